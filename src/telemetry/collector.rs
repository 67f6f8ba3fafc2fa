//! Which collector is exported to, and as what: by a flag, and by the variables that OpenTelemetry's SDKs read.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use percent_encoding::percent_decode_str;

use crate::{
    transport::{ConnectOptions, Endpoint, Header, RemoteError, is_http, split_user_info, without_user_info},
    units::random_uuid,
};

/// The resource's attribute that `OTEL_SERVICE_NAME` sets.
const SERVICE_NAME: &str = "service.name";

/// The attribute that tells one process from another.
const INSTANCE: &str = "service.instance.id";

/// The variable that names the file of the certificate authorities.
pub(super) const CERTIFICATE: &str = "OTEL_EXPORTER_OTLP_CERTIFICATE";

/// The variable that has headers for every request.
pub(super) const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";

/// A collector, and what it is told of us.
#[derive(Debug, Clone)]
pub(crate) struct Collector {
    pub(super) connect: ConnectOptions,
    /// How long a request may take.
    #[cfg_attr(not(feature = "otlp"), allow(dead_code, reason = "only the client asks"))]
    pub(super) timeout: Duration,
    /// How often the metrics are sent.
    pub(super) every: Duration,
    /// Attributes of everything that is sent.
    #[cfg_attr(not(feature = "otlp"), allow(dead_code, reason = "only the client asks"))]
    pub(super) resource: Vec<(String, String)>,
}

impl Collector {
    /// The collector at a URL, the value of the flag `flag`: `http://HOST:PORT`, `https://HOST:PORT` or `unix:PATH`. The
    /// environment's variables say the rest.
    ///
    /// # Errors
    /// Naming the flag or the variable, and nothing that may be secret.
    pub(crate) fn new(
        flag: &str,
        url: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, RemoteError> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let (address, user_info) = split_user_info(url);
        let mut connect = ConnectOptions::new(endpoint(flag, url, &address)?);
        for (name, value) in pairs(HEADERS, variable(HEADERS))? {
            let header = Header::new(&name, &value);
            connect
                .headers
                .push(header.map_err(|reason| RemoteError::config(HEADERS, reason))?);
        }
        if let Some((user, password)) = user_info {
            connect.headers.push(Header::basic(&user, &password));
        }
        connect.tls.certificate = variable(CERTIFICATE).map(PathBuf::from);
        let attributes = "OTEL_RESOURCE_ATTRIBUTES";
        // Each name has one value, the last one. Without an instance, what two processes count would be one series.
        let mut resource = BTreeMap::from([
            (SERVICE_NAME.to_owned(), "outhaul".to_owned()),
            ("service.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            (INSTANCE.to_owned(), random_uuid()),
        ]);
        resource.extend(pairs(attributes, variable(attributes))?);
        resource.extend(variable("OTEL_SERVICE_NAME").map(|name| (SERVICE_NAME.to_owned(), name)));
        let time = |name, default| milliseconds(name, variable(name), default);
        Ok(Self {
            connect,
            timeout: time("OTEL_EXPORTER_OTLP_TIMEOUT", 10_000)?,
            every: time("OTEL_METRIC_EXPORT_INTERVAL", 60_000)?,
            resource: resource.into_iter().collect(),
        })
    }
}

fn endpoint(flag: &str, url: &str, address: &str) -> Result<Endpoint, RemoteError> {
    let error = |reason| RemoteError::config(format!("{flag}={}", without_user_info(url)), reason);
    if address.starts_with("unix:") {
        return Endpoint::parse(flag, address);
    }
    if !is_http(address) {
        return Err(error(
            "unknown scheme; use http://HOST:PORT, https://HOST:PORT or unix:PATH",
        ));
    }
    let place = address.split_once("://").map_or("", |(_, place)| place);
    if place.trim_end_matches('/').contains(['/', '?', '#']) {
        return Err(error(
            "only a host and a port may follow the scheme: outhaul exports by OTLP over gRPC, whose usual port is \
             4317, and not over HTTP",
        ));
    }
    Endpoint::parse_cache(flag, address)
}

/// A list of `NAME=VALUE`, with commas between them, as W3C's baggage has it.
fn pairs(variable: &str, text: Option<String>) -> Result<Vec<(String, String)>, RemoteError> {
    let decoded = |text: &str| percent_decode_str(text.trim()).decode_utf8_lossy().into_owned();
    let text = text.unwrap_or_default();
    let parts = text.split(',').filter(|part| !part.trim().is_empty());
    let pairs = parts.map(|part| match part.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok((decoded(name), decoded(value))),
        _ => Err(RemoteError::config(
            variable,
            "not a list of NAME=VALUE, separated by commas",
        )),
    });
    pairs.collect()
}

