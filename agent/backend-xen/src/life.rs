//! Starting, stopping, pausing and resetting guests; and taking up those that an agent before has left.

use std::{ffi::OsStr, path::PathBuf, sync::Arc, time::Duration};

use supercloud_blanket::{
    BackendError, BackendResult, Launch,
    backend::{GuestEvent, GuestInfo, PauseReason, RunState, StopMode, StopReason},
    home::Home,
};
use supercloud_ids::{Epoch, GuestId};
use tokio::time::{Instant, sleep};

use crate::{
    card,
    guest::{Guest, Record, Role, blocking, run_state, words},
    inner::Inner,
    xl,
};

/// How often a guest that was asked to power off is looked at.
const POWER_OFF_POLL: Duration = Duration::from_millis(500);

/// What has left a guest as it is, and did not get to undoing that.
#[derive(Debug, PartialEq, Eq)]
enum LeftBehind {
    /// A freeze into this file that failed, and whose rolling back did as well.
    ByFreeze(PathBuf),
    /// A copy, where nothing else lets it run on.
    ByCopy,
}

/// Whether a guest that shall run has to be freed of something first. The caller holds its work: nothing of that goes on.
fn left_behind(state: Option<RunState>, role: &Role, can_move_live: bool) -> Option<LeftBehind> {
    match (state?, role) {
        (RunState::Running | RunState::Paused(PauseReason::Saving), Role::Freezing(file)) => {
            Some(LeftBehind::ByFreeze(file.clone()))
        }
        // Where guests move live, the end of the move says what becomes of it.
        (RunState::Paused(PauseReason::Departed), _) if !can_move_live => Some(LeftBehind::ByCopy),
        _ => None,
    }
}

impl Inner {
    /// Makes its domain and lets it run. The caller holds its work, and there is no domain of it.
    ///
    /// # Errors
    /// When it does not run; there may be a domain then.
    pub async fn boot(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let config = self.domain_file(guest);
        let words = [OsStr::new("create"), OsStr::new("-q"), OsStr::new("-p"), OsStr::new("-e"), config.as_os_str()];
        xl::xl("make a domain", self.config.domain_budget, words).await?;
        let domain = self.adopt_domain(guest).await?;
        card::plug(&guest.record().launch, domain, self.config.call_budget).await?;
        // Before it runs: from then on it is there, whoever asks.
        guest.mark(Role::Owner).await?;
        self.unpause(domain).await
    }

    async fn unpause(&self, domain: u32) -> BackendResult<()> {
        xl::xl("let a domain run", self.config.call_budget, ["unpause", &domain.to_string()]).await.map(drop)
    }

    /// Makes its domain anew. The caller holds its work. A guest that cannot boot again is gone.
    ///
    /// # Errors
    /// When it does not boot.
    pub async fn boot_again(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        guest.mark(Role::Booting).await?;
        self.destroy(guest).await?;
        guest.is_domain(None).await?;
        if let Err(error) = self.boot(guest).await {
            self.release(guest, StopReason::Failed).await?;
            return Err(error);
        }
        self.tell(guest.id(), GuestEvent::Rebooted);
        Ok(())
    }

    pub async fn start_guest(&self, launch: Launch) -> BackendResult<GuestInfo> {
        let (guest, _work) = self.take_in(launch, Role::Starting).await?;
        if let Err(error) = self.boot(&guest).await {
            self.release(&guest, StopReason::Failed).await?;
            return Err(error);
        }
        self.tell(guest.id(), GuestEvent::Started);
        self.info(&guest).await
    }

    pub async fn stop_guest(&self, id: GuestId, mode: StopMode) -> BackendResult<()> {
        let Some(guest) = self.settled(id).await? else { return Ok(()) };
        // Who sends it holds its work until it is given up.
        guest.cancel();
        let _work = guest.work.lock().await;
        self.until_alone(&guest).await?;
        if let StopMode::Graceful { budget } = mode {
            let end = Instant::now() + budget;
            let asked = match self.running_domain(&guest, "switch it off").await {
                Ok(domain) => {
                    xl::xl("ask a guest to power off", self.config.call_budget, ["shutdown", &domain.to_string()]).await
                }
                Err(error) => Err(error),
            };
            // One that stands still cannot answer, and one that does not is ended as well.
            while asked.is_ok() && Instant::now() < end {
                match self.state(&guest).await? {
                    Some(RunState::Running) => sleep(POWER_OFF_POLL).await,
                    Some(RunState::ShuttingDown) | None => return self.release(&guest, StopReason::PoweredOff).await,
                    Some(_) => break,
                }
            }
        }
        self.release(&guest, StopReason::Killed).await
    }

    pub async fn pause_guest(&self, id: GuestId) -> BackendResult<()> {
        let (guest, _) = self.expect(id).await?;
        if guest.is_leaving() {
            return Err(BackendError::WrongState { guest: id, wants: "pause it", is: "being sent".to_owned() });
        }
        let _work = guest.work.lock().await;
        if let Some(RunState::Paused(_)) = self.state(&guest).await? {
            return Ok(());
        }
        let domain = self.running_domain(&guest, "pause it").await?;
        xl::xl("pause a domain", self.config.call_budget, ["pause", &domain.to_string()]).await?;
        self.tell(id, GuestEvent::Paused(PauseReason::Asked));
        Ok(())
    }

