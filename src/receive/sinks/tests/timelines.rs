//! A primary that was promoted.

use super::*;
use crate::storage::simdisk::Survivors;

/// Where timeline 1 ends in these tests, and the log of which that is the end.
fn before_promotion() -> WalWriter {
    let mut wal = WalWriter::new(START);
    for seed in 0..15 {
        wal.record(100_000, seed);
    }
    wal
}

/// The same, continued on timeline 2 into the next segment.
fn promoted() -> (WalWriter, Lsn) {
    let mut wal = before_promotion();
    let end = wal.position();
    wal.promote(TWO);
    for seed in 0..9 {
        wal.record(100_000, 100 + seed);
    }
    (wal, end)
}

fn history(end: Lsn) -> Bytes {
    format!("1\t{end}\tno recovery target specified\n").into()
}

/// Follows from the old timeline to the new one, with `void` bytes of the old one behind its end.
fn follow(disk: &SimDisk, method: &str, void: usize, to: Lsn) -> Result<(), SinkError> {
    let (wal, end) = promoted();
    let mut old = before_promotion();
    old.record(50_000, 250);
    let mut sink = sink(disk, method);
    let at = begin(&mut sink)?;
    let mut next = at.lsn;
    if at.timeline == ONE {
        let sent = Lsn(end.0 + void as u64);
        send(&mut sink, &old, at.lsn, sent, 40_000)?;
        assert!(
            run(async { sink.history(TWO, history(end)).await })
                .is_ok_and(|()| sink.has_history(TWO) && sink.has_history(ONE))
        );
        run(sink.switch(Position { timeline: TWO, lsn: end }))?;
        next = end;
    }
    send(&mut sink, &wal, next, to, 40_000)?;
    run(sink.close()).map(drop)
}

#[test]
fn the_first_file_of_a_timeline_begins_with_the_old_one() {
    let (wal, end) = promoted();
    for method in ["none", "gzip"] {
        for void in [0, 9000, 49_000] {
            let disk = disk();
            follow(&disk, method, void, wal.position()).unwrap();
            let files = content(&disk);
            let suffix = if method == "none" { "" } else { ".gz" };
            let name = |timeline, number, partial| format!("0000000{timeline}000000000000000{number}{suffix}{partial}");
            let expected = [name(1, 3, ""), name(1, 4, ".partial"), name(2, 4, ""), name(2, 5, ".partial")];
            assert_eq!(
                files.keys().filter(|name| !name.ends_with(".history")).collect::<Vec<_>>(),
                expected.iter().collect::<Vec<_>>()
            );
            assert_eq!(files["00000002.history"], history(end));
            let second = Lsn(START.0 + SIZE.bytes());
            assert_eq!(
                files[&expected[2]],
                wal.between(second, Lsn(second.0 + SIZE.bytes())),
                "void bytes are not in it"
            );
            assert!(files[&expected[1]].starts_with(wal.between(second, end)), "the old file stays");
            let report = verify_on(&disk, Path::new(DIR), &mut |_| {}).unwrap();
            assert!(report.ok, "{report}");
            assert_eq!((report.end, report.timelines.len()), (wal.position(), 2));
        }
    }
}

#[test]
fn a_crash_on_the_way_to_the_new_timeline_changes_nothing() {
    let (wal, end) = promoted();
    for method in ["none", "gzip"] {
        let disk = disk();
        disk.record();
        follow(&disk, method, 9000, wal.position()).unwrap();
        let files = content(&disk);
        let without_void = |mut files: BTreeMap<String, Vec<u8>>| {
            for (name, bytes) in &mut files {
                if name.starts_with("000000010000000000000004") {
                    bytes.truncate(usize::try_from(segment_offset(end, SIZE)).unwrap());
                }
            }
            files
        };
        for at in (0..disk.operations()).filter(|at| at % 17 == 0 || disk.describe(*at).contains("ename")) {
            for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at)] {
                let crashed = disk.stopped_in(at);
                crashed.crash(survivors);
                let context = format!("{method}, {}, {survivors:?}", disk.describe(at));
                let result = follow(&crashed, method, 0, wal.position());
                assert!(result.is_ok(), "{context}: {}", result.unwrap_err());
                assert!(without_void(content(&crashed)) == without_void(files.clone()), "{context}: another directory");
            }
        }
    }
}

#[test]
fn records_that_the_new_primary_lacks_end_it() {
    let disk = disk();
    let (_, end) = promoted();
    let mut old = before_promotion();
    old.record(100, 250);
    let mut sink = sink(&disk, "none");
    let at = begin(&mut sink).unwrap();
    send(&mut sink, &old, at.lsn, old.position(), 40_000).unwrap();
    run(sink.history(TWO, history(end))).unwrap();
    let error = run(sink.switch(Position { timeline: TWO, lsn: end })).unwrap_err();
    assert!(error.to_string().contains("lost on the new primary"), "{error}");
    assert!(!content(&disk).keys().any(|name| name.starts_with("000000020")), "nothing of the new timeline");
}

#[test]
fn a_switch_that_contradicts_the_history_is_refused() {
    let (_, end) = promoted();
    let old = before_promotion();
    for to in [
        Position { timeline: TWO, lsn: Lsn(end.0 - 8192) },
        Position { timeline: TWO, lsn: Lsn(end.0 + 8) },
        Position { timeline: ONE, lsn: end },
    ] {
        let disk = disk();
        let mut sink = sink(&disk, "none");
        let at = begin(&mut sink).unwrap();
        send(&mut sink, &old, at.lsn, end, 40_000).unwrap();
        run(sink.history(TWO, history(end))).unwrap();
        assert!(run(sink.switch(to)).is_err(), "{to:?}");
    }
}

#[test]
fn a_timeline_may_begin_with_a_segment() {
    // A segment switch is the last that the old primary did.
    let mut wal = WalWriter::new(START);
    wal.record(10_000, 1).switch();
    let end = wal.position();
    wal.promote(TWO).record(1000, 2).record(20_000, 3);
    let disk = disk();
    for _ in 0..2 {
        let mut sink = sink(&disk, "none");
        let at = begin(&mut sink).unwrap();
        if at.timeline == ONE {
            send(&mut sink, &wal, at.lsn, end, 40_000).unwrap();
            run(sink.history(TWO, history(end))).unwrap();
            run(sink.switch(Position { timeline: TWO, lsn: end })).unwrap();
        }
        send(&mut sink, &wal, end, wal.position(), 40_000).unwrap();
        run(sink.close()).unwrap();
    }
    let names: Vec<String> = content(&disk).into_keys().collect();
    assert_eq!(names, ["000000010000000000000003", "00000002.history", "000000020000000000000004.partial"]);
    assert!(verify_on(&disk, Path::new(DIR), &mut |_| {}).unwrap().ok);
}

#[test]
fn a_history_file_is_kept_once_and_never_replaced() {
    let disk = disk();
    let mut one = sink(&disk, "none");
    begin(&mut one).unwrap();
    assert!(!one.has_history(TWO));
    run(one.history(TWO, history(START))).unwrap();
    run(one.history(TWO, history(START))).unwrap();
    assert!(run(one.history(TWO, history(Lsn(START.0 + 8)))).is_err());
    let mut two = sink(&disk, "none");
    begin(&mut two).unwrap();
    assert!(two.has_history(TWO));
    assert!(run(two.history(PgTimelineId(3), Bytes::from_static(b"nonsense\n"))).is_err());
    assert_eq!(content(&disk).into_keys().collect::<Vec<_>>(), ["00000002.history"]);
}
