//! A hypervisor for tests: its guests are tasks that write increasing numbers to their real disks (NBD sockets of real volume
//! processes) and remember what was acknowledged. It outlives the agent, as a real one does; migration streams go through the
//! agents' real sockets. What only it can know is checked: never two running copies of one guest.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use supercloud_api::CompatClass;
use supercloud_blanket::{
    Backend, BackendError, BackendResult, BoxFuture, Launch, LazyThaw, LiveMigration, Mirroring, PostCopy,
    backend::{
        BackendEvent, Capabilities, Frozen, GuestEvent, GuestInfo, MemoryStats, PauseReason, RunState, StopMode,
        StopReason,
    },
    checkpoint::Checkpointing,
    migrate::{
        Cookie, CopyLimits, CopyOptions, MemoryMode, Performed, Transfer, TransferPhase, TransferProgress, Verdict,
    },
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{broadcast, watch},
    task::JoinHandle,
};

use crate::{
    checkpoints::Disks,
    mirroring::{Held, MIRROR, Standby},
    nbd::Nbd,
    post_copying::{Missing, PAGE_BYTES, PAGES},
};

/// The first byte of a stream that leaves all memory behind, and of one that leaves half.
const ALL_IS_LEFT: u8 = 8;
const HALF_IS_LEFT: u8 = 6;
/// Bytes between two numbers on the disk: every block of a volume gets some.
const STRIDE: u64 = 16 << 10;
const RECORD: usize = 512;
const MEMORY_BYTES: usize = 4 << 20;
const PIECES: usize = 40;
const SAVED_BYTES: usize = 17 * BLOCK_BYTES + 1;
const BLOCK_BYTES: usize = 64 << 10;

/// What the tests know about all guests, on all hosts.
#[derive(Default)]
pub struct World {
    running: Mutex<HashMap<GuestId, u32>>,
    pub violations: Mutex<Vec<String>>,
    /// Per guest: slot to the newest number that its disk acknowledged.
    pub acknowledged: Mutex<HashMap<GuestId, HashMap<u64, u64>>>,
    /// Likewise, as of its newest checkpoint.
    pub checkpointed: Mutex<Disks>,
    pub boots: AtomicU64,
    /// How long a piece of memory takes to go.
    pub piece_ms: AtomicU64,
    /// How long a page that was left behind takes to go.
    pub page_ms: AtomicU64,
    /// How long a save takes, beyond the writing.
    pub save_ms: AtomicU64,
    /// Saves end well although somebody cancels them.
    pub saves_go_on: AtomicBool,
    /// Hosts do not let a thawed guest run before its memory is there.
    pub lacks_lazy_thaws: AtomicBool,
    /// So many resumes fail.
    pub failing_resumes: AtomicU32,
}

impl World {
    fn began(&self, guest: GuestId) {
        let mut running = self.running.lock().unwrap();
        let count = running.entry(guest).or_default();
        *count += 1;
        if *count > 1 {
            self.violations.lock().unwrap().push(format!("{count} copies of {guest} run"));
        }
    }

    fn stopped(&self, guest: GuestId) {
        *self.running.lock().unwrap().entry(guest).or_default() -= 1;
    }

    /// The newest number of a guest that was acknowledged.
    pub fn newest(&self, guest: GuestId) -> u64 {
        let all = self.acknowledged.lock().unwrap();
        all.get(&guest).and_then(|slots| slots.values().max()).copied().unwrap_or(0)
    }

    pub fn running(&self, guest: GuestId) -> u32 {
        self.running.lock().unwrap().get(&guest).copied().unwrap_or(0)
    }
}

pub struct Guest {
    pub launch: Launch,
    pub epoch: Epoch,
    pub state: RunState,
    /// The guest's "memory": the next number that it writes.
    pub next: Arc<AtomicU64>,
    /// Of a mirrored guest: what it must not say yet.
    pub held: Arc<Held>,
    cpu: Option<Cpu>,
    /// It came out of this file and has not run since.
    file: Option<PathBuf>,
    /// It was kept by cuts before it ran.
    pub was_standby: bool,
}

