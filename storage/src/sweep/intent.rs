//! The intent of a sweep, and what writers do about it.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use supercloud_ids::ProjectId;

use super::sweep_key;
use crate::{
    backend::{ObjectKey, ObjectStore, StoreError},
    key::ChunkName,
};

/// The longest intent: 256 names of 67 bytes, and who holds it.
const INTENT_BYTES: usize = 32 * 1024;
/// How long a writer waits for a sweep to let go of what it writes.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a sweep is about to delete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intent {
    version: u16,
    /// Who sweeps.
    pub(super) holder: String,
    names: Vec<ChunkName>,
}

impl Intent {
    pub(super) fn new(holder: &str, names: &[ChunkName]) -> Self {
        Self { version: 1, holder: holder.to_owned(), names: names.to_vec() }
    }

    pub(super) fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("texts and numbers make JSON").into()
    }
}

/// The intent of a project, if a sweep has one.
pub(super) async fn read(store: &dyn ObjectStore, project: ProjectId) -> Result<Option<Intent>, StoreError> {
    let key = sweep_key(project, "intent");
    let bytes = match store.get(key.clone(), INTENT_BYTES).await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    match serde_json::from_slice::<Intent>(&bytes) {
        Ok(intent) if intent.version == 1 => Ok(Some(intent)),
        // Not to be passed over: it may name what is being written.
        Ok(_) | Err(_) => Err(StoreError::Io {
            what: format!("{key} is not an intent that this version understands"),
            source: std::io::ErrorKind::InvalidData.into(),
        }),
    }
}

/// Whether a sweep of the project is deleting. Who counts what a store has must count again after that.
///
/// # Errors
/// When the store does not answer.
pub async fn is_sweeping(store: &dyn ObjectStore, project: ProjectId) -> Result<bool, StoreError> {
    Ok(read(store, project).await?.is_some())
}

/// Stores chunks of one project that a manifest is going to name, unless they are there; returns how many were new. When
/// it returns, they are there and no sweep that began before the writer's operation ends will take them: see
/// [`super`] for why. Every writer of content puts its chunks, and the manifest's, by this.
///
/// # Errors
/// When the store fails, or when a sweep that did not end holds one of the chunks.
pub async fn put_chunks(
    store: &dyn ObjectStore,
    project: ProjectId,
    objects: Vec<(ObjectKey, Bytes)>,
) -> Result<usize, StoreError> {
    if objects.is_empty() {
        return Ok(0);
    }
    let stored = store.put_batch(objects.clone()).await?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        // After the put, never before it.
        let Some(intent) = named(store, project, &objects).await? else { return Ok(stored) };
        tracing::debug!(%project, holder = intent.holder, "chunks that are written are being swept: waiting");
        while named(store, project, &objects).await?.is_some() {
            if tokio::time::Instant::now() >= deadline {
                let why = format!("the sweep of {} did not end and holds chunks that are written", intent.holder);
                return Err(StoreError::Unreachable { store: format!("the store of project {project}"), why });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        store.put_batch(objects.clone()).await?;
    }
}

/// The intent, if it names one of the objects.
async fn named(
    store: &dyn ObjectStore,
    project: ProjectId,
    objects: &[(ObjectKey, Bytes)],
) -> Result<Option<Intent>, StoreError> {
    let Some(intent) = read(store, project).await? else { return Ok(None) };
    let is_named = |key: &ObjectKey| key.chunk_name().is_none_or(|name| intent.names.contains(&name));
    Ok(objects.iter().any(|(key, _)| is_named(key)).then_some(intent))
}
