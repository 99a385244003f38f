//! Chunks of this cloud and of others.
//!
//! - Served: `Channel::Chunks` from the cloud's directory store, to whoever shows a ticket for the project.
//! - Fetched: what the cloud lacks is asked of the assignment's chunk sources in order. Volume processes reach them by a
//!   socket of the agent's (`chunk.sock`); the agent itself by [`ChunkSources::reader`]. Either keeps what it got.

use std::{
    fmt, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use supercloud_api::link::ChunkSource as Place;
use supercloud_ids::ProjectId;
use supercloud_storage::{
    backend::{DirStore, ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture},
    key::{ChunkName, DataKeys},
    peer::{
        Dial, DialFuture, Stream,
        chunks::{ChunkClient, ServedProjects, serve_chunks},
    },
    source::{ChunkReader, ChunkSource, StoreSource},
};
use tokio::{net::UnixListener, sync::watch, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    plane::{DataPlane, DataStream},
    socket,
};

/// Connections at once to one chunk socket: a guest has at most 64 volumes.
const CONNECTIONS: usize = 64;

/// Serves the cloud's chunks of one project on a connection of the data plane.
pub async fn serve(store: DirStore, project: ProjectId, stream: DataStream, cancel: &CancellationToken) {
    let projects = ServedProjects::default();
    projects.add(project);
    if let Err(error) = serve_chunks(Arc::new(store), projects, stream, cancel).await {
        tracing::debug!(%project, %error, "a chunk connection broke");
    }
}

/// Dials one chunk source over the data plane.
struct PlaceDial {
    plane: DataPlane,
    project: ProjectId,
    /// The list as it is now, and which of it: tickets are renewed.
    places: watch::Receiver<Vec<Place>>,
    index: usize,
}

impl fmt::Debug for PlaceDial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlaceDial({} of {})", self.index, self.project)
    }
}

impl Dial for PlaceDial {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            let place = self.places.borrow().get(self.index).cloned();
            let place = place.ok_or_else(|| io::Error::other("there is no such chunk source any more"))?;
            let stream = self.plane.dial_chunks(&place, self.project).await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

/// The chunk sources of one guest's assignment, in order.
pub struct ChunkSources {
    project: ProjectId,
    clients: Vec<Arc<ChunkClient>>,
    /// Sealed bytes that this host's volume processes got from other clouds through the chunk socket.
    served_bytes: AtomicU64,
}

impl fmt::Debug for ChunkSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkSources({} for {})", self.clients.len(), self.project)
    }
}

impl ChunkSources {
    /// For a project; `places` may change (renewed tickets), the first list's length is what counts.
    #[must_use]
    pub fn new(plane: &DataPlane, project: ProjectId, places: &watch::Receiver<Vec<Place>>) -> Self {
        let count = places.borrow().len();
        let client = |index| {
            let dial = PlaceDial { plane: plane.clone(), project, places: places.clone(), index };
            Arc::new(ChunkClient::new(Arc::new(dial), project))
        };
        Self { project, clients: (0..count).map(client).collect(), served_bytes: AtomicU64::new(0) }
    }

    /// A reader for the agent itself: the cloud's store, then these; keeps what it got.
    #[must_use]
    pub fn reader(&self, keys: Arc<DataKeys>, store: &DirStore) -> ChunkReader {
        let near: Arc<dyn ChunkSource> = Arc::new(StoreSource::new(self.project, Arc::new(store.clone())));
        let far = self.clients.iter().map(|client| Arc::clone(client) as Arc<dyn ChunkSource>);
        ChunkReader::new(keys, std::iter::once(near).chain(far).collect())
    }

    /// Sealed bytes that volume processes got from other clouds so far.
    #[must_use]
    pub fn served_bytes(&self) -> u64 {
        self.served_bytes.load(Ordering::Relaxed)
    }

    async fn find(&self, name: ChunkName) -> Result<Bytes, StoreError> {
        let mut failure = StoreError::NotFound { key: ObjectKey::chunk(self.project, &name) };
        for client in &self.clients {
            match client.sealed(name).await {
                Ok(sealed) => return Ok(sealed),
                // That one cannot be reached tells more than that another has nothing.
                Err(error @ StoreError::NotFound { .. }) => {
                    tracing::debug!(%error, "a chunk source has it not");
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

/// The sources as a store that can only be read: what the chunk socket serves.
#[derive(Debug)]
struct Far(Arc<ChunkSources>);

fn read_only<T>() -> StoreFuture<'static, T> {
    Box::pin(async {
        Err(StoreError::Unreachable { store: "other clouds' stores".into(), why: "they can only be read".into() })
    })
}

impl ObjectStore for Far {
    fn put(&self, _key: ObjectKey, _bytes: Bytes) -> StoreFuture<'_, ()> {
        read_only()
    }

    fn put_if_absent(&self, _key: ObjectKey, _bytes: Bytes) -> StoreFuture<'_, PutOutcome> {
        read_only()
    }

    fn get(&self, key: ObjectKey, cap: usize) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            // A chunk's key ends with its name: see `ObjectKey::chunk`.
            let name = key.as_str().rsplit('/').next().and_then(|name| name.parse::<ChunkName>().ok());
            let Some(name) = name.filter(|name| ObjectKey::chunk(self.0.project, name) == key) else {
                return Err(StoreError::NotFound { key });
            };
            let sealed = self.0.find(name).await?;
            match sealed.len() {
                len if len > cap => Err(StoreError::TooLarge { key, len: len as u64, cap }),
                len => {
                    self.0.served_bytes.fetch_add(len as u64, Ordering::Relaxed);
                    Ok(sealed)
                }
            }
        })
    }

    fn exists(&self, _key: ObjectKey) -> StoreFuture<'_, bool> {
        read_only()
    }

    fn delete(&self, _key: ObjectKey) -> StoreFuture<'_, bool> {
        read_only()
    }

    fn list<'a>(
        &'a self,
        _prefix: &'a str,
        _after: Option<&'a str>,
        _limit: usize,
    ) -> StoreFuture<'a, Vec<ObjectEntry>> {
        read_only()
    }
}

/// Serves the sources on a unix socket for this host's volume processes; ends when dropped.
///
/// # Errors
/// When the socket cannot be made.
pub fn offer(sources: Arc<ChunkSources>, path: &Path) -> io::Result<AbortOnDropHandle<()>> {
    let listener = socket::listen(path)?;
    Ok(AbortOnDropHandle::new(tokio::spawn(accept(listener, sources))))
}

async fn accept(listener: UnixListener, sources: Arc<ChunkSources>) {
    let projects = ServedProjects::default();
    projects.add(sources.project);
    let far: Arc<dyn ObjectStore> = Arc::new(Far(sources));
    let mut connections = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection to the chunk socket");
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        if !socket::is_peer_allowed(&stream, &[]) || connections.len() >= CONNECTIONS {
            continue;
        }
        let (far, projects) = (far.clone(), projects.clone());
        connections.spawn(async move {
            let never = CancellationToken::new();
            if let Err(error) = serve_chunks(far, projects, stream, &never).await {
                tracing::debug!(%error, "a volume's chunk connection broke");
            }
        });
    }
}