/// The next number of a guest that came, and what it has left behind.
type Came = std::io::Result<(u64, u64)>;

/// Memory that a move in this mode leaves behind.
const fn left_bytes(memory: MemoryMode) -> u64 {
    match memory {
        MemoryMode::PreCopy => 0,
        MemoryMode::Hybrid => PAGES / 2 * PAGE_BYTES,
        MemoryMode::PostCopy => PAGES * PAGE_BYTES,
    }
}

/// The running vCPU.
struct Cpu {
    stop: watch::Sender<bool>,
    task: JoinHandle<bool>,
}

pub struct Inner {
    pub name: String,
    pub world: Arc<World>,
    pub guests: tokio::sync::Mutex<HashMap<GuestId, Guest>>,
    events: broadcast::Sender<BackendEvent>,
    pub cancels: Mutex<HashMap<GuestId, Arc<AtomicBool>>>,
    pub incoming: Mutex<HashMap<GuestId, JoinHandle<Came>>>,
    pub standbys: Mutex<HashMap<GuestId, Arc<Standby>>>,
    /// What guests lack of their memory.
    pub missing: Mutex<HashMap<GuestId, Arc<Missing>>>,
    /// Guests that were thawed before their memory was there, and of which nobody was told that it is.
    pub lazy: Mutex<std::collections::HashSet<GuestId>>,
    /// What the last of them had in its memory.
    pub thawed_as: Mutex<u64>,
    /// What is staged of each guest.
    pub staged: Mutex<HashMap<GuestId, watch::Sender<u64>>>,
    /// Until when guests may run, on the boot clock in milliseconds.
    pub leases: Mutex<HashMap<GuestId, u64>>,
    agent: AtomicU64,
    /// Why guests that are not here any more ended.
    ended: Mutex<HashMap<GuestId, StopReason>>,
}

/// A host's hypervisor.
#[derive(Clone)]
pub struct Hypervisor(pub Arc<Inner>);

pub fn class() -> CompatClass {
    CompatClass {
        back_end: "test".into(),
        accelerator: "none".into(),
        machine_version: "1".into(),
        cpu_baseline: "any".into(),
    }
}

pub fn failed(what: &'static str) -> impl Fn(std::io::Error) -> BackendError {
    move |error| BackendError::Failed { what, detail: error.to_string() }
}

impl Hypervisor {
    pub fn new(name: &str, world: &Arc<World>) -> Self {
        Self(Arc::new(Inner {
            name: name.to_owned(),
            world: world.clone(),
            guests: tokio::sync::Mutex::default(),
            events: broadcast::Sender::new(64),
            cancels: Mutex::default(),
            incoming: Mutex::default(),
            standbys: Mutex::default(),
            missing: Mutex::default(),
            lazy: Mutex::default(),
            thawed_as: Mutex::default(),
            staged: Mutex::default(),
            leases: Mutex::default(),
            agent: AtomicU64::new(0),
            ended: Mutex::default(),
        }))
    }

    /// What libvirt does when its client dies: what was only prepared is gone. Standbys that could go on stay.
    pub async fn agent_died(&self) {
        self.0.agent.fetch_add(1, Ordering::SeqCst);
        for (_, task) in self.0.incoming.lock().unwrap().drain() {
            task.abort();
        }
        self.0.standbys.lock().unwrap().retain(|_, standby| standby.has_cut());
        let standbys: Vec<GuestId> = self.0.standbys.lock().unwrap().keys().copied().collect();
        let stays = |id: &GuestId, state| state != RunState::Paused(PauseReason::Incoming) || standbys.contains(id);
        // Not dropped: a task of the agent may end a moment after it, and would take its standby's process for gone.
        for (_, staged) in self.0.staged.lock().unwrap().iter().filter(|(id, _)| !standbys.contains(id)) {
            staged.send_replace(0);
        }
        self.0.guests.lock().await.retain(|id, guest| stays(id, guest.state));
    }

