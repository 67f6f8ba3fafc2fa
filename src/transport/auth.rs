//! The headers that requests are sent with: the user's own, and those of a credential helper or of Google's credentials.
//!
//! A credential helper is a program that is run as `PATH get`, is given `{"uri": "https://…"}` on its standard input
//! and prints `{"headers": {"Name": ["value"]}, "expires": "RFC 3339 time"}` (the credential helper specification
//! that Bazel's `--credential_helper` follows). Values are secrets: they are in no error, log or `Debug`.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Mutex,
    time::Instant,
};

use super::{ConnectOptions, Google, Header, RemoteError, RemoteErrorKind, Secrets};
use crate::{open_files, units::show_duration};

/// The least time that a source's answer is kept, good or bad, so that a thousand requests don't ask it a thousand
/// times.
const KEPT_AT_LEAST: Duration = Duration::from_secs(5);

/// A source's headers that are taken for secrets: the newest, and those that may still be on their way.
const GIVEN: usize = 64;

/// The most that a helper may print.
const MAX_ANSWER: u64 = 1024 * 1024;

/// Makes the headers of requests.
pub(crate) struct Auth {
    headers: Vec<Header>,
    authority: Option<Header>,
    source: Option<Source>,
    /// The source's last answers.
    answers: parking_lot::Mutex<Answers>,
    /// What requests were sent with, lately.
    secrets: RwLock<Arc<Secrets>>,
}

/// Where further headers come from.
#[derive(Debug)]
enum Source {
    Helper(Helper),
    Google(Google),
}

impl Source {
    /// Headers for calls of a service, and for how long they are good.
    async fn ask(&self, service: &str) -> Result<(Vec<Header>, Duration), RemoteError> {
        match self {
            Self::Helper(helper) => helper.run(service).await,
            Self::Google(google) => google.headers().await,
        }
    }

    /// What is asked about for calls of a service.
    const fn subject(&self, service: &'static str) -> &'static str {
        match self {
            Self::Helper(_) => service,
            Self::Google(_) => "",
        }
    }
}

/// What a source has said, by services.
#[derive(Default)]
struct Answers {
    /// A lock is held while the source is asked: one run serves all who wait.
    of: BTreeMap<&'static str, Arc<Mutex<Option<Answer>>>>,
    /// Headers that are good, and those that were lately.
    given: Vec<Header>,
    /// Counts the runs, so that of many requests refused for the same credentials only one runs the helper again.
    runs: u64,
}

/// A source's answer, or why there is none.
struct Answer {
    result: Result<Vec<Header>, RemoteError>,
    until: Instant,
    run: u64,
}

/// The credentials that a request was sent with, to name them when they are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run(u64);

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("headers", &self.headers)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Auth {
    /// For these options' endpoint. A helper that is for it goes before Google's credentials, even if it has none, as for
    /// Bazel.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`] when a helper's scope or path cannot be.
    pub(crate) fn new(options: &ConnectOptions) -> Result<Self, RemoteError> {
        let google = || options.google.clone().map(Source::Google);
        Ok(Self {
            headers: options.headers.clone(),
            authority: options.authority.clone(),
            source: Helper::choose(options)?.map(Source::Helper).or_else(google),
            answers: parking_lot::Mutex::default(),
            secrets: RwLock::new(Arc::new(Secrets::of(
                options
                    .headers
                    .iter()
                    .chain(&options.authority)
                    .flat_map(Header::secrets),
            ))),
        })
    }

    /// Says so if what a server is shown could be read on the way to it: by HTTP, without TLS, on another machine. Once for
    /// each server that is opened.
    pub(crate) fn warn_if_unencrypted(&self, options: &ConnectOptions) {
        if self.is_unencrypted(options) {
            tracing::warn!(
                server = %options.endpoint,
                "credentials or headers are sent unencrypted: anyone on the way can read them; use https:// if the \
                 server has it"
            );
        }
    }

    fn is_unencrypted(&self, options: &ConnectOptions) -> bool {
        let has_any = !self.headers.is_empty() || self.source.is_some();
        has_any && options.is_unencrypted()
    }

    /// What is not to be shown of what a server says.
    pub(crate) fn secrets(&self) -> Arc<Secrets> {
        self.secrets.read().clone()
    }

    /// A source's answers are as secret, and those that were replaced may still be on their way.
    fn keep_secret(&self, headers: &[Header]) {
        let mut answers = self.answers.lock();
        answers.given.extend_from_slice(headers);
        let most = answers.given.len().saturating_sub(GIVEN);
        answers.given.drain(..most);
        let all = self.headers.iter().chain(&self.authority).chain(&answers.given);
        let secrets = Secrets::of(all.flat_map(Header::secrets));
        drop(answers);
        *self.secrets.write() = Arc::new(secrets);
    }

    /// The user's headers and the source's, and which credentials they hold. A helper is asked about each gRPC service by
    /// itself, as by Bazel (measured with 7.7.1); the empty name is that of a server without services.
    pub(crate) async fn headers(
        &self,
        service: &'static str,
    ) -> Result<(Vec<Header>, Option<Run>), RemoteError> {
        let Some(source) = &self.source else {
            return Ok((self.headers.clone(), None));
        };
        let subject = source.subject(service);
        let answer = Arc::clone(self.answers.lock().of.entry(subject).or_default());
        let mut answer = answer.lock().await;
        if answer.as_ref().is_none_or(|a| a.until <= Instant::now()) {
            let (result, kept) = match source.ask(subject).await {
                Ok((headers, kept)) => {
                    self.keep_secret(&headers);
                    (Ok(headers), kept)
                }
                Err(error) => {
                    tracing::warn!(%error, "no credentials");
                    (Err(error), KEPT_AT_LEAST)
                }
            };
            let mut answers = self.answers.lock();
            answers.runs += 1;
            *answer = Some(Answer {
                result,
                until: Instant::now() + kept.max(KEPT_AT_LEAST),
                run: answers.runs,
            });
        }
        let Some(Answer { result, run, .. }) = &*answer else {
            return Ok((self.headers.clone(), None));
        };
        // A header of both is the source's: it is the newer word.
        let own = result.as_ref().map_err(Clone::clone)?;
        let users = self
            .headers
            .iter()
            .filter(|h| own.iter().all(|o| o.name() != h.name()));
        Ok((users.chain(own).cloned().collect(), Some(Run(*run))))
    }

    /// After a request was refused as unauthenticated: whether another one may fare better, because there is a
    /// source to ask again.
    pub(crate) async fn refresh(&self, refused: Option<Run>) -> bool {
        let Some(refused) = refused else { return false };
        let all: Vec<_> = self.answers.lock().of.values().cloned().collect();
        for answer in all {
            if let Some(answer) = &mut *answer.lock().await
                && answer.run == refused.0
            {
                answer.until = Instant::now();
            }
        }
        true
    }
}

/// Whether a credential helper, as `[SCOPE=]PATH`, can be one.
///
/// # Errors
/// [`RemoteErrorKind::Config`] when its scope or path cannot be.
pub(crate) fn check_helper(options: &ConnectOptions, text: &str) -> Result<(), RemoteError> {
    let alone = ConnectOptions {
        credential_helpers: vec![text.to_owned()],
        ..options.clone()
    };
    Helper::choose(&alone).map(|_| ())
}

/// Whether one of the credential helpers is for the endpoint. Then no other credentials count.
pub(crate) fn has_helper(options: &ConnectOptions) -> bool {
    Helper::choose(options).is_ok_and(|helper| helper.is_some())
}

/// The credential helper for one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Helper {
    path: PathBuf,
    uri: String,
    directory: Option<PathBuf>,
    timeout: Duration,
    /// How long an answer is kept that does not say when it expires.
    kept_for: Duration,
}

