//! Random numbers from a seed: for generated builds, injected faults, and repeatable tests.

use std::time::Duration;

/// Numbers that are the same for a seed on every machine and with every version of a library (SplitMix64).
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    /// From the beginning of a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Another source, which does not depend on how much is taken from this one afterwards.
    pub const fn another(&mut self) -> Self {
        Self(self.number())
    }

    /// From 0 to below `end`, which is not 0.
    pub const fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// From `first` to `last`, both included.
    pub const fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }

    /// From 0 to 1.
    pub fn part(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// True with a probability from 0 to 1.
    pub fn happens(&mut self, probability: f64) -> bool {
        self.part() < probability
    }

    /// One of these, of which there must be some.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// Up to `longest`; short ones are as likely as long ones, as far as that goes.
    pub fn time(&mut self, longest: Duration) -> Duration {
        let shrunk = longest.mul_f64(0.001_f64.powf(self.part()));
        // Whole milliseconds are easier to read.
        Duration::from_millis(shrunk.as_millis() as u64 + 1)
    }

    /// This many bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length.div_ceil(8))
            .flat_map(|_| self.number().to_le_bytes())
            .collect();
        bytes.truncate(length);
        bytes
    }
}
