//! The listeners and background tasks, from their start to their end.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    ControlListener, DaemonError, EventListeners, Retention, Services,
    background::background,
    control, events, evicting, idle,
    recovery::{interrupt_stale, recover, set_aside, sweep},
    retention,
};
use crate::{
    access::{ListenerRules, Listening},
    bes::{self, BesAddress, BesListener, HoldPolicy, Upstream, counted::CountedLayer},
    config::Limits,
    control::Admin,
    journal::{Journal, JournalOptions},
    lease::{self, LeaseOptions, LostOutputs},
    materialize::place::Mark,
    metrics::Metrics,
    notify::Backlog,
    page,
    stage::Reach,
};

/// How long calls may go on once the listeners are closed.
const CLOSING: Duration = Duration::from_secs(10);

/// How long builds that have all their outputs may take after that to be recorded as settled.
const CONCLUDING: Duration = Duration::from_secs(1);

/// How long the record and the output trees may take after that: a little longer than the record gives itself.
const TIDYING: Duration = Duration::from_secs(11);

/// A port for health, metrics and the status page.
pub struct AdminListener {
    /// Where it listens.
    pub listener: TcpListener,
    /// Whom it lets in.
    pub access: ListenerRules,
}

/// The daemon's listeners and background tasks; by default it has none.
#[derive(Default)]
pub struct DaemonOptions {
    /// Where the journal is kept; without one, nothing acknowledged outlives the process.
    pub journal_dir: Option<PathBuf>,
    /// Whether the journal is synced to disk before events are acknowledged.
    pub durable: bool,
    /// How acknowledgements are delayed.
    pub hold: HoldPolicy,
    /// Where events are forwarded to.
    pub upstream: Option<Upstream>,
    /// Where build tools connect. Without any, they connect where [`Daemon::event_listeners`] opens listeners, and the journal
    /// is gone on with when the first one is open.
    pub bes: Vec<BesListener>,
    /// Where the control API is served.
    pub control: Option<BesListener>,
    /// Where the admin port is served.
    pub admin: Option<AdminListener>,
    /// What is kept of old builds; everything, if it is not set.
    pub retention: Option<Retention>,
    /// Below twice this much free space, outputs that the cache still has are removed; never, if it is not set.
    pub auto_evict: Option<Mark>,
    /// Whether and how outputs that were not downloaded are kept in the cache.
    pub leases: Option<LeaseOptions>,
    /// After how much idleness the daemon ends by itself.
    pub idle_timeout: Option<Duration>,
    /// What clients may ask for. Those of one build have no effect here: the policy has these.
    pub limits: Limits,
    /// Notifications that are under way; a daemon that has some is not idle.
    pub notifications: Option<Backlog>,
}

/// A daemon with open listeners.
pub struct Daemon {
    /// Where build tools connect, with the ports that the system chose.
    pub bes: Vec<BesAddress>,
    /// The admin port's address.
    pub admin: Option<SocketAddr>,
    shutdown: CancellationToken,
    tasks: JoinSet<Result<(), DaemonError>>,
    services: Services,
    /// How requests of the control API are counted.
    requests: CountedLayer,
    listeners: EventListeners,
}

/// The build never suffers: without a journal a crash costs a re-derivation, no more.
fn open_journal(dir: &Path, options: JournalOptions, metrics: &Metrics) -> Option<Journal> {
    Journal::open(dir, options)
        .inspect_err(|error| {
            tracing::error!("continuing without a journal: {error}");
            metrics.fault("journal");
        })
        .ok()
}

/// Where build tools' events and the admin port's callers come in.
fn addresses(options: &DaemonOptions) -> Result<(Vec<BesAddress>, Option<SocketAddr>), DaemonError> {
    let bes = options.bes.iter().map(BesListener::address);
    let admin = options.admin.as_ref().map(|admin| admin.listener.local_addr());
    Ok((bes.collect::<Result<_, _>>()?, admin.transpose()?))
}

/// Serves the admin port, with the status page on it.
async fn serve_admin(
    port: Admin,
    services: Services,
    admin: AdminListener,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let service = services.service.for_listener(Reach::Anywhere);
    let pages = page::router(service, services.metrics, admin.access.clone(), stop.clone());
    port.serve(Listening::Tcp(admin.listener), admin.access, pages, stop)
        .await;
    Ok(())
}

/// What is done beside serving.
struct Upkeep {
    retention: Option<Retention>,
    auto_evict: Option<Mark>,
    leases: Option<LeaseOptions>,
}

