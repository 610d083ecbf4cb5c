//! What can fail and come back: one place, or whoever proposes and then a safekeeper.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::{Daemon, Network, Place, Proposing, Random, SmallDisk, wait_for};

use crate::RECOVERY;
use crate::world::World;

/// Who is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    Primary,
    /// A safekeeper, by index.
    Member(usize),
    /// Whoever proposes: the walproposer, or the safekeeper that was elected.
    Proposer,
    /// The same, and then a safekeeper.
    ProposerThen(usize),
}

/// With what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// kill -9.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Pause,
    /// Nothing that it sends arrives.
    Mute,
    /// Nothing that is sent to it arrives.
    Deafen,
    /// Both.
    Isolate,
    /// All connections of the network break.
    Reset,
    /// Its disk is full.
    FullDisk,
}

const WHATS: &[What] =
    &[What::Kill, What::Kill, What::Pause, What::Mute, What::Deafen, What::Isolate, What::Reset, What::FullDisk];

/// How often a primary on a full disk is asked to write more.
const SPACE_TRIES: usize = 100;

/// One of each.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    whom: Whom,
    what: What,
    /// How long it lasts, beside what is waited for.
    lasts: Duration,
}

impl Fault {
    pub fn choose(random: &mut Random, world: &World) -> Fault {
        let members = world.cluster.safekeepers.len() as u64;
        let member = usize::try_from(random.below(members)).unwrap_or(0);
        let whom = match random.below(8) {
            0 | 1 => Whom::Primary,
            2 | 3 => Whom::Member(member),
            4 | 5 => Whom::Proposer,
            _ => Whom::ProposerThen(member),
        };
        let what = random.pick(WHATS).copied().unwrap_or(What::Kill);
        // A disk of its own belongs to a safekeeper, and to the server that was primary first.
        let has_disk = !world.cluster.disks.is_empty()
            && match whom {
                Whom::Primary => world.primary_place == 0,
                Whom::Member(_) => true,
                Whom::Proposer | Whom::ProposerThen(_) => world.proposing == Proposing::Members,
            };
        let what = if what == What::FullDisk && !has_disk { What::Kill } else { what };
        // Most are over before anybody has given up waiting, some only after everybody has.
        let lasts = if random.below(5) == 0 { 5500 + random.below(1000) } else { random.below(700) };
        Fault { whom, what, lasts: Duration::from_millis(lasts) }
    }

    /// Strikes, and brings everything back. Where a majority and its proposer are left, commits must go on meanwhile.
    pub fn strike(self, world: &mut World, random: &mut Random) -> Result<()> {
        let leader = world.leader()?;
        let proposer = leader.map_or(Place::Walproposer, Place::Member);
        match self.whom {
            Whom::Primary => self.hit(world, world.primary_place(), false),
            Whom::Member(index) => self.hit(world, Place::Member(index), true),
            Whom::Proposer => self.hit(world, proposer, leader.is_some()),
            Whom::ProposerThen(index) => {
                let both = random.below(2) == 0 && proposer != Place::Member(index);
                self.begin(world, proposer)?;
                if !both {
                    self.end(world, proposer)?;
                }
                world.ledger.wait_progress(RECOVERY, if both { 0 } else { random.below(20) })?;
                let outcome = self.hit(world, Place::Member(index), !both);
                if both && self.what.needs_end_after_another() {
                    self.end(world, proposer)?;
                }
                outcome
            }
        }
    }

    fn hit(self, world: &mut World, place: Place, commits_go_on: bool) -> Result<()> {
        self.begin(world, place)?;
        // Not a wait for anything: a fault has a duration.
        std::thread::sleep(self.lasts);
        if commits_go_on {
            world.ledger.wait_progress(RECOVERY, 20).with_context(|| format!("commits without {place:?}"))?;
        }
        self.end(world, place)
    }

    fn begin(self, world: &mut World, place: Place) -> Result<()> {
        match self.what {
            What::Kill => match place {
                Place::Server(_) => world.cluster.primary.kill9(),
                place => daemon(world, place)?.kill(),
            },
            What::Pause => match place {
                Place::Server(_) => world.cluster.primary.pause(),
                place => daemon(world, place)?.pause(),
            },
            What::Mute => cut(world, Network::mute, place),
            What::Deafen => cut(world, Network::deafen, place),
            What::Isolate => cut(world, Network::isolate, place),
            What::Reset => {
                world.cluster.network.reset();
                Ok(())
            }
            What::FullDisk => {
                disk(world, place)?.fill()?;
                need_space(world, place)
            }
        }
    }

