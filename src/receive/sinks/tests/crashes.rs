//! A crash or an error in any operation of the disk.

use super::*;
use crate::storage::simdisk::Survivors;

const METHODS: [&str; 2] = ["none", "gzip"];

/// Runs a receiver that flushes now and then, and stops once on its way. At each flush: how many operations were done, and up
/// to where it was durable.
fn with_flushes(disk: &SimDisk, method: &str, wal: &WalWriter) -> Result<Vec<(u64, Lsn)>, SinkError> {
    let mut flushed = Vec::new();
    for end in [Lsn(START.0 + 700_000), wal.position()] {
        let mut sink = sink(disk, method);
        let mut at = begin(&mut sink)?.lsn;
        while at < end {
            let to = end.min(Lsn(at.0 + 150_000));
            send(&mut sink, wal, at, to, 60_000)?;
            let durable = run(sink.flush())?;
            flushed.push((disk.operations(), durable));
            at = to;
        }
        run(sink.close())?;
    }
    Ok(flushed)
}

/// The log as far as it is on the disk, from the start.
fn there(disk: &SimDisk) -> Vec<u8> {
    let mut segments: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (name, bytes) in content(disk) {
        if ArchiveFile::parse(&name).is_some() {
            segments.insert(name[..24].to_owned(), bytes);
        }
    }
    segments.into_values().flatten().collect()
}

#[test]
fn a_crash_loses_nothing_that_was_flushed() {
    let wal = wal();
    for method in METHODS {
        let disk = disk();
        disk.record();
        let flushed = with_flushes(&disk, method, &wal).unwrap();
        let expected = content(&disk);
        let operations = disk.operations();
        for at in (0..operations).filter(|at| at % 7 == 0 || *at < 10) {
            for survivors in [Survivors::Nothing, Survivors::Everything, Survivors::Some(at)] {
                let context = format!("{method}, {}, {survivors:?}", disk.describe(at));
                let crashed = disk.stopped_in(at);
                crashed.crash(survivors);
                let durable = flushed.iter().filter(|(done, _)| *done <= at).map(|(_, lsn)| *lsn).max();
                if let Some(durable) = durable {
                    let found = there(&crashed);
                    let length = usize::try_from(durable.0 - START.0).unwrap();
                    assert!(found.len() >= length, "{context}: {} of {length} bytes", found.len());
                    assert!(found[..length] == wal.between(START, durable)[..], "{context}: other bytes");
                }
                let end = receive(&crashed, method, &wal, wal.position());
                assert_eq!(end.map_err(|error| error.to_string()), Ok(wal.position()), "{context}");
                assert!(content(&crashed) == expected, "{context}: another directory");
            }
        }
    }
}

#[test]
fn an_error_ends_it_and_the_next_start_goes_on() {
    let wal = wal();
    for method in METHODS {
        let whole = disk();
        with_flushes(&whole, method, &wal).unwrap();
        let expected = content(&whole);
        for at in (0..whole.operations()).filter(|at| at % 9 == 0 || *at < 10) {
            let disk = disk();
            disk.fail_at(at, ErrorKind::Other);
            let context = format!("{method}, {}", whole.describe(at));
            let error = with_flushes(&disk, method, &wal).unwrap_err();
            assert!(matches!(error, SinkError::Io { .. }), "{context}: {error}");
            disk.crash(Survivors::Some(at));
            receive(&disk, method, &wal, wal.position()).unwrap();
            assert!(content(&disk) == expected, "{context}: another directory");
        }
    }
}
