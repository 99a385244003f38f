//! One guest: what is kept of it, how it is, and what is done for it beside.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use supercloud_blanket::{
    BackendError, BackendResult, Launch,
    backend::{PauseReason, RunState},
    home::Home,
    lasting::Lasting,
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    console,
    nbd::{self, Disk},
    xl::{Domain, Shutdown},
};

/// What the guest here is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It runs here by right, or did until it was sent.
    Owner,
    /// Its stream is still to come, or coming, into this process of `xl`'s.
    Incoming(Option<Lasting>),
    /// All of it came; nobody has said yet that it may run.
    Arrived,
    /// It is being frozen into this file.
    Freezing(PathBuf),
}

/// What an agent that comes after must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What was started.
    pub launch: Launch,
    /// Under which epoch it is here.
    pub epoch: Epoch,
    /// What it is.
    pub role: Role,
}

/// How a guest of this role is whose domain is this; `None`: it is gone, or as good as gone.
pub fn run_state(domain: Option<&Domain>, role: &Role) -> Option<RunState> {
    if let Role::Incoming(_) = role {
        return Some(RunState::Paused(PauseReason::Incoming));
    }
    let domain = domain?;
    Some(match (domain.shutdown, role) {
        (Some(Shutdown::Suspend), Role::Freezing(_)) => RunState::Paused(PauseReason::Saving),
        (Some(Shutdown::Suspend), _) => RunState::Paused(PauseReason::Departed),
        (Some(Shutdown::Crash), _) => RunState::Crashed,
        (Some(Shutdown::PowerOff | Shutdown::Reboot), _) => RunState::ShuttingDown,
        (None, _) if domain.is_dying => RunState::ShuttingDown,
        (None, Role::Arrived) if domain.is_paused => RunState::Paused(PauseReason::Arrived),
        (None, Role::Freezing(_)) if domain.is_paused => RunState::Paused(PauseReason::Saving),
        (None, _) if domain.is_paused => RunState::Paused(PauseReason::Asked),
        (None, _) => RunState::Running,
    })
}

/// In words, for errors.
pub fn words(state: RunState) -> String {
    match state {
        RunState::Running => "running",
        RunState::ShuttingDown => "shutting down",
        RunState::Crashed => "crashed",
        RunState::Paused(PauseReason::Asked) => "paused on request",
        RunState::Paused(PauseReason::Departed) => "paused as the source of a move",
        RunState::Paused(PauseReason::Incoming) => "still incoming",
        RunState::Paused(PauseReason::Arrived) => "arrived and waiting for the grant",
        RunState::Paused(_) => "paused",
    }
    .to_owned()
}

pub fn failed(what: &'static str) -> impl Fn(std::io::Error) -> BackendError {
    move |error| BackendError::Failed { what, detail: error.to_string() }
}

/// Blocking work of this back end.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> BackendResult<T> {
    let done = tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other);
    done.and_then(|done| done).map_err(failed(what))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest that is here.
pub struct Guest {
    /// Where its record is.
    pub home: Home,
    record: Mutex<Record>,
    /// Held by who changes something about its domain.
    pub work: tokio::sync::Mutex<()>,
    disks: Arc<Mutex<Vec<Disk>>>,
    console: Mutex<Option<JoinHandle<()>>>,
    arrival: Mutex<Option<JoinHandle<BackendResult<()>>>>,
    is_cancelled: AtomicBool,
    cancelled: Notify,
    is_leaving: AtomicBool,
    /// Bytes a second at which it may be sent; 0: as fast as it goes.
    pub limit: AtomicU64,
}

impl Drop for Guest {
    fn drop(&mut self) {
        for task in [self.console.get_mut().unwrap_or_else(PoisonError::into_inner).take()].into_iter().flatten() {
            task.abort();
        }
        if let Some(task) = self.arrival.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

/// It is on its way out as long as this lives.
pub struct Leaving<'a>(&'a Guest);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.is_leaving.store(false, Ordering::Release);
    }
}

impl Guest {
    pub fn new(home: Home, record: Record, disks: Vec<Disk>) -> Self {
        Self {
            home,
            record: Mutex::new(record),
            work: tokio::sync::Mutex::new(()),
            disks: Arc::new(Mutex::new(disks)),
            console: Mutex::default(),
            arrival: Mutex::default(),
            is_cancelled: AtomicBool::new(false),
            cancelled: Notify::new(),
            is_leaving: AtomicBool::new(false),
            limit: AtomicU64::new(0),
        }
    }

    pub fn id(&self) -> GuestId {
        self.home.guest
    }

    pub fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// Changes what it is, for who comes after as well.
    pub async fn mark(&self, epoch: Epoch, role: Role) -> BackendResult<()> {
        let record = Record { epoch, role, ..self.record() };
        let (home, kept) = (self.home.clone(), record.clone());
        blocking("keep a guest's record", move || home.write(&kept)).await?;
        *lock(&self.record) = record;
        Ok(())
    }

