//! A node as the daemon runs it: real acceptors over real stores, which perform what the acceptors decide in its order.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use pgproto::feedback::HotStandbyFeedback;
use pgproto::walproposer::{
    AcceptorMessage, AppendRequest, AppendResponse, Configuration, Member, ProposerElected, ProposerGreeting,
    ProposerMessage, VoteRequest, VoteResponse,
};
use pgproto::{Generation, Lsn, NodeId, Term};

use super::script::{Line, Script, TIMELINES};
use crate::consensus::acceptor::{Acceptor, AcceptorError, Action};
use crate::consensus::history::TermHistory;
use crate::storage::journal::JournalLimits;
use crate::storage::simdisk::SimDisk;
use crate::storage::test_wal::{PG_VERSION, SIZE, SYSTEM_ID, new_timeline};
use crate::storage::{
    CreateError, DataDir, DataDirError, DataDirOptions, OpenError, Recovered, StorageError, TimelineStore, WalReader,
};

/// Where the node's data are.
pub const ROOT: &str = "/data";

const NODE: NodeId = NodeId(1);

/// A journal so small that the life fills it several times. All batches are shorter than the longest, or long enough to
/// bypass it.
fn options() -> DataDirOptions {
    let journal = JournalLimits {
        file_size: 576 << 10,
        total: 3 * (576 << 10),
        reserve: 64 << 10,
        batch: 512 << 10,
        together: TIMELINES,
        ..JournalLimits::default()
    };
    DataDirOptions { journal, ..DataDirOptions::default() }
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The node did not start.
    #[error("the node does not start: {0}")]
    Start(#[from] DataDirError),
    /// The timeline was not created.
    #[error("not created: {0}")]
    Create(#[from] CreateError),
    /// The timeline was not loaded.
    #[error("not loaded: {0}")]
    Open(#[from] OpenError),
    /// Storage failed or refused.
    #[error("storage: {0}")]
    Storage(#[from] StorageError),
    /// The acceptor refused; nothing changed.
    #[error("acceptor: {0}")]
    Refused(#[from] AcceptorError),
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    pub dir: DataDir,
    pub slots: [Option<Slot>; TIMELINES],
}

impl Node {
    /// Starts on `disk`, with no timeline loaded.
    pub fn start(disk: &SimDisk) -> Result<Self, Failure> {
        let dir = DataDir::open_with(Arc::new(disk.clone()), Path::new(ROOT), Some(NODE), options())?;
        Ok(Self { dir, slots: Default::default() })
    }

    /// Loads all timelines it finds; those that cannot be loaded are reported and not there.
    pub async fn load(&mut self, script: &Script) -> Vec<(usize, Failure)> {
        let mut failures = Vec::new();
        let found = self.dir.timelines().unwrap();
        for (number, line) in script.lines.iter().enumerate() {
            if !found.contains(&line.ttid) {
                continue;
            }
            match TimelineStore::open(&self.dir, line.ttid).await {
                Ok((store, recovered)) => {
                    self.slots[number] = Some(Slot::new(recovered, store));
                }
                Err(error) => failures.push((number, Failure::Open(error))),
            }
        }
        failures
    }

    /// Brings all timelines up to date with the journal. A timeline that can't be says so itself.
    pub fn checkpoint(&self) {
        for (_, error) in self.dir.journal().checkpoint_now() {
            tracing::debug!("{error}");
        }
    }

    pub async fn create(&mut self, line: &Line, number: usize) -> Result<(), Failure> {
        let control = new_timeline(line.ttid);
        let (store, recovered) = TimelineStore::create(&self.dir, control).await?;
        self.slots[number] = Some(Slot::new(recovered, store));
        Ok(())
    }
}

/// One loaded timeline.
#[derive(Debug)]
pub struct Slot {
    pub acceptor: Acceptor,
    pub store: TimelineStore,
    batch: Vec<Bytes>,
    batch_start: Lsn,
}

impl Slot {
    fn new(recovered: Recovered, store: TimelineStore) -> Self {
        let mut acceptor = Acceptor::new(NODE, recovered.control, recovered.scanner);
        if let Some(fault) = recovered.fault {
            acceptor.report_fault(fault);
        }
        Self { acceptor, store, batch: Vec::new(), batch_start: Lsn::INVALID }
    }

    pub fn generation(&self) -> Generation {
        self.acceptor.durable_state().configuration.generation
    }

    pub async fn greet(&mut self, line: &Line) -> Result<Term, Failure> {
        let greeting = ProposerGreeting {
            ttid: line.ttid,
            configuration: Configuration::default(),
            pg_version: PG_VERSION,
            system_id: SYSTEM_ID,
            wal_seg_size: SIZE.as_u32(),
        };
        match self.handle(ProposerMessage::Greeting(greeting)).await? {
            Some(AcceptorMessage::Greeting(answer)) => Ok(answer.term),
            other => panic!("a greeting was answered with {other:?}"),
        }
    }

    pub async fn vote(&mut self, term: Term) -> Result<VoteResponse, Failure> {
        let request = VoteRequest { generation: self.generation(), term };
        match self.handle(ProposerMessage::VoteRequest(request)).await? {
            Some(AcceptorMessage::VoteResponse(answer)) => Ok(answer),
            other => panic!("a vote request was answered with {other:?}"),
        }
    }

    pub async fn configure(&mut self, generation: u32) -> Result<(), Failure> {
        let members = vec![Member { id: NODE, host: "node".into(), pg_port: 1 }];
        let configuration = Configuration { generation: Generation(generation), members, new_members: None };
        let actions = self.acceptor.switch_configuration(configuration)?;
        self.perform(actions).await?;
        Ok(())
    }

    pub async fn bump_term(&mut self) -> Result<Term, Failure> {
        let actions = self.acceptor.bump_term(None)?;
        self.perform(actions).await?;
        Ok(self.acceptor.term())
    }

    /// Where a leader with this history starts here.
    pub fn start_of(&self, line: &Line, history: &TermHistory) -> Lsn {
        let end = self.acceptor.flush_lsn();
        let own = self.acceptor.durable_state().term_history.visible_at(end);
        let common = crate::consensus::history::highest_common_point(history, &own, end).unwrap();
        common.map_or(line.start, |point| point.lsn)
    }

    pub async fn elect(&mut self, line: &Line, history: &TermHistory) -> Result<(), Failure> {
        let elected = ProposerElected {
            generation: self.generation(),
            term: history.last_term(),
            start_streaming_at: self.start_of(line, history),
            term_history: history.entries().to_vec(),
            // One of whom nothing is known goes on as the leader before.
            stock: history.entries().iter().rev().find_map(|entry| line.leaders.get(&entry.term)?.stock.clone()),
        };
        self.handle(ProposerMessage::Elected(elected)).await?;
        Ok(())
    }

    /// Sends WAL in two messages, and gets one answer.
    pub async fn append(&mut self, term: Term, wal: Bytes, commit: Lsn) -> Result<AppendResponse, Failure> {
        let middle = wal.len() / 3;
        // A full disk is met before the acceptor counts on the bytes.
        self.store.make_room(Lsn(self.acceptor.write_lsn().0 + wal.len() as u64))?;
        for wal in [wal.slice(..middle), wal.slice(middle..)] {
            let append = AppendRequest {
                generation: self.generation(),
                term,
                begin_lsn: self.acceptor.write_lsn(),
                commit_lsn: commit,
                truncate_lsn: Lsn::INVALID,
                wal,
            };
            if let Some(AcceptorMessage::AppendResponse(refusal)) = self.handle(ProposerMessage::Append(append)).await?
            {
                return Ok(refusal);
            }
        }
        let actions = self.acceptor.flush();
        self.perform(actions).await?;
        Ok(self.acceptor.append_response(term, HotStandbyFeedback::default())?)
    }

    pub async fn save_lazily(&mut self) -> Result<(), Failure> {
        let actions = self.acceptor.checkpoint();
        self.perform(actions).await?;
        Ok(())
    }

    async fn handle(&mut self, message: ProposerMessage) -> Result<Option<AcceptorMessage>, Failure> {
        let actions = self.acceptor.handle(message)?;
        self.perform(actions).await
    }

    /// As the timeline's writer does it.
    async fn perform(&mut self, actions: Vec<Action>) -> Result<Option<AcceptorMessage>, Failure> {
        match self.perform_in_order(actions).await {
            Err(error) if !error.is_fatal() => {
                self.batch.clear();
                let recovered = self.store.reload().await?;
                self.acceptor.fall_back(recovered.control, recovered.scanner);
                Err(error.into())
            }
            performed => Ok(performed?),
        }
    }

    async fn perform_in_order(&mut self, actions: Vec<Action>) -> Result<Option<AcceptorMessage>, StorageError> {
        let mut reply = None;
        for action in actions {
            match action {
                Action::Write { at, wal } => {
                    if self.batch.is_empty() {
                        self.batch_start = at;
                    }
                    self.batch.push(wal);
                }
                Action::Flush => self.write_out().await?,
                Action::Persist(state) => self.store.persist(&state).await?,
                Action::StoreHistory(files) => self.store.store_history(&files).await?,
                Action::InitFirstSegment { start } => self.store.init_first_segment(start).await?,
                Action::Truncate { end } => {
                    self.write_out().await?;
                    self.store.truncate(end).await?;
                }
                Action::Reply(message) => reply = Some(message),
            }
        }
        Ok(reply)
    }

    async fn write_out(&mut self) -> Result<(), StorageError> {
        if !self.batch.is_empty() {
            self.store.append(self.batch_start, &self.batch).await?;
            self.batch.clear();
        }
        Ok(())
    }

    /// Where WAL begins, some having been removed perhaps.
    pub fn first_lsn(&self, line: &Line) -> Lsn {
        line.start.max(self.store.files().oldest_lsn())
    }

    /// All WAL from `from` to `to`, or the first error.
    pub async fn read(&self, from: Lsn, to: Lsn) -> Result<Bytes, crate::storage::ReadError> {
        let mut reader = WalReader::new(self.store.files().clone(), self.acceptor.durable_state())?;
        let mut all = Vec::new();
        while from.0 + (all.len() as u64) < to.0 {
            all.extend_from_slice(&reader.read(Lsn(from.0 + all.len() as u64), to).await?);
        }
        Ok(all.into())
    }
}
