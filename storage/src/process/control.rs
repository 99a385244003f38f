//! What the agent and a volume process say to each other on the control socket: one request frame, one answer frame,
//! JSON payloads, any number of them on a connection.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, VolumeId};

use crate::key::{ContentRoot, MapRoot};

/// The kind of a request's frame.
pub const KIND_REQUEST: u16 = 1;
/// The kind of an answer's frame.
pub const KIND_ANSWER: u16 = 2;

/// A request, version 1. Every one is idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRequestV1 {
    /// Ask for [`VolumeStatus`].
    Status,
    /// Become the writer at `epoch`. From standby only after `Adopt`; refused when a newer epoch was seen.
    Activate {
        /// The guest's epoch from now on.
        epoch: Epoch,
    },
    /// Write no more under `epoch`, for ever; answers [`SealedMap`]. Everything acknowledged is durable then.
    Seal {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Undo `Seal`: the switch was refused and this side goes on at the same epoch.
    Unseal {
        /// The epoch that goes on.
        epoch: Epoch,
    },
    /// At the source, some time before `Seal`: make durable and hash now what `Seal` would have to.
    WarmDigests,
    /// At the destination, when the source's guest has stopped: pull no more ahead, and ask for the source's map now, so
    /// that `Adopt` has nothing left to ask.
    LearnMap,
    /// At the destination, before the switch: pull blocks from the source while it runs (`hot-standby`). Goes on,
    /// pass by pass, until `StopPreCopy` or `Adopt`.
    PreCopy {
        /// At most this many bytes of blocks per second; no limit when none.
        bandwidth_bytes_per_s: Option<u64>,
        /// Pull what is worth it only (`predictive`), not all. Said only when it is so: a process of the version before does not
        /// know it, and refuses.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_predictive: bool,
    },
    /// Record what the guest does with its blocks from now on for so many seconds, then write it as `trace` into the
    /// volume's folder; in place of what is being recorded.
    Trace {
        /// How long.
        seconds: u32,
    },
    /// End the pre-copy; what was pulled stays.
    StopPreCopy,
    /// At the destination: take the sealed source's map. Refused unless its root is the one that the source answered
    /// to `Seal`.
    Adopt {
        /// What the source answered.
        sealed: SealedMap,
    },
    /// At the destination, when active: pull what is still at the source, until nothing is missing. Asked again, it
    /// changes the limit.
    StartBackgroundFetch {
        /// At most this many bytes of blocks per second; no limit when none.
        bandwidth_bytes_per_s: Option<u64>,
    },
    /// Pause the background fetch; blocks that the guest reads are still pulled.
    PauseBackgroundFetch,
    /// Upload the volume's content at this moment as a manifest; answers at once, ask `Status` for progress.
    Publish,
    /// Give up a publish under way.
    CancelPublish,
    /// Upload the content of this moment for the volume's history; answers at once, ask `Status` for [`PointStatus`]. Only of an
    /// active volume all of whose blocks are here. While one is under way nothing else is begun; a `Publish` ends it.
    TakePoint,
    /// At the source of a checkpoint: as `EndCuts`, and the cuts that follow are of this series. A process of the version before does not
    /// know it, and refuses.
    BeginCuts {
        /// By which `TakePointOfCut` knows them; never 0, and another one each time.
        series: u64,
    },
    /// As `EndCuts`, if the cuts are of this series; else nothing.
    EndCutsOf {
        /// The series.
        series: u64,
    },
    /// As `TakePoint`, of the instant of a cut: the newest one of this series. Ends a point that is under way.
    TakePointOfCut {
        /// The series.
        series: u64,
        /// The cut's number in it.
        number: u64,
    },
    /// At the standby of a mirror: pull blocks from the running source as `PreCopy` does; from the source's first cut on, stage cut
    /// after cut apart from what is committed. Goes on until `StopFollow` or `Promote`; asked again, it changes the limit.
    Follow {
        /// At most this many bytes of blocks per second; no limit when none.
        bandwidth_bytes_per_s: Option<u64>,
    },
    /// At a following standby: wait until a cut above `after` is staged, at most a second; answers [`FollowStatus`] in any case.
    AwaitStaged {
        /// The newest staged cut that is known to who asks.
        after: u64,
    },
    /// At a following standby: what it stands for is this staged cut from now on. A commit that failed half way (a full disk) is
    /// finished by the next one; until then there is nothing else that could be promoted.
    CommitCut {
        /// The cut. One that is committed already, or was passed, is done.
        number: u64,
    },
    /// At a following standby whose source is fenced: make of the committed cut a volume that may be activated above `epoch`;
    /// answers [`SealedMap`]. Everything is durable here then and nothing is missing.
    Promote {
        /// The epoch of the source, which ends.
        epoch: Epoch,
    },
    /// End following; what was copied stays as copied ahead, no cut can be promoted any more.
    StopFollow,
    /// At the source of a mirror: drop what is kept of the last cut, and begin to number at 1 again.
    EndCuts,
    /// Serve no more blocks to peers, and close the connection to the source.
    ClosePeer,
    /// Make everything acknowledged durable and end the process.
    Shutdown {
        /// Also delete the volume's data on this host. Refused while active at an epoch, or while following with a committed cut,
        /// unless `is_forced`.
        is_deleting: bool,
        /// Delete an active volume: its guest is deleted.
        #[serde(default)]
        is_forced: bool,
    },
}

