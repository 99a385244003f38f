//! All guests of a host: finds the task that owns a guest, or begins one; routes orders, events and connections to it.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use supercloud_api::{
    data::Channel,
    link::{Announced, GuestReport, Hello, HistoryMark, Notice},
};
use supercloud_blanket::backend::BackendEvent;
use supercloud_ids::{Epoch, GuestId, PortId};
use tokio::sync::{broadcast, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    chunks,
    guest::{
        self, GuestHandle, GuestMessage, GuestView,
        record::{GuestRecord, Places},
    },
    host::Host,
    link::Facts,
    plane::{Incoming, Router, not_here},
};

/// Connections that serve chunks at once.
const CHUNK_CONNECTIONS: usize = 64;

/// All guests of a host.
pub struct Guests {
    host: Arc<Host>,
    tasks: Mutex<HashMap<GuestId, GuestHandle>>,
    ended: mpsc::Sender<GuestId>,
    chunk_connections: TaskTracker,
    cancel: CancellationToken,
    /// What the probe measured.
    probe: serde_json::Value,
    /// Guests whose records cannot be read. Nothing is done with them and nothing is said of them: they may well run, and
    /// whoever calls them lost makes a second copy of them.
    unreadable: Mutex<HashSet<GuestId>>,
    /// What the machine's provider has announced for it.
    announced: watch::Receiver<Option<Announced>>,
}

impl Guests {
    /// No guests yet. What ends is told to the receiver: give it to [`Guests::reap`].
    #[must_use]
    pub fn new(
        host: Arc<Host>,
        probe: serde_json::Value,
        announced: watch::Receiver<Option<Announced>>,
        cancel: CancellationToken,
    ) -> (Arc<Self>, mpsc::Receiver<GuestId>) {
        let (ended, ended_rx) = mpsc::channel(64);
        let chunk_connections = TaskTracker::new();
        let (tasks, unreadable) = (Mutex::default(), Mutex::default());
        (Arc::new(Self { host, tasks, ended, chunk_connections, cancel, probe, unreadable, announced }), ended_rx)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<GuestId, GuestHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the guests that an earlier agent had. One whose record cannot be read is left alone, and told of.
    pub async fn restore(&self) {
        let (folder, run) = (self.host.config.guests_dir(), self.host.config.run_dir.clone());
        let (found, unreadable) =
            tokio::task::spawn_blocking(move || read_records(&folder, &run)).await.unwrap_or_default();
        *self.unreadable.lock().unwrap_or_else(PoisonError::into_inner) = unreadable;
        let mut tasks = self.lock();
        for record in found {
            let guest = record.guest();
            tracing::info!(%guest, "an earlier agent's guest is taken up");
            let handle = guest::begin(self.host.clone(), guest, Some(record), self.ended.clone());
            tasks.insert(guest, handle);
        }
    }

    fn is_unreadable(&self, guest: GuestId) -> bool {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner).contains(&guest)
    }

    /// Tells a guest's task something; begins it if it is not there.
    pub fn tell(&self, guest: GuestId, message: GuestMessage) {
        if self.is_unreadable(guest) {
            tracing::error!(%guest, ?message, "the guest's record cannot be read: mend or remove it, and restart the agent");
            return;
        }
        let mut tasks = self.lock();
        let handle =
            tasks.entry(guest).or_insert_with(|| guest::begin(self.host.clone(), guest, None, self.ended.clone()));
        handle.tell(message);
    }

    fn tell_known(&self, guest: GuestId, message: GuestMessage) {
        match self.lock().get(&guest) {
            Some(handle) => handle.tell(message),
            None => tracing::debug!(%guest, ?message, "nothing is known of the guest"),
        }
    }

    /// The controller is there again, and tells what this host owns.
    pub fn link_up(&self, owned: &[(GuestId, Epoch)]) {
        let mine: HashMap<GuestId, Epoch> = owned.iter().copied().collect();
        let known: Vec<GuestId> = self.lock().keys().copied().collect();
        for guest in known {
            self.tell_known(guest, GuestMessage::LinkUp { owned: mine.get(&guest).copied() });
        }
        for (guest, epoch) in owned {
            if !self.lock().contains_key(guest) {
                self.tell(*guest, GuestMessage::LinkUp { owned: Some(*epoch) });
            }
        }
    }

    /// Forgets guests whose tasks have ended, until `cancel`.
    pub async fn reap(self: Arc<Self>, mut ended: mpsc::Receiver<GuestId>) {
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                guest = ended.recv() => match guest {
                    Some(guest) => {
                        drop(self.lock().remove(&guest));
                        self.host.holdings.forget(guest);
                    }
                    None => return,
                },
            }
        }
    }

    /// Passes the hypervisor's events on, until `cancel`.
    pub async fn follow_backend(self: Arc<Self>) {
        let mut events = self.host.backend.events();
        loop {
            let event = tokio::select! {
                () = self.cancel.cancelled() => return,
                event = events.recv() => event,
            };
            match event {
                Ok(BackendEvent::Guest { guest, what }) => self.tell_known(guest, GuestMessage::Event(what)),
                Ok(BackendEvent::Resynchronise) | Err(broadcast::error::RecvError::Lagged(_)) => self.look_at_all(),
                Err(broadcast::error::RecvError::Closed) => {
                    tracing::error!("the hypervisor tells nothing any more");
                    return;
                }
            }
        }
    }

    fn look_at_all(&self) {
        for handle in self.lock().values() {
            handle.tell(GuestMessage::Look);
        }
    }

    /// The controller ordered something about a guest, at this place in its history.
    pub fn note(&self, guest: GuestId, mark: HistoryMark) {
        self.host.holdings.note(guest, mark);
    }

    /// How the guests are.
    #[must_use]
    pub fn views(&self) -> Vec<(GuestId, GuestView)> {
        self.lock().iter().map(|(guest, handle)| (*guest, handle.view.borrow().clone())).collect()
    }

    /// The guest that has a port, where it runs here.
    #[must_use]
    pub fn of_port(&self, port: PortId) -> Option<GuestView> {
        let tasks = self.lock();
        let mut views = tasks.values().map(|handle| handle.view.borrow());
        views.find(|view| view.ports.contains(&port)).map(|view| view.clone())
    }

    /// Whether no guest takes part in an operation.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.rows().iter().all(|row| row.operation.is_none())
    }

    fn rows(&self) -> Vec<GuestReport> {
        self.lock().values().filter_map(|handle| handle.view.borrow().report.clone()).collect()
    }

    /// Ends all tasks; guests and volume processes go on.
    pub async fn leave(&self) {
        self.lock().clear();
        self.chunk_connections.close();
        self.chunk_connections.wait().await;
    }
}

