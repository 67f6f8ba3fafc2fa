//! Who may see the pages, and who may change something by them.
//!
//! What is on them is of the same kind as what the control API tells, so the rules of a listener with names count, not those
//! of metrics: over the loopback interface without a token, only processes of our own user and of root. A browser cannot send
//! a token of its own accord, so it may be shown as the password of HTTP's basic authentication, which a browser asks for and
//! then sends along by itself. That, and a process being ours, is why requests are looked at as well: any page of the web can
//! have the browser send us one.

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderValue, Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::{
    access::{Caller, ListenerRules, Origin, Refused, Rules},
    control::is_for_us,
};

/// What our own script sends along. A page from elsewhere can only do so if we said that it may, which we never do.
pub(super) const OWN_HEADER: &str = "x-outhaul-page";

/// Nothing from elsewhere, nothing that is written in the page itself, and in nobody's frame.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// Answers a request if it may be, and has the browser treat the answer with care.
pub(super) async fn gate(access: ListenerRules, mut request: Request, next: Next) -> Response {
    let rules = access.rules();
    let origin = request.extensions().get::<Origin>().cloned();
    let caller = origin.as_ref().map_or(Caller::Unknown, Origin::caller);
    let mut response = match judge(&rules, caller, &mut request) {
        Ok(()) => {
            let call = origin.as_ref().map(Origin::admitted);
            let response = next.run(request).await;
            response.map(|body| held(body, call))
        }
        Err(refused) => refused.into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(
        "cross-origin-resource-policy",
        HeaderValue::from_static("same-origin"),
    );
    headers.insert(
        "cross-origin-opener-policy",
        HeaderValue::from_static("same-origin"),
    );
    response
}

/// A call is under way until all of its answer is.
fn held<T: Send + 'static>(body: axum::body::Body, call: T) -> axum::body::Body {
    use http_body_util::BodyExt as _;
    let mut call = Some(call);
    axum::body::Body::new(body.map_frame(move |frame| {
        let _ = &mut call;
        frame
    }))
}

/// Why a request is not answered.
enum Denied {
    /// By the rules of the listener.
    Access(Refused),
    /// By what it says of itself.
    Request(StatusCode, &'static str),
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        match self {
            Self::Access(Refused::Token) => {
                let challenge = [
                    (
                        header::WWW_AUTHENTICATE,
                        "Basic realm=\"outhaul\", charset=\"UTF-8\"",
                    ),
                    (header::WWW_AUTHENTICATE, "Bearer"),
                ];
                let text = "missing or wrong token: enter the token of --admin-token-file as the password, with any user \
                            name, or send it as authorization: Bearer TOKEN\n";
                (
                    StatusCode::UNAUTHORIZED,
                    axum::response::AppendHeaders(challenge),
                    text,
                )
                    .into_response()
            }
            Self::Access(refused) => {
                let who = match refused {
                    Refused::OtherUser { uid, ours, .. } => {
                        format!("user {ours} and root; the caller is user {uid}")
                    }
                    _ => "outhaul's own user and root, and the caller's user could not be determined"
                        .to_owned(),
                };
                let text = format!(
                    "the status page is only for processes of {who}; with --admin-token-file, other users can show the \
                     token\n"
                );
                (StatusCode::FORBIDDEN, text).into_response()
            }
            Self::Request(code, text) => (code, format!("{text}\n")).into_response(),
        }
    }
}

fn judge(rules: &Rules, caller: Caller, request: &mut Request) -> Result<(), Denied> {
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD);
    // With one of these, a page that was led here by a name of its own cannot come in: see `is_for_us`.
    let is_guarded = rules.token.is_some() || rules.tls.is_some();
    if !is_guarded && (changes || !rules.other_users) && !is_for_us(request) {
        return Err(Denied::Request(
            StatusCode::MISDIRECTED_REQUEST,
            "the status page is only shown for this machine's address or localhost; with --admin-token-file or TLS also for \
             other host names",
        ));
    }
    // First of all: no page of another origin shall have the browser ask for a password.
    if is_from_elsewhere(request) {
        return Err(Denied::Request(
            StatusCode::FORBIDDEN,
            "the status page does not answer requests of other web pages",
        ));
    }
    basic_to_bearer(request.headers_mut());
    let path = request.uri().path().to_owned();
    rules
        .judge(caller, &path, request.headers_mut())
        .map_err(Denied::Access)?;
    if !changes {
        return Ok(());
    }
    if !rules.is_known(caller) {
        return Err(Denied::Request(
            StatusCode::FORBIDDEN,
            "nothing can be changed here, since it is unknown who asks: set --admin-token-file, or use a command",
        ));
    }
    let headers = request.headers();
    let is_json = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes() == b"application/json");
    if !headers.contains_key(OWN_HEADER) || !is_json {
        return Err(Denied::Request(
            StatusCode::FORBIDDEN,
            "send requests that change something as content-type: application/json, and with the header x-outhaul-page: 1",
        ));
    }
    Ok(())
}

/// Whether a web page of another origin has the browser send this. Following a link to us is no harm.
fn is_from_elsewhere(request: &Request) -> bool {
    let headers = request.headers();
    let says = |name: &str, values: &[&str]| {
        headers
            .get(name)
            .is_some_and(|said| values.iter().any(|value| said.as_bytes() == value.as_bytes()))
    };
    let follows_link = request.method() == Method::GET && says("sec-fetch-mode", &["navigate"]);
    if says("sec-fetch-site", &["cross-site", "same-site"]) && !follows_link {
        return true;
    }
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes);
    let mut origins = headers.get_all(header::ORIGIN).into_iter();
    !origins.all(|origin| {
        let origin = origin.to_str().unwrap_or_default();
        let authority = origin.split_once("://").map_or("", |(_, authority)| authority);
        !authority.is_empty() && Some(authority.as_bytes()) == host && authority.parse::<Authority>().is_ok()
    })
}

