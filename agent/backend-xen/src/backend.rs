//! [`XenBackend`]: the [`Backend`] trait on Xen's paravirtual domains.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_blanket::{
    Backend, BackendError, BackendResult, BoxFuture, CompatClass, Launch, LiveMigration,
    backend::{
        BackendEvent, Capabilities, Frozen, GuestEvent, GuestInfo, MemoryStats, PauseReason, RunState, StopMode,
        StopReason,
    },
    home::Home,
    migrate::{Transfer, TransferProgress},
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    sync::{broadcast, watch},
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::{
    ACCELERATOR, BACK_END, MACHINE_VERSION, XenConfig, arrive, card, domain,
    guest::{Guest, Record, Role, blocking, run_state, words},
    leave::{self, Load},
    nbd::{self, Disk},
    watch as watching, xl,
};

/// A guest that is frozen or thawed may take this long.
const FREEZE_BUDGET: Duration = Duration::from_secs(3600);
/// How often a guest that was asked to power off is looked at.
const POWER_OFF_POLL: Duration = Duration::from_millis(500);
/// The format of [`Backend::freeze`]'s files: libxl's stream, version 2.
const FROZEN_FORMAT: &str = "supercloud-xen-stream/1";
/// Where `xl` is told how to go about its work.
const XL_SETTINGS: &str = "/etc/xen/xl.conf";

/// Paravirtual guests on this host's Xen.
pub struct XenBackend {
    pub(crate) inner: Arc<Inner>,
    watcher: JoinHandle<()>,
}

impl Drop for XenBackend {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// What the back end's tasks share.
pub struct Inner {
    pub config: XenConfig,
    class: CompatClass,
    version: String,
    /// libxl's name.
    pub library: String,
    /// Whether the hypervisor notes which pages a guest writes.
    pub is_live: bool,
    guests: Mutex<BTreeMap<GuestId, Arc<Guest>>>,
    /// Records that cannot be read: such guests may well run.
    unreadable: Vec<GuestId>,
    pub events: broadcast::Sender<BackendEvent>,
}

/// Whether `xl` runs scripts of Xen's for devices, which is what it does unless it is told otherwise.
fn runs_scripts(settings: &str) -> bool {
    let told = settings.lines().filter_map(|line| line.split('#').next()?.split_once('=')).rev();
    let mut told = told.filter(|(key, _)| key.trim() == "run_hotplug_scripts");
    told.next().is_none_or(|(_, value)| value.trim() != "0")
}

impl XenBackend {
    /// The back end, with the guests that an agent before has left. What was only arriving is ended, and a freeze that was broken off
    /// rolled back.
    ///
    /// # Errors
    /// When this host does not run Xen, or its tools are not set up as they must be; the error says how.
    pub async fn open(config: XenConfig) -> BackendResult<Self> {
        let what = "use Xen";
        let refused = |detail: String| BackendError::Failed { what, detail };
        let info = xl::xl(what, config.call_budget, ["info"]).await?;
        let info =
            xl::parse_info(&info).ok_or_else(|| refused("xl info says nothing that is understood".to_owned()))?;
        if let Some(missing) = blocking(what, || Ok(nbd::missing())).await? {
            return Err(refused(missing));
        }
        let settings = blocking(what, || std::fs::read_to_string(XL_SETTINGS)).await.unwrap_or_default();
        if runs_scripts(&settings) {
            return Err(refused(format!(
                "{XL_SETTINGS} must say run_hotplug_scripts=0: disks and cards are put in place here"
            )));
        }
        let built = xl::run(what, config.call_budget, OsStr::new("xenhypfs"), ["cat", "/buildinfo/config"]).await;
        let is_live = built.is_ok_and(|built| built.lines().any(|line| line.trim() == "CONFIG_SHADOW_PAGING=y"));
        let features = blake3::hash(format!("{} {}", info.release, info.features).as_bytes()).to_hex();
        let class = CompatClass {
            back_end: BACK_END.to_owned(),
            accelerator: ACCELERATOR.to_owned(),
            machine_version: MACHINE_VERSION.to_owned(),
            cpu_baseline: format!("host-{}", &features[..16]),
        };
        let how = if is_live {
            "guests move live"
        } else {
            "guests stand still while they move: the hypervisor is built without shadow page tables (deploy/xen builds one with them)"
        };
        let run_dir = config.run_dir.clone();
        let homes = blocking("use the folder of guests", move || Home::all(&run_dir)).await?;
        let mut inner = Inner {
            library: format!("libxenlight.so.{}", info.release),
            version: format!("Xen {}; {how}", info.version),
            config,
            class,
            is_live,
            guests: Mutex::default(),
            unreadable: Vec::new(),
            events: broadcast::Sender::new(256),
        };
        for home in homes {
            let guest = home.guest;
            if let Err(error) = inner.find_again(home).await {
                tracing::error!(%guest, %error, "a guest cannot be found again: nothing is done with it");
                inner.unreadable.push(guest);
            }
        }
        let inner = Arc::new(inner);
        let watcher = tokio::spawn(watching::keep(Arc::clone(&inner)));
        Ok(Self { inner, watcher })
    }
}

impl Inner {
    fn guests(&self) -> MutexGuard<'_, BTreeMap<GuestId, Arc<Guest>>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn all(&self) -> Vec<Arc<Guest>> {
        self.guests().values().cloned().collect()
    }

