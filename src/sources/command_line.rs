//! What a build's canonical command line says of its remote cache.

use std::{
    path::{Component, Path, PathBuf},
    time::Duration,
};

use super::error::SourceError;
use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::{MAX_HTTP_CONNECTIONS, RemoteOptions},
    transport::{
        Endpoint, Google, Header, TlsFiles,
        auth::{check_helper, has_helper},
        google::DEFAULT_SCOPE,
        is_http, netrc, split_user_info,
    },
    units::parse_duration,
};

/// What newer Bazels, and forks that redact, write in the place of a secret.
const REDACTED: &str = "<REDACTED>";

/// A build that gives its cache less time than we do is not to wait longer because of us. Its limit is for a single blob,
/// though, and ours for a batch, several of which share a line.
const LEAST_TIMEOUT: Duration = Duration::from_secs(30);

/// The directories that relative paths on a build's command line start from, as they are for us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BuildDirectories {
    /// The workspace, where Bazel's server runs.
    pub workspace: PathBuf,
    /// Where the build's client was started.
    pub working_directory: PathBuf,
}

/// Where the build's `--disk_cache` is. A relative one lies below the directory that the client was started in, and `~/`
/// is the home directory, as for Bazel, which takes `..` off as text, wherever links lead.
pub(super) fn disk_cache(line: &CommandLine, directories: &BuildDirectories) -> Option<PathBuf> {
    let text = line.given("disk_cache")?;
    let path = match text.strip_prefix("~/") {
        Some(below) => {
            let users = std::fs::read("/etc/passwd").unwrap_or_default();
            let home = home_of(&users, rustix::process::getuid().as_raw()).or_else(std::env::home_dir)?;
            home.join(below)
        }
        None => directories.working_directory.join(text),
    };
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => _ = normal.pop(),
            part => normal.push(part),
        }
    }
    normal.is_absolute().then_some(normal)
}

/// A user's home directory by the list of users. Bazel's server takes it from there, whatever `HOME` says.
pub(super) fn home_of(users: &[u8], user: u32) -> Option<PathBuf> {
    // Others' names may be in any encoding.
    let users = String::from_utf8_lossy(users);
    let user = user.to_string();
    let home = users.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        (fields.next() == Some(&*user)).then(|| fields.nth(2)).flatten()
    });
    // Where it is not one, Java takes `HOME`.
    home.filter(|home| home.len() > 1).map(PathBuf::from)
}

/// The cache that a build's canonical command line names.
///
/// One option of the build's that cannot be used does not cost the cache: it is left out, noted in
/// [`RemoteOptions::left_out`], and reported if the server then refuses us.
///
/// # Errors
/// One that names the build's own flag.
pub(super) fn options_of(
    line: &CommandLine,
    template: &RemoteOptions,
    directories: &BuildDirectories,
) -> Result<RemoteOptions, SourceError> {
    let (flag, endpoint) = line.remote_cache().ok_or(SourceError::NoCache)?;
    let mut options = template.clone();
    let (address, user_info) = split_user_info(endpoint);
    // Of caches, those that Bazel itself can use: none that would get credentials of the environment.
    let parse = if is_http(&address) {
        Endpoint::parse_cache
    } else {
        Endpoint::parse
    };
    options.connect.endpoint = parse(&format!("--{flag}"), &address)?;
    if options.connect.endpoint.is_http() {
        // Bazel has none there either.
        options.instance_name.clear();
        // Of Bazel's own flag; its default is ours. 0 sets no limit.
        options.connections = line
            .given("remote_max_connections")
            .and_then(|text| text.parse().ok())
            .filter(|count| *count > 0)
            .map(|count: usize| count.min(MAX_HTTP_CONNECTIONS))
            .or(template.connections);
    } else if let Some(instance) = line.last("remote_instance_name") {
        instance.clone_into(&mut options.instance_name);
    }
    // A limit that was set on purpose counts.
    let is_default = template.stall_timeout == RemoteOptions::STALL_TIMEOUT;
    if let Some(Ok(limit)) = line.given("remote_timeout").map(parse_duration)
        && !limit.is_zero()
        && is_default
    {
        options.stall_timeout = options.stall_timeout.min(limit.max(LEAST_TIMEOUT));
    }
    if let Some(proxy) = line
        .last("remote_proxy")
        .and_then(|value| value.strip_prefix("unix:"))
    {
        options.connect.proxy = Some(directories.workspace.join(proxy));
    }
    if !directories.workspace.as_os_str().is_empty() {
        options.connect.workspace = Some(directories.workspace.clone());
    }
    add_headers(line, &mut options);
    if options.connect.endpoint.is_tls() {
        options.connect.tls_authority_override = line.given("tls_authority_override").map(str::to_owned);
        add_tls(line, directories, &mut options);
    }
    add_helpers(line, &mut options);
    // A helper that is for the endpoint goes before Google's credentials, and they go before a `.netrc`.
    let is_known = has_helper(&options.connect) || add_google(line, directories, &mut options);
    add_login(user_info, is_known, &mut options);
    if let Some(function) = line.given("digest_function") {
        match function.parse::<DigestFunction>() {
            Ok(function) => options.digest_function = function,
            Err(error) => options.left_out.push(format!("--digest_function: {error}")),
        }
    }
    options.validate()?;
    Ok(options)
}

