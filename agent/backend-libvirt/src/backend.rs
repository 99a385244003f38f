//! [`LibvirtBackend`]: the [`Backend`] trait on libvirt.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use supercloud_blanket::{
    Backend, BackendError, BackendResult, BoxFuture, CompatClass, Launch, LiveMigration,
    backend::{
        BackendEvent, Capabilities, Frozen, GuestInfo, MemoryStats, PauseReason, RunState, StopMode, StopReason,
    },
    migrate::{Transfer, TransferProgress},
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    sync::{broadcast, watch},
    task::JoinHandle,
    time::Instant,
};
use virt::{connect::Connect, domain::Domain, sys};

use crate::{
    BACK_END, LibvirtConfig, capabilities,
    connection::{Connection, find},
    ending,
    ffi::{self, LibError, LibResult, PhaseCalls},
    metadata::{Mark, NAMESPACE, PREFIX, Role},
    migration::Moves,
    state,
    transfer::Job,
    xml,
};

/// How often a connection that broke is tried again, and a quiet one looked at.
const RECONNECT_EVERY: Duration = Duration::from_secs(1);
/// How often a guest that was asked to power off is looked at.
const POWER_OFF_POLL: Duration = Duration::from_millis(250);
/// A guest that is frozen may take this long.
const FREEZE_BUDGET: Duration = Duration::from_secs(3600);
/// The format of [`Backend::freeze`]'s files: libvirt's save image.
const FROZEN_FORMAT: &str = "libvirt-qemu-save/1";

/// What a save image begins with when it is whole; before, it is `LibvirtQemudPart`.
const WHOLE_IMAGE: &[u8; 16] = b"LibvirtQemudSave";

/// QEMU guests through this host's libvirtd.
pub struct LibvirtBackend {
    pub(crate) connection: Arc<Connection>,
    pub(crate) config: LibvirtConfig,
    pub(crate) phases: Result<PhaseCalls, String>,
    pub(crate) moves: Moves,
    watcher: JoinHandle<()>,
}

impl Drop for LibvirtBackend {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// A machine of ours, as found.
pub(crate) struct Found {
    pub domain: Domain,
    pub mark: Mark,
    pub state: RunState,
}

/// A guest of ours; `None` when it is not here, ended just now, or the machine of that name is not ours.
pub(crate) fn inspect(at: &Connect, guest: GuestId) -> LibResult<Option<Found>> {
    match find(at, guest)? {
        Some(domain) => inspect_domain(domain),
        None => Ok(None),
    }
}

fn inspect_domain(domain: Domain) -> LibResult<Option<Found>> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or(2);
    let mark = match domain.metadata(kind, Some(NAMESPACE), sys::VIR_DOMAIN_AFFECT_LIVE).map_err(LibError::from) {
        Ok(text) => Mark::parse(&text),
        Err(error) if error.is_no_domain() || error.is_no_metadata() => None,
        // A machine that has just ended is still known for a moment, but not active. Nothing else makes it "not here":
        // of a guest that is not here, it is said that it is lost.
        Err(error) if error.is_invalid() => match ffi::domain_state(&domain) {
            Ok((raw, reason)) if state::run_state(raw, reason, Role::Owner).is_none() => None,
            Err(gone) if gone.is_no_domain() => None,
            Ok(_) | Err(_) => return Err(error),
        },
        Err(error) => return Err(error),
    };
    let Some(mark) = mark else { return Ok(None) };
    let (raw, reason) = match ffi::domain_state(&domain) {
        Ok(state) => state,
        Err(error) if error.is_no_domain() => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(state::run_state(raw, reason, mark.role).map(|state| Found { domain, mark, state }))
}

/// Lets a paused machine run. That it runs already is no failure: libvirt resumes one by itself when a save or a move of
/// it is given up, also between our look at it and our call.
pub(crate) fn wake(domain: &Domain) -> LibResult<()> {
    let Err(error) = domain.resume() else { return Ok(()) };
    match ffi::domain_state(domain) {
        Ok((raw, reason)) if state::run_state(raw, reason, Role::Owner) == Some(RunState::Running) => Ok(()),
        Ok(_) | Err(_) => Err(error.into()),
    }
}

/// Writes the guest's mark anew.
pub(crate) fn set_mark(domain: &Domain, mark: Mark) -> LibResult<()> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or(2);
    let element = mark.to_element();
    domain.set_metadata(kind, Some(&element), Some(PREFIX), Some(NAMESPACE), sys::VIR_DOMAIN_AFFECT_LIVE)?;
    Ok(())
}

