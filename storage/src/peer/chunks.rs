//! Sealed chunks for hosts of other clouds: the server gives sealed bytes of the projects that it was told to serve,
//! by name only; it has no keys and learns nothing of the content.
//!
//! Frames: `GetChunk` (kind 16: request u64, project 16, name 32), `Chunk` (17: request u64, then the sealed bytes in
//! pieces of at most 512 KiB, the last flagged), `NoChunk` (18: request u64, is_refused u8).

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use supercloud_ids::ProjectId;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Dial, Stream};
use crate::{
    backend::{ObjectKey, ObjectStore, StoreError, StoreFuture},
    chunk::MAX_SEALED_BYTES,
    key::ChunkName,
    source::ChunkSource,
    wire::{Frame, WireError, read_frame, write_frame},
};

const GET_CHUNK: u16 = 16;
const CHUNK: u16 = 17;
const NO_CHUNK: u16 = 18;
const PIECE_BYTES: usize = 512 << 10;
const AT_ONCE: usize = 16;
const BUDGET: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq)]
enum ChunkMessage {
    Get { request: u64, project: ProjectId, name: ChunkName },
    Piece { request: u64, is_last: bool, bytes: Bytes },
    None { request: u64, is_refused: bool },
}

impl ChunkMessage {
    fn encode(&self) -> Frame {
        let mut out = BytesMut::new();
        let kind = match self {
            Self::Get { request, project, name } => {
                out.put_u64_le(*request);
                out.put_slice(project.uuid().as_bytes());
                out.put_slice(&name.0);
                GET_CHUNK
            }
            Self::Piece { request, is_last, bytes } => {
                out.put_u64_le(*request);
                out.put_u8(u8::from(*is_last));
                out.put_slice(bytes);
                CHUNK
            }
            Self::None { request, is_refused } => {
                out.put_u64_le(*request);
                out.put_u8(u8::from(*is_refused));
                NO_CHUNK
            }
        };
        Frame::v1(kind, out.freeze())
    }

    fn decode(frame: &Frame) -> Result<Self, WireError> {
        let mut fields = frame.expect_version(1)?;
        let request = fields.u64()?;
        let message = match frame.kind {
            GET_CHUNK => {
                let project = ProjectId::from_uuid(uuid::Uuid::from_bytes(fields.array()?));
                Self::Get { request, project, name: ChunkName(fields.array()?) }
            }
            CHUNK => {
                let is_last = fields.u8()? == 1;
                let skip = frame.payload.len() - fields.left();
                return Ok(Self::Piece { request, is_last, bytes: frame.payload.slice(skip..) });
            }
            NO_CHUNK => Self::None { request, is_refused: fields.u8()? == 1 },
            kind => return Err(WireError::Kind { kind }),
        };
        fields.end()?;
        Ok(message)
    }
}

/// Which projects a chunk server serves. Shared: what is added or removed counts at once.
#[derive(Debug, Clone, Default)]
pub struct ServedProjects(Arc<Mutex<HashSet<ProjectId>>>);

impl ServedProjects {
    /// Serve a project's chunks from now on.
    pub fn add(&self, project: ProjectId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(project);
    }

    /// Serve them no more.
    pub fn remove(&self, project: ProjectId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&project);
    }

    /// Whether they are served.
    #[must_use]
    pub fn contains(&self, project: ProjectId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&project)
    }
}

/// Serves chunks of `projects` from `store` on `stream` until the peer leaves or `cancel` is cancelled.
pub async fn serve_chunks<S: Stream + 'static>(
    store: Arc<dyn ObjectStore>,
    projects: ServedProjects,
    stream: S,
    cancel: &CancellationToken,
) -> Result<(), WireError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (frames, mut outgoing) = mpsc::channel::<Frame>(AT_ONCE);
    let send = async {
        while let Some(frame) = outgoing.recv().await {
            let sent = tokio::time::timeout(BUDGET, write_frame(&mut writer, &frame)).await;
            sent.map_err(|_| WireError::Io(std::io::ErrorKind::TimedOut.into()))??;
        }
        Ok(())
    };
    let answer = async {
        let mut tasks = JoinSet::new();
        let permits = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let frame = match read_frame(&mut reader).await {
                Ok(frame) => frame,
                Err(WireError::Closed) => return Ok(()),
                Err(error) => return Err(error),
            };
            let ChunkMessage::Get { request, project, name } = ChunkMessage::decode(&frame)? else {
                return Err(WireError::Kind { kind: frame.kind });
            };
            let Ok(permit) = permits.clone().acquire_owned().await else { return Ok(()) };
            while tasks.try_join_next().is_some() {}
            let (store, frames, is_served) = (store.clone(), frames.clone(), projects.contains(project));
            tasks.spawn(async move {
                let found = match is_served {
                    true => store.get(ObjectKey::chunk(project, &name), MAX_SEALED_BYTES).await.ok(),
                    false => None,
                };
                match found {
                    // A closed channel means that the connection is gone.
                    None => drop(frames.send(ChunkMessage::None { request, is_refused: !is_served }.encode()).await),
                    Some(sealed) => {
                        for start in (0..sealed.len()).step_by(PIECE_BYTES) {
                            let end = (start + PIECE_BYTES).min(sealed.len());
                            let bytes = sealed.slice(start..end);
                            let piece = ChunkMessage::Piece { request, is_last: end == sealed.len(), bytes };
                            let _ = frames.send(piece.encode()).await;
                        }
                    }
                }
                drop(permit);
            });
        }
    };
    tokio::select! {
        () = cancel.cancelled() => Ok(()),
        sent = send => sent,
        answered = answer => answered,
    }
}

