//! The simulated disk keeps what it says and no more.

use std::collections::BTreeSet;

use super::*;

fn write(file: &dyn DiskFile, content: &[u8]) -> io::Result<()> {
    file.write_at(&mut [IoSlice::new(content)], 0)
}

fn read(disk: &SimDisk, path: &str) -> io::Result<Vec<u8>> {
    disk.content(Path::new(path))
}

/// A disk with a durable file `/d/a` of these bytes.
fn disk_with(content: &[u8]) -> (SimDisk, Arc<dyn DiskFile>) {
    let disk = SimDisk::with_dir(Path::new("/d"));
    let a = disk.create(Path::new("/d/a"), true).unwrap();
    write(&*a, content).unwrap();
    a.sync_data().unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    (disk, a)
}

/// Bytes at an address that durable writes accept.
struct Aligned(Vec<u8>);

impl Aligned {
    fn new(byte: u8) -> Self {
        Self(vec![byte; 4 * DURABLE_ALIGNMENT])
    }

    fn get(&self, len: usize) -> &[u8] {
        let start = self.0.as_ptr().align_offset(DURABLE_ALIGNMENT);
        &self.0[start..start + len]
    }
}

#[test]
fn only_synced_bytes_and_names_survive_a_power_cut() {
    let disk = SimDisk::with_dir(Path::new("/d"));
    let a = disk.create(Path::new("/d/a"), true).unwrap();
    write(&*a, b"one").unwrap();
    a.sync_data().unwrap();
    disk.crash(Survivors::Nothing);
    assert!(read(&disk, "/d/a").is_err(), "the name was not synced");
    assert!(a.len().is_err(), "files are closed by a crash");

    let (disk, a) = disk_with(b"one");
    write(&*a, b"two").unwrap();
    disk.rename(Path::new("/d/a"), Path::new("/d/b")).unwrap();
    disk.crash(Survivors::Everything);
    assert_eq!(read(&disk, "/d/b").unwrap(), b"two");
    disk.crash(Survivors::Nothing);
    assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
}

#[test]
fn unsynced_pages_survive_in_any_combination_whole_older_or_torn() {
    let mut outcomes = BTreeSet::new();
    let (mut torn, mut older) = (false, false);
    for seed in 0..400 {
        let (disk, a) = disk_with(&[0; 2 * PAGE]);
        write(&*a, &[1; 2 * PAGE]).unwrap();
        write(&*a, &[2; 2 * PAGE]).unwrap();
        disk.crash(Survivors::Some(seed));
        let content = read(&disk, "/d/a").unwrap();
        let pages = content.chunks(PAGE).map(|page| page.iter().all(|&byte| byte == page[0]).then_some(page[0]));
        let pages: Vec<Option<u8>> = pages.collect();
        torn |= pages.contains(&None);
        older |= pages.contains(&Some(1));
        outcomes.insert(pages);
    }
    assert!(torn && older && outcomes.len() == 16, "{outcomes:?}");
}

#[test]
fn a_failed_sync_loses_its_bytes_for_good() {
    let (disk, a) = disk_with(b"one");
    write(&*a, b"two").unwrap();
    disk.fail_with(disk.operations(), ErrorKind::Other, Effect::Nothing);
    assert!(a.sync_data().is_err());
    a.sync_data().unwrap();
    disk.sync_fs(Path::new("/d")).unwrap();
    assert_eq!(read(&disk, "/d/a").unwrap(), b"two", "still in the page cache");
    a.drop_cache().unwrap();
    assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
    disk.crash(Survivors::Nothing);
    assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
}

#[test]
fn a_stopped_disk_stays_stopped_until_the_crash() {
    let disk = SimDisk::with_dir(Path::new("/d"));
    disk.stop_at(disk.operations() + 1);
    disk.create_dir(Path::new("/d/x")).unwrap();
    assert!(disk.create_dir(Path::new("/d/y")).is_err());
    assert!(disk.sync_dir(Path::new("/d")).is_err());
    disk.crash(Survivors::Nothing);
    assert!(disk.read_dir(Path::new("/d")).unwrap().is_empty());
    disk.create_dir(Path::new("/d/y")).unwrap();
}

