//! Composition: the parts of an agent, started in order and ended in order.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use supercloud_api::{
    CompatClass,
    link::{Answer, Directive, PathPeer, Query},
    unix_ms,
};
use supercloud_blanket::Backend;
use supercloud_sdn::view::OverlayView;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    accounts::{Account, AccountError},
    announced,
    checker::{self, Check},
    cloud_store::{CloudStore, CloudStoreError},
    config::Config,
    consoles::Consoles,
    durable::{self, DurableError},
    farewell, flows,
    guest::GuestMessage,
    guests::Guests,
    holdings::{self, Holdings},
    host::{Brought, Host, Ledger},
    identity::{Identity, IdentityError, Material, Request},
    link::{self, LinkEvent, LinkHandle},
    metadata, paths,
    plane::{self, DataPlane},
    points::{self, Point},
    ports::Switch,
    sweeper::{self, SweepBell},
    volumes::VolumeRunner,
};

/// Directives that may wait.
const EVENTS: usize = 256;
/// How often the certificate's age is looked at.
const RENEW_EVERY: Duration = Duration::from_secs(60);
/// How long a renewal may take.
const RENEW_BUDGET: Duration = Duration::from_secs(30);
/// The pause after the hypervisor could not be asked what it can.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
/// How long a hypervisor that once answered may be silent before the agent goes on without it.
const HYPERVISOR_PATIENCE: Duration = Duration::from_secs(15);
/// How long the data plane's address may still be taken.
const LISTEN_PATIENCE: Duration = Duration::from_secs(10);
/// The pause after a view could not be put in force.
const VIEW_RETRY: Duration = Duration::from_secs(5);

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The identity.
    #[error("the identity is not usable")]
    Identity(#[from] IdentityError),
    /// A user that this host's processes need.
    #[error("a user is missing")]
    Account(#[from] AccountError),
    /// A folder.
    #[error("the agent's folders cannot be made")]
    Folders(#[from] DurableError),
    /// The chunk store.
    #[error("the cloud's chunk store cannot be opened")]
    Store(#[from] CloudStoreError),
    /// The data plane's address.
    #[error("cannot listen at {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An operator has removed this host.
    #[error(
        "this host was removed from its controller: its guests have been ended, their files are kept below {folder}. To make \
         it a host again, give it an empty data_dir and a new join token"
    )]
    Removed {
        /// The agent's folder.
        folder: String,
    },
    /// A worker died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

/// What an agent is made of.
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// Who this host is.
    pub identity: Identity,
    /// The hypervisor.
    pub backend: Arc<dyn Backend>,
    /// The switch.
    pub switch: Arc<dyn Switch>,
    /// What the probe measured.
    pub probe: serde_json::Value,
}

/// The listener of the data plane. A predecessor's may take a moment to be closed: by a process that it was starting, or
/// because the predecessor is still ending.
async fn listen(address: SocketAddr, cancel: &CancellationToken) -> Result<TcpListener, AgentError> {
    let deadline = Instant::now() + LISTEN_PATIENCE;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(source)
                if source.kind() != io::ErrorKind::AddrInUse || Instant::now() >= deadline || cancel.is_cancelled() =>
            {
                return Err(AgentError::Listen { address, source });
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Runs an agent until `cancel`; guests, volume processes and flows go on after it.
///
/// # Errors
/// When it cannot start, or an operator has removed the host: then nothing goes on.
pub async fn run(parts: Parts, cancel: CancellationToken) -> Result<(), AgentError> {
    let Parts { config, identity, backend, switch, probe } = parts;
    let mut identity = identity;
    if let Some(address) = &config.link_address {
        identity.link_address.clone_from(address);
    }
    let material = identity.material()?;
    let (identity_tx, identity_rx) = watch::channel(Arc::new(identity));
    let (material_tx, material_rx) = watch::channel(Arc::new(material));
    let (key_tx, ticket_key) = watch::channel(None);
    let (link, queues) = link::channel();
    let host_id = identity_rx.borrow().host;
    let listener = listen(config.data_listen, &cancel).await?;
    let asked = config.clone();
    let accounts = move || Ok::<_, AccountError>((asked.qemu_account()?, asked.volume_account()?));
    let (qemu, user) = tokio::task::spawn_blocking(accounts).await??;
    let (store, room) = open_folders(&config, user).await?;
    let Some(classes) = classes(&*backend, &config, &cancel).await else { return Ok(()) };
    let plane = DataPlane { host: host_id, address: config.data_address, material: material_rx, ticket_key };
    let host = Arc::new(Host {
        id: host_id,
        runner: VolumeRunner { program: config.volume_program(), user, qemu },
        qemu,
        backend,
        classes,
        switch,
        plane: plane.clone(),
        link: link.clone(),
        store,
        ledger: Ledger::new(room),
        holdings: Holdings::default(),
        brought: Brought::default(),
        config,
    });
    let removed = || AgentError::Removed { folder: host.config.data_dir.display().to_string() };
    if farewell::is_told(&host).await? {
        farewell::end_guests(&host, &cancel).await;
        return Err(removed());
    }
    // Ends by itself when the host is removed.
    let (asked_to_leave, cancel) = (cancel.clone(), cancel.child_token());
    let (announced_tx, heard) = watch::channel(None);
    let (guests, ended) = Guests::new(host.clone(), probe, heard, cancel.clone());
    guests.restore().await;

    let mut tasks = JoinSet::new();
    let (events_tx, events) = mpsc::channel(EVENTS);
    let (view_tx, view_rx) = watch::channel(None);
    tasks.spawn(guests.clone().reap(ended));
    tasks.spawn(guests.clone().follow_backend());
    tasks.spawn(plane::listen(plane, listener, guests.clone(), cancel.clone()));
    tasks.spawn(keep_view(host.clone(), view_rx, cancel.clone()));
    tasks.spawn(metadata::serve(host.clone(), guests.clone(), cancel.clone()));
    tasks.spawn(renew(host.clone(), guests.clone(), identity_tx, material_tx, cancel.clone()));
    tasks.spawn(link::run(guests.clone(), identity_rx, queues, events_tx, cancel.clone()));
    let bell = SweepBell::default();
    let (checks, asked_checks) = checker::queue();
    tasks.spawn(checker::run(host.clone(), asked_checks, cancel.clone()));
    let (points, asked_points) = points::queue();
    tasks.spawn(points::run(host.clone(), asked_points, cancel.clone()));
    tasks.spawn(holdings::run(host.clone(), cancel.clone()));
    tasks.spawn(sweeper::run(host.clone(), bell.clone(), cancel.clone()));
    tasks.spawn(announced::follow(host.config.provider_notices.clone(), announced_tx, cancel.clone()));
    let (flows, asked_flows) = flows::queue();
    tasks.spawn(flows::run(host.clone(), asked_flows, cancel.clone()));
    let (peers_tx, peers) = watch::channel(None);
    tasks.spawn(paths::run(host.link.clone(), peers, cancel.clone()));
    let routes = Routes {
        guests: guests.clone(),
        ticket_key: key_tx,
        views: view_tx,
        bell,
        checks,
        points,
        flows,
        peers: peers_tx,
        consoles: Consoles::new(host.clone()),
    };
    tasks.spawn(dispatch(host.clone(), routes, events, cancel.clone()));
    tracing::info!(host = %host_id, "the agent runs");
    cancel.cancelled().await;
    guests.leave().await;
    let ending = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(5), ending).await.is_err() {
        tracing::warn!("some tasks did not end in time; they are dropped");
    }
    if farewell::is_told(&host).await? {
        farewell::end_guests(&host, &asked_to_leave).await;
        return Err(removed());
    }
    tracing::info!("the agent leaves; guests go on");
    Ok(())
}

async fn open_folders(config: &Config, volume: Account) -> Result<(CloudStore, supercloud_api::Room), AgentError> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || {
        for folder in [&config.data_dir, &config.run_dir, &config.guests_dir()] {
            durable::make_passage(folder)?;
        }
        if let Some(above) = config.store_dir.parent().filter(|above| !above.is_dir()) {
            durable::make_passage(above)?;
        }
        durable::make_folder(&config.store_dir)?;
        durable::share_store(&config.store_dir, volume)?;
        Ok((CloudStore::open(&config)?, config.room()))
    })
    .await?
}

