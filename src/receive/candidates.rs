//! Which node to follow, and when to leave it for another. Pure: the caller brings the clock and tells what it hears.
//!
//! A node is a *candidate*: one of the configured list, or a member that another node named. Nodes are asked in the
//! background how far their committed WAL goes. A node is *usable* when it told so within [`LAGGING_TIMEOUT`], is not on an
//! older Postgres timeline than we are, and its `next_retry_at` has come. The best usable one has the highest commit LSN;
//! among equals our zone goes first, then the order of the list. Before the first connection nothing is known: while no node at
//! all has told anything, the configured ones are usable in their order, so that connecting never waits for answers.
//!
//! The connection is left for the best other candidate for the first [`Reason`] that holds, in this order:
//!
//! | Reason | When |
//! |---|---|
//! | [`Reason::NoExistingConnection`] | there is none |
//! | [`Reason::NoKeepAlives`] | nothing was heard for [`KEEPALIVE_TIMEOUT`] |
//! | [`Reason::LaggingWal`] | the other has [`MAX_LAG`] more committed WAL |
//! | [`Reason::SwitchAvailabilityZone`] | the other is in our zone, the present one is not, and it has as much committed WAL |
//! | [`Reason::NoWalTimeout`] | WAL was waited for longer than [`LAGGING_TIMEOUT`], and the other has it |
//!
//! While a connection is being made, only the first two count: it is given up after [`KEEPALIVE_TIMEOUT`], or after
//! [`ATTEMPT_GRACE`] if its node has told nothing and another one has. WAL is waited for since the last piece came, if the node
//! claims to have more; else since more became known elsewhere. A connection without a better candidate is kept.
//!
//! A node whose WAL turned out not to fit to ours is only tried when there is no connection, and after all others.
//!
//! A connection that ends pushes its node's `next_retry_at` out: from the time when it *began*, by a delay that grows with each
//! time in a row. So a node that served us long may be used again at once. A record received whole makes the node as good as new,
//! and so does a sign of life after a long silence.
//!
//! (spec: semantics 16. New here: nothing known at first, [`ATTEMPT_GRACE`], nodes that don't fit, and that a node which keeps claiming WAL that it doesn't
//! send is left for one that has no more than it claims.)

use std::time::{Duration, Instant};

use pgproto::{HostPort, Lsn, NodeId, PgTimelineId};

use crate::retry::Backoff;

/// First pause before a node is used again: about the time in which a process restarts.
pub const RETRY_FIRST: Duration = Duration::from_millis(100);

/// Longest pause: a node that is back is used soon, and one that stays away isn't asked all the time.
pub const RETRY_LONGEST: Duration = Duration::from_secs(15);

/// Silence after which a connection may be left: ten keepalives of a safekeeper.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long WAL may be waited for that others have, and how long what a node told is believed.
pub const LAGGING_TIMEOUT: Duration = Duration::from_secs(10);

/// So far behind another, a node is not worth waiting for: it is catching up itself.
pub const MAX_LAG: u64 = 1 << 30;

/// Time that an attempt at a node of which nothing was heard has for itself, before another one is preferred that answers.
pub const ATTEMPT_GRACE: Duration = Duration::from_secs(1);

/// Most candidates. A quorum has three or five members, and members change; more is a mistake or worse.
pub const MAX_CANDIDATES: usize = 32;

/// Why a node is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// There is no connection.
    NoExistingConnection,
    /// The present one is silent.
    NoKeepAlives,
    /// The present one is far behind.
    LaggingWal,
    /// The present one is in another zone.
    SwitchAvailabilityZone,
    /// The present one lacks WAL that this one has, or doesn't send it.
    NoWalTimeout,
}

impl Reason {
    /// All of them.
    pub const ALL: [Reason; 5] = [
        Reason::NoExistingConnection,
        Reason::NoKeepAlives,
        Reason::LaggingWal,
        Reason::SwitchAvailabilityZone,
        Reason::NoWalTimeout,
    ];

    /// For metrics and the log.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::NoExistingConnection => "no_existing_connection",
            Reason::NoKeepAlives => "no_keep_alives",
            Reason::LaggingWal => "lagging_wal",
            Reason::SwitchAvailabilityZone => "switch_availability_zone",
            Reason::NoWalTimeout => "no_wal_timeout",
        }
    }
}

