//! The safekeeper's own path, from the hand-over of a proposer's message to its acknowledgement: registry, lanes, writer,
//! storage, as the daemon puts them together. Only the network is left out.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use pgproto::walproposer::{AppendRequest, ProposerElected, ProposerMessage, Proposes, TermLsn, VoteRequest};
use pgproto::{Generation, Lsn, NodeId, SegmentSize, TenantId, TenantTimelineId, Term, TimelineId};
use safekeeper::consensus::state::{ControlState, ServerInfo};
use safekeeper::lanes::{Lane, Lanes};
use safekeeper::storage::DataDir;
use safekeeper::timeline::push::{Ack, PushSession};
use safekeeper::timeline::registry::Registry;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use super::measure::Acks;
use super::wal::{PG_VERSION, SYSTEM_ID, WalStream};

const TERM: Term = Term(1);
const GENERATION: Generation = Generation(0);
/// Twice the journal's length: after so many bytes it has all its files and begins to use them again.
const WARM_UP: u64 = 512 << 20;
/// Bytes per append meanwhile.
const WARM_UP_APPEND: usize = 64 << 10;
/// Where WAL begins, a segment's start for every size of segments.
pub const START: Lsn = Lsn(1 << 32);

/// A node with some timelines, each with a proposer that was elected.
pub struct Node {
    proposers: Vec<Proposer>,
    // Dropped after those who use it.
    _registry: Arc<Registry>,
    runtime: Runtime,
}

/// A proposer's connection, and the WAL of its server.
struct Proposer {
    lane: Lane,
    session: PushSession,
    acks: watch::Receiver<Ack>,
    stream: WalStream,
    acked: Lsn,
}

impl Node {
    /// Starts a node in the new directory `dir`, with syncs.
    pub fn start(dir: &Path, timelines: usize, segment_size: SegmentSize, lanes: usize) -> Result<Self> {
        std::fs::create_dir(dir)?;
        let runtime = Runtime::new()?;
        let (registry, proposers) = runtime.block_on(async {
            let data_dir = DataDir::open(dir, Some(NodeId(1)), true)?;
            let registry = Registry::load(data_dir, Lanes::start(lanes)?).await?;
            let mut proposers = Vec::with_capacity(timelines);
            for number in 0..timelines {
                proposers.push(Proposer::elected(&registry, number, segment_size).await?);
            }
            anyhow::Ok((registry, proposers))
        })?;
        Ok(Self { proposers, _registry: registry, runtime })
    }

    /// Writes until the journal is as it will be for the rest of the node's life.
    pub fn warm_up(&mut self) -> Result<()> {
        let mut bytes = 0;
        while bytes < WARM_UP {
            bytes += self.run(WARM_UP_APPEND, Duration::from_millis(50))?.bytes();
        }
        Ok(())
    }

    /// Every proposer appends `size` bytes, waits until they are acknowledged, and starts again.
    pub fn run(&mut self, size: usize, duration: Duration) -> Result<Acks> {
        let deadline = Instant::now() + duration;
        let running: Vec<_> = self
            .proposers
            .drain(..)
            .map(|proposer| proposer.lane.clone().spawn(proposer.append_until(deadline, size)))
            .collect();
        let mut all = Acks::default();
        for task in running {
            let (proposer, acks) = self.runtime.block_on(task)??;
            self.proposers.push(proposer);
            all.merge(acks);
        }
        Ok(all)
    }

    /// The first proposer sends all of `wal` without waiting; returns when all of it is acknowledged.
    pub fn ingest(&mut self, wal: &[Bytes]) -> Result<Acks> {
        let proposer = self.proposers.pop().context("a node without timelines")?;
        let lane = proposer.lane.clone();
        self.runtime.block_on(lane.spawn(proposer.ingest(wal.to_vec())))?
    }
}

impl Proposer {
    async fn elected(registry: &Arc<Registry>, number: usize, wal_seg_size: SegmentSize) -> Result<Self> {
        let mut timeline_id = [0; 16];
        timeline_id[8..].copy_from_slice(&(number as u64).to_be_bytes());
        let ttid = TenantTimelineId::new(TenantId([7; 16]), TimelineId(timeline_id));
        let server = ServerInfo { pg_version: PG_VERSION, system_id: SYSTEM_ID, wal_seg_size };
        let timeline = registry.get_or_create(ControlState::new(ttid, server)).await?;
        let session = PushSession::open(&timeline, u32::try_from(number)?, Proposes::Untold)?;
        session.handle(ProposerMessage::VoteRequest(VoteRequest { generation: GENERATION, term: TERM })).await?;
        let elected = ProposerElected {
            generation: GENERATION,
            term: TERM,
            start_streaming_at: START,
            term_history: vec![TermLsn { term: TERM, lsn: START }],
            stock: None,
        };
        session.handle(ProposerMessage::Elected(elected)).await?;
        let acks = session.acks();
        let stream = WalStream::new(START, wal_seg_size);
        Ok(Self { lane: registry.lane(Some(ttid)), session, acks, stream, acked: START })
    }

    async fn append_until(mut self, deadline: Instant, size: usize) -> Result<(Self, Acks)> {
        let mut acks = Acks::default();
        loop {
            let begin = self.stream.position();
            let wal = self.stream.message(size);
            let length = wal.len();
            let started = Instant::now();
            self.send(begin, wal).await?;
            self.acknowledged(self.stream.position()).await?;
            let now = Instant::now();
            acks.record(now - started, length);
            if now >= deadline {
                return Ok((self, acks));
            }
        }
    }

    async fn ingest(mut self, wal: Vec<Bytes>) -> Result<Acks> {
        let mut acks = Acks::default();
        let started = Instant::now();
        let mut position = START;
        for message in wal {
            let begin = position;
            position = Lsn(begin.0 + message.len() as u64);
            self.send(begin, message).await?;
        }
        self.acknowledged(position).await?;
        acks.record(started.elapsed(), usize::try_from(position.0 - START.0)?);
        Ok(acks)
    }

    async fn send(&self, begin_lsn: Lsn, wal: Bytes) -> Result<()> {
        let append = AppendRequest {
            generation: GENERATION,
            term: TERM,
            begin_lsn,
            commit_lsn: self.acked,
            truncate_lsn: START,
            wal,
        };
        self.session.handle(ProposerMessage::Append(append)).await?;
        Ok(())
    }

    async fn acknowledged(&mut self, end: Lsn) -> Result<()> {
        while self.acked < end {
            if self.acks.changed().await.is_err() {
                return Err(self.session.writer_gone().await.into());
            }
            match &*self.acks.borrow_and_update() {
                Ack::None => {}
                Ack::Response(response) if response.term == TERM => self.acked = response.flush_lsn,
                Ack::Response(response) => bail!("deposed by term {}", response.term),
                Ack::Refused(error) => bail!("refused: {error}"),
            }
        }
        Ok(())
    }
}
