//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, UNIX_EPOCH},
};

use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{ActionResult, BatchReadBlobsResponse, Directory, DirectoryNode},
    google::rpc,
};
use bytes::Bytes;
use prost::Message as _;

use super::{
    call,
    casblob::{Decoder, Header, Parsed},
    client::to_wire,
    disk,
    expand::{Expanded, expand_result, expand_tree, trees_of},
    inflate::Inflater,
    status::{from_rpc, from_status},
    trees::DirectoryTree,
    wire::Batch,
};
use crate::{
    digest::{Digest, DigestFunction},
    exec_path::ExecPath,
    fuzzing::{first, wait_for},
    output::OutputContent,
    transport::Secrets,
};

/// Entries that an expansion may have here.
const ENTRIES: usize = 2000;

fn function(byte: u8) -> DigestFunction {
    DigestFunction::ALL[usize::from(byte) % DigestFunction::ALL.len()]
}

/// An object of bazel-remote's: read in pieces as in one, and from any offset as from the beginning.
pub(crate) fn casblob(data: &[u8]) {
    let (choice, object) = first(data);
    let size = match Header::parse(object, Some(object.len() as u64)) {
        Ok(Parsed::Header(header)) => header.size().min(1 << 16),
        Ok(Parsed::Needs(bytes)) => {
            assert!(bytes > object.len());
            1
        }
        Err(_) => 1,
    };
    let whole = unpacked(
        Decoder::new(size, Some(object.len() as u64)),
        object,
        object.len().max(1),
        size,
    );
    let pieces = unpacked(Decoder::new(size, None), object, usize::from(choice) + 1, size);
    if let (Some(whole), Some(pieces)) = (&whole, &pieces) {
        assert_eq!(whole, pieces);
    }
    if let (Some(whole), Ok(Parsed::Header(header))) = (whole, Header::parse(object, None)) {
        let offset = u64::from(choice).min(size);
        let (at, skip) = header.place_of(offset);
        assert!(at <= object.len() as u64 || whole.len() as u64 != size);
        let rest = object
            .get(usize::try_from(at).unwrap_or(usize::MAX)..)
            .unwrap_or_default();
        if let Ok(decoder) = Decoder::from_chunk(&header) {
            // A chunk may hold less than it should: what then comes is found to be wrong by its digest.
            let _ = unpacked(decoder, rest, rest.len().max(1), size + skip);
        }
    }
}

/// What an object holds, if it is no more than `size` bytes.
fn unpacked(mut decoder: Decoder, object: &[u8], chunk: usize, size: u64) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for piece in object.chunks(chunk) {
        let mut input = piece;
        loop {
            let left = size.saturating_sub(out.len() as u64);
            let bytes = decoder.run(&mut input, left).ok()?;
            assert!(bytes.len() as u64 <= left + 1);
            if bytes.is_empty() {
                break;
            }
            out.extend_from_slice(&bytes);
            if out.len() as u64 > size {
                return None;
            }
        }
    }
    Some(out)
}

/// A cache's answer to a batch: what the generated type reads.
pub(crate) fn batch_answer(data: &[u8]) {
    let ours = Batch::decode(data);
    if let Ok(theirs) = BatchReadBlobsResponse::decode(data) {
        let again = ours
            .as_ref()
            .map(|ours| BatchReadBlobsResponse::decode(&ours.encode_to_vec()[..]));
        assert_eq!(again, Ok(Ok(theirs)));
    }
    for part in ours.iter().flat_map(|batch| &batch.responses) {
        for function in DigestFunction::ALL {
            if let Some(digest) = part.digest.as_ref().and_then(|d| d.parse(function)) {
                assert!(part.digest.as_ref().is_some_and(|raw| raw.is(&digest)));
            }
        }
        if let Some(status) = &part.status {
            assert_readable(&from_rpc("context", status, &Secrets::default()).message);
        }
    }
}

