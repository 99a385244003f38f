//! A bucket of a service that speaks S3.
//!
//! Objects lie under the names that they have in a directory store, below a prefix. What differs:
//!
//! - *Refresh*: a bucket has no cheap one. An object whose stamp is of the last half hour is left as it is; an older one is
//!   put again. [`ObjectStore::stamp_slack`] is therefore an hour: the rest is for hosts whose clocks are wrong by up to the
//!   quarter of an hour that signatures allow.
//! - *Deletions* are not tried again by themselves: one that got no answer may take effect later, which the sweep that
//!   asked for it must know ([`ObjectStore::delete_tail`]).
//! - *Listings* must be in order and show what was put; services that are only eventually consistent are not supported.

mod config;
mod http;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::{
    BackoffConfig, ObjectMeta, ObjectStore as _, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    list::{PaginatedListOptions, PaginatedListStore as _},
    path::Path,
};

pub use self::config::{BucketConfig, BucketError};
use self::{config::FileCredentials, http::Connector};
use super::{ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture};
use crate::chunk::MAX_SEALED_BYTES;

/// Requests of one batch at once.
const AT_ONCE: usize = 16;
/// Looks under way at once: small requests, of which a freeze makes one for each chunk of its base.
const LOOKS_AT_ONCE: usize = 64;
/// Entries in one page of a listing, by the protocol.
const PAGE: usize = 1000;
/// See [`ObjectStore::stamp_slack`].
const SLACK: Duration = Duration::from_secs(3600);
/// See [`ObjectStore::delete_tail`]: far beyond the budget of a request.
const DELETE_TAIL: Duration = Duration::from_secs(600);
/// How often a conditional put is tried when nothing is there after it was refused.
const CONDITIONAL_TRIES: u32 = 4;
/// The longest text of a service that is passed on, in characters.
const WHY_AT_MOST: usize = 200;

/// An object store in a bucket. Cheap to clone.
#[derive(Clone)]
pub struct BucketStore {
    inner: Arc<Inner>,
}

struct Inner {
    /// Tries again what failed.
    patient: AmazonS3,
    /// Tries once: for deletions.
    once: AmazonS3,
    /// With its slash, or empty.
    prefix: String,
    name: String,
    slack: Duration,
    delete_tail: Duration,
}

impl fmt::Debug for BucketStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketStore({})", self.inner.name)
    }
}

impl BucketStore {
    /// The store in a bucket. No request is made yet. Blocking: reads credentials and authorities.
    ///
    /// # Errors
    /// When the configuration is not acceptable.
    pub fn open(config: &BucketConfig) -> Result<Self, BucketError> {
        config.validate()?;
        let is_plain = config.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http:"));
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&config.bucket)
            .with_region(&config.region)
            .with_allow_http(is_plain)
            // Not every service has the one for many at once.
            .with_disable_bulk_delete(true)
            .with_http_connector(Connector::new(&config.ca_file, is_plain)?);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(path) = &config.credentials_file {
            builder = builder.with_credentials(Arc::new(FileCredentials::open(path)?));
        }
        let retry = |max_retries| RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(200),
                max_backoff: Duration::from_secs(5),
                base: 2.0,
            },
            max_retries,
            retry_timeout: Duration::from_secs(60),
        };
        let build = |builder: AmazonS3Builder, max_retries| {
            let built = builder.with_retry(retry(max_retries)).build();
            built.map_err(|error| BucketError::Client(without_bodies(&error.to_string())))
        };
        Ok(Self {
            inner: Arc::new(Inner {
                patient: build(builder.clone(), 5)?,
                once: build(builder, 0)?,
                prefix: if config.prefix.is_empty() { String::new() } else { format!("{}/", config.prefix) },
                name: config.name(),
                slack: SLACK,
                delete_tail: DELETE_TAIL,
            }),
        })
    }

    /// With other times than the usual ones; for tests of sweeps. All who share a bucket must have the same.
    #[must_use]
    pub fn with_times(self, slack: Duration, delete_tail: Duration) -> Self {
        let inner = &self.inner;
        let (patient, once) = (inner.patient.clone(), inner.once.clone());
        let (prefix, name) = (inner.prefix.clone(), inner.name.clone());
        Self { inner: Arc::new(Inner { patient, once, prefix, name, slack, delete_tail }) }
    }
}

