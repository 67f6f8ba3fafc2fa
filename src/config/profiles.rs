//! Named sets of rules, for what tools read of a build.

use anyhow::{Error, anyhow};
use clap::Args;
use serde::Serialize;

use super::ConfigError;
use crate::invocation::policy::Rule;

/// Rules with their reasons, by the names of their sets. They add to what is downloaded anyway, so none is `known`.
const BUILT_IN: &[(&str, &[(&str, &str)])] = &[
    (
        "coverage",
        &[
            (
                r"required path=.*/(baseline_)?coverage\.dat|bazel-out/_coverage/.*",
                "coverage of each test, and the combined report",
            ),
            (r"required path=.*\.gcno", "what gcov needs besides its counters"),
            (
                r"required path=.*\.(profdata|profraw)",
                "what llvm-cov needs besides the program",
            ),
            (
                r"required path=.*-(instrumented|offline)\.jar",
                "instrumented classes, which JaCoCo's report is about",
            ),
        ],
    ),
    (
        "debug",
        &[
            (
                r"required path=.*\.(dwp|dwo)",
                "debug information beside the program (--fission)",
            ),
            (
                r"required path=.*\.(debug|dbg|sym|unstripped)",
                "debug information that was split off, and symbols",
            ),
            (
                r"required path=.*\.dSYM(/.*)?|.*\.dSYM\.zip|.*\.pdb",
                "debug information of other platforms",
            ),
            (r"required path=.*\.(js|css)\.map", "source maps"),
        ],
    ),
    (
        "ide",
        &[
            (
                r"optional path=.*\.(h|hh|hpp|hxx|inc|ipp|tcc)",
                "generated headers, which clangd includes",
            ),
            (
                r"optional path=.*\.(java|kt|scala|groovy|go|py|pyi|rs|ts|cs|swift|dart|proto)",
                "generated sources, which language servers read like the user's own",
            ),
            (
                r"optional path=.*\.(jar|srcjar)",
                "classes, header jars and generated sources of the JVM's languages",
            ),
            (
                r"optional path=.*\.(so|dylib|dll)",
                "proc macros, which rust-analyzer loads; extension modules of Python",
            ),
            (
                r"optional path=.*\.(rlib|rmeta|d\.ts|x|pcm|swiftmodule)",
                "compiled interfaces of dependencies",
            ),
            (
                r"optional path=.*(compile_commands|rust-project|\.rust_analyzer_crate_spec|\.pkg)\.json|.*intellij-info\.txt",
                "what aspects write for clangd, rust-analyzer, gopls and IntelliJ",
            ),
        ],
    ),
];

/// Flags of profiles.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ProfileArgs {
    /// Rule of a profile, instead of those that it has: NAME=RULE, also for a profile of your own (repeatable)
    #[arg(
        long,
        value_name = "NAME=RULE",
        env = "OUTHAUL_PROFILE_RULE",
        value_delimiter = ';'
    )]
    pub profile_rule: Vec<String>,
}

/// A named set of rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Profile {
    /// What `--profile` calls it.
    pub(crate) name: String,
    /// Its rules, and why they are there; nobody says why of the user's own.
    pub(crate) rules: Vec<ProfileRule>,
}

/// A rule of a profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ProfileRule {
    /// As `--rule` takes it.
    pub(crate) rule: String,
    /// What it is for; empty for the user's own.
    pub(crate) reason: &'static str,
}

impl ProfileArgs {
    /// All profiles that there are, by their names.
    ///
    /// # Errors
    /// Naming the rule that is wrong.
    pub(crate) fn all(&self) -> Result<Vec<Profile>, ConfigError> {
        let mut own: Vec<Profile> = Vec::new();
        for text in &self.profile_rule {
            let wrong = |reason: Error| ConfigError::new(format!("--profile-rule={text}"), reason);
            let (name, rule) = text
                .split_once('=')
                .filter(|(name, _)| !name.is_empty() && !name.contains(char::is_whitespace))
                .ok_or_else(|| wrong(anyhow!("it is not of the form NAME=RULE")))?;
            rule.parse::<Rule>().map_err(wrong)?;
            let rule = ProfileRule {
                rule: rule.to_owned(),
                reason: "",
            };
            match own.iter_mut().find(|profile| profile.name == name) {
                Some(profile) => profile.rules.push(rule),
                None => own.push(Profile {
                    name: name.to_owned(),
                    rules: vec![rule],
                }),
            }
        }
        let built_in = BUILT_IN.iter().map(|(name, rules)| Profile {
            name: (*name).to_owned(),
            rules: rules
                .iter()
                .map(|&(rule, reason)| ProfileRule {
                    rule: rule.to_owned(),
                    reason,
                })
                .collect(),
        });
        let built_in: Vec<Profile> = built_in
            .filter(|profile| own.iter().all(|own| own.name != profile.name))
            .collect();
        own.extend(built_in);
        own.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(own)
    }

