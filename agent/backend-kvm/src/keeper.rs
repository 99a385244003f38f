//! Who talks to a guest's process: one task per guest, as long as the process is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_blanket::{
    BackendError, BackendResult,
    backend::{BackendEvent, GuestEvent, GuestInfo, PauseReason, RunState, StopReason},
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    checkpoint::Way,
    control::{self, Event, Line, Lines, MirrorProgress, Progress, Request, Requests, State},
    record::{self, Home, Proof, Record, Role},
    spawn,
};

/// How often a process that hung up but lives is tried again, and a disk without a way.
const RETRY_EVERY: Duration = Duration::from_millis(250);
/// A disk may be without a way for so long before anybody is told: its volume process is started anew.
const STALL_AFTER: Duration = Duration::from_secs(1);
/// How long a volume process may take to accept.
const DIAL_BUDGET: Duration = Duration::from_secs(5);

/// What is known of the process now.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// How its guest is; `None` before it answered first.
    pub state: Option<State>,
    /// It is gone; why.
    pub gone: Option<StopReason>,
    /// How far it is with sending the guest.
    pub progress: Progress,
    /// How many times a guest came here and did not get through.
    pub failed_arrivals: u32,
    /// The last that it said on its standard error, when it is gone.
    pub said: String,
    /// Why it was not sent, or did not get through, the last time.
    pub error: Option<String>,
    /// How far it is with mirroring the guest.
    pub mirror: MirrorProgress,
    /// The guest is being mirrored, as far as was heard.
    is_mirrored: bool,
    /// How many mirrors are over.
    pub mirrors_over: u32,
    /// Why the last one is, if it was not ended.
    pub mirror_error: Option<String>,
    /// Bytes of its memory that are missing there; `None` before it said.
    pub missing: Option<u64>,
    /// The connection over which memory is served or fetched there, as far as was heard.
    connection: Option<u64>,
    /// The last such connection that is over, and why, if it was not because all of it has come.
    pub connection_over: Option<(u64, Option<String>)>,
}

impl Seen {
    /// Takes what a line says of memory that a move has left behind.
    fn note_left(&mut self, line: &Line) {
        // All that a process of before says of it.
        let is_status = line.is_mirrored.is_some();
        if let Some(missing) = line.missing_bytes.or(is_status.then_some(0)) {
            self.missing = Some(missing);
        }
        let over = |error: Option<String>| line.connection.or(self.connection).map(|number| (number, error));
        match line.event {
            Some(Event::Served | Event::Fetched) => self.connection_over = over(None).or(self.connection_over.take()),
            Some(Event::NotServed | Event::NotFetched) => {
                let why = line.error.clone().unwrap_or_else(|| "its process does not say why".to_owned());
                self.connection_over = over(Some(why)).or(self.connection_over.take());
            }
            // Asked after the talk had broken off: what was said meanwhile is lost.
            None if is_status && self.connection.is_some() && line.connection != self.connection => {
                self.connection_over =
                    self.connection.map(|number| (number, Some("how it ended was not heard".to_owned())));
                self.connection = line.connection;
            }
            None if line.connection.is_some() => self.connection = line.connection,
            _ => {}
        }
        if self.connection_over.as_ref().is_some_and(|(number, _)| Some(*number) == self.connection) {
            self.connection = None;
        }
    }

    /// That all of its memory is there.
    ///
    /// # Errors
    /// That it is not, or that nobody has said so.
    pub fn must_be_whole(&self, guest: GuestId, wants: &'static str) -> BackendResult<()> {
        match self.missing {
            Some(0) => Ok(()),
            Some(bytes) => {
                let is = format!("fetching {bytes} bytes of its memory that were left behind where it came from");
                Err(BackendError::WrongState { guest, wants, is })
            }
            None => Err(BackendError::Away {
                what: wants,
                detail: "its process has not said yet what is missing".to_owned(),
            }),
        }
    }
}

struct Ask {
    request: Request,
    socket: Option<OwnedFd>,
    answer: oneshot::Sender<Line>,
}

/// What its user and its task share.
struct Shared {
    home: Home,
    record: Mutex<Record>,
    /// Why it will be gone, when we end it.
    reason: Mutex<Option<StopReason>>,
    is_cancelled: AtomicBool,
}

