//! What is opened at the start: folders, keys, CA, store.

use std::{os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc};

use supercloud_store::{SledOptions, SledStore, Store};

use super::{Config, StartError, StoreConfig};
use crate::{ca::Authority, keys::Keys};

/// The store, as it has to be closed.
#[derive(Debug)]
pub(super) enum OpenStore {
    Sled(Arc<SledStore>),
    #[cfg(feature = "etcd")]
    Etcd(Arc<supercloud_store_etcd::EtcdStore>),
}

impl OpenStore {
    pub async fn open(config: &Config) -> Result<Self, StartError> {
        match &config.store {
            StoreConfig::Sled => {
                Ok(Self::Sled(Arc::new(SledStore::open(config.state_dir(), SledOptions::default()).await?)))
            }
            #[cfg(feature = "etcd")]
            StoreConfig::Etcd(servers) => {
                let options = supercloud_store_etcd::EtcdOptions::default();
                Ok(Self::Etcd(Arc::new(supercloud_store_etcd::EtcdStore::connect(servers, &options).await?)))
            }
            #[cfg(not(feature = "etcd"))]
            StoreConfig::Etcd(_) => Err(StartError::NoEtcd),
        }
    }

    pub fn handle(&self) -> Arc<dyn Store> {
        match self {
            Self::Sled(store) => Arc::clone(store) as Arc<dyn Store>,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => Arc::clone(store) as Arc<dyn Store>,
        }
    }

    pub async fn close(&self) {
        match self {
            Self::Sled(store) => store.close().await,
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => {}
        }
    }
}

fn make_folder(path: &Path) -> Result<(), StartError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| StartError::Folder { path: path.to_owned(), source })
}

/// Makes the folders, and reads or makes keys and CA.
pub(super) async fn files(config: Arc<Config>) -> Result<(Keys, Authority), StartError> {
    tokio::task::spawn_blocking(move || {
        for folder in [config.data_dir.clone(), config.uploads_dir(), config.chunks_dir()] {
            make_folder(&folder)?;
        }
        Ok((Keys::open_or_make(&config.data_dir)?, Authority::open_or_make(&config.data_dir)?))
    })
    .await
    .map_err(|_| StartError::Interrupted)?
}
