//! Deliberately broken variants of the cluster, to show that the oracle notices: none of it is in the product, all of it in
//! what the simulation puts around it.

use pgproto::Generation;
use pgproto::Lsn;
use pgproto::walproposer::{AcceptorMessage, AppendResponse, ProposerMessage, Proposes};
use safekeeper::timeline::Timeline;

use super::fences;
use super::network::Host;

/// What is wrong with every node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sabotage {
    /// Nothing.
    #[default]
    None,
    /// Disks say that they synced and didn't.
    SyncsThatDoNothing,
    /// Appends are acknowledged when they arrive, not when they are durable.
    AcknowledgeBeforeTheSync,
    /// A vote that the acceptor refuses, because it was given already, is given again.
    VoteTwice,
    /// A proposer that is fenced off is let in again by the nodes that it comes back to.
    ForgetTheFence,
    /// Readers see all that is durable, committed or not.
    ReadBeyondTheCommit,
}

/// What a message asked for, as far as a saboteur must know.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asked {
    Vote(pgproto::Term),
    Append { generation: Generation, term: pgproto::Term, end: Lsn },
    Other,
}

impl Sabotage {
    /// As on the command line.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }

    pub(super) fn proposes(self, host: Host) -> Proposes {
        if self == Self::ForgetTheFence { Proposes::Nothing } else { fences::proposes(host) }
    }

    pub(super) fn asked(self, message: &ProposerMessage) -> Asked {
        match message {
            ProposerMessage::VoteRequest(request) => Asked::Vote(request.term),
            ProposerMessage::Append(append) => {
                Asked::Append { generation: append.generation, term: append.term, end: append.end_lsn() }
            }
            _ => Asked::Other,
        }
    }

    pub(super) fn change(
        self,
        timeline: &Timeline,
        asked: Asked,
        reply: Option<AcceptorMessage>,
    ) -> Option<AcceptorMessage> {
        match (self, asked, reply) {
            (Self::VoteTwice, Asked::Vote(term), Some(AcceptorMessage::VoteResponse(mut vote))) => {
                vote.vote_given |= vote.term == term;
                Some(AcceptorMessage::VoteResponse(vote))
            }
            (Self::AcknowledgeBeforeTheSync, Asked::Append { generation, term, end }, None)
                if timeline.progress().term == term =>
            {
                Some(AcceptorMessage::AppendResponse(AppendResponse {
                    generation,
                    term,
                    flush_lsn: end,
                    commit_lsn: Lsn::INVALID,
                    hs_feedback: Default::default(),
                    pageserver_feedback: None,
                }))
            }
            (_, _, reply) => reply,
        }
    }

    pub(super) fn horizon(self, timeline: &Timeline, end: Lsn) -> Lsn {
        if self == Self::ReadBeyondTheCommit { timeline.progress().flush_lsn.max(end) } else { end }
    }
}