    pub async fn resume_guest(&self, id: GuestId, epoch: Epoch) -> BackendResult<()> {
        let guest = self.settled(id).await?.ok_or(BackendError::NoSuchGuest { guest: id })?;
        let _work = guest.work.lock().await;
        if let Some(left) = left_behind(self.state(&guest).await?, &guest.record().role, self.no_live.is_none()) {
            // Whoever sends it may be about to suspend it.
            self.until_alone(&guest).await?;
            match left {
                LeftBehind::ByFreeze(file) => self.thaw_here(&guest, &file).await?,
                LeftBehind::ByCopy => self.run_on(&guest).await?,
            }
        }
        let domain = self.domain(&guest).await?;
        match (run_state(domain.as_ref(), &guest.record().role), domain) {
            (Some(RunState::Running), _) => {}
            (Some(RunState::Paused(PauseReason::Asked | PauseReason::Arrived)), Some(domain)) => {
                // An agent before may have died between the domain's making and this.
                card::plug(&guest.record().launch, domain.id, self.config.call_budget).await?;
                self.unpause(domain.id).await?;
            }
            (Some(state), _) => {
                return Err(BackendError::WrongState { guest: id, wants: "resume it", is: words(state) });
            }
            (None, _) => return Err(BackendError::NoSuchGuest { guest: id }),
        }
        // The guest runs: from here on nothing may fail. `begin` writes the mark again before it matters.
        if let Err(error) = guest.own(epoch).await {
            tracing::warn!(guest = %id, %error, "cannot renew a guest's record");
        }
        self.tell(id, GuestEvent::Resumed);
        Ok(())
    }

    pub async fn reset_guest(&self, id: GuestId) -> BackendResult<()> {
        let (guest, _) = self.expect(id).await?;
        if guest.is_leaving() {
            return Err(BackendError::WrongState { guest: id, wants: "reset it", is: "being sent".to_owned() });
        }
        let _work = guest.work.lock().await;
        match self.state(&guest).await? {
            Some(state @ RunState::Paused(reason)) if reason != PauseReason::Asked => {
                Err(BackendError::WrongState { guest: id, wants: "reset it", is: words(state) })
            }
            Some(_) => self.boot_again(&guest).await,
            None => Err(BackendError::NoSuchGuest { guest: id }),
        }
    }

    /// Takes up a guest that an agent before has left: known from here on, settled later. `None`: there is nothing of it.
    ///
    /// # Errors
    /// When its record cannot be read.
    pub async fn find_again(&self, home: Home) -> BackendResult<Option<Arc<Guest>>> {
        let at = home.clone();
        let Some(record) = blocking("read a guest's record", move || at.read::<Record>()).await? else {
            blocking("remove a guest's folder", move || home.remove()).await?;
            return Ok(None);
        };
        Ok(Some(Arc::new(Guest::new(home, record, false))))
    }

    /// Makes of a guest that was found again what it shall be. May be done again after an error.
    ///
    /// # Errors
    /// When it is not so yet.
    pub async fn settle(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let _work = guest.work.lock().await;
        // One that still sends finds its output gone, and lets the domain run on.
        self.until_alone(guest).await?;
        guest.is_sent_by(None).await?;
        guest.find_disks().await?;
        let (role, state) = (guest.record().role, self.state(guest).await?);
        tracing::info!(guest = %guest.id(), ?state, ?role, "a guest was found again");
        match role {
            Role::Incoming(_) | Role::Starting => return self.release(guest, StopReason::Failed).await,
            Role::Frozen => return self.release(guest, StopReason::Frozen).await,
            Role::Freezing(file) => {
                if self.settle_freeze(guest, &file, state).await? {
                    return self.release(guest, StopReason::Frozen).await;
                }
            }
            Role::Booting => return self.boot_again(guest).await,
            Role::Owner | Role::Arrived => {}
        }
        match self.domain(guest).await? {
            Some(_) => self.adopt_domain(guest).await.map(drop),
            None => self.release(guest, StopReason::Crashed).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_shall_run_is_freed_of_a_failed_freeze() {
        let freezing = Role::Freezing("/f".into());
        let by_freeze = || Some(LeftBehind::ByFreeze("/f".into()));
        let paused = |reason| Some(RunState::Paused(reason));
        for can_move_live in [false, true] {
            let left = |state, role: &Role| left_behind(state, role, can_move_live);
            assert_eq!(left(paused(PauseReason::Saving), &freezing), by_freeze());
            // It runs again, and its mark could not be renewed.
            assert_eq!(left(Some(RunState::Running), &freezing), by_freeze());
            // Without a domain the file may be all there is of it.
            for state in [None, Some(RunState::Crashed), Some(RunState::ShuttingDown)] {
                assert_eq!(left(state, &freezing), None, "{state:?}");
            }
            // The file is the guest.
            assert_eq!(left(paused(PauseReason::Saving), &Role::Frozen), None);
            assert_eq!(left(Some(RunState::Running), &Role::Owner), None);
            assert_eq!(left(paused(PauseReason::Asked), &Role::Owner), None);
            assert_eq!(left(paused(PauseReason::Arrived), &Role::Arrived), None);
        }
        let departed = |can_move_live| left_behind(paused(PauseReason::Departed), &Role::Owner, can_move_live);
        assert_eq!((departed(false), departed(true)), (Some(LeftBehind::ByCopy), None));
    }
}
