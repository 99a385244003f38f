//! The pure part of the WAN: ports, learned addresses, links with their queues. No clock, no sockets.
//!
//! The link is the classic one of network emulators: a token-free serializer (`free_at`, the instant at which the last
//! accepted frame will have left) followed by a constant delay. A frame is dropped when it is lost at random, when more bytes than
//! the queue holds are waiting for the serializer, or when the link is cut. Frames of a link never overtake each other,
//! also when its delay is changed while they are under way. Cutting a link drops what is under way: after a cut
//! nothing arrives any more.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::addressing::Segment;
use crate::spec::LinkShape;

/// Bytes that one link holds at most, whatever its delay: a bound on memory.
const HELD_BYTES_CAP: u64 = 64 << 20;

/// Bytes on the wire around an Ethernet frame: preamble, checksum, gap.
const FRAME_OVERHEAD: u64 = 24;

/// Ethernet addresses remembered per segment; beyond that, frames to unknown ones go to every port.
const LEARNED_CAP: usize = 4096;

/// One port of the WAN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// The interface in the WAN's namespace.
    pub interface: String,
    /// Index of the site in [`FabricSpec::sites`].
    pub site: usize,
    /// The segment that it belongs to.
    pub segment: Segment,
}

/// A link between two sites.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PairSpec {
    /// One site's index.
    pub a: usize,
    /// The other's.
    pub b: usize,
    /// Both directions.
    pub shape: LinkShape,
}

/// What a fabric is built from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FabricSpec {
    /// Names of the sites.
    pub sites: Vec<String>,
    /// The ports.
    pub ports: Vec<PortSpec>,
    /// Links that differ from the default.
    pub links: Vec<PairSpec>,
    /// Seed of the losses.
    pub seed: u64,
}

/// What happened on one direction of a link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames delivered.
    pub sent_frames: u64,
    /// Bytes delivered.
    pub sent_bytes: u64,
    /// Frames lost at random.
    pub lost_frames: u64,
    /// Frames dropped because the queue was full.
    pub overflow_frames: u64,
    /// Frames dropped because the link or a site was cut.
    pub cut_frames: u64,
    /// Of the delivered ones: guests' frames in tunnels, as everybody on the way can read them (VXLAN).
    pub plain_tunnel_frames: u64,
    /// Of the delivered ones: what WireGuard has encrypted.
    pub encrypted_frames: u64,
}

/// A frame on its way.
#[derive(Debug)]
struct Flying {
    due_ns: u64,
    port: usize,
    frame: Vec<u8>,
}

/// One direction of a link.
#[derive(Debug)]
struct Link {
    shape: LinkShape,
    up: bool,
    free_at_ns: u64,
    last_due_ns: u64,
    held_bytes: u64,
    flying: VecDeque<Flying>,
    counters: Counters,
}

impl Link {
    fn new(shape: LinkShape) -> Self {
        let flying = VecDeque::new();
        Self { shape, up: true, free_at_ns: 0, last_due_ns: 0, held_bytes: 0, flying, counters: Counters::default() }
    }

    fn offer(&mut self, now_ns: u64, port: usize, frame: &[u8], random: &mut Random) {
        let len = frame.len() as u64;
        if !self.up {
            self.counters.cut_frames += 1;
            return;
        }
        if self.shape.loss_ppm > 0 && random.below_million() < self.shape.loss_ppm {
            self.counters.lost_frames += 1;
            return;
        }
        self.free_at_ns = self.free_at_ns.max(now_ns);
        let rate = u64::from(self.shape.rate_mbit);
        // Mbit/s times ns is 1/1000 of a bit.
        let backlog = (self.free_at_ns - now_ns).saturating_mul(rate) / 8000;
        let full = rate > 0 && backlog + len > self.shape.queue_bytes;
        if full || self.held_bytes + len > HELD_BYTES_CAP {
            self.counters.overflow_frames += 1;
            return;
        }
        self.free_at_ns += ((len + FRAME_OVERHEAD) * 8000).checked_div(rate).unwrap_or(0);
        let due_ns = (self.free_at_ns + half_rtt_ns(&self.shape)).max(self.last_due_ns);
        self.last_due_ns = due_ns;
        self.held_bytes += len;
        self.flying.push_back(Flying { due_ns, port, frame: frame.to_vec() });
    }

