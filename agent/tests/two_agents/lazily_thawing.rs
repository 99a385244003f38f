//! The test hypervisor's thaws that run a guest before its memory is there: a page lies in a block of what was frozen, which has to be as
//! it was written.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult, BoxFuture, Launch, LazyThaw,
    backend::{GuestInfo, PauseReason, RunState},
    migrate::Transfer,
    thaw::{FROZEN_BLOCK_BYTES, FrozenBlocks},
};
use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::{
    hypervisor::{Hypervisor, failed, saved},
    post_copying::{Missing, PAGES},
};

/// Reads a block, and looks that it is what was written.
async fn read(image: &dyn FrozenBlocks, block: u64, next: u64) -> std::io::Result<()> {
    let content = image.read(block).await?;
    let mut written = saved(next);
    assert_eq!(written.len() as u64, image.bytes());
    written.resize(written.len().next_multiple_of(FROZEN_BLOCK_BYTES as usize), 0);
    let at = (block * FROZEN_BLOCK_BYTES) as usize;
    assert!(content == written[at..at + FROZEN_BLOCK_BYTES as usize], "block {block} is not what was written");
    Ok(())
}

impl LazyThaw for Hypervisor {
    fn offers(&self) -> BackendResult<()> {
        if self.0.world.lacks_lazy_thaws.load(Ordering::SeqCst) {
            return Err(BackendError::Unsupported { back_end: "fake", option: "thaws at once".into() });
        }
        Ok(())
    }

    fn takes(&self, format: &str) -> BackendResult<()> {
        assert_eq!(format, "test/1");
        self.offers()
    }

    fn thaw_lazily(
        &self,
        launch: Launch,
        image: Arc<dyn FrozenBlocks>,
        _format: String,
    ) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(async move {
            let first = image.read(0).await.map_err(failed("thaw"))?;
            let next = u64::from_le_bytes(first[..8].try_into().unwrap());
            read(&*image, 0, next).await.map_err(failed("thaw"))?;
            let guest = launch.guest;
            self.0.lazy.lock().unwrap().insert(guest);
            let info = self.0.put(launch, RunState::Paused(PauseReason::Arrived), next).await?;
            self.0.missing.lock().unwrap().insert(guest, Arc::new(Missing::new(0..PAGES)));
            *self.0.thawed_as.lock().unwrap() = next;
            Ok(info)
        })
    }

    fn is_lazy(&self, guest: GuestId) -> BackendResult<bool> {
        Ok(self.0.lazy.lock().unwrap().contains(&guest))
    }

    fn fetch(&self, guest: GuestId, image: Arc<dyn FrozenBlocks>) -> BackendResult<Transfer<()>> {
        let inner = self.0.clone();
        let missing = inner.missing.lock().unwrap().get(&guest).cloned();
        let missing = missing.ok_or(BackendError::NoSuchGuest { guest })?;
        let (_, progress) = watch::channel(Default::default());
        let done = Box::pin(async move {
            let next = *inner.thawed_as.lock().unwrap();
            let blocks = image.bytes().div_ceil(FROZEN_BLOCK_BYTES);
            while let Some(page) = missing.next() {
                if !inner.guests.lock().await.contains_key(&guest) {
                    return Err(BackendError::NoSuchGuest { guest });
                }
                tokio::time::sleep(Duration::from_millis(inner.world.page_ms.load(Ordering::SeqCst))).await;
                match read(&*image, page % blocks, next).await {
                    Ok(()) => missing.came(page),
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
            inner.lazy.lock().unwrap().remove(&guest);
            Ok(())
        });
        Ok(Transfer { progress, done })
    }
}
