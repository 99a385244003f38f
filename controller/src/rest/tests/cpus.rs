//! Which processors guests are given at their start, and where they can go with them.

use supercloud_api::{
    Code, CompatClass, CpuChoice, CpuLevel, GuestCreate, GuestMigrate, GuestStart, Host, Phase,
    cpu::{CpuBaseline, Maker, WORDS},
};

use super::{TestController, guest, problem};
use crate::state::{GuestRecord, HostRecord};

/// A processor of `x86-64-v3`, or of v4.
fn features(has_avx512: bool) -> CpuBaseline {
    let mut words = [0; WORDS.len()];
    words[0] = !0;
    words[2] = 1 << 3 | 1 << 5 | 1 << 8;
    words[11] = 1 | 1 << 5;
    if has_avx512 {
        words[2] |= 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31;
    }
    CpuBaseline { maker: Maker(*b"GenuineIntel"), physical_bits: 46, words }.offered()
}

async fn equip(test: &TestController, host: &Host, has_avx512: bool) {
    let cpu_baseline = features(has_avx512).to_string();
    test.edit::<HostRecord>(&host.id, |record| {
        record.host.compat_classes = vec![CompatClass {
            back_end: "kvm".into(),
            accelerator: "kvm".into(),
            machine_version: "2".into(),
            cpu_baseline: cpu_baseline.clone(),
        }];
    })
    .await;
}

fn to_west() -> GuestMigrate {
    serde_json::from_value(serde_json::json!({ "to": "west" })).unwrap()
}

#[tokio::test]
async fn a_guest_can_leave_for_hosts_with_less_unless_it_wants_all() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    equip(&test, &world.hosts[0], true).await;
    equip(&test, &world.hosts[1], false).await;
    let started = |name: &str, cpu| GuestCreate { place: Some("east".into()), start: true, cpu, ..guest(name) };
    for (name, cpu, level, lives) in
        [("web", CpuChoice::Portable, CpuLevel::V3, true), ("calc", CpuChoice::Host, CpuLevel::V4, false)]
    {
        let operation = client.create_guest(&started(name, cpu)).await.unwrap();
        let said = operation.plan.unwrap().checks.into_iter().find(|check| check.name == "cpu").unwrap();
        assert!(said.detail.contains(if lives { "without avx512f" } else { "all that east-1 has" }), "{}", said.detail);
        let id = client.guest(name).await.unwrap().id;
        let class = client.guest(name).await.unwrap().compat_class.unwrap();
        assert_eq!(class.features().unwrap().level(), Some(level));
        test.run_on(id, &world.hosts[0]).await;
        test.edit::<GuestRecord>(&id, |record| record.guest.compat_class = Some(class.clone())).await;
        let moved = client.plan_migration(name, &to_west()).await.unwrap().plan.unwrap();
        assert_eq!(moved.destination.is_some(), lives, "{moved:?}");
        let refused = moved.checks.iter().find(|check| !check.is_ok).map(|check| check.detail.clone());
        assert_eq!(refused.is_some_and(|said| said.contains("it lacks avx512f")), !lives);
        // What each choice would give up and open.
        let cpus = client.explain_placement(name).await.unwrap().cpus;
        let row = |choice| cpus.iter().find(|one| one.choice == choice).unwrap();
        assert_eq!((row(CpuChoice::Portable).hosts, row(CpuChoice::Host).hosts, row(CpuChoice::V4).clouds), (2, 1, 1));
        assert_eq!(cpus.iter().filter(|one| one.is_current).map(|one| one.choice).collect::<Vec<_>>(), [cpu]);
        assert!(row(CpuChoice::Portable).without.iter().any(|name| name == "avx512f"));
    }
    // A level is only given where it is.
    let refused = GuestCreate { place: Some("west".into()), ..started("big", CpuChoice::V4) };
    let said = problem(client.create_guest(&refused).await);
    assert_eq!(said.code, Code::Incompatible);
    let there = GuestCreate { place: Some("west-1".into()), ..refused };
    let said = problem(client.create_guest(&there).await);
    assert!(said.code == Code::Incompatible && said.detail.contains("west-1: x86-64-v3"), "{}", said.detail);
    let anywhere = GuestCreate { place: None, ..started("big", CpuChoice::V4) };
    assert_eq!(client.create_guest(&anywhere).await.unwrap().destination, Some(world.hosts[0].id));
    test.stop().await;
}

#[tokio::test]
async fn another_cpu_is_given_at_a_start_and_what_back_ends_name_themselves_stays_theirs() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    // Hosts that say no features give what they have.
    let rehearsed = GuestStart { place: None, cpu: Some(CpuChoice::V3) };
    assert_eq!(problem(client.start_guest("web", &rehearsed).await).code, Code::Incompatible);
    assert!(client.explain_placement("web").await.unwrap().cpus.is_empty());
    equip(&test, &world.hosts[0], true).await;
    let start = GuestStart { place: Some("east".into()), cpu: Some(CpuChoice::V4) };
    let operation = client.start_guest("web", &start).await.unwrap();
    assert_eq!(operation.phase, Phase::Plan);
    let found = client.guest("web").await.unwrap();
    assert_eq!(
        (found.cpu, found.compat_class.unwrap().features().unwrap().level()),
        (CpuChoice::V4, Some(CpuLevel::V4))
    );
    test.stop().await;
}
