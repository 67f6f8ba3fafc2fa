//! Which directories may be written into, and how paths are translated.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{anyhow, bail};

use crate::materialize::place::Allowance;

/// `FROM=TO`: the build saw `FROM` where we see `TO`, because it ran in another mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathMap {
    from: PathBuf,
    to: PathBuf,
}

impl FromStr for PathMap {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (from, to) = text
            .split_once('=')
            .ok_or_else(|| anyhow!("{text:?} is not of the form FROM=TO"))?;
        let (from, to) = (PathBuf::from(from), PathBuf::from(to));
        if !from.is_absolute() || !to.is_absolute() {
            bail!("both paths in {text:?} must be absolute");
        }
        Ok(Self { from, to })
    }
}

impl PathMap {
    /// Whether this is where the user says that an exec root is, as we see it: it, or what they lie in, is mapped by
    /// itself.
    fn names(&self, path: &Path) -> bool {
        let mut from = self.from.iter().rev().map(|name| name == "execroot");
        match (from.next(), from.next()) {
            (Some(true), _) => path.parent() == Some(&self.to),
            (_, Some(true)) => path == self.to,
            _ => false,
        }
    }
}

/// What the rules say of a path.
pub(super) fn allowance<'a>(rules: &'a RootRules, path: &Path) -> Allowance<'a> {
    Allowance {
        listed: &rules.allowed,
        is_mapped: rules.path_maps.iter().any(|map| map.names(path)),
        uid: rustix::process::geteuid().as_raw(),
    }
}

/// Where outputs go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Destination {
    /// To the exec root that the stream names.
    #[default]
    ExecRoot,
    /// To a directory of the user's.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Right into it by file name, instead of by exec path.
        flatten: bool,
    },
}

/// What is allowed as an output root, and how paths are translated.
#[derive(Debug, Clone, Default)]
pub struct RootRules {
    /// Where outputs go.
    pub destination: Destination,
    /// Translations, the first that fits counts.
    pub path_maps: Vec<PathMap>,
    /// Directories that exec roots must lie in; empty for any that looks like one and that the daemon's user owns.
    pub allowed: Vec<PathBuf>,
    /// Whether the build tool's action cache is left unread.
    pub no_action_cache: bool,
}

impl RootRules {
    /// Where the build's exec root is for us.
    pub(crate) fn translate(&self, exec_root: &str) -> PathBuf {
        self.mapped(exec_root).unwrap_or_else(|| exec_root.into())
    }

    /// Where a directory of the build's is for us, if a translation says it.
    pub(crate) fn mapped(&self, path: &str) -> Option<PathBuf> {
        self.path_maps.iter().find_map(|map| {
            let below = Path::new(path).strip_prefix(&map.from).ok()?;
            Some(if below.as_os_str().is_empty() {
                map.to.clone()
            } else {
                map.to.join(below)
            })
        })
    }

    /// What an exec root of ours is called where builds see it elsewhere.
    pub(crate) fn spellings(&self, exec_root: &Path) -> Vec<PathBuf> {
        let back = |map: &PathMap| {
            let below = exec_root.strip_prefix(&map.to).ok()?;
            // Without a trailing slash.
            let there: PathBuf = map.from.join(below).components().collect();
            // A map before it may take that path elsewhere.
            (self
                .translate(there.to_str()?)
                .components()
                .eq(exec_root.components()))
            .then_some(there)
        };
        self.path_maps.iter().filter_map(back).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_roots_are_translated_at_components() {
        let rules = RootRules {
            path_maps: vec!["/build=/mnt/vm/build".parse().unwrap()],
            ..RootRules::default()
        };
        assert_eq!(rules.translate("/build/x"), Path::new("/mnt/vm/build/x"));
        assert_eq!(rules.translate("/build"), Path::new("/mnt/vm/build"));
        assert_eq!(rules.translate("/builder/x"), Path::new("/builder/x"));
        let rules_of = |maps: &[&str]| RootRules {
            path_maps: maps.iter().map(|map| map.parse().unwrap()).collect(),
            ..RootRules::default()
        };
        let spellings = |maps: &[&str], path: &str| rules_of(maps).spellings(Path::new(path));
        assert_eq!(spellings(&["/from=/to"], "/to/ob"), [Path::new("/from/ob")]);
        assert_eq!(spellings(&["/from/ws=/to"], "/to"), [Path::new("/from/ws")]);
        assert_eq!(spellings(&["/from=/to"], "/too/ob"), [""; 0].map(PathBuf::from));
        // The first that fits counts.
        assert_eq!(
            spellings(&["/a/b=/elsewhere", "/a=/to"], "/to/b"),
            [""; 0].map(PathBuf::from)
        );
        // Who maps an exec root, or what it lies in, says what it is.
        let names = |map: &str, path: &str| map.parse::<PathMap>().unwrap().names(Path::new(path));
        for (map, path, expected) in [
            ("/ob/execroot/ws=/mnt/ws", "/mnt/ws", true),
            ("/ob/execroot/ws=/mnt/ws", "/mnt/ws/sub", false),
            ("/ob/execroot=/mnt/roots", "/mnt/roots/ws", true),
            ("/ob/execroot=/mnt/roots", "/mnt/roots", false),
            ("/ob/execroot=/mnt/roots", "/mnt/roots/ws/sub", false),
            ("/=/mnt/vm", "/mnt/vm/home/user/.ssh", false),
            ("/ob=/mnt", "/mnt", false),
        ] {
            assert_eq!(names(map, path), expected, "{map} {path}");
        }
        for bad in ["/a", "a=/b", "/a=b", "="] {
            assert!(
                bad.parse::<PathMap>().unwrap_err().to_string().contains(bad),
                "{bad}"
            );
        }
    }
}
