//! What processes take of the processors.

use std::{
    collections::HashMap,
    process::Child,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use super::wire::pause_until;

/// The kernel's clock of `/proc`: `USER_HZ` on all architectures that we know.
const TICKS_PER_S: u64 = 100;

/// How often threads are looked at: what one took between the last look and its end is missed.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Tells what processes take, but for the threads whose names begin so: a guest's own. A process's sum goes on holding what a thread
/// took that has ended, and nothing else tells how much that was; so they are looked at all the while.
#[derive(Debug)]
pub struct Meter {
    processes: Vec<u32>,
    others: Others,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Ticks of threads by their numbers, those that have ended included.
#[derive(Debug, Clone)]
struct Others {
    but: &'static str,
    ticks: Arc<Mutex<HashMap<String, u64>>>,
}

impl Others {
    fn look(&self, processes: &[u32]) {
        let mut ticks = self.ticks.lock().unwrap_or_else(PoisonError::into_inner);
        let folders = processes.iter().filter_map(|process| std::fs::read_dir(format!("/proc/{process}/task")).ok());
        for thread in folders.flatten().flatten() {
            // One that ends meanwhile took what was seen of it before.
            let Ok(line) = std::fs::read_to_string(thread.path().join("stat")) else { continue };
            let Some((name, now)) = parse(&line) else { continue };
            if name.starts_with(self.but) {
                ticks.insert(thread.file_name().to_string_lossy().into_owned(), now);
            }
        }
    }
}

impl Meter {
    /// Of these processes from now on.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start(processes: [&Child; 2], but: &'static str) -> std::io::Result<Self> {
        let processes: Vec<u32> = processes.into_iter().map(Child::id).collect();
        let (others, is_over) = (Others { but, ticks: Arc::default() }, Arc::new(AtomicBool::new(false)));
        let (of, seen, ends) = (processes.clone(), others.clone(), Arc::clone(&is_over));
        let look = move || {
            while !ends.load(Ordering::Relaxed) {
                seen.look(&of);
                pause_until(Instant::now() + LOOK_EVERY);
            }
        };
        let thread = std::thread::Builder::new().name("meter".to_owned()).spawn(look)?;
        Ok(Self { processes, others, is_over, thread: Some(thread) })
    }

    /// What they have taken so far.
    ///
    /// # Errors
    /// When one is gone.
    pub fn taken(&self) -> anyhow::Result<Duration> {
        self.others.look(&self.processes);
        let mut all = 0;
        for process in &self.processes {
            let path = format!("/proc/{process}/stat");
            let line = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            all += parse(&line).context("the kernel's line of a process")?.1;
        }
        let others: u64 = self.others.ticks.lock().unwrap_or_else(PoisonError::into_inner).values().sum();
        Ok(Duration::from_millis(all.saturating_sub(others) * 1000 / TICKS_PER_S))
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
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
    fn a_thread_that_has_ended_is_still_told_from_the_others() {
        let child = std::process::Command::new("sleep").arg("60").spawn().map(Sleeper).unwrap();
        let others = Others { but: "sleep", ticks: Arc::default() };
        others.ticks.lock().unwrap().insert("gone".to_owned(), 7);
        others.look(&[child.0.id()]);
        let ticks = others.ticks.lock().unwrap().clone();
        assert_eq!((ticks.len(), ticks.get("gone")), (2, Some(&7)), "{ticks:?}");
        let meter = Meter::start([&child.0, &child.0], "none").unwrap();
        assert!(meter.taken().unwrap() < Duration::from_secs(30));
    }

    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn names_with_anything_in_them_do_not_shift_what_is_read() {
        let line = "4242 (CPU 0/(K) VM) S 1 2 3 0 -1 4194304 500 0 0 0 71 29 0 0 20 0 4 0 100 0 0";
        assert_eq!(parse(line), Some(("CPU 0/(K) VM", 100)));
        assert_eq!(parse("7 (x) S 1 2"), None);
        assert_eq!(parse(""), None);
    }
}
