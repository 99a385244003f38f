//! The lab itself, with real switches and daemons: what it emulates, and that nothing of it survives.
//!
//! Needs root and the packages of ./deploy/setup; without them each test says why it does nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use supercloud_lab::command::{pause, wait_for};
use supercloud_lab::{CONTROLLER, Lab, LabError, LabSpec, LinkShape, ProcessSpec, Which, netns, state};
use supercloud_lab::{process, require};

const LONG: Duration = Duration::from_secs(30);

/// Starts a lab of the test's own, or says why it cannot.
fn start(spec: LabSpec) -> Option<Lab> {
    match Lab::start(spec) {
        Ok(lab) => Some(lab),
        Err(error @ (LabError::NotRoot | LabError::Tools { .. })) => {
            require::skip(&error.to_string());
            None
        }
        Err(error) => panic!("{}", supercloud_lab::lab::chain(&error)),
    }
}

fn unique(name: &str) -> String {
    format!("t-{name}-{}", std::process::id())
}

/// Only network and WAN: no switch, no libvirtd.
fn bare(name: &str, hosts: usize) -> LabSpec {
    LabSpec { switch: false, libvirt: false, ..LabSpec::plain(&unique(name), hosts) }
}

fn udp(lab: &Lab, host: &str) -> UdpSocket {
    let site = lab.host(host).unwrap();
    let address = SocketAddr::from((site.address(), 4000));
    let socket = netns::inside(&site.namespace, || UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    socket
}

/// Sends one datagram at a time until one is answered or `tries` are over.
fn is_reachable(from: &UdpSocket, to: &UdpSocket, tries: usize) -> bool {
    let target = to.local_addr().unwrap();
    let mut buffer = [0; 64];
    (0..tries).any(|_| {
        // A host without a link answers nothing, or its own kernel says that nobody answers ARP.
        let _ = from.send_to(b"probe", target);
        to.recv(&mut buffer).is_ok()
    })
}

fn drain(socket: &UdpSocket) -> Vec<u32> {
    let mut buffer = [0; 64];
    let mut numbers = Vec::new();
    while let Ok(length) = socket.recv(&mut buffer) {
        if let Ok(bytes) = <[u8; 4]>::try_from(&buffer[..length]) {
            numbers.push(u32::from_be_bytes(bytes));
        }
    }
    numbers
}

/// Nothing of this lab is on the machine.
fn assert_gone(name: &str, index: Option<u8>) {
    if let Some(index) = index {
        assert_eq!(netns::list(&format!("scl-{index}-")), Vec::<String>::new());
        assert!(!Path::new(&format!("/sys/class/net/scl{index}r")).exists());
    }
    let root = state::default_root();
    assert!(!root.join(name).exists() && !root.join(format!("{name}.lock")).exists());
    let mark = format!("{}/{name}/", root.display());
    let strays = || -> Vec<String> {
        let all = process::all().into_iter().filter(|process| process.is_running());
        all.map(|process| process.command_line()).filter(|line| line.contains(&mark)).collect()
    };
    // The command that was killed in the middle may have a child that is only now finding its namespace gone.
    assert!(wait_for(LONG, || strays().is_empty().then_some(())).is_some(), "{:?}", strays());
    let rmem = std::fs::read_to_string("/proc/sys/net/core/rmem_default").unwrap();
    let _held = state::machine_lock().unwrap();
    assert_eq!(rmem.trim(), std::fs::read_to_string("/proc/sys/net/core/rmem_default").unwrap().trim());
}

#[test]
fn links_keep_order_lose_what_they_should_and_can_be_cut() {
    let Some(lab) = start(bare("wan", 2)) else { return };
    let (a, b) = (udp(&lab, "h1"), udp(&lab, "h2"));
    assert!(is_reachable(&a, &b, 20));

    // Order and completeness, also while the delay changes under way.
    let target = b.local_addr().unwrap();
    for number in 0..400_u32 {
        if number % 100 == 50 {
            lab.set_link("h1", "h2", LinkShape::new(f64::from(number % 200), 0)).unwrap();
        }
        a.send_to(&number.to_be_bytes(), target).unwrap();
    }
    assert_eq!(drain(&b), (0..400).collect::<Vec<_>>());

    // Nothing gets through a link that loses everything; all does again afterwards.
    lab.set_link("h1", "h2", LinkShape { loss_ppm: 1_000_000, ..LinkShape::default() }).unwrap();
    assert!(!is_reachable(&a, &b, 3));
    lab.set_link("h1", "h2", LinkShape::default()).unwrap();
    assert!(is_reachable(&a, &b, 20));

    // A cut drops what is under way, too.
    lab.set_link("h1", "h2", LinkShape::new(2000.0, 0)).unwrap();
    a.send_to(&7_u32.to_be_bytes(), target).unwrap();
    lab.partition("h1", "h2").unwrap();
    lab.set_link("h1", "h2", LinkShape::default()).unwrap();
    lab.heal("h1", "h2").unwrap();
    assert!(is_reachable(&a, &b, 20));
    assert_eq!(drain(&b), Vec::<u32>::new());
    lab.partition("h1", "h2").unwrap();
    assert!(!is_reachable(&a, &b, 3) && !is_reachable(&b, &a, 3));
    lab.heal_all().unwrap();
    assert!(is_reachable(&a, &b, 20));

    let (links, _) = lab.links().unwrap();
    let there = links.iter().find(|link| link.from == "h1" && link.to == "h2").unwrap();
    assert!(there.counters.lost_frames > 0 && there.counters.cut_frames > 0 && there.counters.sent_frames >= 400);
    assert!(lab.partition("h1", "nowhere").is_err());
    assert!(lab.set_link("h1", "h2", LinkShape { loss_ppm: 2_000_000, ..LinkShape::default() }).is_err());
}

#[test]
fn a_host_without_power_is_silent_and_comes_back() {
    let Some(lab) = start(LabSpec { libvirt: false, ..LabSpec::plain(&unique("power"), 2) }) else { return };
    let site = lab.host("h2").unwrap();
    let address = SocketAddr::from((site.address(), 4001));
    let sleeper = ProcessSpec {
        name: "sleeper".into(),
        argv: vec!["sh".into(), "-c".into(), "setsid sleep 1000 & setsid sleep 1001 & wait".into()],
        env: Vec::new(),
        log: lab.path("logs/sleeper.log"),
    };
    lab.spawn("h2", &sleeper).unwrap();
    assert!(lab.spawn("h2", &sleeper).is_err(), "one of a name runs at a time");
    let sleeps = || site.processes().iter().filter(|process| process.program() == "sleep").count();
    assert!(wait_for(LONG, || (sleeps() == 2).then_some(())).is_some());

    // A connection to the host: its end must not be told of the host's death.
    let listener = netns::inside(&site.namespace, || TcpListener::bind(address)).unwrap().unwrap();
    let h1 = lab.host("h1").unwrap().namespace;
    let mut stream = netns::inside(&h1, || TcpStream::connect_timeout(&address, LONG)).unwrap().unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();

    lab.kill_host("h2").unwrap();
    assert_eq!(site.processes(), []);
    drop((far, listener));
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let error = stream.read(&mut [0]).expect_err("neither data nor an end may arrive");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{error}");
    assert!(lab.exec("h2", &["true"], LONG).is_err());

    lab.boot_host("h2").unwrap();
    assert!(lab.boot_host("h2").is_err());
    let back = SocketAddr::from((site.address(), 4002));
    let listener = netns::inside(&site.namespace, || TcpListener::bind(back)).unwrap().unwrap();
    netns::inside(&h1, || TcpStream::connect_timeout(&back, LONG)).unwrap().unwrap();
    drop(listener);
    lab.restart("h2", "sleeper").unwrap();
    assert!(wait_for(LONG, || (sleeps() == 2).then_some(())).is_some());
}

#[test]
fn daemons_that_are_killed_come_back_and_leftovers_are_seen() {
    let Some(lab) = start(LabSpec::plain(&unique("daemons"), 2)) else { return };
    let ping = || {
        lab.exec(
            "h1",
            &["busybox", "ping", "-c", "1", "-W", "5", &lab.host("h2").unwrap().overlay_address().to_string()],
            LONG,
        )
    };
    assert!(wait_for(LONG, || ping().ok()).is_some(), "the underlay works: {:?}", ping().err());
    assert_eq!(lab.leftovers(), Vec::<String>::new());

    // What neighbours remember of the switch must hold after its restart.
    let mac = || lab.exec("h1", &["cat", "/sys/class/net/br-phy/address"], LONG).unwrap();
    let before = mac();
    for _ in 0..2 {
        assert_eq!(lab.kill_process("h1", Which::Vswitchd, libc::SIGKILL).unwrap(), 1);
        assert_eq!(lab.kill_process("h1", Which::Libvirtd, libc::SIGKILL).unwrap(), 1);
        lab.restart_vswitchd("h1").unwrap();
        lab.restart_libvirtd("h1").unwrap();
        assert_eq!(mac(), before);
        assert!(wait_for(LONG, || ping().ok()).is_some(), "the underlay works again: {:?}", ping().err());
        assert_eq!(lab.leftovers(), Vec::<String>::new());
    }

    lab.exec("h2", &["ip", "tuntap", "add", "stray0", "mode", "tap"], LONG).unwrap();
    lab.exec("h2", &["ovs-vsctl", "add-port", "br-phy", "stray0"], LONG).unwrap();
    lab.exec("h2", &["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"], LONG).unwrap();
    lab.exec("h2", &["ovs-ofctl", "add-flow", "br-phy", "in_port=7,actions=drop"], LONG).unwrap();
    let left = lab.leftovers();
    for what in ["interface stray0", "switch port br-phy/stray0", "process sleep", "flows br-phy"] {
        assert!(left.iter().any(|line| line.contains(&format!("left: h2: {what}"))), "{what}: {left:?}");
    }

    // The way in leads to the controller and no further.
    let controller = lab.host(CONTROLLER).unwrap();
    let address = SocketAddr::from((controller.address(), 8443));
    let listener = netns::inside(&controller.namespace, || TcpListener::bind(address)).unwrap().unwrap();
    TcpStream::connect_timeout(&address, LONG).unwrap();
    drop(listener);

    let (name, index) = (lab.spec().name.clone(), lab.index().get());
    lab.stop().unwrap();
    assert_gone(&name, Some(index));
    supercloud_lab::down(&state::default_root(), &name).unwrap();
}

/// From the first system call to well after the lab is up; in a soak also hundreds of random instants (`SEED=` repeats them).
fn kill_times() -> Vec<u64> {
    let mut times = vec![0, 3, 11, 23, 41, 67, 101, 149, 211, 293, 401, 557, 760, 1200];
    if std::env::var_os("SUPERCLOUD_SOAK").is_some() {
        let mut random: u64 = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121);
        println!("SEED={random}");
        times.extend((0..400).map(|_| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % 1000
        }));
    }
    times
}

