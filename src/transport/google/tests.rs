//! The token endpoint is a server here. The key is for these tests alone.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, extract::State, http::HeaderMap};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{StatusCode, Uri};
use ring::signature::{KeyPair as _, RSA_PKCS1_2048_8192_SHA256, RsaKeyPair, UnparsedPublicKey};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde_json::{Value, json};

use super::token::*;
use crate::transport::{Auth, ConnectOptions, Endpoint, Header, RemoteErrorKind};

const KEY: &str = include_str!("../../../tests/google/key.pem");

/// A token endpoint: what it answers next, the last answer again and again; and what it was sent.
#[derive(Default)]
struct Server {
    answers: Mutex<Vec<(u16, String)>>,
    got: Mutex<Vec<String>>,
}

impl Server {
    async fn start(answers: &[(u16, &str)]) -> (Arc<Self>, String) {
        let server = Arc::new(Self::default());
        *server.answers.lock().unwrap() = answers
            .iter()
            .rev()
            .map(|(code, text)| (*code, (*text).to_owned()))
            .collect();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = async |State(server): State<Arc<Self>>, uri: Uri, headers: HeaderMap, body: String| {
            let named = ["metadata-flavor", "authorization"]
                .into_iter()
                .find_map(|name| headers.get(name));
            let header = named.map_or("", |h| h.to_str().unwrap());
            server.got.lock().unwrap().push(format!("{uri} {header} {body}"));
            let mut answers = server.answers.lock().unwrap();
            let (code, text) = answers.last().unwrap().clone();
            if answers.len() > 1 {
                answers.pop();
            }
            (StatusCode::from_u16(code).unwrap(), text)
        };
        let app = Router::new().fallback(answer).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        (server, format!("http://{address}/token"))
    }

    fn got(&self) -> Vec<String> {
        self.got.lock().unwrap().clone()
    }
}

fn account(endpoint: &str) -> Value {
    json!({
        "type": "service_account",
        "client_email": "me@project.example",
        "private_key_id": "key-1",
        "private_key": KEY,
        "token_uri": endpoint,
    })
}

/// A credentials file, and what asks for it.
fn written(content: &Value) -> (tempfile::TempDir, Google) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("credentials.json");
    std::fs::write(&file, content.to_string()).unwrap();
    let google = Google {
        file: Some(file),
        scopes: vec!["a".to_owned(), "b".to_owned()],
    };
    (dir, google)
}

fn field(form: &str, name: &str) -> String {
    let value = form
        .split(['&', ' '])
        .find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
    percent_encoding::percent_decode_str(value.expect(name))
        .decode_utf8()
        .unwrap()
        .into_owned()
}

fn shown(headers: &[Header]) -> Vec<(&str, &str)> {
    headers.iter().map(|h| (h.name(), h.value())).collect()
}

#[tokio::test]
async fn a_service_account_signs_for_its_token() {
    let answer = r#"{"access_token":"t1","expires_in":3600,"token_type":"Bearer"}"#;
    let (server, endpoint) = Server::start(&[(200, answer)]).await;
    let (_dir, google) = written(&account(&endpoint));
    google.check().unwrap();
    let (headers, kept) = google.headers().await.unwrap();
    assert_eq!(shown(&headers), [("authorization", "Bearer t1")]);
    assert_eq!(kept, Duration::from_secs(3540));

    let got = server.got().remove(0);
    assert_eq!(
        field(&got, "grant_type"),
        "urn:ietf:params:oauth:grant-type:jwt-bearer"
    );
    let assertion = field(&got, "assertion");
    let (claim, signature) = assertion.rsplit_once('.').unwrap();
    let decoded = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
    let key = PrivatePkcs8KeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
    let key = RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).unwrap();
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, key.public_key())
        .verify(claim.as_bytes(), &decoded(signature))
        .unwrap();
    let (head, claims) = claim.split_once('.').unwrap();
    let head: Value = serde_json::from_slice(&decoded(head)).unwrap();
    assert_eq!(head, json!({"alg": "RS256", "kid": "key-1", "typ": "JWT"}));
    let claims: Value = serde_json::from_slice(&decoded(claims)).unwrap();
    assert_eq!(claims["iss"], "me@project.example");
    assert_eq!(claims["aud"], endpoint);
    assert_eq!(claims["scope"], "a b");
    let time = |name: &str| claims[name].as_u64().unwrap();
    assert_eq!(time("exp") - time("iat"), 3600);
}

