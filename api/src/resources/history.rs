//! A volume's history: what was kept of it, and for how long. The rules are in [`crate::history`].

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, Epoch, ProjectId, VolumeId};
use utoipa::ToSchema;

use crate::Ref;

/// How points of a volume are taken and how long they are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HistoryPolicy {
    /// A point is taken this often, in seconds (60 s to 30 days); absent: only when somebody asks for one, and by freezes.
    #[serde(default)]
    pub every_s: Option<u64>,
    /// How densely points are kept, by their age: one to eight bands, the youngest first.
    pub keep: Vec<HistoryBand>,
    /// Points that are due are taken with the memory of the running guest: they are checkpoints, from which it can be thawed. The memory
    /// of the newest so many is kept (1 to 20). Absent: points are of the disk only, and of checkpoints that somebody asks for
    /// the newest one's memory is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u32>,
}

/// Points up to an age, and the longest gap that thinning may make between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HistoryBand {
    /// Of points not older than this, in seconds (at most ten years).
    pub for_s: u64,
    /// Points are thinned as far as no gap gets longer than this, in seconds (at least 60).
    pub every_s: u64,
}

/// A volume's content at one instant, kept in a cloud's store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumePoint {
    /// Its number: 1, 2, … in the order in which they were taken; none is used twice.
    pub number: u64,
    /// Its instant, in milliseconds since 1970: everything in it was written before. Never less than that of the point before.
    pub at_ms: u64,
    /// Tells points apart whose `at_ms` is the same, because the clock went back in between.
    pub tick: u32,
    /// The epoch of the guest that had written it.
    pub epoch: Epoch,
    /// The version of the block map: rises with every write that it covers.
    pub version: u64,
    /// The content: root of its manifest.
    pub root: String,
    /// The cloud in whose store it lies.
    pub cloud: CloudId,
    /// Bytes that had to be stored for it.
    pub stored_bytes: u64,
    /// The guest's memory and devices at the very instant of the disk: then it is a checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<PointMemory>,
    /// BLAKE3 over all of this and the hash of the point before (hex).
    pub hash: String,
}

/// Memory and devices of a guest at the instant of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PointMemory {
    /// Root of its content, in the store of the point's cloud.
    pub root: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// What reads it.
    pub format: String,
    /// Whether it is kept: the guest can be thawed from it. The memory of older points goes before they do.
    pub is_kept: bool,
}

/// Points that were thinned out, in a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ThinnedPoints {
    /// The number of the first.
    pub from: u64,
    /// The number of the last.
    pub to: u64,
    /// The hash of the last: what the point after it is chained to.
    pub hash: String,
}

/// The history of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeHistory {
    /// The volume.
    pub volume: VolumeId,
    /// Its project.
    pub project: ProjectId,
    /// How points are taken and kept.
    pub policy: HistoryPolicy,
    /// The points that are kept, the oldest first.
    pub points: Vec<VolumePoint>,
    /// Those that were thinned out.
    pub thinned: Vec<ThinnedPoints>,
    /// The number of the next point.
    pub next: u64,
    /// The hash of the newest point (hex); 64 zeros when there was none.
    pub head: String,
    /// The content that the volume stood on when it was last looked at: a freeze leaves another one.
    #[serde(default)]
    pub seen_base: Option<String>,
    /// Why the last point that was due could not be taken; absent: it could.
    #[serde(default)]
    pub problem: Option<String>,
    /// When the history was begun.
    pub created_at_ms: u64,
}

/// What a volume was as of an instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeAsOf {
    /// The instant that was asked for.
    pub asked_ms: u64,
    /// The newest point that is not younger.
    pub point: VolumePoint,
    /// How much older it is than the instant.
    pub older_ms: u64,
}

/// The content that a guest's disk starts from, out of a volume's history: no bytes are copied. Exactly one of `as_of_ms` and
/// `point`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskFrom {
    /// The volume, of the same project.
    pub volume: Ref,
    /// The newest point not younger than this instant, in milliseconds since 1970.
    #[serde(default)]
    pub as_of_ms: Option<u64>,
    /// The point of this number.
    #[serde(default)]
    pub point: Option<u64>,
}
