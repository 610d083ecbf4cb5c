//! Who reads a timeline, and what they reported.
//!
//! A reader's entry lives as long as its [`ReaderGuard`]: when the connection ends, for whatever reason, what it reported
//! stops counting.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use parking_lot::Mutex;
use pgproto::Lsn;
use pgproto::feedback::{HotStandbyFeedback, PageserverFeedback};
use pgproto::replication::message::StandbyStatus;

/// What a reader last reported.
#[derive(Clone, Debug, PartialEq)]
pub enum ReaderFeedback {
    /// Nothing, or reports of a page server.
    Pageserver(PageserverFeedback),
    /// A stock reader.
    Standby {
        /// Its positions.
        status: StandbyStatus,
        /// The transactions it still needs.
        hot_standby: HotStandbyFeedback,
    },
}

impl Default for ReaderFeedback {
    fn default() -> Self {
        ReaderFeedback::Pageserver(PageserverFeedback::default())
    }
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
    /// Sent to it so far.
    pub sent_lsn: Lsn,
    /// What it last reported.
    pub feedback: ReaderFeedback,
}

#[derive(Default)]
struct Table {
    readers: BTreeMap<u32, ReaderStatus>,
    aggregate: HotStandbyFeedback,
}

/// The readers of a timeline.
#[derive(Default)]
pub struct Readers {
    table: Mutex<Table>,
}

impl Readers {
    /// Lists a reader until the guard is dropped.
    pub fn register(&self, conn_id: u32, addr: SocketAddr, application_name: Option<String>) -> ReaderGuard<'_> {
        let feedback = ReaderFeedback::default();
        let reader = ReaderStatus { conn_id, addr, application_name, sent_lsn: Lsn::INVALID, feedback };
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
}

/// A reader's entry in the table.
pub struct ReaderGuard<'a> {
    readers: &'a Readers,
    conn_id: u32,
}

impl ReaderGuard<'_> {
    fn update(&self, change: impl FnOnce(&mut ReaderStatus) -> bool) {
        let mut table = self.readers.table.lock();
        let Some(reader) = table.readers.get_mut(&self.conn_id) else { return };
        if change(reader) {
            table.aggregate = aggregate(table.readers.values());
        }
    }

    /// WAL up to `lsn` went out.
    pub fn sent(&self, lsn: Lsn) {
        self.update(|reader| {
            reader.sent_lsn = lsn;
            false
        });
    }

    /// A standby status update arrived.
    pub fn standby_status(&self, new: StandbyStatus) {
        self.update(|reader| {
            let hot_standby = match &reader.feedback {
                ReaderFeedback::Standby { hot_standby, .. } => *hot_standby,
                ReaderFeedback::Pageserver(_) => HotStandbyFeedback::default(),
            };
            reader.feedback = ReaderFeedback::Standby { status: new, hot_standby };
            false
        });
    }

    /// Hot-standby feedback arrived.
    pub fn hot_standby_feedback(&self, new: HotStandbyFeedback) {
        self.update(|reader| {
            let status = match &reader.feedback {
                ReaderFeedback::Standby { status, .. } => *status,
                ReaderFeedback::Pageserver(_) => StandbyStatus::default(),
            };
            reader.feedback = ReaderFeedback::Standby { status, hot_standby: new };
            true
        });
    }

    /// Whether this is a page server, or nobody yet, that has everything below `commit_lsn` in remote storage.
    pub fn pageserver_has(&self, commit_lsn: Lsn) -> bool {
        let table = self.readers.table.lock();
        table.readers.get(&self.conn_id).is_some_and(|reader| match &reader.feedback {
            ReaderFeedback::Pageserver(feedback) => feedback.remote_consistent_lsn >= commit_lsn,
            ReaderFeedback::Standby { .. } => false,
        })
    }

    /// A page server's report arrived.
    pub fn pageserver_feedback(&self, new: PageserverFeedback) {
        self.update(|reader| {
            reader.feedback = ReaderFeedback::Pageserver(new);
            true
        });
    }
}

impl Drop for ReaderGuard<'_> {
    fn drop(&mut self) {
        let mut table = self.readers.table.lock();
        table.readers.remove(&self.conn_id);
        table.aggregate = aggregate(table.readers.values());
    }
}

fn aggregate<'a>(readers: impl Iterator<Item = &'a ReaderStatus>) -> HotStandbyFeedback {
    let asked = |reader: &ReaderStatus| match &reader.feedback {
        ReaderFeedback::Standby { hot_standby, .. } => *hot_standby,
        ReaderFeedback::Pageserver(_) => HotStandbyFeedback::default(),
    };
    let wants = |feedback: &HotStandbyFeedback| feedback.xmin != 0 || feedback.catalog_xmin != 0;
    readers.map(asked).filter(wants).fold(HotStandbyFeedback::default(), HotStandbyFeedback::merge)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feedback(timestamp: i64, xmin: u64, catalog_xmin: u64) -> HotStandbyFeedback {
        HotStandbyFeedback { timestamp, xmin, catalog_xmin }
    }

    #[test]
    fn feedback_is_the_minimum_of_what_is_set_and_ends_with_the_reader() {
        let readers = Readers::default();
        let addr = "127.0.0.1:1".parse().unwrap();
        let a = readers.register(1, addr, None);
        let b = readers.register(2, addr, None);
        assert_eq!(readers.hot_standby_feedback(), HotStandbyFeedback::default());
        a.hot_standby_feedback(feedback(10, 700, 0));
        b.hot_standby_feedback(feedback(5, 600, 900));
        assert_eq!(readers.hot_standby_feedback(), feedback(10, 600, 900));
        drop(b);
        assert_eq!(readers.hot_standby_feedback(), feedback(10, 700, 0));
        a.hot_standby_feedback(feedback(11, 0, 0));
        assert_eq!(readers.hot_standby_feedback(), HotStandbyFeedback::default());
    }
}
