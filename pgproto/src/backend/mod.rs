//! What a server sends, both ways: [`encode`] writes it for our clients, [`BackendMessage`] reads what other servers say.
//!
//! The same values stand on both sides ([`Column`], [`ErrorFields`]), so that what is written can be read back. Rows have
//! text columns only, as everywhere in the replication protocol.

use bytes::Bytes;

use crate::DecodeError;
use crate::frame::Frame;
use crate::read::Reader;

pub mod encode;
mod error;

pub use error::{ErrorFields, Severity, SqlState};

/// Tags of the messages of a server.
pub mod tag {
    /// Authentication requests and AuthenticationOk.
    pub const AUTHENTICATION: u8 = b'R';
    /// Cancellation key.
    pub const BACKEND_KEY_DATA: u8 = b'K';
    /// End of a command.
    pub const COMMAND_COMPLETE: u8 = b'C';
    /// COPY in both directions begins.
    pub const COPY_BOTH_RESPONSE: u8 = b'W';
    /// COPY to the server begins.
    pub const COPY_IN_RESPONSE: u8 = b'G';
    /// COPY from the server begins.
    pub const COPY_OUT_RESPONSE: u8 = b'H';
    /// Payload of a COPY.
    pub const COPY_DATA: u8 = b'd';
    /// End of a COPY.
    pub const COPY_DONE: u8 = b'c';
    /// A row.
    pub const DATA_ROW: u8 = b'D';
    /// Answer to an empty query.
    pub const EMPTY_QUERY_RESPONSE: u8 = b'I';
    /// An error.
    pub const ERROR_RESPONSE: u8 = b'E';
    /// Answer to an unsupported minor version or extension.
    pub const NEGOTIATE_PROTOCOL_VERSION: u8 = b'v';
    /// A warning or a hint.
    pub const NOTICE_RESPONSE: u8 = b'N';
    /// NOTIFY.
    pub const NOTIFICATION_RESPONSE: u8 = b'A';
    /// Value of a setting.
    pub const PARAMETER_STATUS: u8 = b'S';
    /// The server waits for a command.
    pub const READY_FOR_QUERY: u8 = b'Z';
    /// Columns of the rows to come.
    pub const ROW_DESCRIPTION: u8 = b'T';
}

/// Type of a column: the few that replication commands answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColumnType {
    /// `text`
    Text,
    /// `int4`
    Int4,
    /// `int8`
    Int8,
}

impl ColumnType {
    /// Type oid and length as in `pg_type`.
    pub fn oid_and_len(self) -> (u32, i16) {
        match self {
            ColumnType::Text => (25, -1),
            ColumnType::Int4 => (23, 4),
            ColumnType::Int8 => (20, 8),
        }
    }
}

/// A column to announce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its type.
    pub kind: ColumnType,
}

impl<'a> Column<'a> {
    /// A text column.
    pub fn text(name: &'a str) -> Self {
        Self { name, kind: ColumnType::Text }
    }
}

/// What a server asks or says about authentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authentication {
    /// Passed.
    Ok,
    /// A password in clear text is wanted.
    CleartextPassword,
    /// An MD5 hash with this salt is wanted.
    Md5Password([u8; 4]),
    /// SASL with one of these mechanisms is wanted.
    Sasl(Vec<String>),
    /// Challenge of the SASL mechanism.
    SaslContinue(Bytes),
    /// Last message of the SASL mechanism.
    SaslFinal(Bytes),
    /// A method that isn't spoken here (Kerberos, GSSAPI, SSPI), by its number.
    Other(u32),
}

