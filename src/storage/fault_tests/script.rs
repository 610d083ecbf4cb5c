//! The life that all faults interrupt: three timelines on one node, and the WAL their leaders have.
//!
//! The first timeline gets large batches, a switch of segments, a commit LSN, and a second leader that cuts off a part
//! of what the first one wrote and goes on under the next Postgres timeline; its oldest segments are removed, twice. The
//! second one gets many small batches, some of them together with the first one's; a second leader goes on under the next
//! Postgres timeline and into the next segment, and all of that, with some of what was before, is lost to a third
//! one while it is only journaled. The third one is a Neon compute's: it votes, changes its configuration and its term, and
//! has a leader only after the restart in the middle.

use std::collections::BTreeMap;

use bytes::Bytes;
use pgproto::walproposer::{HistoryFile, StockPrimary, TermLsn};
use pgproto::{Ancestry, Lsn, PgTimelineId, TenantId, TenantTimelineId, Term, TimelineId};

use crate::storage::test_wal::{PG_VERSION, WalWriter};

/// Number of timelines.
pub const TIMELINES: usize = 3;

/// The one with large batches.
pub const BULK: usize = 0;
/// The one with small batches.
pub const SMALL: usize = 1;
/// The one that mostly votes.
pub const VOTER: usize = 2;

/// One thing that happens to the node.
#[derive(Clone, Debug)]
pub enum Step {
    /// A proposer's greeting creates the timeline.
    Create(usize),
    /// A proposer greets it again.
    Greet(usize),
    /// A proposer asks for its vote.
    Vote(usize, u64),
    /// It adopts a configuration of this generation.
    Configure(usize, u32),
    /// An operator fences its leader.
    BumpTerm(usize),
    /// The leader of this term introduces itself, again after a restart, and says where it starts.
    Elect(usize, u64),
    /// The leader of this term sends its next batch.
    Append(usize, u64),
    /// Two leaders send their next batches at the same moment.
    AppendTogether((usize, u64), (usize, u64)),
    /// What is saved lazily is saved.
    SaveLazily(usize),
    /// Nobody needs what is committed any more.
    Remove(usize),
    /// Nobody uses the timeline for a while.
    Park(usize),
    /// All timelines are brought up to date with the journal.
    Checkpoint,
    /// The process ends and starts again.
    Restart,
}

/// A leader and all the WAL it has.
#[derive(Clone, Debug)]
pub struct Leader {
    /// Its history, up to its own term.
    pub history: Vec<TermLsn>,
    /// Its log, from the start of the timeline.
    pub wal: WalWriter,
    /// The same, to be read.
    bytes: Bytes,
    /// Ends of the batches that it sends, oldest first.
    pub batches: Vec<Lsn>,
    /// It never knows of more than this as committed.
    pub commits_up_to: Lsn,
    /// What it tells of its server, if that is a stock one.
    pub stock: Option<StockPrimary>,
}

impl Leader {
    /// The Postgres timelines of its log.
    pub fn ancestry(&self) -> Ancestry {
        self.stock.as_ref().map_or_else(Ancestry::default, |stock| stock.ancestry().unwrap())
    }
}

/// One timeline of the script.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its id.
    pub ttid: TenantTimelineId,
    /// Where its WAL begins.
    pub start: Lsn,
    /// Its leaders by term.
    pub leaders: BTreeMap<Term, Leader>,
}

impl Line {
    fn new(number: u8, start: Lsn) -> Self {
        let ttid = TenantTimelineId { tenant_id: TenantId([7; 16]), timeline_id: TimelineId([number; 16]) };
        Self { ttid, start, leaders: BTreeMap::new() }
    }

    /// Adds a leader that continues `base` (the log of an earlier leader, cut at the end of a batch) with records of
    /// these lengths, one batch each; length 0 is a switch of segments. Returns the end of the batch `fork_after`, up
    /// to which it may commit.
    fn lead(&mut self, term: u64, base: Option<(u64, Lsn)>, records: &[usize], fork_after: usize) -> Lsn {
        let (mut wal, mut history, from) = match base {
            None => (WalWriter::new(self.start), Vec::new(), self.start),
            Some((earlier, fork)) => {
                let earlier = &self.leaders[&Term(earlier)];
                (WalWriter::continuing(&earlier.wal, fork), earlier.history.clone(), fork)
            }
        };
        history.push((term, from.0).into());
        let seed = u8::try_from(term).unwrap().wrapping_mul(31);
        let mut batches = Vec::new();
        for (number, body) in (0u8..).zip(records) {
            match body {
                0 => wal.switch(),
                _ => wal.record(*body, seed.wrapping_add(number)),
            };
            batches.push(wal.position());
        }
        let fork = batches.get(fork_after).copied().unwrap_or(wal.position());
        let bytes = wal.since(self.start);
        self.leaders.insert(Term(term), Leader { history, wal, bytes, batches, commits_up_to: fork, stock: None });
        fork
    }

