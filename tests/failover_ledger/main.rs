//! The acknowledged-commit ledger: whatever is done to the cluster, round after round, no acknowledged transaction is lost, none
//! that was rolled back appears, and a former primary acknowledges nothing. Where a member leaves on purpose, no writer meets an error.
//!
//! Writers are attached to both servers all the time, also to the former primary after its successor was promoted. What became of
//! each transaction is kept outside the database, and compared with the primary after each round.
//!
//! Every ten rounds are of the kinds of [`ROUNDS`], in any order; so the default number has each kind twice, whatever the seed: once
//! with the walproposer, once with members that propose. Only full disks need root.
//!
//! `FAILOVER_ROUNDS` sets the number of rounds (default 20), `FAILOVER_SEED` repeats a run's choices. `FAILOVER_PROPOSING` may be
//! `walproposer` or `members`; without it both have their turn.

mod faults;
mod planned;
mod promotion;
mod world;

use anyhow::{Context, Result, ensure};
use testkit::{Cluster, Random, scenario, secs, wait_for};

use self::faults::Fault;
use self::planned::{Leave, Switchover};
use self::promotion::{Cancel, Promotion};
use self::world::World;

const DEFAULT_ROUNDS: u64 = 20;
/// After so many rounds everything starts from nothing. The table that is read after each round stays small.
const ROUNDS_PER_CLUSTER: u64 = ROUNDS.len() as u64;
/// An election, a catch-up and reconnections with back-off, on a busy machine.
const RECOVERY: std::time::Duration = secs(120);

/// What a cluster goes through.
const ROUNDS: [Kind; 10] = [
    Kind::Fault,
    Kind::Fault,
    Kind::Fault,
    Kind::Fault,
    Kind::Promotion,
    Kind::InterruptedPromotion,
    Kind::Cancel,
    Kind::Drain,
    Kind::RollingRestart,
    Kind::Switchover,
];

/// What happens in one round.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Something fails, and comes back.
    Fault,
    /// The primary is lost, and the standby promoted.
    Promotion,
    /// The same, and the preparation is killed and repeated.
    InterruptedPromotion,
    /// The primary is fenced off, nobody is promoted, and it goes on.
    Cancel,
    /// A member, or whoever proposes, is stopped cleanly and started again.
    Drain,
    /// The same with all of them, one after the other.
    RollingRestart,
    /// Primary and standby change places on purpose.
    Switchover,
}

/// The same, with everything that is chosen.
#[derive(Debug, Clone, Copy)]
enum Round {
    Fault(Fault),
    Promotion(Promotion),
    Cancel(Cancel),
    Leave(Leave),
    Switchover(Switchover),
}

impl Round {
    fn choose(kind: Kind, random: &mut Random, world: &World) -> Round {
        match kind {
            Kind::Fault => Round::Fault(Fault::choose(random, world)),
            Kind::Promotion => Round::Promotion(Promotion::choose(random, false)),
            Kind::InterruptedPromotion => Round::Promotion(Promotion::choose(random, true)),
            Kind::Cancel => Round::Cancel(Cancel::choose(random)),
            Kind::Drain => Round::Leave(Leave::one(random)),
            Kind::RollingRestart => Round::Leave(Leave::each(random)),
            Kind::Switchover => Round::Switchover(Switchover::choose(random)),
        }
    }

    fn run(self, world: &mut World, random: &mut Random) -> Result<()> {
        match self {
            Round::Fault(fault) => fault.strike(world, random),
            Round::Promotion(promotion) => promotion.run(world, random),
            Round::Cancel(cancel) => cancel.run(world),
            Round::Leave(leave) => leave.run(world),
            Round::Switchover(switchover) => switchover.run(world),
        }
    }
}

#[test]
fn whatever_fails_no_acknowledged_transaction_is_lost() {
    let rounds = std::env::var("FAILOVER_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_ROUNDS);
    let mut random = Random::from_env("FAILOVER_SEED");
    let mut done = 0;
    while done < rounds {
        let here = ROUNDS_PER_CLUSTER.min(rounds - done);
        // A cluster's choices depend on nothing that happened before it.
        let mut of_cluster = Random::new(random.next());
        scenario("failover-ledger", |scratch| {
            let mut world = World::start(scratch, done)?;
            let mut kinds = ROUNDS.to_vec();
            for round in done + 1..=done + here {
                let kind = kinds.swap_remove(usize::try_from(of_cluster.below(kinds.len() as u64))?);
                play(&mut world, &mut of_cluster, kind, &format!("round {round} of {rounds}"))?;
            }
            conclude(&mut world)
        });
        done += here;
    }
    println!("{done} rounds passed");
}

/// One round and the checks after it.
fn play(world: &mut World, random: &mut Random, kind: Kind, number: &str) -> Result<()> {
    let started = std::time::Instant::now();
    let round = Round::choose(kind, random, world);
    let name = format!("{number}, {round:?}");
    world.say(&format!("{name}, proposed by {:?}", world.proposing));
    world.ledger.wait_progress(RECOVERY, random.below(60)).with_context(|| name.clone())?;
    let outcome = round.run(world, random);
    let outcome = outcome.and_then(|()| world.ledger.wait_progress(RECOVERY, 20).context("commits afterwards"));
    // Whoever was struck is of use again; the next may strike another one.
    let outcome = outcome.and_then(|()| world.cluster.wait_committed(world.cluster.primary.flush_lsn()?));
    let outcome = outcome.and_then(|()| world.cluster.wait_acquainted());
    // What is lost says more than that something else didn't happen because of it.
    outcome.map_err(|error| match world.ledger.check(&world.cluster.primary) {
        Ok(tally) => error.context(format!("{name}, nothing is lost ({tally:?})")),
        Err(loss) => loss.context(format!("{name}, and {error:#}")),
    })?;
    let tally = world.ledger.check(&world.cluster.primary).with_context(|| name.clone())?;
    world.ledger.witness(&world.standby).with_context(|| format!("{name}: the standby"))?;
    world.say(&format!(
        "{number} passed in {:.1} s: {} acknowledged, {} rolled back, {} of {} unknown ones there",
        started.elapsed().as_secs_f64(),
        tally.acknowledged,
        tally.rolled_back,
        tally.unknown_present,
        tally.unknown
    ));
    Ok(())
}

/// At the end both servers have the same rows, and all safekeepers the same bytes.
fn conclude(world: &mut World) -> Result<()> {
    world.ledger.stop(RECOVERY)?;
    let cluster: &Cluster = &world.cluster;
    let end = cluster.primary.flush_lsn()?;
    cluster.wait_committed(end)?;
    cluster.wait_replayed(&world.standby, end)?;
    let [on_primary, on_standby] = [&cluster.primary, &world.standby].map(|server| world.ledger.check(server));
    let (on_primary, on_standby) = (on_primary?, on_standby.context("the standby at the end")?);
    ensure!(on_primary == on_standby, "{on_primary:?} on the primary, {on_standby:?} on the standby");
    wait_for(RECOVERY, "the same WAL on all safekeepers", || cluster.compare_copies(end))?;
    world.say(&format!("all copies are equal up to {end}"));
    Ok(())
}
