//! Making ready on a destination: volumes, seed disk, ports, kernel.

use std::{path::Path, sync::Arc};

use supercloud_api::{
    Code, Problem,
    link::{BootSpec, VolumeSpec},
};
use supercloud_handover::{DestinationPlan, VolumeStamp};
use supercloud_ids::Epoch;
use supercloud_storage::{
    backend::{DirStore, StoreError},
    key::{ContentRoot, DataKeys, ProjectKey},
    process::{KeySource, NbdMode, StartRole, VolumeProcessConfig, control::RoleStatus},
    source::ChunkReader,
    transfer::export_raw,
};

use super::{Job, JobError, file_error};
use crate::{
    chunks::ChunkSources,
    config::free_disk_bytes,
    durable,
    guest::{
        machine::boot_file,
        record::{CopyRecord, VolumeOrigin},
    },
    seed,
    volumes::VolumeHome,
};

/// Memory of a volume process for blocks of its base, in bytes.
const CACHE_BYTES: u64 = 32 << 20;
/// Disk that is left free whatever is spooled, in bytes.
pub const DISK_RESERVE_BYTES: u64 = 256 << 20;
/// Kernels and initial RAM disks that are kept.
const BOOT_FILES: usize = 32;

/// The project's keys and a reader over the cloud's store and the assignment's sources.
#[must_use]
pub fn reader(job: &Job, copy: &CopyRecord, sources: &Arc<ChunkSources>) -> ChunkReader {
    sources.reader(keys(copy), &job.host.store)
}

/// The project's keys.
#[must_use]
pub fn keys(copy: &CopyRecord) -> Arc<DataKeys> {
    Arc::new(DataKeys::derive(copy.spec.project, &ProjectKey::from_bytes(copy.spec.project_key.0)))
}

/// Makes everything of `copy` ready but the hypervisor's process.
///
/// # Errors
/// What is missing.
pub async fn prepare(
    job: &Job,
    plan: &DestinationPlan,
    copy: &CopyRecord,
    sources: &Arc<ChunkSources>,
) -> Result<(), JobError> {
    let host = &job.host;
    host.holdings.expect(copy);
    let disk_bytes = copy.spec.volumes.iter().map(|volume| volume.size_bytes).sum();
    host.ledger.reserve(job.guest, copy.spec.shape, disk_bytes).map_err(JobError::Refused)?;
    for (home, spec) in copy.volumes.iter().zip(&copy.spec.volumes) {
        prepare_volume(job, copy, home, Some(spec), plan.from.epoch).await?;
    }
    let reader = reader(job, copy, sources);
    if let BootSpec::Kernel { kernel_root, initrd_root, .. } = &copy.spec.boot {
        for root in std::iter::once(kernel_root).chain(initrd_root) {
            fetch_boot_file(job, &reader, root).await?;
        }
    }
    if let Some(home) = &copy.seed {
        let store = seed_store(job).await?;
        let base = seed::store(&copy.spec, &keys(copy), &store, &job.places.folder, &job.cancel).await?;
        configure(job, copy, home, base.size_bytes, Some(base.root), VolumeOrigin::Fresh, plan.from.epoch).await?;
        host.runner.ensure(home).await?;
    }
    for port in &copy.spec.ports {
        host.switch.attach(port.port, port.mtu).await?;
    }
    Ok(())
}

async fn seed_store(job: &Job) -> Result<DirStore, JobError> {
    let (folder, user) = (job.places.seed_store(), job.host.runner.user);
    let made = tokio::task::spawn_blocking(move || {
        let shared = durable::make_folder(&folder).and_then(|()| durable::share_store(&folder, user));
        shared.map_err(std::io::Error::other).map_err(file_error("make", &folder))?;
        let content = |source: StoreError| JobError::Content {
            what: "a place for the seed disk",
            source: Box::new(source.into()),
        };
        DirStore::open(&folder).map_err(content)
    });
    made.await?
}

async fn prepare_volume(
    job: &Job,
    copy: &CopyRecord,
    home: &VolumeHome,
    spec: Option<&VolumeSpec>,
    from: Epoch,
) -> Result<(), JobError> {
    let Some(spec) = spec else { return Ok(()) };
    if copy.origin != VolumeOrigin::Local {
        let base = spec.base_root.as_deref().map(parse_root).transpose()?;
        configure(job, copy, home, spec.size_bytes, base, copy.origin, from).await?;
    }
    job.host.runner.ensure(home).await?;
    Ok(())
}

/// Parses a content root that came in an assignment.
///
/// # Errors
/// When it is none.
pub fn parse_root(text: &str) -> Result<ContentRoot, JobError> {
    text.parse().map_err(|_| {
        let cut: String = text.chars().take(80).collect();
        JobError::Refused(Problem::new(Code::BadRequest, format!("'{cut}' is no content root")))
    })
}

