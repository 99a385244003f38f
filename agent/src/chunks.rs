//! Chunks of this cloud and of others.
//!
//! - Served: `Channel::Chunks` from the cloud's store, to whoever shows a ticket for the project.
//! - Fetched: what the cloud lacks is asked of the guest's chunk sources in order. Volume processes reach them by a
//!   socket of the agent's (`chunk.sock`); the agent itself by [`ChunkSources::reader`]. Either keeps what it got. When no
//!   source gives a chunk, the controller is asked where it can be had now ([`ChunkPlaces`]).

use std::{
    collections::HashMap,
    fmt, io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use supercloud_api::link::{Answer, ChunkSource as Place, Query};
use supercloud_ids::{GuestId, ProjectId};
use supercloud_storage::{
    backend::{ObjectEntry, ObjectKey, ObjectStore, PutOutcome, StoreError, StoreFuture},
    key::{ChunkName, DataKeys},
    peer::{
        Dial, DialFuture, Stream,
        chunks::{ChunkClient, ServedProjects, serve_chunks},
    },
    source::{ChunkReader, ChunkSource, StoreSource},
};
use tokio::{net::UnixListener, task::JoinSet};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    accounts::Account,
    cloud_store::CloudStore,
    link::LinkHandle,
    plane::{DataPlane, DataStream},
    socket,
};

/// Connections at once to one chunk socket: a guest has at most 64 volumes.
const CONNECTIONS: usize = 64;

/// Serves the cloud's chunks of one project on a connection of the data plane.
pub async fn serve(store: Arc<dyn ObjectStore>, project: ProjectId, stream: DataStream, cancel: &CancellationToken) {
    let projects = ServedProjects::default();
    projects.add(project);
    if let Err(error) = serve_chunks(store, projects, stream, cancel).await {
        tracing::debug!(%project, %error, "a chunk connection broke");
    }
}

/// How long the controller may take to name the sources anew.
const RENEW_BUDGET: Duration = Duration::from_secs(10);
/// Not more often than this is it asked for one guest, however many blocks are missed.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// Sources of one guest that are listened to.
const SOURCES_AT_MOST: usize = 8;

/// Where a guest's chunks can be had: as told with an assignment, then as the controller says when asked again, for tickets
/// and certificates age while a guest runs on for months. Cheap to clone.
#[derive(Clone)]
pub struct ChunkPlaces(Arc<Places>);

struct Places {
    guest: GuestId,
    link: LinkHandle,
    list: Mutex<Vec<Place>>,
    /// When it was asked for last; held while it is being asked for.
    asked: tokio::sync::Mutex<Option<Renewal>>,
}

struct Renewal {
    at: Instant,
    has_answer: bool,
}

impl ChunkPlaces {
    /// None as yet.
    #[must_use]
    pub fn new(link: LinkHandle, guest: GuestId) -> Self {
        Self(Arc::new(Places { guest, link, list: Mutex::default(), asked: tokio::sync::Mutex::default() }))
    }

    /// These count from now on.
    pub fn set(&self, mut places: Vec<Place>) {
        places.truncate(SOURCES_AT_MOST);
        *self.0.list.lock().unwrap_or_else(PoisonError::into_inner) = places;
    }

    fn get(&self) -> Vec<Place> {
        self.0.list.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the controller where the chunks are now, for somebody who found nothing after `since`. Whether there is a newer
    /// answer than that.
    async fn renew(&self, since: Instant) -> bool {
        let mut asked = self.0.asked.lock().await;
        if let Some(last) = &*asked {
            if last.has_answer && last.at >= since {
                return true;
            }
            if last.at.elapsed() < RENEW_EVERY {
                return false;
            }
        }
        let answer = self.0.link.query(Query::ChunkSources { guest: self.0.guest }, RENEW_BUDGET).await;
        let has_answer = match answer {
            Ok(Answer::ChunkSources { sources }) => {
                self.set(sources);
                true
            }
            Ok(other) => {
                tracing::warn!(guest = %self.0.guest, ?other, "the controller answers something else");
                false
            }
            Err(error) => {
                tracing::debug!(guest = %self.0.guest, error = crate::chain(&error), "no newer chunk sources");
                false
            }
        };
        *asked = Some(Renewal { at: Instant::now(), has_answer });
        has_answer
    }
}

/// Dials one chunk source over the data plane, with the ticket and the certificate that count now.
struct PlaceDial {
    plane: DataPlane,
    project: ProjectId,
    places: ChunkPlaces,
    address: SocketAddr,
}

impl fmt::Debug for PlaceDial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlaceDial({} of {})", self.address, self.project)
    }
}

impl Dial for PlaceDial {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            let place = self.places.get().into_iter().find(|place| place.address == self.address);
            let place = place.ok_or_else(|| io::Error::other("there is no such chunk source any more"))?;
            let stream = self.plane.dial_chunks(&place, self.project).await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

/// The chunk sources of one guest, in order.
pub struct ChunkSources {
    plane: DataPlane,
    project: ProjectId,
    places: ChunkPlaces,
    /// The cloud's bucket, if it has one: asked before all others.
    bucket: Option<StoreSource>,
    /// One for each place in the list, made when it is first asked.
    clients: Mutex<HashMap<SocketAddr, Arc<ChunkClient>>>,
    /// Sealed bytes that this host's volume processes got from other clouds through the chunk socket.
    served_bytes: AtomicU64,
}

impl fmt::Debug for ChunkSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkSources(of {} for {})", self.places.0.guest, self.project)
    }
}

