//! WAL that was set aside on a node when a newer leader cut it off: lists it, and exports it as segments for `pg_waldump`.
//!
//! It comes from a running node by HTTP, or from the data directory of one that is stopped. What was exported is compared with the
//! checksum that was made when it was set aside. A file that is there already with the same content is left as it is, any
//! other is never replaced; a file with its final name is complete.

mod export;
mod source;

use std::fmt;
use std::path::{Path, PathBuf};

use pgproto::{HostPort, Lsn, TenantTimelineId};

use super::node_api::NodeApiError;
use super::{Kind, Steps};
use crate::http::forks::ForkReport;
use crate::storage::{DataDirError, ForkError, OpenError};
use source::Source;

/// Where forks are looked for.
#[derive(Clone, Debug)]
pub struct ForksOptions {
    /// The node that has them.
    pub place: ForksPlace,
    /// The timeline; if not given, the only one that the node has.
    pub ttid: Option<TenantTimelineId>,
}

/// A node.
#[derive(Clone, Debug)]
pub enum ForksPlace {
    /// That runs: its HTTP endpoint.
    Node(HostPort),
    /// That is stopped. Its files are brought up to date with its journal, as a start would.
    Stopped {
        /// Its data directory.
        datadir: PathBuf,
        /// Its journal, if that isn't in the data directory.
        journal_dir: Option<PathBuf>,
    },
}

impl fmt::Display for ForksPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ForksPlace::Node(node) => node.fmt(f),
            ForksPlace::Stopped { datadir, .. } => write!(f, "\"{}\"", datadir.display()),
        }
    }
}

/// The forks of a timeline.
#[derive(Debug, serde::Serialize)]
pub struct ForkList {
    /// The node: its HTTP endpoint, or its directory.
    pub place: String,
    /// The timeline.
    pub ttid: TenantTimelineId,
    /// The oldest first.
    pub forks: Vec<ForkReport>,
}

/// What was exported.
#[derive(Debug, serde::Serialize)]
pub struct Exported {
    /// Each fork.
    pub forks: Vec<ExportedFork>,
}

/// A fork, as segments in a directory.
#[derive(Debug, serde::Serialize)]
pub struct ExportedFork {
    /// Its number.
    pub number: u64,
    /// Where its segments are, and `fork.json`, which says what it is.
    pub directory: PathBuf,
    /// The segments.
    pub files: Vec<PathBuf>,
    /// Before this in the first segment there are zeros: that WAL isn't on the node any more. Otherwise that segment's begin.
    pub whole_from_lsn: Lsn,
    /// Begin of the fork.
    pub from_lsn: Lsn,
    /// End of what was kept.
    pub kept_to_lsn: Lsn,
    /// End of the last whole record; the begin if there is none.
    pub records_end_lsn: Lsn,
    /// Whether all WAL in it is as it was set aside.
    pub intact: bool,
    /// How to look at it: one command for each Postgres timeline in it.
    pub look: Vec<String>,
}

/// Why there is no list or export.
#[derive(Debug, thiserror::Error)]
pub enum ForksError {
    /// The node gives no answer that can be used.
    #[error(transparent)]
    Node(#[from] NodeApiError),
    /// The directory of the stopped node can't be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The timeline in it can't.
    #[error(transparent)]
    Timeline(#[from] OpenError),
    /// A fork in it can't be read.
    #[error("fork {number}: {source}")]
    Fork {
        /// Its number.
        number: u64,
        /// Why.
        source: ForkError,
    },
    /// None was named, and there isn't exactly one.
    #[error("{place} has {count} timelines: name one with --tenant-id and --timeline-id")]
    WhichTimeline {
        /// The node.
        place: String,
        /// How many.
        count: usize,
    },
    /// There is no such fork.
    #[error("{place} has no fork {name:?} of timeline {ttid}: `timeline forks list` shows all")]
    NoSuchFork {
        /// The node.
        place: String,
        /// The timeline.
        ttid: TenantTimelineId,
        /// As it was called.
        name: String,
    },
    /// A file that isn't the one to be written is in the way.
    #[error("\"{}\" is there already and has other content: export to an empty directory", path.display())]
    InTheWay {
        /// The file.
        path: PathBuf,
    },
    /// A file can't be written.
    #[error("\"{}\": {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// All that there is was exported, but some isn't what was set aside.
    #[error(
        "exported, but the WAL in {} isn't what was set aside: it was damaged on disk, or on its way",
        list_numbers(damaged)
    )]
    Damaged {
        /// Numbers of the forks.
        damaged: Vec<u64>,
    },
}

