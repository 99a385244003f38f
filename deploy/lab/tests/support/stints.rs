//! Where a guest ran when, by its own words alone: two copies that ran at once give themselves away.

use std::fmt;

use supercloud_lab::demo::verdict::Seen;
use supercloud_lab::fleet::ServerStats;

/// A stretch of a guest's own time that it spent at one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stint {
    /// The host.
    pub host: String,
    /// The first and last line there: milliseconds since the guest's boot.
    pub t_ms: (u64, u64),
}

impl fmt::Display for Stint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}..{}", self.host, self.t_ms.0, self.t_ms.1)
    }
}

/// The stints, by the guest's own clock. Its clock goes with it, so a guest that moves `n` times has `n + 1` of them; one that
/// ran at two hosts at once speaks at both about the same time, and has more.
pub fn stints(lines: &[Seen<ServerStats>]) -> Vec<Stint> {
    let mut said: Vec<(u64, &str)> = lines.iter().map(|seen| (seen.stats.t_ms, seen.host.as_str())).collect();
    said.sort_unstable();
    let mut stints: Vec<Stint> = Vec::new();
    for (t_ms, host) in said {
        match stints.last_mut() {
            Some(stint) if stint.host == host => stint.t_ms.1 = t_ms,
            _ => stints.push(Stint { host: host.to_owned(), t_ms: (t_ms, t_ms) }),
        }
    }
    stints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(host: &str, t_ms: u64) -> Seen<ServerStats> {
        let stats = ServerStats {
            boot_id: "b".into(),
            t_ms,
            acked: 0,
            verified: 0,
            verify_bad: 0,
            write_errors: 0,
            mem_checked: 0,
            mem_bad: 0,
            clock_back: 0,
            sabotaged: 0,
        };
        Seen { host: host.to_owned(), stats }
    }

    #[test]
    fn a_moved_guest_has_one_stint_per_host_and_a_doubled_one_more() {
        // Heard in another order than said.
        let moved = [line("b", 30), line("a", 10), line("a", 20), line("b", 40)];
        assert_eq!(stints(&moved).iter().map(ToString::to_string).collect::<Vec<_>>(), ["a 10..20", "b 30..40"]);
        let doubled = [line("a", 10), line("a", 20), line("b", 30), line("a", 31), line("b", 40), line("a", 41)];
        assert_eq!(stints(&doubled).len(), 5);
    }
}