/// What a node told of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// End of its committed WAL; 0 if it has none.
    pub commit_lsn: Lsn,
    /// Its newest Postgres timeline.
    pub timeline: PgTimelineId,
}

/// A node as a member names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id, if that is known. Tells that two addresses are of one node.
    pub node_id: Option<NodeId>,
    /// Where it listens.
    pub address: HostPort,
    /// Its availability zone, if it has one.
    pub zone: Option<String>,
}

/// A node that can be followed.
#[derive(Clone, Debug)]
pub struct Candidate {
    address: HostPort,
    configured: bool,
    node_id: Option<NodeId>,
    zone: Option<String>,
    /// It is a safekeeper that names the others.
    names_members: bool,
    /// What it has doesn't fit to what we have, as was found when it was last tried.
    unfit: bool,
    /// When another node last named it.
    named_at: Instant,
    /// When it last told something; at first, when it became a candidate.
    heard_at: Instant,
    told: Option<Told>,
    backoff: Backoff,
}

impl Candidate {
    /// Where it listens.
    pub fn address(&self) -> &HostPort {
        &self.address
    }

    /// What it last told, unless that is too old to be believed.
    pub fn told(&self) -> Option<Told> {
        self.told
    }

    /// Its availability zone, if that is known.
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// Whether it is one to ask for members.
    pub fn names_members(&self) -> bool {
        self.names_members
    }

    /// When it may be used again; `None` means at once.
    pub fn next_retry_at(&self) -> Option<Instant> {
        self.backoff.next_retry_at()
    }

    fn commit_lsn(&self) -> Lsn {
        self.told.map_or(Lsn::INVALID, |told| told.commit_lsn)
    }

    fn rested(&self, now: Instant) -> bool {
        self.next_retry_at().is_none_or(|at| at <= now)
    }
}

/// The present connection, or the attempt at one.
#[derive(Clone, Debug)]
struct Link {
    address: HostPort,
    started_at: Instant,
    /// WAL may come.
    connected: bool,
    /// When anything last came.
    heard_at: Instant,
    /// When WAL last came.
    wal_at: Instant,
    /// End of the WAL that we have.
    received: Lsn,
    /// End of the node's committed WAL, once it said so in the stream.
    commit_lsn: Option<Lsn>,
    /// WAL that another node had first, and since when that is known.
    discovered: Option<(Lsn, Instant)>,
}

impl Link {
    /// End of the committed WAL that the node is known to have.
    fn committed(&self) -> Lsn {
        self.commit_lsn.unwrap_or(self.received)
    }

    /// WAL that the node lacks, and since when that is known, if the best other node has WAL up to `elsewhere`.
    fn lacking(&self, elsewhere: Lsn, now: Instant) -> Option<(Lsn, Instant)> {
        let still = self.discovered.filter(|(lsn, _)| *lsn > self.committed());
        still.or_else(|| (elsewhere > self.committed()).then_some((elsewhere, now)))
    }
}

/// A node to be followed from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The node.
    pub address: HostPort,
    /// Why.
    pub reason: Reason,
}

/// All nodes, and the one that is followed.
#[derive(Clone, Debug)]
pub struct Candidates {
    zone: Option<String>,
    timeline: PgTimelineId,
    known: Vec<Candidate>,
    link: Option<Link>,
}

impl Candidates {
    /// Nothing is known of the `configured` nodes yet. `zone` is ours.
    pub fn new(configured: impl IntoIterator<Item = HostPort>, zone: Option<String>, now: Instant) -> Self {
        let mut candidates = Self { zone, timeline: PgTimelineId::FIRST, known: Vec::new(), link: None };
        for address in configured {
            candidates.add(Member { node_id: None, address, zone: None }, true, now);
        }
        candidates
    }

    fn add(&mut self, member: Member, configured: bool, now: Instant) {
        let Member { node_id, address, zone } = member;
        if self.known.len() < MAX_CANDIDATES && self.known.iter().all(|known| known.address != address) {
            let (named_at, heard_at) = (now, now);
            let backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
            let (names_members, unfit, told) = (false, false, None);
            self.known.push(Candidate {
                address,
                configured,
                node_id,
                zone,
                names_members,
                unfit,
                named_at,
                heard_at,
                told,
                backoff,
            });
        }
    }

