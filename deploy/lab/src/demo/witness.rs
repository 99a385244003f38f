//! Listens to the guests all the while, and measures silences as the peer guest saw them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::verdict::{Seen, Testimony};
use crate::fleet::{Console, Heard, Said};

/// Time between two looks at the consoles.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A guest that prints a line every half second and has not for so long is not heard any more.
const HEARING_BUDGET: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Shared {
    testimony: Testimony,
    other: Vec<String>,
}

impl Shared {
    fn note(&mut self, heard: Vec<Heard>, other: Vec<String>) {
        self.other = other;
        for Heard { host, said } in heard {
            match said {
                Said::Server(stats) => self.testimony.server.push(Seen { host, stats }),
                Said::Client(stats) => self.testimony.client.push(Seen { host, stats }),
                // None travels by itself here.
                Said::Traveller(_) => {}
            }
        }
    }
}

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Witness {
    shared: Arc<Mutex<Shared>>,
    task: JoinHandle<()>,
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A stretch of time over which the longest silence is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// The first line of the client that counts.
    from: usize,
}

impl Witness {
    /// Begins to listen to these consoles.
    #[must_use]
    pub fn listen(mut consoles: Vec<Console>) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let ours = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            loop {
                let looked = tokio::task::spawn_blocking(move || {
                    let heard: Vec<_> = consoles.iter_mut().flat_map(Console::poll).collect();
                    let other = consoles.iter().flat_map(Console::other_lines).collect();
                    (consoles, heard, other)
                });
                let Ok((back, heard, other)) = looked.await else { return };
                consoles = back;
                lock(&ours).note(heard, other);
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        Self { shared, task }
    }

    /// What was said until now.
    #[must_use]
    pub fn testimony(&self) -> Testimony {
        lock(&self.shared).testimony.clone()
    }

    /// How many lines were heard: (server, client).
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let shared = lock(&self.shared);
        (shared.testimony.server.len(), shared.testimony.client.len())
    }

    /// How many answers the client has had, as far as was heard.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        ticks_of(&lock(&self.shared).testimony)
    }

    /// The last lines of other kinds on the consoles, for messages.
    #[must_use]
    pub fn other_lines(&self) -> Vec<String> {
        lock(&self.shared).other.clone()
    }

    /// Waits until what was said until now makes `done` true; whether it did within `budget`.
    pub async fn until(&self, budget: Duration, done: impl Fn(&Testimony) -> bool) -> bool {
        let end = Instant::now() + budget;
        loop {
            if done(&lock(&self.shared).testimony) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Opens a window: from the client's next line on, so that nothing of before counts.
    pub async fn open(&self) -> Window {
        let now = self.counts().1;
        // A client that is not heard any more is noticed when the window is closed.
        self.until(HEARING_BUDGET, |testimony| testimony.client.len() > now).await;
        Window { from: now + 1 }
    }

    /// The longest silence in the window until now, one that still lasts included.
    pub async fn silence(&self, window: Window) -> Option<u64> {
        let now = self.counts().1;
        let is_heard = self.until(HEARING_BUDGET, |testimony| testimony.client.len() > now).await;
        let testimony = lock(&self.shared);
        let lines = testimony.testimony.client.get(window.from..).unwrap_or_default();
        lines.iter().map(|seen| seen.stats.gap_ms).max().filter(|_| is_heard)
    }

    /// The longest silence in the window, once data flows again; none if it does not.
    pub async fn close(&self, window: Window) -> Option<u64> {
        let now = self.counts().1;
        let flows = |testimony: &Testimony| {
            let lines = testimony.client.get(now..).unwrap_or_default();
            lines.first().zip(lines.last()).is_some_and(|(first, last)| last.stats.ticks > first.stats.ticks)
        };
        let has_come_back = self.until(HEARING_BUDGET, flows).await;
        let shared = lock(&self.shared);
        let lines = shared.testimony.client.get(window.from..).unwrap_or_default();
        lines.iter().map(|seen| seen.stats.gap_ms).max().filter(|_| has_come_back)
    }
}

/// How many answers the client has had.
pub fn ticks_of(testimony: &Testimony) -> u64 {
    testimony.client.last().map_or(0, |seen| seen.stats.ticks)
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::path::Path;

    use super::*;

    fn say(path: &Path, ticks: u64, gap_ms: u64) {
        let line = format!(
            r#"@sc {{"role":"client","boot_id":"c","t_ms":{ticks},"connected":true,"connects":1,"resets":0,"bytes":{ticks},"bad":0,"ticks":{ticks},"http_ok":1,"http_failed":0,"mem_checked":1,"mem_bad":0,"clock_back":0,"gap_ms":{gap_ms}}}"#
        );
        writeln!(File::options().create(true).append(true).open(path).unwrap(), "{line}").unwrap();
    }

    async fn heard(witness: &Witness, lines: usize) {
        assert!(witness.until(Duration::from_secs(20), |testimony| testimony.client.len() >= lines).await);
    }

    #[tokio::test]
    async fn only_what_falls_into_the_window_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let witness = Witness::listen(vec![Console::new([("a".to_owned(), path.clone())])]);
        say(&path, 1, 900);
        heard(&witness, 1).await;
        let (window, ()) = tokio::join!(witness.open(), async {
            // Belongs to before: its half second began before the window.
            say(&path, 2, 800);
        });
        heard(&witness, 2).await;
        say(&path, 3, 40);
        say(&path, 3, 540);
        heard(&witness, 4).await;
        let (silence, ()) = tokio::join!(witness.silence(window), async { say(&path, 3, 1040) });
        assert_eq!(silence, Some(1040), "it still lasts");
        let (silence, ()) = tokio::join!(witness.close(window), async {
            say(&path, 3, 1540);
            say(&path, 4, 1600);
        });
        assert_eq!(silence, Some(1600));
    }
}
