//! A blocking SQL connection for tests, over `tokio-postgres`.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tokio_postgres::{NoTls, SimpleQueryMessage};

/// How long a statement may take unless [`Sql::set_deadline`] says otherwise. Generous: the machine may be busy with other tests.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// What became of a statement that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SqlError {
    /// The server says so.
    #[error("{code} {message}: {sql}")]
    Refused {
        /// SQLSTATE.
        code: String,
        /// What it says.
        message: String,
        /// The statement.
        sql: String,
    },
    /// The connection broke. Whether the statement was carried out is unknown.
    #[error("{error}: {sql}")]
    Broken {
        /// What was noticed.
        error: String,
        /// The statement.
        sql: String,
    },
    /// No answer in time. Whether the statement was carried out is unknown; it may even be later.
    #[error("no answer within {seconds} s: {sql}")]
    Late {
        /// How long it was waited for.
        seconds: u64,
        /// The statement.
        sql: String,
    },
}

/// A connection. Its protocol runs only inside the calls of this type.
pub struct Sql {
    runtime: tokio::runtime::Runtime,
    client: tokio_postgres::Client,
    deadline: Duration,
}

impl Sql {
    /// Connects.
    ///
    /// # Errors
    /// When nobody answers or the server refuses.
    pub fn connect(conninfo: &str) -> Result<Sql> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async {
            let connecting = tokio_postgres::connect(conninfo, NoTls);
            let (client, connection) = tokio::time::timeout(CONNECT_DEADLINE, connecting).await??;
            // The error, if any, also reaches the caller of the next statement.
            tokio::spawn(async move { drop(connection.await) });
            anyhow::Ok(client)
        });
        let client = client.with_context(|| format!("connect to {conninfo}"))?;
        Ok(Sql { runtime, client, deadline: DEFAULT_DEADLINE })
    }

    /// How long later statements may take.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Runs one or more statements and returns all rows, as text.
    ///
    /// # Errors
    /// When the server reports one, the connection breaks, or the time is up.
    pub fn rows(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        let messages = self
            .runtime
            .block_on(async { tokio::time::timeout(self.deadline, self.client.simple_query(sql)).await })
            .map_err(|_| SqlError::Late { seconds: self.deadline.as_secs(), sql: sql.to_owned() })?
            .map_err(|error| match error.as_db_error() {
                Some(db) => SqlError::Refused {
                    code: db.code().code().to_owned(),
                    message: db.message().to_owned(),
                    sql: sql.to_owned(),
                },
                None => SqlError::Broken { error: error.to_string(), sql: sql.to_owned() },
            })?;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect()),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Runs statements for their effect.
    ///
    /// # Errors
    /// As [`Sql::rows`].
    pub fn run(&mut self, sql: &str) -> Result<()> {
        self.rows(sql).map(drop)
    }

    /// The single value of a statement's single row; NULL is an error.
    ///
    /// # Errors
    /// As [`Sql::rows`], and when the result has another shape.
    pub fn value(&mut self, sql: &str) -> Result<String> {
        match self.rows(sql)?.as_slice() {
            [row] => match row.as_slice() {
                [Some(value)] => Ok(value.clone()),
                other => bail!("expected one value, got {other:?}: {sql}"),
            },
            rows => bail!("expected one row, got {}: {sql}", rows.len()),
        }
    }

    /// [`Sql::value`], parsed.
    ///
    /// # Errors
    /// As [`Sql::value`], and when the text is not a `T`.
    pub fn parsed<T: std::str::FromStr>(&mut self, sql: &str) -> Result<T> {
        let text = self.value(sql)?;
        text.parse().map_err(|_| anyhow!("unexpected value {text:?}: {sql}"))
    }
}
