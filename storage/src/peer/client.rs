//! The destination's side: one connection, dialled when it is needed and again when it broke; many requests on it.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::UnixStream,
    sync::{Notify, mpsc, oneshot, watch},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Stream,
    message::{Hello, Message},
    server::judge_hello,
};
use crate::{
    volume::{BlockSource, CutInfo, FetchError, FetchFuture, Fetched, MapPage, Priority},
    wire::{Frame, WireError, read_frame, write_frame},
};

/// The time for dialling and the hellos.
const DIAL_BUDGET: Duration = Duration::from_secs(15);
/// The time for one answer: 1 MiB of blocks under way at 35 kB/s. A connection on which one is not answered in time is
/// given up: a link that was cut does not say so.
const ANSWER_BUDGET: Duration = Duration::from_secs(30);
/// The time that a frame may take to leave.
const SEND_BUDGET: Duration = Duration::from_secs(60);

/// A boxed future of a [`Dial`].
pub type DialFuture<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send + 'a>>;

/// A way to a peer.
pub trait Dial: Send + Sync + fmt::Debug {
    /// Makes a connection.
    fn dial(&self) -> DialFuture<'_>;
}

/// Dials a unix socket.
#[derive(Debug, Clone)]
pub struct UnixDial(pub PathBuf);

impl Dial for UnixDial {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move { Ok(Box::new(UnixStream::connect(&self.0).await?) as Box<dyn Stream>) })
    }
}

struct Call {
    request: u64,
    message: Message,
    answer: oneshot::Sender<Result<Message, FetchError>>,
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Message, FetchError>>>>>;

/// A source of blocks at the other end of a connection. Its task ends when it is dropped.
#[derive(Debug)]
pub struct PeerClient {
    demand: mpsc::Sender<Call>,
    background: mpsc::Sender<Call>,
    next: AtomicU64,
    /// Demands under way: while there are any, background requests are held back.
    demands: Arc<Demands>,
    reset: Arc<Notify>,
    _task: DropGuard,
}

#[derive(Debug, Default)]
struct Demands {
    count: watch::Sender<usize>,
}

struct DemandGuard(Arc<Demands>);

impl Drop for DemandGuard {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}

impl PeerClient {
    /// A client of the volume that `hello` names. Dials at the first request.
    #[must_use]
    pub fn new(dial: Arc<dyn Dial>, hello: Hello) -> Self {
        // What waits here is small: messages without blocks.
        let (demand, demand_calls) = mpsc::channel(256);
        let (background, background_calls) = mpsc::channel(256);
        let cancel = CancellationToken::new();
        let task = cancel.clone();
        let reset = Arc::new(Notify::new());
        let is_stuck = reset.clone();
        // Owned: ends with the guard that the client holds.
        tokio::spawn(async move {
            tokio::select! {
                () = task.cancelled() => {}
                () = run(&*dial, hello, demand_calls, background_calls, &is_stuck) => {}
            }
        });
        let _task = cancel.drop_guard();
        Self { demand, background, next: AtomicU64::new(1), demands: Arc::default(), reset, _task }
    }

    /// Asks without keeping anybody back while the answer is waited for.
    async fn poll(&self, message: impl FnOnce(u64) -> Message + Send) -> Result<Message, FetchError> {
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let call = Call { request, message: message(request), answer };
        self.demand.send(call).await.map_err(|_| gone())?;
        self.answer(answered).await
    }

    async fn answer(&self, answered: oneshot::Receiver<Result<Message, FetchError>>) -> Result<Message, FetchError> {
        match tokio::time::timeout(ANSWER_BUDGET, answered).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(gone()),
            Err(_) => {
                self.reset.notify_waiters();
                Err(FetchError::Unreachable(format!("no answer within {ANSWER_BUDGET:?}")))
            }
        }
    }

