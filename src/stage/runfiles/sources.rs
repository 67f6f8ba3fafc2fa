//! Where the sources of a build lie: in its workspace, and in the external repositories of its output base.

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use crate::{
    exec_path::{BUILD_TREE, ExecPath},
    materialize::place::{Lying, owner, read_source},
    record::InvocationRow,
    roots::RootRules,
};

/// What exec paths of external repositories begin with.
const EXTERNAL: &str = "external";

/// The places of one build.
pub(super) struct Sources {
    /// The exec root as the build spells it, and as it is here.
    exec_roots: [String; 2],
    workspace: SourceDirectory,
    external: SourceDirectory,
    /// The build was made in another mount namespace, where absolute links lead elsewhere.
    is_mapped: bool,
}

/// A directory of sources.
struct SourceDirectory {
    /// What exec paths of its sources begin with.
    prefix: &'static str,
    /// As the build spells it; empty if it is not known.
    there: PathBuf,
    /// Where it is here, or why what is in it is not read.
    here: Result<PathBuf, String>,
}

/// A source, or a directory of some.
#[derive(Debug, Clone)]
pub(super) struct Source {
    directory: Result<PathBuf, String>,
    below: String,
    /// Links may not lead out of the directory.
    within: bool,
}

impl Sources {
    /// Those of a build whose exec root is here. Blocks on the file system.
    pub(super) fn of(row: &InvocationRow, here: &str, rules: &RootRules) -> Self {
        // On record is where it is here. Of several names there, each build has one.
        let named = rules.spellings(Path::new(here)).into_iter().next();
        let named = named.map_or_else(|| row.exec_root.clone(), |there| there.display().to_string());
        let there = named.trim_end_matches('/').to_owned();
        let base = |exec_root: &str| Path::new(exec_root).ancestors().nth(2).map(Path::to_owned);
        let is_mapped = Path::new(&there) != Path::new(here);
        let workspace = Path::new(&row.workspace);
        let mapped = rules.mapped(&row.workspace);
        let local = match mapped {
            Some(mapped) => Ok(mapped),
            None if !is_mapped => Ok(workspace.to_owned()),
            None => Err(format!(
                "the build ran in another mount namespace, and no --path-map says where its workspace {} is here",
                workspace.display()
            )),
        };
        // The stream alone does not say which directories may be read.
        let is_owner = base(here).and_then(|base| owner(&base)).as_deref() == Some(&*row.workspace);
        let local = local.and_then(|local| {
            is_owner.then_some(local).ok_or_else(|| {
                format!(
                    "{} is not the workspace that DO_NOT_BUILD_HERE in the build's output base names",
                    workspace.display()
                )
            })
        });
        let is_known = workspace.is_absolute() && workspace.components().count() > 1;
        Self {
            workspace: SourceDirectory {
                prefix: "",
                there: if is_known {
                    workspace.to_owned()
                } else {
                    PathBuf::new()
                },
                here: local,
            },
            external: SourceDirectory {
                prefix: EXTERNAL,
                there: base(&there).map_or_else(PathBuf::new, |base| base.join(EXTERNAL)),
                here: base(here)
                    .map(|base| base.join(EXTERNAL))
                    .ok_or_else(|| "there is no output base".to_owned()),
            },
            exec_roots: [there, here.to_owned()],
            is_mapped,
        }
    }

    /// The exec path of a target that is an output.
    pub(super) fn output_of<'t>(&self, target: &'t str) -> Option<&'t str> {
        self.in_exec_root(target).filter(|path| {
            path.strip_prefix(BUILD_TREE)
                .is_some_and(|below| below.starts_with('/'))
        })
    }

    fn in_exec_root<'t>(&self, target: &'t str) -> Option<&'t str> {
        let mut roots = self.exec_roots.iter().filter(|root| !root.is_empty());
        roots.find_map(|root| target.strip_prefix(root.as_str())?.strip_prefix('/'))
    }

    /// The source that a target is, as the build spells it, with its exec path. In the exec root, sources are links.
    pub(super) fn find(&self, target: &Path) -> Option<(ExecPath, Source)> {
        if target.components().any(|part| part == Component::ParentDir) {
            return None;
        }
        let in_exec_root = self.in_exec_root(target.to_str()?).map(Path::new);
        let (place, below) = match in_exec_root.map(|path| (path.strip_prefix(EXTERNAL).ok(), path)) {
            Some((Some(below), _)) => (&self.external, below.to_str()?),
            Some((None, path)) => (&self.workspace, path.to_str()?),
            None => match below(&self.external.there, target) {
                Some(below) => (&self.external, below),
                None => (&self.workspace, below(&self.workspace.there, target)?),
            },
        };
        let exec_path = Path::new(place.prefix).join(below);
        let exec_path = exec_path.to_str()?;
        if Path::new(exec_path).starts_with(BUILD_TREE) {
            return None;
        }
        let source = Source {
            directory: place.here.clone(),
            below: below.to_owned(),
            within: self.is_mapped,
        };
        Some((ExecPath::new(exec_path).ok()?, source))
    }
}

fn below<'t>(directory: &Path, target: &'t Path) -> Option<&'t str> {
    let is_known = !directory.as_os_str().is_empty();
    is_known
        .then(|| target.strip_prefix(directory).ok()?.to_str())
        .flatten()
}

impl Source {
    /// Opens it. Blocks.
    pub(super) fn read(&self) -> io::Result<Lying> {
        let directory = self.directory.as_ref();
        let directory = directory.map_err(|reason| io::Error::other(reason.clone()))?;
        read_source(directory, &self.below, self.within)
    }

    /// One in this directory.
    pub(super) fn join(&self, name: &str) -> Self {
        Self {
            below: format!("{}/{name}", self.below),
            ..self.clone()
        }
    }

    /// For messages.
    pub(super) fn shown(&self) -> PathBuf {
        self.directory.as_ref().map_or_else(
            |_| PathBuf::from(&self.below),
            |directory| directory.join(&self.below),
        )
    }
}
