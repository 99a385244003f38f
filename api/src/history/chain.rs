//! The chain of a history's points.

use supercloud_ids::VolumeId;

use super::NO_HASH;
use crate::{PointMemory, VolumeHistory, VolumePoint};

/// What a check of a history found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verified {
    /// Points that are kept, all of whose hashes hold.
    pub points: u64,
    /// Points that were thinned out.
    pub thinned: u64,
}

/// Where a history is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainFault {
    /// A point's hash does not cover what it says, or the point before it is another one.
    #[error("point {number} is not what was written, or not after what was written before it: its hash does not hold")]
    Hash {
        /// The point.
        number: u64,
    },
    /// A number is neither kept nor said to be thinned out, or both.
    #[error("point {number} is missing, and is not said to be thinned out")]
    Missing {
        /// The number.
        number: u64,
    },
    /// A number is there twice, or out of its order.
    #[error("point {number} is out of its place")]
    Order {
        /// The number.
        number: u64,
    },
    /// An instant is not after the one before it.
    #[error("point {number} is not later than the point before it")]
    Instant {
        /// The number.
        number: u64,
    },
    /// The hash of the newest point is another one.
    #[error("the newest point is not the last that was written: the history ends elsewhere")]
    Head,
}

/// The hash of a point after `previous` (hex): BLAKE3, in a context of its own, over the hash before and all fields, each of a
/// fixed length.
#[must_use]
pub fn expected_hash(volume: VolumeId, previous: &str, point: &VolumePoint) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("supercloud volume history v1: point");
    // Text of any length is hashed first, so that no two lists of fields make one input.
    hasher.update(blake3::hash(previous.as_bytes()).as_bytes());
    hasher.update(volume.uuid().as_bytes());
    for number in [point.number, point.at_ms, u64::from(point.tick), point.epoch.0, point.version, point.stored_bytes] {
        hasher.update(&number.to_le_bytes());
    }
    hasher.update(blake3::hash(point.root.as_bytes()).as_bytes());
    hasher.update(point.cloud.uuid().as_bytes());
    if let Some(PointMemory { root, bytes, format, is_kept: _ }) = &point.memory {
        // A point without is as long as it was before there were any with. That it is not kept any more is no other point.
        hasher.update(blake3::hash(root.as_bytes()).as_bytes());
        hasher.update(&bytes.to_le_bytes());
        hasher.update(blake3::hash(format.as_bytes()).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Checks a history from its first point to its newest: numbers, instants, hashes.
///
/// # Errors
/// The first fault.
pub fn verify(history: &VolumeHistory) -> Result<Verified, ChainFault> {
    let (mut points, mut rows) = (history.points.iter().peekable(), history.thinned.iter().peekable());
    let mut hash = NO_HASH;
    let (mut number, mut thinned) = (1, 0);
    let mut last: Option<(u64, u32)> = None;
    loop {
        let (point, row) = (points.peek().map(|point| point.number), rows.peek().map(|row| row.from));
        if point == row && point.is_some() {
            return Err(ChainFault::Order { number });
        }
        if point == Some(number) {
            let Some(point) = points.next() else { break };
            if last.is_some_and(|last| last >= (point.at_ms, point.tick)) {
                return Err(ChainFault::Instant { number });
            }
            last = Some((point.at_ms, point.tick));
            if point.hash != expected_hash(history.volume, hash, point) {
                return Err(ChainFault::Hash { number });
            }
            hash = &point.hash;
            number += 1;
        } else if row == Some(number) {
            let Some(row) = rows.next() else { break };
            if row.to < row.from || row.to == u64::MAX {
                return Err(ChainFault::Order { number });
            }
            thinned += row.to - row.from + 1;
            hash = &row.hash;
            number = row.to + 1;
        } else {
            match point.into_iter().chain(row).min() {
                None => break,
                Some(found) if found < number => return Err(ChainFault::Order { number: found }),
                Some(_) => return Err(ChainFault::Missing { number }),
            }
        }
    }
    if number < history.next {
        return Err(ChainFault::Missing { number });
    }
    if number > history.next || hash != history.head {
        return Err(ChainFault::Head);
    }
    Ok(Verified { points: history.points.len() as u64, thinned })
}
