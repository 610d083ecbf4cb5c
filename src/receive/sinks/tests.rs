//! The directory sink on a disk that forgets and fails, and where others left off.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod crashes;
mod timelines;

use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use pgproto::lsn::segment_offset;
use pgproto::{Lsn, PgTimelineId, SystemId};
use proptest::prelude::*;

use super::archive::{ArchiveFile, Salvage};
use super::{Compression, DirectorySink, StreamSink};
use crate::receive::verify::verify_on;
use crate::receive::{Feedback, Origin, Position, Sink, SinkError};
use crate::storage::Disk;
use crate::storage::simdisk::SimDisk;
use crate::storage::test_wal::{PG_VERSION, SIZE, SYSTEM_ID, WalWriter};

pub(in crate::receive) const DIR: &str = "/archive";
/// Where the WAL of these tests begins: the start of a segment.
pub(in crate::receive) const START: Lsn = Lsn(0x30_0000);
pub(in crate::receive) const ONE: PgTimelineId = PgTimelineId(1);
pub(in crate::receive) const TWO: PgTimelineId = PgTimelineId(2);

pub(in crate::receive) fn disk() -> SimDisk {
    SimDisk::with_dir(Path::new(DIR))
}

pub(in crate::receive) fn origin() -> Origin {
    Origin { system_id: SYSTEM_ID, segment_size: SIZE, pg_version: PG_VERSION }
}

/// WAL of two and a half segments: short records, one over several pages, one over a segment's end, a switch.
pub(in crate::receive) fn wal() -> WalWriter {
    let mut wal = WalWriter::new(START);
    for seed in 0..60 {
        wal.record(usize::from(seed) * 97, seed);
    }
    wal.record(40_000, 1).record(3, 2).switch();
    for seed in 0..9 {
        wal.record(110_000, seed);
    }
    wal.record(300_000, 3);
    for seed in 0..200 {
        wal.record(usize::from(seed) * 11, seed);
    }
    wal
}

pub(in crate::receive) fn run<R>(work: impl Future<Output = R>) -> R {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

pub(in crate::receive) fn sink(disk: &SimDisk, compression: &str) -> DirectorySink {
    DirectorySink::on_disk(Arc::new(disk.clone()), Path::new(DIR), compression.parse().unwrap())
}

/// Opens the sink and begins where it wants to, or at the start.
pub(in crate::receive) fn begin(sink: &mut DirectorySink) -> Result<Position, SinkError> {
    run(async {
        let at = sink.open(&origin()).await?.unwrap_or(Position { timeline: ONE, lsn: START });
        sink.begin(at).await?;
        Ok(at)
    })
}

/// Sends WAL in pieces of at most `step` bytes, as servers do: none over the end of a segment.
pub(in crate::receive) fn send(
    sink: &mut impl Sink,
    wal: &WalWriter,
    from: Lsn,
    to: Lsn,
    step: u64,
) -> Result<(), SinkError> {
    let mut at = from;
    while at < to {
        let room = SIZE.bytes() - segment_offset(at, SIZE);
        let end = Lsn(at.0 + step.min(room).min(to.0 - at.0));
        run(sink.write(at, Bytes::copy_from_slice(wal.between(at, end))))?;
        at = end;
    }
    Ok(())
}

/// What a receiver does from its start to its end.
pub(in crate::receive) fn receive(
    disk: &SimDisk,
    compression: &str,
    wal: &WalWriter,
    to: Lsn,
) -> Result<Lsn, SinkError> {
    let mut sink = sink(disk, compression);
    let at = begin(&mut sink)?;
    send(&mut sink, wal, at.lsn, to, 50_000)?;
    run(sink.close())
}

pub(in crate::receive) fn put(disk: &SimDisk, name: &str, content: &[u8]) {
    let file = disk.create(&Path::new(DIR).join(name), true).unwrap();
    file.write_at(&mut [IoSlice::new(content)], 0).unwrap();
    file.sync_all().unwrap();
    disk.sync_dir(Path::new(DIR)).unwrap();
}

/// All files by name, segments decompressed as far as that goes.
pub(in crate::receive) fn content(disk: &SimDisk) -> BTreeMap<String, Vec<u8>> {
    let of_file = |(path, _): (PathBuf, u64)| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut bytes = disk.content(&path).unwrap();
        if let Some(file) = ArchiveFile::parse(&name) {
            bytes.clear();
            let read = Salvage::new(Arc::new(disk.clone()), Path::new(DIR), file).unwrap().read_to_end(&mut bytes);
            assert!(!file.whole || read.is_ok(), "{name}: {read:?}");
        }
        (name, bytes)
    };
    disk.files().into_iter().map(of_file).collect()
}

