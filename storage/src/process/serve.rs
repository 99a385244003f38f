//! Composition: opens the volume, serves its sockets, ends in order.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{net::UnixStream, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    config::{ConfigError, NbdMode, StartRole, VolumeProcessConfig},
    jobs::Jobs,
    orders::Desk,
    sockets::{Socket, ensure_folder},
};
use crate::{
    backend::{DirStore, ObjectStore, StoreError},
    key::{DataKeys, ProjectKey},
    manifest::ManifestError,
    nbd::serve_nbd,
    peer::{Hello, PeerClient, UnixDial, chunks::ChunkClient, serve_peer},
    source::{ChunkReader, ChunkSource, ReadError, StoreSource},
    volume::{Volume, VolumeError, VolumeParams, chain, disk::FolderDisk, role::Role},
};

/// Control connections at once.
const CONTROLS_AT_ONCE: usize = 32;
/// Peers at once: the destination, and the same one again when its first connection hangs.
const PEERS_AT_ONCE: usize = 4;
/// How long the base's manifest is asked for before the start fails.
const OPEN_BUDGET: Duration = Duration::from_secs(30);

/// Why a volume process failed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Its configuration is refused.
    #[error("the volume process cannot be configured")]
    Config(#[from] ConfigError),
    /// A folder or socket cannot be made.
    #[error("cannot {what} {path}")]
    Setup {
        /// What was done.
        what: &'static str,
        /// Where.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The local store cannot be opened.
    #[error("the local store cannot be opened")]
    Store(#[from] StoreError),
    /// The volume cannot be opened, or not be closed in order.
    #[error("the volume failed")]
    Volume(#[from] VolumeError),
    /// A worker thread died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// The one NBD client.
#[derive(Debug)]
pub(super) struct NbdSlot {
    mode: NbdMode,
    /// Held while a client is served.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Ends the session under way.
    current: Mutex<CancellationToken>,
    has_client: AtomicBool,
    is_closed: AtomicBool,
}

impl NbdSlot {
    fn new(mode: NbdMode) -> Self {
        Self {
            mode,
            turn: Arc::default(),
            current: Mutex::default(),
            has_client: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
        }
    }

    pub(super) fn has_client(&self) -> bool {
        self.has_client.load(Ordering::Acquire)
    }

    fn end_current(&self) {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    }

    /// Ends the session under way and allows no other.
    pub(super) async fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.end_current();
        drop(self.turn.lock().await);
    }

    /// Serves one client after the other, as the mode says.
    async fn serve(&self, volume: &Volume, stream: UnixStream) {
        let turn = match self.mode {
            NbdMode::Exclusive => self.turn.clone().try_lock_owned().ok(),
            NbdMode::Replace => {
                self.end_current();
                Some(self.turn.clone().lock_owned().await)
            }
        };
        let Some(_turn) = turn else {
            tracing::warn!(volume = %volume.id(), "a second NBD client was refused");
            return;
        };
        let cancel = CancellationToken::new();
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = cancel.clone();
        if self.is_closed.load(Ordering::Acquire) {
            return;
        }
        self.has_client.store(true, Ordering::Release);
        if let Err(error) = serve_nbd(volume, stream, &cancel).await {
            tracing::warn!(volume = %volume.id(), error = chain(&error), "the NBD client was let go");
        }
        self.has_client.store(false, Ordering::Release);
    }
}

/// Serves a volume until `shutdown` is cancelled (the binary does so on SIGTERM) or the agent orders it. Then
/// everything acknowledged is made durable, and the sockets are removed. `key` is what [`KeySource::read`] gave: a process
/// that gave up its rights cannot read it any more.
///
/// [`KeySource::read`]: super::KeySource::read
pub async fn run(
    config: VolumeProcessConfig,
    key: ProjectKey,
    shutdown: CancellationToken,
) -> Result<(), ProcessError> {
    config.validate()?;
    let setup = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || prepare(&config, &key)).await??
    };
    let store: Arc<dyn ObjectStore> = Arc::new(setup.store);
    let keys = Arc::new(setup.keys);
    let mut sources: Vec<Arc<dyn ChunkSource>> = vec![Arc::new(StoreSource::new(config.project, store.clone()))];
    if let Some(dial) = &config.chunk_dial {
        sources.push(Arc::new(ChunkClient::new(Arc::new(UnixDial(dial.clone())), config.project)));
    }
    let params = VolumeParams {
        volume: config.volume,
        size_bytes: config.size_bytes,
        base: config.base,
        reader: ChunkReader::new(keys, sources),
        start: match config.start {
            StartRole::Active { epoch } => Role::Active { epoch },
            StartRole::Standby => Role::Standby,
        },
        cache_bytes: config.cache_bytes,
    };
    let disk = Arc::new(setup.disk);
    let volume = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        volume = open(disk, params) => volume?,
    };
    if let Some(dial) = &config.peer_dial {
        let hello =
            Hello { volume: config.volume, project: config.project, size_bytes: config.size_bytes, base: config.base };
        volume.set_source(Some(Arc::new(PeerClient::new(Arc::new(UnixDial(dial.clone())), hello))));
    }

    let listen = |path: std::path::PathBuf, others: &[u32]| {
        let failed = |source| ProcessError::Setup { what: "listen at", path: path.display().to_string(), source };
        Socket::listen(&path, config.agent_uid, others).map_err(failed)
    };
    let nbd = listen(config.nbd_socket(), &config.nbd_uids)?;
    let peer = listen(config.peer_socket(), &[])?;
    // The last: who finds it finds the others.
    let control = listen(config.control_socket(), &[])?;
    let desk = Arc::new(Desk {
        jobs: tokio::sync::Mutex::new(Jobs::new(volume.clone(), store)),
        nbd: NbdSlot::new(config.nbd),
        peers: Mutex::default(),
        leave: shutdown.child_token(),
        is_closed: AtomicBool::new(false),
        volume: volume.clone(),
        config,
    });
    tracing::info!(volume = %volume.id(), role = ?volume.role(), "serving");

    let mut tasks = JoinSet::new();
    {
        let (volume, leave) = (volume.clone(), desk.leave.clone());
        tasks.spawn(async move { volume.flush_in_background(&leave).await });
    }
    tasks.spawn(accept_nbd(nbd, desk.clone()));
    tasks.spawn(accept_peers(peer, desk.clone()));
    tasks.spawn(accept_controls(control, desk.clone()));
    desk.leave.cancelled().await;

    tracing::info!(volume = %volume.id(), "leaving");
    desk.jobs.lock().await.stop_all().await;
    desk.nbd.close().await;
    tasks.shutdown().await;
    if !desk.is_closed.swap(true, Ordering::AcqRel) {
        volume.close().await?;
    }
    Ok(())
}

