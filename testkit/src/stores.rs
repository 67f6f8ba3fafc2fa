//! Object stores: the servers of others, with one bucket each.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Digest as _;

use crate::{PATIENCE, Running, clean, peers};

/// The bucket that every store has.
pub const BUCKET: &str = "bkt";
/// The key pair of [`StoreKind::S3`].
pub const KEYS: [(&str, &str); 2] = [
    ("AWS_ACCESS_KEY_ID", "AKIDOUTHAULTEST"),
    ("AWS_SECRET_ACCESS_KEY", "s3cretOfTheStore"),
];
/// The account of Azure's emulator, and its key: they are the same everywhere.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// The stores that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    /// versitygw: S3 that checks signatures. Its objects are files.
    S3,
    /// gofakes3: S3 that lets everybody in, as public buckets do.
    PublicS3,
    /// fake-gcs-server: Google Cloud Storage.
    Gcs,
    /// azurite: Azure Blob Storage, which checks signatures.
    Azure,
}

impl StoreKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::S3, Self::PublicS3, Self::Gcs, Self::Azure];

    /// The peer's name.
    pub const fn peer(self) -> &'static str {
        match self {
            Self::S3 => "versitygw",
            Self::PublicS3 => "gofakes3",
            Self::Gcs => "fake-gcs-server",
            Self::Azure => "azurite",
        }
    }

    /// Whether it can be started; says loudly if not.
    pub fn is_there(self, test: &str) -> bool {
        peers::are_there(test, &[self.peer()])
    }
}

/// A store that runs. It ends when this is dropped.
pub struct Store {
    /// Which one it is.
    pub kind: StoreKind,
    address: SocketAddr,
    process: Running,
    dir: tempfile::TempDir,
}

impl Store {
    /// Starts a store with an empty bucket.
    pub fn start(kind: StoreKind) -> Self {
        Self::start_in(kind, &std::env::temp_dir())
    }

    /// The same with a directory below another than the system's for temporary files.
    pub fn start_in(kind: StoreKind, base: &Path) -> Self {
        let dir = tempfile::tempdir_in(base).unwrap();
        fs::create_dir(dir.path().join(BUCKET)).unwrap();
        let start = |address| clean(command(kind, dir.path(), address));
        let (process, address) = Running::listening(kind.peer(), start);
        let store = Self {
            kind,
            address,
            process,
            dir,
        };
        if kind == StoreKind::Azure {
            store.azure("", "restype=container", &[], b"");
        }
        store
    }

