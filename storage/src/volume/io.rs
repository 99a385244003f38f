//! The guest's operations: read, write, discard, write zeroes.
//!
//! An operation is cut into pieces of one block each. What is local is done at once on a thread that may block; a piece
//! that needs bytes from elsewhere (the rest of a base block, a block that is still at the source) is put aside, the
//! bytes are fetched without any lock held, and the piece is tried again: meanwhile the block may have changed.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;

use super::{
    BLOCKS_PER_WORK, Inner, Volume, VolumeError, chain,
    journal::Record,
    map::{BlockState, Entry},
    relock,
    role::Role,
};
use crate::{
    BLOCK_BYTES,
    key::{ChunkKind, ChunkName},
    process::control::AlarmCode,
    propagation::trace::Touch,
};

/// Blocks fetched at once for one operation.
const FETCHES_AT_ONCE: usize = 16;
/// The pauses between two tries to get what cannot be had.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What a piece lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Base(ChunkName),
    Remote,
}

/// A part of one block.
#[derive(Debug, Clone)]
struct Piece {
    block: u32,
    /// The bytes of the block.
    within: Range<usize>,
    /// Where they start in the operation's buffer.
    at: usize,
}

/// What is done to a piece.
#[derive(Debug, Clone)]
enum Change {
    /// The operation's bytes.
    Write(Bytes),
    /// Zeros, surely.
    Zero,
    /// Zeros where that is cheap; a part of a block stays as it is.
    Discard,
}

/// How an attempt at local work ended.
enum Attempt {
    /// The volume is not active; wait for it.
    NotActive,
    /// The versions that were reserved are nearly used up; flush first.
    NeedsFlush,
    /// Done but for these.
    Done(Vec<(Piece, Need)>),
}

impl Volume {
    fn pieces(&self, offset: u64, len: u64) -> Result<Vec<Piece>, VolumeError> {
        let size_bytes = self.size_bytes();
        let range = VolumeError::Range { offset, len, size_bytes };
        let end = offset.checked_add(len).filter(|end| *end <= size_bytes).ok_or(range)?;
        let mut pieces = Vec::new();
        let mut at = offset;
        while at < end {
            let block = u32::try_from(at / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
            let start = (at % BLOCK_BYTES as u64) as usize;
            let stop = usize::try_from(end - at).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES - start) + start;
            pieces.push(Piece { block, within: start..stop, at: usize::try_from(at - offset).unwrap_or(usize::MAX) });
            at += (stop - start) as u64;
        }
        Ok(pieces)
    }

    /// Reads. Waits while the volume is not active, and while newest bytes cannot be had from where they are: drop the
    /// future to give up.
    pub async fn read(&self, offset: u64, len: usize) -> Result<Bytes, VolumeError> {
        let pieces: Arc<[Piece]> = self.pieces(offset, len as u64)?.into();
        let inner = &self.inner;
        inner.habits.note(pieces.iter().map(|piece| (piece.block, Touch::Read)));
        let mut buffer = loop {
            self.wait_active().await;
            let pieces = pieces.clone();
            let work = inner.blocking(move |inner| {
                let mut buffer = BytesMut::zeroed(len);
                Ok(inner.read_pieces(&pieces, &mut buffer)?.map(|needs| (buffer, needs)))
            });
            if let Some(read) = work.await? {
                break read;
            }
        };
        // A block that was elsewhere when the read began may be given as it was then.
        let mut fetched = futures::stream::iter(buffer.1)
            .map(|(piece, need)| async move {
                let bytes = match need {
                    Need::Base(name) => inner.base_block(piece.block, name).await,
                    Need::Remote => inner.pull_newest(piece.block).await,
                };
                bytes.map(|bytes| (piece, bytes))
            })
            .buffer_unordered(FETCHES_AT_ONCE);
        while let Some(result) = fetched.next().await {
            let (piece, bytes) = result?;
            let len = piece.within.len();
            buffer.0[piece.at..piece.at + len].copy_from_slice(&bytes[piece.within]);
        }
        inner.counters.read.fetch_add(len as u64, Ordering::Relaxed);
        Ok(buffer.0.freeze())
    }