#[test]
fn whatever_instant_up_is_killed_at_down_leaves_nothing() {
    let name = unique("crash");
    let Some(lab) = start(LabSpec::plain(&name, 2)) else { return };
    drop(lab);
    let spec = std::env::temp_dir().join(format!("{name}.toml"));
    std::fs::write(&spec, toml::to_string(&LabSpec::plain(&name, 2)).unwrap()).unwrap();
    let rmem = std::fs::read_to_string("/proc/sys/net/core/rmem_default").unwrap();
    for millis in kill_times() {
        let mut up = Command::new(env!("CARGO_BIN_EXE_supercloud-lab"))
            .arg("up")
            .arg("--spec")
            .arg(&spec)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        pause(Duration::from_millis(millis));
        up.kill().unwrap();
        up.wait().unwrap();
        let index = state::StateDir::new(&state::default_root(), &name).record().unwrap().map(|record| record.index);
        println!("killed after {millis} ms, lab number {index:?}");
        // Every other time the next `up` has to clean up by itself.
        if millis % 2 == 1 {
            supercloud_lab::down(&state::default_root(), &name).unwrap();
            assert_gone(&name, index);
        }
    }
    supercloud_lab::down(&state::default_root(), &name).unwrap();
    assert_gone(&name, None);
    assert_eq!(std::fs::read_to_string("/proc/sys/net/core/rmem_default").unwrap(), rmem);
    std::fs::remove_file(spec).unwrap();
}