    /// Serves the console of its domain; that of one before is not served any more.
    pub fn serve_console(&self, domain: u32, budget: Duration) {
        let task = tokio::spawn(console::serve(self.record().launch, domain, budget));
        if let Some(old) = lock(&self.console).replace(task) {
            old.abort();
        }
    }

    /// Its domain is gone: its console is not served any more.
    pub fn end_console(&self) {
        if let Some(old) = lock(&self.console).take() {
            old.abort();
        }
    }

    /// Who takes its stream; who did before is stopped.
    pub fn set_arrival(&self, task: Option<JoinHandle<BackendResult<()>>>) {
        let old = std::mem::replace(&mut *lock(&self.arrival), task);
        if let Some(old) = old {
            old.abort();
        }
    }

    /// Who takes its stream, to be waited for.
    pub fn take_arrival(&self) -> Option<JoinHandle<BackendResult<()>>> {
        lock(&self.arrival).take()
    }

    /// Its disks' devices, by name.
    pub fn devices(&self) -> std::collections::BTreeMap<String, u32> {
        let record = self.record();
        let names = record.launch.spec.devices.disks.into_iter().map(|disk| disk.name);
        names.zip(lock(&self.disks).iter().map(|disk| disk.index)).collect()
    }

    /// Looks after its disks' connections; the names of those that have none.
    pub async fn mend_disks(&self) -> BackendResult<Vec<String>> {
        let disks = Arc::clone(&self.disks);
        let names: Vec<String> = self.record().launch.spec.devices.disks.into_iter().map(|disk| disk.name).collect();
        blocking("look after a guest's disks", move || {
            let mut disks = lock(&disks);
            let tried = disks.iter_mut().map(Disk::mend);
            Ok(names.into_iter().zip(tried).filter(|(_, mended)| mended.is_err()).map(|(name, _)| name).collect())
        })
        .await
    }

    /// Waits until its disks have nothing under way.
    pub async fn rest_disks(&self, budget: Duration) -> BackendResult<()> {
        let disks = Arc::clone(&self.disks);
        blocking("wait for a suspended guest's disks", move || nbd::come_to_rest(&lock(&disks), budget)).await
    }

    /// Ends its disks' devices.
    pub async fn release_disks(&self) -> BackendResult<()> {
        let disks = Arc::clone(&self.disks);
        let ended = blocking("end a guest's disks", move || {
            let disks = std::mem::take(&mut *lock(&disks));
            disks.iter().map(Disk::disconnect).fold(Ok(()), std::io::Result::and)
        });
        ended.await
    }

    /// Begins to send it; `None` when it is being sent already.
    pub fn leave(&self) -> Option<Leaving<'_>> {
        let was_leaving = self.is_leaving.swap(true, Ordering::AcqRel);
        self.is_cancelled.store(was_leaving && self.is_cancelled(), Ordering::Release);
        (!was_leaving).then_some(Leaving(self))
    }

    pub fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Acquire)
    }

    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    /// Gives up sending it, if it is being sent.
    pub fn cancel(&self) {
        if self.is_leaving() {
            self.is_cancelled.store(true, Ordering::Release);
            self.cancelled.notify_waiters();
        }
    }

    /// Ends when sending it is given up.
    pub async fn until_cancelled(&self) {
        loop {
            let told = self.cancelled.notified();
            if self.is_cancelled() {
                return;
            }
            told.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_tells_a_departed_guest_from_an_arrived_one() {
        let domain = |is_paused, shutdown| Domain {
            name: "x".to_owned(),
            id: 3,
            memory_mib: 64,
            is_paused,
            shutdown,
            is_dying: false,
        };
        let state = |is_paused, shutdown, role: &Role| run_state(Some(&domain(is_paused, shutdown)), role);
        let (paused, still) = (|reason| Some(RunState::Paused(reason)), Some(Shutdown::Suspend));
        let freezing = Role::Freezing("/f".into());
        assert_eq!(state(false, None, &Role::Owner), Some(RunState::Running));
        assert_eq!(state(true, None, &Role::Owner), paused(PauseReason::Asked));
        assert_eq!(state(true, None, &Role::Arrived), paused(PauseReason::Arrived));
        assert_eq!(state(false, still, &Role::Owner), paused(PauseReason::Departed));
        // It arrived, ran, and left again before its mark was renewed.
        assert_eq!(state(false, still, &Role::Arrived), paused(PauseReason::Departed));
        assert_eq!(state(false, still, &freezing), paused(PauseReason::Saving));
        assert_eq!(state(false, Some(Shutdown::Crash), &Role::Owner), Some(RunState::Crashed));
        assert_eq!(state(false, Some(Shutdown::PowerOff), &Role::Owner), Some(RunState::ShuttingDown));
        // Half of it is there, or nothing yet.
        for domain in [None, Some(&domain(true, None))] {
            assert_eq!(run_state(domain, &Role::Incoming(None)), paused(PauseReason::Incoming));
        }
        assert_eq!(run_state(None, &Role::Owner), None);
    }
}
