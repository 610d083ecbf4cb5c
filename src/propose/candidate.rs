//! Proposing inside a safekeeper: stands for election when nobody leads, and stands by while another member does.
//!
//! ```text
//!            nobody leads, and the primary answers               elected
//!  stand by ---------------------------------------> campaign ------------> lead
//!     ^  ^                                              | lost, or too late   | deposed, alone, primary changed
//!     |  +---------- a pause, longer each time ---------+                     |
//!     +-----------------------------------------------------------------------+
//! ```
//!
//! Runs on a thread of its own, as the walproposer is a process of its own: commits pass through several tasks. When to stand
//! is decided in [`super::candidacy`]; the term of office is the walproposer's ([`super::driver`]).

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pgproto::{HostPort, NodeId, TenantTimelineId, Term};
use serde::Serialize;
use tokio::runtime::{Builder, Handle};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::candidacy::{Decision, SILENCE_LIMIT, Situation, View, hears_nobody};
use super::driver::{Driver, Ended, Limits};
use super::primary::{self, PrimaryFacts};
use super::status::{Aside, Report, Status, StatusView};
use super::upstream::UpstreamError;
use super::{PRIMARY_PAUSE, Settings, checks, fenced, lookout};
use crate::consensus::membership::majority;
use crate::peers::Peers;
use crate::peers::exchange::{LeaderReport, Proposing, Resigned};
use crate::retry::Backoff;
use crate::timeline::registry::Registry;

/// How long a campaign may take: one that can't be won in this time stands in the way of others.
const ELECTION_LIMIT: Duration = Duration::from_secs(5);

/// A leader that hears no majority for this long lets go of the primary, so that another one can have it.
const ALONE_LIMIT: Duration = Duration::from_secs(5);

/// A leader that is silent for this long missed a heartbeat.
const SUSPICIOUS: Duration = Duration::from_millis(1500);

/// How long members may take to say who leads.
const ASK_LIMIT: Duration = Duration::from_secs(1);

/// How long the primary may take to be found, so that this member counts as reaching it. Longer than [`primary::GRACE`], which a
/// host that hangs costs.
const PROBE_LIMIT: Duration = Duration::from_secs(3);

/// How long members may take to hear that a leader resigned.
const TELL_LIMIT: Duration = Duration::from_millis(500);

/// What is known of the primary is looked up again when it is older than this.
const FACTS_AGE: Duration = Duration::from_secs(2);

/// How long the primary may take to answer.
const PRIMARY_ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Pause after a lost election: longer each time, so that two candidates don't keep deposing each other.
const LOST_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// Pause after something that only an operator can put right, or another primary.
const HELPLESS_PAUSE: Duration = Duration::from_secs(10);

/// How long a candidate must have reached the primary before it replaces a leader that doesn't: that one may be about to
/// reach it as well.
const REACHED_LIMIT: Duration = Duration::from_secs(2);

/// How a member proposes; the same on all members but for the own address.
#[derive(Clone, Debug)]
pub struct CandidateSettings {
    /// The primary, as in a libpq connection string.
    pub upstream: tokio_postgres::Config,
    /// All safekeepers, this one included.
    pub safekeepers: Vec<HostPort>,
    /// Physical replication slot on the primary.
    pub slot: String,
    /// Name in `synchronous_standby_names`.
    pub application_name: String,
    /// WAL kept for safekeepers that are behind, in bytes.
    pub buffer_size: u64,
}

/// What a member does about proposing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It was elected.
    Leading,
    /// It stands for election.
    Campaigning,
    /// Another member leads, or is about to; or too few members answer.
    StandingBy,
    /// Nobody leads, and it doesn't reach the primary.
    #[default]
    WaitingForPrimary,
    /// The primary is not to be followed any more: another server was promoted, or is to be.
    Fenced,
    /// Only an operator can help; `primary.error` says why.
    NeedsOperator,
    /// It handed over and doesn't stand any more.
    Resigned,
}

/// The answer of `GET /v1/proposer`.
#[derive(Debug, Serialize)]
pub struct ProposerView {
    /// What this member does.
    pub role: Role,
    /// Who leads, as far as this node knows.
    pub leader: Option<NodeId>,
    /// The proposer of this node.
    #[serde(flatten)]
    pub proposer: StatusView,
}

