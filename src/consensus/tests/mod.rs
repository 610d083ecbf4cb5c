//! Consensus as transcripts: what is said, and what must follow.

mod proposer;
