//! What safekeepers say to each other.
//!
//! # NAME
//!
//! peers - tells the other members of each timeline what must be known everywhere, and learns it from them
//!
//! | File | What is in it |
//! |---|---|
//! | [`exchange`] | the messages, and the list of members that clients may ask for |

pub mod exchange;
