//! All chance in a history comes from its seed: one stream of numbers per place that needs some, so that a change in one
//! place doesn't change what happens in the others.

use std::ops::Range;

/// A stream of numbers (splitmix64).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give overlapping streams.
        let mut dice = Self(seed ^ 0x5AFE_6EEB_E12B_0D1E);
        Self(dice.next())
    }

    /// Another stream, told apart by `label`.
    pub fn fork(&self, label: u64) -> Self {
        Self::new(self.0 ^ label.wrapping_mul(0xA24B_AED4_963E_E407))
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `range`, which must not be empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// An index below `count`, which must not be 0.
    pub fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.within(0..count as u64)).unwrap()
    }

    /// True in `percent` of a hundred cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.within(0..100) < percent
    }

    /// One of `choices`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }
}
