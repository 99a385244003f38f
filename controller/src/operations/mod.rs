//! Operations: what REST accepted is carried out here, through restarts, lost messages and lost hosts.
//!
//! ```text
//!   REST writes an operation (plan) ──► begin, leave_plan ──► orders ──► agents
//!                                                                          │ reports
//!          one store transaction  ◄── effects::apply ◄── handover::accept ◄┘
//!   (owner, volumes, ports, operation, events)   then: orders, overlay
//! ```
//! There is no saga state besides the records: whatever a restarted controller must do next follows from the ownership
//! records ([`OwnerRecord::orders`](supercloud_api::handover::OwnerRecord::orders)) and the list of operations that have not
//! ended. Orders are repeated every [`Pace::repeat`] while something is open; reports are checked by the pure protocol.

mod assignment;
pub mod checks;
mod delete;
pub mod effects;
mod follow_up;
mod group;
mod guest_door;
mod handler;
mod happenings;
mod import;
mod lease;
pub mod points;
pub mod progress;
mod repeats;
mod report;
mod sweep_doubts;
mod sweep_guard;
pub mod sweeps;

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use supercloud_api::{
    handover::{Owner, OwnerRecord},
    ids::{Epoch, GuestId, HostId, OperationId},
    link::Announced,
};
use supercloud_storage::backend::DirStore;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    ca::Authority,
    chain,
    consoles::Consoles,
    fencing::Claim,
    flows::FlowBoard,
    keys::Keys,
    leases::LeaseBoard,
    link::Sessions,
    paths::PathBoard,
    state::{AsConflict, GuestRecord, HostRecord, LiveHosts, OperationRecord, Seen, State, StateError, Work},
};
use checks::CheckBoard;
pub use guest_door::{GuestDoor, not_owned};
use points::PointBoard;
use progress::ProgressBoard;
use sweeps::SweepBoard;

/// How often the engine does what it repeats, and how long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Orders are repeated this often while something is open.
    pub repeat: Duration,
    /// What is settled (a host holds blocks of a guest that does nothing) is told this often.
    pub settled: Duration,
    /// Progress is written this often.
    pub flush: Duration,
    /// Overlay views are looked at this often even when nobody says that something changed.
    pub look: Duration,
    /// An operation's time to begin, while another one or missing blocks hold its guest.
    pub plan_budget: Duration,
    /// The destination's time to prepare.
    pub prepare_budget: Duration,
    /// How long a start or a thaw may stand still between then and its switch.
    pub copy_budget: Duration,
    /// As `copy_budget`, of a freeze: its guest is paused all the while.
    pub freeze_budget: Duration,
    /// How long a guest that moves may be paused before the switch: then its source gets it back.
    pub switch_budget: Duration,
    /// All chunk stores are swept this often; never unasked when absent.
    pub sweep: Option<Duration>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            repeat: Duration::from_secs(2),
            settled: Duration::from_secs(120),
            flush: Duration::from_millis(500),
            look: Duration::from_secs(5),
            plan_budget: Duration::from_secs(600),
            prepare_budget: Duration::from_secs(180),
            copy_budget: Duration::from_secs(30 * 60),
            freeze_budget: Duration::from_secs(300),
            switch_budget: Duration::from_secs(120),
            sweep: Some(Duration::from_secs(3600)),
        }
    }
}

/// How agents and guests are told to reach the controller.
#[derive(Debug, Clone)]
pub struct Reach {
    /// Where agents dial the link and fetch chunks: `address:port`.
    pub link_address: String,
    /// The API's URL, for guests' own tokens.
    pub api_url: String,
    /// SHA-256 of the controller's certificate on the link, hex.
    pub certificate_sha256: String,
}

