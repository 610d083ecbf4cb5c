//! The bytes of the PostgreSQL protocol and of the safekeeper's own messages.
//!
//! This crate promises three things:
//!
//! * **Bytes only.** No sockets, no files, no clock. A caller brings a buffer and gets values, or the other way round.
//! * **No panic and no unbounded allocation on any input.** Every length is checked against the bytes at hand before
//!   anything is allocated or sliced; every failure is a [`DecodeError`] that names what was wrong.
//! * **No copy of payloads.** WAL inside a message is a slice ([`bytes::Bytes`]) of the buffer it arrived in.
//!
//! | Module | What it speaks |
//! |---|---|
//! | [`frame`] | message framing: tag, length, body |
//! | [`startup`] | the untagged first packets and version negotiation |
//! | [`backend`] | what a server sends: authentication, rows, errors, COPY |
//! | [`frontend`] | what a client sends: queries, COPY, terminate |
//! | [`replication`] | replication commands and the messages inside COPY BOTH |
//! | [`walproposer`] | proposer and acceptor messages, protocol 2 and 3, and the extension for stock PostgreSQL |
//! | [`feedback`] | what page servers and standbys report back |
//! | [`wal`] | WAL page headers, record boundaries, checksums |
//! | [`pg_timeline`] | which Postgres timeline wrote which part of the log |
//! | [`host_port`] | network addresses |
//! | [`lsn`], [`ids`] | numbers that know what they are |

pub mod backend;
pub mod feedback;
pub mod frame;
pub mod frontend;
pub mod host_port;
pub mod ids;
pub mod lsn;
pub mod pg_timeline;
pub mod read;
pub mod replication;
pub mod startup;
pub mod wal;
pub mod walproposer;

pub use host_port::HostPort;
pub use ids::{Generation, NodeId, SystemId, TenantId, TenantTimelineId, Term, TimelineId};
pub use lsn::{Lsn, SegmentNumber, SegmentSize};
pub use pg_timeline::{Ancestry, PgTimelineId};
pub use read::DecodeError;
