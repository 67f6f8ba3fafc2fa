//! `outhaul serve`: the daemon.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::anyhow;
use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    ending::Signals,
    exit::{self, Failure},
    record::open_record,
    reload::{Hangup, ListenerAccess, Reload, Settings},
    runtime,
};
use crate::{
    access::{ListenerRules, Rules},
    bes::{BesAddress, BesListener},
    config::{
        AccessArgs, BES_LISTEN, CacheArgs, ConfigError, ControlListenArgs, ControlPort, HoldArgs, LeaseArgs,
        LimitArgs, NotifyArgs, OtlpArgs, PlaceArgs, SelectionArgs, StateArgs, UpstreamArgs,
    },
    daemon::{
        AdminListener, ControlListener, Daemon, DaemonOptions, Inherited, Retention, Services, notify_ready,
        notify_stopping,
    },
    invocation::policy::Policy,
    materialize::{MaterializeOptions, place::Mark},
    notify::{Notifier, NotifyOptions},
    record::Record,
    roots::{Destination, RootRules},
    sources::SourceRule,
    stage::Archives,
    telemetry::{Collector, Exporter},
    transport::without_user_info,
    units::{parse_age, parse_duration, parse_size},
};

/// Where the admin port is unless told otherwise.
const ADMIN_LISTEN: &str = "127.0.0.1:8986";

/// How long a record that is being opened when the daemon is told to end is waited for: ends in the midst of it are
/// counted, and after some of them in a row it is taken for the reason.
const OPENING: Duration = Duration::from_secs(5);
/// How long blocking work that is under way at the very end may take.
const LEAVING: Duration = Duration::from_secs(1);

/// Arguments of `outhaul serve`.
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Where build tools send their events: IP:PORT or unix:PATH (repeatable); by default 127.0.0.1:8985, or the
    /// sockets that the service manager passes
    #[arg(long, value_name = "ADDR", env = "OUTHAUL_BES_LISTEN", value_delimiter = ',')]
    bes_listen: Vec<String>,

    /// Address to serve /healthz, /readyz and /metrics on: IP:PORT, or `none`
    #[arg(long, value_name = "ADDR", env = "OUTHAUL_ADMIN_LISTEN", default_value = ADMIN_LISTEN)]
    admin_listen: String,

    /// Exit after this long without a build; for daemons started by socket activation
    #[arg(long, value_name = "DURATION", env = "OUTHAUL_IDLE_TIMEOUT")]
    idle_timeout: Option<String>,

    /// How long to remember a settled build's stream for a client that reconnects; each takes some memory
    #[arg(long, value_name = "DURATION", env = "OUTHAUL_LINGER", default_value = "5m")]
    linger: String,

    /// Sync the journal to disk before acknowledging an event, so that a power failure loses nothing either
    #[arg(long, env = "OUTHAUL_DURABLE")]
    durable: bool,

    /// How long to keep settled builds and their journals
    #[arg(
        long,
        value_name = "DURATION",
        env = "OUTHAUL_RETENTION_AGE",
        default_value = "14d"
    )]
    retention_age: String,

    /// Bytes of journals to keep; the oldest are deleted first
    #[arg(
        long,
        value_name = "SIZE",
        env = "OUTHAUL_RETENTION_SIZE",
        default_value = "1GiB"
    )]
    retention_size: String,

    /// Remove outputs that the cache still has, as `outhaul evict` does, while less than twice --min-free-space is free
    #[arg(long, env = "OUTHAUL_AUTO_EVICT")]
    auto_evict: bool,

    #[command(flatten)]
    pub(super) access: AccessArgs,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    pub(super) control: ControlListenArgs,

    #[command(flatten)]
    pub(super) hold: HoldArgs,

    #[command(flatten)]
    pub(super) selection: SelectionArgs,

    #[command(flatten)]
    pub(super) place: PlaceArgs,

    #[command(flatten)]
    pub(super) cache: CacheArgs,

    #[command(flatten)]
    lease: LeaseArgs,

    #[command(flatten)]
    pub(super) upstream: UpstreamArgs,

    #[command(flatten)]
    limits: LimitArgs,

    #[command(flatten)]
    notify: NotifyArgs,

    #[command(flatten)]
    otlp: OtlpArgs,
}

