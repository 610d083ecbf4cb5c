//! Who reads a timeline, and what they reported.
//!
//! A reader's entry lives as long as its [`ReaderGuard`]: when the connection ends, for whatever reason, what it reported
//! stops counting.
//!
//! Reports are claims. What follows from them (removing WAL, moving a slot) follows from [`Positions`] that are *believed*:
//! nothing beyond the commit LSN of this node, and nothing beyond what this connection sent. The one exception is the
//! first report: a standby that comes back streams again from the start of a segment, while it has more on disk already
//! (spec: postgres clients 4.4).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use parking_lot::Mutex;
use pgproto::Lsn;
use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::replication::message::StandbyStatus;
use tokio::time::Instant;

use super::members::STALE;
use crate::clock;
use crate::metrics::PageserverSample;

/// What a reader last reported, word for word.
#[derive(Clone, Debug, PartialEq)]
pub enum ReaderFeedback {
    /// A Neon page server.
    Pageserver(PageserverFeedback),
    /// A stock reader.
    Standby {
        /// Its positions.
        status: StandbyStatus,
        /// The transactions it still needs.
        hot_standby: HotStandbyFeedback,
    },
}

/// How far a reader is; 0 = it never said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// Received and written. Of a page server: received and ingested.
    pub write: Lsn,
    /// On its disk.
    pub flush: Lsn,
    /// Replayed. Of a page server: in remote storage.
    pub apply: Lsn,
}

impl Positions {
    fn map(self, change: impl Fn(Lsn) -> Lsn) -> Self {
        Self { write: change(self.write), flush: change(self.flush), apply: change(self.apply) }
    }

    fn highest(self) -> Lsn {
        self.write.max(self.flush).max(self.apply)
    }
}

impl From<&StandbyStatus> for Positions {
    fn from(status: &StandbyStatus) -> Self {
        Self { write: status.write, flush: status.flush, apply: status.apply }
    }
}

impl From<&PageserverFeedback> for Positions {
    fn from(feedback: &PageserverFeedback) -> Self {
        Self {
            write: feedback.last_received_lsn,
            flush: feedback.disk_consistent_lsn,
            apply: feedback.remote_consistent_lsn,
        }
    }
}

/// What came of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What is believed.
    pub positions: Positions,
    /// A position was named that this node hasn't got.
    pub absurd: bool,
}

/// One reader.
#[derive(Clone, Debug)]
pub struct ReaderStatus {
    /// Connection number.
    pub conn_id: u32,
    /// Where it connects from.
    pub addr: SocketAddr,
    /// Its `application_name`.
    pub application_name: Option<String>,
    /// Sent to it so far; before that, where it asked to begin.
    pub sent_lsn: Lsn,
    /// What it last reported, if it did.
    pub feedback: Option<ReaderFeedback>,
    /// What of it is believed.
    pub positions: Positions,
    /// What its first report is good for, beyond what was sent.
    credit: Option<Lsn>,
}

impl ReaderStatus {
    /// What it has in remote storage, if it is a page server that has reported.
    fn pageserver_has(&self) -> Option<Lsn> {
        matches!(self.feedback, Some(ReaderFeedback::Pageserver(_))).then_some(self.positions.apply)
    }

    /// Takes in a report while WAL up to `commit_lsn` is committed here.
    fn report(&mut self, reported: Positions, commit_lsn: Lsn) -> Verdict {
        let highest = reported.highest();
        if highest.is_valid() {
            self.credit.get_or_insert(highest.min(commit_lsn));
        }
        let ceiling = self.sent_lsn.max(self.credit.unwrap_or_default()).min(commit_lsn);
        self.positions = reported.map(|lsn| lsn.min(ceiling));
        // Who named a term was sent WAL beyond the commit LSN.
        Verdict { positions: self.positions, absurd: highest > commit_lsn.max(self.sent_lsn) }
    }
}

#[derive(Default)]
struct Table {
    readers: BTreeMap<u32, ReaderStatus>,
    aggregate: HotStandbyFeedback,
    pageserver: Option<PageserverSample>,
    /// What the page servers that left have in remote storage, and when the last one left: it comes back, here or on another
    /// node.
    left: Option<(Lsn, Instant)>,
}

/// The readers of a timeline.
#[derive(Default)]
pub struct Readers {
    table: Mutex<Table>,
}

