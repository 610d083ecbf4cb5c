//! Page server feedback, as a message and as the block inside it.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use pgproto::feedback::PageserverFeedback;
use pgproto::read::Reader;

fuzz_target!(|data: &[u8]| {
    let data = Bytes::copy_from_slice(data);
    let _ = PageserverFeedback::decode_message(data.clone());
    let Ok(feedback) = PageserverFeedback::read(&mut Reader::new(data)) else { return };
    let mut out = BytesMut::new();
    feedback.encode_message(&mut out);
    assert_eq!(PageserverFeedback::decode_message(out.freeze()), Ok(feedback));
});
