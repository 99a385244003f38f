//! From what the guests said to the verdict: pure, so that it can be tested against every kind of evidence.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fleet::{ClientStats, ServerStats};

/// What must be zero. What was not measured is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Connections that broke: streams that ended, streams opened anew, requests that failed.
    pub tcp_resets: Option<u64>,
    /// Bytes of the stream that were wrong, and bytes of memory pages in either guest that were; absent as well when either guest
    /// has not checked memory after the last move.
    pub bytes_corrupted: Option<u64>,
    /// Acknowledged writes that the disk did not hold when it was read back, and writes or flushes that failed.
    pub writes_lost: Option<u64>,
    /// Boots after the first, of either guest, as the guests and as the controller count them; also times at which a guest's
    /// uptime, or any of its clocks as it sees them itself, went back.
    pub guest_restarts: Option<u64>,
}

/// How much was checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Bytes of the stream.
    pub bytes: Option<u64>,
    /// Numbered writes read back from the disk.
    pub writes: Option<u64>,
    /// Arrivals of data, each of which ended a measured silence.
    pub ticks: Option<u64>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All was measured, all is zero.
    Good,
    /// Something is not zero.
    Bad,
    /// Something was not measured.
    Unmeasured,
}

impl Verdict {
    /// The names and numbers.
    #[must_use]
    pub fn numbers(&self) -> [(&'static str, Option<u64>); 4] {
        [
            ("TCP resets", self.tcp_resets),
            ("bytes corrupted", self.bytes_corrupted),
            ("acknowledged writes lost", self.writes_lost),
            ("guest restarts", self.guest_restarts),
        ]
    }

    /// How it stands.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        let numbers = self.numbers();
        if numbers.iter().any(|(_, number)| number.is_some_and(|number| number > 0)) {
            Outcome::Bad
        } else if numbers.iter().any(|(_, number)| number.is_none()) {
            Outcome::Unmeasured
        } else {
            Outcome::Good
        }
    }
}

/// A line as it was heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen<T> {
    /// The host on whose console.
    pub host: String,
    /// The line.
    pub stats: T,
}

/// Everything that was said, in the order in which it was heard.
#[derive(Debug, Clone, Default)]
pub struct Testimony {
    /// By the server.
    pub server: Vec<Seen<ServerStats>>,
    /// By the client.
    pub client: Vec<Seen<ClientStats>>,
}

/// What a verdict is made from.
#[derive(Debug, Clone, Copy)]
pub struct Evidence<'a> {
    /// What the guests said.
    pub testimony: &'a Testimony,
    /// How many lines of the server had been heard when the last move was over.
    pub server_lines_before: usize,
    /// How many of the client.
    pub client_lines_before: usize,
    /// How often the controller started the guests: (server, client).
    pub starts: (u64, u64),
}

/// Bytes of a page of memory.
const PAGE_BYTES: u64 = 4096;

