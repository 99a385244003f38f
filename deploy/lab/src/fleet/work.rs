//! What is done with a fleet: images, networks, guests, moves. Each call waits for its operation's end.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use supercloud_api::{
    CpuChoice, FeedClock, Freeze, Guest, GuestCreate, GuestFreeze, GuestMigrate, GuestPatch, GuestThaw, Image,
    ImageCreate, ImageImport, ImagePart, MemoryMode, Network, NetworkCreate, OnLoss, Operation, OperationKind, Phase,
    Propagation, Shape,
};
use supercloud_cli::progress::phase_name;

use super::{Fleet, FleetError, LogTails, Result, Waiting, blocking, name};
use crate::image::{self, lean::LeanImage};
use crate::process::ProcessId;

/// Size of an upload's pieces.
const PIECE_BYTES: usize = 4 << 20;
/// How long an operation may take: emulated guests on two busy cores.
const OPERATION_BUDGET: Duration = Duration::from_secs(240);
/// How long a guest may stand still for a move between hosts that are translated.
const VM_MAX_DOWNTIME_MS: u64 = 3000;
/// How long a line of shell in a host of this machine's own speed may take.
const SHELL_BUDGET: Duration = Duration::from_secs(120);
/// How long the policy may take to decide, once the feed is where it must.
const DECISION_BUDGET: Duration = Duration::from_secs(60);

/// A lean guest to be made.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Its name.
    pub name: String,
    /// The image.
    pub image: String,
    /// The network.
    pub network: String,
    /// Added to the kernel's command line: the role.
    pub role: String,
    /// Host or cloud.
    pub place: Option<String>,
    /// Its address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its memory, MiB.
    pub memory_mib: u64,
}

impl GuestSpec {
    /// One vCPU, 128 MiB, anywhere.
    #[must_use]
    pub fn new(name: &str, image: &str, network: &str, role: &str) -> Self {
        let [name, image, network, role] = [name, image, network, role].map(str::to_owned);
        Self { name, image, network, role, place: None, ipv4: None, memory_mib: 128 }
    }

    /// Starts it at this host or cloud.
    #[must_use]
    pub fn at(mut self, place: &str) -> Self {
        self.place = Some(place.to_owned());
        self
    }

    /// Gives it this address.
    #[must_use]
    pub fn with_ipv4(mut self, address: Ipv4Addr) -> Self {
        self.ipv4 = Some(address);
        self
    }
}

impl Fleet {
    /// The lean image, built now or taken from the cache, and imported.
    ///
    /// # Errors
    /// When it cannot be built or imported.
    pub async fn import_lean_image(&self, image_name: &str) -> Result<Image> {
        let image = blocking(image::lean::ensure).await??;
        self.import_image(image_name, &image).await
    }

    /// Imports a kernel, an initramfs and a disk.
    ///
    /// # Errors
    /// When a file cannot be read, or the controller refuses.
    pub async fn import_image(&self, image_name: &str, image: &LeanImage) -> Result<Image> {
        let body = ImageCreate { name: name(image_name)?, project: None, cmdline: Some(image.cmdline.clone()) };
        let record =
            self.client.create_image(&body).await.map_err(|source| self.call("making an image record", source))?;
        let id = record.id.to_string();
        let parts =
            [(ImagePart::Kernel, &image.kernel), (ImagePart::Initrd, &image.initrd), (ImagePart::Disk, &image.disk)];
        for (part, file) in parts {
            self.upload(&id, part, file).await?;
        }
        let operation = self
            .client
            .import_image(&id, &ImageImport::default())
            .await
            .map_err(|source| self.call("importing the image", source))?;
        self.finish("importing the image", operation, |_| {}).await?;
        self.client.image(&id).await.map_err(|source| self.call("asking for the image", source))
    }

    async fn upload(&self, image: &str, part: ImagePart, file: &Path) -> Result<()> {
        let path = file.to_owned();
        let content =
            blocking(move || std::fs::read(&path).map(Bytes::from).map_err(|source| FleetError::Read { path, source }))
                .await??;
        for offset in (0..content.len()).step_by(PIECE_BYTES) {
            let piece = content.slice(offset..content.len().min(offset + PIECE_BYTES));
            self.client
                .upload_part(image, part, offset as u64, piece)
                .await
                .map_err(|source| self.call(format!("uploading the image's {part:?}"), source))?;
        }
        Ok(())
    }