/// This member's part in proposing the primary's WAL.
#[derive(Debug)]
pub struct Candidate {
    own: NodeId,
    status: Arc<Status>,
    standing: Arc<Mutex<(Role, Option<NodeId>)>>,
    /// Cancelled: stand no more.
    retire: CancellationToken,
    /// Cancelled when nothing runs any more.
    retired: CancellationToken,
}

impl Candidate {
    /// Begins to stand for election, on a thread of its own, until `shutdown`. Must be called on the runtime that `peers`
    /// runs on.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(
        registry: Arc<Registry>,
        peers: Arc<Peers>,
        settings: CandidateSettings,
        shutdown: &CancellationToken,
    ) -> io::Result<Arc<Self>> {
        let status = Arc::new(Status::new(settings.safekeepers.clone()));
        let candidate = Arc::new(Self {
            own: registry.node_id(),
            status: Arc::clone(&status),
            standing: Arc::default(),
            retire: shutdown.child_token(),
            retired: CancellationToken::new(),
        });
        let reported = Arc::clone(&status);
        peers.stand(settings.safekeepers.clone(), Box::new(move || proposing(&reported.report())));
        let task = Task {
            own: registry.node_id(),
            registry,
            peers,
            main: Handle::current(),
            settings: Arc::new(Settings {
                primary: settings.upstream,
                safekeepers: settings.safekeepers,
                slot: settings.slot,
                application_name: settings.application_name,
                ttid: None,
                buffer_size: settings.buffer_size,
            }),
            status,
            standing: Arc::clone(&candidate.standing),
            retire: candidate.retire.clone(),
            facts: None,
            primary_retry: Backoff::new(PRIMARY_PAUSE.0, PRIMARY_PAUSE.1),
            lost: Backoff::new(LOST_PAUSE.0, LOST_PAUSE.1),
            last_leader: None,
            reached_at: None,
            known_term: Term(0),
        };
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let retired = candidate.retired.clone().drop_guard();
        let run = move || {
            runtime.block_on(task.run());
            drop(retired);
        };
        thread::Builder::new().name("proposer".to_owned()).spawn(run)?;
        Ok(candidate)
    }

    /// How it stands.
    pub fn status(&self) -> ProposerView {
        let (role, leader) = *self.standing.lock();
        let proposer = self.status.view();
        if role == Role::Campaigning && proposer.state == "leading" {
            return ProposerView { role: Role::Leading, leader: Some(self.own), proposer };
        }
        ProposerView { role, leader, proposer }
    }

    /// What its proposer reports, for metrics.
    pub fn proposer(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// Hands the office over if this member has it, and stands for election no more. Returns when the term is over and the
    /// others were told, at the latest after `deadline`; whether it is so.
    pub async fn resign(&self, deadline: Duration) -> bool {
        self.retire.cancel();
        timeout(deadline, self.retired.cancelled()).await.is_ok()
    }
}

/// What a member that leads tells of that.
fn proposing(report: &Report) -> Option<Proposing> {
    let lost = report.primary_lost_at.filter(|_| !report.streaming);
    let without = |at: Instant| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
    report.leading.then(|| Proposing { term: report.term, without_primary_ms: lost.map(without) })
}

/// What to do after a term of office, or the attempt to get one.
enum Next {
    StandBy,
    /// The term ended by its own rules, and the next one is this member's as well, unless somebody campaigned meanwhile.
    Succeed(Term),
    Pause(Role, Duration),
    Retire,
}

struct Task {
    own: NodeId,
    registry: Arc<Registry>,
    peers: Arc<Peers>,
    /// Where the peers' tasks run.
    main: Handle,
    settings: Arc<Settings>,
    status: Arc<Status>,
    standing: Arc<Mutex<(Role, Option<NodeId>)>>,
    retire: CancellationToken,
    /// What is known of the primary, and since when.
    facts: Option<(Arc<PrimaryFacts>, Instant)>,
    primary_retry: Backoff,
    lost: Backoff,
    last_leader: Option<NodeId>,
    /// Since when this member reaches the primary, while a leader doesn't.
    reached_at: Option<Instant>,
    /// The highest term that was heard of.
    known_term: Term,
}

