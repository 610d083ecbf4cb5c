//! Where settings come from and what is said about wrong ones.

use std::io::Write;
use std::process::Command as Process;

use clap::CommandFactory;
use pgproto::NodeId;

use super::*;

fn safekeeper(args: &[&str]) -> Result<Loaded<SafekeeperSettings>, ConfigError> {
    load(std::iter::once("safekeeper").chain(args.iter().copied()))
}

fn walproposer(args: &[&str]) -> Result<Loaded<WalproposerSettings>, ConfigError> {
    load(std::iter::once("walproposer").chain(args.iter().copied()))
}

fn walreceiver(args: &[&str]) -> Result<Loaded<WalreceiverSettings>, ConfigError> {
    load(std::iter::once("walreceiver").chain(args.iter().copied()))
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn with_file(text: &str, more: &[&str]) -> Result<Loaded<SafekeeperSettings>, ConfigError> {
    let file = file(text);
    let path = file.path().to_str().unwrap();
    safekeeper(&[&["--config", path], more].concat())
}

#[test]
fn the_commands_are_well_formed() {
    foreign::add_to(SafekeeperSettings::command(), SafekeeperSettings::FOREIGN).debug_assert();
    WalproposerSettings::command().debug_assert();
    WalreceiverSettings::command().debug_assert();
}

#[test]
fn defaults_are_neons() {
    let loaded = safekeeper(&[]).unwrap();
    assert_eq!(loaded.settings.datadir, Path::new("./"));
    assert_eq!(loaded.settings.listen_pg.to_string(), "127.0.0.1:5454");
    assert_eq!(loaded.settings.listen_http.to_string(), "127.0.0.1:7676");
    assert_eq!((loaded.settings.id, loaded.settings.no_sync), (None, false));
    assert_eq!(loaded.warnings, Vec::<String>::new());
}

/// Three of which this one is one were taken for four, of which no two may fail, and nothing said why.
#[test]
fn a_safekeeper_that_is_not_among_its_peers_by_name_is_told_how_it_counts() {
    let warnings = |peers: &str, own: &str| {
        let upstream = ["--upstream", "host=db", "--peers", peers, "--advertise-pg", own];
        safekeeper(&upstream).unwrap().warnings
    };
    assert_eq!(warnings("a:1,b:1,c:1", "a:1"), Vec::<String>::new());
    assert_eq!(warnings("b:1,c:1", "a:1"), Vec::<String>::new());
    let told = warnings("a:1,b:1,c:1", "10.0.0.1:1");
    assert!(
        told.len() == 1 && told[0].contains("counted as one more: 4") && told[0].contains("--advertise-pg"),
        "{told:?}"
    );
}

#[test]
fn short_and_repeated_flags() {
    let settings = safekeeper(&["-D", "a", "-D", "b", "-l", "h:1", "-n", "--id", "7"]).unwrap().settings;
    assert_eq!(settings.datadir, Path::new("b"));
    assert_eq!((settings.listen_pg.port, settings.no_sync, settings.id), (1, true, Some(NodeId(7))));
    assert!(!safekeeper(&["--no-sync", "--no-sync=false"]).unwrap().settings.no_sync);
}

#[test]
fn the_file_replaces_defaults_and_the_flag_wins() {
    let text = "id = 3\nlisten-pg = '0.0.0.0:6000'\nlisten-http = 'h:1'\nno-sync = true\nlog-format = 'json'";
    let settings = with_file(text, &["--listen-http", "h:2"]).unwrap().settings;
    assert_eq!(settings.id, Some(NodeId(3)));
    assert_eq!(settings.listen_pg.to_string(), "0.0.0.0:6000");
    assert_eq!(settings.listen_http.to_string(), "h:2");
    assert_eq!((settings.no_sync, settings.log_format), (true, LogFormat::Json));
    assert!(!with_file(text, &["--no-sync=false"]).unwrap().settings.no_sync);
}

#[test]
fn required_settings_and_lists_may_come_from_the_file() {
    let file = file("primary = 'host=db user=postgres password=secret'\nsafekeepers = ['a:1', 'b:2', '[::1]:3']\n");
    let path = file.path().to_str().unwrap();
    let settings = walproposer(&["--config", path]).unwrap().settings;
    let addresses: Vec<_> = settings.safekeepers.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["a:1", "b:2", "[::1]:3"]);
    assert_eq!(settings.primary.as_ref().unwrap().get_user(), Some("postgres"));
    assert!(!format!("{settings:?}").contains("secret"));
    let settings = walproposer(&["--config", path, "--safekeepers", "x:1,y:1,z:1"]).unwrap().settings;
    assert_eq!(settings.safekeepers.first().unwrap().host, "x");
}

