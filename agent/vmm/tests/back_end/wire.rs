//! A card's wire, as the outside sees it: a tap of our own, and a socket that hears what comes out of it.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// `TUNSETIFF`, `TUNSETPERSIST` of `linux/if_tun.h`.
const SET_INTERFACE: libc::Ioctl = 0x4004_54cau32 as libc::Ioctl;
const SET_PERSISTENT: libc::Ioctl = 0x4004_54cbu32 as libc::Ioctl;
/// What the counting guest's frames have.
const FRAME_BYTES: usize = 64;

/// A tap.
pub struct Wire {
    pub name: String,
    socket: OwnedFd,
}

fn checked(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: ifreq is a C structure of numbers and bytes, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    request
}

fn set_persistent(name: &str, is_wanted: bool) -> io::Result<()> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut asked = request(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    // SAFETY: the descriptor is open, and the kernel reads and writes an ifreq.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), SET_INTERFACE, &raw mut asked) })?;
    // SAFETY: this one takes its argument by value.
    checked(unsafe { libc::ioctl(tap.as_raw_fd(), SET_PERSISTENT, libc::c_ulong::from(is_wanted)) }).map(drop)
}

impl Wire {
    /// A tap that is up, if that is allowed here.
    ///
    /// # Errors
    /// When it is not.
    pub fn new(name: &str) -> io::Result<Self> {
        set_persistent(name, true)?;
        Ok(Self { name: name.to_owned(), socket: hearing(name)? })
    }

    /// The numbers of the guest's frames that came since this was asked last.
    pub fn numbers(&self) -> Vec<u32> {
        let mut all = Vec::new();
        loop {
            let mut frame = [0u8; 2048];
            // SAFETY: the pointer and the length are those of a local.
            let count = unsafe {
                libc::recv(self.socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), libc::MSG_DONTWAIT)
            };
            let Ok(count) = usize::try_from(count) else { return all };
            // The kernel says something of its own on every interface.
            if count == FRAME_BYTES && frame[..14] == [0; 14] {
                all.push(u32::from_le_bytes(*frame[14..].first_chunk().unwrap()));
            }
        }
    }
}

impl Drop for Wire {
    #[expect(clippy::disallowed_methods, reason = "the guest's process, which was killed, has it for a moment yet")]
    fn drop(&mut self) {
        for _ in 0..500 {
            if set_persistent(&self.name, false).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// Switches an interface on; a socket for all that comes out of it.
fn hearing(name: &str) -> io::Result<OwnedFd> {
    let all = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    // SAFETY: a plain system call.
    let fd = checked(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut up = request(name, libc::IFF_UP);
    // Before the socket is bound: one that is bound to what is off says so first of all.
    // SAFETY: the descriptor is open, and the kernel reads an ifreq.
    checked(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut up) })?;
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the name is a zero-terminated string, which lives over the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // SAFETY: sockaddr_ll is a C structure of numbers, for which all zeros is a valid value.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    at.sll_protocol = all;
    at.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    let length = libc::socklen_t::try_from(size_of_val(&at)).unwrap();
    // SAFETY: the pointer and the length are those of a local.
    checked(unsafe { libc::bind(fd, (&raw const at).cast(), length) })?;
    Ok(socket)
}
