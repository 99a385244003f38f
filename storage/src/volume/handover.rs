//! The hand-over at the destination: copying ahead while the source runs, and taking the map when it is sealed.

use std::sync::{Arc, PoisonError};

use futures::StreamExt as _;
use tokio::sync::watch;

use super::{
    Inner, Volume, VolumeError,
    journal::Record,
    map::{BlockMap, BlockState, Entry},
    relock,
    remote::{BlockSource, FetchLimit, Priority},
    role::Role,
};
use crate::{
    BLOCK_BYTES,
    key::ChunkKind,
    process::control::{PreCopyStatus, SealedMap},
};

/// Blocks asked for at once.
const FETCHES_AT_ONCE: usize = 16;
/// The pause between two passes that found nothing new.
pub(super) const IDLE_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

/// The source's map as far as it was told: data as `Remote`, with digests.
#[derive(Debug)]
pub(super) struct SourceMap {
    map: BlockMap,
    /// Everything up to this version was told.
    since: u64,
}

impl SourceMap {
    pub(super) fn new(blocks: u32) -> Self {
        Self { map: BlockMap::new(blocks), since: 0 }
    }

    /// Brings it up to date; gives the number of entries that were new.
    async fn update(&mut self, source: &dyn BlockSource) -> Result<u64, VolumeError> {
        let (mut from, mut first_version, mut count) = (0, None, 0);
        loop {
            let page = source.map_page(from, self.since).await?;
            first_version.get_or_insert(page.version);
            for entry in &page.entries {
                let wrong = |what| VolumeError::Map { what };
                if entry.block < from || entry.block >= self.map.blocks() {
                    return Err(wrong(format!("block {} is out of place", entry.block)));
                }
                let state = if entry.digest.is_some() { BlockState::Remote } else { BlockState::Zero };
                self.map.set(entry.block, Entry { state, version: entry.version, digest: entry.digest });
            }
            count += page.entries.len() as u64;
            match page.next {
                Some(next) if next > from => from = next,
                Some(_) => return Err(VolumeError::Map { what: "its pages do not go on".into() }),
                None => break,
            }
        }
        self.since = first_version.unwrap_or(0);
        Ok(count)
    }
}

/// Which blocks are pulled before the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ahead {
    /// All, as often as they change.
    #[default]
    All,
    /// Those that will probably not change any more: [`crate::propagation`].
    Predicted,
}

/// Tells how far a pre-copy is.
pub type PreCopy = watch::Sender<PreCopyStatus>;

impl Volume {
    pub(super) fn the_source(&self) -> Result<Arc<dyn BlockSource>, VolumeError> {
        self.inner.source.borrow().clone().ok_or(VolumeError::NoSource)
    }

    /// Pulls blocks from the running source, pass after pass, until the future is dropped. A volume that has adopted a
    /// map gives it up: the source went on.
    pub async fn pre_copy(&self, limit: &FetchLimit, status: &PreCopy, ahead: Ahead) -> Result<(), VolumeError> {
        // Nothing is given up for a source that is not there.
        self.the_source()?;
        self.inner.change_role(Role::await_map).await?;
        if ahead == Ahead::Predicted {
            self.ask_habits().await;
        }
        loop {
            if ahead == Ahead::Predicted {
                self.predicted_pass(limit, status).await?;
                self.flush().await?;
                status.send_modify(|status| status.passes += 1);
                tokio::time::sleep(IDLE_PAUSE).await;
                continue;
            }
            let begin = |count| {
                status.send_modify(|status| {
                    status.is_running = true;
                    status.last_pass_blocks = count;
                });
            };
            let pulled = self.pre_copy_pass(limit, begin).await?;
            self.flush().await?;
            status.send_modify(|status| status.passes += 1);
            if pulled == 0 {
                tokio::time::sleep(IDLE_PAUSE).await;
            }
        }
    }

    /// Learns what the guest did with its blocks at the source.
    async fn ask_habits(&self) {
        let told = match self.the_source() {
            Ok(source) => source.history().await.map_err(VolumeError::from),
            Err(error) => Err(error),
        };
        match told {
            Ok(Some(told)) => self.inner.habits.take(&told),
            Ok(None) => self.inner.habits.take(&[]),
            // An older source knows no such question: what is seen of its map from now on must do.
            Err(error) => {
                tracing::info!(volume = %self.id(), %error, "the source does not tell how its blocks are used");
                self.inner.habits.take(&[]);
            }
        }
    }