    /// Its server's process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The address of a prefix in its bucket, as `--remote-cache` takes it, with more settings.
    pub fn url(&self, prefix: &str, settings: &str) -> String {
        let (scheme, path) = match self.kind {
            StoreKind::S3 | StoreKind::PublicS3 => ("s3", String::new()),
            StoreKind::Gcs => ("gs", String::new()),
            StoreKind::Azure => ("az", format!("/{ACCOUNT}&account={ACCOUNT}")),
        };
        let settings = if settings.is_empty() {
            String::new()
        } else {
            format!("&{settings}")
        };
        format!(
            "{scheme}://{BUCKET}/{prefix}?endpoint=http://{}{path}{settings}",
            self.address
        )
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The directory that is the bucket of [`StoreKind::S3`]: its objects are the files there.
    pub fn directory(&self) -> std::path::PathBuf {
        self.dir.path().join(BUCKET)
    }

    /// What a client must have in its environment.
    pub fn variables(&self) -> Vec<(&'static str, &'static str)> {
        match self.kind {
            StoreKind::S3 => KEYS.to_vec(),
            StoreKind::PublicS3 | StoreKind::Gcs => Vec::new(),
            StoreKind::Azure => vec![("AZURE_STORAGE_KEY", ACCOUNT_KEY)],
        }
    }

    /// Writes an object.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        match self.kind {
            StoreKind::S3 => {
                let path = self.dir.path().join(BUCKET).join(name);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                // Not in place: an old one may be being read.
                let new = self.dir.path().join("new");
                fs::write(&new, bytes).unwrap();
                fs::rename(new, path).unwrap();
            }
            StoreKind::PublicS3 => {
                let path = format!("/{BUCKET}/{}", encoded(name, true));
                self.send("PUT", &path, &[], bytes);
            }
            StoreKind::Gcs => {
                let path = format!(
                    "/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={}",
                    encoded(name, false)
                );
                self.send("POST", &path, &[], bytes);
            }
            StoreKind::Azure => self.azure(name, "", &[("x-ms-blob-type", "BlockBlob")], bytes),
        }
    }

    /// A shared access signature of the bucket of [`StoreKind::Azure`], to read and to list, as it is in queries (Azure's
    /// guide, "Create a service SAS").
    pub fn signature(&self, is_expired: bool) -> String {
        let expiry = if is_expired {
            "2021-01-01T00:00:00Z"
        } else {
            "2199-01-01T00:00:00Z"
        };
        let resource = format!("/blob/{ACCOUNT}/{BUCKET}");
        let version = "2021-08-06";
        let mut signed = vec!["rl", "", expiry, &resource, "", "", "", version, "c"];
        signed.resize(16, "");
        let signature = STANDARD.encode(keyed(&STANDARD.decode(ACCOUNT_KEY).unwrap(), &signed.join("\n")));
        let (expiry, signature) = (encoded(expiry, false), encoded(&signature, false));
        format!("sv={version}&sr=c&sp=rl&se={expiry}&sig={signature}")
    }

    /// A URL that lets anyone read an object of [`StoreKind::S3`] for an hour (AWS's guide, "Authenticating Requests: Using
    /// Query Parameters").
    pub fn presigned(&self, name: &str) -> String {
        let [(_, id), (_, secret)] = KEYS;
        // Such as "Sun, 06 Nov 1994 08:49:37 GMT".
        let now = httpdate::fmt_http_date(SystemTime::now());
        let parts: Vec<&str> = now.split(' ').collect();
        let months = [
            "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
        ];
        let month = 1 + months.iter().position(|month| *month == parts[2]).unwrap();
        let day = format!("{}{month:02}{}", parts[3], parts[1]);
        let time = format!("{day}T{}Z", parts[4].replace(':', ""));
        let scope = format!("{day}/us-east-1/s3/aws4_request");
        let query = format!(
            "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={}&X-Amz-Date={time}&X-Amz-Expires=3600&\
             X-Amz-SignedHeaders=host",
            encoded(&format!("{id}/{scope}"), false)
        );
        let path = format!("/{BUCKET}/{}", encoded(name, true));
        let address = self.address;
        let request = format!("GET\n{path}\n{query}\nhost:{address}\n\nhost\nUNSIGNED-PAYLOAD");
        let signed = format!(
            "AWS4-HMAC-SHA256\n{time}\n{scope}\n{}",
            hex(&sha2::Sha256::digest(request))
        );
        let mut key = format!("AWS4{secret}").into_bytes();
        for part in [&*day, "us-east-1", "s3", "aws4_request"] {
            key = keyed(&key, part);
        }
        format!(
            "http://{address}{path}?{query}&X-Amz-Signature={}",
            hex(&keyed(&key, &signed))
        )
    }

    /// A PUT with the emulator's signature (Azure's guide, "Authorize with Shared Key").
    fn azure(&self, name: &str, query: &str, more: &[(&str, &str)], bytes: &[u8]) {
        let name = encoded(name, true);
        let slash = if name.is_empty() { "" } else { "/" };
        let path = format!("/{ACCOUNT}/{BUCKET}{slash}{name}");
        let date = httpdate::fmt_http_date(SystemTime::now());
        let mut headers = more.to_vec();
        headers.extend([("x-ms-date", &*date), ("x-ms-version", "2021-08-06")]);
        let signed: String = headers
            .iter()
            .map(|(key, value)| format!("{key}:{value}\n"))
            .collect();
        let length = if bytes.is_empty() {
            String::new()
        } else {
            bytes.len().to_string()
        };
        let query_signed = query.replace('=', ":");
        let separator = if query.is_empty() { "" } else { "\n" };
        let text =
            format!("PUT\n\n\n{length}\n\n\n\n\n\n\n\n\n{signed}/{ACCOUNT}{path}{separator}{query_signed}");
        let signature = STANDARD.encode(keyed(&STANDARD.decode(ACCOUNT_KEY).unwrap(), &text));
        let authorization = format!("SharedKey {ACCOUNT}:{signature}");
        headers.push(("authorization", &authorization));
        let question = if query.is_empty() { "" } else { "?" };
        self.send("PUT", &format!("{path}{question}{query}"), &headers, bytes);
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], bytes: &[u8]) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let headers: String = headers
            .iter()
            .map(|(key, value)| format!("{key}: {value}\r\n"))
            .collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n",
            self.address,
            bytes.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // What comes after the answer does not matter.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let is_good = ["200", "201"]
            .iter()
            .any(|code| answer.starts_with(&format!("HTTP/1.1 {code}")));
        assert!(is_good, "{method} {path}: {answer}");
    }
}

/// The HMAC-SHA256 of a text.
fn keyed(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(key).unwrap();
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A name with everything but letters, digits and `-._~` encoded, and perhaps slashes.
fn encoded(name: &str, with_slashes: bool) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || with_slashes && b == b'/';
    let encode = |b: u8| {
        if plain(b) {
            char::from(b).to_string()
        } else {
            format!("%{b:02X}")
        }
    };
    name.bytes().map(encode).collect()
}

fn command(kind: StoreKind, dir: &Path, address: SocketAddr) -> Command {
    let mut command = Command::new(peers::program(kind.peer()));
    match kind {
        StoreKind::S3 => {
            let [(_, id), (_, secret)] = KEYS;
            command.env("ROOT_ACCESS_KEY", id).env("ROOT_SECRET_KEY", secret);
            command.args(["--port", &address.to_string(), "posix"]).arg(dir);
        }
        StoreKind::PublicS3 => {
            command.args(["-backend", "memory", "-quiet", "-host", &address.to_string()]);
            command.args(["-initialbucket", BUCKET]);
        }
        StoreKind::Gcs => {
            command.args([
                "-scheme",
                "http",
                "-backend",
                "memory",
                "-host",
                "127.0.0.1",
                "-port",
            ]);
            command.arg(address.port().to_string());
            command
                .args(["-public-host", &address.to_string(), "-data"])
                .arg(dir);
        }
        StoreKind::Azure => {
            command.args([
                "--blobHost",
                "127.0.0.1",
                "--blobPort",
                &address.port().to_string(),
            ]);
            command.args([
                "--silent",
                "--skipApiVersionCheck",
                "--disableTelemetry",
                "--location",
            ]);
            command.arg(dir);
        }
    }
    command
}
