//! A DHCP client (RFC 2131) on a packet socket: it hears answers before the interface has an address, however they are addressed.
//!
//! [`message`] and [`parse`] are pure; the answer comes over a network and may be anything.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::clock::boot_ms;
use crate::net::Interface;
use crate::sys::check;

const MAGIC: [u8; 4] = [99, 130, 83, 99];
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
/// Fixed part of a message, up to the magic number.
const FIXED_BYTES: usize = 236;
const ANSWER_BUDGET_MS: u64 = 3000;

/// What a server has given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Its network's prefix length.
    pub prefix: u8,
    /// The router.
    pub router: Option<Ipv4Addr>,
    /// The MTU that fits.
    pub mtu: Option<u16>,
    /// Routes of RFC 3442: destination, prefix length, gateway (0.0.0.0: on the link).
    pub routes: Vec<(Ipv4Addr, u8, Ipv4Addr)>,
    /// Seconds for which it holds.
    pub lease_s: u32,
    server: Ipv4Addr,
    kind: u8,
}

/// Ones' complement sum (RFC 1071).
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// An IP packet with a request, from nobody to everybody.
fn message(kind: u8, transaction: u32, mac: [u8; 6], want: Option<(Ipv4Addr, Ipv4Addr)>) -> Vec<u8> {
    let mut dhcp = vec![0_u8; FIXED_BYTES];
    // Request, Ethernet, 6 bytes of address; the answer shall be broadcast.
    dhcp[..3].copy_from_slice(&[1, 1, 6]);
    dhcp[4..8].copy_from_slice(&transaction.to_be_bytes());
    dhcp[10] = 0x80;
    dhcp[28..34].copy_from_slice(&mac);
    dhcp.extend(MAGIC);
    dhcp.extend([53, 1, kind]);
    if let Some((address, server)) = want {
        dhcp.extend([50, 4]);
        dhcp.extend(address.octets());
        dhcp.extend([54, 4]);
        dhcp.extend(server.octets());
    }
    // Mask, router, DNS, MTU, lease, classless routes.
    dhcp.extend([55, 6, 1, 3, 6, 26, 51, 121, 255]);
    // Some servers want the size of a BOOTP message at least.
    dhcp.resize(dhcp.len().max(300), 0);

    let udp_length = u16::try_from(8 + dhcp.len()).unwrap_or(u16::MAX);
    let mut udp = Vec::from([0, 68, 0, 67]);
    udp.extend(udp_length.to_be_bytes());
    udp.extend([0, 0]);
    let pseudo = [&[0, 0, 0, 0, 255, 255, 255, 255, 0, 17][..], &udp_length.to_be_bytes()].concat();
    let sum = checksum(&[&pseudo, &udp, &dhcp]);
    udp[6..8].copy_from_slice(&sum.to_be_bytes());

    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_length).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [ip, udp, dhcp].concat()
}

/// Reads an answer to the request `transaction` out of an IP packet.
fn parse(packet: &[u8], transaction: u32, mac: [u8; 6]) -> Option<Lease> {
    if packet.first()? >> 4 != 4 || *packet.get(9)? != 17 {
        return None;
    }
    let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    let udp = packet.get(..total)?.get(usize::from(packet[0] & 15) * 4..)?;
    if udp.get(..4)? != [0, 67, 0, 68] {
        return None;
    }
    let dhcp = udp.get(8..)?;
    if dhcp.get(..3)? != [2, 1, 6]
        || dhcp.get(4..8)? != transaction.to_be_bytes()
        || dhcp.get(28..34)? != mac
        || dhcp.get(FIXED_BYTES..FIXED_BYTES + 4)? != MAGIC
    {
        return None;
    }
    let address = four(dhcp.get(16..20)?)?;
    let mut lease = Lease {
        address,
        prefix: 24,
        router: None,
        mtu: None,
        routes: Vec::new(),
        lease_s: 3600,
        server: Ipv4Addr::UNSPECIFIED,
        kind: 0,
    };
    let mut options = &dhcp[FIXED_BYTES + 4..];
    loop {
        match options {
            [] | [255, ..] => break,
            [0, rest @ ..] => options = rest,
            [code, length, rest @ ..] => {
                let value = rest.get(..usize::from(*length))?;
                lease.take(*code, value)?;
                options = &rest[value.len()..];
            }
            _ => return None,
        }
    }
    Some(lease)
}

fn four(bytes: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(..4)?).ok()?))
}

impl Lease {
    fn take(&mut self, code: u8, value: &[u8]) -> Option<()> {
        match code {
            1 => {
                let mask = u32::from(four(value)?);
                self.prefix =
                    u8::try_from(mask.leading_ones()).ok().filter(|ones| mask.count_ones() == u32::from(*ones))?;
            }
            3 => self.router = Some(four(value)?),
            26 => self.mtu = Some(u16::from_be_bytes(value.try_into().ok()?)).filter(|mtu| (576..=9000).contains(mtu)),
            51 => self.lease_s = u32::from_be_bytes(value.try_into().ok()?).max(60),
            53 => self.kind = *value.first()?,
            54 => self.server = four(value)?,
            121 => self.routes = parse_routes(value)?,
            _ => {}
        }
        Some(())
    }
}

