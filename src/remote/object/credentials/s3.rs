//! S3: keys, web identities, profiles, and the roles of containers and machines.

use std::sync::Arc;

use http::HeaderMap;
use object_store::{
    ClientOptions,
    aws::{AmazonS3Builder, AmazonS3ConfigKey as Key},
};

use super::{
    Connector, EC2, Environment, NONE, Opened, built, check_host, container::Container, if_any, no_retries,
    sendable, server_at, wrong,
};
use crate::{
    remote::{
        RemoteOptions,
        object::{
            profile::{Files, Profile, ProfileError, Provider},
            service::CHECKSUM_MODE,
        },
    },
    transport::{
        BucketAddress, RemoteError,
        bucket::{Anonymous, is_name},
    },
};

/// The variables that together name a web identity of AWS.
const WEB_IDENTITY: [&str; 2] = ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"];
/// What a container's credentials are called.
const CONTAINER: &str = "the container's role";
/// The path of the role of an ECS task.
const TASK: &str = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";

pub(super) fn open(
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let files = Files::new(environment);
    let profile = match files.read() {
        Err(_) if address.anonymous == Anonymous::Yes => None,
        profile => profile.map_err(|e: ProfileError| wrong(address, e))?,
    };
    let endpoint = endpoint(address, environment, profile.as_ref())?;
    let region = region(address, environment, profile.as_ref())?;
    let plain = endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(&address.bucket)
        .with_region(&region)
        .with_retry(no_retries())
        .with_client_options(
            ClientOptions::new()
                .with_allow_http(plain)
                .with_default_headers(HeaderMap::from_iter([CHECKSUM_MODE])),
        )
        .with_http_connector(connector.clone());
    // Certificates are for one level of names, and other servers' buckets have none.
    let in_path = address
        .path_style
        .or_else(|| profile.as_ref()?.path_style())
        .unwrap_or(endpoint.is_some() || address.bucket.contains('.'));
    builder = builder.with_virtual_hosted_style_request(!in_path);
    // The crate knows the names of the other regions only.
    let in_china = region.starts_with("cn-").then_some("amazonaws.com.cn");
    let endpoint = endpoint.or_else(|| Some(format!("https://s3.{region}.{}", in_china?)));
    if let Some(domain) = in_china {
        builder = builder.with_config(Key::StsEndpoint, format!("https://sts.{region}.{domain}"));
    }
    let own = format!("https://s3.{region}.amazonaws.com");
    check_host(
        address,
        &in_host(endpoint.as_deref().unwrap_or(&own), address, in_path),
    )?;
    if let Some(url) = endpoint {
        builder = builder.with_endpoint(in_host(&url, address, in_path));
    }
    let (builder, shown, provider) = identified(
        builder,
        files,
        profile.as_ref(),
        options,
        address,
        environment,
        &connector,
    )?;
    let store = Arc::new(built(address, builder.build())?);
    Ok(Opened {
        ready: if_any(shown, store.credentials()),
        pages: store.clone(),
        store,
        shown,
        profile: provider,
    })
}

/// The server, if it is not AWS's own.
fn endpoint(
    address: &BucketAddress,
    environment: &Environment,
    profile: Option<&Profile>,
) -> Result<Option<String>, RemoteError> {
    let ignored = environment.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS");
    let is_ignored = ignored.is_some_and(|ignored| ignored.eq_ignore_ascii_case("true"));
    if address.endpoint.is_some() || is_ignored {
        return Ok(address.endpoint.clone());
    }
    let set = |name| Some((name, environment.get(name)?));
    let of_profile = || Some(("endpoint_url of the profile", profile?.endpoint()?.to_owned()));
    let named = set("AWS_ENDPOINT_URL_S3").or_else(|| set("AWS_ENDPOINT_URL"));
    let url = named.or_else(of_profile);
    url.map(|(name, url)| server_at(address, name, &url)).transpose()
}

fn region(
    address: &BucketAddress,
    environment: &Environment,
    profile: Option<&Profile>,
) -> Result<String, RemoteError> {
    let named = address.region.clone();
    let named = named.or_else(|| environment.first(&["AWS_REGION", "AWS_DEFAULT_REGION"]));
    let region = named.or_else(|| profile?.region().map(str::to_owned));
    let region = region.unwrap_or_else(|| "us-east-1".to_owned());
    if is_name(&region) {
        return Ok(region);
    }
    let reason = "the region (AWS_REGION, AWS_DEFAULT_REGION or the profile's) contains a character that no region's name has";
    Err(wrong(address, reason))
}

/// A server's URL with the bucket in the host's name, unless it is in the path.
fn in_host(server: &str, address: &BucketAddress, in_path: bool) -> String {
    match server.split_once("://") {
        Some((scheme, host)) if !in_path => format!("{scheme}://{}.{host}", address.bucket),
        _ => server.to_owned(),
    }
}

