//! Placeholder for the codec.
use super::{AcceptorMessage, ProposerMessage};
use crate::DecodeError;
use bytes::Bytes;

pub(super) fn decode_proposer(_body: Bytes) -> Result<ProposerMessage, DecodeError> {
    Err(DecodeError::Truncated("placeholder"))
}

pub(super) fn decode_acceptor(_body: Bytes) -> Result<AcceptorMessage, DecodeError> {
    Err(DecodeError::Truncated("placeholder"))
}
