//! The control state as the journal and the control copies hold it: Neon's format, and in front of it what a stock
//! PostgreSQL server's log needs beyond that ([`StockInfo`]), when there is something to tell.
//!
//! ```text
//! [ "SKST" | u32 length | timelines | server version | safekeepers [ | fence ] ] control file     everything little-endian
//! ```
//!
//! The fence (`u32` Postgres timeline, `u64` term) is there only when there is one. A safekeeper that knows of no fences
//! refuses to read such a state: it wouldn't keep the promise.
//!
//! So the log of a Neon compute has nothing but Neon's format, which is also what all files and journals had before there
//! were Postgres timelines.

use bytes::{BufMut, Bytes};
use pgproto::pg_timeline::Branch;
use pgproto::read::Reader;
use pgproto::walproposer::Fence;
use pgproto::{Ancestry, DecodeError, HostPort, PgTimelineId, Term};

use super::control_file::{ControlFile, ControlFileError, list, lsn, put_count, put_text, text};
use crate::consensus::state::StockInfo;

const MAGIC: &[u8; 4] = b"SKST";
/// Magic and length.
const HEADER_LEN: usize = 8;

impl ControlFile {
    /// Whether there is more to tell than Neon's format can.
    pub(super) fn has_stock(&self) -> bool {
        self.state.stock != StockInfo::default()
    }

    /// All of the state.
    pub(super) fn encode_state(&self) -> Vec<u8> {
        if !self.has_stock() {
            return self.encode();
        }
        let mut body = Vec::with_capacity(256);
        put_stock(&mut body, &self.state.stock);
        let mut out = Vec::with_capacity(HEADER_LEN + body.len() + 512);
        out.put_slice(MAGIC);
        // Each part of it is limited where it comes in.
        out.put_u32_le(u32::try_from(body.len()).unwrap_or(u32::MAX));
        out.put_slice(&body);
        out.put_slice(&self.encode());
        out
    }

    /// Reads what [`Self::encode_state`] wrote.
    pub(super) fn decode_state(content: &[u8]) -> Result<Self, ControlFileError> {
        let Some(rest) = content.strip_prefix(MAGIC) else { return Self::decode(content) };
        let truncated = || DecodeError::Truncated("what a stock server needs");
        let (length, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let (stock, control) = rest.split_at_checked(length).ok_or_else(truncated)?;
        let mut control = Self::decode(control)?;
        let mut stock = Reader::new(Bytes::copy_from_slice(stock));
        control.state.stock = read_stock(&mut stock)?;
        stock.finish("what a stock server needs")?;
        Ok(control)
    }
}

fn put_stock(out: &mut Vec<u8>, stock: &StockInfo) {
    let branches = stock.ancestry.branches();
    put_count(out, branches.len());
    for branch in branches {
        out.put_u32_le(branch.timeline.0);
        out.put_u64_le(branch.begin.0);
    }
    put_text(out, &stock.server_version);
    put_count(out, stock.safekeepers.len());
    for address in &stock.safekeepers {
        put_text(out, &address.host);
        out.put_u16_le(address.port);
    }
    if let Some(Fence { pg_timeline, term }) = stock.fence {
        out.put_u32_le(pg_timeline.0);
        out.put_u64_le(term.0);
    }
}

fn read_stock(body: &mut Reader) -> Result<StockInfo, DecodeError> {
    let branches = list(body, "timelines", |body| {
        Ok(Branch { timeline: PgTimelineId(body.u32_le("timeline")?), begin: lsn(body, "begin of a timeline")? })
    })?;
    let ancestry = Ancestry::new(branches).map_err(|error| DecodeError::Invalid("timelines", error.to_string()))?;
    let server_version = text(body, "server version")?;
    let safekeepers = list(body, "safekeepers", |body| {
        Ok(HostPort { host: text(body, "host of a safekeeper")?, port: body.u16_le("port of a safekeeper")? })
    })?;
    let fence = if body.remaining() > 0 { Some(read_fence(body)?) } else { None };
    Ok(StockInfo { ancestry, server_version, safekeepers, fence })
}

fn read_fence(body: &mut Reader) -> Result<Fence, DecodeError> {
    match PgTimelineId(body.u32_le("timeline of the fence")?) {
        PgTimelineId(0) => Err(DecodeError::Invalid("timeline of the fence", "0".to_owned())),
        pg_timeline => Ok(Fence { pg_timeline, term: Term(body.u64_le("term of the fence")?) }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::storage::test_wal::new_timeline;
    use pgproto::{Lsn, TenantId, TenantTimelineId, TimelineId};

    fn control(stock: StockInfo) -> ControlFile {
        let mut state = new_timeline(TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16])));
        state.stock = stock;
        ControlFile { creation_ts: Default::default(), ..ControlFile::new(state) }
    }

