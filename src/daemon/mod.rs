//! The daemon: connects the rooms and opens their listeners.
//!
//! [`Rooms`] is what every command that downloads outputs needs; [`Daemon`] adds the listeners: the event service, the
//! control socket, the admin port. On shutdown, a token closes the listeners, waiting clients are released, files that
//! are being placed are finished or dropped, and the record is written.

mod activation;
mod control;
mod events;
mod habit;
mod idle;
mod memory;
mod retention;
#[cfg(test)]
mod tests;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use self::habit::habit;
pub use self::{
    activation::{Inherited, notify_ready, notify_stopping},
    control::ControlDoor,
    events::{EventDoor, EventDoors},
    retention::{Plan as RetentionPlan, Retention},
};
use crate::{
    bep::{self, event::CommandLine},
    bes::{
        self, BesAddress, BesListener, BesOptions, BesService, HoldPolicy, Upstream, counted::CountedLayer,
        limits::BesLimits,
    },
    builds::Decoders,
    control::{Admin, Service},
    doors::{Door, Listening},
    invocation::{Engine, policy::Policy},
    journal::{Journal, JournalOptions, SetAside},
    lease::{self, LeaseOptions, Leases},
    materialize::{MaterializeOptions, Materializer, place::OutputRoot},
    metrics::Metrics,
    notify::Backlog,
    record::{InvocationState, Record},
    roots::{RootRules, Roots},
    sources::{BuildDirectories, SourceRule, Sources},
};

/// How long calls may go on once the doors are closed.
const CLOSING: Duration = Duration::from_secs(10);

/// How long builds that have all their outputs may take after that to be recorded as settled.
const CONCLUDING: Duration = Duration::from_secs(1);

/// How long the record and the output trees may take after that: a little longer than the record gives itself.
const TIDYING: Duration = Duration::from_secs(11);

/// The services behind the listeners. Cheap to clone.
#[derive(Clone)]
pub struct Rooms {
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
    leases: lease::Rooms,
    /// How long settled builds are remembered for clients that come back.
    linger: Duration,
}

impl Rooms {
    /// Puts the rooms together, on the current tokio runtime. `holds_sets` is for [`Engine::new`].
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
        let leases = lease::Rooms {
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

    /// Whether outputs may be brought to an exec root there.
    ///
    /// # Errors
    /// In words, which rule forbids it.
    pub fn allows(&self, exec_root: &Path) -> Result<(), String> {
        self.roots.allows(exec_root).map_err(|e| e.to_string())
    }

    /// Whether the cache that a build with this command line uses answers us.
    ///
    /// # Errors
    /// In words: it uses none, one that is not allowed, or one that does not answer.
    pub async fn reaches_cache(
        &self,
        line: &CommandLine,
        directories: &BuildDirectories,
    ) -> Result<(), String> {
        let cache = self.sources.of_build(Some(line), directories);
        cache
            .map_err(|e| e.to_string())?
            .probe()
            .await
            .map_err(|e| e.to_string())
    }

    /// With another time for which settled builds are remembered, for clients that come back to their stream.
    #[must_use]
    pub fn with_linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self.engine.linger(linger);
        self
    }

