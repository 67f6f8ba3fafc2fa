//! `outhaul gc --orphans`: output bases whose workspace is gone.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{client::Client, exit, exit::Failure, print, runtime};
use crate::{
    config::{ControlArgs, StateArgs, from_environment},
    materialize::place::{owner, small_text},
    printable::printable,
    removal::remove_all,
    units::{allocated, show_size},
};

/// Builds whose output bases are looked at.
const BUILDS: u32 = 10_000;

/// An output base whose workspace is gone.
struct Orphan {
    base: PathBuf,
    workspace: String,
    bytes: u64,
    /// Why it stays.
    kept: Option<String>,
}

/// Shows the output bases of recorded builds whose workspace is gone, and removes them if that is wanted.
pub(super) fn main(state: &StateArgs, remove: bool, as_json: bool) -> Result<u8, Failure> {
    let cache = from_environment()?;
    let builds = runtime()?.block_on(async {
        let mut client = Client::open(&ControlArgs::default(), state, &cache).await?;
        let builds = client.invocations(BUILDS).await;
        client.close().await;
        builds
    })?;
    let mut bases = BTreeMap::new();
    for build in builds {
        if let Some(base) = output_base(Path::new(&build.exec_root)) {
            // Newest first.
            bases.entry(base).or_insert(build.workspace);
        }
    }
    let mut freed = 0;
    let (mut orphans, mut failed) = (0_usize, false);
    for (base, workspace) in bases {
        let Some(mut orphan) = orphan(base, workspace) else {
            continue;
        };
        orphans += 1;
        // Adding up its size may have taken minutes.
        if orphan.kept.is_none() {
            match why(&orphan.base, &orphan.workspace) {
                Some(kept) => orphan.kept = kept,
                None => continue,
            }
        }
        if remove && orphan.kept.is_none() {
            match remove_all(&orphan.base) {
                Ok(()) => freed += orphan.bytes,
                Err(error) => {
                    failed = true;
                    orphan.kept = Some(format!("failed to remove it: {error}"));
                }
            }
        }
        show(&orphan, as_json)?;
    }
    let what = match (remove, orphans) {
        (_, 0) => "no output base of a recorded build has lost its workspace".to_owned(),
        (true, _) => format!("removed {}", show_size(freed)),
        (false, _) => {
            "these output bases have lost their workspace; `outhaul gc --orphans --yes` removes them"
                .to_owned()
        }
    };
    writeln!(print::err(), "outhaul: {what}")?;
    Ok(if failed { exit::FAILED } else { exit::OK })
}

/// The output base that an exec root is in.
fn output_base(exec_root: &Path) -> Option<PathBuf> {
    let execroot = exec_root.parent()?;
    let is_bazels = execroot.file_name()? == "execroot";
    is_bazels.then(|| execroot.parent().map(Path::to_owned)).flatten()
}

/// An output base, if it is the user's own and its workspace is gone.
fn orphan(base: PathBuf, workspace: String) -> Option<Orphan> {
    let kept = why(&base, &workspace)?;
    Some(Orphan {
        bytes: size_below(&base),
        base,
        workspace,
        kept,
    })
}

/// Why an output base whose workspace is gone stays, if it does; none if it is not one.
#[allow(
    clippy::option_option,
    reason = "no orphan, one that goes, and one that stays"
)]
fn why(base: &Path, workspace: &str) -> Option<Option<String>> {
    let metadata = base.symlink_metadata().ok()?;
    let is_own = metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw();
    // A link on its way could be another's, who turns it elsewhere.
    if !is_own || base.canonicalize().ok()? != base {
        return None;
    }
    // With --output_base, one directory has been that of several workspaces.
    let owner = owner(base)?;
    if workspace.is_empty() || owner != workspace || !is_gone(workspace) {
        return None;
    }
    let parent = Path::new(workspace).parent()?;
    let has_entries = fs::read_dir(parent).is_ok_and(|mut entries| entries.next().is_some());
    Some(if has_entries {
        server(base).map(|pid| format!("its Bazel server is running; end it first: kill {pid}"))
    } else {
        let parent = parent.display();
        Some(format!(
            "{parent} is empty, or not there either: if it is where a disk is mounted, mount it; otherwise remove this \
             directory yourself"
        ))
    })
}

fn is_gone(path: impl AsRef<Path>) -> bool {
    path.as_ref()
        .symlink_metadata()
        .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// The process of the Bazel server of an output base, if it is running: another process may have its number by now.
fn server(base: &Path) -> Option<String> {
    let pid = small_text(&base.join("server/server.pid.txt"))?;
    let pid = pid.trim().parse::<u32>().ok()?.to_string();
    let command_line = fs::read(Path::new("/proc").join(&pid).join("cmdline")).ok()?;
    let base = base.as_os_str().as_encoded_bytes();
    let is_of_base = command_line.windows(base.len().max(1)).any(|part| part == base);
    is_of_base.then_some(pid)
}

/// The space that the file system gives to everything below a directory, in bytes.
fn size_below(directory: &Path) -> u64 {
    let mut bytes = 0;
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            bytes += allocated(&metadata);
            if metadata.is_dir() {
                left.push(entry.path());
            }
        }
    }
    bytes
}

