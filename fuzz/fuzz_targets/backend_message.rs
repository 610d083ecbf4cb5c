//! What a server may send to our replication client.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use pgproto::backend::BackendMessage;
use pgproto::frame;

const MAX_BODY: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut buffer = BytesMut::from(data);
    while let Ok(Some(frame)) = frame::decode(&mut buffer, MAX_BODY) {
        let _ = BackendMessage::decode(frame);
    }
});
