//! The service as a client sees it: a real gRPC client over TCP and unix sockets.

mod acks;
mod harness;
mod holding;
mod restart;
