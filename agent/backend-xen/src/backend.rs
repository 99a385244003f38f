//! [`XenBackend`]: the [`Backend`] trait on Xen's paravirtual domains.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use supercloud_blanket::{
    Backend, BackendError, BackendResult, BoxFuture, CompatClass, Launch, LiveMigration,
    backend::{BackendEvent, Capabilities, Frozen, GuestInfo, MemoryStats, StopMode, StopReason},
    home::Home,
    migrate::Transfer,
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{sync::broadcast, task::JoinSet, time::sleep};

use crate::{
    ACCELERATOR, BACK_END, MACHINE_VERSION, XenConfig,
    freeze::FROZEN_FORMAT,
    guest::{Guest, blocking, run_state},
    inner::Inner,
    libxl, nbd, watch as watching, xl,
};

/// The pause before something is tried again with a guest that was found again.
const SETTLE_PAUSE: Duration = Duration::from_secs(2);

/// Paravirtual guests on this host's Xen.
pub struct XenBackend {
    pub(crate) inner: Arc<Inner>,
    /// Looks after guests, and settles those that were found again; ended with this.
    _tasks: JoinSet<()>,
}

/// Whether a path can stand in a domain's configuration, where it is the script of devices.
fn is_plain(path: &Path) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+".contains(&byte);
    path.is_absolute() && path.to_str().is_some_and(|path| path.bytes().all(is_allowed))
}

/// The class of guests here: what they see of the processor is what Xen shows them of this one.
fn class(info: &xl::Info) -> CompatClass {
    let features = blake3::hash(format!("{} {}", info.release, info.features).as_bytes()).to_hex();
    CompatClass {
        back_end: BACK_END.to_owned(),
        accelerator: ACCELERATOR.to_owned(),
        machine_version: MACHINE_VERSION.to_owned(),
        cpu_baseline: format!("host-{}", &features[..16]),
    }
}

/// libxl may change its calls with every release, and those that are made here are one release's.
fn check_release(info: &xl::Info) -> Result<(), String> {
    if info.release == libxl::RELEASE {
        return Ok(());
    }
    Err(format!("this host runs Xen {}; only Xen {} can be used (docs/xen.md)", info.version, libxl::RELEASE))
}

/// Why guests cannot move live on a hypervisor that was built with these settings, if so.
fn no_live(built: &str, may_move_live: bool) -> Option<String> {
    let has_shadow = built.lines().any(|line| line.trim() == "CONFIG_SHADOW_PAGING=y");
    let why = match (has_shadow, may_move_live) {
        (true, true) => return None,
        (true, false) => "none between Xen hosts was seen through to its end yet (docs/xen.md)",
        (false, _) => {
            "this hypervisor is built without shadow page tables, and does not note which pages a guest writes (deploy/xen builds one that \
             does)"
        }
    };
    Some(format!("live moves: {why}; freeze the guest, and thaw it where it shall be"))
}

