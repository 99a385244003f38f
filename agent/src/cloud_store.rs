//! Where the chunks of this host's cloud lie.
//!
//! | | in a folder | in a bucket |
//! |---|---|---|
//! | `store_dir` | the cloud's store, shared by its hosts | this host's own: what came near, and what leaves |
//! | volume processes read | `store_dir`, then the chunk socket | the same; behind the socket the bucket comes first |
//! | a freeze stores | in `store_dir` | there, then all of it goes into the bucket before anybody is told |
//! | what a guest stands on is brought | into `store_dir` | into the bucket |
//!
//! Volume processes never speak with a bucket: they have neither its credentials nor a way out of the host.
//!
//! A [cloud of clouds](supercloud_storage::backend::depsky) stands where a bucket stands.

use std::sync::Arc;

use supercloud_storage::backend::{
    BucketError, BucketStore, DirStore, ObjectStore, StoreError,
    depsky::{CloudOfClouds, CloudOfCloudsError},
};

use crate::config::Config;

/// Why the store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CloudStoreError {
    /// The folder.
    #[error("the folder cannot be used")]
    Folder(#[from] StoreError),
    /// The bucket.
    #[error("the bucket cannot be used")]
    Bucket(#[from] BucketError),
    /// The cloud of clouds.
    #[error("the cloud of clouds cannot be used")]
    CloudOfClouds(#[from] CloudOfCloudsError),
}

/// The chunks of this host's cloud. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CloudStore {
    near: DirStore,
    bucket: Option<Arc<dyn ObjectStore>>,
    clouds: Option<CloudOfClouds>,
}

impl CloudStore {
    /// As configured. Blocking; a bucket is not asked anything yet.
    ///
    /// # Errors
    /// When the folder cannot be used, or the bucket's configuration or credentials are not acceptable.
    pub fn open(config: &Config) -> Result<Self, CloudStoreError> {
        let near = DirStore::open(&config.store_dir)?;
        let bucket = config.bucket.as_ref().map(BucketStore::open).transpose()?;
        let bucket = bucket.map(|bucket| {
            let (slack, tail) = (bucket.stamp_slack(), bucket.delete_tail());
            tracing::info!(?bucket, ?slack, ?tail, "this cloud's chunks are kept in a bucket");
            Arc::new(bucket) as Arc<dyn ObjectStore>
        });
        let clouds = config.cloud_of_clouds.as_ref().map(CloudOfClouds::open).transpose()?;
        let bucket = match (&clouds, bucket) {
            (Some(clouds), _) => {
                let (slack, tail) = (clouds.stamp_slack(), clouds.delete_tail());
                tracing::info!(?clouds, ?slack, ?tail, "this cloud's chunks are kept in a cloud of clouds");
                Some(Arc::new(clouds.clone()) as Arc<dyn ObjectStore>)
            }
            (None, bucket) => bucket,
        };
        Ok(Self { near, bucket, clouds })
    }

    /// The folder: what volume processes read and write.
    #[must_use]
    pub fn near(&self) -> &DirStore {
        &self.near
    }

    /// The bucket, or the cloud of clouds, if the cloud's chunks are kept in one.
    #[must_use]
    pub fn bucket(&self) -> Option<&Arc<dyn ObjectStore>> {
        self.bucket.as_ref()
    }

    /// The cloud of clouds, if the cloud's chunks are kept in one.
    #[must_use]
    pub fn clouds(&self) -> Option<&CloudOfClouds> {
        self.clouds.as_ref()
    }

    /// What counts as this cloud's store.
    #[must_use]
    pub fn home(&self) -> Arc<dyn ObjectStore> {
        match &self.bucket {
            Some(bucket) => Arc::clone(bucket),
            None => Arc::new(self.near.clone()),
        }
    }
}
