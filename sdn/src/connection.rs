//! A client of a switch's OpenFlow: requests and their answers, atomic bundles, packets for the controller.
//!
//! One task reads; it matches answers to requests by xid, answers echoes, and queues packet-ins (a full queue drops,
//! counted). One task writes. Every wait has a deadline. The connection is to be dropped when it fails: making a new
//! one, and finding out what the switch has then, is the driver's matter.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::openflow::{
    BUNDLE_ATOMIC, BUNDLE_ORDERED, BundleControl, DecodeError, EncodeError, FlowStats, HEADER_LEN, Match, Message,
    Meter, MultipartReply, MultipartRequest, PacketIn, PacketOut, PortCounters, VERSION, decode_header,
};

/// How long one exchange may take unless the caller says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);
/// Packet-ins that wait for the agent; more are dropped.
pub const PACKET_IN_QUEUE: usize = 256;
/// The parts of one list may take this many bytes in all.
const MAX_LIST_BYTES: usize = 256 << 20;
const WRITE_QUEUE: usize = 64;

/// Where a switch listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A unix socket, such as `<rundir>/br-int.mgmt`.
    Unix(PathBuf),
    /// `host:port`.
    Tcp(String),
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
            Endpoint::Tcp(addr) => write!(f, "tcp:{addr}"),
        }
    }
}

