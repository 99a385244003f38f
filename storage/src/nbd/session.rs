//! One NBD client, from its first byte to its last.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    handshake::{Agreed, Export, handshake},
    proto::{
        CMD_CACHE, CMD_CUT, CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE,
        CMD_WRITE_ZEROES, EINVAL, EIO, ENOSPC, MAX_REQUEST_BYTES, NbdError, REPLY_TYPE_ERROR, REPLY_TYPE_NONE,
        REPLY_TYPE_OFFSET_DATA, REQUEST_HEADER, Request, simple_reply, structured_reply,
    },
};
use crate::{
    BLOCK_BYTES,
    volume::{Volume, VolumeError, chain},
};

/// Requests under way at once.
const REQUESTS_AT_ONCE: usize = 128;
/// Bytes of reads and writes under way at once: two of the largest requests.
const BYTES_AT_ONCE: u32 = 2 * MAX_REQUEST_BYTES;
/// What a request counts for besides its bytes, so that empty ones are bounded too.
const REQUEST_COST: u32 = 4096;
const HANDSHAKE_BUDGET: Duration = Duration::from_secs(20);
/// The time for a reply to leave. Long: a client that is stopped (a suspended VM) reads again when it goes on.
const SEND_BUDGET: Duration = Duration::from_secs(3600);
/// The time that requests under way have to end after the client took its leave.
const LEAVE_BUDGET: Duration = Duration::from_secs(10);
/// The time that changes which were asked for before a cut have to end. A client that waits for a cut has stopped its guest.
const CUT_BUDGET: Duration = Duration::from_secs(2);
/// WRITE_ZEROES and CACHE are done in steps of this size.
const STEP_BYTES: u64 = 16 << 20;

/// A reply: a header, then data.
struct Reply {
    header: BytesMut,
    data: Bytes,
    /// What the request holds of the bytes under way, until it is sent.
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// Serves `volume` on `stream` until the client leaves or `cancel` is cancelled. When it returns, nothing that the
/// client asked for is under way any more: the next client's writes come after all of this one's.
pub async fn serve_nbd<S>(volume: &Volume, stream: S, cancel: &CancellationToken) -> Result<(), NbdError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let result = tokio::select! {
        () = cancel.cancelled() => Ok(()),
        result = converse(volume, stream) => result,
    };
    volume.quiesce().await;
    match result {
        // How most clients leave.
        Err(NbdError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
        result => result,
    }
}

async fn converse<S>(volume: &Volume, mut stream: S) -> Result<(), NbdError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let export = Export {
        name: volume.id().to_string(),
        size_bytes: volume.size_bytes(),
        preferred_block: u32::try_from(BLOCK_BYTES).unwrap_or(4096),
    };
    let agreed = tokio::time::timeout(HANDSHAKE_BUDGET, handshake(&mut stream, &export));
    let Some(agreed) = agreed.await.map_err(|_| NbdError::Deadline)?? else { return Ok(()) };
    let (reader, mut writer) = tokio::io::split(stream);
    let (replies, mut outgoing) = mpsc::channel::<Reply>(REQUESTS_AT_ONCE);
    let send = async {
        while let Some(reply) = outgoing.recv().await {
            let mut both = Buf::chain(reply.header, reply.data);
            tokio::time::timeout(SEND_BUDGET, writer.write_all_buf(&mut both))
                .await
                .map_err(|_| NbdError::Deadline)??;
        }
        Ok(())
    };
    // Ends when the client leaves; its tasks end with it, and what they have running is waited for by `quiesce`.
    let receive = receive(volume, reader, agreed, replies);
    let (sent, received) = (std::pin::pin!(send), std::pin::pin!(receive));
    match futures::future::select(sent, received).await {
        futures::future::Either::Left((sent, _)) => sent,
        // Left by the rules: answers to what it asked before still go out.
        futures::future::Either::Right((Ok(()), sent)) => sent.await,
        futures::future::Either::Right((received, _)) => received,
    }
}

