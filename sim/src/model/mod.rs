//! The real acceptor and proposer inside a model checker.
