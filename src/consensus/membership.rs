//! Changing who keeps a log, without ever losing what was acknowledged (spec: semantics 5.2 rules 15 to 21, and 6).
//!
//! ```text
//!   {1,2,3}  --start_change-->  {1,2,3}+{3,4,5} joint  --finish-->  {3,4,5}        generations n, n+1, n+2
//!                                        \--------------abort---->  {1,2,3}                    n, n+1, n+2
//! ```
//!
//! While the configuration is joint, elections and commits need a majority of both sets. [`may_finish`] says when the old
//! set can be let go; it decides on what nodes reported, never on hope. Whoever drives a change keeps the configurations
//! in a store that hands out each generation once.
//!
//! Pure: who asks the nodes and stores the configurations is elsewhere.

use std::collections::BTreeSet;

use pgproto::walproposer::{Configuration, Member};
use pgproto::{Generation, Lsn, NodeId, Term};

/// A configuration that none can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Generation 0 is "no configuration"; every other one has members.
    #[error("configuration generation {0} has a set without members")]
    NoMembers(Generation),
    /// A node counts once in a set.
    #[error("configuration generation {generation} names node {node} twice in one set")]
    Duplicate {
        /// The configuration.
        generation: Generation,
        /// The node.
        node: NodeId,
    },
}

/// Checks that a configuration has members, and each of them once.
pub fn check(configuration: &Configuration) -> Result<(), Malformed> {
    let generation = configuration.generation;
    for set in sets(configuration) {
        if set.is_empty() && generation != Generation(0) {
            return Err(Malformed::NoMembers(generation));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = set.iter().find(|member| !seen.insert(member.id)) {
            return Err(Malformed::Duplicate { generation, node: twice.id });
        }
    }
    Ok(())
}

/// Whether two configurations mean the same nodes in the same roles, wherever these listen.
pub fn same_members(a: &Configuration, b: &Configuration) -> bool {
    a.new_members.is_some() == b.new_members.is_some() && sets(a).zip(sets(b)).all(|(a, b)| node_ids(a) == node_ids(b))
}

/// The sets that each need a majority.
pub fn sets(configuration: &Configuration) -> impl Iterator<Item = &[Member]> {
    std::iter::once(configuration.members.as_slice()).chain(configuration.new_members.as_deref())
}

/// Size of a majority of `members` nodes.
pub fn majority(members: usize) -> usize {
    members / 2 + 1
}

fn node_ids(set: &[Member]) -> BTreeSet<NodeId> {
    set.iter().map(|member| member.id).collect()
}

/// Why a membership change can't go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// Three sets at once would not intersect (rule 17).
    #[error("configuration generation {0} is joint already: finish or abort that change first")]
    ChangeUnderWay(Generation),
    /// Only a joint configuration can be finished or aborted.
    #[error("configuration generation {0} is not joint: there is no change to end")]
    NoChange(Generation),
    /// A timeline without a configuration has to get one first.
    #[error("the timeline has no configuration: give it generation 1 with its present members first")]
    NoConfiguration,
    /// There is no number for the next configuration.
    #[error("generation {0} is the last one there is")]
    OutOfGenerations(Generation),
    /// The members make no configuration.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The nodes are not ready yet (rule 18).
    #[error(transparent)]
    NotReady(#[from] NotReady),
}

/// What is missing before a change may be finished (rule 18). Asking the nodes again helps, once they got on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// 18a: a leader could still be elected or commit with the old set alone.
    #[error("{have} of the old members are on generation {generation}, {need} are needed; not yet there: {missing:?}")]
    OldSet {
        /// The joint configuration.
        generation: Generation,
        /// Old members on it.
        have: usize,
        /// A majority of them.
        need: usize,
        /// The other old members.
        missing: Vec<NodeId>,
    },
    /// 18d: a new member could be wiped under its old configuration.
    #[error("{have} of the new members are on generation {generation}, {need} are needed; not yet there: {missing:?}")]
    NewSet {
        /// The joint configuration.
        generation: Generation,
        /// New members on it.
        have: usize,
        /// A majority of them.
        need: usize,
        /// The other new members.
        missing: Vec<NodeId>,
    },
    /// 18b and 18c: the new set lacks WAL that may be committed, or a term that the old set knows.
    #[error(
        "{have} of the new members have all WAL up to {} of term {} and are in term {term} or later, {need} are needed; \
         not yet there: {missing:?}", position.flush_lsn, position.last_log_term
    )]
    Behind {
        /// The log that a majority of the new members must have.
        position: LogPosition,
        /// The term that they must have promised.
        term: Term,
        /// New members that do.
        have: usize,
        /// A majority of them.
        need: usize,
        /// The other new members.
        missing: Vec<NodeId>,
    },
}

/// How good a log is: the higher last term wins, then the longer log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogPosition {
    /// Term of the last record.
    pub last_log_term: Term,
    /// Durable end.
    pub flush_lsn: Lsn,
}

/// What a node reported, of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// Who.
    pub node: NodeId,
    /// Generation of its durable configuration.
    pub generation: Generation,
    /// Highest term it promised.
    pub term: Term,
    /// Its log.
    pub position: LogPosition,
}

