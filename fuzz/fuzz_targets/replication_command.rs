//! The text of a command.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pgproto::replication::command::Command;

fuzz_target!(|text: &str| {
    if let Err(error) = Command::parse(text) {
        let _ = (error.sqlstate(), error.to_string());
    }
});
