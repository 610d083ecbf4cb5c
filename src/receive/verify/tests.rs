//! Damage of every kind, everywhere.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::io::Read;
use std::path::Path;
use std::sync::LazyLock;

use pgproto::lsn::{PAGE_SIZE, segment_offset};
use pgproto::wal::page::header_size;
use pgproto::{Lsn, PgTimelineId};
use proptest::prelude::*;

use super::*;
use crate::receive::sinks::tests::{DIR, START, TWO, disk, put, receive, wal};
use crate::storage::simdisk::SimDisk;
use crate::storage::test_wal::{PG_VERSION, SIZE, SYSTEM_ID, WalWriter};

fn check(disk: &SimDisk) -> Report {
    verify_on(disk, Path::new(DIR), &mut |_| {}).unwrap()
}

/// What is found, as kind and file.
fn found(disk: &SimDisk) -> Vec<(Kind, String)> {
    let report = check(disk);
    assert_eq!(report.ok, report.findings.is_empty());
    report.findings.into_iter().map(|finding| (finding.kind, finding.file)).collect()
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn archive(method: &str) -> (SimDisk, WalWriter) {
    static PLAIN: LazyLock<(SimDisk, WalWriter)> = LazyLock::new(|| received("none"));
    match method {
        "none" => (PLAIN.0.fork(), PLAIN.1.clone()),
        method => received(method),
    }
}

fn received(method: &str) -> (SimDisk, WalWriter) {
    let (disk, wal) = (disk(), wal());
    receive(&disk, method, &wal, wal.position()).unwrap();
    (disk, wal)
}

/// Two whole segments and a partial, of which the second one holds the end of timeline 1.
fn two_timelines() -> (SimDisk, WalWriter, Lsn) {
    let disk = disk();
    let mut wal = WalWriter::new(START);
    for seed in 0..15 {
        wal.record(100_000, seed);
    }
    let end = wal.position();
    let old = wal.clone();
    wal.promote(TWO);
    for seed in 0..9 {
        wal.record(100_000, seed);
    }
    let size = usize::try_from(SIZE.bytes()).unwrap();
    let mut last_of_old = old.since(Lsn(START.0 + SIZE.bytes())).to_vec();
    last_of_old.resize(size, 0);
    let all = wal.since(START);
    put(&disk, "000000010000000000000003", &all[..size]);
    put(&disk, "000000010000000000000004.partial", &last_of_old);
    put(&disk, "00000002.history", format!("1\t{end}\tno reason\n").as_bytes());
    put(&disk, "000000020000000000000004", &all[size..2 * size]);
    let mut last = all[2 * size..].to_vec();
    last.resize(size, 0);
    put(&disk, "000000020000000000000005.partial", &last);
    (disk, wal, end)
}

#[test]
fn a_sound_archive_is_proven_and_told_about() {
    let (disk, wal) = archive("none");
    let mut seen = Vec::new();
    let report = verify_on(&disk, Path::new(DIR), &mut |progress| seen.push(progress.clone())).unwrap();
    assert_eq!(
        seen.iter().map(|progress| (progress.done, progress.total)).collect::<Vec<_>>(),
        [(0, 3), (1, 3), (2, 3)]
    );
    assert_eq!((report.start, report.first_record, report.end), (START, START, wal.position()));
    assert_eq!((report.ok, report.segments, report.files, report.pg_major), (true, 3, 3, PG_VERSION / 10_000));
    assert_eq!((report.system_id, report.unfinished.clone()), (SYSTEM_ID, None));
    assert!(report.to_string().ends_with(&format!("one unbroken chain: 3 segments, 0/300000 to {}", wal.position())));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["end"], wal.position().to_string());
    assert_eq!(json["timelines"][0]["timeline"], 1);

    let (disk, wal, end) = two_timelines();
    let report = check(&disk);
    assert!(report.ok, "{report}");
    let spans: Vec<_> = report.timelines.iter().map(|span| (span.timeline.0, span.begin, span.end)).collect();
    assert_eq!(spans, [(1, START, end), (2, end, wal.position())]);
    assert_eq!((report.segments, report.files), (3, 4));
}

