//! What is top-level: a pure function from what the stream says to required, optional or only known.
//!
//! The rules are those of Bazel's `RemoteOutputChecker`, as far as a stream shows what they need; the user's
//! [`Policy`] stands before them.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use super::{
    pattern,
    policy::{DownloadMode, Kind, Policy},
};
use crate::output::Class;

/// The build tool's command, as far as selection depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) enum Command {
    /// `build`, and every other that has no rule of its own.
    #[default]
    Build,
    /// `test`.
    Test,
    /// `coverage`.
    Coverage,
    /// `run`: what is about to be executed is wanted in every mode.
    Run,
}

impl Command {
    /// From the name in `BuildStarted.command`.
    pub(crate) fn from_name(name: &str) -> Self {
        match name {
            "test" => Self::Test,
            "coverage" => Self::Coverage,
            "run" => Self::Run,
            _ => Self::Build,
        }
    }

    pub(super) const fn tests(self) -> bool {
        matches!(self, Self::Test | Self::Coverage)
    }
}

/// How an output came to be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// By an output group of a completed target or aspect.
    ///
    /// Where some of the group's artifacts were not built, it names those that were, and Bazel's own top-level mode
    /// brings them, too (7.7.1; 4.2.3 does not name such groups).
    Group {
        /// The target is a test rule.
        test_rule: bool,
    },
    /// By a test's result.
    TestOutput {
        /// Whether all of the test has passed in the end; none of what is not one test's.
        passed: Option<bool>,
    },
    /// By the manifest of a target's runfiles.
    Runfiles {
        /// The target is a test rule.
        test_rule: bool,
    },
    /// By a set that no completed target refers to.
    Unreferenced,
    /// As the output of an action that was reported by itself.
    Action,
}

impl Origin {
    const fn is(self, kind: Kind) -> bool {
        match kind {
            Kind::TestOutput => matches!(self, Self::TestOutput { .. }),
            Kind::Runfiles => matches!(self, Self::Runfiles { .. }),
        }
    }

    const fn passed(self) -> Option<bool> {
        match self {
            Self::TestOutput { passed } => passed,
            _ => None,
        }
    }
}

/// The part of an output's circumstances that it shares with the rest of its group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct GroupContext<'a> {
    /// The build tool's command.
    pub command: Command,
    /// The target's label.
    pub label: &'a str,
    /// The aspect, or empty.
    pub aspect: &'a str,
    /// The output group, or empty.
    pub group: &'a str,
    /// How it came to be named.
    pub origin: Origin,
}

/// The verdict on one output, with the rule that gave it, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Required, optional or known.
    pub class: Class,
    /// Which rule said so.
    pub rule: Arc<str>,
}

/// Number of a profile in its [`Selector`]: what all groups have in common that treat every file alike.
pub(crate) type ProfileId = usize;

/// What is left to decide once the group is known: groups with the same profile treat every file alike, so a set
/// that was expanded under a profile need never be expanded under it again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Profile {
    /// Which of the policy's rules apply to the group, as far as it alone decides.
    rules: Vec<usize>,
    /// The verdict if neither rule nor regex nor size speaks, with its reason.
    base: (Class, &'static str),
    /// Whether `--download-regex` can lift a file to required.
    regexes: bool,
}

/// A policy made ready for one invocation.
#[derive(Debug)]
pub(crate) struct Selector {
    policy: Policy,
    /// With each, the reason of its base verdict.
    profiles: Vec<(Profile, Arc<str>)>,
    ids: HashMap<Profile, ProfileId>,
    rule_texts: Vec<Arc<str>>,
    reasons: HashMap<Cow<'static, str>, Arc<str>>,
}

impl Selector {
    /// Makes a policy ready.
    pub(crate) fn new(policy: Policy) -> Self {
        let rule_texts = policy
            .rules
            .iter()
            .map(|rule| format!("rule: {rule}").into())
            .collect();
        Self {
            policy,
            profiles: Vec::new(),
            ids: HashMap::new(),
            rule_texts,
            reasons: HashMap::new(),
        }
    }

