//! The primary is lost. Its standby takes over, and the former primary comes back: as it is, and then as a standby. Or the operator
//! thinks better of it, and it goes on.

use anyhow::{Context, Result, ensure};
use testkit::{Daemon, Network, Postgres, Random, wait_for};

use crate::RECOVERY;
use crate::faults::{member_or_none, wait_blocked};
use crate::world::World;

/// How the primary is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// kill -9.
    Kill,
    /// SIGSTOP; it goes on when its successor has been promoted.
    Pause,
    /// Cut off from the safekeepers, and reachable for clients.
    Isolate,
    /// Not at all: the operator is wrong.
    Alive,
}

const LOSSES: &[Loss] = &[Loss::Kill, Loss::Kill, Loss::Pause, Loss::Isolate, Loss::Alive];

/// The steps of `safekeeperctl failover prepare`.
const STEPS: &[&str] = &["look", "fence", "sync", "replay"];

/// How the former primary becomes a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    Rewind,
    Rebuild,
}

/// The primary's successor is promoted.
#[derive(Debug, Clone, Copy)]
pub struct Promotion {
    loss: Loss,
    /// In this step the preparation is killed, and then made again from the beginning.
    killed_in: Option<&'static str>,
    back: Return,
    /// This safekeeper, by index, is lost together with the primary, and comes back after the promotion.
    without: Option<usize>,
}

impl Promotion {
    pub fn choose(random: &mut Random, interrupted: bool) -> Promotion {
        let loss = random.pick(LOSSES).copied();
        let killed_in = if interrupted { random.pick(STEPS).copied() } else { None };
        let back = random.pick(&[Return::Rewind, Return::Rewind, Return::Rebuild]).copied();
        Promotion {
            loss: loss.unwrap_or(Loss::Kill),
            killed_in,
            back: back.unwrap_or(Return::Rewind),
            without: member_or_none(random),
        }
    }

    pub fn run(self, world: &mut World, random: &mut Random) -> Result<()> {
        self.loss.strike(world)?;
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.kill()?;
        }
        prepare(world, self.killed_in)?;
        world.ledger.fence(&world.cluster.primary);
        world.ledger.unfence(&world.standby);
        world.standby.promote()?;
        world.change_places();
        world.ledger.wait_progress(RECOVERY, 20).context("commits on the promoted standby")?;
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.start()?;
        }
        self.loss.revive(&world.cluster.network, &mut world.standby)?;
        wait_blocked(&world.standby).context("the former primary is back")?;
        world.ledger.wait_progress(RECOVERY, 20 + random.below(50)).context("commits beside the former primary")?;
        world.ledger.check(&world.cluster.primary).context("beside the former primary")?;
        self.rejoin(world)
    }

    /// The former primary becomes the standby.
    fn rejoin(self, world: &mut World) -> Result<()> {
        world.standby.kill9()?;
        let source = world.cluster.readers_conninfo("standby");
        let (scratch, primary) = (world.scratch, &world.cluster.primary);
        match self.back {
            Return::Rewind => world.standby.rewind(scratch, primary, &source)?,
            Return::Rebuild => world.standby.rebuild(scratch, primary, &source)?,
        }
        world.standby.start()?;
        let end = world.cluster.primary.flush_lsn()?;
        world.cluster.wait_replayed(&world.standby, end)
    }
}

/// A promotion is prepared and called off.
#[derive(Debug, Clone, Copy)]
pub struct Cancel {
    loss: Loss,
    /// As in [`Promotion`].
    killed_in: Option<&'static str>,
    /// This safekeeper, by index, is fenced and then away while the fence is lifted.
    without: Option<usize>,
}

impl Cancel {
    pub fn choose(random: &mut Random) -> Cancel {
        let loss = random.pick(LOSSES).copied().unwrap_or(Loss::Kill);
        let killed_in = if random.below(3) == 0 { random.pick(STEPS).copied() } else { None };
        Cancel { loss, killed_in, without: member_or_none(random) }
    }

    pub fn run(self, world: &mut World) -> Result<()> {
        self.loss.strike(world)?;
        prepare(world, self.killed_in)?;
        world.ledger.fence(&world.cluster.primary);
        // It is there, and might be taken for the primary.
        self.loss.revive(&world.cluster.network, &mut world.cluster.primary)?;
        wait_blocked(&world.cluster.primary).context("the primary is fenced off")?;
        world.ledger.check(&world.cluster.primary).context("fenced off")?;
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.kill()?;
        }
        world.ledger.unfence(&world.cluster.primary);
        lift(world)?;
        world.ledger.wait_progress(RECOVERY, 20).context("commits after the fence was lifted")?;
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.start()?;
            // Who was away still refuses the primary.
            lift(world)?;
        }
        Ok(())
    }
}

impl Loss {
    fn strike(self, world: &mut World) -> Result<()> {
        let place = world.primary_place();
        match self {
            Loss::Kill => world.cluster.primary.kill9(),
            Loss::Pause => world.cluster.primary.pause(),
            Loss::Isolate => {
                world.cluster.network.isolate(place);
                Ok(())
            }
            Loss::Alive => Ok(()),
        }
    }

    /// `server`, which was lost, is there again, and knows nothing.
    fn revive(self, network: &Network, server: &mut Postgres) -> Result<()> {
        match self {
            Loss::Kill => server.start(),
            Loss::Pause => server.resume(),
            Loss::Isolate => {
                network.heal();
                Ok(())
            }
            Loss::Alive => Ok(()),
        }
    }
}

/// Nothing that the primary writes from now on can be acknowledged, and the standby has all that was.
fn prepare(world: &World, killed_in: Option<&str>) -> Result<()> {
    let standby = world.standby.conninfo();
    let args = ["failover", "prepare", "--standby", &standby];
    if let Some(step) = killed_in {
        let mut ctl = Daemon::new(world.scratch, "safekeeperctl", world.safekeeperctl(&args));
        let before = ctl.output().len();
        ctl.start()?;
        wait_for(RECOVERY, &format!("the step {step}"), || {
            let reached = ctl.output().get(before..).is_some_and(|output| output.contains(&format!("  {step}: ")));
            ensure!(reached || ctl.check_alive().is_err(), "not yet");
            Ok(())
        })?;
        ctl.kill()?;
    }
    world.operate(&args).context("prepare")
}

/// The primary may go on.
fn lift(world: &World) -> Result<()> {
    world.operate(&["failover", "cancel", "--yes"]).context("cancel")
}
