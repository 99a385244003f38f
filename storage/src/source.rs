//! Where sealed chunks are read from: an ordered list of sources, the nearest first, every answer checked.

use std::{fmt, sync::Arc};

use bytes::Bytes;

use crate::{
    backend::{ObjectKey, ObjectStore, StoreError, StoreFuture},
    chunk::{self, ChunkError, MAX_SEALED_BYTES},
    key::{ChunkKind, ChunkName, DataKeys},
};

/// Something that can give sealed chunks of one project.
pub trait ChunkSource: Send + Sync + fmt::Debug {
    /// The sealed bytes of a chunk, unchecked; at most [`MAX_SEALED_BYTES`].
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes>;

    /// Keeps a chunk that another source had and that was checked; for sources that are near. The default keeps nothing.
    fn keep(&self, name: ChunkName, sealed: Bytes) -> StoreFuture<'_, ()> {
        let _ = (name, sealed);
        Box::pin(async { Ok(()) })
    }
}

/// The chunks of one project in an object store.
#[derive(Debug, Clone)]
pub struct StoreSource {
    project: supercloud_ids::ProjectId,
    store: Arc<dyn ObjectStore>,
}

impl StoreSource {
    /// The chunks of `project` in `store`.
    #[must_use]
    pub fn new(project: supercloud_ids::ProjectId, store: Arc<dyn ObjectStore>) -> Self {
        Self { project, store }
    }
}

impl ChunkSource for StoreSource {
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes> {
        self.store.get(ObjectKey::chunk(self.project, &name), MAX_SEALED_BYTES)
    }

    fn keep(&self, name: ChunkName, sealed: Bytes) -> StoreFuture<'_, ()> {
        // Not `put_if_absent`: what is there may be the damaged object that made us look elsewhere.
        self.store.put(ObjectKey::chunk(self.project, &name), sealed)
    }
}

/// Why a chunk could not be read from any source.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No source has it, or none could be asked. Holds the last source's answer.
    #[error("chunk {name} cannot be read")]
    Unavailable {
        /// The chunk.
        name: ChunkName,
        /// What the last source said.
        #[source]
        source: StoreError,
    },
    /// A source had it, damaged, and no other had it whole.
    #[error("a stored chunk is damaged")]
    Damaged(#[source] ChunkError),
    /// There is no source at all.
    #[error("chunk {name} cannot be read: no store is configured")]
    NoSource {
        /// The chunk.
        name: ChunkName,
    },
}

/// Reads and opens chunks of one project from an ordered list of sources.
#[derive(Debug, Clone)]
pub struct ChunkReader {
    keys: Arc<DataKeys>,
    sources: Vec<Arc<dyn ChunkSource>>,
}

impl ChunkReader {
    /// A reader that asks `sources` in order; a chunk found at a later one is kept at the first.
    #[must_use]
    pub fn new(keys: Arc<DataKeys>, sources: Vec<Arc<dyn ChunkSource>>) -> Self {
        Self { keys, sources }
    }

    /// A reader of one object store.
    #[must_use]
    pub fn of_store(keys: Arc<DataKeys>, store: Arc<dyn ObjectStore>) -> Self {
        let source = StoreSource::new(keys.project(), store);
        Self::new(keys, vec![Arc::new(source)])
    }

    /// The keys that it opens chunks with.
    #[must_use]
    pub fn keys(&self) -> &Arc<DataKeys> {
        &self.keys
    }

    /// The plaintext of a chunk, checked against its name. A damaged copy is passed over when another source has a
    /// whole one, which then replaces it at the first source.
    pub async fn read(&self, kind: ChunkKind, name: ChunkName) -> Result<Bytes, ReadError> {
        let mut failure = None;
        for (index, source) in self.sources.iter().enumerate() {
            let sealed = match source.sealed(name).await {
                Ok(sealed) => sealed,
                Err(source) => {
                    // Damage seen earlier tells more than that a later source has nothing.
                    failure = Some(match failure {
                        Some(ReadError::Damaged(error)) => ReadError::Damaged(error),
                        _ => ReadError::Unavailable { name, source },
                    });
                    continue;
                }
            };
            match self.open(kind, name, sealed.clone()).await {
                Ok(plain) => {
                    if index > 0
                        && let Err(error) = self.sources[0].keep(name, sealed).await
                    {
                        tracing::warn!(%name, %error, "a fetched chunk could not be kept in the local store");
                    }
                    return Ok(plain);
                }
                Err(error) => failure = Some(ReadError::Damaged(error)),
            }
        }
        Err(failure.unwrap_or(ReadError::NoSource { name }))
    }

    async fn open(&self, kind: ChunkKind, name: ChunkName, sealed: Bytes) -> Result<Bytes, ChunkError> {
        let keys = self.keys.clone();
        // Opening 64 KiB takes a tenth of a millisecond of hashing and decryption: off the runtime's threads.
        tokio::task::spawn_blocking(move || chunk::unseal(&keys, kind, &name, &sealed))
            .await
            .unwrap_or(Err(ChunkError::Payload { name }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use supercloud_ids::ProjectId;

    use super::*;
    use crate::{backend::mem::MemStore, key::ProjectKey};

    fn setup() -> (Arc<DataKeys>, Arc<MemStore>, Arc<MemStore>, ChunkReader, ChunkName, Bytes) {
        let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
        let (near, far) = (Arc::new(MemStore::default()), Arc::new(MemStore::default()));
        let sources: Vec<Arc<dyn ChunkSource>> = [&near, &far]
            .map(|store| Arc::new(StoreSource::new(keys.project(), store.clone())) as Arc<dyn ChunkSource>)
            .into();
        let (name, sealed) = chunk::seal(&keys, ChunkKind::Data, b"hello").unwrap();
        (keys.clone(), near, far, ChunkReader::new(keys, sources), name, sealed)
    }

    #[tokio::test]
    async fn a_chunk_found_far_away_is_kept_near() {
        let (keys, near, far, reader, name, sealed) = setup();
        far.put(ObjectKey::chunk(keys.project(), &name), sealed).await.unwrap();
        for _ in 0..3 {
            assert_eq!(reader.read(ChunkKind::Data, name).await.unwrap(), "hello");
        }
        assert_eq!(far.gets.load(Ordering::SeqCst), 1);
        assert_eq!(near.objects.lock().unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_damaged_near_copy_is_repaired_from_afar() {
        let (keys, near, far, reader, name, sealed) = setup();
        let key = ObjectKey::chunk(keys.project(), &name);
        let mut bad = sealed.to_vec();
        bad[30] ^= 1;
        near.put(key.clone(), bad.into()).await.unwrap();
        let error = reader.read(ChunkKind::Data, name).await.unwrap_err();
        assert!(matches!(error, ReadError::Damaged(ChunkError::Tag { .. })), "{error:?}");
        far.put(key.clone(), sealed.clone()).await.unwrap();
        assert_eq!(reader.read(ChunkKind::Data, name).await.unwrap(), "hello");
        assert_eq!(near.get(key, 1000).await.unwrap(), sealed);
    }

    #[tokio::test]
    async fn nothing_anywhere_is_a_typed_error() {
        let (_, _, far, reader, name, _) = setup();
        assert!(matches!(reader.read(ChunkKind::Data, name).await, Err(ReadError::Unavailable { .. })));
        far.is_down.store(true, Ordering::SeqCst);
        let error = reader.read(ChunkKind::Data, name).await.unwrap_err();
        assert!(matches!(error, ReadError::Unavailable { source: StoreError::Unreachable { .. }, .. }));
    }
}
