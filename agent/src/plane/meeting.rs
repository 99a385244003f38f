//! The two agents of one operation: a control connection between them, and channels opened over whichever side can dial.
//!
//! By rule the destination dials when the source has an address; else the source dials. When the one whose turn it is has
//! not come through after a while, the other one tries too. A side that wants a channel dials it if it dialled the
//! control connection; else it asks over that connection ([`HandoverMessage::DialMe`]) and waits for the arrival.
//!
//! Volumes' channels that arrive at the source are carried to the volume process's peer socket right here, for as long as
//! the meeting lives: before the switch, and after it while blocks are still needed.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use rand::Rng as _;
use supercloud_api::{
    Code, Problem,
    data::{self, Channel, HandoverMessage, kind},
    frame::{Frame, FrameError, read_frame, write_frame},
    link::Peer,
};
use supercloud_ids::{OperationId, VolumeId};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{DataPlane, DataStream, Incoming, PlaneError, admission::Role, bridge, not_here};

/// How often either side says that it is there.
const ALIVE_EVERY: Duration = Duration::from_secs(3);
/// A control connection that is silent for so long is given up.
const SILENCE_BUDGET: Duration = Duration::from_secs(15);
/// How long the side whose turn it is not waits before it dials too.
const STAND_BACK: Duration = Duration::from_secs(5);
/// How long an opened channel may take, the peer's part included.
const CHANNEL_BUDGET: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Frames that may wait to be written to a control connection.
const CONTROL_QUEUE: usize = 32;
/// Volume connections that are carried at once for one operation.
const MAX_BRIDGES: usize = 64;

/// What a meeting tells its owner. Dropped when nobody takes it.
#[derive(Debug)]
pub enum MeetingEvent {
    /// The control connection is up.
    Connected,
    /// It broke; the meeting goes on dialling.
    Lost,
    /// The other agent says.
    Message(HandoverMessage),
    /// The other agent opened the hypervisor's stream.
    Memory(Box<DataStream>),
}

/// Finds a volume's peer socket; none where this host does not serve the volume.
pub type PeerSockets = Arc<dyn Fn(VolumeId) -> Option<PathBuf> + Send + Sync>;

/// What a meeting must know.
pub struct MeetingParams {
    /// The data plane.
    pub plane: DataPlane,
    /// The operation.
    pub operation: OperationId,
    /// The other agent; none where this host only answers.
    pub peer: Option<Peer>,
    /// The newest ticket.
    pub ticket: watch::Receiver<String>,
    /// What this host is.
    pub role: Role,
    /// Where volumes are served.
    pub peer_sockets: PeerSockets,
}

enum Request {
    Listen(mpsc::Sender<MeetingEvent>),
    Arrived(Box<Incoming>),
    Say(HandoverMessage),
    Open(Channel, oneshot::Sender<Result<DataStream, PlaneError>>),
}

/// A meeting; ends when dropped.
pub struct Meeting {
    requests: mpsc::Sender<Request>,
    events: Option<mpsc::Receiver<MeetingEvent>>,
    _task: AbortOnDropHandle<()>,
}

/// To speak in a meeting and to open channels. Cheap to clone.
#[derive(Clone)]
pub struct MeetingHandle {
    requests: mpsc::Sender<Request>,
}

impl Meeting {
    /// Begins.
    #[must_use]
    pub fn begin(params: MeetingParams) -> Self {
        let (requests, queue) = mpsc::channel(64);
        let (events_tx, events) = mpsc::channel(64);
        let task = AbortOnDropHandle::new(tokio::spawn(Task::new(params, events_tx).run(queue)));
        Self { requests, events: Some(events), _task: task }
    }

    /// The handle for jobs.
    #[must_use]
    pub fn handle(&self) -> MeetingHandle {
        MeetingHandle { requests: self.requests.clone() }
    }

    /// What happens; given once, from the beginning on (at most 64 wait).
    pub fn take_events(&mut self) -> Option<mpsc::Receiver<MeetingEvent>> {
        self.events.take()
    }

    /// What happens from now on, in place of whoever listened before; begins with [`MeetingEvent::Connected`] where there is a connection.
    /// A source takes the memory channel only from here on.
    pub fn listen(&self) -> mpsc::Receiver<MeetingEvent> {
        let (events_tx, events) = mpsc::channel(64);
        if let Err(error) = self.requests.try_send(Request::Listen(events_tx)) {
            // Who listens hears that there is nothing to hear, and listens again.
            tracing::debug!(%error, "a meeting is overrun");
        }
        events
    }

