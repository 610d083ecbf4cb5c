//! Drives a whole endpoint over loopback sockets: real sessions, real storage, hand-made clients.

mod bad_input;
mod commands;
mod feedback;
mod fence;
mod harness;
mod health;
mod neon_and_stock;
mod pg_timelines;
mod push;
mod readers;
mod replay;
mod replies;
mod slots;
