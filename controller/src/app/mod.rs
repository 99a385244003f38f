//! Puts the parts together: start order, ownership of every task, clean end.
//!
//! ```text
//!   settings -> keys, CA -> store -> state -> first token -> parts that carry operations out -> REST
//!   end: tasks are cancelled, REST drains (8 s), all are awaited (12 s) -> the store is closed
//! ```

mod config;
mod engine;
mod open;

use std::{
    future::Future,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::FutureExt as _;
use supercloud_api::Tenure;
use supercloud_storage::backend::DirStore;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::{Config, ConfigError, FeedConfig, StoreConfig};
use open::OpenStore;

use crate::{
    auth::{self, BootstrapError},
    ca::{Authority, CaError},
    consoles::Consoles,
    evacuation::{self, EvacuationBoard},
    fencing::{self, Claim, Fencing},
    flows::FlowBoard,
    keys::{KeyFileError, Keys},
    leases::LeaseBoard,
    ledger::Clerk,
    link::Sessions,
    markets::MarketsError,
    metrics::Metrics,
    notices::{self, Leaving},
    operations::{checks::CheckBoard, points::PointBoard, progress::ProgressBoard, sweeps::SweepBoard},
    paths::{self, PathBoard},
    plans,
    price_board::Markets,
    recovery::{self, Recovery},
    reliability::ReliabilityBook,
    renting::{self, Place, PlaceParts, ProviderConfigError, Providers},
    rest,
    state::{LiveHosts, State, StateError},
    verdicts::VerdictBoard,
};

/// How long tasks may take to end once they are told.
const TASKS_BUDGET: Duration = Duration::from_secs(12);

/// What the parts share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The settings.
    pub config: Arc<Config>,
    /// The durable state.
    pub state: State,
    /// Root key and ticket key.
    pub keys: Arc<Keys>,
    /// The CA.
    pub authority: Arc<Authority>,
    /// The connected hosts.
    pub hosts: LiveHosts,
    /// The agents' links.
    pub sessions: Sessions,
    /// Consoles that somebody looks at.
    pub consoles: Consoles,
    /// Where a price feed posts its board.
    pub markets: Markets,
    /// Keeps prices for the ledger.
    pub clerk: Clerk,
    /// Who rents hosts to us.
    pub providers: Providers,
    /// Tells the tasks of providers that a renting has changed.
    pub renting_wake: Arc<Notify>,
    /// Tells the task of plans that one was applied, cancelled or is to be taken back.
    pub plans_wake: Arc<Notify>,
    /// Whether guests could leave their hosts in time, as it was found last.
    pub evacuations: EvacuationBoard,
    /// How good it was, as events tell.
    pub reliability: ReliabilityBook,
    /// What policies told of guests.
    pub verdicts: VerdictBoard,
    /// How far operations are, newer than their records.
    pub progress: ProgressBoard,
    /// Where sweeps of chunk stores are asked for, and counted.
    pub sweeps: SweepBoard,
    /// The controller's own chunk store; known once it is open.
    pub chunks: Arc<OnceLock<Arc<DirStore>>>,
    /// Where checks of volumes are asked for.
    pub checks: CheckBoard,
    /// Where points of volumes' histories are asked for.
    pub points: PointBoard,
    /// What agents measure of the ways between them.
    pub paths: PathBoard,
    /// Where flows of ports are asked for.
    pub flows: FlowBoard,
    /// What was granted to hosts of mirrored guests.
    pub leases: LeaseBoard,
    /// Whether this controller grants.
    pub lease_claim: Claim,
    /// What agents are told to dial; known once the link listens.
    pub link_address: Arc<OnceLock<String>>,
    /// Cancelled when the controller ends.
    pub stop: CancellationToken,
    tasks: TaskTracker,
}

impl Parts {
    /// Runs a task until it ends or the controller does (then it is dropped at its next await). A task that panics is logged
    /// and ends the controller: half a controller is worse than one that its supervisor starts again.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.spawn_draining(name, async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// As [`Parts::spawn`], for a task that ends by itself soon after [`Parts::stop`] is cancelled.
    pub fn spawn_draining(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                tracing::error!(task = name, "a task panicked; the controller ends");
                stop.cancel();
            }
        });
    }
}

