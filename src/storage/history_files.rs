//! `00000002.history`: the history files of the Postgres timelines that this log went through, as the primary wrote them.
//!
//! They are kept to be served. Which timeline a byte belongs to, the control state says ([`pgproto::Ancestry`]), so one that is
//! missing or damaged keeps nothing from going on: it is not served, and the next leader brings it again.
//!
//! What it promises:
//!
//! * When [`TimelineFiles::store_history`] has returned, the files are durable; interrupted, each is the old one or the new one.
//! * [`TimelineFiles::history_file`] gives out what was stored, byte for byte, and nothing that contradicts the log.

use std::io::IoSlice;
use std::path::PathBuf;

use bytes::Bytes;
use pgproto::pg_timeline::parse_history;
use pgproto::walproposer::{HistoryFile, MAX_HISTORY_FILE};
use pgproto::{Ancestry, Lsn, PgTimelineId};

use super::blocking;
use super::disk::{DiskError, During, read_file};
use super::errors::StorageError;
use super::segments::TimelineFiles;

/// Why a history file that is there is not given out.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It isn't what was stored.
    #[error(
        "history file \"{path}\" is damaged: {reason}; it is written again when a primary introduces itself the next time, \
         or copy it from another safekeeper",
        path = path.display()
    )]
    Damaged {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// Whether a history file `told` of a timeline that begins at `begin` isn't of the log with this `ancestry`.
fn contradicts(told: &Ancestry, ancestry: &Ancestry, begin: Lsn) -> bool {
    told.begin_of(told.current()) != Some(begin) || !told.agrees_below(ancestry, begin)
}

impl TimelineFiles {
    /// The history file of an ancestor of the log, or of its newest timeline; `None` when there is none. Also that of a timeline
    /// in between that is no ancestor, if the primary had it: a standby wants the files of all numbers and doesn't start when one
    /// is missing (spec: postgres clients 6.1).
    ///
    /// One of the log's own timelines that names other switch points than the log has is none of this log's: it is left over from a timeline that was cut
    /// off, or its bytes have changed.
    pub fn history_file(&self, timeline: PgTimelineId) -> Result<Option<Bytes>, HistoryError> {
        let ancestry = self.ancestry();
        if timeline > ancestry.current() {
            return Ok(None);
        }
        let path = self.history_path(timeline);
        let content = match blocking(|| read_file(self.disk(), &path, MAX_HISTORY_FILE + 1)) {
            Ok(content) => content,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let damaged = |reason: String| Err(HistoryError::Damaged { path: path.clone(), reason });
        if content.len() > MAX_HISTORY_FILE {
            return damaged(format!("it has more than {MAX_HISTORY_FILE} bytes"));
        }
        match parse_history(timeline, &content) {
            Err(error) => damaged(error.to_string()),
            Ok(told) if ancestry.begin_of(timeline).is_some_and(|begin| contradicts(&told, &ancestry, begin)) => {
                damaged("it contradicts what the log knows of its timelines".to_owned())
            }
            Ok(_) => Ok(Some(content.into())),
        }
    }

    /// The timelines that have a history file here, in order.
    pub fn history_files(&self) -> Result<Vec<PgTimelineId>, DiskError> {
        let dir = self.dir();
        let entries = blocking(|| self.disk().read_dir(&dir).during("list", &dir))?;
        let mut found: Vec<_> = entries.iter().filter_map(|entry| PgTimelineId::of_history_file(&entry.name)).collect();
        found.sort_unstable();
        Ok(found)
    }

    /// Stores files, durably, in place of others of the same name. What is there already isn't written.
    ///
    /// # Errors
    /// A full disk leaves everything as it was, and is waited out.
    pub(super) fn store_history(&self, files: &[HistoryFile]) -> Result<(), StorageError> {
        files.iter().try_for_each(|file| self.store_one(file.timeline, &file.content))
    }

    fn store_one(&self, timeline: PgTimelineId, content: &Bytes) -> Result<(), StorageError> {
        let path = self.history_path(timeline);
        // One that can't be read is written again.
        if read_file(self.disk(), &path, MAX_HISTORY_FILE + 1).is_ok_and(|known| known == *content) {
            return Ok(());
        }
        let partial = path.with_extension("history.partial");
        let write = || {
            let file = self.disk().create(&partial, true).during("create", &partial)?;
            file.write_at(&mut [IoSlice::new(content)], 0).during("write", &partial)?;
            file.sync_all().during("sync", &partial)
        };
        write().map_err(|error| {
            // What there is of it takes space that may be what others wait for.
            let _ = self.disk().remove_file(&partial);
            StorageError::refused_if_full(error)
        })?;
        self.disk().rename(&partial, &path).during("rename into place", &path)?;
        Ok(self.sync_dir()?)
    }

    fn history_path(&self, timeline: PgTimelineId) -> PathBuf {
        self.dir().join(timeline.history_file_name())
    }
}
