//! Xen hosts of different hardware, without any virtualization of the processor's: guests with a stock kernel run there and talk; an agent
//! that is killed and started again takes them up; one is frozen, and thawed at the other host.

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

/// Seconds: everything is 20 to 80 times slower in there, and slower still on a machine that others use.
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

/// What a line of shell in a host says.
async fn said(fleet: &Fleet, host: &str, line: &str) -> String {
    fleet.shell(host, line).await.unwrap_or_else(|error| panic!("{host}: {}", chain(&error)))
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_on_xen_talk_outlive_their_agent_and_come_back_from_a_freeze() {
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
    let (web, client) = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let console = Arc::new(Mutex::new(fleet.console(client.id).unwrap()));
    let before = heard(&console, 20_000).await;

    // A live move is refused by name, and the guest goes on.
    let refused = fleet.migrate("web", "h2", |_| {}).await.unwrap_err();
    assert!(chain(&refused).contains("moves no guest while it runs"), "{}", chain(&refused));

    // Killed, and started again: the same domain, the same disk, the same stream.
    let domain = said(&fleet, "h1", "xl list").await;
    said(&fleet, "h1", "kill -9 $(pidof supercloud-agent)").await;
    let lab = Arc::clone(fleet.lab());
    let again = tokio::task::spawn_blocking(move || lab.restart("h1", "agent")).await.unwrap();
    again.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let now = heard(&console, before.bytes + 20_000).await;
    fleet.await_host_up("h1").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let found = said(&fleet, "h1", "xl list").await;
    assert_eq!(found.matches("gst-").count(), 1, "{domain} before, {found} after");
    assert_eq!((now.connects, now.resets, now.bad), (1, 0, 0), "{now:?}");

    let frozen = fleet.freeze("web", |_| {}).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!("frozen: {frozen:?}");
    assert!(!said(&fleet, "h1", "xl list").await.contains("gst-"), "a frozen guest has no domain");
    let thawed = fleet.thaw("web", "h2", |_| {}).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    println!("thawed: {thawed:?}");
    // Where this takes longer than the client waits for its stream, it begins another one.
    let last = heard(&console, now.bytes + 20_000).await;
    assert_eq!((last.bad, last.mem_bad), (0, 0), "{last:?}");
    println!("{} runs on", web.name);
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
