//! Consensus as transcripts: what is said, and what must follow.

mod acceptor;
mod membership;
mod proposer;
mod timelines;
