//! Importing images: uploaded parts are read, checked, chunked, sealed and put into the origin store.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Code, DiskFormat, Image, ImageContent, ImagePart, ImageState, Phase, Problem, Progress,
    ids::{ImageId, OperationId},
};
use supercloud_storage::{
    backend::ObjectStore,
    key::{DataKeys, ProjectKey},
    transfer::{self, ImportOptions, TransferError, TransferPhase},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Engine, EngineError};
use crate::{
    chain,
    state::{Change, Context, EventDraft, OperationRecord, Stored, Work, retry_conflicts},
};

/// How long the converter of one image may take.
const CONVERT_BUDGET: Duration = Duration::from_secs(30 * 60);

impl Engine {
    /// Imports one image after the other until cancelled.
    pub(super) async fn import_all(&self, mut queue: mpsc::Receiver<OperationId>, cancel: CancellationToken) {
        loop {
            let next = tokio::select! {
                next = queue.recv() => next,
                () = cancel.cancelled() => return,
            };
            let Some(id) = next else { return };
            if let Err(error) = self.import(id, &cancel).await {
                warn!(operation = %id, "the import cannot go on now: {}", chain(&error));
            }
            self.queued.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
    }

    async fn import(&self, id: OperationId, cancel: &CancellationToken) -> Result<(), EngineError> {
        let Some(record) = self.state.read::<OperationRecord>(&id).await? else { return Ok(()) };
        // The same operation may have been queued more than once.
        if record.operation.phase.is_terminal() {
            return Ok(());
        }
        let (Work::ImageImport { format }, Some(image)) = (&record.work, record.operation.image) else {
            return Ok(());
        };
        if record.operation.is_cancel_requested {
            let problem = Problem::new(Code::WrongState, "the import was cancelled");
            return self.end_import(id, image, Phase::RolledBack, Err(problem)).await;
        }
        if record.operation.phase < Phase::Copy {
            self.enter_copy(id).await?;
        }
        let Some(found) = self.state.read::<Image>(&image).await? else {
            let problem = Problem::new(Code::NotFound, "the image was deleted");
            return self.end_import(id, image, Phase::Failed, Err(problem)).await;
        };
        let (imported, is_cancelled) = tokio::select! {
            imported = self.import_parts(id, &found, *format, cancel) => (imported, false),
            () = self.cancel_wish(id) => (Err(Problem::new(Code::WrongState, "the import was cancelled")), true),
            () = cancel.cancelled() => return Ok(()),
        };
        let phase = match &imported {
            Ok(_) => Phase::Done,
            // The import was interrupted, not refused: a restarted controller begins again, and finds what is in the store
            // already.
            Err(_) if cancel.is_cancelled() => return Ok(()),
            Err(_) if is_cancelled => Phase::RolledBack,
            Err(_) => Phase::Failed,
        };
        self.end_import(id, image, phase, imported).await
    }

    /// Ends when somebody wishes to cancel.
    async fn cancel_wish(&self, id: OperationId) {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            match self.state.read::<OperationRecord>(&id).await {
                Ok(Some(record)) if !record.operation.is_cancel_requested => {}
                Ok(_) => return,
                Err(error) => warn!(operation = %id, "cannot be read: {}", chain(&error)),
            }
        }
    }

    async fn enter_copy(&self, id: OperationId) -> Result<(), EngineError> {
        retry_conflicts(|| async {
            let Some(before) = self.state.read::<OperationRecord>(&id).await? else { return Ok(()) };
            let mut now = before.value.clone();
            now.operation.phase = Phase::Copy;
            let mut change = Change::new();
            change.update_operation(&before, &mut now);
            self.state.commit(&Context::of_operation(&before.value), change).await?;
            Ok(())
        })
        .await
    }

