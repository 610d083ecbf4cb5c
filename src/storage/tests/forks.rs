//! A fork is had as the segments were, whatever happened to the log since.

use super::*;
use crate::storage::forks::{ForkError, ForkSegments};

/// All segments of a fork.
async fn export(fx: &mut Fixture, number: u64) -> Vec<(String, Vec<u8>)> {
    let mut fork = open(fx, number).await;
    let mut exported = Vec::new();
    for segment in fork.segments() {
        exported.push((segment.name, read_all(&mut fork, segment.begin).await.unwrap()));
    }
    exported
}

async fn open(fx: &mut Fixture, number: u64) -> ForkSegments {
    let control = fx.control.clone();
    ForkSegments::open(fx.store().files(), number, &control).await.unwrap().unwrap()
}

async fn read_all(fork: &mut ForkSegments, begin: Lsn) -> Result<Vec<u8>, ForkError> {
    let mut content = Vec::new();
    while content.len() < SEGMENT_BYTES {
        content.extend_from_slice(&fork.read(Lsn(begin.0 + content.len() as u64)).await?);
    }
    assert_eq!(content.len(), SEGMENT_BYTES, "not beyond the segment");
    Ok(content)
}

/// The segments as they are, from the one with `from` in it.
fn snapshot(fx: &Fixture, from: Lsn) -> Vec<(String, Vec<u8>)> {
    let first = pgproto::SegmentNumber::containing(from, SIZE).file_name(pgproto::PgTimelineId::FIRST, SIZE);
    let names = fx.segments().into_iter().filter(|name| name.as_str() >= first.as_str());
    names.map(|name| (name.trim_end_matches(".partial").to_owned(), std::fs::read(fx.path(&name)).unwrap())).collect()
}

/// The log goes another way from `at` on.
async fn diverge(fx: &mut Fixture, at: Lsn, bytes: usize, seed: u8) -> Lsn {
    fx.store().truncate(at).await.unwrap();
    fx.wal = WalWriter::new(at);
    fx.wal.record(bytes, seed);
    fx.append_new().await
}

/// A timeline with WAL up to two ends, the lower and the higher one.
async fn with_two_ends() -> (Fixture, Lsn, Lsn) {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let low = fx.append_new().await;
    fx.wal.record(100_000, 2);
    let high = fx.append_new().await;
    (fx, low, high)
}

#[tokio::test]
async fn what_stands_before_a_fork_is_found_in_the_log_and_in_later_forks() {
    let (mut fx, low, high) = with_two_ends().await;
    fx.wal.record(1_200_000, 3);
    fx.append_new().await;
    let first = snapshot(&fx, high);
    assert_eq!(first.len(), 2);
    diverge(&mut fx, high, 50_000, 4).await;
    assert!(export(&mut fx, 1).await == first, "what is before is in the log");
    let second = snapshot(&fx, low);
    diverge(&mut fx, low, 300_000, 5).await;
    let third = snapshot(&fx, low);
    for restarted in [false, true] {
        assert!(export(&mut fx, 1).await == first, "restarted: {restarted}");
        assert!(export(&mut fx, 2).await == second, "restarted: {restarted}");
        assert!(snapshot(&fx, low) == third, "the log is left alone");
        assert_eq!(open(&mut fx, 1).await.whole_from(), Lsn(START.0 & !(SEGMENT_BYTES as u64 - 1)));
        fx.restart().await.unwrap();
    }
    let control = fx.control.clone();
    assert!(ForkSegments::open(fx.store().files(), 3, &control).await.unwrap().is_none());
}

