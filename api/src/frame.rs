//! The frame of every wire between our own processes.
//!
//! ```text
//! kind u16 | version u16 | length u32 | payload (length bytes)        little endian
//! ```
//!
//! Kind 0 is invalid, so that a stream of zeros is refused at the first frame. `length` is at most 1 MiB and is
//! checked before anything is allocated. The version belongs to the payload of that kind; a reader accepts versions
//! n and n-1 of each kind.

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The largest payload, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// The size of the header, in bytes.
pub const HEADER_BYTES: usize = 8;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is; never 0.
    pub kind: u16,
    /// The version of that payload.
    pub version: u16,
    /// The payload, at most [`MAX_PAYLOAD_BYTES`].
    pub payload: Vec<u8>,
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between frames.
    #[error("the peer closed the stream")]
    Closed,
    /// The stream broke.
    #[error("the stream broke")]
    Io(#[from] std::io::Error),
    /// Kind 0.
    #[error("a frame of kind 0 is invalid: the peer does not speak this protocol")]
    KindZero,
    /// The length is over the limit.
    #[error("a frame of {0} bytes is over the limit of {MAX_PAYLOAD_BYTES}")]
    TooLong(usize),
    /// A kind that is not expected here.
    #[error("unexpected frame of kind {0}")]
    UnexpectedKind(u16),
    /// A version this side does not speak.
    #[error("frame kind {kind} comes in version {version}; this side speaks {spoken} and the one before")]
    Version {
        /// The kind.
        kind: u16,
        /// The version it came in.
        version: u16,
        /// The newest version spoken here.
        spoken: u16,
    },
    /// The payload is not what the kind says.
    #[error("the payload of a frame of kind {kind} is malformed")]
    Payload {
        /// The kind.
        kind: u16,
        /// What the decoder said.
        #[source]
        source: serde_json::Error,
    },
}

impl Frame {
    /// A frame with a JSON payload.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] when the payload is over the limit.
    pub fn json<T: Serialize>(kind: u16, version: u16, body: &T) -> Result<Self, FrameError> {
        let payload = serde_json::to_vec(body).map_err(|source| FrameError::Payload { kind, source })?;
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(FrameError::TooLong(payload.len()));
        }
        Ok(Self { kind, version, payload })
    }

    /// The frame as it goes over the wire.
    ///
    /// # Errors
    /// When kind or length are not valid.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FrameError> {
        if self.kind == 0 {
            return Err(FrameError::KindZero);
        }
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            return Err(FrameError::TooLong(self.payload.len()));
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        bytes.extend_from_slice(&self.kind.to_le_bytes());
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.payload.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }

    /// The JSON payload of a frame whose kind is `kind`, in version `spoken` or the one before.
    ///
    /// # Errors
    /// When kind, version or payload are not as expected.
    pub fn parse_json<T: DeserializeOwned>(&self, kind: u16, spoken: u16) -> Result<T, FrameError> {
        if self.kind != kind {
            return Err(FrameError::UnexpectedKind(self.kind));
        }
        if self.version == 0 || self.version > spoken || self.version + 1 < spoken {
            return Err(FrameError::Version { kind, version: self.version, spoken });
        }
        serde_json::from_slice(&self.payload).map_err(|source| FrameError::Payload { kind, source })
    }
}

/// Kind, version and length out of a header.
pub(crate) fn parse_header(header: [u8; HEADER_BYTES]) -> Result<(u16, u16, usize), FrameError> {
    let kind = u16::from_le_bytes([header[0], header[1]]);
    let version = u16::from_le_bytes([header[2], header[3]]);
    let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if kind == 0 {
        return Err(FrameError::KindZero);
    }
    if length > MAX_PAYLOAD_BYTES {
        return Err(FrameError::TooLong(length));
    }
    Ok((kind, version, length))
}

/// Reads one frame. Not cancel-safe: own the reader in one task.
///
/// # Errors
/// [`FrameError::Closed`] at a clean end between frames; else what is wrong with the frame or the stream.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Frame, FrameError> {
    let mut header = [0u8; HEADER_BYTES];
    let first = reader.read(&mut header).await?;
    if first == 0 {
        return Err(FrameError::Closed);
    }
    reader.read_exact(&mut header[first..]).await?;
    let (kind, version, length) = parse_header(header)?;
    let mut payload = vec![0u8; length];
    reader.read_exact(&mut payload).await?;
    Ok(Frame { kind, version, payload })
}

/// As [`read_frame`], on a thread that may wait.
///
/// # Errors
/// As [`read_frame`].
pub fn read_frame_blocking(reader: &mut impl std::io::Read) -> Result<Frame, FrameError> {
    let mut header = [0u8; HEADER_BYTES];
    let first = loop {
        match reader.read(&mut header) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if first == 0 {
        return Err(FrameError::Closed);
    }
    reader.read_exact(&mut header[first..])?;
    let (kind, version, length) = parse_header(header)?;
    let mut payload = vec![0u8; length];
    reader.read_exact(&mut payload)?;
    Ok(Frame { kind, version, payload })
}

/// Writes one frame and flushes.
///
/// # Errors
/// When the frame is invalid or the stream broke.
pub async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, frame: &Frame) -> Result<(), FrameError> {
    writer.write_all(&frame.to_bytes()?).await?;
    writer.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_round_trip() {
        let frame = Frame::json(7, 1, &serde_json::json!({"a": 1})).unwrap();
        let mut wire = Vec::new();
        write_frame(&mut wire, &frame).await.unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(read_frame(&mut reader).await.unwrap(), frame);
        assert!(matches!(read_frame(&mut reader).await, Err(FrameError::Closed)));
        let mut reader = wire.as_slice();
        assert_eq!(read_frame_blocking(&mut reader).unwrap(), frame);
        assert!(matches!(read_frame_blocking(&mut reader), Err(FrameError::Closed)));
    }

    #[tokio::test]
    async fn a_length_over_the_limit_is_refused_before_reading_on() {
        let mut wire = vec![1, 0, 1, 0];
        wire.extend_from_slice(&(MAX_PAYLOAD_BYTES as u32 + 1).to_le_bytes());
        assert!(matches!(read_frame(&mut wire.as_slice()).await, Err(FrameError::TooLong(_))));
        assert!(matches!(read_frame(&mut [0u8; 64].as_slice()).await, Err(FrameError::KindZero)));
        assert!(matches!(read_frame(&mut [1u8, 0, 1].as_slice()).await, Err(FrameError::Io(_))));
    }

    #[test]
    fn versions_n_and_n_minus_one_are_spoken() {
        let frame = |version| Frame { kind: 3, version, payload: b"1".to_vec() };
        assert!(frame(2).parse_json::<u32>(3, 2).is_ok());
        assert!(frame(1).parse_json::<u32>(3, 2).is_ok());
        for bad in [0, 3] {
            assert!(matches!(frame(bad).parse_json::<u32>(3, 2), Err(FrameError::Version { .. })));
        }
        assert!(matches!(frame(1).parse_json::<u32>(3, 3), Err(FrameError::Version { .. })));
    }
}
