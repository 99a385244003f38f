//! Starts what carries operations out: the agents' listener, the engine, the replayed price feed.

use std::sync::Arc;

use supercloud_api::tls;
use supercloud_storage::backend::DirStore;
use tokio::net::TcpListener;

use super::{Parts, StartError};
use crate::{
    chain,
    ledger::{self, ProviderPrices},
    link::{self, ChunkServer, LinkHandler},
    markets::FeedMarkets,
    operations::{self, Engine, Pace, Reach},
};

/// Starts the engine and all that belongs to it.
pub(super) async fn start(parts: &Parts) -> Result<Arc<Engine>, StartError> {
    let config = &parts.config;
    let mut followed = None;
    if let Some(feed) = config.feed.clone() {
        let opened = tokio::task::spawn_blocking(move || FeedMarkets::open(&feed));
        let markets = opened.await.map_err(|_| StartError::Interrupted)??;
        parts.markets.post(Arc::new(markets.clone()));
        followed = Some(markets);
    }
    parts.state.book().ask(parts.providers.clone());
    // Before anything is written that the ledger stamps.
    ledger::start(&parts.state, followed.as_ref().zip(config.feed.as_ref())).await?;
    if let Some(markets) = followed {
        let (state, stop) = (parts.state.clone(), parts.stop.clone());
        parts.spawn("price feed", async move { markets.follow_clouds(&state, &stop).await });
    } else if parts.providers.iter().next().is_some() {
        let prices = ProviderPrices::new(parts.state.clone(), parts.providers.clone());
        parts.markets.post(Arc::new(prices.clone()));
        parts.spawn("providers' prices", prices.run());
    }
    parts.clerk.pass().await?;
    parts.spawn("ledger", parts.clerk.clone().run());
    let identity = parts.authority.server_identity(&config.names)?;
    let certificate_sha256 = identity.chain.first().map(tls::fingerprint).unwrap_or_default();
    let server = tls::server_config(
        std::slice::from_ref(parts.authority.certificate()),
        identity,
        &[tls::ALPN_AGENT, tls::ALPN_DATA],
    )
    .map_err(|error| StartError::Tls(chain(&error)))?;
    let chunks_dir = config.chunks_dir();
    let store = tokio::task::spawn_blocking(move || DirStore::open(&chunks_dir))
        .await
        .map_err(|_| StartError::Interrupted)?
        .map_err(|error| StartError::Chunks(chain(&error)))?;
    let store = Arc::new(store);
    let _first = parts.chunks.set(Arc::clone(&store));
    let listener = TcpListener::bind(config.link_listen)
        .await
        .map_err(|source| StartError::Listen { address: config.link_listen, source })?;
    let port = listener.local_addr().map_or(config.link_listen.port(), |address| address.port());
    // A port that the system chose is known only now.
    let link_address = match (&config.link_address, config.link_listen.port()) {
        (None, 0) => format!("{}:{port}", config.names[0]),
        _ => config.link_address(),
    };
    let sessions = parts.sessions.clone();
    let pace = Pace { sweep: config.sweep.every(), ..Pace::default() };
    let parts_of_engine = operations::Parts {
        state: parts.state.clone(),
        sessions: sessions.clone(),
        live: parts.hosts.clone(),
        keys: Arc::clone(&parts.keys),
        authority: Arc::clone(&parts.authority),
        reach: Reach { link_address, api_url: config.api_url(), certificate_sha256: certificate_sha256.clone() },
        progress: parts.progress.clone(),
        store: Arc::clone(&store),
        uploads: config.uploads_dir(),
        sweeps: parts.sweeps.clone(),
        consoles: parts.consoles.clone(),
        checks: parts.checks.clone(),
        points: parts.points.clone(),
        paths: parts.paths.clone(),
        flows: parts.flows.clone(),
        leases: parts.leases.clone(),
        claim: parts.lease_claim.clone(),
    };
    let (engine, imports) = Engine::at_pace(parts_of_engine, pace);
    let chunks = ChunkServer::new(store, &parts.keys.tickets.0.public_key_hex(), &certificate_sha256);
    let handler: Arc<dyn LinkHandler> = Arc::clone(&engine) as _;
    parts.spawn("agent links", link::serve(listener, Arc::new(server), sessions, handler, chunks, parts.stop.clone()));
    parts.spawn("operations", Arc::clone(&engine).run(imports, parts.stop.clone()));
    Ok(engine)
}