#[test]
fn there_may_be_nothing_to_verify() {
    let disk = disk();
    let error = |disk: &SimDisk| verify_on(disk, Path::new(DIR), &mut |_| {}).unwrap_err();
    assert!(matches!(error(&disk), VerifyError::Empty { .. }));
    put(&disk, "000000010000000000000003.partial", &[0; 100]);
    assert!(matches!(error(&disk), VerifyError::NoHeader { .. }));
    assert!(matches!(verify(Path::new("/nonexistent"), &mut |_| {}), Err(VerifyError::List { .. })));
}

/// Bytes that say nothing: of page headers the padding, behind records up to seven.
fn says_nothing(at: Lsn, wal: &WalWriter) -> bool {
    let header = header_size(at, SIZE) as u64;
    let offset = at.page_offset();
    let in_header_padding = offset < header && (20..24).contains(&offset);
    let is_zero = at < wal.position() && wal.between(at, Lsn(at.0 + 1))[0] == 0;
    // The hint to archivers, one bit of the flags.
    in_header_padding || (is_zero && !at.0.is_multiple_of(8) && ends_record(at, wal))
}

/// Whether `at` lies in the padding behind a record.
fn ends_record(at: Lsn, wal: &WalWriter) -> bool {
    let next = Lsn(at.0 + 8 - at.0 % 8);
    let mut scanner = pgproto::wal::RecordScanner::new(wal.start(), SIZE, PG_VERSION);
    scanner.feed(wal.between(wal.start(), at)).unwrap();
    scanner.last_record_end() == next
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// One flipped bit in a whole segment, or in the partial before its last record.
    #[test]
    fn a_flipped_bit_anywhere_is_found(at in 0u64..2_400_000, bit in 0u8..8, near in any::<bool>()) {
        let (disk, wal) = archive("none");
        // Every other one at or just behind the begin of a page.
        let at = if near { at - at % PAGE_SIZE + at % 64 } else { at };
        let lsn = Lsn(START.0 + at).min(Lsn(wal.last_record_before(wal.position()).unwrap().0 - 1));
        let hint = lsn.page_offset() == 2 && bit == 2;
        prop_assume!(!says_nothing(lsn, &wal) && !hint);
        let number = lsn.0 / SIZE.bytes();
        let name = format!("00000001{number:016X}{}", if number == 5 { ".partial" } else { "" });
        disk.flip_bit(&path(&name), segment_offset(lsn, SIZE), bit).unwrap();
        let report = check(&disk);
        prop_assert!(!report.ok, "{name} at {lsn}, bit {bit}");
        // Of a record that spans two segments, the second one is named.
        prop_assert!(report.findings[0].file[..24] >= name[..24], "{name}: {report}");
        let place = report.findings[0].lsn.unwrap();
        prop_assert!(place.0 <= lsn.0 + 8, "{lsn}: {report}");
    }

    /// A partial segment may end anywhere. It is never taken for damaged.
    #[test]
    fn a_segment_cut_anywhere_is_sound(length in 0u64..1_000_000, compressed in any::<bool>()) {
        let wal = wal();
        let disk = disk();
        let to = Lsn(START.0 + 1_048_576 + length);
        receive(&disk, if compressed { "lz4" } else { "none" }, &wal, to).unwrap();
        let report = check(&disk);
        prop_assert!(report.ok, "{report}");
        prop_assert!(report.end <= Lsn(to.0 + 8) || report.end == Lsn(START.0 + SIZE.bytes()), "{report}");
        let reached = report.unfinished.map_or(report.end, |unfinished| unfinished.end);
        // Zeros at the end of what came can't be told from zeros that were always there.
        prop_assert!(reached.0 + 16 >= to.0 || !compressed, "{reached} {to}");
    }

    #[test]
    fn any_file_is_judged(content in proptest::collection::vec(any::<u8>(), 0..20_000), header in any::<bool>(), name in 0usize..5) {
        let (disk, wal) = archive("none");
        let mut content = content;
        if header {
            let page = wal.between(START, Lsn(START.0 + 40));
            content.splice(0..content.len().min(40), page.iter().copied());
        }
        let names = ["000000010000000000000004", "000000010000000000000005.gz.partial", "000000010000000000000006.lz4",
            "00000002.history", "000000010000000000000005.zst"];
        put(&disk, names[name], &content);
        let report = check(&disk);
        prop_assert!(!report.to_string().is_empty());
    }
}

