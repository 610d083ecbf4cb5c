//! Acceptor messages of both versions: what decodes must encode to something that decodes to the same.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use pgproto::walproposer::{AcceptorMessage, ProtocolVersion};

fuzz_target!(|data: &[u8]| {
    for version in [ProtocolVersion::V2, ProtocolVersion::V3, ProtocolVersion::V3Stock] {
        let Ok(message) = AcceptorMessage::decode(Bytes::copy_from_slice(data), version) else { continue };
        let mut out = BytesMut::new();
        message.encode(version, &mut out);
        assert_eq!(AcceptorMessage::decode(out.freeze(), version), Ok(message));
    }
});
