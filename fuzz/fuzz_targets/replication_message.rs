//! The messages inside COPY BOTH, in both directions.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use pgproto::replication::message::{ReaderMessage, ServerMessage};

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    let _ = ServerMessage::decode(data.clone());
    let _ = ReaderMessage::decode(data);
});
