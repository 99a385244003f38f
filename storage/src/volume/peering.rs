//! What a volume tells its peers: its map, with digests, and its blocks.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;

use super::{
    Inner, Volume, VolumeError,
    map::{BlockState, Entry},
    relock,
    remote::{MapEntry, MapPage},
    role::RoleError,
};
use crate::key::{ChunkKind, ChunkName};

/// Entries per page at most: digests of as many blocks may have to be computed for it (32 MiB).
const PAGE_ENTRIES: usize = 512;

/// A block as it is given to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerBlock {
    /// The version of the content.
    pub version: u64,
    /// The content's name; `None` for zeros.
    pub digest: Option<ChunkName>,
    /// The content: a whole block; `None` for zeros.
    pub data: Option<Bytes>,
}

impl Volume {
    /// The entries from block `from` on whose version is above `since`, with digests.
    pub async fn map_page(&self, from: u32, since: u64) -> Result<MapPage, VolumeError> {
        self.check_serving()?;
        let page = self.inner.blocking(move |inner| {
            // The version first: what is written while the page is made is above it, so the next page tells it.
            let (version, blocks, next) = {
                let state = relock(&inner.map);
                let mut blocks = state.map.entries_above(from, since);
                let page: Vec<u32> = blocks.by_ref().take(PAGE_ENTRIES).map(|(block, _)| block).collect();
                (state.next_version - 1, page, blocks.next().map(|(block, _)| block))
            };
            let mut entries = Vec::with_capacity(blocks.len());
            for block in blocks {
                let (entry, _) = inner.digested(block, false)?;
                entries.push(MapEntry {
                    block,
                    version: entry.version,
                    digest: if entry.state == BlockState::Zero { None } else { entry.digest },
                });
            }
            Ok(MapPage { version, entries, next })
        });
        page.await
    }

    /// A block's newest version, for a peer. One that is still at this volume's own source is pulled first.
    pub async fn block_for_peer(&self, block: u32) -> Result<PeerBlock, VolumeError> {
        self.check_serving()?;
        let size_bytes = self.size_bytes();
        if block >= self.inner.blocks {
            return Err(VolumeError::Range { offset: Inner::offset(block), len: 1, size_bytes });
        }
        if self.inner.entry(block).state == BlockState::Remote {
            self.inner.pull_newest(block).await?;
        }
        let read = self.inner.blocking(move |inner| inner.digested(block, true));
        let (entry, data) = read.await?;
        match entry.state {
            BlockState::Local => {
                Ok(PeerBlock { version: entry.version, digest: entry.digest, data: data.map(Bytes::from) })
            }
            BlockState::Zero => Ok(PeerBlock { version: entry.version, digest: None, data: None }),
            // The peer has the base itself, and asks only for what the map told it.
            BlockState::Base | BlockState::Remote => {
                Err(VolumeError::Map { what: format!("block {block} was asked for, which is not here") })
            }
        }
    }

    pub(super) fn check_serving(&self) -> Result<(), VolumeError> {
        let role = self.role();
        if role.may_serve_peers() { Ok(()) } else { Err(RoleError::Role { role, action: "serve peers" }.into()) }
    }

    /// Computes the digests of all local blocks that have none, on all cores.
    pub async fn warm_digests(&self) -> Result<(), VolumeError> {
        let bare: Arc<[u32]> = {
            let state = relock(&self.inner.map);
            state.map.without_digest().collect()
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let share = bare.len().div_ceil(workers).max(1);
        let work = (0..bare.len().div_ceil(share)).map(|worker| {
            let bare = bare.clone();
            self.inner.blocking(move |inner| {
                bare.iter()
                    .skip(worker * share)
                    .take(share)
                    .try_for_each(|&block| inner.digested(block, false).map(drop))
            })
        });
        futures::future::try_join_all(work).await.map(drop)
    }
}

impl Inner {
    /// A block's entry with its digest, computed when it is lacking; with `is_reading` also its data when local.
    pub(super) fn digested(&self, block: u32, is_reading: bool) -> Result<(Entry, Option<Vec<u8>>), VolumeError> {
        let _stripe = self.stripe(block).read().unwrap_or_else(PoisonError::into_inner);
        let mut entry = self.entry(block);
        if entry.state != BlockState::Local || (entry.digest.is_some() && !is_reading) {
            return Ok((entry, None));
        }
        let data = self.read_block(block)?;
        if entry.digest.is_none() {
            // The stripe is held: the version is still that of the data.
            entry.digest = Some(self.keys.name(ChunkKind::Data, &data));
            relock(&self.map).map.set(block, entry);
        }
        Ok((entry, Some(data)))
    }
}
