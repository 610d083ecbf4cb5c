//! One segment file while it is written.
//!
//! Bytes that are there already are not written again but compared: those of the file that is continued, and those of
//! other files of the same segment, such as one that is compressed in another way or that of the timeline before. Only what
//! [is WAL for certain](super::archive::prove) counts as being there; what a crash left behind it is written over.
//!
//! A plain file is continued where it ends. A compressed one can't be: it is made again from its begin, under a name with
//! `.new` behind it, and replaces the old one when it is whole or closed and holds as much.

use std::io::{self, IoSlice, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgproto::wal::RecordScanner;
use pgproto::{Ancestry, Lsn, PgTimelineId, SegmentNumber, SegmentSize};

use super::archive::{self, ArchiveFile, Salvage, prove, read_full};
use super::compression::{Compression, Encoder, Method};
use crate::receive::SinkError;
use crate::storage::{Disk, DiskFile};

/// Behind the name of a compressed file that is made again. Other programs take no notice of such a name.
pub(super) const ASIDE_SUFFIX: &str = ".new";

/// Where the files are and how they are written.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub disk: Arc<dyn Disk>,
    pub dir: PathBuf,
    pub compression: Compression,
    pub size: SegmentSize,
}

/// A segment that is being written, from its begin to its end.
pub(super) struct Segment {
    place: Place,
    timeline: PgTimelineId,
    number: SegmentNumber,
    position: Lsn,
    there: Vec<There>,
    /// End of what was there, of all files.
    there_to: Lsn,
    output: Output,
}

/// Where the bytes go.
enum Output {
    /// Nowhere: the whole segment is there.
    Nowhere,
    /// Into a plain file, but for those in the range, which are in it.
    Plain { file: Arc<dyn DiskFile>, kept: (Lsn, Lsn) },
    /// Through a compressor. `aside`: under the name that doesn't count yet.
    Compressed { file: Arc<dyn DiskFile>, encoder: Box<Encoder>, length: u64, aside: bool },
}

/// Bytes that are there already, in `[from, to)`.
struct There {
    name: String,
    source: Salvage,
    from: Lsn,
    to: Lsn,
}

impl Place {
    /// The path of a file.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes names durable.
    pub(super) fn sync_dir(&self) -> Result<(), SinkError> {
        self.disk.sync_dir(&self.dir).during("cannot sync directory", &self.dir)
    }

    /// The files of a segment that are there.
    pub(super) fn files_of(
        &self,
        timeline: PgTimelineId,
        number: SegmentNumber,
    ) -> Result<Vec<ArchiveFile>, SinkError> {
        let mut found = Vec::new();
        for whole in [true, false] {
            for method in Method::ALL {
                let file = ArchiveFile::new(timeline, number, self.size, method, whole);
                let path = self.path(&file.name());
                if self.disk.exists(&path).during("cannot look for", &path)? {
                    found.push(file);
                }
            }
        }
        Ok(found)
    }

    /// Opens a file to read the segment in it.
    pub(super) fn open(&self, file: &ArchiveFile) -> Result<Box<dyn Read + Send>, SinkError> {
        archive::open(&*self.disk, &self.dir, file).during("cannot open", &self.path(&file.name()))
    }

    /// Same, of a file that may have been cut or damaged by a crash.
    pub(super) fn salvage(&self, file: &ArchiveFile) -> Result<Salvage, SinkError> {
        Salvage::new(self.disk.clone(), &self.dir, *file).during("cannot open", &self.path(&file.name()))
    }

    /// Which part of a file is there for certain. `scanner` as for [`prove`].
    fn there(&self, file: &ArchiveFile, mut scanner: RecordScanner, until: Lsn) -> Result<Option<There>, SinkError> {
        let proven = prove(&mut self.salvage(file)?, &mut scanner, self.size);
        let (from, to) = (proven.from, proven.to.min(until));
        let there = There { name: file.name(), source: self.salvage(file)?, from, to };
        Ok((from < to).then_some(there))
    }
}

impl Segment {
    /// Opens the segment that begins at `scanner`'s position. `scanner` has seen what comes before it, or nothing. `ancestry`
    /// is that of the timeline, if it is known.
    pub(super) fn open(
        place: &Place,
        timeline: PgTimelineId,
        scanner: &RecordScanner,
        ancestry: Option<&Ancestry>,
    ) -> Result<Self, SinkError> {
        let number = SegmentNumber::containing(scanner.position(), place.size);
        let mut segment = Self {
            place: place.clone(),
            timeline,
            number,
            position: number.start(place.size),
            there: Vec::new(),
            there_to: Lsn::INVALID,
            output: Output::Nowhere,
        };
        let files = place.files_of(timeline, number)?;
        for file in &files {
            segment.compare_with(file, scanner, Lsn::MAX)?;
        }
        for older in ancestry.into_iter().flat_map(Ancestry::branches).filter(|branch| branch.timeline < timeline) {
            let end = ancestry.and_then(|ancestry| ancestry.successor(older.timeline));
            let end = end.map_or(Lsn::INVALID, |next| next.begin);
            if end > segment.position {
                for file in &place.files_of(older.timeline, number)? {
                    segment.compare_with(file, scanner, end)?;
                }
            }
        }
        if !files.iter().any(|file| file.whole) {
            segment.output = segment.create(&files)?;
        }
        Ok(segment)
    }

