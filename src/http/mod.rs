//! The HTTP endpoints: Prometheus metrics, state as JSON, and management of timelines (spec: HTTP API).
//!
//! What a client can rely on:
//!
//! * Success is 200 with JSON (`null` where there is nothing to say). A failure has the status that tells what to do
//!   about it, and `{"msg": "..."}`: 4xx is final, 503 means "the same again, later". An unknown path or method is 404
//!   with the plain text `Not Found`.
//! * A request that changes something runs to its end even when the client goes away.
//! * Content types of requests are not looked at, unknown JSON fields are ignored, and GET may carry a body.
//! * `x-request-id` of the request comes back in the response, or a new one does; the log has it too.
//! * Connections, the time for sending a request, and the size of a body are bounded ([`Limits`], [`MAX_BODY`]).
//!
//! | File | What is in it |
//! |---|---|
//! | `serve` | connections: accept, bound, shut down |
//! | `request` | what all requests have in common: ids, bodies, logging |
//! | [`error`] | failures as responses |
//! | [`drain`] | taking a node out |
//! | [`safekeeper`] | routes of the safekeeper |
//! | `status` | routes of a program with nothing to manage |
//! | `fence` | keeps a lost primary out |
//! | [`forks`] | WAL that leaders cut off |
//! | `timeline_status`, `retention_status` | the JSON form of a timeline, and of what holds its WAL |
//! | [`walproposer`] | routes of the walproposer |
//! | [`walreceiver`] | routes of the walreceiver |

pub mod drain;
pub mod error;
mod fence;
pub mod forks;
mod request;
mod retention_status;
pub mod safekeeper;
mod serve;
mod status;
mod timeline_status;
pub mod walproposer;
pub mod walreceiver;

pub use request::MAX_BODY;
pub use serve::{Limits, serve};

#[cfg(test)]
mod tests;
