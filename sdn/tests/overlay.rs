//! What the compiled flows do, over many views and over hosts that are at different views.
#![expect(clippy::unwrap_used, reason = "a test")]

mod overlay_sim;

use std::{collections::BTreeSet, net::Ipv4Addr};

use overlay_sim::{Packet, World, arp_request, empty_view, ipv4, solicit, unicast};
use proptest::prelude::*;
use supercloud_sdn::{
    addr::MacAddr,
    compile::{FORWARDED, METADATA_ADDR, compile, gateway_mac, md_addr, md_ofport},
    openflow::Field,
    view::{MAX_VNI, OverlayView, ViewError},
};

const HOSTS: usize = 4;
const PORTS: usize = 3;

/// What can happen to a port.
#[derive(Debug, Clone, Copy)]
enum Event {
    Start(usize),
    Prepare(usize),
    Switch,
    Cancel,
    Finish,
    Stop,
}

fn happen(view: &OverlayView, port: usize, event: Event) -> Option<OverlayView> {
    let mut next = view.clone();
    next.revision += 1;
    let hosts: Vec<_> = view.hosts.iter().map(|h| h.host).collect();
    let p = &mut next.ports[port];
    match event {
        Event::Start(at) if p.host.is_none() => {
            p.host = Some(hosts[at]);
            p.epoch = p.epoch.next();
            p.moved_from = None;
        }
        Event::Prepare(at) if p.host.is_some_and(|h| h != hosts[at]) => p.prepared_at = Some(hosts[at]),
        Event::Switch if p.host.is_some() && p.prepared_at.is_some() => {
            let (id, to, epoch) = (p.port, p.prepared_at?, p.epoch.next());
            assert!(next.note_switch(id, to, epoch));
        }
        Event::Cancel if p.prepared_at.is_some() => p.prepared_at = None,
        Event::Finish if p.moved_from.is_some() => p.moved_from = None,
        Event::Stop if p.host.is_some() => {
            p.host = None;
            p.prepared_at = None;
            p.moved_from = None;
        }
        _ => return None,
    }
    Some(next)
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0..HOSTS).prop_map(Event::Start),
        4 => (0..HOSTS).prop_map(Event::Prepare),
        4 => Just(Event::Switch),
        1 => Just(Event::Cancel),
        1 => Just(Event::Finish),
        1 => Just(Event::Stop),
    ]
}

/// All views of a history, from the first on.
fn history() -> impl Strategy<Value = Vec<OverlayView>> {
    proptest::collection::vec((0..2 * PORTS, event()), 1..40).prop_map(|events| {
        let mut views = vec![empty_view(HOSTS, 2, PORTS)];
        for (n, port) in (0..2 * PORTS).enumerate() {
            views.extend(happen(views.last().unwrap(), port, Event::Start(n % HOSTS)));
        }
        for (port, event) in events {
            views.extend(happen(views.last().unwrap(), port, event));
        }
        views
    })
}