fn show(orphan: &Orphan, as_json: bool) -> Result<(), Failure> {
    let mut out = print::out();
    if as_json {
        let value = json!({
            "kind": "output_base",
            "path": orphan.base.display().to_string(),
            "workspace": orphan.workspace,
            "bytes": orphan.bytes,
            "kept": orphan.kept,
        });
        writeln!(out, "{value}")?;
        return Ok(());
    }
    let base = orphan.base.display().to_string();
    writeln!(
        out,
        "{:>10}  {}  of {}",
        show_size(orphan.bytes),
        printable(&base),
        printable(&orphan.workspace)
    )?;
    if let Some(kept) = &orphan.kept {
        writeln!(out, "            left in place: {}", printable(kept))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: &str = "DO_NOT_BUILD_HERE";

    #[test]
    fn nothing_is_read_that_may_be_anything() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = dir.path().join("ws");
        let base = base(dir.path(), &workspace);
        fs::rename(base.join(OWNER), base.join("owner")).unwrap();
        std::os::unix::fs::symlink("owner", base.join(OWNER)).unwrap();
        assert!(orphan(base.clone(), workspace.display().to_string()).is_none());
        fs::remove_file(base.join(OWNER)).unwrap();
        let fifo = std::process::Command::new("mkfifo")
            .arg(base.join(OWNER))
            .status();
        assert!(fifo.unwrap().success());
        assert!(orphan(base, workspace.display().to_string()).is_none());
    }

    /// An output base below a directory, of a workspace that is not there.
    fn base(dir: &Path, workspace: &Path) -> PathBuf {
        let base = dir.join("base");
        fs::create_dir_all(base.join("execroot/_main/bazel-out")).unwrap();
        fs::write(base.join("execroot/_main/bazel-out/x"), [0; 10_000]).unwrap();
        fs::write(base.join(OWNER), workspace.display().to_string()).unwrap();
        assert_eq!(output_base(&base.join("execroot/_main")), Some(base.clone()));
        base
    }

    #[test]
    fn an_output_base_is_an_orphan_only_if_its_own_workspace_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let workspace = dir.path().join("ws");
        let base = base(dir.path(), &workspace);
        let named = |workspace: &Path| orphan(base.clone(), workspace.display().to_string());
        let found = named(&workspace).unwrap();
        assert!(found.bytes >= 10_000 && found.kept.is_none());
        assert!(
            named(&dir.path().join("another")).is_none(),
            "it is not that one's"
        );
        assert!(orphan(base.clone(), String::new()).is_none());
        fs::create_dir(base.join("server")).unwrap();
        // This process is not a server of it.
        fs::write(base.join("server/server.pid.txt"), std::process::id().to_string()).unwrap();
        assert!(named(&workspace).unwrap().kept.is_none());
        let mut server = std::process::Command::new("sh")
            .args(["-c", "read x", "sh"])
            .arg(format!("--output_base={}", base.display()))
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // A process that has just been started may have no command line yet.
        let command_line = format!("/proc/{}/cmdline", server.id());
        for _ in 0..1000 {
            if fs::read(&command_line).is_ok_and(|line| !line.is_empty()) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        fs::write(base.join("server/server.pid.txt"), server.id().to_string()).unwrap();
        assert!(named(&workspace).unwrap().kept.unwrap().contains("kill"));
        server.kill().unwrap();
        server.wait().unwrap();
        fs::write(base.join("server/server.pid.txt"), "4294967295").unwrap();
        assert!(named(&workspace).unwrap().kept.is_none());
        fs::create_dir(&workspace).unwrap();
        assert!(named(&workspace).is_none(), "it is there");
        fs::remove_dir(&workspace).unwrap();
        fs::remove_file(base.join(OWNER)).unwrap();
        assert!(named(&workspace).is_none(), "it may be anything");
    }

    #[test]
    fn a_workspace_on_a_disk_that_is_not_mounted_is_not_taken_for_gone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("empty")).unwrap();
        for place in ["mount/home/ws", "empty/ws"] {
            let workspace = dir.path().join(place);
            let base = base(dir.path(), &workspace);
            let found = orphan(base, workspace.display().to_string()).unwrap();
            assert!(found.kept.unwrap().contains("mount it"), "{place}");
        }
    }

    #[test]
    fn only_exec_roots_of_bazel_have_an_output_base() {
        for path in ["", "/", "/x", "/home/user/ws", "execroot", "execroot/x/y"] {
            assert_eq!(output_base(Path::new(path)), None, "{path}");
        }
    }
}
