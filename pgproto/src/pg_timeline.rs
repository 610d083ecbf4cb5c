//! Postgres timelines: which of them wrote which part of the log (spec: postgres clients 8).
//!
//! A promoted standby goes on under the next timeline id, from the *switch point* where it ended recovery. Its history file
//! names all its ancestors with the positions at which they ended:
//!
//! ```text
//! 1<TAB>0/1700B500<TAB>no recovery target specified
//!
//! 2<TAB>0/1A015568<TAB>no recovery target specified
//! ```
//!
//! [`parse_history`] reads it into an [`Ancestry`], which answers what belongs to whom.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Lsn, SegmentNumber, SegmentSize};

/// Number of a Postgres timeline: 1 for what initdb made, more after each promotion. Not to be confused with
/// [`crate::TimelineId`], which names a log on safekeepers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PgTimelineId(pub u32);

impl PgTimelineId {
    /// The one a database cluster begins with; also what Neon calls all there is.
    pub const FIRST: PgTimelineId = PgTimelineId(1);

    /// Name of its history file. The first timeline has none.
    pub fn history_file_name(self) -> String {
        format!("{:08X}.history", self.0)
    }

    /// The timeline whose history file has this name.
    pub fn of_history_file(name: &str) -> Option<PgTimelineId> {
        let digits = name.strip_suffix(".history").filter(|digits| digits.len() == 8)?;
        let upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        digits.bytes().all(upper_hex).then(|| u32::from_str_radix(digits, 16).ok().map(PgTimelineId)).flatten()
    }
}

impl fmt::Display for PgTimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for PgTimelineId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(PgTimelineId)
    }
}

/// Where a timeline begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Branch {
    /// The timeline.
    pub timeline: PgTimelineId,
    /// Its first position: the switch point; 0 for the oldest.
    pub begin: Lsn,
}

/// A timeline and its ancestors: they divide the log among them. Never empty; ids ascend, and positions don't descend.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ancestry(Vec<Branch>);

/// Longest [`Ancestry`]. Each promotion adds one; a history file of that many has some 50 KiB.
pub const MAX_BRANCHES: usize = 1024;

/// Why there is no ancestry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AncestryError {
    /// A line is neither empty nor a comment nor an entry.
    #[error("line {line} of the history file is neither an entry nor a comment")]
    Line {
        /// Its number, from 1.
        line: usize,
    },
    /// Ids don't ascend.
    #[error("timeline {next} cannot descend from timeline {before}")]
    Descending {
        /// The ancestor.
        before: PgTimelineId,
        /// The descendant.
        next: PgTimelineId,
    },
    /// A timeline begins before its parent.
    #[error("timeline {timeline} begins at {begin}, before its parent, which begins at {parent_begin}")]
    Backwards {
        /// The timeline.
        timeline: PgTimelineId,
        /// Where it begins.
        begin: Lsn,
        /// Where its parent begins.
        parent_begin: Lsn,
    },
    /// More than [`MAX_BRANCHES`].
    #[error("more than {MAX_BRANCHES} timelines")]
    TooMany,
    /// No timeline at all, or timeline 0.
    #[error("no timeline, or timeline 0")]
    NoTimeline,
}

impl Default for Ancestry {
    /// Timeline 1 alone.
    fn default() -> Self {
        Self::single(PgTimelineId::FIRST)
    }
}

impl Ancestry {
    /// A timeline whose ancestors, if any, left no WAL that matters.
    pub fn single(timeline: PgTimelineId) -> Self {
        Self(vec![Branch { timeline, begin: Lsn::INVALID }])
    }

    /// Checks `branches`, the oldest first. The first one's begin doesn't count: it holds all that is older.
    pub fn new(mut branches: Vec<Branch>) -> Result<Self, AncestryError> {
        let first = branches.first_mut().filter(|first| first.timeline.0 != 0).ok_or(AncestryError::NoTimeline)?;
        first.begin = Lsn::INVALID;
        if branches.len() > MAX_BRANCHES {
            return Err(AncestryError::TooMany);
        }
        for (parent, child) in branches.iter().zip(branches.iter().skip(1)) {
            if child.timeline <= parent.timeline {
                return Err(AncestryError::Descending { before: parent.timeline, next: child.timeline });
            }
            if child.begin < parent.begin || !child.begin.is_valid() {
                let (timeline, begin, parent_begin) = (child.timeline, child.begin, parent.begin);
                return Err(AncestryError::Backwards { timeline, begin, parent_begin });
            }
        }
        Ok(Self(branches))
    }

    /// All timelines with their begins, the oldest first.
    pub fn branches(&self) -> &[Branch] {
        &self.0
    }

