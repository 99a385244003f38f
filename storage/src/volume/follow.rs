//! The standby of a mirror: copies ahead while no cut was made, then stages cut after cut apart from what is committed.
//!
//! ```text
//!   before the first cut      blocks copied ahead, of any version        in the data file
//!   cut n is being staged     blocks that differ from what is committed  in the stage file
//!   cut n is staged           all of them; the map's root is the source's
//!   commit n                  stage file ─> data file, block by block; only forward once it has begun
//! ```
//!
//! From the first commit on the volume's map and data file are the committed cut, and nothing but a commit changes them. All of
//! this lives as long as the process: one that is started anew follows nothing, and what lies in its files counts as copied ahead.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use futures::StreamExt as _;
use supercloud_ids::Epoch;
use tokio::sync::{Notify, OwnedMutexGuard, watch};

use super::{
    CutInfo, Inner, Volume, VolumeError, chain,
    disk::DiskFile,
    handover::IDLE_PAUSE,
    journal::Record,
    map::{BlockMap, BlockState, Entry},
    recovery::RESERVE_VERSIONS,
    relock,
    remote::{BlockSource, FetchError, FetchLimit},
    role::Role,
};
use crate::{
    BLOCK_BYTES,
    key::ChunkKind,
    process::control::{FollowStatus, SealedMap},
};

/// The file of blocks that are staged.
pub(super) const STAGE_NAME: &str = "stage";
/// Blocks of a cut asked for at once: 3 MiB, the product of 200 Mbit/s and 120 ms.
const FETCHES_AT_ONCE: usize = 48;
/// How long `await_staged` waits.
const AWAIT_BUDGET: Duration = Duration::from_secs(1);
/// The pauses after the source could not be asked.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A volume as the follower of a source.
#[derive(Debug)]
pub(super) struct Following {
    /// None when it does not follow.
    status: watch::Sender<Option<FollowStatus>>,
    state: Arc<tokio::sync::Mutex<State>>,
    /// What lies in the stage file.
    content: Mutex<HashMap<u32, Entry>>,
    /// A cut was committed: the source may keep less.
    committed: Notify,
}

impl Default for Following {
    fn default() -> Self {
        let status = watch::Sender::new(None);
        Self { status, state: Arc::default(), content: Mutex::default(), committed: Notify::new() }
    }
}

#[derive(Debug, Default)]
struct State {
    stage: Option<Arc<dyn DiskFile>>,
    committed: Option<Committed>,
    staged: Option<Staged>,
    /// The source's map did not come out right by its changes: all of it is asked for.
    is_doubtful: bool,
}

#[derive(Debug, Clone, Copy)]
struct Committed {
    number: u64,
    version: u64,
}

/// A cut that is here whole.
#[derive(Debug)]
struct Staged {
    number: u64,
    version: u64,
    /// What differs from the committed map.
    changes: Vec<(u32, Entry)>,
    /// A commit of it was begun: what was committed before is not whole any more.
    is_begun: bool,
}

impl State {
    fn newest(&self) -> u64 {
        let staged = self.staged.as_ref().map(|staged| staged.number);
        staged.or(self.committed.map(|committed| committed.number)).unwrap_or(0)
    }

    /// The version that everything is committed up to, as the source may take it.
    fn have(&self) -> u64 {
        self.committed.filter(|_| !self.is_doubtful).map_or(0, |committed| committed.version)
    }
}

/// Whether what we have of a block is what the map wants.
fn is_same(ours: Entry, wanted: Entry) -> bool {
    match wanted.state {
        BlockState::Base => ours.state == BlockState::Base,
        BlockState::Zero => ours.state == BlockState::Zero && ours.version == wanted.version,
        BlockState::Local | BlockState::Remote => {
            ours.state == BlockState::Local && ours.version == wanted.version && ours.digest == wanted.digest
        }
    }
}

impl Volume {
    /// How it follows; none when it does not.
    #[must_use]
    pub fn follow_status(&self) -> Option<FollowStatus> {
        self.inner.following.status.borrow().clone()
    }

