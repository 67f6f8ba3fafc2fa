//! The caches in use: which one a build's bytes come from.

use std::{collections::HashMap, sync::Arc};

use parking_lot::{Mutex, RwLock};

use super::{
    command_line::{BuildDirectories, add_login, disk_cache, options_of},
    error::SourceError,
};
use crate::{
    bep::event::CommandLine,
    digest::DigestFunction,
    remote::{self, ActionStore, BlobStore, Chain, GrpcCache, LocalFirst, Nowhere, RemoteOptions, Standing},
    transport::{BucketAddress, Endpoint, RemoteError, auth::has_helper, bucket::Anonymous},
};

/// Where to fetch from.
#[derive(Clone)]
pub enum SourceRule {
    /// One cache, or one chain of them, for all builds.
    Fixed(SourceCache),
    /// The caches that the build itself uses, from its canonical command line.
    FromBuild {
        /// Everything but the address: time-outs, connections, further headers.
        template: Box<RemoteOptions>,
        /// Disk caches of ours, before those of the build.
        before: Vec<RemoteOptions>,
        /// Endpoints that a stream may name; `None` where anyone who names it is trusted, because it is the user's own
        /// command or file.
        allowed: Option<Vec<Endpoint>>,
    },
}

/// The stores that a build's bytes come from, in the order in which they are asked, and how to name them in the record.
#[derive(Clone)]
pub struct SourceCache {
    members: Arc<[Member]>,
    all: Arc<dyn ActionStore>,
    /// The same after the files of this machine that a build offers.
    local: Arc<LocalFirst>,
    /// Those that are not directories here; all, where there are none.
    remote: Arc<dyn ActionStore>,
    /// Their endpoints, with a space between them.
    pub endpoint: String,
    /// Their instance name.
    pub instance_name: String,
}

/// A store, and what it was opened with; without that, what stands for one that cannot be used.
#[derive(Clone)]
struct Member {
    options: Option<Arc<RemoteOptions>>,
    store: Arc<dyn ActionStore>,
}

impl Member {
    fn open(options: RemoteOptions) -> Result<Self, RemoteError> {
        Ok(Self {
            store: remote::open(options.clone())?,
            options: Some(Arc::new(options)),
        })
    }

    fn endpoint(&self) -> Option<&Endpoint> {
        self.options.as_ref().map(|options| &options.connect.endpoint)
    }

    fn is_directory(&self) -> bool {
        self.endpoint().is_some_and(|e| e.directory_path().is_some())
    }
}

/// Chains that are kept open. Builds that have found theirs keep it, whatever is forgotten here.
const MOST_CHAINS: usize = 64;

/// The one store, or the chain of them.
fn one_of(members: Vec<Member>) -> Arc<dyn ActionStore> {
    let mut stores: Vec<_> = members.into_iter().map(|member| member.store).collect();
    match stores.pop() {
        Some(only) if stores.is_empty() => only,
        last => Arc::new(Chain::new(stores.into_iter().chain(last).collect())),
    }
}

impl SourceCache {
    /// Opens what the options' address leads to. Connects nothing yet.
    ///
    /// # Errors
    /// Naming the flag, when the options cannot work.
    pub fn open(options: RemoteOptions) -> Result<Self, RemoteError> {
        Self::chain(vec![options])
    }

    /// Opens several, which are asked in this order, directories before all others. Connects nothing yet.
    ///
    /// # Errors
    /// Naming the flag, when the options of one cannot work.
    pub fn chain(options: Vec<RemoteOptions>) -> Result<Self, RemoteError> {
        let members = options.into_iter().map(Member::open);
        Ok(Self::of(members.collect::<Result<_, _>>()?))
    }

    fn of(mut members: Vec<Member>) -> Self {
        members.sort_by_key(|member| !member.is_directory());
        let directories = members.iter().filter(|member| member.is_directory()).count();
        let all = one_of(members.clone());
        let remote = if directories == 0 || directories == members.len() {
            Arc::clone(&all)
        } else {
            one_of(members[directories..].to_vec())
        };
        let named: Vec<&RemoteOptions> = members.iter().filter_map(|m| m.options.as_deref()).collect();
        let last = named.last();
        Self {
            endpoint: chain_of(named.iter().map(|options| &options.connect.endpoint)),
            instance_name: last.map_or_else(String::new, |options| options.instance_name.clone()),
            members: members.into(),
            local: Arc::new(LocalFirst::new(HashMap::new(), all.clone())),
            all,
            remote,
        }
    }

