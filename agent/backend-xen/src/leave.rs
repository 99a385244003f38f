//! A guest's stream goes out: `supercloud-xen` has libxl send the domain, and leave it suspended.
//!
//! What breaks before all is sent lets the domain run on: that program does it, also when this agent is gone, because its output ends
//! then. Only when all was sent, the domain stays as it is, until somebody says what becomes of it.

use std::{
    io,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult,
    lasting::{self, Lasting},
    migrate::{TransferPhase, TransferProgress},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader},
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use crate::{
    BUSY, XenConfig,
    guest::{Guest, failed},
    xl::last_words,
};

const CHUNK_BYTES: usize = 256 << 10;
/// How long the program may take to end, and let the domain run on: a domain has a minute to suspend.
const END_BUDGET: Duration = Duration::from_secs(150);
/// How much is kept of what it says.
const MAX_SAID_BYTES: usize = 16 << 10;
/// How much of it is heard: what says more than this is not libxl any more, and is ended by that.
const MAX_HEARD_BYTES: u64 = 16 << 20;

/// What is to be sent, and how.
pub struct Load<'a> {
    /// Of the back end.
    pub config: &'a XenConfig,
    /// libxl's name.
    pub library: &'a str,
    /// Which guest; [`Guest::leave`] was said.
    pub guest: &'a Guest,
    /// Its domain.
    pub domain: u32,
    /// Copied while it runs, else while it stands still from the start.
    pub is_live: bool,
    /// It is given up after this long.
    pub budget: Duration,
    /// For errors.
    pub what: &'static str,
}

/// A guest that was sent.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// When it stopped.
    pub paused_at: Instant,
    /// The stream's size.
    pub bytes: u64,
}

/// What a line of libxl's says of how far it is.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Suspended,
    Round(u64),
    Other,
}

