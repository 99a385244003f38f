//! Reading a disk before there is a device for it.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{CMD_READ, FINAL_ERRORS, LinkNews, REPLY_BYTES, RETRY_AFTER, Shared, request, understand};
use crate::vmm::boot::disk::ReadAt;

/// How long a server may be silent.
const SILENCE: Duration = Duration::from_secs(30);
/// How long one read may take in all: its volume process may be started anew, its block be away.
const BUDGET: Duration = Duration::from_secs(120);
/// The pause before it is looked for another link.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Reads over the link that a device will use afterwards; waits for another one where that breaks, as a device does.
pub struct NbdReader(pub(super) Arc<Shared>);

/// What the server answered; its error number where it has one.
fn ask(mut stream: &UnixStream, offset: u64, buffer: &mut [u8]) -> io::Result<u32> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let bytes = u32::try_from(buffer.len()).map_err(io::Error::other)?;
    stream.write_all(&request(CMD_READ, 0, offset, bytes))?;
    let mut reply = [0; REPLY_BYTES];
    stream.read_exact(&mut reply)?;
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "the volume process breaks the protocol");
    let (error, _) = understand(&reply).filter(|(_, cookie)| *cookie == 0).ok_or_else(broken)?;
    if error == 0 {
        stream.read_exact(buffer)?;
    }
    stream.set_nonblocking(true)?;
    Ok(error)
}

impl ReadAt for NbdReader {
    fn bytes(&self) -> u64 {
        self.0.bytes
    }

    #[expect(clippy::disallowed_methods, reason = "a thread that reads a disk and does nothing else")]
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let until = Instant::now() + BUDGET;
        let mut why = io::Error::new(io::ErrorKind::NotConnected, "there is no way to the disk");
        while Instant::now() < until {
            let stream = self.0.next().take();
            let Some(stream) = stream else {
                std::thread::sleep(LOOK_AGAIN);
                continue;
            };
            match ask(&stream, offset, buffer) {
                Ok(error) => {
                    // Only one that is whole is given back; what came meanwhile is newer.
                    self.0.next().get_or_insert(stream);
                    if error == 0 {
                        return Ok(());
                    }
                    why = io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(libc::EIO));
                    if FINAL_ERRORS.contains(&error) {
                        break;
                    }
                    std::thread::sleep(RETRY_AFTER);
                }
                Err(error) => {
                    why = error;
                    (self.0.tell)(LinkNews::Lost);
                }
            }
        }
        Err(why)
    }
}
