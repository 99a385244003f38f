//! Operations on guests as REST accepts them.

use std::time::Duration;

use supercloud_api::{
    Code, GuestFreeze, GuestMigrate, GuestStart, GuestStop, GuestThaw, HostPatch, MemoryMode, Phase, ThawMemory,
    Volume,
    handover::{Holder, OperationKind, Owner, OwnerRecord},
    ids::{Epoch, FreezeId},
};

use super::{TestController, class, guest, problem, problem_of};
use crate::state::{Change, Context, GuestRecord, HostRecord, OperationRecord, Work};

fn to(place: &str) -> GuestMigrate {
    GuestMigrate {
        to: place.into(),
        bandwidth_bps: Some(100_000_000),
        max_downtime_ms: None,
        auto_converge: true,
        deadline_ms: None,
        memory: MemoryMode::PreCopy,
        reason: Some("test".into()),
    }
}

#[tokio::test]
async fn a_placement_says_where_a_guest_would_go_and_why_not_elsewhere() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    let found = world.client.explain_placement("web").await.unwrap();
    assert_eq!((found.host, found.destination), (Some(world.hosts[0].id), Some(world.hosts[1].id)));
    // What is explained is what a move does.
    let plan = world.client.plan_migration("web", &to("west")).await.unwrap().plan.unwrap();
    assert_eq!(found.destination, plan.destination);
    let told: Vec<_> = found.hosts.iter().map(|host| (host.host, host.is_ok, host.refusal.as_deref())).collect();
    assert_eq!(told, [(world.hosts[1].id, true, None), (world.hosts[0].id, false, Some("excluded"))]);
    let score = found.hosts[0].score.unwrap();
    let (capacity, used) = (world.hosts[1].capacity, world.hosts[1].used);
    assert_eq!((score.rank, score.free_memory_bytes), (1, capacity.memory_bytes - used.memory_bytes));
    let cordon = HostPatch { cordoned: Some(true) };
    test.admin_client().patch_host(world.hosts[1].name.as_str(), &cordon).await.unwrap();
    let found = world.client.explain_placement("web").await.unwrap();
    assert_eq!(found.destination, None);
    assert!(found.hosts.iter().any(|host| host.refusal.as_deref() == Some("cordoned") && host.score.is_none()));
    let there = world.client.explain_placement_at("web", "east").await.unwrap();
    assert!(there.hosts.iter().any(|host| host.refusal.as_deref() == Some("not_asked_for")), "{there:?}");
    let short: supercloud_api::Placement = world.client.get("/v1/guests/web/placement").await.unwrap();
    assert!(short.hosts.is_empty());
    let bare: supercloud_api::Placement = world.client.get("/v1/guests/web/placement?explain").await.unwrap();
    assert_eq!(bare.hosts.len(), 2);
    for (path, code) in [("web/placement?explain=3", Code::BadRequest), ("web/placement?place=mars", Code::NotFound)] {
        let asked = world.client.get::<supercloud_api::Placement>(&format!("/v1/guests/{path}")).await;
        assert_eq!(problem(asked).code, code, "{path}");
    }
    test.stop().await;
}

#[tokio::test]
async fn a_move_is_checked_planned_and_begun() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;

    let plan = world.client.plan_migration("web", &to("west")).await.unwrap().plan.unwrap();
    assert_eq!(plan.destination, Some(world.hosts[1].id));
    assert_eq!(plan.predicted_ms, Some((256 << 20) * 8000 / 100_000_000));
    assert_eq!(
        (plan.predicted_downtime_ms, plan.predicted_from.as_deref()),
        (None, Some("no move from east to west was measured yet"))
    );
    let names: Vec<_> = plan.checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(names, ["compat_class", "capacity", "reachability", "overlay"]);
    assert_eq!(world.client.guest("web").await.unwrap().operation, None);

    for (place, code) in [("east", Code::WrongState), ("east-1", Code::WrongState), ("mars", Code::NotFound)] {
        assert_eq!(problem(world.client.migrate_guest("web", &to(place)).await).code, code, "{place}");
    }
    let bad = GuestMigrate { max_downtime_ms: Some(0), ..to("west") };
    assert!(problem(world.client.migrate_guest("web", &bad).await).detail.contains("max_downtime_ms"));

    let operation = world.client.migrate_guest("web", &to("west")).await.unwrap();
    assert_eq!((operation.source, operation.destination), (Some(world.hosts[0].id), Some(world.hosts[1].id)));
    let record = test.state().need::<GuestRecord>(&id).await.unwrap();
    assert_eq!(record.owner.operation.as_ref().unwrap().id, operation.id);
    assert_eq!(record.guest.host, Some(world.hosts[0].id), "nothing has moved yet");
    let stored = test.state().need::<OperationRecord>(&operation.id).await.unwrap();
    assert!(matches!(&stored.work, Work::GuestMigrate { options } if options.max_downtime_ms == Some(300)));

    let busy = problem(world.client.freeze_guest("web", &GuestFreeze::default()).await);
    assert_eq!((busy.code, busy.retryable), (Code::OperationInProgress, true));
    assert!(busy.detail.contains(&operation.id.to_string()));
    test.stop().await;
}

