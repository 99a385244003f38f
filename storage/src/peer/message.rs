//! The messages, version 1. All numbers little endian.

use bytes::{BufMut as _, Bytes, BytesMut};
use supercloud_ids::{ProjectId, VolumeId};

use crate::{
    BLOCK_BYTES,
    key::{ChunkName, ContentRoot, MapRoot},
    volume::{CutInfo, MapEntry, MapPage},
    wire::{Fields, Frame, MAX_FRAME_BYTES, WireError},
};

/// Blocks per `GetBlocks` at most.
pub const MAX_BLOCKS: usize = 256;
/// Entries per `Map` at most.
const MAX_ENTRIES: usize = 8192;
/// The longest text of a refusal.
const MAX_TEXT: usize = 1024;

/// Decoding failed; the connection is of no more use.
pub type MessageError = WireError;

/// Which volume the two ends speak of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The volume.
    pub volume: VolumeId,
    /// Its project.
    pub project: ProjectId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it starts from.
    pub base: Option<ContentRoot>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The first of both ends.
    Hello(Hello),
    /// Ask for a page of the map.
    GetMap {
        /// Number of the request.
        request: u64,
        /// From this block on.
        from: u32,
        /// Only versions above this.
        since: u64,
    },
    /// A page of the map.
    Map {
        /// Number of the request.
        request: u64,
        /// The page.
        page: MapPage,
    },
    /// Ask for blocks, each at this version or newer.
    GetBlocks {
        /// Number of the request.
        request: u64,
        /// Blocks and versions.
        blocks: Vec<(u32, u64)>,
    },
    /// A block.
    Block {
        /// Number of the request.
        request: u64,
        /// The block.
        block: u32,
        /// The version of the content.
        version: u64,
        /// The content's name; `None` for zeros.
        digest: Option<ChunkName>,
        /// The content; `None` for zeros. Travels compressed where that helps.
        data: Option<Bytes>,
    },
    /// Everything is durable at the destination.
    Released {
        /// Number of the request.
        request: u64,
    },
    /// Ask what the guest did with its blocks.
    GetHistory {
        /// Number of the request.
        request: u64,
    },
    /// What it did.
    History {
        /// Number of the request.
        request: u64,
        /// As [`crate::propagation::History`] encodes it.
        told: Bytes,
    },
    /// Ask for the newest cut of a mirror; answered when there is one above `after`, or after some seconds.
    AwaitCut {
        /// Number of the request.
        request: u64,
        /// The cut that the follower has whole; 0 when none.
        after: u64,
        /// The version that it has everything up to.
        have: u64,
    },
    /// The newest cut.
    Cut {
        /// Number of the request.
        request: u64,
        /// The cut; `None` when there is no newer one.
        cut: Option<CutInfo>,
    },
    /// Ask for a page of a cut's map; answered by `Map`.
    GetCutMap {
        /// Number of the request.
        request: u64,
        /// The cut.
        number: u64,
        /// From this block on.
        from: u32,
        /// Only versions above this.
        since: u64,
    },
    /// Ask for blocks as of a cut; answered by `Block`, one each.
    GetCutBlocks {
        /// Number of the request.
        request: u64,
        /// The cut.
        number: u64,
        /// Blocks and versions.
        blocks: Vec<(u32, u64)>,
    },
    /// Done; nothing to tell.
    Done {
        /// Number of the request.
        request: u64,
    },
    /// Not done.
    Refused {
        /// Number of the request; 0 for the connection as a whole.
        request: u64,
        /// Why, for people.
        why: String,
    },
}

const HELLO: u16 = 1;
const GET_MAP: u16 = 2;
const MAP: u16 = 3;
const GET_BLOCKS: u16 = 4;
const BLOCK: u16 = 5;
const RELEASED: u16 = 6;
const DONE: u16 = 7;
const REFUSED: u16 = 8;
const GET_HISTORY: u16 = 9;
const HISTORY: u16 = 10;
const AWAIT_CUT: u16 = 11;
const CUT: u16 = 12;
const GET_CUT_MAP: u16 = 13;
const GET_CUT_BLOCKS: u16 = 14;
const VERSION: u16 = 1;

/// How a block's data travels.
const FORM_ZERO: u8 = 0;
const FORM_RAW: u8 = 1;
const FORM_ZSTD: u8 = 2;

fn put_name(out: &mut BytesMut, name: Option<[u8; 32]>) {
    out.put_u8(u8::from(name.is_some()));
    if let Some(name) = name {
        out.put_slice(&name);
    }
}