/// Gives the builder the credentials that there are: the environment's before those of files, and these before those of
/// the machine. Says which, and the provider of a profile's.
fn identified(
    mut builder: AmazonS3Builder,
    files: Files,
    profile: Option<&Profile>,
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
    connector: &Connector,
) -> Result<(AmazonS3Builder, &'static str, Option<Arc<Provider>>), RemoteError> {
    let (mut shown, mut provider) = (NONE, None);
    let keys = (
        environment.get("AWS_ACCESS_KEY_ID"),
        environment.get("AWS_SECRET_ACCESS_KEY"),
    );
    let has = |names: &[&str]| environment.has(names);
    let has_profile = match profile {
        Some(profile)
            if address.anonymous != Anonymous::Yes && keys == (None, None) && !has(&WEB_IDENTITY) =>
        {
            profile.has_credentials().map_err(|e| wrong(address, e))?
        }
        _ => false,
    };
    let set = |builder: AmazonS3Builder, names: &[&str]| {
        let settings = environment.settings(names).into_iter();
        settings.fold(builder, |builder, (key, value)| builder.with_config(key, value))
    };
    if address.anonymous == Anonymous::Yes {
        builder = builder.with_skip_signature(true);
    } else if let (Some(id), Some(secret)) = &keys {
        shown = "the keys in the environment";
        let id = sendable(address, "AWS_ACCESS_KEY_ID", id.clone())?;
        builder = builder.with_access_key_id(id).with_secret_access_key(secret);
        if let Some(token) = environment.get("AWS_SESSION_TOKEN") {
            builder = builder.with_token(sendable(address, "AWS_SESSION_TOKEN", token)?);
        }
    } else if keys != (None, None) {
        return Err(wrong(
            address,
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must both be set",
        ));
    } else if has(&WEB_IDENTITY) {
        shown = "a web identity";
        let names = [WEB_IDENTITY[0], WEB_IDENTITY[1], "AWS_ROLE_SESSION_NAME"];
        builder = set(builder, &names);
        if let Some(url) = environment.get("AWS_ENDPOINT_URL_STS") {
            let url = server_at(address, "AWS_ENDPOINT_URL_STS", &url)?;
            builder = builder.with_config(Key::StsEndpoint, url);
        }
    } else if has_profile {
        shown = "a profile of the AWS files";
        let of_profile = Arc::new(Provider::new(files, options.connect.credential_helper_timeout));
        builder = builder.with_credentials(of_profile.clone());
        provider = Some(of_profile);
    } else if has(&[TASK]) {
        shown = CONTAINER;
        let path = environment.get(TASK).unwrap_or_default();
        if !path.starts_with('/') || http::Uri::try_from(&path).is_err() {
            return Err(wrong(address, format_args!("{TASK} is not a path")));
        }
        builder = set(builder, &[TASK]);
    } else if let Some(container) = Container::new(environment, connector).map_err(|e| wrong(address, e))? {
        shown = CONTAINER;
        builder = builder.with_credentials(Arc::new(container));
    } else if address.anonymous == Anonymous::No || is_ec2(environment) {
        shown = EC2;
        // The AWS tools' variable.
        if let Some(url) = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") {
            let url = server_at(address, "AWS_EC2_METADATA_SERVICE_ENDPOINT", &url)?;
            builder = builder.with_metadata_endpoint(url);
        }
    } else {
        builder = builder.with_skip_signature(true);
    }
    Ok((builder, shown, provider))
}

/// Whether this is a machine of Amazon's with a metadata service (EC2's guide, "Detect whether a host is an EC2 instance").
fn is_ec2(environment: &Environment) -> bool {
    let disabled = environment.get("AWS_EC2_METADATA_DISABLED");
    !disabled.is_some_and(|value| value.eq_ignore_ascii_case("true"))
        && (environment.machine_says("sys_vendor", "Amazon EC2")
            || environment.machine_says("product_uuid", "ec2"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Endpoint;

    #[test]
    fn a_region_in_china_has_servers_of_its_own() {
        for (url, server) in [
            (
                "s3://b?region=cn-north-1",
                "https://b.s3.cn-north-1.amazonaws.com.cn",
            ),
            (
                "s3://b.c?region=cn-north-1",
                "https://s3.cn-north-1.amazonaws.com.cn/b.c",
            ),
            (
                "s3://b?region=us-gov-west-1",
                "https://b.s3.us-gov-west-1.amazonaws.com",
            ),
            ("s3://b?region=cn-north-1&endpoint=http://h", "http://h/b"),
        ] {
            let options = RemoteOptions::new(Endpoint::parse_cache("--remote-cache", url).unwrap());
            let address = options.connect.endpoint.bucket().unwrap();
            let environment = Environment::fake(&[], std::path::Path::new("/none"));
            let connector = Connector::new(&options).unwrap();
            let opened = open(&options, address, &environment, connector).unwrap();
            let shown = format!("{:?}", opened.store);
            assert!(
                shown.contains(&format!("bucket_endpoint: \"{server}\"")),
                "{shown}"
            );
        }
    }
}
