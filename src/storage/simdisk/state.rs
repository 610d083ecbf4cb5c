//! What a disk is at one moment, and what each operation changes.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::dice::Dice;
use super::faults::{Effect, Fault, Operation, OperationKind, Survivors};
use super::inode::Inode;
use super::names::{NameChange, Names, Node};
use super::pages::{PAGE, tear};

#[derive(Clone, Debug, Default)]
pub struct State {
    pub names: Names,
    pub inodes: Vec<Inode>,
    /// Changing operations so far, whatever became of them.
    pub log: Vec<Operation>,
    pub fault: Option<Fault>,
    /// What was being done when the disk stopped.
    pub in_flight: Option<Change>,
    /// Counts crashes; a file opened before the last one is of no use.
    pub epoch: u64,
    /// Most bytes that files may take.
    pub capacity: Option<u64>,
    /// Syncs do nothing.
    pub lies: bool,
    /// Longest delay of a durable write, and what decides.
    pub slow: Option<(Duration, Dice)>,
    /// The disk as it stood in each operation, for those who asked.
    pub record: Option<Vec<State>>,
}

/// What an operation changes.
#[derive(Clone, Debug)]
pub enum Change {
    Create { path: PathBuf, truncate: bool },
    Name(NameChange),
    Write { inode: usize, offset: usize, data: Vec<u8>, durable: bool },
    SetLen { inode: usize, len: usize },
    Sync { inode: usize },
    SyncDir { path: PathBuf },
    SyncFs,
}

impl State {
    /// Counts an operation and does it, or what its fault leaves of it.
    pub fn run(&mut self, kind: OperationKind, path: &Arc<Path>, change: Change) -> io::Result<()> {
        let number = self.log.len() as u64;
        self.log.push(Operation { kind, path: Arc::clone(path) });
        if let Some(mut record) = self.record.take() {
            let fault = Some(Fault::Stop { at: number });
            record.push(State { fault, in_flight: Some(change.clone()), ..self.clone() });
            self.record = Some(record);
        }
        match self.fault {
            Some(Fault::Stop { at }) if number >= at => {
                if number == at {
                    self.in_flight = Some(change);
                }
                Err(io::Error::other("the disk stopped"))
            }
            Some(Fault::Once { at, kind, effect }) if number == at => {
                self.fail(change, effect);
                Err(kind.into())
            }
            Some(Fault::Lie { at }) if number == at => {
                let lied = std::mem::replace(&mut self.lies, true);
                let outcome = self.perform(change);
                self.lies = lied;
                outcome
            }
            _ => self.perform(change),
        }
    }

    fn perform(&mut self, change: Change) -> io::Result<()> {
        match change {
            Change::Create { path, truncate } => self.create(path, truncate)?,
            Change::Name(change) => {
                if let NameChange::Added(..) = change {
                    self.require_space(1)?;
                }
                self.names.change(change);
            }
            Change::Write { inode, offset, data, durable } => {
                let (fitting, outcome) = self.fitting(inode, offset, data.len());
                self.write(inode, offset, &data[..fitting], durable);
                outcome?;
            }
            Change::SetLen { inode, len } => self.inodes[inode].set_len(len),
            Change::Sync { inode } if !self.lies => self.inodes[inode].sync(),
            Change::SyncDir { path } if !self.lies => {
                self.names.sync(&path);
                self.forget_removed();
            }
            Change::SyncFs if !self.lies => self.sync_all(),
            Change::Sync { .. } | Change::SyncDir { .. } | Change::SyncFs => {}
        }
        Ok(())
    }