    /// As what fetching needs.
    pub fn blobs(&self) -> Arc<dyn BlobStore> {
        self.local.clone()
    }

    /// The same, to offer files of this machine to.
    pub(crate) const fn local(&self) -> &Arc<LocalFirst> {
        &self.local
    }

    /// The same without disk caches: reading fills a cache at the address only if it comes there.
    pub(crate) fn remote_blobs(&self) -> Arc<dyn BlobStore> {
        self.remote.clone()
    }

    /// As what knows action results, too.
    pub fn actions(&self) -> Arc<dyn ActionStore> {
        Arc::clone(&self.all)
    }

    /// Whether all of these are in it: the very same stores, with the credentials that they were opened with.
    fn has(&self, members: &[Member]) -> bool {
        let is_here = |member: &Member| self.members.iter().any(|m| Arc::ptr_eq(&m.store, &member.store));
        members.iter().all(is_here)
    }

    /// Asks the stores whether they are there, and let us in.
    ///
    /// # Errors
    /// When there is no cache, or one does not answer.
    pub async fn probe(&self) -> Result<(), RemoteError> {
        self.all.probe().await
    }

    /// The stores, in the order in which they are asked, with what they were opened with.
    pub(crate) fn stores(&self) -> impl Iterator<Item = (&RemoteOptions, &dyn ActionStore)> {
        let members = self.members.iter();
        members.filter_map(|member| Some((member.options.as_deref()?, &*member.store)))
    }

    /// Options of the build's own that could not be used.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = &str> {
        let options = self.members.iter().filter_map(|member| member.options.as_deref());
        options.flat_map(|options| options.left_out.iter().map(String::as_str))
    }

    /// Whether one of the stores is at an authority, or there is none that has one.
    pub(crate) fn is_at(&self, authority: &str) -> bool {
        let mut servers = self.members.iter().filter(|member| !member.is_directory());
        let mut servers = servers.by_ref().filter_map(Member::endpoint).peekable();
        servers.peek().is_none() || servers.any(|endpoint| endpoint.authority() == authority)
    }

    /// What the last one was opened with.
    #[cfg(test)]
    pub(super) fn options(&self) -> Option<Arc<RemoteOptions>> {
        self.members.last()?.options.clone()
    }

    /// The function of digests that do not name theirs.
    fn digest_function(&self) -> DigestFunction {
        let mut options = self.members.iter().filter_map(|member| member.options.as_deref());
        options
            .next()
            .map_or(DigestFunction::Sha256, |options| options.digest_function)
    }
}

impl From<GrpcCache> for SourceCache {
    fn from(cache: GrpcCache) -> Self {
        let options = Some(Arc::new(cache.options().clone()));
        let store = Arc::new(cache);
        Self::of(vec![Member { options, store }])
    }
}

/// Addresses in the order in which they are asked, in one text: as they are, with a blank between them. A blank or a `%` of
/// one in such a list is written as `%20` or `%25`, unless its form does that itself.
fn chain_of<'a>(endpoints: impl ExactSizeIterator<Item = &'a Endpoint>) -> String {
    let is_alone = endpoints.len() == 1;
    let is_raw = |endpoint: &Endpoint| endpoint.unix_path().is_some() || endpoint.bucket().is_some();
    let shown = endpoints.map(|endpoint| match is_raw(endpoint) {
        true if !is_alone => endpoint.to_string().replace('%', "%25").replace(' ', "%20"),
        _ => endpoint.to_string(),
    });
    shown.collect::<Vec<_>>().join(" ")
}

/// What [`chain_of`] has written.
///
/// # Errors
/// When one of them is not the address of a cache.
pub(super) fn endpoints(text: &str) -> Result<Vec<Endpoint>, RemoteError> {
    let parse = |text: &str| Endpoint::parse_cache("--remote-cache", text);
    // The path of a socket may have blanks, where it is the only address.
    if !text.split(' ').all(|part| part.contains(':')) || !text.contains(' ') {
        return parse(text).map(|endpoint| vec![endpoint]);
    }
    let parts = text.split(' ').map(|part| {
        if part.starts_with("unix:") || BucketAddress::is_one(part) {
            parse(&part.replace("%20", " ").replace("%25", "%"))
        } else {
            parse(part)
        }
    });
    parts.collect()
}

