//! Azure: keys, signatures, applications and the identities of machines.

use std::{collections::HashMap, sync::Arc};

use object_store::{
    ClientOptions,
    azure::{AzureConfigKey as Key, MicrosoftAzureBuilder},
};

use super::{
    Connector, Environment, NONE, OF_THE_MACHINE, Opened, built, if_any, no_retries, sendable, server_at,
    wrong,
};
use crate::transport::{
    BucketAddress, RemoteError,
    bucket::{Anonymous, is_name},
    is_this_machine,
};

/// The account of Azure's emulator, and its key, which are the same everywhere (Azurite's documentation).
const EMULATOR: (&str, &str) = (
    "devstoreaccount1",
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
);

/// What a shared access signature is called.
const SIGNATURE: &str = "the shared access signature in the environment";
/// What the endpoint in a connection string is called.
const ENDPOINT: &str = "the endpoint in AZURE_STORAGE_CONNECTION_STRING";
/// What Azure's key is called.
const ACCOUNT_KEY: &str = "the account's key";

/// The elements of `AZURE_STORAGE_CONNECTION_STRING`, by their names in small letters: Azure's own tools ignore the case. No
/// `Debug`: it is all secrets.
struct Connection(HashMap<String, String>);

impl Connection {
    fn new(environment: &Environment) -> Self {
        let text = environment
            .get("AZURE_STORAGE_CONNECTION_STRING")
            .unwrap_or_default();
        let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
        Self(
            pairs
                .map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().to_owned()))
                .collect(),
        )
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).filter(|value| !value.is_empty()).cloned()
    }

    fn is_emulator(&self) -> bool {
        let value = self.get("usedevelopmentstorage");
        value.is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }

    /// The account that it names.
    fn named(&self) -> Option<String> {
        let emulator = self.is_emulator().then(|| EMULATOR.0.to_owned());
        self.get("accountname").or(emulator)
    }

    /// One with a signature may name it in its endpoint only: as the first component of a path, or of the host's name.
    fn account(&self) -> Option<String> {
        if let Some(account) = self.named() {
            return Some(account);
        }
        let url = self.get("blobendpoint")?;
        let in_path = url
            .parse::<http::Uri>()
            .ok()?
            .path()
            .split('/')
            .nth(1)?
            .to_owned();
        if !in_path.is_empty() {
            return Some(in_path);
        }
        host(&url)?.split('.').next().map(str::to_owned)
    }

    /// Where the account is, if not in Azure's public cloud.
    fn endpoint(&self, account: &str) -> Option<String> {
        if let Some(url) = self.get("blobendpoint") {
            return Some(url.trim_end_matches('/').to_owned());
        }
        if self.is_emulator() {
            return Some(format!("http://127.0.0.1:10000/{account}"));
        }
        let suffix = self.get("endpointsuffix")?;
        let scheme = self.get("defaultendpointsprotocol");
        let scheme = scheme.map_or_else(|| "https".to_owned(), |scheme| scheme.to_ascii_lowercase());
        Some(format!("{scheme}://{account}.blob.{suffix}"))
    }
}

/// A URL's host, without brackets.
fn host(url: &str) -> Option<String> {
    let url = url.parse::<http::Uri>().ok()?;
    Some(url.host()?.trim_matches(['[', ']']).to_owned())
}

pub(super) fn open(
    address: &BucketAddress,
    environment: &Environment,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let connection = Connection::new(environment);
    let named = address
        .account
        .clone()
        .or_else(|| environment.first(&["AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"]));
    let account = named.or_else(|| connection.account()).ok_or_else(|| {
        wrong(
            address,
            "no storage account: add account= or set AZURE_STORAGE_ACCOUNT",
        )
    })?;
    let is_of_another = connection.named().is_some_and(|of| of != account);
    if address.anonymous != Anonymous::Yes && is_of_another {
        return Err(wrong(
            address,
            format_args!(
                "AZURE_STORAGE_CONNECTION_STRING is not of the account {account}: change one of them, or add anonymous=yes"
            ),
        ));
    }
    if !is_name(&account) {
        let reason = "the storage account's name contains a character that no account's name has";
        return Err(wrong(address, reason));
    }
    let endpoint = match (address.endpoint.clone(), connection.endpoint(&account)) {
        (None, Some(url)) if !is_of_another => Some(server_at(address, ENDPOINT, &url)?),
        (endpoint, _) => endpoint,
    };
    let plain = endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
    let local = endpoint
        .as_ref()
        .and_then(|url| host(url))
        .is_some_and(|host| is_this_machine(&host));
    let mut builder = MicrosoftAzureBuilder::new()
        .with_container_name(&address.bucket)
        .with_account(&account)
        .with_retry(no_retries())
        .with_client_options(ClientOptions::new().with_allow_http(plain))
        .with_http_connector(connector);
    if let Some(url) = endpoint {
        builder = builder.with_endpoint(url);
    }
    let names = [
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
    ];
    let key = environment
        .first(&names)
        .or_else(|| connection.get("accountkey"))
        .or_else(|| (account == EMULATOR.0 && plain).then(|| EMULATOR.1.to_owned()));
    let sas = environment
        .first(&["AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"])
        .or_else(|| connection.get("sharedaccesssignature"));
    let (mut builder, shown) = identified(builder, sas, key, address, environment);
    if ![NONE, ACCOUNT_KEY, SIGNATURE].contains(&shown) {
        builder = with_authority(builder, shown, address, environment)?;
    }
    // The account's key signs; all others are as good as a password, which is not sent in clear but to this machine.
    if plain && ![NONE, ACCOUNT_KEY].contains(&shown) && !local {
        return Err(wrong(
            address,
            format_args!("{shown} is not sent unencrypted: use https:// in endpoint=, or add anonymous=yes"),
        ));
    }
    let store = Arc::new(built(address, builder.build())?);
    Ok(Opened {
        ready: if_any(shown, store.credentials()),
        pages: store.clone(),
        store,
        shown,
        profile: None,
    })
}

