//! What a verification found, for people and for machines.

use std::fmt;

use pgproto::wal::page::major_of;
use pgproto::{Ancestry, Lsn, PgTimelineId, SystemId};
use serde::Serialize;

use super::Facts;

/// Most findings that are listed; of the rest only the number is told.
const MAX_FINDINGS: usize = 1000;

/// What is known of a directory after it was read. It is proven to be one unbroken chain if there are no findings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// The database cluster it is of.
    pub system_id: SystemId,
    /// Its major version.
    pub pg_major: u32,
    /// Size of its segments.
    pub segment_size: u64,
    /// The timelines the chain is of, the oldest first.
    pub timelines: Vec<TimelineSpan>,
    /// Start of the first segment.
    pub start: Lsn,
    /// Where the first record begins that is there as a whole.
    pub first_record: Lsn,
    /// Where the last whole record ends.
    pub end: Lsn,
    /// What is there of the record behind that.
    pub unfinished: Option<Unfinished>,
    /// How many segments there are, the unfinished one counted.
    pub segments: u64,
    /// How many files were read.
    pub files: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// How much more is wrong than is listed.
    pub more_findings: u64,
    /// What is worth knowing and not wrong.
    pub notes: Vec<String>,
}

/// The part of the chain that a timeline wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TimelineSpan {
    /// The timeline.
    pub timeline: PgTimelineId,
    /// Its first byte here.
    pub begin: Lsn,
    /// Behind its last byte here.
    pub end: Lsn,
}

/// The begin of a record of which there isn't more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unfinished {
    /// Where it begins, or the padding before it.
    pub begin: Lsn,
    /// Behind its last byte that isn't zero.
    pub end: Lsn,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The file, or the one that should be there.
    pub file: String,
    /// Where, if it has a place in the log.
    pub lsn: Option<Lsn>,
    /// What kind of thing.
    pub kind: Kind,
    /// What is wrong, in words.
    pub message: String,
}

/// Kinds of things that can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A segment isn't there.
    MissingSegment,
    /// Of a segment before the last one there is only the begin.
    NotWhole,
    /// A file has not the length of a segment.
    WrongLength,
    /// There is no segment of this name.
    WrongName,
    /// A file can't be read or decompressed.
    Unreadable,
    /// A page header, a record or the link between two records is wrong.
    Damaged,
    /// A page or file is of another timeline than the history says.
    WrongTimeline,
    /// A segment of another database cluster.
    WrongSystem,
    /// A timeline that isn't an ancestor of the newest one.
    ForeignTimeline,
    /// Two files of one segment differ.
    Differs,
    /// A history file isn't there.
    MissingHistory,
    /// A history file can't be understood or contradicts another.
    BadHistory,
}

impl Report {
    pub(super) fn new(facts: Facts) -> Self {
        Self {
            ok: true,
            system_id: facts.system_id,
            pg_major: major_of(facts.magic).unwrap_or_default(),
            segment_size: facts.segment_size.bytes(),
            timelines: Vec::new(),
            start: Lsn::INVALID,
            first_record: Lsn::INVALID,
            end: Lsn::INVALID,
            unfinished: None,
            segments: 0,
            files: 0,
            findings: Vec::new(),
            more_findings: 0,
            notes: Vec::new(),
        }
    }

    pub(super) fn found(&mut self, file: String, lsn: Option<Lsn>, kind: Kind, message: String) {
        self.ok = false;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { file, lsn, kind, message });
        } else {
            self.more_findings += 1;
        }
    }

    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < MAX_FINDINGS {
            self.notes.push(note);
        }
    }

    /// Which timeline wrote which part of the chain.
    pub(super) fn divide(&mut self, ancestry: &Ancestry) {
        for branch in ancestry.branches() {
            let end = ancestry.successor(branch.timeline).map_or(self.end, |next| next.begin.min(self.end));
            let begin = branch.begin.max(self.start);
            if begin < end {
                self.timelines.push(TimelineSpan { timeline: branch.timeline, begin, end });
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        if self.more_findings > 0 {
            writeln!(f, "and {} more", self.more_findings)?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        writeln!(
            f,
            "system identifier {}, PostgreSQL {}, segments of {} bytes",
            self.system_id, self.pg_major, self.segment_size
        )?;
        for span in &self.timelines {
            writeln!(f, "timeline {}: {} to {}", span.timeline, span.begin, span.end)?;
        }
        if let Some(unfinished) = &self.unfinished {
            writeln!(f, "begin of a record from {} to {}", unfinished.begin, unfinished.end)?;
        }
        let verdict = if self.ok { "one unbroken chain" } else { "NOT one unbroken chain" };
        write!(f, "{verdict}: {} segments, {} to {}", self.segments, self.start, self.end)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.lsn {
            Some(lsn) => write!(f, "{} at {lsn}: {}", self.file, self.message),
            None => write!(f, "{}: {}", self.file, self.message),
        }
    }
}
