//! The fleet in memory is what the store has, however it came to that.

use std::sync::Arc;

use supercloud_api::{GuestPatch, Volume, ids::VolumeId};

use super::{TestController, guest};
use crate::state::{Context, Fleet, HostRecord, State};

/// The fleet, once it is what somebody lists anew who knows nothing yet: the engine goes on in between.
async fn in_step(test: &TestController) -> Arc<Fleet> {
    loop {
        let kept = test.state().fleet().await.unwrap();
        let anew = State::open(Arc::clone(test.state().store())).await.unwrap().fleet().await.unwrap();
        if kept == anew {
            return kept;
        }
        if kept == test.state().fleet().await.unwrap() {
            assert_eq!(kept, anew, "nothing changed meanwhile");
        }
    }
}

#[tokio::test]
async fn what_is_kept_in_step_is_what_is_listed_anew() {
    let test = TestController::start().await;
    let world = test.world().await;
    let empty = test.state().fleet().await.unwrap();
    assert_eq!(empty.guests().count(), 0);
    assert_eq!(empty.usage(world.project), crate::state::Usage::default());
    for n in 0..8 {
        let mut wanted = guest(&format!("g{n}"));
        wanted.start = n % 2 == 0;
        wanted.disk_bytes = Some((n + 1) << 20);
        world.client.create_guest(&wanted).await.unwrap();
        let fleet = in_step(&test).await;
        let usage = fleet.usage(world.project);
        assert_eq!((usage.guests, usage.vcpus), (n + 1, n / 2 + 1), "those that start count");
    }
    assert_eq!(empty.guests().count(), 0, "who looks at a fleet sees it as it was");
    world.client.patch_guest("g1", &GuestPatch { follow_prices: Some(true), ..GuestPatch::default() }).await.unwrap();
    let gone = world.client.delete_guest("g3").await.unwrap();
    while !world.client.operation(gone.id).await.unwrap().phase.is_terminal() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let big: VolumeId = world.client.volume("g5").await.unwrap().id;
    test.edit::<Volume>(&big, |volume| volume.size_bytes = 1 << 30).await;
    let loose: VolumeId = world.client.volume("g7").await.unwrap().id;
    test.edit::<Volume>(&loose, |volume| volume.guest = None).await;
    let cordoned = world.hosts[0].id;
    test.edit::<HostRecord>(&cordoned, |host| host.is_cordoned = true).await;
    let fleet = in_step(&test).await;
    assert!(fleet.hosts().any(|host| host.is_cordoned));
    let guest_of =
        |name: &str| fleet.guests().find(|record| record.guest.name.as_str() == name).map(|found| found.guest.id);
    assert_eq!(guest_of("g3"), None);
    assert_eq!(fleet.disks().get(&guest_of("g5").unwrap()), Some(&(1 << 30)));
    assert_eq!(fleet.disks().get(&guest_of("g7").unwrap()), None);
    // The addresses of those that are gone are free again: the first of them is given next.
    world.client.create_guest(&guest("after")).await.unwrap();
    assert_eq!(world.client.guest("after").await.unwrap().ipv4.unwrap().to_string(), "10.20.0.5");
    test.stop().await;
}

#[tokio::test]
async fn a_fleet_whose_history_is_gone_is_listed_anew() {
    let test = TestController::start().await;
    let world = test.world().await;
    let before = test.state().fleet().await.unwrap();
    for n in 0..3 {
        world.client.create_guest(&guest(&format!("g{n}"))).await.unwrap();
    }
    let newest = test.state().health().await.unwrap().revision;
    test.state().store().compact(newest).await.unwrap();
    let fleet = test.state().fleet().await.unwrap();
    assert_eq!((before.guests().count(), fleet.guests().count()), (0, 3));
    world.client.create_guest(&guest("g3")).await.unwrap();
    assert_eq!(in_step(&test).await.guests().count(), 4);
    test.stop().await;
}

#[tokio::test]
async fn what_another_controller_wrote_is_in_it() {
    let test = TestController::start().await;
    let world = test.world().await;
    assert_eq!(test.state().fleet().await.unwrap().hosts().filter(|host| host.is_cordoned).count(), 0);
    let other = State::open(Arc::clone(test.state().store())).await.unwrap();
    let before = other.need::<HostRecord>(&world.hosts[0].id).await.unwrap();
    let mut change = crate::state::Change::new();
    change.update(&before, &HostRecord { is_cordoned: true, ..before.value.clone() });
    change.event(crate::state::EventDraft::new("host.changed").host(before.host.id));
    other.commit(&Context::system(), change).await.unwrap();
    assert_eq!(test.state().fleet().await.unwrap().hosts().filter(|host| host.is_cordoned).count(), 1);
    test.stop().await;
}
