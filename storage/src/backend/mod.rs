//! Object stores: where sealed chunks lie. A store sees names and sealed bytes, nothing else.

mod bucket;
#[cfg(test)]
mod conformance;
pub mod depsky;
mod dir;
#[cfg(test)]
pub(crate) mod mem;

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    str::FromStr,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use supercloud_ids::ProjectId;

pub use self::bucket::{BucketConfig, BucketError, BucketStore};
pub use self::dir::DirStore;
use crate::key::ChunkName;

/// A boxed future of a store, so that stores are usable as `Arc<dyn ObjectStore>`.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why a store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("no object {key}")]
    NotFound {
        /// The object.
        key: ObjectKey,
    },
    /// The object is larger than the caller wants to hold.
    #[error("object {key} has {len} bytes, more than the {cap} that were expected at most")]
    TooLarge {
        /// The object.
        key: ObjectKey,
        /// Its length.
        len: u64,
        /// The cap.
        cap: usize,
    },
    /// The store's medium failed.
    #[error("{what}")]
    Io {
        /// What was done, with its path.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The object is there, and not as it was put.
    #[error("object {key} is damaged: {why}")]
    Damaged {
        /// The object.
        key: ObjectKey,
        /// What is wrong.
        why: String,
    },
    /// The store could not be reached.
    #[error("{store} is not reachable: {why}")]
    Unreachable {
        /// Which store.
        store: String,
        /// Why.
        why: String,
    },
    /// The text is not an object key.
    #[error("'{text}' is not an object key: {why}")]
    Key {
        /// What was given (cut).
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// The name of an object: a project id, then path segments of `[a-z0-9._-]`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey(String);

impl ObjectKey {
    /// Where a sealed chunk of a project lies.
    #[must_use]
    pub fn chunk(project: ProjectId, name: &ChunkName) -> Self {
        let hex = name.to_string();
        Self(format!("{project}/{}/{hex}", &hex[..2]))
    }

    /// An object of a project that is not a chunk, for example `checkpoints/abc`.
    pub fn other(project: ProjectId, path: &str) -> Result<Self, StoreError> {
        format!("{project}/{path}").parse()
    }

    /// The project that it belongs to.
    #[must_use]
    pub fn project(&self) -> Option<ProjectId> {
        self.0.split('/').next()?.parse().ok()
    }

    /// The chunk that it is the place of, if it is one's.
    #[must_use]
    pub fn chunk_name(&self) -> Option<ChunkName> {
        let name: ChunkName = self.0.rsplit('/').next()?.parse().ok()?;
        (Self::chunk(self.project()?, &name) == *self).then_some(name)
    }

    /// The text form.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ObjectKey {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let bad = |why| StoreError::Key { text: text.chars().take(80).collect(), why };
        if text.len() > 255 {
            return Err(bad("longer than 255 bytes"));
        }
        let mut segments = text.split('/');
        let project = segments.next().unwrap_or_default();
        if project.parse::<ProjectId>().is_err() {
            return Err(bad("it does not start with a project id"));
        }
        let mut count = 0;
        for segment in segments {
            count += 1;
            let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
            if segment.is_empty() || segment.starts_with('.') || !segment.bytes().all(is_plain) {
                return Err(bad("a segment is empty, starts with a dot or has a character outside [a-z0-9._-]"));
            }
        }
        if !(1..=8).contains(&count) {
            return Err(bad("it has no or too many segments"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectKey({})", self.0)
    }
}

/// What became of a conditional put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is new.
    Stored,
    /// An object of that name was there already and stays as it was.
    AlreadyThere,
}

/// One entry of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectEntry {
    /// Its name.
    pub key: ObjectKey,
    /// Its length in bytes.
    pub len: u64,
    /// When it was put or refreshed last, by the store's own clock; see [`ObjectStore::stamp_slack`].
    pub modified: SystemTime,
}

/// A place for objects. When a put is answered, the object survives a power cut of the store.
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// Stores an object, replacing one of the same name at once and as a whole.
    fn put(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, ()>;

    /// Stores an object unless one of that name is there; of concurrent calls exactly one stores.
    fn put_if_absent(&self, key: ObjectKey, bytes: Bytes) -> StoreFuture<'_, PutOutcome>;

    /// Stores several objects unless they are there, cheaper than one by one; returns how many were new. Those that are
    /// there are refreshed: as old as if they had been put now.
    fn put_batch(&self, objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize>;

    /// Makes objects as young as if they had been put now; returns those that are not there.
    fn refresh(&self, keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>>;

    /// Reads an object of at most `cap` bytes.
    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes>;

    /// Reads an object of at most `cap` bytes from everywhere where the store keeps a part of it, and puts anew what is missing or
    /// wrong there; also gives how many parts that were.
    fn check(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, (Bytes, u64)> {
        Box::pin(async move { Ok((self.get(key, cap).await?, 0)) })
    }

    /// Whether an object is there.
    fn exists(&self, key: ObjectKey) -> StoreFuture<'_, bool>;

    /// An object's entry, if it is there.
    fn stat(&self, key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>>;

    /// Deletes an object; false when there was none.
    fn delete(&self, key: ObjectKey) -> StoreFuture<'_, bool>;

    /// At most `limit` objects whose names start with `prefix` and come after `after`, in order of names.
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> StoreFuture<'a, Vec<ObjectEntry>>;

    /// Bytes that can still be put before its disk is full; none where that is not known or has no end.
    fn free_bytes(&self) -> StoreFuture<'_, Option<u64>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// How much older than the moment of its last put or refresh an object can look. A sweep leaves alone what looks
    /// younger than this.
    fn stamp_slack(&self) -> Duration {
        Duration::from_secs(1)
    }

    /// How long a deletion may still take effect after the process that asked for it has died.
    fn delete_tail(&self) -> Duration {
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_cannot_leave_their_project() {
        let project = ProjectId::generate();
        assert!(ObjectKey::other(project, "checkpoints/abc").is_ok());
        for bad in ["", "..", "a/../b", "a//b", "/a", ".hidden", "A", "a b", "a\0", "é"] {
            assert!(ObjectKey::other(project, bad).is_err(), "{bad:?}");
        }
        assert!(project.to_string().parse::<ObjectKey>().is_err());
        assert!("etc/passwd".parse::<ObjectKey>().is_err());
        assert!(ObjectKey::other(project, &"a/".repeat(9)).is_err());
        assert!(ObjectKey::other(project, &"a".repeat(300)).is_err());
    }
}
