//! What a local guest may send, and the responders that know it by its switch port.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    ARP, Compiler, Cookie, CookieKind, DHCP_BURST, DHCP_RATE_PPS, FROM_LOCAL, INGRESS, L2, MD_LISTEN, METADATA_ADDR,
    METADATA_TCP_PORT, ND, apply, enter, gateway_mac, md_addr, md_mac, port_cookie,
};
use crate::{
    openflow::{Action, Field, Instruction, METER_BURST, METER_PKTPS, Match, Meter, WHOLE_PACKET, port},
    view::{NetworkView, PortView},
};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const ETH_ARP: u16 = 0x0806;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const ROUTER_ADVERT: u8 = 134;
const NEIGHBOUR_SOLICIT: u8 = 135;
const NEIGHBOUR_ADVERT: u8 = 136;
const REDIRECT: u8 = 137;
const MLDV2_REPORT: u8 = 143;

pub(crate) fn v4(addr: Ipv4Addr) -> u128 {
    u128::from(u32::from(addr))
}

/// IPv6 addresses that a port may use: its link-local one and the given one.
pub(crate) fn v6_addrs(p: &PortView) -> Vec<Ipv6Addr> {
    [p.mac.link_local()].into_iter().chain(p.ipv6).collect()
}

impl Compiler<'_> {
    /// The pins of one guest. Priorities in table 0: 110 never, 105 DHCP, 100 exact ARP/ND/metadata, 95 blocked
    /// destinations, 90 other ND and tunnels, 80 IP by source, 60 no other IP or ARP, 50 other ethertypes.
    pub(super) fn guest(&mut self, net: &NetworkView, p: &PortView, tap: u32) {
        let cookie = port_cookie(CookieKind::Guest, p);
        let from_tap = || Match::any().with(Field::InPort, tap);
        let from = || from_tap().with(Field::EthSrc, p.mac.to_u128());
        let pass = |table| enter(net, FROM_LOCAL, table);
        self.put(INGRESS, 50, from(), cookie, pass(L2));
        for ethertype in [IPV4, IPV6, ETH_ARP] {
            self.put(INGRESS, 60, from_tap().with(Field::EthType, ethertype), cookie, vec![]);
        }
        self.guest_arp(net, p, tap);
        let ipv4 = from().with(Field::EthType, IPV4).with(Field::Ipv4Src, v4(p.ipv4));
        self.put(INGRESS, 80, ipv4, cookie, pass(L2));
        // Servers of addresses and routes are not the guests' to be.
        let udp = |eth: u16, from_port: u16| {
            from_tap().with(Field::EthType, eth).with(Field::IpProto, UDP).with(Field::UdpSrc, from_port)
        };
        self.put(INGRESS, 110, udp(IPV4, 67), cookie, vec![]);
        self.put(INGRESS, 110, udp(IPV6, 547), cookie, vec![]);
        self.guest_dhcp(p, tap);
        self.guest_metadata(p, tap);
        self.guest_ipv6(net, p, tap);
    }

    fn guest_arp(&mut self, net: &NetworkView, p: &PortView, tap: u32) {
        let cookie = port_cookie(CookieKind::Guest, p);
        let from = Match::any()
            .with(Field::InPort, tap)
            .with(Field::EthSrc, p.mac.to_u128())
            .with(Field::EthType, ETH_ARP)
            .with(Field::ArpSha, p.mac.to_u128());
        self.put(INGRESS, 100, from.clone().with(Field::ArpSpa, v4(p.ipv4)), cookie, enter(net, FROM_LOCAL, ARP));
        // A probe asks whether an address is taken, from no address (RFC 5227).
        let probe = from.with(Field::ArpSpa, 0_u8).with(Field::ArpOp, 1_u8);
        self.put(INGRESS, 100, probe, cookie, enter(net, FROM_LOCAL, ARP));
        // Nobody answers a guest that asks for its own address: that would be a conflict.
        let own = Match::any()
            .with(Field::InPort, tap)
            .with(Field::EthType, ETH_ARP)
            .with(Field::ArpOp, 1_u8)
            .with(Field::ArpTpa, v4(p.ipv4));
        self.put(ARP, 110, own, cookie, vec![Instruction::GotoTable(L2)]);
    }

    fn guest_dhcp(&mut self, p: &PortView, tap: u32) {
        let cookie = port_cookie(CookieKind::Dhcp, p);
        let mut to_agent = apply(vec![Action::Output { port: port::CONTROLLER, max_len: WHOLE_PACKET }]);
        if self.local.meters {
            let flags = METER_PKTPS | METER_BURST;
            self.out.add_meter(Meter { id: tap, flags, rate: DHCP_RATE_PPS, burst: DHCP_BURST });
            to_agent.insert(0, Instruction::Meter(tap));
        }
        for source in [0, v4(p.ipv4)] {
            let request = Match::any()
                .with(Field::InPort, tap)
                .with(Field::EthSrc, p.mac.to_u128())
                .with(Field::EthType, IPV4)
                .with(Field::IpProto, UDP)
                .with(Field::Ipv4Src, source)
                .with(Field::UdpSrc, 68_u8)
                .with(Field::UdpDst, 67_u8);
            self.put(INGRESS, 105, request, cookie, to_agent.clone());
        }
    }

    fn guest_metadata(&mut self, p: &PortView, tap: u32) {
        let Some(md0) = self.local.md0 else { return };
        let cookie = port_cookie(CookieKind::Metadata, p);
        let tcp = Match::any().with(Field::EthType, IPV4).with(Field::IpProto, TCP);
        let request = tcp
            .clone()
            .with(Field::InPort, tap)
            .with(Field::EthSrc, p.mac.to_u128())
            .with(Field::EthDst, gateway_mac().to_u128())
            .with(Field::Ipv4Src, v4(p.ipv4))
            .with(Field::Ipv4Dst, v4(METADATA_ADDR))
            .with(Field::TcpDst, METADATA_TCP_PORT);
        let to_service = vec![
            Action::SetField(Field::EthSrc, gateway_mac().to_u128()),
            Action::SetField(Field::EthDst, md_mac().to_u128()),
            Action::SetField(Field::Ipv4Src, v4(md_addr(tap))),
            Action::SetField(Field::Ipv4Dst, v4(MD_LISTEN)),
            Action::output(md0),
        ];
        self.put(INGRESS, 100, request, cookie, apply(to_service));
        let answer = tcp
            .with(Field::InPort, md0)
            .with(Field::Ipv4Src, v4(MD_LISTEN))
            .with(Field::Ipv4Dst, v4(md_addr(tap)))
            .with(Field::TcpSrc, METADATA_TCP_PORT);
        let to_guest = vec![
            Action::SetField(Field::EthSrc, gateway_mac().to_u128()),
            Action::SetField(Field::EthDst, p.mac.to_u128()),
            Action::SetField(Field::Ipv4Src, v4(METADATA_ADDR)),
            Action::SetField(Field::Ipv4Dst, v4(p.ipv4)),
            Action::output(tap),
        ];
        self.put(INGRESS, 100, answer, cookie, apply(to_guest));
    }

    /// The host's kernel finds every guest's stand-in address at one Ethernet address.
    pub(super) fn md0_arp(&mut self) {
        let Some(md0) = self.local.md0 else { return };
        let request = Match::any()
            .with(Field::InPort, md0)
            .with(Field::EthType, ETH_ARP)
            .with(Field::ArpOp, 1_u8)
            .with(Field::ArpSpa, v4(MD_LISTEN));
        let mac = gateway_mac().to_u128();
        let actions = vec![
            Action::copy(Field::EthSrc, Field::EthDst),
            Action::SetField(Field::EthSrc, mac),
            Action::SetField(Field::ArpOp, 2),
            Action::copy(Field::ArpSha, Field::ArpTha),
            Action::SetField(Field::ArpSha, mac),
            Action::copy(Field::ArpTpa, Field::Reg2),
            Action::copy(Field::ArpSpa, Field::ArpTpa),
            Action::copy(Field::Reg2, Field::ArpSpa),
            Action::output(port::IN_PORT),
        ];
        self.put(INGRESS, 100, request, Cookie::new(CookieKind::Metadata, &[]), apply(actions));
    }

    fn guest_ipv6(&mut self, net: &NetworkView, p: &PortView, tap: u32) {
        let cookie = port_cookie(CookieKind::Guest, p);
        let addrs = v6_addrs(p);
        let mac = p.mac.to_u128();
        let from = || Match::any().with(Field::InPort, tap).with(Field::EthSrc, mac).with(Field::EthType, IPV6);
        let icmp = |kind: u8| from().with(Field::IpProto, ICMPV6).with(Field::Icmpv6Type, kind);
        let pass = |table| enter(net, FROM_LOCAL, table);
        for kind in [ROUTER_ADVERT, REDIRECT] {
            self.put(INGRESS, 110, icmp(kind), cookie, vec![]);
        }
        for kind in [NEIGHBOUR_SOLICIT, NEIGHBOUR_ADVERT] {
            self.put(INGRESS, 90, icmp(kind), cookie, vec![]);
        }
        // Before a guest has an address it asks for it and joins groups from the unspecified one.
        let unspecified = |m: Match| m.with(Field::Ipv6Src, 0_u8);
        self.put(INGRESS, 100, unspecified(icmp(MLDV2_REPORT)), cookie, pass(L2));
        for target in &addrs {
            let target = u128::from(*target);
            let probe = unspecified(icmp(NEIGHBOUR_SOLICIT)).with(Field::NdTarget, target);
            self.put(INGRESS, 100, probe, cookie, pass(L2));
        }
        for source in &addrs {
            let source = u128::from(*source);
            self.put(INGRESS, 80, from().with(Field::Ipv6Src, source), cookie, pass(L2));
            let solicit = icmp(NEIGHBOUR_SOLICIT).with(Field::Ipv6Src, source);
            self.put(INGRESS, 100, solicit.clone().with(Field::NdSll, mac), cookie, pass(ND));
            self.put(INGRESS, 100, solicit.with(Field::NdSll, 0_u8), cookie, pass(L2));
            for target in &addrs {
                let advert =
                    icmp(NEIGHBOUR_ADVERT).with(Field::Ipv6Src, source).with(Field::NdTarget, u128::from(*target));
                self.put(INGRESS, 100, advert.clone().with(Field::NdTll, mac), cookie, pass(L2));
                self.put(INGRESS, 100, advert.with(Field::NdTll, 0_u8), cookie, pass(L2));
            }
        }
    }
}
