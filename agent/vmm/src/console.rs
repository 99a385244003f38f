//! The console: what the guest says goes to a log and to whoever is connected, what that one types goes to the guest.
//!
//! Nobody makes the guest wait: a client that does not read misses what was said meanwhile.

use std::{
    fs::File,
    io::{self, Read as _, Write},
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use anyhow::Context as _;

use crate::control;

/// Pieces of output that wait for a client.
const PIECES: usize = 4096;
/// A client that takes nothing for so long is dropped.
const WRITE_BUDGET: Duration = Duration::from_secs(5);

type Client = Arc<Mutex<Option<(SyncSender<Vec<u8>>, UnixStream)>>>;

/// Where the guest's words go.
#[derive(Debug, Clone, Default)]
pub struct Console {
    log: Option<Arc<File>>,
    client: Client,
}

impl Console {
    /// One that writes into this log.
    #[must_use]
    pub fn new(log: Option<File>) -> Self {
        Self { log: log.map(Arc::new), client: Client::default() }
    }

    /// Takes clients, one at a time: the newest. What they type goes to `feed`.
    ///
    /// # Errors
    /// When there is no thread, or the socket does not listen.
    pub fn listen(&self, socket: OwnedFd, feed: impl Fn(&[u8]) + Clone + Send + 'static) -> anyhow::Result<()> {
        let client = Arc::clone(&self.client);
        let take = move |stream: UnixStream| {
            let feed = feed.clone();
            // Who cannot be served hears nothing and goes.
            let _ = serve(&client, stream, feed);
        };
        control::accept("console", socket, take).context("listening for the console's clients")
    }
}

fn serve(client: &Client, stream: UnixStream, feed: impl Fn(&[u8]) + Send + 'static) -> io::Result<()> {
    let (sender, pieces) = sync_channel::<Vec<u8>>(PIECES);
    let (mut writer, mut reader) = (stream.try_clone()?, stream.try_clone()?);
    writer.set_write_timeout(Some(WRITE_BUDGET))?;
    let write = move || {
        for piece in pieces {
            if writer.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = writer.shutdown(Shutdown::Both);
    };
    std::thread::Builder::new().name("console-out".to_owned()).spawn(write)?;
    let read = move || {
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = reader.read(&mut bytes) {
            feed(&bytes[..count]);
        }
    };
    std::thread::Builder::new().name("console-in".to_owned()).spawn(read)?;
    let old = client.lock().unwrap_or_else(PoisonError::into_inner).replace((sender, stream));
    if let Some((_, old)) = old {
        let _ = old.shutdown(Shutdown::Both);
    }
    Ok(())
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some((client, _)) = &*self.client.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = client.try_send(bytes.to_vec());
        }
        match &self.log {
            Some(log) => (&**log).write(bytes),
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
