//! The rules of a volume's history, as pure functions of it and of a clock reading: who keeps it applies them in one transaction,
//! who has it before them can check it without trusting who kept it.
//!
//! - **Clock.** A point's instant is a hybrid one (Kulkarni et al., *Logical Physical Clocks*, 2014, section 3, for a single
//!   node): the wall clock's milliseconds, and a tick that rises where the wall clock did not. It never goes back.
//! - **Chain.** A point's hash covers its fields and the hash of the point before. Thinned points leave the hash of the last of
//!   each row, so the chain is checked from the first point to the newest however many are gone.
//! - **As of.** An instant means the newest point that is not younger.
//! - **Thinning.** See [`thin`].

mod chain;
mod thinning;

use std::cmp::Ordering;

use supercloud_ids::{CloudId, Epoch, ProjectId, VolumeId};

pub use self::{
    chain::{ChainFault, Verified, expected_hash, verify},
    thinning::{MEMORIES_AT_MOST, PolicyFault, check_policy, pause_at_most_ms, points_at_most, thin},
};
use crate::{HistoryPolicy, PointMemory, ThinnedPoints, VolumeAsOf, VolumeHistory, VolumePoint};

/// Points of one volume that can be kept at once: policies that may keep more are refused.
pub const POINTS_AT_MOST: u64 = 500;
/// What the first point is chained to.
pub const NO_HASH: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// What a point is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// When the volume was as it is in the point, or a little later, by the wall clock of who keeps the history.
    pub wall_ms: u64,
    /// The epoch of the guest that had written it.
    pub epoch: Epoch,
    /// The version of the block map.
    pub version: u64,
    /// The content: root of its manifest, 64 hexadecimal digits.
    pub root: String,
    /// The cloud in whose store it lies.
    pub cloud: CloudId,
    /// Bytes that had to be stored for it.
    pub stored_bytes: u64,
    /// The guest's memory at the same instant.
    pub memory: Option<PointMemory>,
}

/// Why an instant, or a number, means no point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AsOfRefusal {
    /// There is none yet.
    #[error("its history has no point yet")]
    Empty,
    /// The instant has not come.
    #[error("{asked_ms} ms lies in the future: it is {now_ms} ms now")]
    Ahead {
        /// The instant.
        asked_ms: u64,
        /// Now.
        now_ms: u64,
    },
    /// Every point that is kept is younger.
    #[error(
        "nothing of {asked_ms} ms is kept: the oldest point is {oldest}, of {oldest_ms} ms ({thinned} points were thinned out)"
    )]
    Before {
        /// The instant.
        asked_ms: u64,
        /// The oldest point that is kept.
        oldest: u64,
        /// Its instant.
        oldest_ms: u64,
        /// Points that are gone.
        thinned: u64,
    },
    /// It was thinned out.
    #[error("point {number} was thinned out; kept are {kept} points, from {oldest} to {newest}")]
    Thinned {
        /// Its number.
        number: u64,
        /// Points that are kept.
        kept: u64,
        /// The oldest of them.
        oldest: u64,
        /// The newest of them.
        newest: u64,
    },
    /// No point has memory.
    #[error("it has no checkpoint: no point of its history has the guest's memory")]
    NoCheckpoint,
    /// The point has none.
    #[error("point {number} has no memory of the guest (any more): it is of the disk only")]
    NoMemory {
        /// Its number.
        number: u64,
    },
    /// There is none of this number.
    #[error("there is no point {number}; the newest is {newest}")]
    None {
        /// The number.
        number: u64,
        /// The newest.
        newest: u64,
    },
}

impl VolumePoint {
    /// Whether a guest can be thawed from it.
    #[must_use]
    pub fn is_checkpoint(&self) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.is_kept)
    }
}

impl VolumeHistory {
    /// A history without points, of a volume that stands on `base` now.
    #[must_use]
    pub fn begin(
        volume: VolumeId,
        project: ProjectId,
        policy: HistoryPolicy,
        base: Option<String>,
        now_ms: u64,
    ) -> Self {
        Self {
            volume,
            project,
            policy,
            points: Vec::new(),
            thinned: Vec::new(),
            next: 1,
            head: NO_HASH.to_owned(),
            seen_base: base,
            problem: None,
            created_at_ms: now_ms,
        }
    }

    /// Adds a point; gives it.
    pub fn append(&mut self, taken: Taken) -> &VolumePoint {
        let (at_ms, tick) = next_instant(self.points.last().map(|last| (last.at_ms, last.tick)), taken.wall_ms);
        let mut point = VolumePoint {
            number: self.next,
            at_ms,
            tick,
            epoch: taken.epoch,
            version: taken.version,
            root: taken.root,
            cloud: taken.cloud,
            stored_bytes: taken.stored_bytes,
            memory: taken.memory,
            hash: String::new(),
        };
        point.hash = expected_hash(self.volume, &self.head, &point);
        self.head.clone_from(&point.hash);
        self.next = self.next.saturating_add(1);
        self.points.push(point);
        &self.points[self.points.len() - 1]
    }