    pub async fn epoch_of(&self, guest: GuestId) -> Option<(Epoch, RunState)> {
        self.0.guests.lock().await.get(&guest).map(|guest| (guest.epoch, guest.state))
    }

    /// The guest reads its whole disk and compares it with what was acknowledged; how many numbers were compared.
    pub async fn check_disk(&self, id: GuestId) -> usize {
        let (disk, cpu, is_mirror) = {
            let mut guests = self.0.guests.lock().await;
            let guest = guests.get_mut(&id).expect("the guest is here");
            (guest.launch.host.disks["disk0"].socket.clone(), guest.cpu.take(), guest.was_standby)
        };
        self.0.halt(id, cpu).await;
        let wanted = self.0.world.acknowledged.lock().unwrap().get(&id).cloned().unwrap_or_default();
        let mut nbd = Nbd::connect(&disk).await.expect("the disk is there");
        for (slot, number) in &wanted {
            let read = nbd.read(slot * STRIDE, RECORD).await.expect("the disk answers");
            // A standby may have more than was said; never less, and never half of it.
            let found = u64::from_le_bytes(read[..8].try_into().unwrap());
            let is_right = if is_mirror { found >= *number } else { found == *number };
            assert!(is_right && read == record(found), "slot {slot} of {id} does not hold {number} but {found}");
        }
        drop(nbd);
        self.0.go(id).await;
        wanted.len()
    }

    /// The guest's process dies, and with it what was done with it.
    pub async fn crash(&self, id: GuestId) {
        let gone = self.0.guests.lock().await.remove(&id).expect("the guest is here");
        self.0.halt(id, gone.cpu).await;
        self.0.ended.lock().unwrap().insert(id, StopReason::Crashed);
    }

    /// The guest switches itself off.
    pub async fn power_off(&self, id: GuestId) {
        let gone = self.0.guests.lock().await.remove(&id).expect("the guest is here");
        self.0.halt(id, gone.cpu).await;
        self.0.ended.lock().unwrap().insert(id, StopReason::PoweredOff);
        let what = GuestEvent::Stopped(StopReason::PoweredOff);
        let _ = self.0.events.send(BackendEvent::Guest { guest: id, what });
    }
}

