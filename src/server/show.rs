//! `SHOW`: the settings that stock clients ask for.

use pgproto::backend::{Column, SqlState, encode};
use pgproto::lsn::PAGE_SIZE;

use super::interrupt::Interrupt;
use super::session::Session;

/// Settings that are the same everywhere.
const FIXED: [(&str, &str); 4] = [
    // Clients create their files with the mode of the server's.
    ("data_directory_mode", "0700"),
    ("transaction_read_only", "off"),
    ("wal_keep_size", "0"),
    ("wal_level", "replica"),
];

/// Answers with one row under the setting's canonical name; 42704 for a setting that isn't known here.
pub(super) fn run(session: &mut Session, name: &str) -> Result<(), Interrupt> {
    let Some((name, value)) = value(session, name)? else {
        let text = format!("unrecognized configuration parameter \"{name}\"");
        return Err(Interrupt::refused(SqlState::UNDEFINED_OBJECT, text));
    };
    let out = session.writer.out();
    encode::row_description(out, &[Column::text(name)]);
    encode::data_row(out, &[Some(&value)]);
    encode::command_complete(out, "SHOW");
    Ok(())
}

/// Canonical name and value. Names compare in any case, as in PostgreSQL.
fn value(session: &Session, asked: &str) -> Result<Option<(&'static str, String)>, Interrupt> {
    let server = || session.timeline().map(|timeline| timeline.control_state().server);
    let is = |name: &str| asked.eq_ignore_ascii_case(name);
    if is("wal_segment_size") {
        let size = server().map_err(|error| error.refusal())?.wal_seg_size.bytes();
        return Ok(Some(("wal_segment_size", megabytes(size))));
    }
    if is("server_version_num") {
        let version = server().map_err(|error| error.refusal())?.pg_version;
        return Ok(Some(("server_version_num", version.to_string())));
    }
    for name in ["block_size", "wal_block_size"] {
        if is(name) {
            return Ok(Some((name, PAGE_SIZE.to_string())));
        }
    }
    let fixed = FIXED.iter().map(|&(name, value)| (name, value.to_owned()));
    let told = session.client.parameters.iter().map(|(name, value)| (*name, value.clone()));
    Ok(fixed.chain(told).find(|(name, _)| is(name)))
}

/// The only form pg_receivewal can read: a number and `MB` or `GB`. Segments have 1 MiB to 1 GiB.
fn megabytes(bytes: u64) -> String {
    match bytes >> 20 {
        1024 => "1GB".to_owned(),
        megabytes => format!("{megabytes}MB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_sizes_as_pg_receivewal_reads_them() {
        assert_eq!(megabytes(1 << 20), "1MB");
        assert_eq!(megabytes(16 << 20), "16MB");
        assert_eq!(megabytes(1 << 30), "1GB");
    }
}
