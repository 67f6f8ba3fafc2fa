//! The caches in use: which one a build's bytes come from.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use super::{
    command_line::{BuildDirectories, disk_cache, options_of},
    error::SourceError,
};
use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::{self, ActionStore, BlobStore, Chain, DiskCache, GrpcCache, Nowhere, RemoteOptions},
    transport::{Endpoint, RemoteError},
};

/// Where to fetch from.
#[derive(Clone)]
pub enum SourceRule {
    /// One cache for all builds.
    Fixed(SourceCache),
    /// The cache that the build itself uses, from its canonical command line.
    FromBuild {
        /// Everything but the address: time-outs, connections, further headers.
        template: Box<RemoteOptions>,
        /// Endpoints that a stream may name; `None` where anyone who names it is trusted, because it is the user's own
        /// command or file.
        allowed: Option<Vec<Endpoint>>,
    },
}

/// A cache in use, and how to name it in the record.
#[derive(Clone)]
pub struct SourceCache {
    /// What it was opened with; `None` where there is a disk cache alone.
    pub(super) options: Option<Arc<RemoteOptions>>,
    /// What the options' address leads to.
    remote: Arc<dyn ActionStore>,
    blobs: Arc<dyn BlobStore>,
    /// Its endpoint; empty where there is a disk cache alone.
    pub endpoint: String,
    /// Its instance name.
    pub instance_name: String,
}

impl SourceCache {
    /// Opens what the options' address leads to. Connects nothing yet.
    ///
    /// # Errors
    /// Naming the flag, when the options cannot work.
    pub fn open(options: RemoteOptions) -> Result<Self, RemoteError> {
        Ok(Self::new(remote::open(options.clone())?, options))
    }

    fn new(store: Arc<dyn ActionStore>, options: RemoteOptions) -> Self {
        Self {
            endpoint: options.connect.endpoint.to_string(),
            instance_name: options.instance_name.clone(),
            options: Some(Arc::new(options)),
            remote: store.clone(),
            blobs: store,
        }
    }

    /// As what fetching needs.
    #[must_use]
    pub fn blobs(&self) -> Arc<dyn BlobStore> {
        Arc::clone(&self.blobs)
    }

    /// The same without the build's disk cache: reading fills a cache at the address only if it comes there.
    #[must_use]
    pub fn remote_blobs(&self) -> Arc<dyn BlobStore> {
        match self.options {
            Some(_) => self.remote.clone(),
            None => self.blobs(),
        }
    }

    /// As what knows action results, too.
    #[must_use]
    pub fn actions(&self) -> Arc<dyn ActionStore> {
        Arc::clone(&self.remote)
    }

    /// Asks the remote cache whether it is there, and lets us in.
    ///
    /// # Errors
    /// When there is no cache, or it does not answer.
    pub async fn probe(&self) -> Result<(), RemoteError> {
        self.remote.probe().await
    }

    /// Options of the build's own that could not be used.
    #[must_use]
    pub fn left_out(&self) -> &[String] {
        self.options
            .as_ref()
            .map_or(&[], |options| options.left_out.as_slice())
    }

    /// The address, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<&Endpoint> {
        self.options.as_ref().map(|options| &options.connect.endpoint)
    }

    /// The function of digests that do not tell theirs.
    fn digest_function(&self) -> DigestFunction {
        let options = self.options.as_ref();
        options.map_or(DigestFunction::Sha256, |options| options.digest_function)
    }
}

impl From<GrpcCache> for SourceCache {
    fn from(cache: GrpcCache) -> Self {
        let options = cache.options().clone();
        Self::new(Arc::new(cache), options)
    }
}

/// The caches in use.
pub struct Sources {
    rule: RwLock<SourceRule>,
    open: Mutex<HashMap<String, SourceCache>>,
}

impl Sources {
    /// By a rule.
    #[must_use]
    pub fn new(rule: SourceRule) -> Self {
        Self {
            rule: RwLock::new(rule),
            open: Mutex::default(),
        }
    }

    /// Another rule, for builds from now on. Those that have found their cache keep it.
    pub fn set_rule(&self, rule: SourceRule) {
        *self.rule.write().unwrap_or_else(PoisonError::into_inner) = rule;
        // They may hold credentials that do not count any more.
        self.lock().clear();
    }

    /// The function of digests whose build does not tell which it is.
    #[must_use]
    pub fn digest_function(&self) -> DigestFunction {
        match self.rule() {
            SourceRule::Fixed(cache) => cache.digest_function(),
            SourceRule::FromBuild { template, .. } => template.digest_function,
        }
    }

