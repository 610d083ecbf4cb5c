//! The consensus of one timeline: acceptor and proposer as pure state machines.
//!
//! Messages go in, ordered actions come out. There is no I/O here, no clock, no randomness, no async and no lock, so the
//! same code runs in the daemons, in simulation and in a model checker.
//!
//! | File | What is in it |
//! |---|---|
//! | [`acceptor`] | the safekeeper's side: votes, appends, what is cut |
//! | [`proposer`] | the other side: campaign, who lacks what, what is committed |
//! | [`state`] | what an acceptor keeps durably |
//! | [`history`] | which term wrote which part of the log |
//! | [`timelines`] | which Postgres timeline did, and whether a primary fits |
//! | [`membership`] | who counts, also while that changes |
//! | [`health`] | what a node may do that can't vouch for its log |

pub mod acceptor;
pub mod health;
pub mod history;
pub mod membership;
pub mod proposer;
pub mod state;
pub mod timelines;

#[cfg(test)]
mod tests;
