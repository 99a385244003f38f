//! The file that a freezing guest goes into: when it is the guest, and when it must not be.
//!
//! ```text
//!   (former file removed) -> record.spooling -> freeze -> record.spooled -> seal, store, switch
//!                                   |                          |
//!                                   +------ freeze withdrawn --+-> thaw -> (file removed, both cleared) -> resume
//! ```
//! With no process here and `spooling` in the record, a file that is whole is the guest. A file must never count once the
//! guest may have run on: its memory would meet a disk that is newer.

use supercloud_api::ids::OperationId;
use supercloud_blanket::backend::{GuestInfo, RunState};

use super::EffectError;
use crate::{
    durable::{self, DurableError},
    guest::{
        actor::Actor,
        record::{CopyRecord, Spooled},
    },
    jobs::Outcome,
};

impl Actor {
    /// Remembers that a file is about to be written, after what an earlier freeze left is gone.
    pub(in crate::guest) async fn note_spooling(&mut self, operation: OperationId) -> Result<(), EffectError> {
        self.remove_spool_file().await?;
        self.record.spooled = None;
        self.record.frozen = None;
        self.record.spooling = Some(operation);
        if self.save().await {
            return Ok(());
        }
        self.record.spooling = None;
        Err(EffectError::Unsaved)
    }

    /// Takes a job's word of where the guest is now; once, and only for the operation that is under way.
    pub(in crate::guest) async fn conclude(&mut self, operation: OperationId, outcome: Outcome) {
        if self.record.spooling != Some(operation) {
            return;
        }
        match outcome {
            Outcome::Saved(spooled) => {
                self.record.spooling = None;
                self.record.spooled = Some(spooled);
                // If it is not kept now, the intention and the file say the same after a restart.
                self.save().await;
            }
            Outcome::NotSaved => self.drop_spool().await,
            Outcome::Nothing | Outcome::ShutDown => {}
        }
    }

    /// With no process here: looks whether the guest is in the file that the hypervisor was told to write.
    pub(in crate::guest) async fn find_spooled(&mut self) -> Result<(), EffectError> {
        let Some(operation) = self.record.spooling else { return Ok(()) };
        match self.host.backend.frozen_in(self.places.memory()).await? {
            Some(frozen) => {
                tracing::info!(guest = %self.guest, %operation, "the guest is in its file: the save had come to its end");
                self.record.spooled = Some(Spooled { operation, format: frozen.format, bytes: frozen.bytes });
                self.record.spooling = None;
                self.save().await;
            }
            None => self.drop_spool().await,
        }
        Ok(())
    }

    /// After a restart, with what there is of the guest's process.
    pub(in crate::guest) async fn restore_spool(&mut self, info: Option<&GuestInfo>) -> Result<(), EffectError> {
        let epoch = self.record.handover.source().epoch();
        match info.filter(|info| info.epoch == epoch).map(|info| info.state) {
            None => {
                let is_missing = !tokio::fs::try_exists(self.places.memory()).await.unwrap_or(true);
                if self.record.spooled.is_some() && is_missing {
                    // Removed, and the record could not be kept.
                    self.drop_spool().await;
                }
                self.find_spooled().await
            }
            // It runs on: what is in the file is older than its disk.
            Some(RunState::Running | RunState::ShuttingDown) => {
                self.drop_spool().await;
                Ok(())
            }
            // Being saved, or out of its file again: the controller's answer decides.
            Some(RunState::Paused(_) | RunState::Crashed) => Ok(()),
        }
    }

    /// A freeze that came to nothing: the guest comes out of its file again.
    pub(in crate::guest) async fn thaw_back(&self, copy: &CopyRecord) -> Result<(), EffectError> {
        if let Some(spooled) = &self.record.spooled {
            let file = self.places.memory();
            self.host.backend.thaw(copy.launch.clone(), file, spooled.format.clone()).await?;
        }
        Ok(())
    }

    /// The file is not the guest any more: before it runs, so that no crash brings old memory to a newer disk.
    pub(in crate::guest) async fn drop_spool(&mut self) {
        let record = &mut self.record;
        let was_there = record.spooled.take().is_some() | record.spooling.take().is_some();
        if record.frozen.take().is_some() || was_there {
            // The file first: where the record cannot be kept (a full disk), none is as good as a record without one.
            if let Err(error) = self.remove_spool_file().await {
                tracing::warn!(guest = %self.guest, error = crate::chain(&error), "the memory's file stays");
            }
            self.save().await;
        }
    }

    async fn remove_spool_file(&self) -> Result<(), EffectError> {
        let (file, folder) = (self.places.memory(), self.places.folder.clone());
        let removed = tokio::task::spawn_blocking(move || {
            durable::remove_file(&file)?;
            durable::sync_folder(&folder)
        });
        Ok(removed.await?.map_err(|error: DurableError| error)?)
    }
}
