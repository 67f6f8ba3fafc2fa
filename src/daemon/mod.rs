//! The daemon: connects the rooms and opens their listeners.
//!
//! [`Services`] is what every command that downloads outputs needs; [`Daemon`] adds the listeners: the event service, the
//! control socket, the admin port. On shutdown, a token closes the listeners, waiting clients are released, files that
//! are being placed are finished or dropped, and the record is written.

mod activation;
mod background;
mod control;
mod deleted;
mod error;
mod events;
mod evicting;
mod idle;
mod memory;
mod recovery;
mod retention;
mod running;
mod services;
#[cfg(test)]
mod tests;

pub use self::running::{Daemon, DaemonOptions};
pub use self::services::Services;
pub(crate) use self::{
    activation::{Inherited, notify_ready, notify_stopping},
    control::ControlListener,
    deleted::Deleted,
    error::DaemonError,
    events::EventListeners,
    retention::{Plan as RetentionPlan, Retention},
    running::AdminListener,
};