fn read_word(line: &str) -> Word {
    if line.contains("Domain now suspended") {
        return Word::Suspended;
    }
    let round = line.split_once("iteration ").and_then(|(_, rest)| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    round.map_or(Word::Other, Word::Round)
}

/// Sends it until everything is in `to`, and it stands still. On an error it runs on, or will when it is told to: the stream's last bytes
/// may have failed after the program had written them.
///
/// # Errors
/// [`BackendError::Cancelled`] when it was, else what went wrong.
pub async fn send(
    load: Load<'_>,
    mut to: impl AsyncWrite + Unpin,
    progress: &watch::Sender<TransferProgress>,
) -> BackendResult<Sent> {
    let Load { config, library, guest, domain, is_live, budget, what } = load;
    let began = Instant::now();
    let mut command = Command::new(&config.program);
    let how = if is_live { "live" } else { "still" };
    command.arg(library).arg(guest.lock_file()).args(["send", &domain.to_string(), how]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    lasting::detach(&mut command, &[]);
    let child = tokio::process::Command::from(command).kill_on_drop(false).spawn();
    let mut child =
        child.map_err(|source| BackendError::File { what: "start", path: config.program.clone(), source })?;
    let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(BackendError::Failed { what, detail: "its program has no output".to_owned() });
    };
    // Dropped on an error, its output ends it.
    guest.is_sent_by(child.id().and_then(Lasting::of)).await?;
    let memory_bytes = guest.record().launch.spec.memory_bytes;
    progress.send_modify(|last| {
        last.memory_total_bytes = memory_bytes;
        last.phase = if is_live { TransferPhase::Copy } else { TransferPhase::Drain };
    });
    // A domain that stands still from the start does so from about now on.
    let mut paused_at = (!is_live).then_some(began);
    let bytes = AtomicU64::new(0);
    let carry = async {
        let (mut from, mut chunk) = (output, vec![0; CHUNK_BYTES]);
        loop {
            let count = from.read(&mut chunk).await?;
            if count == 0 {
                to.flush().await?;
                // All is written; that its carrier hung up by then is no matter here: the other side says what came.
                let _ = to.shutdown().await;
                return Ok(());
            }
            to.write_all(chunk.get(..count).unwrap_or_default()).await?;
            let sent = bytes.fetch_add(count as u64, Ordering::Relaxed).saturating_add(count as u64);
            progress.send_modify(|last| advance(last, sent, began.elapsed()));
            let limit = guest.limit.load(Ordering::Relaxed);
            // 0: as fast as it goes.
            if let Some(ms) = (count as u64).saturating_mul(1000).checked_div(limit) {
                sleep(Duration::from_millis(ms)).await;
            }
        }
    };
    // Dropped, it closes the program's output: then that fails, and lets the domain run on.
    let mut carry = Some(Box::pin(carry));
    let mut lines = BufReader::new(errors.take(MAX_HEARD_BYTES)).lines();
    let mut said = String::new();
    let mut carried: Option<io::Result<()>> = None;
    let mut is_overdue = false;
    let mut end = std::pin::pin!(sleep_until(began + budget));
    let (mut has_lines, mut may_cancel) = (true, true);
    let status = loop {
        let is_over = carry.is_none();
        let carrying = async {
            match &mut carry {
                Some(carry) => carry.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = carrying => (carried, carry) = (Some(done), None),
            line = lines.next_line(), if has_lines => match line {
                Ok(Some(line)) => {
                    match read_word(&line) {
                        Word::Suspended => {
                            paused_at = paused_at.or_else(|| Some(Instant::now()));
                            progress.send_modify(|last| last.phase = last.phase.max(TransferPhase::Drain));
                        }
                        Word::Round(round) => progress.send_modify(|last| last.iteration = last.iteration.max(round + 1)),
                        Word::Other if said.len() < MAX_SAID_BYTES => {
                            said.push_str(&line);
                            said.push('\n');
                        }
                        Word::Other => {}
                    }
                }
                Ok(None) | Err(_) => has_lines = false,
            },
            () = guest.until_cancelled(), if may_cancel => (may_cancel, carry) = (false, None),
            () = &mut end => {
                if is_overdue {
                    let detail = "its program does not end".to_owned();
                    return Err(BackendError::Failed { what, detail });
                }
                (is_overdue, carry) = (true, None);
                end.as_mut().reset(Instant::now() + END_BUDGET);
            }
            status = child.wait(), if is_over => break status.map_err(failed(what))?,
        }
    };
    if status.success() && matches!(carried, Some(Ok(()))) {
        progress.send_modify(|last| last.phase = TransferPhase::Done);
        return Ok(Sent { paused_at: paused_at.unwrap_or_else(Instant::now), bytes: bytes.load(Ordering::Relaxed) });
    }
    if guest.is_cancelled() {
        return Err(BackendError::Cancelled { what });
    }
    if is_overdue {
        return Err(BackendError::Deadline { what, budget_ms: u64::try_from(budget.as_millis()).unwrap_or(u64::MAX) });
    }
    if status.code() == Some(BUSY.into()) {
        return Err(BackendError::WrongState { guest: guest.id(), wants: what, is: "being sent already".to_owned() });
    }
    let mut detail = format!("{status}: {}", last_words(&said));
    if let Some(Err(error)) = carried {
        detail.push_str(&format!("; the stream: {error}"));
    }
    Err(BackendError::Failed { what, detail })
}

fn advance(last: &mut TransferProgress, bytes: u64, elapsed: Duration) {
    let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    last.memory_processed_bytes = bytes;
    last.memory_remaining_bytes = last.memory_total_bytes.saturating_sub(bytes);
    last.bandwidth_bytes_per_s = bytes.saturating_mul(1000) / elapsed_ms.max(1);
    last.elapsed_ms = elapsed_ms;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libxl_says_of_its_way_is_read() {
        assert_eq!(read_word("xc: progress: Frames iteration 3 of 5: 10/20  50%"), Word::Round(3));
        assert_eq!(read_word("xc: progress: Frames iteration 0: 10/20  50%"), Word::Round(0));
        assert_eq!(read_word("xc: progress: Domain now suspended"), Word::Suspended);
        for other in ["", "iteration", "iteration x", "xc: error: no"] {
            assert_eq!(read_word(other), Word::Other);
        }
    }
}