#[tokio::test]
async fn a_user_is_known_by_the_refresh_token() {
    let (server, endpoint) = Server::start(&[(200, r#"{"access_token":"t2"}"#)]).await;
    let (_dir, google) = written(&json!({
        "type": "authorized_user",
        "client_id": "id",
        "client_secret": "a&b=c",
        "refresh_token": "1//x",
        "token_uri": endpoint,
        "quota_project_id": "payer",
    }));
    let (headers, kept) = google.headers().await.unwrap();
    let expected = [("authorization", "Bearer t2"), ("x-goog-user-project", "payer")];
    assert_eq!(shown(&headers), expected);
    assert_eq!(kept, Duration::ZERO);
    let got = server.got().remove(0);
    for (name, value) in [
        ("grant_type", "refresh_token"),
        ("client_id", "id"),
        ("client_secret", "a&b=c"),
        ("refresh_token", "1//x"),
    ] {
        assert_eq!(field(&got, name), value);
    }
}

#[tokio::test]
async fn somebody_elses_token_is_exchanged_and_may_stand_for_a_service_account() {
    let (server, endpoint) = Server::start(&[
        (200, r#"{"value":"theirs/1"}"#),
        (200, r#"{"access_token":"exchanged","expires_in":3600}"#),
        (200, r#"{"accessToken":"t5","expireTime":"2999-01-01T00:00:00Z"}"#),
        (200, r#"{"access_token":"t6","expires_in":600}"#),
    ])
    .await;
    let mut content = json!({
        "type": "external_account",
        "audience": "//iam.example/pool",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": endpoint,
        "credential_source": {
            "url": format!("{endpoint}?theirs"),
            "headers": {"Authorization": "Bearer for-theirs"},
            "format": {"type": "json", "subject_token_field_name": "value"},
        },
        "service_account_impersonation_url": format!("{endpoint}/account"),
    });
    let (_dir, google) = written(&content);
    google.check().unwrap();
    let (headers, kept) = google.headers().await.unwrap();
    assert_eq!(shown(&headers), [("authorization", "Bearer t5")]);
    assert_eq!(kept, Duration::from_secs(24 * 60 * 60));
    let got = server.got();
    assert_eq!(got[0], "/token?theirs Bearer for-theirs ");
    for (name, value) in [
        ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
        ("audience", "//iam.example/pool"),
        ("scope", DEFAULT_SCOPE),
        ("subject_token", "theirs/1"),
        ("subject_token_type", "urn:ietf:params:oauth:token-type:jwt"),
    ] {
        assert_eq!(
            field(&format!("&{}", got[1].replace("/token  ", "")), name),
            value
        );
    }
    let (head, body) = got[2].split_once('{').unwrap();
    assert_eq!(head, "/token/account Bearer exchanged ");
    let body: Value = serde_json::from_str(&format!("{{{body}")).unwrap();
    assert_eq!(body, json!({"lifetime": "3600s", "scope": ["a", "b"]}));

    // From a file, and for itself.
    let theirs = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(theirs.path(), "theirs/2\n").unwrap();
    content["credential_source"] = json!({"file": theirs.path()});
    content["service_account_impersonation_url"] = Value::Null;
    let (_dir, google) = written(&content);
    let (headers, _) = google.headers().await.unwrap();
    assert_eq!(shown(&headers), [("authorization", "Bearer t6")]);
    let got = server.got().remove(3);
    assert_eq!(field(&got, "subject_token"), "theirs/2");
    assert_eq!(field(&got, "scope"), "a b");
}

#[tokio::test]
async fn gcloud_may_have_left_a_service_account_to_stand_for() {
    let (server, endpoint) = Server::start(&[
        (200, r#"{"access_token":"users","expires_in":3600}"#),
        (200, r#"{"accessToken":"t7","expireTime":"2999-01-01T00:00:00Z"}"#),
    ])
    .await;
    let content = json!({
        "type": "impersonated_service_account",
        "service_account_impersonation_url": format!("{endpoint}/account"),
        "delegates": ["between"],
        "source_credentials": {
            "type": "authorized_user", "client_id": "id", "client_secret": "s", "refresh_token": "r",
            "token_uri": endpoint,
        },
    });
    let (_dir, google) = written(&content);
    google.check().unwrap();
    let (headers, _) = google.headers().await.unwrap();
    assert_eq!(shown(&headers), [("authorization", "Bearer t7")]);
    let got = server.got();
    assert_eq!(field(&got[0], "refresh_token"), "r");
    let (head, body) = got[1].split_once('{').unwrap();
    assert_eq!(head, "/token/account Bearer users ");
    let body: Value = serde_json::from_str(&format!("{{{body}")).unwrap();
    let expected = json!({"lifetime": "3600s", "scope": ["a", "b"], "delegates": ["between"]});
    assert_eq!(body, expected);
}

#[tokio::test]
async fn default_credentials_are_found_in_googles_order() {
    let (server, endpoint) = Server::start(&[(200, r#"{"access_token":"t3","expires_in":100}"#)]).await;
    let host = endpoint
        .strip_prefix("http://")
        .unwrap()
        .strip_suffix("/token")
        .unwrap();
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, id: &str| {
        let file = home.path().join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let content = json!({
            "type": "authorized_user", "client_id": id, "client_secret": "s", "refresh_token": "r",
        });
        std::fs::write(&file, content.to_string()).unwrap();
        file.display().to_string()
    };
    let google = Google {
        file: None,
        scopes: vec!["a".to_owned(), "b/c".to_owned()],
    };
    let named = write("named.json", "named");
    write("sdk/application_default_credentials.json", "sdk");
    write(".config/gcloud/application_default_credentials.json", "home");
    let sdk = home.path().join("sdk").display().to_string();
    let directory = home.path().display().to_string();
    let all = [
        ("GOOGLE_APPLICATION_CREDENTIALS", &*named),
        ("CLOUDSDK_CONFIG", &*sdk),
        ("HOME", &*directory),
        ("GCE_METADATA_HOST", host),
    ];
    let from = |first: usize| {
        let all = &all[first..];
        google.question(&|name| Some(all.iter().find(|(n, _)| *n == name)?.1.into()))
    };
    for (first, id) in [(0, "named"), (1, "sdk"), (2, "home")] {
        let question = from(first).ok().unwrap();
        assert!(!question.is_of_the_machine());
        let form = question.call.body.unwrap();
        assert_eq!(field(&form, "client_id"), id);
    }
    let question = from(3).ok().unwrap();
    assert!(question.is_of_the_machine());
    assert_eq!(question.ask().await.ok().unwrap().access_token, "t3");
    let asked = "/computeMetadata/v1/instance/service-accounts/default/token?scopes=a%2Cb%2Fc Google ";
    assert_eq!(server.got(), [asked]);
    // A file that is named, and is no such file, is not passed over.
    let gone = |name: &str| (name == "GOOGLE_APPLICATION_CREDENTIALS").then(|| "/no/such".into());
    let reason = google.question(&gone).err().unwrap().to_string();
    assert!(
        reason.contains("GOOGLE_APPLICATION_CREDENTIALS=/no/such"),
        "{reason}"
    );
}

#[tokio::test]
async fn what_cannot_be_used_is_reported_without_what_is_in_it() {
    let change = |change: fn(&mut Value)| {
        let mut content = account("http://localhost:1/");
        change(&mut content);
        content
    };
    for (content, part) in [
        (json!("s3cret"), "does not contain Google credentials"),
        (json!({"type": ["s3cret"]}), "does not contain Google credentials"),
        (json!({"type": "s3cret"}), "not a service_account"),
        (
            json!({"type": "external_account", "audience": "s3cret"}),
            "no credential_source",
        ),
        (
            json!({"type": "external_account", "credential_source": {"executable": {"command": "s3cret"}}}),
            "neither a file nor a url",
        ),
        (
            json!({"type": "external_account", "credential_source":
                {"environment_id": "aws1", "url": "http://s3cret/"}}),
            "neither a file nor a url",
        ),
        (
            json!({"type": "external_account", "credential_source":
                {"executable": {"command": "s3cret"}, "url": "http://h/"}}),
            "neither a file nor a url",
        ),
        (
            json!({"type": "impersonated_service_account", "source_credentials": {"type": "s3cret"},
                "service_account_impersonation_url": "http://h/"}),
            "not a service_account",
        ),
        (
            json!({"type": "impersonated_service_account", "source_credentials": {"type": "s3cret"}}),
            "not a service_account",
        ),
        (
            json!({"type": "impersonated_service_account",
                "service_account_impersonation_url": "http://s3cret/"}),
            "no source_credentials",
        ),
        (
            json!({"type": "authorized_user", "client_id": "s3cret"}),
            "no client_secret",
        ),
        (
            change(|c| c["private_key"] = json!("s3cret")),
            "not an RSA key in PKCS #8",
        ),
        (change(|c| c["client_email"] = Value::Null), "no client_email"),
        (change(|c| c["token_uri"] = json!("ftp://s3cret@h/")), "not a URL"),
        (change(|c| c["token_uri"] = json!("s3cret\n")), "not a URL"),
    ] {
        let (_dir, google) = written(&content);
        let error = google.check().unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Config);
        let shown = error.to_string();
        let flag = google.flag();
        assert!(shown.contains(part) && shown.starts_with(&flag), "{shown}");
        assert!(!shown.contains("s3cret") && !shown.contains("PRIVATE"), "{shown}");
    }
}

#[tokio::test]
async fn refusals_are_reported_without_what_the_endpoint_says() {
    for (answers, tries, part) in [
        (
            &[(400, r#"{"error":"invalid_grant","error_description":"s3cret"}"#)][..],
            1,
            "400 Bad Request: invalid_grant",
        ),
        (&[(403, r#"{"error":"s3cret"}"#)], 1, "403 Forbidden"),
        (&[(401, "s3cret")], 1, "401 Unauthorized"),
        (&[(200, r#"{"access_token":{"s3cret":1}}"#)], 1, "no token"),
        (
            &[(200, r#"{"access_token":"s3cret\u0001"}"#)],
            1,
            "cannot be sent",
        ),
        (&[(503, "s3cret")], 3, "503 Service Unavailable"),
    ] {
        let (server, endpoint) = Server::start(answers).await;
        let (_dir, google) = written(&account(&endpoint.replace("//", "//me:s3cret@")));
        let error = google.headers().await.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Unauthenticated);
        let shown = error.to_string();
        assert!(
            shown.contains(part) && shown.contains("--google-credentials="),
            "{shown}"
        );
        assert!(!shown.contains("s3cret"), "{shown}");
        assert_eq!(server.got().len(), tries, "{part}");
    }
    // What passes is tried again.
    let answers = [(503, ""), (200, r#"{"access_token":"t4","expires_in":100}"#)];
    let (_server, endpoint) = Server::start(&answers).await;
    let (_dir, google) = written(&account(&endpoint));
    let (headers, _) = google.headers().await.unwrap();
    assert_eq!(shown(&headers), [("authorization", "Bearer t4")]);
}

#[tokio::test]
async fn a_token_is_kept_until_it_is_refused_and_a_helper_goes_before_it() {
    let answers = [
        (200, r#"{"access_token":"t1","expires_in":3600}"#),
        (200, r#"{"access_token":"t2","expires_in":3600}"#),
    ];
    let (server, endpoint) = Server::start(&answers).await;
    let (_dir, google) = written(&account(&endpoint));
    // Bazel 7 sends it where nothing is encrypted, too.
    for address in ["grpcs://h", "grpc://h:1", "unix:/socket"] {
        let mut options = ConnectOptions::new(Endpoint::parse("--remote-cache", address).unwrap());
        options.google = Some(google.clone());
        options
            .headers
            .push(Header::parse("--remote-header", "authorization=old").unwrap());
        let auth = Auth::new(&options).unwrap();
        let token = async || {
            let (headers, run) = auth.headers("").await.unwrap();
            let mut values = headers.iter().filter(|header| header.name() == "authorization");
            let value = values.next().unwrap().value().to_owned();
            assert!(values.next().is_none());
            (value, run)
        };
        let (first, run) = token().await;
        assert_eq!(token().await.0, first, "{address}");
        assert_eq!(auth.secrets().conceal(format!("no {first}!")), "no <concealed>!");
        if address == "grpcs://h" {
            assert_eq!(first, "Bearer t1");
            assert!(auth.refresh(run).await);
            assert_eq!(token().await.0, "Bearer t2");
        }
        assert!(!format!("{auth:?} {options:?}").contains("PRIVATE"));
    }
    assert_eq!(server.got().len(), 4);

    let helper = |scope: &str| {
        let mut options = ConnectOptions::new(Endpoint::parse("--remote-cache", "grpcs://h").unwrap());
        options.google = Some(google.clone());
        options.credential_helpers = vec![format!("{scope}=/no/such/helper")];
        Auth::new(&options).unwrap()
    };
    let error = helper("h").headers("").await.unwrap_err().to_string();
    assert!(error.contains("/no/such/helper"), "{error}");
    helper("elsewhere").headers("").await.unwrap();
    assert_eq!(server.got().len(), 5);
}
