//! A command's own event service: how its events get there by us, and with whose credentials.

use std::path::Path;

use anyhow::{anyhow, bail};

use super::{super::paths::workspace_around, probe::CommandInfo};
use crate::{
    bep::event::CommandLine,
    bes::{HoldPolicy, Upstream},
    config::{CacheArgs, UpstreamArgs},
    sources::{BuildDirectories, google_of},
    transport::{
        ConnectOptions, Endpoint, Header, auth::has_helper, netrc, split_user_info, without_user_info,
    },
};

/// The oldest Bazel that has credential helpers of this name, and a way to an address that is not encrypted where there are
/// Google's credentials: older ones fail there.
const GOOGLE_UNENCRYPTED: u32 = 7;
/// The oldest Bazel that reads a `.netrc`.
const NETRC: u32 = 5;

/// Whether a command has Google's credentials.
///
/// # Errors
/// When it sends no events to an address that is not encrypted then.
pub(super) fn has_google(info: &CommandInfo, line: &CommandLine) -> anyhow::Result<bool> {
    let has_google = google_of(line, Path::new("")).is_some();
    if has_google && info.version.is_none_or(|version| version < GOOGLE_UNENCRYPTED) {
        bail!("with Google's credentials, this Bazel sends events only over encrypted connections");
    }
    Ok(has_google)
}

/// Whether events can go by us the way that a command's own would take.
///
/// # Errors
/// When something else has the last word on where they go, or they would go through Java's own proxies, which lead elsewhere than we get: the service may not be reached otherwise.
pub(super) fn has_way(info: &CommandInfo, line: &CommandLine) -> anyhow::Result<()> {
    if let Some(name) = info
        .options
        .as_ref()
        .ok()
        .and_then(|options| options.overruled.as_ref())
    {
        bail!("a wrapper around Bazel adds {name} after all other options");
    }
    let has_proxy = info.options.as_ref().is_ok_and(|options| options.has_proxy);
    if has_proxy && line.given("bes_backend").is_some() {
        bail!("outhaul cannot forward events through the proxy that Bazel's --host_jvm_args name");
    }
    Ok(())
}

/// The event service at an address that a command names, with the command's own words on how it is reached.
pub(super) fn upstream_at(
    backend: &str,
    info: &CommandInfo,
    line: Option<&CommandLine>,
    (mut upstream, mut cache): (UpstreamArgs, CacheArgs),
    hold: HoldPolicy,
) -> anyhow::Result<Option<Upstream>> {
    let named = |name: &str| line?.given(name);
    upstream.bes_backend = Some(match named("bes_proxy") {
        None => backend.to_owned(),
        Some(proxy) if proxy.starts_with("unix:") && backend.starts_with("grpc://") => proxy.to_owned(),
        Some(proxy) => {
            bail!(
                "outhaul cannot forward events through --bes_proxy={}",
                without_user_info(proxy)
            );
        }
    });
    if let Some(line) = line {
        // Bazel's server runs in the workspace, where relative files are looked for.
        let workspace = directories_of(info).workspace;
        let path = |name| Some(workspace.join(line.given(name)?));
        let tls = &mut cache.tls;
        for (file, name) in [
            (&mut tls.tls_certificate, "tls_certificate"),
            (&mut tls.tls_client_certificate, "tls_client_certificate"),
            (&mut tls.tls_client_key, "tls_client_key"),
        ] {
            *file = file.take().or_else(|| path(name));
        }
        upstream.credential_helper = ["credential_helper", "experimental_credential_helper"]
            .into_iter()
            .flat_map(|name| line.all(name))
            .map(|helper| helper.replace("%workspace%", &workspace.to_string_lossy()))
            .collect();
        upstream.google = google_of(line, &workspace);
        let has_netrc = info.version.is_none_or(|version| version >= NETRC);
        let login = |host: &str| netrc::of_user(host).filter(|_| has_netrc);
        authorize(&mut upstream, line, backend, login);
        upstream.workspace = Some(workspace);
    }
    upstream
        .upstream(&mut cache, hold)
        .map_err(|e| anyhow!("outhaul cannot forward events to the build's own event service: {e}"))
}

