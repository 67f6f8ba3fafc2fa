//! Who may come in: what every listening socket of the daemon has in common, whatever is served behind it.
//!
//! A [`Door`] holds the rules: a certificate, whose certificates callers must have, a token that they must show. An
//! [`Incoming`] takes connections by them, and a [`Guard`] judges each call. The rules can be changed while the door is
//! open; the new ones hold for connections that are made afterwards. The number of connections is limited, and there are
//! deadlines for those without a call: see `room`.
//!
//! Without a token or certificates, a door is for our own user's processes (and root's): the system says whose a unix
//! socket's peer is, and `peer` finds the owner of a connection over the loopback interface. There, others are not
//! even greeted.

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
    pub strangers: bool,
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
