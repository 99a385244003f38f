//! [`LiveMigration`] on processes of our own VMM.
//!
//! | our call | the source's process | the destination's process |
//! |---|---|---|
//! | `begin` | runs | |
//! | `prepare` | | was started, waits for a stream |
//! | `perform` | `stream`, `send`: runs, then **paused**, everything sent | receives |
//! | `complete` | paused | **whole and paused** |
//! | *the caller's decision* | | |
//! | `Backend::resume` | | runs |
//! | `confirm` | ended, or runs again | |
//!
//! A source whose stream breaks with the agent that carries it runs on by itself; one that has sent everything stands still
//! until it is told. A destination that is still arriving when an agent begins is ended (see [`KvmBackend::open`]).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use supercloud_blanket::{
    Backend as _, BackendError, BackendResult, BoxFuture, Launch, LiveMigration,
    backend::{GuestInfo, PauseReason, RunState, StopReason},
    migrate::{
        Cookie, CopyLimits, CopyOptions, MemoryMode, Performed, Transfer, TransferPhase, TransferProgress, Verdict,
    },
    vmm::travel::StreamVersion,
};
use supercloud_ids::GuestId;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    BACK_END, KvmBackend,
    backend::{failed, words},
    checkpoint::Turn,
    control::{Progress, Request, State},
    keeper::{Keeper, Seen},
    record::Role,
};

/// How long a copy that is given up may take to end.
const CANCEL_BUDGET: Duration = Duration::from_secs(90);
/// How long the carrier of a stream may take to accept, or to come.
const DIAL_BUDGET: Duration = Duration::from_secs(10);

/// What the two halves tell each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    /// The version of this exchange.
    version: u16,
    /// Memory that is left behind can be fetched here.
    #[serde(default)]
    fetches: bool,
    /// The newest version of a stream that processes here read; those of before say nothing, and read the first.
    #[serde(default = "first")]
    reads: u16,
}

const VERSION: u16 = 1;

const fn first() -> u16 {
    1
}

/// What a process is told of the version of its stream, which `writes` versions up to this (`None`: it is older than that, and writes
/// what all read), for somewhere up to `reads` is read; `None`: nothing, as it is not to write an older one, or cannot be told.
pub(crate) fn older_stream(reads: u16, writes: Option<u16>) -> Option<u16> {
    writes.filter(|writes| reads < *writes).map(|_| reads.max(1))
}

fn wrap(fetches: bool) -> BackendResult<Cookie> {
    let text = serde_json::to_vec(&Told { version: VERSION, fetches, reads: StreamVersion::default().hello() })
        .map_err(|error| failed("describe a guest")(error.into()))?;
    Cookie::new(text)
}

pub(crate) fn check(cookie: &Cookie) -> BackendResult<()> {
    read(cookie).map(drop)
}

fn read(cookie: &Cookie) -> BackendResult<Told> {
    let foreign = |detail: String| BackendError::Foreign { what: "the cookie", detail };
    let told: Told = serde_json::from_slice(cookie.as_bytes()).map_err(|error| foreign(error.to_string()))?;
    if told.version != VERSION {
        return Err(foreign(format!("version {}; this host knows {VERSION}", told.version)));
    }
    Ok(told)
}

/// A request without arguments.
pub(crate) fn verb(verb: &'static str) -> Request {
    Request { verb, ..Request::default() }
}

/// Whether a guest that was arriving is here, or will not come.
pub(crate) fn has_come(seen: &Seen) -> bool {
    seen.gone.is_some() || seen.failed_arrivals > 0 || seen.state.is_some_and(|state| state != State::Arriving)
}

/// What [`has_come`] waited for, as an outcome.
pub(crate) fn came(what: &'static str, keeper: &Keeper, seen: &Seen) -> BackendResult<()> {
    if seen.gone.is_some() {
        return Err(BackendError::NoSuchGuest { guest: keeper.guest() });
    }
    match seen.state {
        Some(State::Paused) => Ok(()),
        _ => {
            let detail = seen.error.clone().unwrap_or_else(|| "it did not come".to_owned());
            Err(BackendError::Failed { what, detail })
        }
    }
}

/// Tasks that wait for streams, per guest; they go with this agent.
#[derive(Default)]
pub(crate) struct Arrivals(Mutex<BTreeMap<GuestId, JoinHandle<()>>>);

impl Arrivals {
    pub(crate) fn set(&self, guest: GuestId, task: Option<JoinHandle<()>>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = match task {
            Some(task) => all.insert(guest, task),
            None => all.remove(&guest),
        };
        if let Some(old) = old {
            old.abort();
        }
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).values().for_each(JoinHandle::abort);
    }
}