fn parse_routes(mut value: &[u8]) -> Option<Vec<(Ipv4Addr, u8, Ipv4Addr)>> {
    let mut routes = Vec::new();
    while let [prefix, rest @ ..] = value {
        let significant = usize::from(prefix.div_ceil(8));
        let mut to = [0; 4];
        to.get_mut(..significant)?.copy_from_slice(rest.get(..significant)?);
        routes.push((Ipv4Addr::from(to), *prefix, four(rest.get(significant..)?)?));
        value = &rest[significant + 4..];
    }
    Some(routes)
}

/// Asks once on this interface; none when no server answers in time.
pub fn ask(interface: &Interface, transaction: u32) -> io::Result<Option<Lease>> {
    let (index, mac) = (interface.index()?, interface.mac()?);
    let socket = open(index)?;
    send(&socket, index, &message(DISCOVER, transaction, mac, None))?;
    let Some(offer) = receive(&socket, transaction, mac, OFFER)? else { return Ok(None) };
    send(&socket, index, &message(REQUEST, transaction, mac, Some((offer.address, offer.server))))?;
    receive(&socket, transaction, mac, ACK)
}

const ETH_P_IP: u16 = 0x0800;

fn open(index: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    let raw = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: `raw` was just opened and is kept nowhere else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let address = link_address(index);
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a sockaddr_ll of the length given.
    check(unsafe { libc::bind(raw, (&raw const address).cast(), length) })?;
    Ok(socket)
}

fn link_address(index: i32) -> libc::sockaddr_ll {
    // SAFETY: all-zero is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_IP.to_be();
    address.sll_ifindex = index;
    address.sll_halen = 6;
    address.sll_addr[..6].fill(0xff);
    address
}

fn send(socket: &OwnedFd, index: i32, packet: &[u8]) -> io::Result<()> {
    let address = link_address(index);
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: packet and address are valid for the lengths given.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, (&raw const address).cast(), length)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive(socket: &OwnedFd, transaction: u32, mac: [u8; 6], kind: u8) -> io::Result<Option<Lease>> {
    let end = boot_ms() + ANSWER_BUDGET_MS;
    let mut buffer = [0_u8; 2048];
    loop {
        let left = i32::try_from(end.saturating_sub(boot_ms())).unwrap_or(0);
        let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd for the duration of the call.
        if unsafe { libc::poll(&raw mut poll, 1, left) } <= 0 {
            return Ok(None);
        }
        // SAFETY: the buffer is valid for its length.
        let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let Ok(got) = usize::try_from(got) else { return Err(io::Error::last_os_error()) };
        match parse(&buffer[..got], transaction, mac) {
            Some(lease) if lease.kind == kind => return Ok(Some(lease)),
            Some(lease) if lease.kind == NAK => return Ok(None),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

    /// An answer as a server would give it.
    fn answer(options: &[u8]) -> Vec<u8> {
        let mut packet = message(DISCOVER, 77, MAC, None);
        packet.truncate(28 + FIXED_BYTES + 4);
        packet[20..24].copy_from_slice(&[0, 67, 0, 68]);
        packet[28] = 2;
        packet[28 + 16..28 + 20].copy_from_slice(&[10, 1, 2, 3]);
        packet.extend(options);
        let length = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        packet
    }

    const OPTIONS: &[u8] = &[
        53, 1, 5, 1, 4, 255, 255, 254, 0, 3, 4, 10, 1, 2, 1, 26, 2, 5, 170, 51, 4, 0, 0, 14, 16, 54, 4, 10, 1, 2, 1,
        121, 14, 32, 169, 254, 169, 254, 0, 0, 0, 0, 0, 10, 1, 2, 1, 255, 255,
    ];

    #[test]
    fn answers_are_read() {
        // Route option of 14 bytes: one host route on the link (9) and the default route (5).
        let lease = parse(&answer(OPTIONS), 77, MAC).unwrap();
        assert_eq!((lease.address, lease.prefix), (Ipv4Addr::new(10, 1, 2, 3), 23));
        assert_eq!((lease.router, lease.mtu, lease.lease_s), (Some(Ipv4Addr::new(10, 1, 2, 1)), Some(1450), 3600));
        let metadata = (Ipv4Addr::new(169, 254, 169, 254), 32, Ipv4Addr::UNSPECIFIED);
        assert_eq!(lease.routes, [metadata, (Ipv4Addr::UNSPECIFIED, 0, Ipv4Addr::new(10, 1, 2, 1))]);
        assert_eq!(lease.kind, ACK);
        assert_eq!(parse(&answer(OPTIONS), 78, MAC), None);
        assert_eq!(parse(&answer(OPTIONS), 77, [0; 6]), None);
    }

    #[test]
    fn damaged_answers_do_no_harm() {
        let good = answer(OPTIONS);
        let mut random = 0x5eed_u64;
        println!("seed {random:#x}");
        for _ in 0..200_000 {
            let mut bad = good.clone();
            for _ in 0..3 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = usize::try_from(random >> 33).unwrap() % bad.len();
                bad[at] = random.to_le_bytes()[3];
            }
            let cut = usize::try_from(random >> 40).unwrap() % (bad.len() + 1);
            let _ = parse(&bad, 77, MAC);
            let _ = parse(&bad[..cut], 77, MAC);
        }
    }

    #[test]
    fn requests_are_well_formed() {
        let packet = message(REQUEST, 7, MAC, Some((Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::new(10, 0, 0, 1))));
        assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
        assert_eq!(checksum(&[&packet[..20]]), 0, "the IP header's sum");
        let pseudo = [&packet[12..20], &[0, 17], &packet[24..26]].concat();
        assert_eq!(checksum(&[&pseudo, &packet[20..]]), 0, "the UDP sum");
    }
}
