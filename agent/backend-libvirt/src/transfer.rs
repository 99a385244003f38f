//! Long jobs of libvirt's (copying, freezing): run, watched, bounded.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult,
    migrate::{TransferPhase, TransferProgress},
};
use supercloud_ids::GuestId;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use virt::{connect::Connect, sys};

use crate::{
    connection::{Connection, find},
    ffi::{self, LibResult},
    state::{self, JobFigures},
};

/// How often the job's figures are asked for.
const FIGURES_EVERY: Duration = Duration::from_millis(200);
/// How long an aborted job may take to end.
const ABORT_BUDGET: Duration = Duration::from_secs(40);
const CALL_BUDGET: Duration = Duration::from_secs(10);

/// A long job on a guest.
pub(crate) struct Job {
    pub connection: Arc<Connection>,
    pub guest: GuestId,
    pub what: &'static str,
    pub budget: Duration,
    /// Set by whoever cancels it, before the job is aborted.
    pub is_cancelled: Arc<AtomicBool>,
}

impl Job {
    /// Runs `work`, tells its progress, and aborts it when its budget is over.
    pub(crate) async fn drive<T, F>(self, progress: &watch::Sender<TransferProgress>, work: F) -> BackendResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> LibResult<T> + Send + 'static,
    {
        let Self { connection, guest, what, budget, is_cancelled } = self;
        let mut work = std::pin::pin!(connection.run(what, work));
        let mut figures = std::pin::pin!(watch_figures(&connection, guest, progress));
        let mut departures = connection.sink.departures();
        let mut end = std::pin::pin!(tokio::time::sleep_until(Instant::now() + budget));
        let mut is_overdue = false;
        let result = loop {
            tokio::select! {
                // The result first: nothing may delay it, the guest stands still.
                biased;
                result = &mut work => break result,
                () = &mut end => {
                    if is_overdue {
                        return Err(BackendError::Deadline { what, budget_ms: as_ms(budget) });
                    }
                    is_overdue = true;
                    // Already over or not begun is fine: then the work itself ends.
                    let _ = abort(&connection, guest).await;
                    end.as_mut().reset(Instant::now() + ABORT_BUDGET);
                }
                // The sink lives as long as the connection. At once: others use the time in which the guest stands still.
                Ok(()) = departures.changed() => {
                    if connection.sink.has_departed(guest) {
                        progress.send_modify(|last| last.phase = last.phase.max(TransferPhase::Drain));
                    }
                }
                () = &mut figures => {}
            }
        };
        match result {
            Ok(value) => {
                progress.send_modify(|last| last.phase = TransferPhase::Done);
                Ok(value)
            }
            Err(_) if is_cancelled.load(Ordering::Acquire) => Err(BackendError::Cancelled { what }),
            Err(_) if is_overdue => Err(BackendError::Deadline { what, budget_ms: as_ms(budget) }),
            Err(error) => Err(error),
        }
    }
}

fn as_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Never ends; dropped with its job.
async fn watch_figures(connection: &Arc<Connection>, guest: GuestId, progress: &watch::Sender<TransferProgress>) {
    let mut tick = tokio::time::interval(FIGURES_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let asked = connection
            .call("read the figures of a job", CALL_BUDGET, move |at| match find(at, guest)? {
                Some(domain) => figures(&domain).map(Some),
                None => Ok(None),
            })
            .await;
        if let Ok(Some(job)) = asked {
            let is_paused = connection.sink.has_departed(guest);
            progress.send_modify(|last| *last = state::advance(last, &job, is_paused));
        }
    }
}

/// The figures of the guest's job; of one that has just ended, while libvirt still holds it.
pub(crate) fn figures(domain: &virt::domain::Domain) -> LibResult<JobFigures> {
    let (_, params) = ffi::job_stats(domain)?;
    let get = |name| params.get(name).unwrap_or(0);
    Ok(JobFigures {
        iteration: get(sys::VIR_DOMAIN_JOB_MEMORY_ITERATION),
        memory_total: get(sys::VIR_DOMAIN_JOB_MEMORY_TOTAL),
        memory_processed: get(sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED),
        memory_remaining: get(sys::VIR_DOMAIN_JOB_MEMORY_REMAINING),
        dirty_rate: get(sys::VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE),
        page_size: get(sys::VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE),
        bandwidth: get(sys::VIR_DOMAIN_JOB_MEMORY_BPS),
        downtime_ms: params.get(sys::VIR_DOMAIN_JOB_DOWNTIME),
        throttle_percent: get(sys::VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE),
        elapsed_ms: get(sys::VIR_DOMAIN_JOB_TIME_ELAPSED),
    })
}

/// Asks libvirt to abort the guest's job. An error means that there was none to abort, or no guest.
pub(crate) async fn abort(connection: &Arc<Connection>, guest: GuestId) -> BackendResult<()> {
    connection
        .call("abort a job", CALL_BUDGET, move |at| match find(at, guest)? {
            Some(domain) => ffi::abort_job(&domain),
            None => Ok(()),
        })
        .await
}