    /// Begins to be a follower, if it is none: [`Volume::follow`] does the work.
    ///
    /// # Errors
    /// When the volume is not on standby without a map.
    pub async fn begin_follow(&self) -> Result<(), VolumeError> {
        let role = self.role();
        if role != Role::Standby {
            return Err(super::RoleError::Role { role, action: "follow a source" }.into());
        }
        let inner = &self.inner;
        let mut state = inner.following.state.clone().lock_owned().await;
        if self.follow_status().is_some() {
            return Ok(());
        }
        let begun = inner.blocking(move |inner| {
            let disk = |what| move |source| VolumeError::Disk { what, source };
            let stage = inner.disk.open(STAGE_NAME, true).map_err(disk("open the stage file"))?;
            let stage = stage.ok_or_else(|| disk("open the stage file")(std::io::ErrorKind::NotFound.into()))?;
            stage.set_len(0).map_err(disk("empty the stage file"))?;
            *state = State { stage: Some(stage), ..State::default() };
            relock(&inner.following.content).clear();
            inner.following.status.send_replace(Some(FollowStatus::default()));
            Ok(())
        });
        begun.await
    }

    /// Ends following: no cut can be promoted any more. [`Volume::follow`] must have ended.
    pub async fn end_follow(&self) -> Result<(), VolumeError> {
        let inner = &self.inner;
        // What was begun for a cut still writes into the stage file.
        self.quiesce().await;
        let state = inner.following.state.clone().lock_owned().await;
        inner.blocking(move |inner| inner.forget_stage(state)).await
    }

