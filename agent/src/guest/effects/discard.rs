//! What is not an effect of the machine: a disk that stalls, a guest that was deleted.

use supercloud_api::link::Notice;
use supercloud_blanket::backend::{PauseReason, RunState};

use super::EffectError;
use crate::guest::actor::Actor;

impl Actor {
    /// A disk did not answer: the guest stands still until it does. Tries to let it go on.
    pub(in crate::guest) async fn resume_stalled(&mut self) {
        if !self.is_mine_to_run() {
            return;
        }
        let epoch = self.record.handover.destination().epoch().unwrap_or(self.record.handover.source().epoch());
        match self.host.backend.status(self.guest).await {
            Ok(Some(info)) if info.state == RunState::Paused(PauseReason::DiskError) => {
                if let Err(error) = self.host.backend.resume(self.guest, epoch).await {
                    tracing::debug!(guest = %self.guest, error = crate::chain(&error), "the disk does not answer yet");
                }
            }
            Ok(Some(info)) if info.state == RunState::Running => self.is_stalled = false,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(guest = %self.guest, error = crate::chain(&error), "the hypervisor does not tell");
            }
        }
    }

    /// The guest was deleted: nothing of it stays. Whether nothing is left.
    pub(in crate::guest) async fn discard(&mut self) -> bool {
        let jobs = std::mem::take(&mut self.jobs);
        for job in [jobs.leave, jobs.store, jobs.receive, jobs.fetch, jobs.serve].into_iter().flatten() {
            job.end().await;
        }
        match self.try_discard().await {
            Ok(()) => {
                tracing::info!(guest = %self.guest, "discarded");
                self.host.link.tell_once(Notice::Discarded { guest: self.guest });
                true
            }
            Err(error) => {
                tracing::warn!(guest = %self.guest, error = crate::chain(&error), "not discarded yet; told again, it is tried again");
                false
            }
        }
    }

    pub(in crate::guest) async fn try_discard(&mut self) -> Result<(), EffectError> {
        if let Some(info) = self.host.backend.status(self.guest).await? {
            self.kill_at(info.epoch).await?;
        }
        self.met = None;
        self.dials.clear();
        self.sources = None;
        for copy in [self.record.incoming.clone(), self.record.current.clone()].into_iter().flatten() {
            self.record.incoming = self.record.incoming.take().filter(|other| other.epoch != copy.epoch);
            self.remove_copy(&copy).await?;
            for port in &copy.spec.ports {
                self.host.switch.detach(port.port).await?;
            }
        }
        self.record.current = None;
        Ok(())
    }

    /// Removes the guest's folders.
    pub(in crate::guest) async fn forget_files(&self) {
        let (run, folder) = (self.places.run.clone(), self.places.folder.clone());
        let removed = tokio::task::spawn_blocking(move || {
            crate::durable::remove_folder(&folder)?;
            crate::durable::remove_folder(&run)
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(guest = %self.guest, error = crate::chain(&error), "the guest's folders cannot be removed");
        }
    }
}
