//! A guest in our own VMM is mirrored between hosts that are VMs of different hardware, and one of them loses its power: the standby
//! goes on, and whoever talked to the guest goes on talking to it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod heard;

use std::time::{Duration, Instant};

use supercloud_api::{Code, Fencing, GuestFailover, GuestMirror, HostState, MirrorMode, Phase, client::ClientError};
use supercloud_lab::{
    LabSpec,
    fleet::{Fleet, FleetSpec, GuestSpec, Said, programs},
    lab::chain,
    require,
};

use heard::{LONG, hear};

/// Long enough for dozens of the server's writes, and its host dies late in it: were a client told of them before they are safe at
/// the standby, it would be seen.
const INTERVAL_MS: u64 = 4000;
/// So much of it, at least, has passed then.
const LATE_MS: u64 = 3000;

const NETWORK: &str = "lan";
const IMAGE: &str = "lean";

/// A lease that a host on a busy machine renews in time.
const LEASE_MS: u64 = 30_000;

#[tokio::test(flavor = "multi_thread")]
async fn the_standby_goes_on_when_the_host_of_a_strictly_mirrored_guest_loses_its_power() {
    the_host_loses_its_power(Fencing::Manual).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "as long again: ./deploy/test --full"]
async fn by_a_lease_the_standby_goes_on_without_anybodys_word() {
    the_host_loses_its_power(Fencing::Lease).await;
}