/// The caches in use.
pub struct Sources {
    rule: RwLock<SourceRule>,
    open: Mutex<Open>,
}

/// What is open, by the addresses.
#[derive(Default)]
struct Open {
    members: HashMap<String, Member>,
    chains: HashMap<String, SourceCache>,
}

impl Open {
    /// Forgets everything where there would be too much of it with one more chain.
    fn make_room(&mut self, name: &str) {
        let is_full = self.chains.len() >= MOST_CHAINS || self.members.len() >= MOST_CHAINS * Chain::MOST;
        if is_full && !self.chains.contains_key(name) {
            *self = Self::default();
        }
    }
}

impl Sources {
    /// By a rule.
    pub fn new(rule: SourceRule) -> Self {
        Self {
            rule: RwLock::new(rule),
            open: Mutex::default(),
        }
    }

    /// Another rule, for builds from now on. Those that have found their cache keep it.
    pub(crate) fn set_rule(&self, rule: SourceRule) {
        *self.rule.write() = rule;
        // They may hold credentials that do not count any more.
        *self.open.lock() = Open::default();
    }

    /// The function of digests whose build does not say which it is.
    pub fn digest_function(&self) -> DigestFunction {
        match self.rule() {
            SourceRule::Fixed(cache) => cache.digest_function(),
            SourceRule::FromBuild { template, .. } => template.digest_function,
        }
    }

    fn rule(&self) -> SourceRule {
        self.rule.read().clone()
    }

    /// The caches for a build: its disk cache, if it has one, and then the remote one.
    ///
    /// # Errors
    /// When the build names no cache, or none that can be used or is allowed.
    pub fn of_build(
        &self,
        command_line: Option<&CommandLine>,
        directories: &BuildDirectories,
    ) -> Result<SourceCache, SourceError> {
        let (template, before, allowed) = match self.rule() {
            SourceRule::Fixed(cache) => {
                let disk = command_line.and_then(|line| disk_cache(line, directories));
                return self.with_directories(&cache, disk.and_then(Endpoint::directory).into_iter());
            }
            SourceRule::FromBuild {
                template,
                before,
                allowed,
            } => (template, before, allowed),
        };
        let line = command_line.ok_or(SourceError::NoCommandLine)?;
        let mut chain = before;
        let is_ours = |disk: &Endpoint| chain.iter().any(|o| o.connect.endpoint == *disk);
        let disk = disk_cache(line, directories).and_then(Endpoint::directory);
        let disk = disk.filter(|disk| !is_ours(disk));
        // It must be the user's own, and only files whose bytes the build names are read: no list needs to allow it.
        chain.extend(disk.map(|disk| directory_options(&template, disk)));
        let remote = options_of(line, &template, directories).and_then(|options| {
            check(allowed.as_deref(), &options.connect.endpoint)?;
            Ok(options)
        });
        match remote {
            Ok(options) => chain.push(options),
            Err(reason) if chain.is_empty() => return Err(reason),
            Err(SourceError::NoCache) => {}
            Err(reason) => return self.open("", chain, Some(&reason)),
        }
        self.open("", chain, None)
    }

    /// Whether the caches that are open, or named by the settings, are asked at present.
    pub(crate) fn standing(&self) -> Vec<Standing> {
        let named = match self.rule() {
            SourceRule::Fixed(cache) => Some(cache),
            SourceRule::FromBuild { .. } => None,
        };
        let open: Vec<SourceCache> = self.open.lock().chains.values().cloned().collect();
        let mut all: Vec<Standing> = named
            .iter()
            .chain(&open)
            .flat_map(|cache| cache.all.standing())
            .collect();
        // One that is passed over by one chain only, as that.
        all.sort_by(|a, b| (&a.name, a.passed_over.is_none()).cmp(&(&b.name, b.passed_over.is_none())));
        all.dedup_by(|a, b| a.name == b.name);
        all
    }

