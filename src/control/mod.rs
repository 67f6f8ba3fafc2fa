//! The control API of the daemon, and its admin port.

mod admin;
mod names;
mod server;
mod service;
pub(crate) mod staging;
pub(crate) mod wait;

pub(crate) use self::service::{
    find::{Link, links_in, without_intermediates},
    finding,
    why::namer,
};
pub(crate) use self::{
    admin::{Admin, is_for_us},
    server::ControlServer,
    service::{Service, disk::Short},
};
