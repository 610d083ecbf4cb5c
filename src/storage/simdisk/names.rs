//! Names of files and directories, and which of them a crash leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::dice::Dice;

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir,
    /// The file of this number.
    File(usize),
}

/// A change of a name.
#[derive(Clone, Debug)]
pub enum NameChange {
    Added(PathBuf, Node),
    Removed(PathBuf),
    Renamed(PathBuf, PathBuf, Node),
}

impl NameChange {
    /// The directory whose sync makes the change durable.
    fn dir(&self) -> &Path {
        match self {
            NameChange::Added(path, _) | NameChange::Removed(path) | NameChange::Renamed(_, path, _) => {
                path.parent().unwrap()
            }
        }
    }
}

/// All names of a disk, twice.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// What processes see.
    pub nodes: BTreeMap<PathBuf, Node>,
    durable: BTreeMap<PathBuf, Node>,
    /// Changes that are not durable yet, oldest first.
    unsynced: Vec<NameChange>,
}

impl Names {
    /// A durable directory and those above it.
    pub fn add_durable_dir(&mut self, dir: &Path) {
        for ancestor in dir.ancestors() {
            self.nodes.insert(ancestor.to_owned(), Node::Dir);
            self.durable.insert(ancestor.to_owned(), Node::Dir);
        }
    }

    pub fn change(&mut self, change: NameChange) {
        apply(&mut self.nodes, change.clone());
        self.unsynced.push(change);
    }

    pub fn sync(&mut self, dir: &Path) {
        for change in self.unsynced.extract_if(.., |change| change.dir() == dir) {
            apply(&mut self.durable, change);
        }
    }

    pub fn sync_all(&mut self) {
        self.durable = self.nodes.clone();
        self.unsynced.clear();
    }

    /// Keeps what `dice` says of everything unsynced: within one directory a change survives only together with those
    /// before it.
    pub fn crash(&mut self, dice: &mut Dice) {
        let mut lost_dirs: BTreeSet<PathBuf> = BTreeSet::new();
        for change in std::mem::take(&mut self.unsynced) {
            if lost_dirs.contains(change.dir()) || !dice.roll() {
                lost_dirs.insert(change.dir().to_owned());
            } else {
                apply(&mut self.durable, change);
            }
        }
        let complete = |path: &Path| path.ancestors().all(|ancestor| self.durable.contains_key(ancestor));
        self.nodes = self.durable.iter().filter(|(path, _)| complete(path)).map(|(p, n)| (p.clone(), *n)).collect();
        self.durable = self.nodes.clone();
    }

    /// Files that have a name, or may have one after a crash.
    pub fn files(&self) -> BTreeSet<usize> {
        let unsynced = self.unsynced.iter().filter_map(|change| match change {
            NameChange::Added(_, node) | NameChange::Renamed(_, _, node) => Some(node),
            NameChange::Removed(_) => None,
        });
        let file = |node: &Node| if let Node::File(inode) = node { Some(*inode) } else { None };
        self.nodes.values().chain(self.durable.values()).chain(unsynced).filter_map(file).collect()
    }
}

fn apply(nodes: &mut BTreeMap<PathBuf, Node>, change: NameChange) {
    match change {
        NameChange::Added(path, node) => {
            nodes.insert(path, node);
        }
        NameChange::Removed(path) => nodes.retain(|other, _| !other.starts_with(&path)),
        NameChange::Renamed(from, to, node) => {
            // The new name leads to the file even where the old one never became durable.
            let moved: Vec<PathBuf> = nodes.keys().filter(|path| path.starts_with(&from)).cloned().collect();
            nodes.retain(|path, _| !path.starts_with(&to));
            nodes.insert(to.clone(), node);
            for path in moved {
                let below = path.strip_prefix(&from).unwrap().to_owned();
                let target = if below.as_os_str().is_empty() { to.clone() } else { to.join(below) };
                let node = nodes.remove(&path).unwrap();
                nodes.insert(target, node);
            }
        }
    }
}
