//! The progress of an operation as a line of text: phase, bar, bytes, dirty rate, time left. The bar never goes back.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use supercloud_api::{Operation, Phase};

use crate::table::{bytes, duration};

const WIDTH: usize = 24;

/// Shows one operation's progress on standard error: rewritten in place on a terminal, a line per phase elsewhere.
#[derive(Debug)]
pub struct Bar {
    is_terminal: bool,
    share: f64,
    phase: Option<Phase>,
    is_dirty: bool,
}

impl Default for Bar {
    fn default() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal(), share: 0.0, phase: None, is_dirty: false }
    }
}

impl Bar {
    /// Shows a state of the operation.
    pub fn show(&mut self, operation: &Operation) {
        self.share = self.share.max(share(operation));
        let is_new_phase = self.phase != Some(operation.phase);
        self.phase = Some(operation.phase);
        let mut out = std::io::stderr().lock();
        // What cannot be shown is not worth failing for.
        let _ignored = if self.is_terminal {
            self.is_dirty = true;
            // A line that wraps is not rewritten but left behind.
            let columns = terminal_size::terminal_size_of(&out).map_or(80, |(columns, _)| usize::from(columns.0));
            let shown: String = line(operation, self.share).chars().take(columns.saturating_sub(1)).collect();
            write!(out, "\r\x1b[2K{shown}")
        } else if is_new_phase {
            writeln!(out, "{}", line(operation, self.share))
        } else {
            Ok(())
        };
        let _ignored = out.flush();
    }

    /// Ends the line.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.is_dirty) {
            eprintln!();
        }
    }
}

/// How long between two looks at how fast bytes come.
const RATE_EVERY: Duration = Duration::from_millis(500);
/// Where nobody looks on, a line this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Bytes that come or go: how many of how many, how fast, how long still. On standard error: rewritten in place on a terminal, a
/// line now and then elsewhere.
#[derive(Debug)]
pub struct Rate {
    is_terminal: bool,
    is_dirty: bool,
    total: u64,
    done: u64,
    /// Of these, those that did not have to be moved.
    skipped: u64,
    began: Instant,
    shown: Option<Instant>,
}

impl Rate {
    /// Nothing of so many.
    #[must_use]
    pub fn new(total: u64) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        Self { is_terminal, is_dirty: false, total, done: 0, skipped: 0, began: Instant::now(), shown: None }
    }

    /// So many more were moved.
    pub fn done(&mut self, bytes: u64) {
        self.done = self.done.saturating_add(bytes);
        self.show(false);
    }

    /// So many more need not be moved.
    pub fn skip(&mut self, bytes: u64) {
        self.skipped = self.skipped.saturating_add(bytes);
        self.done(bytes);
    }

    /// So many that were counted are moved after all.
    pub fn less(&mut self, bytes: u64) {
        self.skipped = self.skipped.saturating_sub(bytes);
        self.done = self.done.saturating_sub(bytes);
    }

    fn show(&mut self, is_last: bool) {
        let every = if self.is_terminal { RATE_EVERY } else { LINE_EVERY };
        if !is_last && self.shown.unwrap_or(self.began).elapsed() < every {
            return;
        }
        self.shown = Some(Instant::now());
        let line = rate_line(self.done, self.total, self.skipped, self.began.elapsed());
        let mut out = std::io::stderr().lock();
        // What cannot be shown is not worth failing for.
        let _ignored = if self.is_terminal {
            self.is_dirty = true;
            write!(out, "\r\x1b[2K{line}")
        } else {
            writeln!(out, "{line}")
        };
        let _ignored = out.flush();
    }

    /// Says how it ended, and ends the line.
    pub fn end(&mut self) {
        self.show(true);
        if std::mem::take(&mut self.is_dirty) {
            eprintln!();
        }
    }
}

