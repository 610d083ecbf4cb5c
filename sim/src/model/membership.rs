//! Who changes the membership.
