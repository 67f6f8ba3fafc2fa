//! Names and link targets of members: which are allowed, and where they go.

use std::borrow::Cow;

use super::{Archive, ArchiveError, Limit, flatten::Manifest};
use crate::exec_path::{ExecPath, is_reserved};

/// Where a member goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spot {
    /// To this path in the target.
    At(ExecPath),
    /// It is the target itself.
    Target,
    /// Nowhere: too little is left of its name once the leading components are cut.
    Nowhere,
}

/// How names become paths.
pub(super) enum Naming<'a> {
    /// With this many leading components cut.
    Strip(u32),
    /// With the stage directory cut.
    Flatten(&'a Manifest),
}

/// A name as text, without what is nothing to any program: empty components and `.`, and, for directories, the `/` at the end.
pub(super) fn text<'a>(
    archive: &Archive<'_>,
    name: &'a [u8],
    is_directory: bool,
) -> Result<Cow<'a, str>, ArchiveError> {
    let error = |reason: &str| ArchiveError::Name {
        archive: archive.name.to_owned(),
        member: String::from_utf8_lossy(name).into_owned(),
        reason: reason.to_owned(),
    };
    let mut text = std::str::from_utf8(name).map_err(|_| error("it is not UTF-8"))?;
    if is_directory && !text.trim_end_matches('/').is_empty() {
        text = text.trim_end_matches('/');
    }
    let is_nothing = |component: &str| component.is_empty() || component == ".";
    let is_cut_short = !is_directory && text.rsplit('/').next().is_some_and(is_nothing);
    if text.starts_with('/') || is_cut_short || !text.split('/').any(is_nothing) {
        return Ok(Cow::Borrowed(text));
    }
    let components: Vec<&str> = text
        .split('/')
        .filter(|component| !is_nothing(component))
        .collect();
    Ok(match &*components {
        [] if text.is_empty() => Cow::Borrowed(text),
        [] => Cow::Borrowed("."),
        components => Cow::Owned(components.join("/")),
    })
}

/// Where a member of this name goes.
pub(super) fn spot(
    archive: &Archive<'_>,
    naming: &Naming<'_>,
    name: &[u8],
    is_directory: bool,
) -> Result<Spot, ArchiveError> {
    let text = text(archive, name, is_directory)?;
    let text = &*text;
    let error = |reason: String| ArchiveError::Name {
        archive: archive.name.to_owned(),
        member: text.to_owned(),
        reason,
    };
    if is_directory && text == "." {
        return Ok(Spot::Target);
    }
    let whole = ExecPath::new(text).map_err(|e| error(e.reason.to_owned()))?;
    if whole.components().count() as u64 > archive.limits[Limit::Depth] {
        return Err(archive.over(Limit::Depth));
    }
    if whole.components().any(is_reserved) {
        return Err(error("it is reserved for Outhaul's own files".to_owned()));
    }
    let rest = match naming {
        Naming::Strip(0) => return Ok(Spot::At(whole)),
        Naming::Strip(count) => text.splitn(*count as usize + 1, '/').nth(*count as usize),
        Naming::Flatten(manifest) => match manifest.cut(text) {
            Some("") if is_directory => return Ok(Spot::Target),
            Some(rest) if !rest.is_empty() => Some(rest),
            _ => {
                return Err(ArchiveError::Manifest {
                    archive: archive.name.to_owned(),
                    reason: format!("{text:?} is in none of the directories of its manifest"),
                });
            }
        },
    };
    // What follows a slash of a valid path is a valid path.
    match rest.map(ExecPath::new) {
        Some(Ok(path)) => Ok(Spot::At(path)),
        Some(Err(e)) => Err(error(e.reason.to_owned())),
        None => Ok(Spot::Nowhere),
    }
}