/// Asks the hypervisor what it can. When it does not answer for a while, what it said to an earlier agent counts: guests
/// may well run, and the controller must hear of them.
async fn classes(backend: &dyn Backend, config: &Config, cancel: &CancellationToken) -> Option<Vec<CompatClass>> {
    let path = config.data_dir.join("classes.json");
    let file = path.clone();
    let remembered = tokio::task::spawn_blocking(move || durable::read_json::<Vec<CompatClass>>(&file)).await;
    let mut remembered = remembered.ok().and_then(Result::ok).flatten();
    let patience = tokio::time::Instant::now() + HYPERVISOR_PATIENCE;
    loop {
        let asked = tokio::select! {
            () = cancel.cancelled() => return None,
            asked = backend.capabilities() => asked,
        };
        match asked {
            Ok(can) => {
                let classes: Vec<String> = can.classes.iter().map(ToString::to_string).collect();
                tracing::info!(back_end = can.back_end, version = can.version, ?classes, "the hypervisor is there");
                if let Some(why) = can.no_live_migration {
                    tracing::warn!(why, "guests cannot be moved live here");
                }
                let kept = can.classes.clone();
                let written = tokio::task::spawn_blocking(move || durable::write_json(&path, &kept)).await;
                if let Ok(Err(error)) = written {
                    tracing::warn!(error = crate::chain(&error), "what the hypervisor can is not remembered");
                }
                return Some(can.classes);
            }
            Err(error) => {
                tracing::warn!(error = crate::chain(&error), "the hypervisor does not answer yet");
                if tokio::time::Instant::now() >= patience
                    && let Some(classes) = remembered.take()
                {
                    return Some(classes);
                }
                tokio::select! {
                    () = cancel.cancelled() => return None,
                    () = tokio::time::sleep(RETRY_PAUSE) => {}
                }
            }
        }
    }
}

