//! What is shown, and what keys do to it.

use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::look::{Answer, Caches, Seen, Subject, Told};
use crate::{
    cli::progress::{Pace, Progress},
    proto::outhaul::v1 as pb,
};

/// Characters of a search.
const TYPED: usize = 200;

/// Everything that is shown.
pub(super) struct Top {
    /// Screens that lie above each other; the last one is seen. Never empty.
    opened: Vec<Screen>,
    pub(super) link: Link,
    /// What the daemon does not download at present.
    pub(super) paused: Option<pb::Pause>,
    /// The search that is being typed.
    pub(super) typed: Option<String>,
    pub(super) helps: bool,
    /// Lines that a screen has room for, as it was drawn last.
    pub(super) room: usize,
}

/// Whether a daemon answers.
pub(super) enum Link {
    /// Nobody has answered yet.
    Connecting,
    Connected,
    /// None answers, and why.
    Lost(String),
}

/// One screen.
pub(super) struct Screen {
    pub(super) subject: Subject,
    pub(super) content: Content,
    /// The chosen row of a table, or the first line of a text that is seen.
    pub(super) at: usize,
    pub(super) pace: Pace,
}

/// What a screen has to show.
pub(super) enum Content {
    /// Nothing is known yet.
    Unknown,
    Builds(Vec<pb::Invocation>),
    Build(Box<Seen>),
    Outputs(pb::FindOutputsResponse),
    Output(Box<pb::why_response::Answer>),
    Caches(Caches),
    Disk(pb::DiskUsageResponse),
    /// There is no such thing any more.
    Nothing(String),
}

/// What is to be done after a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Nothing,
    Quit,
    /// Ctrl-L: something else has written to the terminal.
    Redraw,
    /// Ctrl-Z: the shell is to have the terminal for a while.
    Stop,
}

/// The sections, from left to right.
pub(super) const SECTIONS: [(&str, Subject); 3] = [
    ("Builds", Subject::Builds),
    ("Caches", Subject::Caches),
    ("Disk", Subject::Disk),
];

impl Screen {
    fn new(subject: Subject) -> Self {
        Self {
            subject,
            content: Content::Unknown,
            at: 0,
            pace: Pace::default(),
        }
    }

    /// How many rows of its table can be chosen; none of a text.
    pub(super) const fn rows(&self) -> Option<usize> {
        match &self.content {
            Content::Builds(builds) => Some(builds.len()),
            Content::Outputs(found) => Some(found.outputs.len()),
            _ => None,
        }
    }

    /// Takes what the daemon has said of it, at a time.
    fn take(&mut self, answer: Answer, at: Duration) {
        self.content = match answer {
            Answer::Builds(builds) => {
                self.follow(&builds);
                Content::Builds(builds)
            }
            Answer::Build(seen) => {
                self.pace.count(at, seen.build.downloaded_bytes);
                Content::Build(seen)
            }
            Answer::Outputs(found) => Content::Outputs(found),
            Answer::Output(Some(answer)) => Content::Output(answer),
            Answer::Output(None) => Content::Nothing("no recorded build has named this output".to_owned()),
            Answer::Caches(caches) => Content::Caches(caches),
            Answer::Disk(usage) => Content::Disk(usage),
            Answer::Nothing(message) => Content::Nothing(message),
        };
        if let Some(rows) = self.rows() {
            self.at = self.at.min(rows.saturating_sub(1));
        }
    }

    /// The chosen build stays chosen when others come.
    fn follow(&mut self, builds: &[pb::Invocation]) {
        if let Content::Builds(before) = &self.content
            && let Some(chosen) = before.get(self.at)
            && let Some(now) = builds
                .iter()
                .position(|build| build.invocation_id == chosen.invocation_id)
        {
            self.at = now;
        }
    }

    /// What Enter opens.
    fn chosen(&self) -> Option<Subject> {
        match &self.content {
            Content::Builds(builds) => builds
                .get(self.at)
                .map(|build| Subject::Build(build.invocation_id.clone())),
            Content::Outputs(found) => found
                .outputs
                .get(self.at)
                .map(|output| Subject::Output(output.absolute_path())),
            _ => None,
        }
    }
}

impl Seen {
    /// How far it is. What is wanted may still become more while it runs.
    pub(super) const fn progress(&self) -> Progress {
        let build = &self.build;
        Progress::of_outputs(
            build.downloaded + build.present + build.failed,
            self.waiting.required + self.waiting.optional,
            build.downloaded_bytes,
            self.waiting.bytes,
        )
    }
}

impl Default for Top {
    fn default() -> Self {
        Self {
            opened: vec![Screen::new(Subject::Builds)],
            link: Link::Connecting,
            paused: None,
            typed: None,
            helps: false,
            room: 1,
        }
    }
}

impl Top {
    /// The screen that is seen.
    pub(super) fn screen(&mut self) -> &mut Screen {
        if self.opened.is_empty() {
            self.opened.push(Screen::new(Subject::Builds));
        }
        let last = self.opened.len() - 1;
        &mut self.opened[last]
    }

