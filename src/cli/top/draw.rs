//! How the screens look. Names are others' choice: what a terminal would not just show of them is escaped.

use std::{borrow::Cow, env, time::Duration};

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Table, TableState},
};

use super::{
    look::{BUILDS, Caches, ROWS, Seen},
    screen::{Content, Link, SECTIONS, Screen, Top},
};
use crate::{
    cli::{
        client::DaemonAddress,
        progress::{BAR, bar},
    },
    printable::clipped,
    proto::outhaul::v1 as pb,
    units::{now_ms, show_count, show_duration, show_size},
};

/// Bytes of a name that are looked at.
const NAME: usize = 4000;
/// A terminal of fewer columns has fewer columns of tables.
const NARROW: u16 = 70;
/// Lines of a message above the screen.
const MESSAGE: usize = 3;

/// What all screens have to go by.
pub(super) struct Theme {
    pub(super) has_colours: bool,
    /// Where the daemon is.
    pub(super) address: String,
    /// The time, if it is not that of the clock.
    pub(super) now_ms: Option<i64>,
}

impl Theme {
    /// As the environment has it: see <https://no-color.org>.
    pub(super) fn of_environment(address: &DaemonAddress) -> Self {
        Self {
            has_colours: env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            address: address.to_string(),
            now_ms: None,
        }
    }

    fn colour(&self, colour: Color) -> Style {
        if self.has_colours {
            Style::new().fg(colour)
        } else {
            Style::new()
        }
    }

    /// What is wrong.
    fn bad(&self) -> Style {
        self.colour(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// A state's name.
    fn state(&self, name: &str) -> Style {
        match name {
            "failed" | "aborted" | "evicted" | "interrupted" | "not asked" => self.bad(),
            "running" | "draining" | "completed" => self.colour(Color::Yellow),
            "settled" | "materialized" | "asked" => self.colour(Color::Green),
            _ => Style::new(),
        }
    }

    fn now_ms(&self) -> i64 {
        self.now_ms.unwrap_or_else(now_ms)
    }
}

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);

/// Draws what is seen.
pub(super) fn draw(frame: &mut Frame<'_>, top: &mut Top, theme: &Theme) {
    let area = frame.area();
    let message = message(top, theme, area.width);
    let rows = [
        Constraint::Length(1),
        Constraint::Length(u16::try_from(message.len()).unwrap_or(0)),
        Constraint::Min(0),
        Constraint::Length(1),
    ];
    let [head, told, body, foot] = Layout::vertical(rows).areas(area);
    frame.render_widget(header(top), head);
    frame.render_widget(Paragraph::new(message), told);
    top.room = usize::from(body.height.saturating_sub(1)).max(1);
    let at = if top.helps {
        let mut from = 0;
        text(frame, body, help(), &mut from)
    } else {
        screen(frame, body, top.screen(), theme)
    };
    frame.render_widget(footer(top, at, foot.width), foot);
}

/// The sections.
fn header(top: &Top) -> Line<'static> {
    let mut spans = Vec::new();
    for (number, (name, _)) in SECTIONS.iter().enumerate() {
        let style = if number == top.section() { CHOSEN } else { DIM };
        spans.push(Span::styled(format!(" {name} "), style));
        spans.push(Span::raw(" "));
    }
    spans.push(Span::styled("outhaul top", BOLD));
    Line::from(spans)
}

/// That nobody answers, or that downloads are paused.
fn message(top: &Top, theme: &Theme, width: u16) -> Vec<Line<'static>> {
    let text = match &top.link {
        Link::Connected => match &top.paused {
            Some(pause) => pause.words(),
            None => return Vec::new(),
        },
        Link::Connecting => format!("Asking the daemon on {}.", theme.address),
        Link::Lost(reason) => format!(
            "No daemon answers on {}: {reason}. Trying again every second.",
            theme.address
        ),
    };
    let mut lines = wrapped(&text, usize::from(width), theme.bad());
    lines.truncate(MESSAGE);
    lines
}

