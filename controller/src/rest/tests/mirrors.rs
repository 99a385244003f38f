//! Mirrors as REST accepts them.

use supercloud_api::{
    Code, Fencing, GuestFailover, GuestMigrate, GuestMirror, MemoryMode, MirrorMode, OperationKind, Phase,
};

use super::{TestController, guest, problem};
use crate::state::{Change, Context, GuestRecord, OperationRecord};

fn to(place: &str) -> GuestMirror {
    GuestMirror {
        to: place.into(),
        interval_ms: None,
        mode: MirrorMode::Strict,
        bandwidth_bps: None,
        fencing: Fencing::Manual,
        lease_ms: None,
        keep: false,
        reason: None,
    }
}

fn dead(host_is_dead: bool) -> GuestFailover {
    GuestFailover { host_is_dead, reason: Some("test".into()) }
}

#[tokio::test]
async fn a_mirror_is_checked_begun_shown_and_fails_over_only_from_a_dead_host() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    let id = client.guest("web").await.unwrap().id;
    assert_eq!(problem(client.mirror_guest("web", &to("west")).await).code, Code::WrongState);
    test.run_on(id, &world.hosts[0]).await;
    assert_eq!(problem(client.fail_over_guest("web", &dead(true)).await).code, Code::WrongState);
    assert!(client.mirrors("web").await.unwrap().is_empty());

    // Both agents must know how.
    for host in &world.hosts {
        assert_eq!(problem(client.mirror_guest("web", &to("west")).await).code, Code::Unsupported);
        test.parts().hosts.note_mirroring(host.id, true);
    }
    for bad in [
        GuestMirror { lease_ms: Some(15_000), ..to("west") },
        GuestMirror { fencing: Fencing::Lease, lease_ms: Some(4_999), ..to("west") },
        GuestMirror { fencing: Fencing::Lease, lease_ms: Some(300_001), ..to("west") },
        GuestMirror { interval_ms: Some(49), ..to("west") },
        GuestMirror { interval_ms: Some(600_001), ..to("west") },
        GuestMirror { bandwidth_bps: Some(999), ..to("west") },
        GuestMirror { reason: Some("x".repeat(300)), ..to("west") },
    ] {
        assert_eq!(problem(client.mirror_guest("web", &bad).await).code, Code::BadRequest, "{bad:?}");
    }
    let plan = client.plan_mirror("web", &to("west")).await.unwrap().plan.unwrap();
    let names: Vec<_> = plan.checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(names, ["compat_class", "capacity", "reachability", "overlay", "mirroring"]);
    assert_eq!(client.guest("web").await.unwrap().operation, None);

    let begun = client.mirror_guest("web", &to("west")).await.unwrap();
    assert_eq!((begun.kind, begun.destination), (OperationKind::GuestMirror, Some(world.hosts[1].id)));
    let [mirror] = client.mirrors("web").await.unwrap().try_into().unwrap();
    assert_eq!((mirror.operation, mirror.mode, mirror.interval_ms), (begun.id, MirrorMode::Strict, 1000));
    assert!(!mirror.is_protected && !mirror.is_failing_over);
    let moved = GuestMigrate {
        to: "west".into(),
        bandwidth_bps: None,
        max_downtime_ms: None,
        auto_converge: true,
        deadline_ms: None,
        memory: MemoryMode::PreCopy,
        reason: None,
    };
    assert_eq!(problem(client.migrate_guest("web", &moved).await).code, Code::OperationInProgress);

    // Not before it copies, not from a host that is there, not without a word for it.
    assert_eq!(problem(client.fail_over_guest("web", &dead(true)).await).code, Code::WrongState);
    let before = test.state().need::<OperationRecord>(&begun.id).await.unwrap();
    let mut now = before.value.clone();
    now.operation.phase = Phase::Copy;
    let mut change = Change::new();
    change.update(&before, &now);
    test.state().commit(&Context::system(), change).await.unwrap();
    // Nor one that its guest's record does not know as a mirror (any more).
    let called_off = problem(client.fail_over_guest("web", &dead(true)).await);
    assert!(called_off.detail.contains("called off"), "{called_off:?}");
    test.edit::<GuestRecord>(&id, |record| {
        let operation = record.owner.operation.as_mut().unwrap();
        operation.phase = supercloud_api::handover::Phase::Copy;
    })
    .await;
    let there = problem(client.fail_over_guest("web", &dead(true)).await);
    assert!(there.code == Code::WrongState && there.detail.contains("is connected"), "{there:?}");
    test.parts().hosts.gone(world.hosts[0].id);
    let unsaid = problem(client.fail_over_guest("web", &dead(false)).await);
    assert!(unsaid.code == Code::BadRequest && unsaid.detail.contains("host_is_dead"), "{unsaid:?}");
    let told = client.fail_over_guest("web", &dead(true)).await.unwrap();
    assert_eq!(told.id, begun.id);
    assert_eq!(problem(client.end_mirrors("web").await).code, Code::WrongState);
    // Said again, it is the same.
    client.fail_over_guest("web", &dead(true)).await.unwrap();
    assert!(client.mirrors("web").await.unwrap()[0].is_failing_over);
    let (events, _) = test.state().events(0, 10_000).await.unwrap();
    let asked: Vec<_> = events.iter().filter(|event| event.kind == "guest.failover_requested").collect();
    assert_eq!(asked.len(), 1);
    assert_eq!(
        (asked[0].guest, asked[0].operation, asked[0].host),
        (Some(id), Some(begun.id), Some(world.hosts[0].id))
    );
    test.stop().await;
}