#[test]
fn flipped_bits_in_compressed_files_are_found() {
    for (method, suffix) in [("gzip", "gz"), ("lz4", "lz4"), ("zstd", "zst")] {
        let (disk, _) = archive(method);
        let name = format!("000000010000000000000004.{suffix}");
        let length = disk.content(&path(&name)).unwrap().len() as u64;
        let file = ArchiveFile::parse(&name).unwrap();
        let decompress = |disk: &SimDisk| {
            let mut plain = Vec::new();
            let read = archive::open(disk, Path::new(DIR), &file).unwrap().read_to_end(&mut plain);
            read.map(|_| plain).ok()
        };
        for at in (20..length).step_by(usize::try_from(length / 20).unwrap()).chain([length - 1]) {
            let damaged = disk.fork();
            damaged.flip_bit(&path(&name), at, 3).unwrap();
            // The same bytes can be said in another way.
            if decompress(&damaged) != decompress(&disk) {
                let found = found(&damaged);
                assert!(!found.is_empty() && found[0].1 == name, "{method}, byte {at} of {length}: {found:?}");
            }
        }
    }
}

#[test]
fn bytes_behind_a_compressed_segment_are_worth_a_note() {
    let (disk, _) = archive("gzip");
    let name = "000000010000000000000004.gz";
    let content = disk.content(&path(name)).unwrap();
    put(&disk, name, &[&content[..], b"what was there before"].concat());
    let report = check(&disk);
    assert!(report.ok && report.notes.len() == 1 && report.notes[0].contains(name), "{report}");
}

#[test]
fn what_is_missing_is_named() {
    let (disk, _) = archive("none");
    disk.remove_file(&path("000000010000000000000004")).unwrap();
    assert_eq!(found(&disk), [(Kind::MissingSegment, "000000010000000000000004".into())]);

    let (disk, ..) = two_timelines();
    disk.remove_file(&path("00000002.history")).unwrap();
    assert_eq!(found(&disk), [(Kind::MissingHistory, "00000002.history".into())]);

    let (disk, ..) = two_timelines();
    disk.remove_file(&path("000000020000000000000004")).unwrap();
    assert_eq!(found(&disk)[0], (Kind::MissingSegment, "000000020000000000000004".into()));
    disk.remove_file(&path("000000010000000000000004.partial")).unwrap();
    assert_eq!(found(&disk), [(Kind::MissingSegment, "000000020000000000000004".into())]);

    let (disk, ..) = two_timelines();
    disk.rename(&path("000000020000000000000004"), &path("000000020000000000000004.partial")).unwrap();
    assert_eq!(found(&disk), [(Kind::NotWhole, "000000020000000000000004.partial".into())]);
}

#[test]
fn an_archive_may_end_with_the_old_timeline() {
    let (disk, _, end) = two_timelines();
    disk.remove_file(&path("000000020000000000000004")).unwrap();
    disk.remove_file(&path("000000020000000000000005.partial")).unwrap();
    let report = check(&disk);
    assert!(report.ok && report.end == end, "{report}");
}

