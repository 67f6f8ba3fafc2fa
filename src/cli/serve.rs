//! `outhaul serve`: the daemon.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    ending::Signals,
    exit::{self, Failure},
    reload::{Doors, Hangup, Reload, Settings},
    runtime,
};
use crate::{
    bes::{BesAddress, BesListener},
    config::{
        CacheArgs, ConfigError, ControlListenArgs, DoorArgs, HoldArgs, LeaseArgs, LimitArgs, NotifyArgs,
        PlaceArgs, SelectionArgs, StateArgs, UpstreamArgs,
    },
    daemon::{
        AdminDoor, ControlDoor, Daemon, DaemonOptions, Inherited, Retention, Rooms, notify_ready,
        notify_stopping,
    },
    doors::{Door, Rules},
    notify::Notifier,
    record::{Opening, Record},
    roots::Destination,
    transport::without_user_info,
    units::{parse_duration, parse_size},
};

/// Where build tools connect unless told otherwise.
const BES_LISTEN: &str = "127.0.0.1:8985";
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

    #[command(flatten)]
    pub(super) doors: DoorArgs,

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
    // Everything is checked before anything is opened.
    let hold = args.hold.policy()?;
    let upstream = args.upstream.upstream(&mut args.cache, hold)?;
    let limits = args.limits.limits()?;
    let mut policy = args.selection.policy()?;
    policy.limits = limits.build;
    let rules = args.place.rules(Destination::ExecRoot)?;
    let options = args.place.options()?;
    let source = args.cache.source_rule(false)?;
    let notify = args.notify.options()?;
    let state_dir = args.state.directory()?;
    let socket = args.state.socket()?;
    let control_port = args.control.port(&args.doors)?;
    let idle_timeout = args
        .idle_timeout
        .as_deref()
        .map(|text| match parse_duration(text) {
            Ok(timeout) if timeout.is_zero() => {
                Err(ConfigError::new("--idle-timeout", "must be greater than zero"))
            }
            parsed => parsed.map_err(|e| ConfigError::new("--idle-timeout", e)),
        })
        .transpose()?;
    let retention = Retention {
        max_age: parse_duration(&args.retention_age)
            .map_err(|e| ConfigError::new(format!("--retention-age={}", args.retention_age), e))?,
        journal_bytes: parse_size(&args.retention_size)
            .map_err(|e| ConfigError::new(format!("--retention-size={}", args.retention_size), e))?,
    };
    let leases = args.lease.options()?;
    let linger =
        parse_duration(&args.linger).map_err(|e| ConfigError::new(format!("--linger={}", args.linger), e))?;
    let addresses = args
        .bes_listen
        .iter()
        .map(|text| {
            text.parse::<BesAddress>()
                .map_err(|e| ConfigError::new("--bes-listen", e))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let admin = match args.admin_listen.as_str() {
        "none" => None,
        text => Some(
            text.parse::<SocketAddr>()
                .map_err(|e| ConfigError::new(format!("--admin-listen={}", without_user_info(text)), e))?,
        ),
    };

    args.guards(&addresses, admin)?;

    // Anyone who ends it during the start need not wait for that: nothing was promised to anybody yet.
    let opening = open_record(&state_dir);
    let Some(record) = unless(ended_for(&shutdown, &at_once), opening).await else {
        tracing::warn!("the record is still being opened");
        return Ok(exit::OK);
    };
    let record = record?;
    let ended_early = {
        let record = record.clone();
        async || {
            let closing = tokio::task::spawn_blocking(move || record.close());
            let _ = tokio::time::timeout(OPENING, closing).await;
            Ok(exit::OK)
        }
    };
    if shutdown.is_cancelled() {
        return ended_early().await;
    }
    let bes = listeners(inherited, &addresses)?;
    let addresses = bes
        .iter()
        .map(BesListener::address)
        .collect::<Result<Vec<_>, _>>()?;
    // Those that were handed over could not be looked at before.
    let guards = args.guards(&addresses, admin)?;
    let doors = Doors {
        bes: Door::new(guards.bes),
        admin: Door::new(guards.admin),
        control: control_port.as_ref().map(|port| Door::new(port.rules.clone())),
    };
    let bes = bes.into_iter().map(|b| b.behind(doors.bes.clone())).collect();
    let control = BesListener::bind(&BesAddress::Unix(socket.clone()))
        .map_err(|e| Failure::usage(format!("--control-socket: {e}")))?;
    let admin_door = match admin {
        Some(address) => Some(AdminDoor {
            listener: TcpListener::bind(address)
                .await
                .map_err(|e| Failure::usage(format!("--admin-listen={address}: {e}")))?,
            door: doors.admin.clone(),
        }),
        None => None,
    };
    let control_address = control_port.as_ref().map(|port| port.address);
    let control_door = match control_port.zip(doors.control.clone()) {
        Some((port, door)) => Some(ControlDoor {
            listener: TcpListener::bind(port.address)
                .await
                .map_err(|e| Failure::usage(format!("--control-listen={}: {e}", port.address)))?,
            door,
            reach: port.reach,
        }),
        None => None,
    };
    let rooms =
        Rooms::open(record, policy, rules, source, options, args.upstream.rewrite_uris)?.with_linger(linger);
    // Before the daemon starts: what it takes up from the journal is told of as well.
    let notifier = (!notify.is_empty())
        .then(|| Notifier::start(notify, rooms.engine.told(), &rooms.metrics))
        .transpose()
        .map_err(|e| Failure::usage(format!("--notify-url: {e}")))?;
    let starting = Daemon::start(
        rooms.clone(),
        DaemonOptions {
            journal_dir: Some(state_dir.join("journal")),
            durable: args.durable,
            hold,
            upstream: upstream.clone(),
            limits: limits.bes,
            control_message: limits.control_message,
            bes,
            control: Some(control),
            admin: admin_door,
            retention: Some(retention),
            leases,
            idle_timeout,
            notifications: notifier.as_ref().map(Notifier::backlog),
        },
    );
    let Some(started) = unless(shutdown.cancelled(), starting).await else {
        return ended_early().await;
    };
    let mut daemon = started.map_err(Failure::failed)?;
    for address in &daemon.bes {
        tracing::info!("listening for build events on {address}");
    }
    if let Some(address) = daemon.admin {
        let scheme = if doors.admin.rules().tls.is_some() {
            "https"
        } else {
            "http"
        };
        tracing::info!("health and metrics on {scheme}://{address}");
    }
    if let Some(door) = control_door {
        let address = door.listener.local_addr()?;
        daemon.open_control(door);
        tracing::info!("control API on {address}");
    }
    tracing::info!("control socket {}", socket.display());
    if args.cache.names_a_cache() {
        probe(&args.cache);
    }
    notify_ready();

    // It ends by a signal, or by itself.
    let (closing, asked) = (daemon.shutdown_token(), shutdown.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = asked.cancelled() => closing.cancel(),
            () = closing.cancelled() => asked.cancel(),
        }
    });
    tokio::spawn(hangup.heed(
        Reload {
            settings,
            doors,
            addresses,
            admin,
            control: control_address,
            upstream,
            rooms,
        },
        shutdown,
    ));
    let closing = daemon.shutdown_token();
    tokio::spawn(async move {
        closing.cancelled().await;
        notify_stopping();
    });
    let ending = async {
        let ended = daemon.join().await;
        if let Some(notifier) = notifier {
            notifier.close().await;
        }
        ended
    };
    let ended = tokio::select! {
        ended = ending => ended,
        () = at_once.cancelled() => Err("exited before cleanup was complete".to_owned()),
    };
    ended.map_err(Failure::failed)?;
    Ok(exit::OK)
}

