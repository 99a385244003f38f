//! The test hypervisor's memory that a move leaves behind. A guest that wants a page that is missing waits for it; a page is told by
//! its number, and is the number of the copy that it came from.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult, PostCopy,
    backend::{PauseReason, RunState},
    migrate::Transfer,
};
use supercloud_ids::GuestId;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::watch,
};

use crate::hypervisor::{Hypervisor, Inner, failed};

/// Pages of a guest, as far as they matter here.
pub const PAGES: u64 = 64;
pub const PAGE_BYTES: u64 = 64 << 10;
/// What the destination says when it has all.
const ALL: u64 = u64::MAX;

/// Pages that a guest lacks.
pub struct Missing {
    pages: Mutex<BTreeSet<u64>>,
    /// The one that the guest waits for.
    wanted: Mutex<Option<u64>>,
    told: watch::Sender<u64>,
}

impl Missing {
    pub fn new(pages: impl IntoIterator<Item = u64>) -> Self {
        let pages: BTreeSet<u64> = pages.into_iter().collect();
        let told = watch::Sender::new(pages.len() as u64 * PAGE_BYTES);
        Self { pages: Mutex::new(pages), wanted: Mutex::default(), told }
    }

    pub fn next(&self) -> Option<u64> {
        let pages = self.pages.lock().unwrap();
        let wanted = self.wanted.lock().unwrap().filter(|page| pages.contains(page));
        wanted.or_else(|| pages.first().copied())
    }

    pub fn is_none_missing(&self) -> bool {
        self.pages.lock().unwrap().is_empty()
    }

    pub fn came(&self, page: u64) {
        self.pages.lock().unwrap().remove(&page);
        let left = self.pages.lock().unwrap().len() as u64 * PAGE_BYTES;
        self.told.send_replace(left);
    }

    /// Waits until this page is here.
    pub async fn touch(&self, page: u64) {
        let mut told = self.told.subscribe();
        while self.pages.lock().unwrap().contains(&page) {
            *self.wanted.lock().unwrap() = Some(page);
            told.changed().await.unwrap();
        }
    }
}

impl Inner {
    async fn serve(&self, guest: GuestId, stream: PathBuf) -> BackendResult<()> {
        let what = "serve memory";
        let mut socket = UnixStream::connect(&stream).await.map_err(failed(what))?;
        loop {
            let page = socket.read_u64().await.map_err(failed(what))?;
            let state = self.guests.lock().await.get(&guest).map(|guest| guest.state);
            match state {
                None => return Err(BackendError::NoSuchGuest { guest }),
                Some(RunState::Paused(PauseReason::Departed)) => {}
                Some(state) => {
                    self.world.violations.lock().unwrap().push(format!("{guest} is {state:?} and serves memory"));
                }
            }
            if page == ALL {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(self.world.page_ms.load(Ordering::SeqCst))).await;
            let came = async {
                socket.write_u64(page).await?;
                socket.write_all(&vec![3; PAGE_BYTES as usize]).await
            };
            came.await.map_err(failed(what))?;
        }
    }

    async fn fetch(&self, listener: UnixListener, missing: &Missing) -> BackendResult<()> {
        let what = "fetch memory";
        let (mut socket, _) = listener.accept().await.map_err(failed(what))?;
        let mut bytes = vec![0; PAGE_BYTES as usize];
        let fetched = async {
            while let Some(page) = missing.next() {
                socket.write_u64(page).await?;
                assert_eq!(socket.read_u64().await?, page);
                socket.read_exact(&mut bytes).await?;
                missing.came(page);
            }
            socket.write_u64(ALL).await?;
            socket.shutdown().await
        };
        fetched.await.map_err(failed(what))
    }

    fn missing(&self, guest: GuestId) -> BackendResult<Arc<Missing>> {
        let missing = self.missing.lock().unwrap().get(&guest).cloned();
        missing.ok_or(BackendError::NoSuchGuest { guest })
    }
}

impl PostCopy for Hypervisor {
    fn serve_memory(&self, guest: GuestId, stream: PathBuf) -> BackendResult<Transfer<()>> {
        let inner = self.0.clone();
        let (_, progress) = watch::channel(Default::default());
        Ok(Transfer { progress, done: Box::pin(async move { inner.serve(guest, stream).await }) })
    }

    fn fetch_memory(&self, guest: GuestId, stream: PathBuf) -> BackendResult<Transfer<()>> {
        let missing = self.0.missing(guest)?;
        let listener = UnixListener::bind(&stream).map_err(failed("listen"))?;
        let inner = self.0.clone();
        let (_, progress) = watch::channel(Default::default());
        let done = Box::pin(async move {
            if missing.next().is_none() {
                return Ok(());
            }
            inner.fetch(listener, &missing).await
        });
        Ok(Transfer { progress, done })
    }

    fn missing_bytes(&self, guest: GuestId) -> BackendResult<watch::Receiver<u64>> {
        Ok(self.0.missing(guest)?.told.subscribe())
    }
}
