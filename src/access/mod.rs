//! Access control for all listeners of the daemon, whatever they serve.
//!
//! A [`ListenerRules`] holds the rules of a listener: its certificate, the authorities of client certificates, and the token
//! that callers must send. An [`Incoming`] accepts connections by these rules, and a [`Guard`] checks each call. The
//! rules can be changed while the listener is open; the new ones apply to new connections. The number of connections is
//! limited, and there are deadlines for those without a call: see `room`.
//!
//! Without a token or certificates, only processes of Outhaul's own user and root may connect: the kernel reports the
//! user of a unix socket's peer, and `peer` finds the owner of a connection over the loopback interface. There,
//! connections of other users are closed before anything is sent.

mod dated;
mod guard;
mod incoming;
mod listener_rules;
mod peer;
mod preface;
mod room;
mod sock_diag;
mod tables;
mod tls;
mod token;

pub(crate) use self::{dated::dated, preface::expect_preface, room::places};
pub(crate) use self::{
    guard::{Guard, Refused},
    incoming::{Caller, Connection, Incoming, Listening, Origin},
    listener_rules::{ListenerRules, Rules},
    tls::{Protocol, ServerTls, TlsFile},
    token::Token,
};