/// Whether events of a command can go by us to the event service that it names, if it names one.
///
/// # Errors
/// When they cannot, with the reason.
pub(in crate::cli) fn can_forward(
    info: &CommandInfo,
    line: &CommandLine,
    (mut upstream, cache): (UpstreamArgs, CacheArgs),
) -> anyhow::Result<()> {
    has_google(info, line)?;
    has_way(info, line)?;
    let Some(backend) = line.given("bes_backend") else {
        return Ok(());
    };
    if upstream.bes_backend.as_deref() != Some(backend) {
        upstream.bes_header.clear();
    }
    upstream_at(
        backend,
        info,
        Some(line),
        (upstream, cache),
        HoldPolicy::default(),
    )
    .map(drop)
}

/// Where a command's relative files are.
pub(in crate::cli) fn directories_of(info: &CommandInfo) -> BuildDirectories {
    let working_directory = info.directory.clone();
    BuildDirectories {
        workspace: workspace_around(&working_directory).unwrap_or_else(|| working_directory.clone()),
        working_directory,
    }
}

/// What the command's own event service is shown. What Bazel shows our address by itself is for us.
fn authorize(
    upstream: &mut UpstreamArgs,
    line: &CommandLine,
    backend: &str,
    login: impl Fn(&str) -> Option<(String, String)>,
) {
    let says_who = |header: &str| {
        let name = header.split('=').next().unwrap_or_default();
        name.eq_ignore_ascii_case("authorization")
    };
    if line.all("bes_header").any(says_who) || upstream.bes_header.iter().any(|h| says_who(h)) {
        return;
    }
    upstream.is_authorized_here = true;
    if upstream.google.is_none()
        && let (address, None) = split_user_info(backend)
        && let Ok(endpoint) = Endpoint::parse("--bes_backend", &address)
        && let Some((user, password)) = endpoint.host().and_then(login)
        && !is_helped(upstream, endpoint)
    {
        let header = Header::basic(&user, &password);
        upstream
            .bes_header
            .push(format!("{}={}", header.name(), header.value()));
    }
}

/// Whether one of the command's helpers is for a server.
fn is_helped(upstream: &UpstreamArgs, endpoint: Endpoint) -> bool {
    let mut connect = ConnectOptions::new(endpoint);
    connect.credential_helpers.clone_from(&upstream.credential_helper);
    has_helper(&connect)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{super::probe::Options, *};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        upstream: UpstreamArgs,
    }

    #[test]
    fn what_bazel_shows_our_address_is_not_for_another_service() {
        let login = |host: &str| (host == "events").then(|| ("me".to_owned(), "secret".to_owned()));
        let basic = Header::basic("me", "secret").value().to_owned();
        let of_netrc = format!("authorization={basic}");
        for (own, options, expected, is_authorized_here) in [
            (&[][..], &[][..], &[of_netrc.as_str()][..], true),
            (&[], &["--bes_header=x=y"], &[&of_netrc], true),
            (&[], &["--bes_header=Authorization=Bearer x"], &[], false),
            (
                &["--bes-header=authorization=Bearer x"],
                &[],
                &["authorization=Bearer x"],
                false,
            ),
        ] {
            let mut upstream = Cli::parse_from([&["outhaul"], own].concat()).upstream;
            authorize(
                &mut upstream,
                &Options::of(options).line(),
                "grpcs://events",
                login,
            );
            assert_eq!(upstream.bes_header, expected, "{own:?} {options:?}");
            assert_eq!(
                upstream.is_authorized_here, is_authorized_here,
                "{own:?} {options:?}"
            );
        }
        let mut other = Cli::parse_from(["outhaul"]).upstream;
        authorize(&mut other, &Options::of(&[]).line(), "grpc://other:1", login);
        assert_eq!((other.bes_header.len(), other.is_authorized_here), (0, true));
    }
}