/// A guest in a file.
pub fn saved(next: u64) -> Vec<u8> {
    // No block is another's.
    let mut bytes: Vec<u8> = (0..SAVED_BYTES).map(|at| 7 + (at / BLOCK_BYTES) as u8).collect();
    bytes[..8].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn record(number: u64) -> Vec<u8> {
    number.to_le_bytes().into_iter().cycle().take(RECORD).collect()
}

impl Inner {
    /// Lets the vCPU run.
    pub async fn go(self: &Arc<Self>, id: GuestId) {
        let mut guests = self.guests.lock().await;
        let Some(guest) = guests.get_mut(&id) else { return };
        let (stop, mut stopped) = watch::channel(false);
        let disk = guest.launch.host.disks["disk0"].socket.clone();
        let (next, held, inner) = (guest.next.clone(), guest.held.clone(), self.clone());
        let missing = self.missing.lock().unwrap().get(&id).cloned();
        guest.state = RunState::Running;
        let mut is_fenced = self.stands_still(id);
        if !is_fenced {
            self.world.began(id);
        }
        let slots = 1 << 20 >> 14;
        let task = tokio::spawn(async move {
            let run = async {
                let mut nbd = Nbd::connect(&disk).await?;
                loop {
                    // A process stands still by itself, whoever is there.
                    let was_fenced = std::mem::replace(&mut is_fenced, inner.stands_still(id));
                    match (was_fenced, is_fenced) {
                        (false, true) => inner.world.stopped(id),
                        (true, false) => inner.world.began(id),
                        _ => {}
                    }
                    if is_fenced {
                        if tokio::time::timeout(Duration::from_millis(20), stopped.changed()).await.is_ok() {
                            return Ok(false);
                        }
                        continue;
                    }
                    let number = next.load(Ordering::SeqCst);
                    let slot = number % slots;
                    if let Some(missing) = &missing {
                        // It can be stopped while it waits for memory.
                        tokio::select! {
                            biased;
                            () = missing.touch(number % PAGES) => {}
                            _ = stopped.changed() => return Ok(true),
                        }
                    }
                    nbd.write(slot * STRIDE, &record(number)).await?;
                    if !held.keeps(slot, number) {
                        inner.world.acknowledged.lock().unwrap().entry(id).or_default().insert(slot, number);
                    }
                    next.store(number + 1, Ordering::SeqCst);
                    if *stopped.borrow_and_update() {
                        return Ok::<_, std::io::Error>(true);
                    }
                    tokio::select! {
                        _ = stopped.changed() => return Ok(true),
                        () = tokio::time::sleep(Duration::from_millis(5)) => {}
                    }
                }
            };
            match run.await {
                Ok(counts) => counts,
                Err(error) => {
                    eprintln!("{}: the disk of {id} fails: {error}", inner.name);
                    inner.world.stopped(id);
                    if let Some(guest) = inner.guests.lock().await.get_mut(&id) {
                        guest.state = RunState::Paused(PauseReason::DiskError);
                    }
                    let what = GuestEvent::Paused(PauseReason::DiskError);
                    let _ = inner.events.send(BackendEvent::Guest { guest: id, what });
                    false
                }
            }
        });
        guest.cpu = Some(Cpu { stop, task });
    }

    /// Its lease is over.
    pub fn stands_still(&self, id: GuestId) -> bool {
        let until_ms = self.leases.lock().unwrap().get(&id).copied();
        until_ms.is_some_and(|until_ms| supercloud_api::lease::boot_ms() >= until_ms)
    }

    /// Stops the vCPU, after the write that is under way: as an emulator drains its disks.
    async fn halt(&self, id: GuestId, cpu: Option<Cpu>) {
        if let Some(cpu) = cpu {
            cpu.stop.send_replace(true);
            if cpu.task.await.unwrap() {
                self.world.stopped(id);
            }
        }
    }

    pub async fn pause(&self, id: GuestId, reason: PauseReason) -> BackendResult<u64> {
        let cpu = {
            let mut guests = self.guests.lock().await;
            let guest = guests.get_mut(&id).ok_or(BackendError::NoSuchGuest { guest: id })?;
            guest.cpu.take()
        };
        self.halt(id, cpu).await;
        let mut guests = self.guests.lock().await;
        let guest = guests.get_mut(&id).ok_or(BackendError::NoSuchGuest { guest: id })?;
        guest.state = RunState::Paused(reason);
        Ok(guest.next.load(Ordering::SeqCst))
    }

    /// A guest is about to run that came out of this file: no restart of the agent may bring it out again.
    fn check_that_it_is_dead(&self, file: &std::path::Path) {
        let record = std::fs::read(file.with_file_name("guest.json")).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        if file.exists() && (!record["spooled"].is_null() || !record["spooling"].is_null()) {
            self.world.violations.lock().unwrap().push(format!("{} could be thawed again", file.display()));
        }
    }

    pub async fn put(self: &Arc<Self>, launch: Launch, state: RunState, next: u64) -> BackendResult<GuestInfo> {
        launch.check()?;
        for tap in launch.host.taps.values() {
            assert!(tap.starts_with("sct"), "{tap}");
        }
        for disk in launch.host.disks.values() {
            assert!(disk.socket.exists(), "{} is not there", disk.socket.display());
        }
        let (id, epoch) = (launch.guest, launch.epoch);
        let mut guests = self.guests.lock().await;
        if guests.contains_key(&id) {
            return Err(BackendError::AlreadyThere { guest: id });
        }
        self.ended.lock().unwrap().remove(&id);
        self.missing.lock().unwrap().remove(&id);
        let (next, held) = (Arc::new(AtomicU64::new(next)), Arc::default());
        guests.insert(id, Guest { launch, epoch, state, next, held, cpu: None, file: None, was_standby: false });
        Ok(GuestInfo { guest: id, epoch, state, pid: None })
    }
}

impl Backend for Hypervisor {
    fn name(&self) -> &'static str {
        "test"
    }

    fn has_balloon(&self, _: &CompatClass) -> bool {
        true
    }

    fn capabilities(&self) -> BoxFuture<'_, BackendResult<Capabilities>> {
        Box::pin(async {
            Ok(Capabilities {
                back_end: "test".into(),
                version: "1".into(),
                classes: vec![class()],
                no_live_migration: None,
            })
        })
    }

    fn start(&self, launch: Launch) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(async move {
            let info = self.0.put(launch, RunState::Paused(PauseReason::Other), 1).await?;
            self.0.world.boots.fetch_add(1, Ordering::SeqCst);
            self.0.go(info.guest).await;
            Ok(info)
        })
    }

    fn stop(&self, guest: GuestId, _mode: StopMode) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let gone = self.0.guests.lock().await.remove(&guest);
            if let Some(gone) = gone {
                self.0.halt(guest, gone.cpu).await;
                let what = GuestEvent::Stopped(StopReason::Killed);
                let _ = self.0.events.send(BackendEvent::Guest { guest, what });
            }
            Ok(())
        })
    }

    fn pause(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move { self.0.pause(guest, PauseReason::Asked).await.map(drop) })
    }

    fn resume(&self, guest: GuestId, epoch: Epoch) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let fails = |left: u32| left.checked_sub(1);
            if self.0.world.failing_resumes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok() {
                return Err(BackendError::Failed { what: "resume", detail: "told to".into() });
            }
            let (state, file) = {
                let mut guests = self.0.guests.lock().await;
                let found = guests.get_mut(&guest).ok_or(BackendError::NoSuchGuest { guest })?;
                assert!(epoch >= found.epoch, "resumed at an older epoch");
                found.epoch = epoch;
                (found.state, found.file.take())
            };
            if let Some(file) = file {
                self.0.check_that_it_is_dead(&file);
            }
            match state {
                RunState::Running => Ok(()),
                RunState::Paused(PauseReason::Incoming | PauseReason::Departed) => {
                    Err(BackendError::WrongState { guest, wants: "resume", is: format!("{state:?}") })
                }
                _ => {
                    self.0.go(guest).await;
                    let _ = self.0.events.send(BackendEvent::Guest { guest, what: GuestEvent::Resumed });
                    Ok(())
                }
            }
        })
    }

    fn reset(&self, _guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async { Ok(()) })
    }

    fn status(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<GuestInfo>>> {
        Box::pin(async move {
            let guests = self.0.guests.lock().await;
            let info = |found: &Guest| GuestInfo { guest, epoch: found.epoch, state: found.state, pid: None };
            Ok(guests.get(&guest).map(info))
        })
    }

    fn how_it_ended(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<StopReason>>> {
        let ended = self.0.ended.lock().unwrap().get(&guest).copied();
        Box::pin(async move { Ok(ended) })
    }

    fn list(&self) -> BoxFuture<'_, BackendResult<Vec<GuestInfo>>> {
        Box::pin(async move {
            let guests = self.0.guests.lock().await;
            let info = |(guest, found): (&GuestId, &Guest)| GuestInfo {
                guest: *guest,
                epoch: found.epoch,
                state: found.state,
                pid: None,
            };
            Ok(guests.iter().map(info).collect())
        })
    }

    fn console(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<PathBuf>> {
        Box::pin(async move {
            let guests = self.0.guests.lock().await;
            let found = guests.get(&guest).and_then(|found| found.launch.host.console_socket.clone());
            found.ok_or(BackendError::NoSuchGuest { guest })
        })
    }

    fn memory_stats(&self, _guest: GuestId) -> BoxFuture<'_, BackendResult<MemoryStats>> {
        Box::pin(async { Ok(MemoryStats::default()) })
    }

    fn events(&self) -> broadcast::Receiver<BackendEvent> {
        self.0.events.subscribe()
    }

    fn freeze(&self, guest: GuestId, file: PathBuf) -> BackendResult<Transfer<Frozen>> {
        let inner = self.0.clone();
        let cancelled = Arc::new(AtomicBool::new(false));
        self.0.cancels.lock().unwrap().insert(guest, cancelled.clone());
        let (_tx, progress) = watch::channel(TransferProgress::default());
        // The hypervisor's own work: it goes on when nobody waits for it.
        let work = tokio::spawn(async move {
            let next = inner.pause(guest, PauseReason::Saving).await?;
            let bytes = saved(next);
            tokio::fs::write(&file, &bytes[..1000]).await.map_err(failed("save"))?;
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_millis(inner.world.save_ms.load(Ordering::SeqCst)) {
                if cancelled.load(Ordering::SeqCst) && !inner.world.saves_go_on.load(Ordering::SeqCst) {
                    let _ = tokio::fs::remove_file(&file).await;
                    inner.go(guest).await;
                    return Err(BackendError::Cancelled { what: "save" });
                }
                if !inner.guests.lock().await.contains_key(&guest) {
                    return Err(BackendError::Failed { what: "save", detail: "its process died".into() });
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            tokio::fs::write(&file, &bytes).await.map_err(failed("save"))?;
            inner.guests.lock().await.remove(&guest);
            let what = GuestEvent::Stopped(StopReason::Frozen);
            let _ = inner.events.send(BackendEvent::Guest { guest, what });
            Ok(Frozen { format: "test/1".into(), bytes: bytes.len() as u64 })
        });
        let done = Box::pin(async move {
            work.await.unwrap_or_else(|error| Err(BackendError::Failed { what: "save", detail: error.to_string() }))
        });
        Ok(Transfer { progress, done })
    }

    fn frozen_in(&self, file: PathBuf) -> BoxFuture<'_, BackendResult<Option<Frozen>>> {
        Box::pin(async move {
            let length = tokio::fs::metadata(&file).await.map_or(0, |found| found.len());
            let is_whole = length == SAVED_BYTES as u64;
            Ok(is_whole.then(|| Frozen { format: "test/1".into(), bytes: length }))
        })
    }

    fn thaw(&self, launch: Launch, file: PathBuf, format: String) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(async move {
            assert_eq!(format, "test/1");
            let bytes = tokio::fs::read(&file).await.map_err(failed("thaw"))?;
            assert_eq!(bytes.len(), SAVED_BYTES, "the file is as long as it was");
            let next = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            assert!(bytes == saved(next));
            let info = self.0.put(launch, RunState::Paused(PauseReason::Arrived), next).await?;
            if let Some(thawed) = self.0.guests.lock().await.get_mut(&info.guest) {
                thawed.file = Some(file);
            }
            Ok(info)
        })
    }

    fn live_migration(&self) -> BackendResult<&dyn LiveMigration> {
        Ok(self)
    }

    fn mirroring(&self) -> BackendResult<&dyn Mirroring> {
        Ok(self)
    }

    fn checkpointing(&self) -> BackendResult<&dyn Checkpointing> {
        Ok(self)
    }

    fn post_copy(&self) -> BackendResult<&dyn PostCopy> {
        Ok(self)
    }

    fn lazy_thaw(&self) -> BackendResult<&dyn LazyThaw> {
        Ok(self)
    }
}

