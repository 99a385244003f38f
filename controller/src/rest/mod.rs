//! REST `/v1`: every route of the role table ([`crate::auth::ROUTES`]), JSON, RFC 9457 problems.
//!
//! What changes something writes records and, for what takes time, an operation in phase `plan`, all in one transaction;
//! carrying it out is not done here. WHEN ADDING A ROUTE: a row in the role table, a handler with its
//! `#[utoipa::path]`, a line in [`router`] and one in [`openapi`]; a test compares the four.

mod asker;
mod blocks;
mod clouds;
mod evacuations;
mod events;
mod gate;
mod groups;
mod guest_calls;
mod guest_console;
mod guest_create;
mod guest_evacuation;
pub(crate) mod guest_mirrors;
pub(crate) mod guest_operations;
mod guest_placement;
pub(crate) mod guest_plan;
mod guests;
mod histories;
mod hosts;
mod idempotency;
mod images;
mod join;
mod ledger;
mod links;
mod networks;
pub mod openapi;
mod operations;
mod plans;
mod projects;
mod reaper;
mod reliability;
mod rentings;
mod reply;
mod serve;
mod session;
mod shares;
mod simulations;
mod squeeze;
mod stores;
mod system;
mod tokens;
mod uploads;
mod verdicts;
mod volumes;

use std::sync::Arc;

use axum::{
    Router, middleware,
    routing::{delete, get, patch, post, put},
};

use tokio::sync::Mutex;

use crate::renting::seen::SeenMarkets;

pub use asker::{Asker, Params, body, check_if_match};
pub use gate::{MAX_JSON_BYTES, MAX_PIECE_BYTES};
pub use guest_calls::GuestCalls;
pub use reaper::expiry_reaper;
pub use reply::{Failure, Reply};
pub use serve::serve;

use crate::{app::Parts, metrics::Metrics};

/// What handlers share.
#[derive(Debug, Clone)]
pub struct Api {
    /// The controller's parts.
    pub parts: Parts,
    /// The counts.
    pub metrics: Metrics,
    uploads: uploads::Uploads,
    streams: events::Streams,
    /// Contents that are given out.
    exports: blocks::Exports,
    /// Consoles that are looked at.
    consoles: shares::Shares,
    /// Flows that are asked for.
    flows: shares::Shares,
    /// What was seen of markets.
    seen_markets: SeenMarkets,
    /// Requests that place guests decide one after the other: they would only make each other decide anew.
    placing: Arc<Mutex<()>>,
    /// The ledger is reckoned up for one after the other: it may take all of a core. What days that are over came to is kept.
    reckoning: Arc<Mutex<crate::ledger::DaySums>>,
    /// So are simulations.
    simulating: Arc<Mutex<()>>,
}

impl Api {
    /// With nothing under way.
    #[must_use]
    pub fn new(parts: &Parts, metrics: &Metrics) -> Self {
        Self {
            parts: parts.clone(),
            metrics: metrics.clone(),
            uploads: uploads::Uploads::new(parts.config.uploads_dir()),
            streams: events::Streams::default(),
            exports: blocks::Exports::default(),
            consoles: shares::Shares::default(),
            flows: shares::Shares::default(),
            seen_markets: SeenMarkets::default(),
            placing: Arc::default(),
            reckoning: Arc::default(),
            simulating: Arc::default(),
        }
    }
}