    async fn call(
        &self,
        priority: Priority,
        message: impl FnOnce(u64) -> Message + Send,
    ) -> Result<Message, FetchError> {
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let call = Call { request, message: message(request), answer };
        let _guard = match priority {
            Priority::Demand => {
                self.demands.count.send_modify(|count| *count += 1);
                let guard = DemandGuard(self.demands.clone());
                self.demand.send(call).await.map_err(|_| gone())?;
                Some(guard)
            }
            Priority::Background => {
                // Who waits for a block comes first. Not for ever: a steady stream of demands must not starve the rest.
                let mut count = self.demands.count.subscribe();
                let quiet = count.wait_for(|count| *count == 0);
                let _ = tokio::time::timeout(Duration::from_millis(200), quiet).await;
                self.background.send(call).await.map_err(|_| gone())?;
                None
            }
        };
        self.answer(answered).await
    }
}

fn gone() -> FetchError {
    FetchError::Unreachable("the connection's task has ended".into())
}

impl BlockSource for PeerClient {
    fn map_page(&self, from: u32, since: u64) -> FetchFuture<'_, MapPage> {
        Box::pin(async move {
            match self.call(Priority::Demand, |request| Message::GetMap { request, from, since }).await? {
                Message::Map { page, .. } => Ok(page),
                other => Err(unexpected(&other)),
            }
        })
    }

    fn block(&self, block: u32, version: u64, priority: Priority) -> FetchFuture<'_, Fetched> {
        Box::pin(async move {
            let blocks = vec![(block, version)];
            match self.call(priority, |request| Message::GetBlocks { request, blocks }).await? {
                Message::Block { block: got, version: found, data, .. } if got == block && found >= version => {
                    Ok(Fetched { version: found, data })
                }
                other => Err(unexpected(&other)),
            }
        })
    }

    fn history(&self) -> FetchFuture<'_, Option<bytes::Bytes>> {
        Box::pin(async move {
            match self.call(Priority::Background, |request| Message::GetHistory { request }).await? {
                Message::History { told, .. } => Ok(Some(told)),
                other => Err(unexpected(&other)),
            }
        })
    }

    fn await_cut(&self, after: u64, have: u64) -> FetchFuture<'_, Option<CutInfo>> {
        Box::pin(async move {
            match self.poll(|request| Message::AwaitCut { request, after, have }).await? {
                Message::Cut { cut, .. } => Ok(cut),
                other => Err(unexpected(&other)),
            }
        })
    }

    fn cut_page(&self, number: u64, from: u32, since: u64) -> FetchFuture<'_, MapPage> {
        Box::pin(async move {
            match self.call(Priority::Demand, |request| Message::GetCutMap { request, number, from, since }).await? {
                Message::Map { page, .. } => Ok(page),
                other => Err(unexpected(&other)),
            }
        })
    }

    fn cut_block(&self, number: u64, block: u32, version: u64) -> FetchFuture<'_, Fetched> {
        Box::pin(async move {
            let blocks = vec![(block, version)];
            match self.poll(|request| Message::GetCutBlocks { request, number, blocks }).await? {
                Message::Block { block: got, version: found, data, .. } if got == block && found == version => {
                    Ok(Fetched { version: found, data })
                }
                other => Err(unexpected(&other)),
            }
        })
    }

    fn released(&self) -> FetchFuture<'_, ()> {
        Box::pin(async move {
            match self.call(Priority::Demand, |request| Message::Released { request }).await? {
                Message::Done { .. } => Ok(()),
                other => Err(unexpected(&other)),
            }
        })
    }
}

fn unexpected(message: &Message) -> FetchError {
    match message {
        Message::Refused { why, .. } => FetchError::Refused(why.clone()),
        Message::Block { block, version, .. } => {
            FetchError::Wrong(format!("block {block} at version {version} was not asked for"))
        }
        _ => FetchError::Wrong("an answer to another question".into()),
    }
}