/// In words, for errors.
pub(crate) fn words(state: RunState) -> String {
    match state {
        RunState::Running => "running".to_owned(),
        RunState::ShuttingDown => "shutting down".to_owned(),
        RunState::Crashed => "crashed".to_owned(),
        RunState::Paused(reason) => match reason {
            PauseReason::Asked => "paused on request".to_owned(),
            PauseReason::Departed => "paused as the source of a move".to_owned(),
            PauseReason::Incoming => "still incoming".to_owned(),
            PauseReason::Arrived => "arrived and waiting for the grant".to_owned(),
            PauseReason::DiskError => "paused by a disk error".to_owned(),
            PauseReason::Saving | PauseReason::Other => "paused".to_owned(),
        },
    }
}

impl LibvirtBackend {
    /// A back end on the daemon that `config` names. It connects in the background and again whenever the daemon was
    /// away; the first call waits for it. Must be called inside a tokio runtime.
    #[must_use]
    pub fn new(config: LibvirtConfig) -> Self {
        let connection = Connection::new(config.uri.clone());
        let watcher = tokio::spawn(Arc::clone(&connection).keep_open(RECONNECT_EVERY));
        let phases = PhaseCalls::find().map_err(|name| format!("libvirt's {}", name.to_string_lossy()));
        Self { connection, config, phases, moves: Moves::default(), watcher }
    }

