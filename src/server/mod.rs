//! The Postgres-protocol endpoint: proposers push WAL in here, readers pull it out.
//!
//! # NAME
//!
//! server - speaks to stock PostgreSQL programs, to Neon's, and to our own walproposer
//!
//! # SYNOPSIS
//!
//! ```text
//! accept --> handshake --> session: one command after the other
//!                             |  identify_system  show  timeline_status  timeline_history
//!                             |  start_wal_push     COPY BOTH with a proposer, until it leaves
//!                             |  start_replication  COPY BOTH with a reader, back to commands after CopyDone
//! ```
//!
//! # PROMISES
//!
//! * Nothing a client sends ends more than its own connection, and nothing it sends makes the server hold more than one
//!   bounded message for it.
//! * Every refusal is an ErrorResponse with a SQLSTATE, the reason and, where there is one, what to do. Connections are
//!   closed without a word only on the client's own wish, on a broken socket, and on a dead reader, as PostgreSQL does.
//! * A replication connection to a timeline that cannot be served here is refused at startup with 57P03: the only answer
//!   after which libpq tries the next host of its list.
//! * Once the shutdown has begun nobody is let in (57P03). Sessions end as soon as what is in hand is done: readers have what
//!   is committed, proposers an acknowledgement of what they sent.
//! * Readers without a term see WAL up to the commit LSN, never more. A commit LSN of 0 is not told as a position.
//!
//! # FILES
//!
//! | File | What is in it |
//! |---|---|
//! | [`mod@self`] | [`serve`], [`ServerConfig`], the limits |
//! | `listener` | the accept loop, connection limit |
//! | `connection` | messages in, messages out, over one socket |
//! | `interrupt` | how a command or a session ends |
//! | `handshake` | first packets, choice of the timeline, letting the client in |
//! | `session` | the command loop |
//! | `settings` | what a client is told before its first command |
//! | `identify_system`, `show`, `status`, `timeline_history` | commands with an answer |
//! | `slots` | replication slots |
//! | `fence` | keeps a lost primary out |
//! | `members` | who else keeps a timeline, and what safekeepers tell each other |
//! | `start_wal_push` | a proposer's stream |
//! | `start_replication`, `horizon` | a reader's stream, and how far it may see |
//!
//! There is no authentication and no encryption yet: SSLRequest is answered with "no", everybody is let in.

mod connection;
mod fence;
mod handshake;
mod horizon;
mod identify_system;
mod interrupt;
mod listener;
mod members;
mod session;
mod settings;
mod show;
mod slots;
mod start_replication;
mod start_wal_push;
mod status;
#[cfg(test)]
mod tests;
mod timeline_history;

use std::time::Duration;

#[cfg(feature = "simulation")]
pub use horizon::{Horizon, cut};
#[cfg(feature = "simulation")]
pub use interrupt::Interrupt;
pub use listener::serve;

/// Sessions at a time. A walproposer needs one, a standby one or two.
pub const MAX_CONNECTIONS: usize = 1000;

/// Connections beyond [`MAX_CONNECTIONS`] that are being told so. When these are used up, nothing more is accepted.
const MAX_REFUSALS: usize = 64;

/// First packets must be there within this time (PostgreSQL's `authentication_timeout`).
const STARTUP_LIMIT: Duration = Duration::from_secs(60);

/// The same while the server stops: a client that connects sends them at once.
const LAST_STARTUP_LIMIT: Duration = Duration::from_millis(200);

/// Largest body of a message that carries a command or a reader's report. The largest real ones have a few hundred bytes.
const MAX_COMMAND_BODY: usize = 64 * 1024;

/// Largest body of a proposer's message. An AppendRequest has 128 KiB of WAL; an Elected grows with the term history.
const MAX_PUSH_BODY: usize = pgproto::walproposer::MAX_MESSAGE_SIZE;

/// Bytes read from a socket at a time, at least.
const READ_AHEAD: usize = 64 * 1024;

/// Knobs of [`serve`]. The defaults are those of Neon's safekeeper and of PostgreSQL.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Sessions at a time.
    pub max_connections: usize,
    /// A connection on which nothing was received for this long is closed.
    pub idle_limit: Duration,
    /// A reader that was silent for this long is taken for dead (PostgreSQL's `wal_sender_timeout`). The same limit is on
    /// writing to a peer that doesn't read.
    pub reader_limit: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_connections: MAX_CONNECTIONS,
            idle_limit: Duration::from_secs(600),
            reader_limit: Duration::from_secs(60),
        }
    }
}