/// The joint configuration with which a change from `current` to `new_members` begins (rule 17).
pub fn start_change(current: &Configuration, new_members: Vec<Member>) -> Result<Configuration, ChangeError> {
    if current.generation == Generation(0) {
        return Err(ChangeError::NoConfiguration);
    }
    if current.new_members.is_some() {
        return Err(ChangeError::ChangeUnderWay(current.generation));
    }
    let joint = Configuration {
        generation: next_generation(current)?,
        members: current.members.clone(),
        new_members: Some(new_members),
    };
    check(&joint)?;
    Ok(joint)
}

/// Whether the old set of `joint` may be let go (rule 18): a majority of it is on the joint configuration, and a majority
/// of the new set, on it too, has a log and a term no lower than all of that old majority.
///
/// What an old member reported may be of any moment since it is on the joint configuration: what it got later needed a
/// majority of the new set as well. What new members reported must be later than that, or from the same round.
pub fn may_finish(joint: &Configuration, old: &[NodeStatus], new: &[NodeStatus]) -> Result<(), ChangeError> {
    let Some(new_set) = &joint.new_members else { return Err(ChangeError::NoChange(joint.generation)) };
    let generation = joint.generation;
    let (old, missing) = on_generation(&joint.members, old, generation);
    let (have, old_need) = (old.len(), majority(joint.members.len()));
    let too_few_old = NotReady::OldSet { generation, have, need: old_need, missing };
    if have < old_need {
        return Err(too_few_old.into());
    }
    let (new, missing) = on_generation(new_set, new, generation);
    let (have, need) = (new.len(), majority(new_set.len()));
    if have < need {
        return Err(NotReady::NewSet { generation, have, need, missing }.into());
    }
    // Any old majority will do, so all are tried: the maxima over one are a position and a term of its members.
    let maxima = old.iter().flat_map(|a| old.iter().map(|b| (a.position, b.term)));
    let mut nearest: Option<(usize, NotReady)> = None;
    for (position, term) in maxima {
        if old.iter().filter(|node| node.position <= position && node.term <= term).count() < old_need {
            continue;
        }
        let (there, behind): (Vec<&NodeStatus>, _) =
            new.iter().partition(|node| node.position >= position && node.term >= term);
        let have = there.len();
        if have >= need {
            return Ok(());
        }
        if nearest.as_ref().is_none_or(|(most, _)| have > *most) {
            let missing = behind.into_iter().map(|node| node.node).chain(missing.iter().copied()).collect();
            nearest = Some((have, NotReady::Behind { position, term, have, need, missing }));
        }
    }
    Err(nearest.map_or(too_few_old, |(_, behind)| behind).into())
}

/// The members of `set` that reported to be on `generation`, each once, and the ids of the others.
fn on_generation(set: &[Member], reports: &[NodeStatus], generation: Generation) -> (Vec<NodeStatus>, Vec<NodeId>) {
    let (mut there, mut missing) = (Vec::new(), Vec::new());
    for id in set.iter().map(|member| member.id) {
        match reports.iter().rfind(|report| report.node == id && report.generation == generation) {
            Some(report) => there.push(*report),
            None => missing.push(id),
        }
    }
    (there, missing)
}

/// The configuration that ends the change of `joint` with the new set, if the nodes are ready for it; see [`may_finish`].
pub fn finish(joint: &Configuration, old: &[NodeStatus], new: &[NodeStatus]) -> Result<Configuration, ChangeError> {
    may_finish(joint, old, new)?;
    let Some(members) = joint.new_members.clone() else { return Err(ChangeError::NoChange(joint.generation)) };
    Ok(Configuration { generation: next_generation(joint)?, members, new_members: None })
}

/// The configuration that takes back the change of `joint` (rule 19). Possible at any time before it is finished: the old
/// set never lost anything, since joint leaders commit in both sets.
pub fn abort(joint: &Configuration) -> Result<Configuration, ChangeError> {
    if joint.new_members.is_none() {
        return Err(ChangeError::NoChange(joint.generation));
    }
    Ok(Configuration { generation: next_generation(joint)?, members: joint.members.clone(), new_members: None })
}

fn next_generation(configuration: &Configuration) -> Result<Generation, ChangeError> {
    let Generation(number) = configuration.generation;
    number.checked_add(1).map(Generation).ok_or(ChangeError::OutOfGenerations(Generation(number)))
}

/// Why a node's copy must stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeepReason {
    /// Its quorum may need it.
    #[error("node {node} is a member in configuration generation {generation}")]
    Member {
        /// The node.
        node: NodeId,
        /// The configuration that says so.
        generation: Generation,
    },
    /// The node knows of a later configuration than the one that leaves it out.
    #[error("configuration generation {told} leaves the node out, but it is in generation {own} already")]
    Outdated {
        /// As durable at the node.
        own: Generation,
        /// As told.
        told: Generation,
    },
}

/// Whether `node`, whose durable configuration is `own`, may wipe its copy because `told` leaves it out (rule 21). All
/// connections to the copy must end with it. What is told must come from the store of configurations: a change leaves a
/// node out only when it was finished or aborted.
pub fn may_wipe(node: NodeId, own: &Configuration, told: &Configuration) -> Result<(), KeepReason> {
    if told.generation == Generation(0) || told.contains(node) {
        return Err(KeepReason::Member { node, generation: told.generation });
    }
    if told.generation < own.generation {
        return Err(KeepReason::Outdated { own: own.generation, told: told.generation });
    }
    if told.generation == own.generation && own.contains(node) {
        return Err(KeepReason::Member { node, generation: own.generation });
    }
    Ok(())
}