/// What a helper prints. No `Debug`: it is all secrets.
#[derive(serde::Deserialize)]
struct Printed {
    #[serde(default)]
    headers: BTreeMap<String, Vec<String>>,
    expires: Option<String>,
}

impl Helper {
    /// The one whose scope fits the endpoint most closely: the host itself, then the longest `*.domain`, then one
    /// without a scope. Of equals the last, as with any flag. All are checked, whether they fit or not.
    fn choose(options: &ConnectOptions) -> Result<Option<Self>, RemoteError> {
        let mut best: Option<(usize, PathBuf)> = None;
        for text in &options.credential_helpers {
            let error = |reason: &str| RemoteError::config(format!("--credential-helper={text}"), reason);
            let (scope, path) = match text.split_once('=') {
                Some((scope, path)) => (Some(scope), path),
                None => (None, text.as_str()),
            };
            if path.is_empty() {
                return Err(error("does not name a program"));
            }
            let path = match path.strip_prefix("%workspace%") {
                Some(below) => {
                    let workspace = options
                        .workspace
                        .as_ref()
                        .ok_or_else(|| error("%workspace% is unknown; use an absolute path"))?;
                    workspace.join(below.trim_start_matches('/'))
                }
                None if path.starts_with('/') || !path.contains('/') => PathBuf::from(path),
                None => {
                    return Err(error(
                        "must be an absolute path, a path starting with %workspace%/, or a name to look up in \
                         PATH",
                    ));
                }
            };
            let Some(host) = options.endpoint.host() else {
                continue;
            };
            let fit = match scope {
                None => Some(0),
                Some(scope) => fit(scope, host).map_err(error)?,
            };
            if let Some(fit) = fit
                && best.as_ref().is_none_or(|(before, _)| fit >= *before)
            {
                best = Some((fit, path));
            }
        }
        Ok(best
            .zip(options.endpoint.credential_uri())
            .map(|((_, path), uri)| Self {
                path,
                uri,
                directory: options.workspace.clone(),
                timeout: options.credential_helper_timeout,
                kept_for: options.credential_helper_cache_duration,
            }))
    }