    fn stock() -> StockInfo {
        let branch = |timeline, begin| Branch { timeline: PgTimelineId(timeline), begin: Lsn(begin) };
        StockInfo {
            ancestry: Ancestry::new(vec![branch(1, 0), branch(2, 0x300_0028)]).unwrap(),
            server_version: "15.18".to_owned(),
            safekeepers: vec![HostPort { host: "sk1".to_owned(), port: 5454 }],
            fence: None,
        }
    }

    #[test]
    fn the_log_of_a_compute_has_neons_format_alone() {
        let control = control(StockInfo::default());
        assert_eq!(control.encode_state(), control.encode());
        assert_eq!(ControlFile::decode_state(&control.encode()).unwrap(), control);
    }

    #[test]
    fn what_a_stock_server_needs_stands_in_front_as_documented() {
        let control = control(stock());
        let encoded = control.encode_state();
        let expected = "534b5354\
             42000000\
             0200000000000000\
             01000000 0000000000000000\
             02000000 2800000300000000\
             0500000000000000 31352e3138\
             0100000000000000 0300000000000000 736b31 4e15"
            .replace(' ', "");
        let stock_length = expected.len() / 2;
        assert_eq!(hex::encode(&encoded[..stock_length]), expected);
        assert_eq!(encoded[stock_length..], control.encode());
        assert_eq!(ControlFile::decode_state(&encoded).unwrap(), control);
        for length in 0..encoded.len() {
            assert!(ControlFile::decode_state(&encoded[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_fence_stands_at_the_end_of_it() {
        let fence = Some(Fence { pg_timeline: PgTimelineId(3), term: Term(0x102) });
        let (with, without) = (control(StockInfo { fence, ..stock() }).encode_state(), control(stock()).encode_state());
        let length = 8 + usize::from(with[4]);
        assert_eq!(with[4], without[4] + 12);
        assert_eq!(hex::encode(&with[length - 12..length]), "030000000201000000000000");
        assert_eq!(with[length..], without[length - 12..]);
        assert_eq!(ControlFile::decode_state(&with).unwrap().state.stock.fence, fence);
        let fenced = control(StockInfo { fence, ..StockInfo::default() });
        assert_eq!(
            ControlFile::decode_state(&fenced.encode_state()).unwrap(),
            fenced,
            "of a log with nothing else to tell"
        );
        let mut zero = with;
        zero[length - 12] = 0;
        assert!(ControlFile::decode_state(&zero).is_err(), "no timeline 0 to fence off");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_state_or_an_error(at in 0..120_usize, byte: u8, body: Vec<u8>, fenced: bool) {
            let fence = fenced.then_some(Fence { pg_timeline: PgTimelineId(3), term: Term(9) });
            let mut changed = control(StockInfo { fence, ..stock() }).encode_state();
            changed[at] = byte;
            let _ = ControlFile::decode_state(&changed);
            let _ = ControlFile::decode_state(&[&b"SKST"[..], &body].concat());
        }
    }
}
