//! The lines on the console: `@sc {...}`, one JSON object each, flat, numbers and booleans and short words only.
//!
//! | field | of | meaning |
//! |---|---|---|
//! | `role`, `boot_id`, `t_ms` | all | who, which boot of it, milliseconds since that boot |
//! | `clock_back` | all | how often any clock went back |
//! | `mem_checked`, `mem_bad` | both | pages of memory checked, found wrong |
//! | `acked` | server | last number whose write was flushed |
//! | `verified`, `verify_bad` | server | records 1..=n read back from the disk, records found wrong |
//! | `write_errors` | server | failed writes or flushes |
//! | `streams` | server | streams being served |
//! | `wall_ms` | server | milliseconds since 1970 |
//! | `sabotaged` | server | faults made on purpose |
//! | `connected` | client | whether the stream stands |
//! | `connects`, `resets` | client | streams opened; streams that ended in any way |
//! | `bytes`, `bad` | client | bytes checked, bytes wrong |
//! | `ticks` | client | arrivals of data |
//! | `gap_ms` | client | longest time without data that ended, or still lasts, in this half second |
//! | `http_ok`, `http_failed` | client | status pages fetched, failed |
//! | `acked_seen` | client | the newest number of which the server said that it is safely written |
//! | `home`, `there`, `back` | traveller | the clouds in which it was: at the start, after its first move, after its second |
//! | `operation_there`, `operation_back`, `repeated` | traveller | the operations, and the answer to the first wish said again |
//! | `retries`, `failed` | traveller | requests made again; why it travels no more |

use std::fmt::{Display, Write as _};
use std::io::Write as _;

/// A flat JSON object being written.
#[derive(Debug)]
pub struct Report {
    text: String,
}

impl Report {
    /// Begins with what all roles say.
    pub fn new(role: &str) -> Self {
        let report = Self { text: String::from("{") };
        report.word("role", role).word("boot_id", &boot_id()).number("t_ms", crate::clock::boot_ms())
    }

    /// Adds a number or boolean.
    pub fn number(mut self, key: &str, value: impl Display) -> Self {
        // Writing to a string cannot fail.
        let _ = write!(self.text, "{}\"{key}\":{value}", if self.text.len() > 1 { "," } else { "" });
        self
    }

    /// Adds a word; what is no plain character is left out.
    pub fn word(self, key: &str, value: &str) -> Self {
        let plain: String =
            value.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.:/ ".contains(*c)).take(100).collect();
        self.number(key, format_args!("\"{plain}\""))
    }

    /// The object.
    pub fn finish(mut self) -> String {
        self.text.push('}');
        self.text
    }
}

/// Prints a line to the console in one write, so that nothing slips in between.
pub fn print(object: &str) {
    let line = format!("@sc {object}\n");
    let mut out = std::io::stdout().lock();
    // A console that nobody reads must not stop the work.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// The kernel's name of this boot.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json() {
        let text = Report { text: "{".into() }.number("a", 1).word("b", "x\"\n y").number("c", true).finish();
        assert_eq!(text, r#"{"a":1,"b":"x y","c":true}"#);
    }
}