impl ChunkSources {
    /// For a project of a host in the cloud of `store`; `places` may change.
    #[must_use]
    pub fn new(plane: DataPlane, project: ProjectId, places: ChunkPlaces, store: &CloudStore) -> Self {
        let bucket = store.bucket().map(|bucket| StoreSource::new(project, Arc::clone(bucket)));
        Self { plane, project, places, bucket, clients: Mutex::default(), served_bytes: AtomicU64::new(0) }
    }

    /// A reader for the agent itself: this host's folder, the cloud's bucket, then these; keeps what it got in the folder.
    #[must_use]
    pub fn reader(self: &Arc<Self>, keys: Arc<DataKeys>, store: &CloudStore) -> ChunkReader {
        let near: Arc<dyn ChunkSource> = Arc::new(StoreSource::new(self.project, Arc::new(store.near().clone())));
        let bucket = self.bucket.clone().map(|bucket| Arc::new(bucket) as Arc<dyn ChunkSource>);
        self.reader_of(keys, std::iter::once(near).chain(bucket))
    }

    /// A reader that keeps what it got in what counts as the cloud's store.
    #[must_use]
    pub fn home_reader(self: &Arc<Self>, keys: Arc<DataKeys>, store: &CloudStore) -> ChunkReader {
        self.reader_of(keys, home_sources(self.project, store).into_iter())
    }

    fn reader_of(
        self: &Arc<Self>,
        keys: Arc<DataKeys>,
        first: impl Iterator<Item = Arc<dyn ChunkSource>>,
    ) -> ChunkReader {
        // One by one, so that a damaged copy at one place is passed over; then all of them, as the controller names them now.
        let nth = |index| Arc::new(Nth { sources: Arc::clone(self), index }) as Arc<dyn ChunkSource>;
        let all = Arc::clone(self) as Arc<dyn ChunkSource>;
        ChunkReader::new(keys, first.chain((0..SOURCES_AT_MOST).map(nth)).chain([all]).collect())
    }

    /// Sealed bytes that volume processes got from other clouds so far.
    #[must_use]
    pub fn served_bytes(&self) -> u64 {
        self.served_bytes.load(Ordering::Relaxed)
    }

    /// The clients of the places that count now, in order.
    fn clients(&self) -> Vec<Arc<ChunkClient>> {
        let places = self.places.get();
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|address, _| places.iter().any(|place| place.address == *address));
        let client = |place: &Place| {
            let dial = || PlaceDial {
                plane: self.plane.clone(),
                project: self.project,
                places: self.places.clone(),
                address: place.address,
            };
            let made = clients
                .entry(place.address)
                .or_insert_with(|| Arc::new(ChunkClient::new(Arc::new(dial()), self.project)));
            Arc::clone(made)
        };
        places.iter().map(client).collect()
    }

    async fn ask_all(&self, name: ChunkName) -> Result<Bytes, StoreError> {
        let mut failure = StoreError::NotFound { key: ObjectKey::chunk(self.project, &name) };
        if let Some(bucket) = &self.bucket {
            match bucket.sealed(name).await {
                Ok(sealed) => return Ok(sealed),
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => {
                    tracing::warn!(%error, "the cloud's bucket does not give a chunk; other places are asked");
                    failure = error;
                }
            }
        }
        for client in self.clients() {
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

    async fn find(&self, name: ChunkName) -> Result<Bytes, StoreError> {
        let began = Instant::now();
        match self.ask_all(name).await {
            Ok(sealed) => Ok(sealed),
            Err(_) if self.places.renew(began).await => self.ask_all(name).await,
            Err(failure) => Err(failure),
        }
    }
}

/// The places of this cloud's chunks, that of what counts as its store first.
pub fn home_sources(project: ProjectId, store: &CloudStore) -> Vec<Arc<dyn ChunkSource>> {
    let near: Arc<dyn ObjectStore> = Arc::new(store.near().clone());
    let stores = store.bucket().cloned().into_iter().chain([near]);
    stores.map(|store| Arc::new(StoreSource::new(project, store)) as Arc<dyn ChunkSource>).collect()
}

impl ChunkSource for ChunkSources {
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes> {
        Box::pin(self.find(name))
    }
}

/// One place of the list.
#[derive(Debug)]
struct Nth {
    sources: Arc<ChunkSources>,
    index: usize,
}

impl ChunkSource for Nth {
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            match self.sources.clients().get(self.index) {
                Some(client) => client.sealed(name).await,
                None => Err(StoreError::NotFound { key: ObjectKey::chunk(self.sources.project, &name) }),
            }
        })
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

    fn put_batch(&self, _objects: Vec<(ObjectKey, Bytes)>) -> StoreFuture<'_, usize> {
        read_only()
    }

    fn refresh(&self, _keys: Vec<ObjectKey>) -> StoreFuture<'_, Vec<ObjectKey>> {
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

    fn stat(&self, _key: ObjectKey) -> StoreFuture<'_, Option<ObjectEntry>> {
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

/// Serves the sources on a unix socket for this host's volume processes, which run as `user`; ends when dropped.
///
/// # Errors
/// When the socket cannot be made.
pub fn offer(sources: Arc<ChunkSources>, path: &Path, user: Account) -> io::Result<AbortOnDropHandle<()>> {
    let listener = socket::listen(path, user)?;
    Ok(AbortOnDropHandle::new(tokio::spawn(accept(listener, sources, user))))
}

async fn accept(listener: UnixListener, sources: Arc<ChunkSources>, user: Account) {
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
        if !socket::is_peer_allowed(&stream, user) || connections.len() >= CONNECTIONS {
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