#[test]
fn a_durable_write_is_whole_when_it_returned_and_torn_when_it_did_not() {
    let (ones, twos) = (Aligned::new(1), Aligned::new(2));
    let (disk, _) = disk_with(&[0; 2 * PAGE]);
    let a = disk.open_durable(Path::new("/d/a")).unwrap();
    write(&*a, ones.get(2 * PAGE)).unwrap();
    disk.stop_at(disk.operations());
    assert!(write(&*a, twos.get(2 * PAGE)).is_err());
    let mut outcomes = BTreeSet::new();
    for seed in 0..300 {
        let disk = disk.fork();
        disk.crash(Survivors::Some(seed));
        let content = read(&disk, "/d/a").unwrap();
        let sectors = content.chunks(SECTOR).map(|sector| {
            let new = sector.iter().take_while(|&&byte| byte == 2).count();
            assert!(sector[new..].iter().all(|&byte| byte == 1), "what was durable before is still there");
            new
        });
        outcomes.insert(sectors.collect::<Vec<_>>());
        // It is durable or it is not; another crash changes nothing.
        disk.crash(Survivors::Nothing);
        assert_eq!(read(&disk, "/d/a").unwrap(), content);
    }
    assert!(outcomes.contains(&vec![0; 16]) && outcomes.contains(&vec![SECTOR; 16]) && outcomes.len() > 50);
}

#[test]
fn a_durable_write_must_keep_the_rules_of_the_device() {
    let (disk, _) = disk_with(&[0; 2 * PAGE]);
    let a = disk.open_durable(Path::new("/d/a")).unwrap();
    let ones = Aligned::new(1);
    let refused = |data: &[u8], offset: u64| {
        let error = a.write_at(&mut [IoSlice::new(data)], offset).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    };
    refused(&ones.get(2 * PAGE)[..100], 0);
    refused(&ones.get(2 * PAGE)[8..8 + PAGE], 0);
    refused(ones.get(PAGE), 512);
    refused(ones.get(PAGE), 2 * PAGE as u64);
    disk.open(Path::new("/d/a")).unwrap().set_len(3 * PAGE as u64).unwrap();
    refused(ones.get(PAGE), 2 * PAGE as u64);
}

#[test]
fn a_failed_operation_did_nothing_a_part_or_all() {
    let mut lengths = BTreeSet::new();
    for seed in 0..200 {
        let (disk, a) = disk_with(&[0; PAGE]);
        disk.fail_with(disk.operations(), ErrorKind::Other, Effect::Part(seed));
        assert!(write(&*a, &[1; PAGE]).is_err());
        lengths.insert(read(&disk, "/d/a").unwrap().iter().filter(|&&byte| byte == 1).count());
    }
    assert!(lengths.len() > 50);
    for (effect, expected) in [(Effect::Nothing, 0), (Effect::Whole, 1)] {
        let (disk, a) = disk_with(&[0; PAGE]);
        disk.fail_with(disk.operations(), ErrorKind::Other, effect);
        assert!(write(&*a, &[1; PAGE]).is_err());
        assert_eq!(read(&disk, "/d/a").unwrap(), [expected; PAGE]);
        disk.fail_with(disk.operations(), ErrorKind::Other, effect);
        assert!(disk.create_dir(Path::new("/d/x")).is_err());
        assert_eq!(disk.exists(Path::new("/d/x")).unwrap(), effect == Effect::Whole);
    }
}

#[test]
fn a_full_disk_takes_what_needs_no_space() {
    let (disk, a) = disk_with(&[0; PAGE]);
    a.set_len(3 * PAGE as u64).unwrap();
    let is_full = |result: io::Result<()>| result.is_err_and(|error| error.kind() == ErrorKind::StorageFull);
    disk.set_full(true);
    write(&*a, &[1; PAGE]).unwrap();
    assert!(is_full(write(&*a, &[2; 2 * PAGE])), "a hole cannot be filled");
    assert_eq!(read(&disk, "/d/a").unwrap()[PAGE - 1..=PAGE], [2, 0]);
    assert!(is_full(disk.create(Path::new("/d/b"), true).map(drop)));
    assert!(is_full(disk.create_dir(Path::new("/d/b"))));
    disk.rename(Path::new("/d/a"), Path::new("/d/b")).unwrap();
    a.set_len(0).unwrap();
    a.sync_data().unwrap();

    disk.set_capacity(Some(2 * PAGE as u64));
    assert!(is_full(write(&*a, &[3; 3 * PAGE])));
    assert_eq!((disk.used(), a.len().unwrap()), (2 * PAGE as u64, 2 * PAGE as u64));
    disk.remove_file(Path::new("/d/b")).unwrap();
    disk.create(Path::new("/d/c"), true).unwrap();
    assert_eq!(disk.used(), 0);
}

