//! An interface's address, MTU and routes, by the old ioctls (netdevice(7)), which need no netlink library.

use std::io;
use std::mem::zeroed;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::sys::check;

/// A network interface by its name.
#[derive(Debug)]
pub struct Interface {
    name: String,
    control: OwnedFd,
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all-zero is a valid sockaddr_in.
    let mut inet: libc::sockaddr_in = unsafe { zeroed() };
    inet.sin_family = libc::AF_INET as libc::sa_family_t;
    inet.sin_addr.s_addr = u32::from_ne_bytes(address.octets());
    // SAFETY: both are 16 bytes of plain data, and sockaddr_in is made to be read as sockaddr.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) }
}

/// The netmask of a prefix length.
pub fn mask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0))
}

impl Interface {
    /// The interface of this name, which need not be there yet.
    pub fn new(name: &str) -> io::Result<Self> {
        // SAFETY: plain system call.
        let raw = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
        // SAFETY: `raw` was just opened and is kept nowhere else.
        let control = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { name: name.to_owned(), control })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: all-zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { zeroed() };
        // One byte stays zero.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        request
    }

    fn call(&self, operation: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every operation used here reads or writes one ifreq.
        check(unsafe { libc::ioctl(self.control.as_raw_fd(), operation, &raw mut *request) }).map(drop)
    }

    /// Its index.
    pub fn index(&self) -> io::Result<i32> {
        let mut request = self.request();
        self.call(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the call has filled in the index.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> io::Result<[u8; 6]> {
        let mut request = self.request();
        self.call(libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: the call has filled in the address.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        Ok(std::array::from_fn(|at| data[at].cast_unsigned()))
    }

    /// Switches it on.
    pub fn up(&self) -> io::Result<()> {
        let mut request = self.request();
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the call has filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        self.call(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Sets its MTU.
    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_mtu = i32::from(mtu);
        self.call(libc::SIOCSIFMTU, &mut request)
    }

    /// Gives it an address with a netmask.
    pub fn set_address(&self, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.call(libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = socket_address(mask(prefix));
        self.call(libc::SIOCSIFNETMASK, &mut request)
    }

    /// Adds a route; one that is there already is fine. Without a gateway the destination is on the link.
    pub fn add_route(&self, to: Ipv4Addr, prefix: u8, gateway: Option<Ipv4Addr>) -> io::Result<()> {
        // SAFETY: all-zero is a valid rtentry.
        let mut route: libc::rtentry = unsafe { zeroed() };
        let mask = mask(prefix);
        route.rt_dst = socket_address(Ipv4Addr::from(u32::from(to) & u32::from(mask)));
        route.rt_genmask = socket_address(mask);
        route.rt_flags = libc::RTF_UP;
        if let Some(gateway) = gateway {
            route.rt_gateway = socket_address(gateway);
            route.rt_flags |= libc::RTF_GATEWAY;
        }
        let name = std::ffi::CString::new(self.name.as_str())?;
        route.rt_dev = name.as_ptr().cast_mut();
        // SAFETY: `route` and the name that it points to outlive the call, which only reads them.
        match check(unsafe { libc::ioctl(self.control.as_raw_fd(), libc::SIOCADDRT, &raw const route) }) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        assert_eq!(mask(0), Ipv4Addr::UNSPECIFIED);
        assert_eq!(mask(24), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(mask(32), Ipv4Addr::BROADCAST);
    }

    #[test]
    fn the_loopback_has_an_index() {
        assert!(Interface::new("lo").unwrap().index().unwrap() > 0);
        assert!(Interface::new("no-such-one").unwrap().index().is_err());
    }
}
