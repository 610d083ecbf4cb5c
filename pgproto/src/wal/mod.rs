//! The format of the write-ahead log, PostgreSQL 14 to 18: page headers and record boundaries.
//!
//! [`RecordScanner`] is fed WAL as it arrives, in pieces of any size, and says where the last whole record ends. It keeps
//! a few dozen bytes of state and never a record's body, so it is cheap to clone: feed a clone, keep it on success.