pub(super) fn main(args: ServeArgs) -> Result<u8, Failure> {
    // Before the runtime: the environment is changed, which other threads must not see halfway.
    let inherited = Inherited::take().map_err(|e| Failure::usage(format!("inherited socket: {e}")))?;
    let runtime = runtime()?;
    let ended = runtime.block_on(serve(args, inherited));
    // A thread that hangs in a file system of somebody else's is not waited for.
    runtime.shutdown_timeout(LEAVING);
    ended
}

async fn serve(mut args: ServeArgs, inherited: Inherited) -> Result<u8, Failure> {
    // What would end the process is heeded from here on.
    let hangup = Hangup::listen()?;
    let shutdown = CancellationToken::new();
    let at_once = Signals::listen()?.heed(shutdown.clone());
    let settings = Settings::at_start();
    let mut checked = args.checked()?;
    // Anyone who ends it during the start need not wait for that: nothing was promised to anybody yet.
    let opening = open_record(&checked.state_dir);
    let Some(record) = unless(ended_for(&shutdown, &at_once), opening).await else {
        tracing::warn!("the record is still being opened");
        return Ok(exit::OK);
    };
    let record = record?;
    if shutdown.is_cancelled() {
        return ended_early(record).await;
    }
    let (access, addresses, control) = args.open(&mut checked, inherited).await?;
    let mut options = checked.options;
    let upstream = options.upstream.clone();
    let mut services = Services::open(
        record.clone(),
        checked.policy,
        checked.rules,
        checked.source,
        checked.placing,
        args.upstream.rewrite_uris,
    )?
    .with_linger(checked.linger);
    services.service = services.service.with_archives(checked.archives);
    // Before the daemon starts: what it takes up from the journal is reported as well.
    let notifier = (!checked.notify.is_empty())
        .then(|| Notifier::start(checked.notify, services.engine.subscribe(), &services.metrics))
        .transpose()
        .map_err(|e| Failure::usage(format!("--notify-url: {e}")))?;
    let exporter = (checked.otlp.as_ref())
        .map(|collector| services.export(collector, None))
        .transpose()
        .map_err(Failure::usage)?;
    options.notifications = notifier.as_ref().map(Notifier::backlog);
    let starting = Daemon::start(services.clone(), options);
    let Some(started) = unless(shutdown.cancelled(), starting).await else {
        return ended_early(record).await;
    };
    let mut daemon = started.map_err(Failure::failed)?;
    announce(&daemon, &access);
    if let Some(control) = control {
        let address = control.listener.local_addr()?;
        daemon.open_control(control);
        tracing::info!("control API on {address}");
    }
    tracing::info!("control socket {}", checked.socket.display());
    if args.cache.names_a_cache() {
        probe(&args.cache);
    }
    notify_ready();

    tokio::spawn(end_together(daemon.shutdown_token(), shutdown.clone()));
    let reload = Reload {
        settings,
        access,
        addresses,
        admin: checked.admin,
        control: checked.control.map(|port| port.address),
        upstream,
        services,
    };
    tokio::spawn(hangup.heed(reload, shutdown));
    let ending = async {
        let ended = daemon.join().await;
        close(notifier, exporter).await;
        ended
    };
    tokio::select! {
        ended = ending => ended.map(|()| exit::OK).map_err(Failure::failed),
        () = at_once.cancelled() => Err(Failure::failed("exited before cleanup was complete")),
    }
}

/// Sends what receivers and the collector do not have yet, for a few seconds.
async fn close(notifier: Option<Notifier>, exporter: Option<Exporter>) {
    if let Some(notifier) = notifier {
        notifier.close().await;
    }
    if let Some(exporter) = exporter
        && let Some(reason) = exporter.close().await
    {
        tracing::warn!("{reason}");
    }
}

/// What the flags come to.
struct Checked {
    /// All but the listeners, and what is asked for at them.
    options: DaemonOptions,
    policy: Policy,
    rules: RootRules,
    placing: MaterializeOptions,
    source: SourceRule,
    notify: NotifyOptions,
    otlp: Option<Collector>,
    linger: Duration,
    state_dir: PathBuf,
    socket: PathBuf,
    addresses: Vec<BesAddress>,
    admin: Option<SocketAddr>,
    control: Option<ControlPort>,
    archives: Archives,
}

