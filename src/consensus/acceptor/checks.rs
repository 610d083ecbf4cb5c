//! What an acceptor checks before it does anything: everything that comes from a peer or from the disk.

use pgproto::wal::RecordScanner;
use pgproto::walproposer::{Configuration, ProposerGreeting, Proposes, StockPrimary, TermLsn};
use pgproto::{Ancestry, Generation, Lsn, Term};

use super::{Acceptor, AcceptorError, LazyLsns, MAX_TERM_STEP};
use crate::consensus::health::Fault;
use crate::consensus::history::{TermHistory, highest_common_point};
use crate::consensus::membership;

/// What becomes of the log here when a leader is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// It is cut where the leader starts, and goes on from there.
    Continue,
    /// It has nothing in common with the leader's: another one begins in its place.
    Anew,
}

impl Acceptor {
    /// Checks what was loaded against the invariants of semantics 5.3.
    pub(super) fn check_loaded(&mut self) {
        let (commit, end) = (self.lazy.commit_lsn, self.flush_lsn());
        if commit > end {
            let reason = format!("WAL up to {commit} is committed, but whole records end at {end}");
            self.health.add_fault(Fault { from: end, acked_end: commit, reason: reason.into() });
        }
        let (term, joined) = (self.durable.term, self.durable.term_history.last_term());
        if joined > term {
            self.quarantine(format!("its log has WAL of term {joined}, but it promised no term above {term}"));
        }
        // Peers of other safekeepers told each other these, so they may be ahead. Too low they are true as well.
        let lazy = &mut self.lazy;
        for lsn in [&mut lazy.backup_lsn, &mut lazy.peer_horizon_lsn, &mut lazy.remote_consistent_lsn] {
            *lsn = (*lsn).min(commit);
        }
    }

    /// What holds after every step, unless what was loaded broke it (spec: semantics 5.3, 22 and 23).
    pub(super) fn assert_invariants(&self) {
        if !self.health.is_sound() {
            return;
        }
        let LazyLsns { commit_lsn, backup_lsn, peer_horizon_lsn, remote_consistent_lsn } = self.lazy;
        assert!(commit_lsn <= self.flush_lsn(), "only what is here can be called committed here");
        assert!(peer_horizon_lsn <= commit_lsn, "the peer horizon is committed");
        assert!(
            backup_lsn <= commit_lsn && remote_consistent_lsn <= commit_lsn,
            "only committed WAL leaves the quorum"
        );
        assert!(self.durable.term >= self.durable.term_history.last_term(), "WAL comes only from terms joined");
    }

    /// Refuses a proposer that the fence doesn't admit, whatever its message: it shall not vote, lead, append, nor be
    /// acknowledged what it appended before.
    pub fn check_fence(&self, proposes: Proposes) -> Result<(), AcceptorError> {
        match self.durable.stock.fence {
            Some(fence) if !fence.admits(proposes) => Err(AcceptorError::FencedOff { fence, proposes }),
            _ => Ok(()),
        }
    }

    pub(super) fn check_identity(&self, greeting: &ProposerGreeting) -> Result<(), AcceptorError> {
        let own = &self.durable;
        if greeting.ttid != own.ttid {
            return Err(AcceptorError::WrongTimeline(own.ttid));
        }
        self.check_version(greeting.pg_version)?;
        // Segments are cut in this size and WAL is scanned by it, so it is never unknown.
        if greeting.wal_seg_size != own.server.wal_seg_size.as_u32() {
            let (ours, theirs) = (own.server.wal_seg_size.bytes(), u64::from(greeting.wal_seg_size));
            return Err(AcceptorError::SegmentSizeMismatch { ours, theirs });
        }
        Ok(())
    }

    /// A log is of one major version; 0 means unknown.
    fn check_version(&self, version: u32) -> Result<(), AcceptorError> {
        let major = |version: u32| version / 10_000;
        if version != 0 && !(14..=18).contains(&major(version)) {
            return Err(AcceptorError::UnsupportedVersion(version));
        }
        let (ours, theirs) = (major(self.durable.server.pg_version), major(version));
        if ours != 0 && theirs != 0 && ours != theirs {
            return Err(AcceptorError::VersionMismatch { ours, theirs });
        }
        Ok(())
    }

