//! Bazel's commands.

/// Commands that build outputs.
const BUILDING: &[&str] = &["build", "test", "run", "coverage", "mobile-install"];
/// All others. `query` and its like send events, too, but have no outputs.
const OTHER: &[&str] = &[
    "analyze-profile",
    "aquery",
    "canonicalize-flags",
    "clean",
    "config",
    "cquery",
    "dump",
    "fetch",
    "help",
    "info",
    "license",
    "mod",
    "print_action",
    "query",
    "shutdown",
    "sync",
    "vendor",
    "version",
];

/// Whether a command of an event stream may have outputs: any that is not known to have none.
pub(crate) fn has_outputs(command: &str) -> bool {
    !OTHER.contains(&command)
}

/// Whether this is a known command that builds outputs.
pub(crate) fn builds(command: &str) -> bool {
    BUILDING.contains(&command)
}

/// Whether this is a command at all.
pub(crate) fn is_known(command: &str) -> bool {
    builds(command) || !has_outputs(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_may_have_outputs_and_is_not_taken_for_a_command() {
        for (command, expected) in [
            ("build", (true, true, true)),
            ("mobile-install", (true, true, true)),
            ("query", (false, false, true)),
            ("fetch", (false, false, true)),
            ("info", (false, false, true)),
            ("new-command", (true, false, false)),
            ("", (true, false, false)),
        ] {
            let reported = (has_outputs(command), builds(command), is_known(command));
            assert_eq!(reported, expected, "{command}");
        }
    }
}
