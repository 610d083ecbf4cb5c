//! Writers that are faster than checkpoints, on the threads of a real journal.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use pgproto::{Lsn, TenantId, TenantTimelineId, Term, TimelineId};

use super::*;
use crate::storage::RealDisk;

fn limits() -> JournalLimits {
    JournalLimits {
        file_size: 64 << 10,
        total: 256 << 10,
        reserve: 8 << 10,
        batch: 16 << 10,
        idle_before_checkpoint: Duration::from_secs(60),
        together: 2,
    }
}

/// A timeline whose checkpoint is never done before the journal is full.
#[derive(Debug)]
struct Slow {
    ttid: TenantTimelineId,
    journal: OnceLock<Arc<Inner>>,
    hurry: AtomicBool,
}

impl Behind for Slow {
    fn ttid(&self) -> TenantTimelineId {
        self.ttid
    }

    fn checkpoint(&self, batch: u64) -> Result<u64, CheckpointError> {
        let files = &self.journal.get().unwrap().files;
        while files.usage().used < limits().total && !self.hurry.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        Ok(batch)
    }
}

fn start(dir: &Path) -> (Journal, Arc<Slow>) {
    let (_, read) = Journal::open(Arc::new(RealDisk::new(false)), &dir.join("journal"), limits()).unwrap();
    let journal = read.start(false, 0).unwrap();
    let ttid = TenantTimelineId::new(TenantId([7; 16]), TimelineId([1; 16]));
    let owner = Arc::new(Slow { ttid, journal: OnceLock::new(), hurry: AtomicBool::new(false) });
    owner.journal.set(Arc::clone(&journal.inner)).unwrap();
    (journal, owner)
}

#[tokio::test]
async fn a_full_journal_that_a_checkpoint_can_empty_makes_writers_wait_and_refuses_none() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, owner) = start(dir.path());
    for at in 1..400 {
        let wal = vec![Bytes::from(vec![0xA5; 3000])];
        let record = Record::Append { at: Lsn(at), term: Term(5), chain: 77, wal };
        journal.commit(vec![Entry { owner: Arc::clone(&owner) as Arc<dyn Behind>, record }]).await.unwrap();
    }
    assert!(journal.stats().bytes_of_entries > 4 * limits().total, "it was full several times");
    // Its threads end when they are done.
    owner.hurry.store(true, Ordering::Relaxed);
}