/// Takes the one stream and gives it to the process.
async fn take_stream(listener: UnixListener, path: PathBuf, keeper: Arc<Keeper>) {
    let guest = keeper.guest();
    let given = async {
        let (stream, _) = listener.accept().await.map_err(failed("wait for the stream of a guest"))?;
        let stream = stream.into_std().map_err(failed("take the stream of a guest"))?;
        keeper.ask("take the stream of a guest", verb("stream"), Some(stream.into())).await
    };
    let given = given.await;
    // Its job is done; a later one makes its own.
    let _ = tokio::fs::remove_file(path).await;
    if let Err(error) = given {
        tracing::warn!(%guest, %error, "the stream of an incoming guest cannot be taken");
    }
}

/// A guest on its way out of its process.
pub(crate) struct Leaving<'a> {
    pub keeper: &'a Keeper,
    pub what: &'static str,
    pub budget: Duration,
    /// Until it has begun.
    pub turn: Turn,
}

impl Leaving<'_> {
    /// Sends it until everything is on the stream, and it stands still. On an error it runs on.
    pub(crate) async fn send(
        self,
        request: Request,
        shown: &watch::Sender<TransferProgress>,
    ) -> BackendResult<Progress> {
        let Self { keeper, what, budget, turn } = self;
        keeper.set_cancelled(false);
        let began = Instant::now();
        let memory_bytes = keeper.record().launch.spec.memory_bytes;
        keeper.ask(what, request, None).await?;
        drop(turn);
        let mut overdue = None;
        let seen = loop {
            let left = budget.saturating_sub(began.elapsed());
            let before = keeper.seen().progress;
            let news =
                |seen: &Seen| seen.gone.is_some() || seen.state != Some(State::Sending) || seen.progress != before;
            // The process itself gives up a stream that takes nothing.
            let looked = keeper.until(what, if overdue.is_some() { CANCEL_BUDGET } else { left }, news).await;
            match looked {
                Ok(seen) => {
                    shown.send_modify(|last| *last = advance(last, &seen.progress, memory_bytes, began.elapsed()));
                    if seen.gone.is_some() || seen.state != Some(State::Sending) {
                        break seen;
                    }
                }
                Err(late @ BackendError::Deadline { .. }) if overdue.is_none() => {
                    overdue = Some(late);
                    // That it ended meanwhile is no failure.
                    let _ = keeper.ask(what, verb("cancel"), None).await;
                }
                Err(error) => return Err(error),
            }
        };
        if seen.gone.is_some() {
            return Err(BackendError::NoSuchGuest { guest: keeper.guest() });
        }
        if seen.state == Some(State::Sent) {
            shown.send_modify(|last| last.phase = TransferPhase::Done);
            return Ok(seen.progress);
        }
        if keeper.is_cancelled() {
            return Err(BackendError::Cancelled { what });
        }
        let detail = seen.error.unwrap_or_else(|| "its process does not say why".to_owned());
        Err(overdue.unwrap_or(BackendError::Failed { what, detail }))
    }
}

/// The next figures to show: phases and totals never go back.
fn advance(last: &TransferProgress, now: &Progress, memory_bytes: u64, elapsed: Duration) -> TransferProgress {
    let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
    let phase = match (now.round, now.is_last) {
        (0, _) => TransferPhase::Setup,
        (_, false) => TransferPhase::Copy,
        (_, true) => TransferPhase::Drain,
    };
    TransferProgress {
        phase: phase.max(last.phase),
        iteration: u64::from(now.round).max(last.iteration),
        memory_total_bytes: memory_bytes,
        memory_processed_bytes: now.sent_bytes.max(last.memory_processed_bytes),
        memory_remaining_bytes: now.left_bytes,
        dirty_bytes_per_s: now.dirty_bytes_per_s,
        bandwidth_bytes_per_s: now.sent_bytes.saturating_mul(1000) / elapsed_ms.max(1),
        expected_downtime_ms: last.expected_downtime_ms,
        is_holding: now.is_holding,
        throttle_percent: now.throttle_percent.into(),
        elapsed_ms: elapsed_ms.max(last.elapsed_ms),
    }
}

/// The way to the carrier of a stream.
pub(crate) async fn dial(stream: &Path) -> BackendResult<std::os::fd::OwnedFd> {
    let what = "reach the carrier of the stream";
    let budget_ms = u64::try_from(DIAL_BUDGET.as_millis()).unwrap_or(u64::MAX);
    let dialled = timeout(DIAL_BUDGET, UnixStream::connect(stream)).await;
    let dialled = dialled.map_err(|_| BackendError::Deadline { what, budget_ms })?;
    let dialled = dialled.and_then(UnixStream::into_std).map_err(failed(what))?;
    Ok(dialled.into())
}

