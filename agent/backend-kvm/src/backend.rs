//! [`KvmBackend`]: the [`Backend`] trait on processes of our own VMM.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::unix::{fs::OpenOptionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kvm_ioctls::Kvm;
use supercloud_blanket::{
    Backend, BackendError, BackendResult, BoxFuture, CompatClass, Launch, LazyThaw, LiveMigration, Mirroring, PostCopy,
    backend::{
        BackendEvent, Capabilities, Frozen, GuestEvent, GuestInfo, MemoryStats, PauseReason, RunState, StopMode,
        StopReason,
    },
    checkpoint::Checkpointing,
    migrate::{Transfer, TransferProgress},
    vmm::{
        cpu,
        travel::{TravelError, image},
        version::MachineVersion,
    },
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    sync::{broadcast, watch},
    task::JoinSet,
};

use crate::{
    ACCELERATOR, BACK_END, KvmConfig, checkpoint,
    control::{Request, State},
    keeper::{Keeper, Seen},
    migration::{self, Leaving},
    record::{Home, Record, Role},
    spawn,
};

/// A guest that is frozen or thawed may take this long.
const FREEZE_BUDGET: Duration = Duration::from_secs(3600);
pub(crate) const THAW_BUDGET: Duration = FREEZE_BUDGET;
/// The pause before something is tried again with a guest that was found again.
const SETTLE_PAUSE: Duration = Duration::from_secs(2);
/// A guest that is being frozen shall not be copied in many rounds: it will stand still anyway.
const FREEZE_DOWNTIME_MS: u64 = 60_000;
/// The format of [`Backend::freeze`]'s files: that of checkpoints, so that what did not change is stored once, and a thaw can begin anywhere.
const FROZEN_FORMAT: &str = checkpoint::FORMAT;
/// The newest of those that agents of before have frozen guests into: the stream of a move.
const STREAM_FORMAT: &str = "supercloud-kvm-stream/2";
/// Those that can be thawed besides.
const THAWED_FORMATS: [&str; 2] = [STREAM_FORMAT, "supercloud-kvm-stream/1"];
/// The version of the stream of which an image is made: pages one by one.
const IMAGE_STREAM: u16 = 1;

/// Guests in processes of our own VMM.
pub struct KvmBackend {
    pub(crate) config: KvmConfig,
    /// What this host's processors can do, and the name that guests of older agents know it by.
    baselines: [String; 2],
    keepers: Mutex<BTreeMap<GuestId, Arc<Keeper>>>,
    events: broadcast::Sender<BackendEvent>,
    /// Guests of which nothing can be said: they may well run.
    unreadable: Mutex<BTreeSet<GuestId>>,
    /// What is done for guests that were found again.
    settling: Mutex<JoinSet<()>>,
    /// Who waits for the streams of guests that come here.
    pub(crate) arrivals: migration::Arrivals,
    /// Why memory cannot be left behind at moves from or to this host, if it cannot.
    pub(crate) no_faults: Option<String>,
}

/// In words, for errors.
pub(crate) fn words(state: RunState) -> String {
    match state {
        RunState::Running => "running",
        RunState::ShuttingDown => "shutting down",
        RunState::Crashed => "ended",
        RunState::Paused(PauseReason::Asked) => "paused on request",
        RunState::Paused(PauseReason::Departed) => "paused as the source of a move",
        RunState::Paused(PauseReason::Incoming) => "still incoming",
        RunState::Paused(PauseReason::Arrived) => "arrived and waiting for the grant",
        RunState::Paused(_) => "paused",
    }
    .to_owned()
}

pub(crate) fn failed(what: &'static str) -> impl Fn(io::Error) -> BackendError {
    move |error| BackendError::Failed { what, detail: error.to_string() }
}