/// Where what the link brings belongs.
struct Routes {
    guests: Arc<Guests>,
    ticket_key: watch::Sender<Option<String>>,
    views: watch::Sender<Option<OverlayView>>,
    bell: SweepBell,
    checks: mpsc::Sender<Check>,
    points: mpsc::Sender<Point>,
    flows: mpsc::Sender<flows::Asked>,
    /// None while no controller has asked in its session.
    peers: watch::Sender<Option<Vec<PathPeer>>>,
    consoles: Consoles,
}

/// Takes it there.
async fn dispatch(host: Arc<Host>, routes: Routes, mut events: mpsc::Receiver<LinkEvent>, cancel: CancellationToken) {
    let mut told = None;
    loop {
        let event = tokio::select! {
            () = cancel.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            None => return,
            Some(LinkEvent::Down) => {
                tracing::info!("the controller is away; guests go on");
                routes.consoles.close_all();
                routes.peers.send_replace(None);
            }
            Some(LinkEvent::Up(welcome)) => {
                // Revisions are compared within one session only: a controller that was killed may have told of one that it
                // had not written down, and a store that was restored begins at a lower one.
                told = None;
                routes.peers.send_replace(None);
                routes.ticket_key.send_replace(Some(welcome.ticket_key));
                routes.guests.link_up(&welcome.owned);
            }
            Some(LinkEvent::Removed(problem)) => {
                tracing::error!(%problem, "the controller has removed this host; its guests are ended");
                // The word is kept first: whoever dies in between goes on with it.
                while let Err(error) = farewell::keep(&host).await {
                    tracing::error!(error = crate::chain(&error), "that this host was removed cannot be kept yet");
                    tokio::select! {
                        () = cancel.cancelled() => return,
                        () = tokio::time::sleep(RETRY_PAUSE) => {}
                    }
                }
                cancel.cancel();
                return;
            }
            Some(LinkEvent::Directive(directive)) => direct(&routes, &mut told, directive),
        }
    }
}

/// `told` is the newest revision of an overlay view in this session.
fn direct(routes: &Routes, told: &mut Option<u64>, directive: Directive) {
    let Routes { guests, views, bell, checks, points, flows: questions, peers, consoles, .. } = routes;
    match directive {
        Directive::Order { guest, order, assignment, mark } => {
            if let Some(mark) = mark {
                guests.note(guest, mark);
            }
            guests.tell(guest, GuestMessage::Order { order, assignment });
        }
        Directive::SwitchOver { guest, operation } => guests.tell(guest, GuestMessage::SwitchOver { operation }),
        Directive::Discard { guest } => guests.tell(guest, GuestMessage::Discard),
        Directive::Overlay { revision, view } => match serde_json::from_value::<OverlayView>(view) {
            Ok(view) if view.revision != revision => {
                tracing::warn!(revision, said = view.revision, "an overlay view contradicts its own revision");
            }
            Ok(view) => {
                if told.is_none_or(|before| before < revision) {
                    *told = Some(revision);
                    views.send_replace(Some(view));
                }
            }
            Err(error) => tracing::warn!(revision, %error, "an overlay view is not understood"),
        },
        Directive::OverlayPiece { revision, .. } => {
            tracing::debug!(revision, "a piece that the link should have put together")
        }
        Directive::DropFreeze { freeze, project, memory_root } => {
            // Its chunks may belong to other content, too: a sweep finds what nothing names any more.
            tracing::debug!(%freeze, %project, memory_root, "a freeze is over");
            bell.project(project);
        }
        Directive::SweepStore => bell.all(),
        Directive::CheckVolume { guest, volume, bytes_per_s } => {
            if checks.try_send(Check { guest, volume, bytes_per_s }).is_err() {
                tracing::warn!(%guest, %volume, "too many checks wait: this one is not made");
            }
        }
        Directive::TakePoint { guest, volume, memory } => {
            if points.try_send(Point { guest, volume, memory }).is_err() {
                tracing::warn!(%guest, %volume, "too many points wait: this one is not taken");
            }
        }
        Directive::Console { console, order } => consoles.order(console, order),
        Directive::MeasurePaths { peers: told } => drop(peers.send_replace(Some(told))),
        Directive::TellFlows { asked, of } => {
            if questions.try_send(flows::Asked { number: asked, of }).is_err() {
                tracing::warn!(port = %of.port, "too many ask for flows: this one is not answered");
            }
        }
    }
}

