//! `outhaul top`: builds, caches and the disk in the terminal, live.
//!
//! * `look`: asks the daemon for what is seen.
//! * `screen`: what is seen, and what keys do to it.
//! * `draw`: how it looks.
//! * `terminal`: takes the terminal, and gives it back as it was.

mod draw;
mod look;
mod screen;
mod terminal;

use std::{
    io::{IsTerminal as _, stdin, stdout},
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use ratatui::crossterm::event;
use rustix::process::Signal;
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval},
};

use self::{
    draw::Theme,
    look::{Subject, Told},
    screen::{Action, Top},
    terminal::Screens,
};
use super::{
    client::DaemonAddress,
    exit::{self, Failure},
    follow::DaemonArgs,
    run::child::{Signals, code_of, stop},
    runtime,
};

/// How often the times on the screen change.
const TICK: Duration = Duration::from_secs(1);

/// Arguments of `outhaul top`.
#[derive(Debug, Args)]
pub(super) struct TopArgs {
    #[command(flatten)]
    daemon: DaemonArgs,
}

pub(super) fn main(args: &TopArgs) -> Result<u8, Failure> {
    if !stdin().is_terminal() || !stdout().is_terminal() {
        return Err(Failure::usage(
            "outhaul top needs a terminal for its input and output; use `outhaul status --watch` in scripts and logs",
        ));
    }
    let address = args.daemon.address()?;
    runtime()?.block_on(show(address))
}

/// Shows the screens until they are left.
async fn show(address: DaemonAddress) -> Result<u8, Failure> {
    // Before the terminal is taken: whatever ends this gives it back.
    let signals = Signals::listen()?;
    let theme = Theme::of_environment(&address);
    let screens =
        Screens::take().map_err(|e| Failure::failed(format!("failed to set up the terminal: {e}")))?;
    let mut top = Top::default();
    let (subject, shown) = watch::channel(top.subject());
    let (tell, told) = mpsc::channel(4);
    tokio::select! {
        code = seen(screens, signals, &mut top, &theme, (subject, told)) => code,
        // It goes on for as long as it is listened to.
        () = look::look(address, shown, tell) => Ok(exit::OK),
    }
}

/// Draws, and takes what is typed, told and signalled, until one of that is to leave.
async fn seen(
    mut screens: Screens,
    mut signals: Signals,
    top: &mut Top,
    theme: &Theme,
    (subject, mut told): (watch::Sender<Subject>, mpsc::Receiver<Told>),
) -> Result<u8, Failure> {
    let begun = Instant::now();
    let mut events = terminal_events();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        screens.terminal.draw(|frame| draw::draw(frame, top, theme))?;
        let action = tokio::select! {
            event = events.recv() => match event {
                Some(Ok(event)) => event.as_key_event().map_or(Action::Nothing, |key| top.key(key)),
                // The terminal is gone.
                Some(Err(_)) | None => Action::Quit,
            },
            Some(news) = told.recv() => {
                top.take(news, begun.elapsed());
                Action::Nothing
            }
            signal = signals.next() => match signal {
                // Nobody would continue it.
                Signal::TSTP if !terminal::may_stop() => Action::Nothing,
                Signal::TSTP => {
                    terminal::give_back();
                    stop();
                    screens.take_again()?;
                    Action::Nothing
                }
                Signal::CONT => {
                    screens.take_again()?;
                    Action::Nothing
                }
                signal => return Ok(code_of(signal)),
            },
            _ = tick.tick() => Action::Nothing,
        };
        match action {
            Action::Nothing => {}
            Action::Quit => return Ok(exit::OK),
            Action::Stop => terminal::stop_job(),
            Action::Redraw => screens.redraw()?,
        }
        subject.send_if_modified(|before| {
            let now = top.subject();
            let is_another = *before != now;
            *before = now;
            is_another
        });
    }
}

/// What is typed, and that the terminal has another size. Read on a thread of its own, which ends with the process.
fn terminal_events() -> mpsc::Receiver<std::io::Result<event::Event>> {
    let (typed, events) = mpsc::channel(16);
    thread::spawn(move || {
        loop {
            let event = event::read();
            let is_last = event.is_err();
            if typed.blocking_send(event).is_err() || is_last {
                return;
            }
        }
    });
    events
}
