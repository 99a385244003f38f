//! What an image or a volume holds, given out as a stream of blocks ([`supercloud_api::blocks`]): read from the store chunk by
//! chunk, each checked against the Merkle tree that the content's root names, as fast as the reader takes them. What lies in a
//! cloud's store is asked of that cloud's agents; it does not go through a file here.

mod agents;

use std::{convert::Infallible, ops::Range, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _};
use supercloud_api::{
    Code, Image, ImageState, Problem, Ref, Volume,
    blocks::{BLOCK_BYTES, BlockMap, BlocksError, Encoder, MEDIA_TYPE, block_count},
    ids::{CloudId, ProjectId, TokenId},
};
use supercloud_storage::{
    backend::{ObjectStore, StoreError, StoreFuture},
    key::{ChunkKind, ChunkName, ContentRoot, DataKeys, ProjectKey},
    manifest::{LEAF_BLOCKS, ManifestError, Outline},
    source::{ChunkReader, ChunkSource, ReadError, StoreSource},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{
    Api, Asker, Failure,
    events::may_go_on,
    images::part_of,
    shares::{Share, Shares},
};
use crate::{app::Parts, chain, state::StateError};

/// Contents that are given out at once: each takes a core's time and some 2 MiB.
const EXPORTS_AT_ONCE: usize = 8;
/// Of these, those of one token.
const EXPORTS_OF_ONE: usize = 2;
/// Blocks that are read at once for one reader.
const READS_AT_ONCE: usize = 8;
/// Frames that wait for a slow reader.
const QUEUE: usize = 8;
/// How long a reader may take to take a frame.
const SLOW_READER_BUDGET: Duration = Duration::from_secs(60);
/// The token is looked at again after so many leaves (256 MiB each).
const LOOK_EVERY_LEAVES: usize = 4;
/// And after so long, also while the reader takes nothing.
const LOOK_EVERY: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(30) };

/// The places for contents that are given out. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Exports {
    places: Arc<Semaphore>,
    shares: Shares,
}

impl Default for Exports {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(EXPORTS_AT_ONCE)), shares: Shares::default() }
    }
}

/// A place; given back when dropped.
pub(super) struct Turn {
    _share: Share,
    _place: OwnedSemaphorePermit,
}

impl Exports {
    /// A place for who asks.
    ///
    /// # Errors
    /// When all are taken, or this token has its share of them.
    pub(super) fn take(&self, asker: &Asker) -> Result<Turn, Failure> {
        let too_many = || Failure::new(Code::TooManyRequests, "too many contents are being read");
        let share = self.shares.take(&asker.caller()?.token, EXPORTS_OF_ONE).ok_or_else(too_many)?;
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| too_many())?;
        Ok(Turn { _share: share, _place: place })
    }
}