/// The keys, or what is typed; and on the right, where in the screen this is.
fn footer(top: &Top, at: String, width: u16) -> Line<'static> {
    let width = usize::from(width);
    if let Some(typed) = &top.typed {
        let shown = fitted(typed, width.saturating_sub(2));
        return Line::from(format!("/{shown}_"));
    }
    let keys = match width {
        0..40 => "q quit  ? help",
        40..NARROW_KEYS => "q quit  / search  Enter open  ? help",
        _ => "q quit  Up/Down choose  Enter open  Esc back  Left/Right section  / search  ? help",
    };
    let room = width.saturating_sub(keys.len() + at.len());
    Line::styled(format!("{keys}{}{at}", " ".repeat(room)), DIM)
}

/// Columns from which on all keys are named.
const NARROW_KEYS: usize = 90;

fn help() -> Vec<Line<'static>> {
    let keys = [
        ("Up, Down, k, j", "choose a row, or scroll"),
        ("PageUp, PageDown, Space", "a page up or down"),
        ("Home, End", "to the beginning or the end"),
        ("Enter", "open the chosen build, or why an output is there or not"),
        ("Esc, Backspace", "back"),
        ("Left, Right, Tab", "builds, caches, disk"),
        ("/", "search outputs, of the build that is shown or of all"),
        ("?", "this page"),
        ("q, Ctrl-C", "quit"),
        ("Ctrl-L", "draw the screen anew"),
        ("Ctrl-Z", "stop, until `fg` in the shell"),
    ];
    let mut lines = vec![Line::styled("Keys", BOLD)];
    for (key, what) in keys {
        lines.push(Line::from(format!("  {key:<24} {what}")));
    }
    lines.push(Line::from(""));
    lines.push(Line::from(
        "Any key closes this page. In scripts, use `outhaul status --watch`.",
    ));
    lines
}

/// Draws one screen, and says where in it this is.
fn screen(frame: &mut Frame<'_>, area: Rect, screen: &mut Screen, theme: &Theme) -> String {
    let width = usize::from(area.width);
    let lines = match &screen.content {
        Content::Unknown => Vec::new(),
        Content::Nothing(why) => wrapped(why, width, theme.bad()),
        Content::Builds(builds) if builds.is_empty() => wrapped(
            "No builds are recorded yet. Run Bazel with --bes_backend=grpc://HOST:PORT, the address of the daemon's port \
             for build events: by default grpc://127.0.0.1:8985.",
            width,
            Style::new(),
        ),
        Content::Builds(builds) => return table(frame, area, builds_table(builds, area, theme), screen.at),
        Content::Outputs(found) if found.outputs.is_empty() => wrapped(
            if found.more {
                "None of the outputs that were looked at has all of these words, and there are more. Open a build and search \
                 there, or use `outhaul ls`."
            } else {
                "No recorded output has all of these words in its path or label, or a digest that begins with them."
            },
            width,
            Style::new(),
        ),
        Content::Outputs(found) => {
            return table(frame, area, outputs_table(found, area, theme), screen.at);
        }
        Content::Build(seen) => build(seen, screen.pace.rate(), width, theme),
        Content::Output(answer) => output(answer, width, theme),
        Content::Caches(caches) => self::caches(caches, width, theme),
        Content::Disk(usage) => disk(usage, width),
    };
    text(frame, area, lines, &mut screen.at)
}

/// Draws lines from one on, and says which are seen.
fn text(frame: &mut Frame<'_>, area: Rect, lines: Vec<Line<'_>>, from: &mut usize) -> String {
    let height = usize::from(area.height);
    let all = lines.len();
    *from = (*from).min(all.saturating_sub(height));
    let shown: Vec<Line<'_>> = lines.into_iter().skip(*from).take(height).collect();
    let to = *from + shown.len();
    frame.render_widget(Paragraph::new(shown), area);
    if all > height {
        format!(" {}-{to}/{all}", *from + 1)
    } else {
        String::new()
    }
}

