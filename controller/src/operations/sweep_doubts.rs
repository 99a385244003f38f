//! Why nothing may be swept now, and whose turn it is: what [`super::sweep_guard`] decides on, read from the records.

use std::collections::HashSet;

use supercloud_api::{
    Code, Problem,
    ids::{CloudId, HostId},
    link::{GuestReport, HistoryMark},
};
use tokio::time::Instant;

use super::{Engine, EngineError, handler::internal, sweep_guard};
use crate::state::{AcceptedMark, Change, Context, DeletedGuest, EventDraft, GuestRecord, HostRecord};

impl Engine {
    /// The marks that are in no history of ours, and of which no operator has said that they do not count.
    pub(super) async fn foreign(&self, marks: &[HistoryMark]) -> Result<Vec<HistoryMark>, EngineError> {
        let mut foreign = Vec::new();
        for mark in marks {
            // It becomes part of a key.
            let is_hash = sweep_guard::is_hash(&mark.hash);
            let is_known = self.is_in_history(mark).await?
                || (is_hash
                    && self.state.read::<AcceptedMark>(&AcceptedMark::key(mark.seq, &mark.hash)).await?.is_some());
            if !is_known {
                foreign.push(mark.clone());
            }
        }
        self.sweeps.note_foreign(foreign.iter().cloned());
        Ok(foreign)
    }

    /// Keeps in mind what a host tells of its guests and the records do not have.
    pub(super) async fn doubt_guests(&self, host: HostId, reports: &[GuestReport]) -> Result<(), EngineError> {
        let told = sweep_guard::told(reports);
        if self.sweeps.guard(|guard| guard.is_told(host, &told)) {
            return Ok(());
        }
        let mut doubt = None;
        for (guest, epoch, is_incoming) in &told {
            let known = self.state.read::<GuestRecord>(guest).await?.map(|record| record.owner.epoch);
            if sweep_guard::is_known(known, *epoch, *is_incoming) {
                continue;
            }
            if known.is_none() && self.state.read::<DeletedGuest>(guest).await?.is_some() {
                continue;
            }
            let what = known.map_or_else(
                || "of which nothing is known".to_owned(),
                |known| format!("at epoch {}, which was at epoch {} last", epoch.0, known.0),
            );
            doubt = Some(format!("holds guest {guest}, {what}"));
            break;
        }
        self.sweeps.guard(|guard| guard.tell(host, told, doubt));
        Ok(())
    }

    /// Why nothing may be swept now.
    pub(super) async fn doubt(&self) -> Result<Option<String>, EngineError> {
        let hosts = self.state.list::<HostRecord>().await?;
        let removed: HashSet<HostId> = hosts.iter().filter(|host| host.is_removed).map(|host| host.host.id).collect();
        let now = Instant::now().into_std();
        let doubt = self.sweeps.guard(|guard| guard.doubt(|host| removed.contains(&host), now));
        Ok(doubt.map(|doubt| format!("{doubt}: were these records brought back from a backup? Nothing is removed")))
    }

    /// A host's turn to sweep its cloud's store begins or goes on.
    pub(super) async fn take_turn(&self, host: HostId) -> Result<CloudId, Problem> {
        let here = self.state.need::<HostRecord>(&host).await.map_err(|error| internal(&error.into()))?;
        let cloud = here.host.cloud;
        match self.sweeps.guard(|guard| guard.take_turn(cloud, host, Instant::now().into_std())) {
            Ok(()) => Ok(cloud),
            Err(other) => {
                Err(Problem::new(Code::OperationInProgress, format!("host {other} is sweeping this cloud's store")))
            }
        }
    }

    /// Why the controller's own store may not be swept. Hosts that it has not heard since its start may run guests that stand on
    /// images in it of which the records do not know.
    pub(super) async fn own_doubt(&self) -> Result<Option<String>, EngineError> {
        if let Some(doubt) = self.doubt().await? {
            return Ok(Some(doubt));
        }
        let hosts = self.state.list::<HostRecord>().await?;
        let there = hosts.iter().filter(|host| !host.is_removed).map(|host| host.host.id);
        let unheard = self.sweeps.guard(|guard| guard.unheard(there));
        let first = hosts.iter().find(|host| unheard.contains(&host.host.id));
        Ok(first.map(|host| {
            format!("host {} has told nothing since this controller's start: nothing is removed before", host.host.name)
        }))
    }

    pub(super) async fn tell_own_doubt(&self, doubt: &str) -> Result<(), EngineError> {
        let mut change = Change::new();
        let data = serde_json::json!({ "store": "controller", "problem": doubt });
        change.event(EventDraft::new("store.not_swept").data(data));
        self.state.commit(&Context::system(), change).await?;
        Ok(())
    }
}
