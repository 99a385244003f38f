//! [`PostCopy`] on processes of our own VMM.
//!
//! | our call | the source's process | the destination's process |
//! |---|---|---|
//! | `perform` | sent, something left behind | arrived, something missing |
//! | `serve_memory` | `serve`: answers over a connection | |
//! | `fetch_memory` | | `fetch`: over a connection, and whoever touches what is missing waits |
//!
//! Both processes outlive their agents; a connection goes with the agent that carries it, and the next agent makes another one.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use supercloud_blanket::{
    BackendError, BackendResult, PostCopy,
    migrate::{Transfer, TransferPhase, TransferProgress},
};
use supercloud_ids::GuestId;
use tokio::{
    net::UnixListener,
    sync::watch,
    time::{Duration, Instant},
};

use crate::{
    KvmBackend,
    backend::failed,
    keeper::{Keeper, Seen},
    migration::{dial, verb},
};

/// A socket that goes when nobody waits for who connects to it any more.
struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// Which file it is: another call may have put its own there.
    file: (u64, u64),
}

impl Listening {
    fn new(path: PathBuf) -> BackendResult<Self> {
        let cannot = |source| BackendError::File { what: "listen at", path: path.clone(), source };
        // One call on a local file each, as every bind(2) is.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(cannot)?;
        let file = file_at(&path).map_err(cannot)?;
        Ok(Self { listener, path, file })
    }
}

fn file_at(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

impl Drop for Listening {
    fn drop(&mut self) {
        // It is bound still, so that no other file can have its number.
        if file_at(&self.path).is_ok_and(|file| file == self.file) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Follows a connection to its end.
pub(crate) async fn follow(
    keeper: &Keeper,
    what: &'static str,
    number: u64,
    progress: &watch::Sender<TransferProgress>,
    show: impl Fn(&Seen) -> TransferProgress,
) -> BackendResult<()> {
    let began = Instant::now();
    let mut last = None;
    loop {
        let shown = |seen: &Seen| (seen.missing, seen.progress.left_bytes, seen.connection_over.clone());
        let news = |seen: &Seen| seen.gone.is_some() || Some(shown(seen)) != last;
        // As long as it takes: the process itself gives up who is silent.
        let seen = keeper.until(what, Duration::MAX, news).await?;
        last = Some(shown(&seen));
        progress.send_modify(|last| {
            let now = show(&seen);
            let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            *last = TransferProgress {
                phase: TransferPhase::Copy,
                memory_processed_bytes: now.memory_processed_bytes.max(last.memory_processed_bytes),
                bandwidth_bytes_per_s: now.memory_processed_bytes.saturating_mul(1000) / elapsed_ms.max(1),
                elapsed_ms,
                ..now
            };
        });
        if seen.gone.is_some() {
            return Err(BackendError::NoSuchGuest { guest: keeper.guest() });
        }
        match seen.connection_over {
            Some((over, error)) if over == number => {
                let Some(detail) = error else {
                    progress.send_modify(|last| last.phase = TransferPhase::Done);
                    return Ok(());
                };
                return Err(BackendError::Failed { what, detail });
            }
            // Another one has taken its place, and is over already.
            Some((over, _)) if over > number => return Err(BackendError::Cancelled { what }),
            _ => {}
        }
    }
}

/// Fetches over who connects, until nothing is missing.
async fn fetch(keeper: &Keeper, listening: Listening, progress: &watch::Sender<TransferProgress>) -> BackendResult<()> {
    let what = "fetch a guest's memory";
    let total = keeper.record().launch.spec.memory_bytes;
    let is_whole = |seen: &Seen| seen.gone.is_some() || seen.missing == Some(0);
    let stream = tokio::select! {
        seen = keeper.until(what, Duration::MAX, is_whole) => {
            let is_gone = seen?.gone.is_some();
            return if is_gone { Err(BackendError::NoSuchGuest { guest: keeper.guest() }) } else { Ok(()) };
        }
        accepted = listening.listener.accept() => accepted.map_err(failed(what))?.0,
    };
    drop(listening);
    let stream = stream.into_std().map_err(failed(what))?;
    let Some(number) = keeper.ask(what, verb("fetch"), Some(stream.into())).await?.connection else {
        // Nothing was missing any more.
        return Ok(());
    };
    let show = |seen: &Seen| {
        let missing = seen.missing.unwrap_or(total);
        TransferProgress {
            memory_total_bytes: total,
            memory_processed_bytes: total.saturating_sub(missing),
            memory_remaining_bytes: missing,
            ..TransferProgress::default()
        }
    };
    let followed = follow(keeper, what, number, progress, show).await;
    // Whatever became of the connection, if that was said too.
    if keeper.seen().missing == Some(0) { Ok(()) } else { followed }
}

impl PostCopy for KvmBackend {
    fn serve_memory(&self, guest: GuestId, stream: PathBuf) -> BackendResult<Transfer<()>> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        let (sender, progress) = watch::channel(TransferProgress::default());
        let done = async move {
            let what = "serve a guest's memory";
            let total = keeper.record().launch.spec.memory_bytes;
            let socket = dial(&stream).await?;
            let number = keeper.ask(what, verb("serve"), Some(socket)).await?.connection;
            let silent = || BackendError::Failed { what, detail: "its process does not say over what".to_owned() };
            let show = |seen: &Seen| TransferProgress {
                memory_total_bytes: total,
                memory_processed_bytes: seen.progress.sent_bytes,
                memory_remaining_bytes: seen.progress.left_bytes,
                ..TransferProgress::default()
            };
            follow(&keeper, what, number.ok_or_else(silent)?, &sender, show).await
        };
        Ok(Transfer { progress, done: Box::pin(done) })
    }

    fn fetch_memory(&self, guest: GuestId, stream: PathBuf) -> BackendResult<Transfer<()>> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        let listening = Listening::new(stream)?;
        let (sender, progress) = watch::channel(TransferProgress::default());
        let done = async move {
            keeper.state_of_process().await?.ok_or(BackendError::NoSuchGuest { guest })?;
            fetch(&keeper, listening, &sender).await
        };
        Ok(Transfer { progress, done: Box::pin(done) })
    }

    fn missing_bytes(&self, guest: GuestId) -> BackendResult<watch::Receiver<u64>> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        if keeper.seen().missing.is_none() {
            let detail = "its process has not said yet".to_owned();
            return Err(BackendError::Away { what: "ask what of a guest's memory is missing", detail });
        }
        Ok(keeper.missing())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_goes_takes_no_other_socket_along() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fetch.sock");
        let old = Listening::new(path.clone()).unwrap();
        let new = Listening::new(path.clone()).unwrap();
        drop(old);
        tokio::net::UnixStream::connect(&path).await.unwrap();
        drop(new);
        assert!(!path.exists());
    }
}