impl ServeArgs {
    /// Checks everything, before anything is opened.
    fn checked(&mut self) -> Result<Checked, ConfigError> {
        let hold = self.hold.policy(HoldArgs::TIMEOUT)?;
        let upstream = self.upstream.upstream(&mut self.cache, hold)?;
        let limits = self.limits.limits()?;
        let mut policy = self.selection.policy()?;
        policy.limits = limits.build;
        let rules = self.place.rules(Destination::ExecRoot)?;
        let placing = self.place.options()?;
        let source = self.cache.source_rule(false)?;
        let notify = self.notify.options()?;
        let otlp = self.otlp.collector()?;
        let state_dir = self.state.directory()?;
        let socket = self.state.socket()?;
        let control = self.control.port(&self.access, &self.cache.remote_cache)?;
        if self.auto_evict && placing.place.space == Mark::NOTHING {
            return Err(ConfigError::new(
                "--auto-evict",
                "has no effect with --min-free-space=0; name the space that is to stay free",
            ));
        }
        let idle_timeout = self.idle_timeout.as_deref().map(parse_duration).transpose();
        let idle_timeout = match idle_timeout {
            Ok(Some(Duration::ZERO)) => Err(anyhow!("must be greater than zero")),
            parsed => parsed,
        };
        let given = |flag: &str, text: &str| format!("{flag}={text}");
        let duration =
            |flag: &str, text: &str| parse_duration(text).map_err(|e| ConfigError::new(given(flag, text), e));
        let options = DaemonOptions {
            journal_dir: Some(state_dir.join("journal")),
            durable: self.durable,
            hold,
            upstream,
            limits,
            idle_timeout: idle_timeout.map_err(|e| ConfigError::new("--idle-timeout", e))?,
            retention: Some(Retention {
                max_age: parse_age(&self.retention_age)
                    .map_err(|e| ConfigError::new(given("--retention-age", &self.retention_age), e))?,
                journal_bytes: parse_size(&self.retention_size)
                    .map_err(|e| ConfigError::new(given("--retention-size", &self.retention_size), e))?,
            }),
            leases: self.lease.options()?,
            auto_evict: self.auto_evict.then_some(placing.place.space),
            ..DaemonOptions::default()
        };
        let linger = duration("--linger", &self.linger)?;
        let addresses = self.bes_listen.iter().map(|text| text.parse::<BesAddress>());
        let addresses = addresses
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| ConfigError::new("--bes-listen", e))?;
        let admin = match self.admin_listen.as_str() {
            "none" => None,
            text => Some(
                text.parse::<SocketAddr>()
                    .map_err(|e| ConfigError::new(given("--admin-listen", &without_user_info(text)), e))?,
            ),
        };
        self.guards(&addresses, admin)?;
        Ok(Checked {
            options,
            policy,
            rules,
            placing,
            source,
            notify,
            otlp,
            linger,
            state_dir,
            socket,
            addresses,
            admin,
            control,
            archives: self.cache.archives()?,
        })
    }

    /// Opens the listeners, all but the control port for the daemon. Also gives where build events are taken.
    async fn open(
        &self,
        checked: &mut Checked,
        inherited: Inherited,
    ) -> Result<(ListenerAccess, Vec<BesAddress>, Option<ControlListener>), Failure> {
        let bes = listeners(inherited, &checked.addresses)?;
        let addresses = bes.iter().map(BesListener::address);
        let addresses = addresses.collect::<Result<Vec<_>, _>>()?;
        // Those that were handed over could not be looked at before.
        let guards = self.guards(&addresses, checked.admin)?;
        let control = checked.control.as_ref();
        let access = ListenerAccess {
            bes: ListenerRules::new(guards.bes),
            admin: ListenerRules::new(guards.admin),
            control: control.map(|port| ListenerRules::new(port.rules.clone())),
        };
        let options = &mut checked.options;
        options.bes = bes
            .into_iter()
            .map(|b| b.with_rules(access.bes.clone()))
            .collect();
        let control = BesListener::bind(&BesAddress::Unix(checked.socket.clone()));
        options.control = Some(control.map_err(|e| Failure::usage(format!("--control-socket: {e}")))?);
        if let Some(address) = checked.admin {
            options.admin = Some(AdminListener {
                listener: bind("--admin-listen", address).await?,
                access: access.admin.clone(),
            });
        }
        let port = match checked.control.as_ref().zip(access.control.clone()) {
            Some((port, access)) => Some(ControlListener {
                listener: bind("--control-listen", port.address).await?,
                access,
                reach: port.reach.clone(),
            }),
            None => None,
        };
        Ok((access, addresses, port))
    }
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address)
        .await
        .map_err(|e| Failure::usage(format!("{flag}={address}: {e}")))
}

