//! What every command that downloads outputs needs.

use std::{
    collections::HashMap,
    io,
    ops::ControlFlow,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crate::{
    bep::{self, event::CommandLine},
    bes::{BesOptions, BesService, HoldPolicy, Upstream, limits::BesLimits},
    builds::Decoders,
    control::Service,
    exec_path::BUILD_TREE,
    invocation::{Engine, policy::Policy},
    journal::Journal,
    lease,
    materialize::{MaterializeOptions, Materializer},
    metrics::Metrics,
    record::{OutputState, Record, RootId},
    roots::{RootError, RootRules, Roots},
    sources::{BuildDirectories, SourceError, SourceRule, Sources},
    units::now_ms,
};

/// For how long builds count whose outputs' directories should be there, in milliseconds: a week.
const REMEMBERED_MS: i64 = 7 * 24 * 3600 * 1000;

/// The services behind the listeners. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    /// What is known.
    pub record: Record,
    /// What is counted.
    pub metrics: Metrics,
    /// The builds and their invocations.
    pub engine: Engine,
    /// The control API.
    pub service: Service,
    roots: Arc<Roots>,
    sources: Arc<Sources>,
    /// What keeping leases needs.
    pub(super) leases: lease::LeaseContext,
    /// How long settled builds are remembered for clients that come back.
    linger: Duration,
}

impl Services {
    /// Puts the services together, on the current tokio runtime. `holds_sets` is for [`Engine::new`].
    ///
    /// # Errors
    /// When a writer thread cannot be started.
    pub fn open(
        record: Record,
        policy: Policy,
        rules: RootRules,
        source: SourceRule,
        options: MaterializeOptions,
        holds_sets: bool,
    ) -> io::Result<Self> {
        let metrics = Metrics::default();
        let materializer = Materializer::start(options, metrics.clone())?;
        let roots = Arc::new(Roots::new(rules, record.clone()));
        let sources = Arc::new(Sources::new(source));
        let engine = Engine::new(
            policy,
            holds_sets,
            record.clone(),
            materializer.clone(),
            roots.clone(),
            sources.clone(),
            metrics.clone(),
        );
        let leases = lease::LeaseContext {
            record: record.clone(),
            roots: roots.clone(),
            sources: sources.clone(),
            metrics: metrics.clone(),
        };
        let service = Service::new(
            record.clone(),
            materializer,
            roots.clone(),
            sources.clone(),
            Some(engine.clone()),
        );
        Ok(Self {
            linger: BesOptions::default().linger,
            leases,
            record,
            metrics,
            engine,
            service,
            roots,
            sources,
        })
    }

    /// Other policies, for builds from now on.
    pub fn reload(&self, policy: Policy, rules: RootRules, source: SourceRule) {
        self.engine.set_policy(policy);
        self.roots.set_rules(rules);
        self.sources.set_rule(source);
    }

    /// Whether outputs may be brought to a running Bazel's output base.
    ///
    /// # Errors
    /// When a rule forbids it, or the directory cannot be seen from here.
    pub(crate) fn allows(&self, output_base: &Path) -> Result<(), RootError> {
        self.roots.allows(output_base)
    }

    /// A directory that is gone and that outputs of the last days lay in, with Bazel's action cache still there: then Bazel does
    /// not name these outputs if it downloads nothing. Walks over the record, and blocks.
    pub(crate) fn deleted_directory(&self, output_base: &Path) -> Option<PathBuf> {
        let rules = self.roots.rules();
        let output_base = output_base.to_str().map(|base| rules.translate(base))?;
        let mut entries = std::fs::read_dir(output_base.join("action_cache")).ok()?;
        entries.next()?.ok()?;
        let roots = self.record.roots().into_iter();
        roots
            .filter(|(_, root)| {
                // Of an earlier directory of this name, nothing is Bazel's any more.
                let found = std::fs::metadata(&root.path);
                Path::new(&root.path).starts_with(&output_base)
                    && found.is_ok_and(|found| (found.dev(), found.ino()) == (root.device, root.inode))
            })
            .find_map(|(id, root)| self.deleted_directory_in(id, Path::new(&root.path)))
    }

    fn deleted_directory_in(&self, root: RootId, exec_root: &Path) -> Option<PathBuf> {
        let oldest = now_ms().saturating_sub(REMEMBERED_MS);
        let oldest = u64::try_from(oldest).unwrap_or_default();
        let mut looked_at: HashMap<String, bool> = HashMap::new();
        // Of each target, what the newest build has named, and of that, a directory that is gone. What it had before, such as a
        // directory in a tree, Bazel itself has removed.
        let mut targets: HashMap<String, (u64, Option<PathBuf>)> = HashMap::new();
        self.record.see_outputs_after(root, BUILD_TREE, |row| {
            let (label, version) = (row.label(), row.version());
            // Versions are about the time in milliseconds.
            if version < oldest || label.is_empty() {
                return ControlFlow::Continue(());
            }
            if !targets.contains_key(label) {
                targets.insert(label.to_owned(), (version, None));
            }
            let Some((newest, gone)) = targets.get_mut(label) else {
                return ControlFlow::Continue(());
            };
            if version > *newest {
                (*newest, *gone) = (version, None);
            }
            let is_there = version == *newest && gone.is_none() && row.state() == OutputState::Materialized;
            let path = is_there.then(|| row.path()).flatten();
            let Some(directory) = path.as_ref().and_then(|path| path.parent()) else {
                return ControlFlow::Continue(());
            };
            let is_gone = match looked_at.get(directory) {
                Some(is_gone) => *is_gone,
                None => {
                    let is_gone = !exec_root.join(directory).exists();
                    looked_at.insert(directory.to_owned(), is_gone);
                    is_gone
                }
            };
            if is_gone {
                *gone = Some(exec_root.join(directory));
            }
            ControlFlow::Continue(())
        });
        targets.into_values().find_map(|(_, gone)| gone)
    }

    /// Whether Bazel's action cache may be read.
    pub(crate) fn reads_action_cache(&self) -> bool {
        !self.roots.rules().no_action_cache
    }

    /// Whether the cache that a build with this command line uses answers us.
    ///
    /// # Errors
    /// When it uses none, one that is not allowed, or one that does not answer.
    pub(crate) async fn reaches_cache(
        &self,
        line: &CommandLine,
        directories: &BuildDirectories,
    ) -> Result<(), SourceError> {
        let cache = self.sources.of_build(Some(line), directories)?;
        Ok(cache.probe().await?)
    }

    /// With another time for which settled builds are remembered, for clients that come back to their stream.
    pub(crate) fn with_linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self.engine.linger(linger);
        self
    }

    /// The event service in front of the engine, and of the upstream service if there is one.
    pub fn events(
        &self,
        hold: HoldPolicy,
        journal: Option<Journal>,
        upstream: Option<Upstream>,
        limits: BesLimits,
    ) -> BesService {
        let (metrics, sources) = (self.metrics.clone(), Arc::clone(&self.sources));
        let decoders: Decoders = Arc::new(move || {
            let metrics = metrics.clone();
            let mut decoder = bep::Decoder::new(Some(sources.digest_function()));
            Box::new(move |bytes| {
                decoder
                    .decode(bytes)
                    .inspect_err(|_| metrics.fault("undecodable_event"))
            })
        });
        let options = BesOptions {
            hold,
            limits,
            linger: self.linger,
            ..BesOptions::default()
        };
        let service = BesService::new(
            Arc::new(self.engine.clone()),
            decoders,
            journal,
            upstream,
            options,
        );
        self.metrics.also("bes", service.counting());
        service
    }
}
