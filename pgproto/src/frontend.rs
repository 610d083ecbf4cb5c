//! What a client sends after the StartupMessage.
//!
//! [`FrontendMessage::decode`] is the server's side; [`query`], [`password`], [`copy_data`], [`copy_done`] and
//! [`terminate`] write what our own clients need. The extended query protocol is recognised by its tags, not decoded:
//! replication sessions refuse it as PostgreSQL does.

use bytes::{Bytes, BytesMut};

use crate::DecodeError;
use crate::frame::{Frame, put, put_cstr};
use crate::read::Reader;

const BIND: u8 = b'B';
const CLOSE: u8 = b'C';
const COPY_DATA: u8 = b'd';
const COPY_DONE: u8 = b'c';
const COPY_FAIL: u8 = b'f';
const DESCRIBE: u8 = b'D';
const EXECUTE: u8 = b'E';
const FLUSH: u8 = b'H';
const FUNCTION_CALL: u8 = b'F';
const PARSE: u8 = b'P';
const PASSWORD: u8 = b'p';
const QUERY: u8 = b'Q';
const SYNC: u8 = b'S';
const TERMINATE: u8 = b'X';

/// A message of a client, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontendMessage {
    /// `Q`: one command as text.
    Query(String),
    /// `P`, `B`, `D`, `E`, `C`, `H`: the extended query protocol, up to the next Sync.
    Extended,
    /// `S`: end of a series of extended messages; always answered with ReadyForQuery.
    Sync,
    /// `F`: a call of a function by its number.
    FunctionCall,
    /// `d`: payload of a COPY.
    CopyData(Bytes),
    /// `c`: the client's end of a COPY.
    CopyDone,
    /// `f`: the client breaks off a COPY, and says why.
    CopyFail(String),
    /// `p`: a password or a SASL message, as the exchange has it.
    Password(Bytes),
    /// `X`: the client goes.
    Terminate,
}

impl FrontendMessage {
    /// Decodes a message of a client.
    pub fn decode(frame: Frame) -> Result<Self, DecodeError> {
        let mut body = Reader::new(frame.body);
        let message = match frame.tag {
            COPY_DATA => return Ok(Self::CopyData(body.rest())),
            PASSWORD => return Ok(Self::Password(body.rest())),
            BIND | CLOSE | DESCRIBE | EXECUTE | FLUSH | PARSE => return Ok(Self::Extended),
            FUNCTION_CALL => return Ok(Self::FunctionCall),
            QUERY => Self::Query(body.cstr("query")?),
            COPY_FAIL => Self::CopyFail(body.cstr("reason of CopyFail")?),
            COPY_DONE => Self::CopyDone,
            SYNC => Self::Sync,
            TERMINATE => Self::Terminate,
            tag => return Err(DecodeError::UnknownTag { what: "frontend message", value: tag.into() }),
        };
        body.finish("frontend message")?;
        Ok(message)
    }
}

/// Appends a simple query.
pub fn query(out: &mut BytesMut, text: &str) {
    put(out, QUERY, |body| put_cstr(body, text));
}

/// Appends a password in clear text.
pub fn password(out: &mut BytesMut, text: &str) {
    put(out, PASSWORD, |body| put_cstr(body, text));
}

/// Appends a CopyData message whose payload `body` writes.
pub fn copy_data(out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    put(out, COPY_DATA, body);
}

/// Appends the end of a COPY in this direction.
pub fn copy_done(out: &mut BytesMut) {
    put(out, COPY_DONE, |_| {});
}

/// Appends a goodbye.
pub fn terminate(out: &mut BytesMut) {
    put(out, TERMINATE, |_| {});
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame;

    fn decode(tag: u8, body: &[u8]) -> Result<FrontendMessage, DecodeError> {
        FrontendMessage::decode(Frame { tag, body: Bytes::copy_from_slice(body) })
    }

    #[test]
    fn query_of_the_specification() {
        let text = "START_WAL_PUSH (proto_version '3', allow_timeline_creation 'false')";
        let mut out = BytesMut::new();
        query(&mut out, text);
        assert_eq!(
            hex::encode(&out),
            "510000004853544152545f57414c5f50555348202870726f746f5f76657273696f6e202733272c20616c6c6f775f74696d656c696e65\
             5f6372656174696f6e202766616c7365272900"
        );
        let message = FrontendMessage::decode(frame::decode(&mut out, 1000).unwrap().unwrap());
        assert_eq!(message, Ok(FrontendMessage::Query(text.into())));
    }

    #[test]
    fn every_tag_and_no_other() {
        for tag in *b"PBDECH" {
            assert_eq!(decode(tag, b"anything"), Ok(FrontendMessage::Extended));
        }
        assert_eq!(decode(b'S', b""), Ok(FrontendMessage::Sync));
        assert_eq!(decode(b'F', b"x"), Ok(FrontendMessage::FunctionCall));
        assert_eq!(decode(b'X', b""), Ok(FrontendMessage::Terminate));
        assert_eq!(decode(b'c', b""), Ok(FrontendMessage::CopyDone));
        assert_eq!(decode(b'f', b"no\0"), Ok(FrontendMessage::CopyFail("no".into())));
        assert_eq!(decode(b'p', b"secret\0"), Ok(FrontendMessage::Password("secret\0".into())));
        for tag in [0, b'?', b'W', 0xFF] {
            assert!(matches!(decode(tag, b""), Err(DecodeError::UnknownTag { .. })));
        }
    }

    #[test]
    fn queries_are_one_terminated_text() {
        for bad in [&b""[..], b"SHOW x", b"a\0b\0", b"\xFF\0"] {
            assert!(decode(b'Q', bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(tag: u8, body: Vec<u8>) {
            let _ = decode(tag, &body);
        }

        #[test]
        fn copy_data_round_trips(payload: Vec<u8>) {
            let mut out = BytesMut::new();
            copy_data(&mut out, |body| body.extend_from_slice(&payload));
            let message = FrontendMessage::decode(frame::decode(&mut out, payload.len()).unwrap().unwrap());
            prop_assert_eq!(message, Ok(FrontendMessage::CopyData(payload.into())));
        }
    }
}
