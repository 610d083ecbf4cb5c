//! A write load that remembers, outside the database, what became of each transaction.
//!
//! What it tells apart, for each numbered row:
//!
//! - **acknowledged**: the server confirmed the COMMIT. The row must be there for ever, on whichever server comes next.
//! - **rolled back**: on purpose, or because COMMIT was never sent, or because the server refused. The row may never appear.
//! - **unknown**: COMMIT was sent and not answered. Neither outcome is wrong.
//! - **seen**: whatever the outcome was, somebody read the row on a standby ([`Ledger::witness`]). It must be there for ever, too.

mod writer;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use crate::postgres::Postgres;
use crate::wait::wait_for;

/// How many ids a failure names.
const SHOWN: usize = 20;

/// Writers that insert numbered rows into the table `ledger`, each attached to one server for as long as it lives: through crashes,
/// and while the server is a standby that refuses them.
#[derive(Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
    writers: Mutex<Vec<JoinHandle<()>>>,
}

/// An acknowledged transaction.
#[derive(Debug, Clone, Copy)]
pub struct Commit {
    /// The row it inserted.
    pub id: u64,
    /// When it began.
    pub begun: Instant,
    /// When the acknowledgement arrived.
    pub at: Instant,
    /// TCP port of the server that acknowledged it.
    pub server: u16,
}

