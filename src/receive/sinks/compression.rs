//! Compressing segment files, and reading them again.
//!
//! Files are what the usual programs make and read: `.gz` (gzip), `.lz4` (LZ4 frame), `.zst` (Zstandard). `pg_receivewal`
//! knows the first two.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::RangeInclusive;
use std::str::FromStr;

use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;

/// Largest gzip level.
const MAX_GZIP_LEVEL: i32 = 9;
/// gzip's own default.
const DEFAULT_GZIP_LEVEL: i32 = 6;
/// Largest Zstandard level that needs no more than 8 MiB of window.
const MAX_ZSTD_LEVEL: i32 = 19;
/// Zstandard's own default.
const DEFAULT_ZSTD_LEVEL: i32 = 3;
/// Largest window that is accepted when reading, as a power of two: what the level above can ask for.
const MAX_ZSTD_WINDOW: u32 = 23;

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// LZ4 in its frame format.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl Method {
    /// All of them.
    pub const ALL: [Method; 4] = [Method::None, Method::Gzip, Method::Lz4, Method::Zstd];

    /// What comes behind the name of a segment, before `.partial`.
    pub fn suffix(self) -> &'static str {
        match self {
            Method::None => "",
            Method::Gzip => ".gz",
            Method::Lz4 => ".lz4",
            Method::Zstd => ".zst",
        }
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Method::None => "none",
            Method::Gzip => "gzip",
            Method::Lz4 => "lz4",
            Method::Zstd => "zstd",
        }
    }

    /// Decompresses `source`. A source that ends too early gives what it holds and then
    /// [`UnexpectedEof`](io::ErrorKind::UnexpectedEof).
    pub fn reader<R: Read + Send + 'static>(self, source: R) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Method::None => Box::new(source),
            Method::Gzip => Box::new(GzipReader(GzDecoder::new(BufReader::new(source)))),
            Method::Lz4 => Box::new(Lz4Reader(lz4_flex::frame::FrameDecoder::new(Ends::new(source)))),
            Method::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(source)?;
                decoder.window_log_max(MAX_ZSTD_WINDOW)?;
                Box::new(decoder)
            }
        })
    }
}

/// There are bytes behind the end of a compressed file. `pg_receivewal` leaves such when it writes a segment again and the
/// file gets shorter: it doesn't cut off what is left of the old one.
#[derive(Debug, thiserror::Error)]
#[error("there are other bytes behind the end of the compressed data")]
pub struct TrailingBytes;

impl TrailingBytes {
    /// Whether this is all that is wrong.
    pub fn is_all(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

/// One gzip file, and nothing behind it.
struct GzipReader<R>(GzDecoder<BufReader<R>>);

impl<R: Read> Read for GzipReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buf)? {
            0 if !buf.is_empty() && !self.0.get_mut().fill_buf()?.is_empty() => Err(io::Error::other(TrailingBytes)),
            count => Ok(count),
        }
    }
}

/// The decoder takes a file that ends between two blocks for a whole one. This one looks for the end mark.
struct Lz4Reader<R: Read>(lz4_flex::frame::FrameDecoder<Ends<R>>);

impl<R: Read> Read for Lz4Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buf)? {
            0 if !buf.is_empty() && !self.0.get_ref().is_lz4_frame_end() => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }
}

/// Remembers the first and the last bytes of what is read.
struct Ends<R> {
    source: R,
    first: [u8; 5],
    last: [u8; 8],
    length: u64,
}

impl<R: Read> Ends<R> {
    fn new(source: R) -> Self {
        Self { source, first: [0; 5], last: [0; 8], length: 0 }
    }

    /// The frame's flags are its fifth byte; the fourth bit of them tells of a checksum behind the end mark, four zeros.
    fn is_lz4_frame_end(&self) -> bool {
        let [mark_or_other @ .., _, _, _, _] = self.last;
        let [_, _, _, _, mark_or_checksum @ ..] = self.last;
        let has_checksum = self.first[4] & 0b100 != 0;
        let mark = if has_checksum { mark_or_other } else { mark_or_checksum };
        self.length == 0 || mark == [0; 4]
    }
}