/// A symlink's target as text, if it is allowed: relative, and inside of the directory that is unpacked whatever other
/// links there are. So `..` stands only at its beginning, where it leads through directories that are none.
pub(super) fn target<'a>(
    archive: &Archive<'_>,
    link: &ExecPath,
    target: &'a [u8],
    is_any_allowed: bool,
) -> Result<&'a str, ArchiveError> {
    let error = |reason| ArchiveError::Link {
        archive: archive.name.to_owned(),
        member: link.as_str().to_owned(),
        target: String::from_utf8_lossy(target).into_owned(),
        reason,
    };
    let text = std::str::from_utf8(target).map_err(|_| error("its target is not UTF-8"))?;
    if text.is_empty() || text.len() > 4095 || text.contains('\0') {
        return Err(error("no file can have that name"));
    }
    if is_any_allowed {
        return Ok(text);
    }
    if text.starts_with('/') {
        return Err(error("it leads out of the directory, with an absolute path"));
    }
    let mut above = link.components().count() - 1;
    let mut is_below = false;
    for component in text.split('/') {
        match component {
            "" | "." => {}
            ".." if is_below => return Err(error("it has \"..\" after a name, which may be that of a link")),
            ".." => {
                above = above
                    .checked_sub(1)
                    .ok_or_else(|| error("it leads out of the directory"))?;
            }
            _ => is_below = true,
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Format, Limits, Mode},
        *,
    };

    const EXTRACT: Mode = Mode::Extract { strip_components: 0 };

    fn archive(limits: &Limits) -> Archive<'_> {
        Archive {
            name: "a.tar",
            order: 0,
            format: Format::Tar,
            mode: &EXTRACT,
            below: "",
            limits,
        }
    }

    #[test]
    fn names_become_paths_or_errors() {
        let limits = Limits::default();
        let archive = archive(&limits);
        let at = |path: &str| Some(Spot::At(ExecPath::new(path).unwrap()));
        let long = "n".repeat(300);
        for (name, strip, is_directory, expected) in [
            ("a/b", 0, false, at("a/b")),
            ("./a/b", 0, false, at("a/b")),
            ("././a", 0, false, at("a")),
            ("a/b/", 0, true, at("a/b")),
            (".", 0, true, Some(Spot::Target)),
            ("./", 0, true, Some(Spot::Target)),
            ("./", 1, true, Some(Spot::Target)),
            ("a/b/c", 1, false, at("b/c")),
            ("./a/b/c", 2, false, at("c")),
            ("a/b/c", 3, false, Some(Spot::Nowhere)),
            ("a", 1, true, Some(Spot::Nowhere)),
            ("a/b/", 0, false, None),
            (".", 0, false, None),
            ("./", 0, false, None),
            ("", 0, false, None),
            ("", 0, true, None),
            ("/", 0, true, None),
            ("/a", 0, false, None),
            (".//a", 0, false, at("a")),
            ("a/./b//c", 0, false, at("a/b/c")),
            ("a//b/./", 0, true, at("a/b")),
            ("a/.", 0, true, at("a")),
            ("x//a//b", 1, false, at("a/b")),
            ("a/.", 0, false, None),
            ("./.", 0, true, Some(Spot::Target)),
            ("//a", 0, false, None),
            ("a//../b", 0, false, None),
            ("..", 0, true, None),
            ("a/../b", 0, false, None),
            // Also where what is wrong would be cut.
            ("../a", 1, false, None),
            ("a//b", 0, false, at("a/b")),
            ("a/./b", 0, false, at("a/b")),
            ("a\0b", 0, false, None),
            (".outhaul-tmp/1", 0, false, None),
            ("a/.OUTHAUL", 0, false, None),
            (&long, 0, false, None),
        ] {
            let found = spot(&archive, &Naming::Strip(strip), name.as_bytes(), is_directory);
            assert_eq!(found.as_ref().ok(), expected.as_ref(), "{name:?}: {found:?}");
        }
        let found = spot(&archive, &Naming::Strip(0), b"a\xff", false).unwrap_err();
        assert!(found.to_string().contains("not UTF-8"), "{found}");
        let deep = vec!["d"; 257].join("/");
        let found = spot(&archive, &Naming::Strip(0), deep.as_bytes(), false).unwrap_err();
        assert!(found.to_string().contains("archive-depth=256"), "{found}");
    }

    #[test]
    fn links_lead_inside_or_are_errors() {
        let limits = Limits::default();
        let archive = archive(&limits);
        for (link, to, is_allowed) in [
            ("l", "a", true),
            ("l", "a/b/./c", true),
            ("l", ".", true),
            ("l", "gone", true),
            ("d/l", "../a", true),
            ("d/e/l", "../../a", true),
            ("d/l", "..", true),
            ("l", "..", false),
            ("l", "../a", false),
            ("d/l", "../../a", false),
            ("d/l", "./../../a", false),
            // Physically, `a` may be a link to a directory less deep.
            ("d/l", "a/../b", false),
            ("l", "/etc/passwd", false),
            ("l", "", false),
            ("l", "a\0", false),
        ] {
            let path = ExecPath::new(link).unwrap();
            let found = target(&archive, &path, to.as_bytes(), false);
            assert_eq!(found.is_ok(), is_allowed, "{link} {to:?}: {found:?}");
            let is_name = !to.is_empty() && !to.contains('\0');
            let found = target(&archive, &path, to.as_bytes(), true);
            assert_eq!(found.is_ok(), is_name, "{link} {to:?}: {found:?}");
        }
    }
}