    /// Asks or changes something small.
    pub(crate) async fn quick<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Connect) -> LibResult<T> + Send + 'static,
    ) -> BackendResult<T> {
        self.connection.call(what, self.config.call_budget, work).await
    }

    /// Makes or ends a process.
    pub(crate) async fn slow<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Connect) -> LibResult<T> + Send + 'static,
    ) -> BackendResult<T> {
        self.connection.call(what, self.config.process_budget, work).await
    }

    pub(crate) fn info(&self, found: &Found) -> GuestInfo {
        GuestInfo {
            guest: found.mark.guest,
            epoch: found.mark.epoch,
            state: found.state,
            pid: self.config.pid_dir.as_deref().and_then(|dir| read_pid(dir, found.mark.guest)),
        }
    }

    /// The guest, or an error that says that it is not here.
    pub(crate) async fn expect(&self, guest: GuestId) -> BackendResult<Found> {
        self.quick("look for a guest", move |at| inspect(at, guest)).await?.ok_or(BackendError::NoSuchGuest { guest })
    }

    /// Refuses a launch that cannot be, or whose guest is here already.
    pub(crate) async fn admit(&self, launch: &Launch) -> BackendResult<()> {
        xml::check(launch)?;
        let accelerator = &launch.spec.class.accelerator;
        if !self.config.accelerators.iter().any(|ours| ours.name() == accelerator) {
            let option = format!("accelerator '{accelerator}' on this host");
            return Err(BackendError::Unsupported { back_end: BACK_END, option });
        }
        let guest = launch.guest;
        match self.quick("look for a guest", move |at| find(at, guest)).await? {
            Some(_) => Err(BackendError::AlreadyThere { guest }),
            None => Ok(()),
        }
    }

    async fn start_guest(&self, launch: Launch) -> BackendResult<GuestInfo> {
        self.admit(&launch).await?;
        let guest = launch.guest;
        let text = xml::render(&launch, &Mark { guest, epoch: launch.epoch, role: Role::Owner });
        self.slow("start a guest", move |at| {
            at.create_domain_xml(&text, 0)?;
            Ok(())
        })
        .await?;
        Ok(self.info(&self.expect(guest).await?))
    }

    pub(crate) async fn destroy(&self, guest: GuestId) -> BackendResult<()> {
        self.slow("end a guest", move |at| {
            let Some(found) = inspect(at, guest)? else { return Ok(()) };
            match found.domain.destroy().map_err(LibError::from) {
                // It ended by itself meanwhile.
                Err(error) if error.is_no_domain() || find(at, guest)?.is_none() => Ok(()),
                other => other,
            }
        })
        .await
    }

    async fn stop_guest(&self, guest: GuestId, mode: StopMode) -> BackendResult<()> {
        if let StopMode::Graceful { budget } = mode {
            let deadline = Instant::now() + budget;
            let asked = self
                .quick("press a guest's power button", move |at| match inspect(at, guest)? {
                    Some(found) if found.state == RunState::Running => {
                        found.domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)?;
                        Ok(true)
                    }
                    Some(_) => Ok(false),
                    None => Ok(true),
                })
                .await;
            // A guest that stands still cannot answer its power button, and one that refuses it is killed as well.
            if let Ok(true) = asked {
                while Instant::now() < deadline {
                    if self.quick("look for a guest", move |at| inspect(at, guest)).await?.is_none() {
                        return Ok(());
                    }
                    tokio::time::sleep(POWER_OFF_POLL).await;
                }
            }
        }
        self.destroy(guest).await
    }

    async fn resume_guest(&self, guest: GuestId, epoch: Epoch) -> BackendResult<()> {
        let refused = self
            .quick("resume a guest", move |at| {
                let Some(found) = inspect(at, guest)? else {
                    return Ok(Some(BackendError::NoSuchGuest { guest }));
                };
                match found.state {
                    RunState::Paused(PauseReason::Incoming | PauseReason::Departed)
                    | RunState::ShuttingDown
                    | RunState::Crashed => {
                        let is = words(found.state);
                        return Ok(Some(BackendError::WrongState { guest, wants: "resume it", is }));
                    }
                    RunState::Running => {}
                    RunState::Paused(_) => {
                        wake(&found.domain)?;
                    }
                }
                let mark = Mark { guest, epoch, role: Role::Owner };
                if mark != found.mark {
                    // The guest runs: from here on nothing may fail. `begin` writes the mark again before it matters.
                    if let Err(error) = set_mark(&found.domain, mark) {
                        tracing::warn!(%guest, %error, "cannot renew a guest's mark");
                    }
                }
                Ok(None)
            })
            .await?;
        refused.map_or(Ok(()), Err)
    }

    async fn pause_guest(&self, guest: GuestId) -> BackendResult<()> {
        let found = self.expect(guest).await?;
        match found.state {
            RunState::Paused(_) => Ok(()),
            RunState::Running => self.quick("pause a guest", move |_| Ok(found.domain.suspend()?)).await,
            state => Err(BackendError::WrongState { guest, wants: "pause it", is: words(state) }),
        }
    }

    fn freeze_guest(&self, guest: GuestId, file: PathBuf) -> Transfer<Frozen> {
        let (sender, progress) = watch::channel(TransferProgress::default());
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let tracked = self.moves.track(guest, &is_cancelled);
        let connection = Arc::clone(&self.connection);
        let done = async move {
            let what = "freeze a guest";
            let path = utf8(&file)?.to_owned();
            connection.sink.take_departed_at(guest);
            if tokio::fs::try_exists(&file).await.unwrap_or(true) {
                let source = std::io::ErrorKind::AlreadyExists.into();
                return Err(BackendError::File { what: "freeze a guest into", path: file, source });
            }
            let job = Job { connection, guest, what, budget: FREEZE_BUDGET, is_cancelled };
            let missing = job
                .drive(&sender, move |at| {
                    let _tracked = tracked;
                    let Some(found) = inspect(at, guest)? else { return Ok(true) };
                    // Without SAVE_PAUSED: with it libvirt would leave the guest standing still when the save fails or is
                    // aborted. That it comes out of the file standing still is said when it does.
                    ffi::save(&found.domain, &path)?;
                    Ok(false)
                })
                .await?;
            if missing {
                return Err(BackendError::NoSuchGuest { guest });
            }
            // From here on the file is the guest: it must outlive a power cut.
            let synced = tokio::task::spawn_blocking(move || sync_file(&file).map_err(|source| (file, source)));
            match synced.await {
                Ok(Ok(bytes)) => Ok(Frozen { format: FROZEN_FORMAT.to_owned(), bytes }),
                Ok(Err((path, source))) => Err(BackendError::File { what: "make durable", path, source }),
                Err(broken) => Err(BackendError::Failed { what, detail: broken.to_string() }),
            }
        };
        Transfer { progress, done: Box::pin(done) }
    }

    async fn thaw_guest(&self, launch: Launch, file: PathBuf, format: String) -> BackendResult<GuestInfo> {
        if format != FROZEN_FORMAT {
            let option = format!("frozen guests of format '{}'", format.chars().take(64).collect::<String>());
            return Err(BackendError::Unsupported { back_end: BACK_END, option });
        }
        self.admit(&launch).await?;
        let guest = launch.guest;
        let path = utf8(&file)?.to_owned();
        let text = xml::render(&launch, &Mark { guest, epoch: launch.epoch, role: Role::Arrived });
        // Reading memory back takes as long as its size; the budget of a process would be too short for large ones.
        let gib = launch.spec.memory_bytes >> 30;
        let budget =
            self.config.process_budget + Duration::from_secs(30).saturating_mul(u32::try_from(gib).unwrap_or(1024));
        self.connection
            .call("thaw a guest", budget, move |at| {
                let text = xml::with_current_memory(text, &at.save_image_xml_desc(&path, 0)?);
                ffi::restore(at, &path, &text, sys::VIR_DOMAIN_SAVE_PAUSED)
            })
            .await?;
        Ok(self.info(&self.expect(guest).await?))
    }

    async fn ask_capabilities(&self) -> BackendResult<Capabilities> {
        let accelerators = self.config.accelerators.clone();
        let (classes, version) = self
            .slow("ask what libvirt can do", move |at| {
                let machines = capabilities::machines(&at.capabilities()?);
                let newest = machines.first().cloned();
                let mut classes = Vec::new();
                for accelerator in accelerators {
                    let kind = if accelerator == crate::Accelerator::Kvm { "kvm" } else { "qemu" };
                    let domain = at.domain_capabilities(None, Some("x86_64"), newest.as_deref(), Some(kind), 0)?;
                    classes.extend(capabilities::classes(accelerator, &machines, &capabilities::baselines(&domain)));
                }
                let (libvirt, qemu) = (at.lib_version()?, at.hyp_version()?);
                let version =
                    format!("libvirt {}, QEMU {}", capabilities::version(libvirt), capabilities::version(qemu));
                Ok((classes, version))
            })
            .await?;
        let no_live_migration = self.phases.as_ref().err().map(|missing| format!("{missing} is missing"));
        Ok(Capabilities { back_end: BACK_END.to_owned(), version, classes, no_live_migration })
    }
}

