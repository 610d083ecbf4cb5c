//! ErrorResponse and NoticeResponse: what went wrong, in the fields PostgreSQL uses.

use std::fmt;

use bytes::{BufMut, BytesMut};

use super::tag;
use crate::DecodeError;
use crate::frame::{put, put_cstr};
use crate::read::Reader;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The command failed, the session goes on.
    Error,
    /// The session ends.
    Fatal,
    /// The server restarts.
    Panic,
    /// Nothing failed.
    Warning,
    /// Anything a server says below a warning.
    Notice,
}

impl Severity {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
            Severity::Panic => "PANIC",
            Severity::Warning => "WARNING",
            Severity::Notice => "NOTICE",
        }
    }

    fn parse(word: &str) -> Self {
        match word {
            "ERROR" => Severity::Error,
            "FATAL" => Severity::Fatal,
            "PANIC" => Severity::Panic,
            "WARNING" => Severity::Warning,
            _ => Severity::Notice,
        }
    }
}

/// Five characters that tell programs what went wrong.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState([u8; 5]);

impl SqlState {
    /// Success; also how a server says that it ended a stream on purpose.
    pub const SUCCESSFUL_COMPLETION: SqlState = SqlState(*b"00000");
    /// The peer broke the protocol.
    pub const PROTOCOL_VIOLATION: SqlState = SqlState(*b"08P01");
    /// Not offered.
    pub const FEATURE_NOT_SUPPORTED: SqlState = SqlState(*b"0A000");
    /// A parameter has a value it cannot have.
    pub const INVALID_PARAMETER_VALUE: SqlState = SqlState(*b"22023");
    /// A name that it cannot be.
    pub const INVALID_NAME: SqlState = SqlState(*b"42602");
    /// A name with too many bytes.
    pub const NAME_TOO_LONG: SqlState = SqlState(*b"42622");
    /// The command could not be parsed.
    pub const SYNTAX_ERROR: SqlState = SqlState(*b"42601");
    /// No such setting or slot.
    pub const UNDEFINED_OBJECT: SqlState = SqlState(*b"42704");
    /// The slot exists already.
    pub const DUPLICATE_OBJECT: SqlState = SqlState(*b"42710");
    /// No space is left.
    pub const DISK_FULL: SqlState = SqlState(*b"53100");
    /// There are as many of these as there may be.
    pub const CONFIGURATION_LIMIT_EXCEEDED: SqlState = SqlState(*b"53400");
    /// The node isn't in a state to do this.
    pub const OBJECT_NOT_IN_PREREQUISITE_STATE: SqlState = SqlState(*b"55000");
    /// The primary whose WAL it is has been fenced off. Not PostgreSQL's; of its class 55, as the one above.
    pub const FENCED_OFF: SqlState = SqlState(*b"55F01");
    /// Somebody else uses it.
    pub const OBJECT_IN_USE: SqlState = SqlState(*b"55006");
    /// What was under way took too long.
    pub const QUERY_CANCELED: SqlState = SqlState(*b"57014");
    /// The server ends the session.
    pub const ADMIN_SHUTDOWN: SqlState = SqlState(*b"57P01");
    /// Nothing was received for too long.
    pub const IDLE_SESSION_TIMEOUT: SqlState = SqlState(*b"57P05");
    /// Not now, try another host: libpq does.
    pub const CANNOT_CONNECT_NOW: SqlState = SqlState(*b"57P03");
    /// Input or output failed.
    pub const IO_ERROR: SqlState = SqlState(*b"58030");
    /// WAL or a file isn't there any more.
    pub const UNDEFINED_FILE: SqlState = SqlState(*b"58P01");
    /// Anything else.
    pub const INTERNAL_ERROR: SqlState = SqlState(*b"XX000");
    /// Stored data is damaged.
    pub const DATA_CORRUPTED: SqlState = SqlState(*b"XX001");

    /// The five characters.
    pub fn as_str(&self) -> &str {
        // Only ASCII is ever stored.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// Reads five upper-case letters or digits.
    pub fn parse(text: &str) -> Option<Self> {
        let code: [u8; 5] = text.as_bytes().try_into().ok()?;
        code.iter().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()).then_some(SqlState(code))
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The fields of an error or a notice that matter here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message} ({code})", severity.as_str())]
pub struct ErrorFields {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, for programs.
    pub code: SqlState,
    /// What it is, for people.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ErrorFields {
    /// An error after which the session goes on.
    pub fn error(code: SqlState, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, code, message: message.into(), detail: None, hint: None }
    }

