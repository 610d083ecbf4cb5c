//! A small seeded generator, so that a failing run can be repeated from the seed it printed.

use std::hash::{BuildHasher, Hasher};

/// SplitMix64 (Steele, Lea, Flood 2014): every seed gives a full-period sequence; not for secrets.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// A sequence that differs between processes and calls.
    #[must_use]
    pub fn from_entropy() -> Random {
        Random(std::collections::hash_map::RandomState::new().build_hasher().finish())
    }

    /// Seed from the environment variable `name`, or a fresh one; printed either way.
    #[must_use]
    pub fn from_env(name: &str) -> Random {
        let seed = std::env::var(name).ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| Random::from_entropy().next() >> 32);
        println!("random seed: {name}={seed}");
        Random::new(seed)
    }

    /// The next 64 bits.
    #[expect(clippy::should_implement_trait, reason = "an endless sequence of one type, not an iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound` (which must not be 0), with a bias too small to matter here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// One element of `choices`; `None` when there is none.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> Option<&'a T> {
        let index = self.below(choices.len() as u64);
        choices.get(usize::try_from(index).unwrap_or(0))
    }
}
