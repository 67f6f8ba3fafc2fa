//! What is on record and matches a pattern.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::PathBuf,
};

use super::{
    super::{client::Client, exit::Failure},
    wanted::Wanted,
};
use crate::{
    control::without_intermediates,
    invocation::{
        pattern::{self, TargetPattern},
        policy::PathRegex,
        rows,
    },
    proto::outhaul::v1 as pb,
};

/// Adds what is on record and matches.
pub(super) async fn listed(
    client: &mut Client,
    id: &str,
    wanted: &Wanted,
    paths: &mut BTreeSet<String>,
) -> Result<(), Failure> {
    let mut all = Vec::new();
    // Those that patterns name are packages, too: of an intermediate output, no event tells the label.
    let named = wanted.packages.iter().map(TargetPattern::package);
    let mut packages: HashSet<String> = named.collect();
    let workspaces = workspaces_of(client, id, wanted).await?;
    let are_meant: Vec<bool> = wanted
        .globs
        .iter()
        .map(|glob| glob.is_meant(&workspaces))
        .collect();
    let globs = wanted
        .globs
        .iter()
        .map(|glob| (glob.written.clone(), glob.is_of_any));
    let regexes = wanted
        .regexes
        .iter()
        .map(|regex| (format!("--path={regex}"), false));
    let patterns: Vec<(String, bool)> = globs.chain(regexes).collect();
    // By the configuration where only one counts.
    let mut found = vec![BTreeMap::<(usize, String), Vec<String>>::new(); patterns.len()];
    client
        .outputs(id, pb::OutputClass::Unspecified, |output| {
            let path = output.absolute_path();
            let globs = wanted.globs.iter().zip(&are_meant);
            let globs = globs.map(|(glob, is_meant)| *is_meant && glob.regex.is_match(&path));
            let regexes = wanted
                .regexes
                .iter()
                .map(|regex| regex.matches(&output.exec_path));
            let hits = patterns.iter().zip(globs.chain(regexes));
            for (found, ((_, is_of_any), _)) in found.iter_mut().zip(hits).filter(|(_, (_, hit))| *hit) {
                let configuration = output.exec_path.split('/').nth(1).filter(|_| *is_of_any);
                let configuration = configuration.unwrap_or_default();
                let place = found.entry((configuration.len(), configuration.to_owned()));
                place.or_default().push(path.clone());
            }
            if !wanted.packages.is_empty() {
                if let Some((package, _)) = output.label.split_once(':') {
                    packages.insert(package.trim_start_matches('@').to_owned());
                }
                all.push((path, output.exec_path));
            }
            Ok(())
        })
        .await?;
    for ((written, _), found) in patterns.into_iter().zip(found) {
        // The one with the shortest name, as for paths.
        let (_, found) = found
            .into_iter()
            .next()
            .ok_or_else(|| Failure::not_found(format!("{written}: no recorded output matches")))?;
        paths.extend(found);
    }
    match of_packages(all, &packages, &wanted.packages, &wanted.of_packages) {
        Ok(found) => paths.extend(found),
        Err(mut failure) => {
            let (build, _) = client.invocation(id).await?;
            let version = &build.build_tool_version;
            if rows::is_known_by_events_alone(version) {
                failure.message = format!("{}, {}", failure.message, without_intermediates(version));
            }
            return Err(failure);
        }
    }
    Ok(())
}

/// Where the build's workspace is, as it was given and as it is, if any pattern is by a link in it.
async fn workspaces_of(client: &mut Client, id: &str, wanted: &Wanted) -> Result<Vec<PathBuf>, Failure> {
    if wanted.globs.iter().all(|glob| glob.by_link.is_none()) {
        return Ok(Vec::new());
    }
    let (build, _) = client.invocation(id).await?;
    let given = PathBuf::from(build.workspace);
    let real = given.canonicalize().ok();
    let all = [Some(given), real].into_iter().flatten();
    Ok(all
        .filter(|workspace| !workspace.as_os_str().is_empty())
        .collect())
}

/// The paths of those rows that are in a package which matches, and match one of the regular expressions, if there are any.
/// Each pattern that takes in must be of use, and each regular expression.
fn of_packages(
    rows: Vec<(String, String)>,
    packages: &HashSet<String>,
    patterns: &[TargetPattern],
    regexes: &[PathRegex],
) -> Result<Vec<String>, Failure> {
    let mut hits = vec![false; patterns.len()];
    let mut matched = vec![false; regexes.len()];
    let mut paths = Vec::new();
    for (path, exec_path) in rows {
        let Some(label) = label_of(&exec_path, packages) else {
            continue;
        };
        for (hit, pattern) in hits.iter_mut().zip(patterns) {
            *hit |= pattern.is_negative || pattern.covers(&label);
        }
        if !pattern::matches(patterns, &label) {
            continue;
        }
        let mut is_wanted = regexes.is_empty();
        for (matched, regex) in matched.iter_mut().zip(regexes) {
            if regex.matches(&exec_path) {
                (*matched, is_wanted) = (true, true);
            }
        }
        if is_wanted {
            paths.push(path);
        }
    }
    if let Some((pattern, _)) = patterns.iter().zip(&hits).find(|(_, hit)| !**hit) {
        let message = format!("--all-of={pattern}: no recorded output is in such a package");
        return Err(Failure::not_found(message));
    }
    if let Some((regex, _)) = regexes.iter().zip(&matched).find(|(_, hit)| !**hit) {
        let message = format!("--path={regex}: no recorded output of the packages in --all-of matches");
        return Err(Failure::not_found(message));
    }
    Ok(paths)
}

