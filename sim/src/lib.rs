//! The cluster put to the proof by machines.
//!
//! [`model`] runs the real acceptors and proposers inside a model checker: every order of messages, losses, crashes and
//! membership changes within a bound. [`cluster`] runs whole timelines with simulated disks, network and time: fewer
//! orders, but all of the code.

#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "serves tests alone: a surprise must end the run"
)]
pub mod cluster;
pub mod model;
