//! Follows a log across safekeepers, or other PostgreSQL servers, into a [`Sink`]: the library behind `walreceiver`, which
//! page servers and other users of WAL embed.
//!
//! What a user can rely on:
//!
//! * The sink is given one unbroken run of WAL, from the position it asked for. Each byte was checked before: it belongs to a
//!   record with the right checksum, behind the record that it says it follows, in a page with the right address. A gap, a
//!   byte of another log or of another database cluster ends the connection, or all, but is never written.
//! * The loss of a node is no reason to end. The next connection goes to whichever node is best by the rules of
//!   [`candidates`]; a node that fails is left alone for a time that grows, and is as good as any other once it works.
//! * Where the primary's Postgres timeline ends, the sink is told, gets the history file, and goes on under the next one.
//! * The nodes hear what the sink reports, as a hot standby or as a page server does ([`Feedback`]).
//! * Memory is bounded, whatever the nodes send and however slow the sink is.
//!
//! ```text
//!   probe (one per other node) --answers--> receiver <--events-- stream (the node that is followed)
//!                                            |  |  ----reports--->
//!                            candidates: which?  +--> scanner: is it right? --> sink
//! ```
//!
//! | File | What is in it |
//! |---|---|
//! | [`candidates`] | which node to follow, and when to leave it |
//! | [`receiver`] | chooses, connects, checks what comes and hands it to the sink |
//! | `stream` | the connection to the node that is followed |
//! | `probe` | asks the other nodes how far they are |
//! | [`node`] | how to log in at a node, and what can be wrong with one |
//! | [`sink`] | what takes the WAL |
//! | [`sinks`] | a directory, standard output |
//! | [`slot`] | makes and drops the replication slot |
//! | [`status`] | what is shown to operators |
//! | [`verify`] | whether a directory is one unbroken chain |

pub mod candidates;
pub mod node;
mod probe;
pub mod receiver;
pub mod sink;
pub mod sinks;
pub mod slot;
pub mod status;
mod stream;
pub mod verify;

pub use receiver::{ReceiveError, Settings, Start, run};
pub use sink::{Feedback, Origin, Position, Sink, SinkError};

#[cfg(test)]
mod tests;
