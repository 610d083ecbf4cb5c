//! The consensus of one timeline: acceptor and proposer as pure state machines.
//!
//! Messages go in, ordered actions come out. There is no I/O here, no clock, no randomness, no async and no lock, so the
//! same code runs in the daemons, in simulation and in a model checker.

pub mod acceptor;
pub mod health;
pub mod history;
pub mod membership;
pub mod proposer;
pub mod state;
pub mod timelines;

#[cfg(test)]
mod tests;
