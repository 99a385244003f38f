//! The agents of a cloud that are asked for its chunks: those that can be dialled when a content is begun, each until it fails once.
//! A host that swallows packets costs a few seconds once, and not some for each chunk.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use supercloud_api::{
    Code,
    ids::{CloudId, ProjectId},
};
use supercloud_storage::{
    backend::{StoreError, StoreFuture},
    key::ChunkName,
    peer::{Dial, DialFuture, Stream, chunks::ChunkClient},
    source::ChunkSource,
};
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    chain,
    link::{AgentDial, Caller},
    rest::{Api, Failure},
    state::HostRecord,
};

/// Agents of a cloud that are asked for its chunks.
const AGENTS_AT_MOST: usize = 4;
/// Hosts of a cloud that are dialled to find these.
const HOSTS_AT_MOST: usize = 64;
/// Of these, so many at once.
const DIALS_AT_ONCE: usize = 16;
/// How long a host may take to open a connection.
const DIAL_BUDGET: Duration = Duration::from_secs(5);
/// How long others are waited for once one has.
const MORE_BUDGET: Duration = Duration::from_millis(500);
/// How long an agent may take to give a chunk.
const CHUNK_BUDGET: Duration = Duration::from_secs(20);

/// The agents of a cloud that answer, at most [`AGENTS_AT_MOST`].
///
/// # Errors
/// [`Code::HostUnavailable`] when none does.
pub(super) async fn of_cloud(
    api: &Api,
    cloud: CloudId,
    project: ProjectId,
) -> Result<Vec<Arc<dyn ChunkSource>>, Failure> {
    let caller = Caller::new(&api.parts.authority, Arc::clone(&api.parts.keys))
        .map_err(|error| Failure::new(Code::Internal, chain(&error)))?;
    let mut dials: Vec<Arc<dyn Dial>> = Vec::new();
    for record in api.parts.state.list::<HostRecord>().await? {
        let host = &record.host;
        let is_there = host.cloud == cloud && !record.is_removed && api.parts.sessions.is_open(host.id);
        let Some(address) = host.data_address.filter(|_| is_there) else { continue };
        dials.push(Arc::new(AgentDial {
            caller: caller.clone(),
            host: host.id,
            certificate_sha256: host.certificate_sha256.clone(),
            address,
            project,
        }));
        if dials.len() == HOSTS_AT_MOST {
            break;
        }
    }
    let opened = open_some(dials, DIAL_BUDGET).await;
    if opened.is_empty() {
        let why = "no host of the cloud in whose store it lies is connected at an address that the controller can dial";
        return Err(Failure::new(Code::HostUnavailable, why));
    }
    let agent = |opened: Opened| Arc::new(Agent::new(ChunkClient::new(Arc::new(opened), project), CHUNK_BUDGET)) as _;
    Ok(opened.into_iter().map(agent).collect())
}

/// Dials all, several at once and each for so long; the first that open.
async fn open_some(dials: Vec<Arc<dyn Dial>>, budget: Duration) -> Vec<Opened> {
    let dials: Vec<_> = dials.into_iter().map(|dial| open_one(dial, budget).boxed()).collect();
    let mut answers = futures::stream::iter(dials).buffer_unordered(DIALS_AT_ONCE);
    let (mut opened, mut until) = (Vec::new(), None);
    while opened.len() < AGENTS_AT_MOST {
        let answer = match until {
            None => answers.next().await,
            Some(until) => timeout_at(until, answers.next()).await.unwrap_or(None),
        };
        match answer {
            Some(Some((dial, stream))) => {
                // The others are dialled anew when they are needed: a connection that idles may have ended by then.
                let stream = opened.is_empty().then_some(stream);
                opened.push(Opened { dial, stream: Mutex::new(stream) });
                until = until.or_else(|| Some(Instant::now() + MORE_BUDGET));
            }
            Some(None) => {}
            None => break,
        }
    }
    opened
}

async fn open_one(dial: Arc<dyn Dial>, budget: Duration) -> Option<(Arc<dyn Dial>, Box<dyn Stream>)> {
    let error = match timeout(budget, dial.dial()).await {
        Ok(Ok(stream)) => return Some((dial, stream)),
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    tracing::warn!(?dial, %error, "an agent cannot be dialled: others are asked for the cloud's chunks");
    None
}

/// A way that may begin with a connection that is open already, and dials anew when that has ended.
struct Opened {
    dial: Arc<dyn Dial>,
    stream: Mutex<Option<Box<dyn Stream>>>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dial.fmt(f)
    }
}

impl Dial for Opened {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            let open = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
            match open {
                Some(stream) => Ok(stream),
                None => timeout(DIAL_BUDGET, self.dial.dial()).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())),
            }
        })
    }
}

/// An agent that is asked until it cannot be reached once: who reads begins anew with those that can be.
#[derive(Debug)]
struct Agent<S> {
    source: S,
    is_out: AtomicBool,
    budget: Duration,
}