    /// Runs it for calls of a service: headers, and for how long they are good.
    async fn run(&self, service: &str) -> Result<(Vec<Header>, Duration), RemoteError> {
        let uri = format!("{}{service}", self.uri);
        let printed = tokio::time::timeout(self.timeout, self.output(&uri))
            .await
            .map_err(|_| {
                let timeout = show_duration(self.timeout);
                self.error(
                    &uri,
                    &format!("did not answer within {timeout} (--credential_helper_timeout)"),
                )
            })??;
        let (headers, expires_in) =
            read_answer(&printed, SystemTime::now()).map_err(|e| self.error(&uri, &e.to_string()))?;
        Ok((headers, expires_in.unwrap_or(self.kept_for)))
    }

    async fn output(&self, uri: &str) -> Result<Vec<u8>, RemoteError> {
        let mut command = open_files::command(self.path.as_os_str());
        command
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        let mut child = command
            .spawn()
            .map_err(|e| self.error(uri, &format!("failed to start: {e}")))?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(self.error(uri, "failed to start: no pipes"));
        };
        let question = serde_json::json!({ "uri": uri }).to_string();
        let ask = async move {
            // A helper that needs no question may have closed its input.
            let _ = stdin.write_all(question.as_bytes()).await;
        };
        let mut answer = Vec::new();
        let mut stdout = stdout.take(MAX_ANSWER);
        let ((), read) = tokio::join!(ask, stdout.read_to_end(&mut answer));
        read.map_err(|e| self.error(uri, &format!("failed to read its output: {e}")))?;
        let status = child
            .wait()
            .await
            .map_err(|e| self.error(uri, &format!("failed to wait for it: {e}")))?;
        if matches!(status.code(), Some(126 | 127)) {
            return Err(self.error(
                uri,
                &format!(
                    "failed to start (exit code {})",
                    status.code().unwrap_or_default()
                ),
            ));
        }
        if !status.success() {
            // Nothing of what it has printed: a script that shows what it does shows its secrets.
            return Err(self.error(uri, &format!(
                "failed with {status}; its output is hidden because it may contain secrets, so run it by hand: \
                 echo '{{\"uri\":\"{}\"}}' | {} get",
                uri,
                self.path.display()
            )));
        }
        Ok(answer)
    }

    fn error(&self, uri: &str, message: &str) -> RemoteError {
        RemoteError::new(
            RemoteErrorKind::Unauthenticated,
            format!("credential helper {} for {}", self.path.display(), uri),
            message,
        )
    }
}

/// What is wrong with a helper's answer. Nothing of the answer is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("did not print the expected JSON")]
    NotJson,
    #[error("printed a header with an invalid name or value")]
    Header,
    #[error("printed an expiry that is not an RFC 3339 time")]
    Expiry,
}

/// Headers, and for how long they are good if it says so, out of what a helper printed; or what is wrong with that.
pub(crate) fn read_answer(
    printed: &[u8],
    now: SystemTime,
) -> Result<(Vec<Header>, Option<Duration>), AnswerError> {
    // The decoder's words would quote the answer.
    let printed: Printed = serde_json::from_slice(printed).map_err(|_| AnswerError::NotJson)?;
    let mut headers = Vec::new();
    for (name, values) in printed.headers {
        for value in values {
            // Its name may be anything, too.
            let header = Header::new(&name, &value);
            headers.push(header.map_err(|_| AnswerError::Header)?);
        }
    }
    let expires_in = match printed.expires {
        None => None,
        Some(text) => {
            let expires_in = text
                .parse::<prost_types::Timestamp>()
                .ok()
                .and_then(|time| SystemTime::try_from(time).ok())
                .ok_or(AnswerError::Expiry)?
                .duration_since(now)
                .unwrap_or_default();
            // A helper's year 9999 must not overflow the clock.
            Some(expires_in.min(Duration::from_secs(24 * 60 * 60)))
        }
    };
    Ok((headers, expires_in))
}

/// How closely a scope fits a host: the more, the closer; `None` when it does not.
fn fit(scope: &str, host: &str) -> Result<Option<usize>, &'static str> {
    let scope = scope.to_ascii_lowercase();
    // Newer Bazels know scopes with a path (`example.com/team`); those before them match none.
    let (scope, path) = scope.split_once('/').unwrap_or((&scope, ""));
    let domain = scope.strip_prefix("*.").unwrap_or(scope);
    if domain.is_empty() || domain.contains(['*', ':']) {
        return Err("the scope must be a host name or *.DOMAIN");
    }
    if !path.is_empty() {
        return Ok(None);
    }
    if scope == host {
        return Ok(Some(usize::MAX));
    }
    let wild = scope.len() > domain.len();
    let below = host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'));
    // Bazel lets *.example.com match example.com too.
    Ok((wild && (below || host == domain)).then_some(domain.len()))
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