impl Readers {
    /// Lists a reader that reads from `start` on, until the guard is dropped.
    pub fn register(
        &self,
        conn_id: u32,
        addr: SocketAddr,
        application_name: Option<String>,
        start: Lsn,
    ) -> ReaderGuard<'_> {
        let reader = ReaderStatus {
            conn_id,
            addr,
            application_name,
            sent_lsn: start,
            feedback: None,
            positions: Positions::default(),
            credit: None,
        };
        self.table.lock().readers.insert(conn_id, reader);
        ReaderGuard { readers: self, conn_id }
    }

    /// All readers.
    pub fn list(&self) -> Vec<ReaderStatus> {
        self.table.lock().readers.values().cloned().collect()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.table.lock().readers.len()
    }

    /// What all hot standbys together still need (spec: semantics 15.5).
    pub fn hot_standby_feedback(&self) -> HotStandbyFeedback {
        self.table.lock().aggregate
    }

    /// What page servers said since the process started.
    pub fn pageserver(&self) -> Option<PageserverSample> {
        self.table.lock().pageserver
    }

    /// What all page servers that are connected, or left not long ago, have in remote storage; `None` when none has reported.
    /// Each serves its own part of the data, so only what the last of them has counts.
    pub fn pageservers_have(&self) -> Option<Lsn> {
        let table = self.table.lock();
        let left = table.left.filter(|(_, since)| since.elapsed() < STALE).map(|(lsn, _)| lsn);
        table.readers.values().filter_map(ReaderStatus::pageserver_has).chain(left).min()
    }

    fn note_pageserver(&self, new: &PageserverFeedback) {
        let mut table = self.table.lock();
        let before = table.pageserver;
        table.pageserver = Some(PageserverSample {
            last_received_lsn: new.last_received_lsn,
            unix_time: clock::unix_seconds(),
            reports: before.map_or(0, |before| before.reports) + 1,
            corruption_detected: new.corruption_detected || before.is_some_and(|before| before.corruption_detected),
        });
    }
}

/// A reader's entry in the table.
pub struct ReaderGuard<'a> {
    readers: &'a Readers,
    conn_id: u32,
}

impl ReaderGuard<'_> {
    /// Changes the entry, and what all entries together ask for.
    fn update<T: Default>(&self, change: impl FnOnce(&mut ReaderStatus) -> T) -> T {
        let mut table = self.readers.table.lock();
        let Some(reader) = table.readers.get_mut(&self.conn_id) else { return T::default() };
        let result = change(reader);
        table.aggregate = aggregate(table.readers.values());
        result
    }

    /// WAL up to `lsn` went out.
    pub fn sent(&self, lsn: Lsn) {
        if let Some(reader) = self.readers.table.lock().readers.get_mut(&self.conn_id) {
            reader.sent_lsn = lsn;
        }
    }

    /// A standby status update arrived while WAL up to `commit_lsn` is committed here.
    pub fn standby_status(&self, new: StandbyStatus, commit_lsn: Lsn) -> Verdict {
        self.update(|reader| {
            let hot_standby = match reader.feedback {
                Some(ReaderFeedback::Standby { hot_standby, .. }) => hot_standby,
                _ => HotStandbyFeedback::default(),
            };
            reader.feedback = Some(ReaderFeedback::Standby { status: new, hot_standby });
            reader.report((&new).into(), commit_lsn)
        })
    }

    /// Hot-standby feedback arrived.
    pub fn hot_standby_feedback(&self, new: HotStandbyFeedback) {
        self.update(|reader| {
            let status = match reader.feedback {
                Some(ReaderFeedback::Standby { status, .. }) => status,
                _ => StandbyStatus::default(),
            };
            reader.feedback = Some(ReaderFeedback::Standby { status, hot_standby: new });
        });
    }

    /// A page server's report arrived while WAL up to `commit_lsn` is committed here.
    pub fn pageserver_feedback(&self, new: PageserverFeedback, commit_lsn: Lsn) -> Verdict {
        self.readers.note_pageserver(&new);
        self.update(|reader| {
            let reported = (&new).into();
            // It never has more than where it asked to begin, so that its first report isn't worth more than later ones.
            reader.credit = Some(Lsn::INVALID);
            reader.feedback = Some(ReaderFeedback::Pageserver(new));
            reader.report(reported, commit_lsn)
        })
    }

    /// Whether this is a page server, or nobody yet, that has everything below `commit_lsn` in remote storage.
    pub fn pageserver_has(&self, commit_lsn: Lsn) -> bool {
        let table = self.readers.table.lock();
        table.readers.get(&self.conn_id).is_some_and(|reader| match &reader.feedback {
            Some(ReaderFeedback::Pageserver(feedback)) => feedback.remote_consistent_lsn >= commit_lsn,
            Some(ReaderFeedback::Standby { .. }) => false,
            None => !commit_lsn.is_valid(),
        })
    }
}

impl Drop for ReaderGuard<'_> {
    fn drop(&mut self) {
        let mut table = self.readers.table.lock();
        let reader = table.readers.remove(&self.conn_id);
        if let Some(lsn) = reader.as_ref().and_then(ReaderStatus::pageserver_has) {
            let others = table.left.filter(|(_, since)| since.elapsed() < STALE);
            table.left = Some((others.map_or(lsn, |(other, _)| lsn.min(other)), Instant::now()));
        }
        table.aggregate = aggregate(table.readers.values());
    }
}