    /// A guest that is here.
    ///
    /// # Errors
    /// When nobody can say.
    pub fn guest(&self, id: GuestId) -> BackendResult<Option<Arc<Guest>>> {
        if self.unreadable.contains(&id) {
            let detail = format!("its record in {} cannot be used", self.config.run_dir.display());
            return Err(BackendError::Failed { what: "find a guest", detail });
        }
        Ok(self.guests().get(&id).cloned())
    }

    /// Its domain, if it has one.
    async fn domain(&self, guest: &Guest) -> BackendResult<Option<xl::Domain>> {
        let name = guest.id().to_string();
        Ok(xl::list(self.config.call_budget).await?.into_iter().find(|domain| domain.name == name))
    }

    /// How it is; `None`: it is gone.
    pub async fn state(&self, guest: &Guest) -> BackendResult<Option<RunState>> {
        let domain = self.domain(guest).await?;
        Ok(run_state(domain.as_ref(), &guest.record().role))
    }

    /// The guest, with its state.
    pub async fn expect(&self, id: GuestId) -> BackendResult<(Arc<Guest>, RunState)> {
        let missing = || BackendError::NoSuchGuest { guest: id };
        let guest = self.guest(id)?.ok_or_else(missing)?;
        let state = self.state(&guest).await?.ok_or_else(missing)?;
        Ok((guest, state))
    }

