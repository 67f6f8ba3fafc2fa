//! Following a build over as many connections as it takes, for the commands that wait.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;

use super::{
    client::{Client, DaemonAddress, Following, Lost, beside},
    exit,
    exit::Failure,
    paths, print,
};
use crate::{
    config::{CacheArgs, ConfigError, ControlArgs, StateArgs, TlsArgs, from_environment},
    printable::printable,
    proto::outhaul::v1::{self as pb, watch_invocation_response::Event},
    units::now_ms,
};

/// How long after a lost connection the daemon is looked for again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long the record may be another process's without a word of it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Flags that choose the build to follow.
#[derive(Debug, Args)]
pub(super) struct ChoiceArgs {
    /// Invocation ID of the build; it does not need to have started
    #[arg(long, value_name = "ID", conflicts_with_all = ["workspace", "next"])]
    invocation: Option<String>,

    /// The newest build of this workspace, or its first if there is none yet; by default, of the workspace of the
    /// current directory, or of any if there is none
    #[arg(long, value_name = "DIR")]
    workspace: Option<PathBuf>,

    /// Wait for the next build instead of one that has already started
    #[arg(long)]
    next: bool,
}

impl ChoiceArgs {
    /// Which invocation the flags mean.
    pub(super) fn choice(&self) -> Result<pb::InvocationChoice, Failure> {
        if let Some(id) = &self.invocation {
            return Ok(by_id(id));
        }
        let workspace = match &self.workspace {
            Some(workspace) => {
                let absolute = std::path::absolute(workspace)
                    .map_err(|e| ConfigError::new(format!("--workspace={}", workspace.display()), e))?;
                Some(absolute)
            }
            None => std::env::current_dir()
                .ok()
                .and_then(|directory| paths::workspace_around(&directory)),
        };
        // Bazel names the real path. A workspace of another machine is not here to be looked at.
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let workspace = workspace.map(|path| real(&path).display().to_string());
        Ok(pb::InvocationChoice {
            invocation_id: String::new(),
            workspace: workspace.unwrap_or_default(),
            next: self.next,
            since_ms: 0,
        })
    }
}

/// Flags that say which daemon to ask.
#[derive(Debug, Args)]
pub(super) struct DaemonArgs {
    #[command(flatten)]
    tls: TlsArgs,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    state: StateArgs,
}

impl DaemonArgs {
    /// Where the daemon is.
    pub(super) fn address(&self) -> Result<DaemonAddress, Failure> {
        DaemonAddress::new(&self.control, &self.state, self.tls.files())
    }
}

fn by_id(id: &str) -> pb::InvocationChoice {
    pb::InvocationChoice {
        invocation_id: id.to_owned(),
        ..pb::InvocationChoice::default()
    }
}

/// What is done with what is heard.
pub(super) trait Hears {
    /// What it comes to.
    type Answer;

    /// Takes an event; answers once enough was heard.
    async fn event(&mut self, client: &mut Client, event: Event) -> Result<Option<Self::Answer>, Failure>;

    /// A daemon listens: from now on nothing is missed.
    fn found(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    /// The daemon is away. Called once until it is found again.
    fn lost(&mut self, reason: &str) -> std::io::Result<()> {
        say_lost(reason)
    }
}

/// Says to people that the daemon is away.
pub(super) fn say_lost(reason: &str) -> std::io::Result<()> {
    writeln!(
        print::err(),
        "outhaul: lost the connection to the daemon ({reason}); reconnecting"
    )
}

/// Follows builds, one after the other.
pub(super) struct Follower<'a> {
    state: &'a StateArgs,
    address: DaemonAddress,
    cache: CacheArgs,
    begun: Instant,
    /// The workspace whose next build is followed after this one.
    later: Option<String>,
    /// The daemon that has told of the build before.
    daemon: Option<Client>,
    /// What it says of the next one.
    ahead: Option<Following>,
    is_lost: bool,
    is_held: bool,
}

impl<'a> Follower<'a> {
    /// Of the daemon that the flags name, or the record if none answers.
    pub(super) fn new(args: &'a DaemonArgs) -> Result<Self, Failure> {
        Ok(Self {
            state: &args.state,
            address: args.address()?,
            cache: from_environment()?,
            begun: Instant::now(),
            later: None,
            daemon: None,
            ahead: None,
            is_lost: false,
            is_held: false,
        })
    }

