//! The blocks of an image or volume as REST gives them out (`GET /v1/images/{image}/parts/{part}/blocks` and the like): a stream
//! of [frames](crate::frame), version 1.
//!
//! ```text
//!   HEAD {size, root, range, map's size and hash}  MAP bits ...  BLOCK ... (or DIGESTS ...)  END        or FAILED {problem}
//! ```
//!
//! The map says which blocks of the whole are not all zeros, so a reader knows every offset of the file that it makes before the
//! first byte of data comes. Blocks come in order; each carries a digest of its number and its content. A stream that does not
//! end with `END` is not whole, and one that leaves out a block of the map, or repeats one, is refused where it does so.
//!
//! [`Decoder`] does no I/O: it is given bytes as they come.

use bytes::{Buf as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::{
    Problem,
    frame::{Frame, FrameError, HEADER_BYTES, MAX_PAYLOAD_BYTES, parse_header},
};

/// The media type of the stream.
pub const MEDIA_TYPE: &str = "application/vnd.supercloud.blocks";
/// Bytes of one block.
pub const BLOCK_BYTES: usize = 64 * 1024;
/// The largest content, in bytes (2 TiB).
pub const MAX_SIZE_BYTES: u64 = 2 << 40;
/// The version of every payload.
const VERSION: u16 = 1;
/// Digests in one frame at most.
const DIGESTS_PER_FRAME: usize = 64;
/// Bytes of a number and a digest.
const DIGEST_BYTES: usize = 4 + 32;

/// Frame kinds.
mod kind {
    pub const HEAD: u16 = 1;
    pub const MAP: u16 = 2;
    pub const BLOCK: u16 = 3;
    pub const DIGESTS: u16 = 4;
    pub const END: u16 = 5;
    pub const FAILED: u16 = 6;
}

/// What a block's digest is: BLAKE3 of its number (little endian) and its content. The number is in it, so that a right block at
/// a wrong place is found out.
#[must_use]
pub fn digest(block: u32, data: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&block.to_le_bytes()).update(data);
    *hasher.finalize().as_bytes()
}

/// The number of blocks of a content; `None` when it is empty or too large.
#[must_use]
pub fn block_count(size_bytes: u64) -> Option<u32> {
    let blocks = size_bytes.div_ceil(BLOCK_BYTES as u64);
    u32::try_from(blocks).ok().filter(|_| (1..=MAX_SIZE_BYTES).contains(&size_bytes))
}

/// Which blocks are not all zeros: a bit each, the first block in the lowest bit of the first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockMap {
    blocks: u32,
    bits: Vec<u8>,
}

impl BlockMap {
    /// All zeros.
    #[must_use]
    pub fn zeros(blocks: u32) -> Self {
        Self { blocks, bits: vec![0; (blocks as usize).div_ceil(8)] }
    }

    /// The map out of its bits; `None` when there are too few or too many of them, or one beyond the end is set.
    #[must_use]
    pub fn from_bits(blocks: u32, bits: Vec<u8>) -> Option<Self> {
        let beyond = match (blocks % 8, bits.last()) {
            (0, _) | (_, None) => 0,
            (within, Some(last)) => last >> within,
        };
        (bits.len() == (blocks as usize).div_ceil(8) && beyond == 0).then_some(Self { blocks, bits })
    }

    /// Its bits.
    #[must_use]
    pub fn bits(&self) -> &[u8] {
        &self.bits
    }

    /// How many blocks there are, of either kind.
    #[must_use]
    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether a block has data; none beyond the end has.
    #[must_use]
    pub fn has(&self, block: u32) -> bool {
        block < self.blocks && self.bits[block as usize / 8] >> (block % 8) & 1 == 1
    }

    /// This block has data; beyond the end nothing happens.
    pub fn set(&mut self, block: u32) {
        if block < self.blocks {
            self.bits[block as usize / 8] |= 1 << (block % 8);
        }
    }

    /// How many blocks in a range have data.
    #[must_use]
    pub fn count(&self, from: u32, to: u32) -> u32 {
        let (mut at, to, mut count) = (from, to.min(self.blocks), 0);
        while at < to {
            if at.is_multiple_of(8) && to - at >= 8 {
                count += self.bits[at as usize / 8].count_ones();
                at += 8;
            } else {
                count += u32::from(self.has(at));
                at += 1;
            }
        }
        count
    }

