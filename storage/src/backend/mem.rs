//! An object store in memory, for tests: counts what was asked, can be told to fail.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::Bytes;

use super::{ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture};

#[derive(Debug, Default)]
pub(crate) struct MemStore {
    pub objects: Mutex<BTreeMap<ObjectKey, Bytes>>,
    pub gets: AtomicUsize,
    pub puts: AtomicUsize,
    pub is_down: AtomicBool,
}

impl MemStore {
    fn up(&self) -> Result<(), StoreError> {
        if self.is_down.load(Ordering::SeqCst) {
            return Err(StoreError::Unreachable { store: "memory".into(), why: "told to be down".into() });
        }
        Ok(())
    }
}

impl ObjectStore for MemStore {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.up()?;
            self.puts.fetch_add(1, Ordering::SeqCst);
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
            objects.insert(key, bytes);
            Ok(PutOutcome::Stored)
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
                .map(|(key, bytes)| ObjectEntry { key: key.clone(), len: bytes.len() as u64 })
                .collect())
        })
    }
}
