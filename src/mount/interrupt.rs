//! Whether a reader that waits has got a signal. `fuser` does not hand on the kernel's requests to interrupt others, and
//! without an answer not even a killed reader ends.

use std::time::Duration;

/// How often is looked.
const EVERY: Duration = Duration::from_millis(100);

/// Signals that want a program to end, or to stop waiting: HUP, INT, QUIT, ABRT, KILL, ALRM and TERM. Others come to programs
/// that do not expect an open file to fail because of them, such as those that language runtimes send to themselves.
const ENDING: u64 = bits(&[1, 2, 3, 6, 9, 14, 15]);

const fn bits(signals: &[u32]) -> u64 {
    let (mut set, mut at) = (0, 0);
    while at < signals.len() {
        set |= 1 << (signals[at] - 1);
        at += 1;
    }
    set
}

/// Ends when a thread has such a signal to handle, or is gone. Never for one that cannot be seen.
pub(super) async fn interrupted(thread: u32) {
    let path = format!("/proc/{thread}/status");
    if thread == 0 || std::fs::read_to_string(&path).is_err() {
        std::future::pending::<()>().await;
    }
    loop {
        tokio::time::sleep(EVERY).await;
        // A small file without a disk.
        if std::fs::read_to_string(&path).map_or(true, |status| has_signal(&status)) {
            return;
        }
    }
}

/// Whether such signals are pending that are neither blocked nor ignored.
fn has_signal(status: &str) -> bool {
    let set = |name: &str| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
            .unwrap_or(0)
    };
    (set("SigPnd") | set("ShdPnd")) & !(set("SigBlk") | set("SigIgn")) & ENDING != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_and_ignored_signals_interrupt_nobody() {
        for (pending, shared, blocked, ignored, is_interrupted) in [
            ("0", "0", "0", "0", false),
            ("0000000000000100", "0", "0", "0", true),
            ("0", "0000000000004000", "0", "0", true),
            ("0", "4000", "0000000000004000", "0", false),
            ("0", "0000000000000002", "0", "2", false),
            ("0", "4002", "0", "2", true),
            // SIGCHLD, SIGTSTP and SIGURG.
            ("0000000000490000", "0", "0", "0", false),
        ] {
            let status = format!(
                "Name:\tcat\nSigQ:\t0/1\nSigPnd:\t{pending}\nShdPnd:\t{shared}\nSigBlk:\t{blocked}\nSigIgn:\t{ignored}\n"
            );
            assert_eq!(has_signal(&status), is_interrupted, "{status}");
        }
    }
}