/// A path that libvirt can be told.
pub(crate) fn utf8(path: &Path) -> BackendResult<&str> {
    path.to_str().filter(|_| path.is_absolute()).ok_or_else(|| BackendError::File {
        what: "use",
        path: path.to_owned(),
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}

fn sync_file(file: &Path) -> std::io::Result<u64> {
    let opened = std::fs::File::open(file)?;
    opened.sync_all()?;
    if let Some(folder) = file.parent() {
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(opened.metadata()?.len())
}

/// The size of a save image that is whole, made durable; `None` when there is none. libvirt writes another magic at its
/// head while it goes on, and this one last, when the memory is in the file and synced (`src/qemu/qemu_saveimage.c`).
fn whole_image(file: &Path) -> std::io::Result<Option<u64>> {
    let mut magic = [0; WHOLE_IMAGE.len()];
    let read = std::fs::File::open(file).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut magic));
    match read {
        Ok(()) if magic == *WHOLE_IMAGE => sync_file(file).map(Some),
        Ok(()) => Ok(None),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::UnexpectedEof) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// A pid file is a line with a number.
fn read_pid(dir: &Path, guest: GuestId) -> Option<u32> {
    std::fs::read_to_string(dir.join(format!("{guest}.pid"))).ok()?.trim().parse().ok()
}

/// The unix socket that a console is bound to, in the machine's XML.
fn console_socket(xml: &str) -> Option<PathBuf> {
    let from = xml.find("<serial type='unix'").or_else(|| xml.find("<console type='unix'"))?;
    let source = &xml[from..][xml[from..].find("<source ")?..];
    let path = crate::metadata::attribute(source.split('>').next()?, "path")?;
    Some(PathBuf::from(path.replace("&apos;", "'").replace("&amp;", "&")))
}

impl Backend for LibvirtBackend {
    fn name(&self) -> &'static str {
        BACK_END
    }

    fn has_balloon(&self, _: &CompatClass) -> bool {
        true
    }

    fn capabilities(&self) -> BoxFuture<'_, BackendResult<Capabilities>> {
        Box::pin(self.ask_capabilities())
    }

    fn start(&self, launch: Launch) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.start_guest(launch))
    }

    fn stop(&self, guest: GuestId, mode: StopMode) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.stop_guest(guest, mode))
    }

    fn pause(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.pause_guest(guest))
    }

    fn resume(&self, guest: GuestId, epoch: Epoch) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.resume_guest(guest, epoch))
    }

    fn reset(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let found = self.expect(guest).await?;
            self.quick("reset a guest", move |_| Ok(found.domain.reset()?)).await
        })
    }

    fn status(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<GuestInfo>>> {
        Box::pin(async move {
            let found = self.quick("look for a guest", move |at| inspect(at, guest)).await?;
            Ok(found.map(|found| self.info(&found)))
        })
    }

    fn how_it_ended(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<StopReason>>> {
        let log = self.config.log_dir.as_deref().map(|dir| dir.join(format!("{guest}.log")));
        Box::pin(async move {
            let Some(path) = log else { return Ok(None) };
            let what = "read the log of a guest";
            let read = tokio::task::spawn_blocking(move || ending::read(&path).map_err(|source| (path, source)));
            match read.await {
                Ok(Ok(ended)) => Ok(ended),
                Ok(Err((path, source))) => Err(BackendError::File { what, path, source }),
                Err(broken) => Err(BackendError::Failed { what, detail: broken.to_string() }),
            }
        })
    }

    fn list(&self) -> BoxFuture<'_, BackendResult<Vec<GuestInfo>>> {
        Box::pin(async move {
            let all = self
                .slow("list guests", |at| {
                    let mut ours = Vec::new();
                    for domain in at.list_all_domains(sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE)? {
                        let name = domain.name()?;
                        if let Some(found) = inspect_domain(domain)?
                            && found.mark.guest.to_string() == name
                        {
                            ours.push(found);
                        }
                    }
                    Ok(ours)
                })
                .await?;
            Ok(all.iter().map(|found| self.info(found)).collect())
        })
    }

    fn console(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<PathBuf>> {
        Box::pin(async move {
            let found = self.expect(guest).await?;
            let xml = self.quick("describe a guest", move |_| Ok(found.domain.xml_desc(0)?)).await?;
            console_socket(&xml).ok_or_else(|| BackendError::Unsupported {
                back_end: BACK_END,
                option: format!("a console socket for guest {guest}, which was started without one"),
            })
        })
    }

    fn memory_stats(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<MemoryStats>> {
        Box::pin(async move {
            let found = self.expect(guest).await?;
            let figures = self
                .quick("read memory figures", move |_| {
                    Ok(found.domain.memory_stats(0)?.into_iter().map(|stat| (stat.tag, stat.val)).collect::<Vec<_>>())
                })
                .await?;
            // libvirt tells kibibytes.
            let get = |tag: u32| figures.iter().find(|(have, _)| *have == tag).map(|(_, kib)| kib.saturating_mul(1024));
            Ok(MemoryStats {
                actual_bytes: get(sys::VIR_DOMAIN_MEMORY_STAT_ACTUAL_BALLOON),
                resident_bytes: get(sys::VIR_DOMAIN_MEMORY_STAT_RSS),
                unused_bytes: get(sys::VIR_DOMAIN_MEMORY_STAT_UNUSED),
                usable_bytes: get(sys::VIR_DOMAIN_MEMORY_STAT_USABLE),
                available_bytes: get(sys::VIR_DOMAIN_MEMORY_STAT_AVAILABLE),
            })
        })
    }

    fn events(&self) -> broadcast::Receiver<BackendEvent> {
        self.connection.subscribe()
    }

    fn freeze(&self, guest: GuestId, file: PathBuf) -> BackendResult<Transfer<Frozen>> {
        utf8(&file)?;
        Ok(self.freeze_guest(guest, file))
    }

    fn frozen_in(&self, file: PathBuf) -> BoxFuture<'_, BackendResult<Option<Frozen>>> {
        Box::pin(async move {
            let what = "look for a frozen guest in";
            let looked = tokio::task::spawn_blocking(move || whole_image(&file).map_err(|source| (file, source)));
            match looked.await {
                Ok(Ok(bytes)) => Ok(bytes.map(|bytes| Frozen { format: FROZEN_FORMAT.to_owned(), bytes })),
                Ok(Err((path, source))) => Err(BackendError::File { what, path, source }),
                Err(broken) => Err(BackendError::Failed { what, detail: broken.to_string() }),
            }
        })
    }

    fn thaw(&self, launch: Launch, file: PathBuf, format: String) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.thaw_guest(launch, file, format))
    }

    fn live_migration(&self) -> BackendResult<&dyn LiveMigration> {
        match &self.phases {
            Ok(_) => Ok(self),
            Err(missing) => {
                let option = format!("live migration: {missing} is missing");
                Err(BackendError::Unsupported { back_end: BACK_END, option })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_save_image_that_is_whole_counts() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory");
        assert_eq!(whole_image(&file).unwrap(), None);
        for part in [&b""[..], b"LibvirtQemudSav", b"LibvirtQemudPart and more"] {
            std::fs::write(&file, part).unwrap();
            assert_eq!(whole_image(&file).unwrap(), None, "{part:?}");
        }
        std::fs::write(&file, b"LibvirtQemudSave and more").unwrap();
        assert_eq!(whole_image(&file).unwrap(), Some(25));
        assert!(whole_image(dir.path()).is_err());
    }

    #[test]
    fn the_console_socket_is_found_in_libvirts_own_xml() {
        let xml = "<devices><serial type='unix'>\n  <source mode='bind' path='/run/g/console.sock'/>\n\
                   <log file='/x/path=y' append='on'/></serial><console type='unix'><source mode='bind' path='/b'/>";
        assert_eq!(console_socket(xml), Some(PathBuf::from("/run/g/console.sock")));
        assert_eq!(console_socket("<serial type='null'/>"), None);
        assert_eq!(console_socket("<serial type='unix'"), None);
    }
}
