//! A frozen guest as it lies in stores: its blocks, each checked against its name, from the nearest place that has it whole.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use supercloud_blanket::{
    BoxFuture,
    thaw::{FROZEN_BLOCK_BYTES, FrozenBlocks},
};
use supercloud_storage::{
    BLOCK_BYTES,
    key::{ChunkKind, ContentRoot},
    manifest::{Manifest, ManifestError},
    source::{ChunkReader, ReadError},
};

const _: () = assert!(FROZEN_BLOCK_BYTES == BLOCK_BYTES as u64);

/// The blocks of one.
#[derive(Debug)]
pub struct StoredBlocks {
    manifest: Manifest,
    bytes: u64,
    reader: ChunkReader,
    /// Why the last block that was asked for could not be had.
    trouble: Mutex<Option<ReadError>>,
}

impl StoredBlocks {
    /// Of this content, of which so many bytes count: in the store it is filled up to whole sectors.
    ///
    /// # Errors
    /// When the list of its blocks cannot be had, or is of less.
    pub async fn open(reader: ChunkReader, root: ContentRoot, bytes: u64) -> Result<Self, ManifestError> {
        let manifest = Manifest::load(&reader, root).await?;
        if bytes == 0 || bytes > manifest.size_bytes() {
            return Err(ManifestError::Size { size_bytes: bytes });
        }
        Ok(Self { manifest, bytes, reader, trouble: Mutex::default() })
    }

    /// Why the last block that was asked for could not be had; `None`: it came.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|error| crate::chain(error))
    }

    /// Likewise, taken out.
    #[must_use]
    pub fn take_trouble(&self) -> Option<ReadError> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl FrozenBlocks for StoredBlocks {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_hole(&self, block: u64) -> bool {
        u32::try_from(block).is_ok_and(|block| self.manifest.get(block).is_none())
    }

    fn read(&self, block: u64) -> BoxFuture<'_, io::Result<Vec<u8>>> {
        Box::pin(async move {
            let number = u32::try_from(block).ok().filter(|number| *number < self.manifest.blocks());
            let number = number.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            let Some(name) = self.manifest.get(number) else { return Ok(vec![0; BLOCK_BYTES]) };
            let read = self.reader.read(ChunkKind::Data, name).await;
            let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            match read {
                Ok(plain) => {
                    *trouble = None;
                    let mut plain = plain.to_vec();
                    plain.resize(BLOCK_BYTES, 0);
                    Ok(plain)
                }
                Err(error) => {
                    let text = crate::chain(&error);
                    *trouble = Some(error);
                    Err(io::Error::other(text))
                }
            }
        })
    }
}