fn get_name(fields: &mut Fields<'_>) -> Result<Option<[u8; 32]>, WireError> {
    match fields.u8()? {
        0 => Ok(None),
        1 => Ok(Some(fields.array()?)),
        _ => Err(fields.malformed("a flag is neither 0 nor 1")),
    }
}

fn put_blocks(out: &mut BytesMut, blocks: &[(u32, u64)]) {
    for (block, version) in blocks {
        out.put_u32_le(*block);
        out.put_u64_le(*version);
    }
}

fn get_blocks(fields: &mut Fields<'_>) -> Result<Vec<(u32, u64)>, WireError> {
    let count = fields.left() / 12;
    if count == 0 || count > MAX_BLOCKS {
        return Err(fields.malformed("no, or too many, blocks"));
    }
    let mut blocks = Vec::with_capacity(count);
    while fields.left() > 0 {
        blocks.push((fields.u32()?, fields.u64()?));
    }
    Ok(blocks)
}

impl Message {
    /// The frame of a message. Compresses a block's data: call it where that may take its time.
    #[must_use]
    pub fn encode(&self) -> Frame {
        let mut out = BytesMut::new();
        let kind = match self {
            Self::Hello(hello) => {
                out.put_slice(hello.volume.uuid().as_bytes());
                out.put_slice(hello.project.uuid().as_bytes());
                out.put_u64_le(hello.size_bytes);
                put_name(&mut out, hello.base.map(|base| base.0));
                HELLO
            }
            Self::GetMap { request, from, since } => {
                out.put_u64_le(*request);
                out.put_u32_le(*from);
                out.put_u64_le(*since);
                GET_MAP
            }
            Self::Map { request, page } => {
                out.put_u64_le(*request);
                out.put_u64_le(page.version);
                out.put_u8(u8::from(page.next.is_some()));
                out.put_u32_le(page.next.unwrap_or(0));
                for entry in &page.entries {
                    out.put_u32_le(entry.block);
                    out.put_u64_le(entry.version);
                    put_name(&mut out, entry.digest.map(|digest| digest.0));
                }
                MAP
            }
            Self::GetBlocks { request, blocks } => {
                out.put_u64_le(*request);
                put_blocks(&mut out, blocks);
                GET_BLOCKS
            }
            Self::AwaitCut { request, after, have } => {
                [request, after, have].into_iter().for_each(|number| out.put_u64_le(*number));
                AWAIT_CUT
            }
            Self::Cut { request, cut } => {
                out.put_u64_le(*request);
                if let Some(cut) = cut {
                    [cut.number, cut.version, cut.since].into_iter().for_each(|number| out.put_u64_le(number));
                    out.put_slice(&cut.root.0);
                }
                CUT
            }
            Self::GetCutMap { request, number, from, since } => {
                out.put_u64_le(*request);
                out.put_u64_le(*number);
                out.put_u32_le(*from);
                out.put_u64_le(*since);
                GET_CUT_MAP
            }
            Self::GetCutBlocks { request, number, blocks } => {
                out.put_u64_le(*request);
                out.put_u64_le(*number);
                put_blocks(&mut out, blocks);
                GET_CUT_BLOCKS
            }
            Self::Block { request, block, version, digest, data } => {
                out.reserve(BLOCK_BYTES + 64);
                out.put_u64_le(*request);
                out.put_u32_le(*block);
                out.put_u64_le(*version);
                put_name(&mut out, digest.map(|digest| digest.0));
                match data {
                    None => out.put_u8(FORM_ZERO),
                    Some(data) => {
                        let packed = zstd::bulk::compress(data, 1).ok().filter(|p| p.len() < data.len() * 9 / 10);
                        out.put_u8(if packed.is_some() { FORM_ZSTD } else { FORM_RAW });
                        out.put_slice(packed.as_deref().unwrap_or(data));
                    }
                }
                BLOCK
            }
            Self::Released { request } => {
                out.put_u64_le(*request);
                RELEASED
            }
            Self::GetHistory { request } => {
                out.put_u64_le(*request);
                GET_HISTORY
            }
            Self::History { request, told } => {
                out.put_u64_le(*request);
                out.put_slice(told);
                HISTORY
            }
            Self::Done { request } => {
                out.put_u64_le(*request);
                DONE
            }
            Self::Refused { request, why } => {
                out.put_u64_le(*request);
                // A cut character becomes a replacement mark at the other end.
                out.put_slice(&why.as_bytes()[..why.len().min(MAX_TEXT)]);
                REFUSED
            }
        };
        debug_assert!(out.len() <= MAX_FRAME_BYTES);
        Frame { kind, version: VERSION, payload: out.freeze() }
    }