    fn compare_with(&mut self, file: &ArchiveFile, scanner: &RecordScanner, until: Lsn) -> Result<(), SinkError> {
        if let Some(there) = self.place.there(file, scanner.clone(), until)? {
            self.there_to = self.there_to.max(there.to);
            self.there.push(there);
        }
        Ok(())
    }

    /// The file that is written.
    fn target(&self, whole: bool) -> ArchiveFile {
        let method = self.place.compression.method();
        ArchiveFile::new(self.timeline, self.number, self.place.size, method, whole)
    }

    fn create(&self, files: &[ArchiveFile]) -> Result<Output, SinkError> {
        let name = self.target(false).name();
        let exists = files.contains(&self.target(false));
        let path = self.place.path(&name);
        let encoder = self.place.compression.encoder().during("cannot compress", &path)?;
        let output = match encoder {
            None => self.create_plain(&path, &name)?,
            Some(encoder) => {
                if exists {
                    // Until the new one holds as much, this one must not get lost.
                    let file = self.place.disk.open(&path).during("cannot open", &path)?;
                    file.sync_all().during("cannot sync", &path)?;
                }
                let path = if exists { self.place.path(&format!("{name}{ASIDE_SUFFIX}")) } else { path };
                let file = self.place.disk.create(&path, true).during("cannot create", &path)?;
                Output::Compressed { file, encoder: Box::new(encoder), length: 0, aside: exists }
            }
        };
        self.place.sync_dir()?;
        Ok(output)
    }

    fn create_plain(&self, path: &Path, name: &str) -> Result<Output, SinkError> {
        let size = self.place.size.bytes();
        let file = self.place.disk.create(path, false).during("cannot create", path)?;
        let length = file.len().during("cannot read the length of", path)?;
        if length > size {
            let text = format!("\"{}\" has {length} bytes, more than a segment of {size}", path.display());
            return Err(SinkError::Diverged(text));
        }
        if length == 0 {
            file.reserve(size).during("cannot reserve space for", path)?;
        } else if length < size {
            file.set_len(size).during("cannot extend", path)?;
        }
        file.sync_all().during("cannot sync", path)?;
        let kept = self.there.iter().find(|there| there.name == name);
        let kept = kept.map_or((self.position, self.position), |there| (there.from, there.to));
        Ok(Output::Plain { file, kept })
    }

    /// The next byte.
    pub(super) fn position(&self) -> Lsn {
        self.position
    }

    /// Position behind the segment.
    pub(super) fn end(&self) -> Lsn {
        self.number.end(self.place.size)
    }

    /// Takes the bytes at its position, which belong to this segment.
    pub(super) fn write(&mut self, wal: &[u8]) -> Result<(), SinkError> {
        let (at, end) = (self.position, Lsn(self.position.0.saturating_add(wal.len() as u64)));
        for there in &mut self.there {
            there.compare(at, wal)?;
        }
        self.there.retain(|there| there.to > end);
        let path = self.output_path();
        match &mut self.output {
            Output::Nowhere => {}
            Output::Plain { file, kept } => {
                let start = self.number.start(self.place.size);
                for (from, to) in [(at, kept.0.min(end)), (at.max(kept.1), end)] {
                    let bytes = part(wal, at, from, to);
                    if !bytes.is_empty() {
                        let offset = from.saturating_sub(start);
                        file.write_at(&mut [IoSlice::new(bytes)], offset).during("cannot write", &path)?;
                    }
                }
            }
            Output::Compressed { file, encoder, length, .. } => {
                encoder.write(wal).during("cannot compress", &path)?;
                append(&**file, length, &encoder.take()).during("cannot write", &path)?;
            }
        }
        self.position = end;
        Ok(())
    }

    fn output_path(&self) -> PathBuf {
        let aside = matches!(self.output, Output::Compressed { aside: true, .. });
        let suffix = if aside { ASIDE_SUFFIX } else { "" };
        self.place.path(&format!("{}{suffix}", self.target(false).name()))
    }

