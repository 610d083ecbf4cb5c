//! Whether an acceptor can still vouch for its log (spec: semantics 5.3 and 21.A).
//!
//! A vote with a low end of the log says "I never acknowledged anything above". A node that lost acknowledged WAL, or
//! whose state contradicts itself, must not say that: it says nothing instead, and tells the operator why.
//!
//! | | sound | fault | quarantined |
//! |---|---|---|---|
//! | greeting, status, term bump, membership | yes | yes | yes |
//! | refusing lower terms | yes | yes | yes |
//! | reads of committed WAL | yes | what the checksums confirm | what the checksums confirm |
//! | vote | yes | no: the connection is closed | no: the connection is closed |
//! | accepting a leader | yes | no | no |
//! | appends of a leader accepted before | yes | yes | no |
//!
//! Why a leader accepted before may go on appending in state fault: its WAL goes behind the end of the log, where nothing
//! is damaged, and is durable when it is acknowledged. An acknowledgement only counts towards a majority; the proof that
//! what a majority has is never lost needs the *voters* to tell the truth, and this node is none. So each majority that
//! votes has another node of the one that acknowledged. Refusing the appends would add no safety, and would stop all
//! commits when one more node is away. A quarantined node has no log that it could vouch for, so it appends nothing.
//!
//! Health only gets worse. Who repaired the damage builds the acceptor anew from what is on disk.

use std::fmt;
use std::sync::Arc;

use pgproto::Lsn;

use super::acceptor::AcceptorError;

/// Acknowledged WAL that is damaged: unknown, which is not the same as absent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// First position that can't be vouched for.
    pub from: Lsn,
    /// End of what was acknowledged; 0 when that isn't known.
    pub acked_end: Lsn,
    /// What was found, for the operator.
    pub reason: Arc<str>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WAL from {} on is damaged", self.from)?;
        if self.acked_end.is_valid() {
            write!(f, " and was acknowledged up to {}", self.acked_end)?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Whether an acceptor can vouch for its log. See the module's page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Health {
    /// As far as is known, everything ever acknowledged is there.
    #[default]
    Sound,
    /// Acknowledged WAL is damaged.
    Fault(Fault),
    /// An invariant of consensus is broken, for this reason: nothing here is certain but the bytes, which are kept.
    Quarantined(Arc<str>),
}

impl Health {
    /// Whether everything is well.
    pub fn is_sound(&self) -> bool {
        matches!(self, Self::Sound)
    }

    /// Fails unless this acceptor may say how far its log goes.
    pub fn check_vouches(&self) -> Result<(), AcceptorError> {
        match self {
            Self::Sound => Ok(()),
            Self::Fault(fault) => Err(AcceptorError::Faulty(fault.clone())),
            Self::Quarantined(reason) => Err(AcceptorError::Quarantined(Arc::clone(reason))),
        }
    }

    /// Fails when nothing here is certain.
    pub fn check_not_quarantined(&self) -> Result<(), AcceptorError> {
        match self {
            Self::Quarantined(reason) => Err(AcceptorError::Quarantined(Arc::clone(reason))),
            Self::Sound | Self::Fault(_) => Ok(()),
        }
    }

    /// A short name for status.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sound => "sound",
            Self::Fault(_) => "fault",
            Self::Quarantined(_) => "quarantined",
        }
    }

    /// Adds a fault: the damaged range grows, the first reason stays. A quarantine already says more.
    pub(super) fn add_fault(&mut self, new: Fault) {
        match self {
            Self::Sound => *self = Self::Fault(new),
            Self::Fault(known) => {
                known.from = known.from.min(new.from);
                known.acked_end = known.acked_end.max(new.acked_end);
            }
            Self::Quarantined(_) => {}
        }
    }

    /// Quarantines; the first reason stays.
    pub(super) fn quarantine(&mut self, reason: impl Into<Arc<str>>) {
        if !matches!(self, Self::Quarantined(_)) {
            *self = Self::Quarantined(reason.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(from: u64, acked_end: u64, reason: &str) -> Fault {
        Fault { from: Lsn(from), acked_end: Lsn(acked_end), reason: reason.into() }
    }

    #[test]
    fn health_only_gets_worse() {
        let mut health = Health::Sound;
        health.add_fault(fault(0x200, 0, "first"));
        health.add_fault(fault(0x300, 0x400, "second"));
        health.add_fault(fault(0x100, 0x150, "third"));
        assert_eq!(health, Health::Fault(fault(0x100, 0x400, "first")));
        health.quarantine("broken");
        health.quarantine("broken again");
        health.add_fault(fault(0x10, 0, "late"));
        assert_eq!(health, Health::Quarantined("broken".into()));
    }

    #[test]
    fn a_fault_says_what_is_damaged() {
        assert_eq!(
            fault(0x100, 0x400, "checksum").to_string(),
            "WAL from 0/100 on is damaged and was acknowledged up to 0/400: checksum"
        );
        assert_eq!(fault(0x100, 0, "checksum").to_string(), "WAL from 0/100 on is damaged: checksum");
    }
}
