//! A domain's console: what it says goes into a log and to who is connected, what those say goes to it.
//!
//! Xen's own daemon (`xenconsoled`) has a terminal for each domain, whose path is in the store. While no agent is there, that daemon
//! keeps what the domain says, up to its own bound.

use std::{ffi::OsStr, fs::File, io, os::unix::fs::OpenOptionsExt as _, sync::Arc, time::Duration};

use supercloud_blanket::{Launch, home};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, unix::AsyncFd},
    net::{UnixListener, UnixStream},
    sync::broadcast,
    task::JoinSet,
    time::sleep,
};

use crate::xl;

/// Between two attempts to reach a terminal.
const RETRY_EVERY: Duration = Duration::from_millis(500);
/// What is read at once.
const CHUNK_BYTES: usize = 4096;
/// Most who listen at one time; each is a few kilobytes.
const MAX_CLIENTS: usize = 8;

/// Serves the console of a domain until it is dropped, or the domain's terminal ends.
pub async fn serve(launch: Launch, domain: u32, budget: Duration) {
    let guest = launch.guest;
    if let Err(error) = talk(&launch, domain, budget).await {
        tracing::debug!(%guest, %error, "the console has ended");
    }
}

async fn terminal(domain: u32, budget: Duration) -> io::Result<File> {
    let key = format!("/local/domain/{domain}/console/tty");
    loop {
        let told = xl::run("find a console", budget, OsStr::new("xenstore-read"), [key.as_str()]).await;
        match told.as_deref().map(str::trim) {
            Ok(path) if path.starts_with("/dev/pts/") => {
                let options = libc::O_NOCTTY | libc::O_NONBLOCK;
                return File::options().read(true).write(true).custom_flags(options).open(path);
            }
            // The daemon has not got to it yet.
            _ => sleep(RETRY_EVERY).await,
        }
    }
}

async fn talk(launch: &Launch, domain: u32, budget: Duration) -> io::Result<()> {
    let terminal = terminal(domain, budget).await?;
    // SAFETY: the file owns its descriptor, is moved in here, and only lent from here on: it stays open and the same until it is dropped.
    let terminal = Arc::new(unsafe { AsyncFd::register(terminal)? });
    let mut log = match &launch.host.console_log {
        Some(path) => {
            let mut options = tokio::fs::OpenOptions::new();
            Some(options.create(true).append(true).mode(0o600).open(path).await?)
        }
        None => None,
    };
    let (said, _) = broadcast::channel::<Arc<[u8]>>(64);
    let listener = match &launch.host.console_socket {
        Some(path) => {
            let listener = home::listen(path)?;
            listener.set_nonblocking(true)?;
            Some(UnixListener::from_std(listener)?)
        }
        None => None,
    };
    let mut clients = JoinSet::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = read(&terminal, &mut chunk) => {
                let bytes = &chunk[..read?];
                if bytes.is_empty() {
                    return Ok(());
                }
                if let Some(log) = &mut log {
                    log.write_all(bytes).await?;
                    log.flush().await?;
                }
                // Nobody may be listening.
                let _ = said.send(bytes.into());
            }
            accepted = accepted => {
                let (client, _) = accepted?;
                if clients.len() < MAX_CLIENTS {
                    clients.spawn(attend(client, said.subscribe(), Arc::clone(&terminal)));
                }
            }
            Some(_) = clients.join_next(), if !clients.is_empty() => {}
        }
    }
}

/// One who is connected; it ends when that one hangs up.
async fn attend(mut client: UnixStream, mut said: broadcast::Receiver<Arc<[u8]>>, terminal: Arc<AsyncFd<File>>) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        tokio::select! {
            heard = said.recv() => match heard {
                Ok(bytes) if client.write_all(&bytes).await.is_ok() => {}
                // It reads too slowly: it misses something.
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                _ => return,
            },
            typed = client.read(&mut chunk) => match typed {
                Ok(count) if count > 0 => {
                    if write(&terminal, &chunk[..count]).await.is_err() {
                        return;
                    }
                }
                _ => return,
            },
        }
    }
}

async fn read(terminal: &AsyncFd<File>, chunk: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = terminal.readable().await?;
        match ready.try_io(|terminal| io::Read::read(&mut terminal.get_ref(), chunk)) {
            Ok(done) => return done,
            Err(_not_yet) => {}
        }
    }
}

async fn write(terminal: &AsyncFd<File>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = terminal.writable().await?;
        if let Ok(done) = ready.try_io(|terminal| io::Write::write(&mut terminal.get_ref(), bytes)) {
            bytes = bytes.get(done?..).unwrap_or_default();
        }
    }
    Ok(())
}