/// Why a step of the engine failed. Nothing has changed then; it is tried again with the next report or repeat.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The state.
    #[error("{0}")]
    State(#[from] StateError),
    /// A guest's ownership record contradicts itself.
    #[error("an ownership record is damaged")]
    Record(#[from] supercloud_api::handover::RecordError),
    /// What a record refers to is not what it should be.
    #[error("{0}")]
    Broken(String),
}

impl AsConflict for EngineError {
    fn is_conflict(&self) -> bool {
        matches!(self, Self::State(error) if error.is_conflict())
    }
}

/// The engine. One per controller, shared by all sessions.
#[derive(Debug)]
pub struct Engine {
    pub(crate) state: State,
    pub(crate) sessions: Sessions,
    pub(crate) live: LiveHosts,
    pub(crate) keys: Arc<Keys>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) reach: Reach,
    pub(crate) progress: ProgressBoard,
    pub(crate) store: Arc<DirStore>,
    pub(crate) uploads: PathBuf,
    /// The overlay changed.
    pub(crate) overlay: Arc<Notify>,
    imports: mpsc::Sender<OperationId>,
    /// Imports that wait or run: none is queued twice.
    queued: Mutex<HashSet<OperationId>>,
    /// Guests whose cloud is known to have all that their volumes stand on, at which epoch: only to save looking again.
    settled_bases: Mutex<HashMap<GuestId, Epoch>>,
    /// Guests of which hosts have told and this store knows nothing; people were told.
    unknown_guests: Mutex<HashSet<(HostId, GuestId)>>,
    /// What hosts told last of their providers' announcements: repeated with each heartbeat.
    announcements: Mutex<HashMap<HostId, Announced>>,
    /// Removed hosts that came back, and when people were told.
    returns: Mutex<HashMap<HostId, tokio::time::Instant>>,
    happenings: happenings::Happenings,
    /// When this engine was made (wall time).
    began_ms: u64,
    pub(crate) pace: Pace,
    /// Where sweeps are asked for.
    pub(crate) sweeps: SweepBoard,
    pub(crate) consoles: Consoles,
    /// Where checks of volumes are asked for.
    pub(crate) checks: CheckBoard,
    /// Where points of volumes' histories are asked for.
    pub(crate) points: PointBoard,
    /// What agents measure of the ways between them.
    pub(crate) paths: PathBoard,
    /// Where flows of ports are asked for.
    pub(crate) flows: FlowBoard,
    /// What was granted to hosts.
    pub(crate) leases: LeaseBoard,
    /// Whether this controller grants.
    pub(crate) claim: Claim,
    /// Hosts that know `predictive`, as they said when they came.
    knows_predictive: Mutex<HashSet<HostId>>,
    /// What hosts said last that they can.
    abilities: Mutex<HashMap<HostId, handler::Abilities>>,
    /// What carries out what guests ask.
    guest_door: OnceLock<Arc<dyn GuestDoor>>,
    /// Parts of groups' operations that are ready.
    ready: group::ReadyBoard,
}

/// The hosts that have to do with a guest.
fn hosts_of(owner: &OwnerRecord) -> Vec<HostId> {
    let mut hosts: Vec<HostId> = owner.holders.iter().map(|holder| holder.host).collect();
    if let Owner::Host(host) = owner.owner {
        hosts.push(host);
    }
    if let Some(operation) = &owner.operation {
        hosts.extend(operation.source());
        hosts.extend(operation.kind.destination());
    }
    hosts
}

/// What the engine is made of.
#[derive(Debug)]
pub struct Parts {
    /// The records.
    pub state: State,
    /// The open links.
    pub sessions: Sessions,
    /// Hosts that are connected.
    pub live: LiveHosts,
    /// Root key and ticket key.
    pub keys: Arc<Keys>,
    /// The CA.
    pub authority: Arc<Authority>,
    /// How to be reached.
    pub reach: Reach,
    /// Where REST looks for the newest progress.
    pub progress: ProgressBoard,
    /// The origin store, in which images lie.
    pub store: Arc<DirStore>,
    /// Where REST puts uploads.
    pub uploads: PathBuf,
    /// Where REST asks for sweeps of stores.
    pub sweeps: SweepBoard,
    /// Consoles that somebody looks at.
    pub consoles: Consoles,
    /// Where REST asks for checks of volumes.
    pub checks: CheckBoard,
    /// Where REST asks for points of volumes' histories.
    pub points: PointBoard,
    /// Where REST looks for the ways between hosts.
    pub paths: PathBoard,
    /// Where REST asks for flows of ports.
    pub flows: FlowBoard,
    /// What was granted to hosts.
    pub leases: LeaseBoard,
    /// Whether this controller grants.
    pub claim: Claim,
}

