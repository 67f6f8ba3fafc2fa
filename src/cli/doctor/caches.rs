//! The caches that a build with Outhaul reads from: whether they answer, and what they can do.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use http::{Method, Request, header};
use http_body_util::Empty;

use super::{finding::Finding, machine};
use crate::{
    remote::{ActionStore, Capabilities, RemoteOptions},
    sources::{SourceCache, SourceError},
    transport::{ConnectOptions, Endpoint, HttpClient},
    units::show_size,
};

const CODE: &str = "cache";
/// How long a cache may take for each answer.
const ANSWER: Duration = Duration::from_secs(10);

/// What is found of all caches of a command.
pub(super) async fn all(cache: &SourceCache) -> Vec<Finding> {
    let mut found: Vec<Finding> = cache.left_out().map(left_out).collect();
    for (options, store) in cache.stores() {
        let endpoint = &options.connect.endpoint;
        if let Some(path) = endpoint.directory_path() {
            found.push(directory(path));
            continue;
        }
        let answer = tokio::time::timeout(ANSWER, ask(store)).await;
        let answer = answer.unwrap_or_else(|_| Err(format!("no answer within {} s", ANSWER.as_secs())));
        let is_there = answer.is_ok();
        found.push(server(endpoint, answer));
        if is_there && endpoint.is_http() {
            let asked = tokio::time::timeout(ANSWER, date(options)).await.ok().flatten();
            found
                .extend(asked.map(|theirs| machine::clock(&endpoint.to_string(), theirs, SystemTime::now())));
        }
    }
    found
}

async fn ask(store: &dyn ActionStore) -> Result<Capabilities, String> {
    store.probe().await.map_err(|error| error.to_string())?;
    store.capabilities().await.map_err(|error| error.to_string())
}

/// What an HTTP server says that the time is. It is asked without credentials: any answer will do.
async fn date(options: &RemoteOptions) -> Option<SystemTime> {
    let connect = ConnectOptions {
        headers: Vec::new(),
        ..options.connect.clone()
    };
    let client = HttpClient::new(&connect, 1).ok()?;
    let request = Request::builder()
        .method(Method::HEAD)
        .uri(connect.endpoint.http_uri())
        .header(header::USER_AGENT, concat!("outhaul/", env!("CARGO_PKG_VERSION")))
        .body(Empty::new())
        .ok()?;
    let answer = client.send(request).await.ok()?;
    httpdate::parse_http_date(answer.headers().get(header::DATE)?.to_str().ok()?).ok()
}

/// A cache on the network.
fn server(endpoint: &Endpoint, answer: Result<Capabilities, String>) -> Finding {
    let kind = match endpoint {
        _ if endpoint.is_http() => "an HTTP cache",
        _ if endpoint.bucket().is_some() => "a bucket",
        _ => "a gRPC cache",
    };
    let capabilities = match answer {
        Ok(capabilities) => capabilities,
        Err(reason) => {
            return Finding::error(
                CODE,
                format!("{endpoint}, {kind}, does not answer outhaul: {reason}"),
                "check the address, the network, certificates and credentials; until then, Bazel downloads by itself \
                 under `outhaul run`",
            );
        }
    };
    let mut said = format!("{endpoint} is {kind}");
    if endpoint.is_http() || endpoint.bucket().is_some() {
        return Finding::ok(CODE, said);
    }
    let functions: Vec<String> = capabilities
        .digest_functions
        .iter()
        .map(ToString::to_string)
        .collect();
    if !functions.is_empty() {
        said.push_str(&format!("; digests: {}", functions.join(", ")));
    }
    said.push_str(&format!(
        "; batches of {}",
        show_size(capabilities.max_batch_bytes)
    ));
    said.push_str(if capabilities.zstd_streams {
        "; zstd"
    } else {
        "; no compression"
    });
    Finding::ok(CODE, said)
}

/// A disk cache.
fn directory(path: &Path) -> Finding {
    use std::{io::ErrorKind, os::unix::fs::MetadataExt as _};
    let shown = path.display();
    let user = rustix::process::geteuid().as_raw();
    let owner = match path.metadata() {
        Ok(meta) => meta.uid(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Finding::note(
                CODE,
                format!("the disk cache {shown} is not there yet"),
                "build once: Bazel makes the directory",
            );
        }
        Err(error) => return unreadable(path, &error),
    };
    if owner != 0 && owner != user {
        return Finding::warning(
            CODE,
            format!(
                "the disk cache {shown} belongs to user {owner}, not to user {user}, so outhaul does not read it"
            ),
            "build and run outhaul as the same user",
        );
    }
    match path.read_dir() {
        Ok(_) => Finding::ok(CODE, format!("{shown} is a disk cache")),
        Err(error) => unreadable(path, &error),
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Finding {
    Finding::error(
        CODE,
        format!("failed to read the disk cache {}: {error}", path.display()),
        "give this user the right to read it, or name another --disk_cache",
    )
}

/// An option of the command's that cannot be used.
fn left_out(reason: &str) -> Finding {
    Finding::warning(
        "cache-options",
        format!("an option of the cache cannot be used: {reason}"),
        "give outhaul the same by its own flag: see `outhaul run --help`, Remote cache",
    )
}

/// Why there is no cache at all.
pub(super) fn none(reason: &SourceError) -> Finding {
    match reason {
        SourceError::NoCache => Finding::warning(
            CODE,
            "the command uses neither a remote cache nor a disk cache, so there is nothing to download from",
            "add --remote_cache=URL or --disk_cache=DIR to the rc file",
        ),
        reason => Finding::error(
            CODE,
            format!("outhaul cannot use the command's cache: {reason}"),
            "change the flag that the message names",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Level, *};
    use crate::digest::DigestFunction;

    fn endpoint(text: &str) -> Endpoint {
        Endpoint::parse_cache("--remote-cache", text).unwrap()
    }

    #[test]
    fn a_server_is_shown_with_what_it_can_do() {
        let capabilities = Capabilities {
            digest_functions: vec![DigestFunction::Sha256, DigestFunction::Blake3],
            zstd_streams: true,
            ..Capabilities::plain(3 << 20)
        };
        let found = server(&endpoint("grpc://cache:1"), Ok(capabilities.clone()));
        assert_eq!(found.level, Level::Ok);
        assert_eq!(
            found.message,
            "grpc://cache:1 is a gRPC cache; digests: sha256, blake3; batches of 3.0 MiB; zstd"
        );
        let found = server(&endpoint("http://cache/x"), Ok(capabilities));
        assert!(found.message.ends_with("is an HTTP cache"), "{}", found.message);
        let found = server(&endpoint("http://cache/x"), Err("refused".to_owned()));
        assert_eq!(found.level, Level::Error);
        assert!(found.message.contains("refused"), "{}", found.message);
    }

    #[test]
    fn a_disk_cache_is_there_or_not_or_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for (path, level) in [
            (dir.path().to_owned(), Level::Ok),
            (dir.path().join("none"), Level::Note),
            (file.clone(), Level::Error),
            (file.join("below"), Level::Error),
        ] {
            assert_eq!(directory(&path).level, level, "{}", path.display());
        }
    }

    #[test]
    fn a_command_without_a_cache_and_options_that_cannot_be_used_are_warnings() {
        assert_eq!(none(&SourceError::NoCache).level, Level::Warning);
        assert_eq!(none(&SourceError::NotNamed).level, Level::Error);
        let found = left_out("--tls_certificate=ca.pem: no such file");
        assert_eq!(found.level, Level::Warning);
        assert!(found.message.contains("ca.pem"));
    }
}