fn assert_readable(message: &str) {
    assert!(
        !message.contains(char::is_control) && message.len() < 600,
        "{message:?}"
    );
}

/// A cache's error, with its details.
pub(crate) fn status(data: &[u8]) {
    if let Ok(status) = rpc::Status::decode(data) {
        assert_readable(&from_rpc("context", &status, &Secrets::default()).message);
    }
    let (code, details) = first(data);
    let details = Bytes::copy_from_slice(details);
    let words = String::from_utf8_lossy(&details).into_owned();
    let status = tonic::Status::with_details(tonic::Code::from_i32(code.into()), words, details);
    assert_readable(&from_status("context", &status, &Secrets::default()).message);
}

/// What a credential helper prints.
pub(crate) fn credentials(data: &[u8]) {
    let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    if let Ok((headers, expires_in)) = crate::transport::auth::read_answer(data, now) {
        assert!(expires_in.unwrap_or_default() <= Duration::from_secs(24 * 60 * 60));
        for header in headers {
            assert!(!header.value().contains(['\r', '\n', '\0']));
        }
    }
}

/// An answer's frames: in pieces of any size they say the same.
pub(crate) fn grpc_frames(data: &[u8]) {
    let (choice, data) = first(data);
    let status = match choice & 3 {
        0 => Some("0"),
        1 => Some("5"),
        2 => Some("nonsense"),
        _ => None,
    };
    let chunk = usize::from(choice >> 2) + 1;
    let whole = wait_for(call::fuzz_pieces(data, usize::MAX, status));
    let pieces = wait_for(call::fuzz_pieces(data, chunk, status));
    assert_eq!(pieces.is_ok(), whole.is_ok());
    if let (Ok(pieces), Ok(whole)) = (pieces, whole) {
        assert_eq!(pieces, whole);
        assert!(whole.len() <= data.len());
    }
    let whole = wait_for(call::fuzz_single::<Batch>(data, usize::MAX, status));
    let pieces = wait_for(call::fuzz_single::<Batch>(data, chunk, status));
    assert_eq!(pieces.ok(), whole.ok());
}

/// Compressed bytes: never more than a byte beyond what was promised, and what zstd itself makes of them.
pub(crate) fn inflate(data: &[u8]) {
    let (choice, packed) = first(data);
    let promised = 1_u64 << (choice & 15);
    let chunk = usize::from(choice >> 4) * 7 + 1;
    let whole = inflated(packed, packed.len().max(1), promised);
    let pieces = inflated(packed, chunk, promised);
    // Too much data and invalid zstd data are refused alike, and which of both is seen first is up to the pieces.
    let taken = |bytes: &std::io::Result<Vec<u8>>| match bytes {
        Ok(bytes) => {
            assert!(bytes.len() as u64 <= promised + 1);
            (bytes.len() as u64 <= promised).then(|| bytes.clone())
        }
        Err(_) => None,
    };
    // Of data that ends early it is up to the pieces, too, whether that is seen: then nothing comes of it, and it is
    // found to be too short.
    if let (Some(pieces), Some(whole)) = (taken(&pieces), taken(&whole)) {
        assert_eq!(pieces, whole);
    }
    if let Some(whole) = taken(&whole)
        && let Ok(theirs) = zstd::bulk::decompress(packed, whole.len() + 1)
    {
        assert_eq!(theirs, whole);
    }
}

fn inflated(packed: &[u8], chunk: usize, promised: u64) -> std::io::Result<Vec<u8>> {
    let mut inflater = Inflater::new()?;
    let mut out = Vec::new();
    for mut input in packed.chunks(chunk) {
        loop {
            let left = promised.saturating_sub(out.len() as u64);
            let piece = inflater.run(&mut input, left)?;
            out.extend_from_slice(&piece);
            if out.len() as u64 > promised {
                return Ok(out);
            }
            if piece.is_empty() {
                break;
            }
        }
    }
    Ok(out)
}

