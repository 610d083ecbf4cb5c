//! A service that keeps the write-ahead log of PostgreSQL servers safe on a quorum of nodes.
//!
//! The rooms of the house, from the front door down. A room may use those below it, never those above; a test compares.
//!
//! | Room | What it promises |
//! |---|---|
//! | [`daemon`] | what every daemon does around its work: ports, signals, the service manager |
//! | [`config`] | the settings of all programs |
//! | [`operate`] | what an operator does across nodes and servers: failover, switchover |
//! | [`drain`] | takes a safekeeper out, step by step |
//! | [`http`] | the management API and `/metrics` |
//! | [`server`] | the Postgres-protocol endpoint |
//! | [`propose`] | follows a stock primary and proposes its WAL to the quorum |
//! | [`receive`] | follows a log across safekeepers into a directory, a stream or an embedder |
//! | [`peers`] | what safekeepers tell each other |
//! | [`client`] | the client side of the Postgres protocol |
//! | [`timeline`] | one replicated log: its single writer, readers, registry |
//! | [`storage`] | WAL and control file on disk, over one `Disk` seam |
//! | [`consensus`] | acceptor and proposer as pure state machines |
//! | [`metrics`] | what is counted and measured |
//! | [`shutdown`] | which step of a shutdown comes when, for all that take part |
//! | [`lanes`] | the threads on which timelines and their proposers' connections live |
//! | [`retry`] | how long to wait before trying again |
//! | [`clock`] | the time of day |

pub mod client;
pub mod clock;
pub mod config;
pub mod consensus;
pub mod daemon;
pub mod drain;
pub mod http;
pub mod lanes;
pub mod metrics;
pub mod operate;
pub mod peers;
pub mod propose;
pub mod receive;
pub mod retry;
pub mod server;
pub mod shutdown;
pub mod storage;
pub mod timeline;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    /// All files of a room but its tests, which may look at anything.
    fn files_of(room: &Path) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(room) else { return vec![room.with_extension("rs")] };
        let paths = entries.map(|entry| entry.unwrap().path());
        let own = paths.filter(|path| !path.file_stem().unwrap().to_string_lossy().ends_with("tests"));
        own.flat_map(|path| if path.is_dir() { files_of(&path) } else { vec![path] }).collect()
    }

    #[test]
    fn rooms_use_only_rooms_below_them() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let page = include_str!("lib.rs").lines();
        let rooms: Vec<&str> =
            page.clone().filter_map(|line| line.strip_prefix("//! | [`")?.split('`').next()).collect();
        for module in page.filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')) {
            assert!(rooms.contains(&module), "{module} is not in the table");
        }
        for (index, room) in rooms.iter().enumerate() {
            for file in files_of(&src.join(room)) {
                let text = fs::read_to_string(&file).unwrap();
                let code = text.lines().map(|line| line.split("//").next().unwrap());
                let used = code.flat_map(|line| line.split("crate::").skip(1));
                let used = used.filter_map(|rest| rest.split(|c: char| c != '_' && !c.is_ascii_alphanumeric()).next());
                let above = used.filter_map(|name| rooms.iter().position(|room| *room == name)).find(|at| *at < index);
                let above = above.map(|at| rooms[at]);
                assert!(
                    above.is_none(),
                    "{} is above {room}, and used in {}",
                    above.unwrap_or_default(),
                    file.display()
                );
            }
        }
    }
}
