//! Telling people what happens: chapters, steps with their time, remarks.

use std::future::Future;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use supercloud_cli::progress::Bar;
use supercloud_cli::table::duration;

/// Writes to standard output. What cannot be written (nobody reads any more) is not worth failing for.
#[derive(Debug, Clone, Copy)]
pub struct Teller {
    is_terminal: bool,
}

impl Default for Teller {
    fn default() -> Self {
        Self { is_terminal: std::io::stdout().is_terminal() }
    }
}

impl Teller {
    /// Text as it is.
    pub fn say(self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ignored = writeln!(out, "{text}").and_then(|()| out.flush());
    }

    /// A new chapter.
    pub fn chapter(self, number: usize, of: usize, text: &str) {
        if self.is_terminal {
            self.say(&format!("\n\x1b[1m{number}/{of}  {text}\x1b[0m"));
        } else {
            self.say(&format!("\n{number}/{of}  {text}"));
        }
    }

    /// A remark inside a chapter.
    pub fn remark(self, text: &str) {
        for line in text.lines() {
            self.say(&format!("     {line}"));
        }
    }

    /// Says what is done, does it, says how long it took; on a terminal the seconds are counted meanwhile.
    pub async fn step<T>(self, text: &str, work: impl Future<Output = T>) -> T {
        let began = Instant::now();
        self.part(&format!("     {text} "));
        let mut work = std::pin::pin!(work);
        let result = loop {
            tokio::select! {
                result = &mut work => break result,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    if self.is_terminal {
                        self.part(&format!("\r\x1b[2K     {text} ... {} s", began.elapsed().as_secs()));
                    }
                }
            }
        };
        let took = duration(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
        let start = if self.is_terminal { format!("\r\x1b[2K     {text} ") } else { String::new() };
        self.say(&format!("{start}({took})"));
        result
    }

    fn part(self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ignored = write!(out, "{text}").and_then(|()| out.flush());
    }
}

/// A live bar for one operation; its line is ended when this is dropped.
#[derive(Debug, Default)]
pub struct LiveBar(Bar);

impl LiveBar {
    /// Shows a state of the operation.
    pub fn show(&mut self, operation: &supercloud_api::Operation) {
        self.0.show(operation);
    }
}

impl Drop for LiveBar {
    fn drop(&mut self) {
        self.0.end();
    }
}
