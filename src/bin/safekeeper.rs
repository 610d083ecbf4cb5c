//! Placeholder until the endpoint is there.
fn main() {}