/// Puts the newest view in force, again and again until it is; remembers it, so that a restarted agent can program its switch
/// without a controller.
async fn keep_view(host: Arc<Host>, mut views: watch::Receiver<Option<OverlayView>>, cancel: CancellationToken) {
    let path = host.config.data_dir.join("view.json");
    let remembered = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || durable::read_json::<OverlayView>(&path)).await
    };
    let mut wanted = match remembered {
        Ok(Ok(view)) => view,
        Ok(Err(error)) => {
            tracing::warn!(error = crate::chain(&error), "the last overlay view cannot be read");
            None
        }
        Err(_) => None,
    };
    loop {
        let newest = views.borrow_and_update().clone();
        if newest.is_some() {
            wanted = newest;
        }
        let mut is_in_force = true;
        if let Some(view) = wanted.clone() {
            let (kept, at) = (view.clone(), path.clone());
            let written = tokio::task::spawn_blocking(move || durable::write_json(&at, &kept)).await;
            if let Ok(Err(error)) = written {
                tracing::warn!(error = crate::chain(&error), "the overlay view cannot be kept");
            }
            if let Err(error) = host.switch.apply(view).await {
                tracing::warn!(error = crate::chain(&error), "the overlay view is not in force yet");
                is_in_force = false;
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = views.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(VIEW_RETRY), if !is_in_force => {}
        }
    }
}

/// Asks for a fresh certificate when it is time.
async fn renew(
    host: Arc<Host>,
    guests: Arc<Guests>,
    identity: watch::Sender<Arc<Identity>>,
    material: watch::Sender<Arc<Material>>,
    cancel: CancellationToken,
) {
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(RENEW_EVERY) => {}
        }
        let current = identity.borrow().clone();
        match current.is_due(unix_ms(), guests.is_quiet()) {
            Ok(false) => continue,
            Ok(true) => {}
            Err(error) => {
                tracing::error!(error = crate::chain(&error), "the certificate cannot be read");
                continue;
            }
        }
        match fresh(&host, &current, &host.link).await {
            Ok((new, ready)) => {
                tracing::info!(fingerprint = ready.fingerprint, "the certificate was renewed");
                material.send_replace(Arc::new(ready));
                identity.send_replace(Arc::new(new));
            }
            Err(error) => tracing::warn!(error, "the certificate was not renewed; it is tried again"),
        }
    }
}

async fn fresh(host: &Host, current: &Identity, link: &LinkHandle) -> Result<(Identity, Material), String> {
    let text = |error: &dyn std::error::Error| crate::chain(error);
    let request = Request::make(host.id).map_err(|error| text(&error))?;
    let query = Query::RenewCertificate { csr_pem: request.csr_pem.clone() };
    let answer = link.query(query, RENEW_BUDGET).await.map_err(|error| text(&error))?;
    let Answer::Certificate { certificate_pem } = answer else {
        return Err("the controller answers something else".to_owned());
    };
    let new = request
        .complete(host.id, certificate_pem, current.ca_pem.clone(), current.link_address.clone())
        .map_err(|error| text(&error))?;
    let ready = new.material().map_err(|error| text(&error))?;
    let (kept, folder) = (new.clone(), host.config.data_dir.clone());
    tokio::task::spawn_blocking(move || kept.save(&folder))
        .await
        .map_err(|error| text(&error))?
        .map_err(|error| text(&error))?;
    Ok((new, ready))
}
