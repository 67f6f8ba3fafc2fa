//! Output roots: which directories may be written into, and which build of one is the newest.
//!
//! [`RootRules`] says which directories are allowed; [`Roots`] keeps the open ones, and begins builds in them. Nothing that
//! an older build wanted is placed in a root any more after [`Roots::begin`] has returned.

mod opened;
mod rules;

pub(crate) use self::opened::{RootError, Roots};
pub use self::rules::{Destination, RootRules};