/// What services say beside the code may repeat what was signed; it stays here.
fn without_bodies(text: &str) -> String {
    let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    let head = text.split('<').next().unwrap_or_default();
    let head: String = head.chars().filter(|c| !c.is_control()).take(WHY_AT_MOST).collect();
    match code {
        Some((code, _)) => format!("{head}({})", code.chars().take(60).collect::<String>()),
        None => head,
    }
}

impl Inner {
    fn path(&self, key: &ObjectKey) -> Path {
        // Keys and the prefix were checked: nothing in them is encoded or left out.
        Path::from(format!("{}{key}", self.prefix))
    }

    fn failed(&self, what: &str, error: &object_store::Error) -> StoreError {
        let why = format!("{what}: {}", without_bodies(&error.to_string()));
        StoreError::Unreachable { store: self.name.clone(), why }
    }

    fn entry(&self, meta: &ObjectMeta) -> Option<ObjectEntry> {
        let key = meta.location.as_ref().strip_prefix(&self.prefix)?.parse().ok()?;
        Some(ObjectEntry { key, len: meta.size, modified: SystemTime::from(meta.last_modified) })
    }

    async fn stat(&self, key: &ObjectKey) -> Result<Option<ObjectEntry>, StoreError> {
        match self.patient.head(&self.path(key)).await {
            Ok(meta) => Ok(Some(ObjectEntry {
                key: key.clone(),
                len: meta.size,
                modified: SystemTime::from(meta.last_modified),
            })),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("cannot look at an object", &error)),
        }
    }

    async fn put(&self, key: &ObjectKey, bytes: Bytes) -> Result<(), StoreError> {
        let put = self.patient.put(&self.path(key), PutPayload::from_bytes(bytes)).await;
        put.map(|_| ()).map_err(|error| self.failed("cannot put an object", &error))
    }

    async fn put_if_absent(&self, key: &ObjectKey, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        let mut tries = CONDITIONAL_TRIES;
        loop {
            let options = PutOptions::from(PutMode::Create);
            match self.patient.put_opts(&self.path(key), PutPayload::from_bytes(bytes.clone()), options).await {
                Ok(_) => return Ok(PutOutcome::Stored),
                Err(object_store::Error::AlreadyExists { .. }) => {
                    // A conflict with another's put or deletion is told in the same way.
                    if self.stat(key).await?.is_some() {
                        return Ok(PutOutcome::AlreadyThere);
                    }
                    tries -= 1;
                    if tries == 0 {
                        let why = "conditional puts of an object that is not there are refused".into();
                        return Err(StoreError::Unreachable { store: self.name.clone(), why });
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(error) => return Err(self.failed("cannot put an object that is new", &error)),
            }
        }
    }

    /// Whether an object was put so lately that no sweep may take it for older than the last half of the slack.
    fn is_fresh(&self, entry: &ObjectEntry) -> bool {
        // One from the future is none: this clock is wrong by more than the slack covers.
        let most = self.slack / 2;
        match SystemTime::now().duration_since(entry.modified) {
            Ok(age) => age <= most,
            Err(ahead) => ahead.duration() <= most / 2,
        }
    }

    /// True when it is new.
    async fn put_or_refresh(&self, key: &ObjectKey, bytes: Bytes) -> Result<bool, StoreError> {
        let there = self.stat(key).await?;
        let is_right = there.as_ref().is_some_and(|entry| entry.len == bytes.len() as u64 && self.is_fresh(entry));
        if !is_right {
            self.put(key, bytes).await?;
        }
        Ok(there.is_none())
    }

    /// False when it is not there.
    async fn refresh(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        match self.stat(key).await? {
            None => Ok(false),
            Some(entry) if self.is_fresh(&entry) => Ok(true),
            Some(_) => match self.get(key, MAX_SEALED_BYTES).await {
                Ok(bytes) => self.put(key, bytes).await.map(|()| true),
                Err(StoreError::NotFound { .. }) => Ok(false),
                Err(error) => Err(error),
            },
        }
    }

    async fn get(&self, key: &ObjectKey, cap: usize) -> Result<Bytes, StoreError> {
        let failed = |error: object_store::Error| match error {
            object_store::Error::NotFound { .. } => StoreError::NotFound { key: key.clone() },
            error => self.failed("cannot read an object", &error),
        };
        let found = self.patient.get(&self.path(key)).await.map_err(failed)?;
        let too_large = |len| StoreError::TooLarge { key: key.clone(), len, cap };
        let len = found.meta.size;
        if len > cap as u64 {
            return Err(too_large(len));
        }
        let mut bytes = BytesMut::with_capacity(usize::try_from(len).unwrap_or(cap));
        let mut pieces = found.into_stream();
        while let Some(piece) = pieces.try_next().await.map_err(failed)? {
            if bytes.len() + piece.len() > cap {
                return Err(too_large((bytes.len() + piece.len()) as u64));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    async fn delete(&self, key: &ObjectKey) -> Result<bool, StoreError> {
        // Services do not tell whether there was one.
        if self.stat(key).await?.is_none() {
            return Ok(false);
        }
        match self.once.delete(&self.path(key)).await {
            Ok(()) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed("cannot delete an object", &error)),
        }
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ObjectEntry>, StoreError> {
        let whole = format!("{}{prefix}", self.prefix);
        let mut found = Vec::new();
        let mut page_token = None;
        while found.len() < limit {
            let options = PaginatedListOptions {
                offset: after.map(|after| format!("{}{after}", self.prefix)),
                max_keys: Some((limit - found.len()).min(PAGE)),
                page_token: page_token.take(),
                ..PaginatedListOptions::default()
            };
            let page = self.patient.list_paginated(Some(&whole), options).await;
            let page = page.map_err(|error| self.failed("cannot list objects", &error))?;
            // What others put there is none of ours.
            found.extend(page.result.objects.iter().filter_map(|meta| self.entry(meta)));
            page_token = page.page_token;
            if page_token.is_none() {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }
}

impl ObjectStore for BucketStore {
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()> {
        Box::pin(async move { self.inner.put(&key, bytes).await })
    }

    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        Box::pin(async move { self.inner.put_if_absent(&key, bytes).await })
    }

    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        Box::pin(async move {
            let puts =
                objects.into_iter().map(|(key, bytes)| async move { self.inner.put_or_refresh(&key, bytes).await });
            let new = futures::stream::iter(puts).buffer_unordered(AT_ONCE);
            new.try_fold(0, |stored, is_new| std::future::ready(Ok(stored + usize::from(is_new)))).await
        })
    }

    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
        Box::pin(async move {
            let looks = keys.into_iter().map(|key| async move {
                let is_there = self.inner.refresh(&key).await?;
                Ok::<_, StoreError>((!is_there).then_some(key))
            });
            let looks = futures::stream::iter(looks).buffer_unordered(LOOKS_AT_ONCE);
            looks.try_filter_map(|missing| std::future::ready(Ok(missing))).try_collect().await
        })
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move { self.inner.get(&key, cap).await })
    }

    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move { Ok(self.inner.stat(&key).await?.is_some()) })
    }

    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
        Box::pin(async move { self.inner.stat(&key).await })
    }

    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool> {
        Box::pin(async move { self.inner.delete(&key).await })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>> {
        Box::pin(self.inner.list(prefix, after, limit))
    }

    fn stamp_slack(&self) -> Duration {
        self.inner.slack
    }

    fn delete_tail(&self) -> Duration {
        self.inner.delete_tail
    }
}
