//! Memory that goes back to the system after a burst of work.
//!
//! glibc keeps what a process has freed, in an arena for each of its busiest threads, below whatever is still in use at
//! the arena's top: after a few hundred builds at once, most of the peak stays resident for as long as the daemon lives.

/// Gives the free pages of all arenas back, which takes milliseconds for each gigabyte. Other C libraries return memory
/// by themselves, or cannot be asked to.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(
            unsafe_code,
            reason = "glibc has no safe call for it, and this one takes no pointer"
        )]
        // SAFETY: it may be called at any time from any thread: it takes the lock of each arena in turn.
        let _ = unsafe { libc::malloc_trim(0) };
    }
}
