//! Chance from a seed.

use std::time::Duration;

/// Numbers that are the same for a seed on every machine and with every version of a library (SplitMix64).
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Another source, which does not depend on how much is taken from this one afterwards.
    pub(crate) const fn another(&mut self) -> Self {
        Self(self.number())
    }

    /// From 0 to below `end`.
    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    pub(crate) const fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }

    /// From 0 to 1.
    pub(crate) fn part(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(crate) fn happens(&mut self, probability: f64) -> bool {
        self.part() < probability
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// Up to `longest`; short ones are as likely as long ones, as far as that goes.
    pub(crate) fn time(&mut self, longest: Duration) -> Duration {
        let shrunk = longest.mul_f64(0.001_f64.powf(self.part()));
        // Whole milliseconds are easier to read.
        Duration::from_millis(shrunk.as_millis() as u64 + 1)
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length.div_ceil(8))
            .flat_map(|_| self.number().to_le_bytes())
            .collect();
        bytes.truncate(length);
        bytes
    }
}
