//! How a command or a session ends before it is done.

use std::io;

use pgproto::DecodeError;
use pgproto::backend::{ErrorFields, SqlState};
use pgproto::replication::CommandError;
use pgproto::replication::command::StartWalPush;

use crate::consensus::acceptor::AcceptorError;
use crate::storage::ReadError;
use crate::timeline::TimelineError;
use crate::timeline::registry::CreateTimelineError;

/// What to do about a fence.
const FENCED_OFF_HINT: &str = "Promote the standby: the new primary is let in by itself. Or lift the fence with \
                               \"safekeeperctl failover cancel\".";

/// Why something stopped, and with it what to do next.
#[derive(Debug)]
pub enum Interrupt {
    /// Tell the client; the session goes on with the next command.
    Refused(ErrorFields),
    /// Tell the client, then close.
    Fatal(ErrorFields),
    /// The rest of the session is a proposer's stream, to be served on the lane of its timeline.
    Push(StartWalPush),
    /// The server stops while it streams: say so as a walsender does, with CommandComplete, then close.
    Stopped,
    /// The server stops while the session does nothing: say so, then close at once.
    Evicted,
    /// Close without a word: the client left, or there is nobody left to tell.
    Gone(String),
}

impl Interrupt {
    /// An error after which the session goes on.
    pub(super) fn refused(code: SqlState, message: impl Into<String>) -> Self {
        Interrupt::Refused(ErrorFields::error(code, message))
    }

    /// An error after which the connection is closed.
    pub(super) fn fatal(code: SqlState, message: impl Into<String>) -> Self {
        Interrupt::Fatal(ErrorFields::fatal(code, message))
    }

    /// The server is stopping.
    pub(super) fn shutdown() -> Self {
        Interrupt::Fatal(shutting_down())
    }
}

/// As PostgreSQL says that it is being shut down.
pub(super) fn shutting_down() -> ErrorFields {
    ErrorFields::fatal(SqlState::ADMIN_SHUTDOWN, "terminating connection due to administrator command")
}

impl From<CommandError> for Interrupt {
    fn from(error: CommandError) -> Self {
        Interrupt::Refused(error.into())
    }
}

/// Bytes that make no sense leave no safe place to go on from.
impl From<DecodeError> for Interrupt {
    fn from(error: DecodeError) -> Self {
        Self::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string())
    }
}

impl From<io::Error> for Interrupt {
    fn from(error: io::Error) -> Self {
        Interrupt::Gone(error.to_string())
    }
}

/// Reading WAL back failed. The stream ends, the session may go on, as with a stock server.
impl From<ReadError> for Interrupt {
    fn from(error: ReadError) -> Self {
        let code = match &error {
            ReadError::NotStarted => SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
            ReadError::InvalidRange { .. } => SqlState::INVALID_PARAMETER_VALUE,
            ReadError::BeforeStart { .. } | ReadError::SegmentMissing { .. } => SqlState::UNDEFINED_FILE,
            ReadError::ShortSegment { .. } | ReadError::Damaged { .. } => SqlState::DATA_CORRUPTED,
            ReadError::Disk(_) => SqlState::IO_ERROR,
        };
        Self::refused(code, error.to_string())
    }
}

/// A proposer's message wasn't taken: its connection ends, it comes back and negotiates anew.
impl From<TimelineError> for Interrupt {
    fn from(error: TimelineError) -> Self {
        let code = match &error {
            TimelineError::Refused(refusal) => refusal_code(refusal),
            TimelineError::Failed { .. } => SqlState::IO_ERROR,
            TimelineError::NoSpace { .. } => SqlState::DISK_FULL,
            TimelineError::ShuttingDown(_) => SqlState::ADMIN_SHUTDOWN,
        };
        let fields = ErrorFields::fatal(code, error.to_string());
        Interrupt::Fatal(if code == SqlState::FENCED_OFF { fields.with_hint(FENCED_OFF_HINT) } else { fields })
    }
}

/// Making the timeline that a proposer wants to push to failed.
impl From<CreateTimelineError> for Interrupt {
    fn from(error: CreateTimelineError) -> Self {
        let code = match &error {
            CreateTimelineError::Taken(_) => SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
            CreateTimelineError::Invalid(..) => SqlState::INVALID_PARAMETER_VALUE,
            CreateTimelineError::TooMany { .. } => SqlState::CONFIGURATION_LIMIT_EXCEEDED,
            CreateTimelineError::Storage { .. } => SqlState::IO_ERROR,
        };
        Self::fatal(code, error.to_string())
    }
}

/// What depends on the log being whole is not to be had while it isn't.
pub(super) fn unsound(error: AcceptorError) -> Interrupt {
    Interrupt::refused(SqlState::DATA_CORRUPTED, error.to_string())
}

fn refusal_code(refusal: &AcceptorError) -> SqlState {
    match refusal {
        AcceptorError::BadWal(_) | AcceptorError::Faulty(_) | AcceptorError::Quarantined(_) => SqlState::DATA_CORRUPTED,
        AcceptorError::FencedOff { .. } => SqlState::FENCED_OFF,
        alarming if alarming.is_alarming() => SqlState::DATA_CORRUPTED,
        AcceptorError::WrongTimeline(_)
        | AcceptorError::VersionMismatch { .. }
        | AcceptorError::UnsupportedVersion(_)
        | AcceptorError::TermTooFar { .. }
        | AcceptorError::SegmentSizeMismatch { .. } => SqlState::INVALID_PARAMETER_VALUE,
        _ => SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE,
    }
}