    /// The rules of some profiles, in their order.
    ///
    /// # Errors
    /// When there is no such profile, or a rule is wrong.
    pub(super) fn rules(&self, names: &[String]) -> Result<Vec<Rule>, ConfigError> {
        let all = self.all()?;
        let mut rules = Vec::new();
        for name in names {
            let flag = || format!("--profile={name}");
            let profile = all.iter().find(|profile| profile.name == *name).ok_or_else(|| {
                let names: Vec<&str> = all.iter().map(|profile| profile.name.as_str()).collect();
                let reason = format!("no such profile; there are {}", names.join(", "));
                ConfigError::new(flag(), reason)
            })?;
            for rule in &profile.rules {
                let rule: Rule = rule.rule.parse().map_err(|e| ConfigError::new(flag(), e))?;
                rules.push(Rule { raises: true, ..rule });
            }
        }
        Ok(rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Class;

    fn rules_of(profile: &str, own: &[&str]) -> Result<Vec<Rule>, ConfigError> {
        let profile_rule = own.iter().map(|rule| (*rule).to_owned()).collect();
        ProfileArgs { profile_rule }.rules(&[profile.to_owned()])
    }

    #[test]
    fn each_profile_picks_what_its_tools_read() {
        for (profile, picked, left) in [
            (
                "coverage",
                &[
                    "bazel-out/k8-fastbuild/testlogs/a/t/coverage.dat",
                    "bazel-out/_coverage/_coverage_report.dat",
                    "bazel-out/k8/bin/a/_objs/a/a.gcno",
                ][..],
                &["bazel-out/k8-fastbuild/testlogs/a/t/test.log"][..],
            ),
            (
                "debug",
                &[
                    "bazel-out/k8/bin/a/app.dwp",
                    "bazel-out/k8/bin/a/app.dSYM/Contents/x",
                ],
                &["bazel-out/k8/bin/a/app", "bazel-out/k8/bin/a/map"],
            ),
            (
                "ide",
                &[
                    "bazel-out/k8/bin/a/x.pb.h",
                    "bazel-out/k8/bin/a/libx-speed-src.jar",
                    "bazel-out/k8-opt-exec/bin/a/libmacro-123.so",
                    "bazel-out/k8/bin/a/x.intellij-info.txt",
                    "bazel-out/k8/bin/a/lib.rust_analyzer_crate_spec.json",
                ],
                &["bazel-out/k8/bin/a/app", "bazel-out/k8/bin/a/x.o"],
            ),
        ] {
            let rules = rules_of(profile, &[]).unwrap();
            assert!(rules.iter().all(|rule| rule.verdict > Class::Known), "{profile}");
            let is_picked = |path: &str| {
                let matches = |rule: &Rule| rule.path.as_ref().is_some_and(|regex| regex.matches(path));
                rules.iter().any(matches)
            };
            for path in picked {
                assert!(is_picked(path), "{profile}: {path}");
            }
            for path in left {
                assert!(!is_picked(path), "{profile}: {path}");
            }
        }
    }

    #[test]
    fn the_users_own_rules_stand_in_the_place_of_a_profiles() {
        let own = [
            "ide=required path=.*\\.h",
            "mine=optional label=//a/...",
            "ide=known",
        ];
        let texts = |profile| -> Vec<String> {
            let rules = rules_of(profile, &own).unwrap();
            rules.iter().map(ToString::to_string).collect()
        };
        assert_eq!(texts("ide"), ["required path=.*\\.h", "known"]);
        assert_eq!(texts("mine"), ["optional label=//a/..."]);
        assert_eq!(rules_of("debug", &own).unwrap(), rules_of("debug", &[]).unwrap());
        let error = rules_of("eclipse", &own).unwrap_err().to_string();
        assert!(
            error.contains("--profile=eclipse") && error.contains("coverage, debug, ide, mine"),
            "{error}"
        );
        for (wrong, reason) in [
            ("ide", "NAME=RULE"),
            ("=known", "NAME=RULE"),
            ("ide=maybe", "maybe"),
        ] {
            let error = rules_of("ide", &[wrong]).unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains(reason), "{error}");
        }
    }
}
