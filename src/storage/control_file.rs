//! `safekeeper.control`: the durable state of one timeline, in Neon's format, byte for byte (spec: wire protocol 8.3).
//!
//! ```text
//! u32 magic 0xCAFECEEF | u32 version | body | u32 CRC-32C of all before      everything little-endian
//! ```
//!
//! A timeline of generation 0 is written as version 9, which has neither configuration nor creation time, any other as
//! version 10; so Neon's safekeeper can read what we write, at whatever age it is. Both versions are read. A file that
//! is short, damaged, of another version or otherwise not understood gives an error and never a guess: the promises in
//! it are unknown then.

use std::path::Path;

use bytes::{BufMut, Bytes};
use pgproto::lsn::InvalidSegmentSize;
use pgproto::read::Reader;
use pgproto::walproposer::{Configuration, Member, TermLsn};
use pgproto::{DecodeError, Generation, Lsn, NodeId, SegmentSize, SystemId, TenantTimelineId, Term};
use serde::Serialize;

use super::disk::{Disk, DiskError, read_file, replace_file};
use crate::consensus::history::{HistoryError, TermHistory};
use crate::consensus::state::{ControlState, ServerInfo, StockInfo};

/// Name of the control file in a timeline's directory.
pub const CONTROL_FILE_NAME: &str = "safekeeper.control";

const MAGIC: u32 = 0xCAFE_CEEF;
const VERSION_WITHOUT_GENERATION: u32 = 9;
const VERSION: u32 = 10;
/// Magic, version and checksum: no file is shorter.
const MIN_LENGTH: usize = 12;
/// Far more than the largest real file (a term history of a hundred thousand entries); keeps a mix-up from eating
/// memory.
const MAX_LENGTH: usize = 16 * 1024 * 1024;

/// Everything in a control file. What consensus knows is in `state`; the rest is carried along unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// Promises and positions.
    pub state: ControlState,
    /// Partial segments in remote storage.
    pub partial_backup: Vec<PartialSegment>,
    /// Whether the WAL is on this disk.
    pub eviction: EvictionState,
    /// When the timeline was created here; the epoch when not known (version 9 doesn't carry it).
    pub creation_ts: CreationTime,
}

/// Seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CreationTime {
    /// Whole seconds.
    pub secs_since_epoch: u64,
    /// Nanoseconds of the second, below a billion.
    pub nanos_since_epoch: u32,
}

impl CreationTime {
    /// The system clock's time, or the epoch when that is before 1970.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { secs_since_epoch: since.as_secs(), nanos_since_epoch: since.subsec_nanos() }
    }
}

/// A partial segment that is, was or will be in remote storage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartialSegment {
    /// How far its upload or removal is.
    pub status: UploadStatus,
    /// Name of the remote object.
    pub name: String,
    /// Commit LSN at upload.
    pub commit_lsn: Lsn,
    /// End of the WAL in it.
    pub flush_lsn: Lsn,
    /// Term of its last record.
    pub term: Term,
}

/// Stages in the life of a remote partial segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum UploadStatus {
    /// Being uploaded; may or may not exist.
    InProgress,
    /// Exists.
    Uploaded,
    /// Being removed; may or may not exist.
    Deleting,
}

/// Whether the newest WAL of a timeline is on this disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum EvictionState {
    /// On this disk.
    #[default]
    Present,
    /// In remote storage only, up to this LSN.
    Offloaded(Lsn),
}