#[test]
fn a_wrong_file_is_an_error_that_names_file_and_key() {
    let cases = [
        ("lisen-pg = 'h:1'", "unknown setting \"lisen-pg\""),
        ("config = 'other'", "unknown setting \"config\""),
        ("init = true", "unknown setting \"init\""),
        ("help = true", "unknown setting \"help\""),
        ("id = 0", "setting \"id\""),
        ("id = 'one'", "expected a whole number"),
        ("listen-pg = 5454", "expected host:port"),
        ("no-sync = 'perhaps'", "setting \"no-sync\""),
        ("log-format = 'xml'", "expected one of: plain, json"),
        ("datadir = { a = 1 }", "setting \"datadir\""),
        ("id = ", "not valid TOML"),
    ];
    for (text, expected) in cases {
        let error = with_file(text, &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let error = safekeeper(&["--config", "/nonexistent.toml"]).unwrap_err().to_string();
    assert!(error.contains("/nonexistent.toml"), "{error}");
}

#[test]
fn a_secret_in_the_file_is_not_repeated() {
    let file = file("primary = 'host=db password=secret bogus'\nsafekeepers = 'a:1'\n");
    let error = walproposer(&["--config", file.path().to_str().unwrap()]).unwrap_err().to_string();
    assert!(error.contains("setting \"primary\"") && !error.contains("secret"), "{error}");
}

#[test]
fn a_wrong_flag_is_an_error() {
    for args in [&["--bogus"][..], &["--id", "0"], &["--listen-pg", "5454"], &["extra"], &["--id"]] {
        assert!(matches!(safekeeper(args), Err(ConfigError::CommandLine(_))), "{args:?}");
    }
    let error = walproposer(&["--safekeepers", "a:1,b:1,c:1"]).unwrap_err().to_string();
    assert!(error.contains("--primary"), "{error}");
    let error = walproposer(&["--primary", "host=x user", "--safekeepers", "a:1"]).unwrap_err().to_string();
    assert!(error.contains("--primary"), "{error}");
}

#[test]
fn combinations_are_checked() {
    let with = |more: &[&str]| walproposer(&[&["--primary", "host=db user=u"], more].concat());
    let three = "a:1,b:1,c:1";
    assert_eq!(with(&["--safekeepers", three]).unwrap().warnings, Vec::<String>::new());
    for (args, expected) in [
        (&["--safekeepers", "a:1,b:1,a:1"][..], "a:1 twice"),
        (&["--safekeepers", three, "--buffer-size", "1KiB"], "too small"),
        (&["--safekeepers", three, "--tenant-id", "cf0480929707ee75372337efaa5ecf96"], "go together"),
    ] {
        let error = with(args).unwrap_err().to_string();
        assert!(error.contains(expected), "{args:?}: {error}");
    }
    for few in ["a:1", "a:1,b:1", "a:1,b:1,c:1,d:1"] {
        assert_eq!(with(&["--safekeepers", few]).unwrap().warnings.len(), 1, "{few}");
    }
    assert_eq!(safekeeper(&["--no-sync"]).unwrap().warnings.len(), 1);
}

#[test]
fn a_receiver_must_know_from_where_and_to_where() {
    let settings =
        walreceiver(&["--safekeepers", "a:1,b:2", "-D", "dir", "-S", "s", "-n", "-s", "1"]).unwrap().settings;
    assert_eq!((settings.safekeepers.len(), settings.no_loop, settings.status_interval), (2, true, 1));
    assert!(walreceiver(&["--safekeepers", "a:1", "--slot", "s", "--create-slot"]).is_ok());
    assert!(walreceiver(&["--verify", "dir"]).is_ok());
    for (args, expected) in [
        (&["-D", "dir"][..], "--safekeepers is missing"),
        (&["--safekeepers", "a:1"], "--directory DIR or --stdout"),
        (&["--safekeepers", "a:1", "--stdout", "-Z", "lz4"], "--compress is for a directory"),
        (&["--safekeepers", "a:1", "--stdout", "-D", "dir"], "cannot be used with"),
        (&["--safekeepers", "a:1", "--create-slot"], "--slot"),
        (&["--safekeepers", "a:1", "-D", "dir", "--start", "here"], "expected \"current\", \"oldest\", or an LSN"),
        (&["--safekeepers", "a:1", "-D", "dir", "--compress", "rar"], "rar"),
        (&["--safekeepers", "a:1", "-D", "d", "--tenant-id", "cf0480929707ee75372337efaa5ecf96"], "go together"),
    ] {
        let error = walreceiver(args).unwrap_err().to_string();
        assert!(error.contains(expected), "{args:?}: {error}");
    }
}

#[test]
fn neons_flags_warn_or_refuse() {
    let args = ["--id", "1", "--heartbeat-timeout", "5s", "--broker-endpoint", "http://127.0.0.1:50051"];
    let extras = ["--enable-offload", "--delete-offloaded-wal", "--partial-backup-timeout", "10s"];
    let loaded = safekeeper(&[&args[..], &extras].concat()).unwrap();
    assert_eq!(loaded.settings.id, Some(NodeId(1)));
    assert_eq!(loaded.warnings.len(), 5, "{:?}", loaded.warnings);
    for flag in ["remote-storage", "pg-auth-public-key-path", "listen-https", "max-timeline-disk-usage-bytes"] {
        let error = safekeeper(&[&format!("--{flag}"), "x"]).unwrap_err();
        assert!(matches!(error, ConfigError::Unsupported { .. }), "{flag}: {error}");
        assert!(error.to_string().starts_with(&format!("--{flag} is not supported by this version: ")), "{error}");
    }
    let off = safekeeper(&["--pg-auth-public-key-path", "", "--max-timeline-disk-usage-bytes", "0"]).unwrap();
    assert_eq!(off.warnings, Vec::<String>::new());
    assert!(with_file("remote-storage = '{}'", &[]).is_err());
    assert!(safekeeper(&["--enable-tls-wal-service-api", "--id", "1"]).is_err());
}

/// The environment belongs to the process, so the test runs itself again in one with the variables set.
#[test]
fn the_environment_wins_over_the_file_and_loses_to_the_flag() {
    let file = file("id = 3\nlisten-pg = 'file:1'\nlisten-http = 'file:2'\nno-sync = false\n");
    let child = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", "config::tests::in_the_environment", "--ignored", "--nocapture"])
        .env("SAFEKEEPER_CONFIG", file.path())
        .env("SAFEKEEPER_LISTEN_PG", "env:1")
        .env("SAFEKEEPER_LISTEN_HTTP", "env:2")
        .env("SAFEKEEPER_NO_SYNC", "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "run by the test above in a process of its own"]
fn in_the_environment() {
    let settings = safekeeper(&["--listen-http", "flag:2"]).unwrap().settings;
    assert_eq!(settings.id, Some(NodeId(3)));
    assert_eq!(settings.listen_pg.to_string(), "env:1");
    assert_eq!(settings.listen_http.to_string(), "flag:2");
    assert!(settings.no_sync);
}

#[test]
fn help_teaches() {
    for (mut command, flags) in [
        (
            SafekeeperSettings::command(),
            &["--datadir", "SAFEKEEPER_LISTEN_PG", "Examples:", "[default: 127.0.0.1:7676]"],
        ),
        (WalproposerSettings::command(), &["--buffer-size", "WALPROPOSER_SLOT", "Examples:", "[default: 64MiB]"]),
        (WalreceiverSettings::command(), &["--endpos", "WALRECEIVER_SLOT", "Examples:", "[default: current]"]),
        (SafekeeperctlSettings::command(), &["--nodes", "SAFEKEEPERCTL_TIMEOUT", "Examples:", "[default: 5min]"]),
    ] {
        let help = command.render_long_help().to_string();
        for text in flags {
            assert!(help.contains(text), "{text} is missing in:\n{help}");
        }
        assert!(!help.contains("broker-endpoint"));
    }
}

/// The row of a setting: flag, variable, default, meaning.
fn row(arg: &Arg) -> String {
    let short = arg.get_short().map(|short| format!(", `-{short}`")).unwrap_or_default();
    let name = match arg.get_long() {
        Some(long) => format!("`--{long}`{short}"),
        None => format!("`{}`", arg.get_value_names().unwrap()[0]),
    };
    let env = arg.get_env().map(|env| format!("`{}`", env.to_str().unwrap())).unwrap_or_default();
    let shown = !matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::Version);
    let defaults: Vec<_> = arg.get_default_values().iter().filter_map(|value| value.to_str()).collect();
    let default = if shown && !defaults.is_empty() { format!("`{}`", defaults.join(",")) } else { String::new() };
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let help = help.replace("\n\n", " ").replace('|', "\\|");
    let help = if help.ends_with('.') { help } else { format!("{help}.") };
    format!("| {name} | {env} | {default} | {help} |\n")
}

/// All settings of a program.
fn reference<S: Settings>() -> String {
    let rows: String = S::command().get_arguments().map(row).collect();
    format!("| Flag | Environment | Default | Meaning |\n|---|---|---|---|\n{rows}")
}

/// What each command of a program takes beside them.
fn of_commands(parent: &Command, path: &str) -> String {
    let rows = parent.get_subcommands().map(|command| {
        let path = format!("{path} {}", command.get_name()).trim_start().to_owned();
        let own: String = command.get_arguments().map(|arg| format!("| `{path}` {}", row(arg))).collect();
        own + &of_commands(command, &path)
    });
    rows.collect()
}

#[test]
fn the_document_has_every_setting() {
    let doc = include_str!("../../docs/configuration.md");
    for (heading, table) in [
        ("## safekeeper", reference::<SafekeeperSettings>()),
        ("## walproposer", reference::<WalproposerSettings>()),
        ("## walreceiver", reference::<WalreceiverSettings>()),
        ("## safekeeperctl", reference::<SafekeeperctlSettings>()),
        ("## safekeeperctl", of_commands(&SafekeeperctlSettings::command(), "")),
    ] {
        let section = doc.split_once(&format!("{heading}\n")).map(|(_, rest)| rest).unwrap_or_default();
        let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
        assert!(section.contains(&table), "under \"{heading}\", docs/configuration.md shall have:\n\n{table}");
    }
}

#[test]
fn the_document_lists_neons_flags() {
    let doc = include_str!("../../docs/configuration.md");
    for flag in SafekeeperSettings::FOREIGN {
        assert!(doc.contains(&format!("`--{}`", flag.name())), "docs/configuration.md shall have --{}", flag.name());
    }
}
