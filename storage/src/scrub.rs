//! Reading everything that some content is made of, in one store, and mending what is missing or damaged there from wherever
//! else it can be had.

use std::sync::Arc;

use futures::StreamExt as _;

use crate::{
    backend::{ObjectKey, ObjectStore, StoreError},
    chunk::{self, MAX_SEALED_BYTES},
    key::{ChunkKind, ChunkName, ContentRoot},
    manifest::{Manifest, ManifestError},
    source::ChunkReader,
    volume::FetchLimit,
};

/// Chunks looked at together.
const AT_ONCE: usize = 4;
/// Names of lost chunks that are told.
const NAMED_AT_MOST: usize = 20;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scrubbed {
    /// Chunks that the content is made of, its manifests' parts among them.
    pub chunks: u64,
    /// Sealed bytes that were read and are as they should be.
    pub sound_bytes: u64,
    /// Chunks that the store lacked and now has.
    pub fetched: u64,
    /// Chunks that were damaged there and are whole now; of a store over several others, also those of which a piece was missing or
    /// wrong.
    pub repaired: u64,
    /// Chunks that the store lacks and nobody gives.
    pub missing: u64,
    /// Chunks that are damaged there and nobody gives whole.
    pub damaged: u64,
    /// Some of the last two.
    pub lost: Vec<ChunkName>,
}

/// What one chunk was found to be.
enum Found {
    Sound(u64),
    /// As [`Found::Sound`]; parts of it that the store keeps apart were not, and are now.
    Mended(u64),
    Missing,
    Damaged,
}

/// Looks at every chunk of `roots` in `store`. `reader` reads from there first, then from where else chunks can be had, and keeps
/// what it finds in the store. `limit` is drawn from for each chunk; `tell` hears how many are done.
///
/// # Errors
/// When the store does not answer, or a part of a manifest is nowhere: then of what it names nothing is known.
pub async fn scrub(
    store: &Arc<dyn ObjectStore>,
    reader: &ChunkReader,
    roots: &[ContentRoot],
    limit: &FetchLimit,
    mut tell: impl FnMut(&Scrubbed) + Send,
) -> Result<Scrubbed, ManifestError> {
    let mut scrubbed = Scrubbed::default();
    let mut names = Vec::new();
    for root in roots {
        // By way of the reader, which passes damaged parts over; they are looked at below.
        let manifest = Manifest::load(reader, *root).await?;
        let (sealed_root, parts) = manifest.seal(reader.keys())?;
        debug_assert_eq!(sealed_root, *root);
        names.extend(parts.iter().map(|(name, _)| {
            let kind = if *name == root.as_chunk() { ChunkKind::Root } else { ChunkKind::Leaf };
            (*name, kind)
        }));
        names.extend(manifest.chunks().map(|(_, name)| (name, ChunkKind::Data)));
    }
    names.sort_unstable_by_key(|(name, _)| *name);
    names.dedup_by_key(|(name, _)| *name);
    scrubbed.chunks = names.len() as u64;
    let mut looks = futures::stream::iter(names)
        .map(|(name, kind)| async move {
            limit.draw(MAX_SEALED_BYTES as u64).await;
            let found = look(store, reader, kind, name).await?;
            let is_mended = match found {
                Found::Sound(_) | Found::Mended(_) => false,
                // What it finds elsewhere it keeps here; only a look here tells whether it could.
                Found::Missing | Found::Damaged => {
                    reader.read(kind, name).await.is_ok()
                        && matches!(look(store, reader, kind, name).await?, Found::Sound(_) | Found::Mended(_))
                }
            };
            Ok::<_, StoreError>((name, found, is_mended))
        })
        .buffer_unordered(AT_ONCE);
    while let Some(looked) = looks.next().await {
        let (name, found, is_mended) = looked?;
        let count = match (found, is_mended) {
            (Found::Sound(bytes), _) => {
                scrubbed.sound_bytes += bytes;
                tell(&scrubbed);
                continue;
            }
            (Found::Mended(bytes), _) => {
                scrubbed.sound_bytes += bytes;
                scrubbed.repaired += 1;
                tell(&scrubbed);
                continue;
            }
            (Found::Missing, true) => &mut scrubbed.fetched,
            (Found::Damaged, true) => &mut scrubbed.repaired,
            (Found::Missing, false) => &mut scrubbed.missing,
            (Found::Damaged, false) => &mut scrubbed.damaged,
        };
        *count += 1;
        if !is_mended && scrubbed.lost.len() < NAMED_AT_MOST {
            scrubbed.lost.push(name);
        }
        tell(&scrubbed);
    }
    Ok(scrubbed)
}