    /// The first block at `from` or after it that has data.
    #[must_use]
    pub fn next(&self, from: u32) -> Option<u32> {
        let mut at = from;
        while at < self.blocks {
            let byte = self.bits[at as usize / 8] >> (at % 8);
            if byte != 0 {
                return Some(at + byte.trailing_zeros());
            }
            at = (at / 8 + 1) * 8;
        }
        None
    }
}

/// What a stream begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Identity of the content: the root of its Merkle tree, against which every block was checked before it was sent.
    pub root: String,
    /// The content's size in bytes; the last block is filled up with zeros beyond it.
    pub size_bytes: u64,
    /// Always [`BLOCK_BYTES`].
    pub block_bytes: u32,
    /// The first block that is told of.
    pub from: u32,
    /// The first that is not any more.
    pub to: u32,
    /// Digests come in the place of blocks.
    pub digests: bool,
    /// BLAKE3 of the map, hex.
    pub map_blake3: String,
}

/// The end of a whole stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    /// Blocks, or digests, that came.
    blocks: u32,
}

/// What is wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum BlocksError {
    /// A frame is malformed.
    #[error("the block stream is malformed")]
    Frame(#[from] FrameError),
    /// The frames are whole but make no sense.
    #[error("the block stream makes no sense: {0}")]
    Nonsense(&'static str),
    /// A block is damaged.
    #[error("block {block} does not have the digest that it came with")]
    Damaged {
        /// Which.
        block: u32,
    },
    /// A block is missing, or comes where it does not belong.
    #[error("block {expected:?} was due, and {came:?} came")]
    Order {
        /// The block that was due; none: the end.
        expected: Option<u32>,
        /// The block that came; none: the end.
        came: Option<u32>,
    },
    /// The far side says that it cannot go on.
    #[error("{0}")]
    Failed(Problem),
    /// It ended before its end.
    #[error("the block stream broke off")]
    BrokeOff,
}

/// Frames of a stream, as bytes.
#[derive(Debug)]
pub struct Encoder {
    sent: u32,
    digests: Vec<u8>,
}

fn frame(kind: u16, payload: Vec<u8>) -> Result<Bytes, FrameError> {
    Ok(Frame { kind, version: VERSION, payload }.to_bytes()?.into())
}

impl Encoder {
    /// Begins a stream of the blocks from `from` to `to` (not included): the encoder and the stream's first bytes.
    ///
    /// # Errors
    /// [`BlocksError::Nonsense`] when the range or the size is out of range.
    pub fn begin(
        root: String,
        size_bytes: u64,
        map: &BlockMap,
        range: std::ops::Range<u32>,
        digests: bool,
    ) -> Result<(Self, Vec<Bytes>), BlocksError> {
        if block_count(size_bytes) != Some(map.blocks()) || range.start > range.end || range.end > map.blocks() {
            return Err(BlocksError::Nonsense("its size, its map and its range do not fit together"));
        }
        let head = Head {
            root,
            size_bytes,
            block_bytes: u32::try_from(BLOCK_BYTES).unwrap_or(u32::MAX),
            from: range.start,
            to: range.end,
            digests,
            map_blake3: blake3::hash(map.bits()).to_hex().to_string(),
        };
        let mut begun = vec![Frame::json(kind::HEAD, VERSION, &head)?.to_bytes()?.into()];
        for piece in map.bits().chunks(MAX_PAYLOAD_BYTES) {
            begun.push(frame(kind::MAP, piece.to_vec())?);
        }
        Ok((Self { sent: 0, digests: Vec::new() }, begun))
    }

    /// A block; `data` is [`BLOCK_BYTES`] long.
    ///
    /// # Errors
    /// When it is not.
    pub fn block(&mut self, block: u32, data: &[u8]) -> Result<Bytes, BlocksError> {
        if data.len() != BLOCK_BYTES {
            return Err(BlocksError::Nonsense("a block of another length"));
        }
        self.sent += 1;
        let mut payload = Vec::with_capacity(DIGEST_BYTES + data.len());
        payload.extend_from_slice(&block.to_le_bytes());
        payload.extend_from_slice(&digest(block, data));
        payload.extend_from_slice(data);
        Ok(frame(kind::BLOCK, payload)?)
    }

    /// A block's digest; bytes when enough of them have come together.
    ///
    /// # Errors
    /// Those of frames.
    pub fn digest(&mut self, block: u32, data: &[u8]) -> Result<Option<Bytes>, BlocksError> {
        self.sent += 1;
        self.digests.extend_from_slice(&block.to_le_bytes());
        self.digests.extend_from_slice(&digest(block, data));
        if self.digests.len() < DIGESTS_PER_FRAME * DIGEST_BYTES {
            return Ok(None);
        }
        Ok(Some(frame(kind::DIGESTS, std::mem::take(&mut self.digests))?))
    }

    /// The end of a whole stream.
    ///
    /// # Errors
    /// Those of frames.
    pub fn end(&mut self) -> Result<Vec<Bytes>, BlocksError> {
        let mut last = Vec::new();
        if !self.digests.is_empty() {
            last.push(frame(kind::DIGESTS, std::mem::take(&mut self.digests))?);
        }
        last.push(Frame::json(kind::END, VERSION, &End { blocks: self.sent })?.to_bytes()?.into());
        Ok(last)
    }

    /// Why the stream does not go on.
    ///
    /// # Errors
    /// Those of frames.
    pub fn failed(problem: &Problem) -> Result<Bytes, BlocksError> {
        Ok(Frame::json(kind::FAILED, VERSION, problem)?.to_bytes()?.into())
    }
}

/// What a stream tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// What it is of, first and once.
    Head(Box<Head>, BlockMap),
    /// A block, whole and checked.
    Block {
        /// Which.
        block: u32,
        /// Its [`BLOCK_BYTES`].
        data: Bytes,
    },
    /// A block's digest.
    Digest {
        /// Which.
        block: u32,
        /// See [`digest`].
        digest: [u8; 32],
    },
    /// All has come.
    End,
}

