//! From one primary to another on purpose, with nothing lost and nothing left behind.
