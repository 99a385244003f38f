//! The driver against real switches: three hosts, two projects with the same addresses, a move, a killed switch.
#![expect(clippy::unwrap_used, reason = "a test")]

mod ovs_lab;

use std::{net::Ipv4Addr, process::Command, sync::Arc, time::Duration};

use ovs_lab::{Lab, missing, must, run};
use supercloud_ids::{Epoch, HostId, NetworkId, PortId, ProjectId};
use supercloud_sdn::{
    compile::{Cookie, CookieKind, MD_LISTEN, gateway_mac, md_addr},
    ovsdb::OvsdbError,
    shown,
    switch::{SwitchDriver, SwitchError},
    tap,
    view::{HostView, NetworkView, OverlayView, PortView},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn network(vni: u32) -> NetworkView {
    NetworkView {
        network: NetworkId::generate(),
        project: ProjectId::generate(),
        vni,
        cidr: "10.77.0.0/24".parse().unwrap(),
        cidr6: Some("fd77::/64".parse().unwrap()),
        gateway: Ipv4Addr::new(10, 77, 0, 1),
        dns: vec![Ipv4Addr::new(10, 77, 0, 2)],
        mtu: 1450,
    }
}

fn port(net: &NetworkView, n: u8, host: Option<HostId>) -> PortView {
    PortView {
        port: PortId::generate(),
        network: net.network,
        mac: format!("02:00:00:00:00:{n:02x}").parse().unwrap(),
        ipv4: Ipv4Addr::new(10, 77, 0, n),
        ipv6: Some(format!("fd77::{n:x}").parse().unwrap()),
        hostname: Some(format!("guest-{n}")),
        host,
        epoch: Epoch(1),
        prepared_at: None,
        moved_from: None,
    }
}

fn address(ns: &str, interface: &str, n: u8) {
    must(&format!(
        "ip -n {ns} addr add 10.77.0.{n}/24 dev {interface} && ip -n {ns} route add default via 10.77.0.1 && \
         ip -n {ns} -6 addr add fd77::{n:x}/64 dev {interface} nodad"
    ));
}

/// Answers out of `count` echoes.
fn ping(ns: &str, target: &str, count: u32, more: &str) -> u32 {
    let out = run(&format!("ip netns exec {ns} busybox ping -c {count} -i 0.1 -W 1 {more} {target}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let received =
        text.split(" packets received").next().and_then(|t| t.rsplit(' ').next()).and_then(|t| t.parse().ok());
    received.unwrap_or(0)
}

/// Whether all of three echoes come back, in the end: the datapath's cache follows a change of flows a little later.
fn reaches(ns: &str, target: &str, more: &str) -> bool {
    (0..20).any(|_| ping(ns, target, 3, more) == 3)
}

struct World {
    view: OverlayView,
    drivers: Vec<Arc<SwitchDriver>>,
}

impl World {
    fn apply(&mut self, lab: &Lab, hosts: &[usize]) {
        for at in hosts {
            let (driver, view) = (self.drivers[*at].clone(), self.view.clone());
            lab.hosts[*at].on(async move { driver.apply(view).await.unwrap() });
        }
    }

    fn attach(&self, lab: &Lab, at: usize, port: PortId, tap: &str) -> u32 {
        let (driver, tap) = (self.drivers[at].clone(), tap.to_owned());
        lab.hosts[at].on(async move { driver.attach_tap(port, &tap).await.unwrap() })
    }

    /// Nothing is left to change, at any host.
    fn assert_settled(&self, lab: &Lab) {
        for (host, driver) in lab.hosts.iter().zip(&self.drivers) {
            let driver = driver.clone();
            let again = host.on(async move { driver.reconcile().await.unwrap() });
            assert_eq!((again.added, again.removed), (0, 0), "{} is settled", host.ns);
        }
    }
}

#[test]
fn real_switches_carry_isolate_move_and_recover() {
    if let Some(reason) = missing() {
        assert!(std::env::var_os("SUPERCLOUD_REQUIRE").is_none(), "SUPERCLOUD_REQUIRE is set, but {reason}");
        println!("SKIPPED real_switches_carry_isolate_move_and_recover: {reason}");
        return;
    }
    let mut lab = Lab::start(3);
    let ids: Vec<HostId> = lab.hosts.iter().map(|h| h.id).collect();
    let (a, b) = (network(101), network(102));
    let ports = [
        port(&a, 11, Some(ids[0])),
        port(&a, 12, Some(ids[1])),
        port(&a, 13, Some(ids[0])),
        port(&b, 11, Some(ids[0])),
        port(&b, 33, Some(ids[1])),
        port(&a, 14, Some(ids[2])),
        // Known, but not running anywhere.
        port(&a, 15, None),
    ];
    let mac = |n: usize| ports[n].mac.to_string();
    let a11 = lab.guest("a11", 0, "sda11", &mac(0));
    let a12 = lab.guest("a12", 1, "sda12", &mac(1));
    let a13 = lab.guest("a13", 0, "sda13", &mac(2));
    let b11 = lab.guest("b11", 0, "sdb11", &mac(3));
    let b33 = lab.guest("b33", 1, "sdb33", &mac(4));
    let a14 = lab.guest("a14", 2, "sda14", &mac(5));
    let drivers = lab.hosts.iter().map(ovs_lab::Host::driver).collect();
    let hosts = lab
        .hosts
        .iter()
        .map(|h| HostView { host: h.id, overlay_addr: h.overlay_addr, index: h.index, encryption: None })
        .collect();
    let view = OverlayView { revision: 1, hosts, networks: vec![a, b], ports: ports.to_vec() };
    let mut world = World { view, drivers };
    let number = world.attach(&lab, 0, ports[0].port, "sda11");
    for (n, at, tap) in [(1, 1, "sda12"), (2, 0, "sda13"), (3, 0, "sdb11"), (4, 1, "sdb33"), (5, 2, "sda14")] {
        world.attach(&lab, at, ports[n].port, tap);
    }
    world.apply(&lab, &[0, 1, 2]);
    world.assert_settled(&lab);

    dhcp_gives_the_ports_own_address(&lab, &a11);
    for (ns, n) in [(&a12, 12), (&a13, 13), (&b11, 11), (&b33, 33), (&a14, 14)] {
        address(ns, "eth0", n);
    }
    must(&format!("ip -n {a11} -6 addr add fd77::b/64 dev eth0 nodad"));
    traffic_flows_inside_a_network_only(&a11, &b11);
    answers_are_local(&a11);
    spoofed_sources_are_dropped(&a11);
    guests_reach_metadata_and_no_host(&lab, &a11, number);
    a_move_is_cut_over(&mut lab, &mut world, &a11, &a13, &a14);
    a_killed_switch_comes_back(&lab, &world, &a11);
    a_new_driver_takes_over(&lab, &mut world, &a11);
    detached_ports_leave_nothing(&lab, &world);
    taps_are_sealed_against_the_hosts_own_stack(&lab, &mut world);
}

fn dhcp_gives_the_ports_own_address(lab: &Lab, ns: &str) {
    let script = lab.hosts[0].rundir.join("udhcpc.sh");
    let said = lab.hosts[0].rundir.join("udhcpc.out");
    std::fs::write(&script, format!("#!/bin/sh\n[ \"$1\" = bound ] && env > {}\nexit 0\n", said.display())).unwrap();
    must(&format!("chmod +x {}", script.display()));
    must(&format!(
        "ip netns exec {ns} timeout 30 busybox udhcpc -i eth0 -n -q -f -t 10 -T 1 -O mtu -O 121 -s {} 2>&1",
        script.display()
    ));
    let said = std::fs::read_to_string(said).unwrap();
    for line in
        ["ip=10.77.0.11", "subnet=255.255.255.0", "router=10.77.0.1", "dns=10.77.0.2", "mtu=1450", "hostname=guest-11"]
    {
        assert!(said.lines().any(|l| l == line), "{line} in\n{said}");
    }
    must(&format!("ip -n {ns} addr add 10.77.0.11/24 dev eth0 && ip -n {ns} route add default via 10.77.0.1"));
}

fn traffic_flows_inside_a_network_only(a11: &str, b11: &str) {
    // The tunnel was warmed when it was made: not even the first packet is lost.
    assert_eq!(ping(a11, "10.77.0.12", 3, ""), 3, "across hosts");
    assert_eq!(ping(a11, "10.77.0.13", 3, ""), 3, "on one host");
    assert!(reaches(a11, "fd77::c", "-6"), "IPv6 across hosts");
    assert_eq!(ping(a11, "10.77.0.12", 2, "-s 1422"), 2, "packets of the whole MTU");
    assert_eq!(ping(a11, "ff02::1%eth0", 2, "-6"), 2, "multicast");
    assert_eq!(ping(b11, "10.77.0.33", 3, ""), 3, "the other project");
    assert_eq!(ping(a11, "10.77.0.33", 2, ""), 0, "no way into another project");
    assert_eq!(ping(b11, "10.77.0.12", 2, ""), 0, "nor out of it");
}

fn answers_are_local(a11: &str) {
    assert_eq!(ping(a11, "10.77.0.15", 1, ""), 0, "it does not run");
    assert_eq!(ping(a11, "fd77::f", 1, "-6"), 0, "it does not run");
    let known = must(&format!("ip -n {a11} neigh show"));
    for address in ["10.77.0.15 dev eth0 lladdr 02:00:00:00:00:0f", "fd77::f dev eth0 lladdr 02:00:00:00:00:0f"] {
        assert!(known.contains(address), "{address} in\n{known}");
    }
}

fn spoofed_sources_are_dropped(a11: &str) {
    must(&format!("ip -n {a11} addr add 10.77.0.99/24 dev eth0"));
    assert_eq!(ping(a11, "10.77.0.12", 2, "-I 10.77.0.99"), 0, "another's IPv4 address");
    must(&format!("ip -n {a11} addr del 10.77.0.99/24 dev eth0"));
    must(&format!("ip -n {a11} link set eth0 address 02:00:00:00:00:63"));
    assert_eq!(ping(a11, "10.77.0.12", 2, ""), 0, "another's Ethernet address");
    must(&format!("ip -n {a11} link set eth0 address 02:00:00:00:00:0b"));
    assert!(reaches(a11, "10.77.0.12", ""), "its own");
}

fn guests_reach_metadata_and_no_host(lab: &Lab, a11: &str, number: u32) {
    let host = &lab.hosts[0];
    let listener = host.on(async { tokio::net::TcpListener::bind((MD_LISTEN, 80)).await.unwrap() });
    host.spawn(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(format!("HTTP/1.0 200 OK\r\n\r\n{}", peer.ip()).as_bytes()).await;
        }
    });
    let seen = must(&format!("ip netns exec {a11} timeout 20 busybox wget -qO- http://169.254.169.254/"));
    assert_eq!(seen, md_addr(number).to_string(), "the service knows the guest by its switch port");
    let known = must(&format!("ip -n {a11} neigh show 10.77.0.1"));
    assert!(known.contains(&gateway_mac().to_string()), "{known}");
    for target in ["198.19.200.1", "169.254.64.1", "169.254.169.253"] {
        assert_eq!(ping(a11, target, 1, ""), 0, "{target}");
    }
}

fn a_move_is_cut_over(lab: &mut Lab, world: &mut World, a11: &str, a13: &str, a14: &str) {
    let ids: Vec<HostId> = lab.hosts.iter().map(|h| h.id).collect();
    let moved = world.view.ports[2].port;
    // Prepared: the destination has the tap, and is silent.
    lab.wire(a13, "eth1", 1, "sdm13", "02:00:00:00:00:0d");
    world.attach(lab, 1, moved, "sdm13");
    world.view.revision = 2;
    world.view.ports[2].prepared_at = Some(ids[1]);
    world.apply(lab, &[0, 1, 2]);
    assert!(reaches(a11, "10.77.0.13", ""), "still at the source");

    let mut stream = Command::new("ip")
        .args(["netns", "exec", a11, "busybox", "ping", "-c", "60", "-i", "0.1", "-W", "1", "10.77.0.13"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    must(&format!("ip -n {a13} addr flush dev eth0 && ip -n {a13} link set eth0 down"));
    address(a13, "eth1", 13);
    // The hosts of the move learn of the switch before the controller's view comes; the third host knows nothing.
    for at in [1, 0] {
        let (driver, to) = (world.drivers[at].clone(), ids[1]);
        let applied = lab.hosts[at].on(async move { driver.note_switch(moved, to, Epoch(2)).await.unwrap() });
        assert!(applied.added > 0, "one bundle changes it");
    }
    assert!(reaches(a11, "10.77.0.13", ""), "at the destination");

    let counters = |world: &World| {
        let driver = world.drivers[1].clone();
        lab.hosts[1].on(async move { driver.port_counters(moved).await.unwrap() })
    };
    let before = counters(world).tx_packets;
    assert_eq!(ping(a14, "10.77.0.13", 3, ""), 0, "a host that does not know of the switch takes no frame from there");
    assert!(counters(world).tx_packets >= before + 3, "but what it sends is forwarded by the source");
    let look = {
        let (driver, network) =
            (world.drivers[1].clone(), world.view.ports.iter().find(|p| p.port == moved).unwrap().network);
        lab.hosts[1].on(async move { driver.look(moved, network).await.unwrap() })
    };
    assert_eq!(look.counters.tx_packets, counters(world).tx_packets);
    let kinds: Vec<_> = look.flows.iter().filter_map(|flow| Cookie(flow.cookie).kind()).collect();
    for kind in [CookieKind::Guest, CookieKind::Dhcp, CookieKind::Deliver, CookieKind::Flood] {
        assert!(kinds.contains(&kind), "{kind:?} is among {kinds:?}");
    }
    let tap = look.names.get(&look.counters.port).unwrap();
    let delivered = look.flows.iter().filter(|flow| Cookie(flow.cookie).is(CookieKind::Deliver));
    let delivered: Vec<String> = delivered.map(|flow| shown::actions(&flow.instructions, &look.names)).collect();
    assert!(delivered.contains(&format!("output:{tap}")), "{delivered:?}");
    assert!(look.flows.iter().any(|flow| flow.packets > 0), "what has passed is counted");

    // An older view does not undo it, the controller's next one completes it.
    world.view.revision = 3;
    world.apply(lab, &[1]);
    assert!(reaches(a11, "10.77.0.13", ""), "an older epoch changes nothing");
    assert!(world.view.note_switch(moved, ids[1], Epoch(2)));
    world.view.revision = 4;
    world.apply(lab, &[0, 1, 2]);
    assert!(reaches(a14, "10.77.0.13", ""), "everybody knows");
    world.assert_settled(lab);
    let status = stream.wait().unwrap();
    assert!(status.success(), "the running ping got answers");
    let driver = world.drivers[0].clone();
    lab.hosts[0].on(async move { driver.detach(moved).await.unwrap() });
    world.view.ports[2].moved_from = None;
    world.view.revision = 5;
    world.apply(lab, &[0, 1, 2]);
    assert!(reaches(a11, "10.77.0.13", ""), "the move is finished");
}

fn a_killed_switch_comes_back(lab: &Lab, world: &World, a11: &str) {
    let host = &lab.hosts[1];
    let pid = std::fs::read_to_string(host.rundir.join("vsw.pid")).unwrap();
    must(&format!("kill -9 {}", pid.trim()));
    host.start_vswitchd();
    let mut status = world.drivers[1].status();
    host.on(async move {
        tokio::time::timeout(Duration::from_secs(60), status.wait_for(|s| s.connected && s.reconciled > 0))
            .await
            .expect("the switch comes back")
            .unwrap();
    });
    assert!(reaches(a11, "10.77.0.12", ""), "after the restart");
    world.assert_settled(lab);
    // A foreign hand: a flow removed and one added are put right, and nothing else is touched.
    host.ofctl("add-flow br-int table=0,priority=7,actions=drop");
    host.ofctl("--strict del-flows br-int table=4,priority=0");
    let driver = world.drivers[1].clone();
    let healed = host.on(async move { driver.reconcile().await.unwrap() });
    assert_eq!((healed.added, healed.removed), (1, 1));
}

/// The agent restarts: what is in the switch goes on, and the new driver takes it up.
fn a_new_driver_takes_over(lab: &Lab, world: &mut World, a11: &str) {
    let before = lab.hosts[0].ofctl("--no-stats dump-flows br-int");
    let old = world.drivers.remove(0);
    let had = lab.hosts[0].on({
        let old = old.clone();
        async move { old.attached().await.unwrap() }
    });
    drop(old);
    world.drivers.insert(0, lab.hosts[0].driver());
    assert_eq!(lab.hosts[0].ofctl("--no-stats dump-flows br-int"), before, "no flow is touched");
    let driver = world.drivers[0].clone();
    assert_eq!(lab.hosts[0].on(async move { driver.attached().await.unwrap() }), had);
    assert!(reaches(a11, "10.77.0.12", ""));
    let (driver, view) = (world.drivers[0].clone(), world.view.clone());
    let applied = lab.hosts[0].on(async move { driver.apply(view).await.unwrap() });
    assert_eq!((applied.added, applied.removed), (0, 0), "everything was right");
}

fn detached_ports_leave_nothing(lab: &Lab, world: &World) {
    let (host, driver) = (&lab.hosts[2], world.drivers[2].clone());
    let id = world.view.ports[5].port;
    let attached = host.on(async move {
        driver.detach(id).await.unwrap();
        driver.detach(id).await.unwrap();
        driver.attached().await.unwrap()
    });
    assert!(attached.is_empty(), "{attached:?}");
    let driver = world.drivers[2].clone();
    let (refused, attached) =
        host.on(async move { (driver.attach_tap(id, "sdnothere").await, driver.attached().await.unwrap()) });
    assert!(matches!(refused, Err(SwitchError::Ovsdb(OvsdbError::NoPort { .. }))), "{refused:?}");
    assert!(attached.is_empty(), "a tap that is not there leaves nothing");
    let flows = host.ofctl("--no-stats dump-flows br-int");
    assert!(!flows.contains("reg0"), "{flows}");
}

fn taps_are_sealed_against_the_hosts_own_stack(lab: &Lab, world: &mut World) {
    let host = &lab.hosts[0];
    let (sealed, open) = ("sdsealed", "sdopen");
    let answers = |name: &'static str, target: [u8; 4]| {
        host.on(async move { tokio::task::spawn_blocking(move || hears_arp(name, target)).await.unwrap() })
    };
    host.on(async move {
        tokio::task::spawn_blocking(move || {
            tap::create(sealed, 1450, None, tap::Reader::Userspace).unwrap();
            tap::create(sealed, 1400, None, tap::Reader::Userspace).unwrap();
            assert!(tap::exists(sealed));
        })
        .await
        .unwrap();
    });
    must(&format!("ip -n {} tuntap add {open} mode tap && ip -n {} link set {open} up", host.ns, host.ns));
    let underlay = host.overlay_addr.octets();
    assert!(answers(open, underlay), "the question is one that a host answers");
    assert!(!answers(sealed, underlay), "but not to a guest");
    // The switch hears what the host's own stack does not.
    let guest = port(&world.view.networks[0], 0x44, Some(host.id));
    let id = guest.port;
    world.view.ports.push(guest);
    world.view.revision += 1;
    world.attach(lab, 0, id, sealed);
    world.apply(lab, &[0]);
    assert!(answers(sealed, [10, 77, 0, 1]), "the gateway is answered for by the switch");
    assert!(!answers(sealed, underlay), "and the host still does not answer");
    let driver = world.drivers[0].clone();
    host.on(async move { driver.detach(id).await.unwrap() });
    let details = must(&format!("ip -n {} link show {sealed}", host.ns));
    assert!(details.contains("mtu 1400"), "{details}");
    host.on(async move {
        tokio::task::spawn_blocking(move || {
            tap::remove(sealed).unwrap();
            tap::remove(sealed).unwrap();
            assert!(!tap::exists(sealed));
        })
        .await
        .unwrap();
    });
    must(&format!("ip -n {} link del {open}", host.ns));
}

/// Whether a guest at this tap that asks by ARP for an address hears an answer.
fn hears_arp(name: &str, target: [u8; 4]) -> bool {
    use std::{
        io::{Read, Write},
        os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    };
    let mut file =
        std::fs::File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").unwrap();
    // SAFETY: all zeros is a valid ifreq, and the kernel writes no further than its end.
    let rc = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request)
    };
    assert_eq!(rc, 0, "attaching to {name}");
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 0x44, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 0x44, 10, 77, 0, 0x44]);
    frame.extend([0; 6]);
    frame.extend(target);
    frame.resize(60, 0);
    let mut buffer = [0; 2048];
    for _ in 0..10 {
        // A tap without carrier refuses writes for a moment.
        let _ = file.write(&frame);
        let until = std::time::Instant::now() + Duration::from_millis(100);
        while std::time::Instant::now() < until {
            match file.read(&mut buffer) {
                Ok(n) if n >= 42 && buffer[12..14] == [8, 6] && buffer[20..22] == [0, 2] => return true,
                Ok(_) => {}
                Err(_) => std::thread::yield_now(),
            }
        }
    }
    false
}
