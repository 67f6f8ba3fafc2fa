//! The state directory, and the record in it.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use super::{
    finding::Finding,
    machine::{is_writable, nearest},
};
use crate::record::{Examined, Opening};

/// Whether the state directory can be used, and by nobody else.
pub(super) fn directory(path: &Path) -> Finding {
    const CODE: &str = "state-directory";
    let shown = path.display();
    let unusable = |reason: String| {
        Finding::error(
            CODE,
            format!("the state directory cannot be written, so builds are not recorded: {reason}"),
            "give this user the right to write there, or name another directory with --state-dir",
        )
    };
    let Ok(meta) = path.metadata() else {
        let above = nearest(path).ok_or_else(|| format!("{shown}: there is no way to it"));
        return match above.and_then(|above| is_writable(&above)) {
            Err(reason) => unusable(reason),
            Ok(()) => Finding::ok(CODE, format!("the state directory {shown} is not there yet")),
        };
    };
    if !meta.is_dir() {
        return unusable(format!("{shown} is not a directory"));
    }
    if let Err(reason) = is_writable(path) {
        return unusable(reason);
    }
    let user = rustix::process::geteuid().as_raw();
    if meta.uid() != user {
        return Finding::warning(
            CODE,
            format!(
                "the state directory {shown} belongs to user {}, not to user {user}",
                meta.uid()
            ),
            "run outhaul as one user only, or give each a --state-dir",
        );
    }
    if meta.mode() & 0o022 != 0 {
        return Finding::warning(
            CODE,
            format!(
                "other users can write to the state directory {shown} (mode {:04o})",
                meta.mode() & 0o7777
            ),
            format!("chmod go-w '{shown}'"),
        );
    }
    Finding::ok(CODE, format!("the state directory is {shown}"))
}

/// Whether the record opens. `answers` is whether a daemon answers on the control socket.
pub(super) fn record(examined: &Examined, answers: bool) -> Finding {
    const CODE: &str = "record";
    match examined {
        Examined::Missing => Finding::ok(CODE, "nothing is recorded yet"),
        Examined::Held(holder) if answers => {
            Finding::ok(CODE, format!("the record is in use by {holder}, which answers"))
        }
        Examined::Held(holder) => Finding::note(
            CODE,
            format!("the record is in use by {holder}, which answers no other command"),
            "wait for its end: an `outhaul run` has the record for itself; others answer on the control socket",
        ),
        Examined::Opened(Opening::Fresh | Opening::Existing) => Finding::ok(CODE, "the record opens"),
        Examined::Opened(Opening::Quarantined { reason, .. }) => Finding::warning(
            CODE,
            format!("the record cannot be used: {reason}"),
            "nothing needs to be done: the next command sets it aside and starts a new one; outputs are checked again",
        ),
        Examined::Opened(Opening::Unavailable { reason }) => Finding::error(
            CODE,
            format!("the record does not open: {reason}"),
            "free some space on the disk of the state directory, or name another one with --state-dir",
        ),
        Examined::Unknown(reason) => Finding::note(
            CODE,
            format!("whether the record opens is unknown: {reason}"),
            "see what `outhaul status` says",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::{super::finding::Level, *};
    use crate::record::Holder;

    #[test]
    fn a_state_directory_is_ours_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |mode| {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            directory(dir.path()).level
        };
        assert_eq!(mode(0o700), Level::Ok);
        assert_eq!(mode(0o755), Level::Ok);
        assert_eq!(mode(0o775), Level::Warning);
        assert_eq!(mode(0o757), Level::Warning);
        mode(0o700);
        assert_eq!(directory(&dir.path().join("not/yet")).level, Level::Ok);
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(directory(&file).level, Level::Error);
    }

    #[test]
    fn a_state_directory_that_is_closed_to_us_is_an_error() {
        crate::unprivileged::run(
            "cli::doctor::state::tests::a_state_directory_that_is_closed_to_us_is_an_error",
            |dir| {
                let closed = dir.join("closed");
                std::fs::create_dir(&closed).unwrap();
                std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o555)).unwrap();
                assert_eq!(directory(&closed).level, Level::Error);
                assert_eq!(directory(&closed.join("state")).level, Level::Error);
            },
        );
    }

    #[test]
    fn each_state_of_the_record_is_judged() {
        let reason = || "why".to_owned();
        for (examined, answers, level) in [
            (Examined::Missing, false, Level::Ok),
            (Examined::Held(Holder::default()), true, Level::Ok),
            (Examined::Held(Holder::default()), false, Level::Note),
            (Examined::Opened(Opening::Existing), false, Level::Ok),
            (
                Examined::Opened(Opening::Quarantined {
                    moved_to: "/x".into(),
                    reason: reason(),
                }),
                false,
                Level::Warning,
            ),
            (
                Examined::Opened(Opening::Unavailable { reason: reason() }),
                false,
                Level::Error,
            ),
            (Examined::Unknown(reason()), false, Level::Note),
        ] {
            assert_eq!(record(&examined, answers).level, level, "{examined:?}");
        }
    }
}