impl Shared {
    /// Says, to who comes after this agent as well, why the process will be gone, before it is.
    async fn intend(self: &Arc<Self>, reason: StopReason) {
        *lock(&self.reason) = Some(reason);
        let shared = Arc::clone(self);
        let noted = tokio::task::spawn_blocking(move || shared.home.note_end(reason)).await;
        if let Err(error) = noted.map_err(io::Error::other).and_then(|noted| noted) {
            tracing::warn!(guest = %self.home.guest, %error, "why a guest's process ends cannot be kept");
        }
    }
}

/// A guest's process.
pub struct Keeper {
    shared: Arc<Shared>,
    asks: mpsc::Sender<Ask>,
    seen: watch::Receiver<Seen>,
    staged: watch::Receiver<u64>,
    missing: watch::Receiver<u64>,
    is_settled: watch::Sender<bool>,
    /// By which the guest leaves.
    pub way: Way,
    budget: Duration,
    task: JoinHandle<()>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an agent may know of a guest whose process says this.
pub fn run_state(state: State, role: &Role) -> RunState {
    match (state, role) {
        (State::Arriving, _) => RunState::Paused(PauseReason::Incoming),
        (State::Running | State::Sending, _) => RunState::Running,
        (State::Paused | State::Sent, Role::Freezing(_)) => RunState::Paused(PauseReason::Saving),
        (State::Paused, Role::Incoming) => RunState::Paused(PauseReason::Arrived),
        (State::Paused, Role::Owner) => RunState::Paused(PauseReason::Asked),
        (State::Sent, _) => RunState::Paused(PauseReason::Departed),
        (State::Ended, _) => RunState::Crashed,
    }
}

impl Keeper {
    /// Begins to talk to a process. While it is not settled, nothing is said of its guest.
    pub fn new(
        home: Home,
        record: Record,
        events: broadcast::Sender<BackendEvent>,
        budget: Duration,
        is_settled: bool,
    ) -> Self {
        let shared = Arc::new(Shared {
            home,
            record: Mutex::new(record),
            reason: Mutex::new(None),
            is_cancelled: AtomicBool::new(false),
        });
        let (asks, asked) = mpsc::channel(16);
        let (sender, seen) = watch::channel(Seen::default());
        let (stages, staged) = watch::channel(0);
        let (misses, missing) = watch::channel(0);
        let talk = Talk {
            shared: Arc::clone(&shared),
            asked,
            seen: sender,
            staged: stages,
            missing: misses,
            events,
            waiting: BTreeMap::new(),
            next_id: 1,
            lost: BTreeMap::new(),
            attaching: BTreeMap::new(),
            told: BTreeSet::new(),
        };
        let is_settled = watch::Sender::new(is_settled);
        let (way, task) = (Way::default(), tokio::spawn(talk.run()));
        Self { shared, asks, seen, staged, missing, is_settled, way, budget, task }
    }

    pub fn guest(&self) -> GuestId {
        self.shared.home.guest
    }

    pub fn record(&self) -> Record {
        lock(&self.shared.record).clone()
    }

    /// Changes what is kept of it, for good.
    pub async fn mark(&self, epoch: Epoch, role: Role) -> BackendResult<()> {
        self.rewrite(move |record| Record { epoch, role, ..record }).await
    }

    /// Keeps who can serve memory that is missing there; `None`: none is.
    pub async fn note_left(&self, left: Option<Proof>) -> BackendResult<()> {
        self.rewrite(move |record| Record { left, ..record }).await
    }

    async fn rewrite(&self, change: impl FnOnce(Record) -> Record + Send + 'static) -> BackendResult<()> {
        let shared = Arc::clone(&self.shared);
        let write = move || {
            let mut record = lock(&shared.record);
            let new = change(record.clone());
            if new != *record {
                shared.home.write(&new)?;
                *record = new;
            }
            io::Result::Ok(())
        };
        let written = tokio::task::spawn_blocking(write).await.map_err(io::Error::other).and_then(|written| written);
        let path = self.shared.home.folder.clone();
        written.map_err(|source| BackendError::File { what: "keep a record in", path, source })
    }

    /// Whether the copy that goes on was cancelled by its user.
    pub fn is_cancelled(&self) -> bool {
        self.shared.is_cancelled.load(Ordering::Acquire)
    }

    pub fn set_cancelled(&self, is_cancelled: bool) {
        self.shared.is_cancelled.store(is_cancelled, Ordering::Release);
    }

    /// The newest cut of a mirror that is whole there.
    pub fn staged(&self) -> watch::Receiver<u64> {
        self.staged.clone()
    }

