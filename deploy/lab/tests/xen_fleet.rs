//! Xen hosts of different hardware, without any virtualization of the processor's: guests with a stock kernel run there, talk, and move
//! between them without losing their stream.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use supercloud_lab::{
    LabSpec,
    command::pause,
    fleet::{ClientStats, Console, Fleet, FleetSpec, GuestSpec, Said, programs},
    host_vm::{Hardware, Hypervisor},
    lab::chain,
    require,
};

/// Everything is 20 to 80 times slower in there, and slower still on a machine that others use.
const LONG: Duration = Duration::from_secs(600);
const LOOKS: usize = 600;

const NETWORK: &str = "lan";
const IMAGE: &str = "lean";

/// Two hosts of clouds with different virtual hardware.
fn spec(name: &str) -> LabSpec {
    let mut spec = LabSpec::plain(name, 2);
    for (host, hardware) in spec.hosts.iter_mut().zip([Hardware::Virtio, Hardware::Vmware]) {
        (host.vm, host.hypervisor) = (Some(hardware), Hypervisor::Xen);
    }
    spec
}

/// What the client has counted once it has so many bytes more than the last time.
async fn heard(console: &Arc<Mutex<Console>>, bytes: u64) -> ClientStats {
    let console = Arc::clone(console);
    let heard = move || {
        let mut console = console.lock().unwrap();
        for _ in 0..LOOKS {
            for heard in console.poll() {
                if let Said::Client(stats) = heard.said
                    && stats.bytes > bytes
                {
                    return Ok(stats);
                }
            }
            pause(Duration::from_secs(1));
        }
        Err(console.other_lines())
    };
    let heard = tokio::task::spawn_blocking(heard).await.unwrap();
    heard.unwrap_or_else(|said| panic!("the guests do not talk: {said:?}"))
}

/// What a command in a host says.
async fn said(fleet: &Fleet, host: &'static str, line: &'static str) -> String {
    let lab = Arc::clone(fleet.lab());
    let said = tokio::task::spawn_blocking(move || lab.exec(host, &["sh", "-c", line], LONG)).await.unwrap();
    said.unwrap_or_else(|error| panic!("{host}: {}", chain(&error)))
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_on_xen_move_between_hosts_of_different_hardware() {
    if !require::host_vms() {
        return;
    }
    tokio::task::spawn_blocking(programs::build).await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
    let spec = FleetSpec::new(spec(&format!("t-xen-{}", std::process::id())));
    let fleet = Fleet::up(spec).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    for host in ["h1", "h2"] {
        let is_virtual =
            said(&fleet, host, "cat /sys/hypervisor/type; grep -c -w -e svm -e vmx /proc/cpuinfo || true").await;
        assert_eq!(is_virtual.split_whitespace().collect::<Vec<_>>(), ["xen", "0"], "{host}");
    }
    let classes = fleet.admin().host("h1").await.unwrap().compat_classes;
    assert_eq!((classes.len(), classes[0].back_end.as_str()), (1, "xen"));

    fleet.import_lean_image(IMAGE).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.create_network(NETWORK, "10.20.0.0/24").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let address = "10.20.0.10".parse().unwrap();
    let small = |spec: GuestSpec| GuestSpec { memory_mib: 96, ..spec };
    let server = small(GuestSpec::new("web", IMAGE, NETWORK, "sc.role=server").at("h1").with_ipv4(address));
    let client =
        small(GuestSpec::new("watcher", IMAGE, NETWORK, &format!("sc.role=client sc.peer={address}")).at("h2"));
    let made = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client));
    let (_, client) = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let console = Arc::new(Mutex::new(fleet.console(client.id).unwrap()));
    let before = heard(&console, 20_000).await;

    for to in ["h2", "h1"] {
        let moved = fleet.migrate("web", to, |_| {}).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        println!("to {to}: {moved:?}");
        let domains = said(&fleet, if to == "h1" { "h2" } else { "h1" }, "xl list").await;
        assert_eq!(domains.matches("gst-").count(), usize::from(to == "h1"), "{domains}");
        let now = heard(&console, before.bytes + 20_000).await;
        assert_eq!((now.connects, now.resets, now.bad), (1, 0, 0), "{now:?}");
    }

    let frozen = fleet.freeze("web", |_| {}).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!("frozen: {frozen:?}");
    let thawed = fleet.thaw("web", "h2", |_| {}).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!("thawed: {thawed:?}");
    let last = heard(&console, before.bytes + 60_000).await;
    assert_eq!((last.connects, last.resets, last.bad), (1, 0, 0), "{last:?}");
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