/// A cache's trees: whatever they say, all of it lies below its place, once.
pub(crate) fn tree_message(data: &[u8]) {
    let (choice, data) = first(data);
    let function = function(choice);
    if let Ok(tree) = DirectoryTree::decode(function, Bytes::copy_from_slice(data)) {
        let _ = (tree.missing(), tree.weight(), tree.encoded_bytes);
        check(&tree);
    }
    if let Some(tree) = knotted(function, data) {
        let _ = tree.missing();
        check(&tree);
    }
    if let Ok(result) = ActionResult::decode(data) {
        let _ = trees_of(function, &result);
        let trees: HashMap<_, Box<DirectoryTree>> = HashMap::new();
        if let Ok(entries) = expand_result(function, &result, &trees, ENTRIES) {
            once(&entries);
        }
    }
}

/// What lies in a disk cache where an action's result should: the blobs that it names are looked for where blobs are.
pub(crate) fn disk_result(data: &[u8]) {
    let (choice, data) = first(data);
    let function = function(choice);
    let Ok(result) = disk::decode(data) else { return };
    assert!(!data.is_empty());
    let trees: HashMap<_, Box<DirectoryTree>> = HashMap::new();
    let Ok(entries) = expand_result(function, &result, &trees, ENTRIES) else {
        return;
    };
    once(&entries);
    for entry in &entries {
        if let OutputContent::Blob(digest) = &entry.content {
            let place = disk::place_of_blob(digest);
            assert!(
                place.ends_with(&digest.hash_hex()) && !place.contains(".."),
                "{place}"
            );
            assert_eq!(place.matches("cas/").count(), 1, "{place}");
        }
    }
}

fn check(tree: &DirectoryTree) {
    let base = "bazel-out/k8/tree.d";
    if let Ok(entries) = expand_tree(ExecPath::new(base).ok(), tree, ENTRIES) {
        assert!(entries.iter().all(|entry| entry.path.starts_with(base)));
        once(&entries);
    }
}

fn once(entries: &[Expanded]) {
    assert!(entries.len() <= ENTRIES);
    let paths: HashSet<_> = entries.iter().map(|entry| &entry.path).collect();
    assert_eq!(paths.len(), entries.len());
    for entry in entries {
        if let OutputContent::Symlink(target) = &entry.content {
            assert!(!target.is_empty() && !target.contains('\0'));
        }
    }
}

/// Directories that refer to later ones by their numbers, which no fuzzer could do by their digests.
fn knotted(function: DigestFunction, mut data: &[u8]) -> Option<DirectoryTree> {
    let mut directories = Vec::new();
    while let Some((length, rest)) = data.split_first() {
        let (bytes, rest) = rest.split_at_checked(usize::from(*length))?;
        directories.push(Directory::decode(bytes).ok()?);
        data = rest;
    }
    let mut digests: Vec<Digest> = Vec::new();
    let mut encoded = Vec::new();
    let count = directories.len();
    for (at, mut directory) in directories.into_iter().enumerate().rev() {
        let tie = |node: &mut DirectoryNode| {
            let number = node
                .digest
                .as_ref()
                .and_then(|d| usize::try_from(d.size_bytes).ok());
            // The last one's digest came first.
            let child = number.filter(|n| *n > at && *n < count).map(|n| count - 1 - n);
            if let Some(digest) = child.and_then(|child| digests.get(child)) {
                node.digest = Some(to_wire(digest));
            }
        };
        directory.directories.iter_mut().for_each(tie);
        let bytes = Bytes::from(directory.encode_to_vec());
        digests.push(Digest::of(function, &bytes));
        encoded.push(bytes);
    }
    let mut tree = DirectoryTree::rooted_at(digests.last()?.clone());
    for bytes in encoded {
        tree.add(bytes).ok()?;
    }
    Some(tree)
}
