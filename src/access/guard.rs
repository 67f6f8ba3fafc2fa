//! Judges each call at a listener.

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::{BoxFuture, Either, Ready, ready};
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt as _;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::{Caller, ListenerRules, Origin, Rules, token};

/// What everybody may ask who may connect: whether we serve is no secret to them, and the probes of load balancers and
/// clusters can show no token.
const OPEN: &[&str] = &["/healthz", "/readyz"];
/// All of its calls as well.
const HEALTH: &str = "/grpc.health.v1.Health/";

fn is_open(path: &str) -> bool {
    OPEN.contains(&path) || path.starts_with(HEALTH)
}

/// Why a call is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It shows no token, or another one.
    Token,
    /// It is another user's process.
    OtherUser {
        /// User ID of the caller.
        uid: u32,
        /// Whom it could come in for.
        ours: u32,
        /// Whether a token would let it in.
        token: bool,
    },
    /// It is unknown whose process it is.
    Nobody,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Token => f.write_str(
                "missing or wrong token: send the token from the token file as authorization: Bearer TOKEN or \
                 as x-outhaul-token: TOKEN",
            ),
            Self::OtherUser { uid, ours, token } => {
                write!(
                    f,
                    "this port only accepts processes of user {ours} and of root; the caller is user {uid}"
                )?;
                if *token {
                    f.write_str(" and has sent no token")?;
                }
                Ok(())
            }
            Self::Nobody => f.write_str(
                "this port only accepts processes of outhaul's own user, and the caller's user could not be \
                 determined",
            ),
        }
    }
}

impl Refused {
    fn status(&self) -> Status {
        let code = match self {
            Self::Token => Code::Unauthenticated,
            Self::OtherUser { .. } | Self::Nobody => Code::PermissionDenied,
        };
        Status::new(code, self.to_string())
    }
}

impl Rules {
    /// Whether a caller over TCP is listened to at all: not if no call of theirs could be answered.
    pub(super) fn receive(&self, caller: Caller) -> Result<(), Refused> {
        if self.token.is_some() {
            Ok(())
        } else {
            self.admit(caller)
        }
    }

    /// Whether a call is answered. Our own token is taken out of its headers, and what is meant to be one: they are
    /// nobody else's business, such as that of whom headers are passed on to.
    ///
    /// # Errors
    /// When it is not.
    pub(crate) fn judge(&self, caller: Caller, path: &str, headers: &mut HeaderMap) -> Result<(), Refused> {
        let shown = self.token.as_ref().is_some_and(|token| token.take(headers));
        headers.remove(token::OWN_HEADER);
        if shown || is_open(path) {
            return Ok(());
        }
        if self.token.is_some() && !matches!(caller, Caller::Process { unix: true, .. }) {
            return Err(Refused::Token);
        }
        self.admit(caller)
    }

    /// Whether a caller may come in without a token: where none is wanted, or on a unix socket, for whose peers the
    /// system vouches.
    fn admit(&self, caller: Caller) -> Result<(), Refused> {
        let ours = rustix::process::geteuid().as_raw();
        let certified = self.tls.as_ref().is_some_and(|tls| tls.wants_certificates);
        match caller {
            Caller::Remote => Ok(()),
            Caller::Process { uid, .. } if uid == ours || uid == 0 => Ok(()),
            Caller::Process { unix: false, .. } | Caller::Unknown if certified || self.other_users => Ok(()),
            Caller::Process { uid, .. } => Err(Refused::OtherUser {
                uid,
                ours,
                token: self.token.is_some(),
            }),
            Caller::Unknown => Err(Refused::Nobody),
        }
    }

    /// Whether it is known of a caller whom [`Self::judge`] has let in that they may change something: by a token, by a
    /// certificate, or because it is a process of our own user or of root.
    pub(crate) fn is_known(&self, caller: Caller) -> bool {
        let ours = rustix::process::geteuid().as_raw();
        let certified = self.tls.as_ref().is_some_and(|tls| tls.wants_certificates);
        let is_ours = matches!(caller, Caller::Process { uid, .. } if uid == ours || uid == 0);
        self.token.is_some() || certified || is_ours
    }
}

/// Puts [`Rules::judge`] before a gRPC service.
#[derive(Clone)]
pub(crate) struct Guard(pub ListenerRules);

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded {
            access: self.0.clone(),
            inner,
        }
    }
}

/// A service that a [`Guard`] protects.
#[derive(Clone)]
pub(crate) struct Guarded<S> {
    access: ListenerRules,
    inner: S,
}