impl KvmBackend {
    /// The back end, with the guests that an agent before has left. What was only arriving is ended, and a freeze that was
    /// broken off rolled back.
    ///
    /// # Errors
    /// When there is no `/dev/kvm`, or the folder cannot be used.
    pub async fn open(config: KvmConfig) -> BackendResult<Self> {
        let run_dir = config.run_dir.clone();
        let what = "use";
        let found = tokio::task::spawn_blocking(move || {
            let found = Home::all(&run_dir).map_err(|source| BackendError::File { what, path: run_dir, source })?;
            let baseline = Kvm::new().map_err(|error| error.to_string());
            let baseline = baseline.and_then(|kvm| cpu::baseline(&kvm).map_err(|error| error.to_string()));
            let detail = |detail| BackendError::Failed { what: "ask /dev/kvm what the processors can do", detail };
            let no_faults = spawn::open_userfaultfd().err().map(|error| format!("/dev/userfaultfd: {error}"));
            Ok::<_, BackendError>((found, baseline.map_err(detail)?, no_faults))
        });
        let (homes, (features, name), no_faults) =
            found.await.map_err(|error| failed("look for guests")(io::Error::other(error)))??;
        let back_end = Self {
            config,
            baselines: [features.to_string(), name],
            keepers: Mutex::default(),
            events: broadcast::Sender::new(256),
            unreadable: Mutex::default(),
            settling: Mutex::default(),
            arrivals: migration::Arrivals::default(),
            no_faults,
        };
        for home in homes {
            back_end.find_again(home).await;
        }
        Ok(back_end)
    }

    /// Those that guests can have here: new ones the first, and others go on with what they have.
    fn classes(&self) -> Vec<CompatClass> {
        let class = |baseline: &String, version: MachineVersion| CompatClass {
            back_end: BACK_END.to_owned(),
            accelerator: ACCELERATOR.to_owned(),
            machine_version: version.name().to_owned(),
            cpu_baseline: baseline.clone(),
        };
        let of = |baseline| MachineVersion::ALL.into_iter().map(move |version| class(baseline, version));
        self.baselines.iter().flat_map(of).collect()
    }

    fn keepers(&self) -> MutexGuard<'_, BTreeMap<GuestId, Arc<Keeper>>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up a guest that an agent before has left. What one guest's process does or leaves out keeps no other from that: what
    /// there is to do is done beside, as often as it takes, and until then nothing is said of this guest.
    async fn find_again(&self, home: Home) {
        let (guest, at) = (home.guest, home.clone());
        let read = tokio::task::spawn_blocking(move || at.read::<Record>()).await;
        let record = match read.map_err(io::Error::other).and_then(|read| read) {
            Ok(Some(record)) => record,
            // Its process was never told what to run, and has ended.
            Ok(None) => return self.forget(home).await,
            Err(error) => {
                tracing::error!(%guest, %error, folder = %home.folder.display(), "the record of a guest's process cannot be read: nothing is done with that guest");
                self.unreadable().insert(guest);
                return;
            }
        };
        let (role, epoch) = (record.role.clone(), record.epoch);
        let keeper = self.keep(home, record, false);
        let budget = self.config.process_budget;
        let settle = async move {
            while let Err(error) = settle(&keeper, &role, epoch, budget).await {
                tracing::warn!(%guest, %error, "a guest that was found again is not yet as it shall be");
                tokio::time::sleep(SETTLE_PAUSE).await;
            }
            keeper.settled();
        };
        self.settling.lock().unwrap_or_else(PoisonError::into_inner).spawn(settle);
    }

