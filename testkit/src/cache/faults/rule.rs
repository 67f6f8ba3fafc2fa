//! A rule: what happens, to what, how often.

use crate::Chance;

/// How often a rule is applied before it is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Times {
    /// The first time only.
    Once,
    /// The first N times.
    First(u32),
    /// Always.
    Always,
    /// By chance, and in the same way every time that the same seed is given.
    Random {
        /// Makes the chance.
        seed: u64,
        /// How often in a thousand.
        per_mille: u32,
        /// How many times at most.
        most: u32,
    },
}

#[derive(Debug)]
pub(super) struct Rule<Match, Fault> {
    /// `None` matches everything.
    on: Option<Match>,
    pub(super) fault: Fault,
    /// `None` is forever.
    left: Option<u32>,
    /// State of the generator, and how often in a thousand it says yes.
    chance: Option<(Chance, u32)>,
}

impl<Match: PartialEq, Fault: Copy> Rule<Match, Fault> {
    pub(super) const fn new(on: Option<Match>, fault: Fault, times: Times) -> Self {
        let (left, chance) = match times {
            Times::Once => (Some(1), None),
            Times::First(times) => (Some(times), None),
            Times::Always => (None, None),
            Times::Random {
                seed,
                per_mille,
                most,
            } => (Some(most), Some((Chance::new(seed), per_mille))),
        };
        Self {
            on,
            fault,
            left,
            chance,
        }
    }

    /// Whether it is its turn. Where chance decides, every question is another throw.
    pub(super) fn matches(&mut self, candidate: &Match) -> bool {
        self.left != Some(0) && self.on.as_ref().is_none_or(|on| on == candidate) && self.throws()
    }

    fn throws(&mut self) -> bool {
        self.chance
            .as_mut()
            .is_none_or(|(chance, per_mille)| chance.below(1000) < u64::from(*per_mille))
    }

    /// Uses the rule once.
    pub(super) fn take(&mut self) -> Fault {
        self.left = self.left.map(|left| left.saturating_sub(1));
        self.fault
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_repeated_by_its_seed_and_ends() {
        let thrown = |seed| {
            let times = Times::Random {
                seed,
                per_mille: 300,
                most: 200,
            };
            let mut rule = Rule::new(None, (), times);
            (0..2000)
                .map(|_| rule.matches(&()).then(|| rule.take()).is_some())
                .collect::<Vec<_>>()
        };
        let first = thrown(1);
        assert_eq!(first, thrown(1));
        assert_ne!(first, thrown(2));
        assert_eq!(first.iter().filter(|hit| **hit).count(), 200);
        let early = first[..300].iter().filter(|hit| **hit).count();
        assert!((50..150).contains(&early), "{early}");
    }
}
