//! One writer of the ledger: transactions of several kinds on one server, and what is known of each afterwards.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Commit, Shared};
use crate::random::Random;
use crate::secs;
use crate::sql::{Sql, SqlError};
use crate::wait::wait_for;

/// Ids below the writer's number.
const ID_BITS: u32 = 40;
/// SQLSTATE of a standby's answer to a write.
const READ_ONLY: &str = "25006";
/// SQLSTATE of `1 / 0`.
const DIVISION_BY_ZERO: &str = "22012";
/// A standby is asked again so often whether it has been promoted. Waiting too long would only make a test slower.
const STANDBY_PAUSE: Duration = Duration::from_millis(10);

/// What a transaction does.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// A statement of its own.
    Plain,
    /// BEGIN and COMMIT one by one.
    Block,
    /// Two rows, the second behind a savepoint that is rolled back.
    Savepoint,
    /// ROLLBACK.
    Rollback,
    /// A statement fails, and COMMIT ends it as ROLLBACK would.
    Failure,
}

impl Kind {
    fn choose(random: &mut Random) -> Kind {
        match random.below(16) {
            0..=8 => Kind::Plain,
            9..=11 => Kind::Block,
            12 => Kind::Savepoint,
            13..=14 => Kind::Rollback,
            _ => Kind::Failure,
        }
    }
}

/// What became of a transaction.
enum Outcome {
    Acknowledged,
    RolledBack,
    Unknown,
}

/// Writes rows until told to stop. Ids are unique among writers.
pub(super) fn write(shared: &Shared, conninfo: &str, server: u16, writer: u64) {
    let mut connection: Option<Sql> = None;
    let mut random = Random::new(writer);
    let mut id = writer << ID_BITS;
    while !shared.stop.load(Ordering::Relaxed) {
        let Some(sql) = connection.as_mut() else {
            connection = wait_for(secs(1), "the primary", || Sql::connect(conninfo)).ok();
            continue;
        };
        id += 1;
        let (begun, kind) = (Instant::now(), Kind::choose(&mut random));
        let (first, second) = (id, matches!(kind, Kind::Savepoint).then_some(id + 1));
        id += u64::from(second.is_some());
        let mut step = Steps { sql, may_be_committed: false };
        let (outcome, error) = match step.take(kind, first) {
            Ok(outcome) => (outcome, None),
            Err(error) => (step.after(&error), Some(error)),
        };
        let mut book = shared.book();
        // The order of these moments is the order in the book.
        let at = Instant::now();
        // Rolled back in each case: its COMMIT comes with the first row alone.
        book.rolled_back.extend(second);
        match outcome {
            Outcome::Acknowledged => {
                book.commits.push(Commit { id: first, begun, at, server });
                shared.acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Outcome::RolledBack => drop(book.rolled_back.insert(first)),
            Outcome::Unknown => drop(book.unknown.insert(first)),
        }
        let refused = error.as_ref().is_some_and(|error| code(error) == Some(READ_ONLY));
        book.errors.extend(error.as_ref().filter(|_| !refused).map(|error| (at, server, format!("{error:#}"))));
        drop(book);
        // The session may outlive the promotion.
        if refused && sql.run("ROLLBACK").is_ok() {
            std::thread::sleep(STANDBY_PAUSE);
        } else if error.is_some() {
            connection = None;
        }
    }
}

/// A transaction under way.
struct Steps<'a> {
    sql: &'a mut Sql,
    /// What commits has been sent.
    may_be_committed: bool,
}

impl Steps<'_> {
    fn take(&mut self, kind: Kind, id: u64) -> Result<Outcome> {
        // Rows of different length, so that records cross pages at changing places.
        let insert = |id: u64| format!("INSERT INTO ledger VALUES ({id}, repeat('x', {}))", id * 37 % 900);
        match kind {
            Kind::Plain => {
                self.commit(&insert(id))?;
                return Ok(Outcome::Acknowledged);
            }
            Kind::Block => self.sql.run(&format!("BEGIN; {}", insert(id)))?,
            Kind::Savepoint => {
                self.sql.run(&format!("BEGIN; {}; SAVEPOINT s; {}", insert(id), insert(id + 1)))?;
                self.sql.run("ROLLBACK TO s")?;
            }
            Kind::Rollback => {
                self.sql.run(&format!("BEGIN; {}", insert(id)))?;
                self.sql.run("ROLLBACK")?;
                return Ok(Outcome::RolledBack);
            }
            Kind::Failure => {
                self.sql.run(&format!("BEGIN; {}", insert(id)))?;
                match self.sql.run("SELECT 1 / 0") {
                    Err(error) if code(&error) == Some(DIVISION_BY_ZERO) => self.sql.run("COMMIT")?,
                    other => other?,
                }
                return Ok(Outcome::RolledBack);
            }
        }
        self.commit("COMMIT")?;
        Ok(Outcome::Acknowledged)
    }

    fn commit(&mut self, sql: &str) -> Result<()> {
        self.may_be_committed = true;
        self.sql.run(sql)
    }

    /// What `error` says of the transaction.
    fn after(&self, error: &anyhow::Error) -> Outcome {
        // A server that ends a session that waits for its standbys has committed on its own disk.
        let refused = code(error) == Some(READ_ONLY);
        if self.may_be_committed && !refused { Outcome::Unknown } else { Outcome::RolledBack }
    }
}

fn code(error: &anyhow::Error) -> Option<&str> {
    match error.downcast_ref()? {
        SqlError::Refused { code, .. } => Some(code),
        _ => None,
    }
}
