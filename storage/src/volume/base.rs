//! Reading the base: decrypted blocks in a bounded cache, each fetched once however many ask for it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::key::ChunkName;

/// Decrypted chunks by name, within a budget; the least recently added that was not asked for again goes first.
#[derive(Debug)]
pub(super) struct Cache {
    budget: usize,
    inner: Mutex<CacheInner>,
}

#[derive(Debug, Default)]
struct CacheInner {
    chunks: HashMap<ChunkName, (Bytes, bool)>,
    order: VecDeque<ChunkName>,
    bytes: usize,
}

impl Cache {
    pub(super) fn new(budget: u64) -> Self {
        Self { budget: usize::try_from(budget).unwrap_or(usize::MAX), inner: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, CacheInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, name: &ChunkName) -> Option<Bytes> {
        let mut inner = self.lock();
        let (bytes, was_used) = inner.chunks.get_mut(name)?;
        *was_used = true;
        Some(bytes.clone())
    }

    pub(super) fn insert(&self, name: ChunkName, bytes: Bytes) {
        if bytes.len() > self.budget {
            return;
        }
        let mut inner = self.lock();
        let len = bytes.len();
        if inner.chunks.insert(name, (bytes, false)).is_some() {
            return;
        }
        inner.bytes += len;
        inner.order.push_back(name);
        while inner.bytes > self.budget {
            let Some(oldest) = inner.order.pop_front() else { break };
            match inner.chunks.get_mut(&oldest) {
                // A second chance.
                Some((_, was_used @ true)) => {
                    *was_used = false;
                    inner.order.push_back(oldest);
                }
                Some((bytes, false)) => {
                    let len = bytes.len();
                    inner.chunks.remove(&oldest);
                    inner.bytes -= len;
                }
                None => {}
            }
        }
    }
}

/// What is being fetched, so that nobody fetches it twice at once.
#[derive(Debug)]
pub(super) struct InFlight<K> {
    keys: Mutex<HashSet<K>>,
    done: Notify,
}

impl<K> Default for InFlight<K> {
    fn default() -> Self {
        Self { keys: Mutex::default(), done: Notify::new() }
    }
}

impl<K: Eq + Hash + Copy> InFlight<K> {
    fn lock(&self) -> MutexGuard<'_, HashSet<K>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else fetches `key`, then claims it; the claim ends when it is dropped.
    pub(super) async fn claim(&self, key: K) -> Claim<'_, K> {
        loop {
            let done = self.done.notified();
            tokio::pin!(done);
            // Enlisted before the look, so that no end is missed in between.
            done.as_mut().enable();
            if let Some(claim) = self.try_claim(key) {
                return claim;
            }
            done.await;
        }
    }

    /// Claims `key` unless somebody fetches it.
    pub(super) fn try_claim(&self, key: K) -> Option<Claim<'_, K>> {
        let is_new = self.lock().insert(key);
        // Made only when it is one: a claim that is dropped gives the key free.
        is_new.then(|| Claim { all: self, key })
    }
}

pub(super) struct Claim<'a, K: Eq + Hash + Copy> {
    all: &'a InFlight<K>,
    key: K,
}

impl<K: Eq + Hash + Copy> Drop for Claim<'_, K> {
    fn drop(&mut self) {
        self.all.lock().remove(&self.key);
        self.all.done.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_its_budget_and_keeps_what_is_used() {
        let name = |i: u8| ChunkName([i; 32]);
        let cache = Cache::new(1000);
        for i in 0..100 {
            cache.insert(name(i), vec![i; 100].into());
            if i > 0 {
                assert!(cache.get(&name(0)).is_some(), "the one in use was dropped at {i}");
            }
            let inner = cache.lock();
            assert!(inner.bytes <= 1000 && inner.chunks.len() <= 10 && inner.order.len() <= 10);
        }
        cache.insert(name(200), vec![0; 1001].into());
        assert!(cache.get(&name(200)).is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_key_is_claimed_by_one_at_a_time() {
        let flights = std::sync::Arc::new(InFlight::<u32>::default());
        let held = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let (flights, held) = (flights.clone(), held.clone());
            tasks.spawn(async move {
                let _claim = flights.claim(1).await;
                assert_eq!(held.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                tokio::task::yield_now().await;
                held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            });
        }
        while let Some(result) = tasks.join_next().await {
            result.unwrap();
        }
        assert!(flights.try_claim(1).is_some());
    }
}
