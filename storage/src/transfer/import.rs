//! Import: a disk image becomes sealed chunks and a manifest.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::io::AsyncReadExt as _;
use tokio_util::sync::CancellationToken;

use super::{
    DiskFormat, Progress, TransferError, TransferPhase,
    qcow2::{self, Qcow2Header},
};
use crate::{
    BLOCK_BYTES, SECTOR_BYTES,
    backend::{ObjectKey, ObjectStore},
    block_count, chunk, is_zero,
    key::{ChunkKind, ChunkName, ContentRoot, DataKeys},
    manifest::Manifest,
    sparse, sweep,
};

/// Blocks sealed by one worker at a time.
const RUN_BLOCKS: usize = 64;
/// Runs under way at once: with the batch being stored, about 30 MiB of memory.
const RUNS_AT_ONCE: usize = 4;
/// The user that runs foreign image parsers.
const NOBODY: u32 = 65_534;
/// The most memory that the converter may map.
const CONVERT_MEMORY_BYTES: u64 = 2 << 30;

/// How an import is done.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The format; detected when none.
    pub format: Option<DiskFormat>,
    /// A folder for temporary files, with room for the disk's data.
    pub work_folder: PathBuf,
    /// The time that the qcow2 converter may take, and its CPU seconds.
    pub convert_budget: Duration,
}

/// What an import made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The image's identity.
    pub root: ContentRoot,
    /// The disk's size in bytes (rounded up to 512).
    pub size_bytes: u64,
    /// What the file was.
    pub format: DiskFormat,
    /// Blocks that are not all zeros.
    pub chunks: u64,
    /// Of these, how many the store did not have yet.
    pub new_chunks: u64,
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> TransferError {
    let path = path.display().to_string();
    move |source| TransferError::File { what, path, source }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    tokio::task::spawn_blocking(work).await.map_err(TransferError::Worker)?
}