impl<S, B> Service<Request<B>> for Guarded<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<
        Ready<Result<Response<Body>, S::Error>>,
        Either<BoxFuture<'static, Result<Response<Body>, S::Error>>, S::Future>,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // Connections that are not ours (of tests, say) know nothing of it, and are as good as remote ones.
        let origin = request.extensions().get::<Origin>().cloned();
        let (caller, rules) = match &origin {
            Some(origin) => (origin.caller, Arc::clone(&origin.rules)),
            None => (Caller::Remote, self.access.rules()),
        };
        let path = request.uri().path().to_owned();
        if let Err(refused) = rules.judge(caller, &path, request.headers_mut()) {
            self.access.warn(format_args!("refused a call: {refused}"));
            return Either::Left(ready(Ok(refused.status().into_http())));
        }
        let call = match &origin {
            Some(origin) if is_open(&path) => {
                origin.visit.heard();
                None
            }
            Some(origin) => Some(origin.visit.admitted()),
            None => None,
        };
        let answering = self.inner.call(request);
        Either::Right(match call {
            None => Either::Right(answering),
            Some(call) => Either::Left(Box::pin(async move {
                let answer = answering.await?;
                // It is under way until all of its answer is.
                let held = move |frame| {
                    let _ = &call;
                    frame
                };
                Ok(answer.map(|body| Body::new(body.map_frame(held))))
            })),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Token;
    use super::*;

    const SECRET: &str = "0123456789abcdef";

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in all {
            map.append(*name, value.parse().unwrap());
        }
        map
    }

    fn judge(rules: &Rules, caller: Caller, shown: &[(&'static str, &str)]) -> Result<(), Refused> {
        rules.judge(caller, "/a.Service/Call", &mut headers(shown))
    }

    #[test]
    fn a_listener_without_a_token_is_for_our_own_user_and_root() {
        let rules = Rules::default();
        let ours = rustix::process::geteuid().as_raw();
        for unix in [true, false] {
            judge(&rules, Caller::Process { uid: ours, unix }, &[]).unwrap();
            judge(&rules, Caller::Process { uid: 0, unix }, &[]).unwrap();
            let other = Caller::Process { uid: ours + 7, unix };
            let refused = judge(&rules, other, &[]).unwrap_err();
            assert_eq!(refused.status().code(), Code::PermissionDenied);
            assert!(
                refused.to_string().contains(&format!("user {}", ours + 7)),
                "{refused}"
            );
            let open = Rules {
                other_users: true,
                ..Rules::default()
            };
            // A socket is never open to others.
            assert_eq!(judge(&open, other, &[]).is_ok(), !unix);
        }
        judge(&rules, Caller::Remote, &[]).unwrap();
        assert_eq!(judge(&rules, Caller::Unknown, &[]), Err(Refused::Nobody));
    }

    #[test]
    fn a_caller_that_could_get_no_answer_is_not_received() {
        let ours = rustix::process::geteuid().as_raw();
        let tcp = |uid| Caller::Process { uid, unix: false };
        let strict = Rules::default();
        let token = Rules {
            token: Some(Token::new(SECRET).unwrap()),
            ..Rules::default()
        };
        let open = Rules {
            other_users: true,
            ..Rules::default()
        };
        for (caller, by_default) in [
            (tcp(ours), true),
            (tcp(0), true),
            (tcp(ours + 7), false),
            (Caller::Unknown, false),
            (Caller::Remote, true),
        ] {
            assert_eq!(strict.receive(caller).is_ok(), by_default, "{caller:?}");
            token.receive(caller).unwrap();
            open.receive(caller).unwrap();
        }
    }

    #[test]
    fn a_token_is_required_on_tcp_and_lets_other_users_in_everywhere() {
        let rules = Rules {
            token: Some(Token::new(SECRET).unwrap()),
            ..Rules::default()
        };
        let ours = rustix::process::geteuid().as_raw();
        let bearer = format!("Bearer {SECRET}");
        let right: [&[(&'static str, &str)]; 2] =
            [&[("authorization", &bearer)], &[("x-outhaul-token", SECRET)]];
        let callers = [
            Caller::Remote,
            Caller::Unknown,
            Caller::Process {
                uid: ours,
                unix: false,
            },
            Caller::Process {
                uid: ours + 7,
                unix: false,
            },
            Caller::Process {
                uid: ours + 7,
                unix: true,
            },
        ];
        for caller in callers {
            for shown in right {
                judge(&rules, caller, shown).unwrap();
            }
            judge(&rules, caller, &[]).unwrap_err();
            judge(&rules, caller, &[("authorization", "Bearer something-else-here")]).unwrap_err();
        }
        judge(
            &rules,
            Caller::Process {
                uid: ours,
                unix: true,
            },
            &[],
        )
        .unwrap();
    }

    #[test]
    fn probes_need_no_token() {
        let rules = Rules {
            token: Some(Token::new(SECRET).unwrap()),
            ..Rules::default()
        };
        for (path, open) in [
            ("/grpc.health.v1.Health/Check", true),
            ("/healthz", true),
            ("/readyz", true),
            ("/healthzzz", false),
            ("/readyz/x", false),
            ("/metrics", false),
            ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", false),
        ] {
            let judged = rules.judge(Caller::Remote, path, &mut HeaderMap::new());
            assert_eq!(judged.is_ok(), open, "{path}");
        }
    }

    #[test]
    fn our_token_goes_no_further_and_what_is_meant_for_others_does() {
        let rules = Rules {
            token: Some(Token::new(SECRET).unwrap()),
            ..Rules::default()
        };
        let bearer = format!("Bearer {SECRET}");
        let mut map = headers(&[
            ("authorization", "Bearer the-upstream-services-own"),
            ("authorization", &bearer),
            ("x-outhaul-token", SECRET),
            ("x-api-key", "key"),
        ]);
        rules.judge(Caller::Remote, "/a.Service/Call", &mut map).unwrap();
        let mut left: Vec<_> = map
            .iter()
            .map(|(n, v)| (n.as_str(), v.to_str().unwrap()))
            .collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [
                ("authorization", "Bearer the-upstream-services-own"),
                ("x-api-key", "key")
            ]
        );
        // On a socket, where it is not needed, as well.
        let ours = rustix::process::geteuid().as_raw();
        let mut map = headers(&[("authorization", &bearer)]);
        let caller = Caller::Process {
            uid: ours,
            unix: true,
        };
        rules.judge(caller, "/a.Service/Call", &mut map).unwrap();
        assert!(map.is_empty());
        // What is for us alone stays with us, whether or not it is asked for or right.
        for (rules, path) in [
            (&Rules::default(), "/a.Service/Call"),
            (&rules, "/a.Service/Call"),
            (&rules, "/grpc.health.v1.Health/Check"),
        ] {
            let mut map = headers(&[("x-outhaul-token", "of-another-listener-than-this")]);
            rules.judge(caller, path, &mut map).unwrap();
            assert!(map.is_empty(), "{path}");
        }
    }
}
