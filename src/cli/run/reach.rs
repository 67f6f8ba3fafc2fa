//! Where a command's Bazel server is, as far as it matters to us: whether it gets to our port.

use std::os::unix::ffi::OsStrExt as _;

use anyhow::bail;

use super::probe::CommandInfo;

/// A variable with a proxy's address, through which gRPC for Java makes all its connections, also to this machine (measured
/// with 7.7.1; other proxies of Java's are not for this machine).
const GRPC_PROXY: &str = "GRPC_PROXY_EXP";

/// Whether Bazel's server gets to a port of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Reach {
    Sure,
    /// It is not to be seen from here.
    Unknown,
}

/// Looks where a command's server is. It runs since the command's options were asked for.
///
/// # Errors
/// When it has a network of its own, or sends all that it sends by gRPC through a proxy.
pub(in crate::cli) fn reach_of(info: &CommandInfo) -> anyhow::Result<Reach> {
    let base = info.options.as_ref().ok().and_then(|o| o.output_base.as_deref());
    // One that serves a single command, with --batch, leaves no number.
    let Some((base, pid)) = base.and_then(|base| {
        let pid = std::fs::read_to_string(base.join("server/server.pid.txt")).ok()?;
        Some((base, pid.trim().parse::<u32>().ok()?))
    }) else {
        return Ok(Reach::Sure);
    };
    let network = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/net"));
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let named = base.as_os_str().as_bytes();
    let is_server = !named.is_empty() && words.windows(named.len()).any(|part| part == named);
    match (network(&pid.to_string()), network("self")) {
        (Ok(theirs), Ok(ours)) if is_server && theirs == ours => {
            if has_grpc_proxy(&std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default()) {
                bail!(
                    "Bazel's server was started with {GRPC_PROXY}, and does not reach outhaul through that proxy"
                );
            }
            Ok(Reach::Sure)
        }
        (Ok(_), Ok(_)) if is_server => {
            bail!("Bazel's server runs in another network namespace, from which it cannot reach outhaul")
        }
        _ => Ok(Reach::Unknown),
    }
}

/// Whether the environment of a process, its variables ended by NUL, names a proxy for all of gRPC.
fn has_grpc_proxy(environment: &[u8]) -> bool {
    let named = |variable: &[u8]| {
        let (name, value) = variable.split_at_checked(GRPC_PROXY.len()).unwrap_or_default();
        // With nothing in it, it is this machine's port 80.
        name == GRPC_PROXY.as_bytes() && value.starts_with(b"=")
    };
    environment.split(|byte| *byte == 0).any(named)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{super::probe::Options, *};

    #[test]
    fn a_proxy_for_all_of_grpc_is_seen() {
        for (environment, has_one) in [
            (&b"A=b\0GRPC_PROXY_EXP=proxy:1\0C=d\0"[..], true),
            (b"GRPC_PROXY_EXP=proxy:1", true),
            (b"GRPC_PROXY_EXP=\0", true),
            (b"NO_GRPC_PROXY_EXP=proxy:1\0GRPC_PROXY_EXPECTED=1\0", false),
            (b"", false),
        ] {
            assert_eq!(has_grpc_proxy(environment), has_one, "{environment:?}");
        }
    }

    #[test]
    fn a_server_is_found_by_its_number_and_its_output_base() {
        let base = tempfile::tempdir().unwrap();
        let mut options = Options::of(&[]);
        options.output_base = Some(base.path().to_owned());
        let info = CommandInfo {
            word: "build".to_owned(),
            directory: PathBuf::new(),
            version: Some(7),
            backend: None,
            options: Ok(options),
            is_refused: false,
            is_script: false,
        };
        assert_eq!(reach_of(&info).unwrap(), Reach::Sure, "without a server");
        std::fs::create_dir(base.path().join("server")).unwrap();
        let write = |pid: u32| std::fs::write(base.path().join("server/server.pid.txt"), pid.to_string());
        let sleep = |of: &Path| {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "read line"]).arg(of);
            command.stdin(std::process::Stdio::piped()).spawn().unwrap()
        };
        for (of, expected) in [(base.path(), Reach::Sure), (Path::new("/other"), Reach::Unknown)] {
            let mut server = sleep(of);
            // It may just be about to become what it is to be.
            let words = || std::fs::read(format!("/proc/{}/cmdline", server.id())).unwrap_or_default();
            while !words().starts_with(b"sh\0") {
                std::thread::yield_now();
            }
            write(server.id()).unwrap();
            assert_eq!(reach_of(&info).unwrap(), expected, "{}", of.display());
            server.kill().unwrap();
            server.wait().unwrap();
        }
        assert_eq!(reach_of(&info).unwrap(), Reach::Unknown, "there is none any more");
    }
}