fn milliseconds(variable: &str, text: Option<String>, default: u64) -> Result<Duration, RemoteError> {
    let given = text.map(|text| text.trim().parse::<u64>()).transpose();
    match given {
        Ok(Some(0)) | Err(_) => Err(RemoteError::config(
            variable,
            "not a number of milliseconds greater than zero",
        )),
        Ok(given) => Ok(Duration::from_millis(given.unwrap_or(default))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collector(url: &str, variables: &[(&str, &str)]) -> Result<Collector, RemoteError> {
        Collector::new("--otlp-endpoint", url, |name| {
            let given = variables.iter().find(|(known, _)| *known == name);
            given.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_usual_variables_keep_their_meaning() {
        let plain = collector("http://localhost:4317/", &[("OTEL_SERVICE_NAME", "")]).unwrap();
        assert_eq!(plain.connect.endpoint.http_uri(), "http://localhost:4317");
        assert_eq!((plain.timeout.as_secs(), plain.every.as_secs()), (10, 60));
        assert_eq!(attribute(&plain, SERVICE_NAME), ["outhaul"]);
        assert!(plain.connect.headers.is_empty());

        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "host.name=a%20b, service.name=other,");
        let told = collector(
            "https://me:p%40ss@h",
            &[
                ("OTEL_EXPORTER_OTLP_HEADERS", "X-Key=a%3Db, x-team = t"),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "1500"),
                ("OTEL_METRIC_EXPORT_INTERVAL", " 20 "),
                ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
                attributes,
            ],
        )
        .unwrap();
        assert_eq!(told.connect.endpoint.http_uri(), "https://h:443");
        let headers = told.connect.headers.iter().map(|h| (h.name(), h.value()));
        // me:p@ss
        let basic = ("authorization", "Basic bWU6cEBzcw==");
        assert_eq!(
            headers.collect::<Vec<_>>(),
            [("x-key", "a=b"), ("x-team", "t"), basic]
        );
        assert_eq!((told.timeout.as_millis(), told.every.as_millis()), (1500, 20));
        assert_eq!(told.connect.tls.certificate, Some("/ca.pem".into()));
        assert_eq!(attribute(&told, "host.name"), ["a b"]);
        assert_eq!(attribute(&told, SERVICE_NAME), ["other"]);
        assert_eq!(attribute(&told, "service.version"), [env!("CARGO_PKG_VERSION")]);
        let named = collector("unix:/s", &[attributes, ("OTEL_SERVICE_NAME", "mine")]).unwrap();
        assert_eq!(attribute(&named, SERVICE_NAME), ["mine"]);
    }

    fn attribute<'a>(collector: &'a Collector, name: &str) -> Vec<&'a str> {
        let named = collector.resource.iter().filter(|(key, _)| key == name);
        named.map(|(_, value)| value.as_str()).collect()
    }

    #[test]
    fn each_process_is_an_instance_of_its_own_unless_it_is_named() {
        let instances = [(); 2].map(|()| {
            let collector = collector("http://h", &[]).unwrap();
            let [instance] = attribute(&collector, INSTANCE)[..] else {
                panic!("{:?}", collector.resource)
            };
            assert_eq!(instance.len(), 36);
            instance.to_owned()
        });
        assert_ne!(instances[0], instances[1]);
        let given = "service.instance.id=a,service.version=1,service.version=2";
        let named = collector("http://h", &[("OTEL_RESOURCE_ATTRIBUTES", given)]).unwrap();
        assert_eq!(attribute(&named, INSTANCE), ["a"]);
        assert_eq!(attribute(&named, "service.version"), ["2"]);
    }

    #[test]
    fn what_is_wrong_is_named_without_secrets() {
        for (url, variables, named) in [
            (
                "me:hush@h:4317",
                &[][..],
                "--otlp-endpoint=***@h:4317: unknown scheme",
            ),
            (
                "grpc://h:4317",
                &[],
                "--otlp-endpoint=grpc://h:4317: unknown scheme",
            ),
            (
                "http://h:4318/v1/traces",
                &[],
                "--otlp-endpoint=http://h:4318/v1/traces: only a host",
            ),
            ("http://me:hush@h:port", &[], "--otlp-endpoint="),
            ("http://", &[], "--otlp-endpoint="),
            (
                "http://h",
                &[("OTEL_EXPORTER_OTLP_HEADERS", "hush")],
                "OTEL_EXPORTER_OTLP_HEADERS: not a list",
            ),
            (
                "http://h",
                &[("OTEL_EXPORTER_OTLP_HEADERS", "te=hush")],
                "OTEL_EXPORTER_OTLP_HEADERS: this header",
            ),
            (
                "http://h",
                &[("OTEL_EXPORTER_OTLP_TIMEOUT", "0")],
                "OTEL_EXPORTER_OTLP_TIMEOUT",
            ),
            (
                "http://h",
                &[("OTEL_METRIC_EXPORT_INTERVAL", "1s")],
                "OTEL_METRIC_EXPORT_INTERVAL",
            ),
            (
                "http://h",
                &[("OTEL_RESOURCE_ATTRIBUTES", "=x")],
                "OTEL_RESOURCE_ATTRIBUTES",
            ),
        ] {
            let error = collector(url, variables).unwrap_err().to_string();
            assert!(error.starts_with(named) && !error.contains("hush"), "{error}");
        }
    }
}