/// Rows, their widths, and what is above them.
struct Rows<'a> {
    head: Vec<&'static str>,
    widths: Vec<Constraint>,
    rows: Vec<Row<'a>>,
    /// What is said of rows that are left out.
    more: &'static str,
}

/// Draws a table with its chosen row, and says which that is.
fn table(frame: &mut Frame<'_>, area: Rect, rows: Rows<'_>, chosen: usize) -> String {
    let all = rows.rows.len();
    let table = Table::new(rows.rows, rows.widths)
        .header(Row::new(rows.head).style(BOLD))
        .row_highlight_style(CHOSEN);
    let mut state = TableState::new().with_selected(Some(chosen));
    frame.render_stateful_widget(table, area, &mut state);
    format!(" {}/{all}{}", chosen + 1, rows.more)
}

/// The room for the one column that gets what the others leave.
fn rest(area: Rect, others: &[u16]) -> usize {
    let taken: u16 = others.iter().map(|width| width + 1).sum();
    usize::from(area.width.saturating_sub(taken))
}

fn number(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned())
}

fn builds_table<'a>(builds: &'a [pb::Invocation], area: Rect, theme: &Theme) -> Rows<'a> {
    let is_narrow = area.width < NARROW;
    let widths: &[u16] = if is_narrow {
        &[11, 8, 7]
    } else {
        &[11, 18, 8, 10, 7]
    };
    let room = rest(area, widths);
    let row = |build: &'a pb::Invocation| {
        let state = build.shown_state();
        let failed = number(show_count(build.failed));
        let failed = if build.failed > 0 {
            failed.style(theme.bad())
        } else {
            failed
        };
        let state = Cell::from(state).style(theme.state(state));
        let workspace = Cell::from(fitted(&build.workspace, room));
        let command = Cell::from(command(build, if is_narrow { 8 } else { 18 }));
        if is_narrow {
            return Row::new([state, command, workspace, failed]);
        }
        Row::new([
            state,
            command,
            workspace,
            number(took(build, theme.now_ms())),
            number(show_size(build.downloaded_bytes)),
            failed,
        ])
    };
    let (head, widths) = if is_narrow {
        (
            vec!["State", "Command", "Workspace", " Failed"],
            vec![11, 8, 0, 7],
        )
    } else {
        let head = vec![
            "State",
            "Command",
            "Workspace",
            "    Took",
            "Downloaded",
            " Failed",
        ];
        (head, vec![11, 18, 0, 8, 10, 7])
    };
    Rows {
        head,
        widths: widths.into_iter().map(column).collect(),
        rows: builds.iter().map(row).collect(),
        more: if builds.len() >= BUILDS as usize { "+" } else { "" },
    }
}

/// A column of that width; the one without gets the rest.
const fn column(width: u16) -> Constraint {
    match width {
        0 => Constraint::Fill(1),
        width => Constraint::Length(width),
    }
}

fn outputs_table<'a>(found: &'a pb::FindOutputsResponse, area: Rect, theme: &Theme) -> Rows<'a> {
    let is_narrow = area.width < NARROW;
    let room = if is_narrow {
        rest(area, &[12])
    } else {
        rest(area, &[12, 10])
    };
    let row = |output: &'a pb::Output| {
        let state = output.state().name();
        let style = theme.state(&state);
        let state = Cell::from(state).style(style);
        let path = Cell::from(fitted(&output.exec_path, room));
        if is_narrow {
            return Row::new([state, path]);
        }
        let size = output
            .digest
            .as_ref()
            .map_or_else(|| "-".to_owned(), |digest| show_size(digest.size));
        Row::new([state, path, number(size)])
    };
    let (head, widths) = if is_narrow {
        (vec!["State", "Output"], vec![12, 0])
    } else {
        (vec!["State", "Output", "      Size"], vec![12, 0, 10])
    };
    Rows {
        head,
        widths: widths.into_iter().map(column).collect(),
        rows: found.outputs.iter().map(row).collect(),
        more: if found.more { "+" } else { "" },
    }
}

