//! Caches that keep each blob as a file or an object of its own: a disk cache, an HTTP server, and buckets.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};
use outhaul::digest::Digest;
use outhaul_testkit::{
    cpu, free_address,
    stores::{Store, StoreKind},
};

use crate::{
    cache::{Kind, require},
    process::Process,
};

/// Such a cache. What serves it ends when this is dropped.
pub(crate) enum Keyed {
    /// As Bazel's `--disk_cache` keeps it.
    Disk(PathBuf),
    /// nginx in front of a directory.
    Nginx {
        process: Process,
        address: SocketAddr,
        root: PathBuf,
    },
    /// An object store's bucket.
    Bucket(Box<Store>),
}

impl Keyed {
    /// Starts an empty one below `base`.
    pub(crate) fn start(kind: Kind, base: &Path) -> Result<Self> {
        match kind {
            Kind::Disk => {
                let directory = base.join("disk-cache");
                fs::create_dir_all(&directory)?;
                Ok(Self::Disk(directory))
            }
            Kind::Nginx => Self::nginx(base),
            Kind::Versitygw => bucket(StoreKind::S3, base),
            Kind::Gofakes3 => bucket(StoreKind::PublicS3, base),
            Kind::Embedded | Kind::BuildboxCasd | Kind::BazelRemote => bail!("{kind:?} is a cache by gRPC"),
        }
    }

    fn nginx(base: &Path) -> Result<Self> {
        let directory = base.join("nginx");
        let root = directory.join("root");
        fs::create_dir_all(root.join("cas"))?;
        let address = free_address();
        let config = directory.join("nginx.conf");
        let text = include_str!("../../scripts/nginx.conf")
            .replace("ADDRESS", &address.to_string())
            .replace("DIR", &directory.display().to_string());
        fs::write(&config, text)?;
        let mut command = Command::new(require("nginx")?);
        command.arg("-p").arg(&directory).arg("-c").arg(&config);
        let process = Process::start(command, || TcpStream::connect(address).is_ok());
        Ok(Self::Nginx {
            process,
            address,
            root,
        })
    }

    /// As `--remote-cache` takes it.
    pub(crate) fn endpoint(&self) -> String {
        match self {
            Self::Disk(directory) => format!("file://{}", directory.display()),
            Self::Nginx { address, .. } => format!("http://{address}"),
            Self::Bucket(store) => store.url("", "layout=bazel"),
        }
    }

    /// What a client must have in its environment.
    pub(crate) fn variables(&self) -> Vec<(&'static str, &'static str)> {
        match self {
            Self::Disk(_) | Self::Nginx { .. } => Vec::new(),
            Self::Bucket(store) => store.variables(),
        }
    }

    /// Seconds of processor time of the server so far.
    pub(crate) fn cpu(&self) -> f64 {
        match self {
            Self::Disk(_) => 0.0,
            Self::Nginx { process, .. } => process.cpu(),
            Self::Bucket(store) => cpu(store.id()),
        }
    }

    /// Puts a blob in.
    pub(crate) fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let hash = digest.hash_hex();
        match self {
            Self::Disk(directory) => {
                let path = directory.join(place_on_disk(&hash));
                fs::create_dir_all(path.parent().unwrap_or(directory))?;
                fs::write(path, bytes)?;
            }
            Self::Nginx { root, .. } => fs::write(root.join("cas").join(hash), bytes)?,
            Self::Bucket(store) => store.put(&format!("cas/{hash}"), bytes),
        }
        Ok(())
    }
}

/// Where a disk cache has a blob.
pub(crate) fn place_on_disk(hash: &str) -> String {
    format!("cas/{}/{hash}", hash.get(..2).unwrap_or_default())
}

fn bucket(kind: StoreKind, base: &Path) -> Result<Keyed> {
    require(kind.peer())?;
    Ok(Keyed::Bucket(Box::new(Store::start_in(kind, base))))
}