    /// An error that ends the session.
    pub fn fatal(code: SqlState, message: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, ..Self::error(code, message) }
    }

    /// Adds a detail.
    #[must_use]
    pub fn with_detail(self, detail: impl Into<String>) -> Self {
        Self { detail: Some(detail.into()), ..self }
    }

    /// Adds a hint.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Appends an ErrorResponse.
    pub fn encode(&self, out: &mut BytesMut) {
        put(out, tag::ERROR_RESPONSE, |body| {
            let mut field = |code: u8, text: &str| {
                body.put_u8(code);
                put_cstr(body, text);
            };
            field(b'S', self.severity.as_str());
            // The severity again, never translated. Clients since 9.6 look at this one.
            field(b'V', self.severity.as_str());
            field(b'C', self.code.as_str());
            field(b'M', &self.message);
            if let Some(detail) = &self.detail {
                field(b'D', detail);
            }
            if let Some(hint) = &self.hint {
                field(b'H', hint);
            }
            body.put_u8(0);
        });
    }

    /// Reads the fields; those not known here are skipped. Missing ones get a value that says so.
    pub(super) fn decode(body: &mut Reader) -> Result<Self, DecodeError> {
        let mut fields = Self::error(SqlState::INTERNAL_ERROR, "(no message)");
        let mut translated = None;
        let mut untranslated = None;
        loop {
            let code = body.u8("error field")?;
            if code == 0 {
                break;
            }
            let text = body.cstr("error field")?;
            match code {
                b'S' => translated = Some(Severity::parse(&text)),
                b'V' => untranslated = Some(Severity::parse(&text)),
                b'C' => {
                    fields.code =
                        SqlState::parse(&text).ok_or_else(|| DecodeError::Invalid("SQLSTATE", text.clone()))?;
                }
                b'M' => fields.message = text,
                b'D' => fields.detail = Some(text),
                b'H' => fields.hint = Some(text),
                _ => {}
            }
        }
        fields.severity = untranslated.or(translated).unwrap_or(Severity::Error);
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::BackendMessage;
    use crate::frame;

    #[test]
    fn published_errors_are_read() {
        for (hex_text, code, message) in [
            (
                "45 0000002d 53 4552524f5200 43 585830303000 4d 4a57542061757468656e7469636174696f6e206572726f7200 00",
                SqlState::INTERNAL_ERROR,
                "JWT authentication error",
            ),
            (
                "4500000042534552524f5200433030303030004d656e64696e672073747265616d696e6720746f2070616765736572766572\
                 2d3120617420302f314132423344300000",
                SqlState::SUCCESSFUL_COMPLETION,
                "ending streaming to pageserver-1 at 0/1A2B3D0",
            ),
        ] {
            let bytes = hex::decode(hex_text.replace(' ', "")).unwrap();
            let frame = frame::decode(&mut BytesMut::from(&bytes[..]), 1000).unwrap().unwrap();
            let decoded = BackendMessage::decode(frame).unwrap();
            assert_eq!(decoded, BackendMessage::ErrorResponse(ErrorFields::error(code, message)));
        }
    }

    #[test]
    fn display_says_everything_that_matters() {
        let error = ErrorFields::fatal(SqlState::CANNOT_CONNECT_NOW, "not here");
        assert_eq!(error.to_string(), "FATAL: not here (57P03)");
    }

    #[test]
    fn sql_states_are_five_letters_or_digits() {
        assert_eq!(SqlState::parse("57P03"), Some(SqlState::CANNOT_CONNECT_NOW));
        for bad in ["", "57p03", "57P0", "57P031", "57P0é"] {
            assert_eq!(SqlState::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(message in "[^\0]*", detail in prop::option::of("[^\0]*"), hint in prop::option::of("[^\0]*")) {
            let fields = ErrorFields { detail, hint, ..ErrorFields::fatal(SqlState::IO_ERROR, message) };
            let mut out = BytesMut::new();
            fields.encode(&mut out);
            let frame = frame::decode(&mut out, 100_000).unwrap().unwrap();
            prop_assert_eq!(BackendMessage::decode(frame).unwrap(), BackendMessage::ErrorResponse(fields));
        }
    }
}