    /// Hands over a connection that the other agent opened.
    pub fn arrived(&self, incoming: Incoming) {
        if let Err(error) = self.requests.try_send(Request::Arrived(Box::new(incoming))) {
            tracing::debug!(%error, "a data connection is dropped: the meeting is overrun");
        }
    }
}

impl MeetingHandle {
    /// Of a meeting to which nobody came.
    #[cfg(test)]
    pub(crate) fn of_nobody() -> Self {
        Self { requests: mpsc::channel(1).0 }
    }

    /// Says something to the other agent; lost when there is no connection.
    pub async fn say(&self, message: HandoverMessage) {
        // A meeting that is over has nobody to hear.
        let _ = self.requests.send(Request::Say(message)).await;
    }

    /// Opens a channel to the other agent.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn open(&self, channel: Channel) -> Result<DataStream, PlaneError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Open(channel, reply)).await.map_err(|_| PlaneError::Over)?;
        match timeout(CHANNEL_BUDGET, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(PlaneError::Over),
            Err(_) => Err(PlaneError::Deadline { peer: "the other agent".to_owned() }),
        }
    }
}

type Wanted = oneshot::Sender<Result<DataStream, PlaneError>>;

/// Why a connection was dialled.
enum Purpose {
    /// To be the control connection.
    Control,
    /// Somebody here wants the channel.
    Wanted(Wanted),
    /// The other agent asked for it.
    Asked,
}

struct Dialled {
    channel: Channel,
    purpose: Purpose,
    result: Result<DataStream, PlaneError>,
}

struct Control {
    is_dialled: bool,
    outbox: mpsc::Sender<HandoverMessage>,
    inbox: mpsc::Receiver<Result<HandoverMessage, FrameError>>,
    heard_at: Instant,
    /// Reader and writer; they end with the connection.
    _tasks: JoinSet<()>,
}

struct Task {
    params: MeetingParams,
    events: mpsc::Sender<MeetingEvent>,
    control: Option<Control>,
    /// Somebody here takes the other agent's stream of memory.
    takes_memory: bool,
    /// Opens that wait for a control connection.
    queued: Vec<(Channel, Wanted)>,
    /// Opens that wait for the other agent to dial.
    awaited: HashMap<Channel, Vec<Wanted>>,
    dials: JoinSet<Dialled>,
    bridges: JoinSet<()>,
    is_dialling: bool,
    dial_at: Option<Instant>,
    pause: Duration,
}

impl Task {
    fn new(params: MeetingParams, events: mpsc::Sender<MeetingEvent>) -> Self {
        let dial_at = first_dial(&params, Instant::now());
        Self {
            takes_memory: params.role == Role::Destination,
            params,
            events,
            control: None,
            queued: Vec::new(),
            awaited: HashMap::new(),
            dials: JoinSet::new(),
            bridges: JoinSet::new(),
            is_dialling: false,
            dial_at,
            pause: FIRST_PAUSE,
        }
    }

