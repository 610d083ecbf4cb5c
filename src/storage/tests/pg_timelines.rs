//! The log goes over to other Postgres timelines: names of segments, and history files.

use pgproto::walproposer::HistoryFile;
use pgproto::{Ancestry, PgTimelineId, pg_timeline};

use super::*;

/// The ancestry of `timeline` whose ancestors are 1, 2 and so on, ending at these positions.
fn ancestry(timeline: u32, ends: &[u64]) -> Ancestry {
    pg_timeline::parse_history(PgTimelineId(timeline), &history(ends)).unwrap()
}

fn history(ends: &[u64]) -> Bytes {
    let line = |(parent, end): (u32, &u64)| format!("{parent}\t{}\tno recovery target specified\n", Lsn(*end));
    (1..).zip(ends).map(line).collect::<Vec<_>>().join("\n").into()
}

fn file(timeline: u32, content: &Bytes) -> HistoryFile {
    HistoryFile { timeline: PgTimelineId(timeline), content: content.clone() }
}

impl Fixture {
    /// A leader is accepted whose log went through these timelines.
    async fn go_over(&mut self, to: Ancestry) {
        self.control.term = self.control.term.next();
        self.control.stock.ancestry = to;
        let control = self.control.clone();
        self.store().persist(&control).await.unwrap();
    }
}

#[tokio::test]
async fn a_switch_within_a_segment_renames_it_and_readers_go_on() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(900_000, 1).record(200_000, 2);
    let switch = fx.append_new().await;
    assert_eq!(fx.segments(), ["000000010000000000000003", "000000010000000000000004.partial"]);
    let mut open = fx.reader();
    open.read(Lsn(0x40_0000), switch).await.unwrap();
    fx.go_over(ancestry(2, &[switch.0])).await;
    assert_eq!(fx.segments(), ["000000010000000000000003", "000000020000000000000004.partial"]);
    fx.wal.record(900_000, 3).record(900_000, 4);
    let end_lsn = fx.append_new().await;
    let names = ["000000010000000000000003", "000000020000000000000004", "000000020000000000000005.partial"];
    assert_eq!(fx.segments(), names);
    for restarted in [false, true] {
        for reader in [&mut open, &mut fx.reader()] {
            let mut read = BytesMut::new();
            while START.0 + (read.len() as u64) < end_lsn.0 {
                let at = Lsn(START.0 + read.len() as u64);
                read.extend_from_slice(&reader.read(at, end_lsn).await.unwrap());
            }
            assert!(read == fx.wal.since(START), "restarted: {restarted}");
        }
        assert_eq!(end(fx.restart().await.unwrap()), end_lsn);
        assert_eq!(fx.segments(), names);
    }
    // A timeline that begins with a segment leaves the one before alone.
    fx.go_over(ancestry(3, &[switch.0, 0x50_0000])).await;
    let names = ["000000010000000000000003", "000000020000000000000004", "000000030000000000000005.partial"];
    assert_eq!(fx.segments(), names);
}

#[tokio::test]
async fn a_cut_below_a_switch_takes_the_names_back() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(900_000, 1);
    let cut = fx.append_new().await;
    fx.wal.record(200_000, 2);
    let switch = fx.append_new().await;
    fx.go_over(ancestry(2, &[switch.0])).await;
    fx.wal.record(1_000_000, 3);
    fx.append_new().await;
    fx.store().truncate(cut).await.unwrap();
    assert_eq!(fx.segments(), ["000000010000000000000003", "000000020000000000000004.partial"]);
    fx.go_over(ancestry(3, &[cut.0])).await;
    assert_eq!(fx.segments(), ["000000010000000000000003", "000000030000000000000004.partial"]);
    fx.go_over(Ancestry::default()).await;
    assert_eq!(fx.segments(), ["000000010000000000000003", "000000010000000000000004.partial"]);
    fx.wal = WalWriter::continuing(&fx.wal, cut);
    fx.wal.record(2_000_000, 4);
    let end_lsn = fx.append_new().await;
    assert_eq!(end(fx.restart().await.unwrap()), end_lsn);
    assert_eq!(fx.store().files().forks().unwrap().len(), 1);
}

/// As a crash between the state and the renames leaves it.
#[tokio::test]
async fn segments_with_an_older_timelines_name_are_renamed_at_the_start() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(900_000, 1).record(200_000, 2);
    let switch = fx.append_new().await;
    let right = ["000000010000000000000003", "000000020000000000000004.partial"];
    for settled in [false, true] {
        fx.go_over(ancestry(2, &[switch.0])).await;
        assert_eq!(fx.segments(), right);
        if settled {
            fx.store().settle().await.unwrap();
        }
        (fx.store, fx.data_dir) = (None, None);
        std::fs::rename(fx.path(right[1]), fx.path("000000010000000000000004.partial")).unwrap();
        assert_eq!(end(fx.restart().await.unwrap()), switch);
        assert_eq!(fx.segments(), right);
    }
    // The state that was about to be left again, when the journal had the next one already.
    fx.go_over(ancestry(3, &[switch.0])).await;
    (fx.store, fx.data_dir) = (None, None);
    std::fs::rename(fx.path("000000030000000000000004.partial"), fx.path(right[1])).unwrap();
    assert_eq!(end(fx.restart().await.unwrap()), switch);
    assert_eq!(fx.segments(), [right[0], "000000030000000000000004.partial"]);
}

