//! `supercloud top`: the fleet at a glance, on a terminal, as it changes.

mod draw;
mod snapshot;

use std::{io::IsTerminal as _, time::Duration};

use anyhow::{Context as _, ensure};
use clap::Args;
use crossterm::event::{Event as TerminalEvent, EventStream, KeyCode, KeyEventKind, KeyModifiers};
use futures::StreamExt as _;
use supercloud_api::{Event, Page, client::Client, unix_ms};
use tokio::{sync::watch, task::JoinHandle};

use self::snapshot::Snapshot;

/// How long after a look the next one comes when nothing is told.
const QUIET_PERIOD: Duration = Duration::from_secs(5);
/// The same while something moves: progress is no event.
const BUSY_PERIOD: Duration = Duration::from_secs(1);
/// Looks are at least so far apart, however much happens.
const LEAST_PERIOD: Duration = Duration::from_millis(500);
/// How long after the event stream broke off it is opened again.
const STREAM_PAUSE: Duration = Duration::from_secs(3);
/// Where the output is no terminal.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// Options of `top`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  supercloud top\n  supercloud top --once          # one picture as text\n  \
    supercloud top --once --size 120x40\n\nKeys: q, Esc or Ctrl-C quit.")]
pub struct TopArguments {
    /// Print one picture as text, and end.
    #[arg(long)]
    pub once: bool,
    /// The picture's size in characters; that of the terminal, or 80x24, when absent.
    #[arg(long, value_name = "WIDTHxHEIGHT", value_parser = size, requires = "once")]
    pub size: Option<(u16, u16)>,
}

/// Reads a size: `80x24`.
fn size(text: &str) -> Result<(u16, u16), String> {
    let wrong = || format!("'{text}' is no size: write columns, x and lines, as in 80x24, each 10 to 1000");
    let (width, height) = text.split_once('x').ok_or_else(wrong)?;
    let number = |text: &str| text.parse::<u16>().ok().filter(|number| (10..=1000).contains(number)).ok_or_else(wrong);
    Ok((number(width)?, number(height)?))
}

/// Shows the fleet.
pub async fn run(client: &Client, arguments: &TopArguments) -> anyhow::Result<()> {
    if arguments.once {
        let of_terminal = terminal_size::terminal_size().map(|(width, height)| (width.0, height.0));
        let (width, height) = arguments.size.or(of_terminal).unwrap_or(USUAL_SIZE);
        let snapshot = Snapshot::take(client).await?;
        print!("{}", draw::text(width, height, &snapshot, unix_ms()));
        return Ok(());
    }
    ensure!(
        std::io::stdout().is_terminal() && std::io::stdin().is_terminal(),
        "there is no terminal to draw on; `supercloud top --once` prints one picture"
    );
    // What cannot be had at all (no controller, no right) is said before the terminal changes.
    let first = Snapshot::take(client).await?;
    let (sender, seen) = watch::channel(first);
    let _watcher = Stopped(tokio::spawn(keep_looking(client.clone(), sender)));
    live(seen).await
}

/// A task that ends with its owner.
struct Stopped(JoinHandle<()>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The terminal as it was before, whatever happens: in a panic the library's hook has seen to it before the message is written.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            ratatui::restore();
        }
    }
}

async fn live(mut seen: watch::Receiver<Snapshot>) -> anyhow::Result<()> {
    let _restored = Restored;
    let mut terminal = ratatui::try_init().context("setting the terminal up")?;
    let mut keys = EventStream::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut ended =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).context("hearing signals")?;
    let mut hung_up =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).context("hearing signals")?;
    loop {
        let snapshot = seen.borrow_and_update().clone();
        terminal.draw(|frame| draw::draw(frame.area(), frame.buffer_mut(), &snapshot, unix_ms())).context("drawing")?;
        tokio::select! {
            changed = seen.changed() => changed.context("nobody looks any more")?,
            // How old the picture is changes by itself.
            _ = tick.tick() => {}
            _ = ended.recv() => return Ok(()),
            _ = hung_up.recv() => return Ok(()),
            key = keys.next() => match key {
                Some(Ok(event)) if is_quit(&event) => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("reading keys"),
                None => return Ok(()),
            },
        }
    }
}

fn is_quit(event: &TerminalEvent) -> bool {
    let TerminalEvent::Key(key) = event else { return false };
    let is_ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (is_ctrl_c || matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc))
}

/// Looks again and again: when an event comes, and from time to time.
async fn keep_looking(client: Client, sender: watch::Sender<Snapshot>) {
    let (wake, mut woken) = watch::channel(());
    let hear = hear_events(&client, &wake);
    let look = async {
        loop {
            let period = if sender.borrow().is_busy() { BUSY_PERIOD } else { QUIET_PERIOD };
            tokio::time::sleep(LEAST_PERIOD).await;
            // The other end lives as long as this task.
            let _told_or_not = tokio::time::timeout(period - LEAST_PERIOD, woken.changed()).await;
            match Snapshot::take(&client).await {
                Ok(snapshot) => drop(sender.send_replace(snapshot)),
                Err(error) => sender.send_modify(|last| last.trouble = Some(format!("not seen: {error}"))),
            }
        }
    };
    tokio::join!(hear, look);
}

/// Wakes at each event. Without a stream it is looked from time to time all the same.
async fn hear_events(client: &Client, wake: &watch::Sender<()>) {
    loop {
        let newest: Result<Page<Event>, _> = client.get("/v1/events?last=1").await;
        let after = newest.ok().and_then(|page| page.items.last().map(|event| event.seq));
        if let Some(after) = after
            && let Ok(stream) = client.events(after).await
        {
            let mut stream = Box::pin(stream);
            while let Some(Ok(_)) = stream.next().await {
                wake.send_replace(());
            }
        }
        tokio::time::sleep(STREAM_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_columns_and_lines() {
        assert_eq!(size("80x24"), Ok((80, 24)));
        for wrong in ["", "80", "80x", "9x24", "80x1001", "80 x 24"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
