//! `supercloud guest console`: a guest's serial console on this terminal.

use std::{
    io::{IsTerminal as _, Read as _, Write as _},
    time::Duration,
};

use anyhow::Context as _;
use futures::StreamExt as _;
use supercloud_api::{
    client::{Client, ClientError},
    link::{CONSOLE_TAKEN, MAX_CONSOLE_BYTES},
};
use tokio::{sync::mpsc, time::Instant};

/// Ctrl-], as of telnet: ends it.
const ESCAPE: u8 = 0x1d;
/// How long a guest that has left its host is looked for: a move's switch, a controller's restart.
const FOLLOW_BUDGET: Duration = Duration::from_secs(120);
const FOLLOW_PAUSE: Duration = Duration::from_millis(500);

/// The terminal as it was before.
struct Raw;

impl Raw {
    fn begin() -> anyhow::Result<Self> {
        crossterm::terminal::enable_raw_mode().context("setting the terminal up")?;
        Ok(Self)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = crossterm::terminal::disable_raw_mode();
    }
}

/// Why it is not shown any more.
enum Ended {
    /// The user wants no more.
    Escaped,
    /// Somebody else looks at it now.
    Taken,
    /// The guest left its host, or the connection broke.
    Lost,
}

/// Shows it until the user ends it.
pub async fn run(client: &Client, guest: &str, read_only: bool) -> anyhow::Result<()> {
    let is_terminal = std::io::stdin().is_terminal() && !read_only;
    // What cannot be had at all is said before the terminal changes.
    let (mut number, mut pieces) = client.console(guest).await?;
    if is_terminal {
        eprintln!("{guest}'s console; Ctrl-] ends it");
    }
    let raw = is_terminal.then(Raw::begin).transpose()?;
    let mut typed = if read_only { None } else { Some(keys()) };
    loop {
        match look(client, guest, number, &mut pieces, &mut typed).await? {
            Ended::Lost => {}
            Ended::Escaped => {
                drop(raw);
                eprintln!();
                return Ok(());
            }
            Ended::Taken => {
                drop(raw);
                anyhow::bail!("somebody else looks at {guest}'s console now; the same command takes it back");
            }
        }
        // Wherever it is by then.
        let until = Instant::now() + FOLLOW_BUDGET;
        (number, pieces) = loop {
            tokio::select! {
                () = tokio::time::sleep(FOLLOW_PAUSE) => {}
                () = escaped(&mut typed) => {
                    drop(raw);
                    eprintln!();
                    return Ok(());
                }
            }
            match client.console(guest).await {
                Ok(again) => break again,
                Err(error) if Instant::now() >= until => return Err(error.into()),
                Err(_) => {}
            }
        };
    }
}

/// Waits for the user to want no more; what else is typed meanwhile is typed into nothing.
async fn escaped(typed: &mut Option<mpsc::Receiver<Vec<u8>>>) {
    while let Some(keys) = typed {
        match keys.recv().await {
            Some(data) if data.contains(&ESCAPE) => return,
            Some(_) => {}
            None => *typed = None,
        }
    }
    std::future::pending().await
}

async fn look(
    client: &Client,
    guest: &str,
    number: u64,
    pieces: &mut (impl futures::Stream<Item = Result<bytes::Bytes, ClientError>> + Unpin),
    typed: &mut Option<mpsc::Receiver<Vec<u8>>>,
) -> anyhow::Result<Ended> {
    let taken = format!("[{CONSOLE_TAKEN}]\r\n");
    let mut is_taken = false;
    loop {
        let key = async {
            match typed {
                Some(typed) => typed.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            piece = pieces.next() => match piece {
                Some(Ok(piece)) => {
                    is_taken = piece.ends_with(taken.as_bytes());
                    let mut out = std::io::stdout().lock();
                    out.write_all(&piece).and_then(|()| out.flush()).context("writing what the console says")?;
                }
                Some(Err(_)) | None if is_taken => return Ok(Ended::Taken),
                Some(Err(_)) | None => return Ok(Ended::Lost),
            },
            data = key => match data {
                Some(data) => {
                    let (before, is_end) = match data.iter().position(|byte| *byte == ESCAPE) {
                        Some(at) => (&data[..at], true),
                        None => (&data[..], false),
                    };
                    for part in before.chunks(MAX_CONSOLE_BYTES) {
                        // The console went meanwhile: what is typed into nothing is lost.
                        let _ = client.type_into_console(guest, number, part).await;
                    }
                    if is_end {
                        return Ok(Ended::Escaped);
                    }
                }
                // The end of what was piped in: it is looked at on.
                None => *typed = None,
            },
        }
    }
}

/// What is typed, on a thread of its own: reading a terminal cannot be given up.
fn keys() -> mpsc::Receiver<Vec<u8>> {
    let (sender, typed) = mpsc::channel(64);
    std::thread::spawn(move || {
        let mut bytes = [0; 1024];
        while let Ok(count @ 1..) = std::io::stdin().read(&mut bytes) {
            if sender.blocking_send(bytes[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    typed
}
