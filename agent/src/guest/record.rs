//! What an agent remembers of a guest: one file, replaced atomically, mode 0600 (it holds the project's key).
//!
//! ```text
//!   <data>/guests/<guest id>/guest.json         this record
//!   <data>/guests/<guest id>/console.log        what the console says
//!   <data>/guests/<guest id>/memory             memory state on its way into or out of the store
//!   <data>/guests/<guest id>/volumes/<volume>/  configuration, key, log, data/
//!   <run>/<guest>/                              sockets: <volume>/{nbd,control,peer}.sock, chunk.sock, out.sock, …
//!   <run>/<guest>/in/stream.sock                the hypervisor takes an incoming stream
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use supercloud_api::link::{Assignment, FrozenContent, GuestSpec};
use supercloud_blanket::Launch;
use supercloud_handover::{LocalHandover, VolumeStamp};
use supercloud_ids::{Epoch, GuestId, HostId, OperationId};

use crate::{
    accounts::Account,
    durable::{self, DurableError},
    volumes::VolumeHome,
};

/// The version of the file.
const VERSION: u16 = 1;

/// Where a guest's files and sockets are on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The guest's folder.
    pub folder: PathBuf,
    /// The folder of its sockets.
    pub run: PathBuf,
}

impl Places {
    /// Below the agent's folders.
    #[must_use]
    pub fn new(guests_dir: &Path, run_dir: &Path, guest: GuestId) -> Self {
        Self { folder: guests_dir.join(guest.to_string()), run: run_dir.join(guest.short()) }
    }

    /// Makes the folders; `qemu` is the hypervisor's user. Blocking.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn make(&self, qemu: Account) -> Result<(), DurableError> {
        durable::make_passage(&self.folder)?;
        durable::make_passage(&self.run)?;
        // The rest is opened for it: by libvirtd (console, saved memory) or by us.
        durable::make_folder_of(&self.incoming(), qemu)
    }

    /// The chunk store of the seed disk. Of its own: what lies in the cloud's store is swept when the controller's records do
    /// not name it, and they know nothing of seed disks.
    #[must_use]
    pub fn seed_store(&self) -> PathBuf {
        self.folder.join("seed-store")
    }

    /// The record.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.folder.join("guest.json")
    }

    /// What the console says.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// Where the console is served.
    #[must_use]
    pub fn console_socket(&self) -> PathBuf {
        self.run.join("console.sock")
    }

    /// Memory state on its way into or out of the store.
    #[must_use]
    pub fn memory(&self) -> PathBuf {
        self.folder.join("memory")
    }

    /// Memory of a checkpoint on its way into the store.
    #[must_use]
    pub fn checkpoint(&self) -> PathBuf {
        self.folder.join("checkpoint")
    }

    /// The folder in which the hypervisor makes the socket below: its own.
    #[must_use]
    pub fn incoming(&self) -> PathBuf {
        self.run.join("in")
    }

    /// Where the hypervisor takes an incoming stream.
    #[must_use]
    pub fn incoming_stream(&self) -> PathBuf {
        self.incoming().join("stream.sock")
    }

    /// Where the hypervisor takes memory that a move has left behind.
    #[must_use]
    pub fn incoming_memory(&self) -> PathBuf {
        self.incoming().join("memory.sock")
    }

    /// Where the hypervisor sends an outgoing stream.
    #[must_use]
    pub fn outgoing_stream(&self) -> PathBuf {
        self.run.join("out.sock")
    }

    /// Where volume processes find other clouds' chunks.
    #[must_use]
    pub fn chunk_socket(&self) -> PathBuf {
        self.run.join("chunk.sock")
    }

    /// Where a volume is.
    #[must_use]
    pub fn volume(&self, volume: supercloud_ids::VolumeId) -> VolumeHome {
        VolumeHome {
            volume,
            folder: self.folder.join("volumes").join(volume.to_string()),
            run: self.run.join(volume.short()),
        }
    }
}