/// A label in the package that an output is in: the nearest directory above that is known to be one, or its own.
fn label_of(exec_path: &str, packages: &HashSet<String>) -> Option<String> {
    // After `bazel-out`, the configuration, and `bin` or the like.
    let below = exec_path.splitn(4, '/').nth(3)?;
    let (repository, below) = match below.strip_prefix("external/") {
        Some(below) => below.split_once('/')?,
        None => ("", below),
    };
    let (directory, name) = below.rsplit_once('/').unwrap_or(("", below));
    let ends = directory.rmatch_indices('/').map(|(at, _)| at);
    let mut above = [directory.len()].into_iter().chain(ends).chain([0]);
    let known = above.find(|&end| packages.contains(&format!("{repository}//{}", &directory[..end])));
    let package = &directory[..known.unwrap_or(directory.len())];
    Some(format!("{repository}//{package}:{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_in_the_nearest_package_that_is_known() {
        let packages = ["//a", "//a/b", "lib//p"].map(str::to_owned).into();
        for (path, label) in [
            ("bazel-out/k8/bin/a/x", "//a:x"),
            ("bazel-out/k8/bin/a/_objs/x/x.o", "//a:x.o"),
            ("bazel-out/k8/bin/a/b/c/x", "//a/b:x"),
            ("bazel-out/k8/bin/other/x", "//other:x"),
            ("bazel-out/k8/bin/x", "//:x"),
            ("bazel-out/k8/bin/external/lib/p/q/x", "lib//p:x"),
        ] {
            assert_eq!(label_of(path, &packages).as_deref(), Some(label), "{path}");
        }
        assert_eq!(label_of("bazel-out/volatile", &packages), None);
    }

    #[test]
    fn packages_need_no_target_of_theirs_in_the_build() {
        let rows = [
            "bazel-out/k8/bin/app/lib/x",
            "bazel-out/k8/bin/libs/deep/x",
            "bazel-out/k8/bin/x",
        ];
        for (pattern, expected) in [
            ("//libs/...", &["libs/deep/x"][..]),
            ("//libs/deep:all", &["libs/deep/x"]),
            ("//app/lib:all", &["app/lib/x"]),
            ("//app/...", &["app/lib/x"]),
            ("//...", &["app/lib/x", "libs/deep/x", "x"]),
        ] {
            let pattern: TargetPattern = pattern.parse().unwrap();
            let packages = ["//".to_owned(), "//app".to_owned(), pattern.package()].into();
            let rows = rows.map(|path| (path.to_owned(), path.to_owned()));
            let paths = of_packages(rows.into(), &packages, std::slice::from_ref(&pattern), &[]);
            let paths = paths.unwrap_or_else(|failure| panic!("{}", failure.message));
            let below = paths
                .iter()
                .map(|path| path.strip_prefix("bazel-out/k8/bin/").unwrap());
            assert_eq!(below.collect::<Vec<_>>(), expected, "{pattern}");
        }
    }

    #[test]
    fn each_pattern_of_packages_must_match() {
        let packages = ["//a", "//b"].map(str::to_owned).into();
        for (patterns, regexes, expected) in [
            (&["//a:all"][..], &[][..], Ok(1)),
            (&["//..."], &[], Ok(2)),
            (&["//...", "-//b/..."], &[], Ok(1)),
            (&["//a/...", "-//none/..."], &[], Ok(1)),
            (&["-//b/..."], &[], Ok(1)),
            (&["//a:all", "//none/..."], &[], Err("--all-of=//none/...: ")),
            (&["//none:all", "//a/..."], &[], Err("--all-of=//none:all: ")),
            (&["//..."], &[".*/a/x", ".*/b/.*"], Ok(2)),
            // Its package is there; only the expression is of no use.
            (&["//a:all", "//b:all"], &[".*/a/x"], Ok(1)),
            (&["//a:all"], &[".*/b/x"], Err("--path=.*/b/x: ")),
            (&["//..."], &[".*/a/x", ".*/none"], Err("--path=.*/none: ")),
            (&["//none/..."], &["none"], Err("--all-of=//none/...: ")),
        ] {
            let rows = ["bazel-out/k8/bin/a/x", "bazel-out/k8/bin/b/x"];
            let rows = rows.map(|path| (format!("/w/{path}"), path.to_owned()));
            let read: Vec<TargetPattern> = patterns.iter().map(|text| text.parse().unwrap()).collect();
            let by_path: Vec<PathRegex> = regexes.iter().map(|text| text.parse().unwrap()).collect();
            match (of_packages(rows.into(), &packages, &read, &by_path), expected) {
                (Ok(paths), Ok(count)) => assert_eq!(paths.len(), count, "{patterns:?} {regexes:?}"),
                (Err(failure), Err(part)) => {
                    assert!(failure.message.starts_with(part), "{}", failure.message);
                }
                (got, _) => panic!(
                    "{patterns:?} {regexes:?}: {:?}",
                    got.map_err(|failure| failure.message)
                ),
            }
        }
    }
}
