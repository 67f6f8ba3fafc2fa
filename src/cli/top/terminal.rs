//! The terminal, while the screens have it.

use std::{
    io::{self, Stdout, stdout},
    mem::ManuallyDrop,
    panic,
    sync::atomic::{AtomicBool, Ordering},
};

use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    crossterm::{
        cursor, execute,
        terminal::{
            Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
        },
    },
};
use rustix::process::{Signal, getpgid, getpgrp, getppid, getsid, kill_current_process_group};

/// Whether it is ours now. There is one terminal in a process, and a panic must find it.
static OURS: AtomicBool = AtomicBool::new(false);

/// Has the terminal until it is dropped.
pub(super) struct Screens {
    /// Never dropped: it would write to a terminal that may be gone, and panic.
    pub(super) terminal: ManuallyDrop<Terminal<CrosstermBackend<Stdout>>>,
}

impl Screens {
    /// Takes the terminal. A panic gives it back before it says anything.
    ///
    /// # Errors
    /// When it cannot be had.
    pub(super) fn take() -> io::Result<Self> {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            give_back();
            before(panic);
        }));
        take()?;
        let terminal = Terminal::new(CrosstermBackend::new(stdout()));
        terminal
            .map(|terminal| Self {
                terminal: ManuallyDrop::new(terminal),
            })
            .inspect_err(|_| give_back())
    }

    /// Takes the terminal again, after this process was stopped, and the shell had it.
    ///
    /// # Errors
    /// When it cannot be had.
    pub(super) fn take_again(&mut self) -> io::Result<()> {
        give_back();
        take()?;
        self.redraw()
    }

    /// Has all of the screen drawn the next time, whatever others have written there.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub(super) fn redraw(&mut self) -> io::Result<()> {
        execute!(stdout(), Clear(ClearType::All))?;
        // Its own way to clear the screen asks the terminal where the cursor is, and the answer comes as if it was typed.
        self.terminal = ManuallyDrop::new(Terminal::new(CrosstermBackend::new(stdout()))?);
        Ok(())
    }
}

impl Drop for Screens {
    fn drop(&mut self) {
        give_back();
    }
}

fn take() -> io::Result<()> {
    OURS.store(true, Ordering::Relaxed);
    let taken = enable_raw_mode().and_then(|()| execute!(stdout(), EnterAlternateScreen, cursor::Hide));
    if taken.is_err() {
        give_back();
    }
    taken
}

/// Makes the terminal what it was. One that was closed is nobody's any more.
pub(super) fn give_back() {
    if OURS.swap(false, Ordering::Relaxed) {
        let _ = execute!(stdout(), cursor::Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

/// What Ctrl-Z does in a terminal that is nobody's: a signal for all of the job. Without a shell that could continue it, such as
/// under `ssh -t HOST outhaul top`, nothing.
pub(super) fn stop_job() {
    if may_stop() {
        let _ = kill_current_process_group(Signal::TSTP);
    }
}

/// Whether this process is in a job of a shell's, which is in another process group of the session.
pub(super) fn may_stop() -> bool {
    let shell = getppid();
    let session = shell.and_then(|parent| getsid(Some(parent)).ok());
    let is_of_shell = session.is_some() && session == getsid(None).ok();
    is_of_shell && shell.and_then(|parent| getpgid(Some(parent)).ok()) != Some(getpgrp())
}