    fn pop_due(&mut self, now_ns: u64) -> Option<Flying> {
        if self.flying.front()?.due_ns > now_ns {
            return None;
        }
        let flying = self.flying.pop_front()?;
        let len = flying.frame.len() as u64;
        self.held_bytes -= len;
        self.counters.sent_frames += 1;
        self.counters.sent_bytes += len;
        match udp_port(&flying.frame) {
            Some(VXLAN_PORT) => self.counters.plain_tunnel_frames += 1,
            Some(WIREGUARD_PORT) => self.counters.encrypted_frames += 1,
            _ => {}
        }
        Some(flying)
    }

    fn set_up(&mut self, up: bool) {
        self.up = up;
        if !up {
            self.counters.cut_frames += self.flying.len() as u64;
            self.flying.clear();
            self.held_bytes = 0;
            self.free_at_ns = 0;
            self.last_due_ns = 0;
        }
    }
}

fn half_rtt_ns(shape: &LinkShape) -> u64 {
    // The range was checked: 0..=10,000 ms.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= value <= 5e9")]
    {
        (shape.rtt_ms * 500_000.0) as u64
    }
}

/// A small generator for losses (xorshift64*, Vigna 2014): the same seed gives the same losses.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below_million(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        u32::try_from(high % 1_000_000).unwrap_or(0)
    }
}

/// A request that names what is not there.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FabricError {
    /// No such site.
    #[error("the WAN has no site {0:?}")]
    UnknownSite(String),
    /// One site named twice.
    #[error("a link joins two different sites, not {0:?} with itself")]
    SameSite(String),
    /// A port names a site that is not in the list, or a segment has two ports of one site.
    #[error("port {0:?} does not fit the list of sites")]
    BadPort(String),
}

/// The state of one direction, for people and tests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkStatus {
    /// From this site.
    pub from: String,
    /// To this one.
    pub to: String,
    /// Its shape.
    #[serde(flatten)]
    pub shape: LinkShape,
    /// Whether it carries anything.
    pub up: bool,
    /// What happened on it.
    #[serde(flatten)]
    pub counters: Counters,
}

/// The whole WAN.
#[derive(Debug)]
pub struct Fabric {
    sites: Vec<String>,
    site_up: Vec<bool>,
    ports: Vec<PortSpec>,
    /// Row `from`, column `to`.
    links: Vec<Link>,
    learned: HashMap<(Segment, [u8; 6]), usize>,
    random: Random,
}

impl Fabric {
    /// Builds the fabric.
    ///
    /// # Errors
    /// When ports or links name sites that are not there.
    pub fn new(spec: FabricSpec) -> Result<Self, FabricError> {
        let count = spec.sites.len();
        for (at, port) in spec.ports.iter().enumerate() {
            let double = spec.ports[..at].iter().any(|other| other.site == port.site && other.segment == port.segment);
            if port.site >= count || double {
                return Err(FabricError::BadPort(port.interface.clone()));
            }
        }
        let mut links: Vec<Link> = (0..count * count).map(|_| Link::new(LinkShape::default())).collect();
        for pair in &spec.links {
            if pair.a >= count || pair.b >= count {
                return Err(FabricError::UnknownSite(format!("#{}", pair.a.max(pair.b))));
            }
            links[pair.a * count + pair.b].shape = pair.shape;
            links[pair.b * count + pair.a].shape = pair.shape;
        }
        Ok(Self {
            site_up: vec![true; count],
            sites: spec.sites,
            ports: spec.ports,
            links,
            learned: HashMap::new(),
            random: Random(spec.seed | 1),
        })
    }

    /// The ports, in the order of their indices.
    #[must_use]
    pub fn ports(&self) -> &[PortSpec] {
        &self.ports
    }