/// Why a control file could not be read. The timeline must not be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlFileError {
    /// The file could not be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Fewer bytes than any control file has.
    #[error("control file has {0} bytes, too few for a control file")]
    TooShort(usize),
    /// The checksum over the file is wrong: bytes changed on disk, or were never all written.
    #[error("control file is damaged: checksum is {computed:08x}, file says {stored:08x}")]
    Checksum {
        /// Over the bytes found.
        computed: u32,
        /// As stored behind them.
        stored: u32,
    },
    /// Not a control file.
    #[error("not a control file: magic number is {0:#010x}")]
    Magic(u32),
    /// Written by a version of the software that this one doesn't know.
    #[error("control file has format version {0}; this safekeeper reads versions 9 and 10")]
    Version(u32),
    /// The checksum is right, but the content makes no sense.
    #[error("control file cannot be understood: {0}")]
    Content(#[from] DecodeError),
    /// Same, for the segment size.
    #[error("control file cannot be understood: {0}")]
    SegmentSize(#[from] InvalidSegmentSize),
    /// Same, for the term history.
    #[error("control file cannot be understood: {0}")]
    History(#[from] HistoryError),
}

impl ControlFile {
    /// The control file of a timeline created now.
    pub fn new(state: ControlState) -> Self {
        let creation_ts = CreationTime::now();
        Self { state, partial_backup: Vec::new(), eviction: EvictionState::Present, creation_ts }
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        let with_generation = self.state.configuration.generation != Generation(0);
        out.put_u32_le(MAGIC);
        out.put_u32_le(if with_generation { VERSION } else { VERSION_WITHOUT_GENERATION });
        self.encode_body(&mut out, with_generation);
        out.put_u32_le(crc32c::crc32c(&out));
        out
    }

    fn encode_body(&self, out: &mut Vec<u8>, with_generation: bool) {
        let state = &self.state;
        put_text(out, &state.ttid.tenant_id.to_string());
        put_text(out, &state.ttid.timeline_id.to_string());
        if with_generation {
            put_configuration(out, &state.configuration);
        }
        out.put_u64_le(state.term.0);
        put_count(out, state.term_history.entries().len());
        for entry in state.term_history.entries() {
            out.put_u64_le(entry.term.0);
            out.put_u64_le(entry.lsn.0);
        }
        out.put_u32_le(state.server.pg_version);
        out.put_u64_le(state.server.system_id.0);
        out.put_u32_le(state.server.wal_seg_size.as_u32());
        put_text(out, UNUSED_PROPOSER_UUID);
        for lsn in [state.timeline_start_lsn, state.local_start_lsn, state.commit_lsn, state.backup_lsn] {
            out.put_u64_le(lsn.0);
        }
        out.put_u64_le(state.peer_horizon_lsn.0);
        out.put_u64_le(state.remote_consistent_lsn.0);
        if !with_generation {
            put_count(out, 0); // peers, no longer used
        }
        put_count(out, self.partial_backup.len());
        for segment in &self.partial_backup {
            segment.encode(out);
        }
        match self.eviction {
            EvictionState::Present => out.put_u32_le(0),
            EvictionState::Offloaded(lsn) => {
                out.put_u32_le(1);
                out.put_u64_le(lsn.0);
            }
        }
        if with_generation {
            out.put_u64_le(self.creation_ts.secs_since_epoch);
            out.put_u32_le(self.creation_ts.nanos_since_epoch);
        }
    }

    /// Reads the bytes of a file: checksum first, so that damage is called damage.
    pub fn decode(content: &[u8]) -> Result<Self, ControlFileError> {
        if content.len() < MIN_LENGTH {
            return Err(ControlFileError::TooShort(content.len()));
        }
        let (checked, stored) = content.split_at(content.len() - 4);
        let stored = Reader::new(Bytes::copy_from_slice(stored)).u32_le("checksum")?;
        let computed = crc32c::crc32c(checked);
        if computed != stored {
            return Err(ControlFileError::Checksum { computed, stored });
        }
        let mut body = Reader::new(Bytes::copy_from_slice(checked));
        match body.u32_le("magic")? {
            MAGIC => {}
            other => return Err(ControlFileError::Magic(other)),
        }
        let with_generation = match body.u32_le("version")? {
            VERSION => true,
            VERSION_WITHOUT_GENERATION => false,
            other => return Err(ControlFileError::Version(other)),
        };
        let file = Self::decode_body(&mut body, with_generation)?;
        body.finish("control file")?;
        Ok(file)
    }

    fn decode_body(body: &mut Reader, with_generation: bool) -> Result<Self, ControlFileError> {
        let tenant_id = id(body, "tenant id")?;
        let timeline_id = id(body, "timeline id")?;
        let configuration = if with_generation { configuration(body)? } else { Configuration::default() };
        let term = Term(body.u64_le("term")?);
        let term_history = list(body, "term history", |body| {
            Ok(TermLsn { term: Term(body.u64_le("term of history")?), lsn: lsn(body, "LSN of history")? })
        })?;
        let server = ServerInfo {
            pg_version: body.u32_le("Postgres version")?,
            system_id: SystemId(body.u64_le("system id")?),
            wal_seg_size: SegmentSize::new(body.u32_le("segment size")?)?,
        };
        text(body, "proposer uuid")?;
        let state = ControlState {
            ttid: TenantTimelineId::new(tenant_id, timeline_id),
            configuration,
            term,
            term_history: TermHistory::new(term_history)?,
            server,
            stock: StockInfo::default(),
            timeline_start_lsn: lsn(body, "timeline start LSN")?,
            local_start_lsn: lsn(body, "local start LSN")?,
            commit_lsn: lsn(body, "commit LSN")?,
            backup_lsn: lsn(body, "backup LSN")?,
            peer_horizon_lsn: lsn(body, "peer horizon LSN")?,
            remote_consistent_lsn: lsn(body, "remote consistent LSN")?,
        };
        if !with_generation {
            // Peers: an id and four positions each, read for nothing.
            list(body, "peers", |body| body.bytes(40, "peer"))?;
        }
        let partial_backup = list(body, "partial backup", PartialSegment::decode)?;
        let eviction = match body.u32_le("eviction state")? {
            0 => EvictionState::Present,
            1 => EvictionState::Offloaded(lsn(body, "offloaded LSN")?),
            other => return Err(DecodeError::UnknownTag { what: "eviction state", value: other.into() }.into()),
        };
        let creation_ts = if with_generation { creation_time(body)? } else { CreationTime::default() };
        Ok(Self { state, partial_backup, eviction, creation_ts })
    }

    /// Replaces the control file in the directory `dir` atomically and durably.
    pub fn write(&self, disk: &dyn Disk, dir: &Path) -> Result<(), DiskError> {
        replace_file(disk, dir, CONTROL_FILE_NAME, &self.encode())
    }

    /// Reads the control file at `path`.
    pub fn read(disk: &dyn Disk, path: &Path) -> Result<Self, ControlFileError> {
        Self::decode(&read_file(disk, path, MAX_LENGTH)?)
    }

    /// The form in which tools and the HTTP interface show it (spec: HTTP API, `CF` of `debug_dump`).
    pub fn to_json(&self) -> serde_json::Value {
        let state = &self.state;
        let timelines = state.stock.ancestry.branches().iter();
        let timelines = timelines.map(|b| serde_json::json!({ "timeline": b.timeline, "begin": b.begin }));
        serde_json::json!({
            "tenant_id": state.ttid.tenant_id,
            "timeline_id": state.ttid.timeline_id,
            "mconf": state.configuration,
            "acceptor_state": { "term": state.term, "term_history": state.term_history.entries() },
            "server": {
                "pg_version": state.server.pg_version,
                "system_id": state.server.system_id,
                "wal_seg_size": state.server.wal_seg_size.as_u32(),
            },
            "proposer_uuid": UNUSED_PROPOSER_UUID,
            "timeline_start_lsn": state.timeline_start_lsn,
            "local_start_lsn": state.local_start_lsn,
            "commit_lsn": state.commit_lsn,
            "backup_lsn": state.backup_lsn,
            "peer_horizon_lsn": state.peer_horizon_lsn,
            "remote_consistent_lsn": state.remote_consistent_lsn,
            "partial_backup": { "segments": self.partial_backup },
            "eviction_state": self.eviction,
            "creation_ts": self.creation_ts,
            "stock": {
                "timelines": timelines.collect::<Vec<_>>(),
                "server_version": state.stock.server_version,
                "safekeepers": state.stock.safekeepers.iter().map(ToString::to_string).collect::<Vec<_>>(),
            },
        })
    }
}

/// Whether this begins like a control file of any version.
pub(super) fn is_control_file(content: &[u8]) -> bool {
    content.starts_with(&MAGIC.to_le_bytes())
}

/// The field is there in all versions and filled by none.
const UNUSED_PROPOSER_UUID: &str = "00000000000000000000000000000000";

impl PartialSegment {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32_le(match self.status {
            UploadStatus::InProgress => 0,
            UploadStatus::Uploaded => 1,
            UploadStatus::Deleting => 2,
        });
        put_text(out, &self.name);
        out.put_u64_le(self.commit_lsn.0);
        out.put_u64_le(self.flush_lsn.0);
        out.put_u64_le(self.term.0);
    }

    fn decode(body: &mut Reader) -> Result<Self, DecodeError> {
        let status = match body.u32_le("partial segment status")? {
            0 => UploadStatus::InProgress,
            1 => UploadStatus::Uploaded,
            2 => UploadStatus::Deleting,
            other => return Err(DecodeError::UnknownTag { what: "partial segment status", value: other.into() }),
        };
        Ok(Self {
            status,
            name: text(body, "partial segment name")?,
            commit_lsn: lsn(body, "partial segment commit LSN")?,
            flush_lsn: lsn(body, "partial segment flush LSN")?,
            term: Term(body.u64_le("partial segment term")?),
        })
    }
}

pub(super) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.put_u64_le(count as u64);
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    put_count(out, text.len());
    out.put_slice(text.as_bytes());
}

