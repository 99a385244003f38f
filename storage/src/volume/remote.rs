//! Blocks whose newest content is still at the host that the volume came from: asking for them, checking them, putting
//! them in place.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::time::Instant;

use super::{
    CutInfo, Inner, Volume, VolumeError, chain,
    io::{FIRST_PAUSE, LONGEST_PAUSE},
    journal::Record,
    map::{BlockState, Entry},
    relock,
};
use crate::{
    BLOCK_BYTES, is_zero,
    key::{ChunkKind, ChunkName},
    process::control::AlarmCode,
};

/// Blocks that the background fetch asks for at once: 1 MiB, the product of 200 Mbit/s and 40 ms.
const FETCHES_AT_ONCE: usize = 16;

/// Why a block or page of the map could not be had from the source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// There is no connection, and none can be made now.
    #[error("the source cannot be reached: {0}")]
    Unreachable(String),
    /// The source refused.
    #[error("the source refused: {0}")]
    Refused(String),
    /// The source's answer is not what was asked for.
    #[error("the source's answer is wrong: {0}")]
    Wrong(String),
}

/// A boxed future of a [`BlockSource`].
pub type FetchFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, FetchError>> + Send + 'a>>;

/// How urgent a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// The guest waits for it.
    Demand,
    /// Nobody waits.
    Background,
}

/// A block as the source gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The version of the content.
    pub version: u64,
    /// The content: a whole block; `None` for zeros.
    pub data: Option<Bytes>,
}

/// One entry of the source's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// The block.
    pub block: u32,
    /// Its version.
    pub version: u64,
    /// Its content's name; `None` for zeros.
    pub digest: Option<ChunkName>,
}

/// A page of the source's map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapPage {
    /// The highest version of the source when the page was made.
    pub version: u64,
    /// Entries in order of their blocks.
    pub entries: Vec<MapEntry>,
    /// Where to go on; `None` when this was the last page.
    pub next: Option<u32>,
}

/// The host that a volume came from. Implementations check that what arrives is well formed, not that it is right.
pub trait BlockSource: Send + Sync + fmt::Debug {
    /// The entries from block `from` on whose version is above `since`.
    fn map_page(&self, from: u32, since: u64) -> FetchFuture<'_, MapPage>;
    /// A block at `version` or newer.
    fn block(&self, block: u32, version: u64, priority: Priority) -> FetchFuture<'_, Fetched>;
    /// Tell the source that everything is durable here.
    fn released(&self) -> FetchFuture<'_, ()>;
    /// What the guest did with its blocks there, encoded ([`History`](crate::propagation::History)); none where that is not known.
    fn history(&self) -> FetchFuture<'_, Option<Bytes>> {
        Box::pin(std::future::ready(Ok(None)))
    }
    /// The newest cut when it is above `after`, which the follower has whole besides everything up to version `have`;
    /// `None` after some seconds without one, at once where `after` is the highest number there is: that only tells `have`.
    fn await_cut(&self, _after: u64, _have: u64) -> FetchFuture<'_, Option<CutInfo>> {
        no_cuts()
    }
    /// The entries of a cut's map from block `from` on whose version is above `since`.
    fn cut_page(&self, _number: u64, _from: u32, _since: u64) -> FetchFuture<'_, MapPage> {
        no_cuts()
    }
    /// A block as of a cut, where it has this version.
    fn cut_block(&self, _number: u64, _block: u32, _version: u64) -> FetchFuture<'_, Fetched> {
        no_cuts()
    }
}

fn no_cuts<'a, T: Send + 'a>() -> FetchFuture<'a, T> {
    Box::pin(std::future::ready(Err(FetchError::Refused("it makes no cuts".into()))))
}

/// A limit on bytes per second, shared by all who draw from it; may change at any time.
#[derive(Debug, Default)]
pub struct FetchLimit {
    state: Mutex<LimitState>,
}

#[derive(Debug, Default)]
struct LimitState {
    bytes_per_s: Option<u64>,
    /// When what was drawn so far will have been paid for.
    paid_until: Option<Instant>,
}

impl FetchLimit {
    /// Sets the limit; none when `None`. A limit of 0 counts as 1 byte per second.
    pub fn set(&self, bytes_per_s: Option<u64>) {
        let mut state = relock(&self.state);
        *state = LimitState { bytes_per_s, paid_until: None };
    }

    /// Waits until `bytes` more may be transferred.
    pub async fn draw(&self, bytes: u64) {
        let until = {
            let mut state = relock(&self.state);
            let Some(rate) = state.bytes_per_s else { return };
            let now = Instant::now();
            let from = state.paid_until.map_or(now, |paid| paid.max(now));
            // A rate of 1 byte/s would take a day per block: bounded, so that a later, higher limit is felt.
            let cost = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64).min(Duration::from_secs(60));
            state.paid_until = Some(from + cost);
            from
        };
        tokio::time::sleep_until(until).await;
    }
}

impl Volume {
    /// Pulls what is at the source, in order of blocks or, where the guest's habits are known, as they suggest, until nothing is missing and all of it is durable; then tells
    /// the source. What cannot be had is tried again, with the alarm up, for ever: drop the future to pause.
    pub async fn fetch_all(&self, limit: &FetchLimit) -> Result<(), VolumeError> {
        let inner = &self.inner;
        loop {
            let remote: Vec<u32> = {
                let state = relock(&inner.map);
                state.map.entries().filter(|(_, e)| e.state == BlockState::Remote).map(|(block, _)| block).collect()
            };
            if remote.is_empty() {
                self.flush().await?;
                if self.missing() == 0 {
                    break;
                }
                // Written or pulled between the look and the flush: once more.
                continue;
            }
            let remote = inner.habits.order_rest(remote);
            let mut pulls = futures::stream::iter(remote)
                .map(|block| async move {
                    limit.draw(BLOCK_BYTES as u64).await;
                    inner.pull(block, Priority::Background).await
                })
                .buffer_unordered(FETCHES_AT_ONCE);
            while let Some(result) = pulls.next().await {
                result?;
            }
        }
        let Some(source) = inner.source.borrow().clone() else { return Ok(()) };
        source.released().await?;
        Ok(())
    }
}