/// Writes a new volume's configuration, unless this very operation has done so already.
async fn configure(
    job: &Job,
    copy: &CopyRecord,
    home: &VolumeHome,
    size_bytes: u64,
    base: Option<ContentRoot>,
    origin: VolumeOrigin,
    from: Epoch,
) -> Result<(), JobError> {
    // What an earlier operation may have left would be taken for this one's.
    job.host.runner.delete(home).await?;
    let is_peer = origin == VolumeOrigin::Peer;
    let config = VolumeProcessConfig {
        volume: home.volume,
        project: copy.spec.project,
        size_bytes,
        base,
        start: if is_peer { StartRole::Standby } else { StartRole::Active { epoch: from } },
        data_folder: home.data(),
        run_folder: home.run.clone(),
        store_folder: match &copy.seed {
            Some(seed) if seed.volume == home.volume => job.places.seed_store(),
            _ => job.host.config.store_dir.clone(),
        },
        key: KeySource::File(home.key_file()),
        peer_dial: is_peer.then(|| home.peer_dial()),
        chunk_dial: Some(job.places.chunk_socket()),
        // QEMU comes again when the process was started anew.
        nbd: NbdMode::Replace,
        // Who may connect, the runner knows.
        nbd_uids: Vec::new(),
        agent_uid: None,
        cache_bytes: CACHE_BYTES,
    };
    let key = ProjectKey::from_bytes(copy.spec.project_key.0);
    job.host.runner.configure(home, config, key.expose_hex()).await?;
    Ok(())
}

/// Seals volumes that nobody else has, and gives what they are: the state from which the guest would start.
///
/// # Errors
/// When one cannot be sealed.
pub async fn seal_here(copy: &CopyRecord, from: Epoch) -> Result<Vec<VolumeStamp>, JobError> {
    let mut stamps = Vec::new();
    for home in &copy.volumes {
        let sealed =
            home.client().seal(from).await.map_err(|source| JobError::Volume { what: "take its seal", source })?;
        stamps.push(VolumeStamp { volume: home.volume, root: sealed.root.0, version: sealed.version });
    }
    Ok(stamps)
}

/// Makes the volumes of a granted copy take writes at `copy.epoch`.
///
/// A volume that is sealed at the epoch before was made here, or was here before nobody owned the guest: nobody else has written
/// it since, which the grant proves; so its seal may be lifted.
///
/// # Errors
/// When one cannot be activated.
pub async fn activate(runner: &crate::volumes::VolumeRunner, copy: &CopyRecord, from: Epoch) -> Result<(), JobError> {
    let failed = |source| JobError::Volume { what: "become active", source };
    for home in copy.all_volumes() {
        let status = runner.ensure(home).await?;
        let client = home.client();
        if let RoleStatus::Sealed { epoch } = status.role
            && epoch == from
            && epoch < copy.epoch
            && copy.origin != VolumeOrigin::Peer
        {
            client.unseal(epoch).await.map_err(failed)?;
        }
        client.activate(copy.epoch).await.map_err(failed)?;
    }
    Ok(())
}

/// Fetches a boot part into the cache, if it is not there.
async fn fetch_boot_file(job: &Job, reader: &ChunkReader, root: &str) -> Result<(), JobError> {
    let cache = job.host.boot_cache();
    let path = boot_file(&cache, root);
    if tokio::fs::try_exists(&path).await.unwrap_or(false) {
        return Ok(());
    }
    let (folder, qemu) = (cache.clone(), job.host.qemu);
    tokio::task::spawn_blocking(move || prune(&folder).and_then(|()| durable::lend(&folder, qemu)))
        .await?
        .map_err(|source| file_error("prepare", &cache)(std::io::Error::other(source)))?;
    let temp = path.with_extension(job.operation.short());
    // Left by a crash of this very operation.
    let _ = tokio::fs::remove_file(&temp).await;
    export(job, reader, parse_root(root)?, &temp, "the kernel or initial RAM disk").await?;
    let given = temp.clone();
    tokio::task::spawn_blocking(move || durable::lend(&given, qemu))
        .await?
        .map_err(|source| file_error("lend", &temp)(std::io::Error::other(source)))?;
    tokio::fs::rename(&temp, &path).await.map_err(file_error("rename to", &path))
}

/// Writes content of the store to a file.
///
/// # Errors
/// When it cannot be had, or the disk has no room.
pub async fn export(
    job: &Job,
    reader: &ChunkReader,
    root: ContentRoot,
    path: &Path,
    what: &'static str,
) -> Result<(), JobError> {
    let exported = export_raw(reader, root, path, &job.cancel, |_| {}).await;
    exported.map_err(|source| JobError::Content { what, source: Box::new(source) })?;
    Ok(())
}

/// Checks that the disk can take a spool file of so many bytes.
///
/// # Errors
/// `NoCapacity`.
pub async fn check_disk(job: &Job, bytes: u64) -> Result<(), JobError> {
    let folder = job.host.config.data_dir.clone();
    let free = tokio::task::spawn_blocking(move || free_disk_bytes(&folder)).await?;
    if free < bytes.saturating_add(DISK_RESERVE_BYTES) {
        let detail = format!("{bytes} bytes of disk are needed for the guest's memory, {free} are free here");
        return Err(JobError::Refused(Problem::new(Code::NoCapacity, detail)));
    }
    Ok(())
}

/// Makes the cache's folder and removes the files that were used longest ago. Blocking.
fn prune(cache: &Path) -> Result<(), durable::DurableError> {
    durable::make_folder(cache)?;
    let Ok(entries) = std::fs::read_dir(cache) else { return Ok(()) };
    let mut files: Vec<_> =
        entries.flatten().filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    files.sort();
    let excess = files.len().saturating_sub(BOOT_FILES);
    for (_, path) in files.into_iter().take(excess) {
        // A kernel that a hypervisor has open stays until it closes it.
        durable::remove_file(&path)?;
    }
    Ok(())
}