    async fn import_parts(
        &self,
        id: OperationId,
        image: &Stored<Image>,
        format: Option<DiskFormat>,
        cancel: &CancellationToken,
    ) -> Result<Vec<ImageContent>, Problem> {
        let internal = |error: &dyn std::error::Error| Problem::new(Code::Internal, chain(error));
        let key = self.state.project_key(&self.keys.root, image.project).await.map_err(|error| internal(&error))?;
        let keys = Arc::new(DataKeys::derive(image.project, &ProjectKey::from_bytes(key)));
        let store: Arc<dyn ObjectStore> = Arc::clone(&self.store) as _;
        let folder = self.uploads.join(image.id.to_string());
        let mut contents = Vec::new();
        for uploaded in &image.uploaded {
            let part = uploaded.part;
            let options = ImportOptions {
                // Only disks have formats: a kernel is bytes.
                format: match (part, format) {
                    (ImagePart::Disk, Some(DiskFormat::Raw)) => Some(transfer::DiskFormat::Raw),
                    (ImagePart::Disk, Some(DiskFormat::Qcow2)) => Some(transfer::DiskFormat::Qcow2),
                    (ImagePart::Disk, None) => None,
                    (ImagePart::Kernel | ImagePart::Initrd, _) => Some(transfer::DiskFormat::Raw),
                },
                work_folder: folder.clone(),
                convert_budget: CONVERT_BUDGET,
            };
            let board = self.progress.clone();
            let name = part_name(part);
            let tell = move |step: transfer::Progress| {
                let message = match step.phase {
                    TransferPhase::Converting => format!("{name}: converting"),
                    TransferPhase::Storing | TransferPhase::Writing => format!("{name}: storing"),
                };
                board.tell(
                    id,
                    &Progress {
                        memory_total_bytes: step.total_bytes,
                        memory_sent_bytes: step.done_bytes,
                        memory_remaining_bytes: step.total_bytes.saturating_sub(step.done_bytes),
                        message,
                        ..Progress::default()
                    },
                );
            };
            let path = folder.join(name);
            let made = transfer::import_image(&path, &options, Arc::clone(&keys), Arc::clone(&store), cancel, tell)
                .await
                .map_err(|error| import_problem(name, &error))?;
            contents.push(ImageContent {
                part,
                root: made.root.to_string(),
                // A kernel's length is exact: it is handed over as a file. A disk's is whole sectors.
                size_bytes: if part == ImagePart::Disk { made.size_bytes } else { uploaded.bytes },
                stored_bytes: made.chunks.saturating_mul(supercloud_storage::BLOCK_BYTES as u64).min(made.size_bytes),
            });
        }
        if !contents.iter().any(|content| content.part == ImagePart::Disk) {
            return Err(Problem::new(Code::BadContent, "an image needs a disk: upload the part 'disk'"));
        }
        Ok(contents)
    }

    async fn end_import(
        &self,
        id: OperationId,
        image: ImageId,
        phase: Phase,
        outcome: Result<Vec<ImageContent>, Problem>,
    ) -> Result<(), EngineError> {
        retry_conflicts(|| async {
            let Some(before) = self.state.read::<OperationRecord>(&id).await? else { return Ok(()) };
            let mut now = before.value.clone();
            now.operation.phase = phase;
            self.progress.apply(id, &mut now.operation.progress);
            let mut change = Change::new();
            if let Some(before) = self.state.read::<Image>(&image).await? {
                let mut image = before.value.clone();
                match &outcome {
                    Ok(contents) => {
                        image.parts.clone_from(contents);
                        image.state = ImageState::Ready;
                    }
                    Err(_) => image.state = ImageState::Failed,
                }
                change.event(
                    EventDraft::new(if outcome.is_ok() { "image.ready" } else { "image.failed" })
                        .project(image.project)
                        .operation(id)
                        .data(serde_json::json!({ "image": image.id, "name": image.name })),
                );
                change.update(&before, &image);
            }
            now.operation.error = outcome.as_ref().err().cloned();
            change.update_operation(&before, &mut now);
            self.state.commit(&Context::of_operation(&before.value), change).await?;
            Ok::<_, EngineError>(())
        })
        .await?;
        self.progress.forget(id);
        info!(%image, ?phase, "import ended");
        // The uploaded files have done their duty either way: a failed import starts with a new image.
        let folder = self.uploads.join(image.to_string());
        match tokio::fs::remove_dir_all(&folder).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                warn!("{} could not be removed: {error}", folder.display());
            }
            _ => {}
        }
        Ok(())
    }
}

/// The part's file name, as REST writes it.
#[must_use]
pub const fn part_name(part: ImagePart) -> &'static str {
    match part {
        ImagePart::Disk => "disk",
        ImagePart::Kernel => "kernel",
        ImagePart::Initrd => "initrd",
    }
}

/// What is wrong with the content is the user's to mend; what is wrong with the store is ours.
fn import_problem(part: &str, error: &TransferError) -> Problem {
    let code = match error {
        TransferError::Format { .. }
        | TransferError::Size { .. }
        | TransferError::Qcow2(_)
        | TransferError::Convert { .. } => Code::BadContent,
        _ => Code::Internal,
    };
    Problem::new(code, format!("{part}: {}", chain(error)))
}
