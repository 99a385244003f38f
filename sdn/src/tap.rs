//! Guests' interfaces on the host: persistent taps (Linux' Documentation/networking/tuntap.rst), and what the host's
//! own network stack may do with them: nothing.
//!
//! Open vSwitch's userspace datapath reads a tap by a packet socket, so the host's kernel sees each frame too and would
//! answer ARP for the host's addresses and take in what is sent to them. [`create`] therefore seals the tap: strict
//! reverse-path filter (a tap has no route, so no source passes), no ARP answers, no IPv6, and, where the `nft` command
//! works, an ingress chain that drops everything (packet sockets come before it). The kernel datapath takes each frame
//! itself, before the host's stack and *after* that chain: there is none then, or the guest would have no network.
//!
//! All functions block; call them on a blocking thread. They act in the network namespace of the calling thread.

use std::{
    ffi::{OsStr, c_short},
    fs,
    io::{self, Write},
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use supercloud_ids::PortId;

/// What taps' names start with.
pub const TAP_PREFIX: &str = "sct";
/// Where the kernel shows the interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Why an interface could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// See [`is_interface_name`].
    #[error("'{0}' is not a name for an interface")]
    Name(String),
    /// A system call failed.
    #[error("{action} of interface {name} failed")]
    Os {
        /// What was tried.
        action: &'static str,
        /// The interface.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Who takes a tap's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// The switch's own process, by a packet socket: the kernel sees them as well.
    Userspace,
    /// The kernel's datapath.
    Kernel,
}

/// The name of a port's tap: 13 characters.
#[must_use]
pub fn tap_name(port: PortId) -> String {
    format!("{TAP_PREFIX}{}", port.short())
}

/// Whether an interface can be called so here: 1 to 15 letters, digits, `-` and `_`; not first a `-`, which programs take for an option.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    (1..libc::IFNAMSIZ).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn ifreq(name: &str) -> Result<libc::ifreq, TapError> {
    if !is_interface_name(name) {
        return Err(TapError::Name(name.chars().take(64).collect()));
    }
    // SAFETY: ifreq is a C structure of numbers and bytes, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl(fd: &OwnedFd, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the descriptor is open, every code used in this module takes a pointer to an ifreq, and the kernel
    // writes no further than its end.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(request)) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn ioctl_number(fd: &OwnedFd, code: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the codes used with this function take a number and no pointer.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), code, value) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; the result is checked before it is owned.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn failed<'a>(action: &'static str, name: &'a str) -> impl Fn(io::Error) -> TapError + 'a {
    move |source| TapError::Os { action, name: name.into(), source }
}

fn tun() -> io::Result<OwnedFd> {
    fs::File::options().read(true).write(true).open("/dev/net/tun").map(OwnedFd::from)
}

/// Attaches to the tap, making it when it is not there.
fn attach(name: &str) -> Result<OwnedFd, TapError> {
    let mut request = ifreq(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as c_short;
    let fd = tun().map_err(failed("opening /dev/net/tun", name))?;
    ioctl(&fd, libc::TUNSETIFF, &mut request).map_err(failed("attaching", name))?;
    Ok(fd)
}

/// Whether the interface is a Xen domain's card, by the device that the kernel says it belongs to: `.../vif-<domain>-<index>`.
fn is_xen_card(interfaces: &Path, name: &str) -> bool {
    let device = fs::read_link(interfaces.join(name).join("device"));
    let device = device.as_deref().ok().and_then(Path::file_name).and_then(OsStr::to_str);
    let numbers = device.and_then(|device| device.strip_prefix("vif-")?.split_once('-'));
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    numbers.is_some_and(|(domain, index)| is_number(domain) && is_number(index))
}

/// Makes a persistent tap (or takes the one that is there), seals it against the host's network stack, sets its MTU and
/// brings it up. `owner` is the uid that may open it besides root. A tap in use by a running guest is left as it is,
/// but for MTU and seal.
pub fn create(name: &str, mtu: u16, owner: Option<u32>, reader: Reader) -> Result<(), TapError> {
    match attach(name) {
        Ok(fd) => {
            if let Some(uid) = owner {
                ioctl_number(&fd, libc::TUNSETOWNER, uid.into()).map_err(failed("TUNSETOWNER", name))?;
            }
            ioctl_number(&fd, libc::TUNSETPERSIST, 1).map_err(failed("TUNSETPERSIST", name))?;
        }
        // A guest holds it.
        Err(TapError::Os { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) && exists(name) => {}
        // It is no tap: the Xen back end has put a domain's card in its place. Anything else is nobody's we know.
        Err(TapError::Os { source, .. })
            if source.raw_os_error() == Some(libc::EINVAL) && is_xen_card(Path::new(INTERFACES), name) => {}
        Err(other) => return Err(other),
    }
    seal(name, reader)?;
    set_up(name, Some(mtu))
}

/// Removes a tap. One that is not there counts as removed; one that a guest holds goes when the guest does.
pub fn remove(name: &str) -> Result<(), TapError> {
    unseal(name);
    if !exists(name) {
        return Ok(());
    }
    match attach(name) {
        Ok(fd) => ioctl_number(&fd, libc::TUNSETPERSIST, 0).map_err(failed("TUNSETPERSIST", name)),
        Err(other) if exists(name) => Err(other),
        Err(_) => Ok(()),
    }
}

/// Whether there is such an interface in the network namespace of this thread.
#[must_use]
pub fn exists(name: &str) -> bool {
    let Ok(mut request) = ifreq(name) else { return false };
    control_socket().and_then(|fd| ioctl(&fd, libc::SIOCGIFINDEX, &mut request)).is_ok()
}

/// Brings an interface up, with this MTU where one is given.
pub fn set_up(name: &str, mtu: Option<u16>) -> Result<(), TapError> {
    let fd = control_socket().map_err(failed("opening a socket", name))?;
    if let Some(mtu) = mtu {
        let mut request = ifreq(name)?;
        request.ifr_ifru.ifru_mtu = mtu.into();
        ioctl(&fd, libc::SIOCSIFMTU, &mut request).map_err(failed("setting the MTU", name))?;
    }
    let mut request = ifreq(name)?;
    ioctl(&fd, libc::SIOCGIFFLAGS, &mut request).map_err(failed("reading the flags", name))?;
    // SAFETY: SIOCGIFFLAGS has just filled in this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
    ioctl(&fd, libc::SIOCSIFFLAGS, &mut request).map_err(failed("bringing up", name))
}

/// Gives an interface its one IPv4 address.
pub fn set_ipv4(name: &str, addr: Ipv4Addr, prefix_len: u8) -> Result<(), TapError> {
    let fd = control_socket().map_err(failed("opening a socket", name))?;
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0));
    for (code, addr) in [(libc::SIOCSIFADDR, addr), (libc::SIOCSIFNETMASK, mask)] {
        let mut request = ifreq(name)?;
        let mut data = [0 as libc::c_char; 14];
        // sockaddr_in: port (2), address (4), padding.
        for (to, from) in data[2..6].iter_mut().zip(addr.octets()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data };
        ioctl(&fd, code, &mut request).map_err(failed("setting the address", name))?;
    }
    Ok(())
}