#[derive(Debug)]
enum Stage {
    Head,
    Map { head: Box<Head>, bits: Vec<u8> },
    Blocks { digests: bool, map: BlockMap, to: u32, next: u32, came: u32, waiting: Bytes },
    Ended,
}

/// Reads a stream, sans I/O: bytes in by [`Decoder::push`], items out by [`Decoder::next_item`]. Holds one frame at most.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    stage: Stage,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { buffer: BytesMut::new(), stage: Stage::Head }
    }
}

impl Decoder {
    /// These bytes came. Take all items before more are pushed.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// No more will come.
    ///
    /// # Errors
    /// [`BlocksError::BrokeOff`] when more should have.
    pub fn finish(&self) -> Result<(), BlocksError> {
        match self.stage {
            Stage::Ended => Ok(()),
            _ => Err(BlocksError::BrokeOff),
        }
    }

    /// The next item of what has come; `None`: more bytes are needed.
    ///
    /// # Errors
    /// What is wrong with the stream; it is of no use any more then.
    pub fn next_item(&mut self) -> Result<Option<Item>, BlocksError> {
        loop {
            if let Some(item) = self.waiting_digest()? {
                return Ok(Some(item));
            }
            let Some((kind, payload)) = self.frame()? else { return Ok(None) };
            if let Some(item) = self.step(kind, payload)? {
                return Ok(Some(item));
            }
        }
    }

    /// The next whole frame.
    fn frame(&mut self) -> Result<Option<(u16, Bytes)>, BlocksError> {
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let (kind, version, length) = parse_header(*header)?;
        if version != VERSION {
            return Err(FrameError::Version { kind, version, spoken: VERSION }.into());
        }
        if self.buffer.len() < HEADER_BYTES + length {
            return Ok(None);
        }
        self.buffer.advance(HEADER_BYTES);
        Ok(Some((kind, self.buffer.split_to(length).freeze())))
    }

    fn waiting_digest(&mut self) -> Result<Option<Item>, BlocksError> {
        let Stage::Blocks { map, to, next, came, waiting, .. } = &mut self.stage else { return Ok(None) };
        if waiting.is_empty() {
            return Ok(None);
        }
        let entry = waiting.split_to(DIGEST_BYTES);
        let (block, digest) = number_and_digest(&entry)?;
        due(map, *to, next, Some(block))?;
        *came += 1;
        Ok(Some(Item::Digest { block, digest }))
    }