    /// The message of a frame.
    pub fn decode(frame: &Frame) -> Result<Self, MessageError> {
        let mut fields = frame.expect_version(VERSION)?;
        let message = match frame.kind {
            HELLO => {
                let id = |bytes: [u8; 16]| uuid::Uuid::from_bytes(bytes);
                Self::Hello(Hello {
                    volume: VolumeId::from_uuid(id(fields.array()?)),
                    project: ProjectId::from_uuid(id(fields.array()?)),
                    size_bytes: fields.u64()?,
                    base: get_name(&mut fields)?.map(ContentRoot),
                })
            }
            GET_MAP => Self::GetMap { request: fields.u64()?, from: fields.u32()?, since: fields.u64()? },
            MAP => return decode_map(fields),
            GET_BLOCKS => Self::GetBlocks { request: fields.u64()?, blocks: get_blocks(&mut fields)? },
            AWAIT_CUT => Self::AwaitCut { request: fields.u64()?, after: fields.u64()?, have: fields.u64()? },
            CUT => {
                let request = fields.u64()?;
                let mut cut = None;
                if fields.left() > 0 {
                    let (number, version, since) = (fields.u64()?, fields.u64()?, fields.u64()?);
                    if number == 0 || since > version {
                        return Err(fields.malformed("no cut has these numbers"));
                    }
                    cut = Some(CutInfo { number, version, since, root: MapRoot(fields.array()?) });
                }
                Self::Cut { request, cut }
            }
            GET_CUT_MAP => Self::GetCutMap {
                request: fields.u64()?,
                number: fields.u64()?,
                from: fields.u32()?,
                since: fields.u64()?,
            },
            GET_CUT_BLOCKS => {
                Self::GetCutBlocks { request: fields.u64()?, number: fields.u64()?, blocks: get_blocks(&mut fields)? }
            }
            BLOCK => return decode_block(fields),
            RELEASED => Self::Released { request: fields.u64()? },
            GET_HISTORY => Self::GetHistory { request: fields.u64()? },
            HISTORY => {
                let request = fields.u64()?;
                // Looked into by who asked for it.
                return Ok(Self::History { request, told: Bytes::copy_from_slice(fields.rest()) });
            }
            DONE => Self::Done { request: fields.u64()? },
            REFUSED => {
                let request = fields.u64()?;
                if fields.left() > MAX_TEXT {
                    return Err(fields.malformed("too long a text"));
                }
                let text = String::from_utf8_lossy(fields.rest());
                // It goes to logs and people: one line, no control characters.
                let why = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                return Ok(Self::Refused { request, why });
            }
            kind => return Err(WireError::Kind { kind }),
        };
        fields.end()?;
        Ok(message)
    }
}

fn decode_map(mut fields: Fields<'_>) -> Result<Message, WireError> {
    let request = fields.u64()?;
    let version = fields.u64()?;
    let has_next = fields.u8()?;
    let next = fields.u32()?;
    if has_next > 1 {
        return Err(fields.malformed("a flag is neither 0 nor 1"));
    }
    let mut entries: Vec<MapEntry> = Vec::new();
    while fields.left() > 0 {
        let entry =
            MapEntry { block: fields.u32()?, version: fields.u64()?, digest: get_name(&mut fields)?.map(ChunkName) };
        if entries.len() >= MAX_ENTRIES || entries.last().is_some_and(|last| last.block >= entry.block) {
            return Err(fields.malformed("too many entries, or not in order"));
        }
        entries.push(entry);
    }
    let next = (has_next == 1).then_some(next);
    if entries.last().is_some_and(|last| next.is_some_and(|next| next <= last.block)) {
        return Err(fields.malformed("the next page starts inside this one"));
    }
    Ok(Message::Map { request, page: MapPage { version, entries, next } })
}