    /// Writes; with `is_fua` it is durable when it returns. Waits as [`Volume::read`] does.
    pub async fn write(&self, offset: u64, data: Bytes, is_fua: bool) -> Result<(), VolumeError> {
        let len = data.len() as u64;
        self.change(offset, len, Change::Write(data), is_fua).await?;
        self.inner.counters.written.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }

    /// Makes a range read as zeros and gives its space back.
    pub async fn write_zeroes(&self, offset: u64, len: u64, is_fua: bool) -> Result<(), VolumeError> {
        self.change(offset, len, Change::Zero, is_fua).await
    }

    /// Tells that a range's content is not needed: whole blocks of it read as zeros from here on.
    pub async fn discard(&self, offset: u64, len: u64, is_fua: bool) -> Result<(), VolumeError> {
        self.change(offset, len, Change::Discard, is_fua).await
    }

    async fn change(&self, offset: u64, len: u64, change: Change, is_fua: bool) -> Result<(), VolumeError> {
        let mut pieces = self.pieces(offset, len)?;
        let touch = |piece: &Piece| {
            let is_whole = piece.within.len() >= self.inner.block_len(piece.block);
            (piece.block, if is_whole { Touch::Fill } else { Touch::Write })
        };
        self.inner.habits.note(pieces.iter().map(touch));
        pieces.reverse();
        while !pieces.is_empty() {
            // From the end of a reversed list: in order, without moving the rest.
            let part = pieces.split_off(pieces.len().saturating_sub(BLOCKS_PER_WORK));
            self.change_part(part, &change).await?;
        }
        if is_fua { self.flush().await } else { Ok(()) }
    }

    async fn change_part(&self, mut pieces: Vec<Piece>, change: &Change) -> Result<(), VolumeError> {
        let inner = &self.inner;
        let mut fills: HashMap<u32, Bytes> = HashMap::new();
        loop {
            self.wait_active().await;
            let (todo, given, what) = (pieces.clone(), std::mem::take(&mut fills), change.clone());
            let attempt = inner.blocking(move |inner| inner.change_pieces(&todo, &what, &given)).await?;
            let needs = match attempt {
                Attempt::NotActive => continue,
                Attempt::NeedsFlush => {
                    self.flush().await?;
                    continue;
                }
                Attempt::Done(needs) if needs.is_empty() => return Ok(()),
                Attempt::Done(needs) => needs,
            };
            let mut fetched = futures::stream::iter(needs.clone())
                .map(|(piece, need)| async move {
                    match need {
                        Need::Base(name) => Ok(Some((piece.block, inner.base_block(piece.block, name).await?))),
                        // Pulled into its place: the next attempt finds it local.
                        Need::Remote => inner.pull_newest(piece.block).await.map(|_| None),
                    }
                })
                .buffer_unordered(FETCHES_AT_ONCE);
            while let Some(result) = fetched.next().await {
                fills.extend(result?);
            }
            pieces = needs.into_iter().map(|(piece, _): (Piece, Need)| piece).collect();
        }
    }

    /// Waits until the volume is active.
    async fn wait_active(&self) {
        let mut role = self.watch_role();
        // The sender lives as long as the volume, which `self` holds.
        let _ = role.wait_for(|role| role.is_active()).await;
    }
}

impl Inner {
    /// `None` when the volume is not active.
    fn read_pieces(&self, pieces: &[Piece], buffer: &mut [u8]) -> Result<Option<Vec<(Piece, Need)>>, VolumeError> {
        let role = self.role.read().unwrap_or_else(PoisonError::into_inner);
        if !role.is_active() {
            return Ok(None);
        }
        let mut needs = Vec::new();
        for piece in pieces {
            let out = &mut buffer[piece.at..piece.at + piece.within.len()];
            let _stripe = self.stripe(piece.block).read().unwrap_or_else(PoisonError::into_inner);
            match self.entry(piece.block).state {
                BlockState::Zero => {}
                BlockState::Local => self.read_data(out, piece)?,
                BlockState::Remote => needs.push((piece.clone(), Need::Remote)),
                BlockState::Base => match self.base_name(piece.block) {
                    None => {}
                    Some(name) => match self.cache.get(&name) {
                        Some(bytes) => out.copy_from_slice(&bytes[piece.within.clone()]),
                        None => needs.push((piece.clone(), Need::Base(name))),
                    },
                },
            }
        }
        Ok(Some(needs))
    }