    /// Takes a frame that a site has sent.
    pub fn ingress(&mut self, now_ns: u64, port: usize, frame: &[u8]) {
        let Some((to, from)) = frame.split_first_chunk::<6>() else { return };
        let Some((from, _)) = from.split_first_chunk::<6>() else { return };
        let PortSpec { site, segment, .. } = self.ports[port];
        if !is_group(*from) && (self.learned.len() < LEARNED_CAP || self.learned.contains_key(&(segment, *from))) {
            self.learned.insert((segment, *from), port);
        }
        match self.learned.get(&(segment, *to)) {
            Some(known) if !is_group(*to) => {
                let known = *known;
                self.offer(now_ns, site, known, frame);
            }
            _ => {
                for other in 0..self.ports.len() {
                    if self.ports[other].segment == segment {
                        self.offer(now_ns, site, other, frame);
                    }
                }
            }
        }
    }

    fn offer(&mut self, now_ns: u64, from_site: usize, to_port: usize, frame: &[u8]) {
        let to_site = self.ports[to_port].site;
        if to_site == from_site {
            return;
        }
        let link = &mut self.links[from_site * self.sites.len() + to_site];
        if self.site_up[from_site] && self.site_up[to_site] {
            link.offer(now_ns, to_port, frame, &mut self.random);
        } else {
            link.counters.cut_frames += 1;
        }
    }

    /// Gives every frame that is due to `deliver(port, frame)`, link by link, in order.
    pub fn deliver_due(&mut self, now_ns: u64, mut deliver: impl FnMut(usize, Vec<u8>)) {
        for link in &mut self.links {
            while let Some(flying) = link.pop_due(now_ns) {
                deliver(flying.port, flying.frame);
            }
        }
    }

    /// The instant at which the next frame is due.
    #[must_use]
    pub fn next_due_ns(&self) -> Option<u64> {
        self.links.iter().filter_map(|link| link.flying.front().map(|flying| flying.due_ns)).min()
    }

    fn site(&self, name: &str) -> Result<usize, FabricError> {
        let found = self.sites.iter().position(|site| site == name);
        found.ok_or_else(|| FabricError::UnknownSite(name.to_owned()))
    }

    fn pair(&mut self, a: &str, b: &str) -> Result<[usize; 2], FabricError> {
        let (from, to) = (self.site(a)?, self.site(b)?);
        if from == to {
            return Err(FabricError::SameSite(a.to_owned()));
        }
        let count = self.sites.len();
        Ok([from * count + to, to * count + from])
    }

    /// Gives both directions of a link a new shape; frames under way keep theirs.
    ///
    /// # Errors
    /// When a site is not there.
    pub fn set_shape(&mut self, a: &str, b: &str, shape: LinkShape) -> Result<(), FabricError> {
        for at in self.pair(a, b)? {
            self.links[at].shape = shape;
        }
        Ok(())
    }

    /// The shape of the direction from `a` to `b`.
    ///
    /// # Errors
    /// When a site is not there.
    pub fn shape(&mut self, a: &str, b: &str) -> Result<LinkShape, FabricError> {
        let [at, _] = self.pair(a, b)?;
        Ok(self.links[at].shape)
    }

    /// Cuts (`up == false`) or heals the link of two sites; a cut drops what is under way.
    ///
    /// # Errors
    /// When a site is not there.
    pub fn set_link_up(&mut self, a: &str, b: &str, up: bool) -> Result<(), FabricError> {
        for at in self.pair(a, b)? {
            self.links[at].set_up(up);
        }
        Ok(())
    }

    /// Heals every link (sites that are down stay down).
    pub fn heal_all(&mut self) {
        for link in &mut self.links {
            link.set_up(true);
        }
    }

    /// Takes a site off the WAN (its machine lost power) or puts it back; what is under way to or from it is dropped.
    ///
    /// # Errors
    /// When the site is not there.
    pub fn set_site_up(&mut self, site: &str, up: bool) -> Result<(), FabricError> {
        let at = self.site(site)?;
        self.site_up[at] = up;
        if !up {
            let count = self.sites.len();
            for other in 0..count {
                for link in [at * count + other, other * count + at] {
                    let was = self.links[link].up;
                    self.links[link].set_up(false);
                    self.links[link].up = was;
                }
            }
        }
        Ok(())
    }