/// Judges. A number counts as measured only when it was also measured after the last move.
#[must_use]
pub fn judge(evidence: &Evidence) -> (Verdict, Checked) {
    let Testimony { server, client } = evidence.testimony;
    let is_client_heard = client.len() > evidence.client_lines_before;
    let is_server_heard = server.len() > evidence.server_lines_before;

    let client_boots = boots(client, |stats| (&stats.boot_id, stats.t_ms));
    let server_boots = boots(server, |stats| (&stats.boot_id, stats.t_ms));
    // Counters begin anew with each boot: their last states are added up.
    let client_sum = |number: fn(&ClientStats) -> u64| -> u64 {
        client_boots.iter().map(|lines| lines.iter().map(|stats| number(stats)).max().unwrap_or(0)).sum()
    };
    let server_sum = |number: fn(&ServerStats) -> u64| -> u64 {
        server_boots.iter().map(|lines| lines.iter().map(|stats| number(stats)).max().unwrap_or(0)).sum()
    };

    let bytes = Some(client_sum(|stats| stats.bytes)).filter(|bytes| is_client_heard && *bytes > 0);
    let ticks = Some(client_sum(|stats| stats.ticks)).filter(|ticks| is_client_heard && *ticks > 0);
    let writes = verified_after(evidence);

    let broken = client_sum(|stats| stats.resets.max(stats.connects.saturating_sub(1)) + stats.http_failed);
    let bad_pages = client_sum(|stats| stats.mem_bad) + server_sum(|stats| stats.mem_bad);
    let corrupted = client_sum(|stats| stats.bad) + bad_pages * PAGE_BYTES;
    let found_bad = server.iter().map(|seen| seen.stats.verify_bad).max().unwrap_or(0);
    let lost = found_bad.max(acknowledgements_taken_back(&server_boots)) + server_sum(|stats| stats.write_errors);
    let reboots = client_boots.len().saturating_sub(1) + server_boots.len().saturating_sub(1);
    let restarts = (reboots as u64).max(evidence.starts.0.saturating_sub(1) + evidence.starts.1.saturating_sub(1))
        + times_back(server, |stats| (&stats.boot_id, stats.t_ms))
        + times_back(client, |stats| (&stats.boot_id, stats.t_ms))
        + server_sum(|stats| stats.clock_back)
        + client_sum(|stats| stats.clock_back);
    let is_memory_checked =
        has_risen(server, evidence.server_lines_before, |stats| (&stats.boot_id, stats.mem_checked))
            && has_risen(client, evidence.client_lines_before, |stats| (&stats.boot_id, stats.mem_checked));

    let verdict = Verdict {
        tcp_resets: ticks.map(|_| broken),
        // Corrupt is corrupt, whether or not all was checked to the end.
        bytes_corrupted: bytes.filter(|_| is_memory_checked || corrupted > 0).map(|_| corrupted),
        // Lost is lost, whether or not a later check came to its end.
        writes_lost: if writes.is_some() || lost > 0 { Some(lost) } else { None },
        guest_restarts: (is_client_heard && is_server_heard).then_some(restarts),
    };
    (verdict, Checked { bytes, writes, ticks })
}

/// Whether a counter that begins anew with each boot went on after the first `before` lines.
pub(super) fn has_risen<T>(lines: &[Seen<T>], before: usize, counter: fn(&T) -> (&str, u64)) -> bool {
    let (before, after) = lines.split_at(before.min(lines.len()));
    let reached =
        |boot| before.iter().map(|seen| counter(&seen.stats)).filter(|(of, _)| *of == boot).map(|at| at.1).max();
    after.iter().map(|seen| counter(&seen.stats)).any(|(boot, count)| count > reached(boot).unwrap_or(0))
}

/// The number up to which a check after the last move found everything that had been acknowledged until then.
fn verified_after(evidence: &Evidence) -> Option<u64> {
    let (before, after) = evidence.testimony.server.split_at_checked(evidence.server_lines_before)?;
    let acked = before.iter().map(|seen| seen.stats.acked).max().filter(|acked| *acked > 0)?;
    let reached = after.iter().map(|seen| &seen.stats).filter(|stats| stats.verified + stats.verify_bad >= acked);
    reached.map(|stats| stats.verified).max()
}

/// The lines of each boot, in the guest's own order; boots in the order in which they were first heard.
fn boots<T>(lines: &[Seen<T>], key: impl Fn(&T) -> (&str, u64)) -> Vec<Vec<&T>> {
    let mut order: BTreeMap<&str, usize> = BTreeMap::new();
    let mut boots: Vec<Vec<&T>> = Vec::new();
    for seen in lines {
        let at = *order.entry(key(&seen.stats).0).or_insert(boots.len());
        if at == boots.len() {
            boots.push(Vec::new());
        }
        boots[at].push(&seen.stats);
    }
    for lines in &mut boots {
        lines.sort_by_key(|stats| key(stats).1);
    }
    boots
}

/// By how much the acknowledged number ever fell: a guest that goes on from an older disk says smaller numbers.
fn acknowledgements_taken_back(boots: &[Vec<&ServerStats>]) -> u64 {
    let (mut highest, mut back) = (0_u64, 0_u64);
    for stats in boots.iter().flatten() {
        back = back.max(highest.saturating_sub(stats.acked));
        highest = highest.max(stats.acked);
    }
    back
}

/// How often the uptime went back on one console within one boot: a guest that goes on from an older memory. (Lines of
/// two consoles may be heard in any order.)
fn times_back<T>(lines: &[Seen<T>], key: impl Fn(&T) -> (&str, u64)) -> u64 {
    let mut last: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    let mut back = 0;
    for seen in lines {
        let (boot, t_ms) = key(&seen.stats);
        let before = last.insert((&seen.host, boot), t_ms);
        back += u64::from(before.is_some_and(|before| t_ms < before));
    }
    back
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