impl KvmBackend {
    async fn begin_move(&self, guest: GuestId) -> BackendResult<Cookie> {
        let (keeper, state) = self.expect(guest).await?;
        if state != RunState::Running {
            return Err(BackendError::WrongState { guest, wants: "begin a move", is: words(state) });
        }
        keeper.seen().must_be_whole(guest, "begin a move")?;
        // What came here may still be marked so, and paused it would pass for an arriving guest.
        keeper.mark(keeper.record().epoch, Role::Owner).await?;
        wrap(self.no_faults.is_none())
    }

    async fn prepare_move(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BackendResult<Cookie> {
        check(&cookie)?;
        let guest = launch.guest;
        let listener = UnixListener::bind(&listen).map_err(|source| BackendError::File {
            what: "listen at",
            path: listen.clone(),
            source,
        })?;
        let keeper = self.launch(launch, true).await?;
        self.arrivals.set(guest, Some(tokio::spawn(take_stream(listener, listen, keeper))));
        wrap(self.no_faults.is_none())
    }

    async fn complete_move(&self, guest: GuestId, cookie: Cookie) -> BackendResult<GuestInfo> {
        check(&cookie)?;
        let (keeper, state) = self.expect(guest).await?;
        if !matches!(state, RunState::Paused(PauseReason::Incoming | PauseReason::Arrived)) {
            return Err(BackendError::WrongState { guest, wants: "complete its move", is: words(state) });
        }
        let what = "take an incoming guest";
        let seen = keeper.until(what, self.config.process_budget, has_come).await;
        self.arrivals.set(guest, None);
        if let Err(error) = seen.and_then(|seen| came(what, &keeper, &seen)) {
            keeper.end(StopReason::Failed, self.config.process_budget).await?;
            return Err(error);
        }
        keeper.info().await?.ok_or(BackendError::NoSuchGuest { guest })
    }

    async fn discard_move(&self, guest: GuestId) -> BackendResult<()> {
        self.arrivals.set(guest, None);
        let Some(keeper) = self.keeper(guest)? else { return Ok(()) };
        match keeper.info().await?.map(|info| info.state) {
            None => Ok(()),
            Some(RunState::Paused(PauseReason::Incoming | PauseReason::Arrived) | RunState::Crashed) => {
                keeper.end(StopReason::Failed, self.config.process_budget).await
            }
            Some(state) => Err(BackendError::WrongState { guest, wants: "discard it as incoming", is: words(state) }),
        }
    }

    async fn confirm_move(&self, guest: GuestId, verdict: Verdict) -> BackendResult<()> {
        let Some(keeper) = self.keeper(guest)? else { return self.gone_at(guest, verdict) };
        let what = "end a move";
        let mut state = keeper.seen().state;
        if state == Some(State::Sending) {
            // A copy that nobody waits for. That it has ended meanwhile is no failure.
            let _ = keeper.ask(what, verb("cancel"), None).await;
            let is_over = |seen: &Seen| seen.gone.is_some() || seen.state != Some(State::Sending);
            state = keeper.until(what, self.config.process_budget, is_over).await?.state;
        }
        let Some(info) = keeper.info().await? else { return self.gone_at(guest, verdict) };
        match (verdict, state, info.state) {
            (_, Some(State::Arriving), state) | (_, _, state @ RunState::Paused(PauseReason::Arrived)) => {
                Err(BackendError::WrongState { guest, wants: "end its move as the source", is: words(state) })
            }
            (Verdict::Keep, _, RunState::Running) => Ok(()),
            (Verdict::Keep, _, RunState::Paused(_)) => {
                keeper.ask("resume the source of a move", verb("resume"), None).await.map(drop)
            }
            (Verdict::Release, _, RunState::Paused(_)) => {
                keeper.end(StopReason::Departed, self.config.process_budget).await
            }
            (_, _, state) => {
                Err(BackendError::WrongState { guest, wants: "end its move as the source", is: words(state) })
            }
        }
    }

    fn gone_at(&self, guest: GuestId, verdict: Verdict) -> BackendResult<()> {
        match verdict {
            Verdict::Release => Ok(()),
            Verdict::Keep => Err(BackendError::NoSuchGuest { guest }),
        }
    }
}

impl LiveMigration for KvmBackend {
    fn begin(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(self.begin_move(guest))
    }