#[tokio::test]
async fn a_mirror_that_is_kept_is_remembered_until_somebody_ends_it() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    let id = client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    for host in &world.hosts {
        test.parts().hosts.note_mirroring(host.id, true);
    }
    // There is none: nothing to end.
    assert_eq!(client.end_mirrors("web").await.unwrap().operation, None);
    let kept = || GuestMirror { keep: true, interval_ms: Some(200), fencing: Fencing::Lease, ..to("west") };
    // The guest's own host must know how; the standby's need not.
    test.parts().hosts.note_leases(world.hosts[1].id, true);
    assert_eq!(problem(client.mirror_guest("web", &kept()).await).code, Code::Unsupported);
    test.parts().hosts.note_leases(world.hosts[1].id, false);
    test.parts().hosts.note_leases(world.hosts[0].id, true);
    client.plan_mirror("web", &kept()).await.unwrap();
    assert_eq!(client.guest("web").await.unwrap().kept_mirror, None, "a dry run changes nothing");
    let begun = client.mirror_guest("web", &kept()).await.unwrap();
    let wish = client.guest("web").await.unwrap().kept_mirror.unwrap();
    assert_eq!((wish.to.as_str(), wish.interval_ms, wish.mode), ("west", 200, MirrorMode::Strict));
    assert_eq!(wish.lease_ms, Some(15_000));
    let [mirror] = client.mirrors("web").await.unwrap().try_into().unwrap();
    assert_eq!((mirror.fencing, mirror.lease_ms), (Fencing::Lease, Some(15_000)));

    client.end_mirrors("web").await.unwrap();
    assert_eq!(client.guest("web").await.unwrap().kept_mirror, None);
    assert!(client.operation(begun.id).await.unwrap().is_cancel_requested);
    // Said again, it is the same.
    client.end_mirrors("web").await.unwrap();
    test.stop().await;
}

#[tokio::test]
async fn who_cancels_a_kept_mirror_does_not_want_another_one_in_its_place() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    let id = client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    for host in &world.hosts {
        test.parts().hosts.note_mirroring(host.id, true);
    }
    let begun = client.mirror_guest("web", &GuestMirror { keep: true, ..to("west") }).await.unwrap();
    client.cancel_operation(begun.id).await.unwrap();
    assert_eq!(client.guest("web").await.unwrap().kept_mirror, None);
    test.stop().await;
}