    fn unreadable(&self) -> MutexGuard<'_, BTreeSet<GuestId>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn forget(&self, home: Home) {
        let guest = home.guest;
        let removed = tokio::task::spawn_blocking(move || home.remove()).await;
        if let Err(error) = removed.map_err(io::Error::other).and_then(|removed| removed) {
            tracing::warn!(%guest, %error, "what is left of a guest's process cannot be removed");
        }
    }

    fn keep(&self, home: Home, record: Record, is_settled: bool) -> Arc<Keeper> {
        let guest = home.guest;
        let keeper = Keeper::new(home, record, self.events.clone(), self.config.call_budget, is_settled);
        let keeper = Arc::new(keeper);
        self.keepers().insert(guest, Arc::clone(&keeper));
        keeper
    }

    /// The guest's process, while it is here.
    ///
    /// # Errors
    /// When nobody can say.
    pub(crate) fn keeper(&self, guest: GuestId) -> BackendResult<Option<Arc<Keeper>>> {
        if self.unreadable().contains(&guest) {
            let detail = format!("its record in {} cannot be read", self.config.run_dir.display());
            return Err(BackendError::Failed { what: "find a guest's process", detail });
        }
        let mut keepers = self.keepers();
        let Some(keeper) = keepers.get(&guest) else { return Ok(None) };
        if keeper.seen().gone.is_some() {
            keepers.remove(&guest);
            return Ok(None);
        }
        Ok(Some(Arc::clone(keeper)))
    }

    /// Likewise, with its state.
    pub(crate) async fn expect(&self, guest: GuestId) -> BackendResult<(Arc<Keeper>, RunState)> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        match keeper.info().await? {
            Some(info) => Ok((keeper, info.state)),
            None => Err(BackendError::NoSuchGuest { guest }),
        }
    }

    /// Refuses a launch that cannot be, or whose guest is here already.
    fn admit(&self, launch: &Launch) -> BackendResult<()> {
        launch.check()?;
        let lacks = |option: String| Err(BackendError::Unsupported { back_end: BACK_END, option });
        let classes = self.classes();
        if !classes.iter().any(|class| class.serves(&launch.spec.class)) {
            let classes: Vec<String> = classes.iter().map(ToString::to_string).collect();
            return lacks(format!("class '{}'; it has {} here", launch.spec.class, classes.join(", ")));
        }
        if launch.spec.devices.has_balloon && !self.has_balloon(&launch.spec.class) {
            return lacks(format!("a memory balloon of class '{}'", launch.spec.class));
        }
        match self.keeper(launch.guest)? {
            Some(_) => Err(BackendError::AlreadyThere { guest: launch.guest }),
            None => Ok(()),
        }
    }

    /// Starts the process of a guest that boots when it is let run, or arrives.
    pub(crate) async fn launch(&self, launch: Launch, arrives: bool) -> BackendResult<Arc<Keeper>> {
        self.admit(&launch)?;
        let home = Home::new(&self.config.run_dir, launch.guest);
        let (config, at) = (self.config.clone(), home.clone());
        let started = tokio::task::spawn_blocking(move || {
            let file = |source| BackendError::File { what: "use", path: at.folder.clone(), source };
            at.make().map_err(file)?;
            at.begin().map_err(file)?;
            let started = spawn::start(&config, &at, &launch, arrives)?;
            let role = if arrives { Role::Incoming } else { Role::Owner };
            let record = Record { epoch: launch.epoch, launch, role, process: started.process, left: None };
            // Before it does anything: what nobody would find again ends by itself.
            at.write(&record).map_err(file)?;
            started.begin()?;
            Ok::<_, BackendError>(record)
        });
        let record = started.await.map_err(|error| failed("start a guest")(io::Error::other(error)))??;
        let keeper = self.keep(home.clone(), record, true);
        let what = "start a guest's process";
        let seen = keeper.until(what, self.config.process_budget, |seen| seen.state.is_some() || seen.gone.is_some());
        let failed = match seen.await {
            Ok(seen) if seen.gone.is_none() => return Ok(keeper),
            Ok(seen) => BackendError::Failed { what, detail: format!("it ended; it said: {}", seen.said) },
            Err(error) => error,
        };
        keeper.end(StopReason::Failed, self.config.process_budget).await?;
        self.keepers().remove(&home.guest);
        Err(failed)
    }

    async fn start_guest(&self, launch: Launch) -> BackendResult<GuestInfo> {
        let guest = launch.guest;
        let keeper = self.launch(launch, false).await?;
        keeper.ask("start a guest", migration::verb("resume"), None).await?;
        let _ = self.events.send(BackendEvent::Guest { guest, what: GuestEvent::Started });
        keeper.info().await?.ok_or(BackendError::NoSuchGuest { guest })
    }

    async fn resume_guest(&self, guest: GuestId, epoch: Epoch) -> BackendResult<()> {
        let (keeper, state) = self.expect(guest).await?;
        match state {
            RunState::Running => {}
            RunState::Paused(PauseReason::Asked | PauseReason::Arrived) => {
                keeper.ask("resume a guest", migration::verb("resume"), None).await?;
            }
            state => return Err(BackendError::WrongState { guest, wants: "resume it", is: words(state) }),
        }
        // The guest runs: from here on nothing may fail. `begin` writes the mark again before it matters.
        if let Err(error) = keeper.mark(epoch, Role::Owner).await {
            tracing::warn!(%guest, %error, "cannot renew a guest's record");
        }
        Ok(())
    }

    fn freeze_guest(&self, guest: GuestId, file: PathBuf) -> Transfer<Frozen> {
        let (progress, shown) = watch::channel(TransferProgress::default());
        let budget = self.config.process_budget;
        let expected = self.keeper(guest);
        let done = async move {
            let keeper = expected?.ok_or(BackendError::NoSuchGuest { guest })?;
            let what = "freeze a guest";
            let there = tokio::fs::try_exists(&file).await.unwrap_or(true);
            if there {
                let source = io::ErrorKind::AlreadyExists.into();
                return Err(BackendError::File { what: "freeze a guest into", path: file, source });
            }
            match keeper.info().await?.map(|info| info.state) {
                Some(RunState::Running) => {}
                Some(state) => return Err(BackendError::WrongState { guest, wants: "freeze it", is: words(state) }),
                None => return Err(BackendError::NoSuchGuest { guest }),
            }
            keeper.seen().must_be_whole(guest, "freeze it")?;
            let epoch = keeper.record().epoch;
            keeper.mark(epoch, Role::Freezing(file.clone())).await?;
            let part = part_of(&file);
            let frozen = save(&keeper, &file, &part, &progress).await;
            match frozen {
                Ok(bytes) => {
                    // The file is the guest by now, whatever becomes of this process.
                    keeper.end(StopReason::Frozen, budget).await?;
                    Ok(Frozen { format: FROZEN_FORMAT.to_owned(), bytes })
                }
                Err(error) => {
                    // Before it runs on: a file that is there counts as the guest.
                    remove_frozen(&file).await?;
                    // Sent, or paused by a file that took nothing: it runs on.
                    if keeper.info().await?.is_some_and(|info| info.state != RunState::Running) {
                        keeper.ask("let a guest run on", migration::verb("resume"), None).await?;
                    }
                    keeper.mark(epoch, Role::Owner).await?;
                    Err(if keeper.is_cancelled() { BackendError::Cancelled { what } } else { error })
                }
            }
        };
        Transfer { progress: shown, done: Box::pin(done) }
    }

    async fn thaw_guest(&self, launch: Launch, file: PathBuf, format: String) -> BackendResult<GuestInfo> {
        let is_image = format == checkpoint::FORMAT;
        if !is_image && !THAWED_FORMATS.contains(&format.as_str()) {
            let option = format!("frozen guests of format '{}'", format.chars().take(64).collect::<String>());
            return Err(BackendError::Unsupported { back_end: BACK_END, option });
        }
        let guest = launch.guest;
        let keeper = self.launch(launch, true).await?;
        let thawed = thaw(&keeper, &file, is_image).await;
        if thawed.is_err() {
            keeper.end(StopReason::Failed, self.config.process_budget).await?;
        }
        thawed?;
        keeper.info().await?.ok_or(BackendError::NoSuchGuest { guest })
    }
}

