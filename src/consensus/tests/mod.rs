//! Consensus as transcripts: what is said, and what must follow.

mod acceptor;
mod fence;
mod membership;
mod proposer;
mod stock_primary;
mod timelines;