    /// Makes a network.
    ///
    /// # Errors
    /// When the controller refuses.
    pub async fn create_network(&self, network: &str, cidr: &str) -> Result<Network> {
        let body = NetworkCreate { name: name(network)?, project: None, cidr: cidr.to_owned(), dns: Vec::new() };
        self.client.create_network(&body).await.map_err(|source| self.call("making a network", source))
    }

    /// Makes a guest and waits until its virtual machine runs (it then boots).
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn create_guest(&self, spec: &GuestSpec) -> Result<Guest> {
        let body = GuestCreate {
            name: name(&spec.name)?,
            project: None,
            image: spec.image.as_str().into(),
            shape: Shape { vcpus: 1, memory_bytes: spec.memory_mib << 20 },
            disk_from: None,
            network: spec.network.as_str().into(),
            ipv4: spec.ipv4,
            place: spec.place.as_deref().map(Into::into),
            disk_bytes: None,
            user_data: None,
            cmdline_extra: Some(spec.role.clone()),
            propagation: Propagation::HotStandby,
            follow_prices: false,
            cpu: CpuChoice::default(),
            on_loss: OnLoss::Nothing,
            start: true,
        };
        let what = format!("starting guest {}", spec.name);
        let operation = self.client.create_guest(&body).await.map_err(|source| self.call(&what, source))?;
        self.finish(&what, operation, |_| {}).await?;
        self.guest(&spec.name).await
    }

    /// A guest as it is now.
    ///
    /// # Errors
    /// When there is none.
    pub async fn guest(&self, guest: &str) -> Result<Guest> {
        self.client.guest(guest).await.map_err(|source| self.call(format!("asking for guest {guest}"), source))
    }

    /// Moves a guest live and waits for the end; every state seen is shown to `watch`.
    ///
    /// # Errors
    /// When it is refused, rolled back or fails.
    pub async fn migrate(&self, guest: &str, to: &str, watch: impl FnMut(&Operation)) -> Result<Operation> {
        let body = GuestMigrate {
            to: to.into(),
            bandwidth_bps: None,
            // What takes a fraction of a second elsewhere takes seconds where every page is copied by a translated processor.
            max_downtime_ms: self.is_of_vms().then_some(VM_MAX_DOWNTIME_MS),
            auto_converge: true,
            deadline_ms: None,
            memory: MemoryMode::PreCopy,
            reason: None,
        };
        let what = format!("moving {guest} to {to}");
        let operation = self.client.migrate_guest(guest, &body).await.map_err(|source| self.call(&what, source))?;
        self.finish(&what, operation, watch).await
    }

    /// Freezes a guest into the store of the cloud where it is.
    ///
    /// # Errors
    /// As [`Fleet::migrate`].
    pub async fn freeze(&self, guest: &str, watch: impl FnMut(&Operation)) -> Result<(Operation, Freeze)> {
        let what = format!("freezing {guest}");
        let operation = self
            .client
            .freeze_guest(guest, &GuestFreeze::default())
            .await
            .map_err(|source| self.call(&what, source))?;
        let operation = self.finish(&what, operation, watch).await?;
        let id = self.guest(guest).await?.freeze;
        let freezes = self.client.freezes().await.map_err(|source| self.call("asking for freezes", source))?;
        let freeze = freezes.into_iter().find(|freeze| Some(freeze.id) == id);
        freeze
            .map(|freeze| (operation, freeze))
            .ok_or_else(|| FleetError::Unexpected(format!("guest {guest} is frozen, but there is no freeze of it")))
    }

    /// Thaws a frozen guest at a host or cloud.
    ///
    /// # Errors
    /// As [`Fleet::migrate`].
    pub async fn thaw(&self, guest: &str, to: &str, watch: impl FnMut(&Operation)) -> Result<Operation> {
        let body = GuestThaw { to: Some(to.into()), ..GuestThaw::default() };
        let what = format!("thawing {guest} in {to}");
        let operation = self.client.thaw_guest(guest, &body).await.map_err(|source| self.call(&what, source))?;
        self.finish(&what, operation, watch).await
    }

    /// Lets price policies move a guest, or not.
    ///
    /// # Errors
    /// When the controller refuses.
    pub async fn follow_prices(&self, guest: &str, follow: bool) -> Result<Guest> {
        let body = GuestPatch { follow_prices: Some(follow), ..GuestPatch::default() };
        self.client.patch_guest(guest, &body).await.map_err(|source| self.call("changing the guest", source))
    }