/// All routes behind the gate.
pub fn router(api: Api) -> Router {
    let gate = gate::Gate::new(api.parts.clone(), api.metrics.clone());
    Router::new()
        .route("/healthz", get(system::healthz))
        .route("/readyz", get(system::readyz))
        .route("/metrics", get(system::metrics))
        .route("/v1/openapi.json", get(system::openapi_document))
        .route("/v1/whoami", get(tokens::whoami))
        .route("/v1/session", post(session::create).delete(session::remove))
        .route("/v1/clouds", get(clouds::list).post(clouds::create))
        .route("/v1/clouds/{cloud}", get(clouds::read))
        .route("/v1/clouds/{cloud}/rent", post(rentings::rent))
        .route("/v1/rentings", get(rentings::list))
        .route("/v1/rentings/{renting}", get(rentings::read))
        .route("/v1/rentings/{renting}/return", post(rentings::give_back))
        .route("/v1/rentings/{renting}/join-token", post(rentings::new_join_token))
        .route("/v1/stores", get(stores::list))
        .route("/v1/stores/{store}/sweep", post(stores::sweep))
        .route("/v1/hosts", get(hosts::list))
        .route("/v1/hosts/{host}", get(hosts::read).patch(hosts::change).delete(hosts::remove))
        .route("/v1/links", get(links::list))
        .route("/v1/join-tokens", post(join::create_token))
        .route("/v1/join", post(join::join))
        .route("/v1/projects", get(projects::list).post(projects::create))
        .route("/v1/projects/{project}", get(projects::read))
        .route("/v1/tokens", get(tokens::list).post(tokens::create))
        .route("/v1/tokens/{token}", delete(tokens::remove))
        .route("/v1/images", get(images::list).post(images::create))
        .route("/v1/images/{image}", get(images::read).delete(images::remove))
        .route("/v1/images/{image}/sites", get(images::sites))
        .route("/v1/images/{image}/parts/{part}", put(images::upload).get(images::uploaded))
        .route("/v1/images/{image}/parts/{part}/blocks", get(blocks::of_image))
        .route("/v1/images/{image}/import", post(images::import))
        .route("/v1/volumes", get(volumes::list))
        .route("/v1/volumes/{volume}", get(volumes::read))
        .route("/v1/volumes/{volume}/sites", get(volumes::volume_sites))
        .route("/v1/volumes/{volume}/check", post(volumes::check))
        .route("/v1/volumes/{volume}/history", get(histories::read).put(histories::set).delete(histories::remove))
        .route("/v1/volumes/{volume}/as-of", get(histories::as_of))
        .route("/v1/volumes/{volume}/points", post(histories::take))
        .route("/v1/volumes/{volume}/blocks", get(blocks::of_volume))
        .route("/v1/freezes", get(volumes::list_freezes))
        .route("/v1/freezes/{freeze}", get(volumes::read_freeze))
        .route("/v1/networks", get(networks::list).post(networks::create))
        .route("/v1/networks/{network}", get(networks::read).delete(networks::remove))
        .route("/v1/ports", get(networks::list_ports))
        .route("/v1/ports/{port}", get(networks::read_port))
        .route("/v1/ports/{port}/flows", get(links::flows))
        .route("/v1/guests", get(guests::list).post(guest_create::create))
        .route("/v1/guests/{guest}", patch(guests::change).get(guests::read).delete(guest_operations::remove))
        .route("/v1/guests/{guest}/placement", get(guest_placement::read))
        .route("/v1/guests/{guest}/console", get(guest_console::open))
        .route("/v1/guests/{guest}/console/{console}/input", post(guest_console::input))
        .route("/v1/guests/{guest}/evacuation", get(guest_evacuation::read))
        .route("/v1/guests/{guest}/start", post(guest_operations::start))
        .route("/v1/guests/{guest}/stop", post(guest_operations::stop))
        .route("/v1/guests/{guest}/migrate", post(guest_operations::migrate))
        .route(
            "/v1/guests/{guest}/mirrors",
            post(guest_mirrors::begin).get(guest_mirrors::list).delete(guest_mirrors::end),
        )
        .route("/v1/guests/{guest}/checkpoints", post(histories::checkpoint))
        .route("/v1/guests/{guest}/failover", post(guest_mirrors::fail_over))
        .route("/v1/guests/{guest}/freeze", post(guest_operations::freeze))
        .route("/v1/guests/{guest}/thaw", post(guest_operations::thaw))
        .route("/v1/groups", get(groups::list).post(groups::create))
        .route("/v1/groups/{group}", get(groups::read).patch(groups::change).delete(groups::remove))
        .route("/v1/groups/{group}/migrate", post(groups::migrate))
        .route("/v1/groups/{group}/freeze", post(groups::freeze))
        .route("/v1/groups/{group}/thaw", post(groups::thaw))
        .route("/v1/operations", get(operations::list))
        .route("/v1/operations/{operation}", get(operations::read))
        .route("/v1/operations/{operation}/cancel", post(operations::cancel))
        .route("/v1/evacuations", get(evacuations::list))
        .route("/v1/reliability", get(reliability::read))
        .route("/v1/verdicts", get(verdicts::list).post(verdicts::tell))
        .route("/v1/simulations", post(simulations::create))
        .route("/v1/plans", get(plans::list).post(plans::create))
        .route("/v1/plans/{plan}", get(plans::read))
        .route("/v1/plans/{plan}/apply", post(plans::apply))
        .route("/v1/plans/{plan}/cancel", post(plans::cancel))
        .route("/v1/plans/{plan}/undo", post(plans::undo))
        .route("/v1/events", get(events::list))
        .route("/v1/events/stream", get(events::stream))
        .route("/v1/ledger", get(ledger::read))
        .route("/v1/markets", get(system::markets))
        .route("/v1/prices", get(system::prices))
        .route("/v1/feed", post(system::set_feed_clock))
        // Named, so that a merge keeps it behind the gate, which knows what to say.
        .fallback(async || axum::http::StatusCode::NOT_FOUND)
        .with_state(api)
        // The gate reads every body under its own limits; axum's default of 2 MB would refuse upload pieces after it.
        .layer(axum::extract::DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(gate, gate::gate))
        .merge(crate::dashboard::router())
}

#[cfg(test)]
mod tests;
