//! Whether the guest runs by a lease here: for exactly as long as a standby of it may be told to take over without a word of this host.

use supercloud_handover::{OperationKind, SourceState};
use supercloud_ids::{Epoch, OperationId};
use tokio::sync::watch;

use super::{
    actor::{Actor, Running},
    record::GuestRecord,
};
use crate::jobs::lease::{self, Held};

/// Said while the guest stands still.
const OVER: &str = "its lease is over, as the controller was not heard: it stands still until that is heard again";

/// A lease that is kept.
pub(super) struct Kept {
    job: Running,
    held: Held,
}

/// What the guest's process knows of a lease.
#[derive(Default)]
pub(super) enum Leasing {
    /// That it needs none.
    #[default]
    None,
    /// A lease is kept.
    Kept(Kept),
    /// Perhaps one that was kept by an agent before, or is not known to be over.
    Left,
    /// One of a mirror that is over, of which the process has not been told yet.
    Over,
}

impl Leasing {
    /// Whether one is kept.
    pub const fn is_kept(&self) -> bool {
        matches!(self, Self::Kept(_))
    }

    /// To whoever mirrors the guest.
    pub fn held(&self) -> Option<Held> {
        match self {
            Self::Kept(kept) => Some(kept.held.clone()),
            Self::None | Self::Left | Self::Over => None,
        }
    }

    /// Why the guest stands still, if it does for want of a lease.
    pub fn alarm(&self) -> Option<&'static str> {
        match self {
            Self::Kept(kept) if lease::is_over(&kept.held) => Some(OVER),
            _ => None,
        }
    }
}

/// By what the guest may run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    /// By this lease, of this mirror: from the order to mirror it to the controller's word that the mirror's standby can never be
    /// promoted, which is what the machine leaves `Copying` by. A mirror that is broken, or whose agent was restarted, is not over.
    Lease(OperationId, Epoch, u64),
    /// It is the owner's, and nobody else can be promoted.
    Own,
    /// By none, or that is not known: what its process was told last counts, and it is told nothing.
    None,
}

/// Pure.
fn right(record: &GuestRecord) -> Right {
    match record.handover.source().state() {
        SourceState::Copying { plan, .. } if matches!(plan.kind, OperationKind::Mirror { .. }) => {
            let assignment = record.assignment.as_ref().filter(|assignment| assignment.operation == plan.operation);
            match assignment.and_then(|assignment| assignment.mirror).map(|mirror| mirror.lease_ms) {
                Some(Some(lease_ms)) => Right::Lease(plan.operation, plan.epoch, lease_ms),
                Some(None) => Right::Own,
                None => Right::None,
            }
        }
        SourceState::Running | SourceState::Resuming { .. } | SourceState::Copying { .. } => Right::Own,
        _ => Right::None,
    }
}

impl Actor {
    /// Begins or ends to keep a lease, as it is wanted now. What cannot be ended now is ended later: no guest is left under a lease that
    /// nobody renews.
    pub(super) async fn keep_lease(&mut self) {
        match (right(&self.record), &mut self.leasing) {
            (Right::Own | Right::None, Leasing::None) => {}
            (Right::Lease(operation, ..), Leasing::Kept(kept))
                if kept.job.operation == operation && !kept.job.is_over() => {}
            (Right::Lease(operation, epoch, lease_ms), leasing) => {
                let (told, held) = watch::channel(None);
                let is_over = match std::mem::take(leasing) {
                    Leasing::Kept(kept) => {
                        let is_over = kept.job.operation != operation;
                        kept.job.end().await;
                        is_over
                    }
                    Leasing::Over => true,
                    Leasing::None | Leasing::Left => false,
                };
                // One of another mirror may be longer than who waits for this one's end would wait.
                if is_over && !self.end_lease().await {
                    return;
                }
                let job = self.job(operation);
                let job = Self::start(&job.clone(), lease::keep(job, epoch, lease_ms, told));
                self.leasing = Leasing::Kept(Kept { job, held });
            }
            (Right::None, leasing) => {
                if let Leasing::Kept(kept) = std::mem::replace(leasing, Leasing::Left) {
                    kept.job.end().await;
                }
            }
            (Right::Own, leasing) => {
                // Its last word to the process is said before the lease is ended.
                if let Leasing::Kept(kept) = std::mem::replace(leasing, Leasing::Over) {
                    kept.job.end().await;
                }
                self.end_lease().await;
            }
        }
    }

