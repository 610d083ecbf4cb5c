//! Chance that comes out the same in every run.

/// A source of decisions.
#[derive(Clone, Debug)]
pub enum Dice {
    /// Always no, or the smallest number.
    Never,
    /// Always yes, or the largest number.
    Always,
    /// By this seed.
    Seeded(u64),
}

impl Dice {
    /// Yes or no.
    pub fn roll(&mut self) -> bool {
        self.below(2) == 1
    }

    /// A number below `count`, which is not 0.
    pub fn below(&mut self, count: usize) -> usize {
        match self {
            Dice::Never => 0,
            Dice::Always => count - 1,
            Dice::Seeded(state) => {
                // splitmix64
                *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                z ^= z >> 31;
                let scaled = (u128::from(z) * count as u128) >> 64;
                usize::try_from(scaled).unwrap()
            }
        }
    }
}
