//! A service that keeps the write-ahead log of PostgreSQL servers safe on a quorum of nodes.
//!
//! The rooms of the house, from the front door down. A room may use those below it, never those above.
//!
//! | Room | What it promises |
//! |---|---|
//! | [`operate`] | what an operator does across nodes and servers: failover, switchover |
//! | [`drain`] | takes a safekeeper out, step by step |
//! | [`http`] | the management API and `/metrics` |
//! | [`server`] | the Postgres-protocol endpoint |
//! | `propose` | follows a stock primary and proposes its WAL to the quorum |
//! | [`shutdown`] | which step of a shutdown comes when, for all that take part |
//! | [`receive`] | follows a log across safekeepers into a directory, a stream or an embedder |
//! | [`peers`] | what safekeepers tell each other |
//! | [`client`] | the client side of the Postgres protocol |
//! | `timeline` | one replicated log: its single writer, readers, registry |
//! | [`storage`] | WAL and control file on disk, over one `Disk` seam |
//! | [`consensus`] | acceptor and proposer as pure state machines |

pub mod client;
pub mod clock;
pub mod config;
pub mod consensus;
pub mod daemon;
pub mod drain;
pub mod http;
pub mod lanes;
pub mod metrics;
pub mod operate;
pub mod peers;
pub mod propose;
pub mod receive;
pub mod retry;
pub mod server;
pub mod shutdown;
pub mod storage;
pub mod timeline;
