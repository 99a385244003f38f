//! A guest is frozen into a file, and comes out of one.
//!
//! The commit point is the name of the file: from then on the file is the guest, and nothing lets the domain run again, whatever fails
//! afterwards. Before it, what goes wrong ends with a guest that runs and without a file.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult, Launch,
    backend::{Frozen, GuestInfo, PauseReason, RunState, StopReason},
    migrate::{Transfer, TransferProgress},
};
use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::{
    BACK_END, arrive,
    guest::{Guest, Role, blocking},
    inner::Inner,
    leave::{self, Load},
};

/// A guest that is frozen or thawed may take this long.
const FREEZE_BUDGET: Duration = Duration::from_secs(3600);
/// The format of [`supercloud_blanket::Backend::freeze`]'s files: libxl's stream, version 2.
pub const FROZEN_FORMAT: &str = "supercloud-xen-stream/1";

/// Where a file is written before it is whole.
fn part_of(file: &Path) -> PathBuf {
    file.with_extension("part")
}

/// Removes what there is of a freeze that was none, for good. Blocking.
fn remove_frozen(file: &Path) -> io::Result<()> {
    // In this order: who is still about to give it its name finds nothing to name, or has done so before.
    for left in [part_of(file), file.to_owned()] {
        match std::fs::remove_file(&left) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    sync_folder(file)
}

fn sync_folder(file: &Path) -> io::Result<()> {
    std::fs::File::open(file.parent().unwrap_or(Path::new("/")))?.sync_all()
}

impl Inner {
    pub fn freeze_guest(self: &Arc<Self>, id: GuestId, file: PathBuf) -> Transfer<Frozen> {
        let (sender, progress) = watch::channel(TransferProgress::default());
        let back_end = Arc::clone(self);
        let done = async move {
            let what = "freeze a guest";
            let guest = back_end.settled(id).await?.ok_or(BackendError::NoSuchGuest { guest: id })?;
            let _work = guest.work.lock().await;
            if tokio::fs::try_exists(&file).await.unwrap_or(true) {
                let source = io::ErrorKind::AlreadyExists.into();
                return Err(BackendError::File { what: "freeze a guest into", path: file, source });
            }
            let Some(_leaving) = guest.leave() else {
                let is = "being sent".to_owned();
                return Err(BackendError::WrongState { guest: id, wants: "freeze it", is });
            };
            let domain = back_end.running_domain(&guest, "freeze it").await?;
            guest.mark(Role::Freezing(file.clone())).await?;
            guest.limit.store(0, Ordering::Relaxed);
            let bytes = match back_end.save(&guest, domain, &file, &sender).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    back_end.thaw_here(&guest, &file).await?;
                    return Err(if guest.is_cancelled() { BackendError::Cancelled { what } } else { error });
                }
            };
            // The file is the guest: nothing may fail from here on. What could not be taken away is looked after later.
            let taken_away = match guest.mark(Role::Frozen).await {
                Ok(()) => back_end.release(&guest, StopReason::Frozen).await,
                Err(error) => Err(error),
            };
            if let Err(error) = taken_away {
                tracing::warn!(guest = %id, %error, "a guest was frozen, and what is left of it is taken away later");
            }
            Ok(Frozen { format: FROZEN_FORMAT.to_owned(), bytes })
        };
        Transfer { progress, done: Box::pin(done) }
    }

    /// Has the guest sent into the file, durably; its size. On an error the file does not have its name, or is about to lose it.
    async fn save(
        &self,
        guest: &Guest,
        domain: u32,
        file: &Path,
        progress: &watch::Sender<TransferProgress>,
    ) -> BackendResult<u64> {
        let part = part_of(file);
        let cannot = |source| BackendError::File { what: "write the frozen guest to", path: part_of(file), source };
        // What a guest has in its memory is nobody else's.
        let mut options = tokio::fs::OpenOptions::new();
        let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&part).await.map_err(cannot)?;
        let load = Load {
            config: &self.config,
            library: &self.library,
            guest,
            domain,
            is_live: false,
            budget: FREEZE_BUDGET,
            what: "freeze a guest",
        };
        let sent = leave::send(load, opened, progress).await?;
        guest.rest_disks(self.config.call_budget).await?;
        let (from, to) = (part, file.to_owned());
        let finish = move || {
            std::fs::File::open(&from)?.sync_all()?;
            // COMMIT POINT, once it lasts: until then the caller removes it again before the guest runs.
            std::fs::rename(&from, &to)?;
            sync_folder(&to)
        };
        tokio::task::spawn_blocking(finish).await.map_err(io::Error::other).and_then(|done| done).map_err(cannot)?;
        Ok(sent.bytes)
    }

    /// Rolls a freeze back: there is no file any more, and then the guest runs. When the file cannot be removed, it does not.
    pub async fn thaw_here(&self, guest: &Arc<Guest>, file: &Path) -> BackendResult<()> {
        let left = file.to_owned();
        blocking("remove what is left of a freeze", move || remove_frozen(&left)).await?;
        if self.state(guest).await? == Some(RunState::Paused(PauseReason::Saving)) {
            self.run_on(guest).await?;
        }
        guest.mark(Role::Owner).await
    }

    /// Whether a freeze that an agent before has begun came to its end; else it is rolled back.
    ///
    /// # Errors
    /// When neither can be done.
    pub async fn settle_freeze(&self, guest: &Arc<Guest>, file: &Path, state: Option<RunState>) -> BackendResult<bool> {
        let cannot = |source| BackendError::File { what: "look for a frozen guest in", path: file.to_owned(), source };
        let is_whole = tokio::fs::try_exists(file).await.map_err(cannot)?;
        if is_whole && state != Some(RunState::Running) {
            guest.mark(Role::Frozen).await?;
            return Ok(true);
        }
        self.thaw_here(guest, file).await?;
        Ok(false)
    }

    pub async fn thaw_guest(&self, launch: Launch, file: PathBuf, format: String) -> BackendResult<GuestInfo> {
        if format != FROZEN_FORMAT {
            let option = format!("frozen guests of format '{}'", format.chars().take(64).collect::<String>());
            return Err(BackendError::Unsupported { back_end: BACK_END, option });
        }
        let (guest, _work) = self.take_in(launch, Role::Incoming(None)).await?;
        let thawed = async {
            let cannot = |source| BackendError::File { what: "read the frozen guest in", path: file.clone(), source };
            let stream = tokio::fs::File::open(&file).await.map_err(cannot)?;
            arrive::restore(&guest, &self.domain_file(&guest), stream).await?;
            self.settle_in(&guest).await
        };
        if let Err(error) = thawed.await {
            self.release(&guest, StopReason::Failed).await?;
            return Err(error);
        }
        self.info(&guest).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_that_was_none_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("frozen");
        remove_frozen(&file).unwrap();
        std::fs::write(&file, "x").unwrap();
        std::fs::write(part_of(&file), "x").unwrap();
        remove_frozen(&file).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        // One that cannot be removed keeps the guest from running.
        std::fs::create_dir(&file).unwrap();
        assert!(remove_frozen(&file).is_err());
    }
}