fn network_of(view: &OverlayView, tap: u32) -> Option<supercloud_ids::NetworkId> {
    view.ports.get(tap as usize - 1).map(|p| p.network)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]

    /// Everybody knows the same: each frame gets exactly where it should, once.
    #[test]
    fn one_view_is_one_right_segment(views in history()) {
        let view = views.last().unwrap();
        let world = World::new(&[view; HOSTS]);
        let running: Vec<_> = view.ports.iter().filter(|p| p.host.is_some()).collect();
        for p in &running {
            let (host, tap) = (world.number(p.host.unwrap()), world.tap(p.port));
            for q in view.ports.iter().filter(|q| q.port != p.port) {
                let got = world.send(host, tap, &ipv4((p.mac, p.ipv4), (q.mac, q.ipv4)));
                let to: Vec<_> = got.iter().map(|(h, t, _)| (*h, *t)).collect();
                // The other network has ports of the same addresses: the one of p's own network is meant.
                let meant = view.ports.iter().find(|r| r.network == p.network && r.mac == q.mac).unwrap();
                let wanted: Vec<_> = meant
                    .host
                    .filter(|_| meant.port != p.port)
                    .map(|h| (world.number(h), world.tap(meant.port)))
                    .into_iter()
                    .collect();
                prop_assert_eq!(to, wanted);
            }
            for group in [MacAddr::BROADCAST, MacAddr([0x33, 0x33, 0, 0, 0, 1]), MacAddr([1, 0, 0x5e, 0, 0, 9])] {
                let mut to: Vec<_> =
                    world.send(host, tap, &unicast(p.mac, group)).iter().map(|(h, t, _)| (*h, *t)).collect();
                to.sort_unstable();
                let mut wanted: Vec<_> = running
                    .iter()
                    .filter(|q| q.network == p.network && q.port != p.port)
                    .map(|q| (world.number(q.host.unwrap()), world.tap(q.port)))
                    .collect();
                wanted.sort_unstable();
                prop_assert_eq!(to, wanted, "to {}", group);
            }
        }
    }

    /// Nobody knows the same: no loop (the interpreter counts), no second copy, nothing into another network.
    #[test]
    fn any_mix_of_views_loops_nowhere_and_leaks_nothing(
        views in history(),
        at in proptest::collection::vec(any::<proptest::sample::Index>(), HOSTS),
    ) {
        let mixed: Vec<&OverlayView> = at.iter().map(|i| i.get(&views)).collect();
        let world = World::new(&mixed);
        let all = &views[0].ports;
        for host in 0..HOSTS {
            for p in all {
                let tap = world.tap(p.port);
                let mut frames: Vec<Packet> = all.iter().map(|q| unicast(p.mac, q.mac)).collect();
                frames.extend([MacAddr::BROADCAST, gateway_mac()].map(|m| unicast(p.mac, m)));
                for frame in &frames {
                    let got = world.send(host, tap, frame);
                    let places: BTreeSet<_> = got.iter().map(|(h, t, _)| (*h, *t)).collect();
                    prop_assert_eq!(places.len(), got.len(), "a second copy of {:?}", frame);
                    prop_assert!(frame[&Field::EthDst] >> 40 & 1 == 1 || got.len() <= 1);
                    for (_, to, _) in &got {
                        prop_assert_eq!(network_of(&views[0], *to), Some(p.network));
                    }
                }
            }
        }
    }

    /// A port speaks with its own addresses, and only where it runs.
    #[test]
    fn only_the_owner_speaks_and_only_as_itself(views in history()) {
        let view = views.last().unwrap();
        let world = World::new(&[view; HOSTS]);
        for p in &view.ports {
            let tap = world.tap(p.port);
            let peer = view.ports.iter().find(|q| q.network == p.network && q.port != p.port && q.host.is_some());
            let Some(q) = peer else { continue };
            for host in 0..HOSTS {
                let sent = |frame: &Packet| world.send(host, tap, frame).len();
                let runs_here = p.host == Some(world.hosts[host]);
                let other = Ipv4Addr::new(10, 0, 0, 200);
                prop_assert_eq!(sent(&ipv4((p.mac, p.ipv4), (q.mac, q.ipv4))), usize::from(runs_here));
                prop_assert_eq!(sent(&ipv4((q.mac, p.ipv4), (q.mac, q.ipv4))), 0, "another's MAC");
                prop_assert_eq!(sent(&ipv4((p.mac, other), (q.mac, q.ipv4))), 0, "another's IPv4");
                prop_assert_eq!(sent(&arp_request((p.mac, other), q.ipv4)), 0, "ARP with another's IPv4");
                let mut lie = arp_request((p.mac, p.ipv4), q.ipv4);
                lie.insert(Field::ArpSha, q.mac.to_u128());
                prop_assert_eq!(sent(&lie), 0, "ARP with another's MAC");
                let mut lie = solicit(p, q);
                lie.insert(Field::NdSll, q.mac.to_u128());
                prop_assert_eq!(sent(&lie), 0, "ND with another's MAC");
                let mut lie = solicit(p, q);
                lie.insert(Field::Ipv6Src, q.ipv6.unwrap().into());
                prop_assert_eq!(sent(&lie), 0, "another's IPv6");
                for blocked in ["198.18.0.1", "198.19.200.1", "169.254.0.7", "169.254.64.1"] {
                    prop_assert_eq!(sent(&ipv4((p.mac, p.ipv4), (q.mac, blocked.parse().unwrap()))), 0, "{}", blocked);
                }
                // By a tunnel, a MAC comes only from its owner's, and leaves by none again but marked, for who moved.
                let net = view.networks.iter().find(|n| n.network == p.network).unwrap();
                for peer in (0..HOSTS).filter(|n| *n != host) {
                    for q in view.ports.iter().filter(|q| q.network == p.network) {
                        let mut frame = unicast(p.mac, q.mac);
                        frame.insert(Field::TunnelId, net.vni.into());
                        let out = overlay_sim::process(&world.tables[host], 1000 + peer as u32, &frame);
                        prop_assert!(out.is_empty() || p.host == Some(world.hosts[peer]), "{:?}", out);
                        for (to, packet) in out.iter().filter(|(to, _)| *to >= 1000) {
                            prop_assert_eq!(q.moved_from, Some(world.hosts[host]), "to {}", to);
                            prop_assert_eq!(packet[&Field::TunnelId], (net.vni | FORWARDED).into());
                        }
                    }
                    let mut frame = unicast(p.mac, MacAddr::BROADCAST);
                    frame.insert(Field::TunnelId, net.vni.into());
                    let out = overlay_sim::process(&world.tables[host], 1000 + peer as u32, &frame);
                    prop_assert!(out.iter().all(|(to, _)| *to < 1000), "{:?}", out);
                }
            }
        }
    }

    #[test]
    fn compiling_is_deterministic_and_whatever_the_order(views in history(), seed: u64) {
        let view = views.last().unwrap();
        let mut shuffled = view.clone();
        let by = |n: u128| (n as u64).wrapping_mul(seed | 1);
        shuffled.ports.sort_by_key(|p| by(p.port.uuid().as_u128()));
        shuffled.networks.sort_by_key(|n| by(n.network.uuid().as_u128()));
        let world = World::new(&[view; HOSTS]);
        let local = supercloud_sdn::compile::LocalPorts {
            taps: world.ports.iter().zip(1..).map(|(p, n)| (*p, n)).collect(),
            ..Default::default()
        };
        for host in &world.hosts {
            let tables = compile(view, *host, &local).unwrap();
            prop_assert_eq!(&tables, &compile(&shuffled, *host, &local).unwrap());
            prop_assert!(tables.changes_from(&[], &[]).counts() == (tables.len(), 0));
        }
    }
}

