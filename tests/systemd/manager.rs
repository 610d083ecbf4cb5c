//! A systemd of the test's own: process 1 of a process namespace of its own, with its own units, in a control group of its
//! own. It shares the network and the programs with everybody, and nothing else that it could disturb.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testkit::{Daemon, Launch, Scratch, secs, wait_for};

/// What every service needs of the units that come with systemd: here they do nothing.
const TARGETS: [&str; 7] = [
    "basic.target",
    "multi-user.target",
    "network-online.target",
    "network.target",
    "shutdown.target",
    "sysinit.target",
    "umount.target",
];

/// Puts itself into the control groups given behind the directory, then becomes a systemd in namespaces of its own. In there, `/opt`
/// has the programs and the test's files, whatever the units hide, and directories where state and temporary files go are its own.
const START: &str = r#"
set -eu
dir=$1 programs=$2 systemd=$3
shift 3
for group; do mkdir -p "$group"; echo $$ >"$group/cgroup.procs"; done
exec unshare --mount --pid --uts --ipc --fork --kill-child --mount-proc --propagation private sh -euc '
    mount -t tmpfs tmpfs /run
    mkdir -p /run/systemd/system /run/lock
    mount -t tmpfs -o mode=755 tmpfs /opt
    for name in etc log units; do mkdir /opt/$name; mount --bind "$1/$name" /opt/$name; done
    mkdir /opt/bin; mount --bind "$2" /opt/bin
    mount --bind "$1/lib" /var/lib
    for name in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs $name; done
    exec env -i container=test PATH=$PATH SYSTEMD_UNIT_PATH=/opt/units \
        "$3" --system --unit=basic.target --log-target=console --show-status=no
' sh "$dir" "$programs" "$systemd"
"#;

/// A running systemd.
pub struct Manager {
    dir: PathBuf,
    groups: Vec<PathBuf>,
    daemon: Daemon,
    /// Its process id out here.
    pid: String,
}

impl Manager {
    /// Starts it, if that can be done here; otherwise says why not.
    pub fn start(scratch: &Scratch, programs: &Path) -> Result<Result<Manager, String>> {
        let systemd = ["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
        let Some(systemd) = systemd.into_iter().find(|path| Path::new(path).exists()) else {
            return Ok(Err("no systemd (Debian's package systemd has it)".to_owned()));
        };
        if !rustix::process::geteuid().is_root() {
            return Ok(Err("a systemd of one's own needs root".to_owned()));
        }
        let namespaces =
            Command::new("unshare").args(["--mount", "--pid", "--uts", "--ipc", "--fork", "true"]).output();
        if !namespaces.is_ok_and(|output| output.status.success()) {
            return Ok(Err("namespaces can't be made here".to_owned()));
        }
        let groups = groups()?;
        if groups.is_empty() || groups.iter().any(|group| fs::create_dir(group).is_err()) {
            return Ok(Err("control groups can't be made here".to_owned()));
        }
        let dir = scratch.path().join("systemd");
        for name in ["etc", "log", "lib", "units"] {
            fs::create_dir_all(dir.join(name))?;
        }
        for target in TARGETS {
            fs::write(dir.join("units").join(target), "[Unit]\nDefaultDependencies=no\n")?;
        }
        let launch = Launch::new("sh").args(["-c", START, "sh"]).arg(&dir).arg(programs).arg(systemd).args(&groups);
        let daemon = Daemon::spawn(scratch, "systemd", launch)?;
        let mut manager = Manager { dir, groups, daemon, pid: String::new() };
        manager.wait_running()?;
        Ok(Ok(manager))
    }

    fn wait_running(&mut self) -> Result<()> {
        let unshare = self.daemon.pid().context("its process")?;
        let pid = self.daemon.wait_until(secs(60), "systemd to start", || {
            let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
            let pid = children.split_whitespace().next().context("no child yet")?.to_owned();
            let state = systemctl(&pid, &["is-system-running"])?;
            ensure!(state.trim() == "running", "it is {state:?}");
            Ok(pid)
        })?;
        self.pid = pid;
        Ok(())
    }

    /// Where files are that units see as `/opt/etc`.
    pub fn etc(&self) -> PathBuf {
        self.dir.join("etc")
    }

    /// Where files are that units see as `/var/lib`.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("lib")
    }

    /// What a unit has written to standard error.
    pub fn log(&self, unit: &str) -> String {
        fs::read_to_string(self.dir.join("log").join(unit)).unwrap_or_default()
    }

    /// Installs one of the units in `systemd/`: with the programs under test, and an account that there is.
    pub fn install(&self, unit: &str) -> Result<()> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(unit);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let text = text.replace("/usr/bin/", "/opt/bin/").replace("/etc/safekeeper/", "/opt/etc/");
        let units = self.dir.join("units");
        fs::write(units.join(unit), text)?;
        let own = units.join(format!("{unit}.d"));
        fs::create_dir(&own)?;
        let log = "StandardOutput=append:/opt/log/%n\nStandardError=append:/opt/log/%n\n\
                   ExecStopPost=/bin/echo ended: $SERVICE_RESULT $EXIT_CODE $EXIT_STATUS\n";
        fs::write(own.join("test.conf"), format!("[Service]\nUser=65534\nGroup=65534\n{log}"))?;
        self.systemctl(&["daemon-reload"]).map(drop)
    }

    /// `systemctl ARGS`, which must succeed.
    pub fn systemctl(&self, args: &[&str]) -> Result<String> {
        systemctl(&self.pid, args)
    }

    /// A property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let text = self.systemctl(&["show", "--value", "--property", name, unit])?;
        Ok(text.trim().to_owned())
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // Everything in its namespace ends with it.
        let _ = self.daemon.kill();
        for group in &self.groups {
            let removed = wait_for(secs(30), "the control group to be empty", || remove_group(group));
            if let Err(error) = removed {
                eprintln!("{}: {error:#}", group.display());
            }
        }
    }
}

fn systemctl(pid: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new("nsenter");
    command.args(["--target", pid, "--mount", "--pid", "systemctl"]).args(args);
    let output = command.output()?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{args:?}: {told} {}", String::from_utf8_lossy(&output.stderr));
    Ok(told)
}

/// Control groups for a manager, in those of this process: the one of version 2, or those of version 1 that systemd uses.
fn groups() -> Result<Vec<PathBuf>> {
    let name = format!("safekeeper-test-{}", std::process::id());
    let mine = fs::read_to_string("/proc/self/cgroup")?;
    let place = |prefix: &str| mine.lines().find_map(|line| line.split_once(prefix)).map(|(_, path)| path.to_owned());
    let root = Path::new("/sys/fs/cgroup");
    let unified = [root.join("unified"), root.to_owned()].into_iter().find(|dir| dir.join("cgroup.procs").exists());
    let of = |root: PathBuf, path: String| root.join(path.trim_start_matches('/')).join(&name);
    let named = root.join("systemd");
    let named = named.exists().then(|| place(":name=systemd:")).flatten().map(|path| of(named, path));
    let unified = unified.and_then(|root| place("0::").map(|path| of(root, path)));
    Ok(named.into_iter().chain(unified).collect())
}

/// Groups can be removed from the innermost on, once nobody is in them.
fn remove_group(group: &Path) -> Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_group(&entry.path())?;
        }
    }
    Ok(fs::remove_dir(group)?)
}
