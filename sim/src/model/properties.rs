//! What must hold in every state (spec: semantics 5.1 and 5.3).
//!
//! Two checks look further than the present state, so that a search of few terms finds what would need many: what a
//! leader must have when it is elected, and what any majority would elect now.

use std::collections::BTreeSet;

use pgproto::walproposer::{Configuration, Member, Proposes};
use pgproto::{Generation, NodeId, Term};
use stateright::Property;

use super::Cluster;
use super::node::Node;
use super::state::State;
use super::wal::{index_of, lsn_of};

/// All of them, by number of the specification where they have one.
pub fn all() -> Vec<Property<Cluster>> {
    vec![
        Property::always("1 states are well-formed", |_, state: &State| well_formed(state)),
        Property::always("2 no two leaders share a term", |_, state: &State| leaders_differ(state)),
        Property::always("3 a term is won at most once", |_, state: &State| terms_won_once(state)),
        Property::always("4 a log's terms never decrease", |_, state: &State| logs_are_monotonic(state)),
        Property::always("5 committed records never differ", |_, state: &State| !state.committed.conflict),
        Property::always("5a a leader has all that was committed before its term", |_, state: &State| {
            leaders_are_complete(state)
        }),
        Property::always("5b any quorum would elect a leader that has all that is committed", |_, state: &State| {
            any_quorum_keeps_committed(state)
        }),
        Property::always("5c what a node calls committed is committed", |_, state: &State| {
            local_commits_are_true(state)
        }),
        Property::always("6 a generation is one configuration", |_, state: &State| generations_are_unique(state)),
        Property::always("9 a follower's log is a prefix of its leader's", |_, state: &State| followers_agree(state)),
        Property::always("11 a log's history says who wrote it", |_, state: &State| histories_are_true(state)),
        Property::always("22 horizon, commit and flush are in order", |_, state: &State| lsns_are_in_order(state)),
        Property::always("23 terms are in order", |_, state: &State| terms_are_in_order(state)),
        Property::always("26 a term begins at one place", |_, state: &State| term_starts_are_unique(state)),
        Property::always("28 what was acknowledged is durable", |_, state: &State| acknowledged_is_durable(state)),
        Property::always("D7 a commit that reaches the term start is saved", |_, state: &State| {
            commits_are_saved(state)
        }),
        Property::always(
            "F1 who is fenced off commits nothing beyond the end that was told",
            |cluster, state: &State| fenced_commit_no_more(cluster, state),
        ),
        Property::always("F2 the end found behind a fence is final", |cluster, state: &State| {
            final_ends_are_final(cluster, state)
        }),
        Property::always("F3 who follows a leader elected behind a fence has it", |_, state: &State| {
            followers_are_fenced(state)
        }),
        Property::always("24 no step breaks a promise", |_, state: &State| state.broken.is_none()),
    ]
}

fn well_formed(state: &State) -> bool {
    let aligned = |node: &Node| {
        let acceptor = node.acceptor();
        let lsns = [acceptor.flush_lsn(), acceptor.write_lsn(), acceptor.lazy_lsns().commit_lsn];
        lsns.into_iter().all(|lsn| index_of(lsn).is_some())
            // Memory and disk agree between two messages.
            && acceptor.durable_state() == node.control()
            && index_of(acceptor.flush_lsn()) == Some(node.flushed())
            && index_of(acceptor.write_lsn()) == Some(node.log().len())
    };
    state.present().all(|(_, node)| aligned(node))
}

fn leaders_differ(state: &State) -> bool {
    distinct(state.leaders().map(|(_, term)| term))
}

fn terms_won_once(state: &State) -> bool {
    distinct(state.candidates().filter_map(|candidate| candidate.elected).map(|(term, _)| term))
}

fn distinct(terms: impl Iterator<Item = Term>) -> bool {
    let mut seen = BTreeSet::new();
    terms.into_iter().all(|term| seen.insert(term))
}

fn logs_are_monotonic(state: &State) -> bool {
    let terms = |node: &Node| -> Vec<_> { node.log().authors().iter().map(|author| state.term_of(*author)).collect() };
    state.present().all(|(_, node)| terms(node).is_sorted())
}

fn leaders_are_complete(state: &State) -> bool {
    let committed = &state.committed;
    state.leaders().all(|(leader, term)| {
        let before = |index: &usize| committed.terms[*index] < term.0;
        (0..committed.log.len()).filter(before).all(|index| leader.log.author(index) == committed.log.author(index))
    })
}

/// Every quorum of nodes that could elect now: those of one generation, by its configuration. Power may be lost before
/// the vote, so what isn't durable doesn't count.
fn any_quorum_keeps_committed(state: &State) -> bool {
    if state.committed.log.is_empty() {
        return true;
    }
    state.issued.iter().all(|configuration| {
        let able: Vec<_> = state.present().filter(|(_, node)| on(node, configuration.generation)).collect();
        (1..1usize << able.len()).all(|choice| {
            let voters =
                || able.iter().enumerate().filter(move |(bit, _)| choice >> bit & 1 == 1).map(|(_, node)| *node);
            if !is_quorum(configuration, state.nodes.len(), |id| voters().any(|(index, _)| id.0 == index as u64 + 1)) {
                return true;
            }
            let Some(best) = voters().map(|(_, node)| node.rank()).max() else { return true };
            let mut donors = voters().filter(|(_, node)| node.rank() == best);
            donors.all(|(_, node)| has_all_committed(state, node))
        })
    })
}