/// A message of a server, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendMessage {
    /// `R`
    Authentication(Authentication),
    /// `S`
    ParameterStatus {
        /// Setting.
        name: String,
        /// Its value now.
        value: String,
    },
    /// `K`
    BackendKeyData {
        /// Process id.
        process_id: u32,
        /// Secret for a CancelRequest; 4 bytes in protocol 3.0.
        secret: Bytes,
    },
    /// `v`
    NegotiateProtocolVersion {
        /// Newest version the server speaks, major in the upper half.
        newest: u32,
        /// Extensions it doesn't know.
        unknown_extensions: Vec<String>,
    },
    /// `Z`, with the transaction status.
    ReadyForQuery(u8),
    /// `T`: names of the columns.
    RowDescription(Vec<String>),
    /// `D`: values, `None` for NULL.
    DataRow(Vec<Option<Bytes>>),
    /// `C`, with the command tag.
    CommandComplete(String),
    /// `I`
    EmptyQueryResponse,
    /// `W`
    CopyBothResponse,
    /// `H`
    CopyOutResponse,
    /// `G`
    CopyInResponse,
    /// `d`
    CopyData(Bytes),
    /// `c`
    CopyDone,
    /// `E`
    ErrorResponse(ErrorFields),
    /// `N`
    NoticeResponse(ErrorFields),
    /// `A`, not looked into.
    NotificationResponse,
}

impl BackendMessage {
    /// Decodes a message of a server.
    pub fn decode(frame: Frame) -> Result<Self, DecodeError> {
        let mut body = Reader::new(frame.body);
        let message = match frame.tag {
            tag::COPY_DATA => return Ok(Self::CopyData(body.rest())),
            tag::NOTIFICATION_RESPONSE => return Ok(Self::NotificationResponse),
            tag::AUTHENTICATION => Self::Authentication(decode_authentication(&mut body)?),
            tag::PARAMETER_STATUS => {
                Self::ParameterStatus { name: body.cstr("parameter name")?, value: body.cstr("parameter value")? }
            }
            tag::BACKEND_KEY_DATA => Self::BackendKeyData { process_id: body.u32("process id")?, secret: body.rest() },
            tag::NEGOTIATE_PROTOCOL_VERSION => decode_negotiation(&mut body)?,
            tag::READY_FOR_QUERY => Self::ReadyForQuery(body.u8("transaction status")?),
            tag::ROW_DESCRIPTION => Self::RowDescription(decode_columns(&mut body)?),
            tag::DATA_ROW => Self::DataRow(decode_row(&mut body)?),
            tag::COMMAND_COMPLETE => Self::CommandComplete(body.cstr("command tag")?),
            tag::EMPTY_QUERY_RESPONSE => Self::EmptyQueryResponse,
            tag::COPY_BOTH_RESPONSE | tag::COPY_OUT_RESPONSE | tag::COPY_IN_RESPONSE => {
                decode_copy_response(frame.tag, &mut body)?
            }
            tag::COPY_DONE => Self::CopyDone,
            tag::ERROR_RESPONSE => Self::ErrorResponse(ErrorFields::decode(&mut body)?),
            tag::NOTICE_RESPONSE => Self::NoticeResponse(ErrorFields::decode(&mut body)?),
            tag => return Err(DecodeError::UnknownTag { what: "backend message", value: tag.into() }),
        };
        body.finish("backend message")?;
        Ok(message)
    }
}

fn decode_authentication(body: &mut Reader) -> Result<Authentication, DecodeError> {
    Ok(match body.u32("authentication method")? {
        0 => Authentication::Ok,
        3 => Authentication::CleartextPassword,
        5 => Authentication::Md5Password(body.array("salt")?),
        10 => {
            let mut mechanisms = Vec::new();
            loop {
                let name = body.cstr("SASL mechanism")?;
                if name.is_empty() {
                    break Authentication::Sasl(mechanisms);
                }
                mechanisms.push(name);
            }
        }
        11 => Authentication::SaslContinue(body.rest()),
        12 => Authentication::SaslFinal(body.rest()),
        other => {
            body.rest();
            Authentication::Other(other)
        }
    })
}

fn decode_negotiation(body: &mut Reader) -> Result<BackendMessage, DecodeError> {
    let newest = body.u32("newest protocol version")?;
    let count = body.u32("number of extensions")?;
    // Nothing is allocated by the count: every name takes at least its terminator from the body.
    let unknown_extensions = (0..count).map(|_| body.cstr("extension")).collect::<Result<_, _>>()?;
    Ok(BackendMessage::NegotiateProtocolVersion { newest, unknown_extensions })
}