impl LiveMigration for Hypervisor {
    fn begin(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(async move {
            match self.0.guests.lock().await.get(&guest).map(|guest| guest.state) {
                Some(RunState::Running) => Cookie::new(b"one".to_vec()),
                Some(state) => Err(BackendError::WrongState { guest, wants: "move", is: format!("{state:?}") }),
                None => Err(BackendError::NoSuchGuest { guest }),
            }
        })
    }

    fn perform(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: CopyOptions,
    ) -> BackendResult<Transfer<Performed>> {
        assert_eq!(cookie.as_bytes(), b"two");
        let cancelled = Arc::new(AtomicBool::new(false));
        self.0.cancels.lock().unwrap().insert(guest, cancelled.clone());
        let (tx, progress) = watch::channel(TransferProgress::default());
        let (inner, agent) = (self.0.clone(), self.0.agent.load(Ordering::SeqCst));
        // The hypervisor's own work: it goes on, or breaks, whoever waits for it.
        let work = tokio::spawn(async move {
            let what = "copy";
            let mut socket = UnixStream::connect(&stream).await.map_err(failed(what))?;
            let piece = vec![9; MEMORY_BYTES / PIECES];
            match options.memory {
                MemoryMode::PreCopy => {}
                MemoryMode::Hybrid => socket.write_u8(HALF_IS_LEFT).await.map_err(failed(what))?,
                MemoryMode::PostCopy => socket.write_u8(ALL_IS_LEFT).await.map_err(failed(what))?,
            }
            let pieces = if options.memory == MemoryMode::PostCopy { 0 } else { PIECES };
            for sent in 1..=pieces {
                if cancelled.load(Ordering::SeqCst) {
                    return Err(BackendError::Cancelled { what });
                }
                socket.write_all(&piece).await.map_err(failed(what))?;
                tx.send_modify(|told| {
                    told.phase = TransferPhase::Copy;
                    told.iteration = 1;
                    told.memory_total_bytes = MEMORY_BYTES as u64;
                    told.memory_processed_bytes = (sent * piece.len()) as u64;
                    told.memory_remaining_bytes = (MEMORY_BYTES - sent * piece.len()) as u64;
                });
                tokio::time::sleep(Duration::from_millis(inner.world.piece_ms.load(Ordering::SeqCst))).await;
            }
            let paused_at = std::time::Instant::now();
            let next = inner.pause(guest, PauseReason::Departed).await?;
            let sent = async {
                socket.write_all(&next.to_le_bytes()).await?;
                socket.shutdown().await?;
                // Back to the running state when the other end is not there to have taken it.
                let mut end = [0];
                socket.read(&mut end).await
            };
            match sent.await {
                Ok(1) => {}
                other => {
                    inner.go(guest).await;
                    return Err(BackendError::Failed { what, detail: format!("{other:?}") });
                }
            }
            if inner.agent.load(Ordering::SeqCst) != agent {
                eprintln!("{}: the copy of {guest} ended after its agent", inner.name);
            }
            let (progress, left_bytes) = (*tx.borrow(), left_bytes(options.memory));
            Ok(Performed {
                cookie: Cookie::new(b"three".to_vec())?,
                paused_for: paused_at.elapsed(),
                progress,
                left_bytes,
            })
        });
        let done = Box::pin(async move {
            work.await.unwrap_or_else(|error| Err(BackendError::Failed { what: "copy", detail: error.to_string() }))
        });
        Ok(Transfer { progress, done })
    }

