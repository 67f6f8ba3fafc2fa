//! Which recorded build is meant, where a user names none or only a workspace.

use std::{borrow::Borrow, collections::HashMap, path::Path};

use super::row::InvocationRow;

/// The build that is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Which {
    /// The invocation; empty for the newest.
    pub invocation_id: String,
    /// A directory in the workspace whose newest build is meant, absolute; empty for any.
    pub workspace: String,
}

impl Which {
    /// An invocation by its id; the newest build if that is empty.
    pub(crate) fn of(invocation_id: &str) -> Self {
        Self {
            invocation_id: invocation_id.to_owned(),
            workspace: String::new(),
        }
    }

    /// Of some invocations, newest first, the one that is meant where no id is given: the newest build of the innermost
    /// workspace that the directory lies in. One that was brought here from elsewhere is meant only where there are no
    /// others. Blocks on the file system.
    pub(crate) fn newest<R: Borrow<InvocationRow>>(&self, rows: impl IntoIterator<Item = R>) -> Option<R> {
        let mut depth_of = self.depths();
        let mut best = None;
        for one in rows {
            let row = one.borrow();
            let Some(depth) = depth_of(&row.workspace).filter(|_| row.is_build()) else {
                continue;
            };
            let rank = (!row.imported, depth);
            if best.as_ref().is_none_or(|(highest, _)| rank > *highest) {
                best = Some((rank, one));
                if self.workspace.is_empty() && rank.0 {
                    break;
                }
            }
        }
        best.map(|(_, one)| one)
    }

    /// Of some things, each of a workspace, those of the workspace asked for: the innermost one that the directory lies
    /// in. All of them if none is asked for. Blocks on the file system.
    pub(crate) fn innermost<'a, T>(
        &self,
        all: impl IntoIterator<Item = T>,
        workspace: impl Fn(&T) -> &'a str,
    ) -> Vec<T> {
        let mut depth_of = self.depths();
        let found = all
            .into_iter()
            .filter_map(|one| Some((depth_of(workspace(&one))?, one)));
        let mut found: Vec<(usize, T)> = found.collect();
        let deepest = found.iter().map(|(depth, _)| *depth).max();
        found.retain(|(depth, _)| Some(*depth) == deepest);
        found.into_iter().map(|(_, one)| one).collect()
    }

    /// Says how deep a workspace lies that the directory asked for is, or lies in. They are all the same if none is
    /// asked for.
    fn depths(&self) -> impl FnMut(&str) -> Option<usize> {
        let asked = Path::new(&self.workspace);
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let mut known = HashMap::new();
        move |workspace| {
            if asked.as_os_str().is_empty() {
                return Some(0);
            }
            *known.entry(workspace.to_owned()).or_insert_with(|| {
                let of = real(Path::new(workspace));
                let is_in = asked.starts_with(workspace) || real(asked).starts_with(&of);
                (is_in && !workspace.is_empty()).then(|| of.components().count())
            })
        }
    }

    /// That there is no such build, in words.
    pub(crate) fn not_recorded(&self) -> String {
        match (self.invocation_id.as_str(), self.workspace.as_str()) {
            ("", "") => "no builds are recorded".to_owned(),
            ("", workspace) => format!("no builds of {workspace} are recorded"),
            (id, _) => format!("invocation {id:?} is not recorded"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, workspace: &str, command: &str, started_ms: i64) -> InvocationRow {
        InvocationRow {
            invocation_id: id.to_owned(),
            workspace: workspace.to_owned(),
            command: command.to_owned(),
            imported: id.starts_with("imported"),
            started_ms,
            ..InvocationRow::default()
        }
    }

    #[test]
    fn the_newest_build_that_began_here_is_meant() {
        let recorded = [
            row("imported", "/w", "build", 60),
            row("outer", "/w", "build", 50),
            row("asks", "/w/inner", "cquery", 40),
            row("inner", "/w/inner", "test", 30),
            row("older", "/w/inner", "build", 20),
            row("imported-elsewhere", "/elsewhere", "build", 10),
            row("other", "/other", "new-command", 5),
            row("unbegun", "/unbegun", "", 0),
        ];
        for (workspace, expected) in [
            ("", Some("outer")),
            ("/w", Some("outer")),
            ("/w/sub", Some("outer")),
            ("/w/inner", Some("inner")),
            ("/w/inner/sub", Some("inner")),
            ("/w/innermost", Some("outer")),
            ("/elsewhere/sub", Some("imported-elsewhere")),
            ("/other", Some("other")),
            ("/unbegun", None),
            ("/x", None),
        ] {
            let which = Which {
                workspace: workspace.to_owned(),
                ..Which::default()
            };
            let meant = which.newest(&recorded).map(|row| row.invocation_id.as_str());
            assert_eq!(meant, expected, "{workspace}");
        }
        let imported = Which::default().newest(&recorded[..1]);
        assert_eq!(imported.map(|row| row.invocation_id.as_str()), Some("imported"));
    }

    #[test]
    fn a_workspace_within_another_has_its_own_builds() {
        let innermost = |asked: &str, all: &[&'static str]| {
            let which = Which {
                workspace: asked.to_owned(),
                ..Which::default()
            };
            which.innermost(all.iter().copied(), |workspace| *workspace)
        };
        let all = ["/w", "/w/inner", "", "/other", "/w/inner", "/w"];
        assert_eq!(innermost("/w/inner/sub", &all), ["/w/inner", "/w/inner"]);
        assert_eq!(innermost("/w/inner", &all), ["/w/inner", "/w/inner"]);
        assert_eq!(innermost("/w/innermost", &all), ["/w", "/w"]);
        assert_eq!(innermost("/x", &all), [""; 0]);
        assert_eq!(innermost("", &all), all);
    }
}
