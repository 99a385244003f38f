//! The source's side: answers one peer on one connection.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{
    Stream,
    message::{Hello, Message},
};
use crate::{
    volume::{PeerBlock, Volume, VolumeError, chain},
    wire::{Frame, WireError, read_frame, write_frame},
};

/// Blocks that are read, hashed and compressed at once for one peer.
const BLOCKS_AT_ONCE: usize = 16;
/// Requests under way at once; a peer that sends more waits.
const REQUESTS_AT_ONCE: usize = 64;
/// The time for the first message.
const HELLO_BUDGET: Duration = Duration::from_secs(10);
/// The time that one frame may take to leave: a peer that stops reading is let go.
const SEND_BUDGET: Duration = Duration::from_secs(60);

/// Why serving a peer ended, other than by its leaving.
#[derive(Debug, thiserror::Error)]
pub enum PeerServerError {
    /// What it sent is not of this protocol, or the connection broke.
    #[error("the peer's connection failed")]
    Wire(#[from] WireError),
    /// It did not say hello, or stopped reading.
    #[error("the peer was silent for too long")]
    Deadline,
    /// It speaks of another volume.
    #[error("the peer asked for another volume: its {0} differs")]
    OtherVolume(&'static str),
}

fn own_hello(volume: &Volume) -> Hello {
    Hello { volume: volume.id(), project: volume.project(), size_bytes: volume.size_bytes(), base: volume.base() }
}

/// Compares hellos; names the first field that differs.
pub(super) fn judge_hello(ours: &Hello, theirs: &Hello) -> Result<(), &'static str> {
    match () {
        () if ours.volume != theirs.volume => Err("volume"),
        () if ours.project != theirs.project => Err("project"),
        () if ours.size_bytes != theirs.size_bytes => Err("size"),
        () if ours.base != theirs.base => Err("base"),
        () => Ok(()),
    }
}

/// Serves a volume's map and blocks on `stream` until the peer leaves or `cancel` is cancelled.
pub async fn serve_peer<S: Stream + 'static>(
    volume: Volume,
    stream: S,
    cancel: &CancellationToken,
) -> Result<(), PeerServerError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let ours = own_hello(&volume);
    let greet = async {
        let theirs = Message::decode(&read_frame(&mut reader).await?)?;
        let Message::Hello(theirs) = theirs else { return Err(WireError::Kind { kind: 0 }.into()) };
        match judge_hello(&ours, &theirs) {
            Ok(()) => write_frame(&mut writer, &Message::Hello(ours).encode()).await.map_err(PeerServerError::from),
            Err(field) => {
                let why = format!("this is another volume: the {field} differs");
                write_frame(&mut writer, &Message::Refused { request: 0, why }.encode()).await?;
                Err(PeerServerError::OtherVolume(field))
            }
        }
    };
    tokio::select! {
        () = cancel.cancelled() => return Ok(()),
        greeted = tokio::time::timeout(HELLO_BUDGET, greet) => match greeted {
            Ok(Err(PeerServerError::Wire(WireError::Closed))) => return Ok(()),
            greeted => greeted.map_err(|_| PeerServerError::Deadline)??,
        }
    }

    // Bounded: what is read from disk but not sent yet is at most this, per peer.
    let (frames, mut outgoing) = mpsc::channel::<Frame>(BLOCKS_AT_ONCE);
    let send = async {
        while let Some(frame) = outgoing.recv().await {
            tokio::time::timeout(SEND_BUDGET, write_frame(&mut writer, &frame))
                .await
                .map_err(|_| PeerServerError::Deadline)??;
        }
        Ok(())
    };
    let answer = async {
        let mut tasks = JoinSet::new();
        let (requests, blocks) = (Arc::new(Semaphore::new(REQUESTS_AT_ONCE)), Arc::new(Semaphore::new(BLOCKS_AT_ONCE)));
        loop {
            let message = match read_frame(&mut reader).await {
                Ok(frame) => Message::decode(&frame)?,
                Err(WireError::Closed) => return Ok(()),
                Err(error) => return Err(PeerServerError::from(error)),
            };
            let Ok(permit) = requests.clone().acquire_owned().await else { return Ok(()) };
            while tasks.try_join_next().is_some() {}
            let (volume, frames, blocks) = (volume.clone(), frames.clone(), blocks.clone());
            tasks.spawn(async move {
                respond(&volume, message, &frames, &blocks).await;
                drop(permit);
            });
        }
    };
    tokio::select! {
        () = cancel.cancelled() => Ok(()),
        sent = send => sent,
        answered = answer => answered,
    }
}