#[test]
fn files_of_one_segment_must_agree_as_far_as_they_are_of_one_timeline() {
    let (disk, _, end) = two_timelines();
    let old = path("000000010000000000000004.partial");
    // Behind the end of timeline 1 anything may be.
    let above = disk.fork();
    above.flip_bit(&old, segment_offset(end, SIZE), 1).unwrap();
    assert_eq!(found(&above), []);
    // A page header's padding is in no checksum.
    disk.flip_bit(&old, PAGE_SIZE + 20, 1).unwrap();
    assert_eq!(found(&disk), [(Kind::Differs, "000000010000000000000004.partial".into())]);

    // The same segment twice.
    let (disk, wal) = archive("gzip");
    put(&disk, "000000010000000000000003", wal.between(START, Lsn(START.0 + SIZE.bytes())));
    assert_eq!(found(&disk), []);
    let half = wal.between(START, Lsn(START.0 + SIZE.bytes() / 2));
    put(&disk, "000000010000000000000003.partial", half);
    assert_eq!(found(&disk), [], "a partial may be shorter");
    put(&disk, "000000010000000000000003", half);
    assert!(found(&disk).iter().any(|(kind, _)| *kind == Kind::WrongLength));
}

/// As when a receiver that was killed goes on with another method.
#[test]
fn a_segment_that_was_begun_twice_is_proven_as_far_as_one_of_the_files_goes() {
    let (begun, wal) = archive("none");
    let mut longer = wal.clone();
    longer.record(5000, 77);
    for method in ["gzip", "lz4", "zstd"] {
        let disk = begun.fork();
        receive(&disk, method, &longer, longer.position()).unwrap();
        let report = check(&disk);
        assert!(report.ok && report.files == 4, "{method}: {report}");
        assert_eq!(report.end, longer.position(), "{method}");
    }
    // A new timeline's file that was only just made has less than the old one's.
    let (disk, _, end) = two_timelines();
    disk.remove_file(&path("000000020000000000000005.partial")).unwrap();
    disk.remove_file(&path("000000020000000000000004")).unwrap();
    let mut old = Vec::new();
    let name = ArchiveFile::parse("000000010000000000000004.partial").unwrap();
    archive::open(&disk, Path::new(DIR), &name).unwrap().read_to_end(&mut old).unwrap();
    old[8192 * 3..].fill(0);
    put(&disk, "000000020000000000000004.partial", &old);
    let report = check(&disk);
    assert!(report.ok && report.end < end, "{report}");
}

#[test]
fn lengths_names_and_clusters() {
    let (disk, _) = archive("none");
    let content = disk.content(&path("000000010000000000000004")).unwrap();
    let third = || (Kind::WrongLength, "000000010000000000000004".to_owned());
    put(&disk, "000000010000000000000004", &[&content[..], b"x"].concat());
    assert_eq!(found(&disk), [third()]);
    put(&disk, "000000010000000000000004", &content[..content.len() - 8192]);
    assert_eq!(found(&disk), [third()]);

    let (disk, _) = archive("none");
    put(&disk, "000000010000000000001004", &content);
    put(&disk, "0000000100000000000000AA.backup", b"not a segment");
    assert_eq!(found(&disk), [(Kind::WrongName, "000000010000000000001004".into())]);

    let (disk, _) = archive("none");
    disk.flip_bit(&path("000000010000000000000004"), 24, 0).unwrap();
    assert_eq!(found(&disk), [(Kind::WrongSystem, "000000010000000000000004".into())]);
    let (disk, _) = archive("none");
    disk.flip_bit(&path("000000010000000000000003"), 24, 0).unwrap();
    assert_eq!(found(&disk), [(Kind::WrongSystem, "000000010000000000000003".into())], "the majority is right");
}

