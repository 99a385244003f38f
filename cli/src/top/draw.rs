//! The picture that `top` draws: pure, from a snapshot and a size. Sections that have nothing to tell take one line.

use ratatui::{
    buffer::Buffer,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Paragraph, Widget as _},
};
use supercloud_api::{Guest, GuestState, Host, HostState, Operation, OperationKind, Tenure};
use supercloud_cli::{
    progress,
    table::{bytes, duration, time, usd},
};

use super::snapshot::Snapshot;
use crate::listings::word;

/// What is older than this is said to be old, in milliseconds.
const OLD_MS: u64 = 15_000;
/// At most so many lines of alarms, and of moves.
const ALARMS_AT_MOST: usize = 5;
const MOVES_AT_MOST: usize = 8;
/// From this width on moves are told in full.
const WIDE: u16 = 130;
/// Characters of a bar of memory.
const BAR: usize = 6;

const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
const TITLE: Style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().fg(Color::DarkGray);

/// Draws the snapshot as it looks at `now_ms` of the wall clock.
pub fn draw(area: Rect, buffer: &mut Buffer, snapshot: &Snapshot, now_ms: u64) {
    let alarms = alarms(snapshot);
    let (alarm_room, move_room) = (
        1 + alarms.len().min(ALARMS_AT_MOST),
        1 + (snapshot.operations.len() + usize::from(snapshot.more_operations > 0)).min(MOVES_AT_MOST),
    );
    // Hosts and prices get what they need of at most half of the rest; guests the remainder.
    let fixed = 3 + alarm_room + move_room;
    let rest = usize::from(area.height).saturating_sub(fixed);
    let wanted = 2 + snapshot.hosts.len().max(snapshot.markets.len());
    let hosts_room = wanted.min(rest.div_ceil(2)).max(rest.min(3));
    let length = |lines: usize| Constraint::Length(u16::try_from(lines).unwrap_or(u16::MAX));
    let parts: [Rect; 6] = Layout::vertical([
        length(2),
        length(alarm_room),
        length(move_room),
        length(hosts_room),
        Constraint::Fill(1),
        length(1),
    ])
    .areas(area);
    head(snapshot, now_ms).render(parts[0], buffer);
    let title = if alarms.is_empty() {
        Line::styled("No alarms", TITLE)
    } else {
        Line::styled(format!("Alarms {}", alarms.len()), BAD)
    };
    section(title, None, alarms, parts[1], buffer);
    moves(snapshot, parts[2], buffer);
    let [hosts_part, _gap, prices_part] = Layout::horizontal([
        Constraint::Fill(1),
        Constraint::Length(2),
        Constraint::Length(prices_width(snapshot, area.width)),
    ])
    .areas(parts[3]);
    hosts(snapshot, hosts_part, buffer);
    prices(snapshot, prices_part, buffer);
    guests(snapshot, parts[4], buffer);
    Paragraph::new(Line::styled("q quit", FAINT)).render(parts[5], buffer);
}

/// Text as it may stand on a terminal: what a guest or a host says of itself cannot steer it.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn head(snapshot: &Snapshot, now_ms: u64) -> Paragraph<'static> {
    let count = |state| snapshot.guests.iter().filter(|guest| guest.state == state).count();
    let up = snapshot.hosts.iter().filter(|host| host.state == HostState::Up).count();
    let mut counts = format!("hosts {up}/{} up   guests {}", snapshot.hosts.len(), snapshot.guests.len());
    for state in [GuestState::Running, GuestState::Stopped, GuestState::Frozen, GuestState::Created, GuestState::Lost] {
        if count(state) > 0 {
            counts.push_str(&format!(", {} {}", count(state), word(state)));
        }
    }
    let age = now_ms.saturating_sub(snapshot.taken_at_ms);
    let mut first = vec![Span::styled("supercloud ", TITLE), Span::raw(plain(&snapshot.url)), Span::raw("  ")];
    match &snapshot.trouble {
        Some(trouble) => first.push(Span::styled(plain(trouble), BAD)),
        None if snapshot.taken_at_ms == 0 => first.push(Span::raw("looking")),
        None if age > OLD_MS => first.push(Span::styled(format!("seen {} ago", duration(age)), BAD)),
        None => first.push(Span::raw(format!("{} UTC", time(snapshot.taken_at_ms)))),
    }
    Paragraph::new(vec![Line::from(first), Line::raw(counts)])
}