/// Imports the disk image at `path` into `store` as a manifest of `keys`' project.
///
/// qcow2 is converted by `qemu-img`, which runs as an unprivileged user under caps on memory, CPU, file size and time,
/// and only after the header was found harmless.
pub async fn import_image(
    path: &Path,
    options: &ImportOptions,
    keys: Arc<DataKeys>,
    store: Arc<dyn ObjectStore>,
    cancel: &CancellationToken,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<Imported, TransferError> {
    let source = path.to_owned();
    let (file, format, header) = {
        let wanted = options.format;
        blocking(move || probe(&source, wanted)).await?
    };
    let Some(header) = header else {
        return import_raw(file, path, format, keys, store, cancel, &mut progress).await;
    };
    progress(Progress { phase: TransferPhase::Converting, done_bytes: 0, total_bytes: header.virtual_size });
    let converted = tokio::select! {
        () = cancel.cancelled() => return Err(TransferError::Cancelled),
        converted = convert(file, header, options) => converted?,
    };
    import_raw(converted, path, format, keys, store, cancel, &mut progress).await
}

/// Opens the file and finds what it is.
fn probe(path: &Path, wanted: Option<DiskFormat>) -> Result<(File, DiskFormat, Option<Qcow2Header>), TransferError> {
    let file = File::open(path).map_err(file_error("cannot open", path))?;
    let meta = file.metadata().map_err(file_error("cannot stat", path))?;
    if !meta.is_file() {
        return Err(TransferError::Format { path: path.display().to_string(), expected: "disk" });
    }
    let mut start = Vec::new();
    (&file).take(qcow2::PROBE_BYTES as u64).read_to_end(&mut start).map_err(file_error("cannot read", path))?;
    let is_qcow2 = start.starts_with(&qcow2::MAGIC);
    match wanted {
        Some(DiskFormat::Qcow2) if !is_qcow2 => {
            Err(TransferError::Format { path: path.display().to_string(), expected: "qcow2" })
        }
        // Said to be raw but looks like qcow2: a guest could write such a header into its own raw disk, so the word
        // of the caller counts, and a raw image is never handed to a parser.
        Some(DiskFormat::Raw) => Ok((file, DiskFormat::Raw, None)),
        _ if is_qcow2 => {
            let header = Qcow2Header::parse(&start, meta.len())?;
            Ok((file, DiskFormat::Qcow2, Some(header)))
        }
        _ => Ok((file, DiskFormat::Raw, None)),
    }
}

/// Runs the converter; gives the raw file, already unlinked.
async fn convert(file: File, header: Qcow2Header, options: &ImportOptions) -> Result<File, TransferError> {
    let folder = options.work_folder.clone();
    let work = blocking(move || WorkFolder::new(&folder, &file)).await?;
    let output = work.path.join("out.raw");
    let secs = options.convert_budget.as_secs().max(1);
    let mut command = tokio::process::Command::new("setpriv");
    if work.is_privileged {
        command.args(["--reuid", &NOBODY.to_string(), "--regid", &NOBODY.to_string(), "--clear-groups"]);
    }
    command
        .args(["--no-new-privs", "--inh-caps=-all", "--", "prlimit"])
        .arg(format!("--cpu={secs}"))
        .arg(format!("--as={CONVERT_MEMORY_BYTES}"))
        .arg(format!("--fsize={}", header.virtual_size.next_multiple_of(SECTOR_BYTES)))
        .args(["--core=0", "--", "qemu-img", "convert", "-f", "qcow2", "-O", "raw"])
        // Relative to the folder that it starts in: the folders above need not be open to the unprivileged user.
        .args(["in.qcow2", "out.raw"])
        .current_dir(&work.path)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let convert = |message: String| TransferError::Convert { message };
    let mut child = command.spawn().map_err(|e| convert(format!("it cannot be started: {e}")))?;
    let stderr = child.stderr.take();
    let run = async {
        let mut said = Vec::new();
        if let Some(stderr) = stderr {
            // What it says is shown to a person: the first lines are enough. Reading on would let it fill memory.
            let _ = stderr.take(4096).read_to_end(&mut said).await;
        }
        (child.wait().await, said)
    };
    let Ok((status, said)) = tokio::time::timeout(options.convert_budget, run).await else {
        return Err(convert(format!("it did not end within {} s", secs)));
    };
    let status = status.map_err(|e| convert(e.to_string()))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&said);
        let said = said.replace(&*work.path.to_string_lossy(), "");
        return Err(convert(format!("{status}: {}", said.trim())));
    }
    blocking(move || {
        let file = File::open(&output).map_err(file_error("cannot open", &output))?;
        let len = file.metadata().map_err(file_error("cannot stat", &output))?.len();
        if len < header.virtual_size || len > header.virtual_size.next_multiple_of(SECTOR_BYTES) {
            let message = format!("it made {len} bytes of a disk of {}", header.virtual_size);
            return Err(TransferError::Convert { message });
        }
        // The open file stays readable; its folder goes now.
        drop(work);
        Ok(file)
    })
    .await
}

/// A private folder with a copy of the image that the unprivileged user can read; removed when dropped.
struct WorkFolder {
    path: PathBuf,
    is_privileged: bool,
}

impl WorkFolder {
    fn new(parent: &Path, image: &File) -> Result<Self, TransferError> {
        use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
        let path = parent.join(format!("import-{:016x}", rand::random::<u64>()));
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(file_error("cannot make folder", &path))?;
        // The owner of a file that we just made tells who we are.
        let is_privileged = std::fs::metadata(&path).map_err(file_error("cannot stat", &path))?.uid() == 0;
        let work = Self { path, is_privileged };
        let input = work.path.join("in.qcow2");
        let mut copy = File::create_new(&input).map_err(file_error("cannot make file", &input))?;
        let mut image = image;
        std::io::Seek::rewind(&mut image).map_err(file_error("cannot read the image for", &input))?;
        std::io::copy(&mut image, &mut copy).map_err(file_error("cannot copy the image to", &input))?;
        if is_privileged {
            for path in [&input, &work.path] {
                std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY))
                    .map_err(file_error("cannot give away", path))?;
            }
        }
        Ok(work)
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // Best effort: what stays only takes space in a temporary folder.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Finds the next blocks with data from `from` on; at most [`RUN_BLOCKS`]. Also gives where to go on.
fn scan(file: &File, from: u32, blocks: u32) -> std::io::Result<(Vec<u32>, u32)> {
    let mut found = Vec::new();
    let mut at = from;
    while at < blocks && found.len() < RUN_BLOCKS {
        let Some(data) = sparse::next_data(file, u64::from(at) * BLOCK_BYTES as u64)? else {
            return Ok((found, blocks));
        };
        let block_of = |offset: u64| u32::try_from(offset / BLOCK_BYTES as u64).unwrap_or(u32::MAX);
        at = at.max(block_of(data.start));
        let end = block_of(data.end.saturating_sub(1)).saturating_add(1).min(blocks);
        // An empty range would not advance; files that shrink meanwhile can give one.
        let end = end.max(at.saturating_add(1)).min(blocks);
        while at < end && found.len() < RUN_BLOCKS {
            found.push(at);
            at += 1;
        }
    }
    Ok((found, at))
}

