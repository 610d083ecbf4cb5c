//! The first page of a fork. Everything in it is fixed in place but the reason, whose room is not used up, and the Postgres
//! timelines, so that versions differ in what is appended.

use bytes::{Buf, BufMut};
use pgproto::pg_timeline::Branch;
use pgproto::{Lsn, PgTimelineId, SegmentSize, SystemId, TenantId, TenantTimelineId, Term, TimelineId};

use super::{Fork, ForkError, ForkHeader, FoundFile, PAGE};

pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"SKFORKED");
/// What is written. Version 1 has no system identifier and no Postgres timelines.
pub(super) const VERSION: u32 = 2;
/// Everything before the reason.
pub(super) const FIXED_LEN: usize = 108;
/// Longest reason in bytes; the rest of a longer one is left out.
pub(super) const MAX_REASON: usize = 1024;
/// Where the system identifier is.
const STOCK_AT: usize = FIXED_LEN + MAX_REASON;
/// Most Postgres timelines; of more, the newest are noted. Uncommitted WAL of more promotions than that is not to be had.
pub(super) const MAX_BRANCHES: usize = 64;
const CRC_LEN: usize = 4;

/// Makes `header` one that fits.
pub(super) fn shorten(header: &mut ForkHeader) {
    header.reason.truncate(header.reason.floor_char_boundary(MAX_REASON));
    let too_many = header.pg_timelines.len().saturating_sub(MAX_BRANCHES);
    header.pg_timelines.drain(..too_many);
}

pub(super) fn encode(fork: &Fork) -> Vec<u8> {
    let header = &fork.header;
    let mut out = Vec::with_capacity(PAGE);
    out.put_u64_le(MAGIC);
    out.put_u32_le(VERSION);
    out.put_u32_le(header.segment_size.as_u32());
    out.put_u32_le(header.pg_version);
    out.put_slice(&header.ttid.tenant_id.0);
    out.put_slice(&header.ttid.timeline_id.0);
    for number in [header.from.0, header.to.0, fork.kept_to.0, header.term.0, header.new_term.0, header.when] {
        out.put_u64_le(number);
    }
    out.put_u32_le(fork.wal_crc);
    out.put_u32_le(u32::try_from(header.reason.len()).unwrap_or(u32::MAX));
    debug_assert_eq!(out.len(), FIXED_LEN);
    out.put_slice(header.reason.as_bytes());
    out.resize(STOCK_AT, 0);
    out.put_u64_le(header.system_id.0);
    out.put_u32_le(u32::try_from(header.pg_timelines.len()).unwrap_or(u32::MAX));
    for branch in &header.pg_timelines {
        out.put_u32_le(branch.timeline.0);
        out.put_u64_le(branch.begin.0);
    }
    out.resize(PAGE - CRC_LEN, 0);
    out.put_u32_le(crc32c::crc32c(&out));
    out
}

pub(super) fn decode(page: &[u8; PAGE], found: &FoundFile) -> Result<Fork, ForkError> {
    let (checked, mut stored) = page.split_at(PAGE - CRC_LEN);
    let (mut fixed, reason) = checked.split_at(FIXED_LEN);
    let (reason, mut stock) = reason.split_at(STOCK_AT - FIXED_LEN);
    if fixed.get_u64_le() != MAGIC || crc32c::crc32c(checked) != stored.get_u32_le() {
        return Err(ForkError::Header);
    }
    let version = fixed.get_u32_le();
    if !(1..=VERSION).contains(&version) {
        return Err(ForkError::Version(version));
    }
    let segment_size = SegmentSize::new(fixed.get_u32_le()).map_err(|_| ForkError::Header)?;
    let pg_version = fixed.get_u32_le();
    let (mut tenant_id, mut timeline_id) = ([0; 16], [0; 16]);
    fixed.copy_to_slice(&mut tenant_id);
    fixed.copy_to_slice(&mut timeline_id);
    let ttid = TenantTimelineId::new(TenantId(tenant_id), TimelineId(timeline_id));
    let (from, to, kept_to) = (Lsn(fixed.get_u64_le()), Lsn(fixed.get_u64_le()), Lsn(fixed.get_u64_le()));
    let (term, new_term, when) = (Term(fixed.get_u64_le()), Term(fixed.get_u64_le()), fixed.get_u64_le());
    let wal_crc = fixed.get_u32_le();
    let length = usize::try_from(fixed.get_u32_le()).unwrap_or(usize::MAX);
    let reason = reason.get(..length).and_then(|reason| std::str::from_utf8(reason).ok());
    let reason = reason.ok_or(ForkError::Header)?.to_owned();
    let (system_id, pg_timelines) =
        if version == 1 { (SystemId(0), Vec::new()) } else { (SystemId(stock.get_u64_le()), branches(stock)?) };
    let header =
        ForkHeader { ttid, segment_size, pg_version, system_id, pg_timelines, from, to, term, new_term, when, reason };
    if !(from <= kept_to && kept_to <= to) {
        return Err(ForkError::Header);
    }
    Ok(Fork { number: found.number, path: found.path.clone(), header, kept_to, wal_crc })
}

fn branches(mut from: &[u8]) -> Result<Vec<Branch>, ForkError> {
    let count = usize::try_from(from.get_u32_le()).ok().filter(|count| *count <= MAX_BRANCHES);
    let count = count.ok_or(ForkError::Header)?;
    Ok((0..count)
        .map(|_| Branch { timeline: PgTimelineId(from.get_u32_le()), begin: Lsn(from.get_u64_le()) })
        .collect())
}
