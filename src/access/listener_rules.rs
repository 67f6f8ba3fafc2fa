//! What a listener asks of callers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};

use super::{tls::ServerTls, token::Token};

/// Who is turned away is worth a line of the log so often: who knocks all day shall not fill it.
const WARN_EVERY: Duration = Duration::from_secs(1);

/// What a listener asks of callers.
#[derive(Clone, Default)]
pub struct Rules {
    /// TLS, on TCP.
    pub tls: Option<ServerTls>,
    /// A token, on TCP; on a unix socket it lets other users' processes in.
    pub token: Option<Token>,
    /// Whether other users' processes may come in over the loopback interface without either.
    pub other_users: bool,
}

/// A listener's rules, shared by all who look at them. Cheap to clone.
#[derive(Clone, Default)]
pub struct ListenerRules(Arc<Shared>);

#[derive(Default)]
struct Shared {
    rules: RwLock<Arc<Rules>>,
    /// When it was last logged that somebody was refused.
    warned: Mutex<Option<Instant>>,
}

impl ListenerRules {
    /// With rules.
    pub fn new(rules: Rules) -> Self {
        let access = Self::default();
        access.set(rules);
        access
    }

    /// Other rules, for connections from now on.
    pub fn set(&self, rules: Rules) {
        *self.0.rules.write() = Arc::new(rules);
    }

    /// The rules at present.
    pub fn rules(&self) -> Arc<Rules> {
        self.0.rules.read().clone()
    }

    /// Logs why somebody was turned away, unless that was just done.
    pub(super) fn warn(&self, why: impl std::fmt::Display) {
        let mut warned = self.0.warned.lock();
        if warned.is_none_or(|last| last.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            tracing::warn!("{why}");
        } else {
            tracing::debug!("{why}");
        }
    }
}