    /// Tells the process that it needs no lease; whether it heard that. If not, it is told later.
    async fn end_lease(&mut self) -> bool {
        let ended = match self.host.backend.mirroring() {
            Ok(mirroring) => mirroring.lease(self.guest, None).await,
            Err(_) => Ok(()),
        };
        let is_ended = ended.is_ok();
        self.leasing = if is_ended { Leasing::None } else { Leasing::Over };
        if let Err(error) = ended {
            let error = crate::chain(&error);
            tracing::warn!(guest = %self.guest, error, "the guest's lease is not ended yet; it is tried again");
        }
        is_ended
    }
}

#[cfg(test)]
mod tests {
    use supercloud_api::link::MirrorOptions;
    use supercloud_handover::{
        LocalEvent, LocalHandover, Owner, SourceEvent, SourceHandover, SourceOrder, SourcePlan, Stamp,
    };
    use supercloud_ids::{GuestId, HostId};

    use super::*;

    fn assignment(operation: OperationId, lease_ms: Option<u64>) -> supercloud_api::link::Assignment {
        let mirror = MirrorOptions { interval_ms: 100, is_strict: true, lease_ms, bandwidth_bps: None };
        serde_json::from_value(serde_json::json!({
            "operation": operation, "peer": null, "ticket": null, "chunk_sources": [], "grace_ms": 0, "frozen": null,
            "migration": supercloud_api::link::MigrationOptions::default(), "mirror": mirror,
            "spec": {
                "guest": GuestId::generate(), "name": "web", "project": supercloud_ids::ProjectId::generate(),
                "project_key": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
                "shape": {"vcpus": 1, "memory_bytes": 1 << 27}, "class": null, "compat_class": null,
                "boot": {"from": "disk"}, "volumes": [], "ports": [], "user_data": null, "ssh_keys": [],
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_lease_is_kept_for_as_long_as_the_standby_could_take_over_and_never_ended_where_it_has() {
        let (guest, host, operation) = (GuestId::generate(), HostId::generate(), OperationId::generate());
        let mut record = GuestRecord::new(guest, host);
        assert_eq!(right(&record), Right::None);
        record.handover = LocalHandover::of(SourceHandover::running(guest, host, Epoch(4)), host);
        assert_eq!(right(&record), Right::Own);
        let plan = SourcePlan {
            guest,
            operation,
            turn: 1,
            kind: OperationKind::Mirror { to: HostId::generate() },
            epoch: Epoch(4),
        };
        let mut ended = record.clone();
        record.handover.step(LocalEvent::Source(SourceEvent::Order(SourceOrder::Begin(plan))));
        // Without its assignment it is not known; nothing is ended by that.
        assert_eq!(right(&record), Right::None);
        record.assignment = Some(assignment(operation, None));
        assert_eq!(right(&record), Right::Own);
        record.assignment = Some(assignment(operation, Some(5_000)));
        assert_eq!(right(&record), Right::Lease(operation, Epoch(4), 5_000));
        // Broken, and that is not heard: it may be taken over.
        record.handover.step(LocalEvent::Source(SourceEvent::CopyFailed { operation }));
        assert_eq!(right(&record), Right::Lease(operation, Epoch(4), 5_000));
        ended.clone_from(&record);
        let yours = SourceOrder::StillYours { operation: Some(operation), turn: 1, epoch: Epoch(4) };
        ended.handover.step(LocalEvent::Source(SourceEvent::Order(yours)));
        assert_eq!(right(&ended), Right::Own);
        let now = Stamp { owner: Owner::Host(HostId::generate()), epoch: Epoch(5) };
        let elsewhere = SourceOrder::Elsewhere { now, yours: Epoch(4), needed: false };
        record.handover.step(LocalEvent::Source(SourceEvent::Order(elsewhere)));
        assert_eq!(right(&record), Right::None);
    }
}
