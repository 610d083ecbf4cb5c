//! Crashes and faults of the disk under the life of a node: what was promised holds, or nothing more is said.
//!
//! The [`script`] is lived by real acceptors over real stores ([`node`]); [`life`] writes down what was promised at which
//! disk operation, and [`promises`] tells whether it holds after a fault. Then:
//!
//! * [`crash`]: the disk stops in every operation, and while the node recovers from that.
//! * [`failing`]: every operation fails once.
//! * [`full`]: the disk is full from every step on, or finds no space at a single operation.
//! * [`bitrot`]: bits flip in every file of nodes at rest.
//! * [`cuts`]: ends of a log that the script doesn't have.
//! * [`begun_anew`]: crashes while a log gives way to one that begins in another place.
//!
//! The environment variable `FAULT_ROUNDS` multiplies what is chosen by chance; 1 when it is not set.

mod begun_anew;
mod bitrot;
mod crash;
mod cuts;
mod failing;
mod full;
mod life;
mod node;
mod promises;
mod script;

/// How many times what is chosen by chance is chosen.
fn rounds() -> u64 {
    let set = std::env::var("FAULT_ROUNDS").ok();
    set.map_or(1, |rounds| rounds.parse().expect("FAULT_ROUNDS is a number"))
}
