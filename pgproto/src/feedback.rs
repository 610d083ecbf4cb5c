//! What page servers and hot standbys report back.
//!
//! A page server's report is a *block* of named values ([`PageserverFeedback::read`], [`PageserverFeedback::encode`]).
//! It travels to acceptors in a `z` message ([`PageserverFeedback::decode_message`]) and from there to proposers at the
//! end of an AppendResponse, big-endian in every protocol version.

use bytes::{BufMut, Bytes, BytesMut};

use crate::read::Reader;
use crate::{DecodeError, Lsn};

/// First byte of the CopyData body that carries a page server's report.
pub const PAGESERVER_FEEDBACK_TAG: u8 = b'z';

/// Aggregate of hot-standby feedback as an acceptor reports it. All zeros: no standby asks for anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HotStandbyFeedback {
    /// Newest time of a contributing report: microseconds since 2000-01-01, 0 = none.
    pub timestamp: i64,
    /// Full transaction id (epoch in the upper half), 0 = none.
    pub xmin: u64,
    /// Full transaction id, 0 = none.
    pub catalog_xmin: u64,
}

impl HotStandbyFeedback {
    /// What two standbys need together: the older of each transaction id that is set, and the newer time.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        let oldest = |a: u64, b: u64| if a == 0 || b == 0 { a.max(b) } else { a.min(b) };
        Self {
            timestamp: self.timestamp.max(other.timestamp),
            xmin: oldest(self.xmin, other.xmin),
            catalog_xmin: oldest(self.catalog_xmin, other.catalog_xmin),
        }
    }
}

/// Report of a Neon page server (spec: wire protocol 4.3).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PageserverFeedback {
    /// Logical size in bytes; non-zero only from shard 0.
    pub current_timeline_size: u64,
    /// Last received and ingested.
    pub last_received_lsn: Lsn,
    /// On the page server's disk.
    pub disk_consistent_lsn: Lsn,
    /// In remote storage; lets WAL be removed.
    pub remote_consistent_lsn: Lsn,
    /// Microseconds since 2000-01-01.
    pub reply_time: i64,
    /// Reporting shard.
    pub shard_number: u32,
    /// The page server saw corruption.
    pub corruption_detected: bool,
}

const SIZE: &str = "current_timeline_size";
const WRITE_LSN: &str = "ps_writelsn";
const FLUSH_LSN: &str = "ps_flushlsn";
const APPLY_LSN: &str = "ps_applylsn";
const REPLY_TIME: &str = "ps_replytime";
const SHARD: &str = "shard_number";
const CORRUPTION: &str = "corruption_detected";

impl PageserverFeedback {
    /// Reads a block. Keys may come in any order; unknown ones are skipped by their length, missing ones are zero.
    /// A known key with another length than its own is an error.
    pub fn read(body: &mut Reader) -> Result<Self, DecodeError> {
        let mut feedback = Self::default();
        for _ in 0..body.u8("number of feedback keys")? {
            let key = body.cstr("feedback key")?;
            let length = body.u32("feedback value length")?;
            let length = usize::try_from(length).map_err(|_| DecodeError::Truncated("feedback value"))?;
            let mut value = Reader::new(body.bytes(length, "feedback value")?);
            match key.as_str() {
                SIZE => feedback.current_timeline_size = value.u64(SIZE)?,
                WRITE_LSN => feedback.last_received_lsn = Lsn(value.u64(WRITE_LSN)?),
                FLUSH_LSN => feedback.disk_consistent_lsn = Lsn(value.u64(FLUSH_LSN)?),
                APPLY_LSN => feedback.remote_consistent_lsn = Lsn(value.u64(APPLY_LSN)?),
                REPLY_TIME => feedback.reply_time = value.i64(REPLY_TIME)?,
                SHARD => feedback.shard_number = value.u32(SHARD)?,
                CORRUPTION => feedback.corruption_detected = value.u8(CORRUPTION)? != 0,
                _ => continue,
            }
            value.finish("feedback value")?;
        }
        Ok(feedback)
    }

    /// Appends the block: the first five keys always, shard and corruption only when set.
    pub fn encode(&self, out: &mut BytesMut) {
        let optional = u8::from(self.shard_number > 0) + u8::from(self.corruption_detected);
        out.put_u8(5 + optional);
        put_value(out, SIZE, &self.current_timeline_size.to_be_bytes());
        put_value(out, WRITE_LSN, &self.last_received_lsn.0.to_be_bytes());
        put_value(out, FLUSH_LSN, &self.disk_consistent_lsn.0.to_be_bytes());
        put_value(out, APPLY_LSN, &self.remote_consistent_lsn.0.to_be_bytes());
        put_value(out, REPLY_TIME, &self.reply_time.to_be_bytes());
        if self.shard_number > 0 {
            put_value(out, SHARD, &self.shard_number.to_be_bytes());
        }
        if self.corruption_detected {
            put_value(out, CORRUPTION, &[1]);
        }
    }

    /// Decodes a whole `z` CopyData body, tag included. The length field is not checked and bytes behind the block are
    /// ignored, as the protocol asks.
    pub fn decode_message(body: Bytes) -> Result<Self, DecodeError> {
        let mut body = Reader::new(body);
        match body.u8("tag")? {
            PAGESERVER_FEEDBACK_TAG => {}
            tag => return Err(DecodeError::UnknownTag { what: "feedback message", value: tag.into() }),
        }
        body.u64("length of feedback block")?;
        Self::read(&mut body)
    }

    /// Appends a whole `z` CopyData body, tag included.
    pub fn encode_message(&self, out: &mut BytesMut) {
        let mut block = BytesMut::new();
        self.encode(&mut block);
        out.put_u8(PAGESERVER_FEEDBACK_TAG);
        out.put_u64(block.len() as u64);
        out.put_slice(&block);
    }
}

fn put_value(out: &mut BytesMut, key: &str, value: &[u8]) {
    out.put_slice(key.as_bytes());
    out.put_u8(0);
    out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
    out.put_slice(value);
}