type Answer = Result<Bytes, StoreError>;

struct Call {
    request: u64,
    name: ChunkName,
    answer: oneshot::Sender<Answer>,
}

/// Chunks of one project at the other end of a connection. Its task ends when it is dropped.
pub struct ChunkClient {
    project: ProjectId,
    calls: mpsc::Sender<Call>,
    next: AtomicU64,
    _task: DropGuard,
}

impl fmt::Debug for ChunkClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ChunkClient({})", self.project)
    }
}

fn unreachable(why: String) -> StoreError {
    StoreError::Unreachable { store: "the other host's store".into(), why }
}

impl ChunkClient {
    /// A client for the chunks of `project`. Dials at the first request.
    #[must_use]
    pub fn new(dial: Arc<dyn Dial>, project: ProjectId) -> Self {
        let (calls, mut incoming) = mpsc::channel::<Call>(256);
        let cancel = CancellationToken::new();
        let task = cancel.clone();
        // Owned: ends with the guard that the client holds.
        tokio::spawn(async move {
            let run = async {
                while let Some(first) = incoming.recv().await {
                    match tokio::time::timeout(BUDGET, dial.dial()).await {
                        Ok(Ok(stream)) => converse(stream, project, first, &mut incoming).await,
                        Ok(Err(error)) => drop(first.answer.send(Err(unreachable(error.to_string())))),
                        Err(_) => drop(first.answer.send(Err(unreachable(format!("no connection in {BUDGET:?}"))))),
                    }
                }
            };
            tokio::select! {
                () = task.cancelled() => {}
                () = run => {}
            }
        });
        Self { project, calls, next: AtomicU64::new(1), _task: cancel.drop_guard() }
    }
}

impl ChunkSource for ChunkClient {
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            let request = self.next.fetch_add(1, Ordering::Relaxed);
            let (answer, answered) = oneshot::channel();
            let gone = || unreachable("the connection's task has ended".into());
            self.calls.send(Call { request, name, answer }).await.map_err(|_| gone())?;
            match tokio::time::timeout(BUDGET, answered).await {
                Ok(answer) => answer.map_err(|_| gone())?,
                Err(_) => Err(unreachable(format!("no answer within {BUDGET:?}"))),
            }
        })
    }
}

struct Pending {
    name: ChunkName,
    bytes: BytesMut,
    answer: oneshot::Sender<Answer>,
}