fn seal(name: &str, reader: Reader) -> Result<(), TapError> {
    for (family, setting, value) in [
        ("ipv6", "disable_ipv6", "1"),
        ("ipv4", "arp_ignore", "8"),
        ("ipv4", "rp_filter", "1"),
        ("ipv4", "accept_local", "0"),
        ("ipv4", "forwarding", "0"),
    ] {
        let folder: PathBuf = Path::new("/proc/sys/net").join(family).join("conf").join(name);
        // A kernel without IPv6 has no such folder, and needs no such setting.
        if folder.exists() {
            fs::write(folder.join(setting), value).map_err(failed("sealing", name))?;
        }
    }
    if reader == Reader::Kernel {
        unseal(name);
        return Ok(());
    }
    let rules = format!(
        "add table netdev {table}\ndelete table netdev {table}\ntable netdev {table} {{\n chain ingress {{\n  type filter \
         hook ingress device \"{name}\" priority 0; policy drop;\n }}\n}}\n",
        table = table(name)
    );
    if let Err(err) = nft(&rules) {
        tracing::debug!(%err, name, "no nft: the tap is sealed by settings alone");
    }
    Ok(())
}

/// Seals a tap that is there anew, for another reader: the switch went to another datapath.
///
/// # Errors
/// When a setting cannot be written.
pub fn hand_to(name: &str, reader: Reader) -> Result<(), TapError> {
    if exists(name) { seal(name, reader) } else { Ok(()) }
}

fn unseal(name: &str) {
    // Made first, so that removing one that is not there is no error.
    let _ = nft(&format!("add table netdev {table}\ndelete table netdev {table}\n", table = table(name)));
}

fn table(name: &str) -> String {
    format!("seal_{}", name.replace('-', "_"))
}

fn nft(rules: &str) -> io::Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(rules.as_bytes())?;
    }
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("nft ended with {status}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_plain() {
        let name = tap_name(PortId::generate());
        assert!(name.len() <= 15 && ifreq(&name).is_ok(), "{name}");
        for bad in ["", "0123456789abcdef", "a/b", "a b", "ä", "a%d"] {
            assert!(ifreq(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_domains_card_stands_for_a_tap() {
        let interfaces = tempfile::tempdir().unwrap();
        for (name, device) in [
            ("sct0", "../../../vif-7-0"),
            ("sct1", "../../../virtio0"),
            ("sct2", "../../../vif-7"),
            ("sct3", "../../../vif-a-0"),
            ("sct4", "vif-7-0/other"),
        ] {
            let place = interfaces.path().join(name);
            fs::create_dir(&place).unwrap();
            std::os::unix::fs::symlink(device, place.join("device")).unwrap();
        }
        // A bridge or a bond has no device.
        fs::create_dir(interfaces.path().join("sct5")).unwrap();
        let cards: Vec<_> = (0..7).filter(|at| is_xen_card(interfaces.path(), &format!("sct{at}"))).collect();
        assert_eq!(cards, [0]);
    }
}