#[test]
fn pages_are_of_the_timeline_that_the_history_says() {
    let (disk, _, end) = two_timelines();
    let page = segment_offset(end.page_start(), SIZE);
    disk.flip_bit(&path("000000020000000000000004"), page + 4, 1).unwrap();
    let found_now = found(&disk);
    assert_eq!(found_now[0], (Kind::WrongTimeline, "000000020000000000000004".into()));
    assert_eq!(found_now.len(), 2, "the old file has another byte there");

    let (disk, _, end) = two_timelines();
    // By this history the timeline changed a page later.
    let wrong = format!("1\t{}\tno reason\n", Lsn(end.page_start().0 + 2 * PAGE_SIZE));
    put(&disk, "00000002.history", wrong.as_bytes());
    assert!(found(&disk).contains(&(Kind::WrongTimeline, "000000020000000000000004".into())));
    put(&disk, "00000002.history", b"nonsense");
    assert_eq!(found(&disk), [(Kind::BadHistory, "00000002.history".into())]);
}

#[test]
fn timelines_that_do_not_belong_there() {
    let (disk, wal, end) = two_timelines();
    let third = PgTimelineId(3).history_file_name();
    // Timeline 3 comes from timeline 1, and knows nothing of timeline 2.
    put(&disk, &third, format!("1\t{end}\tno reason\n").as_bytes());
    assert!(found(&disk).contains(&(Kind::ForeignTimeline, "000000020000000000000004".into())));
    put(&disk, &third, format!("1\t{}\tx\n2\t{}\ty\n", Lsn(end.0 + 8), wal.position()).as_bytes());
    assert!(found(&disk).contains(&(Kind::BadHistory, "00000002.history".into())));
    put(&disk, &third, format!("1\t{end}\tx\n2\t{}\ty\n", wal.position()).as_bytes());
    assert_eq!(found(&disk), []);
    // A file of timeline 1 behind its end is left alone.
    put(&disk, "000000010000000000000005", b"whatever");
    let report = check(&disk);
    assert!(report.ok && report.notes.len() == 1, "{report}");
}

#[test]
fn a_link_to_another_record_is_found_across_segments() {
    let (disk, wal) = archive("none");
    // Another server's third segment: valid in itself.
    let third = Lsn(START.0 + SIZE.bytes() * 2);
    let mut other = WalWriter::behind(third, Lsn(START.0 + 0x1000));
    other.record(100, 1).record(300_000, 2).switch();
    put(&disk, "000000010000000000000005", &other.since(third));
    disk.remove_file(&path("000000010000000000000005.partial")).unwrap();
    assert_eq!(found(&disk), [(Kind::Damaged, "000000010000000000000005".into())]);
    assert!(check(&disk).end < wal.position());
}

#[test]
fn a_record_may_begin_in_the_last_segment_and_end_in_none() {
    let wal = wal();
    let disk = disk();
    let end = Lsn(START.0 + 2 * SIZE.bytes());
    receive(&disk, "none", &wal, end).unwrap();
    let report = check(&disk);
    let begin = wal.last_record_before(end).unwrap();
    assert!(report.ok, "{report}");
    assert_eq!((report.end, report.unfinished), (begin, Some(Unfinished { begin, end })));
}

#[test]
fn a_log_may_begin_within_its_first_segment() {
    let start = Lsn(START.0 + 5 * PAGE_SIZE + 0x100);
    let mut wal = WalWriter::new(start);
    wal.record(100, 1).record(50_000, 2);
    let mut content = vec![0; usize::try_from(SIZE.bytes()).unwrap()];
    let headers = pgproto::wal::page::first_segment_headers(start, PG_VERSION, SYSTEM_ID, SIZE).unwrap();
    let all = headers.iter().map(|(at, bytes)| (*at, bytes.clone())).chain([(start, wal.since(start))]);
    for (at, bytes) in all {
        let offset = usize::try_from(segment_offset(at, SIZE)).unwrap();
        content[offset..offset + bytes.len()].copy_from_slice(&bytes);
    }
    let disk = disk();
    put(&disk, "000000010000000000000003.partial", &content);
    let report = check(&disk);
    assert!(report.ok, "{report}");
    assert_eq!((report.first_record, report.end), (start, wal.position()));
}
