//! Setting a guest back to a checkpoint: what a point of its volume's history holds becomes what the guest is.
//!
//! A guest that nobody runs (lost, or stopped) is from then on frozen as of the point, at its epoch, and thawed like any other that is
//! frozen: at the next epoch, by the usual switch. Both are one transaction with the operation. The point stays: it can be gone back to
//! again. Where the thaw does not succeed the guest stays frozen as of the point.

use supercloud_api::{
    Code, Freeze, FrozenVolume, HistoryBand, HistoryPolicy, Port, Volume, VolumeHistory,
    handover::{self, OwnerRecord},
    history::AsOfRefusal,
    ids::{FreezeId, HostId},
    unix_ms,
};

use crate::{
    ledger,
    rest::Failure,
    state::{Change, EventDraft, GuestRecord, State, Stored},
};

/// A guest that is set back, and all that hangs on it.
#[derive(Debug)]
pub(crate) struct SetBack {
    /// The guest as it is to be, before anything begins.
    pub guest: GuestRecord,
    /// As what it is thawed.
    pub freeze: FreezeId,
    /// To which point.
    pub point: u64,
    made: Freeze,
    volume: (Stored<Volume>, Volume),
    ports: Vec<(Stored<Port>, Port)>,
    history: (Stored<VolumeHistory>, VolumeHistory),
    lost_from: Option<HostId>,
}

/// How points are kept of a volume of which only checkpoints were asked for.
const ASKED_FOR: HistoryBand = HistoryBand { for_s: 7 * 86_400, every_s: 3600 };

/// The history that is begun for a guest's first checkpoint, as part of a change.
pub(crate) fn begin_history(volume: &Stored<Volume>, change: &mut Change) -> VolumeHistory {
    let policy = HistoryPolicy { every_s: None, keep: vec![ASKED_FOR], memory: None };
    let begun = VolumeHistory::begin(volume.id, volume.project, policy.clone(), volume.base.clone(), unix_ms());
    change.unchanged(volume).create(&begun);
    let data = serde_json::json!({ "volume": volume.name, "policy": policy, "thinned": 0 });
    change.event(EventDraft::new("volume.history").project(volume.project).guest(volume.guest).data(data));
    begun
}

fn refused(why: impl Into<String>) -> Failure {
    Failure::new(Code::WrongState, why.into())
}

impl SetBack {
    /// What it comes to; the newest checkpoint where no point is named.
    ///
    /// # Errors
    /// When there is no such checkpoint, or the guest may run, or something holds it.
    pub async fn plan(state: &State, found: &GuestRecord, point: Option<u64>) -> Result<Self, Failure> {
        let name = &found.guest.name;
        let [volume] = found.guest.volumes.as_slice() else {
            return Err(refused(format!("guest {name} has not exactly one volume: it has no checkpoints")));
        };
        let volume = state.need::<Volume>(volume).await?;
        let history = state.read::<VolumeHistory>(&volume.id).await?;
        let history = history.ok_or_else(|| refused(format!("guest {name}: {}", AsOfRefusal::NoCheckpoint)))?;
        let meant = history.checkpoint(point).map_err(|refusal| refused(format!("guest {name}: {refusal}")))?;
        let memory = meant.memory.as_ref().ok_or_else(|| refused(AsOfRefusal::NoCheckpoint.to_string()))?;
        let made = Freeze {
            id: FreezeId::generate(),
            guest: found.guest.id,
            project: found.guest.project,
            epoch: found.owner.epoch,
            cloud: meant.cloud,
            memory_root: memory.root.clone(),
            memory_bytes: memory.bytes,
            memory_format: memory.format.clone(),
            volumes: vec![FrozenVolume { volume: volume.id, root: meant.root.clone(), stored_bytes: 0 }],
            is_consumed: false,
            created_at_ms: unix_ms(),
            point: Some(meant.number),
        };
        let owner = handover::set_back(&found.owner, made.id).map_err(|refusal| refused(refusal.to_string()))?;
        let mut ports = Vec::new();
        for id in &found.guest.ports {
            let port = state.need::<Port>(id).await?;
            let now = Port { host: None, prepared_at: None, moved_from: None, ..port.value.clone() };
            ports.push((port, now));
        }
        let now = Volume {
            base: Some(meant.root.clone()),
            base_cloud: Some(meant.cloud),
            host: None,
            needed_source: None,
            map_root: None,
            ..volume.value.clone()
        };
        // What it stands on now is in the history already.
        let seen = VolumeHistory { seen_base: now.base.clone(), ..history.value.clone() };
        let lost_from = host_of(&found.owner);
        let mut guest = found.clone();
        guest.set_owner(owner, None);
        guest.guest.alarm = None;
        let (freeze, point) = (made.id, meant.number);
        Ok(Self { guest, freeze, point, made, volume: (volume, now), ports, history: (history, seen), lost_from })
    }

    /// Everything but the guest's own record.
    pub fn write(&self, guest: &mut GuestRecord, now: ledger::Stamp, change: &mut Change) {
        ledger::keep_stays(guest, now, change);
        change.create(&self.made).update(&self.volume.0, &self.volume.1).update(&self.history.0, &self.history.1);
        for (before, now) in self.ports.iter().filter(|(before, now)| before.value != *now) {
            change.update(before, now);
        }
        let point = self.history.0.points.iter().find(|point| point.number == self.point);
        change.event(
            EventDraft::new("guest.set_back")
                .project(self.made.project)
                .guest(self.made.guest)
                .host(self.lost_from)
                .data(serde_json::json!({
                    "volume": self.volume.1.name, "point": self.point, "freeze": self.freeze,
                    "at_ms": point.map(|point| point.at_ms),
                })),
        );
    }
}

fn host_of(owner: &OwnerRecord) -> Option<HostId> {
    match owner.owner {
        handover::Owner::Lost(host) => Some(host),
        _ => None,
    }
}