#[tokio::test]
async fn a_second_file_for_a_segment_is_left_alone() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(900_000, 1).record(200_000, 2);
    let switch = fx.append_new().await;
    let foreign = [b"from the old primary", b"from the new primary"];
    std::fs::write(fx.path("000000020000000000000004.partial"), foreign[1]).unwrap();
    fx.go_over(ancestry(2, &[switch.0])).await;
    std::fs::write(fx.path("000000010000000000000004"), foreign[0]).unwrap();
    std::fs::write(fx.path("000000090000000000000003"), foreign[0]).unwrap();
    fx.wal.record(900_000, 3);
    let end_lsn = fx.append_new().await;
    for _restart in 1..=2 {
        let names = [
            "000000010000000000000003",
            "000000010000000000000004",
            "000000020000000000000004",
            "000000020000000000000004.partial.other",
            "000000020000000000000005.partial",
            "000000090000000000000003",
        ];
        assert_eq!(fx.segments(), names);
        assert_eq!(std::fs::read(fx.path(names[1])).unwrap(), foreign[0]);
        assert_eq!(std::fs::read(fx.path(names[3])).unwrap(), foreign[1]);
        assert_eq!(end(fx.restart().await.unwrap()), end_lsn);
        let read = fx.reader().read(Lsn(0x40_0000), switch).await.unwrap();
        assert!(fx.wal.since(Lsn(0x40_0000)).starts_with(&read));
    }
}

#[tokio::test]
async fn errors_name_the_file_that_is_there() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(900_000, 1).record(200_000, 2);
    let switch = fx.append_new().await;
    fx.go_over(ancestry(2, &[switch.0])).await;
    let mut reader = fx.reader();
    let missing = reader.read(Lsn(0x60_0000), Lsn(0x60_0010)).await.unwrap_err();
    assert!(missing.to_string().contains("000000020000000000000006"), "{missing}");
    fx.store().settle().await.unwrap();
    std::fs::remove_file(fx.path("000000020000000000000004.partial")).unwrap();
    let fault = fx.restart().await.unwrap().fault.unwrap();
    assert!(fault.reason.contains("000000020000000000000004"), "{fault}");
}

#[tokio::test]
async fn history_files_are_kept_byte_for_byte() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let switch = fx.append_new().await;
    let (second, third) = (history(&[switch.0]), history(&[switch.0, switch.0]));
    let files = [file(2, &second), file(3, &third)];
    fx.store().store_history(&files).await.unwrap();
    assert_eq!(fx.store().files().history_file(PgTimelineId(2)).unwrap(), None, "the log isn't there yet");
    fx.go_over(ancestry(3, &[switch.0, switch.0])).await;
    let written = std::fs::metadata(fx.path("00000002.history")).unwrap().ino();
    fx.store().store_history(&files).await.unwrap();
    assert_eq!(std::fs::metadata(fx.path("00000002.history")).unwrap().ino(), written, "it was there");
    fx.restart().await.unwrap();
    let kept = fx.store().files().clone();
    assert_eq!(kept.history_files().unwrap(), [PgTimelineId(2), PgTimelineId(3)]);
    assert_eq!(kept.history_file(PgTimelineId(2)).unwrap().unwrap(), second);
    assert_eq!(kept.history_file(PgTimelineId(3)).unwrap().unwrap(), third);
    for none in [1, 4] {
        assert_eq!(kept.history_file(PgTimelineId(none)).unwrap(), None);
    }
    assert_eq!(fx.segments().iter().filter(|name| name.contains("partial")).count(), 1);
}

#[tokio::test]
async fn history_files_of_timelines_between_the_logs_own_are_served_too() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let switch = fx.append_new().await;
    let (of_another_branch, third) = (history(&[switch.0 - 8]), history(&[switch.0]));
    fx.store().store_history(&[file(2, &of_another_branch), file(3, &third)]).await.unwrap();
    fx.go_over(pgproto::pg_timeline::parse_history(PgTimelineId(3), &third).unwrap()).await;
    let files = fx.store().files().clone();
    assert_eq!(files.history_file(PgTimelineId(2)).unwrap().unwrap(), of_another_branch);
    assert_eq!(files.history_file(PgTimelineId(3)).unwrap().unwrap(), third);
}

#[tokio::test]
async fn a_damaged_history_file_is_not_served_and_mended_by_the_next_leader() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let switch = fx.append_new().await;
    let good = history(&[switch.0]);
    fx.store().store_history(&[file(2, &good)]).await.unwrap();
    fx.go_over(ancestry(2, &[switch.0])).await;
    let other_switch = history(&[switch.0 - 8]);
    for damaged in [&b"1\t0/"[..], &[0; 40], &other_switch, &vec![b'\n'; 70_000]] {
        std::fs::write(fx.path("00000002.history"), damaged).unwrap();
        fx.restart().await.unwrap();
        let refused = fx.store().files().history_file(PgTimelineId(2)).unwrap_err();
        assert!(refused.to_string().contains("00000002.history"), "{refused}");
        fx.store().store_history(&[file(2, &good)]).await.unwrap();
        assert_eq!(fx.store().files().history_file(PgTimelineId(2)).unwrap().unwrap(), good);
    }
    std::fs::remove_file(fx.path("00000002.history")).unwrap();
    fx.restart().await.unwrap();
    assert_eq!(fx.store().files().history_file(PgTimelineId(2)).unwrap(), None);
}