    /// Does of `change` what its failing leaves.
    fn fail(&mut self, change: Change, effect: Effect) {
        let mut dice = match effect {
            Effect::Nothing => Dice::Never,
            Effect::Part(seed) => Dice::Seeded(seed),
            // What the disk is too full for isn't done either.
            Effect::Whole => return drop(self.perform(change)),
        };
        match change {
            Change::Write { .. } if effect == Effect::Nothing => {}
            Change::Write { inode, offset, data, durable } => {
                let (fitting, _) = self.fitting(inode, offset, data.len());
                let new = &data[..fitting];
                let torn = tear(&self.inodes[inode].replaced_by(new, offset), new, offset, &mut dice);
                self.write(inode, offset, &torn, durable);
            }
            Change::Sync { inode } if !self.lies => self.inodes[inode].sync_in_vain(&mut dice),
            Change::SyncFs if !self.lies => {
                for inode in &mut self.inodes {
                    inode.sync_in_vain(&mut dice);
                }
            }
            other => {
                if dice.roll() {
                    drop(self.perform(other));
                }
            }
        }
    }

    fn create(&mut self, path: PathBuf, truncate: bool) -> io::Result<()> {
        match self.names.nodes.get(&path).copied() {
            Some(Node::File(inode)) if truncate => self.inodes[inode].set_len(0),
            Some(_) => {}
            None => {
                self.require_space(1)?;
                let inode = self.inodes.len();
                self.inodes.push(Inode::default());
                self.names.change(NameChange::Added(path, Node::File(inode)));
            }
        }
        Ok(())
    }

    fn write(&mut self, inode: usize, offset: usize, data: &[u8], durable: bool) {
        if durable && !self.lies {
            self.inodes[inode].write_durably(data, offset);
        } else {
            self.inodes[inode].write(data, offset);
        }
    }

    /// How many of the bytes there is space for, and the error if that isn't all.
    fn fitting(&self, inode: usize, offset: usize, len: usize) -> (usize, io::Result<()>) {
        let Some(mut free) = self.free_pages() else { return (len, Ok(())) };
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            if self.inodes[inode].content.is_hole(page) {
                if free == 0 {
                    return ((page * PAGE).saturating_sub(offset), Err(ErrorKind::StorageFull.into()));
                }
                free -= 1;
            }
        }
        (len, Ok(()))
    }

    fn require_space(&self, pages: u64) -> io::Result<()> {
        if self.free_pages().is_some_and(|free| free < pages) { Err(ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn free_pages(&self) -> Option<u64> {
        Some(self.capacity?.saturating_sub(self.used()) / PAGE as u64)
    }

    /// Bytes that files take; holes take none.
    pub fn used(&self) -> u64 {
        let pages =
            |node: &Node| if let Node::File(inode) = node { self.inodes[*inode].content.allocated() } else { 0 };
        self.names.nodes.values().map(pages).sum::<usize>() as u64 * PAGE as u64
    }

    fn sync_all(&mut self) {
        self.names.sync_all();
        for inode in &mut self.inodes {
            inode.sync();
        }
        self.forget_removed();
    }

    /// Drops the content of files that neither a name nor a handle leads to.
    fn forget_removed(&mut self) {
        let named = self.names.files();
        for (number, inode) in self.inodes.iter_mut().enumerate() {
            if !named.contains(&number) && Arc::strong_count(&inode.handles) == 1 {
                *inode = Inode::default();
            }
        }
    }

    pub fn crash(&mut self, survivors: Survivors) {
        self.epoch += 1;
        self.fault = None;
        let mut dice = match survivors {
            Survivors::Nothing => Dice::Never,
            Survivors::Everything => Dice::Always,
            Survivors::Some(seed) => Dice::Seeded(seed),
        };
        if let Some(change) = self.in_flight.take() {
            let effect = match (survivors, dice.below(3)) {
                (Survivors::Nothing, _) | (Survivors::Some(_), 0) => Effect::Nothing,
                (Survivors::Everything, _) | (Survivors::Some(_), 1) => Effect::Whole,
                (Survivors::Some(seed), _) => Effect::Part(!seed),
            };
            // A sync that was interrupted loses nothing by itself: what follows decides about every page.
            let is_sync = matches!(change, Change::Sync { .. } | Change::SyncFs);
            if effect == Effect::Whole || !is_sync {
                self.fail(change, effect);
            }
        }
        // When only the process died, all is as it was, and nothing became durable by that.
        if survivors != Survivors::Everything {
            self.names.crash(&mut dice);
            for inode in &mut self.inodes {
                inode.crash(&mut dice);
            }
            self.forget_removed();
        }
    }
}
