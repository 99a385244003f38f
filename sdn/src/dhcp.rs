//! A DHCPv4 responder (RFC 2131, options RFC 2132, 3442): a pure function from a guest's frame to the answer's frame.
//!
//! The guest is known by its switch port, so there is nothing to allocate: the lease is the port's own address. The
//! guest is hostile: every length is checked, and only frames that carry the port's own Ethernet address are answered.

use std::net::Ipv4Addr;

use crate::{
    addr::MacAddr,
    compile::{METADATA_ADDR, gateway_mac},
    view::{NetworkView, PortView},
};

/// How long a lease lasts, in seconds. Long: a guest that was frozen for a while should still own its address.
pub const LEASE_S: u32 = 86_400;
/// The largest request that is looked at: an Ethernet frame.
const MAX_FRAME: usize = 9_216;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Smallest BOOTP message (RFC 1542, section 2.1); some clients drop shorter ones.
const MIN_BOOTP: usize = 300;

/// What a port is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The guest's Ethernet address.
    pub mac: MacAddr,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix_len: u8,
    /// The router, which also is the server's name.
    pub gateway: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// MTU in bytes.
    pub mtu: u16,
    /// The guest's name.
    pub hostname: Option<String>,
    /// Seconds.
    pub lease_s: u32,
}

impl Lease {
    /// The lease of a port of a network.
    #[must_use]
    pub fn of(port: &PortView, net: &NetworkView) -> Self {
        Self {
            mac: port.mac,
            ipv4: port.ipv4,
            prefix_len: net.cidr.prefix_len(),
            gateway: net.gateway,
            dns: net.dns.clone(),
            mtu: net.mtu,
            hostname: port.hostname.clone(),
            lease_s: LEASE_S,
        }
    }
}

/// Why a frame gets no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// A field or the whole is too short, too long or contradicts itself.
    #[error("malformed at {0}")]
    Malformed(&'static str),
    /// Not IPv4 UDP from port 68 to 67.
    #[error("not a DHCP request")]
    NotDhcp,
    /// It names another Ethernet address than the port's.
    #[error("the request is for another Ethernet address")]
    NotTheirs,
    /// It went through a relay or is for another server.
    #[error("the request is for another server")]
    NotOurs,
    /// A message that wants no answer (decline, release).
    #[error("message type {0} wants no answer")]
    Silent(u8),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Offer = 2,
    Ack = 5,
    Nak = 6,
}

struct Request<'a> {
    bootp: &'a [u8],
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    ciaddr: Ipv4Addr,
    broadcast: bool,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn addr(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}

fn parse<'a>(frame: &'a [u8], lease: &Lease) -> Result<Request<'a>, NoAnswer> {
    use NoAnswer::*;
    if frame.len() > MAX_FRAME {
        return Err(Malformed("frame"));
    }
    if be16(frame, 12).ok_or(Malformed("Ethernet"))? != 0x0800 {
        return Err(NotDhcp);
    }
    if frame[6..12] != lease.mac.0 {
        return Err(NotTheirs);
    }
    let ip = &frame[14..];
    let first = *ip.first().ok_or(Malformed("IP"))?;
    let header = usize::from(first & 15) * 4;
    let total = usize::from(be16(ip, 2).ok_or(Malformed("IP"))?);
    if first >> 4 != 4 || header < 20 || total < header {
        return Err(Malformed("IP"));
    }
    // What is behind the IP packet is Ethernet's padding.
    let ip = ip.get(..total).ok_or(Malformed("IP length"))?;
    if ip[9] != 17 || be16(ip, 6).is_none_or(|f| f & 0x3fff != 0) {
        return Err(NotDhcp);
    }
    let udp = &ip[header..];
    let len = usize::from(be16(udp, 4).ok_or(Malformed("UDP"))?);
    if be16(udp, 0) != Some(68) || be16(udp, 2) != Some(67) {
        return Err(NotDhcp);
    }
    let bootp = udp.get(8..len).ok_or(Malformed("UDP length"))?;
    let options = bootp.get(240..).ok_or(Malformed("BOOTP"))?;
    if bootp[0] != 1 || bootp[1] != 1 || bootp[2] != 6 || bootp[236..240] != MAGIC {
        return Err(Malformed("BOOTP"));
    }
    if bootp[28..34] != lease.mac.0 {
        return Err(NotTheirs);
    }
    if bootp[24..28] != [0; 4] {
        return Err(NotOurs);
    }
    let (kind, requested, server) = parse_options(options)?;
    Ok(Request {
        bootp,
        kind,
        requested,
        server,
        ciaddr: addr(&bootp[12..16]).ok_or(Malformed("BOOTP"))?,
        broadcast: bootp[10] & 0x80 != 0,
    })
}