/// What [`Ledger::check`] found on a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Transactions that were acknowledged, all of which are there.
    pub acknowledged: usize,
    /// Rows that were rolled back, none of which is there.
    pub rolled_back: usize,
    /// Transactions whose outcome nobody was told.
    pub unknown: usize,
    /// Those of them that are there.
    pub unknown_present: usize,
    /// Rows in the table.
    pub rows: usize,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    acknowledged: Arc<AtomicU64>,
    /// Number of the next writer.
    next_writer: AtomicU64,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    commits: Vec<Commit>,
    rolled_back: HashSet<u64>,
    unknown: HashSet<u64>,
    seen: HashSet<u64>,
    /// What writers met that they didn't ask for: when, on which server by TCP port, and what.
    errors: Vec<(Instant, u16, String)>,
    /// Servers by TCP port that may acknowledge nothing that began after this moment.
    fenced: BTreeMap<u16, Instant>,
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    /// Creates the table on `primary` and starts `writers` writers.
    ///
    /// # Errors
    /// When the table cannot be created.
    pub fn start(primary: &Postgres, writers: u64) -> Result<Ledger> {
        primary.sql()?.run("CREATE TABLE ledger (id bigint PRIMARY KEY, padding text NOT NULL)")?;
        let ledger = Ledger { shared: Arc::new(Shared::default()), writers: Mutex::default() };
        ledger.attach(primary, writers);
        Ok(ledger)
    }

    /// Starts `writers` more writers, on `server`, which may be a standby.
    pub fn attach(&self, server: &Postgres, writers: u64) {
        let conninfo = format!("{} application_name=ledger", server.conninfo());
        let spawn = |_| {
            let number = 1 + self.shared.next_writer.fetch_add(1, Ordering::Relaxed);
            let (shared, conninfo, port) = (Arc::clone(&self.shared), conninfo.clone(), server.port());
            std::thread::spawn(move || writer::write(&shared, &conninfo, port, number))
        };
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).extend((0..writers).map(spawn));
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

    /// The first acknowledgement of a transaction that began after `moment`.
    #[must_use]
    pub fn first_after(&self, moment: Instant) -> Option<Commit> {
        let book = self.shared.book();
        // They are in the order of their acknowledgements.
        let later = book.commits.iter().rev().take_while(|commit| commit.at > moment);
        later.filter(|commit| commit.begun > moment).last().copied()
    }

    /// The last acknowledgement by `server`.
    #[must_use]
    pub fn last_of(&self, server: &Postgres) -> Option<Commit> {
        self.shared.book().commits.iter().rev().find(|commit| commit.server == server.port()).copied()
    }

    /// The first acknowledgement by `server` after `moment`.
    #[must_use]
    pub fn first_of(&self, server: &Postgres, moment: Instant) -> Option<Commit> {
        let book = self.shared.book();
        book.commits
            .iter()
            .rev()
            .take_while(|commit| commit.at > moment)
            .filter(|commit| commit.server == server.port())
            .last()
            .copied()
    }

    /// From now on `server` may acknowledge nothing that begins: [`Ledger::check`] fails if it does.
    pub fn fence(&self, server: &Postgres) {
        self.shared.book().fenced.insert(server.port(), Instant::now());
    }

    /// `server` may acknowledge transactions again.
    pub fn unfence(&self, server: &Postgres) {
        self.shared.book().fenced.remove(&server.port());
    }

    /// Remembers which rows can be read on `standby`: they are committed for everybody, whatever their writers know.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn witness(&self, standby: &Postgres) -> Result<usize> {
        let rows = present(standby)?;
        let count = rows.len();
        self.shared.book().seen.extend(rows);
        Ok(count)
    }

    /// Checks `server`, the primary of the moment, while the writers go on: everything acknowledged or seen so far is there, nothing
    /// is there that was rolled back or never written, and no fenced server has acknowledged anything.
    ///
    /// # Errors
    /// What is wrong, with the ids.
    pub fn check(&self, server: &Postgres) -> Result<Tally> {
        // What is acknowledged before the table is read, must be in it; what is rolled back after it is read, must not have been.
        let (acknowledged, seen) = {
            let book = self.shared.book();
            (book.commits.iter().map(|commit| commit.id).collect::<HashSet<_>>(), book.seen.clone())
        };
        let rows = present(server)?;
        let book = self.shared.book();
        for commit in &book.commits {
            let late = book.fenced.get(&commit.server).is_some_and(|fenced| commit.begun > *fenced);
            ensure!(!late, "a fenced server has ACKNOWLEDGED a transaction: {commit:?}");
        }
        none("acknowledged transactions are LOST", acknowledged.difference(&rows))?;
        none("rows that a standby showed are LOST", seen.difference(&rows))?;
        none("rows are there that were ROLLED BACK", rows.intersection(&book.rolled_back))?;
        Ok(Tally {
            acknowledged: acknowledged.len(),
            rolled_back: book.rolled_back.len(),
            unknown: book.unknown.len(),
            unknown_present: book.unknown.intersection(&rows).count(),
            rows: rows.len(),
        })
    }

    /// Lets every writer finish its transaction, and returns what was acknowledged.
    ///
    /// # Errors
    /// When a writer doesn't come to an end, because its commit is never answered.
    pub fn finish(self, deadline: Duration) -> Result<Vec<Commit>> {
        self.stop(deadline)?;
        Ok(std::mem::take(&mut self.shared.book().commits))
    }

    /// Lets every writer finish its transaction. Whatever was written can still be checked.
    ///
    /// # Errors
    /// As [`Ledger::finish`].
    pub fn stop(&self, deadline: Duration) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let writers = std::mem::take(&mut *self.writers.lock().unwrap_or_else(PoisonError::into_inner));
        wait_for(deadline, "the writers to finish", || {
            ensure!(writers.iter().all(JoinHandle::is_finished), "a commit is still waiting");
            Ok(())
        })?;
        for writer in writers {
            writer.join().map_err(|_| anyhow!("a writer panicked"))?;
        }
        Ok(())
    }

    /// Checks that no writer on `server` has met an error since `moment`: no statement failed, and no connection broke. What fails on
    /// purpose doesn't count, nor does a standby's refusal.
    ///
    /// # Errors
    /// What the writers met.
    pub fn check_undisturbed(&self, server: &Postgres, moment: Instant) -> Result<()> {
        let book = self.shared.book();
        let met = book.errors.iter().filter(|(at, port, _)| *at > moment && *port == server.port());
        let met: Vec<&str> = met.map(|(_, _, error)| error.as_str()).collect();
        ensure!(met.is_empty(), "writers met ERRORS: {met:?}");
        Ok(())
    }

    /// Checks that every transaction of `acknowledged` is in the table on `server`, and returns how many rows there are.
    ///
    /// # Errors
    /// Those that are missing.
    pub fn verify(acknowledged: &[Commit], server: &Postgres) -> Result<usize> {
        let rows = present(server)?;
        let acknowledged: HashSet<u64> = acknowledged.iter().map(|commit| commit.id).collect();
        none("acknowledged transactions are LOST", acknowledged.difference(&rows))?;
        Ok(rows.len())
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // A writer whose commit is never answered ends with its server.
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// The rows in the table on `server`.
fn present(server: &Postgres) -> Result<HashSet<u64>> {
    let rows = server.sql()?.rows("SELECT id FROM ledger")?;
    Ok(rows.iter().filter_map(|row| row.first()?.as_deref()?.parse().ok()).collect())
}

/// Fails when there is one.
fn none<'a>(what: &str, ids: impl Iterator<Item = &'a u64>) -> Result<()> {
    let mut ids: Vec<u64> = ids.copied().collect();
    ids.sort_unstable();
    let shown = ids.get(..ids.len().min(SHOWN)).unwrap_or_default();
    ensure!(ids.is_empty(), "{} {what}: {shown:?}", ids.len());
    Ok(())
}
