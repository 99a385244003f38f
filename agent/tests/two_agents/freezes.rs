//! A freeze that is cancelled, or whose agent dies, while the hypervisor saves the guest's memory: for a moment a file is all
//! there is of the guest, and whatever happens then, the guest goes on and is never booted again.

use std::{sync::atomic::Ordering, time::Duration};

use supercloud_api::{
    handover::{OperationKind, Phase, Report},
    ids::{FreezeId, GuestId, OperationId},
};
use supercloud_blanket::backend::{PauseReason, RunState};

use crate::lab::Lab;

/// A lab with a guest whose memory is being saved.
async fn saving(save_ms: u64, goes_on: bool) -> (Lab, GuestId, OperationId) {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    lab.world.save_ms.store(save_ms, Ordering::SeqCst);
    lab.world.saves_go_on.store(goes_on, Ordering::SeqCst);
    let operation = lab.controller.operate(guest, OperationKind::Freeze { freeze: FreezeId::generate() });
    lab.eventually("its memory is being saved", async || {
        let state = lab.hosts[0].hypervisor.epoch_of(guest).await.map(|(_, state)| state);
        state == Some(RunState::Paused(PauseReason::Saving))
    })
    .await;
    (lab, guest, operation)
}

/// The freeze came to nothing; the guest runs on, and the next freeze of it thaws elsewhere.
async fn runs_on(lab: &Lab, guest: GuestId, operation: OperationId) {
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.check(guest).await;
    assert!(!lab.hosts[0].memory_file(guest).exists(), "the file is not removed");
    lab.world.save_ms.store(0, Ordering::SeqCst);
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.eventually("the frozen guest's host is free", async || lab.hosts[0].leftovers().is_empty()).await;
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was booted again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_cancelled_while_memory_is_saved_is_given_up() {
    let (lab, guest, operation) = saving(60_000, false).await;
    assert!(lab.controller.abort(guest, operation));
    runs_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_ends_well_after_its_cancel_is_thawed_again() {
    // Long enough for the progress that is told meanwhile to fill every queue.
    let (lab, guest, operation) = saving(18_000, true).await;
    assert!(lab.controller.abort(guest, operation));
    runs_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thawed_back_guest_that_does_not_resume_at_once_does_so_later() {
    let (lab, guest, operation) = saving(500, true).await;
    lab.world.failing_resumes.store(2, Ordering::SeqCst);
    assert!(lab.controller.abort(guest, operation));
    runs_on(&lab, guest, operation).await;
    assert_eq!(lab.world.failing_resumes.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_in_the_middle_of_a_save_and_comes_back_when_it_has_ended() {
    let (lab, guest, operation) = saving(500, true).await;
    lab.hosts[0].kill_agent().await;
    lab.eventually("the save has ended", async || lab.hosts[0].hypervisor.epoch_of(guest).await.is_none()).await;
    lab.hosts[0].start_agent();
    runs_on(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_in_the_middle_of_a_save_and_comes_back_while_it_goes_on() {
    for goes_on in [false, true] {
        println!("the save can{} be given up", if goes_on { "not" } else { "" });
        let (lab, guest, operation) = saving(4_000, goes_on).await;
        lab.hosts[0].kill_agent().await;
        lab.hosts[0].start_agent();
        tokio::time::sleep(Duration::from_millis(300)).await;
        runs_on(&lab, guest, operation).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_at_the_end_of_a_save_only_delays_it() {
    let (lab, guest, operation) = saving(500, false).await;
    lab.hosts[0].fill_disk(guest, true);
    lab.eventually("the save has ended", async || lab.hosts[0].hypervisor.epoch_of(guest).await.is_none()).await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(lab.controller.record(guest).operation.is_some());
    lab.hosts[0].fill_disk(guest, false);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_at_the_destination_only_delays_the_switch() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let (paused, mut is_paused) = tokio::sync::mpsc::unbounded_channel();
    let destination = lab.hosts[1].clone();
    let mut is_full = false;
    lab.controller.hook(move |_, report| {
        match report {
            Report::Prepared { .. } if !std::mem::replace(&mut is_full, true) => destination.fill_disk(guest, true),
            Report::Paused { .. } => drop(paused.send(())),
            _ => {}
        }
        crate::controller::Verdict::Take
    });
    let operation = lab.controller.operate(guest, lab.migrate(1));
    is_paused.recv().await.unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(lab.controller.record(guest).operation.is_some());
    lab.hosts[1].fill_disk(guest, false);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    lab.controller.unhook();
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_dies_while_it_is_saved_is_lost_and_not_made_of_half_a_file() {
    let (lab, guest, operation) = saving(60_000, true).await;
    lab.hosts[0].kill_agent().await;
    lab.hosts[0].hypervisor.crash(guest).await;
    lab.hosts[0].start_agent();
    lab.controller.ended(guest, operation).await;
    lab.eventually("it is known as lost", async || {
        matches!(lab.controller.record(guest).owner, supercloud_api::handover::Owner::Lost(_))
    })
    .await;
    assert_eq!(lab.world.running(guest), 0);
    lab.violations();
}
