//! Paths, digests and the names of blobs.

use std::path::{Component, Path};

use super::first;
use crate::{
    bep::uri::{BytestreamUri, ResourceName},
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
};

/// An exec path: what is taken stays below its root, and nothing else is refused.
pub fn exec_path(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let shared = ExecPath::shared(&text.as_ref().into());
    let path = ExecPath::new(&text);
    assert_eq!(path, shared);
    let plain = |component: &str| {
        !matches!(component, "" | "." | "..") && component.len() <= 255 && !component.contains('\0')
    };
    assert_eq!(path.is_ok(), text.len() <= 4095 && text.split('/').all(plain));
    let Ok(path) = path else { return };
    assert_eq!(path.as_str(), text);
    let mut components = path.as_path().components();
    assert!(components.all(|component| matches!(component, Component::Normal(_))));
    assert_eq!(path.as_path().components().count(), path.components().count());
    assert!(Path::new("/root").join(path.as_path()).starts_with("/root"));
    let whole = path
        .parent()
        .map_or_else(String::new, |parent| format!("{parent}/"));
    assert_eq!(whole + path.file_name(), text);
    if let Ok(longer) = path.join(&text) {
        assert!(longer.starts_with(path.as_str()));
    }
}

/// A digest as text and its parts.
pub fn digest(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string().parse(), Ok(digest.clone()));
        let tail = text.rsplit('/').next().unwrap_or_default();
        assert!(tail.bytes().all(|b| b.is_ascii_digit()), "{text:?}");
    }
    let (choice, rest) = first(data);
    let function = DigestFunction::ALL.get(usize::from(choice) % 8).copied();
    let hash = String::from_utf8_lossy(rest);
    let ours = Digest::from_hex(function, &hash, 7);
    let theirs = hex::decode(hash.as_bytes()).ok().and_then(|bytes| {
        let function = function.or_else(|| DigestFunction::from_hash_len(bytes.len()))?;
        Digest::new(function, &bytes, 7).ok()
    });
    assert_eq!(ours.ok(), theirs);
    if let Some(digest) = theirs {
        assert!(digest.is_hex(hash.as_bytes()));
    }
}

/// A blob's or file's name.
pub fn uri(data: &[u8]) {
    let (choice, data) = first(data);
    let function = DigestFunction::ALL.get(usize::from(choice) % 8).copied();
    let text = String::from_utf8_lossy(data);
    if let Ok(uri) = BytestreamUri::parse_with(&text, function) {
        assert_eq!(uri.to_string().parse(), Ok(uri));
    }
    if let Ok(name) = ResourceName::parse_with(&text, function) {
        assert_eq!(name.to_string().parse(), Ok(name));
    }
}