    /// Pulls what is worth it, in the order in which it is, until nothing is that is not here, or as many blocks came as were
    /// lacking at the beginning: a guest may write faster than the line carries.
    async fn predicted_pass(&self, limit: &FetchLimit, status: &PreCopy) -> Result<(), VolumeError> {
        let source = self.the_source()?;
        let habits = &self.inner.habits;
        let mut left: Option<u64> = None;
        loop {
            let (plan, count) = {
                let mut known = self.inner.source_map.lock().await;
                let before = known.since;
                known.update(&*source).await?;
                let state = relock(&self.inner.map);
                let mut lacking = Vec::new();
                for (block, entry) in known.map.entries().filter(|(_, entry)| entry.state == BlockState::Remote) {
                    let ours = state.map.get(block);
                    if before > 0 && entry.version > before {
                        habits.note_rewrite(block);
                    }
                    if ours.version < entry.version || ours.state == BlockState::Remote {
                        lacking.push((block, entry.version));
                    }
                }
                drop(state);
                habits.plan(lacking)
            };
            status.send_modify(|status| {
                status.is_running = true;
                status.last_pass_blocks = count;
            });
            let due = left.get_or_insert(count);
            if plan.is_empty() || *due == 0 {
                return Ok(());
            }
            let (began, count) = (tokio::time::Instant::now(), plan.len());
            *due = due.saturating_sub(count as u64);
            self.pull_ahead(&*source, plan, limit).await?;
            habits.note_rate(count, began.elapsed());
        }
    }

    /// Pulls all that is older here than at the source, once; tells beforehand how many blocks that is, and gives the number.
    pub(super) async fn pre_copy_pass(&self, limit: &FetchLimit, told: impl FnOnce(u64)) -> Result<u64, VolumeError> {
        let source = self.the_source()?;
        let wanted: Vec<(u32, u64)> = {
            let mut known = self.inner.source_map.lock().await;
            known.update(&*source).await?;
            let state = relock(&self.inner.map);
            let is_old = |(block, entry): &(u32, Entry)| {
                let ours = state.map.get(*block);
                entry.state == BlockState::Remote && (ours.version < entry.version || ours.state == BlockState::Remote)
            };
            known.map.entries().filter(is_old).map(|(block, entry)| (block, entry.version)).collect()
        };
        let count = wanted.len() as u64;
        told(count);
        self.pull_ahead(&*source, wanted, limit).await?;
        Ok(count)
    }

    /// Brings these blocks, several at once, within the limit.
    async fn pull_ahead(
        &self,
        source: &dyn BlockSource,
        blocks: Vec<(u32, u64)>,
        limit: &FetchLimit,
    ) -> Result<(), VolumeError> {
        let mut pulls = futures::stream::iter(blocks)
            .map(|(block, version)| async move {
                limit.draw(BLOCK_BYTES as u64).await;
                let fetched = source.block(block, version, Priority::Background).await?;
                self.keep_ahead(block, fetched.version, fetched.data).await
            })
            .buffer_unordered(FETCHES_AT_ONCE);
        while let Some(result) = pulls.next().await {
            result?;
        }
        Ok(())
    }

    /// Keeps a copy of a version that may or may not be the newest at the switch.
    async fn keep_ahead(&self, block: u32, version: u64, data: Option<bytes::Bytes>) -> Result<(), VolumeError> {
        self.inner
            .blocking(move |inner| {
                let role = inner.role.read().unwrap_or_else(PoisonError::into_inner);
                if *role != Role::Standby {
                    // Adopted meanwhile: the map tells what is needed.
                    return Ok(());
                }
                let _stripe = inner.stripe(block).write().unwrap_or_else(PoisonError::into_inner);
                let mine = inner.entry(block);
                if mine.version >= version && mine.state != BlockState::Remote {
                    return Ok(());
                }
                if data.as_ref().is_some_and(|data| data.len() != BLOCK_BYTES) {
                    return Err(VolumeError::Map { what: format!("block {block} came with another length") });
                }
                match data {
                    None => {
                        inner.punch(block)?;
                        inner.note(block, Entry { state: BlockState::Zero, version, digest: None })
                    }
                    Some(data) => {
                        // Should this process die between the two, new content lies under the old version. The source
                        // is past that version, so no map that it will announce can name it.
                        let digest = inner.keys.name(ChunkKind::Data, &data);
                        inner.write_block(block, &data)?;
                        inner.count_pulled(data.len());
                        inner.note(block, Entry { state: BlockState::Local, version, digest: Some(digest) })
                    }
                }
            })
            .await
    }

    /// Asks for what is new in the source's map, and pulls nothing.
    pub async fn learn_map(&self) -> Result<(), VolumeError> {
        let source = self.the_source()?;
        let new = self.inner.source_map.lock().await.update(&*source).await?;
        tracing::debug!(volume = %self.id(), new, "the source's map was asked for ahead");
        Ok(())
    }

