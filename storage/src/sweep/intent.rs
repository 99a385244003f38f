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
/// Chunks that are refreshed together.
const COUNTED_AT_ONCE: usize = 256;

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
    let keys: Vec<ObjectKey> = objects.iter().map(|(key, _)| key.clone()).collect();
    let stored = store.put_batch(objects.clone()).await?;
    // After the put, never before it.
    while let Some(intent) = named(store, project, &keys).await? {
        wait_for(store, project, &keys, &intent).await?;
        store.put_batch(objects.clone()).await?;
    }
    Ok(stored)
}

/// Looks which chunks of a project a store lacks, for somebody who is going to rely on all others without putting them:
/// when it returns, no sweep that has begun will take those. One that begins later must find them reached: by a root that
/// lives and whose manifest is in the store already, put there by [`put_chunks`].
///
/// # Errors
/// When the store fails, or when a sweep that did not end holds one of the chunks.
pub async fn count_on(
    store: &dyn ObjectStore,
    project: ProjectId,
    names: &[ChunkName],
) -> Result<Vec<ChunkName>, StoreError> {
    count_on_telling(store, project, names, |_| ()).await
}

/// As [`count_on`]; tells after each batch how many names it has looked at.
///
/// # Errors
/// As [`count_on`].
pub async fn count_on_telling(
    store: &dyn ObjectStore,
    project: ProjectId,
    names: &[ChunkName],
    mut tell: impl FnMut(usize) + Send,
) -> Result<Vec<ChunkName>, StoreError> {
    let (mut lacking, mut looked) = (Vec::new(), 0);
    for some in names.chunks(COUNTED_AT_ONCE) {
        let keys: Vec<ObjectKey> = some.iter().map(|name| ObjectKey::chunk(project, name)).collect();
        let mut missing = store.refresh(keys.clone()).await?;
        // After the refresh, never before it. What it names may be gone a moment later.
        while let Some(intent) = named(store, project, &keys).await? {
            wait_for(store, project, &keys, &intent).await?;
            missing = store.refresh(keys.clone()).await?;
        }
        lacking.extend(missing.iter().filter_map(ObjectKey::chunk_name));
        looked += some.len();
        tell(looked);
    }
    Ok(lacking)
}

/// Waits until the intent of a sweep names none of the objects any more.
async fn wait_for(
    store: &dyn ObjectStore,
    project: ProjectId,
    keys: &[ObjectKey],
    intent: &Intent,
) -> Result<(), StoreError> {
    tracing::debug!(%project, holder = intent.holder, "chunks that are needed are being swept: waiting");
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while named(store, project, keys).await?.is_some() {
        if tokio::time::Instant::now() >= deadline {
            let why = format!("the sweep of {} did not end and holds chunks that are needed", intent.holder);
            return Err(StoreError::Unreachable { store: format!("the store of project {project}"), why });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// The intent, if it names one of the objects.
async fn named(store: &dyn ObjectStore, project: ProjectId, keys: &[ObjectKey]) -> Result<Option<Intent>, StoreError> {
    let Some(intent) = read(store, project).await? else { return Ok(None) };
    let is_named = |key: &ObjectKey| key.chunk_name().is_none_or(|name| intent.names.contains(&name));
    Ok(keys.iter().any(is_named).then_some(intent))
}