    /// What is to be asked of the daemon.
    pub(super) fn subject(&mut self) -> Subject {
        self.screen().subject.clone()
    }

    /// The number of the section that is seen.
    pub(super) fn section(&self) -> usize {
        let first = self.opened.first().map(|screen| &screen.subject);
        let found = SECTIONS.iter().position(|(_, subject)| Some(subject) == first);
        found.unwrap_or(0)
    }

    /// Takes what was told, at a time by a clock that only runs forward.
    pub(super) fn take(&mut self, told: Told, at: Duration) {
        match told {
            Told::Connected => self.link = Link::Connected,
            Told::Lost(reason) => self.link = Link::Lost(reason),
            Told::Paused(pause) => self.paused = pause,
            Told::Answer(subject, answer) => {
                let screen = self.screen();
                // Of what is not seen any more, it is late.
                if screen.subject == subject {
                    screen.take(answer, at);
                }
            }
        }
    }

    /// Takes a key.
    pub(super) fn key(&mut self, key: KeyEvent) -> Action {
        if key.kind == KeyEventKind::Release {
            return Action::Nothing;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Action::Quit,
                KeyCode::Char('l') => Action::Redraw,
                KeyCode::Char('z') => Action::Stop,
                _ => Action::Nothing,
            };
        }
        if let Some(typed) = self.typed.take() {
            self.typed = self.type_on(typed, key.code);
            return Action::Nothing;
        }
        if self.helps && key.code != KeyCode::Char('q') {
            self.helps = false;
            return Action::Nothing;
        }
        match key.code {
            KeyCode::Char('q') => return Action::Quit,
            KeyCode::Char('?') => self.helps = true,
            KeyCode::Char('/') => self.typed = Some(String::new()),
            KeyCode::Esc | KeyCode::Backspace if self.opened.len() > 1 => {
                self.opened.pop();
            }
            KeyCode::Enter => {
                let chosen = self.screen().chosen();
                self.opened.extend(chosen.map(Screen::new));
            }
            KeyCode::Right | KeyCode::Tab => self.turn(1),
            KeyCode::Left | KeyCode::BackTab => self.turn(SECTIONS.len() - 1),
            code => self.go(code),
        }
        Action::Nothing
    }

    /// Goes on with a search, until Enter begins it or Esc drops it.
    fn type_on(&mut self, mut typed: String, code: KeyCode) -> Option<String> {
        match code {
            KeyCode::Esc => return None,
            KeyCode::Enter if typed.trim().is_empty() => return None,
            KeyCode::Enter => {
                self.search(typed);
                return None;
            }
            // With nothing left to delete, it is over.
            KeyCode::Backspace => {
                typed.pop()?;
            }
            KeyCode::Char(c) if !c.is_control() && typed.chars().count() < TYPED => typed.push(c),
            _ => {}
        }
        Some(typed)
    }

    /// Shows the outputs that a search finds, in the output root of the build that is seen, or in all.
    fn search(&mut self, text: String) {
        let build = match &self.screen().subject {
            Subject::Build(id) | Subject::Outputs { build: id, .. } => id.clone(),
            _ => String::new(),
        };
        // A search after a search takes its place.
        self.opened
            .retain(|screen| !matches!(screen.subject, Subject::Outputs { .. } | Subject::Output(_)));
        self.opened.push(Screen::new(Subject::Outputs { build, text }));
    }

    /// Shows the section that is so many to the right.
    fn turn(&mut self, by: usize) {
        let (_, subject) = &SECTIONS[(self.section() + by) % SECTIONS.len()];
        self.opened = vec![Screen::new(subject.clone())];
    }

    /// Moves within the screen.
    fn go(&mut self, code: KeyCode) {
        let room = self.room.max(1);
        let screen = self.screen();
        // The end of a text is known when it is drawn.
        let last = screen
            .rows()
            .map_or(usize::MAX / 2, |rows| rows.saturating_sub(1));
        let to = match code {
            KeyCode::Up | KeyCode::Char('k') => screen.at.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => screen.at.saturating_add(1),
            KeyCode::PageUp => screen.at.saturating_sub(room),
            KeyCode::PageDown | KeyCode::Char(' ') => screen.at.saturating_add(room),
            KeyCode::Home => 0,
            KeyCode::End => last,
            _ => return,
        };
        screen.at = to.min(last);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli::top) fn build(id: &str) -> pb::Invocation {
        pb::Invocation {
            invocation_id: id.to_owned(),
            ..pb::Invocation::default()
        }
    }

    pub(in crate::cli::top) fn press(top: &mut Top, codes: impl IntoIterator<Item = KeyCode>) {
        for code in codes {
            assert_eq!(top.key(KeyEvent::from(code)), Action::Nothing, "{code:?}");
        }
    }

    fn typed(text: &str) -> impl Iterator<Item = KeyCode> + '_ {
        text.chars().map(KeyCode::Char)
    }

    fn with_builds(ids: &[&str]) -> Top {
        let mut top = Top::default();
        builds(&mut top, ids);
        top
    }

    fn builds(top: &mut Top, ids: &[&str]) {
        let list = ids.iter().map(|id| build(id)).collect();
        top.take(
            Told::Answer(Subject::Builds, Answer::Builds(list)),
            Duration::ZERO,
        );
    }

    #[test]
    fn the_chosen_build_is_opened_and_stays_chosen_when_others_begin() {
        let mut top = with_builds(&["b", "a"]);
        press(&mut top, [KeyCode::Down]);
        builds(&mut top, &["d", "c", "b", "a"]);
        assert_eq!(top.screen().at, 3);
        press(&mut top, [KeyCode::Down, KeyCode::Enter]);
        assert_eq!(top.subject(), Subject::Build("a".to_owned()));
        press(&mut top, [KeyCode::Esc]);
        assert_eq!((top.subject(), top.screen().at), (Subject::Builds, 3));
        press(&mut top, [KeyCode::Backspace, KeyCode::Home, KeyCode::Up]);
        assert_eq!((top.subject(), top.screen().at), (Subject::Builds, 0));
        builds(&mut top, &[]);
        press(
            &mut top,
            [KeyCode::Down, KeyCode::End, KeyCode::PageUp, KeyCode::Enter],
        );
        assert_eq!((top.subject(), top.screen().at), (Subject::Builds, 0));
    }

    #[test]
    fn sections_lie_in_a_circle() {
        let mut top = with_builds(&["a"]);
        press(&mut top, [KeyCode::Enter, KeyCode::Right]);
        assert_eq!(top.subject(), Subject::Caches);
        press(&mut top, [KeyCode::Tab]);
        assert_eq!(top.subject(), Subject::Disk);
        press(&mut top, [KeyCode::Right]);
        assert_eq!(top.subject(), Subject::Builds);
        press(&mut top, [KeyCode::Left, KeyCode::BackTab]);
        assert_eq!(top.subject(), Subject::Caches);
    }

    #[test]
    fn a_search_is_about_the_build_that_is_seen_and_takes_the_place_of_one_before() {
        let mut top = with_builds(&["a"]);
        press(&mut top, [KeyCode::Enter, KeyCode::Char('/')]);
        press(&mut top, typed("qx?"));
        press(&mut top, [KeyCode::Backspace, KeyCode::Backspace, KeyCode::Enter]);
        let of = |text: &str| Subject::Outputs {
            build: "a".to_owned(),
            text: text.to_owned(),
        };
        assert_eq!(top.subject(), of("q"));
        let found = pb::FindOutputsResponse {
            outputs: vec![pb::Output {
                exec_root: "/o".to_owned(),
                exec_path: "bazel-out/x".to_owned(),
                ..pb::Output::default()
            }],
            more: false,
        };
        top.take(Told::Answer(of("q"), Answer::Outputs(found)), Duration::ZERO);
        press(&mut top, [KeyCode::Enter]);
        assert_eq!(top.subject(), Subject::Output("/o/bazel-out/x".to_owned()));
        press(&mut top, [KeyCode::Esc, KeyCode::Char('/')]);
        press(&mut top, typed("y"));
        press(&mut top, [KeyCode::Enter]);
        assert_eq!(top.subject(), of("y"));
        press(&mut top, [KeyCode::Esc]);
        assert_eq!(top.subject(), Subject::Build("a".to_owned()));
        // Nothing is searched for without a word.
        for keys in [
            [KeyCode::Char('/'), KeyCode::Enter],
            [KeyCode::Char('/'), KeyCode::Backspace],
            [KeyCode::Char('/'), KeyCode::Esc],
        ] {
            press(&mut top, keys);
            assert_eq!((top.typed.as_deref(), top.opened.len()), (None, 2));
        }
    }

    #[test]
    fn what_is_said_of_another_screen_is_late() {
        let mut top = with_builds(&["a"]);
        press(&mut top, [KeyCode::Enter]);
        builds(&mut top, &["b"]);
        assert!(matches!(top.screen().content, Content::Unknown));
        top.take(
            Told::Answer(Subject::Build("a".to_owned()), Answer::Nothing("gone".to_owned())),
            Duration::ZERO,
        );
        assert!(matches!(top.screen().content, Content::Nothing(_)));
    }

    #[test]
    fn keys_that_end_it_do_so_everywhere() {
        let control = |c| KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL);
        let mut top = Top::default();
        assert_eq!(top.key(control('c')), Action::Quit);
        assert_eq!(top.key(control('z')), Action::Stop);
        assert_eq!(top.key(control('l')), Action::Redraw);
        assert_eq!(top.key(control('w')), Action::Nothing);
        press(&mut top, [KeyCode::Char('?')]);
        assert!(top.helps);
        assert_eq!(top.key(KeyEvent::from(KeyCode::Char('q'))), Action::Quit);
        press(&mut top, [KeyCode::Down]);
        assert!(!top.helps, "any other key closes it");
        press(&mut top, typed("/q"));
        assert_eq!(top.typed.as_deref(), Some("q"), "it is a letter like any other");
        assert_eq!(top.key(control('c')), Action::Quit);
    }
}
