//! Replication slots: `CREATE_REPLICATION_SLOT`, `READ_REPLICATION_SLOT`, `DROP_REPLICATION_SLOT`, and using one.
//!
//! A slot is known to all members of the timeline, so that a standby finds its slot wherever it connects next. Creating and
//! dropping one succeed when a majority has that on disk. What isn't known here is asked for once among the others, before
//! a client is told that it doesn't exist.

use std::sync::Arc;
use std::time::Duration;

use pgproto::Lsn;
use pgproto::SegmentNumber;
use pgproto::backend::{Column, ColumnType, ErrorFields, SqlState, encode};
use pgproto::replication::BadSlotName;
use tokio::time::{Instant, timeout};

use super::interrupt::Interrupt;
use super::session::Session;
use crate::peers::Unsettled;
use crate::timeline::Timeline;
use crate::timeline::holds::WalStatus;
use crate::timeline::slots::{MAX_SLOTS, Slot, SlotError, SlotGuard, TakenAway, TemporarySlot};

/// How often a slot is created again when it turns out that others remember a later one, which was dropped.
const MAX_TRIES: usize = 3;

/// `DROP_REPLICATION_SLOT ... WAIT` looks again after this time: nobody tells when another node's client has left.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Makes a slot; with `reserve_wal` it keeps the WAL from the start of the segment in which the commit LSN is: what a reader
/// that begins now asks for first.
pub(super) async fn create(
    session: &mut Session,
    name: &str,
    temporary: bool,
    reserve_wal: bool,
) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let restart_lsn = if reserve_wal { position_to_reserve(&timeline)? } else { Lsn::INVALID };
    if temporary {
        let slot = TemporarySlot::create(Arc::clone(&timeline), name, session.client.id, restart_lsn)?;
        session.temporary.push(slot);
        session.house.peers.hurry(&timeline);
    } else {
        create_everywhere(session, &timeline, name, restart_lsn).await?;
    }
    tracing::info!(ttid = %timeline.ttid(), name, temporary, %restart_lsn, "replication slot created");
    let out = session.writer.out();
    let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"].map(Column::text);
    encode::row_description(out, &columns);
    // A physical slot has no consistent point.
    encode::data_row(out, &[Some(name), Some("0/0"), None, None]);
    encode::command_complete(out, "CREATE_REPLICATION_SLOT");
    Ok(())
}

fn position_to_reserve(timeline: &Timeline) -> Result<Lsn, Interrupt> {
    let commit_lsn = timeline.progress().commit_lsn;
    if !commit_lsn.is_valid() {
        let text = format!("timeline {} has no committed WAL on this safekeeper yet", timeline.ttid());
        return Err(Interrupt::refused(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text));
    }
    let size = timeline.control_state().server.wal_seg_size;
    Ok(SegmentNumber::containing(commit_lsn, size).start(size).max(timeline.wal_start()))
}

/// Creates the slot here and lets a majority know. What only a minority would know is taken back.
async fn create_everywhere(
    session: &Session,
    timeline: &Arc<Timeline>,
    name: &str,
    restart_lsn: Lsn,
) -> Result<(), Interrupt> {
    let (peers, slots) = (&session.house.peers, timeline.slots());
    for _ in 0..MAX_TRIES {
        let created = slots.create(name, restart_lsn)?;
        let settled = peers.settle(timeline, name).await;
        match slots.get(name) {
            Some(slot) if slot.incarnation == created.incarnation => {
                return settled.map_err(|error| {
                    if let Err(error) = slots.drop_slot(name) {
                        tracing::warn!(ttid = %timeline.ttid(), name, %error, "slot not taken back");
                    }
                    unsettled(&format!("replication slot \"{name}\" not created"), &error)
                });
            }
            Some(_) => return Err(SlotError::Exists(name.to_owned()).into()),
            // Others remember a later slot of this name, which was dropped: the next one will be later still.
            None => {}
        }
    }
    let text = format!("replication slot \"{name}\" is being dropped elsewhere");
    Err(Interrupt::refused(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text))
}

fn unsettled(what: &str, error: &Unsettled) -> Interrupt {
    let fields = ErrorFields::error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, format!("{what}: {error}"));
    Interrupt::Refused(fields.with_hint("Try again when a majority of the safekeepers can be reached."))
}

/// Answers with the position of a slot: NULLs while it has none, and for a slot that doesn't exist.
pub(super) async fn read(session: &mut Session, name: &str) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let restart_lsn = match timeline.slots().temporary().get(name) {
        Some(temporary) => Some(temporary.restart_lsn),
        None => find(session, &timeline, name).await.map(|slot| match timeline.wal_status(&slot) {
            Some(WalStatus::Lost) => Lsn::INVALID,
            _ => slot.restart_lsn,
        }),
    };
    let position = restart_lsn.filter(|lsn| lsn.is_valid());
    let pg_timeline = position.map(|lsn| timeline.control_state().stock.ancestry.at(lsn).to_string());
    let position = position.map(|lsn| lsn.to_string());
    let out = session.writer.out();
    let columns = [
        Column::text("slot_type"),
        Column::text("restart_lsn"),
        Column { name: "restart_tli", kind: ColumnType::Int8 },
    ];
    encode::row_description(out, &columns);
    encode::data_row(out, &[restart_lsn.map(|_| "physical"), position.as_deref(), pg_timeline.as_deref()]);
    encode::command_complete(out, "READ_REPLICATION_SLOT");
    Ok(())
}

/// The slot of this name. Others are asked when it isn't known here.
async fn find(session: &Session, timeline: &Arc<Timeline>, name: &str) -> Option<Slot> {
    let known = timeline.slots().get(name);
    if known.is_some() {
        return known;
    }
    session.house.peers.ask(timeline).await;
    timeline.slots().get(name)
}