/// Imports that may wait.
const IMPORTS_AT_MOST: usize = 1024;

impl Engine {
    /// The engine, and the queue of imports for [`Engine::run`].
    #[must_use]
    pub fn new(parts: Parts) -> (Arc<Self>, mpsc::Receiver<OperationId>) {
        Self::at_pace(parts, Pace::default())
    }

    /// As [`Engine::new`], at another pace.
    #[must_use]
    pub fn at_pace(parts: Parts, pace: Pace) -> (Arc<Self>, mpsc::Receiver<OperationId>) {
        let (imports, queue) = mpsc::channel(IMPORTS_AT_MOST);
        let Parts { state, sessions, live, keys, authority, reach, .. } = parts;
        let (progress, store, uploads) = (parts.progress, parts.store, parts.uploads);
        let (sweeps, consoles, checks, points) = (parts.sweeps, parts.consoles, parts.checks, parts.points);
        let (paths, flows) = (parts.paths, parts.flows);
        let (leases, claim) = (parts.leases, parts.claim);
        let overlay = Arc::new(Notify::new());
        let queued = Mutex::default();
        let engine = Self {
            state,
            sessions,
            live,
            keys,
            authority,
            reach,
            progress,
            store,
            uploads,
            overlay,
            imports,
            queued,
            settled_bases: Mutex::default(),
            unknown_guests: Mutex::default(),
            announcements: Mutex::default(),
            returns: Mutex::default(),
            happenings: happenings::Happenings::default(),
            began_ms: supercloud_api::unix_ms(),
            pace,
            sweeps,
            consoles,
            checks,
            points,
            paths,
            flows,
            leases,
            claim,
            knows_predictive: Mutex::default(),
            abilities: Mutex::default(),
            guest_door: OnceLock::new(),
            ready: group::ReadyBoard::default(),
        };
        (Arc::new(engine), queue)
    }

    /// Carries operations out until cancelled. Everything it starts ends with it.
    pub async fn run(self: Arc<Self>, imports: mpsc::Receiver<OperationId>, cancel: CancellationToken) {
        tokio::join!(
            self.follow(cancel.clone()),
            self.repeat(cancel.clone()),
            self.flush(cancel.clone()),
            self.push_overlay(cancel.clone()),
            self.write_happenings(cancel.clone()),
            self.sweep_stores(cancel.clone()),
            self.send_checks(cancel.clone()),
            self.take_points(cancel.clone()),
            self.import_all(imports, cancel),
        );
    }

    /// Picks up every operation that has not ended, and every change of one (a wish to cancel).
    async fn follow(&self, cancel: CancellationToken) {
        let mut follower = self.state.follow::<OperationRecord>();
        loop {
            let seen = tokio::select! {
                seen = follower.next() => seen,
                () = cancel.cancelled() => return,
            };
            match seen {
                Ok(Seen::Put(record)) if !record.operation.phase.is_terminal() => {
                    if let Err(error) = self.take_up(&record.value).await {
                        warn!(operation = %record.operation.id, "cannot go on now: {}", chain(&error));
                    }
                }
                Ok(Seen::Put(record)) => self.progress.forget(record.operation.id),
                Ok(_) => {}
                Err(error) => warn!("an operation's record cannot be read: {}", chain(&error)),
            }
        }
    }

    /// Does what an operation's record asks for now.
    async fn take_up(&self, record: &OperationRecord) -> Result<(), EngineError> {
        let operation = &record.operation;
        match &record.work {
            Work::ImageImport { .. } => {
                let mut queued = self.queued.lock().unwrap_or_else(PoisonError::into_inner);
                if !queued.contains(&operation.id) && self.imports.try_send(operation.id).is_ok() {
                    // When the queue is full the repeat brings it again.
                    queued.insert(operation.id);
                }
                Ok(())
            }
            Work::GuestDelete => self.delete_step(operation.id).await,
            Work::Group => self.group_step(record).await,
            // Carried out by whoever speaks with providers: see `crate::renting`.
            Work::HostRent | Work::HostReturn => Ok(()),
            _ if operation.is_cancel_requested => self.cancel(operation.id).await,
            Work::GuestMirror { is_failing_over: true, .. } if operation.phase == supercloud_api::Phase::Copy => {
                match (operation.guest, operation.source) {
                    (Some(guest), Some(host)) => self.promote(guest, host, operation.id).await,
                    _ => Ok(()),
                }
            }
            _ if operation.phase == supercloud_api::Phase::Plan => self.begin(operation.id).await,
            _ => Ok(()),
        }
    }