    fn read_data(&self, out: &mut [u8], piece: &Piece) -> Result<(), VolumeError> {
        let offset = Self::offset(piece.block) + piece.within.start as u64;
        self.data.read_at(out, offset).map_err(|source| VolumeError::Disk { what: "read the data file", source })
    }

    pub(super) fn base_name(&self, block: u32) -> Option<ChunkName> {
        self.base.as_ref()?.get(block)
    }

    fn change_pieces(
        &self,
        pieces: &[Piece],
        change: &Change,
        fills: &HashMap<u32, Bytes>,
    ) -> Result<Attempt, VolumeError> {
        let role = self.role.read().unwrap_or_else(PoisonError::into_inner);
        if !role.is_active() {
            return Ok(Attempt::NotActive);
        }
        if self.has_failed.load(Ordering::Acquire) {
            return Err(VolumeError::Failed);
        }
        {
            let state = relock(&self.map);
            if state.reserved - state.next_version <= pieces.len() as u64 {
                return Ok(Attempt::NeedsFlush);
            }
        }
        let mut needs = Vec::new();
        let mut done = 0;
        for piece in pieces {
            let _stripe = self.stripe(piece.block).write().unwrap_or_else(PoisonError::into_inner);
            let is_whole = piece.within.start == 0 && piece.within.end >= self.block_len(piece.block);
            let need = match change {
                Change::Write(bytes) => {
                    let bytes = &bytes[piece.at..piece.at + piece.within.len()];
                    self.write_piece(piece, bytes, is_whole, fills.get(&piece.block))?
                }
                Change::Zero | Change::Discard if is_whole => self.zero_block(piece.block)?,
                Change::Zero => self.zero_piece(piece, fills.get(&piece.block))?,
                Change::Discard => self.discard_piece(piece)?,
            };
            match need {
                None => done += piece.within.len() as u64,
                Some(need) => needs.push((piece.clone(), need)),
            }
        }
        self.completed.fetch_add(1, Ordering::AcqRel);
        self.counters.dirty.fetch_add(done, Ordering::Relaxed);
        self.hint_flush(relock(&self.map).hot.len());
        Ok(Attempt::Done(needs))
    }

    /// Gives the block its next version; needs the block's stripe.
    fn commit(&self, block: u32, state: BlockState) -> Result<(), VolumeError> {
        let mut guard = relock(&self.map);
        let map = &mut *guard;
        let entry = Entry { state, version: map.next_version, digest: None };
        map.hot
            .append(Record::Block(block, entry))
            .map_err(|source| VolumeError::Disk { what: "write the hot log", source })?;
        map.next_version += 1;
        map.map.set(block, entry);
        map.pending.insert(block);
        Ok(())
    }

    fn write_piece(
        &self,
        piece: &Piece,
        bytes: &[u8],
        is_whole: bool,
        fill: Option<&Bytes>,
    ) -> Result<Option<Need>, VolumeError> {
        let offset = Self::offset(piece.block) + piece.within.start as u64;
        match self.entry(piece.block).state {
            BlockState::Local => {
                self.save_for_snapshots(piece.block);
                // The version first: content of a version that somebody copied must not change under it.
                self.commit(piece.block, BlockState::Local)?;
                self.data
                    .write_at(bytes, offset)
                    .map_err(|source| VolumeError::Disk { what: "write the data file", source })?;
                Ok(None)
            }
            // The region is a hole: what is not written reads as zeros.
            BlockState::Zero => self.write_first(piece.block, bytes, offset).map(|()| None),
            BlockState::Base | BlockState::Remote if is_whole => {
                self.write_first(piece.block, bytes, offset).map(|()| None)
            }
            BlockState::Remote => Ok(Some(Need::Remote)),
            BlockState::Base => match (self.base_name(piece.block), fill) {
                (None, _) => self.write_first(piece.block, bytes, offset).map(|()| None),
                (Some(name), None) => match self.cache.get(&name) {
                    Some(fill) => self.write_filled(piece, bytes, &fill).map(|()| None),
                    None => Ok(Some(Need::Base(name))),
                },
                (Some(_), Some(fill)) => self.write_filled(piece, bytes, fill).map(|()| None),
            },
        }
    }

