//! What the live roots reach.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::RangeInclusive,
};

use supercloud_ids::ProjectId;

use super::{Authority, SweepError};
use crate::{
    backend::{ObjectKey, ObjectStore, StoreError},
    chunk::MAX_SEALED_BYTES,
    key::{ChunkKind, ChunkName, ContentRoot},
};

/// The names of one pass that are reached.
pub(super) struct Reach {
    bytes: RangeInclusive<u8>,
    names: HashSet<ChunkName>,
}

impl Reach {
    /// Of names whose first byte is among these.
    pub(super) fn new(bytes: RangeInclusive<u8>) -> Self {
        Self { bytes, names: HashSet::new() }
    }

    fn add(&mut self, name: ChunkName) {
        if self.bytes.contains(&name.0[0]) {
            self.names.insert(name);
        }
    }

    pub(super) fn has(&self, name: &ChunkName) -> bool {
        self.names.contains(name)
    }
}

/// A leaf of a manifest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaf {
    name: ChunkName,
    /// A manifest that has it.
    root: ContentRoot,
    /// Whether its content must be known.
    is_home: bool,
}

/// The upper parts of all live manifests.
#[derive(Default)]
pub(super) struct Tree {
    roots: BTreeMap<ContentRoot, bool>,
    leaves: HashMap<ChunkName, Leaf>,
    /// Roots whose manifests neither the store nor the authority had.
    absent: HashSet<ContentRoot>,
}

impl Tree {
    pub(super) fn leaf_count(&self) -> usize {
        self.leaves.len()
    }

    /// Adds roots; gives the leaves that are new.
    pub(super) async fn add(
        &mut self,
        store: &dyn ObjectStore,
        authority: &dyn Authority,
        project: ProjectId,
        roots: &BTreeMap<ContentRoot, bool>,
    ) -> Result<Vec<Leaf>, SweepError> {
        let mut new = Vec::new();
        for (root, is_home) in roots {
            // A root that has come home is read again: it was allowed to be absent before. So is one that was absent:
            // a guest that stands on it may have come to this cloud.
            let was_home = self.roots.get(root).copied();
            let is_absent = self.absent.contains(root);
            if was_home.is_some_and(|was_home| was_home || !is_home) && !is_absent {
                continue;
            }
            let chunk = root.as_chunk();
            if is_absent && !is_home && !store.exists(ObjectKey::chunk(project, &chunk)).await? {
                continue;
            }
            let Some(names) = names(store, authority, project, ChunkKind::Root, chunk).await? else {
                if *is_home {
                    return Err(SweepError::Manifest { root: *root, chunk });
                }
                // Nobody has read this content by this store; its data is elsewhere.
                self.absent.insert(*root);
                self.roots.insert(*root, *is_home);
                continue;
            };
            self.absent.remove(root);
            for name in names {
                let leaf = Leaf { name, root: *root, is_home: *is_home };
                if self.leaves.get(&name).is_none_or(|known| leaf.is_home && !known.is_home) {
                    self.leaves.insert(name, leaf);
                    new.push(leaf);
                }
            }
            self.roots.insert(*root, *is_home);
        }
        Ok(new)
    }

    /// Marks roots and leaves themselves.
    pub(super) fn reach_trees(&self, reach: &mut Reach) {
        self.roots.keys().for_each(|root| reach.add(root.as_chunk()));
        self.leaves.keys().for_each(|leaf| reach.add(*leaf));
    }

    /// Marks everything.
    pub(super) async fn reach_all(
        &self,
        store: &dyn ObjectStore,
        authority: &dyn Authority,
        project: ProjectId,
        reach: &mut Reach,
    ) -> Result<(), SweepError> {
        self.reach_trees(reach);
        for leaf in self.leaves.values() {
            self.reach_leaf(store, authority, project, *leaf, reach).await?;
        }
        Ok(())
    }

    /// Marks the data of a leaf.
    pub(super) async fn reach_leaf(
        &self,
        store: &dyn ObjectStore,
        authority: &dyn Authority,
        project: ProjectId,
        leaf: Leaf,
        reach: &mut Reach,
    ) -> Result<(), SweepError> {
        match names(store, authority, project, ChunkKind::Leaf, leaf.name).await? {
            Some(names) => names.into_iter().for_each(|name| reach.add(name)),
            None if leaf.is_home => return Err(SweepError::Manifest { root: leaf.root, chunk: leaf.name }),
            None => {}
        }
        Ok(())
    }
}

/// The names in a part of a manifest, from the store's copy, else from the authority's own.
async fn names(
    store: &dyn ObjectStore,
    authority: &dyn Authority,
    project: ProjectId,
    kind: ChunkKind,
    name: ChunkName,
) -> Result<Option<Vec<ChunkName>>, SweepError> {
    match store.get(ObjectKey::chunk(project, &name), MAX_SEALED_BYTES).await {
        Ok(sealed) => {
            if let Some(names) = authority.names(project, kind, name, Some(sealed)).await? {
                return Ok(Some(names));
            }
            tracing::warn!(%project, %name, "a part of a manifest is damaged in this store");
        }
        Err(StoreError::NotFound { .. } | StoreError::TooLarge { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(authority.names(project, kind, name, None).await?)
}