/// Why an exchange with a switch failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The switch cannot be reached.
    #[error("connecting to the switch at {endpoint} failed")]
    Connect {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The switch does not speak OpenFlow 1.3.
    #[error("the switch offers no OpenFlow 1.3: {0}")]
    Version(String),
    /// No answer in time.
    #[error("the switch did not answer {what} within {deadline:?}")]
    Deadline {
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// The connection ended.
    #[error("the connection to the switch ended during {what}")]
    Closed {
        /// What was asked.
        what: &'static str,
    },
    /// The switch refused.
    #[error("the switch refused {what}: error type {kind}, code {code}{}", refused_name(*kind, *code))]
    Refused {
        /// What was asked.
        what: String,
        /// OFPET_*.
        kind: u16,
        /// The code of that type.
        code: u16,
    },
    /// The answer is not one to this request.
    #[error("the switch answered {what} by something else")]
    Unexpected {
        /// What was asked.
        what: &'static str,
    },
    /// The list is longer than this client takes.
    #[error("the switch's list of {what} is longer than {MAX_LIST_BYTES} bytes")]
    TooLong {
        /// What was asked.
        what: &'static str,
    },
    /// A message does not fit the format.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

fn refused_name(kind: u16, code: u16) -> &'static str {
    match (kind, code) {
        (0, _) => " (hello failed)",
        (1, 5) => " (permission)",
        (1, _) => " (bad request)",
        (2, _) => " (bad action)",
        (3, _) => " (bad instruction)",
        (4, _) => " (bad match)",
        (5, 1) => " (table full)",
        (5, _) => " (flow-mod failed)",
        (6, _) => " (group-mod failed)",
        (12, _) => " (meter-mod failed)",
        _ => "",
    }
}

/// An answer, or that part of it that came in one message, and its length on the wire.
type Answer = (Message, usize);
type Pending = Arc<Mutex<HashMap<u32, mpsc::UnboundedSender<Answer>>>>;

/// An open connection. Dropping it ends its tasks.
#[derive(Debug)]
pub struct Connection {
    writer: mpsc::Sender<Vec<u8>>,
    pending: Pending,
    next_xid: AtomicU32,
    next_bundle: AtomicU32,
    dropped_packets: Arc<AtomicU64>,
    datapath_id: u64,
    deadline: Duration,
    closed: CancellationToken,
    /// Owns the reading and the writing task.
    _tasks: JoinSet<()>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection {
    /// Connects and shakes hands: hello, features, and whole packets to us. Packets for the controller come by the
    /// returned queue.
    pub async fn open(
        endpoint: &Endpoint,
        deadline: Duration,
    ) -> Result<(Self, mpsc::Receiver<PacketIn>), ConnectionError> {
        let connect = async {
            match endpoint {
                Endpoint::Unix(path) => UnixStream::connect(path).await.map(|s| Box::new(s) as Box<dyn Stream>),
                Endpoint::Tcp(addr) => {
                    let stream = TcpStream::connect(addr.as_str()).await?;
                    stream.set_nodelay(true)?;
                    Ok(Box::new(stream) as Box<dyn Stream>)
                }
            }
        };
        let stream = timeout(deadline, connect)
            .await
            .map_err(|_| ConnectionError::Deadline { what: "the connection", deadline })?
            .map_err(|source| ConnectionError::Connect { endpoint: endpoint.clone(), source })?;
        let (reader, write_half) = tokio::io::split(stream);
        let (writer, write_queue) = mpsc::channel(WRITE_QUEUE);
        let (packet_in, packets) = mpsc::channel(PACKET_IN_QUEUE);
        let closed = CancellationToken::new();
        let pending = Pending::default();
        let dropped_packets = Arc::new(AtomicU64::new(0));
        let (hello_tx, mut hello_rx) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        tasks.spawn(write_all(write_half, write_queue, closed.clone()));
        tasks.spawn(
            Inbox {
                pending: pending.clone(),
                writer: writer.clone(),
                packet_in,
                hello: hello_tx,
                dropped: dropped_packets.clone(),
                closed: closed.clone(),
            }
            .run(reader),
        );
        let mut connection = Connection {
            writer,
            pending,
            next_xid: AtomicU32::new(16),
            next_bundle: AtomicU32::new(1),
            dropped_packets,
            datapath_id: 0,
            deadline,
            closed,
            _tasks: tasks,
        };
        connection.send(Message::Hello { versions: Some(1 << VERSION) }.encode(1)?, "hello").await?;
        match timeout(deadline, hello_rx.recv()).await {
            Err(_) => return Err(ConnectionError::Deadline { what: "hello", deadline }),
            Ok(None) => return Err(ConnectionError::Closed { what: "hello" }),
            Ok(Some(Err(said))) => return Err(ConnectionError::Version(said)),
            Ok(Some(Ok(()))) => {}
        }
        match connection.ask(&Message::FeaturesRequest, "features").await? {
            Message::FeaturesReply { datapath_id, .. } => connection.datapath_id = datapath_id,
            _ => return Err(ConnectionError::Unexpected { what: "features" }),
        }
        // A management connection gets no packet-in before it says how much of a packet it wants.
        connection.tell(&[Message::SetConfig { flags: 0, miss_send_len: 0xffff }], "set-config").await?;
        Ok((connection, packets))
    }

    /// The bridge's identity.
    #[must_use]
    pub fn datapath_id(&self) -> u64 {
        self.datapath_id
    }

    /// Packet-ins that were dropped because the queue was full.
    #[must_use]
    pub fn dropped_packets(&self) -> u64 {
        self.dropped_packets.load(Ordering::Relaxed)
    }

    /// Done when the connection has ended.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    fn xid(&self) -> u32 {
        self.next_xid.fetch_add(1, Ordering::Relaxed)
    }

    async fn send(&self, bytes: Vec<u8>, what: &'static str) -> Result<(), ConnectionError> {
        match timeout(self.deadline, self.writer.send(bytes)).await {
            Err(_) => Err(ConnectionError::Deadline { what, deadline: self.deadline }),
            Ok(Err(_)) => Err(ConnectionError::Closed { what }),
            Ok(Ok(())) => Ok(()),
        }
    }

    async fn next(
        &self,
        answers: &mut mpsc::UnboundedReceiver<Answer>,
        what: &'static str,
    ) -> Result<Answer, ConnectionError> {
        let answer = tokio::select! {
            answer = timeout(self.deadline, answers.recv()) => answer,
            () = self.closed.cancelled() => return Err(ConnectionError::Closed { what }),
        };
        match answer {
            Err(_) => Err(ConnectionError::Deadline { what, deadline: self.deadline }),
            Ok(None) => Err(ConnectionError::Closed { what }),
            Ok(Some((Message::Error { kind, code, .. }, _))) => {
                Err(ConnectionError::Refused { what: what.into(), kind, code })
            }
            Ok(Some(answer)) => Ok(answer),
        }
    }

    /// Sends a request and waits for its one answer.
    async fn ask(&self, request: &Message, what: &'static str) -> Result<Message, ConnectionError> {
        let xid = self.xid();
        let mut answers = Expected::new(&self.pending, [xid]);
        self.send(request.encode(xid)?, what).await?;
        Ok(self.next(&mut answers.queue, what).await?.0)
    }

    /// Sends messages that are answered only when refused, and waits until the switch has done them all.
    /// The first refusal is returned; what came after it may have been done.
    pub async fn tell(&self, messages: &[Message], what: &'static str) -> Result<(), ConnectionError> {
        let mut bytes = Vec::new();
        let mut xids = Vec::with_capacity(messages.len() + 1);
        for message in messages {
            let xid = self.xid();
            bytes.extend(message.encode(xid)?);
            xids.push(xid);
        }
        let barrier = self.xid();
        bytes.extend(Message::BarrierRequest.encode(barrier)?);
        xids.push(barrier);
        let mut answers = Expected::new(&self.pending, xids);
        self.send(bytes, what).await?;
        match self.next(&mut answers.queue, what).await? {
            (Message::BarrierReply, _) => Ok(()),
            _ => Err(ConnectionError::Unexpected { what }),
        }
    }

    /// Changes flows and groups at once or not at all. An error names the refused message.
    pub async fn apply_bundle(&self, messages: &[Message]) -> Result<(), ConnectionError> {
        if messages.is_empty() {
            return Ok(());
        }
        let bundle = self.next_bundle.fetch_add(1, Ordering::Relaxed);
        let flags = BUNDLE_ATOMIC | BUNDLE_ORDERED;
        let control = |control| Message::BundleControl { bundle, control, flags };
        self.ask(&control(BundleControl::OpenRequest), "opening a bundle").await?;
        let mut bytes = Vec::new();
        let mut xids = Vec::with_capacity(messages.len() + 1);
        let mut names = HashMap::with_capacity(messages.len());
        for (at, message) in messages.iter().enumerate() {
            let xid = self.xid();
            let add = Message::BundleAdd { bundle, flags, message: Box::new(message.clone()) };
            bytes.extend(add.encode(xid)?);
            xids.push(xid);
            names.insert(xid, at);
        }
        let commit = self.xid();
        xids.push(commit);
        bytes.extend(control(BundleControl::CommitRequest).encode(commit)?);
        let mut answers = Expected::new(&self.pending, xids);
        self.send(bytes, "a bundle").await?;
        let committed = self.next(&mut answers.queue, "a bundle").await;
        match committed {
            Ok((Message::BundleControl { control: BundleControl::CommitReply, .. }, _)) => Ok(()),
            Ok(_) => Err(ConnectionError::Unexpected { what: "a bundle" }),
            Err(ConnectionError::Refused { kind, code, .. }) => {
                let at = answers.last_xid().and_then(|xid| names.get(&xid)).copied();
                let what = at.map_or("a bundle".into(), |at| format!("message {at} of a bundle: {:?}", messages[at]));
                Err(ConnectionError::Refused { what, kind, code })
            }
            Err(other) => Err(other),
        }
    }

    async fn list<T>(
        &self,
        request: MultipartRequest,
        what: &'static str,
        pick: impl Fn(MultipartReply) -> Option<Vec<T>>,
    ) -> Result<Vec<T>, ConnectionError> {
        let xid = self.xid();
        let mut answers = Expected::new(&self.pending, [xid]);
        self.send(Message::MultipartRequest(request).encode(xid)?, what).await?;
        let (mut list, mut bytes) = (Vec::new(), 0);
        loop {
            let (answer, len) = self.next(&mut answers.queue, what).await?;
            bytes += len;
            if bytes > MAX_LIST_BYTES {
                return Err(ConnectionError::TooLong { what });
            }
            let Message::MultipartReply { more, part } = answer else {
                return Err(ConnectionError::Unexpected { what });
            };
            list.extend(pick(part).ok_or(ConnectionError::Unexpected { what })?);
            if !more {
                return Ok(list);
            }
        }
    }

    /// All flows of the switch.
    pub async fn dump_flows(&self) -> Result<Vec<FlowStats>, ConnectionError> {
        self.flows(MultipartRequest::all_flows()).await
    }

    /// The flows whose cookie has these bits where the mask has any.
    pub async fn dump_flows_of(&self, cookie: u64, cookie_mask: u64) -> Result<Vec<FlowStats>, ConnectionError> {
        self.flows(MultipartRequest::Flows { table: 0xff, cookie, cookie_mask, matching: Match::any() }).await
    }

    async fn flows(&self, request: MultipartRequest) -> Result<Vec<FlowStats>, ConnectionError> {
        self.list(request, "flows", |part| match part {
            MultipartReply::Flows(list) => Some(list),
            _ => None,
        })
        .await
    }

    /// All meters of the switch.
    pub async fn dump_meters(&self) -> Result<Vec<Meter>, ConnectionError> {
        self.list(MultipartRequest::MeterConfig, "meters", |part| match part {
            MultipartReply::MeterConfig(list) => Some(list),
            _ => None,
        })
        .await
    }

    /// Counters of a port, or of all ([`crate::openflow::port::ANY`]).
    pub async fn port_counters(&self, port: u32) -> Result<Vec<PortCounters>, ConnectionError> {
        self.list(MultipartRequest::PortStats { port }, "port counters", |part| match part {
            MultipartReply::PortStats(list) => Some(list),
            _ => None,
        })
        .await
    }

    /// Sends a frame through the switch. A refusal comes back with the next barrier only; this does not wait.
    pub async fn packet_out(&self, packet: PacketOut) -> Result<(), ConnectionError> {
        let bytes = Message::PacketOut(packet).encode(self.xid())?;
        self.send(bytes, "a packet-out").await
    }

    /// Asks whether the switch is there.
    pub async fn echo(&self) -> Result<(), ConnectionError> {
        match self.ask(&Message::EchoRequest(b"supercloud".to_vec()), "echo").await? {
            Message::EchoReply(_) => Ok(()),
            _ => Err(ConnectionError::Unexpected { what: "echo" }),
        }
    }
}

/// Registers xids for one queue of answers, and removes them when dropped.
struct Expected<'a> {
    pending: &'a Pending,
    xids: Vec<u32>,
    queue: mpsc::UnboundedReceiver<Answer>,
}