fn add_headers(line: &CommandLine, options: &mut RemoteOptions) {
    // `run` knows some from the command itself already.
    let own = options.connect.headers.clone();
    let is_known = |name: &str| own.iter().any(|known| known.name().eq_ignore_ascii_case(name));
    for name in ["remote_header", "remote_cache_header"] {
        for text in line.all(name) {
            let (header, value) = text.split_once('=').unwrap_or(("", text));
            if value == REDACTED {
                if !is_known(header) {
                    options.left_out.push(format!(
                        "--{name}={header}: its value is redacted in the build's events"
                    ));
                }
                continue;
            }
            match Header::parse(&format!("--{name}"), text) {
                Ok(header) if own.contains(&header) => {}
                Ok(header) => options.connect.headers.push(header),
                Err(error) => options.left_out.push(error.to_string()),
            }
        }
    }
}

/// Bazel's server runs in the workspace, where relative files are looked for.
fn add_tls(line: &CommandLine, directories: &BuildDirectories, options: &mut RemoteOptions) {
    let path = |name| Some(directories.workspace.join(line.given(name)?));
    let files = &mut options.connect.tls;
    let certificate = path("tls_certificate").filter(|_| files.certificate.is_none());
    if certificate.is_some() {
        let tried = TlsFiles {
            certificate,
            ..TlsFiles::default()
        };
        match tried.read() {
            Ok(_) => files.certificate = tried.certificate,
            Err(error) => options.left_out.push(error.to_string()),
        }
    }
    if files.client_certificate.is_some() || files.client_key.is_some() {
        return;
    }
    match (path("tls_client_certificate"), path("tls_client_key")) {
        (client_certificate @ Some(_), client_key @ Some(_)) => {
            let tried = TlsFiles {
                certificate: files.certificate.clone(),
                client_certificate,
                client_key,
            };
            match tried.read() {
                Ok(_) => *files = tried,
                Err(error) => options.left_out.push(error.to_string()),
            }
        }
        (Some(file), None) => options.left_out.push(format!(
            "--tls_client_certificate={}: requires --tls_client_key",
            file.display()
        )),
        (None, Some(file)) => options.left_out.push(format!(
            "--tls_client_key={}: requires --tls_client_certificate",
            file.display()
        )),
        (None, None) => {}
    }
}

fn add_helpers(line: &CommandLine, options: &mut RemoteOptions) {
    for name in ["credential_helper", "experimental_credential_helper"] {
        for text in line.all(name) {
            match check_helper(&options.connect, text) {
                Ok(()) => options.connect.credential_helpers.push(text.to_owned()),
                Err(error) => options.left_out.push(error.to_string()),
            }
        }
    }
    let connect = &mut options.connect;
    for (name, duration) in [
        ("timeout", &mut connect.credential_helper_timeout),
        ("cache_duration", &mut connect.credential_helper_cache_duration),
    ] {
        for prefix in ["experimental_", ""] {
            let name = format!("{prefix}credential_helper_{name}");
            match line.given(&name).map(parse_duration) {
                None => {}
                Some(Ok(given)) => *duration = given,
                Some(Err(error)) => options.left_out.push(format!("--{name}: {error}")),
            }
        }
    }
}

/// Google's credentials that a build's command line asks for: a file goes before the default ones. Bazel's server runs in
/// the workspace, where a relative file is looked for.
pub(crate) fn google_of(line: &CommandLine, workspace: &Path) -> Option<Google> {
    let file = line.given("google_credentials").map(|file| workspace.join(file));
    if file.is_none() && line.switch("google_default_credentials") != Some(true) {
        return None;
    }
    let scopes = line.last("google_auth_scopes").unwrap_or(DEFAULT_SCOPE);
    let scopes = scopes.split(',').filter(|scope| !scope.is_empty());
    Some(Google {
        file,
        scopes: scopes.map(str::to_owned).collect(),
    })
}

/// Whether Google's credentials are asked for, if only to no avail.
fn add_google(line: &CommandLine, directories: &BuildDirectories, options: &mut RemoteOptions) -> bool {
    if options.connect.google.is_some() {
        return true;
    }
    let Some(google) = google_of(line, &directories.workspace) else {
        return false;
    };
    match google.check() {
        Ok(()) => options.connect.google = Some(google),
        Err(error) => options.left_out.push(error.to_string()),
    }
    true
}

/// User name and password: of the address itself, or of the user's `.netrc`, where nothing else says who it is
/// (`is_known`). Of an HTTP cache's address, they go before all else, as for Bazel.
pub(crate) fn add_login(user_info: Option<(String, String)>, is_known: bool, options: &mut RemoteOptions) {
    let connect = &mut options.connect;
    if connect.endpoint.is_http() && user_info.is_some() {
        connect.credential_helpers.clear();
        connect.google = None;
    }
    if let Some((user, password)) = user_info.as_ref().filter(|_| !connect.endpoint.is_http()) {
        connect.authority = Header::of_authority(user, password, &connect.endpoint.authority());
    }
    let says_who = |header: &Header| header.name() == "authorization";
    if connect.headers.iter().any(says_who) {
        return;
    }
    let login = user_info.or_else(|| {
        let is_asked = !is_known && !connect.no_netrc;
        netrc::of_user(connect.endpoint.host().filter(|_| is_asked)?)
    });
    if let Some((user, password)) = login {
        connect.headers.push(Header::basic(&user, &password));
    }
}

/// Endpoint and instance name of the cache that a build's canonical command line names, and nothing else of it.
pub(crate) fn address_of(line: &CommandLine) -> Option<(String, String)> {
    let placeholder = Endpoint::parse("--remote-cache", "grpc://localhost:1").ok()?;
    let options = options_of(
        line,
        &RemoteOptions::new(placeholder),
        &BuildDirectories::default(),
    )
    .ok()?;
    Some((options.connect.endpoint.to_string(), options.instance_name))
}
