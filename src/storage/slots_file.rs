//! The file with a timeline's replication slots: `safekeeper.control.slots`, a line with the checksum and then JSON.
//!
//! ```text
//! safekeeper slots 1 <crc32c of all that follows, 8 hex digits>\n
//! <JSON>
//! ```
//!
//! It is replaced as a whole, durably. What the JSON means is the business of `timeline::slots`.

use super::disk::{DiskError, During, read_file, replace_file};
use super::segments::TimelineFiles;

const FILE_NAME: &str = "safekeeper.control.slots";

/// What the first line begins with: the format and its version.
const TITLE: &str = "safekeeper slots 1 ";

/// Largest file that is read: several times what the limits on slots allow.
const MAX_LENGTH: usize = 1 << 20;

/// Why there is a file, and no slots in it.
#[derive(Debug, thiserror::Error)]
pub enum SlotsFileError {
    /// It can't be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It isn't what was written.
    #[error("{FILE_NAME} is damaged: {0}")]
    Damaged(&'static str),
}

impl TimelineFiles {
    /// The JSON that was saved last; `None` if none ever was.
    pub fn load_slots(&self) -> Result<Option<Vec<u8>>, SlotsFileError> {
        let path = self.dir().join(FILE_NAME);
        let content = match super::blocking(|| read_file(self.disk(), &path, MAX_LENGTH)) {
            Ok(content) => content,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(unseal(&content).map_err(SlotsFileError::Damaged)?))
    }

    /// Replaces the file durably: after a crash there is the old one or the new one.
    pub fn save_slots(&self, json: &[u8]) -> Result<(), DiskError> {
        super::blocking(|| replace_file(self.disk(), &self.dir(), FILE_NAME, &seal(json)))
    }

    /// Gives a damaged file another name, so that the next one that is saved doesn't destroy it.
    pub fn set_slots_aside(&self) -> Result<(), DiskError> {
        let path = self.dir().join(FILE_NAME);
        let aside = self.dir().join(format!("{FILE_NAME}.damaged"));
        super::blocking(|| self.disk().rename(&path, &aside)).during("rename", &path)
    }
}

fn seal(json: &[u8]) -> Vec<u8> {
    let mut content = format!("{TITLE}{:08x}\n", crc32c::crc32c(json)).into_bytes();
    content.extend_from_slice(json);
    content
}

fn unseal(content: &[u8]) -> Result<Vec<u8>, &'static str> {
    let line_end = content.iter().position(|&byte| byte == b'\n').ok_or("it has no first line")?;
    let (line, json) = content.split_at_checked(line_end).ok_or("it has no first line")?;
    let json = json.strip_prefix(b"\n").unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| "its first line is not text")?;
    let checksum = line.strip_prefix(TITLE).ok_or("it is of another format or version")?;
    let checksum = u32::from_str_radix(checksum, 16).map_err(|_| "its checksum can't be read")?;
    if checksum == crc32c::crc32c(json) { Ok(json.to_vec()) } else { Err("its checksum is wrong") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::simdisk::Survivors;

    #[test]
    fn what_was_saved_is_there_after_a_crash() {
        let (disk, files) = TimelineFiles::simulated();
        assert!(files.load_slots().unwrap().is_none());
        files.save_slots(b"[1]").unwrap();
        files.save_slots(b"[1,2]").unwrap();
        disk.crash(Survivors::Nothing);
        assert_eq!(files.load_slots().unwrap().unwrap(), b"[1,2]");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let good = seal(b"{\"slots\":[]}");
        assert_eq!(unseal(&good).unwrap(), b"{\"slots\":[]}");
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // The checksum's digits may change their case.
                if !bad.eq_ignore_ascii_case(&good) || bad[TITLE.len() + 9..] != good[TITLE.len() + 9..] {
                    assert!(unseal(&bad).is_err(), "bit {bit} of byte {at}");
                }
            }
            assert!(unseal(&good[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_damaged_file_is_kept_beside_the_next_one() {
        let (disk, files) = TimelineFiles::simulated();
        files.save_slots(b"[1]").unwrap();
        files.set_slots_aside().unwrap();
        assert!(files.load_slots().unwrap().is_none());
        files.save_slots(b"[2]").unwrap();
        disk.crash(Survivors::Nothing);
        assert_eq!(files.load_slots().unwrap().unwrap(), b"[2]");
        assert!(files.disk().exists(&files.dir().join("safekeeper.control.slots.damaged")).unwrap());
    }
}
