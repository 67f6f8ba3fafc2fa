//! The real binary: its listeners, its command line, and what it says to bad input.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod access;
mod activation;
mod admin;
#[cfg(feature = "mcp")]
mod agents;
mod archives;
mod bad_endpoints;
mod bad_events;
mod bad_settings;
mod browser;
mod carrying;
mod collecting;
mod commands;
mod control;
#[cfg(feature = "object-stores")]
mod credentials;
mod crowding;
mod depth;
mod doctor;
mod ending;
mod evicting;
mod fetching;
mod full_disk;
mod http;
mod keeping;
mod leasing;
mod monitoring;
#[cfg(feature = "mount")]
mod mounting;
mod notifying;
mod pages;
mod pausing;
mod printed;
mod python;
mod reading;
mod reloading;
mod replaying;
mod reported;
mod reporting;
mod roots;
mod running;
mod scripts;
mod secrets;
mod secured;
mod shipped;
mod staging;
mod support;
#[cfg(feature = "otlp")]
mod telemetry;
mod terminal;
mod waiting;
mod watching;
mod wrapper;