    /// Makes durable what was written, and returns the end of that. Of a compressed file nothing counts before it is whole:
    /// what a crash leaves of it can't be read to the last byte, and to end blocks early would make it larger.
    pub(super) fn flush(&self) -> Result<Lsn, SinkError> {
        match &self.output {
            Output::Nowhere => Ok(self.position),
            Output::Plain { file, .. } => {
                file.sync_data().during("cannot sync", &self.output_path())?;
                Ok(self.position)
            }
            Output::Compressed { .. } => Ok(self.number.start(self.place.size)),
        }
    }

    /// A file that was made again takes the place of the old one, once it holds as much.
    fn bring_forward(&mut self) -> Result<(), SinkError> {
        let from = self.output_path();
        let target = self.place.path(&self.target(false).name());
        match &mut self.output {
            Output::Compressed { aside, .. } if *aside && self.position >= self.there_to => {
                self.place.disk.rename(&from, &target).during("cannot rename", &from)?;
                *aside = false;
                self.place.sync_dir()
            }
            _ => Ok(()),
        }
    }

    /// All is written: gives the file its name, durably.
    pub(super) fn finish(mut self) -> Result<(), SinkError> {
        if matches!(self.output, Output::Nowhere) {
            return Ok(());
        }
        self.complete()?;
        self.bring_forward()?;
        let from = self.output_path();
        let target = self.place.path(&self.target(true).name());
        self.place.disk.rename(&from, &target).during("cannot rename", &from)?;
        self.place.sync_dir()?;
        // What is left of other attempts at the same segment was compared with it.
        for file in self.place.files_of(self.timeline, self.number)?.iter().filter(|file| !file.whole) {
            let path = self.place.path(&file.name());
            self.place.disk.remove_file(&path).during("cannot remove", &path)?;
        }
        Ok(())
    }

    /// Ends a segment that isn't whole.
    pub(super) fn close(mut self) -> Result<(), SinkError> {
        if matches!(self.output, Output::Nowhere) {
            return Ok(());
        }
        self.complete()?;
        self.bring_forward()?;
        if matches!(self.output, Output::Compressed { aside: true, .. }) {
            let path = self.output_path();
            self.place.disk.remove_file(&path).during("cannot remove", &path)?;
        }
        Ok(())
    }

    /// Ends the compressed stream, if it is one, and makes the file durable.
    fn complete(&mut self) -> Result<(), SinkError> {
        let path = self.output_path();
        match &mut self.output {
            Output::Nowhere => Ok(()),
            Output::Plain { file, .. } => file.sync_all().during("cannot sync", &path),
            Output::Compressed { file, encoder, length, .. } => {
                encoder.finish().during("cannot compress", &path)?;
                append(&**file, length, &encoder.take()).during("cannot write", &path)?;
                file.sync_all().during("cannot sync", &path)
            }
        }
    }
}

impl There {
    /// Compares the next bytes, which are those at `at`.
    fn compare(&mut self, at: Lsn, wal: &[u8]) -> Result<(), SinkError> {
        let end = Lsn(at.0.saturating_add(wal.len() as u64));
        let (from, to) = (at.max(self.from), end.min(self.to));
        let mut bytes = vec![0; part(wal, at, at, to).len()];
        let (count, error) = read_full(&mut self.source, &mut bytes);
        if from >= to {
            return Ok(());
        }
        if to > Lsn(at.0.saturating_add(count as u64)) {
            let source = error.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
            return Err(SinkError::Io { what: "cannot read again", path: self.name.clone().into(), source });
        }
        let (here, comes) = (part(&bytes, at, from, to), part(wal, at, from, to));
        match here.iter().zip(comes).position(|(here, comes)| here != comes) {
            None => Ok(()),
            Some(offset) => Err(SinkError::Diverged(format!(
                "WAL at {} differs from what is in \"{}\": this is not the log that was received before. Nothing was \
                 changed. Verify the directory, or receive into an empty one",
                Lsn(from.0.saturating_add(offset as u64)),
                self.name
            ))),
        }
    }
}

/// The bytes of `wal`, which begins at `at`, that lie in `[from, to)`; none if it is empty.
fn part(wal: &[u8], at: Lsn, from: Lsn, to: Lsn) -> &[u8] {
    let offset = |lsn: Lsn| usize::try_from(lsn.saturating_sub(at)).unwrap_or(usize::MAX);
    wal.get(offset(from)..offset(to)).unwrap_or_default()
}

fn append(file: &dyn DiskFile, length: &mut u64, bytes: &[u8]) -> io::Result<()> {
    if !bytes.is_empty() {
        file.write_at(&mut [IoSlice::new(bytes)], *length)?;
        *length = length.saturating_add(bytes.len() as u64);
    }
    Ok(())
}

/// Says what was being done when the disk refused.
pub(super) trait During<T> {
    fn during(self, what: &'static str, path: &Path) -> Result<T, SinkError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: &'static str, path: &Path) -> Result<T, SinkError> {
        self.map_err(|source| SinkError::Io { what, path: path.to_owned(), source })
    }
}
