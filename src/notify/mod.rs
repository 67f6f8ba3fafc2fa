//! Notifications about settled targets and builds: documents that are posted to URLs, or given to a command.
//!
//! [`Notifier`] listens to the engine's changes and creates a document for each event to report. Every receiver has its
//! own task and a bounded queue, which drops the oldest documents when it is full: a slow or unreachable receiver
//! affects neither builds nor other receivers. Each receiver gets its documents one at a time, in the order of events.
//!
//! A document may be sent twice: a build that is resumed from the journal after a crash is reported again.

mod delivery;
mod document;
mod error;
mod hook;
mod http;
mod notifier;
mod printed;
mod queue;
mod retry;
mod signature;
#[cfg(test)]
mod tests;
mod url;

#[cfg(test)]
pub(crate) use self::document::Event;
pub(crate) use self::{
    hook::Hook,
    notifier::{Backlog, Notifier, NotifyOptions},
    signature::Secret,
    url::NotifyUrl,
};
