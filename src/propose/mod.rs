//! Follows a stock PostgreSQL primary and proposes its WAL to the quorum.
//!
//! ```text
//!                    +------------------------- driver ------------------------+
//!  primary --WAL-->  | upstream -> buffer -> consensus proposer -> peer queues | --> safekeeper 1
//!          <--ack--  |                         commit LSN <-- acknowledgements | --> safekeeper 2
//!                    +----------------------------------------------------------+ --> safekeeper 3
//! ```
//!
//! It promises the primary: what is reported as flushed is durable on a majority of the safekeepers, in the term of this
//! proposer, and the report never goes back. Losing an election stops the reports; that is the fence against a second
//! proposer.
//!
//! | File | What is in it |
//! |---|---|
//! | [`driver`] | one term of office, from campaign to step-down |
//! | [`upstream`] | the stream from the primary and the reports to it |
//! | [`buffer`] | WAL received and not yet everywhere |
//! | [`peer`] | the connection to one safekeeper |
//! | [`donor`] | old WAL for a safekeeper that is far behind |
//! | [`connection`] | the client side of the Postgres protocol |
//! | [`status`] | what is shown to operators |

pub mod buffer;
pub mod connection;
mod donor;
mod driver;
mod peer;
pub mod safekeepers;
pub mod status;
pub mod upstream;