    /// Copies ahead until the source makes its first cut, then stages cut after cut, for as long as the future is not dropped.
    ///
    /// # Errors
    /// Only when going on is of no use: the volume failed, or does not follow.
    pub async fn follow(&self, limit: &FetchLimit) -> Result<(), VolumeError> {
        let following = &self.inner.following;
        let mut pause = FIRST_PAUSE;
        loop {
            if following.status.borrow().is_none() {
                return Err(VolumeError::Following("follows no source"));
            }
            let trouble = match self.follow_once(limit).await {
                Ok(()) => {
                    pause = FIRST_PAUSE;
                    self.tell(|status| status.trouble = None);
                    continue;
                }
                Err(error @ (VolumeError::Failed | VolumeError::Role(_) | VolumeError::Journal(_))) => {
                    let trouble = chain(&error);
                    self.tell(|status| status.trouble = Some(trouble));
                    return Err(error);
                }
                Err(error) => chain(&error),
            };
            tracing::info!(volume = %self.id(), trouble, "following will be tried again");
            self.tell(|status| status.trouble = Some(trouble));
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn tell(&self, change: impl FnOnce(&mut FollowStatus)) {
        self.inner.following.tell(change);
    }

    /// Waits for a cut and stages it; returns after a while also when there was none.
    async fn follow_once(&self, limit: &FetchLimit) -> Result<(), VolumeError> {
        let source = self.the_source()?;
        let (newest, have, is_copying) = {
            let state = self.inner.following.state.lock().await;
            (state.newest(), state.have(), state.committed.is_none() && state.staged.is_none())
        };
        let found = if is_copying {
            tokio::select! {
                biased;
                found = source.await_cut(newest, have) => found?,
                copied = self.copy_ahead(limit) => return copied,
            }
        } else {
            let following = &self.inner.following;
            let mut found = source.await_cut(newest, have);
            loop {
                tokio::select! {
                    found = &mut found => break found?,
                    () = following.committed.notified() => {
                        let have = following.state.lock().await.have();
                        // Answered at once: only to tell it.
                        source.await_cut(u64::MAX, have).await?;
                    }
                }
            }
        };
        let Some(cut) = found else { return Ok(()) };
        if cut.number <= newest {
            return Err(FetchError::Wrong(format!("cut {} is not above {newest}", cut.number)).into());
        }
        if is_copying {
            // A block that is being copied ahead must not overwrite what the cut brings.
            self.quiesce().await;
        }
        self.stage(&source, cut, limit).await
    }

    async fn copy_ahead(&self, limit: &FetchLimit) -> Result<(), VolumeError> {
        loop {
            let pulled =
                self.pre_copy_pass(limit, |lacking| self.tell(|status| status.lacking_blocks = lacking)).await?;
            self.flush().await?;
            self.tell(|status| status.passes += 1);
            if pulled == 0 {
                tokio::time::sleep(IDLE_PAUSE).await;
            }
        }
    }

    /// Brings a cut: when it returns, all of it is here.
    async fn stage(&self, source: &Arc<dyn BlockSource>, cut: CutInfo, limit: &FetchLimit) -> Result<(), VolumeError> {
        let following = &self.inner.following;
        let have = {
            let state = following.state.clone().lock_owned().await;
            let mut state = self.finish_commit(state).await?;
            // Not to be committed any more: the source has gone on without it.
            state.staged = None;
            state.have()
        };
        if cut.since > have {
            return Err(VolumeError::Cut { number: cut.number, why: "keeps less than is lacking here" });
        }
        let changes = match self.ask_changes(&**source, cut, have).await {
            Err(error @ VolumeError::Map { .. }) => {
                following.state.lock().await.is_doubtful = true;
                return Err(error);
            }
            changes => changes?,
        };
        let lacking: Vec<(u32, Entry)> = {
            let content = relock(&following.content);
            let is_here = |(block, entry): &&(u32, Entry)| {
                entry.state != BlockState::Local || content.get(block).is_some_and(|ours| is_same(*ours, *entry))
            };
            changes.iter().filter(|change| !is_here(change)).copied().collect()
        };
        self.tell(|status| status.lacking_blocks = lacking.len() as u64);
        let mut pulls = futures::stream::iter(lacking)
            .map(|(block, entry)| async move {
                limit.draw(BLOCK_BYTES as u64).await;
                let fetched = source.cut_block(cut.number, block, entry.version).await?;
                self.keep_staged(block, entry, fetched.data).await
            })
            .buffer_unordered(FETCHES_AT_ONCE);
        while let Some(result) = pulls.next().await {
            result?;
            self.tell(|status| {
                status.lacking_blocks = status.lacking_blocks.saturating_sub(1);
                status.pulled_blocks += 1;
            });
        }
        drop(pulls);
        let mut state = following.state.lock().await;
        state.staged = Some(Staged { number: cut.number, version: cut.version, changes, is_begun: false });
        state.is_doubtful = false;
        drop(state);
        self.tell(|status| status.staged = cut.number);
        Ok(())
    }

    /// What the cut's map says otherwise than ours, in order of blocks. Checked against the cut's root.
    async fn ask_changes(
        &self,
        source: &dyn BlockSource,
        cut: CutInfo,
        have: u64,
    ) -> Result<Vec<(u32, Entry)>, VolumeError> {
        let inner = &self.inner;
        let wrong = |what: String| VolumeError::Source(FetchError::Wrong(what));
        let mut told: Vec<(u32, Entry)> = Vec::new();
        let mut from = 0;
        loop {
            let page = source.cut_page(cut.number, from, have).await?;
            for entry in &page.entries {
                if entry.block < from || entry.block >= inner.blocks || entry.version > cut.version {
                    return Err(wrong(format!("block {} is not of cut {}", entry.block, cut.number)));
                }
                let state = if entry.digest.is_some() { BlockState::Local } else { BlockState::Zero };
                told.push((entry.block, Entry { state, version: entry.version, digest: entry.digest }));
            }
            match page.next {
                Some(next) if next > from => from = next,
                Some(_) => return Err(wrong("its pages do not go on".into())),
                None => break,
            }
        }
        let compare = move |inner: &Inner| {
            let ours = relock(&inner.map).map.clone();
            // Without a committed cut, what is here is of any version: the map is what was told and nothing else.
            let mut map = if have > 0 { ours.clone() } else { BlockMap::new(inner.blocks) };
            told.iter().for_each(|(block, entry)| map.set(*block, *entry));
            let root = map.root(inner.params.size_bytes, inner.params.base);
            if root != Some(cut.root) {
                let what = format!("the root of cut {} comes out as {root:?}, not {:?}", cut.number, cut.root);
                return Err(VolumeError::Map { what });
            }
            let mut changes = told;
            changes.retain(|(block, entry)| !is_same(ours.get(*block), *entry));
            if have == 0 {
                // What we have and the source does not: of a guest whose writes were lost with its host's power.
                let extra = ours.entries().filter(|(block, _)| map.get(*block).state == BlockState::Base);
                changes.extend(extra.map(|(block, _)| (block, Entry::default())));
                changes.sort_unstable_by_key(|(block, _)| *block);
            }
            Ok(changes)
        };
        inner.blocking(compare).await
    }

    /// Puts a block of a cut into the stage file.
    async fn keep_staged(&self, block: u32, entry: Entry, data: Option<bytes::Bytes>) -> Result<(), VolumeError> {
        let wrong =
            move || VolumeError::Source(FetchError::Wrong(format!("block {block} is not what the cut's map says")));
        let data = data.filter(|data| data.len() == BLOCK_BYTES).ok_or_else(wrong)?;
        let stage = self.inner.following.state.lock().await.stage.clone();
        let stage = stage.ok_or(VolumeError::Following("follows no source"))?;
        let kept = self.inner.blocking(move |inner| {
            if Some(inner.keys.name(ChunkKind::Data, &data)) != entry.digest {
                return Err(wrong());
            }
            relock(&inner.following.content).remove(&block);
            stage
                .write_at(&data, Inner::offset(block))
                .map_err(|source| VolumeError::Disk { what: "write the stage file", source })?;
            relock(&inner.following.content).insert(block, entry);
            inner.count_pulled(data.len());
            Ok(())
        });
        kept.await
    }

    /// Waits, a second at most, until a cut above `after` is staged; tells how it follows in any case.
    ///
    /// # Errors
    /// When it does not follow.
    pub async fn await_staged(&self, after: u64) -> Result<FollowStatus, VolumeError> {
        let mut seen = self.inner.following.status.subscribe();
        let is_there = |status: &Option<FollowStatus>| status.as_ref().is_none_or(|status| status.staged > after);
        // Over time it is told as it is; the sender lives as long as the volume.
        let _ = tokio::time::timeout(AWAIT_BUDGET, seen.wait_for(is_there)).await;
        self.follow_status().ok_or(VolumeError::Following("follows no source"))
    }

    /// Commits a staged cut. One that is committed, or was passed, is done already.
    ///
    /// # Errors
    /// When the cut is not staged, or the disk fails: then it must be asked for again, and nothing else can be promoted.
    pub async fn commit_cut(&self, number: u64) -> Result<(), VolumeError> {
        let mut state = self.inner.following.state.clone().lock_owned().await;
        if self.follow_status().is_none() {
            return Err(VolumeError::Following("follows no source"));
        }
        if state.committed.is_some_and(|committed| committed.number >= number) {
            return Ok(());
        }
        match &mut state.staged {
            Some(staged) if staged.number == number => staged.is_begun = true,
            _ => return Err(VolumeError::Cut { number, why: "is not staged" }),
        }
        self.finish_commit(state).await.map(drop)
    }

    /// Does what is left of a commit that was begun.
    async fn finish_commit(&self, mut state: OwnedMutexGuard<State>) -> Result<OwnedMutexGuard<State>, VolumeError> {
        if !state.staged.as_ref().is_some_and(|staged| staged.is_begun) {
            return Ok(state);
        }
        // With the guard: it goes on, undisturbed, when its caller is gone.
        let finished = self.inner.blocking(move |inner| {
            let stage = state.stage.clone().ok_or(VolumeError::Following("follows no source"))?;
            let Some(staged) = &state.staged else { return Ok(state) };
            inner.apply_stage(&*stage, &staged.changes)?;
            let Staged { number, version, .. } = *staged;
            state.committed = Some(Committed { number, version });
            state.staged = None;
            relock(&inner.following.content).clear();
            // Only space: what lies there counts for nothing.
            if let Err(error) = stage.set_len(0) {
                tracing::warn!(volume = %inner.params.volume, %error, "the stage file cannot be emptied");
            }
            inner.following.tell(|status| {
                status.committed = number;
                status.committed_version = version;
            });
            inner.following.committed.notify_one();
            Ok(state)
        });
        finished.await
    }

    /// Whether there is a committed cut to promote, or one whose promotion only has to be told again.
    #[must_use]
    pub fn may_promote(&self, epoch: Epoch) -> bool {
        let is_done = self.role() == Role::Adopted { sealed: epoch };
        is_done || self.follow_status().is_some_and(|status| status.committed > 0)
    }

    /// Makes of the committed cut a volume that may be activated above `epoch`; durable when it returns.
    /// [`Volume::follow`] must have ended.
    ///
    /// # Errors
    /// When there is no committed cut, the role does not allow it, or the disk fails.
    pub async fn promote(&self, epoch: Epoch) -> Result<SealedMap, VolumeError> {
        let inner = &self.inner;
        let _transition = inner.transition.lock().await;
        let role = inner.role_now();
        if role != (Role::Adopted { sealed: epoch }) {
            let next = match role {
                Role::Standby => role.adopt(epoch)?,
                _ => return Err(super::RoleError::Role { role, action: "be promoted" }.into()),
            };
            // Staging that was begun ends before: it shares the stage file.
            self.quiesce().await;
            let state = inner.following.state.clone().lock_owned().await;
            if self.follow_status().is_none_or(|status| status.committed == 0) {
                return Err(VolumeError::Following("has no committed cut that could be promoted"));
            }
            let state = self.finish_commit(state).await?;
            self.flush().await?;
            inner.blocking(move |inner| inner.take_committed(state, next)).await?;
            self.set_source(None);
        }
        inner.adopted_root().ok_or_else(|| VolumeError::Map { what: "a digest is lacking".into() })
    }
}

impl Following {
    fn tell(&self, change: impl FnOnce(&mut FollowStatus)) {
        self.status.send_modify(|status| {
            if let Some(status) = status {
                change(status);
            }
        });
    }
}

impl Inner {
    fn forget_stage(&self, mut state: OwnedMutexGuard<State>) -> Result<(), VolumeError> {
        *state = State::default();
        relock(&self.following.content).clear();
        self.following.status.send_replace(None);
        let removed = self.disk.remove(STAGE_NAME);
        removed.map_err(|source| VolumeError::Disk { what: "remove the stage file", source })
    }

    /// Brings the changes of a staged cut into map and data file. May be repeated after it failed.
    fn apply_stage(&self, stage: &dyn DiskFile, changes: &[(u32, Entry)]) -> Result<(), VolumeError> {
        if self.has_failed.load(Ordering::Acquire) {
            return Err(VolumeError::Failed);
        }
        self.forget_newer(changes)?;
        for (block, entry) in changes {
            let role = self.role.read().unwrap_or_else(PoisonError::into_inner);
            if *role != Role::Standby {
                return Err(super::RoleError::Role { role: *role, action: "commit a cut" }.into());
            }
            let _stripe = self.stripe(*block).write().unwrap_or_else(PoisonError::into_inner);
            let ours = self.entry(*block);
            if is_same(ours, *entry) {
                continue;
            }
            match entry.state {
                BlockState::Local => {
                    let mut data = vec![0; BLOCK_BYTES];
                    stage
                        .read_at(&mut data, Self::offset(*block))
                        .map_err(|source| VolumeError::Disk { what: "read the stage file", source })?;
                    self.write_block(*block, &data)?;
                }
                BlockState::Zero | BlockState::Base | BlockState::Remote => self.punch(*block)?,
            }
            self.note(*block, *entry)?;
        }
        Ok(())
    }

    /// A block of ours may be of a later version than the cut's: copied ahead after the cut was made. It is forgotten, durably,
    /// before content of an earlier version lies in its place: after a crash nothing may take that for the later one.
    fn forget_newer(&self, changes: &[(u32, Entry)]) -> Result<(), VolumeError> {
        let mut newer = Vec::new();
        for (block, entry) in changes {
            let _stripe = self.stripe(*block).write().unwrap_or_else(PoisonError::into_inner);
            let ours = self.entry(*block);
            if ours.state != BlockState::Base && ours.version >= entry.version && !is_same(ours, *entry) {
                self.note(*block, Entry::default())?;
                newer.push(*block);
            }
        }
        if newer.is_empty() {
            return Ok(());
        }
        let flushed = self.flush_now();
        if flushed.is_err() {
            self.fail();
        }
        flushed?;
        newer.into_iter().try_for_each(|block| {
            let _stripe = self.stripe(block).write().unwrap_or_else(PoisonError::into_inner);
            self.punch(block)
        })
    }

    /// Makes the committed cut the volume's map, under a role that may be activated. Everything is flushed.
    fn take_committed(&self, state: OwnedMutexGuard<State>, role: Role) -> Result<(), VolumeError> {
        let reserved = {
            let mut map = relock(&self.map);
            let highest = map.map.highest_version();
            map.next_version = map.next_version.max(highest + 1);
            map.reserved = map.reserved.max(highest + RESERVE_VERSIONS);
            map.reserved
        };
        let appended = self.journal.append(&[Record::Reserve(reserved), Record::Role(role)]);
        if appended.is_err() {
            self.fail();
        }
        appended?;
        {
            let mut now = self.role.write().unwrap_or_else(PoisonError::into_inner);
            *now = role;
            self.role_seen.send_replace(role);
        }
        // The promotion holds; a file that is left goes at the next start.
        if let Err(error) = self.forget_stage(state) {
            tracing::warn!(volume = %self.params.volume, error = chain(&error), "a file is left");
        }
        Ok(())
    }
}
