//! A write load that remembers, outside the database, which transactions were acknowledged.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::postgres::Postgres;
use crate::secs;
use crate::sql::Sql;
use crate::wait::wait_for;

/// How many missing ids a failure names.
const SHOWN: usize = 20;

/// Writers that insert numbered rows into the table `ledger`, one transaction each.
///
/// An id counts as acknowledged only when the server confirmed its COMMIT. After an error a writer connects again and goes on with the
/// next id: what became of the last one is unknown, and neither outcome is wrong.
#[derive(Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<()>>,
}

/// An acknowledged transaction.
#[derive(Debug, Clone, Copy)]
pub struct Commit {
    /// The row it inserted.
    pub id: u64,
    /// When the acknowledgement arrived.
    pub at: Instant,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: Arc<AtomicU64>,
    commits: Mutex<Vec<Commit>>,
}

impl Ledger {
    /// Creates the table on `primary` and starts `writers` writers.
    ///
    /// # Errors
    /// When the table cannot be created.
    pub fn start(primary: &Postgres, writers: u64) -> Result<Ledger> {
        primary.sql()?.run("CREATE TABLE ledger (id bigint PRIMARY KEY, padding text NOT NULL)")?;
        let shared = Arc::new(Shared::default());
        let spawn = |writer: u64| {
            let (shared, conninfo) = (Arc::clone(&shared), format!("{} application_name=ledger", primary.conninfo()));
            std::thread::spawn(move || write(&shared, &conninfo, writer))
        };
        let writers = (1..=writers).map(spawn).collect();
        Ok(Ledger { shared, writers })
    }

    /// Transactions acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// The counter behind [`Ledger::acknowledged`].
    #[must_use]
    pub fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.shared.acknowledged)
    }

    /// Waits until `count` more transactions have been acknowledged.
    ///
    /// # Errors
    /// When they aren't in time.
    pub fn wait_progress(&self, deadline: Duration, count: u64) -> Result<()> {
        let goal = self.acknowledged() + count;
        wait_for(deadline, &format!("{count} more commits"), || {
            let now = self.acknowledged();
            ensure!(now >= goal, "{} came", count - (goal - now));
            Ok(())
        })
    }

    /// Lets every writer finish its transaction, and returns what was acknowledged.
    ///
    /// # Errors
    /// When a writer doesn't come to an end, because its commit is never answered.
    pub fn finish(mut self, deadline: Duration) -> Result<Vec<Commit>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let writers = std::mem::take(&mut self.writers);
        wait_for(deadline, "the writers to finish", || {
            ensure!(writers.iter().all(JoinHandle::is_finished), "a commit is still waiting");
            Ok(())
        })?;
        for writer in writers {
            writer.join().map_err(|_| anyhow!("a writer panicked"))?;
        }
        let mut commits = self.shared.commits.lock().map_err(|_| anyhow!("a writer panicked"))?;
        Ok(std::mem::take(&mut *commits))
    }

    /// Checks that every transaction of `acknowledged` is in the table on `server`, and returns how many rows there are.
    ///
    /// # Errors
    /// Those that are missing.
    pub fn verify(acknowledged: &[Commit], server: &Postgres) -> Result<usize> {
        let mut sql = server.sql()?;
        let rows = sql.rows("SELECT id FROM ledger")?;
        let present: HashSet<u64> = rows.iter().filter_map(|row| row.first()?.as_deref()?.parse().ok()).collect();
        let missing: Vec<u64> =
            acknowledged.iter().map(|commit| commit.id).filter(|id| !present.contains(id)).collect();
        let shown = missing.get(..missing.len().min(SHOWN)).unwrap_or_default();
        ensure!(missing.is_empty(), "{} acknowledged transactions are LOST: {shown:?}", missing.len());
        Ok(present.len())
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // A writer whose commit is never answered ends with its server.
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// Writes rows until told to stop. Ids are unique among writers.
fn write(shared: &Shared, conninfo: &str, writer: u64) {
    let mut connection: Option<Sql> = None;
    let mut id = writer << 40;
    while !shared.stop.load(Ordering::Relaxed) {
        let Some(sql) = connection.as_mut() else {
            connection = wait_for(secs(1), "the primary", || Sql::connect(conninfo)).ok();
            continue;
        };
        id += 1;
        // Rows of different length, so that records cross pages at changing places.
        match sql.run(&format!("INSERT INTO ledger VALUES ({id}, repeat('x', {}))", id * 37 % 900)) {
            Ok(()) => {
                if let Ok(mut commits) = shared.commits.lock() {
                    commits.push(Commit { id, at: Instant::now() });
                }
                shared.acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => connection = None,
        }
    }
}