/// The same log up to `at`, and another one behind it.
fn other_log(at: Lsn) -> WalWriter {
    let full = wal();
    let end = full.last_record_before(at).unwrap();
    let mut other = WalWriter::continuing(&full, end);
    while other.position() < full.position() {
        other.record(777, 99);
    }
    other
}

#[test]
fn files_are_as_pg_receivewal_leaves_them() {
    let (wal, suffixes) = (wal(), [("none", ""), ("gzip", ".gz"), ("lz4", ".lz4"), ("zstd", ".zst")]);
    for (method, suffix) in suffixes {
        let disk = disk();
        let mut sink = sink(&disk, method);
        assert_eq!(run(sink.open(&origin())).unwrap(), None);
        run(sink.begin(Position { timeline: ONE, lsn: START })).unwrap();
        send(&mut sink, &wal, START, wal.position(), 131_072).unwrap();
        let third = Lsn(START.0 + 2 * SIZE.bytes());
        let standby = |write, flush| Feedback::Standby { write, flush, apply: Lsn::INVALID, hot_standby: None };
        assert_eq!(sink.feedback(), standby(wal.position(), third), "whole segments are on disk");
        let durable = if method == "none" { wal.position() } else { third };
        assert_eq!(run(sink.flush()).unwrap(), durable);
        assert_eq!(sink.feedback(), standby(wal.position(), durable));
        assert_eq!(run(sink.close()).unwrap(), wal.position());
        assert_eq!(sink.feedback(), standby(wal.position(), wal.position()), "for the last report");

        let files = content(&disk);
        let name = |number: u32, partial: &str| format!("0000000100000000{number:08X}{suffix}{partial}");
        assert_eq!(
            files.keys().cloned().collect::<Vec<_>>(),
            [name(3, ""), name(4, ""), name(5, ".partial")],
            "{method}"
        );
        assert_eq!(files[&name(3, "")], wal.between(START, Lsn(START.0 + SIZE.bytes())));
        let mut last = wal.since(third).to_vec();
        if method == "none" {
            last.resize(usize::try_from(SIZE.bytes()).unwrap(), 0);
        }
        assert_eq!(files[&name(5, ".partial")], last, "zeros behind the WAL of plain files");
        let report = verify_on(&disk, Path::new(DIR), &mut |_| {}).unwrap();
        assert!(report.ok && report.end == wal.position(), "{report}");
    }
}

#[test]
fn a_byte_that_differs_ends_it_and_changes_nothing() {
    let wal = wal();
    for method in ["none", "gzip", "lz4", "zstd"] {
        let disk = disk();
        receive(&disk, method, &wal, wal.position()).unwrap();
        let before = content(&disk);
        let third = Lsn(START.0 + 2 * SIZE.bytes());
        let other = other_log(Lsn(third.0 + 300_000));
        let error = receive(&disk, method, &other, other.position()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, SinkError::Diverged(_)) && text.contains("00000005"), "{text}");
        let after = content(&disk);
        for (name, bytes) in &before {
            assert_eq!(&after[name], bytes, "{method}: {name}");
        }
        receive(&disk, method, &wal, wal.position()).unwrap();
        assert_eq!(content(&disk), before, "{method}: the right log is still welcome");
    }
}