    /// The newest timeline.
    pub fn current(&self) -> PgTimelineId {
        self.0.last().map_or(PgTimelineId::FIRST, |branch| branch.timeline)
    }

    /// The timeline that the byte at `lsn` belongs to.
    pub fn at(&self, lsn: Lsn) -> PgTimelineId {
        let newest = self.0.iter().rev().find(|branch| branch.begin <= lsn);
        newest.map_or(PgTimelineId::FIRST, |branch| branch.timeline)
    }

    /// Whether `timeline` is this one or an ancestor.
    pub fn contains(&self, timeline: PgTimelineId) -> bool {
        self.0.iter().any(|branch| branch.timeline == timeline)
    }

    /// Where `timeline` begins, if it is one of these; 0 for the oldest.
    pub fn begin_of(&self, timeline: PgTimelineId) -> Option<Lsn> {
        self.0.iter().find(|branch| branch.timeline == timeline).map(|branch| branch.begin)
    }

    /// What follows `timeline`: the next timeline, which begins where that one ends. `None` for the newest and for those
    /// that are none of these.
    pub fn successor(&self, timeline: PgTimelineId) -> Option<Branch> {
        let index = self.0.iter().position(|branch| branch.timeline == timeline)?;
        self.0.get(index + 1).copied()
    }

    /// The timeline in the name of the file that holds a segment: the one its last byte belongs to. Files of older timelines
    /// that were copied into it, as Postgres does, have the same bytes up to where those end.
    pub fn of_segment(&self, number: SegmentNumber, size: SegmentSize) -> PgTimelineId {
        self.at(Lsn(number.end(size).0.saturating_sub(1)))
    }

    /// These timelines as they were when the log ended at `end`: those that begin at `end` count already.
    pub fn up_to(&self, end: Lsn) -> Self {
        let kept: Vec<_> = self.0.iter().take_while(|branch| branch.begin <= end).copied().collect();
        Self(kept)
    }

    /// Whether every byte below `end` belongs to the same timeline in both.
    pub fn agrees_below(&self, other: &Self, end: Lsn) -> bool {
        if !end.is_valid() {
            return true;
        }
        let last = Lsn(end.0 - 1);
        let before = |ancestry: &Self| -> Vec<Branch> {
            let owners = ancestry.0.iter().zip(ancestry.0.iter().skip(1).map(Some).chain([None]));
            // A timeline that ends where it began owns nothing.
            let owns = |&(branch, next): &(&Branch, Option<&Branch>)| {
                branch.begin <= last && next.is_none_or(|next| next.begin > branch.begin)
            };
            owners.filter(owns).map(|(branch, _)| *branch).collect()
        };
        before(self) == before(other)
    }
}

/// Reads the history file of `timeline`. As PostgreSQL does, everything behind the position on a line is a comment.
pub fn parse_history(timeline: PgTimelineId, content: &[u8]) -> Result<Ancestry, AncestryError> {
    let mut branches = Vec::new();
    let mut begin = Lsn::INVALID;
    for (index, line) in content.split(|&byte| byte == b'\n').enumerate() {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_start();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let wrong = || AncestryError::Line { line: index + 1 };
        let mut words = text.split_ascii_whitespace();
        let parent = words.next().and_then(|word| word.parse().ok()).ok_or_else(wrong)?;
        let end = words.next().and_then(|word| word.parse().ok()).ok_or_else(wrong)?;
        if branches.len() >= MAX_BRANCHES {
            return Err(AncestryError::TooMany);
        }
        branches.push(Branch { timeline: parent, begin });
        begin = end;
    }
    branches.push(Branch { timeline, begin });
    Ancestry::new(branches)
}

