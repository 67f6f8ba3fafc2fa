//! The remote caches to measure with: the library's own in this process, or a real one in a process of its own.

use std::{
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use bazel_remote_apis::{
    build::bazel::remote::execution::v2::{
        BatchUpdateBlobsRequest, Digest as WireDigest, batch_update_blobs_request::Request,
        content_addressable_storage_client::ContentAddressableStorageClient,
    },
    google::bytestream::{WriteRequest, byte_stream_client::ByteStreamClient},
};
use bytes::Bytes;
use clap::ValueEnum;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use outhaul::digest::Digest;
use outhaul_testkit::{
    cache::{EmbeddedCache, RunningCache},
    cpu_of_threads, free_address,
};
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use crate::{keyed::Keyed, process::Process};

/// Name of the threads of the embedded cache.
const THREADS: &str = "cache";
/// Bytes of a batch, below the 4 MiB that gRPC servers take.
const BATCH: usize = 3 << 20;
/// Bytes of a message of a stream.
const PIECE: usize = 1 << 20;

/// Which cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// The library's own, in memory, on threads of the benchmark's process
    Embedded,
    /// BuildStream's
    BuildboxCasd,
    /// The Go one
    BazelRemote,
    /// A directory of Bazel's `--disk_cache`
    Disk,
    /// nginx, by HTTP
    Nginx,
    /// A bucket of versitygw, which is S3
    Versitygw,
    /// A bucket of gofakes3, which keeps it in memory
    Gofakes3,
}

/// A cache that runs. It ends when this is dropped.
pub(crate) struct Cache {
    kind: Kind,
    /// Of one by gRPC.
    address: Option<SocketAddr>,
    instance: &'static str,
    server: Server,
}

enum Server {
    Embedded {
        cache: RunningCache,
        /// Its threads, which end with it.
        _runtime: Runtime,
    },
    Process(Process),
    Keyed(Keyed),
}

impl Kind {
    /// Whether it is asked by gRPC.
    pub(crate) const fn is_grpc(self) -> bool {
        matches!(self, Self::Embedded | Self::BuildboxCasd | Self::BazelRemote)
    }

    /// The program, unless it is this one.
    const fn program(self) -> Option<&'static str> {
        match self {
            Self::Embedded | Self::Disk => None,
            Self::BuildboxCasd => Some("buildbox-casd"),
            Self::BazelRemote => Some("bazel-remote"),
            Self::Nginx => Some("nginx"),
            Self::Versitygw => Some("versitygw"),
            Self::Gofakes3 => Some("gofakes3"),
        }
    }

    /// The instance name to ask under. LUCI's cas says this one to every cache of the same machine, and casd knows one
    /// only.
    const fn instance(self) -> &'static str {
        match self {
            Self::BuildboxCasd => "instance",
            _ => "",
        }
    }

    /// What the cache is, for the table's head.
    pub(crate) fn describe(self) -> Result<String> {
        let Some(name) = self.program() else {
            return Ok(match self {
                Self::Disk => "a disk cache".to_owned(),
                _ => "embedded cache in the player's process".to_owned(),
            });
        };
        let flag = if self == Self::Nginx { "-v" } else { "--version" };
        let output = Command::new(require(name)?).arg(flag).output()?;
        let is_store = matches!(self, Self::Versitygw | Self::Gofakes3);
        if is_store || !output.status.success() {
            // A build that does not know its own version.
            return Ok(name.to_owned());
        }
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let last = said.lines().rfind(|line| !line.trim().is_empty());
        let last = last.unwrap_or(name).trim();
        let last = last.rsplit('/').next().unwrap_or(last);
        Ok(match self {
            Self::Nginx => format!("{name} {last}"),
            _ => last.to_owned(),
        })
    }
}

impl Cache {
    /// Starts an empty cache, which keeps what it has to keep below `base`.
    pub(crate) fn start(kind: Kind, base: &Path) -> Result<Self> {
        if !kind.is_grpc() {
            return Ok(Self {
                kind,
                address: None,
                instance: kind.instance(),
                server: Server::Keyed(Keyed::start(kind, base)?),
            });
        }
        let Some(name) = kind.program() else {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .thread_name(THREADS)
                .enable_all()
                .build()?;
            let running = runtime.block_on(EmbeddedCache::builder().start())?;
            let endpoint = running.endpoint();
            let address = endpoint.strip_prefix("grpc://").context("an address by TCP")?;
            return Ok(Self {
                kind,
                address: Some(address.parse()?),
                instance: kind.instance(),
                server: Server::Embedded {
                    cache: running,
                    _runtime: runtime,
                },
            });
        };
        let store = base.join("cas");
        std::fs::create_dir_all(&store)?;
        let address = free_address();
        let mut command = Command::new(require(name)?);
        if kind == Kind::BuildboxCasd {
            command.arg("--bind").arg(address.to_string());
            command.args(["--log-level", "warning"]);
            command
                .args(["--local-server-instance", kind.instance()])
                .arg(&store);
        } else {
            command.arg("--dir").arg(&store);
            command.args(["--max_size=12", "--log_timezone=none", "--access_log_level=none"]);
            command.arg(format!("--grpc_address={address}"));
            command.arg(format!("--http_address={}", free_address()));
        }
        let process = Process::start(command, || TcpStream::connect(address).is_ok());
        Ok(Self {
            kind,
            address: Some(address),
            instance: kind.instance(),
            server: Server::Process(process),
        })
    }

    pub(crate) const fn kind(&self) -> Kind {
        self.kind
    }