fn decode_block(mut fields: Fields<'_>) -> Result<Message, WireError> {
    let request = fields.u64()?;
    let block = fields.u32()?;
    let version = fields.u64()?;
    let digest = get_name(&mut fields)?.map(ChunkName);
    let form = fields.u8()?;
    let bad = fields.malformed("its data is not a block");
    let rest = fields.rest();
    let data = match form {
        FORM_ZERO if rest.is_empty() && digest.is_none() => None,
        FORM_RAW => Some(rest.to_vec()),
        // The capacity caps what is allocated, whatever the payload says of itself.
        FORM_ZSTD => Some(zstd::bulk::decompress(rest, BLOCK_BYTES).map_err(|_| bad)?),
        _ => return Err(bad),
    };
    if data.as_ref().is_some_and(|data| data.len() != BLOCK_BYTES || digest.is_none()) {
        let kind = BLOCK;
        return Err(WireError::Malformed { kind, what: "its data is not a block with a digest".into() });
    }
    Ok(Message::Block { request, block, version, digest, data: data.map(Bytes::from) })
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    fn all() -> Vec<Message> {
        let mut noise = vec![0; BLOCK_BYTES];
        rand::rngs::SmallRng::seed_from_u64(5).fill(&mut noise[..]);
        let name = Some(ChunkName([7; 32]));
        let block = |data: Option<Vec<u8>>| Message::Block {
            request: 3,
            block: 4,
            version: 5,
            digest: data.as_ref().and(name),
            data: data.map(Bytes::from),
        };
        let entry = |block, digest| MapEntry { block, version: 8, digest };
        vec![
            Message::Hello(Hello {
                volume: VolumeId::generate(),
                project: ProjectId::generate(),
                size_bytes: 1 << 30,
                base: Some(ContentRoot([1; 32])),
            }),
            Message::GetMap { request: 1, from: 2, since: 3 },
            Message::Map {
                request: 1,
                page: MapPage { version: 9, entries: vec![entry(1, name), entry(7, None)], next: Some(8) },
            },
            Message::Map { request: 1, page: MapPage { version: 9, entries: vec![], next: None } },
            Message::GetBlocks { request: 2, blocks: vec![(1, 2), (3, 4)] },
            block(None),
            block(Some(vec![1; BLOCK_BYTES])),
            block(Some(noise)),
            Message::AwaitCut { request: 4, after: 5, have: 6 },
            Message::Cut { request: 4, cut: None },
            Message::Cut { request: 4, cut: Some(CutInfo { number: 6, version: 9, since: 7, root: MapRoot([3; 32]) }) },
            Message::GetCutMap { request: 4, number: 6, from: 7, since: 8 },
            Message::GetCutBlocks { request: 4, number: 6, blocks: vec![(1, 2), (3, 4)] },
            Message::Released { request: 9 },
            Message::Done { request: 9 },
            Message::Refused { request: 0, why: "no such volume".into() },
        ]
    }

    #[test]
    fn messages_come_back() {
        for message in all() {
            assert_eq!(Message::decode(&message.encode()).unwrap(), message);
        }
    }

    #[test]
    fn a_block_travels_compressed_when_that_helps() {
        let data = Some(Bytes::from(vec![1; BLOCK_BYTES]));
        let message = Message::Block { request: 1, block: 1, version: 1, digest: Some(ChunkName([1; 32])), data };
        assert!(message.encode().payload.len() < 1000);
    }

    #[test]
    fn mutated_messages_never_panic() {
        let seed = 0x5eed_0005;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let frames: Vec<_> = all().iter().map(Message::encode).collect();
        for _ in 0..20_000 {
            let mut frame = frames[rng.random_range(0..frames.len())].clone();
            let mut payload = frame.payload.to_vec();
            for _ in 0..rng.random_range(0..5) {
                if !payload.is_empty() {
                    let at = rng.random_range(0..payload.len().min(200));
                    payload[at] = rng.random();
                }
            }
            match rng.random_range(0..10) {
                0 => payload.truncate(rng.random_range(0..=payload.len())),
                1 => payload.extend_from_slice(&[0; 13]),
                2 => frame.kind = rng.random_range(0..16),
                3 => frame.version = rng.random_range(0..3),
                _ => {}
            }
            frame.payload = payload.into();
            match Message::decode(&frame) {
                Ok(Message::Block { data, digest, .. }) => {
                    assert_eq!(data.is_some(), digest.is_some());
                    assert!(data.is_none_or(|data| data.len() == BLOCK_BYTES));
                }
                Ok(Message::GetBlocks { blocks, .. } | Message::GetCutBlocks { blocks, .. }) => {
                    assert!((1..=MAX_BLOCKS).contains(&blocks.len()))
                }
                Ok(Message::Map { page, .. }) => {
                    assert!(page.entries.is_sorted_by(|a, b| a.block < b.block));
                }
                _ => {}
            }
        }
    }
}