struct Setup {
    disk: FolderDisk,
    store: DirStore,
    keys: DataKeys,
}

fn prepare(config: &VolumeProcessConfig, key: &ProjectKey) -> Result<Setup, ProcessError> {
    let failed = |what, path: &std::path::Path| {
        let path = path.display().to_string();
        move |source| ProcessError::Setup { what, path, source }
    };
    let keys = DataKeys::derive(config.project, key);
    let folder = &config.data_folder;
    let disk = FolderDisk::open(folder).map_err(failed("open the volume's folder", folder))?;
    let store = DirStore::open(&config.store_folder)?;
    let folder = &config.run_folder;
    ensure_folder(folder, !config.nbd_uids.is_empty()).map_err(failed("make the folder", folder))?;
    Ok(Setup { disk, store, keys })
}

/// Opens the volume; when its base cannot be reached, tries again for a while.
async fn open(disk: Arc<FolderDisk>, params: VolumeParams) -> Result<Volume, VolumeError> {
    let deadline = tokio::time::Instant::now() + OPEN_BUDGET;
    loop {
        match Volume::open(disk.clone(), params.clone()).await {
            Err(VolumeError::Base(ManifestError::Read { root, source: source @ ReadError::Unavailable { .. } }))
                if tokio::time::Instant::now() < deadline =>
            {
                tracing::warn!(%root, error = chain(&source), "the base cannot be read yet");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            other => return other,
        }
    }
}

async fn accept_nbd(socket: Socket, desk: Arc<Desk>) {
    let mut sessions = JoinSet::new();
    loop {
        let stream = socket.accept().await;
        while sessions.try_join_next().is_some() {}
        let desk = desk.clone();
        sessions.spawn(async move { desk.nbd.serve(&desk.volume, stream).await });
    }
}

async fn accept_peers(socket: Socket, desk: Arc<Desk>) {
    let mut peers = JoinSet::new();
    let slots = Arc::new(Semaphore::new(PEERS_AT_ONCE));
    loop {
        let stream = socket.accept().await;
        while peers.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(volume = %desk.volume.id(), "too many peers; one was refused");
            continue;
        };
        let cancel = desk.peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let volume = desk.volume.clone();
        peers.spawn(async move {
            if let Err(error) = serve_peer(volume.clone(), stream, &cancel).await {
                tracing::warn!(volume = %volume.id(), error = chain(&error), "a peer was let go");
            }
            drop(slot);
        });
    }
}

async fn accept_controls(socket: Socket, desk: Arc<Desk>) {
    let mut controls = JoinSet::new();
    let slots = Arc::new(Semaphore::new(CONTROLS_AT_ONCE));
    loop {
        let stream = socket.accept().await;
        while controls.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(volume = %desk.volume.id(), "too many control connections; one was refused");
            continue;
        };
        let desk = desk.clone();
        controls.spawn(async move {
            if let Err(error) = desk.serve(stream).await {
                tracing::warn!(volume = %desk.volume.id(), error = chain(&error), "a control connection broke");
            }
            drop(slot);
        });
    }
}
