//! What safekeepers tell each other, and what clients may ask of it: the JSON of two commands on the Postgres port.
//!
//! ```text
//! PEER_EXCHANGE '<Exchange>'   one row, one column "exchange": the Exchange of the node that was asked, about the same timelines
//! TIMELINE_MEMBERS             one row, one column "members": TimelineMembers of the connection's timeline
//! ```
//!
//! Unknown fields are ignored and missing lists are empty, so that versions can talk to each other.

use pgproto::{HostPort, Lsn, NodeId, TenantTimelineId, Term};
use serde::{Deserialize, Serialize};

use crate::timeline::members::RemoteTemporary;
use crate::timeline::slots::{InUse, Slot};

/// Who keeps a timeline, as one of them knows it: the answer to `TIMELINE_MEMBERS`. For clients that want to know where else
/// to go. The node that answers is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineMembers {
    /// The members, in no particular order.
    pub members: Vec<TimelineMember>,
}

/// One node that keeps a timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineMember {
    /// Its id; unknown until it was reached once.
    pub node_id: Option<NodeId>,
    /// Where its Postgres port is.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Where it stands, as its operator named that.
    #[serde(default)]
    pub availability_zone: Option<String>,
    /// Durable there; `0/0` when nothing is known.
    #[serde(default)]
    pub flush_lsn: Lsn,
    /// Committed there, as far as it knows; `0/0` when nothing is known.
    pub commit_lsn: Lsn,
    /// How long ago these were true, in milliseconds; 0 for the node that answers, absent if it was never heard of.
    #[serde(default)]
    pub age_ms: Option<u64>,
    /// Why it doesn't answer the node that tells this; absent while it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// It is about to stop.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// What a node tells another, and is answered with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exchange {
    /// Who speaks.
    pub from: Sender,
    /// Timelines of which something is said. The answer is about those of them that it has.
    #[serde(default)]
    pub timelines: Vec<TimelineReport>,
    /// In a question: the timelines of which the sender wants to know who leads them, one [`LeaderReport`] each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub who_leads: Vec<TenantTimelineId>,
    /// In an answer: what was asked for in `who_leads`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaders: Vec<LeaderReport>,
    /// The sender led this timeline, and does no longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resigned: Option<Resigned>,
}

impl Exchange {
    /// Nothing but who speaks.
    pub fn of(from: Sender) -> Self {
        let (timelines, who_leads, leaders) = (Vec::new(), Vec::new(), Vec::new());
        Self { from, timelines, who_leads, leaders, resigned: None }
    }
}

/// What a node knows of who leads a timeline, and whether it can.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderReport {
    /// Which timeline.
    #[serde(flatten)]
    pub ttid: TenantTimelineId,
    /// The highest term promised there; 0 when it doesn't have the timeline.
    #[serde(default)]
    pub term: Term,
    /// How long ago that was promised, in milliseconds; absent when it was before the node started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub voted_ms: Option<u64>,
    /// The leader of that term came there: its campaign is over.
    #[serde(default)]
    pub elected: bool,
    /// How long the leader of that term has been silent there, in milliseconds; absent when none is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_ms: Option<u64>,
    /// The node proposes WAL of the timeline itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proposing: Option<Proposing>,
    /// The node would propose it, if it were elected.
    #[serde(default)]
    pub candidate: bool,
}

/// A node that leads a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposing {
    /// In which term.
    pub term: Term,
    /// For how long it hasn't had a stream from the primary, in milliseconds; absent while it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub without_primary_ms: Option<u64>,
}

/// The end of a term that its leader chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resigned {
    /// Which timeline.
    #[serde(flatten)]
    pub ttid: TenantTimelineId,
    /// The term that ended.
    pub term: Term,
    /// Who shall lead next, without waiting.
    #[serde(default)]
    pub successor: Option<NodeId>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sender {
    /// Its id.
    pub node_id: NodeId,
    /// A number that is another after each start: who sees a new one has to tell everything again.
    pub life: u64,
    /// Where others reach it, if it was told.
    #[serde(default)]
    pub advertised: Option<HostPort>,
    /// Where it stands.
    #[serde(default)]
    pub availability_zone: Option<String>,
    /// It is about to stop: whoever needs a node had better take another one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// What a node says of a timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineReport {
    /// Which.
    #[serde(flatten)]
    pub ttid: TenantTimelineId,
    /// Durable there.
    pub flush_lsn: Lsn,
    /// Known to be committed there.
    pub commit_lsn: Lsn,
    /// What the page servers connected to it have in remote storage; absent when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pageservers_have: Option<Lsn>,
    /// All its slots, and the tombstones of dropped ones.
    #[serde(default)]
    pub slots: Vec<Slot>,
    /// The temporary slots of its clients.
    #[serde(default)]
    pub temporary: Vec<RemoteTemporary>,
    /// Slots that its clients use at the moment.
    #[serde(default)]
    pub in_use: Vec<InUse>,
}