impl<'a> Expected<'a> {
    fn new(pending: &'a Pending, xids: impl IntoIterator<Item = u32>) -> Self {
        let (tx, queue) = mpsc::unbounded_channel();
        let xids: Vec<u32> = xids.into_iter().collect();
        let mut map = pending.lock().unwrap_or_else(PoisonError::into_inner);
        for xid in &xids {
            map.insert(*xid, tx.clone());
        }
        drop(map);
        Self { pending, xids, queue }
    }

    /// The xid that was answered by an error first: errors take their xid out of the table.
    fn last_xid(&self) -> Option<u32> {
        let map = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        self.xids.iter().copied().find(|xid| !map.contains_key(xid))
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        let mut map = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        for xid in &self.xids {
            map.remove(xid);
        }
    }
}

async fn write_all(
    mut to: tokio::io::WriteHalf<Box<dyn Stream>>,
    mut queue: mpsc::Receiver<Vec<u8>>,
    closed: CancellationToken,
) {
    while let Some(bytes) = queue.recv().await {
        if to.write_all(&bytes).await.is_err() {
            break;
        }
    }
    closed.cancel();
}

/// What the reading task needs.
struct Inbox {
    pending: Pending,
    writer: mpsc::Sender<Vec<u8>>,
    packet_in: mpsc::Sender<PacketIn>,
    hello: mpsc::Sender<Result<(), String>>,
    dropped: Arc<AtomicU64>,
    closed: CancellationToken,
}

