//! What can be asked of a daemon: the control API on its socket, and the admin port.

mod admin;
mod names;
mod server;
mod service;
pub(crate) mod staging;
pub(crate) mod wait;

pub(crate) use self::service::{watch::Heard, why::namer};
pub use self::{admin::Admin, server::ControlServer, service::Service};
