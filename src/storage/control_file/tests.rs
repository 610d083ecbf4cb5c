//! The published vectors, both directions; damage of every kind.

use proptest::prelude::*;

use super::*;
use crate::storage::disk::RealDisk;

/// Version 10, three members, a partial segment (spec: wire protocol 10.5).
const V10: &str = "efcefeca0a0000002000000000000000636630343830393239373037656537353337323333376566616135656366393620000000000000\
     00313132646564363634323261613565393533653534343066613534323761633407000000030000000000000001000000000000000900\
     000000000000736b312e6c6f63616c4e1502000000000000000900000000000000736b322e6c6f63616c4e150300000000000000090000\
     0000000000736b332e6c6f63616c4e150005000000000000000200000000000000020000000000000018fd490100000000050000000000\
     0000c8b3a20100000000159802002143658778563412000000012000000000000000303030303030303030303030303030303030303030\
     303030303030303030303018fd49010000000018fd490100000000c8b3a2010000000018fd49010000000018fd49010000000000000000\
     0000000001000000000000000100000048000000000000003030303030303031303030303030303030303030303030315f355f30303030\
     3030303030314132423344305f303030303030303030314132423343385f736b312e7061727469616cc8b3a20100000000d0b3a2010000\
     000005000000000000000000000080cfd4670000000015cd5b07e390f939";

/// Version 9: the same without configuration, partial segment and creation time.
const V9: &str = "efcefeca090000002000000000000000636630343830393239373037656537353337323333376566616135656366393620000000000000\
     00313132646564363634323261613565393533653534343066613534323761633405000000000000000200000000000000020000000000\
     000018fd4901000000000500000000000000c8b3a201000000001598020021436587785634120000000120000000000000003030303030\
     30303030303030303030303030303030303030303030303030303018fd49010000000018fd490100000000c8b3a2010000000018fd4901\
     0000000018fd49010000000000000000000000000000000000000000000000000000000000000000a4e54c45";

const PARTIAL_NAME: &str = "000000010000000000000001_5_0000000001A2B3D0_0000000001A2B3C8_sk1.partial";

fn v10() -> ControlFile {
    let start = Lsn(0x149_FD18);
    let commit = Lsn(0x1A2_B3C8);
    let member = |id: u64| Member { id: NodeId(id), host: format!("sk{id}.local"), pg_port: 5454 };
    ControlFile {
        state: ControlState {
            ttid: TenantTimelineId::new(
                "cf0480929707ee75372337efaa5ecf96".parse().unwrap(),
                "112ded66422aa5e953e5440fa5427ac4".parse().unwrap(),
            ),
            configuration: Configuration {
                generation: Generation(7),
                members: vec![member(1), member(2), member(3)],
                new_members: None,
            },
            term: Term(5),
            term_history: TermHistory::new(vec![(2, start.0).into(), (5, commit.0).into()]).unwrap(),
            server: ServerInfo {
                pg_version: 170_005,
                system_id: SystemId(0x1234_5678_8765_4321),
                wal_seg_size: SegmentSize::DEFAULT,
            },
            stock: StockInfo::default(),
            timeline_start_lsn: start,
            local_start_lsn: start,
            commit_lsn: commit,
            backup_lsn: start,
            peer_horizon_lsn: start,
            remote_consistent_lsn: Lsn(0),
        },
        partial_backup: vec![PartialSegment {
            status: UploadStatus::Uploaded,
            name: PARTIAL_NAME.to_owned(),
            commit_lsn: commit,
            flush_lsn: Lsn(commit.0 + 8),
            term: Term(5),
        }],
        eviction: EvictionState::Present,
        creation_ts: CreationTime { secs_since_epoch: 1_742_000_000, nanos_since_epoch: 123_456_789 },
    }
}

fn v9() -> ControlFile {
    let mut file = v10();
    file.state.configuration = Configuration::default();
    file.partial_backup.clear();
    file.creation_ts = CreationTime::default();
    file
}

/// Puts a right checksum behind `content`.
fn sealed(mut content: Vec<u8>) -> Vec<u8> {
    content.put_u32_le(crc32c::crc32c(&content));
    content
}

#[test]
fn published_files_are_written_and_read_byte_for_byte() {
    for (hex, file) in [(V10, v10()), (V9, v9())] {
        assert_eq!(hex::encode(file.encode()), hex);
        assert_eq!(ControlFile::decode(&hex::decode(hex).unwrap()).unwrap(), file);
    }
}

#[test]
fn joint_configuration_and_eviction_survive() {
    let mut file = v10();
    file.state.configuration.new_members = Some(file.state.configuration.members[1..].to_vec());
    file.eviction = EvictionState::Offloaded(Lsn(0x1A2_B3D0));
    for status in [UploadStatus::InProgress, UploadStatus::Deleting] {
        file.partial_backup.push(PartialSegment { status, ..file.partial_backup[0].clone() });
    }
    assert_eq!(ControlFile::decode(&file.encode()).unwrap(), file);
}

