//! Where events are forwarded to, with Bazel's flag names.

use std::path::PathBuf;

use clap::Args;

use super::{CacheArgs, ConfigError};
use crate::{
    bes::{HoldMode, HoldPolicy, Upstream, UpstreamOptions},
    transport::{Endpoint, Google, Header, split_user_info},
};

/// Flags of the upstream event service.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Forwarding")]
pub(crate) struct UpstreamArgs {
    /// Event service to forward every event to: grpc://HOST:PORT, grpcs://HOST, grpcs://HOST:PORT or unix:PATH; the
    /// --tls flags apply to it as well
    #[arg(long, value_name = "URL", env = "OUTHAUL_BES_BACKEND")]
    pub bes_backend: Option<String>,

    /// Header for that service, instead of the one of that name that the build tool sends (repeatable)
    #[arg(
        long,
        value_name = "NAME=VALUE",
        env = "OUTHAUL_BES_HEADER",
        hide_env_values = true
    )]
    pub bes_header: Vec<String>,

    /// Replace the URIs of files that are on disk with file:// URIs in forwarded events; requires --hold=target
    #[arg(long, env = "OUTHAUL_REWRITE_URIS")]
    pub rewrite_uris: bool,

    /// Credential helpers of a build whose own event service this is.
    #[arg(skip)]
    pub credential_helper: Vec<String>,

    /// Google's credentials of such a build.
    #[arg(skip)]
    pub google: Option<Google>,

    /// The workspace of such a build, where its helpers run.
    #[arg(skip)]
    pub workspace: Option<PathBuf>,

    /// Whether the build tool's `authorization` is for us, by our address, and not for that service.
    #[arg(skip)]
    pub is_authorized_here: bool,
}

impl UpstreamArgs {
    /// The upstream service, if one is named. It may share the cache's TLS files.
    ///
    /// # Errors
    /// Naming the flag that is missing or wrong.
    pub(crate) fn upstream(
        &self,
        cache: &mut CacheArgs,
        hold: HoldPolicy,
    ) -> Result<Option<Upstream>, ConfigError> {
        // An empty address is how Bazel's flag is taken back.
        let Some(url) = self.bes_backend.as_deref().filter(|url| !url.is_empty()) else {
            return match (self.rewrite_uris, self.bes_header.is_empty()) {
                (true, _) => Err(ConfigError::new("--rewrite-uris", "requires --bes-backend")),
                (false, false) => Err(ConfigError::new("--bes-header", "requires --bes-backend")),
                (false, true) => Ok(None),
            };
        };
        if self.rewrite_uris && hold.mode != HoldMode::Target {
            return Err(ConfigError::new(
                "--rewrite-uris",
                "requires --hold=target: otherwise events are forwarded before the files are on disk",
            ));
        }
        let (address, user_info) = split_user_info(url);
        let endpoint = Endpoint::parse("--bes-backend", &address)?;
        let mut options = UpstreamOptions::new(endpoint);
        let connect = &mut options.connect;
        let authority = connect.endpoint.authority();
        connect.authority =
            user_info.and_then(|(user, password)| Header::of_authority(&user, &password, &authority));
        for text in &self.bes_header {
            let header = Header::parse("--bes-header", text)?;
            connect.headers.push(header);
        }
        // They may be meant for the cache alone.
        if connect.endpoint.is_tls() {
            connect.tls = cache.tls.files();
            cache.tls_for_upstream = true;
        }
        connect.credential_helpers.clone_from(&self.credential_helper);
        connect.google.clone_from(&self.google);
        let workspace = self.workspace.clone();
        connect.workspace = workspace.or_else(|| std::env::current_dir().ok());
        options.rewrite_uris = self.rewrite_uris;
        options.is_authorized_here = self.is_authorized_here;
        Upstream::new(options).map(Some).map_err(|e| {
            ConfigError::new(
                format!("--bes-backend={}", crate::transport::without_user_info(url)),
                e,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::HoldArgs;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        upstream: UpstreamArgs,
        #[command(flatten)]
        cache: CacheArgs,
        #[command(flatten)]
        hold: HoldArgs,
    }

    fn upstream(args: &[&str]) -> Result<Option<Upstream>, ConfigError> {
        let mut cli = Cli::parse_from(std::iter::once("outhaul").chain(args.iter().copied()));
        let hold = cli.hold.policy(HoldArgs::TIMEOUT)?;
        let upstream = cli.upstream.upstream(&mut cli.cache, hold)?;
        if cli.cache.names_a_cache() {
            cli.cache.source_rule(false)?;
        }
        Ok(upstream)
    }

    #[test]
    fn the_user_of_an_address_is_not_shown() {
        let upstream = upstream(&["--bes-backend=grpcs://k3y@h"]).unwrap().unwrap();
        assert_eq!(upstream.name(), "grpcs://h:443");
    }

    #[test]
    fn wrong_values_name_their_flag() {
        for (args, part) in [
            (vec!["--bes-backend=ftp://x"], "--bes-backend"),
            (vec!["--bes-backend=grpc://"], "--bes-backend"),
            (vec!["--bes-backend=grpc://h:1", "--bes-header=x"], "--bes-header"),
            (vec!["--bes-header=a=b"], "--bes-backend"),
            (vec!["--rewrite-uris", "--hold=target"], "--bes-backend"),
            (
                vec!["--rewrite-uris", "--bes-backend=grpc://h:1"],
                "--hold=target",
            ),
            (vec!["--hold=never"], "--hold"),
        ] {
            let error = upstream(&args).err().expect("wrong").to_string();
            assert!(error.contains(part), "{args:?}: {error}");
        }
    }

    #[tokio::test]
    async fn an_upstream_is_optional() {
        assert!(upstream(&[]).unwrap().is_none());
        assert!(upstream(&["--bes-backend="]).unwrap().is_none());
        assert!(upstream(&["--hold=target"]).unwrap().is_none());
        let all = [
            "--bes-backend=grpc://h:1",
            "--bes-header=x-api-key=secret",
            "--rewrite-uris",
            "--hold=target",
        ];
        assert!(upstream(&all).unwrap().is_some());
    }

    #[tokio::test]
    async fn tls_files_are_for_services_that_speak_tls() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        let made = rcgen::generate_simple_self_signed(["h".to_owned()]).unwrap();
        std::fs::write(&file, made.cert.pem()).unwrap();
        let tls = format!("--tls-certificate={}", file.display());
        let both = |cache, backend| upstream(&[&tls, cache, backend]);
        assert!(
            both("--remote-cache=grpc://c:1", "--bes-backend=grpcs://h")
                .unwrap()
                .is_some()
        );
        assert!(
            both("--remote-cache=grpcs://c:1", "--bes-backend=grpc://h:1")
                .unwrap()
                .is_some()
        );
        let nobody = both("--remote-cache=grpc://c:1", "--bes-backend=grpc://h:1");
        let error = nobody.err().expect("nobody uses it").to_string();
        assert!(error.contains("--tls-certificate"), "{error}");
    }
}