    async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut alive = interval(ALIVE_EVERY);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let dial_at = self.dial_at.filter(|_| self.control.is_none() && !self.is_dialling);
            tokio::select! {
                request = queue.recv() => match request {
                    Some(request) => self.handle(request).await,
                    None => return,
                },
                Some(dialled) = self.dials.join_next() => {
                    if let Ok(dialled) = dialled {
                        self.dialled(dialled).await;
                    }
                }
                Some(_) = self.bridges.join_next() => {}
                message = next_message(&mut self.control) => match message {
                    Some(Ok(message)) => self.heard(message),
                    Some(Err(error)) => self.lose(&error.to_string()),
                    None => self.lose("the other agent closed the control connection"),
                },
                () = until(dial_at) => {
                    self.is_dialling = true;
                    self.dial(Channel::Control, Purpose::Control);
                }
                _ = alive.tick() => {
                    if self.control.as_ref().is_some_and(|c| c.heard_at.elapsed() > SILENCE_BUDGET) {
                        self.lose("the other agent is silent");
                    }
                    self.say(HandoverMessage::Alive);
                    self.queued.retain(|(_, wanted)| !wanted.is_closed());
                    self.awaited.values_mut().for_each(|list| list.retain(|wanted| !wanted.is_closed()));
                }
            }
        }
    }

    async fn handle(&mut self, request: Request) {
        match request {
            Request::Listen(events) => {
                self.events = events;
                self.takes_memory = true;
                if self.control.is_some() {
                    self.tell(MeetingEvent::Connected);
                }
            }
            Request::Say(message) => self.say(message),
            Request::Open(channel, wanted) => self.open(channel, wanted),
            Request::Arrived(incoming) => {
                let channel = incoming.channel.clone();
                let takes = match &channel {
                    Channel::Control => true,
                    Channel::Memory => self.is_awaited(&channel) || self.takes_memory,
                    Channel::Volume { volume } => {
                        self.is_awaited(&channel)
                            || (self.bridges.len() < MAX_BRIDGES && (self.params.peer_sockets)(*volume).is_some())
                    }
                    Channel::Chunks { .. } => false,
                };
                if !takes {
                    incoming.refuse(not_here("nothing here waits for this channel")).await;
                    return;
                }
                match incoming.accept().await {
                    Ok(stream) if channel == Channel::Control => self.connect(stream, false),
                    Ok(stream) => self.arrive(&channel, stream),
                    Err(error) => tracing::debug!(%error, "an opened channel broke at once"),
                }
            }
        }
    }

    fn is_awaited(&self, channel: &Channel) -> bool {
        self.awaited.get(channel).is_some_and(|list| list.iter().any(|wanted| !wanted.is_closed()))
    }

    fn say(&mut self, message: HandoverMessage) {
        if let Some(control) = &self.control
            && control.outbox.try_send(message).is_err()
        {
            self.lose("the control connection takes nothing any more");
        }
    }

    fn open(&mut self, channel: Channel, wanted: Wanted) {
        match &self.control {
            None if self.dial_at.is_none() && self.params.peer.as_ref().is_some_and(|_| !self.may_be_dialled()) => {
                let name = self.peer_name();
                // Whoever asked may have stopped waiting.
                let _ = wanted.send(Err(PlaneError::NoAddress(name)));
            }
            None => self.queued.push((channel, wanted)),
            Some(control) if control.is_dialled => self.dial(channel, Purpose::Wanted(wanted)),
            Some(_) => {
                self.awaited.entry(channel.clone()).or_default().push(wanted);
                self.say(HandoverMessage::DialMe { channel });
            }
        }
    }

    fn may_be_dialled(&self) -> bool {
        self.params.plane.address.is_some()
    }

    fn peer_name(&self) -> String {
        self.params.peer.as_ref().map_or_else(|| "the other agent".to_owned(), |peer| peer.name.to_string())
    }

    fn dial(&mut self, channel: Channel, purpose: Purpose) {
        let (plane, peer, name) = (self.params.plane.clone(), self.params.peer.clone(), self.peer_name());
        let ticket = self.params.ticket.borrow().clone();
        self.dials.spawn(async move {
            let result = match peer {
                Some(peer) => plane.dial(&peer, &ticket, channel.clone()).await,
                None => Err(PlaneError::NoAddress(name)),
            };
            Dialled { channel, purpose, result }
        });
    }

    async fn dialled(&mut self, dialled: Dialled) {
        let Dialled { channel, purpose, result } = dialled;
        match (purpose, result) {
            (Purpose::Control, result) => {
                self.is_dialling = false;
                match result {
                    // The other one came through meanwhile: one control connection is enough.
                    Ok(_) if self.control.is_some() => {}
                    Ok(stream) => self.connect(stream, true),
                    Err(error) => {
                        tracing::debug!(error = %crate::chain(&error), operation = %self.params.operation, "no control connection yet");
                        self.dial_later();
                    }
                }
            }
            // Whoever asked may have stopped waiting.
            (Purpose::Wanted(wanted), result) => drop(wanted.send(result)),
            (Purpose::Asked, Ok(stream)) => self.arrive(&channel, stream),
            (Purpose::Asked, Err(error)) => {
                let detail = format!("a channel that was asked for cannot be dialled: {}", crate::chain(&error));
                tracing::warn!(operation = %self.params.operation, detail);
                if channel == Channel::Memory {
                    let problem = Problem::new(Code::HostUnavailable, detail);
                    self.say(HandoverMessage::Failed { problem });
                }
            }
        }
    }

    fn dial_later(&mut self) {
        self.dial_at = self.dial_at.map(|_| Instant::now() + self.pause.mul_f64(rand::rng().random_range(0.7..1.3)));
        self.pause = (self.pause * 2).min(LAST_PAUSE);
    }

    /// A control connection is there; it replaces an older one.
    fn connect(&mut self, stream: DataStream, is_dialled: bool) {
        let (reader, writer) = tokio::io::split(stream);
        let (outbox, outgoing) = mpsc::channel(CONTROL_QUEUE);
        let (incoming, inbox) = mpsc::channel(CONTROL_QUEUE);
        let mut tasks = JoinSet::new();
        tasks.spawn(read_messages(reader, incoming));
        tasks.spawn(write_messages(writer, outgoing));
        if self.control.is_some() {
            self.tell(MeetingEvent::Lost);
        }
        self.control = Some(Control { is_dialled, outbox, inbox, heard_at: Instant::now(), _tasks: tasks });
        self.pause = FIRST_PAUSE;
        self.tell(MeetingEvent::Connected);
        for (channel, wanted) in std::mem::take(&mut self.queued) {
            self.open(channel, wanted);
        }
    }

    fn lose(&mut self, why: &str) {
        if self.control.take().is_some() {
            tracing::debug!(operation = %self.params.operation, why, "the control connection is lost");
            for (channel, list) in std::mem::take(&mut self.awaited) {
                self.queued.extend(list.into_iter().map(|wanted| (channel.clone(), wanted)));
            }
            self.dial_later();
            self.tell(MeetingEvent::Lost);
        }
    }

    fn heard(&mut self, message: HandoverMessage) {
        if let Some(control) = &mut self.control {
            control.heard_at = Instant::now();
        }
        match message {
            HandoverMessage::Alive | HandoverMessage::Other => {}
            HandoverMessage::DialMe { channel } => {
                if self.dials.len() < MAX_BRIDGES {
                    self.dial(channel, Purpose::Asked);
                }
            }
            message => self.tell(MeetingEvent::Message(message)),
        }
    }

    /// A channel that the other agent wanted, or that somebody here waits for.
    fn arrive(&mut self, channel: &Channel, stream: DataStream) {
        let mut stream = Some(stream);
        for wanted in self.awaited.remove(channel).into_iter().flatten() {
            let Some(given) = stream.take() else {
                // One arrival for one request; the others ask again.
                self.queued.push((channel.clone(), wanted));
                continue;
            };
            if let Err(Ok(back)) = wanted.send(Ok(given)) {
                stream = Some(back);
            }
        }
        if self.control.is_some() {
            for (channel, wanted) in std::mem::take(&mut self.queued) {
                self.open(channel, wanted);
            }
        }
        let Some(stream) = stream else { return };
        match channel {
            Channel::Memory => self.tell(MeetingEvent::Memory(Box::new(stream))),
            Channel::Volume { volume } => {
                let Some(socket) = (self.params.peer_sockets)(*volume) else { return };
                let volume = *volume;
                self.bridges.spawn(async move {
                    let carried = match bridge::connect(&socket, Duration::from_secs(5)).await {
                        Ok(local) => bridge::carry(stream, local).await,
                        Err(error) => Err(error),
                    };
                    match carried {
                        Ok((to_volume, from_volume)) => {
                            tracing::debug!(%volume, to_volume, from_volume, "a volume's channel has ended");
                        }
                        Err(error) => tracing::debug!(%volume, %error, "a volume's channel broke"),
                    }
                });
            }
            Channel::Control | Channel::Chunks { .. } => {}
        }
    }

    fn tell(&self, event: MeetingEvent) {
        if let Err(mpsc::error::TrySendError::Full(event)) = self.events.try_send(event) {
            tracing::debug!(?event, "nobody takes what happens in a meeting");
        }
    }
}