/// One build: what it waits for, how far it is, what went wrong, its targets.
fn build(seen: &Seen, rate: Option<u64>, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let build = &seen.build;
    let state = build.shown_state();
    let mut lines = vec![Line::from(vec![
        Span::styled(state, theme.state(state)),
        Span::raw("  "),
        Span::styled(command(build, width.saturating_sub(state.len() + 2)), BOLD),
    ])];
    lines.push(Line::from(fitted(&build.workspace, width)));
    lines.push(Line::styled(
        fitted(&format!("invocation {}", build.invocation_id), width),
        DIM,
    ));
    lines.extend(held(seen, width, theme));
    lines.extend(counts(seen, rate, width, theme));
    lines.extend(on_their_way(&seen.waiting, width));
    lines.extend(problems(build, width, theme));
    lines.extend(targets(seen, width, theme));
    lines
}

/// What holds the command, and until when.
fn held(seen: &Seen, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let waiting = &seen.waiting;
    if waiting.hold_until_ms == 0 {
        return Vec::new();
    }
    let what = match waiting.required {
        0 => "The command waits for the last checks, or for the upstream event service".to_owned(),
        1 => "The command waits for 1 required output".to_owned(),
        n => format!("The command waits for {} required outputs", show_count(n)),
    };
    let left = span(theme.now_ms(), waiting.hold_until_ms);
    let text = format!("{what}, at most {left} longer ({}).", waiting.hold_limit);
    wrapped(&text, width, theme.colour(Color::Yellow))
}

/// How far it is, and what came of the outputs so far.
fn counts(seen: &Seen, rate: Option<u64>, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let build = &seen.build;
    let waiting = &seen.waiting;
    let mut lines = Vec::new();
    if !build.state().is_over() {
        let progress = seen.progress();
        let words = progress.words("outputs", rate);
        let part = progress.part().unwrap_or(0.0);
        let bar = bar(part, BAR.min(width / 3));
        lines.extend(wrapped(
            &format!("{bar} {:3.0}%  {words}", part * 100.0),
            width,
            BOLD,
        ));
    }
    let mut counts = vec![
        format!(
            "{} downloaded ({})",
            show_count(build.downloaded),
            show_size(build.downloaded_bytes)
        ),
        format!("{} already present", show_count(build.present)),
        format!("{} on their way", show_count(waiting.required + waiting.optional)),
        format!("{} failed", show_count(build.failed)),
        format!("{} only recorded", show_count(build.known)),
    ];
    if build.superseded > 0 {
        counts.push(format!("{} left to a newer build", show_count(build.superseded)));
    }
    let took = took(build, theme.now_ms());
    lines.extend(wrapped(
        &format!("{}; took {took}", counts.join(", ")),
        width,
        Style::new(),
    ));
    if build.hold_us > 0 {
        let held = show_duration(Duration::from_micros(build.hold_us));
        lines.push(Line::from(format!("held the command for {held}")));
    }
    if !build.remote_cache.is_empty() {
        lines.extend(wrapped(
            &format!("cache {}", build.remote_cache),
            width,
            Style::new(),
        ));
    }
    for (store, outputs) in &build.stores {
        let text = format!("{} from {store}", show_count(*outputs));
        lines.extend(wrapped(&text, width, Style::new()));
    }
    lines
}

fn on_their_way(waiting: &pb::Waiting, width: usize) -> Vec<Line<'static>> {
    if waiting.outputs.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![Line::from(""), Line::styled("On their way", BOLD)];
    for output in &waiting.outputs {
        let size = show_size(output.bytes);
        let path = fitted(&output.exec_path, width.saturating_sub(13));
        lines.push(Line::from(format!("{size:>11}  {path}")));
    }
    let all = waiting.required + waiting.optional;
    let more = all.saturating_sub(waiting.outputs.len() as u64);
    if more > 0 {
        lines.push(Line::from(format!("{:>11}  and {} more", "", show_count(more))));
    }
    lines
}

