//! The client side of the Postgres protocol: what our own programs speak to a primary and to safekeepers.
//!
//! | File | What is in it |
//! |---|---|
//! | [`connection`] | log in, run a command, COPY in both directions |
//! | `replication` | the questions a reader of WAL asks, and the answers as values |
//! | `safekeeper` | how our own programs log in to a safekeeper |

pub mod connection;
pub(crate) mod replication;
pub(crate) mod safekeeper;
