//! A scripted upstream service, and what must hold whatever it does.

mod fake;
mod holding;
mod lifecycle;
pub(super) mod requests;
mod rig;
mod streams;