fn put_configuration(out: &mut Vec<u8>, configuration: &Configuration) {
    out.put_u32_le(configuration.generation.0);
    put_members(out, &configuration.members);
    match &configuration.new_members {
        None => out.put_u8(0),
        Some(members) => {
            out.put_u8(1);
            put_members(out, members);
        }
    }
}

fn put_members(out: &mut Vec<u8>, members: &[Member]) {
    put_count(out, members.len());
    for member in members {
        out.put_u64_le(member.id.0);
        put_text(out, &member.host);
        out.put_u16_le(member.pg_port);
    }
}

/// A length, and as many values. Reserves nothing: a wrong length runs out of bytes before it runs out of memory.
pub(super) fn list<T>(
    body: &mut Reader,
    field: &'static str,
    mut one: impl FnMut(&mut Reader) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    (0..body.u64_le(field)?).map(|_| one(body)).collect()
}

pub(super) fn text(body: &mut Reader, field: &'static str) -> Result<String, DecodeError> {
    let length = usize::try_from(body.u64_le(field)?).map_err(|_| DecodeError::Truncated(field))?;
    let bytes = body.bytes(length, field)?;
    String::from_utf8(bytes.into()).map_err(|_| DecodeError::BadString(field))
}

fn id<T: std::str::FromStr>(body: &mut Reader, field: &'static str) -> Result<T, DecodeError> {
    let text = text(body, field)?;
    text.parse().map_err(|_| DecodeError::Invalid(field, text))
}

