//! The command loop of one client.

use std::sync::Arc;

use pgproto::backend::{ErrorFields, SqlState, encode};
use pgproto::frontend::FrontendMessage;
use pgproto::replication::Command;

use super::connection::{MessageReader, MessageWriter};
use super::handshake::{Client, NoTimeline, find_timeline};
use super::interrupt::Interrupt;
use super::listener::House;
use super::{
    MAX_COMMAND_BODY, fence, identify_system, members, show, slots, start_replication, status, timeline_history,
};
use crate::metrics::{self, QueryKind};
use crate::timeline::Timeline;
use crate::timeline::slots::TemporarySlot;

/// Characters of a refused command that are logged.
const LOGGED_TEXT: usize = 200;

/// A client that was let in.
pub(super) struct Session {
    pub(super) house: Arc<House>,
    pub(super) client: Client,
    pub(super) reader: MessageReader,
    pub(super) writer: MessageWriter,
    /// Slots that end with it.
    pub(super) temporary: Vec<TemporarySlot>,
}

impl Session {
    /// Serves the client until the session ends; says why it did.
    pub(super) async fn run(&mut self) -> Interrupt {
        loop {
            if let Err(end) = self.next_message().await {
                return end;
            }
        }
    }

    /// The timeline that commands are about.
    pub(super) fn timeline(&self) -> Result<Arc<Timeline>, NoTimeline> {
        find_timeline(&self.house.registry, self.client.ttid)
    }

    async fn receive(&mut self) -> Result<FrontendMessage, Interrupt> {
        tokio::select! {
            frame = self.reader.next_or_idle(MAX_COMMAND_BODY) => Ok(FrontendMessage::decode(frame?)?),
            () = self.house.shutdown.finishing().cancelled() => Err(Interrupt::Evicted),
        }
    }

    async fn next_message(&mut self) -> Result<(), Interrupt> {
        match self.receive().await? {
            FrontendMessage::Query(text) => self.query(&text).await?,
            FrontendMessage::Extended => self.refuse_extended().await?,
            FrontendMessage::FunctionCall => {
                let text = "fastpath function calls not supported in a replication connection";
                ErrorFields::error(SqlState::PROTOCOL_VIOLATION, text).encode(self.writer.out());
            }
            FrontendMessage::Sync => {}
            FrontendMessage::Terminate => return Err(Interrupt::Gone("terminated by the client".to_owned())),
            FrontendMessage::Password(_) => {
                return Err(Interrupt::fatal(SqlState::PROTOCOL_VIOLATION, "unexpected password message"));
            }
            // Left over from a COPY that failed; the client noticed too late.
            FrontendMessage::CopyData(_) | FrontendMessage::CopyDone | FrontendMessage::CopyFail(_) => return Ok(()),
        }
        encode::ready_for_query(self.writer.out());
        Ok(self.writer.flush().await?)
    }

    /// Runs a command and tells how it ended, unless the whole session ends with it.
    async fn query(&mut self, text: &str) -> Result<(), Interrupt> {
        match self.run_command(text).await {
            Err(Interrupt::Refused(fields)) => {
                let text: String = text.chars().take(LOGGED_TEXT).collect();
                tracing::info!(id = self.client.id, address = %self.client.address, text, error = %fields, "refused");
                // What a stream left half sent comes first.
                self.writer.flush().await?;
                fields.encode(self.writer.out());
                Ok(())
            }
            result => result,
        }
    }

    async fn run_command(&mut self, text: &str) -> Result<(), Interrupt> {
        let command = Command::parse(text)?;
        if let Command::StartWalPush(request) = command {
            return Err(Interrupt::Push(request));
        }
        let _timer = metrics::query(kind(&command));
        match command {
            Command::IdentifySystem => identify_system::run(self),
            Command::Show(name) => show::run(self, &name),
            Command::TimelineStatus => status::run(self),
            Command::SetDatestyle => {
                encode::command_complete(self.writer.out(), "SELECT 1");
                Ok(())
            }
            Command::TimelineHistory(timeline) => timeline_history::run(self, timeline),
            Command::StartReplication(request) => start_replication::run(self, request).await,
            Command::StartWalPush(request) => Err(Interrupt::Push(request)),
            Command::TimelineFence(request) => fence::run(self, request).await,
            Command::TimelineMembers => members::run(self),
            Command::PeerExchange(json) => members::exchange(self, &json),
            Command::ReadReplicationSlot(name) => slots::read(self, &name).await,
            Command::CreateReplicationSlot { name, temporary, reserve_wal } => {
                slots::create(self, &name, temporary, reserve_wal).await
            }
            Command::DropReplicationSlot { name, wait } => slots::drop_slot(self, &name, wait).await,
        }
    }

    /// Refuses a series of extended messages once, then skips to its Sync, as a walsender does.
    async fn refuse_extended(&mut self) -> Result<(), Interrupt> {
        let text = "extended query protocol not supported in a replication connection";
        ErrorFields::error(SqlState::PROTOCOL_VIOLATION, text).encode(self.writer.out());
        self.writer.flush().await?;
        loop {
            match self.receive().await? {
                FrontendMessage::Sync => return Ok(()),
                FrontendMessage::Terminate => return Err(Interrupt::Gone("terminated by the client".to_owned())),
                _ => {}
            }
        }
    }
}

fn kind(command: &Command) -> QueryKind {
    match command {
        Command::StartWalPush(_) => QueryKind::StartWalPush,
        Command::StartReplication(_) => QueryKind::StartReplication,
        Command::IdentifySystem => QueryKind::IdentifySystem,
        Command::TimelineStatus => QueryKind::TimelineStatus,
        _ => QueryKind::Other,
    }
}
