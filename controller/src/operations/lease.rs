//! Hosts ask whether mirrored guests may run on there.

use supercloud_api::{
    Code, Problem,
    ids::{Epoch, GuestId, HostId},
    link::Answer,
};

use super::{Engine, EngineError, handler::internal};
use crate::state::{GuestRecord, OperationRecord, Work};

impl Engine {
    /// Grants a lease, if the host owns the guest and no standby of it takes over. The order is what counts: see [`crate::leases`].
    pub(super) async fn renew_lease(
        &self,
        host: HostId,
        (guest, epoch): (GuestId, Epoch),
        asked_ms: u64,
        lease_ms: u64,
    ) -> Result<Answer, Problem> {
        self.leases.heard(host);
        // Before anything is remembered: a host has no say about others' guests.
        let is_owned = async || self.may_run(host, (guest, epoch), lease_ms).await.map_err(|error| internal(&error));
        let no = |why: &str| Err(Problem::new(Code::Forbidden, why));
        if !is_owned().await? {
            return no("the guest does not run there, or its standby takes over");
        }
        if !self.leases.grant(guest, lease_ms) {
            return no("its standby takes over, or no lease is that long");
        }
        if !is_owned().await? {
            return no("its standby takes over");
        }
        let holds = self.claim.holds(&self.state).await.map_err(|error| internal(&error.into()))?;
        if !holds {
            return Err(Problem::new(Code::TooManyRequests, "this controller does not grant leases (yet); ask again"));
        }
        Ok(Answer::Lease { asked_ms, lease_ms })
    }

    async fn may_run(
        &self,
        host: HostId,
        (guest, epoch): (GuestId, Epoch),
        lease_ms: u64,
    ) -> Result<bool, EngineError> {
        let Some(record) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(false) };
        if !record.owner.is_owned_by(host, epoch) {
            return Ok(false);
        }
        let Some(operation) = record.owner.operation.as_ref().filter(|operation| operation.is_mirrored()) else {
            // Nobody else can be let run it: it was never to be, or that is over.
            return Ok(true);
        };
        if operation.source_lost {
            return Ok(false);
        }
        let mirror = self.state.read::<OperationRecord>(&operation.id).await?;
        // No longer than a controller that knows of nothing that was granted would wait.
        let may = |record: &OperationRecord| match &record.work {
            Work::GuestMirror { options, is_failing_over } => {
                !is_failing_over && options.lease_ms.is_none_or(|most| lease_ms <= most)
            }
            _ => true,
        };
        Ok(mirror.is_none_or(|record| may(&record)))
    }
}
