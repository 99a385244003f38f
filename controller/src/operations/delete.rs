//! Deleting a guest: every host that may hold something of it confirms that nothing is left, then its records go.

use std::collections::BTreeSet;

use supercloud_api::{
    Code, Freeze, Phase, Port, Problem, Volume, VolumeHistory,
    handover::Owner,
    ids::{GuestId, HostId, OperationId},
    link::Directive,
    unix_ms,
};

use super::{Engine, EngineError, effects};
use crate::{
    auth,
    state::{
        Change, Context, DeletedGuest, EventDraft, GuestRecord, GuestSeed, HostRecord, OperationRecord, Stored,
        TokenRecord, keys, retry_conflicts,
    },
};

/// Records of freezes that are removed in one transaction.
const FREEZES_AT_ONCE: usize = 40;

impl Engine {
    /// One step of a deletion: asks the hosts, or (when none is left to ask) removes the records.
    pub(super) async fn delete_step(&self, id: OperationId) -> Result<(), EngineError> {
        let ask = retry_conflicts(|| async {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { return Ok(None) };
            if record.operation.phase.is_terminal() {
                return Ok(None);
            }
            let Some(guest) = record.operation.guest else { return Ok(None) };
            let Some(guest) = self.state.read::<GuestRecord>(&guest).await? else {
                // The records went in the transaction that also ended an operation of this guest.
                self.end_delete(&record, Phase::Done, None).await?;
                return Ok(None);
            };
            let volumes = self.volume_records(&guest).await?;
            if record.operation.phase == Phase::Plan {
                return self.begin_delete(&record, &guest, &volumes).await;
            }
            let missing = self.removed_hosts(&guest.discarding).await?;
            if !missing.is_empty() {
                let mut now = guest.value.clone();
                now.discarding.retain(|host| !missing.contains(host));
                let mut change = Change::new();
                change.update(&guest, &now);
                self.state.commit(&Context::of_operation(&record.value), change).await?;
                return Ok(Some(now));
            }
            if guest.discarding.is_empty() {
                self.remove_records(&record, &guest, &volumes).await?;
                return Ok(None);
            }
            Ok::<_, EngineError>(Some(guest.value))
        })
        .await?;
        if let Some(guest) = ask {
            for host in &guest.discarding {
                self.sessions.send(*host, Directive::Discard { guest: guest.guest.id });
            }
            if guest.discarding.is_empty() {
                return Box::pin(self.delete_step(id)).await;
            }
        }
        Ok(())
    }

    async fn volume_records(&self, guest: &GuestRecord) -> Result<Vec<Stored<Volume>>, EngineError> {
        let mut volumes = Vec::new();
        for id in &guest.guest.volumes {
            volumes.push(self.state.need::<Volume>(id).await?);
        }
        Ok(volumes)
    }

    /// Hosts that were removed and so will never answer.
    async fn removed_hosts(&self, hosts: &BTreeSet<HostId>) -> Result<Vec<HostId>, EngineError> {
        let mut removed = Vec::new();
        for host in hosts {
            let record = self.state.read::<HostRecord>(host).await?;
            if record.is_none_or(|record| record.is_removed) {
                removed.push(*host);
            }
        }
        Ok(removed)
    }

    /// From the plan on there is no way back: the guest cannot be started any more.
    async fn begin_delete(
        &self,
        record: &Stored<OperationRecord>,
        guest: &Stored<GuestRecord>,
        volumes: &[Stored<Volume>],
    ) -> Result<Option<GuestRecord>, EngineError> {
        if matches!(guest.owner.owner, Owner::Host(_)) || guest.owner.operation.is_some() {
            let problem = Problem::new(Code::WrongState, "the guest runs, or an operation is under way; stop it first");
            self.end_delete(record, Phase::RolledBack, Some(problem)).await?;
            return Ok(None);
        }
        let mut now = guest.value.clone();
        let volumes: Vec<Volume> = volumes.iter().map(|volume| volume.value.clone()).collect();
        now.discarding = effects::holding_hosts(&now, &volumes).into_iter().collect();
        let mut operation = record.value.clone();
        operation.operation.phase = Phase::Finish;
        let mut change = Change::new();
        change.update(guest, &now);
        change.update_operation(record, &mut operation);
        self.state.commit(&Context::of_operation(&record.value), change).await?;
        Ok(Some(now))
    }