    fn write_filled(&self, piece: &Piece, bytes: &[u8], fill: &[u8]) -> Result<(), VolumeError> {
        let mut whole = fill.to_vec();
        whole.resize(BLOCK_BYTES, 0);
        whole[piece.within.clone()].copy_from_slice(bytes);
        self.write_first(piece.block, &whole, Self::offset(piece.block))
    }

    /// Writes into a region that is a hole and makes the block local.
    fn write_first(&self, block: u32, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
        let written = self
            .data
            .write_at(bytes, offset)
            .map_err(|source| VolumeError::Disk { what: "write the data file", source })
            .and_then(|()| self.commit(block, BlockState::Local));
        if written.is_err() {
            // A part may lie there now (the disk is full): what is not local must be a hole.
            self.punch(block)?;
        }
        written
    }

    pub(super) fn punch(&self, block: u32) -> Result<(), VolumeError> {
        let punched = self.data.punch(Self::offset(block)..Self::offset(block) + BLOCK_BYTES as u64);
        punched.map_err(|source| {
            self.fail();
            VolumeError::Disk { what: "give back a block of the data file", source }
        })
    }

    fn zero_block(&self, block: u32) -> Result<Option<Need>, VolumeError> {
        match self.entry(block).state {
            BlockState::Zero => {}
            BlockState::Base if self.base_name(block).is_none() => {}
            BlockState::Base => self.commit(block, BlockState::Zero)?,
            // Where a block is remote, an older copy may lie that was pulled ahead.
            BlockState::Remote | BlockState::Local => {
                self.save_for_snapshots(block);
                self.commit(block, BlockState::Zero)?;
                self.punch(block)?;
            }
        }
        Ok(None)
    }

    fn zero_piece(&self, piece: &Piece, fill: Option<&Bytes>) -> Result<Option<Need>, VolumeError> {
        match self.entry(piece.block).state {
            BlockState::Zero => Ok(None),
            BlockState::Base if self.base_name(piece.block).is_none() => Ok(None),
            _ => self.write_piece(piece, &vec![0; piece.within.len()], false, fill),
        }
    }

    /// A part of a block: its space is given back where it is local, else it stays as it is.
    fn discard_piece(&self, piece: &Piece) -> Result<Option<Need>, VolumeError> {
        if self.entry(piece.block).state == BlockState::Local {
            self.save_for_snapshots(piece.block);
            self.commit(piece.block, BlockState::Local)?;
            let start = Self::offset(piece.block) + piece.within.start as u64;
            self.data
                .punch(start..start + piece.within.len() as u64)
                .map_err(|source| VolumeError::Disk { what: "give back a part of the data file", source })?;
        }
        Ok(None)
    }

    /// A block of the base, from the cache or wherever its chunk is. Waits for as long as it cannot be had.
    pub(super) async fn base_block(&self, block: u32, name: ChunkName) -> Result<Bytes, VolumeError> {
        let mut pause = FIRST_PAUSE;
        loop {
            {
                let _claim = self.base_flights.claim(name).await;
                if let Some(bytes) = self.cache.get(&name) {
                    return Ok(bytes);
                }
                match self.params.reader.read(ChunkKind::Data, name).await {
                    Ok(bytes) => {
                        let bytes = whole_block(bytes);
                        self.cache.insert(name, bytes.clone());
                        self.calm(AlarmCode::BaseUnavailable);
                        return Ok(bytes);
                    }
                    Err(source) => {
                        let error = VolumeError::BaseBlock { block, source };
                        self.raise(AlarmCode::BaseUnavailable, chain(&error));
                    }
                }
            }
            // Never an error to the guest: its file system would give up, while the operator can bring the chunk back.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether the guest's operations are served now.
    pub(super) fn role_now(&self) -> Role {
        *self.role_seen.borrow()
    }
}

/// Fills up the last block of a base, which other writers of manifests may have stored short.
fn whole_block(bytes: Bytes) -> Bytes {
    if bytes.len() == BLOCK_BYTES {
        return bytes;
    }
    let mut whole = bytes.to_vec();
    whole.resize(BLOCK_BYTES, 0);
    whole.into()
}
