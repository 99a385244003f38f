//! A small interpreter of the compiled tables: packets as fields, hosts joined by tunnels, each host at its own view.
//! Written from the OpenFlow specification, not from the compiler, so that the two can disagree.

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
};

use supercloud_ids::{Epoch, HostId, NetworkId, PortId, ProjectId};
use supercloud_sdn::{
    addr::MacAddr,
    compile::{LocalPorts, compile},
    flows::FlowTables,
    openflow::{Action, Field, Instruction, port},
    view::{HostView, NetworkView, OverlayView, PortView},
};

/// A packet: its header fields. One without a field does not match a flow that asks for it.
pub type Packet = BTreeMap<Field, u128>;

/// More passes of hosts than any right path takes.
const MAX_PASSES: usize = 64;

/// Runs a packet through a host's tables; the packets that leave, each by a port.
pub fn process(tables: &FlowTables, in_port: u32, packet: &Packet) -> Vec<(u32, Packet)> {
    let mut packet = packet.clone();
    packet.insert(Field::InPort, in_port.into());
    for register in [Field::Reg0, Field::Reg1, Field::Reg2, Field::Reg3] {
        packet.insert(register, 0);
    }
    let (mut table, mut out) = (Some(0), Vec::new());
    while let Some(now) = table.take() {
        let hits = |key: &supercloud_sdn::flows::FlowKey| {
            key.table == now && key.matching.fields().all(|(f, v, m)| packet.get(&f).is_some_and(|have| have & m == v))
        };
        let mut matching: Vec<_> = tables.flows().filter(|(key, _)| hits(key)).collect();
        matching.sort_by_key(|(key, _)| std::cmp::Reverse(key.priority));
        let Some((key, body)) = matching.first() else { break };
        // Which of two flows of one priority wins is undefined: they must at least do the same.
        for (other, same) in matching.iter().skip(1).take_while(|(k, _)| k.priority == key.priority) {
            assert_eq!(body.instructions, same.instructions, "ambiguous: {key:?} and {other:?}");
        }
        for instruction in &body.instructions {
            match instruction {
                Instruction::Apply(actions) => actions.iter().for_each(|a| act(a, in_port, &mut packet, &mut out)),
                Instruction::GotoTable(next) => {
                    assert!(*next > now, "tables go forward only");
                    table = Some(*next);
                }
                Instruction::Meter(id) => assert!(tables.meters().any(|m| m.id == *id), "meter {id}"),
                other => panic!("not part of the compiler's language: {other:?}"),
            }
        }
    }
    out
}

fn act(action: &Action, in_port: u32, packet: &mut Packet, out: &mut Vec<(u32, Packet)>) {
    match action {
        // OpenFlow never sends a packet back by its port unless told so by name.
        Action::Output { port: to, .. } if *to == in_port => {}
        Action::Output { port: port::IN_PORT, .. } => out.push((in_port, packet.clone())),
        Action::Output { port: to, .. } => out.push((*to, packet.clone())),
        Action::SetField(field, value) => {
            packet.insert(*field, *value);
        }
        Action::Move { src, src_bit: 0, dst, dst_bit: 0, bits } if usize::from(*bits) == 8 * dst.len() => {
            let value = packet.get(src).copied().unwrap_or(0);
            packet.insert(*dst, value);
        }
        other => panic!("not part of the compiler's language: {other:?}"),
    }
}

/// Who got a packet: the host's number, the switch port, the packet.
pub type Delivery = (usize, u32, Packet);

pub struct World {
    pub hosts: Vec<HostId>,
    /// The port's number in this list is its tap's switch port, less one, at every host.
    pub ports: Vec<PortId>,
    pub tables: Vec<FlowTables>,
}

impl World {
    /// Each host at a view of its own.
    pub fn new(views: &[&OverlayView]) -> Self {
        let hosts: Vec<HostId> = views[0].hosts.iter().map(|h| h.host).collect();
        let ports: Vec<PortId> = views[0].ports.iter().map(|p| p.port).collect();
        let taps: BTreeMap<PortId, u32> = ports.iter().zip(1..).map(|(p, n)| (*p, n)).collect();
        let tables = hosts
            .iter()
            .zip(views)
            .map(|(me, view)| {
                let peers = hosts.iter().zip(1000..).filter(|(h, _)| *h != me);
                let local = LocalPorts {
                    taps: taps.clone(),
                    tunnels: peers.map(|(h, n)| (*h, n)).collect(),
                    md0: Some(999),
                    blocked: vec!["198.18.0.0/15".parse().unwrap()],
                    nd_responder: true,
                    meters: true,
                };
                compile(view, *me, &local).unwrap()
            })
            .collect();
        Self { hosts, ports, tables }
    }

    pub fn tap(&self, port: PortId) -> u32 {
        self.ports.iter().position(|p| *p == port).unwrap() as u32 + 1
    }

