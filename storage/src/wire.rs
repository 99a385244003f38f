//! Frames: what every socket of the store speaks below its messages.
//!
//! `kind u16, version u16, length u32`, little endian, then `length` bytes; kind 0 is invalid, length at most 1 MiB.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The largest payload of a frame, in bytes.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// The length of a frame's header.
pub const HEADER_BYTES: usize = 8;

/// Why a frame could not be read, or a payload not be understood.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The other end closed the connection between two frames.
    #[error("the other end closed the connection")]
    Closed,
    /// Kind 0, or a kind that is not expected here.
    #[error("a frame of kind {kind} is not expected here")]
    Kind {
        /// The kind.
        kind: u16,
    },
    /// A version that this build does not speak.
    #[error("a frame of kind {kind} has version {version}, which is not spoken here")]
    Version {
        /// The kind.
        kind: u16,
        /// The version.
        version: u16,
    },
    /// A length above the cap.
    #[error("a frame of kind {kind} says {len} bytes, the cap is {MAX_FRAME_BYTES}")]
    TooLarge {
        /// The kind.
        kind: u16,
        /// The length.
        len: u64,
    },
    /// A payload that is not what its kind says.
    #[error("a frame of kind {kind} is malformed: {what}")]
    Malformed {
        /// The kind.
        kind: u16,
        /// What is wrong.
        what: String,
    },
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is; never 0.
    pub kind: u16,
    /// The version of the payload's format.
    pub version: u16,
    /// The payload, at most [`MAX_FRAME_BYTES`].
    pub payload: Bytes,
}

impl Frame {
    /// A frame of version 1.
    #[must_use]
    pub fn v1(kind: u16, payload: Bytes) -> Self {
        Self { kind, version: 1, payload }
    }

    /// The payload of a frame that must be of `version`.
    pub fn expect_version(&self, version: u16) -> Result<Fields<'_>, WireError> {
        if self.version != version {
            return Err(WireError::Version { kind: self.kind, version: self.version });
        }
        Ok(Fields { kind: self.kind, rest: &self.payload })
    }
}

/// Checks a header; returns kind, version and payload length.
pub fn parse_header(header: [u8; HEADER_BYTES]) -> Result<(u16, u16, usize), WireError> {
    let kind = u16::from_le_bytes([header[0], header[1]]);
    let version = u16::from_le_bytes([header[2], header[3]]);
    let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    if kind == 0 {
        return Err(WireError::Kind { kind });
    }
    if len as usize > MAX_FRAME_BYTES {
        return Err(WireError::TooLarge { kind, len: u64::from(len) });
    }
    Ok((kind, version, len as usize))
}

/// Reads one frame. [`WireError::Closed`] when the stream ends before its first byte. Not cancel-safe: own the reader.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Frame, WireError> {
    let mut header = [0; HEADER_BYTES];
    if reader.read(&mut header[..1]).await? == 0 {
        return Err(WireError::Closed);
    }
    reader.read_exact(&mut header[1..]).await?;
    let (kind, version, len) = parse_header(header)?;
    let mut payload = BytesMut::zeroed(len);
    reader.read_exact(&mut payload).await?;
    Ok(Frame { kind, version, payload: payload.freeze() })
}

