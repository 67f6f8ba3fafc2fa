//! Azure: keys, signatures, applications and the identities of machines.

use std::sync::Arc;

use object_store::{
    ClientOptions,
    azure::{AzureConfigKey as Key, MicrosoftAzureBuilder},
};

use super::{Connector, Environment, NONE, OF_THE_MACHINE, Opened, built, if_any, no_retries, wrong};
use crate::{
    remote::RemoteOptions,
    transport::{BucketAddress, RemoteError, bucket::Anonymous},
};

/// The account of Azure's emulator, and its key, which are the same everywhere (Azurite's documentation).
const EMULATOR: (&str, &str) = (
    "devstoreaccount1",
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
);

/// What Azure's key is called.
const ACCOUNT_KEY: &str = "the account's key";
pub(super) fn open(
    options: &RemoteOptions,
    address: &BucketAddress,
    environment: &Environment,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let connection = environment
        .get("AZURE_STORAGE_CONNECTION_STRING")
        .unwrap_or_default();
    let connected = |name: &str| {
        let mut pairs = connection.split(';').filter_map(|pair| pair.split_once('='));
        pairs
            .find(|(key, _)| key.trim() == name)
            .map(|(_, value)| value.to_owned())
    };
    let account = address
        .account
        .clone()
        .or_else(|| environment.first(&["AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"]))
        .or_else(|| connected("AccountName"))
        .ok_or_else(|| {
            wrong(
                address,
                "no storage account: add account= or set AZURE_STORAGE_ACCOUNT",
            )
        })?;
    let endpoint = address.endpoint.clone().or_else(|| connected("BlobEndpoint"));
    let plain = endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
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
        .or_else(|| connected("AccountKey"))
        .or_else(|| (account == EMULATOR.0 && plain).then(|| EMULATOR.1.to_owned()));
    let sas = environment
        .first(&["AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"])
        .or_else(|| connected("SharedAccessSignature"));
    let (builder, shown) = identified(builder, sas, key, address, environment);
    // The account's key signs; all others are as good as a password, which is not sent in clear but to this machine.
    if plain && ![NONE, ACCOUNT_KEY].contains(&shown) && !options.connect.endpoint.is_local() {
        return Err(wrong(
            address,
            format_args!("{shown} is not sent unencrypted: use https:// in endpoint=, or add anonymous=yes"),
        ));
    }
    let store = built(address, builder.build())?;
    Ok(Opened {
        ready: if_any(shown, store.credentials()),
        store: Arc::new(store),
        shown,
        profile: None,
    })
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
        "the shared access signature in the environment"
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
