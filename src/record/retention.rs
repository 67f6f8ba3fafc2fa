//! Which invocations to forget: planned as plain data first, so that a plan can be shown before it is carried out.

use std::{collections::HashMap, time::Duration};

use super::{
    handle::Record,
    row::{InvocationRow, RootId},
};
use crate::units::now_ms;

/// How much history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Invocations that began longer ago are forgotten.
    pub max_age: Option<Duration>,
    /// Of more than this many, the oldest are forgotten.
    pub max_invocations: Option<usize>,
}

/// Invocations to forget.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetentionPlan {
    /// Their ids, newest first.
    pub remove: Vec<String>,
    /// How many stay.
    pub kept: usize,
}

impl Retention {
    /// Decides over `invocations`, newest first, at `now_ms`. Never forgets one that is not over, nor the newest of
    /// a root: `get` and `stat` start from it.
    pub fn plan(&self, invocations: &[InvocationRow], now_ms: i64) -> RetentionPlan {
        let mut newest: HashMap<RootId, u64> = HashMap::new();
        for row in invocations {
            if let Some(root) = row.root {
                let version = newest.entry(root).or_default();
                *version = row.version.max(*version);
            }
        }
        let max_age_ms = self
            .max_age
            .map(|age| i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let mut plan = RetentionPlan::default();
        for row in invocations {
            let age = now_ms.saturating_sub(row.started_ms);
            let too_old = max_age_ms.is_some_and(|max| age > max);
            let too_many = self.max_invocations.is_some_and(|max| plan.kept >= max);
            let is_newest = row
                .root
                .is_some_and(|root| newest.get(&root) == Some(&row.version));
            if (too_old || too_many) && row.state.is_over() && !is_newest {
                plan.remove.push(row.invocation_id.clone());
            } else {
                plan.kept += 1;
            }
        }
        plan
    }
}

impl Record {
    /// What a retention would forget now.
    pub fn plan_retention(&self, retention: &Retention) -> RetentionPlan {
        retention.plan(&self.invocations(usize::MAX), now_ms())
    }

    /// Forgets what a plan names.
    pub fn execute_retention(&self, plan: &RetentionPlan) {
        self.remove_invocations(&plan.remove);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::InvocationState;

    const DAY_MS: i64 = 86_400_000;

    fn row(id: &str, days: i64, root: u32, state: InvocationState) -> InvocationRow {
        InvocationRow {
            invocation_id: id.into(),
            started_ms: days * DAY_MS,
            version: days.unsigned_abs(),
            root: (root != 0).then_some(RootId(root)),
            state,
            ..InvocationRow::default()
        }
    }

    fn removed(retention: Retention) -> Vec<String> {
        use InvocationState::{Running, Settled};
        let rows = [
            row("e", 90, 1, Settled),
            row("d", 80, 1, Settled),
            row("running", 50, 1, Running),
            row("c", 40, 1, Settled),
            row("newest of 2", 30, 2, Settled),
            row("b", 20, 2, Settled),
            row("no root", 10, 0, Settled),
        ];
        let plan = retention.plan(&rows, 100 * DAY_MS);
        assert_eq!(plan.kept + plan.remove.len(), rows.len());
        plan.remove
    }

    #[test]
    fn the_old_go_but_never_what_runs_or_a_roots_newest() {
        let max_age = Some(Duration::from_secs(30 * 86_400));
        assert_eq!(
            removed(Retention {
                max_age,
                max_invocations: None
            }),
            ["c", "b", "no root"]
        );
    }

    #[test]
    fn builds_of_the_future_have_no_age() {
        let rows = [
            row("newest of 1", 9000, 1, InvocationState::Settled),
            row("of another clock", 8999, 1, InvocationState::Settled),
            row("a little ahead", 101, 0, InvocationState::Settled),
            row("now", 100, 0, InvocationState::Settled),
        ];
        let retention = |max_age| Retention {
            max_age,
            max_invocations: None,
        };
        let age = Some(Duration::from_secs(14 * 86_400));
        assert!(retention(age).plan(&rows, 100 * DAY_MS).remove.is_empty());
        assert!(retention(None).plan(&rows, 100 * DAY_MS).remove.is_empty());
        for now in [i64::MIN, i64::MAX] {
            let plan = retention(age).plan(&rows, now);
            assert_eq!(plan.kept + plan.remove.len(), rows.len(), "nothing overflows");
        }
    }

    #[test]
    fn the_surplus_goes_oldest_first() {
        let max_invocations = Some(5);
        assert_eq!(
            removed(Retention {
                max_age: None,
                max_invocations
            }),
            ["b", "no root"]
        );
        assert!(
            removed(Retention {
                max_age: None,
                max_invocations: None
            })
            .is_empty()
        );
    }
}
