//! Groups as REST accepts them: all members are checked, placed and begun, or none.

use supercloud_api::{
    Code, Group, GroupCreate, GroupThaw, GroupUpdate, GuestFreeze, GuestMigrate, MemoryMode, OperationKind, Phase,
    ProjectCreate, Ref,
    client::Client,
    handover::{Owner, OwnerRecord},
    ids::{Epoch, FreezeId, GuestId},
};

use super::{TestController, World, guest, problem};
use crate::state::{GuestRecord, OperationRecord, Work};

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

fn wanted(name: &str, guests: &[&str]) -> GroupCreate {
    let guests = guests.iter().map(|guest| Ref::from(*guest)).collect();
    GroupCreate { name: name.parse().unwrap(), project: None, guests }
}

/// Guests that run on these hosts.
async fn guests(test: &TestController, world: &World, places: &[(&str, usize)]) -> Vec<GuestId> {
    let mut ids = Vec::new();
    for (name, host) in places {
        world.client.create_guest(&guest(name)).await.unwrap();
        let id = world.client.guest(name).await.unwrap().id;
        test.run_on(id, &world.hosts[*host]).await;
        ids.push(id);
    }
    ids
}

async fn held(client: &Client, names: &[&str]) -> usize {
    let mut count = 0;
    for name in names {
        count += usize::from(client.guest(name).await.unwrap().operation.is_some());
    }
    count
}

#[tokio::test]
async fn a_group_is_made_of_guests_that_are_in_no_other() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    let ids = guests(&test, &world, &[("web", 0), ("db", 0), ("cache", 1)]).await;
    let made = client.create_group(&wanted("shop", &["web", "db"])).await.unwrap();
    assert_eq!((made.guests.clone(), made.operation), (ids[..2].to_vec(), None));
    let many: Vec<&str> = vec!["web"; 9];
    for (name, members, code) in [
        ("none", &[][..], Code::BadRequest),
        ("many", &many, Code::BadRequest),
        ("twice", &["cache", "cache"], Code::BadRequest),
        ("other", &["cache", "web"], Code::WrongState),
        ("nobody", &["nobody"], Code::NotFound),
        ("shop", &["cache"], Code::NameTaken),
    ] {
        assert_eq!(problem(client.create_group(&wanted(name, members)).await).code, code, "{name}");
    }
    let tried: Group =
        client.call(reqwest::Method::POST, "/v1/groups?dry_run=true", &wanted("dry", &["cache"])).await.unwrap();
    assert_eq!(problem(client.group(&tried.id.to_string()).await).code, Code::NotFound);
    let set = GroupUpdate { guests: vec!["cache".into(), "web".into()] };
    let changed = client.patch_group("shop", &set).await.unwrap();
    assert_eq!(changed.guests, [ids[2], ids[0]]);
    assert_eq!(client.groups().await.unwrap(), [changed]);
    // A member is not deleted under it.
    let refused = problem(client.delete_guest("web").await);
    assert_ne!(refused.code, Code::NotFound, "{refused:?}");
    client.delete_group("shop").await.unwrap();
    assert!(client.groups().await.unwrap().is_empty());
    // Another project's guests are no members, whoever asks.
    let admin = test.admin_client();
    admin.create_project(&ProjectCreate { name: "other".parse().unwrap(), quota: None }).await.unwrap();
    let foreign = GroupCreate { project: Some("other".into()), ..wanted("spy", &[&ids[0].to_string()]) };
    assert_eq!(problem(admin.create_group(&foreign).await).code, Code::BadRequest);
    test.stop().await;
}

