//! What server and reader say to each other inside COPY BOTH. One CopyData body is one message.
//!
//! | First byte | Direction | Message |
//! |---|---|---|
//! | `w` | to the reader | [`ServerMessage::XLogData`] |
//! | `k` | to the reader | [`ServerMessage::Keepalive`] |
//! | `r` | from the reader | standby status update: [`StandbyStatus`] |
//! | `h` | from the reader | hot-standby feedback: [`HotStandbyFeedback`] |
//! | `z` | from the reader | a Neon page server's report: [`PageserverFeedback`] |
//!
//! Times are microseconds since 2000-01-01 00:00:00 UTC, numbers big-endian.

use bytes::{BufMut, Bytes, BytesMut};

use crate::backend::encode::{copy_data, copy_data_header};
use crate::feedback::{HotStandbyFeedback, PAGESERVER_FEEDBACK_TAG, PageserverFeedback};
use crate::read::Reader;
use crate::{DecodeError, Lsn};

const XLOG_DATA: u8 = b'w';
const KEEPALIVE: u8 = b'k';
const STATUS_UPDATE: u8 = b'r';
const HOT_STANDBY_FEEDBACK: u8 = b'h';

/// Bytes in front of the WAL of an XLogData message, tag included.
pub const XLOG_DATA_HEADER_LEN: usize = 25;

/// Server to reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerMessage {
    /// `w`: a piece of WAL.
    XLogData {
        /// Position of the first byte of `data`.
        start: Lsn,
        /// End of the WAL that the sender could send now.
        end: Lsn,
        /// When it was sent.
        timestamp: i64,
        /// The WAL, sharing the buffer of the message.
        data: Bytes,
    },
    /// `k`: the server is alive, and may ask the same of the reader.
    Keepalive {
        /// End of the WAL that the server could send now.
        end: Lsn,
        /// When it was sent.
        timestamp: i64,
        /// The reader shall answer at once.
        reply_requested: bool,
    },
}

impl ServerMessage {
    /// Decodes the body of a CopyData message.
    pub fn decode(body: Bytes) -> Result<Self, DecodeError> {
        let mut body = Reader::new(body);
        let message = match body.u8("tag")? {
            XLOG_DATA => Self::XLogData {
                start: Lsn(body.u64("start of WAL")?),
                end: Lsn(body.u64("end of WAL")?),
                timestamp: body.i64("time")?,
                data: body.rest(),
            },
            KEEPALIVE => Self::Keepalive {
                end: Lsn(body.u64("end of WAL")?),
                timestamp: body.i64("time")?,
                reply_requested: body.u8("reply flag")? != 0,
            },
            tag => return Err(DecodeError::UnknownTag { what: "streaming message", value: tag.into() }),
        };
        body.finish("streaming message")?;
        Ok(message)
    }
}

/// Appends everything of a CopyData message with XLogData but the WAL: the caller sends `wal_len` bytes of it behind.
/// The other operands are the fields of [`ServerMessage::XLogData`].
pub fn put_xlog_data_header(out: &mut BytesMut, start: Lsn, end: Lsn, timestamp: i64, wal_len: usize) {
    copy_data_header(out, XLOG_DATA_HEADER_LEN.saturating_add(wal_len));
    out.put_u8(XLOG_DATA);
    out.put_u64(start.0);
    out.put_u64(end.0);
    out.put_i64(timestamp);
}

/// Appends a CopyData message with a keepalive. The operands are the fields of [`ServerMessage::Keepalive`].
pub fn put_keepalive(out: &mut BytesMut, end: Lsn, timestamp: i64, reply_requested: bool) {
    copy_data(out, |body| {
        body.put_u8(KEEPALIVE);
        body.put_u64(end.0);
        body.put_i64(timestamp);
        body.put_u8(reply_requested.into());
    });
}

/// How far a reader is. Stock readers send positions in any relation to each other, and 0 for "never".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Received and written.
    pub write: Lsn,
    /// On disk.
    pub flush: Lsn,
    /// Replayed.
    pub apply: Lsn,
    /// When it was sent.
    pub timestamp: i64,
    /// The server shall answer with a keepalive at once.
    pub reply_requested: bool,
}