    /// Checks what the leader tells of its Postgres timelines against its log and against the one here, which goes on at
    /// `start`; returns them.
    pub(super) fn check_timelines(
        &self,
        primary: Option<&StockPrimary>,
        history: &TermHistory,
        (start, log): (Lsn, Start),
    ) -> Result<Option<Ancestry>, AcceptorError> {
        let own = &self.durable.stock.ancestry;
        let Some(primary) = primary else {
            let only_first = *own == Ancestry::default() || log == Start::Anew;
            return if only_first { Ok(None) } else { Err(AcceptorError::TimelineUntold(own.current())) };
        };
        self.check_version(primary.pg_version)?;
        let theirs = primary.ancestry()?;
        let timeline = theirs.current();
        let (begin, term_start) =
            (theirs.begin_of(timeline).unwrap_or_default(), history.last().map_or(Lsn::INVALID, |entry| entry.lsn));
        if begin > term_start {
            return Err(AcceptorError::TimelineBeginsLate { timeline, begin, term_start });
        }
        let stays = log == Start::Continue && self.has_wal();
        if stays && !theirs.agrees_below(own, start) {
            return Err(AcceptorError::OtherTimelines { end: start, ours: own.current(), theirs: timeline });
        }
        Ok(Some(theirs))
    }

    /// What a higher configuration must be like to be adopted, and an equal one to be the same.
    pub(super) fn check_configuration(&self, theirs: &Configuration) -> Result<(), AcceptorError> {
        let (ours, generation) = (&self.durable.configuration, theirs.generation);
        if generation > ours.generation {
            membership::check(theirs)?;
            if !theirs.contains(self.node_id) {
                return Err(AcceptorError::NotAMember { node: self.node_id, generation });
            }
        }
        if generation == ours.generation && generation != Generation(0) && !membership::same_members(ours, theirs) {
            return Err(AcceptorError::TwoConfigurations(generation));
        }
        Ok(())
    }

    /// Records, and so terms and what is committed, begin at multiples of 8.
    pub(super) fn check_boundary(lsn: Lsn) -> Result<(), AcceptorError> {
        if lsn.align_up() == lsn { Ok(()) } else { Err(AcceptorError::NotARecordBoundary(lsn)) }
    }

    pub(super) fn check_generation(&self, theirs: Generation) -> Result<(), AcceptorError> {
        let ours = self.durable.configuration.generation;
        if ours == theirs { Ok(()) } else { Err(AcceptorError::GenerationMismatch { ours, theirs }) }
    }

    pub(super) fn check_term_step(&self, asked: Term) -> Result<(), AcceptorError> {
        let ours = self.durable.term;
        if asked.0 > ours.0.saturating_add(MAX_TERM_STEP) {
            return Err(AcceptorError::TermTooFar { ours, asked });
        }
        Ok(())
    }

    /// Whether the leader may start at `wanted`: the position at which its log and the one here part.
    pub(super) fn check_start(&self, history: &TermHistory, wanted: Lsn) -> Result<Start, AcceptorError> {
        // The log ends where it will end once all of it is flushed, which happens before it is cut.
        let written = self.scanner.as_ref().map_or(Lsn::INVALID, RecordScanner::last_record_end);
        let end = written.max(self.durable.timeline_start_lsn);
        // Also of terms whose WAL has not arrived here, both histories tell the same.
        history.check_agrees(&self.durable.term_history)?;
        let own = self.durable.term_history.visible_at(end);
        let common = highest_common_point(history, &own, end)?;
        let first = history.first().map_or(Lsn::INVALID, |entry| entry.lsn);
        let ours = common.map_or(first, |point: TermLsn| point.lsn);
        if ours != wanted || !wanted.is_valid() {
            return Err(AcceptorError::StartMismatch { ours, theirs: wanted });
        }
        // What the flush that comes first will make committed counts already.
        let commit = self.lazy.commit_lsn.max(self.leader_commit_lsn.min(end));
        if common.is_none() && own.first().is_some() && self.is_unrelated(first, commit)? {
            return Ok(Start::Anew);
        }
        if wanted < commit {
            return Err(AcceptorError::TruncatesCommitted { start: wanted, commit });
        }
        if written.is_valid() && wanted > end {
            return Err(AcceptorError::StartBeyondEnd { start: wanted, end });
        }
        Ok(Start::Continue)
    }

    /// A leader whose log has no term in common with the one here (rule 12): whether that log begins in another place.
    /// It does when first elections failed and the primary's slot was made anew in between.
    ///
    /// Then nothing of the log here was ever committed by a quorum, nor will be: each majority that could have done so has
    /// one of the leader's voters, who would have told its first term. Is something known to be committed here all the
    /// same, then some node forgot what it had.
    fn is_unrelated(&self, theirs: Lsn, commit: Lsn) -> Result<bool, AcceptorError> {
        let ours = self.durable.timeline_start_lsn;
        if commit > ours {
            return Err(AcceptorError::TruncatesCommitted { start: ours, commit });
        }
        // Within a process the commit LSN, which is at least the start of the timeline, must not fall.
        if theirs < ours {
            return Err(AcceptorError::EarlierBeginning { ours, theirs });
        }
        Ok(theirs > ours)
    }
}