    /// With each later build of a workspace, or of any: the daemon is asked about the next one while it tells of one, so that
    /// what comes first of that is not missed.
    pub(super) fn with_later(mut self, workspace: String) -> Self {
        self.later = Some(workspace);
        self
    }

    /// The build that is followed after this one.
    pub(super) fn after(&self, build: &pb::Invocation) -> pb::InvocationChoice {
        pb::InvocationChoice {
            workspace: self.later.clone().unwrap_or_default(),
            next: true,
            // What began since then is one of the next.
            since_ms: match build.started_ms {
                0 => 0,
                started_ms => started_ms + 1,
            },
            ..pb::InvocationChoice::default()
        }
    }

    /// Follows the build that is meant until `hears` answers.
    pub(super) async fn follow<H: Hears>(
        &mut self,
        mut choice: pb::InvocationChoice,
        hears: &mut H,
    ) -> Result<H::Answer, Failure> {
        let asked_at = now_ms();
        // Once a daemon has answered, its record is left to it: it may be starting again.
        let mut met = self.daemon.is_some();
        loop {
            let connected = match self.daemon.take() {
                Some(daemon) => Ok(daemon),
                None => self.address.connect().await,
            };
            let mut client = match connected {
                Ok(daemon) => {
                    met = true;
                    daemon
                }
                Err(reason) if met => {
                    self.lost(hears, &reason.to_string())?;
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
                Err(refused) => {
                    let refused = refused.to_string();
                    let here = Client::here(&self.address, &refused, self.state, None, &self.cache).await;
                    // A daemon that is starting, or a command that will be done.
                    if let Err(failure) = &here
                        && failure.held
                    {
                        self.held(&failure.message)?;
                        tokio::time::sleep(AGAIN).await;
                        continue;
                    }
                    here?
                }
            };
            // A build is settled when nothing of it is on its way, what is optional as well.
            let says = client.says_paused(|_| true);
            let ended = beside(says, self.hear(&mut client, &mut choice, hears)).await;
            if ended.is_ok() && client.here.is_none() {
                self.daemon = Some(client);
            } else {
                self.ahead = None;
                client.close().await;
            }
            match ended {
                Ok(answer) => return Ok(answer),
                Err(Lost::Connection(reason)) => self.lost(hears, &reason)?,
                Err(Lost::Refused(failure)) if failure.code == exit::NOT_FOUND && !met => {
                    return Err(Failure::not_found(format!(
                        "{}, and no daemon answers on {}",
                        failure.message, self.address
                    )));
                }
                Err(Lost::Refused(failure)) => return Err(failure),
            }
            if choice.next && choice.since_ms == 0 {
                // What began while nobody listened is still the next one.
                choice.since_ms = asked_at;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn hear<H: Hears>(
        &mut self,
        client: &mut Client,
        choice: &mut pb::InvocationChoice,
        hears: &mut H,
    ) -> Result<H::Answer, Lost> {
        let mut following = match self.ahead.take() {
            Some(ahead) => ahead,
            None => client.watch(choice.clone()).await?,
        };
        if client.here.is_none() {
            self.is_lost = false;
            hears.found().map_err(|e| Lost::Refused(e.into()))?;
        }
        while let Some(event) = following.next().await? {
            let mut next = None;
            if let Event::Invocation(invocation) = &event {
                *choice = by_id(&invocation.invocation_id);
                next = (self.later.is_some() && client.here.is_none()).then(|| self.after(invocation));
            }
            if let Some(answer) = hears.event(client, event).await.map_err(Lost::Refused)? {
                return Ok(answer);
            }
            if let Some(next) = next {
                self.ahead = Some(client.watch(next).await?);
            }
        }
        Err(Lost::Connection("the daemon has closed the stream".to_owned()))
    }

    /// Says once that the daemon is away.
    fn lost(&mut self, hears: &mut impl Hears, reason: &str) -> std::io::Result<()> {
        if std::mem::replace(&mut self.is_lost, true) {
            return Ok(());
        }
        hears.lost(reason)
    }

    /// Says once that another process has the record. One that is only starting or ending is not worth a word.
    fn held(&mut self, reason: &str) -> std::io::Result<()> {
        if self.is_held || self.begun.elapsed() < PATIENCE {
            return Ok(());
        }
        self.is_held = true;
        writeln!(print::err(), "outhaul: waiting: {}", printable(reason))
    }
}
