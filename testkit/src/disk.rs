//! A disk that is small enough to be filled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::programs::run;

/// The file that takes up the rest of the disk.
const FILLER: &str = "filler";

/// A file system in memory of a fixed size, mounted at a directory for as long as this value lives.
#[derive(Debug)]
pub struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts one of so many megabytes at `dir`, which is made unless it is there. `None` where that isn't allowed: who isn't root.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn mount(dir: &Path, megabytes: u64) -> Result<Option<SmallDisk>> {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let size = format!("size={megabytes}m,mode=0755");
        let mounted = run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "safekeeper-test"]).arg(dir));
        Ok(mounted.is_ok().then(|| SmallDisk { dir: dir.to_owned() }))
    }

    /// Leaves no space.
    ///
    /// # Errors
    /// When there is still some.
    pub fn fill(&self) -> Result<()> {
        let mut filler = fs::OpenOptions::new().create(true).append(true).open(self.dir.join(FILLER))?;
        let zeros = vec![0u8; 1 << 20];
        // Smaller and smaller pieces, as long as one fits.
        for size in [1 << 20, 64 << 10, 4 << 10] {
            while std::io::Write::write_all(&mut filler, zeros.get(..size).unwrap_or_default()).is_ok() {}
        }
        Ok(())
    }

    /// Was it filled, and not freed since?
    #[must_use]
    pub fn is_filled(&self) -> bool {
        self.dir.join(FILLER).exists()
    }

    /// Gives the space back.
    ///
    /// # Errors
    /// When it wasn't filled.
    pub fn free(&self) -> Result<()> {
        fs::remove_file(self.dir.join(FILLER)).context("the filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Even while a process that was just killed is still there.
        let _ = Command::new("umount").arg("--lazy").arg(&self.dir).output();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_nothing_until_it_is_freed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let Some(disk) = SmallDisk::mount(&path, 2).unwrap() else {
            println!("LEFT OUT, file systems cannot be mounted here: full disks");
            return;
        };
        disk.fill().unwrap();
        assert!(disk.is_filled());
        let error = fs::write(path.join("file"), [1; 8192]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        disk.free().unwrap();
        assert!(!disk.is_filled());
        fs::write(path.join("file"), [1; 8192]).unwrap();
        drop(disk);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0, "it is still mounted");
    }
}