/// An answer, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum ControlAnswerV1 {
    /// Done; nothing to tell.
    Done,
    /// To `Status`.
    Status(Box<VolumeStatus>),
    /// To `Seal` and `Promote`.
    Sealed(SealedMap),
    /// To `AwaitStaged`.
    Following(FollowStatus),
    /// Not done.
    Refused(Refusal),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind of refusal, for programs.
    pub code: RefusalCode,
    /// The whole chain of causes, for people.
    pub message: String,
}

/// The kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The request's epoch is older than, or not, the volume's.
    Epoch,
    /// The volume's role does not allow it.
    Role,
    /// The source's map is not the one that was announced.
    Map,
    /// There is no such cut, or it is not staged (any more).
    Cut,
    /// The source cannot be reached or answers wrongly; ask again.
    Peer,
    /// The local disk failed.
    Disk,
    /// The request was not understood.
    Malformed,
    /// Anything else.
    Internal,
}

/// The map of a sealed volume: what the controller records at the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedMap {
    /// The epoch that was sealed.
    pub epoch: Epoch,
    /// The root over every block's number, version and digest.
    pub root: MapRoot,
    /// The highest version of any block: grows with every write.
    pub version: u64,
    /// Blocks that differ from the base.
    pub blocks: u64,
}

/// The role of a volume on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "role", rename_all = "snake_case")]
pub enum RoleStatus {
    /// Opened at a destination: reads and writes wait.
    Standby {
        /// Whether it has the source's map, so that it may be activated.
        is_adopted: bool,
    },
    /// The writer at an epoch.
    Active {
        /// The epoch.
        epoch: Epoch,
    },
    /// Was the writer at an epoch; still serves blocks to peers.
    Sealed {
        /// The epoch.
        epoch: Epoch,
    },
}

/// The state of a volume process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume.
    pub volume: VolumeId,
    /// The process's id.
    pub pid: u32,
    /// The role, with its epoch.
    #[serde(flatten)]
    pub role: RoleStatus,
    /// The size in bytes.
    pub size_bytes: u64,
    /// Blocks that differ from the base.
    pub blocks: u64,
    /// Blocks whose newest content is not durable on this host yet: the source may be released only at 0.
    pub missing_blocks: u64,
    /// The same in bytes.
    pub missing_bytes: u64,
    /// Bytes of blocks pulled from the source before the volume was activated.
    pub pulled_bytes_before: u64,
    /// Bytes of blocks pulled from the source after it was activated.
    pub pulled_bytes_after: u64,
    /// Bytes read and written by the guest since the process started.
    pub guest_read_bytes: u64,
    /// Bytes written by the guest since the process started.
    pub guest_written_bytes: u64,
    /// Bytes acknowledged that are not durable yet (no flush has followed).
    pub dirty_bytes: u64,
    /// Whether an NBD client is connected.
    pub has_client: bool,
    /// Guest requests that wait for a block which cannot be had, and why; none when all is well.
    pub alarm: Option<Alarm>,
    /// The pre-copy.
    pub pre_copy: PreCopyStatus,
    /// Whether the background fetch is running.
    pub is_fetching: bool,
    /// At a source: the destination has said that it has everything, durably.
    pub is_released: bool,
    /// The publish that was last asked for.
    pub publish: PublishStatus,
    /// At the standby of a mirror: how it follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub following: Option<FollowStatus>,
    /// The point of the history that was last asked for.
    #[serde(default)]
    pub point: PointStatus,
}

/// Something that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// What it is.
    pub code: AlarmCode,
    /// In words, with the last error's chain.
    pub message: String,
}

