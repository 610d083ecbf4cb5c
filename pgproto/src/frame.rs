//! Message framing: one tag byte, a length that counts itself, a body.
//!
//! [`decode`] takes whole messages off the front of a read buffer without copying their bodies. A length above the
//! caller's limit is refused as soon as the five header bytes are there, before anything is buffered for it. The
//! `put_*` functions here are what the encoders of this crate build on.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::DecodeError;

/// Bytes in front of a body: the tag and the length.
pub const HEADER_LEN: usize = 5;

/// The length field counts itself.
const LENGTH_FIELD_LEN: u32 = 4;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What kind of message this is; the meaning depends on the direction.
    pub tag: u8,
    /// What follows the length field.
    pub body: Bytes,
}

/// Takes the first message off `buffer`, or nothing while it is incomplete.
///
/// `max_body` is the largest body allowed, in bytes. While a message is incomplete, room for the rest of it is reserved,
/// so that reading on doesn't grow the buffer step by step.
pub fn decode(buffer: &mut BytesMut, max_body: usize) -> Result<Option<Frame>, DecodeError> {
    let mut header = buffer.get(..HEADER_LEN).unwrap_or_default();
    if header.is_empty() {
        return Ok(None);
    }
    let tag = header.get_u8();
    let body_len = checked_body_len(header.get_u32(), max_body)?;
    let missing = (HEADER_LEN + body_len).saturating_sub(buffer.len());
    if missing > 0 {
        buffer.reserve(missing);
        return Ok(None);
    }
    buffer.advance(HEADER_LEN);
    Ok(Some(Frame { tag, body: buffer.split_to(body_len).freeze() }))
}

fn checked_body_len(length: u32, max_body: usize) -> Result<usize, DecodeError> {
    length
        .checked_sub(LENGTH_FIELD_LEN)
        .and_then(|body| usize::try_from(body).ok())
        .filter(|&body| body <= max_body)
        .ok_or_else(|| DecodeError::BadLength {
            what: "message",
            length: length.into(),
            min: LENGTH_FIELD_LEN.into(),
            max: u64::from(LENGTH_FIELD_LEN).saturating_add(max_body as u64),
        })
}

/// Appends the header of a message whose body of `body_len` bytes the caller writes itself.
///
/// Bodies come from this side and are far smaller than 4 GiB; a larger one would be announced as the largest possible.
pub fn put_header(out: &mut BytesMut, tag: u8, body_len: usize) {
    out.put_u8(tag);
    out.put_u32(wire_len(body_len.saturating_add(LENGTH_FIELD_LEN as usize)));
}

/// Appends a message; `body` writes what follows the length.
pub fn put(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    put_length_prefixed(out, body);
}

/// Appends a length that counts itself, then what `body` writes.
pub(crate) fn put_length_prefixed(out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u32(0);
    body(out);
    let length = wire_len(out.len().saturating_sub(start));
    if let Some(mut field) = out.get_mut(start..) {
        field.put_u32(length);
    }
}

/// Appends text and its terminator. NUL cannot occur inside a string of this protocol, so it is left out.
pub(crate) fn put_cstr(out: &mut BytesMut, text: &str) {
    out.extend(text.bytes().filter(|&byte| byte != 0));
    out.put_u8(0);
}

/// A length of ours as the protocol counts it.
pub(crate) fn wire_len(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_messages_one_by_one() {
        let mut buffer = BytesMut::new();
        put(&mut buffer, b'Q', |body| put_cstr(body, "SHOW x"));
        put(&mut buffer, b'X', |_| {});
        assert_eq!(decode(&mut buffer, 100).unwrap().unwrap(), Frame { tag: b'Q', body: "SHOW x\0".into() });
        assert_eq!(decode(&mut buffer, 100).unwrap().unwrap(), Frame { tag: b'X', body: Bytes::new() });
        assert_eq!(decode(&mut buffer, 100), Ok(None));
    }

    #[test]
    fn body_is_not_copied() {
        let mut buffer = BytesMut::from(&b"d\0\0\0\x07abc"[..]);
        let address = buffer.as_ptr() as usize;
        let frame = decode(&mut buffer, 3).unwrap().unwrap();
        assert_eq!(frame.body.as_ptr() as usize, address + HEADER_LEN);
    }

    #[test]
    fn lengths_are_refused_before_the_body_arrives() {
        for (length, max_body, fine) in [(3, 10, false), (0, 10, false), (4, 0, true), (15, 10, false), (14, 10, true)]
        {
            let mut buffer = BytesMut::new();
            buffer.put_u8(b'd');
            buffer.put_u32(length);
            assert_eq!(decode(&mut buffer, max_body).is_ok(), fine, "length {length}");
        }
        let mut huge = BytesMut::from(&[b'd', 0xFF, 0xFF, 0xFF, 0xFF][..]);
        let capacity = huge.capacity();
        assert!(decode(&mut huge, 1 << 20).is_err());
        assert_eq!(huge.capacity(), capacity, "nothing was reserved for it");
    }

    proptest! {
        #[test]
        fn round_trip_through_any_cut(tag: u8, body: Vec<u8>, cut in 0..100_usize) {
            let mut whole = BytesMut::new();
            put(&mut whole, tag, |out| out.put_slice(&body));
            let rest = whole.split_off(cut.min(whole.len()));
            let mut buffer = whole;
            if !rest.is_empty() {
                prop_assert_eq!(decode(&mut buffer, body.len()), Ok(None));
                buffer.extend_from_slice(&rest);
            }
            prop_assert_eq!(decode(&mut buffer, body.len()), Ok(Some(Frame { tag, body: body.into() })));
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, max_body in 0..10_000_usize) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = decode(&mut buffer, max_body) {
                prop_assert!(frame.body.len() <= max_body);
            }
        }
    }
}