impl StandbyStatus {
    /// Appends the body of a CopyData message.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u8(STATUS_UPDATE);
        out.put_u64(self.write.0);
        out.put_u64(self.flush.0);
        out.put_u64(self.apply.0);
        out.put_i64(self.timestamp);
        out.put_u8(self.reply_requested.into());
    }

    fn decode_fields(body: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            write: Lsn(body.u64("write LSN")?),
            flush: Lsn(body.u64("flush LSN")?),
            apply: Lsn(body.u64("apply LSN")?),
            timestamp: body.i64("time")?,
            reply_requested: match body.u8("reply flag")? {
                0 => false,
                1 => true,
                other => return Err(DecodeError::Invalid("reply flag", other.to_string())),
            },
        })
    }
}

/// Appends the body of a CopyData message with hot-standby feedback.
pub fn encode_hot_standby_feedback(feedback: &HotStandbyFeedback, out: &mut BytesMut) {
    out.put_u8(HOT_STANDBY_FEEDBACK);
    out.put_i64(feedback.timestamp);
    // On the wire the 32 bits of the transaction id come first, then its epoch.
    out.put_u64(feedback.xmin.rotate_left(32));
    out.put_u64(feedback.catalog_xmin.rotate_left(32));
}

/// Reader to server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReaderMessage {
    /// `r`
    Status(StandbyStatus),
    /// `h`
    HotStandby(HotStandbyFeedback),
    /// `z`
    Pageserver(PageserverFeedback),
}