    /// Bytes of its memory that are missing there, once it said.
    pub fn missing(&self) -> watch::Receiver<u64> {
        self.missing.clone()
    }

    pub fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// It is as it shall be.
    pub fn settled(&self) {
        self.is_settled.send_replace(true);
    }

    /// What its process says; `None` when it is gone. Waits for the first word.
    pub async fn state_of_process(&self) -> BackendResult<Option<State>> {
        let what = "hear from a guest's process";
        let seen = self.until(what, self.budget, |seen| seen.state.is_some() || seen.gone.is_some()).await?;
        Ok(seen.state.filter(|_| seen.gone.is_none()))
    }

    /// The guest as it is; `None` when it is gone. Waits for the process's first word, and until it is settled.
    pub async fn info(&self) -> BackendResult<Option<GuestInfo>> {
        let mut is_settled = self.is_settled.subscribe();
        let what = "settle a guest that was found again";
        let budget_ms = u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX);
        let settled = timeout(self.budget, is_settled.wait_for(|is_settled| *is_settled)).await;
        settled
            .map_err(|_| BackendError::Deadline { what, budget_ms })?
            .map_err(|_| BackendError::NoSuchGuest { guest: self.guest() })?;
        let Some(state) = self.state_of_process().await? else { return Ok(None) };
        let record = self.record();
        let state = run_state(state, &record.role);
        Ok(Some(GuestInfo { guest: self.guest(), epoch: record.epoch, state, pid: Some(record.process.pid) }))
    }

    /// Waits until it is so.
    pub async fn until(
        &self,
        what: &'static str,
        budget: Duration,
        is_so: impl FnMut(&Seen) -> bool,
    ) -> BackendResult<Seen> {
        let mut seen = self.seen.clone();
        let late =
            |_| BackendError::Deadline { what, budget_ms: u64::try_from(budget.as_millis()).unwrap_or(u64::MAX) };
        let found = timeout(budget, seen.wait_for(is_so)).await.map_err(late)?;
        // The task goes with the guest's process, or with this keeper.
        found.map(|seen| seen.clone()).map_err(|_| BackendError::NoSuchGuest { guest: self.guest() })
    }

    /// Asks the process for something.
    pub async fn ask(&self, what: &'static str, request: Request, socket: Option<OwnedFd>) -> BackendResult<Line> {
        let (answer, answered) = oneshot::channel();
        let gone = || BackendError::NoSuchGuest { guest: self.guest() };
        let ask = async {
            self.asks.send(Ask { request, socket, answer }).await.map_err(|_| gone())?;
            let detail = "its process hung up".to_owned();
            answered.await.map_err(|_| BackendError::Away { what, detail })
        };
        let budget_ms = u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX);
        let line = timeout(self.budget, ask).await.map_err(|_| BackendError::Deadline { what, budget_ms })??;
        match line.error {
            Some(detail) => Err(BackendError::Failed { what, detail: detail.chars().take(1024).collect() }),
            None => Ok(line),
        }
    }

    /// Ends the process, and waits until it is gone.
    pub async fn end(&self, reason: StopReason, budget: Duration) -> BackendResult<()> {
        self.shared.intend(reason).await;
        let asked = self.ask("end a guest's process", Request { verb: "end", ..Request::default() }, None).await;
        if asked.is_err() {
            // It does not hear, or is gone already.
            self.record().process.end().await;
        }
        self.until("end a guest's process", budget, |seen| seen.gone.is_some()).await.map(drop)
    }
}

/// The task's own.
struct Talk {
    shared: Arc<Shared>,
    asked: mpsc::Receiver<Ask>,
    seen: watch::Sender<Seen>,
    staged: watch::Sender<u64>,
    missing: watch::Sender<u64>,
    events: broadcast::Sender<BackendEvent>,
    waiting: BTreeMap<u64, oneshot::Sender<Line>>,
    next_id: u64,
    /// Disks without a way, and since when.
    lost: BTreeMap<String, Instant>,
    /// New ways that are being taken, by the numbers of requests.
    attaching: BTreeMap<u64, String>,
    /// Those of which others were told.
    told: BTreeSet<String>,
}

