//! A connection: frames over a socket that does not block, with bounded buffers.

use std::{
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Instant,
};

use supercloud_api::frame::{Frame, FrameError, HEADER_BYTES, read_frame_blocking};

use super::{SILENCE, VERSION};
use crate::vmm::travel::{
    TravelError,
    pages::{FRAME_BYTES, MOST_BYTES},
};

/// The largest payload here: a frame of pages.
const MAX_PAYLOAD_BYTES: usize = FRAME_BYTES + MOST_BYTES;
/// Bytes that wait to be written: no more are put there.
const MAX_WRITING_BYTES: usize = 2 * MAX_PAYLOAD_BYTES;

/// The connection.
#[derive(Debug)]
pub struct Link {
    socket: UnixStream,
    reading: Vec<u8>,
    writing: Vec<u8>,
    written: usize,
    is_closed: bool,
    heard_at: Instant,
}

impl Link {
    /// Takes the socket.
    ///
    /// # Errors
    /// When it cannot be made not to block.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (reading, writing) = (Vec::new(), Vec::new());
        Ok(Self { socket, reading, writing, written: 0, is_closed: false, heard_at: Instant::now() })
    }

    /// What to poll, and for what.
    pub fn poll(&self) -> (BorrowedFd<'_>, libc::c_short) {
        let wants_room = if self.written < self.writing.len() { libc::POLLOUT } else { 0 };
        (self.socket.as_fd(), libc::POLLIN | wants_room)
    }

    /// Whether a frame of any size can be said now.
    pub fn has_room(&self) -> bool {
        self.writing.len() - self.written + HEADER_BYTES + MAX_PAYLOAD_BYTES <= MAX_WRITING_BYTES
    }

    /// Puts a frame to what is to be written; only when there is room.
    ///
    /// # Errors
    /// When the frame is none.
    pub fn say(&mut self, kind: u16, payload: Vec<u8>) -> Result<(), TravelError> {
        if self.written == self.writing.len() {
            self.writing.clear();
            self.written = 0;
        }
        self.writing.extend(Frame { kind, version: VERSION, payload }.to_bytes()?);
        Ok(())
    }

    /// Writes what the socket takes.
    ///
    /// # Errors
    /// When it is broken.
    pub fn flush(&mut self) -> Result<(), TravelError> {
        while let Some(left) = self.writing.get(self.written..).filter(|left| !left.is_empty()) {
            match self.socket.write(left) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.written > MAX_PAYLOAD_BYTES {
            self.writing.drain(..self.written);
            self.written = 0;
        }
        Ok(())
    }

    /// The next frame that is there; `None`: not now.
    ///
    /// # Errors
    /// When the other end has closed it, broke off in a frame, or says what is no frame of these.
    pub fn next(&mut self) -> Result<Option<Frame>, TravelError> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            if self.is_closed {
                let cut = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(if self.reading.is_empty() { FrameError::Closed } else { cut.into() }.into());
            }
            let mut piece = [0; 16 << 10];
            match self.socket.read(&mut piece) {
                Ok(0) => self.is_closed = true,
                Ok(count) => {
                    self.heard_at = Instant::now();
                    self.reading.extend(piece.get(..count).unwrap_or_default());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn take(&mut self) -> Result<Option<Frame>, TravelError> {
        let Some(header) = self.reading.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [.., l0, l1, l2, l3] = *header;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD_BYTES {
            return Err(FrameError::TooLong(length).into());
        }
        let whole = HEADER_BYTES + length;
        let Some(mut bytes) = self.reading.get(..whole) else { return Ok(None) };
        let frame = read_frame_blocking(&mut bytes)?;
        self.reading.drain(..whole);
        let Frame { kind, version, .. } = frame;
        if version != VERSION {
            return Err(FrameError::Version { kind, version, spoken: VERSION }.into());
        }
        Ok(Some(frame))
    }

    /// Counts the silence of the other end from now on.
    pub fn is_its_turn(&mut self) {
        self.heard_at = Instant::now();
    }

    /// That the other end, whose turn it is, says something still.
    ///
    /// # Errors
    /// When it was silent for too long.
    pub fn check_silence(&self) -> Result<(), TravelError> {
        let silence = self.heard_at.elapsed();
        if silence > SILENCE { Err(TravelError::Mute(silence)) } else { Ok(()) }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Whoever else has the socket hears of it.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