    /// Repeats orders and enforces deadlines, for as long as something is open.
    async fn repeat(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(self.pace.repeat);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut rounds = repeats::Rounds::default();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = cancel.cancelled() => return,
            }
            if let Err(error) = self.repeat_once(&mut rounds).await {
                warn!("orders could not be repeated: {}", chain(&error));
            }
        }
    }

    async fn repeat_once(&self, rounds: &mut repeats::Rounds) -> Result<(), EngineError> {
        for id in self.state.active_operations().await? {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { continue };
            let step = async {
                self.take_up(&record.value).await?;
                self.enforce_deadlines(&record.value).await
            };
            if let Err(error) = step.await {
                warn!(operation = %id, "cannot go on now: {}", chain(&error));
            }
        }
        let mut removed = self.state.list::<HostRecord>().await?;
        removed.retain(|host| host.is_removed);
        let removed: HashSet<HostId> = removed.iter().map(|host| host.host.id).collect();
        for host in &removed {
            self.sessions.drop_host(*host);
        }
        let guests = self.state.list::<GuestRecord>().await?;
        self.repeat_orders(&guests, rounds).await;
        if removed.is_empty() {
            return Ok(());
        }
        for guest in guests {
            let lost = hosts_of(&guest.owner).into_iter().filter(|host| removed.contains(host));
            for host in lost.collect::<HashSet<_>>() {
                if let Err(error) = self.note_lost(guest.guest.id, host).await {
                    warn!(%host, "not everything that follows from its removal is done: {}", chain(&error));
                }
            }
        }
        Ok(())
    }

    /// Guests that a host owns.
    pub(crate) async fn owned_by(
        &self,
        host: HostId,
    ) -> Result<Vec<(GuestId, supercloud_api::ids::Epoch)>, StateError> {
        let guests = self.state.list::<GuestRecord>().await?;
        Ok(guests
            .iter()
            .filter(|guest| guest.owner.is_owned_by(host, guest.owner.epoch))
            .map(|guest| (guest.guest.id, guest.owner.epoch))
            .collect())
    }

    /// Writes the newest progress of operations into their records.
    async fn flush(&self, cancel: CancellationToken) {
        let mut ticks = tokio::time::interval(self.pace.flush);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = cancel.cancelled() => return,
            }
            for id in self.progress.take_unwritten() {
                match self.write_progress(id).await {
                    Ok(()) => {}
                    // Somebody else just wrote the record; the next tell brings it again.
                    Err(error) if error.is_conflict() => {}
                    Err(error) => warn!(operation = %id, "its progress could not be written: {}", chain(&error)),
                }
            }
        }
    }

    async fn write_progress(&self, id: OperationId) -> Result<(), EngineError> {
        let Some(before) = self.state.read::<OperationRecord>(&id).await? else {
            self.progress.forget(id);
            return Ok(());
        };
        if before.operation.phase.is_terminal() {
            self.progress.forget(id);
            return Ok(());
        }
        let mut now = before.value.clone();
        self.progress.apply(id, &mut now.operation.progress);
        if now == before.value {
            return Ok(());
        }
        let mut change = crate::state::Change::new();
        change.update(&before, &now);
        self.state.commit(&crate::state::Context::system(), change).await?;
        Ok(())
    }

    /// Logs and raises what people must hear of; the event is written by the caller's change.
    pub(crate) fn raise(alarm: supercloud_api::handover::Alarm) {
        warn!("ALARM: {alarm}");
    }

    /// Says what happened to an operation, for the log.
    pub(crate) fn log_phase(operation: &supercloud_api::Operation) {
        info!(operation = %operation.id, kind = ?operation.kind, phase = ?operation.phase, "operation");
    }
}
