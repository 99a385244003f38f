//! [`LazyThaw`] on processes of our own VMM: a move out of an image that has left all memory behind, and this agent in the place of the
//! source's process.
//!
//! The process outlives the agent; what proves to it that who comes later serves the same image is in the guest's record.

use std::{
    io::{self, Read as _, Write as _},
    ops::ControlFlow,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use supercloud_blanket::{
    BackendError, BackendResult, BoxFuture, Launch,
    backend::{GuestInfo, StopReason},
    migrate::{Transfer, TransferProgress},
    thaw::{FROZEN_BLOCK_BYTES, FrozenBlocks, LazyThaw},
    vmm::travel::{
        image::{BLOCK_BYTES, Blocks, ImageFeed, Lay},
        left::{Left, Served, serve_from},
    },
};
use supercloud_ids::GuestId;
use tokio::{runtime::Handle, sync::watch, task::JoinSet, time::Duration};

use crate::{
    BACK_END, KvmBackend,
    backend::{THAW_BUDGET, failed},
    checkpoint,
    keeper::{Keeper, Seen},
    migration,
    post_copy::follow,
    record::Proof,
};

const _: () = assert!(FROZEN_BLOCK_BYTES == BLOCK_BYTES);

const WHAT: &str = "thaw a guest before its memory is here";
const FETCH: &str = "fetch a thawed guest's memory";

/// Reads how an image is laid out.
async fn lay_of(image: &dyn FrozenBlocks, what: &'static str) -> BackendResult<Lay> {
    let first = image.read(0).await.map_err(failed(what))?;
    let refused = |error| BackendError::Failed { what, detail: checkpoint::chain(&error) };
    Lay::read(&first, image.bytes()).map_err(refused)
}

async fn state_of(image: &dyn FrozenBlocks, lay: &Lay) -> BackendResult<Vec<u8>> {
    let mut state = Vec::new();
    for block in lay.state_blocks() {
        // What is zeros is not JSON, and is refused where it is read.
        state.extend(image.read(block).await.map_err(failed(WHAT))?);
    }
    Ok(state)
}

/// Has the guest come without its memory. It stands still.
async fn arrive(keeper: &Keeper, stream: Vec<u8>, left: &Left) -> BackendResult<()> {
    let (ours, theirs) = UnixStream::pair().map_err(failed(WHAT))?;
    // Kept before it is there: who finds it can go on.
    keeper.note_left(Some(Proof::of(left))).await?;
    keeper.ask(WHAT, migration::verb("stream"), Some(theirs.into())).await?;
    let writing = tokio::task::spawn_blocking(move || {
        let written = (&ours).write_all(&stream);
        // Until the other end has closed it: what is on its way is not cut off.
        let _ = ours.shutdown(std::net::Shutdown::Write);
        written
    });
    let seen = keeper.until(WHAT, THAW_BUDGET, migration::has_come).await?;
    migration::came(WHAT, keeper, &seen)?;
    writing.await.map_err(io::Error::other).and_then(|written| written).map_err(failed(WHAT))
}

impl KvmBackend {
    async fn thaw_without_memory(
        &self,
        launch: Launch,
        image: Arc<dyn FrozenBlocks>,
        format: String,
    ) -> BackendResult<GuestInfo> {
        self.takes(&format)?;
        let lay = lay_of(&*image, WHAT).await?;
        if lay.config() != checkpoint::config_of(&launch.spec) {
            let detail = "what was frozen is another machine".to_owned();
            return Err(BackendError::Failed { what: WHAT, detail });
        }
        let state = state_of(&*image, &lay).await?;
        let making = tokio::task::spawn_blocking(move || {
            let pages = lay.pages(|block| image.is_hole(block));
            lay.leave(&state, pages)
        });
        let made = making.await.map_err(io::Error::other).map_err(failed(WHAT))?;
        let (stream, left) =
            made.map_err(|error| BackendError::Failed { what: WHAT, detail: checkpoint::chain(&error) })?;
        let guest = launch.guest;
        let keeper = self.launch(launch, true).await?;
        if let Err(error) = arrive(&keeper, stream, &left).await {
            keeper.end(StopReason::Failed, self.config.process_budget).await?;
            return Err(error);
        }
        keeper.info().await?.ok_or(BackendError::NoSuchGuest { guest })
    }
}

/// Brings blocks by tasks of the runtime, for a thread of its own.
struct Bringing {
    image: Arc<dyn FrozenBlocks>,
    runtime: Handle,
    /// They go with this.
    tasks: JoinSet<()>,
    tell: mpsc::Sender<(u64, Option<Vec<u8>>)>,
    told: mpsc::Receiver<(u64, Option<Vec<u8>>)>,
    rings: Arc<UnixStream>,
    bell: UnixStream,
}

impl Bringing {
    fn new(image: Arc<dyn FrozenBlocks>, runtime: Handle) -> io::Result<Self> {
        let (rings, bell) = UnixStream::pair()?;
        rings.set_nonblocking(true)?;
        bell.set_nonblocking(true)?;
        let (tell, told) = mpsc::channel();
        Ok(Self { image, runtime, tasks: JoinSet::new(), tell, told, rings: Arc::new(rings), bell })
    }
}

impl Blocks for Bringing {
    fn bring(&mut self, block: u64) {
        while self.tasks.try_join_next().is_some() {}
        let (image, tell, rings) = (Arc::clone(&self.image), self.tell.clone(), Arc::clone(&self.rings));
        let bring = async move {
            let content = match image.read(block).await {
                Ok(content) => Some(content),
                Err(error) => {
                    tracing::debug!(block, %error, "a block of a frozen guest cannot be had now");
                    None
                }
            };
            // Who is gone needs it no more; a bell that takes no more rings already.
            if tell.send((block, content)).is_ok() {
                let _ = (&*rings).write(&[1]);
            }
        };
        self.tasks.spawn_on(bring, &self.runtime);
    }

    fn come(&mut self) -> Option<(u64, Option<Vec<u8>>)> {
        // Before it is looked: what comes after that rings again.
        while matches!((&self.bell).read(&mut [0; 64]), Ok(64)) {}
        self.told.try_recv().ok()
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// Ends who serves when nobody follows it any more.
struct Serving(Arc<AtomicBool>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

async fn fetch(
    keeper: &Keeper,
    proof: Proof,
    image: Arc<dyn FrozenBlocks>,
    progress: &watch::Sender<TransferProgress>,
) -> BackendResult<()> {
    let lay = lay_of(&*image, FETCH).await?;
    let (ours, theirs) = UnixStream::pair().map_err(failed(FETCH))?;
    let Some(number) = keeper.ask(FETCH, migration::verb("fetch"), Some(theirs.into())).await?.connection else {
        // Nothing was missing any more.
        return Ok(());
    };
    let is_over = Serving(Arc::default());
    let (over, runtime) = (Arc::clone(&is_over.0), Handle::current());
    let serve = move || {
        let pages = lay.pages(|block| image.is_hole(block));
        let left = proof.left(pages);
        let mut watch =
            |_: &Served| if over.load(Ordering::Acquire) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let feed = ImageFeed::new(&lay, Bringing::new(image, runtime)?);
        serve_from(feed, &left, ours, &mut watch)
    };
    let mut serving = tokio::task::spawn_blocking(serve);
    let total = keeper.record().launch.spec.memory_bytes;
    let show = |seen: &Seen| {
        let missing = seen.missing.unwrap_or(total);
        TransferProgress {
            memory_total_bytes: total,
            memory_processed_bytes: total.saturating_sub(missing),
            memory_remaining_bytes: missing,
            ..TransferProgress::default()
        }
    };
    let followed = follow(keeper, FETCH, number, progress, show).await;
    drop(is_over);
    if keeper.seen().missing == Some(0) {
        return Ok(());
    }
    // Rather what is wrong here than that the connection was closed.
    if let Ok(Ok(Err(error))) = tokio::time::timeout(Duration::from_secs(1), &mut serving).await {
        tracing::info!(guest = %keeper.guest(), error = checkpoint::chain(&error), "a frozen guest's memory is not served just now");
    }
    followed
}

impl LazyThaw for KvmBackend {
    fn offers(&self) -> BackendResult<()> {
        match &self.no_faults {
            None => Ok(()),
            Some(why) => Err(BackendError::Unsupported {
                back_end: BACK_END,
                option: format!("thaws that fetch memory while the guest runs, at this host: {why}"),
            }),
        }
    }

    fn takes(&self, format: &str) -> BackendResult<()> {
        self.offers()?;
        if format == checkpoint::FORMAT {
            return Ok(());
        }
        let format: String = format.chars().take(64).collect();
        let option = format!("thaws that fetch memory while the guest runs, of format '{format}'");
        Err(BackendError::Unsupported { back_end: BACK_END, option })
    }

    fn thaw_lazily(
        &self,
        launch: Launch,
        image: Arc<dyn FrozenBlocks>,
        format: String,
    ) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.thaw_without_memory(launch, image, format))
    }

    fn is_lazy(&self, guest: GuestId) -> BackendResult<bool> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        Ok(keeper.record().left.is_some())
    }

    fn fetch(&self, guest: GuestId, image: Arc<dyn FrozenBlocks>) -> BackendResult<Transfer<()>> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        let (sender, progress) = watch::channel(TransferProgress::default());
        let done = async move {
            keeper.state_of_process().await?.ok_or(BackendError::NoSuchGuest { guest })?;
            if let Some(proof) = keeper.record().left
                && keeper.seen().missing != Some(0)
            {
                fetch(&keeper, proof, image, &sender).await?;
            }
            keeper.note_left(None).await
        };
        Ok(Transfer { progress, done: Box::pin(done) })
    }
}
