//! What is said about sweeps of chunk stores.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, ProjectId, VolumeId};

/// A place in the controller's history: an event of its chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryMark {
    /// The event's number.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
}

/// The root of a manifest that something names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreRoot {
    /// The root, hex.
    pub root: String,
    /// Whether the asking host's cloud has to have it.
    pub is_home: bool,
}

/// A part of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ManifestPart {
    /// Names leaves.
    Root,
    /// Names data.
    Leaf,
}

/// What the sweep of one project of a cloud's store did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSwept {
    /// The project.
    pub project: ProjectId,
    /// Chunks that were there.
    pub seen_chunks: u64,
    /// Their bytes.
    pub seen_bytes: u64,
    /// Of these, chunks that were removed.
    pub freed_chunks: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Chunks that nothing names and that are too young to be removed.
    pub young_chunks: u64,
    /// Why it did not come to its end, if it did not.
    pub problem: Option<String>,
    /// Of a store over several others: those that gave something wrong lately, by name, and what.
    #[serde(default)]
    pub wrong: Vec<String>,
}

/// What a check of a volume found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ChunksChecked {
    /// Chunks that it stands on.
    pub chunks: u64,
    /// Bytes that were read and are right.
    pub sound_bytes: u64,
    /// Chunks that its cloud's store lacked and has now.
    pub fetched: u64,
    /// Chunks that were damaged there and are whole now.
    pub repaired: u64,
    /// Chunks that are nowhere.
    pub missing: u64,
    /// Chunks that are damaged and nowhere whole.
    pub damaged: u64,
    /// Names of some of the last two, hex.
    pub lost: Vec<String>,
}

/// A check of a volume has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeChecked {
    /// The guest.
    pub guest: GuestId,
    /// The volume.
    pub volume: VolumeId,
    /// What it found.
    pub found: ChunksChecked,
    /// Why it did not come to its end, if it did not.
    pub problem: Option<String>,
}

/// A point of a volume's history whose content is in the store of the host's cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointContent {
    /// Root of its manifest, hex.
    pub root: String,
    /// The epoch at which it was written.
    pub epoch: Epoch,
    /// The version of the block map.
    pub version: u64,
    /// How long ago the moment was when this was said, in milliseconds, by a clock that only goes on. Never more than it was.
    pub age_ms: u64,
    /// Blocks that differ from what the volume stands on.
    pub total_blocks: u64,
    /// Of them, those that were read for it.
    pub sealed_blocks: u64,
    /// Bytes that had to be stored.
    pub stored_bytes: u64,
    /// Memory and devices of the guest at the same instant, if they were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<CheckpointContent>,
}

/// Memory and devices of a guest at the instant of a point, whose content is in the store of the host's cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointContent {
    /// Root of its manifest, hex.
    pub root: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// What reads it.
    pub format: String,
    /// Blocks of it that had to be stored: the others were there.
    pub stored_blocks: u64,
    /// Blocks of it that are not zeros.
    pub filled_blocks: u64,
    /// For how long the guest stood still, in microseconds.
    pub stood_still_us: u64,
}

/// A point of a volume's history was taken, or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointTaken {
    /// The guest.
    pub guest: GuestId,
    /// The volume.
    pub volume: VolumeId,
    /// What was kept; absent: nothing was.
    #[serde(default)]
    pub content: Option<PointContent>,
    /// Why not.
    #[serde(default)]
    pub problem: Option<String>,
}