fn on(node: &Node, generation: Generation) -> bool {
    node.control().configuration.generation == generation
}

fn has_all_committed(state: &State, node: &Node) -> bool {
    let (log, committed) = (node.durable_log(), &state.committed.log);
    log.len() >= committed.len() && log.agrees_with(committed)
}

/// Written apart from the code under test.
fn is_quorum(configuration: &Configuration, nodes: usize, has: impl Fn(NodeId) -> bool) -> bool {
    let enough = |set: &[Member]| set.iter().filter(|member| has(member.id)).count() * 2 > set.len();
    if configuration.generation == Generation(0) {
        let all = (1..=nodes as u64).map(NodeId);
        return all.filter(|id| has(*id)).count() * 2 > nodes;
    }
    enough(&configuration.members) && configuration.new_members.as_deref().is_none_or(enough)
}

fn local_commits_are_true(state: &State) -> bool {
    state.present().all(|(_, node)| {
        let Some(commit) = index_of(node.acceptor().lazy_lsns().commit_lsn) else { return false };
        let committed = &state.committed.log;
        commit <= committed.len() && node.log().prefix(commit).agrees_with(committed) && commit <= node.log().len()
    })
}

fn generations_are_unique(state: &State) -> bool {
    let known = state.present().map(|(_, node)| &node.control().configuration);
    known.chain(state.issued.iter()).all(|one| {
        let mut issued = state.issued.iter().filter(|other| other.generation == one.generation);
        issued.all(|other| other == one)
    })
}

/// Once it was cut by its leader, which its history shows.
fn followers_agree(state: &State) -> bool {
    state.leaders().all(|(leader, term)| {
        let mut followers = state
            .present()
            .filter(|(_, node)| node.control().term == term && node.control().term_history.last_term() == term);
        followers.all(|(_, node)| node.log().len() <= leader.log.len() && node.log().agrees_with(&leader.log))
    })
}

fn histories_are_true(state: &State) -> bool {
    state.present().all(|(_, node)| {
        let entries = node.control().term_history.entries();
        node.log().authors().iter().enumerate().all(|(index, author)| {
            let told = entries.iter().rev().find(|entry| entry.lsn <= lsn_of(index)).map(|entry| entry.term);
            told == state.term_of(*author)
        })
    })
}

fn lsns_are_in_order(state: &State) -> bool {
    state.present().all(|(_, node)| {
        let lazy = node.acceptor().lazy_lsns();
        let flush_lsn = node.acceptor().flush_lsn();
        lazy.peer_horizon_lsn <= lazy.commit_lsn
            && lazy.commit_lsn <= flush_lsn
            && lazy.backup_lsn <= lazy.commit_lsn
            && lazy.remote_consistent_lsn <= lazy.commit_lsn
    })
}

fn terms_are_in_order(state: &State) -> bool {
    state.present().all(|(_, node)| {
        let history = node.control().term_history.entries();
        let rising = history.windows(2).all(|pair| pair[0].term < pair[1].term && pair[0].lsn <= pair[1].lsn);
        rising && node.control().term >= node.rank().last_log_term
    })
}

fn term_starts_are_unique(state: &State) -> bool {
    state.present().all(|(_, node)| {
        node.control().term_history.entries().iter().all(|entry| {
            let mut won = state.candidates().filter_map(|candidate| candidate.elected);
            won.all(|(term, start)| term != entry.term || start == entry.lsn)
        })
    })
}

/// A server that starts relies on it.
fn commits_are_saved(state: &State) -> bool {
    state.present().all(|(_, node)| {
        let (commit, start) = (node.acceptor().lazy_lsns().commit_lsn, node.acceptor().term_start_lsn());
        commit < start || node.control().commit_lsn >= start
    })
}

/// A leader's belief holds for as long as the node is in its term.
fn acknowledged_is_durable(state: &State) -> bool {
    state.leaders().all(|(leader, term)| {
        state
            .present()
            .filter(|(_, node)| node.control().term == term)
            .all(|(index, node)| leader.acknowledged(index) <= node.durable_log().end())
    })
}

/// A majority told where its logs end. Only what was acknowledged before that can be declared committed.
fn fenced_commit_no_more(cluster: &Cluster, state: &State) -> bool {
    state.candidates().enumerate().all(|(index, candidate)| {
        let end = state.fenced_end(cluster.bounds.proposes(index));
        end.is_none_or(|end| candidate.committed() <= end)
    })
}

/// What an operator tells as the end below which every acknowledged commit is.
fn final_ends_are_final(cluster: &Cluster, state: &State) -> bool {
    let found = state.candidates().filter_map(|candidate| Some((candidate.behind_fence?, candidate.final_end?)));
    found.into_iter().all(|(fence, end)| {
        state.candidates().enumerate().all(|(index, candidate)| {
            let fenced_off = match cluster.bounds.proposes(index) {
                Proposes::Nothing => false,
                Proposes::Untold => true,
                Proposes::WalOf(primary) => primary <= fence,
            };
            !fenced_off || candidate.committed() <= end
        })
    })
}

/// Also those that were away when the fence was set: else nodes that lose their disks, one after the other, would lift it.
fn followers_are_fenced(state: &State) -> bool {
    state.leaders().all(|(leader, term)| {
        let follows = |node: &Node| node.control().term == term && node.control().term_history.last_term() == term;
        let mut followers = state.present().filter(|(_, node)| follows(node));
        followers.all(|(_, node)| {
            let fence = node.control().stock.fence.map(|fence| fence.pg_timeline);
            fence >= leader.behind_fence
        })
    })
}