impl<R: Read> Read for Ends<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buf)?;
        let known = usize::try_from(self.length).unwrap_or(usize::MAX);
        for (first, byte) in self.first.iter_mut().skip(known).zip(buf.iter().take(count)) {
            *first = *byte;
        }
        self.length += count as u64;
        for byte in buf.iter().take(count).skip(count.saturating_sub(self.last.len())) {
            self.last.rotate_left(1);
            self.last[7] = *byte;
        }
        Ok(count)
    }
}

/// How files are to be compressed.
///
/// ```
/// # use safekeeper::receive::sinks::Compression;
/// for text in ["none", "gzip", "gzip:9", "gzip:level=9", "lz4", "zstd:7", "0", "5"] {
///     assert!(text.parse::<Compression>().is_ok());
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    method: Method,
    level: i32,
}

impl Compression {
    /// Plain files.
    pub const NONE: Compression = Compression { method: Method::None, level: 0 };

    /// The method.
    pub fn method(self) -> Method {
        self.method
    }

    /// A compressor, unless files are plain.
    pub(super) fn encoder(self) -> io::Result<Option<Encoder>> {
        let out = Vec::new();
        Ok(match self.method {
            Method::None => None,
            Method::Gzip => {
                let level = self.level.unsigned_abs();
                Some(Encoder::Gzip(GzEncoder::new(out, flate2::Compression::new(level))))
            }
            Method::Lz4 => {
                let info = lz4_flex::frame::FrameInfo::new().content_checksum(true);
                Some(Encoder::Lz4(Box::new(lz4_flex::frame::FrameEncoder::with_frame_info(info, out))))
            }
            Method::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, self.level)?;
                encoder.include_checksum(true)?;
                Some(Encoder::Zstd(encoder))
            }
        })
    }
}

/// The text names no way to compress.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not none, gzip[:1-{MAX_GZIP_LEVEL}], lz4 or zstd[:1-{MAX_ZSTD_LEVEL}]; a number alone is the level of gzip"
)]
pub struct InvalidCompression(String);

impl FromStr for Compression {
    type Err = InvalidCompression;

    /// `METHOD`, `METHOD:LEVEL`, `METHOD:level=LEVEL`, or as in older versions of `pg_receivewal` the level of gzip alone.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || InvalidCompression(text.to_owned());
        let (name, level) = match text.split_once(':') {
            Some((name, level)) => (name, Some(level.strip_prefix("level=").unwrap_or(level))),
            None if text == "0" => ("none", None),
            None if text.parse::<u32>().is_ok() => ("gzip", Some(text)),
            None => (text, None),
        };
        let method = Method::ALL.into_iter().find(|method| method.name() == name).ok_or_else(wrong)?;
        let level = level.map(|level| level.parse::<i32>().map_err(|_| wrong())).transpose()?;
        let (default, levels) = match method {
            Method::None | Method::Lz4 => (0, RangeInclusive::new(1, 0)),
            Method::Gzip => (DEFAULT_GZIP_LEVEL, 1..=MAX_GZIP_LEVEL),
            Method::Zstd => (DEFAULT_ZSTD_LEVEL, 1..=MAX_ZSTD_LEVEL),
        };
        match level {
            Some(level) if !levels.contains(&level) => Err(wrong()),
            level => Ok(Self { method, level: level.unwrap_or(default) }),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.method {
            Method::None | Method::Lz4 => f.write_str(self.method.name()),
            Method::Gzip | Method::Zstd => write!(f, "{}:{}", self.method.name(), self.level),
        }
    }
}

/// Compresses in memory; what is ready is taken out with [`Encoder::take`].
pub(super) enum Encoder {
    Gzip(GzEncoder<Vec<u8>>),
    Lz4(Box<lz4_flex::frame::FrameEncoder<Vec<u8>>>),
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
}

