//! The daemon: connects the rooms and opens their listeners.
//!
//! [`Rooms`] is what every command that downloads outputs needs; [`Daemon`] adds the listeners: the event service, the
//! control socket, the admin port. On shutdown, a token closes the listeners, waiting clients are released, files that
//! are being placed are finished or dropped, and the record is written.

mod activation;
mod background;
mod control;
mod error;
mod events;
mod idle;
mod memory;
mod recovery;
mod retention;
mod rooms;
mod running;
#[cfg(test)]
mod tests;

pub(crate) use self::activation::{Inherited, notify_ready, notify_stopping};
pub(crate) use self::control::ControlDoor;
pub(crate) use self::error::DaemonError;
pub(crate) use self::events::EventDoors;
pub(crate) use self::retention::{Plan as RetentionPlan, Retention};
pub use self::rooms::Rooms;
pub(crate) use self::running::AdminDoor;
pub use self::running::{Daemon, DaemonOptions};
