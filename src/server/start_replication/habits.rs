//! How a kind of reader wants to be treated; the table is in [`super`].

use std::time::Duration;

use pgproto::replication::command::StartReplication;

use crate::server::ServerConfig;
use crate::server::handshake::Client;

/// Keepalive interval for stock readers. They give up after 60 s by default.
const STOCK_KEEPALIVE: Duration = Duration::from_secs(10);
/// Keepalive interval for Neon's programs.
const NEON_KEEPALIVE: Duration = Duration::from_secs(1);

/// How a kind of reader wants to be treated.
#[derive(Clone, Copy)]
pub(super) struct Habits {
    pub(super) keepalive: Duration,
    /// Every keepalive asks for a reply.
    pub(super) always_ask: bool,
    /// Silence after which the reader is dead.
    pub(super) limit: Duration,
    /// Sending WAL counts as a sign of life.
    pub(super) silent: bool,
    /// The stream may be ended once the reader has everything and nobody writes.
    pub(super) may_be_sent_home: bool,
}

impl Habits {
    pub(super) fn of(client: &Client, request: &StartReplication, config: &ServerConfig) -> Self {
        match request.term {
            Some(_) => Self {
                keepalive: NEON_KEEPALIVE,
                always_ask: true,
                limit: config.idle_limit,
                silent: true,
                may_be_sent_home: false,
            },
            None if client.is_pageserver() => Self::pageserver(config.reader_limit),
            None => Self {
                keepalive: STOCK_KEEPALIVE,
                always_ask: false,
                limit: config.reader_limit,
                silent: false,
                may_be_sent_home: false,
            },
        }
    }

    /// None of Neon's.
    pub(super) fn is_stock(self) -> bool {
        !self.silent && !self.may_be_sent_home
    }

    pub(super) fn pageserver(limit: Duration) -> Self {
        Self { keepalive: NEON_KEEPALIVE, always_ask: true, limit, silent: false, may_be_sent_home: true }
    }
}
