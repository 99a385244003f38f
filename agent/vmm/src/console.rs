//! The console: what the guest says goes to a log and to whoever is connected, what that one types goes to the guest.
//!
//! Nobody makes the guest wait: a client that does not read misses what was said meanwhile.

use std::{
    fs::File,
    io::{self, Read as _, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    time::Duration,
};

use anyhow::Context as _;
use supercloud_blanket::vmm::legacy::SerialPort;

use crate::control;

/// Pieces of output that wait for a client.
const PIECES: usize = 4096;
/// A client that takes nothing for so long is dropped.
const WRITE_BUDGET: Duration = Duration::from_secs(5);

/// The serial port of the machine that is there now.
pub type CurrentSerial = Arc<Mutex<Option<Arc<Mutex<SerialPort>>>>>;

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

/// Feeds what comes in to the serial port of the machine that is there then. What a guest does not read is lost when too
/// much of it waits.
pub fn feed_serial(mut input: File, serial: CurrentSerial) -> anyhow::Result<()> {
    let read = move || {
        let mut bytes = [0; 256];
        loop {
            let mut polled = libc::pollfd { fd: input.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: the pointer is to one local entry.
            if unsafe { libc::poll(&raw mut polled, 1, -1) } < 0
                && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted
            {
                return;
            }
            match input.read(&mut bytes) {
                Ok(0) => return,
                Ok(count) => {
                    feed(&serial, &bytes[..count]);
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => return,
            }
        }
    };
    std::thread::Builder::new().name("console-in".to_owned()).spawn(read).context("beginning a thread").map(drop)
}

/// Types into the serial port that is there now.
pub fn feed(serial: &CurrentSerial, bytes: &[u8]) {
    let port = serial.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(port) = port {
        port.lock().unwrap_or_else(PoisonError::into_inner).feed(bytes);
    }
}