    /// The leader's server is a stock one: it writes `timeline`, whose ancestors ended at these positions.
    fn on_timeline(&mut self, term: u64, timeline: u32, ancestors: &[(u32, Lsn)]) {
        let line = |(parent, end): &(u32, Lsn)| format!("{parent}\t{end}\tno recovery target specified\n");
        let content = ancestors.iter().map(line).collect::<Vec<_>>().join("\n").into();
        let timeline = PgTimelineId(timeline);
        let history = if ancestors.is_empty() { Vec::new() } else { vec![HistoryFile { timeline, content }] };
        self.leaders.get_mut(&Term(term)).unwrap().stock = Some(StockPrimary {
            pg_version: PG_VERSION,
            server_version: "15.18 (Debian 15.18-1)".to_owned(),
            safekeepers: Vec::new(),
            timeline,
            history,
            fence: None,
        });
    }

    /// The bytes between two positions of a leader's log.
    pub fn wal(&self, term: Term, from: Lsn, to: Lsn) -> Bytes {
        let offset = |lsn: Lsn| usize::try_from(lsn.0 - self.start.0).unwrap();
        self.leaders[&term].bytes.slice(offset(from)..offset(to))
    }
}

/// The timelines and what happens to them, in order.
#[derive(Clone, Debug)]
pub struct Script {
    pub lines: [Line; TIMELINES],
    pub steps: Vec<Step>,
}

impl Script {
    pub fn new() -> Self {
        // In the middle of a segment and of a page; where a server's first segment really begins; elsewhere.
        let mut bulk = Line::new(1, Lsn(0x32_4028));
        let mut small = Line::new(2, Lsn(0x20_0028));
        let mut voter = Line::new(3, Lsn(0x50_2000));
        let fork = bulk.lead(2, None, &[210_000, 100, 210_000, 24, 210_000, 210_000, 0, 50, 20_000, 1_060_000], 7);
        bulk.lead(
            3,
            Some((2, fork)),
            &[90_000, 1_060_000, 300, 70_000, 200_000, 230_000, 40, 200_000, 1_060_000, 500, 24],
            usize::MAX,
        );
        bulk.on_timeline(2, 1, &[]);
        bulk.on_timeline(3, 2, &[(1, fork)]);
        let fork = small.lead(4, None, &[40, 4_000, 24, 9_000, 512, 100, 64_000, 300, 33], 6);
        let switch = small.leaders[&Term(4)].wal.position();
        small.lead(5, Some((4, switch)), &[500, 1_060_000, 300], usize::MAX);
        small.leaders.get_mut(&Term(5)).unwrap().commits_up_to = fork;
        small.on_timeline(4, 1, &[]);
        small.on_timeline(5, 2, &[(1, switch)]);
        small.lead(6, Some((4, fork)), &[77, 12_000, 30_000, 8_192, 25, 50_000, 50_000, 24], usize::MAX);
        small.on_timeline(6, 3, &[(1, fork)]);
        voter.lead(9, None, &[200, 100_000], usize::MAX);
        Self { lines: [bulk, small, voter], steps: steps() }
    }
}

fn steps() -> Vec<Step> {
    use Step::*;
    vec![
        Create(BULK),
        Greet(BULK),
        Vote(BULK, 1),
        Vote(BULK, 2),
        Elect(BULK, 2),
        Append(BULK, 2),
        Create(SMALL),
        Vote(SMALL, 4),
        Elect(SMALL, 4),
        Append(SMALL, 4),
        Append(SMALL, 4),
        Append(BULK, 2),
        AppendTogether((BULK, 2), (SMALL, 4)),
        Append(BULK, 2),
        SaveLazily(BULK),
        Create(VOTER),
        Vote(VOTER, 7),
        Configure(VOTER, 1),
        BumpTerm(VOTER),
        Append(BULK, 2),
        AppendTogether((SMALL, 4), (BULK, 2)),
        Park(BULK),
        Park(VOTER),
        Append(SMALL, 4),
        Append(BULK, 2),
        Append(BULK, 2),
        Checkpoint,
        Append(BULK, 2),
        Append(BULK, 2),
        Append(SMALL, 4),
        Append(SMALL, 4),
        Vote(BULK, 3),
        Elect(BULK, 3),
        Append(BULK, 3),
        Append(BULK, 3),
        AppendTogether((BULK, 3), (SMALL, 4)),
        Append(SMALL, 4),
        Vote(SMALL, 5),
        Elect(SMALL, 5),
        Append(SMALL, 5),
        Append(SMALL, 5),
        Append(SMALL, 5),
        Vote(SMALL, 6),
        Elect(SMALL, 6),
        Append(SMALL, 6),
        SaveLazily(SMALL),
        SaveLazily(BULK),
        Checkpoint,
        Append(SMALL, 6),
        Remove(BULK),
        Restart,
        Greet(VOTER),
        Vote(VOTER, 9),
        Elect(VOTER, 9),
        Elect(BULK, 3),
        Elect(SMALL, 6),
        AppendTogether((SMALL, 6), (VOTER, 9)),
        AppendTogether((BULK, 3), (SMALL, 6)),
        AppendTogether((BULK, 3), (SMALL, 6)),
        Append(SMALL, 6),
        Append(VOTER, 9),
        AppendTogether((BULK, 3), (SMALL, 6)),
        Checkpoint,
        AppendTogether((BULK, 3), (SMALL, 6)),
        SaveLazily(BULK),
        Append(BULK, 3),
        Append(BULK, 3),
        Append(BULK, 3),
        SaveLazily(BULK),
        Checkpoint,
        Remove(BULK),
        Append(BULK, 3),
        Park(SMALL),
    ]
}
