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
        match packet {
            FirstPacket::Ssl | FirstPacket::Gss => {}
            FirstPacket::Startup(message) => {
                let _ = message.replication_mode();
                let _ = message.options().selector();
                message.encode(&mut BytesMut::new());
                break;
            }
            FirstPacket::DirectTls | FirstPacket::Cancel | FirstPacket::UnsupportedVersion { .. } => return,
        }
    }
    while let Ok(Some(frame)) = frame::decode(&mut buffer, MAX_BODY) {
        let _ = FrontendMessage::decode(frame);
    }
});
