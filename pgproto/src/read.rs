//! Reading fields out of a message body, checked: the one place where lengths meet bytes.

use bytes::{Buf, Bytes};

/// Why a message could not be decoded. The peer is at fault, never the reader.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ended inside the named field.
    #[error("message ended inside {0}")]
    Truncated(&'static str),
    /// A NUL-terminated string had no terminator, or text was not UTF-8.
    #[error("{0} is not a NUL-terminated UTF-8 string")]
    BadString(&'static str),
    /// Bytes were left over behind the last field.
    #[error("{0} has {1} bytes behind its last field")]
    TrailingBytes(&'static str, usize),
    /// A length was outside the range that the protocol or this server allows.
    #[error("length {length} of {what} is outside {min}..={max}")]
    BadLength {
        /// The message or field.
        what: &'static str,
        /// The length as sent.
        length: u64,
        /// Smallest length allowed.
        min: u64,
        /// Largest length allowed.
        max: u64,
    },
    /// A tag or kind was not known here.
    #[error("unknown {what} {value:#04x}")]
    UnknownTag {
        /// What the tag selects.
        what: &'static str,
        /// The tag as sent.
        value: u64,
    },
    /// A field had a value that the protocol doesn't allow.
    #[error("invalid {0}: {1}")]
    Invalid(&'static str, String),
}

/// Reads fields from the front of a body. Every method fails instead of panicking when bytes are missing.
#[derive(Debug)]
pub struct Reader {
    rest: Bytes,
}

macro_rules! fixed_width {
    ($($(#[$doc:meta])* $name:ident, $get:ident, $type:ty;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&mut self, field: &'static str) -> Result<$type, DecodeError> {
                if self.rest.remaining() < size_of::<$type>() {
                    return Err(DecodeError::Truncated(field));
                }
                Ok(self.rest.$get())
            }
        )*
    };
}

impl Reader {
    /// Starts at the front of `body`.
    pub fn new(body: Bytes) -> Self {
        Self { rest: body }
    }

    fixed_width! {
        /// One byte.
        u8, get_u8, u8;
        /// Big-endian.
        u16, get_u16, u16;
        /// Big-endian.
        u32, get_u32, u32;
        /// Big-endian.
        u64, get_u64, u64;
        /// Big-endian.
        i16, get_i16, i16;
        /// Big-endian.
        i32, get_i32, i32;
        /// Big-endian.
        i64, get_i64, i64;
        /// Little-endian.
        u16_le, get_u16_le, u16;
        /// Little-endian.
        u32_le, get_u32_le, u32;
        /// Little-endian.
        u64_le, get_u64_le, u64;
        /// Little-endian.
        i64_le, get_i64_le, i64;
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.remaining()
    }

    /// The next `count` bytes, sharing the buffer.
    pub fn bytes(&mut self, count: usize, field: &'static str) -> Result<Bytes, DecodeError> {
        if self.rest.remaining() < count {
            return Err(DecodeError::Truncated(field));
        }
        Ok(self.rest.split_to(count))
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        self.bytes(N, field)?.copy_to_slice(&mut array);
        Ok(array)
    }

    /// Text up to the next NUL, which is consumed.
    pub fn cstr(&mut self, field: &'static str) -> Result<String, DecodeError> {
        let end = self.rest.iter().position(|&b| b == 0).ok_or(DecodeError::BadString(field))?;
        let text = self.rest.split_to(end);
        self.rest.advance(1);
        String::from_utf8(text.to_vec()).map_err(|_| DecodeError::BadString(field))
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> Bytes {
        self.rest.split_off(0)
    }

    /// Succeeds only when nothing is left.
    pub fn finish(self, message: &'static str) -> Result<(), DecodeError> {
        match self.rest.remaining() {
            0 => Ok(()),
            left => Err(DecodeError::TrailingBytes(message, left)),
        }
    }
}