impl Talk {
    async fn run(mut self) {
        let process = lock(&self.shared.record).process;
        while process.is_alive() {
            match control::connect(&record::control_socket(&self.shared.home)).await {
                Ok((requests, lines)) => {
                    if let Err(error) = self.talk(&requests, lines).await {
                        tracing::warn!(guest = %self.shared.home.guest, %error, "the talk with a guest's process broke off");
                    }
                    // Who waits for an answer hears that there is none; what is lost is told again.
                    self.waiting.clear();
                    self.attaching.clear();
                }
                Err(error) => {
                    tracing::debug!(guest = %self.shared.home.guest, %error, "a guest's process does not listen");
                }
            }
            sleep(RETRY_EVERY).await;
        }
        self.is_gone().await;
    }

    async fn talk(&mut self, requests: &Requests, mut lines: Lines) -> io::Result<()> {
        self.say(requests, Request { verb: "status", ..Request::default() }, None, None).await?;
        // Kept from turn to turn: however much the process says, a disk without a way is tried again.
        let mut next_try = Instant::now();
        loop {
            let retry = async {
                match self.lost.is_empty() {
                    true => std::future::pending().await,
                    false => sleep_until(next_try).await,
                }
            };
            tokio::select! {
                line = lines.next() => match line? {
                    Some(line) => {
                        if let Some(reason) = self.hear(line) {
                            // Of no use to anybody any more.
                            self.shared.intend(reason).await;
                            self.say(requests, Request { verb: "end", ..Request::default() }, None, None).await?;
                        }
                    }
                    None => return Ok(()),
                },
                ask = self.asked.recv() => match ask {
                    Some(Ask { request, socket, answer }) => self.say(requests, request, socket, Some(answer)).await?,
                    None => return Ok(()),
                },
                () = retry => {
                    self.mend(requests).await?;
                    next_try = Instant::now() + RETRY_EVERY;
                }
            }
        }
    }

    async fn say(
        &mut self,
        requests: &Requests,
        mut request: Request,
        socket: Option<OwnedFd>,
        answer: Option<oneshot::Sender<Line>>,
    ) -> io::Result<()> {
        request.id = self.next_id;
        self.next_id += 1;
        if let Some(answer) = answer {
            self.waiting.retain(|_, waiting| !waiting.is_closed());
            self.waiting.insert(request.id, answer);
        }
        requests.say(&request, socket).await
    }

    fn tell(&self, what: GuestEvent) {
        // Nobody may listen.
        let _ = self.events.send(BackendEvent::Guest { guest: self.shared.home.guest, what });
    }

    /// Takes a line; how the guest ended, if it has by itself.
    fn hear(&mut self, line: Line) -> Option<StopReason> {
        if let Some(state) = line.state {
            self.note(&line, state);
        }
        if let Some(disk) = line.id.and_then(|id| self.attaching.remove(&id)) {
            match &line.error {
                None => self.goes_on(&disk),
                Some(error) => {
                    tracing::warn!(guest = %self.shared.home.guest, disk, error, "a new way to a disk is not taken");
                    self.lost.entry(disk).or_insert_with(Instant::now);
                }
            }
        }
        for disk in &line.lost {
            self.lost.entry(disk.clone()).or_insert_with(Instant::now);
        }
        match line.event {
            Some(Event::Rebooted) => self.tell(GuestEvent::Rebooted),
            Some(Event::DiskLost) => {
                self.lost.entry(line.disk.clone().unwrap_or_default()).or_insert_with(Instant::now);
            }
            Some(Event::DiskRefused) => self.stalls(line.disk.clone().unwrap_or_default()),
            Some(Event::DiskAnswers) => self.goes_on(line.disk.as_deref().unwrap_or_default()),
            _ => {}
        }
        let ended = line.event.or(line.ended).filter(|event| matches!(event, Event::PoweredOff | Event::Broken));
        if let Some(answer) = line.id.and_then(|id| self.waiting.remove(&id)) {
            // Who asked may have gone.
            let _ = answer.send(line);
        }
        // Unless we are ending it anyway.
        let reason = if ended? == Event::PoweredOff { StopReason::PoweredOff } else { StopReason::Crashed };
        lock(&self.shared.reason).is_none().then_some(reason)
    }