impl ReaderMessage {
    /// Decodes the body of a CopyData message.
    pub fn decode(body: Bytes) -> Result<Self, DecodeError> {
        if body.first() == Some(&PAGESERVER_FEEDBACK_TAG) {
            return PageserverFeedback::decode_message(body).map(Self::Pageserver);
        }
        let mut body = Reader::new(body);
        let message = match body.u8("tag")? {
            STATUS_UPDATE => Self::Status(StandbyStatus::decode_fields(&mut body)?),
            HOT_STANDBY_FEEDBACK => Self::HotStandby(HotStandbyFeedback {
                timestamp: body.i64("time")?,
                xmin: body.u64("xmin")?.rotate_left(32),
                catalog_xmin: body.u64("catalog xmin")?.rotate_left(32),
            }),
            tag => return Err(DecodeError::UnknownTag { what: "standby message type", value: tag.into() }),
        };
        body.finish("standby message")?;
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{backend, frame};

    const S: Lsn = Lsn(0x149_FD18);
    const T: Lsn = Lsn(0x1A2_B3C8);
    const T8: Lsn = Lsn(0x1A2_B3D0);
    const TIME: i64 = 725_846_400_000_000;

    fn bytes(hex_text: &str) -> Bytes {
        hex::decode(hex_text.replace(' ', "")).unwrap().into()
    }

    #[test]
    fn status_update_of_the_specification() {
        let update = StandbyStatus { write: T8, flush: T, apply: S, timestamp: TIME, reply_requested: false };
        let body = bytes("72 0000000001a2b3d0 0000000001a2b3c8 000000000149fd18 0002942748d56000 00");
        let mut out = BytesMut::new();
        update.encode(&mut out);
        assert_eq!(out, body);
        assert_eq!(ReaderMessage::decode(body), Ok(ReaderMessage::Status(update)));
    }

    #[test]
    fn hot_standby_feedback_of_the_specification() {
        let feedback = HotStandbyFeedback { timestamp: TIME, xmin: 3 << 32 | 1234, catalog_xmin: 3 << 32 | 1200 };
        let body = bytes("68 0002942748d56000 000004d2 00000003 000004b0 00000003");
        let mut out = BytesMut::new();
        encode_hot_standby_feedback(&feedback, &mut out);
        assert_eq!(out, body);
        assert_eq!(ReaderMessage::decode(body), Ok(ReaderMessage::HotStandby(feedback)));
    }

    #[test]
    fn xlog_data_of_the_specification() {
        let body = bytes("77 0000000001a2b3c8 0000000001a2b3d0 0002942748d56000 0102030405060708");
        let data = bytes("0102030405060708");
        let mut out = BytesMut::new();
        put_xlog_data_header(&mut out, T, T8, TIME, data.len());
        out.put_slice(&data);
        let frame = frame::decode(&mut out, 100).unwrap().unwrap();
        assert_eq!((frame.tag, &frame.body), (backend::tag::COPY_DATA, &body));
        let message = ServerMessage::XLogData { start: T, end: T8, timestamp: TIME, data };
        assert_eq!(ServerMessage::decode(body), Ok(message));
    }

    #[test]
    fn keepalive_of_the_specification() {
        let body = bytes("6b 0000000001a2b3d0 0002942748d56000 01");
        let mut out = BytesMut::new();
        put_keepalive(&mut out, T8, TIME, true);
        let frame = frame::decode(&mut out, 100).unwrap().unwrap();
        assert_eq!((frame.tag, &frame.body), (backend::tag::COPY_DATA, &body));
        let message = ServerMessage::Keepalive { end: T8, timestamp: TIME, reply_requested: true };
        assert_eq!(ServerMessage::decode(body), Ok(message));
    }

    #[test]
    fn lengths_are_exact() {
        let status = bytes("72 0000000001a2b3d0 0000000001a2b3c8 000000000149fd18 0002942748d56000 00");
        for length in 0..status.len() {
            assert!(ReaderMessage::decode(status.slice(..length)).is_err(), "{length} bytes");
        }
        let longer = [&status[..], b"x"].concat();
        assert!(ReaderMessage::decode(longer.into()).is_err());
        assert!(ServerMessage::decode(bytes("6b 0000000001a2b3d0 0002942748d56000 01 00")).is_err());
        assert!(ServerMessage::decode(bytes("77 0000000001a2b3c8 0000000001a2b3d0 0002942748d560")).is_err());
        assert!(ReaderMessage::decode(bytes("3f 00")).is_err(), "unknown kind");
        let flag_2 = bytes("72 0000000001a2b3d0 0000000001a2b3c8 000000000149fd18 0002942748d56000 02");
        assert!(ReaderMessage::decode(flag_2).is_err());
    }

    proptest! {
        #[test]
        fn status_round_trips(write: u64, flush: u64, apply: u64, timestamp: i64, reply_requested: bool) {
            let update = StandbyStatus { write: Lsn(write), flush: Lsn(flush), apply: Lsn(apply), timestamp, reply_requested };
            let mut out = BytesMut::new();
            update.encode(&mut out);
            prop_assert_eq!(ReaderMessage::decode(out.freeze()), Ok(ReaderMessage::Status(update)));
        }

        #[test]
        fn hot_standby_feedback_round_trips(timestamp: i64, xmin: u64, catalog_xmin: u64) {
            let feedback = HotStandbyFeedback { timestamp, xmin, catalog_xmin };
            let mut out = BytesMut::new();
            encode_hot_standby_feedback(&feedback, &mut out);
            prop_assert_eq!(ReaderMessage::decode(out.freeze()), Ok(ReaderMessage::HotStandby(feedback)));
        }

        #[test]
        fn keepalive_round_trips(end: u64, timestamp: i64, reply_requested: bool) {
            let mut out = BytesMut::new();
            put_keepalive(&mut out, Lsn(end), timestamp, reply_requested);
            let frame = frame::decode(&mut out, 100).unwrap().unwrap();
            let message = ServerMessage::Keepalive { end: Lsn(end), timestamp, reply_requested };
            prop_assert_eq!(ServerMessage::decode(frame.body), Ok(message));
        }

        #[test]
        fn arbitrary_bytes_never_panic(tag in prop::sample::select(&b"wkrhz?"[..]), rest: Vec<u8>) {
            let body = Bytes::from([&[tag], &rest[..]].concat());
            let _ = ReaderMessage::decode(body.clone());
            let _ = ServerMessage::decode(body);
        }
    }
}