    pub async fn info(&self, guest: &Guest) -> BackendResult<GuestInfo> {
        let state = self.state(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        Ok(GuestInfo { guest: guest.id(), epoch: guest.record().epoch, state, pid: None })
    }

    /// The number of its domain, which runs.
    pub async fn running_domain(&self, guest: &Guest, wants: &'static str) -> BackendResult<u32> {
        let id = guest.id();
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: id })?;
        match run_state(Some(&domain), &guest.record().role) {
            Some(RunState::Running) => Ok(domain.id),
            Some(state) => Err(BackendError::WrongState { guest: id, wants, is: words(state) }),
            None => Err(BackendError::NoSuchGuest { guest: id }),
        }
    }

    /// The file of its domain's configuration.
    pub fn domain_file(&self, guest: &Guest) -> PathBuf {
        guest.home.folder.join("domain.cfg")
    }

    /// Makes a guest's folder, its disks and its record; no domain yet.
    pub async fn take_in(&self, launch: Launch, role: Role) -> BackendResult<Arc<Guest>> {
        domain::check(&launch, &self.class)?;
        let id = launch.guest;
        if self.guest(id)?.is_some() {
            return Err(BackendError::AlreadyThere { guest: id });
        }
        let home = Home::new(&self.config.run_dir, id);
        let record = Record { epoch: launch.epoch, launch, role };
        let made = blocking("make a guest's disks", move || {
            home.make()?;
            home.begin()?;
            // Before there is anything that somebody would have to find again.
            home.write(&record)?;
            let mut disks: Vec<Disk> = Vec::new();
            for disk in &record.launch.spec.devices.disks {
                let at = record.launch.host.disks.get(&disk.name).ok_or(io::ErrorKind::NotFound)?;
                match Disk::connect(identifier(id, &disk.name), disk, at) {
                    Ok(disk) => disks.push(disk),
                    Err(error) => {
                        for disk in &disks {
                            disk.disconnect()?;
                        }
                        home.remove()?;
                        return Err(error);
                    }
                }
            }
            Ok(Guest::new(home, record, disks))
        });
        let guest = Arc::new(made.await?);
        let text = domain::render(&guest.record().launch, &guest.devices());
        let file = self.domain_file(&guest);
        blocking("write a domain's configuration", move || std::fs::write(file, text)).await?;
        self.guests().insert(id, Arc::clone(&guest));
        Ok(guest)
    }

    /// Puts in place what a domain needs that has come, and says so; it stands still yet.
    pub async fn settle_in(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let _work = guest.work.lock().await;
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        let record = guest.record();
        card::plug(&record.launch, domain.id, self.config.call_budget).await?;
        guest.mark(record.epoch, Role::Arrived).await?;
        guest.serve_console(domain.id, self.config.call_budget);
        Ok(())
    }

    /// Makes its domain and lets it run. The caller holds its work.
    pub async fn boot(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let config = self.domain_file(guest);
        let words = [OsStr::new("create"), OsStr::new("-q"), OsStr::new("-p"), OsStr::new("-e"), config.as_os_str()];
        xl::xl("make a domain", self.config.domain_budget, words).await?;
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        guest.serve_console(domain.id, self.config.call_budget);
        card::plug(&guest.record().launch, domain.id, self.config.call_budget).await?;
        self.unpause(domain.id).await
    }

    async fn unpause(&self, domain: u32) -> BackendResult<()> {
        xl::xl("let a domain run", self.config.call_budget, ["unpause", &domain.to_string()]).await.map(drop)
    }

    /// Lets a suspended domain run on here.
    pub async fn run_on(&self, guest: &Arc<Guest>) -> BackendResult<()> {
        let domain = self.domain(guest).await?.ok_or(BackendError::NoSuchGuest { guest: guest.id() })?;
        let words = [self.library.as_str(), "resume", &domain.id.to_string()].map(str::to_owned);
        xl::run("let a suspended domain run on", self.config.domain_budget, self.config.program.as_os_str(), words)
            .await
            .map(drop)
    }

    /// Ends its domain, if it has one.
    pub async fn destroy(&self, guest: &Guest) -> BackendResult<()> {
        let Some(domain) = self.domain(guest).await? else { return Ok(()) };
        let ended = xl::xl("end a domain", self.config.domain_budget, ["destroy", &domain.id.to_string()]).await;
        match ended {
            Err(error) if self.domain(guest).await?.is_some_and(|domain| !domain.is_dying) => Err(error),
            // It went by itself meanwhile.
            _ => Ok(()),
        }
    }

    /// Ends what there is of a guest: nothing of it is here afterwards.
    pub async fn release(&self, guest: &Arc<Guest>, reason: StopReason) -> BackendResult<()> {
        let home = guest.home.clone();
        blocking("note how a guest ends", move || home.note_end(reason)).await?;
        guest.set_arrival(None);
        if let Role::Incoming(Some(process)) = guest.record().role {
            process.end().await;
        }
        self.destroy(guest).await?;
        guest.release_disks().await?;
        let home = guest.home.clone();
        blocking("remove a guest's folder", move || home.remove()).await?;
        self.guests().remove(&guest.id());
        guest.end_console();
        let what = GuestEvent::Stopped(reason);
        // Nobody may be listening.
        let _ = self.events.send(BackendEvent::Guest { guest: guest.id(), what });
        Ok(())
    }

    /// Takes up a guest that an agent before has left.
    async fn find_again(&self, home: Home) -> BackendResult<()> {
        let (id, at) = (home.guest, home.clone());
        let read = blocking("read a guest's record", move || {
            let Some(record) = at.read::<Record>()? else { return Ok(None) };
            let mut disks = Vec::new();
            for disk in &record.launch.spec.devices.disks {
                if let Some(socket) = record.launch.host.disks.get(&disk.name) {
                    disks.extend(Disk::find(identifier(id, &disk.name), socket)?);
                }
            }
            Ok(Some((record, disks)))
        });
        let Some((record, disks)) = read.await? else {
            return blocking("remove a guest's folder", move || home.remove()).await;
        };
        let role = record.role.clone();
        let guest = Arc::new(Guest::new(home, record, disks));
        self.guests().insert(id, Arc::clone(&guest));
        let state = self.state(&guest).await?;
        tracing::info!(guest = %id, ?state, ?role, "a guest was found again");
        match role {
            Role::Incoming(_) => return self.release(&guest, StopReason::Failed).await,
            Role::Freezing(file) if whole(&file).await? => return self.release(&guest, StopReason::Frozen).await,
            Role::Freezing(file) => self.thaw_here(&guest, &file).await?,
            Role::Owner | Role::Arrived => {}
        }
        match self.domain(&guest).await? {
            Some(domain) => guest.serve_console(domain.id, self.config.call_budget),
            None => self.release(&guest, StopReason::Crashed).await?,
        }
        Ok(())
    }

    /// Rolls a freeze back: there is no file, and the guest runs.
    async fn thaw_here(&self, guest: &Arc<Guest>, file: &Path) -> BackendResult<()> {
        for left in [part_of(file), file.to_owned()] {
            match tokio::fs::remove_file(&left).await {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(BackendError::File { what: "remove what is left of a freeze in", path: left, source });
                }
                _ => {}
            }
        }
        if self.state(guest).await? == Some(RunState::Paused(PauseReason::Saving)) {
            self.run_on(guest).await?;
        }
        guest.mark(guest.record().epoch, Role::Owner).await
    }

    async fn start_guest(&self, launch: Launch) -> BackendResult<GuestInfo> {
        let id = launch.guest;
        let guest = self.take_in(launch, Role::Owner).await?;
        let work = guest.work.lock().await;
        if let Err(error) = self.boot(&guest).await {
            self.release(&guest, StopReason::Failed).await?;
            return Err(error);
        }
        drop(work);
        let _ = self.events.send(BackendEvent::Guest { guest: id, what: GuestEvent::Started });
        self.info(&guest).await
    }

    async fn stop_guest(&self, id: GuestId, mode: StopMode) -> BackendResult<()> {
        let Some(guest) = self.guest(id)? else { return Ok(()) };
        let _work = guest.work.lock().await;
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

    async fn pause_guest(&self, id: GuestId) -> BackendResult<()> {
        let (guest, state) = self.expect(id).await?;
        if let RunState::Paused(_) = state {
            return Ok(());
        }
        let domain = self.running_domain(&guest, "pause it").await?;
        xl::xl("pause a domain", self.config.call_budget, ["pause", &domain.to_string()]).await.map(drop)
    }

    async fn resume_guest(&self, id: GuestId, epoch: Epoch) -> BackendResult<()> {
        let (guest, _) = self.expect(id).await?;
        let _work = guest.work.lock().await;
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
        if let Err(error) = guest.mark(epoch, Role::Owner).await {
            tracing::warn!(guest = %id, %error, "cannot renew a guest's record");
        }
        Ok(())
    }

    async fn reset_guest(&self, id: GuestId) -> BackendResult<()> {
        let (guest, state) = self.expect(id).await?;
        let _work = guest.work.lock().await;
        if let RunState::Paused(reason) = state
            && reason != PauseReason::Asked
        {
            return Err(BackendError::WrongState { guest: id, wants: "reset it", is: words(state) });
        }
        self.destroy(&guest).await?;
        self.boot(&guest).await
    }

    fn freeze_guest(self: &Arc<Self>, id: GuestId, file: PathBuf) -> Transfer<Frozen> {
        let (sender, progress) = watch::channel(TransferProgress::default());
        let back_end = Arc::clone(self);
        let done = async move {
            let what = "freeze a guest";
            let guest = back_end.guest(id)?.ok_or(BackendError::NoSuchGuest { guest: id })?;
            let _work = guest.work.lock().await;
            if tokio::fs::try_exists(&file).await.unwrap_or(true) {
                let source = io::ErrorKind::AlreadyExists.into();
                return Err(BackendError::File { what: "freeze a guest into", path: file, source });
            }
            let domain = back_end.running_domain(&guest, "freeze it").await?;
            let Some(_leaving) = guest.leave() else {
                let is = "being sent".to_owned();
                return Err(BackendError::WrongState { guest: id, wants: "freeze it", is });
            };
            guest.mark(guest.record().epoch, Role::Freezing(file.clone())).await?;
            guest.limit.store(0, std::sync::atomic::Ordering::Relaxed);
            let frozen = back_end.save(&guest, domain, &file, &sender).await;
            match frozen {
                Ok(bytes) => {
                    // The file is the guest by now, whatever becomes of the domain.
                    back_end.release(&guest, StopReason::Frozen).await?;
                    Ok(Frozen { format: FROZEN_FORMAT.to_owned(), bytes })
                }
                Err(error) => {
                    back_end.thaw_here(&guest, &file).await?;
                    Err(if guest.is_cancelled() { BackendError::Cancelled { what } } else { error })
                }
            }
        };
        Transfer { progress, done: Box::pin(done) }
    }

    /// Has the guest sent into the file, durably; its size.
    async fn save(
        &self,
        guest: &Guest,
        domain: u32,
        file: &Path,
        progress: &watch::Sender<TransferProgress>,
    ) -> BackendResult<u64> {
        let part = part_of(file);
        let cannot = |source| BackendError::File { what: "write the frozen guest to", path: part_of(file), source };
        // What a guest has in its memory is nobody else's.
        let mut options = tokio::fs::OpenOptions::new();
        let opened = options.write(true).create(true).truncate(true).mode(0o600).open(&part).await.map_err(cannot)?;
        let load = Load {
            config: &self.config,
            library: &self.library,
            guest,
            domain,
            is_live: false,
            budget: FREEZE_BUDGET,
            what: "freeze a guest",
        };
        let sent = leave::send(load, opened, progress).await?;
        guest.rest_disks(self.config.call_budget).await?;
        let (from, to) = (part.clone(), file.to_owned());
        let finish = move || {
            std::fs::File::open(&from)?.sync_all()?;
            std::fs::rename(&from, &to)?;
            std::fs::File::open(to.parent().unwrap_or(Path::new("/")))?.sync_all()
        };
        tokio::task::spawn_blocking(finish).await.map_err(io::Error::other).and_then(|done| done).map_err(cannot)?;
        Ok(sent.bytes)
    }

    async fn thaw_guest(&self, launch: Launch, file: PathBuf, format: String) -> BackendResult<GuestInfo> {
        if format != FROZEN_FORMAT {
            let option = format!("frozen guests of format '{}'", format.chars().take(64).collect::<String>());
            return Err(BackendError::Unsupported { back_end: BACK_END, option });
        }
        let guest = self.take_in(launch, Role::Incoming(None)).await?;
        let thawed = async {
            let cannot = |source| BackendError::File { what: "read the frozen guest in", path: file.clone(), source };
            let stream = tokio::fs::File::open(&file).await.map_err(cannot)?;
            arrive::restore(&guest, &self.domain_file(&guest), stream).await?;
            self.settle_in(&guest).await
        };
        if let Err(error) = thawed.await {
            self.release(&guest, StopReason::Failed).await?;
            return Err(error);
        }
        self.info(&guest).await
    }
}

