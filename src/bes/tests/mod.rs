//! The service as a client sees it: a real gRPC client over TCP and unix sockets.

mod acks;
mod attempts;
mod backend;
mod forwarding;
pub(super) mod harness;
mod holding;
mod hostile;
mod memory;
mod restart;
mod simulated;
