//! A guest in our own VMM leaves its memory behind when it moves between hosts that are VMs of different hardware: it runs at once, the
//! rest follows, and nobody who talks to it notices.

mod heard;

use supercloud_api::{GuestMigrate, MemoryMode, Phase};
use supercloud_lab::{
    LabSpec,
    fleet::{Fleet, FleetSpec, GuestSpec, Said, programs},
    lab::chain,
    require,
};

use heard::{LONG, hear};

const NETWORK: &str = "lan";
const IMAGE: &str = "lean";

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_leaves_its_memory_behind_and_nobody_notices() {
    if !require::host_vms() {
        return;
    }
    tokio::task::spawn_blocking(programs::build).await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
    let spec = FleetSpec::new(LabSpec::three_clouds_of_vms(&format!("t-post-{}", std::process::id())));
    let fleet = Fleet::up(spec).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.import_lean_image(IMAGE).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.create_network(NETWORK, "10.20.0.0/24").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let address = "10.20.0.10".parse().unwrap();
    let server = GuestSpec::new("web", IMAGE, NETWORK, "sc.role=server").at("aws-east").with_ipv4(address);
    let client = GuestSpec::new("watcher", IMAGE, NETWORK, &format!("sc.role=client sc.peer={address}")).at("home");
    let made = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client));
    let (server, client) = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let (watcher, web) = (heard::console(&fleet, client.id), heard::console(&fleet, server.id));
    hear(&watcher, "the stream", |_, said| matches!(said, Said::Client(stats) if stats.bytes > 20_000)).await;
    let boot_id = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let noted = boot_id.clone();
    hear(&web, "the server", move |_, said| {
        let Said::Server(stats) = said else { return false };
        noted.lock().unwrap().clone_from(&stats.boot_id);
        stats.acked > 0
    })
    .await;
    let boot = boot_id.lock().unwrap().clone();

    let api = fleet.client();
    // Each time to other hardware; the last one is as every other move, of a guest that has come like this.
    let moves = [
        ("gcp-west", MemoryMode::PostCopy),
        ("home", MemoryMode::Hybrid),
        ("aws-east", MemoryMode::PostCopy),
        ("gcp-west", MemoryMode::PreCopy),
    ];
    for (to, memory) in moves {
        let wanted = GuestMigrate {
            to: to.into(),
            bandwidth_bps: None,
            max_downtime_ms: Some(5000),
            auto_converge: true,
            deadline_ms: None,
            memory,
            reason: None,
        };
        let operation = api.migrate_guest("web", &wanted).await.unwrap();
        let mut most_missing = 0;
        let watch = |seen: &supercloud_api::Operation| {
            most_missing = most_missing.max(seen.progress.memory_missing_bytes.unwrap_or(0));
        };
        let ended = api.wait(operation.id, LONG, watch).await.unwrap();
        assert_eq!(ended.phase, Phase::Done, "{memory:?} to {to}: {ended:#?}");
        let guest = fleet.guest("web").await.unwrap();
        assert_eq!((guest.host_name.as_ref().map(ToString::to_string).as_deref(), guest.starts), (Some(to), 1));
        assert_eq!(guest.alarm, None);
        println!(
            "{memory:?} to {to}: standing still {:?} ms, {most_missing} bytes seen missing",
            ended.progress.downtime_ms
        );
        if memory == MemoryMode::PostCopy {
            assert!(most_missing > 0, "nothing was left behind");
        }
        // All that was acknowledged is read back there, and all memory that it checks is its own.
        let (boot, mut reached) = (boot.clone(), None);
        hear(&web, "the server where it has moved to", move |host, said| {
            let Said::Server(stats) = said else { return false };
            assert!(stats.is_whole() && stats.boot_id == boot, "{stats:?} of {boot}");
            host == to && stats.verified >= *reached.get_or_insert(stats.acked.max(1))
        })
        .await;
        let mut before = 0;
        hear(&watcher, "the stream", move |_, said| {
            let Said::Client(stats) = said else { return false };
            assert!(stats.is_unharmed(), "{stats:?}");
            before = if before == 0 { stats.bytes } else { before };
            stats.connected && stats.bytes > before + 20_000
        })
        .await;
    }
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