    /// The event service in front of the engine, and of the upstream service if there is one.
    #[must_use]
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
                decoder.decode(bytes).map_err(|e| {
                    metrics.fault("undecodable_event");
                    e.to_string()
                })
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

/// A port for health and metrics.
pub struct AdminDoor {
    /// Where it listens.
    pub listener: TcpListener,
    /// Whom it lets in.
    pub door: Door,
}

/// The daemon's listeners and background tasks.
pub struct DaemonOptions {
    /// Where the journal is kept; without one, nothing acknowledged outlives the process.
    pub journal_dir: Option<PathBuf>,
    /// Whether the journal is synced to disk before events are acknowledged.
    pub durable: bool,
    /// How acknowledgements are delayed.
    pub hold: HoldPolicy,
    /// Where events are forwarded to.
    pub upstream: Option<Upstream>,
    /// Where build tools connect. Without any, they connect where [`Daemon::event_doors`] opens doors, and the journal
    /// is gone on with when the first one is open.
    pub bes: Vec<BesListener>,
    /// Where the control API is served.
    pub control: Option<BesListener>,
    /// Where the admin port is served.
    pub admin: Option<AdminDoor>,
    /// What is kept of old builds; everything, if not told.
    pub retention: Option<Retention>,
    /// Whether and how outputs that were not downloaded are kept in the cache.
    pub leases: Option<LeaseOptions>,
    /// After how much idleness the daemon ends by itself.
    pub idle_timeout: Option<Duration>,
    /// What clients of the event service may ask for.
    pub limits: BesLimits,
    /// Bytes of one request of the control API.
    pub control_message: usize,
    /// Notifications that are under way; a daemon that has some is not idle.
    pub notifications: Option<Backlog>,
}

/// A daemon with open doors.
pub struct Daemon {
    /// Where build tools connect, with the ports that the system chose.
    pub bes: Vec<BesAddress>,
    /// The admin port's address.
    pub admin: Option<SocketAddr>,
    shutdown: CancellationToken,
    tasks: JoinSet<Result<(), String>>,
    rooms: Rooms,
    /// How requests of the control API are counted.
    requests: CountedLayer,
    doors: EventDoors,
}

impl Daemon {
    /// Sweeps what dead processes left in the known output roots, goes on from the journal, and opens the doors.
    ///
    /// # Errors
    /// In words, what could not be opened.
    pub async fn start(mut rooms: Rooms, options: DaemonOptions) -> Result<Self, String> {
        sweep(&rooms.record).await;
        if let Some(dir) = &options.journal_dir {
            rooms.service = rooms.service.with_journal(dir.clone());
        }
        let leases = Leases::default();
        rooms.service = rooms.service.with_leases(leases.clone());
        let journal = options.journal_dir.and_then(|dir| {
            let journal_options = JournalOptions {
                durable: options.durable,
                most: options.limits.journal,
            };
            match Journal::open(&dir, journal_options) {
                Ok(journal) => Some(journal),
                Err(error) => {
                    // The build never suffers: without a journal a crash costs a re-derivation, no more.
                    tracing::error!("continuing without a journal: {error}");
                    rooms.metrics.fault("journal");
                    None
                }
            }
        });
        let events = rooms.events(options.hold, journal.clone(), options.upstream, options.limits);
        let requests = CountedLayer {
            budget: events.budget(),
            most: options.control_message,
        };
        let bes = options
            .bes
            .iter()
            .map(|listener| listener.address().map_err(|e| e.to_string()))
            .collect::<Result<Vec<_>, _>>()?;
        let admin = options
            .admin
            .as_ref()
            .map(|admin| admin.listener.local_addr())
            .transpose()
            .map_err(|e| e.to_string())?;
        interrupt_stale(&rooms.record).await;
        if let Some(journal) = &journal {
            set_aside(&rooms, journal).await;
        }
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let stop = shutdown.clone();
        let (doors, opened) = EventDoors::new(rooms.clone(), journal.clone(), options.hold, options.limits);
        if options.bes.is_empty() {
            tasks.spawn(async move { events::serve(opened, stop).await });
        } else {
            recover(&events, journal.as_ref()).await;
            let service = events.clone();
            tasks.spawn(async move {
                bes::serve(service, options.bes, stop)
                    .await
                    .map_err(|e| e.to_string())
            });
        }
        if let Some(listener) = options.control {
            let (service, stop) = (rooms.service.clone(), shutdown.clone());
            let requests = requests.clone();
            tasks.spawn(async move { control::serve_unix(service, listener, requests, stop).await });
        }
        let page = Admin::new(rooms.metrics.clone(), rooms.record.clone());
        if let Some(admin) = options.admin {
            let (page, stop) = (page.clone(), shutdown.clone());
            tasks.spawn(async move {
                page.serve(Listening::Tcp(admin.listener), admin.door, stop).await;
                Ok(())
            });
        }
        if let Some(retention) = options.retention {
            let (record, roots) = (rooms.record.clone(), rooms.leases.roots.clone());
            let forgetting = retention::keep(record, journal, roots, retention, shutdown.clone());
            tasks.spawn(habit("deleting old builds", forgetting, shutdown.clone()));
        }
        if let Some(leasing) = options.leases {
            let keeping = lease::keep(rooms.leases.clone(), leasing, leases, shutdown.clone());
            tasks.spawn(habit("renewing leases", keeping, shutdown.clone()));
        }
        let work = idle::Work {
            rooms: rooms.clone(),
            events: events.clone(),
            notifications: options.notifications,
        };
        let (timeout, stop) = (options.idle_timeout, shutdown.clone());
        let watching = async move { idle::watch(&work, timeout, &stop).await };
        tasks.spawn(habit("watching for idle time", watching, shutdown.clone()));
        page.set_ready(true);
        Ok(Self {
            bes,
            admin,
            shutdown,
            tasks,
            rooms,
            requests,
            doors,
        })
    }

    /// For opening further doors for build tools' events, if the daemon was started without any.
    #[must_use]
    pub fn event_doors(&self) -> EventDoors {
        self.doors.clone()
    }