async fn look(
    store: &Arc<dyn ObjectStore>,
    reader: &ChunkReader,
    kind: ChunkKind,
    name: ChunkName,
) -> Result<Found, StoreError> {
    let key = ObjectKey::chunk(reader.keys().project(), &name);
    let (sealed, mended) = match store.check(key, MAX_SEALED_BYTES).await {
        Ok(checked) => checked,
        Err(StoreError::NotFound { .. }) => return Ok(Found::Missing),
        Err(StoreError::TooLarge { .. } | StoreError::Damaged { .. }) => return Ok(Found::Damaged),
        Err(error) => return Err(error),
    };
    let (keys, len) = (reader.keys().clone(), sealed.len() as u64);
    let opened = tokio::task::spawn_blocking(move || chunk::unseal(&keys, kind, &name, &sealed).is_ok()).await;
    Ok(match (opened.unwrap_or(false), mended) {
        (true, 0) => Found::Sound(len),
        (true, _) => Found::Mended(len),
        (false, _) => Found::Damaged,
    })
}

#[cfg(test)]
mod tests {
    use supercloud_ids::ProjectId;

    use super::*;
    use crate::{
        BLOCK_BYTES,
        backend::mem::MemStore,
        key::{DataKeys, ProjectKey},
        source::{ChunkSource, StoreSource},
    };

    #[tokio::test]
    async fn what_is_missing_or_damaged_is_mended_from_elsewhere_or_named() {
        let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
        let (near, far) = (Arc::new(MemStore::default()), Arc::new(MemStore::default()));
        let sources: Vec<Arc<dyn ChunkSource>> = [&near, &far]
            .map(|store| Arc::new(StoreSource::new(keys.project(), store.clone())) as Arc<dyn ChunkSource>)
            .into();
        let reader = ChunkReader::new(keys.clone(), sources);
        let mut manifest = Manifest::zeros(8 * BLOCK_BYTES as u64).unwrap();
        let mut data = Vec::new();
        for block in 0..6u8 {
            let (name, sealed) = chunk::seal(&keys, ChunkKind::Data, &[block + 1; 1000]).unwrap();
            manifest.set(block.into(), Some(name));
            let key = ObjectKey::chunk(keys.project(), &name);
            for store in [&near, &far] {
                store.put(key.clone(), sealed.clone()).await.unwrap();
            }
            data.push((key, name));
        }
        let root = manifest.store(&keys, &*near).await.unwrap();
        manifest.store(&keys, &*far).await.unwrap();
        let near_store: Arc<dyn ObjectStore> = near.clone();
        let (limit, mut told) = (FetchLimit::default(), 0);
        let all = scrub(&near_store, &reader, &[root, root], &limit, |_| told += 1).await.unwrap();
        assert_eq!((all.chunks, all.fetched + all.repaired + all.missing + all.damaged, told), (8, 0, 8));
        assert!(all.sound_bytes > 0);

        let spoil = |key: &ObjectKey, in_store: &MemStore| {
            let mut objects = in_store.objects.lock().unwrap();
            let mut bad = objects[key].to_vec();
            *bad.last_mut().unwrap() ^= 1;
            objects.insert(key.clone(), bad.into());
        };
        // 0: gone here; 1: damaged here; 2: gone everywhere; 3: damaged everywhere; and the leaf is damaged here.
        near.objects.lock().unwrap().remove(&data[0].0);
        spoil(&data[1].0, &near);
        near.objects.lock().unwrap().remove(&data[2].0);
        far.objects.lock().unwrap().remove(&data[2].0);
        spoil(&data[3].0, &near);
        spoil(&data[3].0, &far);
        let is_leaf = |key: &&ObjectKey| {
            key.chunk_name().is_some_and(|name| name != root.as_chunk() && data.iter().all(|(_, data)| *data != name))
        };
        let leaf = near.objects.lock().unwrap().keys().find(is_leaf).unwrap().clone();
        spoil(&leaf, &near);
        let mut found = scrub(&near_store, &reader, &[root], &limit, |_| ()).await.unwrap();
        found.lost.sort_unstable();
        let mut lost = vec![data[2].1, data[3].1];
        lost.sort_unstable();
        // The leaf was mended when it was read to know what it names.
        assert_eq!((found.chunks, found.fetched, found.repaired), (8, 1, 1));
        assert_eq!((found.missing, found.damaged, found.lost), (1, 1, lost));
        let again = scrub(&near_store, &reader, &[root], &limit, |_| ()).await.unwrap();
        assert_eq!((again.fetched, again.repaired, again.missing, again.damaged), (0, 0, 1, 1));
    }
}