fn refused(request: u64, error: &VolumeError) -> Message {
    Message::Refused { request, why: chain(error) }
}

/// Reads one block and sends it, as soon as it is its turn.
async fn give_block(
    request: u64,
    block: u32,
    read: impl Future<Output = Result<PeerBlock, VolumeError>>,
    frames: &mpsc::Sender<Frame>,
    blocks: &Semaphore,
) {
    // Never closed.
    let _permit = blocks.acquire().await;
    let answer = match read.await {
        Ok(PeerBlock { version, digest, data }) => Message::Block { request, block, version, digest, data },
        Err(error) => refused(request, &error),
    };
    // Compressing 64 KiB takes a fraction of a millisecond, but many of them would keep the runtime busy.
    if let Ok(frame) = tokio::task::spawn_blocking(move || answer.encode()).await {
        // A closed channel means that the connection is gone.
        let _ = frames.send(frame).await;
    }
}

async fn respond(volume: &Volume, message: Message, frames: &mpsc::Sender<Frame>, blocks: &Semaphore) {
    match message {
        Message::GetMap { request, from, since } => {
            let answer = match volume.map_page(from, since).await {
                Ok(page) => Message::Map { request, page },
                Err(error) => refused(request, &error),
            };
            // A closed channel means that the connection is gone.
            let _ = frames.send(answer.encode()).await;
        }
        Message::GetBlocks { request, blocks: wanted } => {
            let give = |block| give_block(request, block, volume.block_for_peer(block), frames, blocks);
            futures::future::join_all(wanted.into_iter().map(|(block, _)| give(block))).await;
        }
        Message::GetCutBlocks { request, number, blocks: wanted } => {
            let give = |block| give_block(request, block, volume.cut_block(number, block), frames, blocks);
            futures::future::join_all(wanted.into_iter().map(|(block, _)| give(block))).await;
        }
        Message::AwaitCut { request, after, have } => {
            let answer = match volume.await_cut(after, have).await {
                Ok(cut) => Message::Cut { request, cut },
                Err(error) => refused(request, &error),
            };
            let _ = frames.send(answer.encode()).await;
        }
        Message::GetCutMap { request, number, from, since } => {
            let answer = match volume.cut_page(number, from, since).await {
                Ok(page) => Message::Map { request, page },
                Err(error) => refused(request, &error),
            };
            let _ = frames.send(answer.encode()).await;
        }
        Message::Released { request } => {
            let answer = match volume.note_released().await {
                Ok(()) => Message::Done { request },
                Err(error) => refused(request, &error),
            };
            let _ = frames.send(answer.encode()).await;
        }
        Message::GetHistory { request } => {
            let answer = match volume.history_for_peer().await {
                Ok(told) => Message::History { request, told },
                Err(error) => refused(request, &error),
            };
            let _ = frames.send(answer.encode()).await;
        }
        Message::Hello(_)
        | Message::History { .. }
        | Message::Map { .. }
        | Message::Cut { .. }
        | Message::Block { .. }
        | Message::Done { .. }
        | Message::Refused { .. } => {
            let why = "this message is not for the source".into();
            let _ = frames.send(Message::Refused { request: 0, why }.encode()).await;
        }
    }
}