fn aggregate<'a>(readers: impl Iterator<Item = &'a ReaderStatus>) -> HotStandbyFeedback {
    let asked = |reader: &ReaderStatus| match &reader.feedback {
        Some(ReaderFeedback::Standby { hot_standby, .. }) => Some(*hot_standby),
        _ => None,
    };
    let wants = |feedback: &HotStandbyFeedback| feedback.xmin != 0 || feedback.catalog_xmin != 0;
    readers.filter_map(asked).filter(wants).fold(HotStandbyFeedback::default(), HotStandbyFeedback::merge)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feedback(timestamp: i64, xmin: u64, catalog_xmin: u64) -> HotStandbyFeedback {
        HotStandbyFeedback { timestamp, xmin, catalog_xmin }
    }

    fn status(write: u64, flush: u64, apply: u64) -> StandbyStatus {
        StandbyStatus { write: Lsn(write), flush: Lsn(flush), apply: Lsn(apply), ..StandbyStatus::default() }
    }

    fn positions(write: u64, flush: u64, apply: u64) -> Positions {
        Positions { write: Lsn(write), flush: Lsn(flush), apply: Lsn(apply) }
    }

    fn stored(remote_consistent_lsn: u64) -> PageserverFeedback {
        PageserverFeedback { remote_consistent_lsn: Lsn(remote_consistent_lsn), ..PageserverFeedback::default() }
    }

    fn addr() -> SocketAddr {
        "127.0.0.1:1".parse().unwrap()
    }

    #[test]
    fn feedback_is_the_minimum_of_what_is_set_and_ends_with_the_reader() {
        let readers = Readers::default();
        let a = readers.register(1, addr(), None, Lsn(1));
        let b = readers.register(2, addr(), None, Lsn(1));
        assert_eq!(readers.hot_standby_feedback(), HotStandbyFeedback::default());
        a.hot_standby_feedback(feedback(10, 700, 0));
        b.hot_standby_feedback(feedback(5, 600, 900));
        assert_eq!(readers.hot_standby_feedback(), feedback(10, 600, 900));
        drop(b);
        assert_eq!(readers.hot_standby_feedback(), feedback(10, 700, 0));
        a.hot_standby_feedback(feedback(11, 0, 0));
        assert_eq!(readers.hot_standby_feedback(), HotStandbyFeedback::default());
    }

    #[test]
    fn a_returning_standby_may_report_more_than_it_was_sent_and_others_may_not() {
        let readers = Readers::default();
        let reader = readers.register(1, addr(), None, Lsn(100));
        // It has 150 on disk, and is sent its segment once more.
        assert_eq!(reader.standby_status(status(100, 150, 150), Lsn(500)).positions, positions(100, 150, 150));
        reader.sent(Lsn(120));
        assert_eq!(reader.standby_status(status(120, 150, 150), Lsn(500)).positions, positions(120, 150, 150));
        let early = reader.standby_status(status(120, 400, 0), Lsn(500));
        assert_eq!(early, Verdict { positions: positions(120, 150, 0), absurd: false });
        reader.sent(Lsn(450));
        assert_eq!(reader.standby_status(status(450, 400, 300), Lsn(500)).positions, positions(450, 400, 300));
        let absurd = reader.standby_status(status(u64::MAX, 501, 300), Lsn(500));
        assert_eq!(absurd, Verdict { positions: positions(450, 450, 300), absurd: true });
    }

    #[test]
    fn a_first_report_is_believed_up_to_the_commit_lsn_of_then() {
        let readers = Readers::default();
        let reader = readers.register(1, addr(), None, Lsn(100));
        assert_eq!(reader.standby_status(status(0, 0, 0), Lsn(200)).positions, Positions::default());
        let first = reader.standby_status(status(u64::MAX, u64::MAX, 0), Lsn(200));
        assert_eq!(first, Verdict { positions: positions(200, 200, 0), absurd: true });
        let later = reader.standby_status(status(u64::MAX, u64::MAX, 0), Lsn(300));
        assert_eq!(later.positions, positions(200, 200, 0), "nothing was sent");
    }

    #[test]
    fn the_first_report_of_a_page_server_is_not_believed_beyond_what_was_sent() {
        let readers = Readers::default();
        let reader = readers.register(1, addr(), None, Lsn(100));
        let verdict = reader.pageserver_feedback(stored(u64::MAX), Lsn(500));
        assert_eq!((verdict.positions.apply, verdict.absurd), (Lsn(100), true));
    }

    #[test]
    fn wal_is_remote_once_every_page_server_has_it() {
        let readers = Readers::default();
        assert_eq!(readers.pageservers_have(), None);
        let a = readers.register(1, addr(), None, Lsn(100));
        let b = readers.register(2, addr(), None, Lsn(100));
        let standby = readers.register(3, addr(), None, Lsn(100));
        a.pageserver_feedback(stored(80), Lsn(500));
        standby.standby_status(status(10, 10, 10), Lsn(500));
        assert_eq!(readers.pageservers_have(), Some(Lsn(80)));
        b.pageserver_feedback(stored(60), Lsn(500));
        assert_eq!(readers.pageservers_have(), Some(Lsn(60)));
        drop(b);
        a.pageserver_feedback(stored(501), Lsn(500));
        assert_eq!(readers.pageservers_have(), Some(Lsn(60)), "the other one comes back");
        readers.table.lock().left = Instant::now().checked_sub(STALE).map(|long_ago| (Lsn(60), long_ago));
        assert_eq!(readers.pageservers_have(), Some(Lsn(100)), "no more than was sent");
    }
}