#[tokio::test]
async fn all_members_are_begun_or_none() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    let names = ["web", "db", "cache"];
    guests(&test, &world, &[("web", 0), ("db", 0), ("cache", 1)]).await;
    client.create_group(&wanted("shop", &names)).await.unwrap();

    // Two have to go, one is there.
    let path = "/v1/groups/shop/migrate?dry_run=true";
    let dry: supercloud_api::Operation = client.call(reqwest::Method::POST, path, &to("west")).await.unwrap();
    let plan = dry.plan.unwrap();
    assert_eq!((dry.parts.len(), plan.destination), (2, Some(world.hosts[1].id)));
    assert_eq!(plan.predicted_bytes, Some(2 * (256 << 20)));
    for name in ["web", "db"] {
        assert!(plan.checks.iter().any(|check| check.detail.starts_with(&format!("{name}: "))), "{:?}", plan.checks);
    }
    assert_eq!(held(client, &names).await, 0, "a dry run");
    assert_eq!(client.operations().await.unwrap().iter().filter(|one| one.group.is_some()).count(), 0);

    // One of them cannot: none goes, and the answer says which.
    client.migrate_guest("db", &to("west")).await.unwrap();
    let refused = problem(client.migrate_group("shop", &to("west")).await);
    assert_eq!(refused.code, Code::OperationInProgress);
    assert!(refused.detail.starts_with("guest db: "), "{}", refused.detail);
    assert_eq!(held(client, &names).await, 1);
    client.patch_group("shop", &GroupUpdate { guests: vec!["web".into(), "cache".into()] }).await.unwrap();

    let whole = client.freeze_group("shop", &GuestFreeze { reason: Some("night".into()) }).await.unwrap();
    assert_eq!((whole.kind, whole.parts.len(), whole.phase), (OperationKind::GroupFreeze, 2, Phase::Plan));
    let group = client.group("shop").await.unwrap();
    assert_eq!((whole.group, group.operation), (Some(group.id), Some(whole.id)));
    for part in &whole.parts {
        let record = test.state().need::<OperationRecord>(part).await.unwrap();
        assert_eq!((record.operation.part_of, record.operation.group), (Some(whole.id), Some(group.id)));
        assert_eq!(record.operation.reason.as_deref(), Some("night"));
        assert!(matches!(record.work, Work::GuestFreeze { .. }));
        let member = test.state().need::<GuestRecord>(&record.operation.guest.unwrap()).await.unwrap();
        assert_eq!(member.owner.operation.as_ref().unwrap().group, Some(whole.id));
    }
    // While that is under way, nothing else is done with the group.
    for refused in [
        problem(client.freeze_group("shop", &GuestFreeze::default()).await),
        problem(client.delete_group("shop").await),
        problem(client.patch_group("shop", &GroupUpdate { guests: vec!["web".into()] }).await),
    ] {
        assert_eq!(refused.code, Code::OperationInProgress, "{refused:?}");
    }
    test.stop().await;
}

#[tokio::test]
async fn what_does_not_fit_together_does_not_go_together() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    let names = ["a", "b", "c"];
    let ids = guests(&test, &world, &[("a", 0), ("b", 0), ("c", 0)]).await;
    client.create_group(&wanted("shop", &names)).await.unwrap();
    assert_eq!(problem(client.migrate_group("shop", &to("east")).await).code, Code::WrongState, "all are there");
    // Each would fit alone; the third finds the room taken by the others.
    let room = world.hosts[1].capacity.memory_bytes - world.hosts[1].used.memory_bytes;
    for id in &ids {
        test.edit::<GuestRecord>(id, |record| record.guest.shape.memory_bytes = room / 5 * 2).await;
    }
    let refused = problem(client.migrate_group("shop", &to("west")).await);
    assert_eq!(refused.code, Code::NoCapacity, "{}", refused.detail);
    assert_eq!(held(client, &names).await, 0);
    client.patch_group("shop", &GroupUpdate { guests: vec!["a".into(), "b".into()] }).await.unwrap();
    client.migrate_group("shop", &to("west")).await.unwrap();
    assert_eq!(held(client, &names).await, 2);
    test.stop().await;
}

#[tokio::test]
async fn a_frozen_group_is_thawed_where_there_is_room_for_all() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    let ids = guests(&test, &world, &[("a", 0), ("b", 0)]).await;
    client.create_group(&wanted("shop", &["a", "b"])).await.unwrap();
    let refused = problem(client.thaw_group("shop", &GroupThaw::default()).await);
    assert!(refused.code == Code::WrongState && refused.detail.starts_with("guest a: "), "{refused:?}");
    for id in &ids {
        let owner =
            OwnerRecord { owner: Owner::Frozen(FreezeId::generate()), epoch: Epoch(2), ..OwnerRecord::new(*id) };
        test.edit::<GuestRecord>(id, |record| record.set_owner(owner.clone(), None)).await;
    }
    let thawed =
        client.thaw_group("shop", &GroupThaw { to: Some("west".into()), ..GroupThaw::default() }).await.unwrap();
    assert_eq!((thawed.kind, thawed.parts.len()), (OperationKind::GroupThaw, 2));
    assert_eq!(thawed.destination, Some(world.hosts[1].id));
    test.stop().await;
}
