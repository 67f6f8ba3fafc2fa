//! What every command that downloads outputs needs.

use std::{io, path::Path, sync::Arc, time::Duration};

use super::deleted::{self, Deleted};
use crate::{
    bep::{self, event::CommandLine},
    bes::{BesOptions, BesService, HoldPolicy, Upstream, limits::BesLimits},
    builds::Decoders,
    control::Service,
    digest::DigestFunction,
    invocation::{Engine, policy::Policy},
    journal::Journal,
    lease,
    materialize::{MaterializeOptions, Materializer},
    metrics::Metrics,
    record::{InvocationState, Record},
    roots::{RootError, RootRules, Roots},
    sources::{BuildDirectories, SourceError, SourceRule, Sources},
    telemetry::{Collector, Exporter, TraceParent},
    transport::RemoteError,
};

/// What Bazel's commands end with when the user has interrupted them.
const INTERRUPTED: i32 = 8;

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

    /// Exports traces of builds, which are all a part of the `parent`, and the metrics. To be called before there are any builds.
    ///
    /// # Errors
    /// When the settings cannot work, such as a certificate that cannot be read.
    pub(crate) fn export(
        &self,
        collector: &Collector,
        parent: Option<TraceParent>,
    ) -> Result<Exporter, RemoteError> {
        let exporter = Exporter::start(collector, parent, &self.metrics)?;
        self.engine.trace(exporter.traces());
        Ok(exporter)
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

    /// See [`deleted::look`].
    pub(crate) fn deleted(
        &self,
        output_base: &Path,
        function: Option<DigestFunction>,
        exec_root: Option<&str>,
    ) -> Deleted {
        let Some(base) = output_base.to_str() else {
            return Deleted::Nothing;
        };
        let base = self.roots.rules().translate(base);
        let function = function.unwrap_or_else(|| self.sources.digest_function());
        match deleted::look(&base, function, exec_root) {
            Deleted::Nothing if self.was_interrupted(&base) => Deleted::Unknown,
            deleted => deleted,
        }
    }

    /// Whether the newest recorded build of an output base was interrupted.
    fn was_interrupted(&self, output_base: &Path) -> bool {
        let roots = self.record.roots().into_iter();
        let of_base = roots.filter(|(_, row)| Path::new(&row.path).starts_with(output_base));
        let builds = of_base.filter_map(|(id, _)| self.record.newest_invocation(id));
        let newest = builds.max_by_key(|build| build.started_ms);
        newest.is_some_and(|build| {
            build.state == InvocationState::Interrupted || build.finished && build.exit_code == INTERRUPTED
        })
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