/// What is wrong, worst first.
fn alarms(snapshot: &Snapshot) -> Vec<Line<'static>> {
    let lost = |guest: &&Guest| guest.state == GuestState::Lost;
    let worst = snapshot.guests.iter().filter(lost);
    let others = snapshot.guests.iter().filter(|guest| guest.alarm.is_some() && !lost(guest));
    let guests = worst.chain(others).map(|guest| {
        let alarm = guest.alarm.clone().unwrap_or_else(|| "its host was lost".into());
        format!("guest {} ({}): {}", guest.name, word(guest.state), plain(&alarm))
    });
    let away = snapshot.hosts.iter().filter(|host| host.state == HostState::Unreachable);
    let hosts = away.map(|host| format!("host {} is unreachable since {}", host.name, time(host.last_seen_ms)));
    hosts.chain(guests).map(|text| Line::styled(text, BAD)).collect()
}

/// A title, a header if there is one, and as many lines as there is room for; the last one tells how many are left out.
fn section(
    title: Line<'static>,
    header: Option<String>,
    mut lines: Vec<Line<'static>>,
    area: Rect,
    buffer: &mut Buffer,
) {
    let mut shown = vec![title];
    shown.extend(header.filter(|_| !lines.is_empty()).map(|header| Line::styled(header, FAINT)));
    let room = usize::from(area.height).saturating_sub(shown.len());
    if lines.len() > room {
        let left_out = lines.len() - room.saturating_sub(1);
        lines.truncate(room.saturating_sub(1));
        lines.push(Line::styled(format!("... {left_out} more"), FAINT));
    }
    shown.extend(lines);
    Paragraph::new(shown).render(area, buffer);
}

const fn verb(kind: OperationKind) -> &'static str {
    match kind {
        OperationKind::GuestMigrate => "move",
        OperationKind::GuestMirror => "mirror",
        OperationKind::GuestFreeze => "freeze",
        OperationKind::GuestThaw => "thaw",
        OperationKind::GuestStart => "start",
        OperationKind::GuestStop => "stop",
        OperationKind::GuestDelete => "delete",
        OperationKind::ImageImport => "import",
        OperationKind::GroupMigrate => "group move",
        OperationKind::GroupFreeze => "group freeze",
        OperationKind::GroupThaw => "group thaw",
        OperationKind::HostRent => "rent",
        OperationKind::HostReturn => "return",
    }
}

fn moves(snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let host = |id: Option<supercloud_api::ids::HostId>| {
        let found = id.and_then(|id| snapshot.hosts.iter().find(|host| host.id == id));
        found.map(|host| host.name.to_string())
    };
    let line = |operation: &Operation| {
        let guest = operation.guest.and_then(|id| snapshot.guests.iter().find(|guest| guest.id == id));
        let guest = guest.map_or_else(|| "?".into(), |guest| guest.name.to_string());
        let way = match (host(operation.source), host(operation.destination)) {
            (Some(from), Some(to)) => format!("{from} > {to}"),
            (Some(at), None) | (None, Some(at)) => at,
            (None, None) => String::new(),
        };
        let left = format!("{} {guest} {way}", verb(operation.kind));
        let share = progress::share(operation);
        let told = if area.width < WIDE { short(operation, share) } else { progress::line(operation, share) };
        Line::raw(plain(&format!("{left:<28} {told}")))
    };
    let mut lines: Vec<Line<'static>> = snapshot.operations.iter().map(line).collect();
    if snapshot.more_operations > 0 {
        lines.push(Line::styled(format!("... {} more", snapshot.more_operations), FAINT));
    }
    let title = match snapshot.operations.len() + snapshot.more_operations {
        0 => "Nothing is moving".into(),
        count => format!("Moving {count}"),
    };
    section(Line::styled(title, TITLE), None, lines, area, buffer);
}

/// An operation in fewer words than [`progress::line`]: phase, bar, what went over of how much, time left.
fn short(operation: &Operation, share: f64) -> String {
    let told = &operation.progress;
    let mut text = format!("{:<7} {} {:>3.0} %", progress::phase_name(operation.phase), bar(share, 10), share * 100.0);
    if told.memory_total_bytes > 0 {
        text.push_str(&format!(" {} sent", bytes(told.memory_sent_bytes)));
    }
    match (told.eta_max_ms, told.downtime_ms) {
        (_, Some(pause)) => text.push_str(&format!(", paused {}", duration(pause))),
        (Some(most), None) => text.push_str(&format!(", ETA {}", duration(most))),
        (None, None) => {}
    }
    text
}

/// A share, 0 to 1, as a bar of so many characters.
fn bar(share: f64, width: usize) -> String {
    let filled = ((share.clamp(0.0, 1.0) * width as f64).round() as usize).min(width);
    format!("{}{}", "█".repeat(filled), "░".repeat(width - filled))
}

fn share_of(used: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { used as f64 / all as f64 }
}