/// Message type, requested address, server identifier. Of a repeated option the first counts.
fn parse_options(mut options: &[u8]) -> Result<(u8, Option<Ipv4Addr>, Option<Ipv4Addr>), NoAnswer> {
    let bad = NoAnswer::Malformed("options");
    let (mut kind, mut requested, mut server) = (None, None, None);
    while let Some((code, rest)) = options.split_first() {
        options = rest;
        match code {
            0 => continue,
            255 => break,
            _ => {}
        }
        let (len, rest) = options.split_first().ok_or(bad)?;
        let (value, rest) = rest.split_at_checked(usize::from(*len)).ok_or(bad)?;
        options = rest;
        match code {
            53 if kind.is_none() => kind = Some(*value.first().filter(|_| value.len() == 1).ok_or(bad)?),
            50 if requested.is_none() => requested = Some(addr(value).ok_or(bad)?),
            54 if server.is_none() => server = Some(addr(value).ok_or(bad)?),
            _ => {}
        }
    }
    Ok((kind.ok_or(NoAnswer::Malformed("message type"))?, requested, server))
}

/// The frame that answers a guest's frame.
pub fn respond(frame: &[u8], lease: &Lease) -> Result<Vec<u8>, NoAnswer> {
    let request = parse(frame, lease)?;
    if request.server.is_some_and(|s| s != lease.gateway) {
        return Err(NoAnswer::NotOurs);
    }
    match request.kind {
        1 => Ok(answer(&request, lease, Kind::Offer, lease.ipv4)),
        3 => {
            // Which address is asked for: selecting and init-reboot by option 50, renewing by ciaddr (section 4.3.2).
            let asked = request.requested.unwrap_or(request.ciaddr);
            let kind = if asked == lease.ipv4 { Kind::Ack } else { Kind::Nak };
            Ok(answer(&request, lease, kind, lease.ipv4))
        }
        // Inform: parameters without an address, to the address it has.
        8 if request.ciaddr == lease.ipv4 => Ok(answer(&request, lease, Kind::Ack, Ipv4Addr::UNSPECIFIED)),
        kind => Err(NoAnswer::Silent(kind)),
    }
}