/// Source A, destination B, a peer X, and a guest beside each, with every mix of "prepared" and "switched".
#[test]
fn a_moved_guest_is_reached_whoever_knows_of_the_switch() {
    let start = empty_view(3, 1, 4);
    let mut prepared = start;
    for (port, at) in [(0, 0), (1, 0), (2, 1), (3, 2)] {
        prepared = happen(&prepared, port, Event::Start(at)).unwrap();
    }
    prepared = happen(&prepared, 0, Event::Prepare(1)).unwrap();
    let switched = happen(&prepared, 0, Event::Switch).unwrap();
    let (mover, tap) = (&prepared.ports[0], 1);
    for mix in 0..8 {
        let knows = |host: usize| mix >> host & 1 == 1;
        let views: Vec<_> = (0..3).map(|h| if knows(h) { &switched } else { &prepared }).collect();
        let world = World::new(&views);
        for (sender, host) in [(1, 0), (2, 1), (3, 2)] {
            let got = world.send(host, sender as u32 + 1, &unicast(prepared.ports[sender].mac, mover.mac));
            let to: Vec<_> = got.iter().map(|(h, t, _)| (*h, *t)).collect();
            // Whoever does not know sends to the source, which passes on what it has given up.
            let place = if knows(host) || knows(0) { 1 } else { 0 };
            assert_eq!(to, [(place, tap)], "mix {mix:03b}, from host {host}");
        }
        // Before its host knows, the guest is silent at the destination.
        let said = world.send(1, tap, &unicast(mover.mac, MacAddr::BROADCAST));
        assert_eq!(said.is_empty(), !knows(1), "mix {mix:03b}");
    }
}

#[test]
fn questions_are_answered_at_the_askers_switch() {
    let mut view = empty_view(2, 1, 3);
    view = happen(&view, 0, Event::Start(0)).unwrap();
    view = happen(&view, 1, Event::Start(1)).unwrap();
    let world = World::new(&[&view, &view]);
    let me = &view.ports[0];
    // The third port does not run: it is answered for too.
    let known = [(view.ports[1].ipv4, view.ports[1].mac), (view.ports[2].ipv4, view.ports[2].mac)];
    for (addr, mac) in
        known.into_iter().chain([(Ipv4Addr::new(10, 0, 0, 1), gateway_mac()), (METADATA_ADDR, gateway_mac())])
    {
        let got = world.send(0, 1, &arp_request((me.mac, me.ipv4), addr));
        assert_eq!(got.len(), 1, "{addr}");
        let (host, port, answer) = &got[0];
        assert_eq!((*host, *port), (0, 1));
        assert_eq!(answer[&Field::ArpOp], 2);
        assert_eq!(answer[&Field::ArpSha], mac.to_u128());
        assert_eq!(answer[&Field::ArpSpa], u128::from(u32::from(addr)));
        assert_eq!(answer[&Field::ArpTha], me.mac.to_u128());
        assert_eq!(answer[&Field::ArpTpa], u128::from(u32::from(me.ipv4)));
        assert_eq!((answer[&Field::EthSrc], answer[&Field::EthDst]), (mac.to_u128(), me.mac.to_u128()));
    }
    // Its own address: a probe that must not be answered by anybody but another owner.
    let own = world.send(0, 1, &arp_request((me.mac, Ipv4Addr::UNSPECIFIED), me.ipv4));
    assert!(own.iter().all(|(host, _, packet)| *host == 1 && packet[&Field::ArpOp] == 1), "{own:?}");
    let got = world.send(0, 1, &solicit(me, &view.ports[1]));
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].2[&Field::Icmpv6Type], 136);
    assert_eq!(got[0].2[&Field::NdTll], view.ports[1].mac.to_u128());
    assert_eq!(got[0].2[&Field::Ipv6Dst], u128::from(me.mac.link_local()));
}