/// The history file of `ancestor`, as a descendant's history file has it: PostgreSQL begins a new one with a copy of the
/// parent's, and separates its own line by a blank one.
pub fn history_of_ancestor(content: &[u8], ancestor: PgTimelineId) -> Option<&[u8]> {
    let mut start = 0;
    for line in content.split_inclusive(|&byte| byte == b'\n') {
        let text = String::from_utf8_lossy(line);
        let parent = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
        if parent == Some(ancestor) {
            let before = content.get(..start)?;
            return Some(before.strip_suffix(b"\n").filter(|parents| parents.ends_with(b"\n")).unwrap_or(before));
        }
        start += line.len();
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const THIRD: &[u8] =
        b"1\t0/1700B500\tno recovery target specified\n\n2\t0/1A015568\tno recovery target specified\n";
    const ONE: PgTimelineId = PgTimelineId(1);
    const TWO: PgTimelineId = PgTimelineId(2);
    const THREE: PgTimelineId = PgTimelineId(3);

    fn third() -> Ancestry {
        parse_history(THREE, THIRD).unwrap()
    }

    #[test]
    fn a_history_divides_the_log() {
        let third = third();
        let (first_end, second_end) = (Lsn(0x1700_B500), Lsn(0x1A01_5568));
        assert_eq!(third.current(), THREE);
        assert_eq!(
            [Lsn(1), Lsn(first_end.0 - 1), first_end, second_end].map(|lsn| third.at(lsn)),
            [ONE, ONE, TWO, THREE]
        );
        assert_eq!(third.successor(ONE), Some(Branch { timeline: TWO, begin: first_end }));
        assert_eq!(third.successor(THREE), None);
        let size = SegmentSize::DEFAULT;
        let name = |number| SegmentNumber(number).file_name(third.of_segment(SegmentNumber(number), size), size);
        assert_eq!(
            [0x16, 0x17, 0x1A].map(name),
            ["000000010000000000000016", "000000020000000000000017", "00000003000000000000001A"]
        );
    }

    #[test]
    fn comments_gaps_and_other_spelling() {
        let content = b"# a comment\n  1 \t0/2000000 before a test\n\n";
        let ancestry = parse_history(PgTimelineId(5), content).unwrap();
        assert_eq!(ancestry.successor(ONE), Some(Branch { timeline: PgTimelineId(5), begin: Lsn(0x200_0000) }));
        assert_eq!(parse_history(TWO, b""), Ok(Ancestry::single(TWO)), "made by a tool");
    }

    #[test]
    fn bad_histories_say_what_is_wrong() {
        let wrong = |timeline, content: &[u8]| parse_history(timeline, content).unwrap_err();
        assert_eq!(wrong(TWO, b"\n1 0/1\nx\n"), AncestryError::Line { line: 3 });
        assert_eq!(wrong(TWO, b"1\n"), AncestryError::Line { line: 1 });
        assert!(matches!(wrong(TWO, b"2\t0/1\n"), AncestryError::Descending { .. }));
        assert!(matches!(wrong(THREE, b"1\t0/9\n2\t0/8\n"), AncestryError::Backwards { .. }));
        assert_eq!(wrong(PgTimelineId(0), b""), AncestryError::NoTimeline);
        assert_eq!(wrong(PgTimelineId(u32::MAX), "1\t0/1\n".repeat(2000).as_bytes()), AncestryError::TooMany);
    }

    #[test]
    fn agreement_is_about_the_bytes_below() {
        let other = parse_history(THREE, b"1\t0/1700B500\tx\n2\t0/1B000000\ty\n").unwrap();
        assert!(third().agrees_below(&other, Lsn(0x1A01_5568)), "they part there");
        assert!(!third().agrees_below(&other, Lsn(0x1A01_5569)));
        assert!(third().agrees_below(&Ancestry::default(), Lsn(0x1700_B500)));
        assert!(!third().agrees_below(&Ancestry::default(), Lsn(0x1700_B501)));
        assert_eq!(third().up_to(Lsn(0x1A01_5567)).current(), TWO);
        assert_eq!(third().up_to(Lsn(0x1A01_5568)).current(), THREE);
    }

    #[test]
    fn a_history_file_begins_with_those_of_the_ancestors() {
        assert_eq!(history_of_ancestor(THIRD, TWO), Some(&b"1\t0/1700B500\tno recovery target specified\n"[..]));
        assert_eq!(history_of_ancestor(THIRD, ONE), Some(&b""[..]));
        assert_eq!(history_of_ancestor(THIRD, THREE), None);
        let by_hand = b"# a comment\n1\t0/9\tx\n2\t0/19\ty\n";
        assert_eq!(history_of_ancestor(by_hand, TWO), Some(&b"# a comment\n1\t0/9\tx\n"[..]));
    }

    #[test]
    fn history_files_have_names() {
        assert_eq!(PgTimelineId(0x1F).history_file_name(), "0000001F.history");
        assert_eq!(PgTimelineId::of_history_file("0000001F.history"), Some(PgTimelineId(0x1F)));
        for other in ["0000001f.history", "00000001.histor", "000000001.history", "+0000001.history"] {
            assert_eq!(PgTimelineId::of_history_file(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_history_or_an_error(content: Vec<u8>, timeline: u32) {
            if let Ok(ancestry) = parse_history(PgTimelineId(timeline), &content) {
                prop_assert_eq!(ancestry.current(), PgTimelineId(timeline));
                prop_assert!(ancestry.agrees_below(&ancestry, Lsn::MAX));
            }
        }
    }
}