    /// Cancelled, it closes the doors.
    #[must_use]
    pub fn shutdown_token(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Opens a TCP port for the control API.
    pub fn open_control(&mut self, door: ControlDoor) {
        let (service, stop) = (self.rooms.service.clone(), self.shutdown.clone());
        let requests = self.requests.clone();
        self.tasks
            .spawn(async move { control::serve_tcp(service, door, requests, stop).await });
    }

    /// Serves until the token is cancelled or a door fails; then lets everybody go and writes the record.
    ///
    /// # Errors
    /// In words, which door failed.
    pub async fn join(mut self) -> Result<(), String> {
        let mut result = Ok(());
        loop {
            let next = if self.shutdown.is_cancelled() {
                let Ok(next) = tokio::time::timeout(CLOSING, self.tasks.join_next()).await else {
                    tracing::warn!("cancelled calls that did not end in time");
                    self.tasks.abort_all();
                    break;
                };
                next
            } else {
                tokio::select! {
                    next = self.tasks.join_next() => next,
                    () = self.shutdown.cancelled() => continue,
                }
            };
            let Some(ended) = next else { break };
            let ended = ended.unwrap_or_else(|e| Err(format!("a task of the daemon panicked: {e}")));
            if let Err(reason) = ended {
                result = Err(reason);
            }
            self.shutdown.cancel();
        }
        self.rooms.engine.conclude(CONCLUDING).await;
        let (record, service) = (self.rooms.record.clone(), self.rooms.service.clone());
        // Side by side: an output tree may hang, which is no reason to write no record.
        let tidying = [
            tokio::task::spawn_blocking(move || record.close()),
            tokio::task::spawn_blocking(move || service.let_go()),
        ];
        if tokio::time::timeout(TIDYING, futures::future::join_all(tidying))
            .await
            .is_err()
        {
            tracing::warn!("the record or an output tree was not released in time");
        }
        result
    }
}

/// Dropped in the midst of a start that is called off: no journal was the end of it.
struct Unharmed(Option<Journal>);

impl Unharmed {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Unharmed {
    fn drop(&mut self) {
        if let Some(journal) = &self.0 {
            journal.forget_replays();
        }
    }
}

/// Goes on from the journal.
async fn recover(events: &BesService, journal: Option<&Journal>) {
    // Anyone who ends the daemon while it starts has not died of a build.
    let unharmed = Unharmed(journal.cloned());
    let recovered = events.recover().await;
    unharmed.done();
    match recovered {
        Ok(0) => {}
        Ok(streams) => tracing::info!(streams, "resuming builds that were not settled"),
        Err(error) => tracing::error!("failed to read the journal: {error}"),
    }
}

/// Sets aside journals that the daemon died of, and says so in the log and with their builds.
async fn set_aside(rooms: &Rooms, journal: &Journal) {
    let (rooms, journal) = (rooms.clone(), journal.clone());
    let done = tokio::task::spawn_blocking(move || {
        let all = match journal.set_aside() {
            Ok(all) => all,
            Err(error) => return tracing::error!("failed to read the journal: {error}"),
        };
        for SetAside { key, message } in all {
            tracing::error!("not resuming build {key}: {message}");
            rooms.metrics.fault("journal");
            if let Some(mut row) = rooms.record.invocation(&key.invocation_id)
                && row.build_id == key.build_id
            {
                row.errors.push(message);
                rooms.record.put_invocation(&row);
            }
        }
    });
    if done.await.is_err() {
        tracing::error!("setting journals aside panicked; this is a bug in outhaul");
    }
}

/// Removes temporary files that dead processes left in the output roots that the record knows.
async fn sweep(record: &Record) {
    let roots: Vec<PathBuf> = record
        .roots()
        .into_iter()
        .map(|(_, row)| PathBuf::from(row.path))
        .collect();
    let swept = tokio::task::spawn_blocking(move || {
        for root in roots {
            match OutputRoot::open(&root, false).and_then(|root| root.sweep()) {
                Ok(0) => {}
                Ok(entries) => tracing::info!(root = %root.display(), entries, "swept temporary files"),
                Err(error) => {
                    tracing::debug!(root = %root.display(), "failed to sweep temporary files: {error}")
                }
            }
        }
    });
    if swept.await.is_err_and(|e| e.is_panic()) {
        tracing::error!("sweeping panicked; this is a bug in outhaul");
    }
}

/// Invocations that a process before this one did not see settle have broken off, unless the journal goes on with
/// them now.
async fn interrupt_stale(record: &Record) {
    let record = record.clone();
    let marked = tokio::task::spawn_blocking(move || {
        for mut row in record.invocations(usize::MAX) {
            if !row.state.is_over() {
                row.state = InvocationState::Interrupted;
                record.put_invocation(&row);
            }
        }
    });
    if marked.await.is_err_and(|e| e.is_panic()) {
        tracing::error!("looking for interrupted builds panicked; this is a bug in outhaul");
    }
}