#[tokio::test]
async fn memory_is_left_behind_only_where_both_agents_know_how() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    let id = client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    let hybrid = GuestMigrate { memory: MemoryMode::Hybrid, ..to("west") };
    for host in &world.hosts {
        for refused in [client.migrate_guest("web", &hybrid).await, client.plan_migration("web", &hybrid).await] {
            let refused = problem(refused);
            assert_eq!(refused.code, Code::Unsupported);
            assert!(
                refused.detail.contains("hybrid") && refused.detail.contains(&host.id.to_string()),
                "{}",
                refused.detail
            );
        }
        test.parts().hosts.note_post_copy(host.id, true);
    }
    assert_eq!(client.guest("web").await.unwrap().operation, None, "nothing was begun");
    let plan = client.plan_migration("web", &hybrid).await.unwrap().plan.unwrap();
    let risk = plan.checks.iter().find(|check| check.name == "post_copy").unwrap();
    assert!(risk.detail.contains("loses the guest"), "{}", risk.detail);

    let operation = client.migrate_guest("web", &hybrid).await.unwrap();
    let record = test.state().need::<GuestRecord>(&id).await.unwrap();
    let kind = record.owner.operation.as_ref().unwrap().kind;
    assert_eq!(kind, OperationKind::Migrate { to: world.hosts[1].id, post_copy: true });
    let stored = test.state().need::<OperationRecord>(&operation.id).await.unwrap();
    assert!(matches!(&stored.work, Work::GuestMigrate { options } if options.memory == MemoryMode::Hybrid));
    test.stop().await;
}

#[tokio::test]
async fn a_destination_that_cannot_take_the_guest_is_refused_by_name() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    let west = world.hosts[1].id;

    let admin = test.admin_client();
    admin.patch_host("west-1", &HostPatch { cordoned: Some(true) }).await.unwrap();
    let refused = problem(world.client.migrate_guest("web", &to("west")).await);
    assert_eq!(refused.code, Code::NoCapacity);
    assert!(refused.detail.contains("west-1 is cordoned"), "{}", refused.detail);
    admin.patch_host("west-1", &HostPatch { cordoned: Some(false) }).await.unwrap();

    test.edit::<HostRecord>(&west, |record| record.host.compat_classes[0].machine_version = "pc-i440fx-8.0".into())
        .await;
    let refused = problem(world.client.migrate_guest("web", &to("west")).await);
    assert_eq!(refused.code, Code::Incompatible);
    assert!(refused.detail.contains("7.2") && refused.detail.contains("8.0"), "{}", refused.detail);
    test.edit::<HostRecord>(&west, |record| record.host.compat_classes = vec![class()]).await;

    for host in &world.hosts {
        test.edit::<HostRecord>(&host.id, |record| record.host.data_address = None).await;
    }
    // Raw, because the typed client tries again for a while when a host does not answer.
    let migrate = || {
        let request = test.raw(reqwest::Method::POST, "/v1/guests/web/migrate", Some(&world.secret));
        request.json(&to("west")).send()
    };
    let refused = problem_of(migrate().await.unwrap()).await;
    assert!(refused.detail.contains("behind NAT"), "{}", refused.detail);

    test.parts().hosts.gone(west);
    let refused = problem_of(migrate().await.unwrap()).await;
    assert_eq!((refused.code, refused.retryable), (Code::HostUnavailable, true));
    let dry = world.client.plan_migration("web", &to("west")).await.unwrap().plan.unwrap();
    assert!(dry.destination.is_none() && !dry.checks[0].is_ok);
    test.stop().await;
}

