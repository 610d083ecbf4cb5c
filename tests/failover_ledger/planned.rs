//! What is done on purpose, and cleanly: members leave and come back without any writer meeting an error; the primary is changed.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use testkit::{Daemon, Place, Proposing, Random, wait_for};

use crate::RECOVERY;
use crate::faults::member_or_none;
use crate::world::World;

/// Who leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    /// A safekeeper, by index.
    Member(usize),
    /// Whoever proposes.
    Proposer,
    /// All safekeepers, one after the other from this one on, and the walproposer if there is one.
    Each(usize),
}

/// How a safekeeper is told to. A walproposer gets SIGTERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Sigterm,
    /// `safekeeperctl drain`.
    Drain,
}

/// Members are stopped cleanly, and started again.
#[derive(Debug, Clone, Copy)]
pub struct Leave {
    whom: Whom,
    how: How,
}

impl Leave {
    /// One leaves.
    pub fn one(random: &mut Random) -> Leave {
        let whom = match random.below(6) {
            member @ 0..3 => Whom::Member(usize::try_from(member).unwrap_or(0)),
            _ => Whom::Proposer,
        };
        Leave { whom, how: How::choose(random) }
    }

    /// A rolling restart.
    pub fn each(random: &mut Random) -> Leave {
        let first = usize::try_from(random.below(3)).unwrap_or(0);
        Leave { whom: Whom::Each(first), how: How::choose(random) }
    }

    pub fn run(self, world: &mut World) -> Result<()> {
        let begun = Instant::now();
        for place in self.places(world)? {
            match place {
                Place::Member(index) => self.restart(world, index)?,
                _ => {
                    world.cluster.walproposer.stop()?;
                    world.cluster.walproposer.start()?;
                }
            }
            world.ledger.wait_progress(RECOVERY, 20).with_context(|| format!("commits behind {place:?}"))?;
            // Only who has everything can be spared when the next one leaves.
            world.cluster.wait_committed(world.cluster.primary.flush_lsn()?)?;
        }
        world.ledger.check_undisturbed(&world.cluster.primary, begun)?;
        world.cluster.wait_replayed(&world.standby, world.cluster.primary.flush_lsn()?)
    }

    fn places(self, world: &World) -> Result<Vec<Place>> {
        let members = world.cluster.safekeepers.len();
        Ok(match self.whom {
            Whom::Member(index) => vec![Place::Member(index)],
            Whom::Proposer => vec![world.leader()?.map_or(Place::Walproposer, Place::Member)],
            Whom::Each(first) => {
                let walproposer = (world.proposing == Proposing::Walproposer).then_some(Place::Walproposer);
                (first..first + members).map(|index| Place::Member(index % members)).chain(walproposer).collect()
            }
        })
    }

    fn restart(self, world: &mut World, index: usize) -> Result<()> {
        match self.how {
            How::Sigterm => world.cluster.safekeeper(index)?.stop()?,
            How::Drain => {
                let node = world.cluster.safekeeper(index)?.http_address();
                world.operate(&["drain", "--node", &node])?;
                let status = world.cluster.safekeeper(index)?.daemon().wait_exit(RECOVERY)?;
                ensure!(status.success(), "safekeeper {index} was drained and ended with {status}");
            }
        }
        world.ledger.wait_progress(RECOVERY, 20).with_context(|| format!("commits without safekeeper {index}"))?;
        world.cluster.safekeeper(index)?.start()
    }
}

impl How {
    fn choose(random: &mut Random) -> How {
        if random.below(2) == 0 { How::Sigterm } else { How::Drain }
    }
}

/// `safekeeperctl switchover`: the standby is promoted, and the former primary follows without a rewind.
#[derive(Debug, Clone, Copy)]
pub struct Switchover {
    /// This safekeeper, by index, is lost before, and comes back after.
    without: Option<usize>,
}

impl Switchover {
    pub fn choose(random: &mut Random) -> Switchover {
        Switchover { without: member_or_none(random) }
    }

    pub fn run(self, world: &mut World) -> Result<()> {
        if let Some(index) = self.without {
            world.cluster.safekeeper(index)?.kill()?;
            world.ledger.wait_progress(RECOVERY, 20).context("commits without a safekeeper")?;
        }
        wait_for(RECOVERY, "the standby to stream", || {
            let streams = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
            ensure!(world.standby.sql()?.value(streams)? == "1", "it doesn't");
            Ok(())
        })?;
        // A standby acknowledges nothing; as soon as it is promoted it may.
        world.ledger.unfence(&world.standby);
        let turn = world.scratch.path().join("turn-of-the-old-primary");
        let mut ctl = self.begin(world, &format!("touch {}", turn.display()))?;
        ctl.wait_until(RECOVERY, "the old primary to be replaced", || {
            ensure!(turn.exists(), "not yet");
            Ok(())
        })?;
        std::fs::remove_file(turn)?;
        world.ledger.fence(&world.cluster.primary);
        world.change_places();
        let status = world.standby.daemon().wait_exit(RECOVERY)?;
        ensure!(status.success(), "the old primary stopped with {status}");
        world.standby.follow(world.scratch, &world.cluster.readers_conninfo("standby"))?;
        world.standby.start()?;
        let status = ctl.wait_exit(RECOVERY)?;
        ensure!(status.success(), "switchover ended with {status}: {}", ctl.output());
        match self.without {
            Some(index) => world.cluster.safekeeper(index)?.start(),
            None => Ok(()),
        }
    }

    fn begin(self, world: &mut World, start_old: &str) -> Result<Daemon> {
        let pid = world.cluster.primary.daemon().pid().context("a primary")?;
        let (from, to) = (world.cluster.primary.conninfo(), world.standby.conninfo());
        let stop = format!("kill -INT {pid}");
        let switchover = ["switchover", "--from", &from, "--to", &to, "--stop", &stop, "--start-old", start_old];
        Daemon::spawn(world.scratch, "safekeeperctl", world.safekeeperctl(&switchover))
    }
}
