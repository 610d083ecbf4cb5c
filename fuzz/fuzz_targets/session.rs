//! What a client may send on a fresh connection: first packets, then messages.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use pgproto::frame;
use pgproto::frontend::FrontendMessage;
use pgproto::startup::{self, FirstPacket};

const MAX_BODY: usize = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut buffer = BytesMut::from(data);
    while let Ok(Some(packet)) = startup::decode(&mut buffer) {
        if let FirstPacket::Startup(message) = packet {
            let _ = message.replication_mode();
            let _ = message.options().selector();
            let mut out = BytesMut::new();
            message.encode(&mut out);
            break;
        }
    }
    while let Ok(Some(frame)) = frame::decode(&mut buffer, MAX_BODY) {
        let _ = FrontendMessage::decode(frame);
    }
});