    /// The memory of older points is not kept any more; gives of how many that was.
    fn drop_memories(&mut self) -> usize {
        let kept = usize::try_from(self.policy.memory.unwrap_or(1)).unwrap_or(usize::MAX);
        let memories = self.points.iter_mut().rev().filter_map(|point| point.memory.as_mut());
        let old = memories.filter(|memory| memory.is_kept).skip(kept);
        old.map(|memory| memory.is_kept = false).count()
    }

    /// Thins the points by the policy; gives those that go. Checkpoints whose memory is kept stay.
    pub fn thin(&mut self, now_ms: u64) -> Vec<VolumePoint> {
        self.drop_memories();
        let instants: Vec<u64> = self.points.iter().map(|point| point.at_ms).collect();
        let keeps = thin(&instants, &self.policy.keep, now_ms, pause_at_most_ms(&self.policy));
        let mut gone = Vec::new();
        let mut kept = Vec::with_capacity(self.points.len());
        for (point, is_kept) in std::mem::take(&mut self.points).into_iter().zip(keeps) {
            if is_kept || point.is_checkpoint() {
                kept.push(point);
                continue;
            }
            self.thinned.push(ThinnedPoints { from: point.number, to: point.number, hash: point.hash.clone() });
            gone.push(point);
        }
        self.points = kept;
        if !gone.is_empty() {
            self.join_rows();
        }
        gone
    }

    /// Thins by the newest point's instant, so that a volume that nobody writes to loses nothing by growing old; gives how many
    /// points went.
    pub fn thin_by_newest(&mut self) -> usize {
        let newest_ms = self.points.last().map_or(0, |newest| newest.at_ms);
        self.thin(newest_ms).len()
    }

    /// Rows that meet become one.
    fn join_rows(&mut self) {
        self.thinned.sort_by_key(|row| row.from);
        let mut rows: Vec<ThinnedPoints> = Vec::with_capacity(self.thinned.len());
        for row in std::mem::take(&mut self.thinned) {
            match rows.last_mut() {
                Some(last) if last.to.saturating_add(1) == row.from => (last.to, last.hash) = (row.to, row.hash),
                _ => rows.push(row),
            }
        }
        self.thinned = rows;
    }

    /// The checkpoint of a number; the newest when none is said.
    ///
    /// # Errors
    /// When there is none, or its memory is not kept any more.
    pub fn checkpoint(&self, number: Option<u64>) -> Result<&VolumePoint, AsOfRefusal> {
        let Some(number) = number else {
            return self.points.iter().rev().find(|point| point.is_checkpoint()).ok_or(AsOfRefusal::NoCheckpoint);
        };
        match self.point(number)? {
            point if point.is_checkpoint() => Ok(point),
            _ => Err(AsOfRefusal::NoMemory { number }),
        }
    }

    /// How many points were thinned out.
    #[must_use]
    pub fn thinned_count(&self) -> u64 {
        let rows = self.thinned.iter().map(|row| row.to.saturating_sub(row.from).saturating_add(1));
        rows.fold(0, u64::saturating_add)
    }

    /// The newest point that is not younger than an instant.
    ///
    /// # Errors
    /// When there is none, or the instant has not come.
    pub fn as_of(&self, asked_ms: u64, now_ms: u64) -> Result<VolumeAsOf, AsOfRefusal> {
        let (Some(oldest), Some(newest)) = (self.points.first(), self.points.last()) else {
            return Err(AsOfRefusal::Empty);
        };
        if asked_ms > now_ms.max(newest.at_ms) {
            return Err(AsOfRefusal::Ahead { asked_ms, now_ms });
        }
        match self.points.iter().rev().find(|point| point.at_ms <= asked_ms) {
            Some(point) => {
                Ok(VolumeAsOf { asked_ms, point: point.clone(), older_ms: asked_ms.saturating_sub(point.at_ms) })
            }
            None => Err(AsOfRefusal::Before {
                asked_ms,
                oldest: oldest.number,
                oldest_ms: oldest.at_ms,
                thinned: self.thinned_count(),
            }),
        }
    }

    /// The point of a number.
    ///
    /// # Errors
    /// When there is none, or it was thinned out.
    pub fn point(&self, number: u64) -> Result<&VolumePoint, AsOfRefusal> {
        let (Some(oldest), Some(newest)) = (self.points.first(), self.points.last()) else {
            return Err(AsOfRefusal::Empty);
        };
        match self.points.iter().find(|point| point.number == number) {
            Some(point) => Ok(point),
            None if number == 0 || number >= self.next => {
                Err(AsOfRefusal::None { number, newest: self.next.saturating_sub(1) })
            }
            None => Err(AsOfRefusal::Thinned {
                number,
                kept: self.points.len() as u64,
                oldest: oldest.number,
                newest: newest.number,
            }),
        }
    }
}

/// The instant that follows another one, at a reading of the wall clock: never before it, whatever the clock says.
#[must_use]
pub fn next_instant(last: Option<(u64, u32)>, wall_ms: u64) -> (u64, u32) {
    let Some((last_ms, tick)) = last else { return (wall_ms, 0) };
    match (wall_ms.cmp(&last_ms), tick.checked_add(1)) {
        (Ordering::Greater, _) => (wall_ms, 0),
        (_, Some(tick)) => (last_ms, tick),
        // Four thousand million points within a millisecond.
        (_, None) => (last_ms.saturating_add(1), 0),
    }
}

#[cfg(test)]
mod tests;