fn style_of_host(host: &Host) -> Style {
    match host.state {
        HostState::Up => Style::new(),
        HostState::Cordoned => Style::new().fg(Color::Yellow),
        HostState::Unreachable | HostState::Removed => BAD,
    }
}

fn hosts(snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let header = format!("{:<11} {:<9} {:<6} {:>3} {:<BAR$} {:>8}", "NAME", "CLOUD", "STATE", "G", "MEMORY", "PRICE/H");
    let line = |host: &Host| {
        let guests = snapshot.guests.iter().filter(|guest| guest.host == Some(host.id)).count();
        let price = snapshot.rented.get(&host.id).and_then(|(_, market)| market.as_ref());
        let price = price.map_or_else(|| "-".into(), |market| usd(market.price_nanousd_per_hour));
        let memory = bar(share_of(host.used.memory_bytes, host.capacity.memory_bytes), BAR);
        let state = match host.state {
            HostState::Up => "up",
            HostState::Unreachable => "away",
            HostState::Cordoned => "cordon",
            HostState::Removed => "gone",
        };
        let [name, cloud] = [cut(host.name.as_str(), 11), cut(host.cloud_name.as_str(), 9)];
        Line::styled(format!("{name:<11} {cloud:<9} {state:<6} {guests:>3} {memory} {price:>8}"), style_of_host(host))
    };
    let title = Line::styled(format!("Hosts {}", snapshot.hosts.len()), TITLE);
    section(title, Some(header), snapshot.hosts.iter().map(line).collect(), area, buffer);
}

/// At most so many characters; what is cut off is told by a dot.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most { text.to_owned() } else { text.chars().take(most - 1).chain(['.']).collect() }
}

/// The width that prices take: none where there are none.
fn prices_width(snapshot: &Snapshot, width: u16) -> u16 {
    if snapshot.markets.is_empty() { 0 } else { (width.saturating_sub(50)).clamp(20, 56).min(width) }
}

fn prices(snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    if snapshot.markets.is_empty() {
        return;
    }
    let mut markets: Vec<_> = snapshot.markets.iter().collect();
    markets.sort_by_key(|market| (market.price_nanousd_per_hour, market.name.clone()));
    // The tenure is what tells two markets of one type apart: it is never cut off.
    let room = usize::from(area.width).saturating_sub(14).max(8);
    let lines = markets.iter().map(|market| {
        let price = usd(market.price_nanousd_per_hour);
        let is_above = market.on_demand_nanousd_per_hour.is_some_and(|most| market.price_nanousd_per_hour > most);
        let style = if is_above { BAD } else { Style::new() };
        let name = cut(&plain(&format!("{}/{}", market.cloud_name, market.instance_type)), room);
        let tenure = match market.tenure {
            Tenure::Spot => "spot",
            Tenure::OnDemand => "",
        };
        Line::styled(format!("{name:<room$} {tenure:<4} {price:>8}"), style)
    });
    let header = format!("{:<room$} {:<4} {:>8}", "MARKET", "", "PRICE/H");
    section(Line::styled("Prices", TITLE), Some(header), lines.collect(), area, buffer);
}

fn guests(snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let header = format!("{:<16} {:<8} {:<12} {:<12} {:<15} {:>9}", "NAME", "STATE", "CLOUD", "HOST", "IPV4", "SHAPE");
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let line = |guest: &Guest| {
        let cloud = cut(&or_dash(guest.cloud_name.as_ref().map(ToString::to_string)), 12);
        let host = cut(&or_dash(guest.host_name.as_ref().map(ToString::to_string)), 12);
        let (name, state) = (cut(guest.name.as_str(), 16), word(guest.state));
        let ipv4 = or_dash(guest.ipv4.map(|ip| ip.to_string()));
        let shape = format!("{}x{}", guest.shape.vcpus, bytes(guest.shape.memory_bytes).replace(' ', ""));
        let style = if guest.state == GuestState::Lost || guest.alarm.is_some() { BAD } else { Style::new() };
        Line::styled(format!("{name:<16} {state:<8} {cloud:<12} {host:<12} {ipv4:<15} {shape:>9}"), style)
    };
    let title = Line::styled(format!("Guests {}", snapshot.guests.len()), TITLE);
    section(title, Some(header), snapshot.guests.iter().map(line).collect(), area, buffer);
}

/// The picture as text: a line each, without what is empty at its end.
pub fn text(width: u16, height: u16, snapshot: &Snapshot, now_ms: u64) -> String {
    let area = Rect::new(0, 0, width, height);
    let mut buffer = Buffer::empty(area);
    draw(area, &mut buffer, snapshot, now_ms);
    let mut out = String::new();
    for y in 0..height {
        let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
#[path = "draw_tests.rs"]
mod tests;