/// Drops a slot that nobody uses; with `wait`, as soon as nobody does.
pub(super) async fn drop_slot(session: &mut Session, name: &str, wait: bool) -> Result<(), Interrupt> {
    let timeline = session.timeline().map_err(|error| error.refusal())?;
    let own = |slot: &TemporarySlot| slot.name() == name && Arc::ptr_eq(slot.timeline(), &timeline);
    if let Some(index) = session.temporary.iter().position(own) {
        session.temporary.swap_remove(index);
        session.house.peers.hurry(&timeline);
    } else {
        drop_everywhere(session, &timeline, name, wait).await?;
    }
    tracing::info!(ttid = %timeline.ttid(), name, "replication slot dropped");
    encode::command_complete(session.writer.out(), "DROP_REPLICATION_SLOT");
    Ok(())
}

async fn drop_everywhere(
    session: &mut Session,
    timeline: &Arc<Timeline>,
    name: &str,
    wait: bool,
) -> Result<(), Interrupt> {
    if let Some(others) = timeline.slots().temporary().get(name) {
        return Err(SlotError::InUse { name: name.to_owned(), conn_id: others.conn_id, node: None }.into());
    }
    find(session, timeline, name).await;
    let Session { house, reader, .. } = session;
    let deadline = Instant::now() + house.config.idle_limit;
    loop {
        if timeline.members().user_of(name).is_some() {
            // Perhaps not any more.
            house.peers.ask(timeline).await;
        }
        match drop_unused(timeline, name) {
            Ok(_) => break,
            Err(SlotError::InUse { .. }) if wait && Instant::now() < deadline => {
                tokio::select! {
                    _ = timeout(LOOK_AGAIN, timeline.slots().released()) => {}
                    () = house.shutdown.finishing().cancelled() => return Err(Interrupt::shutdown()),
                    gone = reader.gone() => return Err(gone),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    let settled = house.peers.settle(timeline, name).await;
    settled.map_err(|error| {
        let what =
            format!("replication slot \"{name}\" dropped here, and the others will learn of it when they are back");
        unsettled(&what, &error)
    })
}

fn drop_unused(timeline: &Timeline, name: &str) -> Result<Slot, SlotError> {
    match timeline.members().user_of(name) {
        Some((node, conn_id)) if timeline.slots().get(name).is_some() => {
            Err(SlotError::InUse { name: name.to_owned(), conn_id, node: Some(node) })
        }
        _ => timeline.slots().drop_slot(name),
    }
}

/// Uses the slot that START_REPLICATION names, if it names one.
///
/// Neon's replicas name slots that nobody made: on a compute's timeline, a name that isn't known has no effect.
pub(super) async fn acquire<'a>(
    session: &Session,
    timeline: &'a Arc<Timeline>,
    name: Option<&str>,
) -> Result<Option<SlotGuard<'a>>, Interrupt> {
    let Some(name) = name else { return Ok(None) };
    if !timeline.slots().temporary().contains_key(name)
        && let Some(slot) = find(session, timeline, name).await
        && timeline.wal_status(&slot) == Some(WalStatus::Lost)
    {
        let text = format!("can no longer get changes from replication slot \"{name}\"");
        let fields = ErrorFields::error(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, text);
        let start = timeline.wal_start();
        let detail = format!("WAL from {} on is needed for it, and before {start} was removed here.", slot.restart_lsn);
        return Err(Interrupt::Refused(fields.with_detail(detail)));
    }
    let guard = match timeline.slots().acquire(name, session.client.id) {
        Err(SlotError::Unknown(_)) if !timeline.is_of_stock_server() => return Ok(None),
        acquired => acquired?,
    };
    session.house.peers.hurry(timeline);
    Ok(Some(guard))
}

/// The end of a stream whose slot is another's now.
pub(super) fn taken_away(name: &str, how: TakenAway) -> Interrupt {
    match how {
        TakenAway::Dropped => {
            let text = format!("terminating connection because replication slot \"{name}\" was dropped");
            Interrupt::fatal(SqlState::UNDEFINED_OBJECT, text)
        }
        TakenAway::TakenOver(node) => {
            let text = format!(
                "terminating connection because replication slot \"{name}\" is used by a connection to safekeeper {node} now"
            );
            Interrupt::fatal(SqlState::OBJECT_IN_USE, text)
        }
    }
}

impl From<SlotError> for Interrupt {
    fn from(error: SlotError) -> Self {
        let code = match &error {
            SlotError::BadName { reason: BadSlotName::TooLong, .. } => SqlState::NAME_TOO_LONG,
            SlotError::BadName { .. } => SqlState::INVALID_NAME,
            SlotError::Exists(_) => SqlState::DUPLICATE_OBJECT,
            SlotError::Unknown(_) => SqlState::UNDEFINED_OBJECT,
            SlotError::InUse { .. } => SqlState::OBJECT_IN_USE,
            SlotError::Full => SqlState::CONFIGURATION_LIMIT_EXCEEDED,
            SlotError::Disk(_) => SqlState::IO_ERROR,
        };
        let fields = ErrorFields::error(code, error.to_string());
        Interrupt::Refused(match error {
            SlotError::BadName { reason: BadSlotName::Character, .. } => fields.with_hint(
                "Replication slot names may only contain lower case letters, numbers, and the underscore character.",
            ),
            SlotError::InUse { node: Some(node), .. } => {
                fields.with_detail(format!("The connection is to safekeeper {node}."))
            }
            SlotError::Full => fields.with_hint(format!("Drop one: a timeline has at most {MAX_SLOTS}.")),
            _ => fields,
        })
    }
}