async fn the_host_loses_its_power(fencing: Fencing) {
    if !require::host_vms() {
        return;
    }
    tokio::task::spawn_blocking(programs::build).await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
    let spec = FleetSpec::new(LabSpec::three_clouds_of_vms(&format!("t-mirror-{}", std::process::id())));
    let fleet = Fleet::up(spec).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.import_lean_image(IMAGE).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.create_network(NETWORK, "10.20.0.0/24").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let address = "10.20.0.10".parse().unwrap();
    let server = GuestSpec::new("web", IMAGE, NETWORK, "sc.role=server").at("gcp-west").with_ipv4(address);
    let client = GuestSpec::new("watcher", IMAGE, NETWORK, &format!("sc.role=client sc.peer={address}")).at("home");
    let made = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client));
    let (server, client) = made.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let console = |guest| heard::console(&fleet, guest);
    let (watcher, web) = (console(client.id), console(server.id));
    hear(&watcher, "the stream", |_, said| matches!(said, Said::Client(stats) if stats.bytes > 20_000)).await;

    // Nothing stands by yet.
    let dead = |host_is_dead| GuestFailover { host_is_dead, reason: None };
    let refused = |result: Result<_, ClientError>, code| match result {
        Err(ClientError::Problem(problem)) => assert_eq!(problem.code, code, "{problem:?}"),
        other => panic!("{other:?}"),
    };
    let api = fleet.client();
    refused(api.fail_over_guest("web", &dead(true)).await, Code::WrongState);

    let began = Instant::now();
    let wanted = GuestMirror {
        to: "aws-east".into(),
        interval_ms: Some(INTERVAL_MS),
        mode: MirrorMode::Strict,
        bandwidth_bps: None,
        fencing,
        lease_ms: (fencing == Fencing::Lease).then_some(LEASE_MS),
        keep: true,
        reason: None,
    };
    let operation = api.mirror_guest("web", &wanted).await.unwrap();
    let mut first_cut = None;
    let standing = loop {
        let now = api.operation(operation.id).await.unwrap();
        assert!(!now.phase.is_terminal(), "the mirror ended: {now:#?}");
        let mirrors = api.mirrors("web").await.unwrap();
        if let [mirror] = mirrors.as_slice() {
            if mirror.is_protected && first_cut.is_none() {
                first_cut = Some(began.elapsed());
            }
            if mirror.standing.committed >= 4 {
                break mirror.standing.clone();
            }
        }
        assert!(began.elapsed() < LONG, "no cuts: {now:#?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    println!("first whole cut after {:.1?}, then {standing:?}", first_cut.unwrap());
    // The stream goes on, a cut at a time.
    let mut before = 0;
    hear(&watcher, "the stream under the mirror", move |_, said| {
        let Said::Client(stats) = said else { return false };
        assert!(stats.is_unharmed(), "{stats:?}");
        before = if before == 0 { stats.bytes } else { before };
        stats.bytes > before + 5_000
    })
    .await;
    // It is held by its mirror, and its host lives.
    refused(api.fail_over_guest("web", &dead(true)).await, Code::WrongState);
    let boot_id = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let noted = boot_id.clone();
    hear(&web, "the server", move |host, said| {
        let Said::Server(stats) = said else { return false };
        assert!(stats.is_whole(), "{stats:?}");
        noted.lock().unwrap().clone_from(&stats.boot_id);
        host == "gcp-west" && stats.acked > 0
    })
    .await;

    let begun = Instant::now();
    while api.mirrors("web").await.unwrap()[0].standing.committed_age_ms < LATE_MS {
        assert!(begun.elapsed() < LONG, "every cut comes early");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let lab = fleet.lab().clone();
    tokio::task::spawn_blocking(move || lab.kill_host("gcp-west")).await.unwrap().unwrap();
    let killed = Instant::now();
    // The last that anybody heard of the server's writes.
    let seen = std::sync::Arc::new(std::sync::Mutex::new((0, 0)));
    let noted = seen.clone();
    hear(&watcher, "the watcher's last word of the server", move |_, said| {
        let Said::Client(stats) = said else { return false };
        assert!(stats.is_unharmed(), "{stats:?}");
        let mut seen = noted.lock().unwrap();
        *seen = if stats.acked_seen > seen.0 { (stats.acked_seen, 0) } else { (seen.0, seen.1 + 1) };
        // For some seconds nothing came any more.
        seen.1 > 6
    })
    .await;
    let seen = seen.lock().unwrap().0;
    assert!(seen > 0, "the watcher never heard of a write");
    if fencing == Fencing::Manual {
        while fleet.admin().host("gcp-west").await.unwrap().state == HostState::Up {
            assert!(killed.elapsed() < LONG, "the dead host is not missed");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        refused(api.fail_over_guest("web", &dead(false)).await, Code::BadRequest);
        println!("missed after {:.1?}", killed.elapsed());
        api.fail_over_guest("web", &dead(true)).await.unwrap();
    }
    let ended = api.wait(operation.id, LONG, |_| {}).await.unwrap();
    assert_eq!(ended.phase, Phase::Done, "{ended:#?}");
    println!("failed over {:.1?} after the power was cut", killed.elapsed());
    let guest = fleet.guest("web").await.unwrap();
    assert_eq!((guest.host_name.as_ref().map(ToString::to_string).as_deref(), guest.starts), (Some("aws-east"), 1));
    assert_eq!(guest.alarm, None);

    // The same boot, whole, on its disk; and the same stream, not a byte wrong.
    let boot = boot_id.lock().unwrap().clone();
    let mut reached = None;
    println!("the watcher has heard of write {seen}");
    hear(&web, "the server after the fail-over", move |host, said| {
        let Said::Server(stats) = said else { return false };
        assert!(stats.is_whole() && stats.boot_id == boot, "{stats:?} of {boot}");
        // All that was acknowledged when it went on is read back.
        if host != "aws-east" {
            return false;
        }
        // It goes on from where it had all that anybody had heard of, and all of that is read back.
        let first = *reached.get_or_insert_with(|| {
            println!("at the standby it goes on from write {}", stats.acked);
            stats.acked
        });
        assert!(first >= seen, "somebody was told of write {seen}, and it goes on from {first}");
        stats.verified >= first.max(1)
    })
    .await;
    let mut before = 0;
    hear(&watcher, "the stream after the fail-over", move |_, said| {
        let Said::Client(stats) = said else { return false };
        assert!(stats.is_unharmed(), "{stats:?}");
        before = if before == 0 { stats.bytes } else { before };
        stats.connected && stats.bytes > before + 20_000
    })
    .await;
    println!("the stream goes on {:.1?} after the power was cut", killed.elapsed());

    // A mirror was to be kept: one is begun again by itself, in the cloud that is left.
    let again = loop {
        if let [mirror] = api.mirrors("web").await.unwrap().as_slice()
            && mirror.is_protected
        {
            break mirror.clone();
        }
        assert!(killed.elapsed() < LONG * 2, "it is not mirrored again");
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    assert_ne!(again.operation, operation.id);
    assert_eq!(again.destination, Some(fleet.admin().host("home").await.unwrap().id));
    println!("mirrored again {:.1?} after the power was cut", killed.elapsed());
    let mut before = 0;
    hear(&watcher, "the stream under the second mirror", move |_, said| {
        let Said::Client(stats) = said else { return false };
        assert!(stats.is_unharmed(), "{stats:?}");
        before = if before == 0 { stats.bytes } else { before };
        stats.connected && stats.bytes > before + 5_000
    })
    .await;
    api.end_mirrors("web").await.unwrap();
    let ended = api.wait(again.operation, LONG, |_| {}).await.unwrap();
    assert_eq!(ended.phase, Phase::RolledBack, "{ended:#?}");
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
