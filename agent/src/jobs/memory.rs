//! Memory that a move has left behind, after the switch: the source serves it, the destination fetches it while the guest runs there.
//!
//! It goes over a channel of the meeting, which the destination wants and either of the two may dial. One that breaks is made again, for
//! as long as it takes: what the guest wants of it waits meanwhile. Only when the source says that its process is gone, or the controller
//! that the source is lost, there is nothing to wait for any more, and with it no guest.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_api::{
    Progress,
    data::{Channel, HandoverMessage},
};
use supercloud_blanket::{
    BackendError, BackendResult, BoxFuture,
    backend::{RunState, StopMode},
};
use supercloud_handover::{DestinationEvent, LocalEvent, SourceEvent};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use super::{Fact, Job, JobError, PROGRESS_EVERY, file_error, in_time, receive::carry_in, standby::LISTEN_BUDGET};
use crate::{
    plane::{
        DataStream, bridge,
        meeting::{MeetingEvent, MeetingHandle},
    },
    socket,
};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How long the hypervisor may take to come to the socket that was made for it.
const COME_BUDGET: Duration = Duration::from_secs(10);
/// How long the last words of a connection may take.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long there may be no way to the missing memory before it is an alarm.
const STALL_AFTER: Duration = Duration::from_secs(10);

/// The source's part: serves whoever comes with the right, the newest first, until the destination has everything. `is_gone`: there is
/// nothing any more; whoever comes is told.
pub async fn serve(job: Job, handle: MeetingHandle, mut events: mpsc::Receiver<MeetingEvent>, mut is_gone: bool) {
    let operation = job.operation;
    let mut serving: Option<BoxFuture<'_, Result<(), JobError>>> = None;
    loop {
        tokio::select! {
            () = job.cancel.cancelled() => return,
            event = events.recv() => match event {
                Some(MeetingEvent::Memory(stream)) if !is_gone => serving = Some(Box::pin(serve_once(&job, *stream))),
                Some(MeetingEvent::Memory(_) | MeetingEvent::Connected) if is_gone => {
                    handle.say(HandoverMessage::MemoryGone).await;
                }
                Some(MeetingEvent::Lost) => serving = None,
                Some(_) => {}
                // Another meeting has taken the place of this one.
                None => return,
            },
            served = async {
                match &mut serving {
                    Some(serving) => serving.await,
                    None => std::future::pending().await,
                }
            } => {
                serving = None;
                match served {
                    Ok(()) => {
                        tracing::info!(guest = %job.guest, %operation, "the destination has all of the memory");
                        job.tell(Fact::Event(LocalEvent::Source(SourceEvent::MemoryServed { operation }))).await;
                        return;
                    }
                    Err(error) => {
                        tracing::info!(guest = %job.guest, %operation, error = crate::chain(&error), "memory is not served just now");
                        is_gone = is_process_gone(&job).await;
                        if is_gone {
                            handle.say(HandoverMessage::MemoryGone).await;
                            job.tell(Fact::Event(LocalEvent::Source(SourceEvent::GuestGone))).await;
                        }
                    }
                }
            }
        }
    }
}

async fn is_process_gone(job: &Job) -> bool {
    match job.host.backend.status(job.guest).await {
        Ok(info) => info.is_none_or(|info| info.state == RunState::Crashed),
        Err(_) => false,
    }
}

/// One connection, to its end.
async fn serve_once(job: &Job, remote: DataStream) -> Result<(), JobError> {
    let path = job.places.outgoing_stream();
    let qemu = job.host.qemu;
    let listener = socket::listen(&path, qemu).map_err(file_error("listen at", &path))?;
    let mut transfer = job.host.backend.post_copy()?.serve_memory(job.guest, path.clone())?;
    let carried = async {
        let come = async {
            loop {
                let (local, _) = listener.accept().await.map_err(file_error("take a connection at", &path))?;
                if socket::is_peer_allowed(&local, qemu) {
                    return Ok(local);
                }
                tracing::warn!("refused a user at the memory stream's socket");
            }
        };
        let local = in_time("the hypervisor", COME_BUDGET, come).await?;
        bridge::carry(local, remote).await.map_err(|_| JobError::Lost)
    };
    let done = both(&mut transfer.done, carried).await;
    // The next one makes its own.
    let _ = tokio::fs::remove_file(&path).await;
    done
}

/// Drives the hypervisor's part and its carrier to the former's end.
async fn both(
    mut done: impl Future<Output = BackendResult<()>> + Unpin,
    carried: impl Future<Output = Result<(u64, u64), JobError>>,
) -> Result<(), JobError> {
    tokio::pin!(carried);
    tokio::select! {
        done = &mut done => {
            // What it has said last is still on its way.
            let _ = timeout(LAST_WORDS, carried).await;
            Ok(done?)
        }
        carried = &mut carried => match timeout(LAST_WORDS, done).await {
            Ok(done) => Ok(done?),
            Err(_) => Err(carried.err().unwrap_or(JobError::Lost)),
        },
    }
}

/// What the destination fetches memory with.
pub struct Fetch {
    /// To open channels.
    pub handle: MeetingHandle,
    /// What the source says.
    pub events: mpsc::Receiver<MeetingEvent>,
    /// The controller says that the source is lost.
    pub source_lost: Arc<Notify>,
    /// Told while memory is missing.
    pub is_missing: Arc<AtomicBool>,
}

