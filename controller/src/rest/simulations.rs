//! Policies tried on a generated market.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{body::Bytes, extract::State, http::HeaderMap};
use supercloud_api::{Code, Simulation, SimulationCreate};

use super::{Api, Asker, Failure, Reply, body};
use crate::simulation::{SimulationError, Trial};

/// How long one may take.
const BUDGET: Duration = Duration::from_secs(40);

/// Sets it when it is dropped: nobody waits any more.
struct Leaving(Arc<AtomicBool>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn refused(error: &SimulationError) -> Failure {
    match error {
        SimulationError::Request(what) => Failure::bad(what.clone()),
        SimulationError::GivenUp => Failure::bad(error.to_string()),
        SimulationError::Market(_) => Failure::new(Code::Internal, error.to_string()),
    }
}

/// Tries one or two policies on a generated market, beside the same fleet on demand. Nothing is kept and nothing moves; one is
/// reckoned at a time.
#[utoipa::path(post, path = "/v1/simulations", tag = "markets", request_body = SimulationCreate, responses((status = 200, body = Simulation)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    asker.caller()?;
    let wanted: SimulationCreate = body(&headers, &bytes)?;
    let trial = Trial::of(&wanted).map_err(|error| refused(&error))?;
    let busy = || Failure::new(Code::TooManyRequests, "another simulation is reckoned now; try again in some seconds");
    let place = Arc::clone(&api.simulating).try_lock_owned().map_err(|_| busy())?;
    let leaving = Leaving(Arc::default());
    let is_left = Arc::clone(&leaving.0);
    let until = Instant::now() + BUDGET;
    // Its place is free when the thread has ended, not when nobody waits for it any more.
    let reckoned = tokio::task::spawn_blocking(move || {
        let _place = place;
        trial.run(|| !is_left.load(Ordering::Relaxed) && Instant::now() < until)
    });
    let found = reckoned.await.map_err(|_| Failure::new(Code::Internal, "the simulation failed"))?;
    drop(leaving);
    Reply::ok(&found.map_err(|error| refused(&error))?)
}
