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

#[cfg(test)]
mod tests {
    use pgproto::{Lsn, Term};

    use super::*;

    #[test]
    fn stock_readers_are_treated_as_by_postgres_and_neons_as_by_neon() {
        let config = ServerConfig::default();
        let habits = |name: &str, term: Option<u64>| {
            let request = StartReplication { slot: None, start: Lsn(1), timeline: None, term: term.map(Term) };
            Habits::of(&Client::named(name), &request, &config)
        };
        let stock = habits("walreceiver", None);
        assert_eq!((stock.keepalive, stock.always_ask, stock.limit), (STOCK_KEEPALIVE, false, config.reader_limit));
        assert!(stock.is_stock() && !stock.may_be_sent_home);
        let pageserver = habits("pageserver-1", None);
        assert_eq!((pageserver.keepalive, pageserver.always_ask), (NEON_KEEPALIVE, true));
        assert!(!pageserver.is_stock() && pageserver.may_be_sent_home);
        // It may never say a word.
        let leader = habits("", Some(3));
        assert_eq!((leader.keepalive, leader.always_ask, leader.limit), (NEON_KEEPALIVE, true, config.idle_limit));
        assert!(!leader.is_stock() && leader.silent && !leader.may_be_sent_home);
    }
}