/// The kinds of alarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlarmCode {
    /// A newest block is at the source, which cannot be reached or gives something else; reads of it wait.
    SourceUnreachable,
    /// A chunk of the base cannot be had; reads of it wait.
    BaseUnavailable,
    /// The local disk failed to make something durable; the volume answers errors.
    DiskFailed,
}

/// How far the pre-copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct PreCopyStatus {
    /// Whether it is running.
    pub is_running: bool,
    /// Whole passes over the source's map so far.
    pub passes: u32,
    /// Blocks that were newer at the source when the last pass began.
    pub last_pass_blocks: u64,
}

/// How the standby of a mirror follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct FollowStatus {
    /// The newest cut that is staged whole; 0 when none.
    pub staged: u64,
    /// The newest cut that is committed: what a promotion would bring; 0 when none.
    pub committed: u64,
    /// The highest version of the committed cut.
    pub committed_version: u64,
    /// Before the first cut: blocks that were newer at the source when the last pass began. From it on: blocks that the cut
    /// which is being staged still lacks.
    pub lacking_blocks: u64,
    /// Whole passes over the source's map before the first cut. The first cut is small when one that found little has ended.
    pub passes: u32,
    /// Blocks of cuts that were brought from the source.
    pub pulled_blocks: u64,
    /// Why the last try failed; none while all is well.
    pub trouble: Option<String>,
}

/// How far a publish is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PublishStatus {
    /// None was asked for since the process started.
    #[default]
    None,
    /// Under way.
    Running {
        /// Blocks done.
        done_blocks: u64,
        /// Blocks in all.
        total_blocks: u64,
    },
    /// Done.
    Done {
        /// The identity of the content.
        root: ContentRoot,
        /// Blocks that were looked at.
        total_blocks: u64,
        /// Bytes that had to be stored (the rest was there).
        stored_bytes: u64,
    },
    /// Failed or cancelled; ask again to go on where it stopped.
    Failed {
        /// The chain of causes.
        message: String,
    },
}

/// How far a point is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum PointStatus {
    /// None was asked for since the process started.
    #[default]
    None,
    /// Under way.
    Running,
    /// Its content is in the store.
    Done {
        /// The identity of the content.
        root: ContentRoot,
        /// The epoch at which it was written.
        epoch: Epoch,
        /// The highest version that was given out before the moment.
        version: u64,
        /// How long ago the moment was, in milliseconds, when this was said.
        age_ms: u64,
        /// Blocks that differ from the base.
        total_blocks: u64,
        /// Of them, those that were read.
        sealed_blocks: u64,
        /// Bytes that had to be stored.
        stored_bytes: u64,
        /// Of one of a cut: the cut's series.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        series: Option<u64>,
    },
    /// Failed, or ended by a publish.
    Failed {
        /// The chain of causes.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_a_stable_text_form() {
        let text = serde_json::to_string(&ControlRequestV1::Seal { epoch: Epoch(3) }).unwrap();
        assert_eq!(text, r#"{"request":"seal","epoch":3}"#);
        let shutdown: ControlRequestV1 = serde_json::from_str(r#"{"request":"shutdown","is_deleting":true}"#).unwrap();
        assert_eq!(shutdown, ControlRequestV1::Shutdown { is_deleting: true, is_forced: false });
        assert!(serde_json::from_str::<ControlRequestV1>(r#"{"request":"seal","epoch":3,"x":1}"#).is_err());
    }

    #[test]
    fn a_status_survives_its_text_form() {
        let status = VolumeStatus {
            volume: VolumeId::generate(),
            pid: 1,
            role: RoleStatus::Active { epoch: Epoch(2) },
            size_bytes: 1,
            blocks: 1,
            missing_blocks: 0,
            missing_bytes: 0,
            pulled_bytes_before: 0,
            pulled_bytes_after: 0,
            guest_read_bytes: 0,
            guest_written_bytes: 0,
            dirty_bytes: 0,
            has_client: false,
            alarm: Some(Alarm { code: AlarmCode::BaseUnavailable, message: "x".into() }),
            pre_copy: PreCopyStatus::default(),
            is_fetching: false,
            is_released: false,
            publish: PublishStatus::Done { root: ContentRoot([1; 32]), total_blocks: 1, stored_bytes: 2 },
            following: Some(FollowStatus { staged: 3, trouble: Some("y".into()), ..FollowStatus::default() }),
            point: PointStatus::Failed { message: "z".into() },
        };
        let answer = ControlAnswerV1::Status(Box::new(status));
        let text = serde_json::to_string(&answer).unwrap();
        assert_eq!(serde_json::from_str::<ControlAnswerV1>(&text).unwrap(), answer, "{text}");
    }
}