/// Connects when there is something to ask, until the client is gone.
async fn run(
    dial: &dyn Dial,
    hello: Hello,
    mut demand: mpsc::Receiver<Call>,
    mut background: mpsc::Receiver<Call>,
    is_stuck: &Notify,
) {
    loop {
        let first = tokio::select! {
            biased;
            call = demand.recv() => call,
            call = background.recv() => call,
        };
        let Some(first) = first else { return };
        if first.answer.is_closed() {
            continue;
        }
        let connected = tokio::time::timeout(DIAL_BUDGET, connect(dial, &hello)).await;
        let stream = match connected {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                // Who asks pauses before it asks again.
                let _ = first.answer.send(Err(error));
                continue;
            }
            Err(_) => {
                let why = format!("no connection within {DIAL_BUDGET:?}");
                let _ = first.answer.send(Err(FetchError::Unreachable(why)));
                continue;
            }
        };
        let why = converse(stream, first, &mut demand, &mut background, is_stuck).await;
        tracing::info!(volume = %hello.volume, why, "the connection to the source ended");
    }
}

async fn connect(dial: &dyn Dial, hello: &Hello) -> Result<Box<dyn Stream>, FetchError> {
    let unreachable = |error: &dyn std::error::Error| FetchError::Unreachable(crate::volume::chain(error));
    let mut stream = dial.dial().await.map_err(|error| unreachable(&error))?;
    write_frame(&mut stream, &Message::Hello(*hello).encode()).await.map_err(|error| unreachable(&error))?;
    let frame = read_frame(&mut stream).await.map_err(|error| unreachable(&error))?;
    match Message::decode(&frame).map_err(|error| FetchError::Wrong(error.to_string()))? {
        Message::Hello(theirs) => {
            judge_hello(hello, &theirs).map_err(|field| FetchError::Wrong(format!("the source's {field} differs")))?;
            Ok(stream)
        }
        other => Err(unexpected(&other)),
    }
}

/// Uses a connection until it breaks; tells why it did.
async fn converse(
    stream: Box<dyn Stream>,
    first: Call,
    demand: &mut mpsc::Receiver<Call>,
    background: &mut mpsc::Receiver<Call>,
    is_stuck: &Notify,
) -> String {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let waiting: Waiting = Arc::default();
    let send = async {
        let mut next = Some(first);
        loop {
            let call = match next.take() {
                Some(call) => call,
                None => {
                    let call = tokio::select! {
                        biased;
                        call = demand.recv() => call,
                        call = background.recv() => call,
                    };
                    match call {
                        Some(call) => call,
                        None => return "it is not needed any more".to_owned(),
                    }
                }
            };
            // Its caller gave up.
            if call.answer.is_closed() {
                continue;
            }
            {
                let mut waiting = waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                waiting.retain(|_, answer| !answer.is_closed());
                waiting.insert(call.request, call.answer);
            }
            let frame: Frame = call.message.encode();
            match tokio::time::timeout(SEND_BUDGET, write_frame(&mut writer, &frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return crate::volume::chain(&error),
                Err(_) => return "the source does not read".into(),
            }
        }
    };
    let receive = async {
        loop {
            let frame = match read_frame(&mut reader).await {
                Ok(frame) => frame,
                Err(WireError::Closed) => return "the source closed it".to_owned(),
                Err(error) => return crate::volume::chain(&error),
            };
            // Decompressing 64 KiB at a time, in order: half a core's worth at 1 GB/s.
            let message = match Message::decode(&frame) {
                Ok(message) => message,
                Err(error) => return crate::volume::chain(&error),
            };
            let request = match &message {
                Message::Map { request, .. }
                | Message::Block { request, .. }
                | Message::Cut { request, .. }
                | Message::History { request, .. }
                | Message::Done { request }
                | Message::Refused { request, .. } => *request,
                _ => return "the source sent a question".into(),
            };
            let answer = waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&request);
            // None when its caller gave up meanwhile.
            if let Some(answer) = answer {
                let _ = answer.send(Ok(message));
            }
        }
    };
    let why = tokio::select! {
        why = send => why,
        why = receive => why,
        () = is_stuck.notified() => "it was silent".into(),
    };
    let mut waiting = waiting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for (_, answer) in waiting.drain() {
        let _ = answer.send(Err(FetchError::Unreachable(why.clone())));
    }
    why
}