async fn converse(stream: Box<dyn Stream>, project: ProjectId, first: Call, calls: &mut mpsc::Receiver<Call>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let waiting: Mutex<HashMap<u64, Pending>> = Mutex::default();
    let lock = || waiting.lock().unwrap_or_else(PoisonError::into_inner);
    let send = async {
        let mut next = Some(first);
        loop {
            let call = match next.take() {
                Some(call) => Some(call),
                None => calls.recv().await,
            };
            let Some(Call { request, name, answer }) = call else { return "it is not needed any more".to_owned() };
            {
                let mut entries = lock();
                entries.retain(|_, pending| !pending.answer.is_closed());
                entries.insert(request, Pending { name, bytes: BytesMut::new(), answer });
            }
            let frame = ChunkMessage::Get { request, project, name }.encode();
            match tokio::time::timeout(BUDGET, write_frame(&mut writer, &frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error.to_string(),
                Err(_) => return "it does not read".into(),
            }
        }
    };
    let receive = async {
        loop {
            let message = match read_frame(&mut reader).await.and_then(|frame| ChunkMessage::decode(&frame)) {
                Ok(message) => message,
                Err(error) => return error.to_string(),
            };
            let mut entries = lock();
            match message {
                ChunkMessage::Piece { request, is_last, bytes } => {
                    let Some(pending) = entries.get_mut(&request) else { continue };
                    if pending.bytes.len() + bytes.len() > MAX_SEALED_BYTES || (bytes.is_empty() && !is_last) {
                        return "it sent too large a chunk".to_owned();
                    }
                    pending.bytes.extend_from_slice(&bytes);
                    if is_last && let Some(pending) = entries.remove(&request) {
                        let _ = pending.answer.send(Ok(pending.bytes.freeze()));
                    }
                }
                ChunkMessage::None { request, is_refused } => {
                    let Some(pending) = entries.remove(&request) else { continue };
                    let error = match is_refused {
                        true => unreachable("it does not serve this project".into()),
                        false => StoreError::NotFound { key: ObjectKey::chunk(project, &pending.name) },
                    };
                    let _ = pending.answer.send(Err(error));
                }
                ChunkMessage::Get { .. } => return "it sent a question".to_owned(),
            }
        }
    };
    let why = tokio::select! {
        why = send => why,
        why = receive => why,
    };
    for (_, pending) in lock().drain() {
        let _ = pending.answer.send(Err(unreachable(why.clone())));
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::{backend::mem::MemStore, peer::DialFuture};

    /// Every dial makes a new server on an in-memory stream.
    #[derive(Debug)]
    struct Loopback {
        store: Arc<MemStore>,
        projects: ServedProjects,
    }

    impl Dial for Loopback {
        fn dial(&self) -> DialFuture<'_> {
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            let (store, projects): (Arc<dyn ObjectStore>, _) = (self.store.clone(), self.projects.clone());
            tokio::spawn(async move { serve_chunks(store, projects, theirs, &CancellationToken::new()).await });
            Box::pin(async move { Ok(Box::new(ours) as Box<dyn Stream>) })
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn chunks_of_served_projects_are_given_and_no_others() {
        let store = Arc::new(MemStore::default());
        let (project, other) = (ProjectId::generate(), ProjectId::generate());
        let projects = ServedProjects::default();
        projects.add(project);
        let mut names = Vec::new();
        for len in [1usize, 1000, PIECE_BYTES, PIECE_BYTES + 1, MAX_SEALED_BYTES] {
            let name = ChunkName(*blake3::hash(&len.to_le_bytes()).as_bytes());
            for project in [project, other] {
                store.put(ObjectKey::chunk(project, &name), vec![3; len].into()).await.unwrap();
            }
            names.push((name, len));
        }
        let dial = Arc::new(Loopback { store, projects: projects.clone() });
        let client = ChunkClient::new(dial.clone(), project);
        let answers = futures::future::join_all(names.iter().map(|(name, _)| client.sealed(*name))).await;
        for (answer, (_, len)) in answers.into_iter().zip(&names) {
            assert_eq!(answer.unwrap().len(), *len);
        }
        assert!(matches!(client.sealed(ChunkName([0; 32])).await, Err(StoreError::NotFound { .. })));
        let stranger = ChunkClient::new(dial, other);
        assert!(matches!(stranger.sealed(names[0].0).await, Err(StoreError::Unreachable { .. })));
        projects.remove(project);
        assert!(matches!(client.sealed(names[0].0).await, Err(StoreError::Unreachable { .. })));
    }

    #[test]
    fn mutated_messages_never_panic() {
        let seed = 0x5eed_0006;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let name = ChunkName([4; 32]);
        let all = [
            ChunkMessage::Get { request: 1, project: ProjectId::generate(), name },
            ChunkMessage::Piece { request: 2, is_last: true, bytes: Bytes::from_static(&[1; 40]) },
            ChunkMessage::None { request: 3, is_refused: true },
        ];
        for message in &all {
            assert_eq!(&ChunkMessage::decode(&message.encode()).unwrap(), message);
        }
        for _ in 0..10_000 {
            let mut frame = all[rng.random_range(0..all.len())].encode();
            let mut payload = frame.payload.to_vec();
            let at = rng.random_range(0..payload.len());
            payload[at] = rng.random();
            payload.truncate(rng.random_range(0..=payload.len()));
            frame.payload = payload.into();
            frame.kind = rng.random_range(14..20);
            let _ = ChunkMessage::decode(&frame);
        }
    }
}
