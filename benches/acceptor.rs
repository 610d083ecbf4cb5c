//! What one acceptor costs outside the disk: CPU time per message, of the checks, the state and the actions it hands out.
//! Aim: a few microseconds for a small append. Besides, what the passes over the bytes cost.
//!
//! ```text
//! cargo bench --bench acceptor [FILTER]
//! ```

#[allow(dead_code, reason = "each benchmark uses a part")]
mod wal;

use bytes::Bytes;
use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use pgproto::feedback::HotStandbyFeedback;
use pgproto::wal::RecordScanner;
use pgproto::walproposer::{
    AppendRequest, Configuration, ProposerElected, ProposerGreeting, ProposerMessage, TermLsn, VoteRequest,
};
use pgproto::{Generation, Lsn, NodeId, SegmentSize, TenantId, TenantTimelineId, Term, TimelineId};
use safekeeper::consensus::acceptor::Acceptor;
use safekeeper::consensus::state::{ControlState, ServerInfo};
use wal::{PG_VERSION, SYSTEM_ID, WalStream};

const SIZES: [usize; 4] = [64, 1024, 8192, 131_072];
const START: Lsn = Lsn(0x200_0000);
const GENERATION: Generation = Generation(0);
/// Terms in the history: a timeline that has seen some failovers.
const TERMS: u64 = 10;

fn main() {
    divan::main();
}

fn ttid() -> TenantTimelineId {
    TenantTimelineId::new(TenantId([1; 16]), TimelineId([2; 16]))
}

fn segment_size() -> SegmentSize {
    SegmentSize::new(16 << 20).unwrap_or(SegmentSize::MIN)
}

/// A timeline without WAL that has promised `term`.
fn acceptor(term: Term) -> Acceptor {
    let server = ServerInfo { pg_version: PG_VERSION, system_id: SYSTEM_ID, wal_seg_size: segment_size() };
    let mut acceptor = Acceptor::new(NodeId(1), ControlState::new(ttid(), server), None);
    accepted(acceptor.bump_term(Some(term)));
    acceptor
}

fn elected_message() -> ProposerMessage {
    let entry = |number: u64| TermLsn { term: Term(number), lsn: START };
    ProposerMessage::Elected(ProposerElected {
        generation: GENERATION,
        term: Term(TERMS),
        start_streaming_at: START,
        term_history: (1..=TERMS).map(entry).collect(),
        stock: None,
    })
}

/// One that follows a leader, and that leader's WAL.
fn following() -> (Acceptor, WalStream) {
    let mut acceptor = acceptor(Term(TERMS));
    accepted(acceptor.handle(elected_message()));
    (acceptor, WalStream::new(START, segment_size()))
}

/// What was handed out; a refusal would make the figures those of another path.
fn accepted<T, E: std::fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| panic!("refused: {error}"))
}

fn append(begin_lsn: Lsn, wal: Bytes) -> ProposerMessage {
    let (generation, term) = (GENERATION, Term(TERMS));
    ProposerMessage::Append(AppendRequest {
        generation,
        term,
        begin_lsn,
        commit_lsn: begin_lsn,
        truncate_lsn: START,
        wal,
    })
}

/// An append alone: handled, flushed, acknowledged. The commit LSN follows one append behind.
#[divan::bench(args = SIZES)]
fn one_append(bencher: Bencher, size: usize) {
    let (mut acceptor, mut stream) = following();
    let messages = || {
        let begin = stream.position();
        append(begin, stream.message(size))
    };
    bencher.counter(BytesCount::new(size)).with_inputs(messages).bench_local_values(|message| {
        let actions = (accepted(acceptor.handle(message)), acceptor.flush());
        (actions, acceptor.append_response(Term(TERMS), HotStandbyFeedback::default()))
    });
}

/// A heartbeat: an append without WAL.
#[divan::bench]
fn heartbeat(bencher: Bencher) {
    let (mut acceptor, _) = following();
    bencher.with_inputs(|| append(START, Bytes::new())).bench_local_values(|message| {
        let actions = (accepted(acceptor.handle(message)), acceptor.flush());
        (actions, acceptor.append_response(Term(TERMS), HotStandbyFeedback::default()))
    });
}

#[divan::bench]
fn greeting(bencher: Bencher) {
    let (mut acceptor, _) = following();
    let message = || {
        ProposerMessage::Greeting(ProposerGreeting {
            ttid: ttid(),
            configuration: Configuration::default(),
            pg_version: PG_VERSION,
            system_id: SYSTEM_ID,
            wal_seg_size: segment_size().as_u32(),
        })
    };
    bencher.with_inputs(message).bench_local_values(|message| accepted(acceptor.handle(message)));
}

/// A vote given, of ever higher terms.
#[divan::bench]
fn vote(bencher: Bencher) {
    let (mut acceptor, _) = following();
    let mut term = Term(TERMS);
    let message = || {
        term = term.next();
        ProposerMessage::VoteRequest(VoteRequest { generation: GENERATION, term })
    };
    bencher.with_inputs(message).bench_local_values(|message| accepted(acceptor.handle(message)));
}

/// A leader accepted by a timeline without WAL.
#[divan::bench]
fn elected(bencher: Bencher) {
    let voted = acceptor(Term(TERMS));
    bencher
        .with_inputs(|| (voted.clone(), elected_message()))
        .bench_local_values(|(mut acceptor, message)| (accepted(acceptor.handle(message)), acceptor));
}

/// The pass over the bytes that finds record boundaries and checks each record's checksum.
#[divan::bench(args = SIZES)]
fn scan(bencher: Bencher, size: usize) {
    let mut stream = WalStream::new(START, segment_size());
    let mut scanner = RecordScanner::new(START, segment_size(), PG_VERSION);
    bencher
        .counter(BytesCount::new(size))
        .with_inputs(|| stream.message(size))
        .bench_local_values(|wal| accepted(scanner.feed(&wal)));
}

/// The checksum alone, as it is used for records, blocks of the ledger and batches of the journal.
#[divan::bench(args = SIZES)]
fn crc32c(bencher: Bencher, size: usize) {
    let bytes = WalStream::new(START, segment_size()).message(size);
    bencher.counter(BytesCount::new(size)).bench_local(|| crc32c::crc32c_append(0, black_box(&bytes)));
}