/// Writes one frame and flushes it: what lies below may be TLS, which keeps what its socket does not take at once. Not cancel-safe.
pub async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, frame: &Frame) -> Result<(), WireError> {
    if frame.payload.len() > MAX_FRAME_BYTES || frame.kind == 0 {
        return Err(WireError::TooLarge { kind: frame.kind, len: frame.payload.len() as u64 });
    }
    let mut header = [0; HEADER_BYTES];
    header[..2].copy_from_slice(&frame.kind.to_le_bytes());
    header[2..4].copy_from_slice(&frame.version.to_le_bytes());
    header[4..].copy_from_slice(&u32::try_from(frame.payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    // Small frames in one write: one segment on the link.
    if frame.payload.len() <= 4096 {
        let mut whole = BytesMut::with_capacity(HEADER_BYTES + frame.payload.len());
        whole.extend_from_slice(&header);
        whole.extend_from_slice(&frame.payload);
        writer.write_all(&whole).await?;
    } else {
        let mut both = Buf::chain(header.as_slice(), frame.payload.as_ref());
        writer.write_all_buf(&mut both).await?;
    }
    writer.flush().await?;
    Ok(())
}

/// Reads the fields of a payload in order; every read is checked against what is left.
#[derive(Debug)]
pub struct Fields<'a> {
    kind: u16,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The fields of bytes that came in a frame of this kind.
    #[must_use]
    pub const fn of(kind: u16, rest: &'a [u8]) -> Self {
        Self { kind, rest }
    }

    fn short(&self) -> WireError {
        self.malformed("it ends too early")
    }

    /// A malformed-payload error of this frame.
    #[must_use]
    pub fn malformed(&self, what: &str) -> WireError {
        WireError::Malformed { kind: self.kind, what: what.to_owned() }
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or_else(|| self.short())?;
        self.rest = rest;
        Ok(*head)
    }

    /// The next byte.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    /// The next 4 bytes as a number.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next 8 bytes as a number.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// How many bytes are left.
    #[must_use]
    pub const fn left(&self) -> usize {
        self.rest.len()
    }

    /// All that is left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Checks that nothing is left.
    pub fn end(self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed("it goes on after its end")) }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    #[tokio::test]
    async fn a_frame_leaves_at_once_through_a_writer_that_holds_back() {
        for len in [10, MAX_FRAME_BYTES] {
            let (ours, mut theirs) = tokio::io::duplex(MAX_FRAME_BYTES + HEADER_BYTES);
            let mut ours = tokio::io::BufWriter::with_capacity(2 * MAX_FRAME_BYTES, ours);
            let frame = Frame::v1(7, vec![9; len].into());
            write_frame(&mut ours, &frame).await.unwrap();
            let read = tokio::time::timeout(std::time::Duration::from_secs(20), read_frame(&mut theirs)).await;
            assert_eq!(read.expect("it never left").unwrap(), frame);
        }
    }

    #[tokio::test]
    async fn frames_come_back() {
        for len in [0usize, 1, 4096, 4097, MAX_FRAME_BYTES] {
            let frame = Frame { kind: 3, version: 9, payload: vec![7; len].into() };
            let mut wire = Vec::new();
            write_frame(&mut wire, &frame).await.unwrap();
            assert_eq!(wire.len(), HEADER_BYTES + len);
            assert_eq!(read_frame(&mut wire.as_slice()).await.unwrap(), frame);
        }
        let big = Frame { kind: 3, version: 9, payload: vec![7; MAX_FRAME_BYTES + 1].into() };
        assert!(matches!(write_frame(&mut Vec::new(), &big).await, Err(WireError::TooLarge { .. })));
    }

    #[tokio::test]
    async fn bad_headers_are_typed() {
        let read = |bytes: Vec<u8>| async move { read_frame(&mut bytes.as_slice()).await };
        assert!(matches!(read(vec![]).await, Err(WireError::Closed)));
        assert!(matches!(read(vec![1, 0, 1]).await, Err(WireError::Io(_))));
        assert!(matches!(read(vec![0; 8]).await, Err(WireError::Kind { kind: 0 })));
        assert!(matches!(read(vec![1, 0, 1, 0, 1, 0, 16, 0]).await, Err(WireError::TooLarge { len: 0x10_0001, .. })));
        assert!(matches!(read(vec![1, 0, 1, 0, 5, 0, 0, 0, 1]).await, Err(WireError::Io(_))));
    }

    #[tokio::test]
    async fn mutated_streams_end_without_panic() {
        let seed = 0x5eed_0003;
        println!("seed {seed:#x}");
        let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
        let mut wire = Vec::new();
        for i in 1..5 {
            write_frame(&mut wire, &Frame::v1(i, vec![1; 50].into())).await.unwrap();
        }
        for _ in 0..5_000 {
            let mut bytes = wire.clone();
            for _ in 0..rng.random_range(1..5) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            let mut stream = bytes.as_slice();
            while let Ok(frame) = read_frame(&mut stream).await {
                assert!(frame.kind != 0 && frame.payload.len() <= MAX_FRAME_BYTES);
            }
        }
    }
}