/// Why there is nothing to wait for.
enum Missing {
    /// Nothing is missing.
    Nothing,
    /// The guest's process has ended; that is told by who looks after it.
    Ended,
    /// What is missing is nowhere.
    Gone(&'static str),
}

/// The destination's part: until nothing is missing; `false` when what is missing cannot be had, and the guest is no more.
pub(super) async fn fetch(job: &Job, mut with: Fetch) -> bool {
    let fetched = fetch_all(job, &mut with).await;
    with.is_missing.store(false, Ordering::Release);
    let why = match fetched {
        Missing::Nothing => {
            job.tell(Fact::MemoryStalled(None)).await;
            return true;
        }
        Missing::Ended => {
            job.tell(Fact::MemoryStalled(None)).await;
            return false;
        }
        Missing::Gone(why) => why,
    };
    tracing::error!(guest = %job.guest, why, "memory of the guest is lost, and with it the guest");
    // It can only stand still: whatever it has is of no use without the rest.
    while let Err(error) = job.host.backend.stop(job.guest, StopMode::Kill).await {
        if matches!(error, BackendError::NoSuchGuest { .. }) {
            break;
        }
        tracing::warn!(guest = %job.guest, error = crate::chain(&error), "what is left of it cannot be ended yet");
        tokio::time::sleep(LAST_PAUSE).await;
    }
    job.tell(Fact::MemoryStalled(None)).await;
    job.tell(Fact::Event(LocalEvent::Destination(DestinationEvent::GuestGone))).await;
    false
}

async fn fetch_all(job: &Job, with: &mut Fetch) -> Missing {
    let path = job.places.incoming_memory();
    let mut pause = FIRST_PAUSE;
    let mut way =
        Way { is_open: AtomicBool::new(false), lost_at: Instant::now(), is_said: false, is_source_lost: false };
    loop {
        let _ = tokio::fs::remove_file(&path).await;
        match fetch_once(job, with, &mut way, &path).await {
            Ok(missing) => return missing,
            Err(JobError::Backend(BackendError::NoSuchGuest { .. })) => return Missing::Ended,
            Err(error) => {
                if way.is_open.swap(false, Ordering::AcqRel) {
                    (pause, way.lost_at) = (FIRST_PAUSE, Instant::now());
                }
                tracing::info!(guest = %job.guest, error = crate::chain(&error), "memory is not fetched just now");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// The way to the source's memory.
struct Way {
    is_open: AtomicBool,
    lost_at: Instant,
    is_said: bool,
    /// The source was declared lost. It may be cut off from the controller only, and serve: what ends the guest is that it is not heard
    /// either, for as long as that takes to be sure of.
    is_source_lost: bool,
}

async fn fetch_once(job: &Job, with: &mut Fetch, way: &mut Way, path: &Path) -> Result<Missing, JobError> {
    let post_copy = job.host.backend.post_copy()?;
    let missing = post_copy.missing_bytes(job.guest)?;
    let mut transfer = post_copy.fetch_memory(job.guest, path.to_owned())?;
    let Fetch { handle, events, source_lost, is_missing } = with;
    let Way { is_open, lost_at, is_said, is_source_lost } = way;
    let (handle, is_open) = (&*handle, &*is_open);
    let carried = async {
        let remote = open(handle).await;
        is_open.store(true, Ordering::Release);
        carry_in(job, remote, path).await.map_err(|_| JobError::Lost)
    };
    let done = both(&mut transfer.done, carried);
    tokio::pin!(done);
    let mut ticks = interval(PROGRESS_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut are_events_open = true;
    loop {
        tokio::select! {
            biased;
            done = &mut done => {
                // All of it, for certain: it is what is left to see when the move is over.
                let left = *missing.borrow();
                job.tell(Fact::Progress(Box::new(shown(left)))).await;
                return done.map(|()| Missing::Nothing);
            }
            event = events.recv(), if are_events_open => match event {
                Some(MeetingEvent::Message(HandoverMessage::MemoryGone)) if *missing.borrow() > 0 => {
                    return Ok(Missing::Gone("its process at the host that it left is gone"));
                }
                // A connection that does not close is of no use all the same.
                Some(MeetingEvent::Lost) if is_open.load(Ordering::Acquire) => return Err(JobError::Lost),
                Some(_) => {}
                None => are_events_open = false,
            },
            () = source_lost.notified() => *is_source_lost = true,
            _ = ticks.tick() => {
                let left = *missing.borrow();
                let is_unheard = !is_open.load(Ordering::Acquire) && lost_at.elapsed() > LISTEN_BUDGET;
                if *is_source_lost && is_unheard && left > 0 {
                    return Ok(Missing::Gone("the host that it left is lost"));
                }
                is_missing.store(left > 0, Ordering::Release);
                job.show(shown(left));
                let is_stalled = !is_open.load(Ordering::Acquire) && left > 0 && lost_at.elapsed() > STALL_AFTER;
                if is_stalled != *is_said {
                    *is_said = is_stalled;
                    let text = format!(
                        "{left} bytes of the guest's memory are at the host that it left, which cannot be reached: it waits for what it \
                         wants of them"
                    );
                    job.tell(Fact::MemoryStalled(is_stalled.then_some(text))).await;
                }
            }
        }
    }
}

fn shown(missing: u64) -> Progress {
    let message = if missing > 0 { "the rest of its memory follows" } else { "" };
    Progress { memory_missing_bytes: Some(missing), message: message.to_owned(), ..Progress::default() }
}

/// Opens the channel, however long that takes.
async fn open(handle: &MeetingHandle) -> DataStream {
    let mut pause = FIRST_PAUSE;
    loop {
        match handle.open(Channel::Memory).await {
            Ok(stream) => return stream,
            Err(error) => tracing::debug!(error = crate::chain(&error), "no way to the missing memory yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}