#[test]
fn another_log_behind_a_whole_segment_is_not_taken() {
    let wal = wal();
    // Ends with a whole segment, in the middle of a record.
    let end = Lsn(START.0 + 2 * SIZE.bytes());
    for at in [Lsn(end.0 - 400_000), Lsn(end.0 - 100_000)] {
        let disk = disk();
        receive(&disk, "none", &wal, end).unwrap();
        let before = content(&disk);
        let other = other_log(at);
        let error = receive(&disk, "none", &other, other.position()).unwrap_err();
        assert!(error.to_string().contains("doesn't continue the segment before it"), "{error}");
        assert_eq!(content(&disk), before);
        receive(&disk, "none", &wal, wal.position()).unwrap();
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let wal = wal();
    let disk = disk();
    receive(&disk, "none", &wal, wal.position()).unwrap();
    let open = |origin: Origin| run(sink(&disk, "none").open(&origin)).map(drop).map_err(|error| error.to_string());
    let error = open(Origin { system_id: SystemId(7), ..origin() }).unwrap_err();
    assert!(error.contains("system identifier"), "{error}");
    let error = open(Origin { segment_size: pgproto::SegmentSize::new(1 << 21).unwrap(), ..origin() }).unwrap_err();
    assert!(error.contains("1048576"), "{error}");
    // A whole segment that was cut, and one that was damaged.
    let fourth = Path::new(DIR).join("000000010000000000000004");
    disk.remove_file(&Path::new(DIR).join("000000010000000000000005.partial")).unwrap();
    disk.flip_bit(&fourth, 300_000, 1).unwrap();
    let error = receive(&disk, "none", &wal, wal.position()).unwrap_err();
    assert!(error.to_string().contains("incorrect checksum"), "{error}");
    disk.create(&fourth, false).unwrap().set_len(100_000).unwrap();
    let error = open(origin()).unwrap_err();
    assert!(error.contains("has 100000 bytes"), "{error}");
}

#[test]
fn a_directory_begins_with_a_segment_and_has_no_gaps() {
    let disk = disk();
    let mut sink = sink(&disk, "none");
    run(sink.open(&origin())).unwrap();
    let error = run(sink.begin(Position { timeline: ONE, lsn: Lsn(START.0 + 8) })).unwrap_err();
    assert!(matches!(error, SinkError::Unsupported(_)), "{error}");
    begin(&mut sink).unwrap();
    let wal = wal();
    send(&mut sink, &wal, START, Lsn(START.0 + 8192), 8192).unwrap();
    let error = run(sink.write(Lsn(START.0 + 16384), wal.since(Lsn(START.0 + 16384)))).unwrap_err();
    assert!(error.to_string().contains("doesn't follow what ends at 0/302000"), "{error}");
    let error = run(sink.write(Lsn(START.0 + 8192), wal.since(Lsn(START.0 + 8192)))).unwrap_err();
    assert!(error.to_string().contains("not open"), "an error is final: {error}");
}

#[test]
fn the_way_to_compress_may_change() {
    let wal = wal();
    let disk = disk();
    let methods = ["none", "gzip", "lz4", "zstd", "gzip", "none"];
    for (step, method) in methods.iter().enumerate() {
        let to = Lsn(START.0 + 1_500_000 + 10_000 * step as u64);
        receive(&disk, method, &wal, to).unwrap();
        let report = verify_on(&disk, Path::new(DIR), &mut |_| {}).unwrap();
        assert!(report.ok, "{report}");
        assert!(report.end <= to && report.end.0 + 150_000 > to.0, "{report}");
    }
    assert_eq!(content(&disk).len(), 5, "whole, and a partial of each kind");
    receive(&disk, "lz4", &wal, wal.position()).unwrap();
    let names: Vec<String> = content(&disk).into_keys().collect();
    assert_eq!(
        names,
        ["000000010000000000000003", "000000010000000000000004.lz4", "000000010000000000000005.lz4.partial"],
        "what is left of earlier attempts is gone"
    );
}

#[test]
fn only_one_may_write_into_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = DirectorySink::new(dir.path(), Compression::NONE, true).unwrap();
    let Err(error) = DirectorySink::new(dir.path(), Compression::NONE, true) else { panic!("two") };
    assert!(error.to_string().contains("another receiver"), "{error}");
    drop(first);
    DirectorySink::new(dir.path(), Compression::NONE, true).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no file tells of the lock");
}