/// How a copy's volumes came here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeOrigin {
    /// Made here, from their base content.
    Fresh,
    /// They were here, sealed, when the operation began; they stay when it does not succeed.
    Local,
    /// From another host that has their newest blocks.
    Peer,
}

/// A guest's machine and volumes on this host, as of one epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CopyRecord {
    /// The epoch at which this host owns it, or will if it is granted.
    pub epoch: Epoch,
    /// The operation that made it.
    pub operation: OperationId,
    /// What it is.
    pub spec: GuestSpec,
    /// How the hypervisor is told.
    pub launch: Launch,
    /// Its volumes, in the order of the spec.
    pub volumes: Vec<VolumeHome>,
    /// Its seed disk: the same bytes on every host, so it never travels.
    pub seed: Option<VolumeHome>,
    /// How the volumes came here.
    pub origin: VolumeOrigin,
    /// The volumes as they were sealed last.
    pub sealed: Vec<VolumeStamp>,
}

impl CopyRecord {
    /// Volumes and seed disk.
    pub fn all_volumes(&self) -> impl Iterator<Item = &VolumeHome> {
        self.volumes.iter().chain(&self.seed)
    }
}

/// Memory and device state in a file of this host: the whole guest, while it is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spooled {
    /// The operation.
    pub operation: OperationId,
    /// Who wrote it and in which format.
    pub format: String,
    /// The file's size.
    pub bytes: u64,
}

/// All that is remembered of a guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestRecord {
    version: u16,
    /// The ownership protocol's two machines.
    pub handover: LocalHandover,
    /// What came with the last order.
    pub assignment: Option<Assignment>,
    /// The copy that the source's machine speaks of.
    pub current: Option<CopyRecord>,
    /// The copy that the destination's machine speaks of.
    pub incoming: Option<CopyRecord>,
    /// The guest is in a file.
    pub spooled: Option<Spooled>,
    /// The hypervisor was told to bring the guest into [`Places::memory`] by this operation. Kept before it is told: it
    /// goes on when this agent dies, and then the file may be all there is of the guest.
    #[serde(default)]
    pub spooling: Option<OperationId>,
    /// A freeze is in the store.
    pub frozen: Option<FrozenContent>,
    /// The guest powered itself off; the controller makes a stop of it, in order.
    #[serde(default)]
    pub is_off: bool,
    /// The guest has moved away and left memory behind, and its process is gone: who wants that memory is told so.
    #[serde(default)]
    pub is_memory_gone: bool,
    /// Something that people should know.
    pub alarm: Option<String>,
}

impl GuestRecord {
    /// Nothing of the guest is here.
    #[must_use]
    pub fn new(guest: GuestId, host: HostId) -> Self {
        Self {
            version: VERSION,
            handover: LocalHandover::idle(guest, host),
            assignment: None,
            current: None,
            incoming: None,
            spooled: None,
            spooling: None,
            frozen: None,
            is_off: false,
            is_memory_gone: false,
            alarm: None,
        }
    }

    /// The guest.
    #[must_use]
    pub fn guest(&self) -> GuestId {
        self.handover.source().guest()
    }

    /// Moves the incoming copy into the place of the current one when the destination's machine has become the source's.
    /// Returns the copy that it replaced.
    pub fn turn(&mut self) -> Option<CopyRecord> {
        let epoch = self.handover.source().epoch();
        let is_mine = self.incoming.as_ref().is_some_and(|copy| copy.epoch == epoch);
        if !is_mine || self.handover.destination().epoch().is_some() {
            return None;
        }
        let before = self.current.take();
        self.current = self.incoming.take();
        self.is_memory_gone = false;
        before
    }

    /// Reads a record. Blocking.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn load(places: &Places) -> Result<Option<Self>, DurableError> {
        durable::read_json(&places.record())
    }

    /// Keeps it. Blocking.
    ///
    /// # Errors
    /// When the system refuses: then the former one is there.
    pub fn save(&self, places: &Places) -> Result<(), DurableError> {
        durable::make_passage(&places.folder)?;
        durable::write_json(&places.record(), self)
    }
}
