//! The role of a container whose credentials come from a URL: EKS pods, CloudShell, and the servers of tools that stand in
//! for ECS (AWS's guide to its SDKs, "Container credential provider").

use std::{fmt, path::PathBuf, sync::Arc, time::Instant};

use async_trait::async_trait;
use http::{Request, Uri, header::AUTHORIZATION};
use object_store::{
    ClientOptions, CredentialProvider,
    aws::AwsCredential,
    client::{HttpClient, HttpConnector as _},
};

use super::{Connector, Environment, Kept};
use crate::{remote::object::profile::Given, transport::is_this_machine};

/// Where AWS has these services: they are asked without encryption.
const SERVICES: [&str; 3] = ["169.254.170.2", "169.254.170.23", "fd00:ec2::23"];

const URL: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";

/// Why a service gives no credentials. Shows nothing that it says.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContainerError {
    #[error("{URL} is not a URL")]
    NotUrl,
    #[error("{URL} is not encrypted, and neither on this machine nor a service of AWS")]
    NotEncrypted,
    #[error("failed to read AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE={}: {error}", file.display())]
    TokenFile { file: PathBuf, error: std::io::Error },
    #[error("AWS_CONTAINER_AUTHORIZATION_TOKEN cannot be sent in a header")]
    Token,
    #[error("{URL} gives no JSON with AccessKeyId and SecretAccessKey")]
    NoJson,
    #[error("{URL} gives {0}")]
    Unusable(&'static str),
}

pub(super) struct Container {
    url: Uri,
    token: Option<String>,
    token_file: Option<PathBuf>,
    client: HttpClient,
    kept: Kept<AwsCredential>,
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Container")
    }
}

impl Container {
    /// If the environment names a URL.
    ///
    /// # Errors
    /// When it is one that a token may not be sent to.
    pub(super) fn new(
        environment: &Environment,
        connector: &Connector,
    ) -> Result<Option<Self>, Box<dyn std::error::Error + Send + Sync>> {
        let Some(url) = environment.get(URL) else {
            return Ok(None);
        };
        let url: Uri = url.parse().map_err(|_| ContainerError::NotUrl)?;
        let host = url.host().ok_or(ContainerError::NotUrl)?;
        let host = host.trim_matches(['[', ']']);
        if url.scheme_str() != Some("https") && !is_this_machine(host) && !SERVICES.contains(&host) {
            return Err(ContainerError::NotEncrypted.into());
        }
        Ok(Some(Self {
            url,
            token: environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN"),
            token_file: environment
                .get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
                .map(PathBuf::from),
            client: connector.connect(&ClientOptions::new().with_allow_http(true))?,
            kept: Kept::default(),
        }))
    }

    async fn fetch(&self) -> object_store::Result<(AwsCredential, Instant)> {
        let failed = |source| object_store::Error::Generic { store: "S3", source };
        let wrong = |error: ContainerError| failed(error.into());
        // The file before the variable, and read each time: its token is replaced before it expires.
        let token = match &self.token_file {
            Some(file) => {
                let read = tokio::fs::read_to_string(file).await;
                let unread = |error| ContainerError::TokenFile {
                    file: file.clone(),
                    error,
                };
                Some(read.map_err(|error| wrong(unread(error)))?)
            }
            None => self.token.clone(),
        };
        let mut request = Request::get(self.url.clone());
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token.trim());
        }
        let request = request.body(bytes::Bytes::new().into());
        let request = request.map_err(|_| wrong(ContainerError::Token))?;
        let answer = self.client.execute(request).await;
        let body = answer.map_err(|e| failed(e.into()))?.into_body().bytes().await;
        let body = body.map_err(|e| failed(e.into()))?;
        let given: Given = serde_json::from_slice(&body).map_err(|_| wrong(ContainerError::NoJson))?;
        given
            .credential()
            .map_err(|what| wrong(ContainerError::Unusable(what)))
    }
}

#[async_trait]
impl CredentialProvider for Container {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.kept.get(self.fetch()).await
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use axum::{Router, http::HeaderMap};

    use super::*;
    use crate::{remote::RemoteOptions, transport::Endpoint};

    /// What a service here gives, that answers `told AUTHORIZATION` as the key; or the error.
    async fn given(variables: &[(&str, &str)], answer: &'static str) -> Result<Arc<AwsCredential>, String> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/creds", listener.local_addr().unwrap());
        let app = Router::new().fallback(async move |headers: HeaderMap| {
            let token = headers
                .get(AUTHORIZATION)
                .map_or("", |token| token.to_str().unwrap());
            answer.replace("TOLD", token)
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        let variables: Vec<_> = [(URL, &*url)]
            .into_iter()
            .chain(variables.iter().copied())
            .collect();
        let endpoint = Endpoint::parse_cache("--remote-cache", "s3://b").unwrap();
        let connector = Connector::new(&RemoteOptions::new(endpoint)).unwrap();
        let environment = Environment::fake(&variables, Path::new("/none"));
        let container = Container::new(&environment, &connector).unwrap().unwrap();
        assert!(!format!("{container:?}").contains("s3cret"));
        container.get_credential().await.map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn the_token_goes_along_from_a_variable_or_a_file_if_there_is_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "filed\n").unwrap();
        let text = ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "text");
        let filed = (
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
            file.path().to_str().unwrap(),
        );
        let answer = r#"{"RoleArn":"r","AccessKeyId":"TOLD","SecretAccessKey":"s3cret","Token":"t","Expiration":"2999-01-01T00:00:00Z"}"#;
        for (variables, token) in [(&[][..], ""), (&[text], "text"), (&[text, filed], "filed")] {
            let given = given(variables, answer).await.unwrap();
            assert_eq!((&*given.key_id, given.token.as_deref()), (token, Some("t")));
        }
        for (variables, answer, part) in [
            (&[][..], "s3cret", "gives no JSON"),
            (
                &[],
                r#"{"AccessKeyId":"s3cret","SecretAccessKey":"s3cret","Expiration":"2001-01-01T00:00:00Z"}"#,
                "credentials that have expired",
            ),
            (
                &[("AWS_CONTAINER_AUTHORIZATION_TOKEN", "s3cret\u{1}")],
                answer,
                "cannot be sent in a header",
            ),
            (
                &[("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/no/such")],
                answer,
                "TOKEN_FILE=/no/such: No such file",
            ),
        ] {
            let error = given(variables, answer).await.unwrap_err();
            assert!(error.contains(part) && !error.contains("s3cret"), "{error}");
        }
    }
}
