//! What the user sets, which is read with the same care.

use std::path::Path;

use crate::{
    bes::BesAddress,
    config::file_arguments,
    invocation::{pattern::TargetPattern, policy::Rule},
    transport::{Endpoint, Header},
    units::{parse_duration, parse_size, show_duration, show_size},
};

/// A configuration file, and the values that can be in one.
pub fn config_file(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let known = |_: &str, flag: &str| match flag {
        "hold" | "remote-cache" | "retention-size" => Some(true),
        "strict" | "durable" => Some(false),
        _ => None,
    };
    let subcommands = ["serve".to_owned(), "run".to_owned()];
    let anywhere = |flag: &str| flag == "idle-timeout";
    if let Ok(arguments) = file_arguments(Path::new("f.toml"), &text, "serve", &subcommands, known, anywhere)
    {
        for argument in arguments {
            let argument = argument.to_string_lossy().into_owned();
            let flag = argument
                .strip_prefix("--")
                .and_then(|rest| rest.split('=').next());
            assert!(
                flag.is_some_and(|flag| known("serve", flag).is_some()),
                "{argument:?}"
            );
        }
    }
    for value in text.lines().take(64) {
        if let Ok(duration) = parse_duration(value) {
            let _ = show_duration(duration);
        }
        if let Ok(size) = parse_size(value) {
            let _ = show_size(size);
        }
        if let Ok(endpoint) = Endpoint::parse_cache("--remote-cache", value) {
            let _ = (
                endpoint.http_uri(),
                endpoint.authority(),
                endpoint.credential_uri(),
            );
        }
        let _ = Header::parse("--remote-header", value);
        let _ = value.parse::<BesAddress>();
        if let Ok(pattern) = value.parse::<TargetPattern>() {
            let _ = pattern.covers(value);
        }
        let _ = value.parse::<Rule>();
    }
}