impl Inbox {
    async fn run(self, mut from: tokio::io::ReadHalf<Box<dyn Stream>>) {
        let mut buffer = BytesMut::with_capacity(1 << 16);
        loop {
            match self.take_messages(&mut buffer) {
                Ok(()) => {}
                Err(err) => {
                    tracing::warn!(%err, "the switch broke the protocol");
                    break;
                }
            }
            match from.read_buf(&mut buffer).await {
                Ok(n) if n > 0 => {}
                _ => break,
            }
        }
        self.closed.cancel();
    }

    /// Takes every whole message out of the buffer, which so never holds more than one message and one read.
    fn take_messages(&self, buffer: &mut BytesMut) -> Result<(), DecodeError> {
        while let Some((kind, len, xid)) = decode_header(buffer)? {
            if buffer.len() < len {
                buffer.reserve(len - buffer.len());
                return Ok(());
            }
            let bytes = buffer.split_to(len);
            // Of a version that is not ours only the hello is looked at.
            if kind == 0 {
                let offers = offers_ours(&bytes);
                let said = format!("version byte {:#x}", bytes.chunk()[0]);
                // A second hello changes nothing.
                let _ = self.hello.try_send(if offers { Ok(()) } else { Err(said) });
                continue;
            }
            match Message::decode(&bytes) {
                Ok((xid, message)) => self.dispatch(xid, message, len),
                // One answer that cannot be read fails its request by its deadline; the stream is still in step.
                Err(err) => tracing::warn!(%err, kind, xid, "a message of the switch cannot be read"),
            }
        }
        Ok(())
    }

    fn dispatch(&self, xid: u32, message: Message, len: usize) {
        match message {
            Message::EchoRequest(data) => {
                let answer = Message::EchoReply(data).encode(xid);
                if answer.is_ok_and(|bytes| self.writer.try_send(bytes).is_err()) {
                    // Who cannot take an answer in is not there.
                    self.closed.cancel();
                }
            }
            Message::PacketIn(packet) => {
                if self.packet_in.try_send(packet).is_err() {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            Message::Error { kind: 0, ref data, .. } => {
                let _ = self.hello.try_send(Err(String::from_utf8_lossy(data).chars().take(200).collect()));
            }
            message => {
                let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
                let waiting = match &message {
                    Message::Error { .. } => pending.remove(&xid),
                    _ => pending.get(&xid).cloned(),
                };
                match (waiting, &message) {
                    (Some(queue), _) => {
                        let _ = queue.send((message, len));
                    }
                    (None, Message::Error { kind, code, .. }) => {
                        tracing::debug!(kind, code, xid, "the switch refused something that nobody waits for");
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Whether a hello offers OpenFlow 1.3: by its bitmap, else by being at least that version.
fn offers_ours(hello: &[u8]) -> bool {
    let mut ours = hello.to_vec();
    let theirs = std::mem::replace(&mut ours[0], VERSION);
    match Message::decode(&ours) {
        Ok((_, Message::Hello { versions: Some(bits) })) => bits & 1 << VERSION != 0,
        _ => theirs >= VERSION && hello.len() >= HEADER_LEN,
    }
}
