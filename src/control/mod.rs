//! The control API of the daemon, and its admin port.

mod admin;
mod names;
mod server;
mod service;
pub(crate) mod staging;
pub(crate) mod wait;

pub(crate) use self::service::{
    find::{Link, links_in, without_intermediates},
    why::namer,
};
pub(crate) use self::{admin::Admin, server::ControlServer, service::Service};