#[tokio::test]
async fn a_freeze_thaws_once_and_a_stale_one_never() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    let freeze = FreezeId::generate();
    test.edit::<GuestRecord>(&id, |record| {
        let owner = OwnerRecord { owner: Owner::Frozen(freeze), epoch: Epoch(1), ..record.owner.clone() };
        record.set_owner(owner, None);
    })
    .await;
    let stale = GuestThaw { freeze: Some(FreezeId::generate()), ..GuestThaw::default() };
    let refused = problem(world.client.thaw_guest("web", &stale).await);
    assert_eq!(refused.code, Code::WrongState);
    assert!(refused.detail.contains(&freeze.to_string()), "{}", refused.detail);
    let started = problem(world.client.start_guest("web", &GuestStart::default()).await);
    assert!(started.detail.contains("thaw it first"), "{}", started.detail);
    let good = GuestThaw { to: Some("west".into()), freeze: Some(freeze), ..GuestThaw::default() };
    // At once only where a host can: else it is refused by name, and nothing is begun.
    let lazy = GuestThaw { memory: Some(ThawMemory::Lazy), ..good.clone() };
    let refused = problem(world.client.thaw_guest("web", &lazy).await);
    assert_eq!(refused.code, Code::Unsupported);
    assert!(refused.detail.contains("memory lazy"), "{}", refused.detail);
    test.parts().hosts.note_lazy_thaw(world.hosts[0].id, true);
    assert!(world.client.thaw_guest("web", &lazy).await.is_err(), "not that one");
    assert_eq!(world.client.guest("web").await.unwrap().operation, None, "nothing was begun");
    test.parts().hosts.note_lazy_thaw(world.hosts[1].id, true);
    let operation = world.client.thaw_guest("web", &lazy).await.unwrap();
    assert_eq!(operation.destination, Some(world.hosts[1].id));
    let check = operation.plan.unwrap().checks.into_iter().find(|check| check.name == "memory").unwrap();
    assert!(check.detail.contains("waits for what it wants"), "{}", check.detail);
    let stored = test.state().need::<OperationRecord>(&operation.id).await.unwrap();
    assert!(matches!(stored.work, Work::GuestThaw { memory: Some(ThawMemory::Lazy), .. }));
    assert_eq!(problem(world.client.thaw_guest("web", &good).await).code, Code::OperationInProgress);
    test.stop().await;
}

#[tokio::test]
async fn waiting_ends_with_the_operation_and_a_cancel_is_noted_once() {
    let test = TestController::start().await;
    let world = test.world().await;
    // No host of these is real, so the operation stays open until the test ends it.
    let mut wanted = guest("web");
    wanted.start = true;
    let operation = world.client.create_guest(&wanted).await.unwrap();
    let client = world.client.clone();
    let waiter = tokio::spawn(async move { client.wait(operation.id, Duration::from_secs(60), |_| {}).await });
    let short: supercloud_api::Operation =
        world.client.get(&format!("/v1/operations/{}?wait=50ms", operation.id)).await.unwrap();
    assert!(!short.phase.is_terminal());
    crate::state::retry_conflicts(|| async {
        let before = test.state().need::<OperationRecord>(&operation.id).await?;
        let mut now = before.value.clone();
        now.operation.phase = Phase::Failed;
        let mut change = Change::new();
        change.update_operation(&before, &mut now);
        test.state().commit(&Context::system(), change).await
    })
    .await
    .unwrap();
    let ended = waiter.await.unwrap().unwrap();
    assert_eq!(ended.phase, Phase::Failed);
    assert!(ended.ended_at_ms.is_some() && ended.phase_times.last().unwrap().phase == Phase::Failed);
    assert!(!test.state().active_operations().await.unwrap().contains(&operation.id));
    assert_eq!(problem(world.client.cancel_operation(operation.id).await).code, Code::WrongState);
    test.stop().await;
}

#[tokio::test]
async fn a_host_goes_only_when_nothing_can_run_on_there() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    let admin = test.admin_client();
    assert_eq!(problem(admin.remove_host("east-1", false).await).code, Code::WrongState);
    test.parts().hosts.gone(world.hosts[0].id);
    let refused = problem(admin.remove_host("east-1", false).await);
    assert!(refused.detail.contains("what guest web has written to its disk"), "{}", refused.detail);
    let removed = admin.remove_host("east-1", true).await.unwrap();
    assert_eq!(removed.state, supercloud_api::HostState::Removed);
    assert_eq!(problem(admin.host("east-1").await).code, Code::NotFound, "the name is free again");
    assert_eq!(admin.host(&removed.id.to_string()).await.unwrap().id, removed.id);
    test.stop().await;
}