impl Task {
    async fn run(mut self) {
        let retire = self.retire.clone();
        let mut succeeds = None;
        while !retire.is_cancelled() {
            let next = match self.stand_by(succeeds).await {
                Some(facts) => self.hold_office(facts).await,
                None => break,
            };
            succeeds = match next {
                Next::Succeed(term) => Some(term),
                _ => None,
            };
            match next {
                Next::StandBy | Next::Succeed(_) => {}
                Next::Pause(role, pause) => {
                    self.stands(role, None);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = retire.cancelled() => {}
                    }
                }
                Next::Retire => break,
            }
        }
        self.stands(Role::Resigned, None);
        self.peers.stand_no_more();
    }

    fn stands(&self, role: Role, leader: Option<NodeId>) {
        *self.standing.lock() = (role, leader);
        let aside = match role {
            Role::Leading | Role::Campaigning => None,
            Role::StandingBy | Role::Resigned => Some(Aside::StandingBy),
            Role::WaitingForPrimary | Role::Fenced | Role::NeedsOperator => Some(Aside::WithoutPrimary),
        };
        self.status.update(|report| report.aside = aside);
    }

    /// Waits until it's on this member to campaign. `None`: it is to retire.
    async fn stand_by(&mut self, mut succeeds: Option<Term>) -> Option<Arc<PrimaryFacts>> {
        let mut resigned = self.peers.watch_resigned();
        let jitter = jitter(Situation::MAX_JITTER);
        let mut vacant_since = None;
        loop {
            // Which log it is about is known once the primary was reached.
            let ttid = match &self.facts {
                Some((facts, _)) => facts.ttid,
                None => self.reach_primary().await?.0.ttid,
            };
            let last_word = *resigned.borrow_and_update();
            let mut leadership = self.registry.get(ttid).ok().map(|timeline| timeline.watch_leadership());
            if let Some(leadership) = &mut leadership {
                leadership.mark_unchanged();
            }
            if let Some(left) = self.patience(ttid) {
                tokio::select! {
                    () = tokio::time::sleep(left) => {}
                    () = changed(&mut leadership) => {}
                    _ = resigned.changed() => {}
                    () = self.retire.cancelled() => return None,
                }
            }
            let views = tokio::select! {
                views = self.views(ttid) => views,
                // What was said before that is out of date, and may depose who was just elected.
                () = changed(&mut leadership) => continue,
            };
            self.known_term = views.iter().map(|view| view.report.term).fold(self.known_term, Term::max);
            self.probe_primary(&views).await;
            let vacant_for = vacant_since.map_or(Duration::ZERO, |since: Instant| since.elapsed());
            let leaving = self.peers.leaving();
            let situation = Situation {
                own: self.own,
                members: self.settings.safekeepers.len(),
                views: &views,
                resigned: last_word.filter(|word| word.ttid == ttid),
                leaving: &leaving,
                last_leader: self.last_leader,
                vacant_for,
                reaches_primary: self.reached_at.is_some_and(|at| at.elapsed() >= REACHED_LIMIT),
                jitter,
            };
            let chosen = succeeds.is_some_and(|term| self.known_term <= term);
            let decision = if chosen { Decision::Campaign } else { situation.decide() };
            let chosen = chosen || situation.is_successor();
            let pause = if chosen { Duration::ZERO } else { self.lost.wait(Instant::now()) };
            let again = match decision {
                Decision::Campaign if pause.is_zero() => {
                    vacant_since.get_or_insert_with(Instant::now);
                    let began = Instant::now();
                    let (facts, at_once) = self.fresh_facts().await?;
                    if at_once && began.elapsed() < LOST_PAUSE.0 {
                        return Some(facts);
                    }
                    // Much may have happened meanwhile. And the others waited for the primary as well: whose turn it is counts
                    // from now on, or all would campaign at once.
                    vacant_since = Some(Instant::now());
                    succeeds = None;
                    Duration::ZERO
                }
                Decision::Campaign => pause,
                Decision::StandBy { leader, vacant, again } => {
                    self.stands(Role::StandingBy, leader);
                    if vacant {
                        vacant_since.get_or_insert_with(Instant::now);
                    } else {
                        vacant_since = None;
                        self.last_leader = leader.or(self.last_leader);
                    }
                    if leader.is_some() {
                        self.lost = Backoff::new(LOST_PAUSE.0, LOST_PAUSE.1);
                    }
                    again
                }
            };
            tokio::select! {
                () = tokio::time::sleep(again) => {}
                () = changed(&mut leadership) => {}
                _ = resigned.changed() => {}
                () = self.retire.cancelled() => return None,
            }
        }
    }

    /// How long a leader that missed a heartbeat may be silent yet. Until then there is nothing to decide, and a question to
    /// it, which it doesn't answer, would only cost time.
    fn patience(&self, ttid: TenantTimelineId) -> Option<Duration> {
        let silent = Duration::from_millis(self.peers.leader(ttid).silent_ms?);
        SILENCE_LIMIT.checked_sub(silent).filter(|_| silent >= SUSPICIOUS)
    }

    /// What the members say that answer, this one first.
    async fn views(&self, ttid: TenantTimelineId) -> Vec<View> {
        let own = View { node: self.own, report: self.peers.leader(ttid) };
        let (peers, members) = (Arc::clone(&self.peers), self.settings.safekeepers.clone());
        // Once it is certain that nobody leads, nobody is waited for: who leads no more may not answer either.
        let needed = majority(members.len());
        let vacant = hears_nobody(&own.report);
        let enough = move |answers: &[(NodeId, LeaderReport)]| {
            vacant && 1 + answers.iter().filter(|(_, report)| hears_nobody(report)).count() >= needed
        };
        let asked = self.main.spawn(async move { peers.ask_who_leads(&members, ttid, ASK_LIMIT, enough).await });
        let others = asked.await.unwrap_or_default();
        std::iter::once(own).chain(others.into_iter().map(|(node, report)| View { node, report })).collect()
    }

    /// While a leader says that it doesn't reach the primary, finds out whether this member does.
    async fn probe_primary(&mut self, views: &[View]) {
        let lost = |view: &View| view.report.proposing.is_some_and(|proposing| proposing.without_primary_ms.is_some());
        if !views.iter().any(|view| view.node != self.own && lost(view)) {
            self.reached_at = None;
            return;
        }
        let found = tokio::select! {
            found = timeout(PROBE_LIMIT, primary::find(&self.settings)) => matches!(found, Ok(Ok(_))),
            () = self.retire.cancelled() => false,
        };
        self.reached_at = if found { self.reached_at.or_else(|| Some(Instant::now())) } else { None };
    }

    /// What is known of the primary, from not long ago; as [`Self::reach_primary`].
    async fn fresh_facts(&mut self) -> Option<(Arc<PrimaryFacts>, bool)> {
        match &self.facts {
            Some((facts, at)) if at.elapsed() < FACTS_AGE => Some((Arc::clone(facts), true)),
            _ => self.reach_primary().await,
        }
    }

    /// Asks for the primary until it answers, and tells whether it did at once; `None` when it is to retire. Everything else
    /// has to wait: without the primary there is nothing to propose.
    async fn reach_primary(&mut self) -> Option<(Arc<PrimaryFacts>, bool)> {
        let mut at_once = true;
        loop {
            let asked = tokio::select! {
                asked = timeout(PRIMARY_ANSWER_LIMIT, primary::facts(&self.settings)) => asked,
                () = self.retire.cancelled() => return None,
            };
            let error = match asked {
                Ok(Ok((facts, primary))) => {
                    self.primary_retry.progress();
                    return Some((self.reached(Arc::new(facts), &primary), at_once));
                }
                Ok(Err(error)) => error,
                Err(_) => UpstreamError::Connection(crate::client::connection::ConnectError::TimedOut),
            };
            at_once = false;
            self.primary_retry.failed(Instant::now());
            let pause = if error.is_fatal() { HELPLESS_PAUSE } else { self.primary_retry.wait(Instant::now()) };
            self.stands(if error.is_fatal() { Role::NeedsOperator } else { Role::WaitingForPrimary }, None);
            self.report_primary_error(&error, pause);
            tokio::select! {
                () = lookout::pause(&self.settings, pause, error.lacks_primary()) => {}
                () = self.retire.cancelled() => return None,
            }
        }
    }

    /// The primary answered.
    fn reached(&mut self, facts: Arc<PrimaryFacts>, primary: &tokio_postgres::Config) -> Arc<PrimaryFacts> {
        let timeline = facts.stock.ancestry.current();
        if self.facts.as_ref().is_none_or(|(known, _)| known.stock.ancestry.current() != timeline) {
            tracing::info!(
                primary = primary::describe(primary), timeline = %facts.ttid, system_id = %facts.server.system_id,
                pg_version = facts.server.pg_version, pg_timeline = %timeline, "found the primary"
            );
            checks::warn_about(primary.clone(), self.settings.application_name.clone());
        }
        self.status.update(|report| {
            report.ttid = Some(facts.ttid);
            (report.primary_error, report.primary_retry_at) = (None, None);
        });
        self.peers.stand_for(facts.ttid);
        self.facts = Some((Arc::clone(&facts), Instant::now()));
        facts
    }

    /// The same error again is not worth a warning.
    fn report_primary_error(&self, error: &UpstreamError, pause: Duration) {
        let text = error.to_string();
        if self.status.report().primary_error.as_deref() != Some(&text) {
            let primary = primary::describe(&self.settings.primary);
            tracing::warn!(primary, error = text, "primary not available; trying again and again");
        }
        self.status.update(|report| {
            report.primary_error = Some(text);
            report.primary_retry_at = Instant::now().checked_add(pause);
        });
    }

    /// Campaigns, and leads if it is elected.
    async fn hold_office(&mut self, facts: Arc<PrimaryFacts>) -> Next {
        self.stands(Role::Campaigning, None);
        let limits =
            Limits { election: Some(ELECTION_LIMIT), known_term: Some(self.known_term), majority: Some(ALONE_LIMIT) };
        let (settings, status) = (Arc::clone(&self.settings), Arc::clone(&self.status));
        let (driver, mut inbox) = Driver::new(Some(settings), Arc::clone(&facts), status);
        let (mut driver, began) = (driver.limited(limits), Instant::now());
        // Its connections stay until the others were told how it ended, so that they don't take it for dead.
        let ended = driver.serve(&mut inbox, &self.retire).await;
        let report = self.status.report();
        // Of a term that is over nothing is to be told.
        self.status.update(|over| {
            let Report { ttid, term, .. } = *over;
            *over = Report { ttid, term, ..Report::default() };
        });
        let led = report.leading;
        self.known_term = self.known_term.max(report.term);
        if led {
            self.last_leader = Some(self.own);
            self.lost.progress();
        }
        let resigned = |successor| Resigned { ttid: facts.ttid, term: report.term, successor };
        match ended {
            Ended::Shutdown => {
                if led {
                    let leaving = self.peers.leaving();
                    let successor = driver.successor(|node| node != self.own && !leaving.contains(&node));
                    tracing::info!(term = %report.term, ?successor, "handing over");
                    self.tell(resigned(successor)).await;
                }
                Next::Retire
            }
            Ended::TimelineOver => {
                self.tell(resigned(Some(self.own))).await;
                self.facts = None;
                Next::Succeed(report.term)
            }
            Ended::PrimaryChanged if began.elapsed() > LOST_PAUSE.0 => {
                self.tell(resigned(Some(self.own))).await;
                self.facts = None;
                Next::Succeed(report.term)
            }
            Ended::Outdated => {
                self.stands(Role::Fenced, None);
                fenced::wait_outdated(&self.settings, &facts, &self.status, &self.retire).await;
                self.facts = None;
                Next::StandBy
            }
            Ended::FencedOff(reason) => {
                self.stands(Role::Fenced, None);
                if fenced::wait(&self.settings, &facts, &reason, &self.status, &self.retire).await {
                    self.facts = None;
                }
                Next::StandBy
            }
            Ended::Fatal(error) => {
                tracing::error!(%error, "an operator has to put this right before WAL of the primary is proposed");
                self.report_primary_error(&error, HELPLESS_PAUSE);
                self.facts = None;
                Next::Pause(Role::NeedsOperator, HELPLESS_PAUSE)
            }
            Ended::Overtaken(term) => {
                tracing::info!(%term, "not standing: somebody else campaigned meanwhile");
                self.known_term = self.known_term.max(term);
                Next::StandBy
            }
            ended => {
                tracing::warn!(reason = %ended, "{}", if led { "stepping down" } else { "not elected" });
                if !led || !matches!(ended, Ended::SteppedDown(_)) {
                    self.lost.failed(Instant::now() + jitter(LOST_PAUSE.0));
                }
                Next::StandBy
            }
        }
    }

    async fn tell(&self, resigned: Resigned) {
        let (peers, members) = (Arc::clone(&self.peers), self.settings.safekeepers.clone());
        let told = self.main.spawn(async move { peers.tell_resigned(&members, resigned, TELL_LIMIT).await });
        let _ = told.await;
    }
}

/// Wakes when a leader comes or goes; never when there is no timeline yet.
async fn changed(leadership: &mut Option<watch::Receiver<Term>>) {
    if let Some(leadership) = leadership
        && leadership.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Something less than `limit`, each time something else.
fn jitter(limit: Duration) -> Duration {
    let random = RandomState::new().hash_one(());
    let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(random.checked_rem(limit).unwrap_or(0))
}
