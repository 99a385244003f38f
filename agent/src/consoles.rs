//! Guests' consoles that the controller has opened: each a task between the hypervisor's socket and the link.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_api::link::{CONSOLE_TAKEN, ConsoleBytes, ConsoleNews, ConsoleOrder, MAX_CONSOLE_BYTES, Notice};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
    net::UnixStream,
    sync::mpsc,
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use crate::{guest::record::Places, host::Host};

/// How much of what a console said before is shown first.
const PAST_BYTES: u64 = 8 << 10;
/// How long the hypervisor may take to answer, and to take what is typed.
const BUDGET: Duration = Duration::from_secs(5);
/// The pause between two pieces: the link is not a console's alone.
const PIECE_PAUSE: Duration = Duration::from_millis(20);
/// Pieces that may wait to be typed; what is typed beyond is lost, as on a real console.
const TYPED: usize = 64;
/// Consoles at once.
const MOST: usize = 64;

struct Shown {
    guest: GuestId,
    typed: mpsc::Sender<Vec<u8>>,
    _task: AbortOnDropHandle<()>,
}

/// All of this host's.
#[derive(Clone)]
pub struct Consoles {
    host: Arc<Host>,
    shown: Arc<Mutex<HashMap<u64, Shown>>>,
}

impl Consoles {
    /// None yet.
    #[must_use]
    pub fn new(host: Arc<Host>) -> Self {
        Self { host, shown: Arc::default() }
    }

    fn shown(&self) -> MutexGuard<'_, HashMap<u64, Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller is away: nobody looks any more.
    pub fn close_all(&self) {
        self.shown().clear();
    }

    /// Does what the controller orders.
    pub fn order(&self, console: u64, order: ConsoleOrder) {
        match order {
            ConsoleOrder::Open { guest, epoch } => self.open(console, guest, epoch),
            ConsoleOrder::Type { data } => {
                if let Some(shown) = self.shown().get(&console)
                    && shown.typed.try_send(data.0).is_err()
                {
                    tracing::debug!(console, "what is typed is lost: the guest does not take it");
                }
            }
            ConsoleOrder::Close => drop(self.shown().remove(&console)),
        }
    }

    fn open(&self, console: u64, guest: GuestId, epoch: Epoch) {
        let mut shown = self.shown();
        // The hypervisor serves one at a time.
        let older: Vec<u64> = shown.iter().filter(|(_, one)| one.guest == guest).map(|(number, _)| *number).collect();
        for number in older {
            shown.remove(&number);
            self.tell(number, closed(CONSOLE_TAKEN));
        }
        if shown.len() >= MOST {
            self.tell(console, closed("too many consoles of this host are open"));
            return;
        }
        let (typed, taken) = mpsc::channel(TYPED);
        let (host, all) = (Arc::clone(&self.host), Arc::clone(&self.shown));
        let task = tokio::spawn(async move {
            let why = show(&host, console, guest, epoch, taken).await;
            host.link.tell(Notice::Console { console, news: closed(&why) });
            // The last thing that it does: it is aborted by this.
            all.lock().unwrap_or_else(PoisonError::into_inner).remove(&console);
        });
        shown.insert(console, Shown { guest, typed, _task: AbortOnDropHandle::new(task) });
    }

    fn tell(&self, console: u64, news: ConsoleNews) {
        self.host.link.tell(Notice::Console { console, news });
    }
}

fn closed(why: &str) -> ConsoleNews {
    ConsoleNews::Closed { why: why.to_owned() }
}

/// Shows a console to its end; why it ended.
async fn show(host: &Host, console: u64, guest: GuestId, epoch: Epoch, mut typed: mpsc::Receiver<Vec<u8>>) -> String {
    let say = |data: Vec<u8>| {
        let news = ConsoleNews::Said { data: ConsoleBytes(data) };
        host.link.tell(Notice::Console { console, news });
    };
    match host.backend.status(guest).await {
        Ok(Some(info)) if info.epoch == epoch => {}
        Ok(_) => return "the guest does not run on this host".to_owned(),
        Err(error) => return crate::chain(&error),
    }
    let reached = async {
        let socket = host.backend.console(guest).await.map_err(|error| crate::chain(&error))?;
        UnixStream::connect(&socket).await.map_err(|error| format!("the guest's console: {error}"))
    };
    let stream = match timeout(BUDGET, reached).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(why)) => return why,
        Err(_) => return "the hypervisor does not answer".to_owned(),
    };
    let places = Places::new(&host.config.guests_dir(), &host.config.run_dir, guest);
    match past(&places.console_log()).await {
        Ok(past) if !past.is_empty() => say(past),
        Ok(_) => {}
        Err(error) => tracing::debug!(%guest, %error, "what the console said before cannot be read"),
    }
    let (mut from, mut to) = stream.into_split();
    let mut piece = vec![0; MAX_CONSOLE_BYTES];
    loop {
        tokio::select! {
            read = from.read(&mut piece) => match read {
                Ok(0) | Err(_) => return "the guest has left this host, or was switched off".to_owned(),
                Ok(count) => {
                    say(piece[..count].to_vec());
                    tokio::time::sleep(PIECE_PAUSE).await;
                }
            },
            data = typed.recv() => {
                let Some(data) = data else { return "nobody looks any more".to_owned() };
                if !matches!(timeout(BUDGET, to.write_all(&data)).await, Ok(Ok(()))) {
                    return "the guest's console does not take what is typed".to_owned();
                }
            }
        }
    }
}

/// The last that it said.
async fn past(log: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = tokio::fs::File::open(log).await?;
    let bytes = file.metadata().await?.len();
    file.seek(std::io::SeekFrom::Start(bytes.saturating_sub(PAST_BYTES))).await?;
    let mut past = Vec::new();
    file.take(PAST_BYTES).read_to_end(&mut past).await?;
    Ok(past)
}