    fn set_limits(&self, _guest: GuestId, _limits: CopyLimits) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async { Ok(()) })
    }

    fn cancel(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        if let Some(cancelled) = self.0.cancels.lock().unwrap().get(&guest) {
            cancelled.store(true, Ordering::SeqCst);
        }
        Box::pin(async { Ok(()) })
    }

    fn confirm(&self, guest: GuestId, verdict: Verdict) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let mut state = self.0.guests.lock().await.get(&guest).map(|guest| guest.state);
            while state == Some(RunState::Paused(PauseReason::Saving)) && verdict == Verdict::Keep {
                self.cancel(guest).await?;
                tokio::time::sleep(Duration::from_millis(10)).await;
                state = self.0.guests.lock().await.get(&guest).map(|guest| guest.state);
                if state.is_none() {
                    return Err(BackendError::NoSuchGuest { guest });
                }
            }
            match (state, verdict) {
                (None, _) | (Some(RunState::Running), Verdict::Keep) => Ok(()),
                (Some(RunState::Paused(PauseReason::Departed | PauseReason::Asked)), Verdict::Keep) => {
                    self.0.go(guest).await;
                    Ok(())
                }
                (Some(RunState::Paused(PauseReason::Departed)), Verdict::Release) => {
                    self.0.guests.lock().await.remove(&guest);
                    Ok(())
                }
                (Some(state), _) => {
                    Err(BackendError::WrongState { guest, wants: "end its move", is: format!("{state:?}") })
                }
            }
        })
    }

    fn prepare(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(async move {
            assert_eq!(cookie.as_bytes(), b"one");
            let guest = launch.guest;
            let listener = UnixListener::bind(&listen).map_err(failed("listen"))?;
            self.0.put(launch, RunState::Paused(PauseReason::Incoming), 0).await?;
            let inner = self.0.clone();
            let task = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await?;
                let mut bytes = vec![0; MEMORY_BYTES / PIECES * PIECES + 8];
                stream.read_exact(&mut bytes[..1]).await?;
                if bytes[0] == MIRROR {
                    inner.stand_by(guest, stream).await?;
                    return Ok((0, 0));
                }
                let memory = match bytes[0] {
                    ALL_IS_LEFT => MemoryMode::PostCopy,
                    HALF_IS_LEFT => MemoryMode::Hybrid,
                    _ => MemoryMode::PreCopy,
                };
                match memory {
                    MemoryMode::PreCopy => stream.read_exact(&mut bytes[1..]).await?,
                    MemoryMode::Hybrid => stream.read_exact(&mut bytes).await?,
                    MemoryMode::PostCopy => {
                        bytes.truncate(8);
                        stream.read_exact(&mut bytes).await?
                    }
                };
                stream.write_all(b".").await?;
                Ok((u64::from_le_bytes(bytes[bytes.len() - 8..].try_into().unwrap()), left_bytes(memory)))
            });
            self.0.incoming.lock().unwrap().insert(guest, task);
            Cookie::new(b"two".to_vec())
        })
    }

    fn complete(&self, guest: GuestId, cookie: Cookie) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(async move {
            assert_eq!(cookie.as_bytes(), b"three");
            let task = self.0.incoming.lock().unwrap().remove(&guest);
            let received = match task {
                Some(task) => tokio::time::timeout(Duration::from_secs(20), task).await,
                None => return Err(BackendError::NoSuchGuest { guest }),
            };
            let Ok(Ok(Ok((next, left)))) = received else {
                self.0.guests.lock().await.remove(&guest);
                return Err(BackendError::Failed { what: "receive", detail: format!("{received:?}") });
            };
            let mut guests = self.0.guests.lock().await;
            let found = guests.get_mut(&guest).ok_or(BackendError::NoSuchGuest { guest })?;
            found.next.store(next, Ordering::SeqCst);
            found.state = RunState::Paused(PauseReason::Arrived);
            self.0.missing.lock().unwrap().insert(guest, Arc::new(Missing::new(PAGES - left / PAGE_BYTES..PAGES)));
            Ok(GuestInfo { guest, epoch: found.epoch, state: found.state, pid: None })
        })
    }

    fn discard(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            if let Some(task) = self.0.incoming.lock().unwrap().remove(&guest) {
                task.abort();
            }
            let mut guests = self.0.guests.lock().await;
            match guests.get(&guest).map(|guest| guest.state) {
                Some(RunState::Running) => {
                    Err(BackendError::WrongState { guest, wants: "discard", is: "running".into() })
                }
                _ => {
                    guests.remove(&guest);
                    Ok(())
                }
            }
        })
    }
}