    /// All directions with their counters.
    #[must_use]
    pub fn status(&self) -> Vec<LinkStatus> {
        let count = self.sites.len();
        let mut all = Vec::new();
        for from in 0..count {
            for to in (0..count).filter(|to| *to != from) {
                let link = &self.links[from * count + to];
                all.push(LinkStatus {
                    from: self.sites[from].clone(),
                    to: self.sites[to].clone(),
                    shape: link.shape,
                    up: link.up && self.site_up[from] && self.site_up[to],
                    counters: link.counters,
                });
            }
        }
        all
    }
}

const VXLAN_PORT: u16 = 4789;
const WIREGUARD_PORT: u16 = 51_820;

/// The port to which a frame goes, if it is UDP over IPv4 and not a later fragment.
fn udp_port(frame: &[u8]) -> Option<u16> {
    let packet = frame.get(14..)?;
    let is_ipv4 = frame[12..14] == [0x08, 0x00] && packet.first()? >> 4 == 4;
    if !is_ipv4 || *packet.get(9)? != 17 || packet[6] & 0x1f != 0 || packet[7] != 0 {
        return None;
    }
    let datagram = packet.get(usize::from(packet[0] & 0x0f) * 4..)?;
    Some(u16::from_be_bytes([*datagram.get(2)?, *datagram.get(3)?]))
}