/// Why the controller cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A folder.
    #[error("cannot make the folder {path}")]
    Folder {
        /// The folder.
        path: std::path::PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The keys.
    #[error("the controller's keys")]
    Keys(#[from] KeyFileError),
    /// The CA.
    #[error("the certificate authority")]
    Authority(#[from] CaError),
    /// The store.
    #[error("the store cannot be opened")]
    Store(#[from] supercloud_store::StoreError),
    /// This build has no such store.
    #[error("this build has no etcd client: build supercloud-controller with --features etcd")]
    NoEtcd,
    /// The state.
    #[error("the state cannot be read")]
    State(#[from] StateError),
    /// The first token.
    #[error("the first start")]
    Bootstrap(#[from] BootstrapError),
    /// A socket.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// TLS.
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
    /// The origin store of images.
    #[error("the chunk store cannot be opened: {0}")]
    Chunks(String),
    /// The price feed.
    #[error("the price feed")]
    Feed(#[from] MarketsError),
    /// A provider.
    #[error("the settings: [[providers]]")]
    Providers(#[from] ProviderConfigError),
    /// A thread ended early.
    #[error("the start was interrupted")]
    Interrupted,
}

/// A controller that runs.
#[derive(Debug)]
pub struct Controller {
    /// What its parts share.
    pub parts: Parts,
    /// Where REST is served: the port is known now also when the settings say 0.
    pub rest_address: SocketAddr,
    store: OpenStore,
}

impl Controller {
    /// Starts a controller.
    ///
    /// # Errors
    /// What cannot be opened or made; nothing runs then.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        supercloud_api::tls::install_provider();
        let config = Arc::new(config);
        let (keys, authority) = open::files(Arc::clone(&config)).await?;
        let store = OpenStore::open(&config).await?;
        let started = Self::start_on(&store, config, keys, authority).await;
        match started {
            Ok((parts, rest_address)) => Ok(Self { parts, rest_address, store }),
            Err(error) => {
                store.close().await;
                Err(error)
            }
        }
    }

    async fn start_on(
        store: &OpenStore,
        config: Arc<Config>,
        keys: Keys,
        authority: Authority,
    ) -> Result<(Parts, SocketAddr), StartError> {
        let state = State::open(store.handle()).await?;
        let settings = Arc::clone(&config);
        let providers = tokio::task::spawn_blocking(move || Providers::open(&settings.providers))
            .await
            .map_err(|_| StartError::Interrupted)??;
        auth::bootstrap(&state, &keys.root, &config.data_dir).await?;
        let markets = Markets::default();
        let own_hosts = config.feed.as_ref().map_or(Tenure::Spot, |feed| feed.own_hosts);
        let clerk = Clerk::new(state.clone(), markets.clone(), own_hosts);
        let sessions = Sessions::default();
        let parts = Parts {
            config,
            state,
            keys: Arc::new(keys),
            authority: Arc::new(authority),
            hosts: LiveHosts::default(),
            consoles: Consoles::new(sessions.clone()),
            paths: PathBoard::default(),
            flows: FlowBoard::new(sessions.clone()),
            leases: LeaseBoard::default(),
            lease_claim: Claim::default(),
            sessions,
            markets,
            clerk,
            providers,
            renting_wake: Arc::default(),
            plans_wake: Arc::default(),
            evacuations: EvacuationBoard::default(),
            reliability: ReliabilityBook::default(),
            verdicts: VerdictBoard::default(),
            progress: ProgressBoard::default(),
            sweeps: SweepBoard::default(),
            chunks: Arc::default(),
            checks: CheckBoard::default(),
            points: PointBoard::default(),
            link_address: Arc::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        match start_parts(&parts).await {
            Ok(rest_address) => Ok((parts, rest_address)),
            Err(error) => {
                end_tasks(&parts).await;
                Err(error)
            }
        }
    }

    /// Waits until something ends the controller (a task that failed, or [`Parts::stop`]).
    pub async fn stopped(&self) {
        self.parts.stop.cancelled().await;
    }

    /// Ends it: drains REST, ends all tasks, closes the store.
    pub async fn shutdown(self) {
        end_tasks(&self.parts).await;
        self.store.close().await;
    }
}

/// Starts everything that runs. What carries operations out starts before REST, which accepts them.
async fn start_parts(parts: &Parts) -> Result<SocketAddr, StartError> {
    let engine = engine::start(parts).await?;
    let _first = parts.link_address.set(engine.reach.link_address.clone());
    let metrics = Metrics::default();
    parts.spawn("operation watcher", metrics.clone().operation_watcher(parts.clone()));
    parts.spawn("expiry reaper", rest::expiry_reaper(parts.clone()));
    for (name, configured) in parts.providers.iter() {
        let place = PlaceParts {
            state: parts.state.clone(),
            keys: Arc::clone(&parts.keys),
            owner: parts.authority.fingerprint(),
            controller_url: parts.config.api_url(),
            wake: Arc::clone(&parts.renting_wake),
            limits: renting::machine::Limits::default(),
            pace: renting::Pace::default(),
        };
        parts.spawn("rentings", Place::new(place, name, configured.clone()).run());
    }
    let (state, live, wake) = (parts.state.clone(), parts.hosts.clone(), Arc::clone(&parts.plans_wake));
    parts.spawn("plans", plans::Runner::new(state, live, wake, plans::Pace::default()).run());
    let recovery = Recovery::new(parts.state.clone(), parts.hosts.clone(), recovery::Pace::default());
    parts.spawn("recovery", recovery.run());
    let fencing = Fencing::new(
        parts.state.clone(),
        parts.hosts.clone(),
        parts.leases.clone(),
        parts.lease_claim.clone(),
        parts.progress.clone(),
        fencing::Pace::default(),
    );
    parts.spawn("fencing", fencing.run());
    let (state, live, wake) = (parts.state.clone(), parts.hosts.clone(), Arc::clone(&parts.plans_wake));
    let (paths, pace) = (parts.paths.clone(), notices::Pace::default());
    parts.spawn("notices", Leaving::new(state, live, paths, wake, parts.config.notices, pace).run());
    parts.spawn("paths", paths::path_teller(parts.clone()));
    parts.spawn("evacuations", evacuation::evacuation_watcher(parts.clone()));
    let api = rest::Api::new(parts, &metrics);
    engine.open_guest_door(Arc::new(rest::GuestCalls::new(api.clone())));
    rest::serve(parts, rest::router(api))
}

async fn end_tasks(parts: &Parts) {
    parts.stop.cancel();
    parts.tasks.close();
    if tokio::time::timeout(TASKS_BUDGET, parts.tasks.wait()).await.is_err() {
        tracing::warn!("some tasks have not ended in time");
    }
}
