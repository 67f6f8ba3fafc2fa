//! Access control for all listeners of the daemon, whatever they serve.
//!
//! A [`Door`] holds the rules of a listener: its certificate, the authorities of client certificates, and the token
//! that callers must send. An [`Incoming`] accepts connections by these rules, and a [`Guard`] checks each call. The
//! rules can be changed while the listener is open; the new ones apply to new connections. The number of connections is
//! limited, and there are deadlines for those without a call: see `room`.
//!
//! Without a token or certificates, only processes of Outhaul's own user and root may connect: the kernel reports the
//! user of a unix socket's peer, and `peer` finds the owner of a connection over the loopback interface. There,
//! connections of other users are closed before anything is sent.

mod dated;
mod greeting;
mod guard;
mod incoming;
mod peer;
mod room;
mod sock_diag;
mod tables;
mod tls;
mod token;

use std::{
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

pub(crate) use self::{dated::dated, greeting::greeted, room::places};
pub use self::{
    guard::{Guard, Guarded, Refused},
    incoming::{Caller, Connection, Incoming, Listening, Origin},
    tls::{Protocol, ServerTls, TlsError, TlsFile},
    token::{Token, TokenError},
};

/// Who is turned away is worth a line of the log so often: who knocks all day shall not fill it.
const TOLD_EVERY: Duration = Duration::from_secs(1);

/// What a door asks of callers.
#[derive(Clone, Default)]
pub struct Rules {
    /// TLS, on TCP.
    pub tls: Option<ServerTls>,
    /// A token, on TCP; on a unix socket it lets other users' processes in.
    pub token: Option<Token>,
    /// Whether other users' processes may come in over the loopback interface without either.
    pub other_users: bool,
}

/// A door's rules, shared by all who look at them. Cheap to clone.
#[derive(Clone, Default)]
pub struct Door(Arc<Shared>);

#[derive(Default)]
struct Shared {
    rules: RwLock<Arc<Rules>>,
    /// When it was last told that somebody was turned away.
    told: Mutex<Option<Instant>>,
}

impl Door {
    /// With rules.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        let door = Self::default();
        door.set(rules);
        door
    }

    /// Other rules, for connections from now on.
    pub fn set(&self, rules: Rules) {
        *self.0.rules.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(rules);
    }

    /// The rules at present.
    #[must_use]
    pub fn rules(&self) -> Arc<Rules> {
        self.0
            .rules
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Logs why somebody was turned away, unless that was just done.
    fn tell(&self, why: impl std::fmt::Display) {
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|last| last.elapsed() >= TOLD_EVERY) {
            *told = Some(Instant::now());
            tracing::warn!("{why}");
        } else {
            tracing::debug!("{why}");
        }
    }
}
