//! Cuts at the source of a mirror: the newest cut's map and changed blocks, for the standby that follows.
//!
//! A cut keeps what changed since the version that the follower said it has (its last committed cut), and only until the
//! follower has taken it, the next cut comes or the mirror ends: a follower that stays away costs one snapshot.
//!
//! Without a follower a cut is the disk's part of a checkpoint: all of its content, for a point of the history ([`CutOf`]).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::watch;

use super::{
    Inner, PeerBlock, Volume, VolumeError,
    map::BlockState,
    relock,
    remote::{MapEntry, MapPage},
    role::{Role, RoleError},
    snapshot::{Purpose, SnapshotId},
};
use crate::key::MapRoot;

/// Entries per page at most. Their digests are known when the cut is told of.
const PAGE_ENTRIES: usize = 8192;
/// How long a follower's question for the next cut stays open.
const AWAIT_BUDGET: Duration = Duration::from_secs(5);
/// A mirror whose follower asked within this is kept: it asks for the pages of a cut, and for the next one as soon as it has this one or
/// was told that there is none yet.
const FOLLOWED: Duration = Duration::from_secs(10);

/// What a follower is told of a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutInfo {
    /// Its number, from 1 on.
    pub number: u64,
    /// The highest version that was given out before it.
    pub version: u64,
    /// The blocks above this version are kept.
    pub since: u64,
    /// The root of the map as of the cut.
    pub root: MapRoot,
}

/// The newest cut, as long as it is kept.
#[derive(Debug, Clone, Copy)]
struct Current {
    number: u64,
    version: u64,
    since: u64,
    snapshot: SnapshotId,
    /// Of the volume at its instant.
    role: Role,
    /// Its instant.
    at: Instant,
    /// When it was computed.
    root: Option<MapRoot>,
}

/// A cut that a point of the history is to be of. Numbers of cuts begin anew with each series: only both together mean one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutOf {
    /// As who began the series named it; never 0.
    pub series: u64,
    /// The cut's number in it.
    pub number: u64,
}

/// A cut that is a point's from now on.
#[derive(Debug)]
pub(super) struct TakenCut {
    pub snapshot: SnapshotId,
    pub version: u64,
    pub at: Instant,
}

/// The cuts of a volume.
#[derive(Debug)]
pub(super) struct Cuts {
    /// The number of the newest one, also when it is not kept any more; 0 when none.
    newest: watch::Sender<u64>,
    /// Held only for a look.
    state: Mutex<State>,
    /// Held while a cut is made or ended.
    making: Mutex<()>,
    /// Held by who computes digests for a cut.
    digesting: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    current: Option<Current>,
    /// The version that the follower has everything up to.
    have: u64,
    /// Which series of numbers it is; 0: a mirror's.
    series: u64,
    /// When a mirror's follower asked last.
    followed_at: Option<Instant>,
}

impl Default for Cuts {
    fn default() -> Self {
        let newest = watch::Sender::new(0);
        Self { newest, state: Mutex::default(), making: Mutex::default(), digesting: tokio::sync::Mutex::default() }
    }
}

impl Volume {
    /// Makes cut `number`: what was acknowledged is in it, what begins later is not.
    ///
    /// # Errors
    /// When the number is not above the newest, the volume is not active, or blocks are still at another host.
    pub async fn cut(&self, number: u64) -> Result<(), VolumeError> {
        if self.missing() > 0 {
            // All may be here, and only not durable yet.
            self.flush().await?;
        }
        self.inner.blocking(move |inner| inner.cut(number)).await
    }

    /// Drops what is kept of the last cut; the next one may have any number.
    pub async fn end_cuts(&self) -> Result<(), VolumeError> {
        self.begin_cuts(0).await
    }

    /// Likewise; the cuts that follow are of this series, each whole by itself, until another one is begun. Nothing to do when that is
    /// under way already.
    pub async fn begin_cuts(&self, series: u64) -> Result<(), VolumeError> {
        self.change_cuts(series, move |now| series == 0 || now != series).await
    }

    /// Drops what is kept of the last cut, if it is of this series.
    pub async fn end_cuts_of(&self, series: u64) -> Result<(), VolumeError> {
        self.change_cuts(0, move |now| now == series).await
    }