    /// Takes the map of the sealed source. When it returns, the map is durable here, blocks that were copied ahead and
    /// are still the newest are kept, and the others are pulled when they are needed. The volume may be activated then.
    pub async fn adopt(&self, sealed: SealedMap) -> Result<(), VolumeError> {
        let inner = &self.inner;
        let _transition = inner.transition.lock().await;
        let role = inner.role_now();
        if matches!(role, Role::Adopted { sealed: epoch } if epoch == sealed.epoch)
            && inner.adopted_root() == Some(sealed)
        {
            return Ok(());
        }
        let next = role.adopt(sealed.epoch)?;
        let source = self.the_source()?;
        let mut known = inner.source_map.lock().await;
        let root = |map: &BlockMap| map.root(inner.params.size_bytes, inner.params.base);
        // Known already, as a rule, where it was asked for ahead: a round trip less of a guest that stands still.
        if root(&known.map) != Some(sealed.root) {
            known.update(&*source).await?;
        }
        if root(&known.map) != Some(sealed.root) {
            // What was told while the source ran can be out of date after a crash of it: ask for all of it again.
            tracing::info!(volume = %self.id(), "the source's map differs from the announced one; asking for all of it");
            *known = SourceMap::new(inner.blocks);
            known.update(&*source).await?;
            let found = root(&known.map);
            if found != Some(sealed.root) {
                let what = format!("its root is {found:?}, not {:?}", sealed.root);
                return Err(VolumeError::Map { what });
            }
        }
        let map = known.map.clone();
        drop(known);
        let _gate = inner.flush_gate.lock().await;
        inner
            .blocking(move |inner| {
                let result = inner.take_map(&map, next);
                if result.is_err() {
                    inner.fail();
                }
                result
            })
            .await
    }
}

impl Inner {
    /// The map that an adopted volume has, as the source announced it.
    pub(super) fn adopted_root(&self) -> Option<SealedMap> {
        let Role::Adopted { sealed: epoch } = self.role_now() else { return None };
        let state = relock(&self.map);
        let root = state.map.root(self.params.size_bytes, self.params.base)?;
        Some(SealedMap { epoch, root, version: state.map.highest_version(), blocks: state.map.len() })
    }

    fn take_map(&self, source: &BlockMap, role: Role) -> Result<(), VolumeError> {
        let _one = relock(&self.flush_lock);
        let mut role_now = self.role.write().unwrap_or_else(PoisonError::into_inner);
        let (records, dropped) = {
            let state = relock(&self.map);
            plan(&state.map, &state.pending, source)
        };
        let mut journal = Vec::with_capacity(records.len() + 2);
        journal.extend(records.iter().map(|(block, planned)| Record::Block(*block, planned.on_disk)));
        journal.push(Record::Reserve(source.highest_version() + super::recovery::RESERVE_VERSIONS));
        // The role last: until it is there, the rest counts for nothing.
        journal.push(Record::Role(role));
        self.journal.append(&journal)?;

        let mut guard = relock(&self.map);
        let state = &mut *guard;
        state.pending.clear();
        for (block, planned) in &records {
            state.map.set(*block, planned.now);
            if planned.now != planned.on_disk {
                state.pending.insert(*block);
            }
        }
        state.remote_on_disk =
            records.iter().filter(|(_, p)| p.on_disk.state == BlockState::Remote).map(|(block, _)| *block).collect();
        let highest = source.highest_version();
        state.next_version = state.next_version.max(highest + 1);
        state.reserved = state.reserved.max(highest + super::recovery::RESERVE_VERSIONS);
        // Nothing of before is wanted: what was copied ahead and is not durable is in the journal as remote.
        state.hot.clear().map_err(|source| VolumeError::Disk { what: "empty the hot log", source })?;
        drop(guard);
        // Regions of the base and of zeros must be holes.
        for block in dropped {
            self.punch(block)?;
        }
        self.completed.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        *role_now = role;
        self.role_seen.send_replace(role);
        Ok(())
    }
}

/// What becomes of a block at adoption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Planned {
    /// Its entry in memory.
    now: Entry,
    /// Its entry in the journal: a copy that is not durable yet counts as remote there, so that nobody has to wait for
    /// it to be while the guest is paused.
    on_disk: Entry,
}

/// The entries after adoption, and the blocks whose region of the data file must become a hole.
fn plan(
    ours: &BlockMap,
    pending: &std::collections::BTreeSet<u32>,
    source: &BlockMap,
) -> (Vec<(u32, Planned)>, Vec<u32>) {
    let mut records = Vec::new();
    let mut dropped = Vec::new();
    for (block, entry) in source.entries() {
        let mine = ours.get(block);
        let is_same = mine.state == BlockState::Local && mine.version == entry.version && mine.digest == entry.digest;
        let planned = if entry.state == BlockState::Remote && is_same {
            let now = Entry { state: BlockState::Local, ..entry };
            Planned { now, on_disk: if pending.contains(&block) { entry } else { now } }
        } else {
            if entry.state == BlockState::Zero && mine.state == BlockState::Local {
                dropped.push(block);
            }
            Planned { now: entry, on_disk: entry }
        };
        records.push((block, planned));
    }
    for (block, mine) in ours.entries().filter(|(block, _)| source.get(*block).state == BlockState::Base) {
        if mine.state == BlockState::Local {
            dropped.push(block);
        }
        let base = Entry::default();
        records.push((block, Planned { now: base, on_disk: base }));
    }
    (records, dropped)
}