/// Where an application is asked about, which may be a host alone, as for Azure's own tools.
fn with_authority(
    mut builder: MicrosoftAzureBuilder,
    shown: &str,
    address: &BucketAddress,
    environment: &Environment,
) -> Result<MicrosoftAzureBuilder, RemoteError> {
    if shown == OF_THE_MACHINE[1] {
        // The crate reads it by itself, with what is around it.
        let name = "IDENTITY_HEADER";
        sendable(address, name, (environment.get)(name).unwrap_or_default())?;
    }
    let name = "AZURE_AUTHORITY_HOST";
    if let Some(host) = environment.get(name) {
        let url = if host.contains("://") {
            host
        } else {
            format!("https://{host}")
        };
        builder = builder.with_config(Key::AuthorityHost, server_at(address, name, &url)?);
    }
    let name = "AZURE_TENANT_ID";
    let tenant = environment.get(name).unwrap_or_default();
    if tenant.contains(['/', '?', '#', '%']) {
        return Err(wrong(address, format_args!("{name} is not the id of a tenant")));
    }
    sendable(address, name, tenant)?;
    Ok(builder)
}

/// Gives the builder the credentials that there are, and says which.
fn identified(
    mut builder: MicrosoftAzureBuilder,
    sas: Option<String>,
    key: Option<String>,
    address: &BucketAddress,
    environment: &Environment,
) -> (MicrosoftAzureBuilder, &'static str) {
    let has = |names: &[&str]| environment.has(names);
    let application = ["AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_AUTHORITY_HOST"];
    let mut set = |names: &[&str]| {
        for (key, value) in environment.settings(names) {
            builder = std::mem::take(&mut builder).with_config(key, value);
        }
    };
    let shown = if address.anonymous == Anonymous::Yes {
        builder = builder.with_skip_signature(true);
        NONE
    } else if let Some(sas) = sas {
        // A signature is narrower than the account's key: anyone who sets both means it.
        builder = builder.with_config(Key::SasKey, sas);
        SIGNATURE
    } else if let Some(key) = key {
        builder = builder.with_access_key(key);
        ACCOUNT_KEY
    } else if has(&["AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_FEDERATED_TOKEN_FILE"]) {
        set(&application);
        set(&["AZURE_FEDERATED_TOKEN_FILE"]);
        "a workload identity"
    } else if has(&["AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"]) {
        set(&application);
        set(&["AZURE_CLIENT_SECRET"]);
        "an application's secret"
    } else if address.anonymous == Anonymous::No
        || environment.machine_says("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77")
    {
        set(&application);
        OF_THE_MACHINE[1]
    } else {
        builder = builder.with_skip_signature(true);
        NONE
    };
    (builder, shown)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_connection_string_says_the_account_and_where_it_is() {
        for (text, expected) in [
            ("AccountName=a;AccountKey=k=", (Some("a"), None)),
            (
                "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=k=;EndpointSuffix=core.chinacloudapi.cn",
                (Some("a"), Some("https://a.blob.core.chinacloudapi.cn")),
            ),
            (
                "accountname=a;endpointsuffix=core.windows.net;",
                (Some("a"), Some("https://a.blob.core.windows.net")),
            ),
            (
                "BlobEndpoint=https://a.blob.core.windows.net/;QueueEndpoint=https://q/;SharedAccessSignature=sv=1&sig=x%3D",
                (Some("a"), Some("https://a.blob.core.windows.net")),
            ),
            (
                "BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1/;SharedAccessSignature=sig=x",
                (
                    Some("devstoreaccount1"),
                    Some("http://127.0.0.1:10000/devstoreaccount1"),
                ),
            ),
            (
                "UseDevelopmentStorage=true",
                (
                    Some("devstoreaccount1"),
                    Some("http://127.0.0.1:10000/devstoreaccount1"),
                ),
            ),
            ("", (None, None)),
        ] {
            let environment =
                Environment::fake(&[("AZURE_STORAGE_CONNECTION_STRING", text)], Path::new("/none"));
            let connection = Connection::new(&environment);
            let account = connection.account();
            let endpoint = connection.endpoint(account.as_deref().unwrap_or_default());
            assert_eq!((account.as_deref(), endpoint.as_deref()), expected, "{text}");
        }
    }
}