    /// Where one by gRPC listens.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        self.address
            .with_context(|| format!("{:?} is no cache by gRPC", self.kind))
    }

    /// The instance name to ask under.
    pub(crate) const fn instance(&self) -> &'static str {
        self.instance
    }

    /// As `--remote_cache` takes it.
    pub(crate) fn endpoint(&self) -> String {
        match (&self.server, self.address) {
            (Server::Keyed(keyed), _) => keyed.endpoint(),
            (_, Some(address)) => format!("grpc://{address}"),
            (_, None) => String::new(),
        }
    }

    /// What the daemon must have in its environment to read it.
    pub(crate) fn variables(&self) -> Vec<(&'static str, &'static str)> {
        match &self.server {
            Server::Keyed(keyed) => keyed.variables(),
            _ => Vec::new(),
        }
    }

    /// The directory of a disk cache.
    pub(crate) fn directory(&self) -> Option<&Path> {
        match &self.server {
            Server::Keyed(Keyed::Disk(directory)) => Some(directory),
            _ => None,
        }
    }

    /// How many blobs it was asked for so far; the library's own counts.
    pub(crate) fn blobs_asked_for(&self) -> Option<u64> {
        match &self.server {
            Server::Embedded { cache, .. } => {
                let stats = cache.stats();
                Some(stats.batch_read_blobs + stats.stream_reads)
            }
            Server::Process(_) | Server::Keyed(_) => None,
        }
    }

    /// Seconds of processor time so far.
    pub(crate) fn cpu(&self) -> f64 {
        match &self.server {
            Server::Embedded { .. } => cpu_of_threads(std::process::id(), THREADS),
            Server::Process(process) => process.cpu(),
            Server::Keyed(keyed) => keyed.cpu(),
        }
    }

    /// Puts blobs in: by uploading them if that is the only way, else directly.
    pub(crate) fn fill(&self, runtime: &Runtime, blobs: impl Iterator<Item = (Digest, Bytes)>) -> Result<()> {
        match &self.server {
            Server::Embedded { cache, .. } => {
                // The digest is the bytes' own, just computed.
                blobs.for_each(|(digest, bytes)| cache.store().put_unverified(digest, bytes));
                Ok(())
            }
            Server::Process(_) => runtime.block_on(upload(self, blobs)),
            Server::Keyed(keyed) => {
                for (digest, bytes) in blobs {
                    keyed.put(&digest, &bytes)?;
                }
                Ok(())
            }
        }
    }
}

async fn upload(cache: &Cache, blobs: impl Iterator<Item = (Digest, Bytes)>) -> Result<()> {
    let channel = Channel::from_shared(format!("http://{}", cache.address()?))?
        .connect()
        .await?;
    let (mut batches, mut batch, mut size) = (Vec::new(), Vec::new(), 0);
    let mut large = Vec::new();
    for (digest, bytes) in blobs {
        if bytes.len() > BATCH / 2 {
            large.push((digest, bytes));
            continue;
        }
        // Each blob carries some bytes beside its own.
        size += bytes.len() + 100;
        batch.push((digest, bytes));
        if size > BATCH / 2 {
            batches.push(std::mem::take(&mut batch));
            size = 0;
        }
    }
    batches.push(batch);
    stream::iter(batches.into_iter().map(anyhow::Ok))
        .try_for_each_concurrent(4, |batch| update(channel.clone(), cache.instance, batch))
        .await?;
    stream::iter(large.into_iter().map(anyhow::Ok))
        .try_for_each_concurrent(2, |(digest, bytes)| {
            write(channel.clone(), cache.instance, digest, bytes)
        })
        .await
}

async fn update(channel: Channel, instance: &str, batch: Vec<(Digest, Bytes)>) -> Result<()> {
    let requests = batch
        .into_iter()
        .map(|(digest, bytes)| Request {
            digest: Some(WireDigest {
                hash: digest.hash_hex(),
                size_bytes: digest.size() as i64,
            }),
            data: bytes.into(),
            ..Request::default()
        })
        .collect();
    let request = BatchUpdateBlobsRequest {
        instance_name: instance.to_owned(),
        requests,
        ..BatchUpdateBlobsRequest::default()
    };
    let mut client = ContentAddressableStorageClient::new(channel).max_decoding_message_size(16 << 20);
    let answer = client.batch_update_blobs(request).await?.into_inner();
    let refused = answer
        .responses
        .iter()
        .filter_map(|r| r.status.as_ref())
        .find(|s| s.code != 0);
    ensure!(refused.is_none(), "the cache took a blob not: {refused:?}");
    Ok(())
}

async fn write(channel: Channel, instance: &str, digest: Digest, bytes: Bytes) -> Result<()> {
    let prefix = if instance.is_empty() { "" } else { "/" };
    let name = format!(
        "{instance}{prefix}uploads/00000000-0000-4000-8000-{:012}/blobs/{digest}",
        bytes.len()
    );
    let pieces = bytes.len().div_ceil(PIECE).max(1);
    let requests = (0..pieces).map(move |n| {
        let start = n * PIECE;
        WriteRequest {
            resource_name: name.clone(),
            write_offset: start as i64,
            finish_write: n + 1 == pieces,
            data: bytes.slice(start..bytes.len().min(start + PIECE)).into(),
        }
    });
    ByteStreamClient::new(channel)
        .write(stream::iter(requests).boxed())
        .await?;
    Ok(())
}

/// A peer's program: what scripts/install-peers installed, or on the `PATH`.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let installed = std::env::var_os("OUTHAUL_PEERS")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/outhaul-peers")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    installed
        .map(|directory| directory.join("bin"))
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
}

pub(crate) fn require(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| {
        format!("there is no {name}, neither of scripts/install-peers ($OUTHAUL_PEERS) nor on the PATH")
    })
}