/// Whom the listeners are for, as far as it is told by flags of their own.
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
            bes: self.doors.bes()?,
            admin: self.doors.admin()?,
        };
        for address in bes {
            if let BesAddress::Tcp(at) = address {
                let flag = format!("--bes-listen={at}");
                self.doors.check(&flag, "--bes-token-file", *at, &guards.bes)?;
            }
        }
        if let Some(at) = admin {
            let flag = format!("--admin-listen={at}");
            self.doors.check(&flag, "--admin-token-file", at, &guards.admin)?;
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

/// Opens the record, and says what was found.
pub(super) async fn open_record(state_dir: &std::path::Path) -> Result<Record, Failure> {
    let directory: PathBuf = state_dir.to_owned();
    let opened = tokio::task::spawn_blocking(move || Record::open(&directory)).await;
    let (record, opening) = opened.map_err(Failure::failed)?.map_err(Failure::failed)?;
    match opening {
        Opening::Quarantined { moved_to, reason } => tracing::error!(
            "the record was damaged ({reason}); moved it to {} and started a new one",
            moved_to.display()
        ),
        Opening::Unavailable { reason } => tracing::error!("the record is kept in memory only: {reason}"),
        Opening::Fresh | Opening::Existing => {}
    }
    Ok(record)
}

/// Checks, after the listeners are open, whether the cache answers: a build may come long after a typing error.
fn probe(cache: &CacheArgs) {
    let Ok(cache) = cache.cache() else { return };
    tokio::spawn(async move {
        match cache.probe().await {
            Ok(capabilities) => tracing::debug!(?capabilities, "the remote cache answers"),
            Err(error) => tracing::error!("the remote cache is not usable at the moment: {error}"),
        }
    });
}
