//! Google: the tokens that the rest of the program uses, too.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use object_store::{
    ClientOptions, CredentialProvider, StaticCredentialProvider,
    gcp::{GcpCredential, GoogleCloudStorageBuilder},
};

use super::{Connector, Kept, NONE, OF_THE_MACHINE, Opened, built, no_retries, nothing, ready, wrong};
use crate::{
    remote::RemoteOptions,
    transport::{BucketAddress, Google, RemoteError, bucket::Anonymous},
};

/// Whether the bucket is at Google, or on this machine.
fn is_googles(options: &RemoteOptions, address: &BucketAddress) -> bool {
    let host = address.host().unwrap_or_default();
    address.endpoint.is_none()
        || options.connect.endpoint.is_local()
        || host == "googleapis.com"
        || host.ends_with(".googleapis.com")
}

pub(super) fn open(
    options: &RemoteOptions,
    address: &BucketAddress,
    connector: Connector,
) -> Result<Opened, RemoteError> {
    let google = match (&options.connect.google, address.anonymous) {
        (_, Anonymous::Yes) => None,
        (Some(google), _) => Some(google.clone()),
        // Nobody has said that another server may have the user's own token.
        (None, Anonymous::Auto) if !is_googles(options, address) => None,
        (None, anonymous) => {
            let default = Google {
                file: None,
                scopes: vec![crate::transport::google::DEFAULT_SCOPE.to_owned()],
            };
            if anonymous == Anonymous::No {
                default.check()?;
                Some(default)
            } else {
                // What is there and wrong is an error, not a reason to go without.
                let advice = |error| wrong(address, format_args!("{error}; anonymous=yes asks without any"));
                default.exists().map_err(advice)?.then_some(default)
            }
        }
    };
    // A token is a password: it is not sent in clear, but to this machine.
    let clear = !address.is_tls() && !options.connect.endpoint.is_local();
    if clear && google.is_some() {
        if options.connect.google.is_some() || address.anonymous == Anonymous::No {
            return Err(wrong(
                address,
                "tokens are not sent unencrypted: use https:// in endpoint=",
            ));
        }
        tracing::debug!("{address} is not encrypted: asking without credentials");
    }
    let google = google.filter(|_| !clear);
    let mut builder = GoogleCloudStorageBuilder::new()
        .with_bucket_name(&address.bucket)
        .with_retry(no_retries())
        .with_client_options(ClientOptions::new().with_allow_http(!address.is_tls()))
        .with_http_connector(connector)
        .with_skip_signature(google.is_none());
    if let Some(url) = &address.endpoint {
        builder = builder.with_base_url(url);
    }
    let (shown, ready, builder) = match google {
        Some(google) => {
            let shown = if google.is_of_the_machine() {
                OF_THE_MACHINE[2]
            } else {
                "Google's credentials"
            };
            let tokens = Arc::new(Tokens {
                google,
                kept: Kept::default(),
            });
            let ready = ready(&tokens);
            (shown, ready, builder.with_credentials(tokens))
        }
        None => {
            let bearer = String::new();
            let none = StaticCredentialProvider::new(GcpCredential { bearer });
            (NONE, nothing(), builder.with_credentials(Arc::new(none)))
        }
    };
    let store = Arc::new(built(address, builder.build())?);
    Ok(Opened {
        pages: store.clone(),
        store,
        shown,
        ready,
        profile: None,
    })
}

/// Google's tokens, as the rest of the program gets them.
struct Tokens {
    google: Google,
    kept: Kept<GcpCredential>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens")
    }
}

impl Tokens {
    async fn fetch(&self) -> object_store::Result<(GcpCredential, Instant)> {
        let headers = self.google.headers().await;
        let (headers, kept) = headers.map_err(|e| object_store::Error::Generic {
            store: "GCS",
            source: Box::new(e),
        })?;
        let bearer = headers.iter().find(|header| header.name() == "authorization");
        let bearer = bearer.and_then(|header| header.value().strip_prefix("Bearer "));
        let bearer = bearer.unwrap_or_default().to_owned();
        let until = Instant::now() + kept.max(Duration::from_secs(1));
        Ok((GcpCredential { bearer }, until))
    }
}

#[async_trait]
impl CredentialProvider for Tokens {
    type Credential = GcpCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<GcpCredential>> {
        self.kept.get(self.fetch()).await
    }
}