    fn find(&mut self, address: &HostPort) -> Option<&mut Candidate> {
        self.known.iter_mut().find(|known| known.address == *address)
    }

    /// The candidates, in the order of the configuration.
    pub fn all(&self) -> &[Candidate] {
        &self.known
    }

    /// The node that is followed or being connected to.
    pub fn current(&self) -> Option<&HostPort> {
        self.link.as_ref().map(|link| &link.address)
    }

    /// WAL of `timeline` is wanted from now on: nodes that know only older ones are of no use.
    pub fn wants_timeline(&mut self, timeline: PgTimelineId) {
        self.timeline = timeline;
    }

    /// The node at `address` named the members, and said who it is, as far as it knows that. Others with its id are its other
    /// addresses.
    pub fn introduced(&mut self, address: &HostPort, node_id: Option<NodeId>, zone: Option<String>) {
        let Some(candidate) = self.find(address) else { return };
        (candidate.node_id, candidate.zone, candidate.names_members) = (node_id, zone, true);
        let current = self.current().cloned();
        let alias = |known: &Candidate| {
            node_id.is_some() && known.node_id == node_id && known.address != *address && !known.configured
        };
        self.known.retain(|known| !alias(known) || current.as_ref() == Some(&known.address));
    }

    /// A node named these as members. Those that nobody names any more, and that don't answer, are forgotten.
    pub fn named(&mut self, members: impl IntoIterator<Item = Member>, now: Instant) {
        for member in members {
            let same = |known: &&mut Candidate| {
                known.address == member.address || (member.node_id.is_some() && known.node_id == member.node_id)
            };
            match self.known.iter_mut().find(same) {
                Some(known) => (known.named_at, known.zone) = (now, member.zone.or(known.zone.take())),
                None => self.add(member, false, now),
            }
        }
    }

    /// A node told how it is.
    pub fn told(&mut self, address: &HostPort, told: Told, now: Instant) {
        let Some(candidate) = self.find(address) else { return };
        if now.saturating_duration_since(candidate.heard_at) > LAGGING_TIMEOUT {
            candidate.backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
        }
        candidate.heard_at = now;
        candidate.told = Some(told);
    }

    /// The node to connect to now, if it's time for one. The caller ends the present connection, if there is one, says so
    /// ([`Candidates::disconnected`]), and begins the new one ([`Candidates::connecting`]).
    pub fn choose(&mut self, now: Instant) -> Option<Choice> {
        self.forget_the_silent(now);
        let Some(link) = &self.link else {
            let address = self.best(now)?.address.clone();
            return Some(Choice { address, reason: Reason::NoExistingConnection });
        };
        let best = self.best(now)?;
        let lacking = link.lacking(best.commit_lsn(), now);
        let reason = self.reason_to_leave(link, best, lacking.map(|(_, at)| at), now);
        let choice = reason.map(|reason| Choice { address: best.address.clone(), reason });
        if let Some(link) = &mut self.link {
            link.discovered = lacking;
        }
        choice
    }

    fn reason_to_leave(
        &self,
        link: &Link,
        best: &Candidate,
        lacking_since: Option<Instant>,
        now: Instant,
    ) -> Option<Reason> {
        let since = |at: Instant| now.saturating_duration_since(at);
        if since(link.heard_at) > KEEPALIVE_TIMEOUT {
            return Some(Reason::NoKeepAlives);
        }
        let present = self.known.iter().find(|known| known.address == link.address);
        if !link.connected {
            let mute = present.is_none_or(|present| present.told.is_none());
            return (mute && since(link.started_at) > ATTEMPT_GRACE).then_some(Reason::NoExistingConnection);
        }
        let (theirs, ours) = (best.commit_lsn(), link.committed());
        if link.commit_lsn.is_some_and(|ours| theirs.saturating_sub(ours) >= MAX_LAG) {
            return Some(Reason::LaggingWal);
        }
        let zone = self.zone.as_deref();
        let elsewhere = present.and_then(Candidate::zone) != zone;
        if link.commit_lsn.is_some() && zone.is_some() && best.zone() == zone && elsewhere && theirs >= ours {
            return Some(Reason::SwitchAvailabilityZone);
        }
        let claims_more = link.received < ours;
        let waiting_since = if claims_more { Some(link.wal_at) } else { lacking_since.map(|at| at.max(link.wal_at)) };
        let has_it = theirs > ours || (claims_more && theirs > link.received);
        (has_it && waiting_since.is_some_and(|at| since(at) > LAGGING_TIMEOUT)).then_some(Reason::NoWalTimeout)
    }