    /// The profile of a group.
    pub(crate) fn profile(&mut self, context: &GroupContext<'_>) -> ProfileId {
        let rules = self
            .policy
            .rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| {
                rule.kind.is_none_or(|kind| context.origin.is(kind))
                    && rule
                        .passed
                        .is_none_or(|wanted| context.origin.passed() == Some(wanted))
                    && rule
                        .label
                        .as_ref()
                        .is_none_or(|p| pattern::matches(std::slice::from_ref(p), context.label))
                    && rule.aspect.as_deref().is_none_or(|wanted| match wanted {
                        "*" => !context.aspect.is_empty(),
                        _ => wanted == context.aspect,
                    })
                    && rule
                        .output_group
                        .as_deref()
                        .is_none_or(|wanted| wanted == context.group)
            })
            .map(|(i, _)| i)
            .collect();
        let profile = Profile {
            rules,
            base: base(&self.policy, context),
            // Bazel ignores the patterns where everything is downloaded anyway.
            regexes: self.policy.mode != DownloadMode::All,
        };
        if let Some(&id) = self.ids.get(&profile) {
            return id;
        }
        let id = self.profiles.len();
        let reason = intern(&mut self.reasons, Cow::Borrowed(profile.base.1));
        self.profiles.push((profile.clone(), reason));
        self.ids.insert(profile, id);
        id
    }

    /// Whether the verdict on a file may depend on the tree that it lies in.
    pub(crate) fn looks_at_trees(&self, profile: ProfileId) -> bool {
        self.profiles.get(profile).is_some_and(|(profile, _)| {
            let has_path = |&i: &usize| self.policy.rules[i].path.is_some();
            (profile.regexes && !self.policy.regexes.is_empty()) || profile.rules.iter().any(has_path)
        })
    }

    /// The most that any file can be wanted, whatever its path and size.
    pub(crate) fn most(&self, profile: ProfileId) -> Class {
        let Some((profile, _)) = self.profiles.get(profile) else {
            return Class::Known;
        };
        if profile.regexes && !self.policy.regexes.is_empty() {
            return Class::Required;
        }
        let rules = profile.rules.iter().map(|i| self.policy.rules[*i].verdict);
        rules.fold(profile.base.0, Class::max)
    }

    /// The verdict on one output of a group. `tree_root` is the root of the tree artifact that it lies in; `size` is
    /// unknown for symlinks and directories.
    pub(crate) fn select(
        &mut self,
        profile: ProfileId,
        path: &str,
        tree_root: Option<&str>,
        size: Option<u64>,
    ) -> Verdict {
        let rules = self
            .profiles
            .get(profile)
            .map_or(&[][..], |(profile, _)| &profile.rules);
        let first = rules
            .iter()
            .copied()
            .find(|i| self.policy.rules[*i].picks(path, tree_root, size));
        let Some(i) = first else {
            return self.without_rules(profile, path, tree_root, size);
        };
        let rule = &self.policy.rules[i];
        let (raises, class) = (rule.raises, rule.verdict);
        let verdict = Verdict {
            class,
            rule: self.rule_texts[i].clone(),
        };
        if raises {
            let without = self.without_rules(profile, path, tree_root, size);
            return if without.class >= class { without } else { verdict };
        }
        verdict
    }

    fn without_rules(
        &mut self,
        profile: ProfileId,
        path: &str,
        tree_root: Option<&str>,
        size: Option<u64>,
    ) -> Verdict {
        let Some((profile, reason)) = self.profiles.get(profile) else {
            return Verdict {
                class: Class::Known,
                rule: "".into(),
            };
        };
        if profile.regexes {
            for regex in &self.policy.regexes {
                if regex.matches(path) || tree_root.is_some_and(|root| regex.matches(root)) {
                    let text = format!("--download-regex={regex}");
                    return Verdict {
                        class: Class::Required,
                        rule: intern(&mut self.reasons, Cow::Owned(text)),
                    };
                }
            }
        }
        let (class, _) = profile.base;
        if class > Class::Known
            && let (Some(max), Some(size)) = (self.policy.max_size, size)
            && size > max
        {
            return Verdict {
                class: Class::Known,
                rule: intern(&mut self.reasons, Cow::Borrowed("larger than --max-size")),
            };
        }
        Verdict {
            class,
            rule: reason.clone(),
        }
    }
}

