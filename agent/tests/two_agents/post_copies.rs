//! Guests that run at their destination before all of their memory is there: whoever dies or is cut off while some is missing, the guest
//! waits for what it wants and goes on; only where what is missing is nowhere any more it is lost, and that is said.

use std::{sync::atomic::Ordering, time::Duration};

use supercloud_api::{
    MemoryMode,
    handover::{OperationKind, Owner, Phase, Report},
    ids::{GuestId, OperationId},
};

use crate::{controller::Verdict, lab::Lab};

/// Two hosts, and a guest at the first; a page that is left behind takes so long to go.
async fn lab(memory: MemoryMode, page_ms: u64) -> (Lab, GuestId) {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.controller.leave_memory(memory);
    lab.world.page_ms.store(page_ms, Ordering::SeqCst);
    (lab, guest)
}

fn post_copy(lab: &Lab, to: usize) -> OperationKind {
    OperationKind::Migrate { to: lab.hosts[to].id, post_copy: true }
}

fn missing(lab: &Lab, operation: OperationId) -> Option<u64> {
    lab.controller.progress(operation).and_then(|progress| progress.memory_missing_bytes)
}

/// Moves the guest as far as that it runs at host 1, and some of its memory has come and some has not.
async fn half_way(lab: &Lab, guest: GuestId) -> OperationId {
    let operation = lab.controller.operate(guest, post_copy(lab, 1));
    lab.eventually("some of its memory has come", async || {
        missing(lab, operation).is_some_and(|left| left > 0 && left < 60 * crate::post_copying::PAGE_BYTES)
    })
    .await;
    assert_eq!(lab.controller.record(guest).owner, Owner::Host(lab.hosts[1].id));
    operation
}

/// It goes on to its end: nothing is missing, nothing is left, nothing was lost.
async fn goes_on(lab: &Lab, guest: GuestId, operation: OperationId) {
    lab.world.page_ms.store(0, Ordering::SeqCst);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    assert_eq!(missing(lab, operation), Some(0));
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was not booted again");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_left_behind_follows_whichever_end_can_dial() {
    for (dialable, memory) in [
        ([true, true], MemoryMode::PostCopy),
        ([true, false], MemoryMode::PostCopy),
        ([false, true], MemoryMode::Hybrid),
        // Nothing is left behind after all.
        ([true, true], MemoryMode::PreCopy),
    ] {
        let lab = Lab::begin(&dialable).await;
        let guest = lab.add_guest();
        lab.start(guest, 0).await;
        lab.controller.leave_memory(memory);
        let operation = lab.controller.operate(guest, post_copy(&lab, 1));
        goes_on(&lab, guest, operation).await;
        // And back, all before.
        lab.controller.leave_memory(MemoryMode::PreCopy);
        lab.done(guest, lab.migrate(0)).await;
        lab.check(guest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_not_released_before_its_memory_is_there() {
    let (lab, guest) = lab(MemoryMode::PostCopy, 30).await;
    let source = lab.hosts[0].id;
    let operation = half_way(&lab, guest).await;
    lab.controller.hook(move |from, report| {
        assert!(!(from == source && matches!(report, Report::Released { .. })), "released while memory is missing");
        Verdict::Take
    });
    let left = missing(&lab, operation);
    lab.eventually("more of it comes", async || missing(&lab, operation) < left).await;
    assert!(lab.hosts[0].hypervisor.epoch_of(guest).await.is_some());
    lab.controller.unhook();
    goes_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_die_while_memory_is_missing_go_on_when_they_are_back() {
    for victims in [&[0][..], &[1], &[0, 1]] {
        let (lab, guest) = lab(MemoryMode::PostCopy, 30).await;
        let operation = half_way(&lab, guest).await;
        for victim in victims {
            lab.hosts[*victim].kill_agent().await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(lab.hosts[0].hypervisor.epoch_of(guest).await.is_some(), "the source is there as long as it is needed");
        for victim in victims {
            lab.hosts[*victim].start_agent();
        }
        goes_on(&lab, guest, operation).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_cannot_be_reached_is_an_alarm_until_it_can() {
    let (lab, guest) = lab(MemoryMode::PostCopy, 30).await;
    let operation = half_way(&lab, guest).await;
    lab.hosts[0].kill_agent().await;
    let alarm = || lab.controller.report(lab.hosts[1].id, guest).and_then(|report| report.alarm);
    lab.eventually("an alarm", async || alarm().is_some_and(|alarm| alarm.contains("cannot be reached"))).await;
    assert_eq!(lab.world.running(guest), 1, "it waits");
    lab.hosts[0].start_agent();
    lab.eventually("no alarm any more", async || alarm().is_none()).await;
    goes_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_lose_their_controller_go_on_without_it() {
    let (lab, guest) = lab(MemoryMode::Hybrid, 30).await;
    let operation = half_way(&lab, guest).await;
    for host in &lab.hosts {
        lab.controller.cut(host.id);
    }
    lab.world.page_ms.store(0, Ordering::SeqCst);
    lab.eventually("all of it has come", async || {
        lab.hosts[1].hypervisor.0.missing.lock().unwrap()[&guest].is_none_missing()
    })
    .await;
    for host in &lab.hosts {
        lab.controller.heal(host.id);
    }
    goes_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_memory_is_gone_is_lost_and_starts_again_from_its_disk() {
    // The process at the source dies; its agent is there, or comes back later.
    for is_agent_there in [true, false] {
        let (lab, guest) = lab(MemoryMode::PostCopy, 30).await;
        let operation = half_way(&lab, guest).await;
        if !is_agent_there {
            lab.hosts[0].kill_agent().await;
        }
        lab.hosts[0].hypervisor.crash(guest).await;
        if !is_agent_there {
            lab.hosts[0].start_agent();
        }
        assert_eq!(lab.controller.ended(guest, operation).await, Phase::Failed);
        assert_eq!(lab.controller.record(guest).owner, Owner::Lost(lab.hosts[1].id));
        assert_eq!(lab.world.running(guest), 0);
        lab.done(guest, OperationKind::RestartFromVolume { to: lab.hosts[1].id }).await;
        lab.check_at_owner(guest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_memory_is_at_a_lost_host_is_lost_when_somebody_says_so() {
    let (lab, guest) = lab(MemoryMode::PostCopy, 30).await;
    let operation = half_way(&lab, guest).await;
    lab.hosts[0].die(guest).await;
    // Silence alone is no reason.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(lab.world.running(guest), 1);
    assert_eq!(lab.controller.record(guest).owner, Owner::Host(lab.hosts[1].id));
    lab.controller.lose(guest, lab.hosts[0].id);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Failed);
    lab.eventually("it is lost", async || lab.controller.record(guest).owner == Owner::Lost(lab.hosts[1].id)).await;
    assert_eq!(lab.world.running(guest), 0);
}
