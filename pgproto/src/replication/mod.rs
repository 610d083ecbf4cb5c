//! The replication protocol: commands as text, and the messages inside COPY BOTH.
//!
//! * [`command`] parses what a client asks for: PostgreSQL's own commands (spec: postgres clients 3.1) and those of Neon
//!   (spec: wire protocol 2), by a real lexer and parser.
//! * [`message`] is what server and reader then say to each other in CopyData.
//! * [`check_slot_name`] knows what a replication slot can be called.

pub mod command;
mod lexer;
pub mod message;
mod slot_name;

pub use command::{Command, CommandError};
pub use slot_name::{BadSlotName, check_slot_name};