/// Makes of a guest that an agent before has left what it shall be: one that was arriving has not come, unless it is a mirror's standby
/// that could go on, and a freeze that did not come to its end was none.
async fn settle(keeper: &Keeper, role: &Role, epoch: Epoch, budget: Duration) -> BackendResult<()> {
    let Some(state) = keeper.state_of_process().await? else { return Ok(()) };
    let guest = keeper.guest();
    tracing::info!(%guest, ?state, ?role, "a guest was found again");
    let Role::Freezing(file) = role else {
        if state != State::Arriving || crate::mirror::committed(keeper).await? > 0 {
            return Ok(());
        }
        return keeper.end(StopReason::Failed, budget).await;
    };
    let stands_still = |state| matches!(state, State::Paused | State::Sent);
    if stands_still(state) && whole(file).await? {
        return keeper.end(StopReason::Frozen, budget).await;
    }
    // It runs, or shall: what there is of a file is not the guest any more.
    let _ = keeper.ask("cancel a freeze", migration::verb("cancel"), None).await;
    remove_frozen(file).await?;
    // It may have been sent to its end before it heard of that, and stands still now.
    let is_over = |seen: &Seen| seen.gone.is_some() || seen.state != Some(State::Sending);
    let seen = keeper.until("end a freeze that was broken off", budget, is_over).await?;
    if seen.state.is_some_and(stands_still) {
        keeper.ask("let a guest run on", migration::verb("resume"), None).await?;
    }
    keeper.mark(epoch, Role::Owner).await
}

