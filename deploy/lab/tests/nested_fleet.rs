//! Agents in hosts that are VMs of different hardware: they join over the emulated WAN, and guests run there in our own VMM and talk
//! over the switches of the hosts' kernels.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use supercloud_api::HostState;
use supercloud_lab::{
    LabSpec,
    command::pause,
    fleet::{Fleet, FleetSpec, GuestSpec, Said, programs},
    lab::chain,
    require,
};

/// Everything is 20 to 80 times slower in there, and slower still on a machine that others use.
const LONG: Duration = Duration::from_secs(600);
const LOOKS: usize = 600;

const NAMES: [&str; 3] = ["aws-east", "gcp-west", "home"];
const NETWORK: &str = "lan";
const IMAGE: &str = "lean";

/// The processes of our VMM in a host.
async fn processes(fleet: &Fleet, host: &'static str) -> usize {
    let lab = fleet.lab().clone();
    let look = move || {
        lab.exec(host, &["sh", "-c", "ls -d /run/supercloud/vmm/gst-*/control; pidof supercloud-vmm | wc -w"], LONG)
    };
    let said = tokio::task::spawn_blocking(look).await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
    said.lines().last().and_then(|line| line.trim().parse().ok()).unwrap_or_else(|| panic!("{host}: {said}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_join_and_guests_talk_between_hosts_of_different_hardware() {
    if !require::host_vms() {
        return;
    }
    tokio::task::spawn_blocking(programs::build).await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
    let spec = FleetSpec::new(LabSpec::three_clouds_of_vms(&format!("t-agents-{}", std::process::id())));
    let fleet = Fleet::up(spec).await.unwrap_or_else(|error| panic!("{}", chain(&error)));

    // Three hosts of different cards and disks, of one class: guests can go from each to each.
    let mut classes = Vec::new();
    for name in NAMES {
        let host = fleet.admin().host(name).await.unwrap();
        assert_eq!(host.state, HostState::Up, "{name}");
        classes.push(host.compat_classes.clone());
    }
    assert!(!classes[0].is_empty() && classes.iter().all(|one| *one == classes[0]), "{classes:?}");

    fleet.import_lean_image(IMAGE).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.create_network(NETWORK, "10.20.0.0/24").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let address = "10.20.0.10".parse().unwrap();
    let server = GuestSpec::new("web", IMAGE, NETWORK, "sc.role=server").at("gcp-west").with_ipv4(address);
    let client = GuestSpec::new("watcher", IMAGE, NETWORK, &format!("sc.role=client sc.peer={address}")).at("home");
    let made = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client));
    let (_, client) = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let mut console = fleet.console(client.id).unwrap();
    let heard = tokio::task::spawn_blocking(move || {
        for _ in 0..LOOKS {
            for heard in console.poll() {
                if let Said::Client(stats) = &heard.said
                    && stats.bytes > 20_000
                {
                    return Ok(heard);
                }
            }
            pause(Duration::from_secs(1));
        }
        Err(console.other_lines())
    });
    let heard = heard.await.unwrap().unwrap_or_else(|said| panic!("the guests do not talk: {said:?}"));
    assert_eq!(heard.host, "home");
    let Said::Client(stats) = heard.said else { panic!("{heard:?}") };
    assert_eq!((stats.connects, stats.resets, stats.bad), (1, 0, 0), "{stats:?}");

    let counts =
        [processes(&fleet, NAMES[0]).await, processes(&fleet, NAMES[1]).await, processes(&fleet, NAMES[2]).await];
    assert!(counts == [0, 1, 1], "{counts:?}");
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
