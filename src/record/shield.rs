//! Keeps panics of the store from reaching anybody.
//!
//! sled 0.34 panics on damaged files, at opening and on later reads, on the caller's thread and on its own pool.
//! That is of no interest to a user: the caller learns of it as an error, and the text goes to the debug log.

use std::{
    any::Any,
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
    thread,
};

use super::error::StoreError;

thread_local! {
    static SHIELDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a store operation. A panic in it becomes [`StoreError::Damaged`], and prints nothing.
pub(super) fn shield<T>(operation: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    install_hook();
    let outer = SHIELDED.replace(true);
    // The store is not used again after `Damaged`, so it does not matter what the closure left half done.
    let result = panic::catch_unwind(AssertUnwindSafe(operation));
    SHIELDED.set(outer);
    match result {
        Ok(result) => result,
        Err(payload) => Err(StoreError::Damaged(format!(
            "the store panicked: {}",
            words(&*payload)
        ))),
    }
}

fn words(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no panic message");
    // sled's messages can hold whole pages.
    text.chars().take(200).collect()
}

/// Puts a hook before the present one that keeps quiet about shielded panics and lets all others through.
fn install_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // The thread-local may be gone when a thread panics while it ends.
            let shielded = SHIELDED.try_with(Cell::get).unwrap_or(false);
            let of_sled = thread::current()
                .name()
                .is_some_and(|name| name.starts_with("sled-io-"));
            if shielded || of_sled {
                tracing::debug!(panic = %words(info.payload()), "the store panicked");
            } else {
                previous(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_words() {
        let error = shield::<()>(|| panic!("page {} is bad", 7)).unwrap_err();
        assert_eq!(
            error,
            StoreError::Damaged("the store panicked: page 7 is bad".into())
        );
        assert_eq!(shield(|| Ok(5)), Ok(5));
        assert!(!SHIELDED.get());
    }
}