    fn step(&mut self, kind: u16, payload: Bytes) -> Result<Option<Item>, BlocksError> {
        if kind == kind::FAILED {
            return Err(BlocksError::Failed(json(kind, &payload)?));
        }
        match (&mut self.stage, kind) {
            (Stage::Head, kind::HEAD) => {
                let head: Head = json(kind, &payload)?;
                let blocks = block_count(head.size_bytes).ok_or(BlocksError::Nonsense("its size is out of range"))?;
                if head.block_bytes as usize != BLOCK_BYTES || head.from > head.to || head.to > blocks {
                    return Err(BlocksError::Nonsense("its range or its blocks' size is out of range"));
                }
                self.stage = Stage::Map { head: Box::new(head), bits: Vec::new() };
                Ok(None)
            }
            (Stage::Map { head, bits }, kind::MAP) => {
                let blocks = block_count(head.size_bytes).unwrap_or(0);
                let wanted = (blocks as usize).div_ceil(8);
                if payload.is_empty() || bits.len() + payload.len() > wanted {
                    return Err(BlocksError::Nonsense("its map is of another size"));
                }
                bits.extend_from_slice(&payload);
                if bits.len() < wanted {
                    return Ok(None);
                }
                if blake3::hash(bits).to_hex().as_str() != head.map_blake3 {
                    return Err(BlocksError::Nonsense("its map is damaged"));
                }
                let map = BlockMap::from_bits(blocks, std::mem::take(bits))
                    .ok_or(BlocksError::Nonsense("its map has blocks beyond the end"))?;
                let (head, waiting) = (head.clone(), Bytes::new());
                let (digests, to, next) = (head.digests, head.to, head.from);
                self.stage = Stage::Blocks { digests, map: map.clone(), to, next, came: 0, waiting };
                Ok(Some(Item::Head(head, map)))
            }
            (Stage::Blocks { digests: false, map, to, next, came, .. }, kind::BLOCK) => {
                if payload.len() != DIGEST_BYTES + BLOCK_BYTES {
                    return Err(BlocksError::Nonsense("a block of another length"));
                }
                let (block, wanted) = number_and_digest(&payload)?;
                due(map, *to, next, Some(block))?;
                *came += 1;
                let data = payload.slice(DIGEST_BYTES..);
                match digest(block, &data) == wanted {
                    true => Ok(Some(Item::Block { block, data })),
                    false => Err(BlocksError::Damaged { block }),
                }
            }
            (Stage::Blocks { digests: true, waiting, .. }, kind::DIGESTS) => {
                if payload.is_empty() || !payload.len().is_multiple_of(DIGEST_BYTES) {
                    return Err(BlocksError::Nonsense("digests of another length"));
                }
                *waiting = payload;
                Ok(None)
            }
            (Stage::Blocks { map, to, next, came, .. }, kind::END) => {
                due(map, *to, next, None)?;
                let end: End = json(kind, &payload)?;
                if end.blocks != *came {
                    return Err(BlocksError::Nonsense("it counts otherwise"));
                }
                self.stage = Stage::Ended;
                Ok(Some(Item::End))
            }
            (_, kind) => Err(FrameError::UnexpectedKind(kind).into()),
        }
    }
}

fn json<T: serde::de::DeserializeOwned>(kind: u16, payload: &[u8]) -> Result<T, BlocksError> {
    serde_json::from_slice(payload).map_err(|source| FrameError::Payload { kind, source }.into())
}

fn number_and_digest(bytes: &[u8]) -> Result<(u32, [u8; 32]), BlocksError> {
    let short = BlocksError::Nonsense("a block without its number and digest");
    match (bytes.first_chunk::<4>(), bytes.get(4..).and_then(<[u8]>::first_chunk::<32>)) {
        (Some(block), Some(digest)) => Ok((u32::from_le_bytes(*block), *digest)),
        _ => Err(short),
    }
}

/// Checks that what came is what was due, and goes on to the next.
fn due(map: &BlockMap, to: u32, next: &mut u32, came: Option<u32>) -> Result<(), BlocksError> {
    let expected = map.next(*next).filter(|block| *block < to);
    if expected != came {
        return Err(BlocksError::Order { expected, came });
    }
    *next = came.map_or(to, |block| block + 1);
    Ok(())
}

#[cfg(test)]
mod tests;
