//! Looks at the primary's settings over plain SQL, and warns about what would make the safekeepers useless.
//!
//! Every finding carries the exact line to set. Nothing here stops the proposer: a primary that can't be asked, or that is
//! configured otherwise on purpose, is followed all the same.

use std::time::Duration;

use pgproto::Lsn;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::standby_names::SyncStandbys;

/// All of one look must end within this time; it must not delay the stream for long.
const LIMIT: Duration = Duration::from_secs(5);

/// How the connection is listed on the primary. Not the name in `synchronous_standby_names`.
const APPLICATION_NAME: &str = "walproposer checks";

/// Where to connect when the connection string doesn't say; every cluster has it.
const DATABASE: &str = "postgres";

/// The settings that matter, as the primary shows them to our role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimarySettings {
    /// The server replays WAL of another one.
    pub in_recovery: bool,
    /// `wal_level`.
    pub wal_level: String,
    /// `synchronous_standby_names`.
    pub synchronous_standby_names: String,
    /// `synchronous_commit`.
    pub synchronous_commit: String,
    /// `fsync`.
    pub fsync: String,
}

/// Something that should be changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong and what follows from it.
    pub problem: String,
    /// The line for postgresql.conf, or what else to do.
    pub remedy: String,
}

/// Judges the settings for a proposer that calls itself `application_name`.
pub fn findings(settings: &PrimarySettings, application_name: &str) -> Vec<Finding> {
    let finding = |problem: String, remedy: &str| Finding { problem, remedy: remedy.to_owned() };
    let mut found = Vec::new();
    if settings.in_recovery {
        let problem = "the server is a hot standby: commits happen elsewhere and don't wait for the safekeepers";
        found.push(finding(problem.to_owned(), "point --primary at the primary"));
    }
    if settings.wal_level == "minimal" {
        let problem = "wal_level is minimal: the server can't stream its WAL";
        found.push(finding(problem.to_owned(), "wal_level = replica   # needs a restart"));
    }
    found.extend(standby_finding(&settings.synchronous_standby_names, application_name));
    if matches!(settings.synchronous_commit.as_str(), "off" | "local") {
        let setting = &settings.synchronous_commit;
        let problem = format!("synchronous_commit is {setting}: commits don't wait for the safekeepers");
        found.push(finding(problem, "synchronous_commit = on"));
    }
    if settings.fsync == "off" {
        let problem =
            "fsync is off: after a crash the server may have less WAL than the safekeepers, and can't be followed";
        found.push(finding(problem.to_owned(), "fsync = on"));
    }
    found
}

fn standby_finding(setting: &str, name: &str) -> Option<Finding> {
    let remedy = format!("synchronous_standby_names = 'ANY 1 ({})'", quoted_name(name));
    let problem = match SyncStandbys::parse(setting) {
        None => "synchronous_standby_names is empty: commits don't wait for the safekeepers".to_owned(),
        Some(standbys) if !standbys.lists(name) => {
            format!(
                "synchronous_standby_names ({setting}) doesn't list \"{name}\": commits don't wait for the safekeepers"
            )
        }
        Some(standbys) if !standbys.always_waits_for(name) => {
            format!("synchronous_standby_names ({setting}) lets other standbys answer in place of the safekeepers")
        }
        Some(_) => return None,
    };
    Some(Finding { problem, remedy })
}

/// A name inside the value of `synchronous_standby_names`, itself inside quotes of postgresql.conf.
fn quoted_name(name: &str) -> String {
    let plain_start = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let plain = plain_start && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let keyword = ["any", "first"].iter().any(|word| word.eq_ignore_ascii_case(name));
    if plain && !keyword { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"").replace('\'', "''")) }
}

/// Asks the primary and judges its answer.
pub async fn look(primary: &Config, application_name: &str) -> Result<Vec<Finding>, AskError> {
    Ok(findings(&settings(primary).await?, application_name))
}

/// Asks a server for its settings.
pub async fn settings(server: &Config) -> Result<PrimarySettings, AskError> {
    ask(server, primary_settings).await
}

/// Looks, and logs a warning for each finding.
///
/// Beside the caller, whom commits may be waiting for.
pub fn warn_about(primary: Config, application_name: String) {
    tokio::spawn(async move {
        match look(&primary, &application_name).await {
            Ok(findings) => {
                for Finding { problem, remedy } in findings {
                    tracing::warn!(set = remedy, "{problem}");
                }
            }
            Err(error) => tracing::warn!(%error, "could not check the settings of the primary over SQL"),
        }
    });
}