fn is_group(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROADCAST: [u8; 6] = [0xff; 6];

    fn mac(site: u8) -> [u8; 6] {
        [2, 0, 0, 0, 0, site]
    }

    fn frame(to: [u8; 6], from: [u8; 6], body: &[u8]) -> Vec<u8> {
        [&to[..], &from, &[0x08, 0x00], body].concat()
    }

    /// Three sites a, b, c with ports 0-2 in one segment and 3-5 in the other.
    fn fabric(shape: LinkShape) -> Fabric {
        let port = |site, segment| PortSpec { interface: format!("p{site}"), site, segment };
        let ports = [Segment::Agents, Segment::Overlay].into_iter().flat_map(|s| (0..3).map(move |i| port(i, s)));
        let links = [(0, 1), (0, 2), (1, 2)].map(|(a, b)| PairSpec { a, b, shape }).to_vec();
        let sites = ["a", "b", "c"].map(String::from).to_vec();
        Fabric::new(FabricSpec { sites, ports: ports.collect(), links, seed: 7 }).unwrap()
    }

    fn all_due(fabric: &mut Fabric, now_ns: u64) -> Vec<(usize, Vec<u8>)> {
        let mut due = Vec::new();
        fabric.deliver_due(now_ns, |port, frame| due.push((port, frame)));
        due
    }

    fn ports_due(fabric: &mut Fabric, now_ns: u64) -> Vec<usize> {
        let mut ports: Vec<_> = all_due(fabric, now_ns).into_iter().map(|(port, _)| port).collect();
        ports.sort_unstable();
        ports
    }

    #[test]
    fn a_frame_takes_half_the_round_trip_plus_its_serialization() {
        let mut fabric = fabric(LinkShape::new(40.0, 8));
        fabric.ingress(1_000, 0, &frame(BROADCAST, mac(0), &[0; 962]));
        // 976 + 24 bytes at 8 Mbit/s are 1 ms.
        assert_eq!(fabric.next_due_ns(), Some(1_000 + 1_000_000 + 20_000_000));
        assert!(all_due(&mut fabric, 21_000_999).is_empty());
        assert_eq!(ports_due(&mut fabric, 21_001_000), [1, 2]);
        assert_eq!(fabric.next_due_ns(), None);
    }

    #[test]
    fn segments_are_separate_but_share_the_budget() {
        let mut fabric = fabric(LinkShape::new(0.0, 8));
        fabric.ingress(0, 3, &frame(BROADCAST, mac(0), &[0; 962]));
        assert_eq!(ports_due(&mut fabric, 1_000_000), [4, 5]);
        fabric.ingress(2_000_000, 0, &frame(BROADCAST, mac(0), &[0; 962]));
        fabric.ingress(2_000_000, 3, &frame(BROADCAST, mac(0), &[0; 962]));
        assert_eq!(ports_due(&mut fabric, 3_000_000), [1, 2]);
        assert_eq!(ports_due(&mut fabric, 4_000_000), [4, 5]);
    }

    #[test]
    fn what_is_in_tunnels_is_counted_by_whether_it_can_be_read() {
        let mut fabric = fabric(LinkShape::new(0.0, 0));
        let datagram = |port: u16, fragment: u8, protocol: u8| {
            let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, fragment, 64, protocol, 0, 0, 198, 19, 1, 1, 198, 19, 1, 2];
            packet.extend([0xc0, 0, port.to_be_bytes()[0], port.to_be_bytes()[1], 0, 8, 0, 0]);
            frame(BROADCAST, mac(0), &packet)
        };
        for one in [
            datagram(4789, 0, 17),
            datagram(51_820, 0, 17),
            datagram(51_820, 0, 17),
            datagram(4789, 9, 17),
            datagram(4789, 0, 6),
            datagram(53, 0, 17),
            datagram(4789, 0, 17)[..36].to_vec(),
            frame(BROADCAST, mac(0), &[0x45]),
        ] {
            fabric.ingress(0, 3, &one);
        }
        assert_eq!(ports_due(&mut fabric, 0).len(), 16);
        for link in fabric.status().iter().filter(|link| link.from == "a") {
            assert_eq!((link.counters.plain_tunnel_frames, link.counters.encrypted_frames), (1, 2), "{link:?}");
        }
    }

    #[test]
    fn known_addresses_go_to_their_port_only() {
        let mut fabric = fabric(LinkShape::new(0.0, 0));
        fabric.ingress(0, 1, &frame(BROADCAST, mac(1), b""));
        all_due(&mut fabric, 0);
        fabric.ingress(0, 0, &frame(mac(1), mac(0), b"x"));
        assert_eq!(ports_due(&mut fabric, 0), [1]);
        // An address that moves is found at its new place.
        fabric.ingress(0, 2, &frame(BROADCAST, mac(1), b""));
        all_due(&mut fabric, 0);
        fabric.ingress(0, 0, &frame(mac(1), mac(0), b"x"));
        assert_eq!(ports_due(&mut fabric, 0), [2]);
    }

    #[test]
    fn frames_of_a_link_keep_their_order_when_the_delay_shrinks() {
        let mut fabric = fabric(LinkShape::new(100.0, 0));
        for n in 0..50_u8 {
            if n == 25 {
                fabric.set_shape("a", "b", LinkShape::new(1.0, 0)).unwrap();
            }
            fabric.ingress(u64::from(n), 0, &frame(BROADCAST, mac(0), &[n]));
        }
        let order: Vec<u8> =
            all_due(&mut fabric, u64::MAX).into_iter().filter(|(port, _)| *port == 1).map(|(_, f)| f[14]).collect();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn loss_is_none_all_or_about_what_was_asked() {
        for (ppm, range) in [(0, 20_000..=20_000), (1_000_000, 0..=0), (250_000, 14_000..=16_000)] {
            let mut fabric = fabric(LinkShape { loss_ppm: ppm, queue_bytes: 1 << 30, ..LinkShape::new(0.0, 0) });
            for _ in 0..10_000 {
                fabric.ingress(0, 0, &frame(BROADCAST, mac(0), b""));
            }
            let got = all_due(&mut fabric, 0).len();
            assert!(range.contains(&got), "{ppm} ppm: {got} of 20000 arrived");
            let lost: u64 = fabric.status().iter().map(|link| link.counters.lost_frames).sum();
            assert_eq!(got as u64 + lost, 20_000);
        }
    }

    #[test]
    fn a_full_queue_drops_from_the_tail() {
        let mut fabric = fabric(LinkShape { queue_bytes: 10_000, ..LinkShape::new(0.0, 1) });
        for n in 0..100_u8 {
            fabric.ingress(0, 0, &frame(BROADCAST, mac(0), &[n; 986]));
        }
        let arrived: Vec<u8> =
            all_due(&mut fabric, u64::MAX).into_iter().filter(|(port, _)| *port == 1).map(|(_, f)| f[14]).collect();
        assert!((9..=11).contains(&arrived.len()), "{arrived:?}");
        assert_eq!(arrived, (0..u8::try_from(arrived.len()).unwrap()).collect::<Vec<_>>());
    }

    #[test]
    fn a_cut_lets_nothing_through_not_even_what_was_under_way() {
        let mut fabric = fabric(LinkShape::new(10.0, 0));
        fabric.ingress(0, 0, &frame(BROADCAST, mac(0), b"under way"));
        fabric.set_link_up("b", "a", false).unwrap();
        fabric.ingress(1, 0, &frame(BROADCAST, mac(0), b"later"));
        fabric.ingress(1, 1, &frame(BROADCAST, mac(1), b"back"));
        // c still hears all three.
        assert_eq!(ports_due(&mut fabric, u64::MAX), [2, 2, 2]);
        fabric.set_link_up("a", "b", true).unwrap();
        fabric.ingress(2, 0, &frame(BROADCAST, mac(0), b""));
        assert_eq!(ports_due(&mut fabric, u64::MAX), [1, 2]);
    }

    #[test]
    fn a_site_without_power_is_silent_and_healing_links_does_not_wake_it() {
        let mut fabric = fabric(LinkShape::new(10.0, 0));
        fabric.set_link_up("a", "c", false).unwrap();
        fabric.ingress(0, 1, &frame(BROADCAST, mac(1), b""));
        fabric.set_site_up("b", false).unwrap();
        fabric.heal_all();
        fabric.ingress(0, 1, &frame(BROADCAST, mac(1), b""));
        fabric.ingress(0, 0, &frame(BROADCAST, mac(0), b""));
        assert_eq!(ports_due(&mut fabric, u64::MAX), [2]);
        fabric.set_site_up("b", true).unwrap();
        fabric.ingress(0, 0, &frame(BROADCAST, mac(0), b""));
        assert_eq!(ports_due(&mut fabric, u64::MAX), [1, 2]);
    }

    #[test]
    fn short_frames_and_wrong_names_are_refused() {
        let mut fabric = fabric(LinkShape::default());
        for len in 0..12 {
            fabric.ingress(0, 0, &vec![0xff; len]);
        }
        assert_eq!(fabric.next_due_ns(), None);
        assert_eq!(fabric.set_link_up("a", "x", false), Err(FabricError::UnknownSite("x".into())));
        assert_eq!(fabric.set_link_up("a", "a", false), Err(FabricError::SameSite("a".into())));
    }

    /// What guests and hosts send may be anything; it must neither break the WAN nor come out where it does not belong.
    #[test]
    fn any_frames_stay_in_their_segment_and_never_come_back() {
        let mut random = Random(0x5eed);
        println!("seed {:#x}", random.0);
        let mut fabric = fabric(LinkShape { queue_bytes: 50_000, loss_ppm: 1000, ..LinkShape::new(1.0, 100) });
        let macs: Vec<[u8; 6]> = (0..3).map(mac).chain([BROADCAST, [1, 0, 0x5e, 0, 0, 1], [0; 6]]).collect();
        let mut arrived = 0;
        for now in 0..200_000_u64 {
            let mut pick = |below: u32| random.below_million() % below;
            let port = pick(6) as usize;
            let mut bytes = frame(macs[pick(6) as usize], macs[pick(6) as usize], &[u8::try_from(port).unwrap(); 50]);
            bytes.truncate(if pick(10) == 0 { pick(64) as usize } else { 64 });
            fabric.ingress(now * 1000, port, &bytes);
            match pick(2000) {
                0 => fabric.set_link_up("a", "b", pick(2) == 0).unwrap(),
                1 => fabric.set_site_up("c", pick(2) == 0).unwrap(),
                2 => fabric.heal_all(),
                _ => {}
            }
            fabric.deliver_due(now * 1000, |to, frame| {
                arrived += 1;
                if let Some(from) = frame.get(14) {
                    let from = usize::from(*from);
                    assert!(from / 3 == to / 3 && from != to, "from port {from} to port {to}");
                }
            });
        }
        assert!(arrived > 10_000, "{arrived}");
        assert!(fabric.learned.len() <= 12);
    }
}
