//! Tells others that targets and builds are settled: documents posted to URLs, or given to a command.
//!
//! [`Notifier`] listens to the engine's changes and makes a document of each that somebody is to hear of. Every
//! receiver has a task and a bounded queue of its own, which loses its oldest documents rather than ever making
//! anybody wait: neither a build nor another receiver notices one that is slow or gone. Documents of one receiver are
//! delivered one after the other, in the order of what they tell.
//!
//! A document may come twice: a build that is taken up from the journal after a crash is told of again.

mod delivery;
mod document;
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

pub use self::{
    document::Event,
    hook::Hook,
    notifier::{Backlog, Notifier, NotifyOptions},
    signature::Secret,
    url::NotifyUrl,
};