fn list_numbers(numbers: &[u64]) -> String {
    let numbers: Vec<String> = numbers.iter().map(|number| format!("fork {number}")).collect();
    numbers.join(", ")
}

impl ForksError {
    /// What to make of it.
    pub fn kind(&self) -> Kind {
        match self {
            ForksError::Node(_) | ForksError::Fork { .. } | ForksError::Write { .. } | ForksError::Damaged { .. } => {
                Kind::Failed
            }
            ForksError::DataDir(_)
            | ForksError::Timeline(_)
            | ForksError::WhichTimeline { .. }
            | ForksError::NoSuchFork { .. }
            | ForksError::InTheWay { .. } => Kind::Refused,
        }
    }
}

/// Lists them.
///
/// # Errors
/// See [`ForksError`].
pub async fn list(options: &ForksOptions) -> Result<ForkList, ForksError> {
    let source = Source::open(options).await?;
    Ok(ForkList { place: options.place.to_string(), ttid: source.ttid(), forks: source.list().await? })
}

/// Exports the fork called `name` (its number, or the name of its file) to segment files in `output`, or each of all to a directory of
/// its own in there, with its number as name.
///
/// # Errors
/// See [`ForksError`].
pub async fn export(
    options: &ForksOptions,
    name: Option<&str>,
    output: &Path,
    steps: &Steps,
) -> Result<Exported, ForksError> {
    let source = Source::open(options).await?;
    let all = source.list().await?;
    let wanted: Vec<(u64, PathBuf)> = match name {
        None => all.iter().map(|fork| (fork.number, output.join(fork.number.to_string()))).collect(),
        Some(name) => {
            let found = all.iter().find(|fork| fork.number.to_string() == name || fork.file == name);
            let none = || ForksError::NoSuchFork {
                place: options.place.to_string(),
                ttid: source.ttid(),
                name: name.to_owned(),
            };
            vec![(found.ok_or_else(none)?.number, output.to_owned())]
        }
    };
    let mut forks = Vec::new();
    for (number, directory) in wanted {
        let step = steps.begin("export", format!("fork {number} to \"{}\"", directory.display()));
        let fork = export::one(&source, number, directory).await?;
        step.done(format!("fork {number}: {} segments, {}", fork.files.len(), fork.verdict()));
        forks.push(fork);
    }
    let damaged: Vec<u64> = forks.iter().filter(|fork| !fork.intact).map(|fork| fork.number).collect();
    if damaged.is_empty() { Ok(Exported { forks }) } else { Err(ForksError::Damaged { damaged }) }
}

impl ExportedFork {
    fn verdict(&self) -> String {
        let Self { from_lsn, kept_to_lsn, records_end_lsn, intact, .. } = self;
        let checked = if *intact { "as it was set aside" } else { "not what was set aside" };
        format!("WAL from {from_lsn} to {kept_to_lsn}, whole records up to {records_end_lsn}, {checked}")
    }
}

impl fmt::Display for ForkList {
    /// A table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.forks.is_empty() {
            return write!(f, "{}: nothing was set aside of timeline {}", self.place, self.ttid);
        }
        write!(
            f,
            "{:>6}  {:>17}  {:>17}  {:>11}  {:>5}  {:>6}  set aside",
            "number", "from", "to", "bytes", "term", "cut by"
        )?;
        for fork in &self.forks {
            let when = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(fork.unix_time));
            let when = when.map_or_else(String::new, |when| humantime::format_rfc3339_seconds(when).to_string());
            let bytes = fork.kept_to_lsn.saturating_sub(fork.from_lsn);
            let (from, to) = (fork.from_lsn.to_string(), fork.to_lsn.to_string());
            let (term, cut_by) = (fork.term, fork.cut_by_term);
            write!(f, "\n{:>6}  {from:>17}  {to:>17}  {bytes:>11}  {term:>5}  {cut_by:>6}  {when}", fork.number)?;
            write!(f, "\n        {}", fork.reason)?;
        }
        Ok(())
    }
}

impl fmt::Display for Exported {
    /// What to do next.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.forks.is_empty() {
            return write!(f, "nothing was set aside");
        }
        write!(f, "look at it with:")?;
        self.forks.iter().flat_map(|fork| &fork.look).try_for_each(|look| write!(f, "\n  {look}"))
    }
}
