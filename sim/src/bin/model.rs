//! Searches every state of a small cluster of real acceptors and proposers for one that breaks a promise.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use pgproto::PgTimelineId;
use pgproto::walproposer::Proposes;
use safekeeper_sim::model::bounds::{Bounds, Network};
use safekeeper_sim::model::search::Search;

/// Searches every state of a small cluster of real acceptors and proposers for one that breaks a promise.
///
/// Ends with 1 and the steps that lead there if it finds one. The defaults are the smallest bounds that mean anything.
#[derive(Parser)]
#[command(name = "model", max_term_width = 110)]
struct Options {
    /// What the network does: a request and its answer at once; ordered streams; any order and twice.
    #[arg(long, value_enum, default_value_t = NetworkName::Exchange)]
    network: NetworkName,
    /// Elections that may be tried; a proposer that restarts tries another.
    #[arg(long, default_value_t = 2)]
    elections: u8,
    /// What each of these proposers says that it proposes, in the order in which they start: WAL of a primary on a Postgres timeline (its
    /// number), nothing (sync), or it doesn't say (untold). There are as many elections as are listed here.
    #[arg(long, value_delimiter = ',', value_parser = proposes)]
    proposes: Vec<Proposes>,
    /// Postgres timelines that an operator fences off, each on all nodes, at any time.
    #[arg(long, value_delimiter = ',', conflicts_with = "new_members")]
    fence: Vec<u32>,
    /// Records that each leader may write.
    #[arg(long, default_value_t = 1)]
    records: usize,
    /// Times that a node loses power.
    #[arg(long, default_value_t = 0)]
    crashes: u8,
    /// Times that a connection breaks (exchange) or is made again (streams, datagrams).
    #[arg(long, default_value_t = 0)]
    breaks: u8,
    /// Times that a message arrives twice (datagrams only).
    #[arg(long, default_value_t = 0)]
    duplicates: u8,
    /// Times that a term is raised by hand.
    #[arg(long, default_value_t = 0)]
    bumps: u8,
    /// A proposer starts when the one before is gone for good.
    #[arg(long)]
    successive: bool,
    /// Nodes make WAL durable as they get it, not some time later.
    #[arg(long)]
    sync: bool,
    /// Peer horizons and saved commit LSNs travel along.
    #[arg(long)]
    hints: bool,
    /// Appends under way to one node (streams and datagrams).
    #[arg(long, default_value_t = 1)]
    in_flight: usize,
    /// Numbers of the members at first.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    members: Vec<u64>,
    /// Numbers of the members after a change of membership.
    #[arg(long, value_delimiter = ',')]
    new_members: Vec<u64>,
    /// Configurations that may be issued: joint, then final or aborted.
    #[arg(long, default_value_t = 2)]
    reconfigurations: u8,
    /// Breadth first: the shortest counterexample, for more memory.
    #[arg(long)]
    shortest: bool,
    /// Threads that search.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Seconds after which to give up; what was seen until then is told.
    #[arg(long)]
    limit: Option<u64>,
}

fn proposes(text: &str) -> Result<Proposes, String> {
    match text {
        "untold" => Ok(Proposes::Untold),
        "sync" => Ok(Proposes::Nothing),
        number => number
            .parse()
            .map(|timeline| Proposes::WalOf(PgTimelineId(timeline)))
            .map_err(|_| "the number of a Postgres timeline, sync or untold".to_owned()),
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum NetworkName {
    Exchange,
    Streams,
    Datagrams,
}

fn main() -> ExitCode {
    let options = Options::parse();
    // A broken assertion of the code under test is told as a counterexample.
    std::panic::set_hook(Box::new(|_| {}));
    let network = match options.network {
        NetworkName::Exchange => Network::Exchange,
        NetworkName::Streams => Network::Streams,
        NetworkName::Datagrams => Network::Datagrams,
    };
    let bounds = Bounds {
        elections: match u8::try_from(options.proposes.len()) {
            Ok(0) | Err(_) => options.elections,
            Ok(listed) => listed,
        },
        proposes: options.proposes,
        fences: options.fence.into_iter().map(PgTimelineId).collect(),
        records: options.records,
        crashes: options.crashes,
        breaks: options.breaks,
        duplicates: options.duplicates,
        bumps: options.bumps,
        successive: options.successive,
        sync: options.sync,
        hints: options.hints,
        in_flight: options.in_flight,
        members: options.members,
        reconfigurations: if options.new_members.is_empty() { 0 } else { options.reconfigurations },
        new_members: options.new_members,
        ..Bounds::new(network)
    };
    let search = Search {
        breadth_first: options.shortest,
        threads: options.threads,
        limit: options.limit.map(Duration::from_secs),
    };
    let outcome = search.run(bounds, |states, depth, took| {
        eprintln!("{:5} s: {states} states, depth {depth}", took.as_secs());
    });
    print!("{outcome}");
    if outcome.failure.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