/// The name of a disk's device.
fn identifier(guest: GuestId, disk: &str) -> String {
    format!("{guest}:{disk}")
}

/// Where a file is written before it is whole.
fn part_of(file: &Path) -> PathBuf {
    file.with_extension("part")
}

async fn whole(file: &Path) -> BackendResult<bool> {
    let what = "look for a frozen guest in";
    tokio::fs::try_exists(file).await.map_err(|source| BackendError::File { what, path: file.to_owned(), source })
}

impl Backend for XenBackend {
    fn name(&self) -> &'static str {
        BACK_END
    }

    fn takes_streams_itself(&self) -> bool {
        true
    }

    fn has_balloon(&self) -> bool {
        false
    }

    fn has_rng(&self) -> bool {
        false
    }

    fn capabilities(&self) -> BoxFuture<'_, BackendResult<Capabilities>> {
        Box::pin(async move {
            Ok(Capabilities {
                back_end: BACK_END.to_owned(),
                version: self.inner.version.clone(),
                classes: vec![self.inner.class.clone()],
                no_live_migration: None,
            })
        })
    }

    fn start(&self, launch: Launch) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.inner.start_guest(launch))
    }

    fn stop(&self, guest: GuestId, mode: StopMode) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.inner.stop_guest(guest, mode))
    }

    fn pause(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.inner.pause_guest(guest))
    }

    fn resume(&self, guest: GuestId, epoch: Epoch) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.inner.resume_guest(guest, epoch))
    }

    fn reset(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.inner.reset_guest(guest))
    }

    fn status(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<GuestInfo>>> {
        Box::pin(async move {
            let Some(guest) = self.inner.guest(guest)? else { return Ok(None) };
            match self.inner.info(&guest).await {
                Err(BackendError::NoSuchGuest { .. }) => Ok(None),
                other => other.map(Some),
            }
        })
    }

    fn how_it_ended(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<StopReason>>> {
        let home = Home::new(&self.inner.config.run_dir, guest);
        Box::pin(blocking("read how a guest ended", move || home.how_it_ended()))
    }

    fn list(&self) -> BoxFuture<'_, BackendResult<Vec<GuestInfo>>> {
        Box::pin(async move {
            let guests = self.inner.all();
            if let Some(guest) = self.inner.unreadable.first() {
                self.inner.guest(*guest)?;
            }
            let domains = xl::list(self.inner.config.call_budget).await?;
            let info = |guest: Arc<Guest>| {
                let (id, record) = (guest.id(), guest.record());
                let domain = domains.iter().find(|domain| domain.name == id.to_string());
                let state = run_state(domain, &record.role)?;
                Some(GuestInfo { guest: id, epoch: record.epoch, state, pid: None })
            };
            Ok(guests.into_iter().filter_map(info).collect())
        })
    }

    fn console(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<PathBuf>> {
        Box::pin(async move {
            let (found, _) = self.inner.expect(guest).await?;
            found.record().launch.host.console_socket.ok_or_else(|| BackendError::Unsupported {
                back_end: BACK_END,
                option: format!("a console socket for guest {guest}, which was started without one"),
            })
        })
    }

    fn memory_stats(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<MemoryStats>> {
        Box::pin(async move {
            let (guest, _) = self.inner.expect(guest).await?;
            let domain = self.inner.domain(&guest).await?;
            let bytes = domain.map(|domain| domain.memory_mib << 20);
            Ok(MemoryStats { actual_bytes: bytes, resident_bytes: bytes, ..MemoryStats::default() })
        })
    }

    fn events(&self) -> broadcast::Receiver<BackendEvent> {
        self.inner.events.subscribe()
    }

    fn freeze(&self, guest: GuestId, file: PathBuf) -> BackendResult<Transfer<Frozen>> {
        if !file.is_absolute() || file.file_name().is_none() {
            let source = io::ErrorKind::InvalidInput.into();
            return Err(BackendError::File { what: "freeze a guest into", path: file, source });
        }
        Ok(self.inner.freeze_guest(guest, file))
    }

    fn frozen_in(&self, file: PathBuf) -> BoxFuture<'_, BackendResult<Option<Frozen>>> {
        Box::pin(async move {
            let what = "look for a frozen guest in";
            match tokio::fs::metadata(&file).await {
                Ok(meta) => Ok(Some(Frozen { format: FROZEN_FORMAT.to_owned(), bytes: meta.len() })),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(BackendError::File { what, path: file, source }),
            }
        })
    }

    fn thaw(&self, launch: Launch, file: PathBuf, format: String) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.inner.thaw_guest(launch, file, format))
    }

    fn live_migration(&self) -> BackendResult<&dyn LiveMigration> {
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_run_unless_the_last_word_says_otherwise() {
        for runs in ["", "#run_hotplug_scripts=0", "run_hotplug_scripts=0\nrun_hotplug_scripts=1", "x=0"] {
            assert!(runs_scripts(runs), "{runs}");
        }
        for not in ["run_hotplug_scripts=0", "a=1\n run_hotplug_scripts = 0 # why\n"] {
            assert!(!runs_scripts(not), "{not}");
        }
    }
}
