//! The members side by side.
