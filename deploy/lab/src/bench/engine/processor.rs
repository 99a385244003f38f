//! What processes take of the processors.

use std::{process::Child, time::Duration};

use anyhow::Context as _;

/// The kernel's clock of `/proc`: `USER_HZ` on all architectures that we know.
const TICKS_PER_S: u64 = 100;

/// What a process has taken so far, threads that have ended included, but for those threads that are there and whose names begin so.
///
/// # Errors
/// When it is gone.
pub fn taken(process: &Child, but: &str) -> anyhow::Result<Duration> {
    let folder = format!("/proc/{}", process.id());
    let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
    let all = parse(&read(&format!("{folder}/stat"))?).context("the kernel's line of a process")?.1;
    let mut others = 0;
    for thread in std::fs::read_dir(format!("{folder}/task"))? {
        let stat = thread?.path().join("stat");
        // One that has ended meanwhile is in the sum.
        let Ok(line) = std::fs::read_to_string(stat) else { continue };
        let (name, ticks) = parse(&line).context("the kernel's line of a thread")?;
        others += if name.starts_with(but) { ticks } else { 0 };
    }
    Ok(Duration::from_millis(all.saturating_sub(others) * 1000 / TICKS_PER_S))
}

/// Name and ticks (user and system) of a line of `/proc/*/stat` (proc(5)); names may have anything in them.
fn parse(line: &str) -> Option<(&str, u64)> {
    let (head, tail) = line.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    let mut fields = tail.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some((name, ticks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_anything_in_them_do_not_shift_what_is_read() {
        let line = "4242 (CPU 0/(K) VM) S 1 2 3 0 -1 4194304 500 0 0 0 71 29 0 0 20 0 4 0 100 0 0";
        assert_eq!(parse(line), Some(("CPU 0/(K) VM", 100)));
        assert_eq!(parse("7 (x) S 1 2"), None);
        assert_eq!(parse(""), None);
    }
}