async fn receive<R: AsyncRead + Unpin>(
    volume: &Volume,
    reader: R,
    agreed: Agreed,
    replies: mpsc::Sender<Reply>,
) -> Result<(), NbdError> {
    let mut reader = tokio::io::BufReader::with_capacity(256 << 10, reader);
    let mut tasks = JoinSet::new();
    // Those that change something, counted.
    let changes = TaskTracker::new();
    let requests = Arc::new(Semaphore::new(REQUESTS_AT_ONCE));
    let bytes = Arc::new(Semaphore::new((BYTES_AT_ONCE + REQUEST_COST) as usize));
    loop {
        let mut header = [0; REQUEST_HEADER];
        reader.read_exact(&mut header).await?;
        let request = Request::parse(&header)?;
        if request.command == CMD_DISC {
            // What waits for bytes that cannot be had would wait for ever: the client has given it up.
            let ended = async { while tasks.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(LEAVE_BUDGET, ended).await;
            return Ok(());
        }
        while tasks.try_join_next().is_some() {}
        if request.command == CMD_CUT {
            let header = BytesMut::from(&simple_reply(request.cookie, cut(volume, request, &changes).await)[..]);
            let slot = requests.clone().acquire_owned().await;
            let share = bytes.clone().acquire_many_owned(REQUEST_COST).await;
            let (Ok(slot), Ok(share)) = (slot, share) else { return Ok(()) };
            let _ = replies.send(Reply { header, data: Bytes::new(), _permits: (slot, share) }).await;
            continue;
        }
        let judged = request.judge(volume.size_bytes());
        let carried = match request.command {
            CMD_READ | CMD_WRITE => request.len.min(MAX_REQUEST_BYTES),
            _ => 0,
        };
        // The permits first: nothing is allocated for more than is allowed to be under way.
        let slot = requests.clone().acquire_owned().await;
        let share = bytes.clone().acquire_many_owned(carried + REQUEST_COST).await;
        let (Ok(slot), Ok(share)) = (slot, share) else { return Ok(()) };
        let permits = (slot, share);
        let data = if request.command == CMD_WRITE {
            match judged {
                Ok(()) => {
                    let mut data = BytesMut::zeroed(request.len as usize);
                    reader.read_exact(&mut data).await?;
                    data.freeze()
                }
                // Its data must be read past to find the next request.
                Err(_) => {
                    let mut data = (&mut reader).take(u64::from(request.len));
                    let skipped = tokio::io::copy(&mut data, &mut tokio::io::sink()).await?;
                    if skipped < u64::from(request.len) {
                        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                    }
                    Bytes::new()
                }
            }
        } else {
            Bytes::new()
        };
        let (volume, replies) = (volume.clone(), replies.clone());
        let change = matches!(request.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES).then(|| changes.token());
        tasks.spawn(async move {
            let result = match judged {
                Ok(()) => execute(&volume, request, data).await,
                Err(error) => Err(error),
            };
            drop(change);
            // A closed channel means that the client is gone.
            let _ = replies.send(reply(request, agreed, result, permits)).await;
        });
    }
}

/// Makes a cut when every change before it has ended; gives the error number. Nothing else is read meanwhile.
async fn cut(volume: &Volume, request: Request, changes: &TaskTracker) -> u32 {
    if let Err(error) = request.judge(volume.size_bytes()) {
        return error;
    }
    changes.close();
    let ended = tokio::time::timeout(CUT_BUDGET, changes.wait()).await;
    changes.reopen();
    if ended.is_err() {
        tracing::warn!(volume = %volume.id(), "a change before a cut does not end; there is no cut");
        return EIO;
    }
    match volume.cut(request.offset).await {
        Ok(()) => 0,
        Err(error) => number(volume, &error),
    }
}

async fn execute(volume: &Volume, request: Request, data: Bytes) -> Result<Bytes, u32> {
    let (offset, len) = (request.offset, u64::from(request.len));
    let is_fua = request.flags & CMD_FLAG_FUA != 0;
    let done = match request.command {
        CMD_READ => return volume.read(offset, request.len as usize).await.map_err(|error| number(volume, &error)),
        CMD_WRITE => volume.write(offset, data, is_fua).await,
        CMD_FLUSH => volume.flush().await,
        CMD_TRIM => volume.discard(offset, len, is_fua).await,
        CMD_WRITE_ZEROES if request.flags & CMD_FLAG_NO_HOLE != 0 => {
            write_real_zeros(volume, offset, len, is_fua).await
        }
        CMD_WRITE_ZEROES => volume.write_zeroes(offset, len, is_fua).await,
        // A hint: reading warms the cache, what is read is not needed.
        CMD_CACHE => warm(volume, offset, len).await,
        _ => return Err(EINVAL),
    };
    done.map(|()| Bytes::new()).map_err(|error| number(volume, &error))
}

/// Zeros that take space, so that a later write cannot fail for want of it.
async fn write_real_zeros(volume: &Volume, mut offset: u64, len: u64, is_fua: bool) -> Result<(), VolumeError> {
    let end = offset + len;
    let zeros = Bytes::from(vec![0; usize::try_from(STEP_BYTES.min(len)).unwrap_or(0)]);
    while offset < end {
        let step = STEP_BYTES.min(end - offset);
        volume.write(offset, zeros.slice(..usize::try_from(step).unwrap_or(0)), false).await?;
        offset += step;
    }
    if is_fua { volume.flush().await } else { Ok(()) }
}

async fn warm(volume: &Volume, offset: u64, len: u64) -> Result<(), VolumeError> {
    // One step is what a cache may be worth; more would only push each other out.
    let step = usize::try_from(len.min(STEP_BYTES)).unwrap_or(0);
    volume.read(offset, step).await.map(drop)
}

fn number(volume: &Volume, error: &VolumeError) -> u32 {
    tracing::warn!(volume = %volume.id(), error = chain(error), "a request of the guest failed");
    match error {
        VolumeError::Disk { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => ENOSPC,
        VolumeError::Range { .. } | VolumeError::Cut { .. } | VolumeError::Role(_) => EINVAL,
        _ => EIO,
    }
}

fn reply(
    request: Request,
    agreed: Agreed,
    result: Result<Bytes, u32>,
    permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
) -> Reply {
    let mut header = BytesMut::new();
    let mut data = Bytes::new();
    let cookie = request.cookie;
    // Only reads must be answered in the structured form, but one form for all is the simplest to get right.
    match (agreed.is_structured, result) {
        (false, Ok(bytes)) => {
            header.extend_from_slice(&simple_reply(cookie, 0));
            data = bytes;
        }
        (false, Err(error)) => header.extend_from_slice(&simple_reply(cookie, error)),
        (true, Ok(bytes)) if bytes.is_empty() => {
            header.extend_from_slice(&structured_reply(cookie, REPLY_TYPE_NONE, 0));
        }
        (true, Ok(bytes)) => {
            let len = u32::try_from(bytes.len() + 8).unwrap_or(u32::MAX);
            header.extend_from_slice(&structured_reply(cookie, REPLY_TYPE_OFFSET_DATA, len));
            header.extend_from_slice(&request.offset.to_be_bytes());
            data = bytes;
        }
        (true, Err(error)) => {
            header.extend_from_slice(&structured_reply(cookie, REPLY_TYPE_ERROR, 6));
            header.extend_from_slice(&error.to_be_bytes());
            header.extend_from_slice(&0u16.to_be_bytes());
        }
    }
    Reply { header, data, _permits: permits }
}