    fn end(self, world: &mut World, place: Place) -> Result<()> {
        match self.what {
            What::Kill => match place {
                Place::Server(_) => world.cluster.primary.start(),
                Place::Member(index) => world.cluster.safekeeper(index)?.start(),
                Place::Walproposer => world.cluster.walproposer.start(),
            },
            What::Pause => match place {
                Place::Server(_) => world.cluster.primary.resume(),
                place => daemon(world, place)?.resume(),
            },
            What::Mute | What::Deafen | What::Isolate => {
                world.cluster.network.heal();
                Ok(())
            }
            What::Reset => Ok(()),
            What::FullDisk => {
                disk(world, place)?.free()?;
                restart_if_dead(world, place)
            }
        }
    }
}

impl What {
    /// Healing a network heals all of it.
    fn needs_end_after_another(self) -> bool {
        !matches!(self, What::Mute | What::Deafen | What::Isolate | What::Reset)
    }
}

fn cut(world: &World, how: impl Fn(&Network, Place), place: Place) -> Result<()> {
    how(&world.cluster.network, place);
    Ok(())
}

fn daemon<'a>(world: &'a mut World, place: Place) -> Result<&'a mut Daemon> {
    match place {
        Place::Member(index) => Ok(world.cluster.safekeeper(index)?.daemon()),
        Place::Walproposer => Ok(world.cluster.walproposer.daemon()),
        Place::Server(_) => Ok(world.cluster.primary.daemon()),
    }
}

fn disk<'a>(world: &'a World, place: Place) -> Result<&'a SmallDisk> {
    let index = match place {
        Place::Member(index) => index,
        _ => world.cluster.safekeepers.len(),
    };
    world.cluster.disks.get(index).context("a disk that can be filled")
}

/// Makes everybody need more space: WAL of several segments, also when files can be used again. Whoever has none is behind then, or
/// fails.
fn need_space(world: &World, place: Place) -> Result<()> {
    let grow = "SET synchronous_commit = local; SELECT pg_switch_wal(); \
                CREATE TABLE filling AS SELECT repeat(md5(i::text), 20) FROM generate_series(1, 3000) i; DROP TABLE filling";
    let primary = &world.cluster.primary;
    let Place::Member(index) = place else {
        let refused = (0..SPACE_TRIES).any(|_| primary.sql().and_then(|mut sql| sql.run(grow)).is_err());
        ensure!(refused, "the primary has found space on a full disk");
        return Ok(());
    };
    for _ in 0..3 {
        primary.sql()?.run(grow)?;
    }
    let (full, end) = (world.cluster.safekeepers.get(index).context("a safekeeper")?, primary.flush_lsn()?);
    // Two may be full, one after the other.
    let filled = world.cluster.disks.iter().filter(|disk| disk.is_filled()).count();
    wait_for(RECOVERY, "those who have space to have the WAL", || {
        let flushed = world.cluster.safekeepers.iter().map(|sk| world.cluster.status_lsn(sk, "flush_lsn"));
        let have = flushed.filter(|lsn| lsn.as_ref().is_ok_and(|lsn| *lsn >= end)).count();
        ensure!(have + filled >= world.cluster.safekeepers.len(), "{have} have it, {filled} are full");
        Ok(())
    })?;
    let flushed = world.cluster.status_lsn(full, "flush_lsn")?;
    ensure!(flushed < end, "safekeeper {} has found space on a full disk: {flushed}", full.id());
    Ok(())
}

fn restart_if_dead(world: &mut World, place: Place) -> Result<()> {
    if daemon(world, place)?.check_alive().is_ok() {
        return Ok(());
    }
    match place {
        Place::Member(index) => {
            let _ = daemon(world, place)?.kill();
            world.cluster.safekeeper(index)?.start()
        }
        _ => {
            let _ = world.cluster.primary.kill9();
            world.cluster.primary.start()
        }
    }
}

/// A safekeeper, by index, every other time.
pub fn member_or_none(random: &mut Random) -> Option<usize> {
    random.pick(&[Some(0), Some(1), Some(2), None, None, None]).copied().flatten()
}

/// Waits until writers on the server wait for its standbys: it does not acknowledge by itself.
pub fn wait_blocked(server: &testkit::Postgres) -> Result<()> {
    wait_for(RECOVERY, "commits on the former primary to wait", || {
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = 'ledger'";
        let count: u64 = server.sql()?.parsed(waiting)?;
        ensure!(count > 0, "none waits");
        Ok(())
    })
}