#[tokio::test]
async fn a_host_with_what_others_need_goes_only_when_it_is_given_up() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[1]).await;
    let (old, admin) = (world.hosts[0].id, test.admin_client());
    let holders = |needed, lost| vec![Holder { host: old, epoch: Epoch(1), needed, lost }];
    let hold = async |needed, lost| {
        test.edit::<GuestRecord>(&id, |record| record.owner.holders = holders(needed, lost)).await;
    };
    hold(true, false).await;
    // Connected or not: its blocks are needed.
    for _ in 0..2 {
        let refused = problem(admin.remove_host("east-1", false).await);
        assert_eq!(refused.code, Code::WrongState);
        assert!(refused.detail.contains("disk blocks of guest web"), "{}", refused.detail);
        test.parts().hosts.gone(old);
    }
    let force = test.raw(reqwest::Method::DELETE, "/v1/hosts/east-1?force=true", Some(&test.admin_secret()));
    assert_eq!(force.send().await.unwrap().status(), reqwest::StatusCode::OK);
    test.stop().await;
}

#[tokio::test]
async fn what_a_guest_still_needs_of_the_cloud_it_left_is_shown() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let web = world.client.guest("web").await.unwrap();
    assert_eq!(web.base_missing_bytes, None, "it does not run");
    let (east, west) = (&world.hosts[0], &world.hosts[1]);
    test.run_on(web.id, west).await;
    let based_on = async |cloud| {
        test.edit::<Volume>(&web.volumes[0], |volume| {
            (volume.base, volume.base_cloud, volume.host) = (Some("0".repeat(64)), Some(cloud), Some(west.id));
        })
        .await;
    };
    based_on(east.cloud).await;
    let shown = async || world.client.guest("web").await.unwrap().base_missing_bytes;
    let secret = test.admin_secret();
    let metrics =
        async || test.raw(reqwest::Method::GET, "/metrics", Some(&secret)).send().await.unwrap().text().await.unwrap();
    assert_eq!(shown().await, None, "its host has not told");
    let text = metrics().await;
    for line in ["supercloud_guests_base_unknown 1", "supercloud_volumes_needing_cloud{cloud=\"east\"} 1"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let epoch = test.state().need::<GuestRecord>(&web.id).await.unwrap().owner.epoch;
    let tell = |epoch| test.parts().hosts.note_bases(west.id, [(web.id, epoch, 5)], std::time::Instant::now());
    tell(epoch.next());
    assert_eq!(shown().await, None, "of another epoch");
    tell(epoch);
    assert_eq!(shown().await, Some(5));
    let text = metrics().await;
    for line in ["supercloud_guests_base_unknown 0", "supercloud_base_missing_bytes 5"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let listed = world.client.guests().await.unwrap();
    assert_eq!(listed[0].base_missing_bytes, Some(5));
    let refused = problem(test.admin_client().remove_host("east-1", false).await);
    assert!(refused.detail.contains("what volume"), "{}", refused.detail);
    // The host is away; what was durable holds.
    test.parts().hosts.gone(west.id);
    assert_eq!(shown().await, None);
    based_on(west.cloud).await;
    assert_eq!(shown().await, Some(0));
    assert!(metrics().await.contains("supercloud_volumes_needing_cloud{cloud=\"east\"} 0"));
    test.stop().await;
}

#[tokio::test]
async fn a_guest_cancels_its_own_wishes_only() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let web = world.client.guest("web").await.unwrap();
    test.run_on(web.id, &world.hosts[0]).await;
    let drain = world.client.migrate_guest("web", &to("west")).await.unwrap();
    let own = test.client(&test.guest_token(world.project, web.id).await);
    assert_eq!(problem(own.cancel_operation(drain.id).await).code, Code::Forbidden);
    test.edit::<OperationRecord>(&drain.id, |record| record.operation.actor = format!("guest:{}", web.id)).await;
    assert!(own.cancel_operation(drain.id).await.unwrap().is_cancel_requested);
    test.stop().await;
}

#[tokio::test]
async fn a_stop_keeps_what_was_asked() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let id = world.client.guest("web").await.unwrap().id;
    test.run_on(id, &world.hosts[0]).await;
    let operation = world.client.stop_guest("web", &GuestStop { force: true, grace_ms: None }).await.unwrap();
    let stored = test.state().need::<OperationRecord>(&operation.id).await.unwrap();
    assert_eq!(stored.work, Work::GuestStop { grace_ms: 0 });
    test.stop().await;
}