fn intern(reasons: &mut HashMap<Cow<'static, str>, Arc<str>>, reason: Cow<'static, str>) -> Arc<str> {
    if let Some(known) = reasons.get(&reason) {
        return known.clone();
    }
    let text: Arc<str> = (&*reason).into();
    reasons.insert(reason, text.clone());
    text
}

/// Bazel's rules.
fn base(policy: &Policy, context: &GroupContext<'_>) -> (Class, &'static str) {
    if policy.mode == DownloadMode::All {
        return match context.origin {
            Origin::Action => (Class::Optional, "--download=all, action output"),
            _ => (Class::Required, "--download=all"),
        };
    }
    if !pattern::matches(&policy.targets, context.label) {
        return (Class::Known, "its target is not among --target");
    }
    match context.origin {
        Origin::Unreferenced => (Class::Known, "no TargetComplete event refers to it"),
        Origin::Action => (Class::Known, "an action's output, not a target's"),
        // They are in a hidden output group, which is built beside the default ones.
        Origin::Runfiles { .. }
            if !policy.output_groups.is_empty() && !policy.output_groups.iter().any(|g| g == "default") =>
        {
            (Class::Known, "its output group is not among --output-group")
        }
        Origin::Runfiles { .. } if context.command == Command::Run => {
            (Class::Required, "top-level: runfiles of the target to run")
        }
        Origin::Runfiles { .. } if policy.mode == DownloadMode::Minimal => {
            (Class::Known, "--download=minimal")
        }
        Origin::Runfiles { test_rule: true } if context.command.tests() => {
            (Class::Known, "runfiles of a test in a command that runs tests")
        }
        Origin::Runfiles { .. } => (Class::Required, "top-level: runfiles of a requested target"),
        Origin::TestOutput { .. } => match (policy.mode, context.command) {
            (DownloadMode::Minimal, _) => (Class::Known, "--download=minimal"),
            (_, Command::Test | Command::Coverage) => (Class::Required, "top-level: output of a test"),
            _ => (
                Class::Known,
                "output of a test in a command that does not run tests",
            ),
        },
        Origin::Group { test_rule, .. } => {
            // Hidden groups are built for their side effects; Bazel does not count them as important outputs.
            if context.group.starts_with("_hidden_") {
                (Class::Known, "its output group is hidden")
            } else if !policy.output_groups.is_empty()
                && !policy.output_groups.iter().any(|g| g == context.group)
            {
                (Class::Known, "its output group is not among --output-group")
            } else if context.command == Command::Run {
                (Class::Required, "top-level: target to run")
            } else if policy.mode == DownloadMode::Minimal {
                (Class::Known, "--download=minimal")
            } else if test_rule && context.command.tests() && context.aspect.is_empty() {
                (Class::Known, "output of a test in a command that runs tests")
            } else {
                (Class::Required, "top-level: output of a requested target")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "bazel-out/k8/bin/a/x.bin";

    fn group(test_rule: bool) -> Origin {
        Origin::Group { test_rule }
    }

    fn policy(mode: DownloadMode) -> Policy {
        Policy {
            mode,
            ..Policy::default()
        }
    }

    fn verdict(policy: &Policy, command: &str, group_name: &str, origin: Origin) -> Class {
        verdict_of_aspect(policy, command, "", group_name, origin)
    }

    fn verdict_of_aspect(
        policy: &Policy,
        command: &str,
        aspect: &str,
        group_name: &str,
        origin: Origin,
    ) -> Class {
        let mut selector = Selector::new(policy.clone());
        let profile = selector.profile(&GroupContext {
            command: Command::from_name(command),
            label: "//a:x",
            aspect,
            group: group_name,
            origin,
        });
        selector.select(profile, PATH, None, Some(100)).class
    }

    /// Bazel's own rules, one line a case.
    #[test]
    fn bazels_rules() {
        use Class::{Known, Optional, Required};
        use DownloadMode::{All, Minimal, Toplevel};
        let plain = group(false);
        let test = group(true);
        for (mode, command, group_name, origin, expected) in [
            (Toplevel, "build", "default", plain, Required),
            (Toplevel, "build", "default", test, Required),
            (Toplevel, "fetch", "default", plain, Required),
            (Toplevel, "build", "_hidden_top_level_INTERNAL_", plain, Known),
            (Toplevel, "build", "_validation", plain, Required),
            (Toplevel, "test", "default", plain, Required),
            (Toplevel, "test", "default", test, Known),
            (Toplevel, "coverage", "default", test, Known),
            (Toplevel, "run", "default", test, Required),
            (
                Toplevel,
                "test",
                "",
                Origin::TestOutput { passed: None },
                Required,
            ),
            (
                Toplevel,
                "coverage",
                "",
                Origin::TestOutput { passed: None },
                Required,
            ),
            (Toplevel, "build", "", Origin::TestOutput { passed: None }, Known),
            (Toplevel, "build", "", Origin::Unreferenced, Known),
            (Toplevel, "build", "", Origin::Action, Known),
            (Minimal, "build", "default", plain, Known),
            (Minimal, "test", "", Origin::TestOutput { passed: None }, Known),
            (Minimal, "run", "default", plain, Required),
            (All, "build", "default", plain, Required),
            (All, "test", "default", test, Required),
            (All, "build", "", Origin::Unreferenced, Required),
            (All, "build", "", Origin::Action, Optional),
        ] {
            assert_eq!(
                verdict(&policy(mode), command, group_name, origin),
                expected,
                "{mode} {command} {group_name:?} {origin:?}"
            );
        }
    }

    /// Bazel leaves out the test, not what an aspect makes of it.
    #[test]
    fn what_aspects_make_of_tests_is_brought() {
        let policy = policy(DownloadMode::Toplevel);
        for command in ["build", "test", "coverage"] {
            let class = verdict_of_aspect(&policy, command, "//x.bzl%a", "report", group(true));
            assert_eq!(class, Class::Required, "{command}");
        }
    }

    #[test]
    fn a_rule_that_only_adds_takes_nothing_away() {
        use Class::{Known, Optional, Required};
        use DownloadMode::{Minimal, Toplevel};
        for (mode, text, expected) in [
            (Toplevel, "optional path=.*", Required),
            (Toplevel, "known", Required),
            (Minimal, "optional path=.*", Optional),
            (Minimal, "required", Required),
            (Minimal, "required path=.*\\.other", Known),
        ] {
            let mut p = policy(mode);
            p.rules = vec![crate::invocation::policy::Rule {
                raises: true,
                ..text.parse().unwrap()
            }];
            assert_eq!(
                verdict(&p, "build", "default", group(false)),
                expected,
                "{mode} {text}"
            );
            // A rule of the user's own decides before it.
            p.rules.insert(0, "known".parse().unwrap());
            assert_eq!(
                verdict(&p, "build", "default", group(false)),
                Known,
                "{mode} {text}"
            );
        }
    }

    #[test]
    fn filters_narrow_the_top_level_and_regexes_widen_it() {
        let plain = group(false);
        let mut p = policy(DownloadMode::Toplevel);
        p.targets = vec!["//b/...".parse().unwrap()];
        assert_eq!(verdict(&p, "build", "default", plain), Class::Known);
        p.regexes = vec![".*/x\\.bin".parse().unwrap()];
        assert_eq!(verdict(&p, "build", "default", plain), Class::Required);

        let mut p = policy(DownloadMode::Toplevel);
        p.output_groups = vec!["extra".to_owned()];
        assert_eq!(verdict(&p, "build", "default", plain), Class::Known);
        assert_eq!(verdict(&p, "build", "extra", plain), Class::Required);

        let mut p = policy(DownloadMode::Toplevel);
        p.max_size = Some(99);
        assert_eq!(verdict(&p, "build", "default", plain), Class::Known);
        p.max_size = Some(100);
        assert_eq!(verdict(&p, "build", "default", plain), Class::Required);

        let mut p = policy(DownloadMode::Minimal);
        p.regexes = vec![".*\\.bin".parse().unwrap()];
        assert_eq!(verdict(&p, "build", "default", group(false)), Class::Required);
    }

    #[test]
    fn the_first_matching_rule_wins() {
        let mut p = policy(DownloadMode::Toplevel);
        p.rules = [
            "known min-size=1GiB",
            "optional label=//a/... path=.*\\.bin",
            "known",
        ]
        .iter()
        .map(|r| r.parse().unwrap())
        .collect();
        let mut selector = Selector::new(p);
        let profile = selector.profile(&GroupContext {
            command: Command::Build,
            label: "//a:x",
            aspect: "",
            group: "default",
            origin: group(false),
        });
        let got = selector.select(profile, PATH, None, Some(5));
        assert_eq!(got.class, Class::Optional);
        assert!(got.rule.contains("label=//a/..."), "{}", got.rule);
        assert_eq!(
            selector.select(profile, PATH, None, Some(2 << 30)).class,
            Class::Known
        );
        assert_eq!(
            selector.select(profile, "bazel-out/y", None, Some(5)).class,
            Class::Known
        );
        // A file in a tree counts by the tree's root as well.
        let in_tree = selector.select(profile, "bazel-out/t/y", Some("bazel-out/t.bin"), Some(5));
        assert_eq!(in_tree.class, Class::Optional);
    }

    #[test]
    fn groups_that_are_treated_alike_share_a_profile() {
        let mut p = policy(DownloadMode::Toplevel);
        p.rules = vec!["optional label=//b/...".parse().unwrap()];
        let mut selector = Selector::new(p);
        let mut of = |label| {
            selector.profile(&GroupContext {
                command: Command::Build,
                label,
                aspect: "",
                group: "default",
                origin: group(false),
            })
        };
        assert_eq!(of("//a:x"), of("//a:y"));
        assert_ne!(of("//a:x"), of("//b:y"));
    }

    #[test]
    fn rules_distinguish_outputs_of_failed_tests_and_runfiles_from_others() {
        use Class::{Known, Required};
        let mut policy = policy(DownloadMode::Minimal);
        let rules = ["required test-output status=failed", "required runfiles"];
        policy.rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let runfiles = Origin::Runfiles { test_rule: false };
        for (origin, expected) in [
            (Origin::TestOutput { passed: Some(false) }, Required),
            (Origin::TestOutput { passed: Some(true) }, Known),
            (Origin::TestOutput { passed: None }, Known),
            (runfiles, Required),
            (group(true), Known),
        ] {
            assert_eq!(verdict(&policy, "test", "", origin), expected, "{origin:?}");
        }
    }

    #[test]
    fn the_most_that_a_file_can_be_wanted_does_not_depend_on_the_one_that_is_looked_at() {
        use Class::{Known, Optional, Required};
        let most = |mode, rules: &[&str], regexes: &[&str], command: &str, test_rule| {
            let mut policy = policy(mode);
            policy.rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
            policy.regexes = regexes.iter().map(|regex| regex.parse().unwrap()).collect();
            let mut selector = Selector::new(policy);
            let profile = selector.profile(&GroupContext {
                command: Command::from_name(command),
                label: "//a:x",
                aspect: "",
                group: "",
                origin: Origin::Runfiles { test_rule },
            });
            selector.most(profile)
        };
        use DownloadMode::{Minimal, Toplevel};
        for (mode, rules, regexes, command, test_rule, expected) in [
            (Minimal, &[][..], &[][..], "build", false, Known),
            (
                Minimal,
                &["required runfiles path=.*y"],
                &[],
                "build",
                false,
                Required,
            ),
            (
                Minimal,
                &["optional runfiles min-size=1MiB"],
                &[],
                "build",
                false,
                Optional,
            ),
            (
                Minimal,
                &["required runfiles label=//b:x"],
                &[],
                "build",
                false,
                Known,
            ),
            (Minimal, &["known runfiles"], &["y"], "build", false, Required),
            (Toplevel, &[], &[], "test", true, Known),
            (
                Toplevel,
                &["known runfiles path=.*y"],
                &[],
                "build",
                false,
                Required,
            ),
        ] {
            let found = most(mode, rules, regexes, command, test_rule);
            assert_eq!(found, expected, "{mode:?} {rules:?} {regexes:?} {command}");
        }
    }
}