fn answer(request: &Request<'_>, lease: &Lease, kind: Kind, yiaddr: Ipv4Addr) -> Vec<u8> {
    let mut b = vec![0; 240];
    b[..4].copy_from_slice(&[2, 1, 6, 0]);
    b[4..8].copy_from_slice(&request.bootp[4..8]);
    b[10..12].copy_from_slice(&request.bootp[10..12]);
    if kind != Kind::Nak {
        b[12..16].copy_from_slice(&request.ciaddr.octets());
        b[16..20].copy_from_slice(&yiaddr.octets());
    }
    b[28..44].copy_from_slice(&request.bootp[28..44]);
    b[236..240].copy_from_slice(&MAGIC);
    let mut option = |code: u8, value: &[u8]| {
        b.push(code);
        b.push(value.len() as u8);
        b.extend_from_slice(value);
    };
    option(53, &[kind as u8]);
    option(54, &lease.gateway.octets());
    if kind != Kind::Nak {
        if !yiaddr.is_unspecified() {
            option(51, &lease.lease_s.to_be_bytes());
        }
        option(1, &u32::MAX.checked_shl(32 - u32::from(lease.prefix_len)).unwrap_or(0).to_be_bytes());
        option(3, &lease.gateway.octets());
        let dns: Vec<u8> = lease.dns.iter().take(8).flat_map(Ipv4Addr::octets).collect();
        if !dns.is_empty() {
            option(6, &dns);
        }
        if let Some(name) = &lease.hostname {
            option(12, &name.as_bytes()[..name.len().min(63)]);
        }
        option(26, &lease.mtu.to_be_bytes());
        // Who reads classless routes must ignore the router option, so the default route is among them. The metadata
        // service gets a route of its own, which holds when the guest's default route leads elsewhere.
        let mut routes = vec![32];
        routes.extend(METADATA_ADDR.octets());
        routes.extend(lease.gateway.octets());
        routes.push(0);
        routes.extend(lease.gateway.octets());
        option(121, &routes);
    }
    b.push(255);
    b.resize(b.len().max(MIN_BOOTP), 0);
    let to_all = request.broadcast || kind == Kind::Nak;
    let dst = match () {
        () if to_all => Ipv4Addr::BROADCAST,
        () if !request.ciaddr.is_unspecified() => request.ciaddr,
        () => lease.ipv4,
    };
    let dst_mac = if to_all { MacAddr::BROADCAST } else { lease.mac };
    frame(dst_mac, lease.gateway, dst, &b)
}

