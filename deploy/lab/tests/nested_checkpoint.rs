//! Checkpoints of a guest that runs in our own VMM, in a host that is a VM: its host is gone for good, and the guest goes on at another one
//! of other hardware from the instant of its newest checkpoint, memory and disk of one piece.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod heard;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use supercloud_api::{GuestPatch, GuestState, HostState, OnLoss, VolumePoint};
use supercloud_lab::{
    LabSpec,
    fleet::{Console, Fleet, FleetSpec, GuestSpec, Said, ServerStats, programs},
    lab::chain,
    require,
};

use heard::{LONG, hear};

const IMAGE: &str = "lean";
const NETWORK: &str = "lan";

/// The server's next word from a host, when it has flushed more than `past` writes.
async fn word(web: &Arc<Mutex<Console>>, at: &'static str, past: u64) -> ServerStats {
    let heard = Arc::new(Mutex::new(None));
    let noted = heard.clone();
    hear(web, "the server", move |host, said| {
        let Said::Server(stats) = said else { return false };
        assert!(stats.is_whole(), "{stats:?}");
        let is_it = host == at && stats.acked > past;
        if is_it {
            *noted.lock().unwrap() = Some(stats.clone());
        }
        is_it
    })
    .await;
    heard.lock().unwrap().clone().unwrap()
}

/// Has a checkpoint be taken.
async fn checkpoint(fleet: &Fleet) -> VolumePoint {
    let begun = Instant::now();
    let number = fleet.client().checkpoint_guest("web").await.unwrap().next;
    loop {
        if let Ok(history) = fleet.client().volume_history("web").await
            && let Some(point) = history.points.iter().find(|point| point.number == number)
        {
            assert!(point.memory.as_ref().is_some_and(|memory| memory.is_kept), "no memory: {point:?}");
            println!("checkpoint {number} after {:.1?}: {} KiB stored anew", begun.elapsed(), point.stored_bytes >> 10);
            return point.clone();
        }
        assert!(begun.elapsed() < LONG, "no checkpoint");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the lab keeps a cloud's store on its host, which dies here with it: it wants a bucket beside the hosts"]
async fn a_guest_goes_on_from_its_newest_checkpoint_when_its_host_is_gone() {
    if !require::host_vms() {
        return;
    }
    tokio::task::spawn_blocking(programs::build).await.unwrap().unwrap_or_else(|error| panic!("{}", chain(&error)));
    let spec = FleetSpec::new(LabSpec::three_clouds_of_vms(&format!("t-checkpoint-{}", std::process::id())));
    let fleet = Fleet::up(spec).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.import_lean_image(IMAGE).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    fleet.create_network(NETWORK, "10.20.0.0/24").await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let server = GuestSpec::new("web", IMAGE, NETWORK, "sc.role=server").at("gcp-west");
    let server = fleet.create_guest(&server).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let web = heard::console(&fleet, server.id);
    let wish = GuestPatch { on_loss: Some(OnLoss::ThawCheckpoint), ..GuestPatch::default() };
    fleet.client().patch_guest("web", &wish).await.unwrap();

    let before = word(&web, "gcp-west", 0).await;
    checkpoint(&fleet).await;
    // It runs on meanwhile, and after it.
    let between = word(&web, "gcp-west", before.acked).await;
    checkpoint(&fleet).await;
    let after = word(&web, "gcp-west", between.acked).await;
    assert_eq!((&before.boot_id, &between.boot_id), (&after.boot_id, &after.boot_id));

    // Its host loses its power, and somebody says that it does not come back.
    let lab = fleet.lab().clone();
    tokio::task::spawn_blocking(move || lab.kill_host("gcp-west")).await.unwrap().unwrap();
    let killed = Instant::now();
    while fleet.admin().host("gcp-west").await.unwrap().state == HostState::Up {
        assert!(killed.elapsed() < LONG, "the dead host is not missed");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    fleet.admin().remove_host("gcp-west", true).await.unwrap();
    let guest = loop {
        let guest = fleet.guest("web").await.unwrap();
        // Until that is noted it is still shown where it was.
        let has_moved = guest.host_name.as_ref().is_some_and(|name| name.as_str() != "gcp-west");
        if guest.state == GuestState::Running && guest.operation.is_none() && has_moved {
            break guest;
        }
        assert!(killed.elapsed() < LONG, "it does not go on: {guest:#?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    let at = guest.host_name.unwrap();
    let at = ["aws-east", "home"].into_iter().find(|name| *name == at.as_str()).unwrap();
    println!("it runs at {at} {:.1?} after the power was cut", killed.elapsed());
    assert_eq!(guest.starts, 1, "it was never booted again");

    // The same boot, from the second checkpoint on: its disk is that instant's, so that all it has flushed is there, and nothing later.
    let again = word(&web, at, 0).await;
    assert_eq!(again.boot_id, after.boot_id);
    println!("it was at write {} before, and goes on from about {}", after.acked, again.acked);
    assert!(again.acked >= between.acked, "{again:?}, and the checkpoint came after {between:?}");
    let further = word(&web, at, again.acked).await;
    assert!(further.verified > 0 && further.boot_id == after.boot_id, "{further:?}");
    fleet.down().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
}
