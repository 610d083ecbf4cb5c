//! What a replication slot can be called.

/// Longest name (`NAMEDATALEN` - 1).
const MAX_NAME: usize = 63;

/// A name that no slot can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSlotName {
    /// It has no characters.
    #[error("is too short")]
    Empty,
    /// It has more than 63 bytes.
    #[error("is too long")]
    TooLong,
    /// It has a character that isn't allowed.
    #[error("contains invalid character")]
    Character,
}

/// PostgreSQL's rules: 1 to 63 lower case letters, digits and underscores.
pub fn check_slot_name(name: &str) -> Result<(), BadSlotName> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    match name.len() {
        0 => Err(BadSlotName::Empty),
        length if length > MAX_NAME => Err(BadSlotName::TooLong),
        _ if name.bytes().all(legal) => Ok(()),
        _ => Err(BadSlotName::Character),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_postgresqls() {
        assert!(check_slot_name("standby_1").is_ok() && check_slot_name(&"x".repeat(63)).is_ok());
        assert_eq!(check_slot_name(""), Err(BadSlotName::Empty));
        assert_eq!(check_slot_name(&"x".repeat(64)), Err(BadSlotName::TooLong));
        for bad in ["A", "a-b", "ä", "a b", "a\0"] {
            assert_eq!(check_slot_name(bad), Err(BadSlotName::Character), "{bad:?}");
        }
    }
}