/// Takes a password for a token.
fn basic_to_bearer(headers: &mut HeaderMap) {
    let password = |value: &HeaderValue| {
        let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let decoded = STANDARD.decode(encoded.trim()).ok()?;
        let (_, password) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        let mut bearer = HeaderValue::from_str(&format!("Bearer {password}")).ok()?;
        bearer.set_sensitive(true);
        Some(bearer)
    };
    if let Some(bearer) = headers.get(header::AUTHORIZATION).and_then(password) {
        headers.insert(header::AUTHORIZATION, bearer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Token;

    const SECRET: &str = "0123456789abcdef";

    fn ours() -> Caller {
        Caller::Process {
            uid: rustix::process::geteuid().as_raw(),
            unix: false,
        }
    }

    fn others() -> Caller {
        Caller::Process {
            uid: rustix::process::geteuid().as_raw() + 7,
            unix: false,
        }
    }

    fn with_token() -> Rules {
        Rules {
            token: Some(Token::new(SECRET).unwrap()),
            ..Rules::default()
        }
    }

    /// The status with which a request is refused; 200 if it is not.
    fn code(rules: &Rules, caller: Caller, method: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri("/get");
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "127.0.0.1:8986");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(axum::body::Body::empty()).unwrap();
        match judge(rules, caller, &mut request) {
            Ok(()) => 200,
            Err(denied) => denied.into_response().status().as_u16(),
        }
    }

    #[test]
    fn names_are_shown_to_our_own_user_and_those_with_the_token() {
        let open = Rules {
            other_users: true,
            ..Rules::default()
        };
        let basic = format!("Basic {}", STANDARD.encode(format!("anyone:{SECRET}")));
        let wrong = format!("Basic {}", STANDARD.encode("anyone:not-this-one-at-all"));
        let bearer = format!("Bearer {SECRET}");
        for (rules, caller, shown, expected) in [
            (Rules::default(), ours(), "", 200),
            (Rules::default(), others(), "", 403),
            (Rules::default(), Caller::Unknown, "", 403),
            (open.clone(), others(), "", 200),
            (with_token(), ours(), "", 401),
            (with_token(), ours(), &*wrong, 401),
            (with_token(), others(), &*basic, 200),
            (with_token(), Caller::Remote, &*bearer, 200),
        ] {
            let headers = [("authorization", shown)];
            let headers = if shown.is_empty() { &[][..] } else { &headers[..] };
            assert_eq!(
                code(&rules, caller, "GET", headers),
                expected,
                "{caller:?} {shown}"
            );
        }
    }

    #[test]
    fn only_our_own_script_and_programs_that_say_so_change_something() {
        let right = [("content-type", "application/json"), ("x-outhaul-page", "1")];
        let post =
            |more: &[(&str, &str)]| code(&Rules::default(), ours(), "POST", &[&right[..], more].concat());
        assert_eq!(post(&[]), 200);
        assert_eq!(
            post(&[
                ("origin", "http://127.0.0.1:8986"),
                ("sec-fetch-site", "same-origin")
            ]),
            200
        );
        for more in [
            &[("origin", "http://evil.example")][..],
            &[("origin", "null")],
            &[("origin", "http://127.0.0.1:8987")],
            &[
                ("origin", "http://127.0.0.1:8986"),
                ("origin", "http://evil.example"),
            ],
            &[("origin", "http://evil.example@127.0.0.1:8986")],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site"), ("sec-fetch-mode", "navigate")],
        ] {
            assert_eq!(post(more), 403, "{more:?}");
        }
        let rebound = [
            ("host", "evil.example:8986"),
            ("origin", "http://evil.example:8986"),
        ];
        assert_eq!(post(&rebound), 421);
        // What a form of any page can send.
        for simple in [
            &[][..],
            &[("content-type", "application/json")],
            &[("x-outhaul-page", "1"), ("content-type", "text/plain")],
        ] {
            assert_eq!(code(&Rules::default(), ours(), "POST", simple), 403, "{simple:?}");
        }
        // Where everybody may see everything, still not everybody may change it.
        let open = Rules {
            other_users: true,
            ..Rules::default()
        };
        assert_eq!(code(&open, ours(), "POST", &right), 200);
        for caller in [others(), Caller::Unknown, Caller::Remote] {
            assert_eq!(code(&open, caller, "POST", &right), 403, "{caller:?}");
        }
        assert_eq!(code(&open, ours(), "POST", &[&right[..], &rebound].concat()), 421);
    }

    #[test]
    fn other_pages_read_nothing_and_links_to_us_work() {
        let get = |headers: &[(&str, &str)]| code(&Rules::default(), ours(), "GET", headers);
        assert_eq!(get(&[("host", "evil.example:8986")]), 421);
        assert_eq!(get(&[("host", "localhost:8986")]), 200);
        assert_eq!(
            get(&[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")]),
            403
        );
        assert_eq!(
            get(&[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "cors")]),
            403
        );
        assert_eq!(
            get(&[("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")]),
            200
        );
        assert_eq!(get(&[("origin", "http://evil.example")]), 403);
        let foreign = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")];
        assert_eq!(
            code(&with_token(), ours(), "GET", &foreign),
            403,
            "no password is asked for"
        );
        let bearer = format!("Bearer {SECRET}");
        let named = [("host", "buildbox:8986"), ("authorization", &*bearer)];
        assert_eq!(code(&with_token(), Caller::Remote, "GET", &named), 200);
    }
}