fn decode_columns(body: &mut Reader) -> Result<Vec<String>, DecodeError> {
    let count = body.u16("number of columns")?;
    (0..count)
        .map(|_| {
            let name = body.cstr("column name")?;
            // Table oid, attribute number, type oid, type length, type modifier, format.
            body.bytes(4 + 2 + 4 + 2 + 4 + 2, "column")?;
            Ok(name)
        })
        .collect()
}

fn decode_row(body: &mut Reader) -> Result<Vec<Option<Bytes>>, DecodeError> {
    let count = body.u16("number of values")?;
    (0..count)
        .map(|_| match body.i32("value length")? {
            -1 => Ok(None),
            length => {
                let length =
                    usize::try_from(length).map_err(|_| DecodeError::Invalid("value length", length.to_string()))?;
                body.bytes(length, "value").map(Some)
            }
        })
        .collect()
}

fn decode_copy_response(tag: u8, body: &mut Reader) -> Result<BackendMessage, DecodeError> {
    body.u8("copy format")?;
    let columns = body.u16("number of copy columns")?;
    body.bytes(usize::from(columns) * 2, "copy column formats")?;
    Ok(match tag {
        tag::COPY_BOTH_RESPONSE => BackendMessage::CopyBothResponse,
        tag::COPY_OUT_RESPONSE => BackendMessage::CopyOutResponse,
        _ => BackendMessage::CopyInResponse,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(tag: u8, body: &[u8]) -> Result<BackendMessage, DecodeError> {
        BackendMessage::decode(Frame { tag, body: Bytes::copy_from_slice(body) })
    }

    #[test]
    fn authentication_requests() {
        let auth = |body: &[u8]| match decode(tag::AUTHENTICATION, body) {
            Ok(BackendMessage::Authentication(auth)) => auth,
            other => panic!("{other:?}"),
        };
        assert_eq!(auth(&[0, 0, 0, 0]), Authentication::Ok);
        assert_eq!(auth(&[0, 0, 0, 3]), Authentication::CleartextPassword);
        assert_eq!(auth(&[0, 0, 0, 5, 1, 2, 3, 4]), Authentication::Md5Password([1, 2, 3, 4]));
        assert_eq!(auth(b"\0\0\0\x0aSCRAM-SHA-256\0\0"), Authentication::Sasl(vec!["SCRAM-SHA-256".into()]));
        assert_eq!(auth(b"\0\0\0\x0br=1"), Authentication::SaslContinue("r=1".into()));
        assert_eq!(auth(b"\0\0\0\x0cv=1"), Authentication::SaslFinal("v=1".into()));
        assert_eq!(auth(&[0, 0, 0, 7]), Authentication::Other(7));
    }

    #[test]
    fn counts_beyond_the_body_are_errors() {
        assert!(decode(tag::DATA_ROW, &[0xFF, 0xFF]).is_err());
        assert!(decode(tag::DATA_ROW, &[0, 1, 0xFF, 0xFF, 0xFF, 0xFE]).is_err(), "length -2");
        assert!(decode(tag::ROW_DESCRIPTION, &[0xFF, 0xFF, b'a', 0]).is_err());
        assert!(decode(tag::NEGOTIATE_PROTOCOL_VERSION, &[0, 3, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF]).is_err());
        assert!(decode(tag::COPY_BOTH_RESPONSE, &[0, 0, 3, 0, 0]).is_err());
        assert!(decode(tag::READY_FOR_QUERY, b"II").is_err(), "trailing byte");
        assert!(decode(b'?', b"").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bodies_never_panic(tag in prop::sample::select(&b"RKCWGHdcDIEvNASZT!"[..]), body: Vec<u8>) {
            let _ = decode(tag, &body);
        }
    }
}