/// It was told to end before it had begun.
async fn ended_early(record: Record) -> Result<u8, Failure> {
    let closing = tokio::task::spawn_blocking(move || record.close());
    let _ = tokio::time::timeout(OPENING, closing).await;
    Ok(exit::OK)
}

/// The daemon ends by a signal, or by itself.
async fn end_together(closing: CancellationToken, asked: CancellationToken) {
    tokio::select! {
        () = asked.cancelled() => closing.cancel(),
        () = closing.cancelled() => asked.cancel(),
    }
    notify_stopping();
}

/// Says where build tools connect, and where the admin port is.
fn announce(daemon: &Daemon, access: &ListenerAccess) {
    for address in &daemon.bes {
        tracing::info!("listening for build events on {address}");
    }
    if let Some(address) = daemon.admin {
        let scheme = if access.admin.rules().tls.is_some() {
            "https"
        } else {
            "http"
        };
        tracing::info!("status page, health and metrics on {scheme}://{address}");
    }
}

/// Whom the listeners are for, as far as flags of their own say it.
pub(super) struct Guards {
    pub(super) bes: Rules,
    pub(super) admin: Rules,
}

impl ServeArgs {
    /// The rules, if these addresses may be listened on by them.
    pub(super) fn guards(
        &self,
        bes: &[BesAddress],
        admin: Option<SocketAddr>,
    ) -> Result<Guards, ConfigError> {
        let guards = Guards {
            bes: self.access.bes()?,
            admin: self.access.admin()?,
        };
        for address in bes {
            if let BesAddress::Tcp(at) = address {
                let flag = format!("--bes-listen={at}");
                self.access.check(&flag, "--bes-token-file", *at, &guards.bes)?;
            }
        }
        if let Some(at) = admin {
            let flag = format!("--admin-listen={at}");
            self.access
                .check(&flag, "--admin-token-file", at, &guards.admin)?;
        }
        Ok(guards)
    }
}

/// What comes of a part of the start, unless the other is done first.
async fn unless<T>(called_off: impl Future<Output = ()>, part: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = called_off => None,
        done = part => Some(done),
    }
}

/// Until the daemon was told to end and some time has passed, or it was told twice.
async fn ended_for(shutdown: &CancellationToken, at_once: &CancellationToken) {
    shutdown.cancelled().await;
    let _ = tokio::time::timeout(OPENING, at_once.cancelled()).await;
}

/// The sockets that were handed over, and those that were asked for; the default where there is neither.
fn listeners(inherited: Inherited, addresses: &[BesAddress]) -> Result<Vec<BesListener>, Failure> {
    let mut listeners = inherited
        .into_listeners()
        .map_err(|e| Failure::usage(format!("inherited socket: {e}")))?;
    let mut addresses = addresses.to_vec();
    if listeners.is_empty() && addresses.is_empty() {
        addresses.extend(BES_LISTEN.parse());
    }
    for address in addresses {
        let listener =
            BesListener::bind(&address).map_err(|e| Failure::usage(format!("--bes-listen: {e}")))?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Checks, after the listeners are open, whether the cache answers: a build may come long after a typing error.
fn probe(cache: &CacheArgs) {
    let Ok(cache) = cache.cache() else { return };
    tokio::spawn(async move {
        match cache.probe().await {
            Ok(()) => tracing::debug!("the remote cache answers"),
            Err(error) => tracing::error!("the remote cache is not usable at the moment: {error}"),
        }
    });
}
