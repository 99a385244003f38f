//! An object store in memory, for tests: counts what was asked, can be told to fail.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture};

#[derive(Debug, Default)]
pub(crate) struct MemStore {
    pub objects: Mutex<BTreeMap<ObjectKey, Bytes>>,
    pub gets: AtomicUsize,
    pub puts: AtomicUsize,
    pub is_down: AtomicBool,
    /// When each object was put or refreshed last.
    pub stamps: Mutex<BTreeMap<ObjectKey, SystemTime>>,
    /// The store's clock, in milliseconds; each put takes one.
    pub clock_ms: Arc<AtomicU64>,
    /// What it says is free; none: it has no end.
    pub free: Mutex<Option<u64>>,
}

impl MemStore {
    fn up(&self) -> Result<(), StoreError> {
        if self.is_down.load(Ordering::SeqCst) {
            return Err(StoreError::Unreachable { store: "memory".into(), why: "told to be down".into() });
        }
        Ok(())
    }

    fn stamp(&self, key: &ObjectKey) {
        let now = self.clock_ms.fetch_add(1, Ordering::SeqCst) + 1;
        let now = SystemTime::UNIX_EPOCH + Duration::from_millis(now);
        self.stamps.lock().unwrap().insert(key.clone(), now);
    }

    fn entry(&self, key: &ObjectKey, bytes: &Bytes) -> ObjectEntry {
        let modified = self.stamps.lock().unwrap().get(key).copied().unwrap_or(SystemTime::UNIX_EPOCH);
        ObjectEntry { key: key.clone(), len: bytes.len() as u64, modified }
    }
}

impl ObjectStore for MemStore {
    fn free_bytes(&self) -> StoreFuture<'_, Option<u64>> {
        Box::pin(async move { Ok(*self.free.lock().unwrap()) })
    }

    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.up()?;
            self.puts.fetch_add(1, Ordering::SeqCst);
            self.stamp(&key);
            self.objects.lock().unwrap().insert(key, bytes);
            Ok(())
        })
    }

    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move {
            self.up()?;
            let mut objects = self.objects.lock().unwrap();
            if objects.contains_key(&key) {
                return Ok(PutOutcome::AlreadyThere);
            }
            self.puts.fetch_add(1, Ordering::SeqCst);
            self.stamp(&key);
            objects.insert(key, bytes);
            Ok(PutOutcome::Stored)
        })
    }

    fn put_batch(&self, batch: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(async move {
            self.up()?;
            let mut stored = 0;
            for (key, bytes) in batch {
                self.stamp(&key);
                let mut objects = self.objects.lock().unwrap();
                if let Entry::Vacant(free) = objects.entry(key) {
                    self.puts.fetch_add(1, Ordering::SeqCst);
                    free.insert(bytes);
                    stored += 1;
                }
            }
            Ok(stored)
        })
    }

    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        Box::pin(async move {
            self.up()?;
            let objects = self.objects.lock().unwrap();
            let (there, missing): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| objects.contains_key(key));
            there.iter().for_each(|key| self.stamp(key));
            Ok(missing)
        })
    }

    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        Box::pin(async move {
            self.up()?;
            Ok(self.objects.lock().unwrap().get(&key).map(|bytes| self.entry(&key, bytes)))
        })
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            self.up()?;
            self.gets.fetch_add(1, Ordering::SeqCst);
            let bytes = self.objects.lock().unwrap().get(&key).cloned();
            let bytes = bytes.ok_or_else(|| StoreError::NotFound { key: key.clone() })?;
            if bytes.len() > cap {
                return Err(StoreError::TooLarge { key, len: bytes.len() as u64, cap });
            }
            Ok(bytes)
        })
    }

    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            self.up()?;
            Ok(self.objects.lock().unwrap().contains_key(&key))
        })
    }

    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move {
            self.up()?;
            Ok(self.objects.lock().unwrap().remove(&key).is_some())
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        Box::pin(async move {
            self.up()?;
            let objects = self.objects.lock().unwrap();
            Ok(objects
                .iter()
                .filter(|(k, _)| k.as_str().starts_with(prefix) && after.is_none_or(|after| k.as_str() > after))
                .take(limit)
                .map(|(key, bytes)| self.entry(key, bytes))
                .collect())
        })
    }
}

#[tokio::test]
async fn it_is_a_store() {
    super::conformance::conforms(std::sync::Arc::new(MemStore::default()), Duration::ZERO, false).await;
}