/// Why a content is not given out to its end.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("the content cannot be read")]
    Manifest(#[from] ManifestError),
    #[error("block {block} cannot be read")]
    Read {
        block: u32,
        #[source]
        source: ReadError,
    },
    #[error("block {block} has {len} bytes")]
    Length { block: u32, len: usize },
    #[error("the stream cannot be written")]
    Encode(#[from] BlocksError),
    #[error("the state cannot be read")]
    State(#[from] StateError),
    #[error("the token was revoked, or has expired")]
    Revoked,
    /// Nobody reads any more.
    #[error("the reader is gone, or too slow")]
    Gone,
}

impl ExportError {
    /// As the reader is told.
    fn problem(&self) -> Problem {
        let code = match self {
            Self::Revoked => Code::Unauthenticated,
            Self::State(_) => Code::StoreUnavailable,
            // May pass: it is worth another try.
            Self::Read { source: ReadError::Unavailable { source: StoreError::Unreachable { .. }, .. }, .. }
            | Self::Manifest(ManifestError::Read {
                source: ReadError::Unavailable { source: StoreError::Unreachable { .. }, .. },
                ..
            }) => Code::HostUnavailable,
            _ => Code::Internal,
        };
        Problem::new(code, chain(self))
    }
}

/// What is given out.
struct Content {
    project: ProjectId,
    root: ContentRoot,
    /// The size: a kernel's is no whole number of sectors, and a volume may be larger than what it began with.
    size_bytes: u64,
    /// The cloud in whose store it lies; none: the controller's own.
    cloud: Option<CloudId>,
}

/// A store that is read and not added to.
#[derive(Debug)]
struct ReadOnly(StoreSource);

impl ChunkSource for ReadOnly {
    fn sealed(&self, name: ChunkName) -> StoreFuture<'_, Bytes> {
        self.0.sealed(name)
    }
}

/// The blocks of an image's part that are not all zeros, with a map that says which these are: a stream of frames (see
/// `supercloud_api::blocks`), or their digests, for who has received some and wants to check them.
#[utoipa::path(get, path = "/v1/images/{image}/parts/{part}/blocks", tag = "images", responses((status = 200, content_type = "application/vnd.supercloud.blocks", body = String)))]
pub async fn of_image(
    State(api): State<Api>,
    asker: Asker,
    Path((image, part)): Path<(String, String)>,
) -> Result<Response, Failure> {
    let part = part_of(part)?;
    let image = asker.find::<Image>(&api.parts, &Ref::from(image)).await?;
    if image.state != ImageState::Ready {
        return Err(Failure::new(
            Code::WrongState,
            format!("image {} is not ready: it has no content yet", image.name),
        ));
    }
    let Some(found) = image.parts.iter().find(|content| content.part == part) else {
        return Err(Failure::new(Code::NotFound, format!("image {} has no such part", image.name)));
    };
    let root = found.root.parse().map_err(|_| Failure::new(Code::Internal, "the image's root is malformed"))?;
    give_out(&api, &asker, Content { project: image.project, root, size_bytes: found.size_bytes, cloud: None }).await
}

/// What a volume holds that no host works on: its guest is frozen, or was never started. As for images.
#[utoipa::path(get, path = "/v1/volumes/{volume}/blocks", tag = "volumes", responses((status = 200, content_type = "application/vnd.supercloud.blocks", body = String)))]
pub async fn of_volume(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Response, Failure> {
    let volume = asker.find::<Volume>(&api.parts, &Ref::from(volume)).await?;
    let wrong = |why: &str| Failure::new(Code::WrongState, format!("volume {} {why}", volume.name));
    if volume.host.is_some() {
        return Err(wrong("is a host's to write: freeze its guest first, which brings what it holds into the store"));
    }
    let Some(base) = &volume.base else { return Err(wrong("holds nothing yet")) };
    let root = base.parse().map_err(|_| Failure::new(Code::Internal, "the volume's root is malformed"))?;
    let (project, size_bytes, cloud) = (volume.project, volume.size_bytes, volume.base_cloud);
    give_out(&api, &asker, Content { project, root, size_bytes, cloud }).await
}

/// Where the chunks of a content are asked for, in order.
async fn sources(api: &Api, content: &Content) -> Result<Vec<Arc<dyn ChunkSource>>, Failure> {
    let store = api.parts.chunks.get().ok_or_else(|| Failure::new(Code::Internal, "the chunk store is not open"))?;
    let own = StoreSource::new(content.project, Arc::clone(store) as Arc<dyn ObjectStore>);
    let mut sources: Vec<Arc<dyn ChunkSource>> = vec![Arc::new(ReadOnly(own))];
    let Some(cloud) = content.cloud else { return Ok(sources) };
    sources.extend(agents::of_cloud(api, cloud, content.project).await?);
    Ok(sources)
}

/// Begins to give out a content: what is wrong before the first byte is a problem like any other.
async fn give_out(api: &Api, asker: &Asker, content: Content) -> Result<Response, Failure> {
    let turn = api.exports.take(asker)?;
    let key = api.parts.state.project_key(&api.parts.keys.root, content.project).await?;
    let keys = Arc::new(DataKeys::derive(content.project, &ProjectKey::from_bytes(key)));
    let reader = ChunkReader::new(keys, sources(api, &content).await?);
    let unread = |error: ManifestError| {
        tracing::error!(root = %content.root, error = %chain(&error), "a content cannot be given out");
        Failure::from(ExportError::from(error).problem())
    };
    let outline = Outline::load(&reader, content.root).await.map_err(unread)?;
    let blocks =
        block_count(content.size_bytes).ok_or_else(|| Failure::new(Code::Internal, "its size is out of range"))?;
    let (from, to) = (asker.params.from_block.unwrap_or(0), asker.params.to_block.unwrap_or(blocks));
    if from > to || to > blocks {
        return Err(Failure::bad(format!("from_block is {from} and to_block {to}; there are {blocks} blocks")));
    }
    let map = map_of(&reader, &outline, blocks).await.map_err(unread)?;
    let begun = Encoder::begin(content.root.to_string(), content.size_bytes, &map, from..to, asker.params.digests);
    let (encoder, begun) = begun.map_err(|error| Failure::from(ExportError::from(error).problem()))?;
    let (sender, receiver) = mpsc::channel::<Bytes>(QUEUE);
    let giving = Giving {
        parts: api.parts.clone(),
        token: asker.caller()?.token.id,
        reader,
        outline,
        range: from..to,
        digests: asker.params.digests,
        encoder,
        sender,
    };
    api.parts.spawn("contents given out", giving.run(begun, turn));
    let frames = tokio_stream::wrappers::ReceiverStream::new(receiver).map(Ok::<Bytes, Infallible>);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE)),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(frames)).into_response())
}