#[test]
fn every_prefix_and_every_flipped_bit_is_refused() {
    let good = v10().encode();
    for length in 0..good.len() {
        let result = ControlFile::decode(&good[..length]);
        match length {
            0..MIN_LENGTH => assert!(matches!(result, Err(ControlFileError::TooShort(n)) if n == length)),
            _ => assert!(matches!(result, Err(ControlFileError::Checksum { .. })), "{length}: {result:?}"),
        }
    }
    for bit in 0..good.len() * 8 {
        let mut damaged = good.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(ControlFile::decode(&damaged), Err(ControlFileError::Checksum { .. })), "bit {bit}");
    }
}

#[test]
fn other_files_and_versions_are_told_apart() {
    let body = |magic: u32, version: u32| [magic.to_le_bytes(), version.to_le_bytes()].concat();
    let decode = |content| ControlFile::decode(&sealed(content)).unwrap_err();
    assert!(matches!(decode(body(0xCAFE_CEEE, 10)), ControlFileError::Magic(0xCAFE_CEEE)));
    assert!(matches!(decode(body(MAGIC, 8)), ControlFileError::Version(8)));
    assert!(matches!(decode(body(MAGIC, 11)), ControlFileError::Version(11)));
    assert!(matches!(decode(body(MAGIC, 10)), ControlFileError::Content(DecodeError::Truncated("tenant id"))));
    let mut long = v10().encode();
    long.truncate(long.len() - 4);
    long.push(0);
    assert!(matches!(decode(long), ControlFileError::Content(DecodeError::TrailingBytes(_, 1))));
}

#[test]
fn nonsense_with_a_right_checksum_is_refused() {
    let mut history = v9();
    history.state.term_history = TermHistory::default();
    let mut content = history.encode();
    content.truncate(content.len() - 4);
    // The segment size is 4 bytes before the proposer uuid: find it by value.
    let at = content.windows(4).position(|w| w == SegmentSize::DEFAULT.as_u32().to_le_bytes()).unwrap();
    content[at] = 1;
    assert!(matches!(ControlFile::decode(&sealed(content)), Err(ControlFileError::SegmentSize(_))));

    // A list that claims 2^63 entries ends at the end of the file, not of the memory.
    let mut content = v9().encode();
    content.truncate(8 + 2 * 40 + 8);
    content.put_u64_le(1 << 63);
    assert!(matches!(ControlFile::decode(&sealed(content)), Err(ControlFileError::Content(DecodeError::Truncated(_)))));
}

#[test]
fn json_has_the_documented_form() {
    let json = v10().to_json();
    assert_eq!(json["tenant_id"], "cf0480929707ee75372337efaa5ecf96");
    assert_eq!(json["mconf"]["members"][2], serde_json::json!({"id": 3, "host": "sk3.local", "pg_port": 5454}));
    assert_eq!(json["acceptor_state"]["term"], 5);
    assert_eq!(json["acceptor_state"]["term_history"][0], serde_json::json!({"term": 2, "lsn": "0/149FD18"}));
    assert_eq!(json["server"]["wal_seg_size"], 16_777_216);
    assert_eq!(json["commit_lsn"], "0/1A2B3C8");
    assert_eq!(json["partial_backup"]["segments"][0]["status"], "Uploaded");
    assert_eq!(json["partial_backup"]["segments"][0]["flush_lsn"], "0/1A2B3D0");
    assert_eq!(json["eviction_state"], "Present");
    assert_eq!(json["stock"]["timelines"], serde_json::json!([{"timeline": 1, "begin": "0/0"}]));
    assert_eq!(json["creation_ts"]["nanos_since_epoch"], 123_456_789);
    let offloaded = ControlFile { eviction: EvictionState::Offloaded(Lsn(0x10)), ..v10() };
    assert_eq!(offloaded.to_json()["eviction_state"], serde_json::json!({"Offloaded": "0/10"}));
}

#[test]
fn file_on_disk_is_replaced_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::new(true);
    let path = dir.path().join(CONTROL_FILE_NAME);
    assert!(matches!(ControlFile::read(&disk, &path), Err(ControlFileError::Disk(e)) if e.is_not_found()));
    v9().write(&disk, dir.path()).unwrap();
    v10().write(&disk, dir.path()).unwrap();
    assert_eq!(ControlFile::read(&disk, &path).unwrap(), v10());
    std::fs::write(&path, b"abc").unwrap();
    assert!(matches!(ControlFile::read(&disk, &path), Err(ControlFileError::TooShort(3))));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..400), version in 9u32..=10) {
        let header = [MAGIC.to_le_bytes(), version.to_le_bytes()].concat();
        let _ = ControlFile::decode(&body);
        let _ = ControlFile::decode(&sealed([header, body].concat()));
    }

    /// Damage that the checksum doesn't see must still not panic.
    #[test]
    fn changed_bytes_with_a_right_checksum_never_panic(at in 8usize..500, byte in any::<u8>()) {
        let mut content = v10().encode();
        content.truncate(content.len() - 4);
        let at = at.min(content.len() - 1);
        content[at] = byte;
        let _ = ControlFile::decode(&sealed(content));
    }
}