    async fn end_delete(
        &self,
        record: &Stored<OperationRecord>,
        phase: Phase,
        problem: Option<Problem>,
    ) -> Result<(), EngineError> {
        let mut now = record.value.clone();
        now.operation.phase = phase;
        now.operation.error = problem;
        let mut change = Change::new();
        if let Some(guest) = now.operation.guest
            && let Some(before) = self.state.read::<GuestRecord>(&guest).await?
            && before.guest.operation == Some(now.operation.id)
        {
            let mut guest = before.value.clone();
            guest.guest.operation = None;
            change.update(&before, &guest);
        }
        change.update_operation(record, &mut now);
        self.state.commit(&Context::of_operation(&record.value), change).await?;
        Ok(())
    }

    /// The last step: names, addresses and records are free again, in one transaction with the operation's end.
    async fn remove_records(
        &self,
        record: &Stored<OperationRecord>,
        guest: &Stored<GuestRecord>,
        volumes: &[Stored<Volume>],
    ) -> Result<(), EngineError> {
        let mut drops = Vec::new();
        let mut freezes = self.state.list::<Freeze>().await?;
        freezes.retain(|freeze| freeze.guest == guest.guest.id);
        // A transaction takes a hundred steps at most, and a guest can have been frozen any number of times.
        for some in freezes.chunks(FREEZES_AT_ONCE) {
            let mut change = Change::new();
            for freeze in some {
                change.delete(freeze);
                drops.push(freeze.value.clone());
            }
            self.state.commit(&Context::of_operation(&record.value), change).await?;
        }
        self.drop_freezes(&drops).await?;
        let mut change = Change::new();
        for volume in volumes {
            change.delete_named(volume);
            if let Some(history) = self.state.read::<VolumeHistory>(&volume.id).await? {
                change.delete(&history);
            }
        }
        for id in &guest.guest.ports {
            let port = self.state.need::<Port>(id).await?;
            change.release(keys::address(port.network, port.ipv4));
            change.release(keys::mac(&port.mac));
            change.delete(&port);
        }
        if let Some(seed) = self.state.read::<GuestSeed>(&guest.guest.id).await? {
            change.delete(&seed);
        }
        if let Some(token) = self.state.read::<TokenRecord>(&auth::guest_token_id(guest.guest.id)).await? {
            TokenRecord::remove_in(&token, &mut change);
        }
        crate::ledger::end_stays(guest, self.state.book().now(), &mut change);
        change.delete_named(guest);
        change.create(&DeletedGuest { guest: guest.guest.id, deleted_at_ms: unix_ms() });
        change.event(
            EventDraft::new("guest.deleted")
                .project(guest.guest.project)
                .guest(guest.guest.id)
                .operation(record.operation.id)
                .data(serde_json::json!({ "name": guest.guest.name })),
        );
        let mut operation = record.value.clone();
        operation.operation.phase = Phase::Done;
        change.update_operation(record, &mut operation);
        self.state.commit(&Context::of_operation(&record.value), change).await?;
        self.overlay.notify_one();
        Ok(())
    }

    /// Tells a host of each freeze's cloud that its memory state may go.
    pub(super) async fn drop_freezes(&self, freezes: &[Freeze]) -> Result<(), EngineError> {
        for freeze in freezes {
            for host in self.state.list::<HostRecord>().await? {
                if host.host.cloud == freeze.cloud && self.sessions.is_open(host.host.id) {
                    let directive = Directive::DropFreeze {
                        freeze: freeze.id,
                        project: freeze.project,
                        memory_root: freeze.memory_root.clone(),
                    };
                    self.sessions.send(host.host.id, directive);
                    break;
                }
            }
        }
        Ok(())
    }

    /// A host has nothing left of a deleted guest.
    pub(super) async fn discarded(&self, host: HostId, guest: GuestId) -> Result<(), EngineError> {
        let operation = retry_conflicts(|| async {
            let Some(before) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(None) };
            let mut now = before.value.clone();
            if !now.discarding.remove(&host) {
                return Ok(None);
            }
            let mut change = Change::new();
            change.update(&before, &now);
            self.state.commit(&Context::system(), change).await?;
            Ok::<_, EngineError>(now.guest.operation)
        })
        .await?;
        match operation {
            Some(operation) => self.delete_step(operation).await,
            None => Ok(()),
        }
    }
}