    /// When the next candidate may be used again that may not be used now.
    pub fn next_retry_at(&self, now: Instant) -> Option<Instant> {
        self.known.iter().filter_map(Candidate::next_retry_at).filter(|at| *at > now).min()
    }

    /// A connection to `address` is begun; we have WAL up to `received`.
    pub fn connecting(&mut self, address: HostPort, received: Lsn, now: Instant) {
        self.link = Some(Link {
            address,
            started_at: now,
            connected: false,
            heard_at: now,
            wal_at: now,
            received,
            commit_lsn: None,
            discovered: None,
        });
    }

    /// The connection stands: WAL behind `received` may come.
    pub fn connected(&mut self, received: Lsn, now: Instant) {
        if let Some(link) = &mut self.link {
            (link.connected, link.heard_at, link.wal_at, link.received) = (true, now, now, received);
        }
    }

    /// The node said that its WAL ends at `commit_lsn`.
    pub fn heard(&mut self, commit_lsn: Lsn, now: Instant) {
        let Some(link) = &mut self.link else { return };
        link.heard_at = now;
        let commit_lsn = link.commit_lsn.unwrap_or_default().max(commit_lsn);
        link.commit_lsn = Some(commit_lsn);
        if let Some(known) = self.known.iter_mut().find(|known| known.address == link.address) {
            known.heard_at = now;
            known.told = Some(Told { commit_lsn, timeline: self.timeline });
        }
    }

    /// WAL up to `end` came.
    pub fn received(&mut self, end: Lsn, now: Instant) {
        if let Some(link) = &mut self.link
            && end > link.received
        {
            (link.received, link.heard_at, link.wal_at) = (end, now, now);
        }
    }

    /// A whole record came: the node works.
    pub fn progress(&mut self) {
        if let Some(link) = &self.link
            && let Some(known) = self.known.iter_mut().find(|known| known.address == link.address)
        {
            known.backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
            known.unfit = false;
        }
    }

    /// The connection shows that the node's WAL doesn't fit to ours. However much it has: a connection isn't left for it, and
    /// others are tried first.
    pub fn unfit(&mut self) {
        if let Some(link) = &self.link
            && let Some(known) = self.known.iter_mut().find(|known| known.address == link.address)
        {
            known.unfit = true;
        }
    }

    /// The connection ended, or couldn't be made, or is given up.
    pub fn disconnected(&mut self) {
        if let Some(link) = self.link.take()
            && let Some(known) = self.known.iter_mut().find(|known| known.address == link.address)
        {
            known.backoff.failed(link.started_at);
        }
    }

    fn forget_the_silent(&mut self, now: Instant) {
        let silent = |at: Instant| now.saturating_duration_since(at) > LAGGING_TIMEOUT;
        let current = self.link.as_ref().map(|link| link.address.clone());
        for known in self.known.iter_mut().filter(|known| silent(known.heard_at)) {
            known.told = None;
        }
        self.known.retain(|known| {
            known.configured
                || current.as_ref() == Some(&known.address)
                || !(silent(known.heard_at) && silent(known.named_at))
        });
    }

    /// The best usable candidate other than the present one.
    fn best(&self, now: Instant) -> Option<&Candidate> {
        let others = || self.known.iter().filter(|known| self.current() != Some(&known.address));
        let has_wal = |known: &Candidate| {
            known.told.is_some_and(|told| told.commit_lsn.is_valid() && told.timeline >= self.timeline)
        };
        let nobody_told = self.link.is_none() && self.known.iter().all(|known| known.told.is_none());
        if nobody_told {
            return others().find(|known| known.configured && known.rested(now));
        }
        let near = |known: &Candidate| self.zone.is_some() && known.zone() == self.zone.as_deref();
        let rank = |known: &Candidate| (!known.unfit, known.commit_lsn(), near(known));
        let fits = |known: &Candidate| self.link.is_none() || !known.unfit;
        let usable = others().filter(|known| has_wal(known) && fits(known) && known.rested(now));
        // The first of those that rank the same.
        usable.reduce(|best, next| if rank(next) > rank(best) { next } else { best })
    }
}

#[cfg(test)]
mod tests;