    /// The caches that the settings name, whatever builds use.
    ///
    /// # Errors
    /// When they name none, or it cannot be used.
    pub(crate) fn named(&self) -> Result<SourceCache, SourceError> {
        match self.rule() {
            SourceRule::Fixed(cache) => Ok(cache),
            SourceRule::FromBuild { before, .. } if before.is_empty() => Err(SourceError::NotNamed),
            SourceRule::FromBuild { before, .. } => self.open("", before, None),
        }
    }

    /// The caches that a recorded invocation used.
    ///
    /// # Errors
    /// When nothing is recorded, it is not allowed, or it cannot be used.
    pub(crate) fn of_record(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, SourceError> {
        self.recorded(endpoint, instance_name, false)
    }

    /// The caches of a build that was recorded elsewhere. That alone is not enough to send credentials anywhere:
    /// where there are any, the user must have named the endpoint. No flag of the build's command line is heeded, and
    /// no directory, which is another one here.
    ///
    /// # Errors
    /// When it names no cache, one that is not allowed, or one that credentials would go to.
    pub(crate) fn of_import(&self, endpoint: &str, instance_name: &str) -> Result<SourceCache, SourceError> {
        self.recorded(endpoint, instance_name, true)
    }

    fn recorded(
        &self,
        recorded: &str,
        instance_name: &str,
        imported: bool,
    ) -> Result<SourceCache, SourceError> {
        let (template, before, allowed) = match self.rule() {
            SourceRule::Fixed(cache) if imported => return Ok(cache),
            SourceRule::Fixed(cache) => {
                // What cannot be read is not needed: the cache is the one for all builds.
                let recorded = endpoints(recorded).unwrap_or_default().into_iter();
                return self.with_directories(&cache, recorded);
            }
            SourceRule::FromBuild {
                template,
                before,
                allowed,
            } => (template, before, allowed),
        };
        if recorded.is_empty() {
            return Err(SourceError::NotRecorded);
        }
        let mut chain = before;
        for endpoint in endpoints(recorded)? {
            let is_directory = endpoint.directory_path().is_some();
            let is_there = chain.iter().any(|o| o.connect.endpoint == endpoint);
            if is_there || imported && is_directory {
                continue;
            }
            if is_directory {
                chain.push(directory_options(&template, endpoint));
                continue;
            }
            check(allowed.as_deref(), &endpoint)?;
            let mut options = (*template).clone();
            options.connect.endpoint = endpoint;
            instance_name.clone_into(&mut options.instance_name);
            if imported && allowed.is_none() && has_credentials(&options) {
                return Err(SourceError::NotConfirmed(options.connect.endpoint));
            }
            if !imported {
                // As a build of here has opened it, with its own credentials.
                options = self
                    .known(&options)
                    .unwrap_or_else(|| without_the_builds_own(options));
            }
            chain.push(options);
        }
        if chain.is_empty() {
            return Err(SourceError::NotRecorded);
        }
        self.open(if imported { "import " } else { "" }, chain, None)
    }

    /// A chain with further directories before it.
    fn with_directories(
        &self,
        cache: &SourceCache,
        endpoints: impl Iterator<Item = Endpoint>,
    ) -> Result<SourceCache, SourceError> {
        let known = cache.members.iter().find_map(|member| member.options.clone());
        let is_new = |endpoint: &Endpoint| {
            let mut members = cache.members.iter();
            endpoint.directory_path().is_some() && !members.any(|m| m.endpoint() == Some(endpoint))
        };
        let new: Vec<Endpoint> = endpoints.filter(is_new).collect();
        let Some(template) = known.filter(|_| !new.is_empty()) else {
            return Ok(cache.clone());
        };
        let key = format!("{} before {}", chain_of(new.iter()), cache.endpoint);
        let mut open = self.open.lock();
        // One of before the rule was set may have come in after that.
        if let Some(chain) = open.chains.get(&key).filter(|chain| chain.has(&cache.members)) {
            return Ok(chain.clone());
        }
        open.make_room(&key);
        let new = new
            .into_iter()
            .map(|endpoint| Member::open(directory_options(&template, endpoint)));
        let mut members = new.collect::<Result<Vec<_>, _>>()?;
        members.extend(cache.members.iter().cloned());
        let chain = SourceCache::of(members);
        open.chains.insert(key, chain.clone());
        Ok(chain)
    }

    /// How many chains are kept.
    #[cfg(test)]
    pub(super) fn chains(&self) -> usize {
        self.open.lock().chains.len()
    }

    /// The options with which the same address was opened last.
    fn known(&self, options: &RemoteOptions) -> Option<RemoteOptions> {
        let open = self.open.lock();
        let member = open.members.get(&key("", options))?;
        member.options.as_deref().cloned()
    }

    /// Opens a chain, as far as it is not open; `reason` is why a store of the build's own is not in it.
    fn open(
        &self,
        kind: &str,
        chain: Vec<RemoteOptions>,
        reason: Option<&SourceError>,
    ) -> Result<SourceCache, SourceError> {
        if chain.len() > Chain::MOST {
            return Err(SourceError::TooMany(chain.len()));
        }
        let mut open = self.open.lock();
        let mut members = Vec::new();
        let keys: Vec<String> = chain.iter().map(|options| key(kind, options)).collect();
        let reason_shown = reason.map_or_else(String::new, ToString::to_string);
        let name = format!("{} {reason_shown}", keys.join(" "));
        open.make_room(&name);
        for (key, options) in keys.into_iter().zip(chain) {
            // Another build may come with other credentials for the same place.
            let known = open.members.get(&key);
            if let Some(member) = known.filter(|known| known.options.as_deref() == Some(&options)) {
                members.push(member.clone());
                continue;
            }
            let member = Member::open(options)?;
            open.members.insert(key, member.clone());
            members.push(member);
        }
        // Its members may have been opened again since, for a build with other credentials.
        if let Some(known) = open.chains.get(&name).filter(|known| known.has(&members)) {
            return Ok(known.clone());
        }
        if let Some(reason) = reason {
            let store = Arc::new(Nowhere(reason.to_string()));
            let options = None;
            members.push(Member { options, store });
        }
        let cache = SourceCache::of(members);
        open.chains.insert(name, cache.clone());
        Ok(cache)
    }
}

fn key(kind: &str, options: &RemoteOptions) -> String {
    format!("{kind}{} {}", options.connect.endpoint, options.instance_name)
}

/// The options for a recorded cache that no build of this process has opened. What the build showed it is not recorded, so
/// that is said if the cache asks for it; a `.netrc` is read as for the build.
fn without_the_builds_own(mut options: RemoteOptions) -> RemoteOptions {
    if options.connect.endpoint.is_http() {
        let is_known = has_helper(&options.connect) || options.connect.google.is_some();
        add_login(None, is_known, &mut options);
    }
    options.left_out.push(
        "a user name and a password in its URL, and its headers, are not recorded and so unknown until the next build; \
         put user name and password into ~/.netrc or give --remote-cache=URL with them to outhaul"
            .to_owned(),
    );
    options
}

/// The options for a build's disk cache, which needs neither credentials nor certificates. Nobody has asked us to read it:
/// where it cannot be used, there is none.
fn directory_options(template: &RemoteOptions, endpoint: Endpoint) -> RemoteOptions {
    let mut options = RemoteOptions::new(endpoint);
    options.digest_function = template.digest_function;
    options.touch = template.touch;
    options.is_optional = true;
    options
}

fn check(allowed: Option<&[Endpoint]>, endpoint: &Endpoint) -> Result<(), SourceError> {
    match allowed {
        Some(allowed) if !allowed.iter().any(|one| one.covers(endpoint)) => {
            Err(SourceError::NotAllowed(endpoint.clone()))
        }
        _ => Ok(()),
    }
}

/// Whether anything would identify us to the server.
pub(super) fn has_credentials(options: &RemoteOptions) -> bool {
    !options.connect.headers.is_empty()
        || !options.connect.credential_helpers.is_empty()
        || options.connect.google.is_some()
        || options.connect.tls.client_certificate.is_some()
        || options.connect.tls.client_key.is_some()
        // Those of the environment, no matter whose the server is.
        || options
            .connect
            .endpoint
            .bucket()
            .is_some_and(|bucket| bucket.anonymous != Anonymous::Yes)
}