impl Upkeep {
    fn start(
        self,
        tasks: &mut JoinSet<Result<(), DaemonError>>,
        services: &Services,
        journal: Option<Journal>,
        lost: LostOutputs,
        shutdown: &CancellationToken,
    ) {
        if let Some(retention) = self.retention {
            let (record, roots) = (services.record.clone(), services.leases.roots.clone());
            let forgetting = retention::keep(record, journal, roots, retention, shutdown.clone());
            tasks.spawn(background("deleting old builds", forgetting, shutdown.clone()));
        }
        if let Some(mark) = self.auto_evict {
            let freeing = evicting::keep_free(services.clone(), mark, shutdown.clone());
            tasks.spawn(background("freeing disk space", freeing, shutdown.clone()));
        }
        if let Some(leasing) = self.leases {
            let keeping = lease::keep(services.leases.clone(), leasing, lost, shutdown.clone());
            tasks.spawn(background("renewing leases", keeping, shutdown.clone()));
        }
    }
}

impl Daemon {
    /// Sweeps what dead processes left in the known output roots, goes on from the journal, and opens the listeners.
    ///
    /// # Errors
    /// When a listener cannot be opened.
    pub async fn start(mut services: Services, options: DaemonOptions) -> Result<Self, DaemonError> {
        let limits = options.limits.bes;
        let (bes, admin) = addresses(&options)?;
        sweep(&services.record).await;
        if let Some(dir) = &options.journal_dir {
            services.service = services.service.with_journal(dir.clone());
        }
        let lost = LostOutputs::default();
        services.service = services.service.with_lost_outputs(lost.clone());
        let journal_options = JournalOptions {
            durable: options.durable,
            most: limits.journal,
        };
        let journal = options
            .journal_dir
            .and_then(|dir| open_journal(&dir, journal_options, &services.metrics));
        let events = services.events(options.hold, journal.clone(), options.upstream, limits);
        let requests = CountedLayer {
            budget: events.budget(),
            most: options.limits.control_message,
        };
        interrupt_stale(&services.record).await;
        if let Some(journal) = &journal {
            set_aside(&services, journal).await;
        }
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let stop = shutdown.clone();
        let (listeners, opened) =
            EventListeners::new(services.clone(), journal.clone(), options.hold, limits);
        if options.bes.is_empty() {
            tasks.spawn(async move { events::serve(opened, stop).await });
        } else {
            recover(&events, journal.as_ref()).await;
            let service = events.clone();
            tasks.spawn(async move { Ok(bes::serve(service, options.bes, stop).await?) });
        }
        if let Some(listener) = options.control {
            let (service, stop) = (services.service.clone(), shutdown.clone());
            let requests = requests.clone();
            tasks.spawn(async move { control::serve_unix(service, listener, requests, stop).await });
        }
        let port = Admin::new(services.metrics.clone(), services.record.clone());
        if let Some(admin) = options.admin {
            tasks.spawn(serve_admin(
                port.clone(),
                services.clone(),
                admin,
                shutdown.clone(),
            ));
        }
        let upkeep = Upkeep {
            retention: options.retention,
            auto_evict: options.auto_evict,
            leases: options.leases,
        };
        upkeep.start(&mut tasks, &services, journal, lost, &shutdown);
        let work = idle::Work {
            services: services.clone(),
            events: events.clone(),
            notifications: options.notifications,
        };
        let (timeout, stop) = (options.idle_timeout, shutdown.clone());
        let watching = async move { idle::watch(&work, timeout, &stop).await };
        tasks.spawn(background("watching for idle time", watching, shutdown.clone()));
        port.set_ready(true);
        Ok(Self {
            bes,
            admin,
            shutdown,
            tasks,
            services,
            requests,
            listeners,
        })
    }

    /// For opening further listeners for build tools' events, if the daemon was started without any.
    pub(crate) fn event_listeners(&self) -> EventListeners {
        self.listeners.clone()
    }

    /// Cancelled, it closes the listeners.
    pub fn shutdown_token(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Opens a TCP port for the control API.
    pub(crate) fn open_control(&mut self, control: ControlListener) {
        let (service, stop) = (self.services.service.clone(), self.shutdown.clone());
        let requests = self.requests.clone();
        self.tasks
            .spawn(async move { control::serve_tcp(service, control, requests, stop).await });
    }

    /// Serves until the token is cancelled or a listener fails; then lets everybody go and writes the record.
    ///
    /// # Errors
    /// When a listener failed.
    pub async fn join(mut self) -> Result<(), DaemonError> {
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
            if let Err(error) = ended.unwrap_or_else(|e| Err(e.into())) {
                result = Err(error);
            }
            self.shutdown.cancel();
        }
        self.services.engine.conclude(CONCLUDING).await;
        let (record, service) = (self.services.record.clone(), self.services.service.clone());
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
