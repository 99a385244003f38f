//! Guests that are thawed before their memory is here: they run, and what is missing comes out of the store, whoever dies or cannot be
//! reached meanwhile; and nobody is told that nothing is missing before that is so.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use supercloud_api::{
    handover::{OperationKind, Owner, Phase, Report},
    ids::{FreezeId, GuestId, OperationId},
    link::ThawWish,
};

use crate::{controller::Verdict, lab::Lab, post_copying::PAGE_BYTES};

/// Two hosts in two clouds, and a guest that was frozen at the first.
async fn frozen() -> (Lab, GuestId, FreezeId) {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.controller.thaw(ThawWish::Lazy);
    (lab, guest, freeze)
}

fn missing(lab: &Lab, operation: OperationId) -> Option<u64> {
    lab.controller.progress(operation).and_then(|progress| progress.memory_missing_bytes)
}

/// Thawed at host 1, where it runs; some of its memory has come and some has not.
async fn half_way(lab: &Lab, guest: GuestId, freeze: FreezeId) -> OperationId {
    lab.world.page_ms.store(30, Ordering::SeqCst);
    let operation = lab.controller.operate(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id });
    lab.eventually("some of its memory has come", async || {
        missing(lab, operation).is_some_and(|left| left > 40 * PAGE_BYTES && left < 62 * PAGE_BYTES)
    })
    .await;
    assert_eq!(lab.controller.record(guest).owner, Owner::Host(lab.hosts[1].id));
    assert_eq!(lab.world.running(guest), 1);
    assert!(!lab.hosts[1].memory_file(guest).exists(), "all of it was fetched first");
    operation
}

async fn goes_on(lab: &Lab, guest: GuestId, operation: OperationId) {
    lab.world.page_ms.store(0, Ordering::SeqCst);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    assert_eq!(missing(lab, operation), Some(0));
    assert!(lab.hosts[1].hypervisor.0.missing.lock().unwrap()[&guest].is_none_missing());
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was not booted again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thawed_guest_runs_at_once_and_the_thaw_is_over_when_its_memory_is_there() {
    let (lab, guest, freeze) = frozen().await;
    let missing_now = lab.hosts[1].hypervisor.clone();
    let is_early = Arc::new(AtomicBool::new(false));
    let early = is_early.clone();
    lab.controller.hook(move |_, report| {
        if matches!(report, Report::NothingMissing { .. }) {
            let all = missing_now.0.missing.lock().unwrap();
            early.fetch_or(!all[&guest].is_none_missing(), Ordering::SeqCst);
        }
        Verdict::Take
    });
    let operation = half_way(&lab, guest, freeze).await;
    let left = missing(&lab, operation);
    lab.eventually("more of it comes", async || missing(&lab, operation) < left).await;
    assert_ne!(lab.controller.record(guest).operation, None, "it is not over");
    goes_on(&lab, guest, operation).await;
    assert!(!is_early.load(Ordering::SeqCst), "nothing is missing, it said");
    lab.controller.unhook();
    // As any other guest from now on.
    lab.done(guest, lab.migrate(0)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_while_memory_is_missing_goes_on_when_it_is_back() {
    for victims in [&[1][..], &[0, 1]] {
        let (lab, guest, freeze) = frozen().await;
        let operation = half_way(&lab, guest, freeze).await;
        for victim in victims {
            lab.hosts[*victim].kill_agent().await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        for victim in victims {
            lab.hosts[*victim].start_agent();
        }
        goes_on(&lab, guest, operation).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_cannot_be_reached_is_an_alarm_until_it_can() {
    let (lab, guest, freeze) = frozen().await;
    // The first ones are at the destination by then; the others are where it was frozen.
    lab.world.page_ms.store(2000, Ordering::SeqCst);
    let operation = lab.controller.operate(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id });
    lab.eventually("some of its memory has come", async || {
        missing(&lab, operation).is_some_and(|left| left < 63 * PAGE_BYTES)
    })
    .await;
    lab.hosts[0].kill_agent().await;
    let store = lab.hosts[0].config.store_dir.clone();
    let away = store.with_file_name("away");
    std::fs::rename(&store, &away).unwrap();
    lab.world.page_ms.store(1, Ordering::SeqCst);
    let alarm = || lab.controller.report(lab.hosts[1].id, guest).and_then(|report| report.alarm);
    lab.eventually("an alarm", async || alarm().is_some_and(|alarm| alarm.contains("do not come"))).await;
    assert_eq!(lab.world.running(guest), 1, "it waits");
    assert!(missing(&lab, operation).is_some_and(|left| left > 0));
    assert_ne!(lab.controller.record(guest).operation, None, "it is not over");
    std::fs::rename(&away, &store).unwrap();
    lab.hosts[0].start_agent();
    lab.eventually("no alarm any more", async || alarm().is_none()).await;
    goes_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_dies_while_memory_is_missing_is_lost_and_not_thawed_again() {
    let (lab, guest, freeze) = frozen().await;
    let operation = half_way(&lab, guest, freeze).await;
    lab.hosts[1].hypervisor.crash(guest).await;
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Failed);
    assert_eq!(lab.controller.record(guest).owner, Owner::Lost(lab.hosts[1].id));
    assert_eq!(lab.world.running(guest), 0);
    lab.world.page_ms.store(0, Ordering::SeqCst);
    lab.done(guest, OperationKind::RestartFromVolume { to: lab.hosts[1].id }).await;
    lab.check_at_owner(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_cannot_refuses_by_name_and_thaws_whole_where_that_is_left_to_it() {
    let (lab, guest, freeze) = frozen().await;
    lab.world.lacks_lazy_thaws.store(true, Ordering::SeqCst);
    let thaw = OperationKind::Thaw { freeze, to: lab.hosts[1].id };
    let operation = lab.controller.operate(guest, thaw);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    assert_eq!(lab.controller.record(guest).owner, Owner::Frozen(freeze));
    assert_eq!(lab.world.running(guest), 0);
    lab.controller.thaw(ThawWish::Either);
    lab.done(guest, thaw).await;
    assert!(!lab.hosts[1].hypervisor.0.missing.lock().unwrap().contains_key(&guest));
    lab.check(guest).await;
}