#[tokio::test]
async fn what_is_lost_before_a_fork_is_zeros_that_tools_skip() {
    let (mut fx, low, high) = with_two_ends().await;
    fx.wal.record(1_200_000, 3);
    let end = fx.append_new().await;
    let before = snapshot(&fx, high);
    diverge(&mut fx, high, 50_000, 4).await;
    diverge(&mut fx, low, 300_000, 5).await;
    let path = fx.path("safekeeper.control.fork.0000000000000002");
    let mut damaged = std::fs::read(&path).unwrap();
    damaged[50_000] ^= 1;
    std::fs::write(&path, damaged).unwrap();

    let found = export(&mut fx, 1).await;
    let mut fork = open(&mut fx, 1).await;
    assert_eq!((fork.whole_from(), fork.fork().header.from, fork.fork().header.to), (high, high, end));
    let offset = usize::try_from(high.0).unwrap() % SEGMENT_BYTES;
    assert!(found[0].1[offset..] == before[0].1[offset..] && found[1] == before[1]);
    let header = |at: usize| PageHeader::parse(&found[0].1[at..]).unwrap();
    let page = offset & !0x1FFF;
    assert_eq!(header(0).long.unwrap().system_id, SYSTEM_ID);
    assert_eq!(usize::try_from(header(page).remaining).unwrap(), offset - page - 24, "up to the first record");
    assert!(found[0].1[LONG_HEADER_SIZE..page].iter().all(|&byte| byte == 0));
    // The scanner reads the segment like any other tool: what is continued on the page is skipped.
    let begin = Lsn(high.0 & !0x1FFF);
    let mut scanner = pgproto::wal::RecordScanner::new(begin, SIZE, 0);
    scanner.feed(&found[0].1[page..]).unwrap();
    scanner.feed(&found[1].1[..usize::try_from(end.0).unwrap() % SEGMENT_BYTES]).unwrap();
    assert_eq!(scanner.last_record_end(), end);
    assert!(fork.read(begin).await.is_ok());
}

#[tokio::test]
async fn a_log_that_is_cut_meanwhile_is_not_taken_for_what_stood_before_a_fork() {
    let (mut fx, low, high) = with_two_ends().await;
    fx.wal.record(1000, 3);
    fx.append_new().await;
    diverge(&mut fx, high, 50_000, 4).await;
    let mut fork = open(&mut fx, 1).await;
    let begin = fork.segments()[0].begin;
    read_all(&mut fork, begin).await.unwrap();
    diverge(&mut fx, low, 300_000, 5).await;
    let again = read_all(&mut fork, begin).await;
    assert!(matches!(again, Err(ForkError::Changed)), "{:?}", again.map(drop));
    read_all(&mut open(&mut fx, 1).await, begin).await.unwrap();
}

#[tokio::test]
async fn a_fork_says_its_server_and_its_timelines() {
    let mut fx = Fixture::started_at(START).await;
    fx.wal.record(100, 1);
    let low = fx.append_new().await;
    fx.wal.record(1_500_000, 2);
    let end = fx.append_new().await;
    // Three promotions: before the fork's segment, in the fork, and behind it.
    let branch = |timeline, begin| pgproto::pg_timeline::Branch { timeline: pgproto::PgTimelineId(timeline), begin };
    let (early, inside) = (Lsn(START.0 & !(SEGMENT_BYTES as u64 - 1)), Lsn(low.0 + 500_000));
    let branches = vec![branch(1, Lsn::INVALID), branch(2, early), branch(3, inside), branch(4, end)];
    fx.control.stock.ancestry = pgproto::Ancestry::new(branches).unwrap();
    let control = fx.control.clone();
    fx.store().persist(&control).await.unwrap();
    fx.store().truncate(low).await.unwrap();
    let fork = open(&mut fx, 1).await;
    let header = &fork.fork().header;
    assert_eq!((header.system_id, header.pg_version), (SYSTEM_ID, control.server.pg_version));
    assert_eq!(header.pg_timelines, [branch(2, early), branch(3, inside)]);
    assert!(header.reason.contains("leaves this one at") && header.reason.contains("term"), "{}", header.reason);
    let names: Vec<String> = fork.segments().into_iter().map(|segment| segment.name).collect();
    assert_eq!(names, ["000000030000000000000003", "000000030000000000000004"]);
}