    fn perform(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: CopyOptions,
    ) -> BackendResult<Transfer<Performed>> {
        let told = read(&cookie)?;
        if options.memory != MemoryMode::PreCopy {
            // Refused by its name.
            self.post_copy()?;
            if !told.fetches {
                let option = "moves that leave memory behind, at the host that the guest goes to".to_owned();
                return Err(BackendError::Unsupported { back_end: BACK_END, option });
            }
        }
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        let (sender, progress) = watch::channel(TransferProgress::default());
        let done = async move {
            let what = "copy a guest";
            let memory = Some(options.memory).filter(|memory| *memory != MemoryMode::PreCopy);
            let status = keeper.ask(what, verb("status"), None).await?;
            if memory.is_some() && status.missing_bytes.is_none() {
                // It would hang up.
                let option = "moves that leave memory behind, of a guest whose process is older than that".to_owned();
                return Err(BackendError::Unsupported { back_end: BACK_END, option });
            }
            let socket = dial(&stream).await?;
            let turn = keeper.make_way().await?;
            keeper.ask(what, verb("stream"), Some(socket)).await?;
            let send = Request {
                max_downtime_ms: options.max_downtime_ms.map(|ms| ms.max(1)),
                max_bytes_per_s: options.bandwidth_bytes_per_s,
                may_throttle: options.auto_converge.then_some(true),
                // A process older than that goes over when it can.
                holds: (options.holds && status.takes_holds == Some(true)).then_some(true),
                memory,
                stream_version: older_stream(told.reads, status.stream_version),
                ..verb("send")
            };
            let sent = Leaving { keeper: &keeper, what, budget: options.budget, turn }.send(send, &sender).await?;
            let paused_for = Duration::from_millis(sent.paused_ms.unwrap_or(0));
            let progress = *sender.borrow();
            let left_bytes = sent.left_behind_bytes.unwrap_or(0);
            Ok(Performed { cookie: wrap(true)?, paused_for, progress, left_bytes })
        };
        Ok(Transfer { progress, done: Box::pin(done) })
    }

    fn set_limits(&self, guest: GuestId, limits: CopyLimits) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let (keeper, _) = self.expect(guest).await?;
            let request = Request {
                max_downtime_ms: limits.max_downtime_ms.map(|ms| ms.max(1)),
                max_bytes_per_s: limits.bandwidth_bytes_per_s,
                holds: limits.holds,
                ..verb("limits")
            };
            keeper.ask("change the limits of a copy", request, None).await.map(drop)
        })
    }

    fn takes_holds(&self) -> bool {
        true
    }

    fn cancel(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let Some(keeper) = self.keeper(guest)? else { return Ok(()) };
            if keeper.seen().state != Some(State::Sending) {
                return Ok(());
            }
            keeper.set_cancelled(true);
            match keeper.ask("cancel a copy", verb("cancel"), None).await {
                // Over already: not an error of the caller's.
                Ok(_) | Err(BackendError::Failed { .. } | BackendError::NoSuchGuest { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn confirm(&self, guest: GuestId, verdict: Verdict) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.confirm_move(guest, verdict))
    }

    fn prepare(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(self.prepare_move(launch, cookie, listen))
    }

    fn complete(&self, guest: GuestId, cookie: Cookie) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.complete_move(guest, cookie))
    }

    fn discard(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.discard_move(guest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_of_others_are_refused() {
        assert!(check(&wrap(true).unwrap()).is_ok());
        // An agent of before says nothing of memory that is left behind.
        let before = Cookie::new(b"{\"version\":1}".to_vec()).unwrap();
        assert_eq!(read(&before).unwrap(), Told { version: 1, fetches: false, reads: 1 });
        assert_eq!(read(&wrap(false).unwrap()).unwrap(), Told { version: 1, fetches: false, reads: 2 });
        for bad in [&b""[..], b"{}", b"{\"version\":2}", b"supercloud-libvirt-qemu/1\n"] {
            assert!(matches!(check(&Cookie::new(bad.to_vec()).unwrap()), Err(BackendError::Foreign { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_stream_is_of_a_version_that_the_other_end_reads() {
        assert_eq!(older_stream(1, Some(2)), Some(1));
        // A guest whose process is older than versions writes the first; it would hang up if it were told of them.
        assert_eq!(older_stream(1, None), None);
        for reads in [2, 3] {
            assert_eq!(older_stream(reads, Some(2)), None);
        }
        assert_eq!(older_stream(0, Some(2)), Some(1));
    }

    #[test]
    fn progress_goes_forward_only() {
        let at = |round, sent_bytes, is_last| Progress { round, sent_bytes, is_last, ..Progress::default() };
        let mut last = TransferProgress::default();
        let mut phases = Vec::new();
        for now in [at(0, 0, false), at(1, 100, false), at(3, 400, true), at(2, 300, false)] {
            last = advance(&last, &now, 1 << 20, Duration::from_secs(1));
            phases.push((last.phase, last.iteration, last.memory_processed_bytes));
        }
        use TransferPhase::{Copy, Drain, Setup};
        assert_eq!(phases, [(Setup, 0, 0), (Copy, 1, 100), (Drain, 3, 400), (Drain, 3, 400)]);
    }
}