    fn note(&self, line: &Line, state: State) {
        self.seen.send_modify(|seen| {
            seen.state = Some(state);
            if let Some(progress) = line.progress {
                seen.progress = progress;
            }
            if let Some(mirror) = line.mirror {
                seen.mirror = mirror;
            }
            match line.event {
                Some(Event::NotSent) => seen.error.clone_from(&line.error),
                Some(Event::NotArrived) => {
                    seen.failed_arrivals += 1;
                    seen.error.clone_from(&line.error);
                }
                Some(Event::MirrorEnded | Event::MirrorBroken) => {
                    seen.mirrors_over += 1;
                    seen.mirror_error.clone_from(&line.error);
                }
                // Asked after the talk had broken off: what was said meanwhile is lost.
                _ if line.is_mirrored == Some(false) && seen.is_mirrored => {
                    seen.mirrors_over += 1;
                    seen.mirror_error = Some("how it ended was not heard".to_owned());
                }
                _ => {}
            }
            let is_over = matches!(line.event, Some(Event::MirrorEnded | Event::MirrorBroken));
            seen.is_mirrored = !is_over && line.is_mirrored.unwrap_or(seen.is_mirrored || line.mirror.is_some());
            seen.note_left(line);
            // Before anybody hears of the rest: who waits for the guest to come looks at this then.
            if let Some(missing) = seen.missing {
                self.missing.send_if_modified(|shown| std::mem::replace(shown, missing) != missing);
            }
        });
        if let Some(cut) = line.cut {
            self.staged.send_if_modified(|staged| std::mem::replace(staged, cut) != cut);
        }
    }

    fn stalls(&mut self, disk: String) {
        if self.told.insert(disk.clone()) {
            self.tell(GuestEvent::DiskError { disk });
        }
    }

    fn goes_on(&mut self, disk: &str) {
        if self.told.remove(disk) && self.told.is_empty() {
            self.tell(GuestEvent::Resumed);
        }
    }

    /// Brings another way to each disk that has none, once its volume process is there again.
    async fn mend(&mut self, requests: &Requests) -> io::Result<()> {
        for (disk, since) in self.lost.clone() {
            let at = lock(&self.shared.record).launch.host.disks.get(&disk).map(|at| at.socket.clone());
            let Some(at) = at else {
                self.lost.remove(&disk);
                continue;
            };
            match timeout(DIAL_BUDGET, UnixStream::connect(&at)).await {
                Ok(Ok(stream)) => {
                    let socket = stream.into_std()?.into();
                    let request = Request { verb: "disk", disk: Some(disk.clone()), ..Request::default() };
                    self.attaching.insert(self.next_id, disk.clone());
                    self.lost.remove(&disk);
                    self.say(requests, request, Some(socket), None).await?;
                }
                Ok(Err(_)) | Err(_) if since.elapsed() >= STALL_AFTER => self.stalls(disk),
                Ok(Err(_)) | Err(_) => {}
            }
        }
        Ok(())
    }

    async fn is_gone(&self) {
        let shared = Arc::clone(&self.shared);
        let leave = move || {
            let home = &shared.home;
            let said = spawn::last_words(home);
            // An agent before may have known.
            let known = lock(&shared.reason).or_else(|| home.how_it_ended().ok().flatten());
            let reason = known.unwrap_or_else(|| {
                tracing::error!(guest = %home.guest, said, "a guest's process died");
                StopReason::Crashed
            });
            // A folder that stays is found, and removed, by the next one that looks.
            if let Err(error) = home.note_end(reason).and_then(|()| home.remove()) {
                tracing::warn!(guest = %home.guest, %error, "what is left of a guest's process cannot be removed");
            }
            (reason, said)
        };
        let (reason, said) =
            tokio::task::spawn_blocking(leave).await.unwrap_or_else(|error| (StopReason::Failed, error.to_string()));
        self.seen.send_modify(|seen| {
            seen.gone = Some(reason);
            seen.said = said;
        });
        self.tell(GuestEvent::Stopped(reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_says_is_understood_by_what_its_guest_is() {
        let role = Role::Freezing("/f".into());
        assert_eq!(run_state(State::Sent, &Role::Owner), RunState::Paused(PauseReason::Departed));
        assert_eq!(run_state(State::Sent, &role), RunState::Paused(PauseReason::Saving));
        assert_eq!(run_state(State::Paused, &Role::Incoming), RunState::Paused(PauseReason::Arrived));
        assert_eq!(run_state(State::Paused, &Role::Owner), RunState::Paused(PauseReason::Asked));
        assert_eq!(run_state(State::Arriving, &Role::Incoming), RunState::Paused(PauseReason::Incoming));
        for role in [Role::Owner, Role::Incoming, role] {
            assert_eq!(run_state(State::Running, &role), RunState::Running);
            assert_eq!(run_state(State::Sending, &role), RunState::Running);
        }
    }
}
