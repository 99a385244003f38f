//! Export: a manifest becomes a raw disk image, zeros as holes.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, sync::Arc};

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{Progress, TransferError, TransferPhase};
use crate::{
    BLOCK_BYTES,
    key::{ChunkKind, ContentRoot},
    manifest::Manifest,
    source::ChunkReader,
};

/// Blocks read at once.
const READS_AT_ONCE: usize = 16;

/// What an export wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// The disk's size in bytes.
    pub size_bytes: u64,
    /// Bytes that are not holes.
    pub data_bytes: u64,
}

/// Writes the content of `root` to a new file (mode 0600), synced. When it fails, the file is removed.
pub async fn export_raw(
    reader: &ChunkReader,
    root: ContentRoot,
    path: &Path,
    cancel: &CancellationToken,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<Exported, TransferError> {
    let manifest = Manifest::load(reader, root).await?;
    let failed = |what| {
        let path = path.display().to_string();
        move |source| TransferError::File { what, path, source }
    };
    let file = tokio::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .await
        .map_err(failed("cannot make file"))?;
    let file = Arc::new(file.into_std().await);
    let result = write_blocks(reader, &manifest, &file, cancel, &mut progress).await;
    let result = match result {
        Ok(exported) => {
            let synced = tokio::task::spawn_blocking(move || file.sync_all()).await.map_err(TransferError::Worker)?;
            synced.map(|()| exported).map_err(failed("cannot sync"))
        }
        Err(error) => Err(error),
    };
    if result.is_err() {
        // Half an image is no image; the error is what counts.
        let _ = tokio::fs::remove_file(path).await;
    }
    result
}

async fn write_blocks(
    reader: &ChunkReader,
    manifest: &Manifest,
    file: &Arc<File>,
    cancel: &CancellationToken,
    progress: &mut (impl FnMut(Progress) + Send),
) -> Result<Exported, TransferError> {
    let size_bytes = manifest.size_bytes();
    let write = |source| TransferError::File { what: "cannot write", path: "the exported image".into(), source };
    file.set_len(size_bytes).map_err(write)?;
    let mut blocks = std::pin::pin!(
        futures::stream::iter(manifest.chunks())
            .map(|(block, name)| async move {
                let plain = reader.read(ChunkKind::Data, name).await;
                plain.map(|plain| (block, plain)).map_err(|source| TransferError::Read { block, source })
            })
            .buffered(READS_AT_ONCE)
    );
    let mut data_bytes = 0;
    while let Some(block) = tokio::select! {
        () = cancel.cancelled() => return Err(TransferError::Cancelled),
        block = blocks.next() => block,
    } {
        let (block, plain) = block?;
        let offset = u64::from(block) * BLOCK_BYTES as u64;
        let len = usize::try_from(size_bytes - offset).unwrap_or(BLOCK_BYTES).min(plain.len());
        let file = file.clone();
        tokio::task::spawn_blocking(move || file.write_all_at(&plain[..len], offset))
            .await
            .map_err(TransferError::Worker)?
            .map_err(write)?;
        data_bytes += len as u64;
        progress(Progress { phase: TransferPhase::Writing, done_bytes: offset + len as u64, total_bytes: size_bytes });
    }
    Ok(Exported { size_bytes, data_bytes })
}