/// When this side dials first, if it can at all.
fn first_dial(params: &MeetingParams, now: Instant) -> Option<Instant> {
    params.peer.as_ref()?.data_address?;
    let is_my_turn = match params.role {
        Role::Destination => true,
        Role::Source => params.plane.address.is_none(),
    };
    Some(if is_my_turn { now } else { now + STAND_BACK })
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn next_message(control: &mut Option<Control>) -> Option<Result<HandoverMessage, FrameError>> {
    match control {
        Some(control) => control.inbox.recv().await,
        None => std::future::pending().await,
    }
}

async fn read_messages<R: AsyncRead + Unpin>(mut reader: R, inbox: mpsc::Sender<Result<HandoverMessage, FrameError>>) {
    loop {
        let message = match read_frame(&mut reader).await {
            Ok(frame) => frame.parse_json(kind::HANDOVER, data::VERSION),
            Err(FrameError::Closed) => return,
            Err(error) => Err(error),
        };
        let is_end = message.is_err();
        if inbox.send(message).await.is_err() || is_end {
            return;
        }
    }
}

async fn write_messages<W: AsyncWrite + Unpin>(mut writer: W, mut outbox: mpsc::Receiver<HandoverMessage>) {
    while let Some(message) = outbox.recv().await {
        let written = match Frame::json(kind::HANDOVER, data::VERSION, &message) {
            Ok(frame) => timeout(SILENCE_BUDGET, write_frame(&mut writer, &frame)).await,
            Err(error) => Ok(Err(error)),
        };
        if !matches!(written, Ok(Ok(()))) {
            // Closing it is what tells the other tasks of this connection.
            break;
        }
    }
    // The peer may be gone already.
    let _ = timeout(Duration::from_secs(1), writer.shutdown()).await;
}