/// The records below a folder, and the guests whose records cannot be read. Blocking.
pub(crate) fn read_records(folder: &Path, run: &Path) -> (Vec<GuestRecord>, HashSet<GuestId>) {
    let (mut records, mut unreadable) = (Vec::new(), HashSet::new());
    let Ok(entries) = std::fs::read_dir(folder) else { return (records, unreadable) };
    for guest in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<GuestId>().ok()) {
        match GuestRecord::load(&Places::new(folder, run, guest)) {
            Ok(Some(record)) if record.guest() == guest => records.push(record),
            // A folder that was made for a guest that then did not come, or is being removed.
            Ok(None) => {}
            Ok(Some(record)) => {
                tracing::error!(%guest, holds = %record.guest(), "the guest's record is another guest's; it is left alone");
                unreadable.insert(guest);
            }
            Err(error) => {
                let error = crate::chain(&error);
                tracing::error!(%guest, error, "the guest's record cannot be read; it is left alone");
                unreadable.insert(guest);
            }
        }
    }
    (records, unreadable)
}

impl Router for Guests {
    fn route(&self, incoming: Incoming) {
        if let Channel::Chunks { project } = incoming.channel {
            if self.chunk_connections.len() >= CHUNK_CONNECTIONS {
                self.chunk_connections.spawn(incoming.refuse(not_here("too many connections ask for chunks")));
                return;
            }
            let (store, cancel) = (self.host.store.home(), self.cancel.clone());
            self.chunk_connections.spawn(async move {
                match incoming.accept().await {
                    Ok(stream) => chunks::serve(store, project, stream, &cancel).await,
                    Err(error) => tracing::debug!(error = crate::chain(&error), "a chunk connection broke at once"),
                }
            });
            return;
        }
        let known = incoming.ticket.guest.and_then(|guest| {
            let tasks = self.lock();
            tasks.get(&guest).map(|handle| handle.mailbox.clone())
        });
        match known.map(|mailbox| mailbox.try_reserve_owned()) {
            Some(Ok(slot)) => drop(slot.send(GuestMessage::Incoming(Box::new(incoming)))),
            _ => {
                self.chunk_connections.spawn(incoming.refuse(not_here("nothing is here of this guest (yet)")));
            }
        }
    }
}

impl Facts for Guests {
    fn hello(&self) -> Hello {
        let host = &self.host;
        Hello {
            host: host.id,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            data_address: host.config.data_address,
            overlay_address: host.config.overlay_address,
            overlay_encryption: host.switch.encryption(),
            capacity: host.ledger.capacity(),
            compat_classes: host.classes.clone(),
            probe: self.probe.clone(),
            guests: self.rows(),
            volumes: Vec::new(),
            view_revision: host.switch.revision(),
            takes_sweeps: true,
            takes_consoles: true,
            knows_predictive: true,
            takes_checks: true,
            takes_points: true,
            takes_checkpoints: host.backend.checkpointing().is_ok(),
            moves_none_live: host.backend.live_migration().is_err(),
            takes_mirrors: host.backend.mirroring().is_ok(),
            takes_post_copy: host.backend.post_copy().is_ok(),
            takes_lazy_thaw: host.backend.lazy_thaw().is_ok_and(|lazy| lazy.offers().is_ok()),
            takes_holds: host.backend.live_migration().is_ok_and(supercloud_blanket::LiveMigration::takes_holds),
            measures_paths: true,
            tells_flows: true,
            takes_leases: host.backend.mirroring().is_ok_and(supercloud_blanket::Mirroring::takes_leases),
        }
    }

    fn heartbeat(&self) -> Notice {
        Notice::Heartbeat {
            used: self.host.ledger.used(),
            guests: self.rows(),
            view_revision: self.host.switch.revision(),
            announced: *self.announced.borrow(),
        }
    }
}

#[cfg(test)]
mod tests {
    use supercloud_ids::HostId;

    use super::*;

    #[test]
    fn a_record_that_cannot_be_read_is_left_alone_and_known() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad, other, empty) =
            (GuestId::generate(), GuestId::generate(), GuestId::generate(), GuestId::generate());
        let places = |guest| Places::new(dir.path(), Path::new("/r"), guest);
        let record = GuestRecord::new(good, HostId::generate());
        record.save(&places(good)).unwrap();
        record.save(&places(other)).unwrap();
        for guest in [bad, empty] {
            std::fs::create_dir_all(&places(guest).folder).unwrap();
        }
        std::fs::write(places(bad).record(), "{").unwrap();
        std::fs::create_dir(dir.path().join("something")).unwrap();
        let (records, unreadable) = read_records(dir.path(), Path::new("/r"));
        assert_eq!(records.iter().map(GuestRecord::guest).collect::<Vec<_>>(), [good]);
        assert_eq!(unreadable, HashSet::from([bad, other]));
    }
}