/// The first LSN that our slot keeps, for servers without READ_REPLICATION_SLOT. `None` when it can't be told.
pub async fn slot_start(primary: &Config, slot: &str) -> Option<Lsn> {
    let lookup = async |client: &Client| {
        let text = "SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name::text = $1";
        let row = client.query_opt(text, &[&slot]).await?;
        row.map_or(Ok(None), |row| row.try_get::<_, Option<String>>(0))
    };
    match ask(primary, lookup).await {
        Ok(lsn) => lsn.and_then(|text| text.parse().ok()),
        Err(error) => {
            tracing::warn!(%error, slot, "could not look up the replication slot over SQL");
            None
        }
    }
}

/// Why the primary could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No connection, or the server reported an error.
    #[error("{}", sql_error(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// Too slow.
    #[error("no answer within {LIMIT:?}")]
    TimedOut,
    /// The answer has another shape.
    #[error("unexpected answer")]
    Unexpected,
}

/// The error with its cause, which `tokio-postgres` leaves out.
fn sql_error(error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Connects, lets `question` do its work, disconnects.
pub(super) async fn ask<T, E: Into<AskError>>(
    primary: &Config,
    question: impl AsyncFnOnce(&Client) -> Result<T, E>,
) -> Result<T, AskError> {
    let mut config = primary.clone();
    config.application_name(APPLICATION_NAME);
    if config.get_dbname().is_none() {
        config.dbname(DATABASE);
    }
    let work = async {
        let (client, connection) = config.connect(NoTls).await?;
        // Its error, if any, also reaches the question. It ends when the client is dropped.
        tokio::spawn(connection);
        question(&client).await.map_err(Into::into)
    };
    tokio::time::timeout(LIMIT, work).await.map_err(|_| AskError::TimedOut)?
}

async fn primary_settings(client: &Client) -> Result<PrimarySettings, AskError> {
    let text = "SELECT pg_is_in_recovery(), current_setting('wal_level'), current_setting('synchronous_standby_names'), \
                current_setting('synchronous_commit'), current_setting('fsync')";
    let answer = client.simple_query(text).await?;
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = row.ok_or(AskError::Unexpected)?;
    let field = |index| row.try_get(index)?.map(str::to_owned).ok_or(AskError::Unexpected);
    Ok(PrimarySettings {
        in_recovery: field(0)? == "t",
        wal_level: field(1)?,
        synchronous_standby_names: field(2)?,
        synchronous_commit: field(3)?,
        fsync: field(4)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> PrimarySettings {
        PrimarySettings {
            in_recovery: false,
            wal_level: "replica".to_owned(),
            synchronous_standby_names: "ANY 1 (safekeeper)".to_owned(),
            synchronous_commit: "on".to_owned(),
            fsync: "on".to_owned(),
        }
    }

    fn remedies(change: impl FnOnce(&mut PrimarySettings)) -> Vec<String> {
        let mut settings = good();
        change(&mut settings);
        findings(&settings, "safekeeper").into_iter().map(|finding| finding.remedy).collect()
    }

    #[test]
    fn a_good_primary_gives_no_findings() {
        assert!(remedies(|_| ()).is_empty());
        assert!(remedies(|s| s.synchronous_commit = "remote_apply".to_owned()).is_empty());
        assert!(remedies(|s| s.wal_level = "logical".to_owned()).is_empty());
        assert!(remedies(|s| s.synchronous_standby_names = "SafeKeeper".to_owned()).is_empty());
    }

    #[test]
    fn every_finding_carries_the_line_to_set() {
        assert_eq!(remedies(|s| s.in_recovery = true), ["point --primary at the primary"]);
        assert_eq!(remedies(|s| s.wal_level = "minimal".to_owned()), ["wal_level = replica   # needs a restart"]);
        assert_eq!(remedies(|s| s.synchronous_commit = "local".to_owned()), ["synchronous_commit = on"]);
        assert_eq!(remedies(|s| s.fsync = "off".to_owned()), ["fsync = on"]);
        for names in ["", "other", "ANY 1 (safekeeper, other)", "FIRST 1 (other, safekeeper)", "ANY 1 (*)"] {
            let line = "synchronous_standby_names = 'ANY 1 (safekeeper)'";
            assert_eq!(remedies(|s| s.synchronous_standby_names = names.to_owned()), [line], "{names}");
        }
    }

    #[test]
    fn names_are_quoted_where_they_must_be() {
        for (name, quoted) in
            [("sk_1", "sk_1"), ("my sk", "\"my sk\""), ("1sk", "\"1sk\""), ("Any", "\"Any\""), ("it's", "\"it''s\"")]
        {
            assert_eq!(quoted_name(name), quoted);
        }
    }
}