fn problems(build: &pb::Invocation, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for error in &build.errors {
        lines.extend(wrapped(&format!("! {error}"), width, theme.bad()));
    }
    if build.evicted > 0 {
        let left_out = build
            .evicted_target_count
            .saturating_sub(build.evicted_targets.len() as u64);
        let more = match left_out {
            0 => String::new(),
            n => format!(" and {} more", show_count(n)),
        };
        let text = format!(
            "! {} outputs of its output root are no longer in the cache; to get them, build again: {}{more}",
            show_count(build.evicted),
            build.evicted_targets.join(" ")
        );
        lines.extend(wrapped(&text, width, theme.bad()));
    }
    if !lines.is_empty() {
        lines.splice(0..0, [Line::from(""), Line::styled("Problems", BOLD)]);
    }
    lines
}

fn targets(seen: &Seen, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let all = seen.all_targets;
    let title = match seen.targets.len() {
        shown if shown < all => format!(
            "Targets ({} of {}, those that failed first; `outhaul status ID` lists all)",
            show_count(shown as u64),
            show_count(all as u64)
        ),
        _ => format!("Targets ({})", show_count(all as u64)),
    };
    let mut lines = vec![Line::from("")];
    lines.extend(wrapped(&title, width, BOLD));
    for target in &seen.targets {
        let state = target.state().name();
        let outputs = target.required + target.optional;
        let counts = match target.failed {
            0 => show_count(outputs),
            failed => format!("{} failed of {}", show_count(failed), show_count(outputs)),
        };
        let name = match &*target.aspect {
            "" => Cow::Borrowed(&*target.label),
            aspect => Cow::Owned(format!("{} ({aspect})", target.label)),
        };
        let room = width.saturating_sub(11 + counts.len() + 1);
        let style = theme.state(&state);
        lines.push(Line::from(vec![
            Span::styled(format!("{state:<10} "), style),
            Span::raw(fitted(&name, room)),
            Span::styled(format!(" {counts}"), DIM),
        ]));
    }
    lines
}

/// Why an output is there or not.
fn output(answer: &pb::why_response::Answer, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let output = answer.output.clone().unwrap_or_default();
    let mut lines = Vec::new();
    if output.exec_path.is_empty() {
        return wrapped("No recorded build has named this output.", width, theme.bad());
    }
    let state = output.state().name();
    let style = theme.state(&state);
    lines.push(Line::styled(state, style));
    lines.extend(wrapped(&output.absolute_path(), width, BOLD));
    if !output.label.is_empty() {
        lines.extend(wrapped(&output.label, width, Style::new()));
    }
    if let Some(digest) = &output.digest {
        let text = format!("{}:{}, {}", digest.function, digest.hash, show_size(digest.size));
        lines.extend(wrapped(&text, width, DIM));
    }
    lines.push(Line::from(""));
    for line in &answer.lines {
        lines.extend(wrapped(line, width, Style::new()));
    }
    lines
}

fn caches(caches: &Caches, width: usize, theme: &Theme) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    if caches.standing.is_empty() {
        lines.extend(wrapped(
            "No cache is in use yet: each build names its own.",
            width,
            Style::new(),
        ));
    }
    for cache in &caches.standing {
        let state = if cache.passed_over_ms.is_some() {
            "not asked"
        } else {
            "asked"
        };
        lines.push(Line::from(vec![
            Span::styled(format!("{state:<10} "), theme.state(state)),
            Span::raw(fitted(&cache.name, width.saturating_sub(11))),
        ]));
        let why = match cache.passed_over_ms {
            None => continue,
            Some(0) => format!("asked again with the next request: {}", cache.reason),
            Some(ms) => format!(
                "for {} more: {}",
                show_duration(Duration::from_millis(ms)),
                cache.reason
            ),
        };
        lines.extend(wrapped(&why, width, theme.bad()));
    }
    if !caches.given.is_empty() {
        lines.push(Line::from(""));
        lines.push(Line::styled("What builds on record have downloaded", BOLD));
    }
    for entry in &caches.given {
        let name = match &*entry.name {
            "" => Cow::Borrowed("(no cache needed)"),
            name => Cow::Borrowed(name),
        };
        let counts = format!(
            "{:>10}  {:>9} outputs  ",
            show_size(entry.downloaded_bytes),
            show_count(entry.downloaded)
        );
        let room = width.saturating_sub(counts.len());
        lines.push(Line::from(format!("{counts}{}", fitted(&name, room))));
    }
    lines
}