impl XenBackend {
    /// The back end, with the guests that an agent before has left. What was only arriving is ended, and a freeze that was broken off
    /// rolled back; until that is done, nothing is said of such a guest.
    ///
    /// # Errors
    /// When this host does not run Xen, or its tools are not set up as they must be; the error says how.
    pub async fn open(config: XenConfig) -> BackendResult<Self> {
        let what = "use Xen";
        let refused = |detail: String| BackendError::Failed { what, detail };
        let info = xl::xl(what, config.call_budget, ["info"]).await?;
        let info =
            xl::parse_info(&info).ok_or_else(|| refused("xl info says nothing that is understood".to_owned()))?;
        check_release(&info).map_err(refused)?;
        if let Some(missing) = blocking(what, || Ok(nbd::missing())).await? {
            return Err(refused(missing));
        }
        if !is_plain(&config.program) {
            let program = config.program.display();
            return Err(refused(format!("the path {program} has characters that xl's configuration cannot have")));
        }
        let built = xl::run(what, config.call_budget, OsStr::new("xenhypfs"), ["cat", "/buildinfo/config"]).await;
        let run_dir = config.run_dir.clone();
        let homes = blocking("use the folder of guests", move || Home::all(&run_dir)).await?;
        let no_live = no_live(&built.unwrap_or_default(), config.may_move_live);
        let mut inner = Inner {
            library: libxl::library(),
            version: format!("Xen {}", info.version),
            config,
            class: class(&info),
            no_live,
            guests: Mutex::default(),
            unreadable: Vec::new(),
            events: broadcast::Sender::new(256),
        };
        let mut found = BTreeMap::new();
        for home in homes {
            let guest = home.guest;
            match inner.find_again(home).await {
                Ok(again) => found.extend(again.map(|again| (guest, again))),
                Err(error) => {
                    tracing::error!(%guest, %error, "a guest cannot be found again: nothing is done with it");
                    inner.unreadable.push(guest);
                }
            }
        }
        inner.guests = Mutex::new(found);
        let inner = Arc::new(inner);
        let mut tasks = JoinSet::new();
        for guest in inner.known() {
            tasks.spawn(settle(Arc::clone(&inner), guest));
        }
        tasks.spawn(watching::keep(Arc::clone(&inner)));
        Ok(Self { inner, _tasks: tasks })
    }
}

async fn settle(back_end: Arc<Inner>, guest: Arc<Guest>) {
    while let Err(error) = back_end.settle(&guest).await {
        tracing::warn!(guest = %guest.id(), %error, "a guest that was found again is not yet as it shall be");
        sleep(SETTLE_PAUSE).await;
    }
    guest.settle();
}

impl Backend for XenBackend {
    fn name(&self) -> &'static str {
        BACK_END
    }

    fn takes_streams_itself(&self) -> bool {
        true
    }

    fn has_balloon(&self, _: &CompatClass) -> bool {
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
                no_live_migration: self.inner.no_live.clone(),
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
            let Some(guest) = self.inner.settled(guest).await? else { return Ok(None) };
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
            for guest in self.inner.all()? {
                guest.until_settled(self.inner.config.call_budget).await?;
            }
            let guests = self.inner.all()?;
            let domains = xl::list(self.inner.config.call_budget).await?;
            self.inner.check_strays(&domains, &guests)?;
            let mut all = Vec::new();
            for guest in guests {
                let domain = self.inner.domain_of(&guest, &domains).await?;
                let record = guest.record();
                if let Some(state) = run_state(domain.as_ref(), &record.role) {
                    all.push(GuestInfo { guest: guest.id(), epoch: record.epoch, state, pid: None });
                }
            }
            Ok(all)
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
        match &self.inner.no_live {
            Some(why) => Err(BackendError::Unsupported { back_end: BACK_END, option: why.clone() }),
            None => Ok(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_has_a_plain_path() {
        assert!(is_plain(Path::new("/usr/lib/supercloud/supercloud-xen")));
        for odd in ["supercloud-xen", "/a b", "/a,b", "/a\"b", "/ä"] {
            assert!(!is_plain(Path::new(odd)), "{odd}");
        }
    }

    #[test]
    fn another_release_of_xen_is_refused_by_name() {
        let info = |release: &str| xl::Info {
            release: release.to_owned(),
            version: format!("{release}.5"),
            features: String::new(),
        };
        check_release(&info("4.17")).unwrap();
        for other in ["4.16", "4.18", "4.1", "5.17"] {
            assert!(
                check_release(&info(other)).is_err_and(|why| why.contains(other) && why.contains("4.17")),
                "{other}"
            );
        }
    }

    #[test]
    fn who_cannot_move_live_says_why() {
        let with = "CONFIG_PV=y\nCONFIG_SHADOW_PAGING=y\n";
        assert_eq!(no_live(with, true), None);
        assert!(no_live(with, false).is_some_and(|why| why.contains("freeze") && why.contains("yet")));
        for without in ["", "# CONFIG_SHADOW_PAGING is not set\nCONFIG_PV=y\n"] {
            assert!(no_live(without, true).is_some_and(|why| why.contains("shadow")), "{without}");
        }
    }
}
