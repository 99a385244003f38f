//! One guest: what is kept of it, how it is, and what is done for it beside.

use std::{
    collections::BTreeMap,
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
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    console,
    nbd::{self, Disk, Turn},
    xl::{Domain, Shutdown},
};

/// What the guest here is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It is being made, and nobody was told yet that it is there.
    Starting,
    /// It runs here by right, or did until it was sent.
    Owner,
    /// Likewise, but its domain is being made anew: it was reset, or has asked for it.
    Booting,
    /// Its stream is still to come, or coming, into this process of `xl`'s.
    Incoming(Option<Lasting>),
    /// All of it came; nobody has said yet that it may run.
    Arrived,
    /// It is being frozen into this file.
    Freezing(PathBuf),
    /// The file is the guest: what there is of it here never runs again.
    Frozen,
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
    /// The number of its domain, once it was made. Its UUID is the guest's own.
    pub domain: Option<u32>,
    /// The program that sends it, or did. Whether it still does, its lock tells.
    pub sender: Option<Lasting>,
}

/// How a guest of this role is whose domain is this; `None`: it is gone, or as good as gone.
pub fn run_state(domain: Option<&Domain>, role: &Role) -> Option<RunState> {
    match role {
        Role::Incoming(_) => return Some(RunState::Paused(PauseReason::Incoming)),
        Role::Starting | Role::Booting => return Some(RunState::Paused(PauseReason::Other)),
        _ => {}
    }
    let domain = domain?;
    Some(match (domain.shutdown, role) {
        (_, Role::Frozen) => RunState::Paused(PauseReason::Saving),
        (_, _) if domain.is_dying => RunState::ShuttingDown,
        (Some(Shutdown::Suspend), Role::Freezing(_)) => RunState::Paused(PauseReason::Saving),
        (Some(Shutdown::Suspend), _) => RunState::Paused(PauseReason::Departed),
        (Some(Shutdown::Crash), _) => RunState::Crashed,
        (Some(Shutdown::PowerOff | Shutdown::Reboot), _) => RunState::ShuttingDown,
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

/// What has become of a guest's disks since they were last looked after.
#[derive(Debug, Default)]
pub struct Mended {
    /// The names of those that are away, each told once.
    pub away: Vec<String>,
    /// The last that was away is there again.
    pub are_all_back: bool,
}

/// A guest that is here.
pub struct Guest {
    /// Where its record is.
    pub home: Home,
    record: Mutex<Record>,
    /// Held by who changes something about its domain.
    pub work: Arc<tokio::sync::Mutex<()>>,
    /// Whether what an agent before has left of it is as it shall be.
    settled: watch::Sender<bool>,
    /// Locked by threads for blocking work alone.
    disks: Arc<Mutex<Vec<Disk>>>,
    is_mending: AtomicBool,
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
    pub fn new(home: Home, record: Record, is_settled: bool) -> Self {
        Self {
            home,
            record: Mutex::new(record),
            work: Arc::default(),
            settled: watch::Sender::new(is_settled),
            disks: Arc::default(),
            is_mending: AtomicBool::new(false),
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

    /// Nothing is left to be done with it from an agent before.
    pub fn settle(&self) {
        self.settled.send_replace(true);
    }

    /// Waits until it is settled.
    ///
    /// # Errors
    /// When it takes too long.
    pub async fn until_settled(&self, budget: Duration) -> BackendResult<()> {
        let mut settled = self.settled.subscribe();
        let waited = timeout(budget, settled.wait_for(|is_settled| *is_settled)).await;
        let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
        let late = || BackendError::Deadline { what: "settle a guest that was found again", budget_ms };
        if waited.is_ok_and(|waited| waited.is_ok()) { Ok(()) } else { Err(late()) }
    }

    /// Whether it is settled.
    pub fn is_settled(&self) -> bool {
        *self.settled.borrow()
    }

    /// Changes what is kept of it, for who comes after as well.
    async fn change(&self, change: impl FnOnce(&mut Record)) -> BackendResult<()> {
        let mut record = self.record();
        change(&mut record);
        let (home, kept) = (self.home.clone(), record.clone());
        blocking("keep a guest's record", move || home.write(&kept)).await?;
        *lock(&self.record) = record;
        Ok(())
    }

    /// Changes what it is. The caller holds its work, as for all of these.
    pub async fn mark(&self, role: Role) -> BackendResult<()> {
        self.change(|record| record.role = role).await
    }

    /// It runs here by right, under this epoch.
    pub async fn own(&self, epoch: Epoch) -> BackendResult<()> {
        self.change(|record| (record.epoch, record.role) = (epoch, Role::Owner)).await
    }

    /// Its domain has this number.
    pub async fn is_domain(&self, id: Option<u32>) -> BackendResult<()> {
        self.change(|record| record.domain = id).await
    }

    /// This program sends it.
    pub async fn is_sent_by(&self, sender: Option<Lasting>) -> BackendResult<()> {
        self.change(|record| record.sender = sender).await
    }

    /// Its domain's UUID.
    pub fn uuid(&self) -> String {
        self.id().uuid().to_string()
    }

    /// The file that a program which sends it, or lets it run on, holds locked.
    pub fn lock_file(&self) -> PathBuf {
        self.home.folder.join("sender")
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

    /// Makes its disks' devices, or finds those that an agent before has made; their numbers, by name.
    pub async fn open_disks(&self, is_new: bool) -> BackendResult<BTreeMap<String, u32>> {
        let (id, launch, disks) = (self.id(), self.record().launch, Arc::clone(&self.disks));
        blocking("make a guest's disks", move || {
            let mut disks = lock(&disks);
            let mut devices = BTreeMap::new();
            for disk in &launch.spec.devices.disks {
                let at = launch.host.disks.get(&disk.name).ok_or(std::io::ErrorKind::NotFound)?;
                let identifier = format!("{id}:{}", disk.name);
                let opened = match is_new {
                    true => Some(Disk::connect(identifier, disk, at)?),
                    false => Disk::find(identifier, at)?,
                };
                if let Some(opened) = opened {
                    devices.insert(disk.name.clone(), opened.index);
                    disks.push(opened);
                }
            }
            Ok(devices)
        })
        .await
    }

    /// Finds its disks' devices, which an agent before has made, unless that was done.
    pub async fn find_disks(&self) -> BackendResult<()> {
        let disks = Arc::clone(&self.disks);
        let is_done = blocking("find a guest's disks", move || Ok(!lock(&disks).is_empty())).await?;
        if is_done { Ok(()) } else { self.open_disks(false).await.map(drop) }
    }

    /// Looks after its disks' connections; what there is to be told of them. Nobody else does so meanwhile.
    pub async fn mend_disks(&self) -> BackendResult<Mended> {
        if self.is_mending.swap(true, Ordering::AcqRel) {
            return Ok(Mended::default());
        }
        let disks = Arc::clone(&self.disks);
        let mended = blocking("look after a guest's disks", move || {
            let mut disks = lock(&disks);
            let (mut mended, mut is_any_back) = (Mended::default(), false);
            for disk in disks.iter_mut() {
                match disk.look_after() {
                    Some(Turn::Away) => mended.away.push(disk.name().to_owned()),
                    Some(Turn::Back) => is_any_back = true,
                    None => {}
                }
            }
            mended.are_all_back = is_any_back && !disks.iter().any(Disk::is_away);
            Ok(mended)
        })
        .await;
        self.is_mending.store(false, Ordering::Release);
        mended
    }

    /// Waits until its disks have nothing under way; who mends them is not kept from that.
    pub async fn rest_disks(&self, budget: Duration) -> BackendResult<()> {
        let disks = Arc::clone(&self.disks);
        blocking("wait for a suspended guest's disks", move || {
            let devices: Vec<u32> = lock(&disks).iter().map(|disk| disk.index).collect();
            nbd::come_to_rest(&devices, budget)
        })
        .await
    }

    /// Ends its disks' devices. Those that could not be ended stay known.
    pub async fn release_disks(&self) -> BackendResult<()> {
        let disks = Arc::clone(&self.disks);
        let ended = blocking("end a guest's disks", move || {
            let mut disks = lock(&disks);
            let mut ended = Ok(());
            disks.retain(|disk| match disk.disconnect() {
                Ok(()) => false,
                Err(error) => {
                    ended = Err(error);
                    true
                }
            });
            ended
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
            uuid: "x".to_owned(),
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
            for role in [Role::Starting, Role::Booting] {
                assert_eq!(run_state(domain, &role), paused(PauseReason::Other), "it is not gone");
            }
        }
        // Its file is the guest: it neither runs nor is it taken for one that does.
        assert_eq!(state(false, None, &Role::Frozen), paused(PauseReason::Saving));
        assert_eq!(run_state(None, &Role::Owner), None);
    }
}