    pub fn number(&self, host: HostId) -> usize {
        self.hosts.iter().position(|h| *h == host).unwrap()
    }

    /// Sends a packet in by a switch port and follows it to its ends.
    pub fn send(&self, host: usize, in_port: u32, packet: &Packet) -> Vec<Delivery> {
        let mut first = packet.clone();
        first.insert(Field::TunnelId, 0);
        let mut queue = VecDeque::from([(host, in_port, first)]);
        let (mut delivered, mut passes) = (Vec::new(), 0);
        while let Some((at, by, packet)) = queue.pop_front() {
            passes += 1;
            assert!(passes <= MAX_PASSES, "a loop: {packet:?}");
            for (to, packet) in process(&self.tables[at], by, &packet) {
                match to {
                    1000.. if (to as usize) < 1000 + self.hosts.len() => {
                        let mut packet = packet;
                        // The wire keeps 24 bits of the key and nothing else of the metadata.
                        let key = packet[&Field::TunnelId];
                        assert!(key < 1 << 24);
                        packet.insert(Field::TunnelId, key);
                        queue.push_back((to as usize - 1000, 1000 + at as u32, packet));
                    }
                    _ => delivered.push((at, to, packet)),
                }
            }
        }
        delivered
    }
}

pub fn unicast(src: MacAddr, dst: MacAddr) -> Packet {
    // An ethertype of its own: what is neither IP nor ARP travels too.
    [(Field::EthSrc, src.to_u128()), (Field::EthDst, dst.to_u128()), (Field::EthType, 0x88b6)].into()
}

pub fn ipv4(src: (MacAddr, Ipv4Addr), dst: (MacAddr, Ipv4Addr)) -> Packet {
    let number = |a: Ipv4Addr| u128::from(u32::from(a));
    let mut packet = unicast(src.0, dst.0);
    packet.extend([
        (Field::EthType, 0x0800),
        (Field::IpProto, 6),
        (Field::Ipv4Src, number(src.1)),
        (Field::Ipv4Dst, number(dst.1)),
        (Field::TcpSrc, 5000),
        (Field::TcpDst, 80),
    ]);
    packet
}

pub fn arp_request(src: (MacAddr, Ipv4Addr), target: Ipv4Addr) -> Packet {
    let number = |a: Ipv4Addr| u128::from(u32::from(a));
    let mut packet = unicast(src.0, MacAddr::BROADCAST);
    packet.extend([
        (Field::EthType, 0x0806),
        (Field::ArpOp, 1),
        (Field::ArpSha, src.0.to_u128()),
        (Field::ArpSpa, number(src.1)),
        (Field::ArpTha, 0),
        (Field::ArpTpa, number(target)),
    ]);
    packet
}

pub fn solicit(src: &PortView, target: &PortView) -> Packet {
    let mut packet = unicast(src.mac, MacAddr([0x33, 0x33, 0xff, 0, 0, 1]));
    packet.extend([
        (Field::EthType, 0x86dd),
        (Field::IpProto, 58),
        (Field::Icmpv6Type, 135),
        (Field::Ipv6Src, src.mac.link_local().into()),
        (Field::Ipv6Dst, 1),
        (Field::NdTarget, target.ipv6.unwrap().into()),
        (Field::NdOptionsType, 1),
        (Field::NdSll, src.mac.to_u128()),
    ]);
    packet
}

/// Hosts, and two networks with the same addresses and ports; nothing runs.
pub fn empty_view(hosts: usize, networks: usize, ports: usize) -> OverlayView {
    let mut view = OverlayView { revision: 1, ..OverlayView::default() };
    for n in 0..hosts {
        let overlay_addr = Ipv4Addr::new(198, 19, 200, n as u8 + 1);
        view.hosts.push(HostView { host: HostId::generate(), overlay_addr, index: n as u16, encryption: None });
    }
    for n in 0..networks {
        let network = NetworkView {
            network: NetworkId::generate(),
            project: ProjectId::generate(),
            vni: 100 + n as u32,
            cidr: "10.0.0.0/24".parse().unwrap(),
            cidr6: Some("fd00::/64".parse().unwrap()),
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            dns: vec![],
            mtu: 1450,
        };
        for p in 0..ports {
            let p = p as u8 + 10;
            view.ports.push(PortView {
                port: PortId::generate(),
                network: network.network,
                mac: MacAddr([2, 0, 0, 0, 0, p]),
                ipv4: Ipv4Addr::new(10, 0, 0, p),
                ipv6: Some(format!("fd00::{p:x}").parse().unwrap()),
                hostname: None,
                host: None,
                epoch: Epoch(1),
                prepared_at: None,
                moved_from: None,
            });
        }
        view.networks.push(network);
    }
    view
}
