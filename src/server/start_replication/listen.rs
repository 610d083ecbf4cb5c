//! What a reader reports.

use pgproto::DecodeError;
use pgproto::backend::SqlState;
use pgproto::frontend::FrontendMessage;
use pgproto::replication::message::ReaderMessage;
use tokio::time::Instant;

use super::habits::Habits;
use super::stream::Stream;
use crate::metrics;
use crate::server::interrupt::Interrupt;
use crate::timeline::readers::Verdict;

impl Stream<'_> {
    /// Takes in what the reader says. True when it ends the stream.
    pub(super) fn hear(&mut self, message: FrontendMessage) -> Result<bool, Interrupt> {
        self.last_heard = Instant::now();
        self.asked = false;
        let unexpected = |tag: char| {
            let text = format!("invalid standby message type \"{tag}\"");
            Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, text))
        };
        let body = match message {
            FrontendMessage::CopyData(body) => body,
            FrontendMessage::CopyDone => return Ok(true),
            FrontendMessage::Terminate => return Err(Interrupt::Gone("terminated by the client".to_owned())),
            FrontendMessage::CopyFail(_) => return unexpected('f'),
            FrontendMessage::Query(_) => return unexpected('Q'),
            FrontendMessage::Sync => return unexpected('S'),
            FrontendMessage::Password(_) => return unexpected('p'),
            FrontendMessage::FunctionCall => return unexpected('F'),
            FrontendMessage::Extended => return unexpected('P'),
        };
        match ReaderMessage::decode(body) {
            Ok(ReaderMessage::Status(status)) => {
                if status.reply_requested {
                    self.keepalive = Some(self.keepalive.unwrap_or(false));
                }
                let heard = self.listed.standby_status(status, self.timeline.progress().commit_lsn);
                self.judge(heard);
            }
            Ok(ReaderMessage::HotStandby(feedback)) => self.listed.hot_standby_feedback(feedback),
            Ok(ReaderMessage::Pageserver(feedback)) => {
                if !self.habits.silent {
                    self.habits = Habits::pageserver(self.habits.limit);
                }
                metrics::pageserver_feedback();
                let commit_lsn = self.timeline.progress().commit_lsn;
                self.judge(self.listed.pageserver_feedback(feedback.clone(), commit_lsn));
                if !self.timeline.pageserver_reported(&feedback) {
                    tracing::debug!(id = self.client.id, "a page server's report has to wait for the next one");
                }
            }
            Err(DecodeError::UnknownTag { value, .. }) => {
                let text = format!("unexpected message type {value:#04x} from a reader");
                return Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, text));
            }
            // The message around it was whole, so there is a place to go on from.
            Err(error) => return Err(Interrupt::refused(SqlState::PROTOCOL_VIOLATION, error.to_string())),
        }
        Ok(false)
    }

    /// Acts on a report, as far as it is believed.
    fn judge(&self, heard: Verdict) {
        if heard.absurd {
            metrics::absurd_report();
        }
        if let Some(slot) = self.slot.as_ref().filter(|_| heard.positions.flush.is_valid()) {
            slot.confirm(heard.positions.flush);
        }
    }
}