#[test]
fn metadata_goes_out_under_the_ports_stand_in_and_comes_back() {
    let view = happen(&empty_view(1, 1, 1), 0, Event::Start(0)).unwrap();
    let world = World::new(&[&view]);
    let me = &view.ports[0];
    let got = world.send(0, 1, &ipv4((me.mac, me.ipv4), (gateway_mac(), METADATA_ADDR)));
    let (_, to, request) = &got[0];
    assert_eq!(*to, 999);
    assert_eq!(request[&Field::Ipv4Src], u128::from(u32::from(md_addr(1))));
    let mut answer = request.clone();
    for (a, b) in [(Field::Ipv4Src, Field::Ipv4Dst), (Field::EthSrc, Field::EthDst), (Field::TcpSrc, Field::TcpDst)] {
        let (x, y) = (request[&a], request[&b]);
        answer.insert(a, y);
        answer.insert(b, x);
    }
    let back = world.send(0, 999, &answer);
    assert_eq!(back.len(), 1);
    assert_eq!(back[0].1, 1);
    assert_eq!(back[0].2[&Field::Ipv4Src], u128::from(u32::from(METADATA_ADDR)));
    assert_eq!(back[0].2[&Field::Ipv4Dst], u128::from(u32::from(me.ipv4)));
    assert_eq!(md_ofport(md_addr(1)), Some(1));
    // Another port of the service is none.
    let mut other = ipv4((me.mac, me.ipv4), (gateway_mac(), METADATA_ADDR));
    other.insert(Field::TcpDst, 22);
    assert!(world.send(0, 1, &other).is_empty());
}

#[test]
fn views_that_would_break_isolation_are_refused() {
    let view = empty_view(2, 2, 2);
    assert_eq!(view.check(), Ok(()));
    type Change = Box<dyn Fn(&mut OverlayView)>;
    let broken: Vec<(&str, Change)> = vec![
        ("VNI twice", Box::new(|v| v.networks[1].vni = v.networks[0].vni)),
        ("VNI of forwarded frames", Box::new(|v| v.networks[0].vni = MAX_VNI + 1)),
        ("VNI 0", Box::new(|v| v.networks[0].vni = 0)),
        ("MAC twice", Box::new(|v| v.ports[1].mac = v.ports[0].mac)),
        ("the gateway's MAC", Box::new(|v| v.ports[0].mac = gateway_mac())),
        ("a group MAC", Box::new(|v| v.ports[0].mac = MacAddr::BROADCAST)),
        ("IPv4 twice", Box::new(|v| v.ports[1].ipv4 = v.ports[0].ipv4)),
        ("the gateway's IPv4", Box::new(|v| v.ports[0].ipv4 = v.networks[0].gateway)),
        ("IPv4 outside", Box::new(|v| v.ports[0].ipv4 = Ipv4Addr::new(10, 0, 1, 1))),
        ("the broadcast address", Box::new(|v| v.ports[0].ipv4 = Ipv4Addr::new(10, 0, 0, 255))),
        ("IPv6 outside", Box::new(|v| v.ports[0].ipv6 = Some("fe80::1".parse().unwrap()))),
        ("port twice", Box::new(|v| v.ports[1].port = v.ports[0].port)),
        ("index twice", Box::new(|v| v.hosts[1].index = v.hosts[0].index)),
        ("unknown host", Box::new(|v| v.ports[0].host = Some(supercloud_ids::HostId::generate()))),
        ("unknown network", Box::new(|v| v.ports[0].network = supercloud_ids::NetworkId::generate())),
        ("hostname", Box::new(|v| v.ports[0].hostname = Some("a b".into()))),
        ("small MTU", Box::new(|v| v.networks[0].mtu = 576)),
    ];
    for (what, change) in broken {
        let mut bad = view.clone();
        change(&mut bad);
        let refused: Result<(), ViewError> = bad.check();
        assert!(refused.is_err(), "{what}");
        assert!(compile(&bad, view.hosts[0].host, &Default::default()).is_err(), "{what}");
    }
}