    /// Sets the clock of the replayed price feed.
    ///
    /// # Errors
    /// When the controller refuses.
    pub async fn set_feed_clock(&self, clock: FeedClock) -> Result<FeedClock> {
        self.admin.set_feed_clock(&clock).await.map_err(|source| self.call("setting the feed's clock", source))
    }

    /// All operations until now.
    ///
    /// # Errors
    /// When the controller does not answer.
    pub async fn operations(&self) -> Result<Vec<Operation>> {
        self.client.operations().await.map_err(|source| self.call("asking for operations", source))
    }

    /// Waits for a move of a guest that somebody else asks for, and is not among `known`.
    ///
    /// # Errors
    /// When none comes in time.
    pub async fn await_foreign_move(&self, guest: &Guest, known: &[Operation]) -> Result<Operation> {
        let mut waiting = Waiting::new("the price policy's decision", self.patient(DECISION_BUDGET));
        loop {
            let operations = self.operations().await?;
            let is_new = |operation: &&Operation| !known.iter().any(|old| old.id == operation.id);
            let is_move = |operation: &&Operation| {
                operation.kind == OperationKind::GuestMigrate && operation.guest == Some(guest.id)
            };
            if let Some(operation) = operations.iter().filter(is_new).find(is_move) {
                return Ok(operation.clone());
            }
            super::check_running(&self.lab, crate::spec::CONTROLLER, "spotd").await?;
            waiting.pause(|| super::log_of(&self.lab, crate::spec::CONTROLLER, "spotd")).await?;
        }
    }

    /// Waits until an operation has ended; one that did not do what it should is an error.
    ///
    /// # Errors
    /// When it was rolled back, failed, or has not ended in time.
    pub async fn finish(
        &self,
        what: &str,
        operation: Operation,
        mut watch: impl FnMut(&Operation),
    ) -> Result<Operation> {
        watch(&operation);
        let budget = self.patient(OPERATION_BUDGET);
        let ended = match self.client.wait(operation.id, budget, &mut watch).await {
            Ok(ended) => ended,
            Err(supercloud_api::client::ClientError::StillRunning(id)) => {
                let last = self.client.operation(id).await.unwrap_or(operation);
                let what = format!(
                    "the end of {what} (operation {id}, phase {}: {})",
                    phase_name(last.phase),
                    last.progress.message
                );
                let logs = self.logs_of_operation(&last);
                return Err(FleetError::Deadline { what, seconds: budget.as_secs(), logs });
            }
            Err(source) => return Err(self.call(what, source)),
        };
        match ended.failure() {
            None => Ok(ended),
            Some(problem) => Err(FleetError::Operation {
                what: what.to_owned(),
                phase: phase_name(ended.phase),
                problem: Box::new(problem),
                logs: self.logs_of_operation(&ended),
            }),
        }
    }

    /// The logs that tell about an operation: of the controller and of the hosts that took part (of all, where that is not known).
    fn logs_of_operation(&self, operation: &Operation) -> LogTails {
        // Host ids are not names; a lab has few hosts, and those that did nothing have little to say.
        let takes_part = operation.phase != Phase::Plan && (operation.guest.is_some() || operation.group.is_some());
        let hosts = self.lab.spec().hosts.iter().map(|host| host.name.as_str()).filter(|_| takes_part);
        self.logs_of(hosts)
    }

    /// Runs a line of shell inside a host to its end, as its root, and gives what it printed.
    ///
    /// # Errors
    /// When the host is down, or the line fails or takes too long.
    pub async fn shell(&self, host: &str, line: &str) -> Result<String> {
        let (lab, host, line) = (Arc::clone(&self.lab), host.to_owned(), line.to_owned());
        let budget = self.patient(SHELL_BUDGET);
        Ok(blocking(move || lab.exec(&host, &["sh", "-c", &line], budget)).await??)
    }

    /// The processes of a guest's hypervisor on a host.
    #[must_use]
    pub fn hypervisors(&self, host: &str) -> Vec<ProcessId> {
        let site = self.lab.host(host).ok();
        let processes = site.map(|site| site.processes()).unwrap_or_default();
        processes.into_iter().filter(|process| process.program().starts_with("qemu-system")).collect()
    }
}