impl Encoder {
    /// Takes bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Encoder::Gzip(encoder) => encoder.write_all(bytes),
            Encoder::Lz4(encoder) => encoder.write_all(bytes),
            Encoder::Zstd(encoder) => encoder.write_all(bytes),
        }
    }

    /// What is ready to be written to the file.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(match self {
            Encoder::Gzip(encoder) => encoder.get_mut(),
            Encoder::Lz4(encoder) => encoder.get_mut(),
            Encoder::Zstd(encoder) => encoder.get_mut(),
        })
    }

    /// Ends the file; what is left of it can be taken.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        match self {
            Encoder::Gzip(encoder) => encoder.try_finish(),
            Encoder::Lz4(encoder) => encoder.try_finish().map_err(io::Error::other),
            Encoder::Zstd(encoder) => encoder.do_finish(),
        }
    }
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Encoder::Gzip(_) => "Gzip",
            Encoder::Lz4(_) => "Lz4",
            Encoder::Zstd(_) => "Zstd",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(text: &str) -> Encoder {
        text.parse::<Compression>().unwrap().encoder().unwrap().unwrap()
    }

    fn read_all(method: Method, bytes: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let mut out = Vec::new();
        let mut reader = method.reader(io::Cursor::new(bytes.to_vec())).unwrap();
        let mut buffer = [0; 1000];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return (out, Ok(())),
                Ok(count) => out.extend_from_slice(&buffer[..count]),
                Err(error) => return (out, Err(error)),
            }
        }
    }

    #[test]
    fn ways_to_compress_are_named_as_for_pg_receivewal() {
        let level = |text: &str| text.parse::<Compression>().map(|compression| compression.to_string());
        for (text, expected) in [
            ("none", "none"),
            ("0", "none"),
            ("4", "gzip:4"),
            ("gzip", "gzip:6"),
            ("gzip:level=9", "gzip:9"),
            ("lz4", "lz4"),
            ("zstd", "zstd:3"),
            ("zstd:19", "zstd:19"),
        ] {
            assert_eq!(level(text), Ok(expected.into()));
        }
        for text in
            ["", "gzip:", "gzip:0", "gzip:10", "10", "lz4:1", "none:1", "zstd:20", "zstd:0", "xz", "gzip:x", "-1"]
        {
            assert!(level(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_compressed_is_read_again_to_the_last_byte() {
        for text in ["gzip", "lz4", "zstd"] {
            let method = text.parse::<Compression>().unwrap().method();
            let plain: Vec<u8> = (0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
            let mut encoder = encoder(text);
            let mut file = Vec::new();
            for piece in plain.chunks(30_000) {
                encoder.write(piece).unwrap();
                file.extend(encoder.take());
            }
            encoder.finish().unwrap();
            file.extend(encoder.take());
            let (read, end) = read_all(method, &file);
            assert_eq!(read, plain, "{text}");
            end.unwrap();
            for length in [0, 1, 10, file.len() / 2, file.len() - 9, file.len() - 4, file.len() - 1] {
                let (read, end) = read_all(method, &file[..length]);
                assert!(plain.starts_with(&read), "{text}, {length} bytes");
                let error = end.map_err(|error| error.kind());
                assert!(length == 0 || error == Err(io::ErrorKind::UnexpectedEof), "{text}, {length} bytes: {error:?}");
            }
        }
    }

    #[test]
    fn bytes_behind_a_gzip_file_are_seen() {
        let mut encoder = encoder("gzip");
        encoder.write(b"text").unwrap();
        encoder.finish().unwrap();
        let mut file = encoder.take();
        file.extend_from_slice(b"what was there before");
        let (read, end) = read_all(Method::Gzip, &file);
        assert_eq!(read, b"text");
        assert!(TrailingBytes::is_all(&end.unwrap_err()));
    }
}
