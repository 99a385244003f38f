//! A network as one L2 segment over many hosts: answers, tunnels, delivery.

use std::{collections::BTreeMap, net::Ipv4Addr};

use supercloud_ids::HostId;

use super::{
    ARP, Compiler, CookieKind, FORWARDED, FROM_LOCAL, FROM_TUNNEL, INGRESS, L2, METADATA_ADDR, ND, ND_ANSWER, Segment,
    apply, enter, gateway_mac,
    guest::{v4, v6_addrs},
    network_cookie, port_cookie,
};
use crate::{
    addr::MacAddr,
    openflow::{Action, Field, Instruction, Match, port},
    view::PortView,
};

const GROUP_BIT: u128 = 0x0100_0000_0000;
/// Solicited and override (RFC 4861, section 4.4).
const ND_SOLICITED_OVERRIDE: u128 = 0x6000_0000;

impl Compiler<'_> {
    /// ARP and ND for every known address of the network, running or not: peers of a frozen guest keep its entry, and
    /// their connections wait instead of failing.
    pub(super) fn answers(&mut self, segment: &Segment<'_>) {
        let net = segment.net;
        let mut known: BTreeMap<Ipv4Addr, MacAddr> = segment.ports.iter().map(|p| (p.ipv4, p.mac)).collect();
        known.insert(net.gateway, gateway_mac());
        known.insert(METADATA_ADDR, gateway_mac());
        let cookie = network_cookie(CookieKind::Answer, net);
        for (addr, mac) in known {
            let request = Match::any()
                .with(Field::Reg0, net.vni)
                .with(Field::EthType, 0x0806_u16)
                .with(Field::ArpOp, 1_u8)
                .with(Field::ArpTpa, v4(addr));
            let actions = vec![
                Action::copy(Field::EthSrc, Field::EthDst),
                Action::SetField(Field::EthSrc, mac.to_u128()),
                Action::SetField(Field::ArpOp, 2),
                Action::copy(Field::ArpSha, Field::ArpTha),
                Action::copy(Field::ArpSpa, Field::ArpTpa),
                Action::SetField(Field::ArpSha, mac.to_u128()),
                Action::SetField(Field::ArpSpa, v4(addr)),
                Action::output(port::IN_PORT),
            ];
            self.put(ARP, 100, request, cookie, apply(actions));
        }
        if self.local.nd_responder {
            for p in &segment.ports {
                self.nd_answers(segment, p);
            }
        }
    }

    fn nd_answers(&mut self, segment: &Segment<'_>, p: &PortView) {
        let cookie = network_cookie(CookieKind::Answer, segment.net);
        let mac = p.mac.to_u128();
        for addr in v6_addrs(p) {
            let addr = u128::from(addr);
            let about = |kind: u8| {
                Match::any()
                    .with(Field::Reg0, segment.net.vni)
                    .with(Field::EthType, 0x86dd_u16)
                    .with(Field::IpProto, 58_u8)
                    .with(Field::Icmpv6Type, kind)
                    .with(Field::NdTarget, addr)
            };
            let turn = vec![
                Action::copy(Field::EthSrc, Field::EthDst),
                Action::SetField(Field::EthSrc, mac),
                Action::copy(Field::Ipv6Src, Field::Ipv6Dst),
                Action::SetField(Field::Ipv6Src, addr),
                Action::SetField(Field::Icmpv6Type, 136),
                Action::SetField(Field::NdOptionsType, 2),
                Action::SetField(Field::NdReserved, ND_SOLICITED_OVERRIDE),
            ];
            let turned = vec![Instruction::Apply(turn), Instruction::GotoTable(ND_ANSWER)];
            self.put(ND, 100, about(135).with(Field::NdOptionsType, 1_u8), cookie, turned);
            // The switch lets a target's option be written only where it knows that there is one.
            let answer = vec![Action::SetField(Field::NdTll, mac), Action::output(port::IN_PORT)];
            self.put(ND_ANSWER, 100, about(136), cookie, apply(answer));
        }
    }

    /// A MAC is taken only from its owner's tunnel; a marked frame only from the tunnel of the move's source.
    pub(super) fn accept_tunnels(&mut self, segment: &Segment<'_>) {
        let net = segment.net;
        for p in &segment.ports {
            let Some(tunnel) = self.tunnel_of(p.host) else { continue };
            let matching = Match::any()
                .with(Field::InPort, tunnel)
                .with(Field::TunnelId, net.vni)
                .with(Field::EthSrc, p.mac.to_u128());
            self.put(INGRESS, 90, matching, port_cookie(CookieKind::Tunnel, p), enter(net, FROM_TUNNEL, L2));
        }
        let arrived = segment.owned.iter().map(|(p, tap)| (*p, *tap, p.moved_from));
        let arriving = segment.prepared.iter().map(|(p, tap)| (*p, *tap, p.host));
        for (p, tap, source) in arrived.chain(arriving).collect::<Vec<_>>() {
            let Some(tunnel) = self.tunnel_of(source) else { continue };
            let matching = Match::any()
                .with(Field::InPort, tunnel)
                .with(Field::TunnelId, net.vni | FORWARDED)
                .with(Field::EthDst, p.mac.to_u128());
            let cookie = port_cookie(CookieKind::Forward, p);
            self.put(INGRESS, 90, matching, cookie, apply(vec![Action::output(tap)]));
        }
    }

    fn tunnel_of(&self, host: Option<HostId>) -> Option<u32> {
        host.filter(|h| *h != self.host).and_then(|h| self.local.tunnels.get(&h)).copied()
    }

    /// Unicast by destination.
    pub(super) fn deliver(&mut self, segment: &Segment<'_>) {
        let net = segment.net;
        let to = |p: &PortView| Match::any().with(Field::Reg0, net.vni).with(Field::EthDst, p.mac.to_u128());
        for (p, tap) in &segment.owned {
            let cookie = port_cookie(CookieKind::Deliver, p);
            self.put(L2, 100, to(p), cookie, apply(vec![Action::output(*tap)]));
        }
        // A peer that knows of the switch before this host does sends here already.
        for (p, tap) in &segment.prepared {
            let matching = to(p).with(Field::Reg1, FROM_TUNNEL);
            let cookie = port_cookie(CookieKind::Deliver, p);
            self.put(L2, 110, matching, cookie, apply(vec![Action::output(*tap)]));
        }
        for p in &segment.ports {
            let Some(tunnel) = self.tunnel_of(p.host) else { continue };
            let actions = vec![Action::SetField(Field::TunnelId, net.vni.into()), Action::output(tunnel)];
            let matching = to(p).with(Field::Reg1, FROM_LOCAL);
            self.put(L2, 100, matching, port_cookie(CookieKind::Remote, p), apply(actions));
        }
        for (p, owner) in &segment.departed {
            let Some(tunnel) = self.tunnel_of(Some(*owner)) else { continue };
            let cookie = port_cookie(CookieKind::Forward, p);
            let matching = to(p).with(Field::Reg1, FROM_TUNNEL);
            let marked = Action::SetField(Field::TunnelId, (net.vni | FORWARDED).into());
            let pass_on = |out| apply(vec![marked.clone(), Action::output(out)]);
            self.put(L2, 110, matching.clone(), cookie, pass_on(tunnel));
            // The new owner's other guests may not know of the switch yet; back by the same tunnel must be said so.
            self.put(L2, 120, matching.with(Field::InPort, tunnel), cookie, pass_on(port::IN_PORT));
        }
    }

    /// Broadcast and multicast: a copy to each local port and, from local ports, to each host that has or awaits one.
    pub(super) fn flood(&mut self, segment: &Segment<'_>) {
        let net = segment.net;
        let cookie = network_cookie(CookieKind::Flood, net);
        let mut taps: Vec<u32> = segment.owned.iter().map(|(_, tap)| *tap).collect();
        taps.sort_unstable();
        if taps.is_empty() {
            return;
        }
        let mut tunnels: Vec<u32> =
            segment.ports.iter().flat_map(|p| [p.host, p.prepared_at]).filter_map(|h| self.tunnel_of(h)).collect();
        tunnels.sort_unstable();
        tunnels.dedup();
        let flood = |origin: u128| {
            Match::any().with(Field::Reg0, net.vni).with(Field::Reg1, origin).with_mask(
                Field::EthDst,
                GROUP_BIT,
                GROUP_BIT,
            )
        };
        let local: Vec<Action> = taps.into_iter().map(Action::output).collect();
        self.put(L2, 90, flood(FROM_TUNNEL), cookie, apply(local.clone()));
        let mut all = local;
        if !tunnels.is_empty() {
            all.push(Action::SetField(Field::TunnelId, net.vni.into()));
            all.extend(tunnels.into_iter().map(Action::output));
        }
        self.put(L2, 90, flood(FROM_LOCAL), cookie, apply(all));
    }
}