impl<S: ChunkSource> Agent<S> {
    fn new(source: S, budget: Duration) -> Self {
        Self { source, is_out: AtomicBool::new(false), budget }
    }
}

impl<S: ChunkSource> ChunkSource for Agent<S> {
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes> {
        Box::pin(async move {
            let unreachable = |why: String| StoreError::Unreachable { store: "the cloud's store".into(), why };
            if self.is_out.load(Ordering::Relaxed) {
                return Err(unreachable("its host could not be reached before".into()));
            }
            let answer = timeout(self.budget, self.source.sealed(name)).await;
            let answer = answer.unwrap_or_else(|_| Err(unreachable(format!("no chunk within {:?}", self.budget))));
            if let Err(error @ StoreError::Unreachable { .. }) = &answer
                && !self.is_out.swap(true, Ordering::Relaxed)
            {
                tracing::warn!(source = ?self.source, %error, "an agent is asked no more for this content");
            }
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// What a host does that is dialled.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Way {
        Opens,
        Refuses,
        SwallowsPackets,
    }

    impl Dial for Way {
        fn dial(&self) -> DialFuture<'_> {
            Box::pin(async move {
                match self {
                    Self::Opens => Ok(Box::new(tokio::io::empty()) as Box<dyn Stream>),
                    Self::Refuses => Err(io::ErrorKind::ConnectionRefused.into()),
                    Self::SwallowsPackets => std::future::pending().await,
                }
            })
        }
    }

    async fn opened(ways: &[Way]) -> usize {
        let dials = ways.iter().map(|way| Arc::new(*way) as Arc<dyn Dial>).collect();
        open_some(dials, Duration::from_millis(20)).await.len()
    }

    #[tokio::test]
    async fn hosts_that_cannot_be_dialled_stand_in_nobodys_way() {
        use Way::{Opens, Refuses, SwallowsPackets};
        assert_eq!(opened(&[]).await, 0);
        assert_eq!(opened(&[SwallowsPackets, Refuses]).await, 0);
        assert_eq!(opened(&[SwallowsPackets, Refuses, Opens, SwallowsPackets, Opens]).await, 2);
        // Behind more than are asked, and more than are dialled at once.
        let mut many = vec![SwallowsPackets; 3 * DIALS_AT_ONCE];
        many.push(Opens);
        assert_eq!(opened(&many).await, 1);
        assert_eq!(opened(&[Opens; 3 * DIALS_AT_ONCE]).await, AGENTS_AT_MOST);
    }

    #[tokio::test]
    async fn an_open_connection_is_used_once_and_then_dialled_anew() {
        let opened = open_some(vec![Arc::new(Way::Opens), Arc::new(Way::Opens)], DIAL_BUDGET).await;
        let idle = |opened: &Opened| opened.stream.lock().unwrap().is_some();
        assert_eq!(opened.iter().map(idle).collect::<Vec<_>>(), [true, false], "the second's would idle");
        for _ in 0..2 {
            opened[0].dial().await.unwrap();
            assert!(!idle(&opened[0]));
        }
    }

    /// Says what it is told to, and counts how often it was asked; silent with nothing to say.
    #[derive(Debug, Default)]
    struct Told {
        asked: AtomicUsize,
        says: Mutex<Vec<Result<Bytes, StoreError>>>,
    }

    impl ChunkSource for Told {
        fn sealed(&self, _: ChunkName) -> StoreFuture<'_, Bytes> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let says = self.says.lock().unwrap().pop();
            Box::pin(async move {
                match says {
                    Some(says) => says,
                    None => std::future::pending().await,
                }
            })
        }
    }

    #[tokio::test]
    async fn an_agent_is_asked_until_it_fails_once() {
        let name = ChunkName([1; 32]);
        let key = supercloud_storage::backend::ObjectKey::chunk(ProjectId::generate(), &name);
        let unreachable = || StoreError::Unreachable { store: "far".into(), why: "gone".into() };
        // The last is said first; after the last it is silent.
        for says in [vec![], vec![Err(unreachable())]] {
            let mut says = says;
            says.extend([Ok(Bytes::from_static(b"x")), Err(StoreError::NotFound { key: key.clone() })]);
            let told = Told { says: Mutex::new(says), ..Told::default() };
            let agent = Agent::new(told, Duration::from_millis(50));
            // That it has not a chunk is no failure.
            assert!(matches!(agent.sealed(name).await, Err(StoreError::NotFound { .. })));
            assert_eq!(agent.sealed(name).await.unwrap(), "x");
            for _ in 0..3 {
                assert!(matches!(agent.sealed(name).await, Err(StoreError::Unreachable { .. })));
            }
            assert_eq!(agent.source.asked.load(Ordering::Relaxed), 3);
        }
    }
}