#[test]
fn bits_flip_and_pages_get_unreadable_at_rest() {
    let (disk, a) = disk_with(b"abc");
    let path = Path::new("/d/a");
    assert_eq!(disk.files(), [(path.to_owned(), 3)]);
    disk.flip_bit(path, 1, 5).unwrap();
    assert!(disk.flip_bit(path, 3, 0).is_err());
    assert_eq!(read(&disk, "/d/a").unwrap(), b"aBc");
    disk.crash(Survivors::Nothing);
    assert_eq!(read(&disk, "/d/a").unwrap(), b"aBc");

    let a = {
        drop(a);
        disk.open(path).unwrap()
    };
    disk.make_unreadable(path, 2).unwrap();
    assert!(a.read_at(&mut [0; 1], 0).is_err());
    write(&*a, b"new").unwrap();
    assert_eq!(a.read_at(&mut [0; 1], 0).unwrap(), 1);
}

#[test]
fn a_lying_disk_loses_what_it_said_it_had() {
    let (disk, a) = disk_with(&[0; PAGE]);
    disk.set_lying(true);
    write(&*a, &[1; PAGE]).unwrap();
    a.sync_all().unwrap();
    disk.create_dir(Path::new("/d/x")).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    disk.sync_fs(Path::new("/d")).unwrap();
    let (durable, twos) = (disk.open_durable(Path::new("/d/a")).unwrap(), Aligned::new(2));
    write(&*durable, twos.get(PAGE)).unwrap();
    disk.crash(Survivors::Nothing);
    assert_eq!(read(&disk, "/d/a").unwrap(), [0; PAGE]);
    assert!(!disk.exists(Path::new("/d/x")).unwrap());
}

#[test]
fn a_recorded_life_can_be_stopped_anywhere() {
    let disk = SimDisk::with_dir(Path::new("/d"));
    disk.record();
    let a = disk.create(Path::new("/d/a"), true).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    write(&*a, b"one").unwrap();
    a.sync_data().unwrap();
    let survivors = |at, survivors| {
        let stopped = disk.stopped_in(at);
        assert!(stopped.create_dir(Path::new("/d/x")).is_err(), "it stopped");
        stopped.crash(survivors);
        read(&stopped, "/d/a").ok()
    };
    assert_eq!(survivors(1, Survivors::Nothing), None);
    assert_eq!(survivors(1, Survivors::Everything), Some(vec![]));
    assert_eq!(survivors(2, Survivors::Nothing), Some(vec![]));
    assert_eq!(survivors(2, Survivors::Everything), Some(b"one".to_vec()));
    assert_eq!(disk.describe(2), "operation 2 (Write { offset: 0, len: 3 } /d/a)");
    assert_eq!(read(&disk, "/d/a").unwrap(), b"one");
}

#[test]
fn a_slow_disk_is_slow_in_the_same_way_every_time() {
    let delays = |seed| {
        let disk = SimDisk::with_dir(Path::new("/d"));
        assert_eq!(disk.delay(), Duration::ZERO);
        disk.set_slow(Duration::from_millis(50), seed);
        (0..20).map(|_| disk.delay()).collect::<Vec<_>>()
    };
    assert_eq!(delays(1), delays(1));
    assert_ne!(delays(1), delays(2));
    assert!(delays(3).iter().all(|delay| *delay <= Duration::from_millis(50)));
}

#[test]
fn removed_files_are_forgotten_when_nothing_leads_to_them() {
    let (disk, a) = disk_with(b"abc");
    disk.remove_file(Path::new("/d/a")).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
    assert_eq!(a.read_at(&mut [0; 3], 0).unwrap(), 3, "open files stay");
    drop(a);
    disk.sync_dir(Path::new("/d")).unwrap();
    assert_eq!(disk.0.lock().inodes[0].content.len(), 0);
}
