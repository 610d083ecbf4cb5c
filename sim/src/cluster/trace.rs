//! What happened, in order: hashed, so that two runs can be compared, and printed on request.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The trace of one history. Clones are the same trace.
#[derive(Clone, Debug)]
pub struct Trace(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    began: Instant,
    print: bool,
    line: String,
    hash: u64,
    events: u64,
}

impl Trace {
    /// An empty trace that begins now, in simulated time; with `print`, events go to standard error.
    pub fn new(print: bool) -> Self {
        let (began, line) = (Instant::now(), String::new());
        Self(Arc::new(Mutex::new(State { began, print, line, hash: 0xCBF2_9CE4_8422_2325, events: 0 })))
    }

    /// Adds an event. Whatever could differ between two runs of one seed (addresses, real time) has no place in it.
    pub fn event(&self, event: fmt::Arguments<'_>) {
        let mut state = self.0.lock();
        let state = &mut *state;
        state.line.clear();
        let elapsed = state.began.elapsed().as_millis();
        fmt::write(&mut state.line, format_args!("{elapsed:>7} ms  {event}")).unwrap();
        for byte in state.line.bytes() {
            // FNV-1a
            state.hash = (state.hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
        state.events += 1;
        if state.print {
            eprintln!("{}", state.line);
        }
    }

    /// Of all events so far.
    pub fn hash(&self) -> u64 {
        self.0.lock().hash
    }

    /// How many there were.
    pub fn events(&self) -> u64 {
        self.0.lock().events
    }
}

/// Adds an event, given as to `format!`.
macro_rules! note {
    ($trace:expr, $($text:tt)*) => { $trace.event(format_args!($($text)*)) };
}
pub(super) use note;