fn frame(dst_mac: MacAddr, src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let udp_len = (8 + payload.len()) as u16;
    let mut out = Vec::with_capacity(42 + payload.len());
    out.extend(dst_mac.0);
    out.extend(gateway_mac().0);
    out.extend([0x08, 0x00]);
    let mut ip = vec![0x45, 0xc0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(src.octets());
    ip.extend(dst.octets());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut udp = Vec::with_capacity(payload.len() + 8);
    udp.extend(67_u16.to_be_bytes());
    udp.extend(68_u16.to_be_bytes());
    udp.extend(udp_len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend_from_slice(payload);
    let pseudo = [&src.octets()[..], &dst.octets()[..], &[0, 17][..], &udp_len.to_be_bytes()[..]].concat();
    let sum = match checksum(&[&pseudo, &udp]) {
        // A sum of zero would mean that there is none.
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    out.extend(ip);
    out.extend(udp);
    out
}

/// The Internet checksum (RFC 1071) over parts of even length but for the last.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u32 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
        }
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease() -> Lease {
        Lease {
            mac: "02:00:00:00:00:07".parse().unwrap(),
            ipv4: Ipv4Addr::new(10, 0, 0, 7),
            prefix_len: 24,
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            dns: vec![Ipv4Addr::new(10, 0, 0, 2)],
            mtu: 1450,
            hostname: Some("web".into()),
            lease_s: 3600,
        }
    }

    fn request(kind: u8, extra: &[u8], change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut b = vec![0; 240];
        b[..4].copy_from_slice(&[1, 1, 6, 0]);
        b[4..8].copy_from_slice(&[1, 2, 3, 4]);
        b[28..34].copy_from_slice(&lease().mac.0);
        b[236..240].copy_from_slice(&MAGIC);
        b.extend([53, 1, kind]);
        b.extend_from_slice(extra);
        b.push(255);
        change(&mut b);
        let mut made = frame(MacAddr::BROADCAST, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, &b);
        made[6..12].copy_from_slice(&lease().mac.0);
        made[34..38].copy_from_slice(&[0, 68, 0, 67]);
        made
    }

    fn option(frame: &[u8], wanted: u8) -> Option<Vec<u8>> {
        let mut options = &frame[42 + 240..];
        while options[0] != 255 {
            let len = usize::from(options[1]);
            if options[0] == wanted {
                return Some(options[2..2 + len].to_vec());
            }
            options = &options[2 + len..];
        }
        None
    }

    #[test]
    fn discover_is_offered_the_ports_own_address() {
        let answer = respond(&request(1, &[], |_| {}), &lease()).unwrap();
        assert_eq!(option(&answer, 53).unwrap(), [2]);
        assert_eq!(answer[42 + 16..42 + 20], [10, 0, 0, 7]);
        assert_eq!(option(&answer, 1).unwrap(), [255, 255, 255, 0]);
        assert_eq!(option(&answer, 26).unwrap(), 1450_u16.to_be_bytes());
        assert_eq!(option(&answer, 121).unwrap(), [32, 169, 254, 169, 254, 10, 0, 0, 1, 0, 10, 0, 0, 1]);
        assert_eq!(option(&answer, 12).unwrap(), b"web");
        assert_eq!(answer[46..50], [1, 2, 3, 4]);
        // Both checksums hold: the sum over what they cover is zero.
        assert_eq!(checksum(&[&answer[14..34]]), 0);
        let len = u16::try_from(answer.len() - 34).unwrap().to_be_bytes();
        assert_eq!(checksum(&[&answer[26..34], &[0, 17], &len, &answer[34..]]), 0);
    }

    #[test]
    fn only_its_own_address_is_acknowledged() {
        let kind = |extra: &[u8], ciaddr: [u8; 4]| {
            let r = request(3, extra, |b| b[12..16].copy_from_slice(&ciaddr));
            respond(&r, &lease()).map(|a| option(&a, 53).unwrap()[0])
        };
        assert_eq!(kind(&[50, 4, 10, 0, 0, 7], [0; 4]), Ok(5));
        assert_eq!(kind(&[50, 4, 10, 0, 0, 8], [0; 4]), Ok(6));
        assert_eq!(kind(&[], [10, 0, 0, 7]), Ok(5));
        assert_eq!(kind(&[], [0; 4]), Ok(6));
        assert_eq!(kind(&[50, 4, 10, 0, 0, 7, 54, 4, 10, 0, 0, 9], [0; 4]), Err(NoAnswer::NotOurs));
    }

    #[test]
    fn others_addresses_relays_and_releases_get_no_answer() {
        let spoofed = request(1, &[], |b| b[33] = 9);
        assert_eq!(respond(&spoofed, &lease()), Err(NoAnswer::NotTheirs));
        let relayed = request(1, &[], |b| b[27] = 1);
        assert_eq!(respond(&relayed, &lease()), Err(NoAnswer::NotOurs));
        assert_eq!(respond(&request(7, &[], |_| {}), &lease()), Err(NoAnswer::Silent(7)));
        let short = request(1, &[50, 200, 1], |b| {
            b.pop();
        });
        assert_eq!(respond(&short, &lease()), Err(NoAnswer::Malformed("options")));
    }

    #[test]
    fn mutated_requests_are_answered_or_not_and_never_for_another() {
        const SEED: u64 = 0x0d4c_9001;
        println!("seed {SEED:#x}");
        let mut dice = SEED;
        let mut roll = |below: usize| {
            // xorshift64*
            dice ^= dice >> 12;
            dice ^= dice << 25;
            dice ^= dice >> 27;
            (dice.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
        };
        let bases = [
            request(1, &[], |_| {}),
            request(3, &[50, 4, 10, 0, 0, 7, 54, 4, 10, 0, 0, 1, 12, 3, b'a', b'b', b'c'], |_| {}),
        ];
        let (mut answered, mut silent) = (0, 0);
        for n in 0..20_000 {
            let mut mutant = bases[n % 2].clone();
            for _ in 0..=roll(4) {
                let at = roll(mutant.len());
                match roll(3) {
                    0 => mutant[at] = roll(256) as u8,
                    1 => mutant.truncate(at.max(1)),
                    _ => mutant.insert(at, roll(256) as u8),
                }
            }
            match respond(&mutant, &lease()) {
                Ok(answer) => {
                    answered += 1;
                    assert!(answer.len() <= 1000);
                    let given = &answer[42 + 16..42 + 20];
                    assert!(given == [10, 0, 0, 7] || given == [0; 4]);
                    assert_eq!(answer[42 + 28..42 + 34], lease().mac.0);
                }
                Err(_) => silent += 1,
            }
        }
        assert!(answered > 500 && silent > 500, "{answered} answered, {silent} silent");
    }
}