fn disk(usage: &pb::DiskUsageResponse, width: usize) -> Vec<Line<'static>> {
    let text = format!(
        "{} recorded outputs are on disk and take {}; `outhaul evict` removes those that the cache still has.",
        show_count(usage.outputs),
        show_size(usage.bytes)
    );
    let mut lines = wrapped(&text, width, Style::new());
    lines.push(Line::from(""));
    let most = usage.entries.first().map_or(0, |entry| entry.bytes).max(1);
    for entry in usage.entries.iter().take(ROWS) {
        let bar = bar(entry.bytes as f64 / most as f64, BAR.min(width / 4));
        let counts = format!(
            "{bar} {:>10}  {:>9}  ",
            show_size(entry.bytes),
            show_count(entry.outputs)
        );
        let name = match &*entry.name {
            "" => "(not recorded)",
            name => name,
        };
        let room = width.saturating_sub(counts.chars().count());
        lines.push(Line::from(format!("{counts}{}", fitted(name, room))));
    }
    lines
}

/// The build tool's command with its exit code, if that says that something is wrong.
fn command(build: &pb::Invocation, room: usize) -> String {
    let command = match &*build.command {
        "" => "(not known yet)",
        command => command,
    };
    let code = match build.exit_code {
        None | Some(0) => String::new(),
        Some(code) => format!(" (exit code {code})"),
    };
    let shown = fitted(command, room);
    if columns(&shown) + code.len() <= room {
        format!("{shown}{code}")
    } else {
        shown
    }
}

/// From its beginning to when all that it wanted was there, or to now.
fn took(build: &pb::Invocation, now_ms: i64) -> String {
    match (build.started_ms, build.settled_ms) {
        (..=0, _) => "-".to_owned(),
        (started, settled) if settled > 0 => span(started, settled),
        _ if build.state().is_over() => "-".to_owned(),
        (started, _) => span(started, now_ms),
    }
}

fn span(from_ms: i64, to_ms: i64) -> String {
    let ms = u64::try_from(to_ms.saturating_sub(from_ms)).unwrap_or_default();
    show_duration(Duration::from_millis(ms))
}

/// The columns that a text takes.
fn columns(text: &str) -> usize {
    Span::raw(text).width()
}

/// A name in at most so many columns: of a long one, its end, which says the most.
fn fitted(text: &str, room: usize) -> String {
    let shown = clipped(text, NAME);
    if columns(&shown) <= room {
        return shown.into_owned();
    }
    let mut taken = 1;
    let mut from = shown.len();
    for (at, c) in shown.char_indices().rev() {
        taken += columns(c.encode_utf8(&mut [0; 4]));
        if taken > room {
            break;
        }
        from = at;
    }
    if room == 0 {
        return String::new();
    }
    format!("…{}", &shown[from..])
}

/// A text in as many lines as it takes, broken between words where it can be.
fn wrapped(text: &str, width: usize, style: Style) -> Vec<Line<'static>> {
    let shown = clipped(text, NAME);
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut taken = 0;
    for word in shown.split_inclusive(' ') {
        let wide = columns(word.trim_end());
        if taken > 0 && taken + wide > width {
            lines.push(std::mem::take(&mut line));
            taken = 0;
        }
        for c in word.chars() {
            let column = columns(c.encode_utf8(&mut [0; 4]));
            if taken + column > width && c != ' ' && taken > 0 {
                lines.push(std::mem::take(&mut line));
                taken = 0;
            }
            line.push(c);
            taken += column;
        }
    }
    lines.push(line);
    lines
        .into_iter()
        .map(|line| Line::styled(line.trim_end().to_owned(), style))
        .collect()
}

#[cfg(test)]
mod tests;