    async fn change_cuts(&self, series: u64, is_to: impl Fn(u64) -> bool + Send + 'static) -> Result<(), VolumeError> {
        let ended = self.inner.blocking(move |inner| {
            let one = relock(&inner.cuts.making);
            {
                let now = relock(&inner.cuts.state);
                if !is_to(now.series) {
                    return Ok(());
                }
                // Its cut may be on its way to the standby, and none is made after one that did not arrive.
                if series != 0 && now.followed_at.is_some_and(|at| at.elapsed() < FOLLOWED) {
                    return Err(VolumeError::Cut { number: 0, why: "would be in the way of a mirror that is kept" });
                }
            }
            *relock(&inner.cuts.state) = State { series, ..State::default() };
            let ended = inner.end_snapshot(Purpose::Cut);
            inner.cuts.newest.send_replace(0);
            drop(one);
            drop(ended);
            Ok(())
        });
        ended.await
    }

    /// For the follower, which has all of cut `after` and everything up to version `have`: the newest cut, when it is another one.
    /// Waits some seconds for it, then gives `None`; at once where `after` is the highest number there is.
    pub async fn await_cut(&self, after: u64, have: u64) -> Result<Option<CutInfo>, VolumeError> {
        self.check_serving()?;
        let inner = &self.inner;
        let taken = inner.blocking(move |inner| {
            let one = relock(&inner.cuts.making);
            let is_taken = {
                let mut state = relock(&inner.cuts.state);
                state.have = have;
                state.followed_at = (state.series == 0).then(Instant::now);
                state.current.take_if(|current| current.number == after).is_some()
            };
            let taken = is_taken.then(|| inner.end_snapshot(Purpose::Cut));
            // Before what it took is given back: the next cut may wait, and with it a guest that stands still.
            drop(one);
            drop(taken);
            Ok(())
        });
        taken.await?;
        if after == u64::MAX {
            return Ok(None);
        }
        let deadline = tokio::time::Instant::now() + AWAIT_BUDGET;
        let mut newest = inner.cuts.newest.subscribe();
        let mut tried = after;
        loop {
            tried = match tokio::time::timeout_at(deadline, newest.wait_for(|newest| *newest > tried)).await {
                Ok(Ok(number)) => *number,
                // In time there was none; the sender lives as long as the volume.
                Ok(Err(_)) | Err(_) => return Ok(None),
            };
            // None when it was given up meanwhile, or ended.
            let current = relock(&inner.cuts.state).current.filter(|current| current.number > after);
            let Some(current) = current else { continue };
            match self.cut_root(current).await {
                Ok(root) => {
                    let Current { number, version, since, .. } = current;
                    return Ok(Some(CutInfo { number, version, since, root }));
                }
                // Replaced or given up meanwhile: the next one is looked at.
                Err(VolumeError::Map { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The root of a cut's map; computes the digests that it lacks, on all cores.
    async fn cut_root(&self, current: Current) -> Result<MapRoot, VolumeError> {
        let inner = &self.inner;
        let _one = inner.cuts.digesting.lock().await;
        let known = relock(&inner.cuts.state).current.filter(|now| now.number == current.number);
        if let Some(root) = known.and_then(|current| current.root) {
            return Ok(root);
        }
        let id = current.snapshot;
        let bare = inner.blocking(move |inner| Ok(inner.snapshot_map(id)?.without_digest().collect::<Arc<[u32]>>()));
        let bare = bare.await?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        let share = bare.len().div_ceil(workers).max(1);
        let work = (0..bare.len().div_ceil(share)).map(|worker| {
            let bare = bare.clone();
            inner.blocking(move |inner| {
                let mut share = bare.iter().skip(worker * share).take(share);
                share.try_for_each(|&block| inner.digested_snapshot(id, block, false).map(drop))
            })
        });
        futures::future::try_join_all(work).await?;
        let root = inner.blocking(move |inner| {
            let root = inner.snapshot_map(id)?.root(inner.params.size_bytes, inner.params.base);
            let root = root.ok_or_else(|| VolumeError::Map { what: "a digest is lacking".into() })?;
            let mut state = relock(&inner.cuts.state);
            if let Some(now) = state.current.as_mut().filter(|now| now.snapshot == id) {
                now.root = Some(root);
            }
            Ok(root)
        });
        root.await
    }

    fn kept_cut(&self, number: u64) -> Result<Current, VolumeError> {
        self.check_serving()?;
        let mut state = relock(&self.inner.cuts.state);
        if state.series == 0 {
            state.followed_at = Some(Instant::now());
        }
        let current = state.current.filter(|current| current.number == number);
        current.ok_or(VolumeError::Cut { number, why: "is not kept (any more)" })
    }

    /// The entries of a cut's map from block `from` on whose version is above `since`.
    pub async fn cut_page(&self, number: u64, from: u32, since: u64) -> Result<MapPage, VolumeError> {
        let cut = self.kept_cut(number)?;
        if since < cut.since {
            return Err(VolumeError::Cut { number, why: "does not keep what changed before the version asked for" });
        }
        let page = self.inner.blocking(move |inner| {
            let map = inner.snapshot_map(cut.snapshot)?;
            let mut rest = map.entries_above(from, since);
            let mut entries = Vec::new();
            for (block, entry) in rest.by_ref().take(PAGE_ENTRIES) {
                if entry.state == BlockState::Local && entry.digest.is_none() {
                    // Asked for before the cut was told of.
                    return Err(VolumeError::Cut { number, why: "was not asked for yet" });
                }
                let digest = if entry.state == BlockState::Zero { None } else { entry.digest };
                entries.push(MapEntry { block, version: entry.version, digest });
            }
            let next = rest.next().map(|(block, _)| block);
            Ok(MapPage { version: cut.version, entries, next })
        });
        page.await
    }

    /// A block as of a cut.
    pub async fn cut_block(&self, number: u64, block: u32) -> Result<PeerBlock, VolumeError> {
        let cut = self.kept_cut(number)?;
        let read = self.inner.blocking(move |inner| inner.digested_snapshot(cut.snapshot, block, true));
        let (entry, data) = read.await?;
        let digest = entry.digest;
        match entry.state {
            BlockState::Local => Ok(PeerBlock { version: entry.version, digest, data: data.map(Bytes::from) }),
            BlockState::Zero => Ok(PeerBlock { version: entry.version, digest: None, data: None }),
            BlockState::Base | BlockState::Remote => {
                Err(VolumeError::Map { what: format!("block {block} was asked for, which is not in the cut") })
            }
        }
    }
}

impl Inner {
    fn cut(&self, number: u64) -> Result<(), VolumeError> {
        let _one = relock(&self.cuts.making);
        if number <= *self.cuts.newest.borrow() {
            return Err(VolumeError::Cut { number, why: "is not above the newest" });
        }
        let since = {
            let mut state = relock(&self.cuts.state);
            state.current = None;
            state.have
        };
        let mut instant = None;
        let judge = |role: Role| {
            // No operation of the guest is half done now.
            instant = Some((role, Instant::now()));
            if !role.is_active() {
                return Err(RoleError::Role { role, action: "be cut" }.into());
            }
            if relock(&self.map).remote_on_disk.is_empty() {
                Ok(())
            } else {
                Err(VolumeError::Cut { number, why: "cannot be made: blocks are still at another host" })
            }
        };
        let begun = self.begin_snapshot(Purpose::Cut, since, judge)?;
        let (version, snapshot) = (begun.version, begun.id);
        let (role, at) = instant.ok_or(VolumeError::Cut { number, why: "has no instant" })?;
        relock(&self.cuts.state).current = Some(Current { number, version, since, snapshot, role, at, root: None });
        self.cuts.newest.send_replace(number);
        Ok(())
    }

    /// Makes of a cut a point's snapshot: whatever becomes of the cuts, it stays until the point has it.
    pub(super) fn take_cut(&self, of: CutOf) -> Result<TakenCut, VolumeError> {
        let CutOf { series, number } = of;
        let one = relock(&self.cuts.making);
        let refused = |why| VolumeError::Cut { number, why };
        let current = {
            let mut state = relock(&self.cuts.state);
            if state.series != series || series == 0 {
                return Err(refused("is of a series that is over"));
            }
            // What a follower may have taken a part of is no whole content.
            let is_it = |current: &mut Current| current.number == number && current.since == 0;
            state.current.take_if(is_it).ok_or_else(|| refused("is not kept (any more)"))?
        };
        let before = self.keep_for_publish(current.snapshot);
        drop(one);
        drop(before?);
        let role = *self.role.read().unwrap_or_else(PoisonError::into_inner);
        if role != current.role {
            return Err(refused("was made before the volume changed hands"));
        }
        Ok(TakenCut { snapshot: current.snapshot, version: current.version, at: current.at })
    }
}
