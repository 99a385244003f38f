//! Agents in hosts that are VMs of different hardware: they join over the emulated WAN, and guests run there in our own VMM and talk
//! over the switches of the hosts' kernels.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use supercloud_api::{HostState, ids::GuestId};
use supercloud_lab::{
    LabSpec,
    command::pause,
    fleet::{ClientStats, Fleet, FleetSpec, GuestSpec, Said, programs},
    lab::chain,
    require,
};

/// Seconds: everything is 20 to 80 times slower in there, and slower still on a machine that others use.
const LOOKS: usize = 600;

const NAMES: [&str; 3] = ["aws-east", "gcp-west", "home"];
const NETWORK: &str = "lan";
const IMAGE: &str = "lean";

/// What a line of shell in a host says.
async fn said(fleet: &Fleet, host: &str, line: &str) -> String {
    fleet.shell(host, line).await.unwrap_or_else(|error| panic!("{host}: {}", chain(&error)))
}

/// Guests' frames on the emulated WAN: those that everybody there can read, and encrypted ones.
fn on_the_wire(fleet: &Fleet) -> (u64, u64) {
    let (links, _) = fleet.lab().links().unwrap();
    let counters = links.iter().map(|link| link.counters);
    counters.fold((0, 0), |(plain, encrypted), one| (plain + one.plain_tunnel_frames, encrypted + one.encrypted_frames))
}

/// Sees the client's stream stand still, and go on as if nothing had been; nothing of it in the clear meanwhile.
async fn silent_then_whole(fleet: &Fleet, client: GuestId) {
    let mut console = fleet.console(client).unwrap();
    let again = tokio::task::spawn_blocking(move || {
        let mut bytes = move || {
            pause(Duration::from_secs(1));
            let heard = console.poll();
            let stats = heard.iter().filter_map(|heard| match &heard.said {
                Said::Client(stats) => Some(stats),
                _ => None,
            });
            // It is read from its beginning.
            let whole = |stats: &&ClientStats| stats.connects <= 1 && (stats.resets, stats.bad) == (0, 0);
            stats.inspect(|stats| assert!(whole(stats), "{stats:?}")).map(|stats| stats.bytes).max()
        };
        // What was under way has arrived by then, and nothing more comes.
        let cut_off = (0..5).filter_map(|_| bytes()).max().unwrap_or(0);
        (0..LOOKS).any(|_| bytes().is_some_and(|now| now > cut_off + 100_000))
    });
    assert!(again.await.unwrap(), "they do not talk again");
    assert_eq!(on_the_wire(fleet).0, 0, "frames in the clear");
}

/// The processes of our VMM in a host.
async fn processes(fleet: &Fleet, host: &'static str) -> usize {
    let line = "ls -d /run/supercloud/vmm/gst-*/control; pidof supercloud-vmm | wc -w";
    let said = said(fleet, host, line).await;
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

    // Three hosts of different cards, disks and processors: none has all that another one has.
    let mut hosts = Vec::new();
    for name in NAMES {
        let host = fleet.admin().host(name).await.unwrap();
        assert_eq!(host.state, HostState::Up, "{name}");
        hosts.push(host);
    }
    let features: Vec<_> = hosts.iter().map(|host| host.features().unwrap()).collect();
    for (mine, theirs) in [(0, 1), (1, 2), (2, 0)] {
        let (mine, theirs) = (&features[mine], &features[theirs]);
        assert!(!mine.covers(theirs) && !theirs.covers(mine), "{:?} {:?}", mine.beyond(theirs), theirs.beyond(mine));
    }

    // A host may check strictly where packets come from.
    said(&fleet, "gcp-west", "sysctl -w net.ipv4.conf.all.rp_filter=1").await;
    fleet.import_lean_image(IMAGE).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.create_network(NETWORK, "10.20.0.0/24").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let address = "10.20.0.10".parse().unwrap();
    let server = GuestSpec::new("web", IMAGE, NETWORK, "sc.role=server").at("gcp-west").with_ipv4(address);
    let client = GuestSpec::new("watcher", IMAGE, NETWORK, &format!("sc.role=client sc.peer={address}")).at("home");
    let made = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client));
    let (server, client) = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    // Guests are told of what all of them have, and can go from each to each.
    for guest in [server.id, client.id] {
        let class = fleet.admin().guest(&guest.to_string()).await.unwrap().compat_class.unwrap();
        assert!(hosts.iter().all(|host| host.serves(&class)), "{class}");
        assert!(class.features().unwrap().level().is_some(), "{class}");
    }
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

    // Nobody on the way has read any of it.
    let (plain, encrypted) = on_the_wire(&fleet);
    assert!(plain == 0 && encrypted > 20, "{plain} frames in the clear, {encrypted} encrypted");
    // Led past the interface, by the way that the underlay's addresses take, nothing is said at all rather than in the clear: the
    // packet rules drop it.
    said(&fleet, "home", "/sbin/ip rule delete priority 4789; /sbin/ip rule delete priority 4789").await;
    let dropped = "for i in $(seq 30); do nft list table inet supercloud_overlay | grep saddr.*drop | grep -q 'packets [1-9]' && exit 0; \
                   sleep 0.5; done; nft list table inet supercloud_overlay; exit 1";
    said(&fleet, "home", dropped).await;
    silent_then_whole(&fleet, client.id).await;
    // And without the interface.
    said(&fleet, "home", "ip link delete sc-wg").await;
    silent_then_whole(&fleet, client.id).await;
    assert!(said(&fleet, "home", "wg show sc-wg peers").await.contains('='));
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