/// Reads a block, filled up with zeros beyond the file's end; `None` when it is all zeros.
fn read_block(file: &File, block: u32, buffer: &mut Vec<u8>) -> std::io::Result<bool> {
    buffer.clear();
    buffer.resize(BLOCK_BYTES, 0);
    let mut filled = 0;
    while filled < BLOCK_BYTES {
        match file.read_at(&mut buffer[filled..], u64::from(block) * BLOCK_BYTES as u64 + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(!is_zero(buffer))
}

type SealedRun = Vec<(u32, ChunkName, Bytes)>;

fn seal_run(file: &File, blocks: &[u32], keys: &DataKeys, path: &Path) -> Result<SealedRun, TransferError> {
    let mut run = Vec::with_capacity(blocks.len());
    let mut buffer = Vec::new();
    for &block in blocks {
        if read_block(file, block, &mut buffer).map_err(file_error("cannot read", path))? {
            let (name, sealed) = chunk::seal(keys, ChunkKind::Data, &buffer)?;
            run.push((block, name, sealed));
        }
    }
    Ok(run)
}

async fn import_raw(
    file: File,
    path: &Path,
    format: DiskFormat,
    keys: Arc<DataKeys>,
    store: Arc<dyn ObjectStore>,
    cancel: &CancellationToken,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<Imported, TransferError> {
    let len = file.metadata().map_err(file_error("cannot stat", path))?.len();
    let size = || TransferError::Size { path: path.display().to_string(), size_bytes: len };
    let size_bytes = len.checked_next_multiple_of(SECTOR_BYTES).ok_or_else(size)?;
    let blocks = block_count(size_bytes).ok_or_else(size)?;
    let mut manifest = Manifest::zeros(size_bytes)?;
    let file = Arc::new(file);
    let path: Arc<Path> = path.into();

    let runs = futures::stream::unfold((0, file.clone(), path.clone()), move |(from, file, path)| async move {
        if from >= blocks {
            return None;
        }
        let (scanned, name) = (file.clone(), path.clone());
        let found = blocking(move || scan(&scanned, from, blocks).map_err(file_error("cannot read", &name))).await;
        // After an error there is nothing to go on with.
        let next = found.as_ref().map_or(blocks, |(_, next)| *next);
        Some((found, (next, file, path)))
    });
    let sealed = runs.map(|found| {
        let (file, keys, path) = (file.clone(), keys.clone(), path.clone());
        async move {
            let (found, next) = found?;
            let run = blocking(move || seal_run(&file, &found, &keys, &path)).await?;
            Ok::<_, TransferError>((run, next))
        }
    });
    let mut sealed = std::pin::pin!(sealed.buffered(RUNS_AT_ONCE));
    let (mut chunks, mut new_chunks) = (0, 0);
    while let Some(run) = tokio::select! {
        () = cancel.cancelled() => return Err(TransferError::Cancelled),
        run = sealed.next() => run,
    } {
        let (run, next) = run?;
        chunks += run.len() as u64;
        let mut objects = Vec::with_capacity(run.len());
        for (block, name, bytes) in run {
            manifest.set(block, Some(name));
            objects.push((ObjectKey::chunk(keys.project(), &name), bytes));
        }
        new_chunks += sweep::put_chunks(&*store, keys.project(), objects).await? as u64;
        let done_bytes = (u64::from(next) * BLOCK_BYTES as u64).min(size_bytes);
        progress(Progress { phase: TransferPhase::Storing, done_bytes, total_bytes: size_bytes });
    }
    let root = manifest.store(&keys, &*store).await?;
    Ok(Imported { root, size_bytes, format, chunks, new_chunks })
}
