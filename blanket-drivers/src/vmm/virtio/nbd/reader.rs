//! Reading a disk before there is a device for it.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::Arc,
    time::Duration,
};

use super::{CMD_READ, REPLY_BYTES, Shared, request, understand};
use crate::vmm::boot::disk::ReadAt;

/// How long the server may take for one answer: the block may be away.
const BUDGET: Duration = Duration::from_secs(60);

/// Reads over the link that a device will use afterwards.
pub struct NbdReader(pub(super) Arc<Shared>);

fn ask(mut stream: &UnixStream, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let bytes = u32::try_from(buffer.len()).map_err(io::Error::other)?;
    stream.write_all(&request(CMD_READ, 0, offset, bytes))?;
    let mut reply = [0; REPLY_BYTES];
    stream.read_exact(&mut reply)?;
    match understand(&reply) {
        Some((0, 0)) => stream.read_exact(buffer),
        Some((error, 0)) => Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(libc::EIO))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the volume process breaks the protocol")),
    }
}

impl ReadAt for NbdReader {
    fn bytes(&self) -> u64 {
        self.0.bytes
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let stream = self.0.next().take();
        let stream =
            stream.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "there is no way to the disk"))?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(BUDGET))?;
        stream.set_write_timeout(Some(BUDGET))?;
        ask(&stream, offset, buffer)?;
        stream.set_nonblocking(true)?;
        // Only one that is whole is given back; what came meanwhile is newer.
        self.0.next().get_or_insert(stream);
        Ok(())
    }
}