pub(super) fn lsn(body: &mut Reader, field: &'static str) -> Result<Lsn, DecodeError> {
    body.u64_le(field).map(Lsn)
}

fn configuration(body: &mut Reader) -> Result<Configuration, DecodeError> {
    let generation = Generation(body.u32_le("generation")?);
    let members = members(body)?;
    let new_members = match body.u8("new members")? {
        0 => None,
        1 => Some(self::members(body)?),
        other => return Err(DecodeError::UnknownTag { what: "new members", value: other.into() }),
    };
    Ok(Configuration { generation, members, new_members })
}

fn members(body: &mut Reader) -> Result<Vec<Member>, DecodeError> {
    list(body, "members", |body| {
        let id = NodeId(body.u64_le("member id")?);
        Ok(Member { id, host: text(body, "member host")?, pg_port: body.u16_le("member port")? })
    })
}

fn creation_time(body: &mut Reader) -> Result<CreationTime, DecodeError> {
    let time = CreationTime {
        secs_since_epoch: body.u64_le("creation time")?,
        nanos_since_epoch: body.u32_le("creation time")?,
    };
    match time.nanos_since_epoch {
        0..1_000_000_000 => Ok(time),
        nanos => Err(DecodeError::Invalid("creation time", format!("{nanos} nanoseconds"))),
    }
}

#[cfg(test)]
mod tests;
