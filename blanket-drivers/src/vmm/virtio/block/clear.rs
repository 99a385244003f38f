//! Parts of a disk that a guest does not need any more, or wants zeros in (virtio 1.2, 5.2.6: discard, write zeroes).

use serde::{Deserialize, Serialize};

use super::{Empties, SECTOR_BYTES, STATUS_IO_ERROR, STATUS_UNSUPPORTED};
use crate::vmm::{Ram, virtio::Segments};

/// Most extents of a request.
pub const MAX_EXTENTS: u32 = 16;
/// Most sectors that one extent discards: 64 MiB. What a device has in hand when it is stopped, or a cut is taken, is waited for.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 17;
/// Most sectors that one extent makes zeros: 16 MiB, as they may have to be written, and what a device has in hand when it is
/// stopped is begun anew.
pub const MAX_ZERO_SECTORS: u32 = 1 << 15;
/// Discards are worth something in these units, and at multiples of them, in sectors: pages of the file that holds the disk.
const ALIGNMENT_SECTORS: u32 = 8;
/// An extent in guest memory: sector u64, sectors u32, flags u32.
const EXTENT_BYTES: usize = 16;
/// Of an extent's flags: its space may be given back. All others are reserved.
const FLAG_UNMAP: u32 = 1;

/// A part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Its first byte: a multiple of 512.
    pub offset: u64,
    /// Its length: a multiple of 512, not zero.
    pub bytes: u32,
    /// It shall take space afterwards as if it was written. Not of a discard.
    pub keeps_space: bool,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Whatever is cheap to be there.
    Discard,
    /// Zeros to be there.
    Zero,
}

impl Kind {
    const fn most_sectors(self) -> u32 {
        match self {
            Self::Discard => MAX_DISCARD_SECTORS,
            Self::Zero => MAX_ZERO_SECTORS,
        }
    }
}

/// Writes the limits into a disk's configuration (5.2.4), which is long enough.
pub(super) fn announce(config: &mut [u8], empties: Empties) {
    let mut put = |at: usize, value: u32| {
        if let Some(place) = config.get_mut(at..at + 4) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    };
    if empties.discards {
        put(36, MAX_DISCARD_SECTORS);
        put(40, MAX_EXTENTS);
        put(44, ALIGNMENT_SECTORS);
    }
    if empties.zeroes {
        put(48, MAX_ZERO_SECTORS);
        put(52, MAX_EXTENTS);
        // The driver may allow that space is given back; three bytes behind it are unused.
        put(56, 1);
    }
}

/// The extents of a request on a disk of so many sectors; the status to refuse it with, if they are not all good.
pub(super) fn understand(ram: &Ram, data: &Segments, sectors: u64, kind: Kind) -> Result<Vec<Extent>, u8> {
    let bytes = usize::try_from(data.bytes()).unwrap_or(usize::MAX);
    let most = EXTENT_BYTES * usize::try_from(MAX_EXTENTS).unwrap_or(0);
    if !bytes.is_multiple_of(EXTENT_BYTES) || !(EXTENT_BYTES..=most).contains(&bytes) {
        return Err(STATUS_IO_ERROR);
    }
    // Read once: from here on only our copy counts.
    let mut copy = vec![0; bytes];
    if data.read(ram, &mut copy) != bytes {
        return Err(STATUS_IO_ERROR);
    }
    let (extents, _) = copy.as_chunks::<EXTENT_BYTES>();
    extents.iter().map(|extent| one(extent, sectors, kind)).collect()
}

fn one(extent: &[u8; EXTENT_BYTES], sectors: u64, kind: Kind) -> Result<Extent, u8> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = *extent;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    // A discard gives space back anyway: the flag is not for it.
    if flags & !FLAG_UNMAP != 0 || (kind == Kind::Discard && flags != 0) {
        return Err(STATUS_UNSUPPORTED);
    }
    let is_there = sector.checked_add(count.into()).is_some_and(|end| end <= sectors);
    if !is_there || !(1..=kind.most_sectors()).contains(&count) {
        return Err(STATUS_IO_ERROR);
    }
    let keeps_space = kind == Kind::Zero && flags & FLAG_UNMAP == 0;
    // Neither wraps: the sectors are there, and at most 64 MiB.
    Ok(Extent { offset: sector * SECTOR_BYTES, bytes: count * SECTOR_BYTES as u32, keeps_space })
}

/// Whether extents that come from elsewhere could be those of a request here.
pub(super) fn are_good(extents: &[Extent], sectors: u64, kind: Kind) -> bool {
    let is_good = |extent: &Extent| {
        let (offset, bytes) = (extent.offset, u64::from(extent.bytes));
        let is_whole = offset.is_multiple_of(SECTOR_BYTES) && bytes.is_multiple_of(SECTOR_BYTES) && bytes > 0;
        let end = offset.checked_add(bytes);
        is_whole
            && bytes <= u64::from(kind.most_sectors()) * SECTOR_BYTES
            && end.is_some_and(|end| end <= sectors * SECTOR_BYTES)
            && !(kind == Kind::Discard && extent.keeps_space)
    };
    (1..=usize::try_from(MAX_EXTENTS).unwrap_or(0)).contains(&extents.len()) && extents.iter().all(is_good)
}
