//! Whether the safekeepers' log and a stock primary's WAL are the same, and on which Postgres timeline a leader goes on
//! (spec: postgres clients 8 and 9.8).
//!
//! A leader's own WAL is all of one timeline. It is found where the log among the voters ends: there the log goes on with
//! what the primary has, unless the two parted before. A timeline that ends is the end of a term; the next one begins
//! with a new election.
//!
//! Votes count whole records only. So what the primary left behind when it switched, the begin of a record that never
//! became whole, isn't in the way: it is cut like any tail. A whole record is another matter, its commit may have been
//! acknowledged: then an operator has to decide ([`Divergence`]).

use pgproto::walproposer::{HistoryFile, StockPrimary};
use pgproto::{Ancestry, HostPort, Lsn, PgTimelineId};

/// What a stock primary says of itself before its WAL is proposed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StockServer {
    /// `PG_VERSION_NUM`; 0 = unknown.
    pub pg_version: u32,
    /// Its own text of that; empty = unknown.
    pub server_version: String,
    /// All safekeepers, to be told to each of them.
    pub safekeepers: Vec<HostPort>,
    /// Its timeline and where that comes from.
    pub ancestry: Ancestry,
    /// The history files it has, ascending.
    pub history: Vec<HistoryFile>,
}

impl StockServer {
    /// What the leader of a term that begins at `start` tells, when the best log among the voters ends there and is of
    /// `log`'s timelines; `None`: nobody has WAL.
    pub fn lead_from(&self, start: Lsn, log: Option<&Ancestry>) -> Result<StockPrimary, Divergence> {
        if let Some(log) = log.filter(|log| !self.ancestry.agrees_below(log, start)) {
            return Err(Divergence::between(log, start, &self.ancestry));
        }
        let timeline = self.ancestry.up_to(start).current();
        Ok(StockPrimary {
            pg_version: self.pg_version,
            server_version: self.server_version.clone(),
            safekeepers: self.safekeepers.clone(),
            timeline,
            history: self.history_of(timeline),
            fence: None,
        })
    }

    /// The history files of `timeline` and its ancestors. Its own is there even if the server no longer has it: the newest
    /// one begins with it.
    fn history_of(&self, timeline: PgTimelineId) -> Vec<HistoryFile> {
        let mut files: Vec<_> = self.history.iter().filter(|file| file.timeline <= timeline).cloned().collect();
        let has_ancestors = self.ancestry.begin_of(timeline).is_some_and(Lsn::is_valid);
        if has_ancestors
            && files.last().is_none_or(|newest| newest.timeline != timeline)
            && let Some(newest) = self.history.last()
            && let Some(content) = pgproto::pg_timeline::history_of_ancestor(&newest.content, timeline)
        {
            let content = newest.content.slice_ref(content);
            files.push(HistoryFile { timeline, content });
        }
        files
    }
}

/// The safekeepers' log and the primary's WAL are not the same: an operator has to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Divergence {
    /// The primary was promoted without records that the safekeepers have.
    #[error(
        "the safekeepers have whole records up to {end} on Postgres timeline {log}, but the primary, now on timeline \
         {primary}, left that one at {parted}: commits in between may have been acknowledged, and the primary lacks them. \
         Nothing was changed. Either go back to a server that has this WAL, or, if it may be lost, keep the primary's WAL \
         under another --timeline-id. (`safekeeperctl failover prepare` before a promotion avoids this.)"
    )]
    BeyondFork {
        /// Timeline at the end of the log.
        log: PgTimelineId,
        /// End of the log.
        end: Lsn,
        /// The primary's timeline.
        primary: PgTimelineId,
        /// Up to here both are the same.
        parted: Lsn,
    },
    /// The log is of a timeline that the primary knows nothing of: another server was promoted.
    #[error(
        "the safekeepers' log ends at {end} on Postgres timeline {log}, which is not in the history of the primary's \
         timeline {primary}: they parted at {parted}, another server was promoted or restored. Nothing was changed. Point \
         --primary at the server whose WAL this is, or keep this one's WAL under another --timeline-id"
    )]
    OtherBranch {
        /// Timeline at the end of the log.
        log: PgTimelineId,
        /// End of the log.
        end: Lsn,
        /// The primary's timeline.
        primary: PgTimelineId,
        /// Up to here both are the same.
        parted: Lsn,
    },
    /// The log goes on where the primary's timeline was left by a promoted server.
    #[error(
        "the primary is still on Postgres timeline {primary}, which was left at {parted}: the safekeepers' log, which ends \
         at {end}, is of timeline {log}. This is a former primary, none of its commits is acknowledged. Nothing was \
         changed. Stop it, rewind it with pg_rewind, make it a standby of the new primary, and point --primary at that one"
    )]
    FormerPrimary {
        /// Timeline at the end of the log.
        log: PgTimelineId,
        /// End of the log.
        end: Lsn,
        /// The primary's timeline.
        primary: PgTimelineId,
        /// Where the log left it.
        parted: Lsn,
    },
}

impl Divergence {
    /// What is the matter with a log that ends at `end`, given that the two don't agree below it.
    fn between(log: &Ancestry, end: Lsn, primary: &Ancestry) -> Self {
        // Where the owner of the bytes changes, in either. The last such position below which both are the same:
        let begins = log.branches().iter().chain(primary.branches()).map(|branch| branch.begin);
        let parted = begins.filter(|&begin| primary.agrees_below(log, begin)).max().unwrap_or_default();
        let (ours, theirs) = (log.current(), primary.current());
        if primary.successor(ours).is_some_and(|next| next.begin == parted) {
            Self::BeyondFork { log: ours, end, primary: theirs, parted }
        } else if log.successor(theirs).is_some_and(|next| next.begin == parted) {
            Self::FormerPrimary { log: ours, end, primary: theirs, parted }
        } else {
            Self::OtherBranch { log: ours, end, primary: theirs, parted }
        }
    }
}
