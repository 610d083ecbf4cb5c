//! The primary is lost, its standby takes over, and the former primary comes back: as it is, and then as a standby.

use anyhow::{Context, Result};
use testkit::{Launch, Network, Random, run_within};

use crate::RECOVERY;
use crate::faults::wait_blocked;
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

/// How the former primary becomes a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    Rewind,
    Rebuild,
}

/// A round.
#[derive(Debug, Clone, Copy)]
pub struct Promotion {
    loss: Loss,
    back: Return,
    /// This safekeeper, by index, is lost together with the primary, and comes back after the promotion.
    without: Option<usize>,
}

impl Promotion {
    pub fn choose(random: &mut Random) -> Promotion {
        let loss = random.pick(&[Loss::Kill, Loss::Kill, Loss::Pause, Loss::Isolate, Loss::Alive]).copied();
        let back = random.pick(&[Return::Rewind, Return::Rewind, Return::Rebuild]).copied();
        let without = [Some(0), Some(1), Some(2), None, None, None];
        let without = random.pick(&without).copied().flatten();
        Promotion { loss: loss.unwrap_or(Loss::Kill), back: back.unwrap_or(Return::Rewind), without }
    }

    pub fn run(self, world: &mut World, random: &mut Random) -> Result<()> {
        let place = world.primary_place();
        match self.loss {
            Loss::Kill => world.cluster.primary.kill9()?,
            Loss::Pause => world.cluster.primary.pause()?,
            Loss::Isolate => Network::isolate(&world.cluster.network, place),
            Loss::Alive => {}
        }
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.kill()?;
        }
        prepare(world).context("prepare")?;
        world.ledger.fence(&world.cluster.primary);
        world.ledger.unfence(&world.standby);
        world.standby.promote()?;
        world.change_places();
        world.ledger.wait_progress(RECOVERY, 20).context("commits on the promoted standby")?;
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.start()?;
        }
        self.revive(world)?;
        wait_blocked(&world.standby).context("the former primary is back")?;
        world.ledger.wait_progress(RECOVERY, 20 + random.below(50)).context("commits beside the former primary")?;
        world.ledger.check(&world.cluster.primary).context("beside the former primary")?;
        self.rejoin(world)
    }

    /// The former primary is there again, and knows nothing.
    fn revive(self, world: &mut World) -> Result<()> {
        match self.loss {
            Loss::Kill => world.standby.start()?,
            Loss::Pause => world.standby.resume()?,
            Loss::Isolate => world.cluster.network.heal(),
            Loss::Alive => {}
        }
        Ok(())
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

/// Nothing that the old primary writes from now on can be acknowledged, and the standby has all that was.
fn prepare(world: &World) -> Result<()> {
    let prepare = Launch::new(env!("CARGO_BIN_EXE_safekeeperctl"))
        .args(["failover", "prepare", "--safekeepers", &world.cluster.safekeeper_addresses()])
        .args(["--standby", &world.standby.conninfo()]);
    run_within(world.scratch, "safekeeperctl", prepare, RECOVERY).map(drop)
}