#[test]
fn files_are_for_their_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut sink = DirectorySink::new(dir.path(), Compression::NONE, true).unwrap();
    let at = begin(&mut sink).unwrap();
    let wal = wal();
    send(&mut sink, &wal, at.lsn, wal.position(), 131_072).unwrap();
    run(sink.history(TWO, Bytes::from_static(b"1\t0/300000\tno reason\n"))).unwrap();
    run(sink.close()).unwrap();
    let mode = |entry: std::fs::DirEntry| entry.metadata().unwrap().permissions().mode() & 0o777;
    let modes: Vec<u32> = std::fs::read_dir(dir.path()).unwrap().map(|entry| mode(entry.unwrap())).collect();
    assert_eq!(modes, [0o600; 4]);
}

#[test]
fn a_stream_gets_the_bare_bytes_and_ends_quietly() {
    let wal = wal();
    let mut out = Vec::new();
    let mut stream = StreamSink::new(&mut out, "a test");
    let at = Position { timeline: ONE, lsn: START };
    run(async {
        assert_eq!(stream.open(&origin()).await.unwrap(), None);
        stream.begin(at).await.unwrap();
    });
    send(&mut stream, &wal, START, wal.position(), 100_000).unwrap();
    run(stream.switch(Position { timeline: TWO, lsn: wal.position() })).unwrap();
    let error = run(stream.switch(Position { timeline: TWO, lsn: START })).unwrap_err();
    assert!(error.to_string().contains("can't take back"), "{error}");
    assert_eq!(run(stream.close()).unwrap(), wal.position());
    assert_eq!(out, wal.since(START));

    let (reader, writer) = tokio::io::duplex(64);
    drop(reader);
    let mut stream = StreamSink::new(writer, "a test");
    run(stream.begin(at)).unwrap();
    let error = send(&mut stream, &wal, START, wal.position(), 100_000).unwrap_err();
    let closed = matches!(&error, SinkError::Io { source, .. } if source.kind() == std::io::ErrorKind::BrokenPipe);
    assert!(closed, "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Stopped anywhere and begun anew, by an orderly end or none: the same directory in the end.
    #[test]
    fn stops_anywhere_change_nothing(
        stops in proptest::collection::vec((0u64..2_600_000, any::<bool>(), 1u64..200_000), 0..5),
        method in 0usize..4,
    ) {
        let wal = wal();
        let method = ["none", "gzip", "lz4", "zstd"][method];
        let expected = {
            let disk = disk();
            receive(&disk, method, &wal, wal.position()).unwrap();
            content(&disk)
        };
        let disk = disk();
        for (stop, orderly, step) in stops {
            let mut sink = sink(&disk, method);
            let at = begin(&mut sink).unwrap();
            let to = Lsn(START.0 + stop).min(wal.position());
            send(&mut sink, &wal, at.lsn, to, step.max(5000)).unwrap();
            if orderly {
                run(sink.close()).unwrap();
            }
        }
        receive(&disk, method, &wal, wal.position()).unwrap();
        prop_assert_eq!(content(&disk), expected);
    }
}

#[test]
fn a_full_disk_ends_it() {
    let disk = disk();
    disk.set_capacity(Some(3 * SIZE.bytes() / 2));
    let wal = wal();
    let error = receive(&disk, "none", &wal, wal.position()).unwrap_err();
    let SinkError::Io { source, .. } = &error else { panic!("{error}") };
    assert_eq!(source.kind(), ErrorKind::StorageFull, "{error}");
    disk.set_capacity(None);
    assert_eq!(receive(&disk, "none", &wal, wal.position()).unwrap(), wal.position());
}
