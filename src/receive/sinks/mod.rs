//! The sinks that come with the receiver.
//!
//! | File | What is in it |
//! |---|---|
//! | [`directory`] | segment files as `pg_receivewal` leaves them |
//! | [`stdout`] | the bare bytes, into a pipe |
//! | `segment` | one segment file while it is written |
//! | [`archive`] | names in such a directory, and reading what the files hold |
//! | [`compression`] | gzip, LZ4 and Zstandard |

pub mod archive;
pub mod compression;
pub mod directory;
mod segment;
pub mod stdout;

#[cfg(test)]
pub(in crate::receive) mod tests;

pub use compression::{Compression, Method};
pub use directory::DirectorySink;
pub use stdout::StreamSink;