/// Which blocks are not all zeros, of so many.
async fn map_of(reader: &ChunkReader, outline: &Outline, blocks: u32) -> Result<BlockMap, ManifestError> {
    let mut map = BlockMap::zeros(blocks);
    // A leaf covers 256 MiB: a large volume has hundreds, and the reader waits for the first byte.
    let leaves: Vec<_> = (0..outline.leaves()).map(|index| blocks_of(outline, reader, index).boxed()).collect();
    let mut leaves = futures::stream::iter(leaves).buffered(READS_AT_ONCE);
    while let Some(leaf) = leaves.next().await {
        for (block, _) in leaf? {
            map.set(block);
        }
    }
    Ok(map)
}

/// The blocks of a leaf that have a chunk.
async fn blocks_of(
    outline: &Outline,
    reader: &ChunkReader,
    index: usize,
) -> Result<Vec<(u32, ChunkName)>, ManifestError> {
    let leaf = outline.leaf(reader, index).await?;
    let names = leaf.iter().flat_map(|names| names.iter().enumerate());
    let block = |at| u32::try_from(index * LEAF_BLOCKS + at).unwrap_or(u32::MAX);
    Ok(names.filter_map(|(at, name)| name.map(|name| (block(at), name))).collect())
}

/// Ends when the token is good no more, or nobody can say so.
async fn until_revoked(parts: Parts, token: TokenId) -> ExportError {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        match may_go_on(&parts, token).await {
            Ok(true) => {}
            Ok(false) => return ExportError::Revoked,
            Err(error) => return error.into(),
        }
    }
}

/// Gives out one content; owned by the controller's tasks. Ends with the content, with its reader, or with the controller.
struct Giving {
    parts: Parts,
    token: TokenId,
    reader: ChunkReader,
    outline: Outline,
    range: Range<u32>,
    digests: bool,
    encoder: Encoder,
    sender: mpsc::Sender<Bytes>,
}

impl Giving {
    async fn run(self, begun: Vec<Bytes>, _turn: Turn) {
        let (sender, root) = (self.sender.clone(), self.outline.root());
        let until_revoked = until_revoked(self.parts.clone(), self.token);
        let outcome = tokio::select! {
            outcome = self.give(begun) => outcome,
            error = until_revoked => Err(error),
            () = sender.closed() => Err(ExportError::Gone),
        };
        match outcome {
            Ok(()) => {}
            Err(ExportError::Gone) => tracing::debug!(%root, "the reader of a content is gone"),
            Err(error) => {
                tracing::error!(%root, error = %chain(&error), "a content is not given out to its end");
                if let Ok(last) = Encoder::failed(&error.problem()) {
                    // Without it the stream breaks off, which says the same with fewer words.
                    let _ = sender.send_timeout(last, SLOW_READER_BUDGET).await;
                }
            }
        }
    }

    async fn send(&self, frames: impl IntoIterator<Item = Bytes>) -> Result<(), ExportError> {
        for frame in frames {
            self.sender.send_timeout(frame, SLOW_READER_BUDGET).await.map_err(|_| ExportError::Gone)?;
        }
        Ok(())
    }

    async fn give(mut self, begun: Vec<Bytes>) -> Result<(), ExportError> {
        self.send(begun).await?;
        let leaves = match self.range.is_empty() {
            true => 0..0,
            false => self.range.start as usize / LEAF_BLOCKS..(self.range.end as usize).div_ceil(LEAF_BLOCKS),
        };
        for (count, index) in leaves.enumerate() {
            if count % LOOK_EVERY_LEAVES == LOOK_EVERY_LEAVES - 1 && !may_go_on(&self.parts, self.token).await? {
                return Err(ExportError::Revoked);
            }
            let mut wanted = blocks_of(&self.outline, &self.reader, index).await?;
            wanted.retain(|(block, _)| self.range.contains(block));
            let reader = self.reader.clone();
            let mut blocks = std::pin::pin!(
                futures::stream::iter(wanted)
                    .map(|(block, name)| {
                        let reader = reader.clone();
                        async move {
                            let plain = reader.read(ChunkKind::Data, name).await;
                            plain.map(|plain| (block, plain)).map_err(|source| ExportError::Read { block, source })
                        }
                    })
                    .buffered(READS_AT_ONCE)
            );
            while let Some(read) = blocks.next().await {
                let (block, plain) = read?;
                let frame = self.encode(block, plain)?;
                self.send(frame).await?;
            }
        }
        let last = self.encoder.end()?;
        self.send(last).await
    }

    fn encode(&mut self, block: u32, plain: Bytes) -> Result<Option<Bytes>, ExportError> {
        let plain = match plain.len() {
            BLOCK_BYTES => plain,
            len => return Err(ExportError::Length { block, len }),
        };
        Ok(match self.digests {
            true => self.encoder.digest(block, &plain)?,
            false => Some(self.encoder.block(block, &plain)?),
        })
    }
}