impl Inner {
    /// The newest content of a block that was at the source when it was looked at; it is local afterwards.
    pub(super) async fn pull_newest(self: &Arc<Self>, block: u32) -> Result<Bytes, VolumeError> {
        self.habits.note_wait(block);
        loop {
            if let Some(bytes) = self.pull(block, Priority::Demand).await? {
                return Ok(bytes);
            }
            // Somebody else pulled or wrote it meanwhile: it is here.
            let read = self.blocking(move |inner| {
                let _stripe = inner.stripe(block).read().unwrap_or_else(PoisonError::into_inner);
                match inner.entry(block).state {
                    BlockState::Zero => Ok(Some(vec![0; BLOCK_BYTES])),
                    BlockState::Local => inner.read_block(block).map(Some),
                    // Not possible without a change of role in between; then the next look tells.
                    BlockState::Base | BlockState::Remote => Ok(None),
                }
            });
            if let Some(bytes) = read.await? {
                return Ok(bytes.into());
            }
            tokio::time::sleep(FIRST_PAUSE).await;
        }
    }

    /// Pulls a block, waiting for as long as it cannot be had; `None` when it is not remote (any more).
    pub(super) async fn pull(self: &Arc<Self>, block: u32, priority: Priority) -> Result<Option<Bytes>, VolumeError> {
        let _claim = self.remote_flights.claim(block).await;
        let mut pause = FIRST_PAUSE;
        loop {
            let entry = self.entry(block);
            if entry.state != BlockState::Remote {
                return Ok(None);
            }
            match self.pull_once(block, entry, priority).await {
                Ok(bytes) => {
                    self.calm(AlarmCode::SourceUnreachable);
                    return Ok(Some(bytes));
                }
                Err(error @ (VolumeError::Source(_) | VolumeError::NoSource)) => {
                    self.raise(AlarmCode::SourceUnreachable, format!("block {block}: {}", chain(&error)));
                }
                Err(error) => return Err(error),
            }
            let mut source = self.source.subscribe();
            source.mark_unchanged();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // A new way to the source is tried at once.
                _ = source.changed() => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn pull_once(self: &Arc<Self>, block: u32, entry: Entry, priority: Priority) -> Result<Bytes, VolumeError> {
        let source = self.source.borrow().clone().ok_or(VolumeError::NoSource)?;
        let fetched = source.block(block, entry.version, priority).await?;
        let wrong = |what: String| VolumeError::Source(FetchError::Wrong(what));
        // The source is sealed: any other version than the map's is another history.
        if fetched.version != entry.version {
            return Err(wrong(format!("it has version {}, not {}", fetched.version, entry.version)));
        }
        let data = fetched.data.unwrap_or_else(|| Bytes::from_static(&ZEROS));
        self.blocking(move |inner| {
            if data.len() != BLOCK_BYTES || Some(inner.keys.name(ChunkKind::Data, &data)) != entry.digest {
                return Err(wrong("its content is not what the map says".into()));
            }
            inner.install(block, entry.version, entry.digest, &data)?;
            inner.count_pulled(data.len());
            Ok(data)
        })
        .await
    }

    pub(super) fn count_pulled(&self, len: usize) {
        let is_after = self.role_now().is_active();
        let counters = &self.counters;
        let counter = if is_after { &counters.pulled_after } else { &counters.pulled_before };
        counter.fetch_add(len as u64, Ordering::Relaxed);
    }

    /// Puts a pulled block in place unless it was overwritten meanwhile.
    fn install(&self, block: u32, version: u64, digest: Option<ChunkName>, data: &[u8]) -> Result<(), VolumeError> {
        let _stripe = self.stripe(block).write().unwrap_or_else(PoisonError::into_inner);
        let entry = self.entry(block);
        if entry.state != BlockState::Remote || entry.version != version {
            return Ok(());
        }
        let state = if is_zero(data) { BlockState::Zero } else { BlockState::Local };
        if state == BlockState::Local {
            self.write_block(block, data)?;
        } else {
            self.punch(block)?;
        }
        self.note(block, Entry { state, version, digest })
    }

    pub(super) fn write_block(&self, block: u32, data: &[u8]) -> Result<(), VolumeError> {
        self.data
            .write_at(data, Self::offset(block))
            .map_err(|source| VolumeError::Disk { what: "write the data file", source })
    }

    pub(super) fn read_block(&self, block: u32) -> Result<Vec<u8>, VolumeError> {
        let mut data = vec![0; BLOCK_BYTES];
        self.data
            .read_at(&mut data, Self::offset(block))
            .map_err(|source| VolumeError::Disk { what: "read the data file", source })?;
        Ok(data)
    }

    /// Sets a block's entry without giving it a new version; needs the block's stripe.
    pub(super) fn note(&self, block: u32, entry: Entry) -> Result<(), VolumeError> {
        let mut guard = relock(&self.map);
        let map = &mut *guard;
        map.hot
            .append(Record::Block(block, entry))
            .map_err(|source| VolumeError::Disk { what: "write the hot log", source })?;
        map.map.set(block, entry);
        map.pending.insert(block);
        let len = map.hot.len();
        drop(guard);
        self.completed.fetch_add(1, Ordering::AcqRel);
        self.hint_flush(len);
        Ok(())
    }
}

static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