/// `12.0 MiB of 64.0 MiB, 6.0 MiB/s, 9 s left`: by what was moved in this time, not by what was there before.
fn rate_line(done: u64, total: u64, skipped: u64, took: Duration) -> String {
    let all = format!("{} of {}", bytes(done), bytes(total));
    let (moved, ms) = (done.saturating_sub(skipped), u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    if moved == 0 || ms == 0 {
        return all;
    }
    let per_s = u64::try_from(u128::from(moved) * 1000 / u128::from(ms)).unwrap_or(u64::MAX).max(1);
    let left_ms = u128::from(total.saturating_sub(done)) * 1000 / u128::from(per_s);
    let left = duration(u64::try_from(left_ms).unwrap_or(u64::MAX));
    format!("{all}, {}/s, {left} left", bytes(per_s))
}

/// How far an operation is, 0 to 1: each phase has its part of the bar; inside the copy, what remains of the memory tells.
#[must_use]
pub fn share(operation: &Operation) -> f64 {
    let progress = &operation.progress;
    match operation.phase {
        Phase::Plan => 0.0,
        Phase::Prepare => 0.05,
        Phase::Copy if progress.memory_total_bytes > 0 => {
            let done = if progress.round <= 1 {
                1.0 - progress.memory_remaining_bytes as f64 / progress.memory_total_bytes as f64
            } else {
                1.0
            };
            0.1 + 0.6 * done.clamp(0.0, 1.0)
        }
        Phase::Copy => 0.1,
        Phase::Switch => 0.75,
        Phase::Resume => 0.8,
        Phase::Finish => {
            let come = progress.disk_bytes_after_resume.unwrap_or(0);
            let all = progress.disk_missing_bytes.saturating_add(come);
            let disk = if all == 0 { 0.0 } else { come as f64 / all as f64 };
            // Memory that was left behind: of it all, where it is not known how much it was.
            let memory = match progress.memory_missing_bytes {
                Some(missing) if progress.memory_total_bytes > 0 => {
                    1.0 - (missing as f64 / progress.memory_total_bytes as f64).clamp(0.0, 1.0)
                }
                Some(_) => 0.0,
                None => 1.0,
            };
            0.85 + 0.14 * if all == 0 && memory < 1.0 { memory } else { disk.min(memory) }
        }
        Phase::Done | Phase::RolledBack | Phase::Failed => 1.0,
    }
}

/// The line.
#[must_use]
pub fn line(operation: &Operation, share: f64) -> String {
    let progress = &operation.progress;
    let filled = ((share * WIDTH as f64).round() as usize).min(WIDTH);
    let phase = phase_name(operation.phase);
    let mut text = match operation.phase {
        // Over, but not by getting to the end.
        Phase::RolledBack | Phase::Failed => phase.to_owned(),
        _ => {
            let bar = format!("{}{}", "█".repeat(filled), "░".repeat(WIDTH - filled));
            format!("{phase:<11} {bar} {:>3.0} %", share * 100.0)
        }
    };
    if progress.memory_total_bytes > 0 {
        text.push_str(&format!("  {} sent", bytes(progress.memory_sent_bytes)));
    }
    if operation.phase == Phase::Copy && progress.memory_total_bytes > 0 {
        text.push_str(&format!(", {} left", bytes(progress.memory_remaining_bytes)));
    }
    // Rounds and what the guest writes meanwhile: of a copy of a running guest.
    if operation.phase == Phase::Copy && progress.round > 0 {
        text.push_str(&format!(
            ", round {}, dirty {}/s, link {}/s, ETA {}",
            progress.round,
            bytes(progress.dirty_bytes_per_s),
            bytes(progress.bandwidth_bytes_per_s),
            eta(operation),
        ));
    }
    let disk = [progress.disk_bytes_before_resume, progress.disk_bytes_after_resume].map(Option::unwrap_or_default);
    if disk != [0, 0] {
        text.push_str(&format!(", disk {}+{}", bytes(disk[0]), bytes(disk[1])));
    }
    if let Some(missing) = progress.memory_missing_bytes.filter(|missing| *missing > 0) {
        text.push_str(&format!(", {} of memory missing", bytes(missing)));
    }
    if let Some(downtime) = progress.downtime_ms.filter(|_| operation.phase >= Phase::Resume) {
        text.push_str(&format!(", paused {}", duration(downtime)));
    }
    if !progress.message.is_empty() {
        text.push_str(&format!("  {}", progress.message));
    }
    text
}

/// The time to the switch as a range.
fn eta(operation: &Operation) -> String {
    let progress = &operation.progress;
    match (progress.eta_min_ms, progress.eta_max_ms) {
        (Some(least), Some(most)) if most > least => format!("{}–{}", duration(least), duration(most)),
        (Some(least), Some(_)) => duration(least),
        (Some(least), None) => format!("over {}", duration(least)),
        _ => "?".into(),
    }
}

/// A phase as the API writes it.
#[must_use]
pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Plan => "plan",
        Phase::Prepare => "prepare",
        Phase::Copy => "copy",
        Phase::Switch => "switch",
        Phase::Resume => "resume",
        Phase::Finish => "finish",
        Phase::Done => "done",
        Phase::RolledBack => "rolled_back",
        Phase::Failed => "failed",
    }
}