    fn rule(&self) -> SourceRule {
        self.rule.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cache for a build: its disk cache, if it has one that can be read, and then the remote one.
    ///
    /// # Errors
    /// When the build names no gRPC cache, or one that is not allowed, and no disk cache.
    pub fn of_build(
        &self,
        command_line: Option<&CommandLine>,
        directories: &BuildDirectories,
    ) -> Result<SourceCache, SourceError> {
        let remote = match &self.rule() {
            SourceRule::Fixed(cache) => Ok(cache.clone()),
            SourceRule::FromBuild { template, allowed } => command_line
                .ok_or(SourceError::NoCommandLine)
                .and_then(|line| options_of(line, template, directories))
                .and_then(|options| {
                    check(allowed.as_deref(), &options.connect.endpoint)?;
                    let key = key(&options.connect.endpoint.to_string(), &options.instance_name);
                    self.open(key, options)
                }),
        };
        let Some(path) = command_line.and_then(|line| disk_cache(line, directories)) else {
            return remote;
        };
        let disk = match DiskCache::open(&path) {
            Ok(disk) => Arc::new(disk),
            Err(error) => {
                tracing::debug!("not reading the build's --disk_cache: {error}");
                return remote;
            }
        };
        Ok(match remote {
            Ok(remote) => SourceCache {
                blobs: Arc::new(Chain::new(vec![disk, remote.blobs()])),
                ..remote
            },
            Err(reason) => {
                let nowhere = Arc::new(Nowhere(reason.to_string()));
                SourceCache {
                    options: None,
                    remote: nowhere.clone(),
                    blobs: Arc::new(Chain::new(vec![disk, nowhere])),
                    endpoint: String::new(),
                    instance_name: String::new(),
                }
            }
        })
    }

    /// The cache that a recorded invocation used.
    ///
    /// # Errors
    /// When nothing is recorded, it is not allowed, or it cannot be used.
    pub fn of_record(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, SourceError> {
        self.recorded(endpoint, instance_name, false)
    }

    /// The cache of a build that was recorded elsewhere. That alone is not enough to send credentials anywhere:
    /// where there are any, the user must have named the endpoint. No flag of the build's command line is heeded.
    ///
    /// # Errors
    /// When it names no cache, one that is not allowed, or one that credentials would go to.
    pub fn of_import(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, SourceError> {
        self.recorded(endpoint, instance_name, true)
    }

    fn recorded(
        &self,
        endpoint: &str,
        instance_name: &str,
        imported: bool,
    ) -> Result<SourceCache, SourceError> {
        let (template, allowed) = match self.rule() {
            SourceRule::Fixed(cache) => return Ok(cache),
            SourceRule::FromBuild { template, allowed } => (template, allowed),
        };
        if endpoint.is_empty() {
            return Err(SourceError::NotRecorded);
        }
        let mut options = *template;
        options.connect.endpoint = Endpoint::parse("--remote-cache", endpoint)?;
        instance_name.clone_into(&mut options.instance_name);
        check(allowed.as_deref(), &options.connect.endpoint)?;
        let key = key(endpoint, instance_name);
        if imported {
            if allowed.is_none() && has_credentials(&options) {
                return Err(SourceError::NotConfirmed(options.connect.endpoint));
            }
            // Never one that a build of here has opened with its own credentials.
            return self.open(format!("import {key}"), options);
        }
        let known = self.lock().get(&key).cloned();
        known.map_or_else(|| self.open(key, options), Ok)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, SourceCache>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, key: String, options: RemoteOptions) -> Result<SourceCache, SourceError> {
        let mut open = self.lock();
        // Another build may come with other credentials for the same place.
        if let Some(cache) = open.get(&key).filter(|cache| {
            let known = cache.options.as_deref();
            known.is_some_and(|known| *known == options)
        }) {
            return Ok(cache.clone());
        }
        let cache = SourceCache::open(options)?;
        open.insert(key, cache.clone());
        Ok(cache)
    }
}

fn key(endpoint: &str, instance_name: &str) -> String {
    format!("{endpoint} {instance_name}")
}

fn check(allowed: Option<&[Endpoint]>, endpoint: &Endpoint) -> Result<(), SourceError> {
    match allowed {
        Some(allowed) if !allowed.contains(endpoint) => Err(SourceError::NotAllowed(endpoint.clone())),
        _ => Ok(()),
    }
}

/// Whether anything would tell the server who we are.
pub(super) fn has_credentials(options: &RemoteOptions) -> bool {
    !options.connect.headers.is_empty()
        || !options.connect.credential_helpers.is_empty()
        || options.connect.google.is_some()
        || options.connect.tls.client_certificate.is_some()
        || options.connect.tls.client_key.is_some()
}
