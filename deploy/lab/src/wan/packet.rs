//! `AF_PACKET` sockets, batched: the only place of the WAN that talks to the kernel about frames (see packet(7)).

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Frames per system call.
pub const BATCH: usize = 64;

/// Room for one frame; larger than any MTU, so that a frame of a veth with offloads left on is seen (and counted), not cut.
const FRAME_ROOM: usize = 65_536;

const ETH_P_ALL: u16 = 0x0003;
const SOCKET_BUFFER_BYTES: libc::c_int = 32 << 20;

/// A raw socket bound to one interface.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl PacketSocket {
    /// Opens a socket for all frames that arrive at the interface (not for those that are sent from it).
    ///
    /// # Errors
    /// When there is no such interface or no right to open it.
    pub fn open(interface: &str) -> io::Result<Self> {
        let name = std::ffi::CString::new(interface)?;
        // SAFETY: `name` is a valid C string.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        // Protocol 0: nothing is received until bind names the interface, so no frame of another one slips in.
        // SAFETY: plain system call.
        let raw =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just opened and belongs to nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
            // Without the right to it the socket works with smaller buffers.
            let _ = set_option(raw, libc::SOL_SOCKET, option, SOCKET_BUFFER_BYTES);
        }
        set_option(raw, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        // SAFETY: all-zero is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ETH_P_ALL.to_be();
        address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
        // SAFETY: the address is a sockaddr_ll of the length given.
        let bound =
            unsafe { libc::bind(raw, (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t) };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(Self { fd }) }
    }

    /// Receives up to [`BATCH`] frames without waiting and gives each to `take`; the number received.
    ///
    /// # Errors
    /// What the kernel says, e.g. `ENETDOWN` when the interface went down (once; the socket stays usable).
    pub fn receive(&self, buffers: &mut Buffers, mut take: impl FnMut(&[u8])) -> io::Result<usize> {
        let mut vectors: [libc::iovec; BATCH] = std::array::from_fn(|at| libc::iovec {
            iov_base: buffers.room[at].as_mut_ptr().cast(),
            iov_len: FRAME_ROOM,
        });
        // SAFETY: all-zero is a valid mmsghdr (no name, no control data).
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { zeroed() };
        for (message, vector) in messages.iter_mut().zip(&mut vectors) {
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: BATCH headers, each with one vector over a buffer of FRAME_ROOM bytes; all outlive the call.
        let got = unsafe {
            libc::recvmmsg(
                self.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(0) } else { Err(error) };
        };
        for (message, room) in messages.iter().zip(&buffers.room).take(got) {
            take(&room[..(message.msg_len as usize).min(FRAME_ROOM)]);
        }
        Ok(got)
    }

    /// Sends the frames in order; gives how many the kernel took. What it refuses for lack of room is tried for some
    /// milliseconds; a frame that it refuses for another reason (too long, interface down) is left out.
    pub fn send(&self, frames: &[Vec<u8>]) -> usize {
        let (mut at, mut taken, mut patience) = (0, 0, 8);
        while at < frames.len() {
            let batch = &frames[at..(at + BATCH).min(frames.len())];
            match self.send_batch(batch) {
                Ok(sent) => {
                    at += sent;
                    taken += sent;
                }
                Err(error) => {
                    let full = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM));
                    if full && patience > 0 {
                        patience -= 1;
                        let mut poll = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
                        // SAFETY: one valid pollfd for the duration of the call.
                        unsafe { libc::poll(&raw mut poll, 1, 1) };
                    } else {
                        at += 1;
                    }
                }
            }
        }
        taken
    }

    fn send_batch(&self, batch: &[Vec<u8>]) -> io::Result<usize> {
        debug_assert!(batch.len() <= BATCH, "callers cut into batches");
        // SAFETY: all-zero is valid for both.
        let mut vectors: [libc::iovec; BATCH] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { zeroed() };
        for ((frame, vector), message) in batch.iter().zip(&mut vectors).zip(&mut messages) {
            // The kernel only reads through this pointer.
            *vector = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: `batch.len() <= BATCH` headers, each with one vector over a frame that outlives the call.
        let sent = unsafe {
            libc::sendmmsg(
                self.as_raw_fd(),
                messages.as_mut_ptr(),
                batch.len().min(BATCH) as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// Where frames are received into; one for all sockets.
#[derive(Debug)]
pub struct Buffers {
    room: Vec<Box<[u8]>>,
}

impl Default for Buffers {
    fn default() -> Self {
        Self { room: (0..BATCH).map(|_| vec![0_u8; FRAME_ROOM].into_boxed_slice()).collect() }
    }
}

fn set_option(fd: RawFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value is a c_int of the length given.
    let done = unsafe {
        libc::setsockopt(fd, level, option, (&raw const value).cast(), size_of::<libc::c_int>() as libc::socklen_t)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