/// Removes what there is of a freeze that was none.
async fn remove_frozen(file: &Path) -> BackendResult<()> {
    for left in [file.to_owned(), part_of(file)] {
        match tokio::fs::remove_file(&left).await {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(BackendError::File { what: "remove what is left of a freeze in", path: left, source });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where a file is written before it is whole.
fn part_of(file: &Path) -> PathBuf {
    file.with_extension("part")
}

async fn whole(file: &Path) -> BackendResult<bool> {
    let what = "look for a frozen guest in";
    tokio::fs::try_exists(file).await.map_err(|source| BackendError::File { what, path: file.to_owned(), source })
}

/// Has the guest sent into the file, durably; its size.
async fn save(
    keeper: &Keeper,
    file: &Path,
    part: &Path,
    progress: &watch::Sender<TransferProgress>,
) -> BackendResult<u64> {
    let what = "freeze a guest";
    let (ours, theirs) = UnixStream::pair().map_err(failed(what))?;
    let turn = keeper.make_way().await?;
    let writes = keeper.ask(what, migration::verb("status"), None).await?.stream_version;
    keeper.ask(what, migration::verb("stream"), Some(theirs.into())).await?;
    let (path, config) = (part.to_owned(), checkpoint::config_of(&keeper.record().launch.spec));
    let write = move || {
        // What a guest has in its memory is nobody else's.
        let mut options = std::fs::File::options();
        let to = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
        let bytes = image::write_sent(&ours, config, &to).map_err(|error| match error {
            TravelError::File(error) => error,
            other => io::Error::other(checkpoint::chain(&other)),
        })?;
        to.sync_all()?;
        Ok(bytes)
    };
    let writing = tokio::task::spawn_blocking(write);
    let send = Request {
        max_downtime_ms: Some(FREEZE_DOWNTIME_MS),
        stream_version: migration::older_stream(IMAGE_STREAM, writes),
        ..migration::verb("send")
    };
    let sent = Leaving { keeper, what, budget: FREEZE_BUDGET, turn }.send(send, progress).await;
    // The process lets its end go, so that the copy ends, too.
    let closed = keeper.ask(what, migration::verb("hang_up"), None).await;
    let written: io::Result<u64> = writing.await.map_err(io::Error::other).and_then(|written| written);
    sent?;
    closed?;
    let cannot = |source| BackendError::File { what: "write the frozen guest to", path: part.to_owned(), source };
    let bytes = written.map_err(cannot)?;
    let (from, to) = (part.to_owned(), file.to_owned());
    let finish = move || {
        std::fs::rename(&from, &to)?;
        let folder = to.parent().unwrap_or(Path::new("/"));
        std::fs::File::open(folder)?.sync_all()
    };
    tokio::task::spawn_blocking(finish).await.map_err(io::Error::other).and_then(|done| done).map_err(cannot)?;
    Ok(bytes)
}

/// Has the guest come out of the file: of a freeze's, or of a checkpoint's. It stands still.
async fn thaw(keeper: &Keeper, file: &Path, is_image: bool) -> BackendResult<()> {
    let what = "thaw a guest";
    let cannot = |source| BackendError::File { what: "read the frozen guest in", path: file.to_owned(), source };
    let path = file.to_owned();
    let (ours, theirs) = UnixStream::pair().map_err(failed(what))?;
    let opened = tokio::task::spawn_blocking(move || std::fs::File::open(path)).await.map_err(io::Error::other);
    let mut from = opened.and_then(|opened| opened).map_err(cannot)?;
    keeper.ask(what, migration::verb("stream"), Some(theirs.into())).await?;
    let reading = tokio::task::spawn_blocking(move || {
        let copied = match is_image {
            true => image::send(&from, &ours).map_err(io::Error::other),
            false => io::copy(&mut from, &mut &ours).map(drop),
        };
        // Until the other end has closed it: what is on its way is not cut off.
        let _ = ours.shutdown(std::net::Shutdown::Write);
        copied
    });
    let seen = keeper.until(what, FREEZE_BUDGET, migration::has_come).await?;
    if is_image && migration::came(what, keeper, &seen).is_err() {
        // Rather what is wrong with the file than that its stream was cut off.
        reading.await.map_err(io::Error::other).and_then(|read| read).map_err(cannot)?;
        return migration::came(what, keeper, &seen);
    }
    migration::came(what, keeper, &seen)?;
    // A file that says that something is elsewhere is none of ours.
    seen.must_be_whole(keeper.guest(), "thaw it")?;
    let read = reading.await.map_err(io::Error::other).and_then(|read| read);
    read.map_err(cannot)
}

impl Backend for KvmBackend {
    fn name(&self) -> &'static str {
        BACK_END
    }

    fn takes_streams_itself(&self) -> bool {
        true
    }

    fn has_balloon(&self, class: &CompatClass) -> bool {
        MachineVersion::named(&class.machine_version).is_some_and(MachineVersion::has_balloon)
    }

    fn capabilities(&self) -> BoxFuture<'_, BackendResult<Capabilities>> {
        Box::pin(async move {
            Ok(Capabilities {
                back_end: BACK_END.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                classes: self.classes(),
                no_live_migration: None,
            })
        })
    }

    fn start(&self, launch: Launch) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.start_guest(launch))
    }

    fn stop(&self, guest: GuestId, mode: StopMode) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let Some(keeper) = self.keeper(guest)? else { return Ok(()) };
            if let StopMode::Graceful { budget } = mode {
                // A guest that stands still cannot answer its power button, and one that refuses it is ended as well.
                let pressed = keeper.ask("press a guest's power button", migration::verb("power_button"), None).await;
                let is_gone = keeper.until("switch a guest off", budget, |seen| seen.gone.is_some());
                if pressed.is_ok() && is_gone.await.is_ok() {
                    return Ok(());
                }
            }
            keeper.end(StopReason::Killed, self.config.process_budget).await
        })
    }

    fn pause(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            match self.expect(guest).await? {
                (_, RunState::Paused(_)) => Ok(()),
                (keeper, RunState::Running) => {
                    keeper.seen().must_be_whole(guest, "pause it")?;
                    keeper.ask("pause a guest", migration::verb("pause"), None).await.map(drop)
                }
                (_, state) => Err(BackendError::WrongState { guest, wants: "pause it", is: words(state) }),
            }
        })
    }

    fn resume(&self, guest: GuestId, epoch: Epoch) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.resume_guest(guest, epoch))
    }

    fn reset(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let (keeper, _) = self.expect(guest).await?;
            keeper.ask("reset a guest", migration::verb("reset"), None).await.map(drop)
        })
    }

    fn status(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<GuestInfo>>> {
        Box::pin(async move {
            match self.keeper(guest)? {
                Some(keeper) => keeper.info().await,
                None => Ok(None),
            }
        })
    }

    fn how_it_ended(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<StopReason>>> {
        let home = Home::new(&self.config.run_dir, guest);
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || home.how_it_ended()).await;
            read.map_err(io::Error::other).and_then(|read| read).map_err(failed("read how a guest ended"))
        })
    }

    fn list(&self) -> BoxFuture<'_, BackendResult<Vec<GuestInfo>>> {
        Box::pin(async move {
            let keepers: Vec<_> = self.keepers().values().cloned().collect();
            let mut all = Vec::new();
            for keeper in keepers {
                all.extend(keeper.info().await?);
            }
            Ok(all)
        })
    }

    fn console(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<PathBuf>> {
        Box::pin(async move {
            let (keeper, _) = self.expect(guest).await?;
            keeper.record().launch.host.console_socket.ok_or_else(|| BackendError::Unsupported {
                back_end: BACK_END,
                option: format!("a console socket for guest {guest}, which was started without one"),
            })
        })
    }

    fn memory_stats(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<MemoryStats>> {
        Box::pin(async move {
            let (keeper, _) = self.expect(guest).await?;
            let record = keeper.record();
            let statm = format!("/proc/{}/statm", record.process.pid);
            let statm = tokio::fs::read_to_string(statm).await.map_err(failed("read memory figures"))?;
            // The second of its fields, in pages (proc(5)).
            let pages: Option<u64> = statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse().ok());
            Ok(MemoryStats {
                actual_bytes: Some(record.launch.spec.memory_bytes),
                resident_bytes: pages.map(|pages| pages.saturating_mul(supercloud_blanket::vmm::memory::PAGE_BYTES)),
                ..MemoryStats::default()
            })
        })
    }

    fn events(&self) -> broadcast::Receiver<BackendEvent> {
        self.events.subscribe()
    }

    fn freeze(&self, guest: GuestId, file: PathBuf) -> BackendResult<Transfer<Frozen>> {
        if !file.is_absolute() || file.file_name().is_none() {
            let source = io::ErrorKind::InvalidInput.into();
            return Err(BackendError::File { what: "freeze a guest into", path: file, source });
        }
        Ok(self.freeze_guest(guest, file))
    }

    fn frozen_in(&self, file: PathBuf) -> BoxFuture<'_, BackendResult<Option<Frozen>>> {
        Box::pin(async move {
            let what = "look for a frozen guest in";
            match tokio::fs::metadata(&file).await {
                Ok(meta) => {
                    let cannot = |source| BackendError::File { what, path: file.clone(), source };
                    let looked = file.clone();
                    let look = move || std::fs::File::open(looked).and_then(|file| image::is_image(&file));
                    let looked = tokio::task::spawn_blocking(look).await.map_err(io::Error::other);
                    // An agent of before may have written it.
                    let is_image = looked.and_then(|looked| looked).map_err(cannot)?;
                    let format = if is_image { FROZEN_FORMAT } else { STREAM_FORMAT };
                    Ok(Some(Frozen { format: format.to_owned(), bytes: meta.len() }))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(BackendError::File { what, path: file, source }),
            }
        })
    }

    fn thaw(&self, launch: Launch, file: PathBuf, format: String) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.thaw_guest(launch, file, format))
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

    fn lazy_thaw(&self) -> BackendResult<&dyn LazyThaw> {
        Ok(self)
    }

    fn post_copy(&self) -> BackendResult<&dyn PostCopy> {
        match &self.no_faults {
            None => Ok(self),
            Some(why) => Err(BackendError::Unsupported {
                back_end: BACK_END,
                option: format!("moves that leave memory behind, at this host: {why}"),
            }),
        }
    }
}
