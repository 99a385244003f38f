//! What must work when nothing goes wrong, and what people may do in between.

use std::sync::atomic::Ordering;

use supercloud_api::{
    handover::{OperationKind, Owner, Phase},
    ids::{Epoch, FreezeId, GuestId},
    link::GuestEventKind,
};

use crate::lab::Lab;

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_starts_moves_there_and_back_and_stops() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    for to in [1, 0] {
        let operation = lab.done(guest, lab.migrate(to)).await;
        lab.check(guest).await;
        let progress = lab.controller.progress(operation).unwrap();
        assert!(progress.downtime_ms.is_some(), "{progress:?}");
        assert!(
            progress
                .disk_bytes_before_resume
                .zip(progress.disk_bytes_after_resume)
                .is_some_and(|(before, after)| before + after > 0),
            "{progress:?}"
        );
    }
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1);
    lab.done(guest, OperationKind::Stop).await;
    assert_eq!(lab.controller.record(guest).owner, Owner::Stopped);
    assert_eq!(lab.world.running(guest), 0);
    // Where its volumes are, and at another host.
    lab.start(guest, 0).await;
    lab.check(guest).await;
    lab.done(guest, OperationKind::Stop).await;
    lab.start(guest, 1).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn either_end_may_be_the_one_that_can_dial() {
    for dialable in [[true, false], [false, true]] {
        let lab = Lab::begin(&dialable).await;
        let guest = lab.add_guest();
        lab.start(guest, 0).await;
        lab.done(guest, lab.migrate(1)).await;
        lab.check(guest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hosts_that_cannot_dial_each_other_are_told_and_the_guest_runs_on() {
    let lab = Lab::begin(&[false, false]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let operation = lab.controller.operate(guest, lab.migrate(1));
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    assert!(!lab.controller.problems().is_empty());
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_move_leaves_the_guest_where_it_was_and_the_next_one_succeeds() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.world.piece_ms.store(50, Ordering::SeqCst);
    let operation = lab.controller.operate(guest, lab.migrate(1));
    lab.eventually("memory is being copied", async || {
        lab.controller.progress(operation).is_some_and(|progress| progress.memory_sent_bytes > 0)
    })
    .await;
    assert!(lab.controller.abort(guest, operation));
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.check(guest).await;
    lab.world.piece_ms.store(2, Ordering::SeqCst);
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_thaws_in_another_cloud() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    assert_eq!(lab.controller.record(guest).owner, Owner::Frozen(freeze));
    assert_eq!(lab.world.running(guest), 0);
    assert_eq!(lab.controller.frozen().unwrap().memory.freeze, freeze);
    lab.eventually("nothing is left of a frozen guest", async || lab.hosts[0].leftovers().is_empty()).await;
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was not booted again");
    lab.done(guest, lab.migrate(0)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_had_with_fresh_tickets_when_those_of_the_assignment_have_aged() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.controller.let_tickets_age();
    assert_eq!(lab.controller.asked_for_sources(), 0);
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    assert!(lab.controller.asked_for_sources() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thawed_guest_needs_the_cloud_that_it_left_no_more() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.eventually("it has written", async || lab.hosts[0].hypervisor.check_disk(guest).await > 3).await;
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.eventually("what its disk stands on has come", async || {
        let report = lab.controller.report(lab.hosts[1].id, guest);
        report.is_some_and(|report| report.epoch == Epoch(2) && report.base_missing_bytes == Some(0))
    })
    .await;
    lab.eventually("nothing is left of it there", async || lab.hosts[0].leftovers().is_empty()).await;
    // No other source any more, and no memory of what was read.
    lab.hosts[0].leave().await;
    for pid in lab.hosts[1].volume_pids() {
        assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    }
    lab.eventually("the disk stalls", async || lab.world.running(guest) == 0).await;
    lab.eventually("the guest runs again", async || lab.world.running(guest) == 1).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_that_is_refused_goes_on_running() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.controller.hook(|_, report| match report {
        supercloud_api::handover::Report::RequestSwitch(_) => crate::controller::Verdict::AbortFirst,
        _ => crate::controller::Verdict::Take,
    });
    let operation = lab.controller.operate(guest, OperationKind::Freeze { freeze: FreezeId::generate() });
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.controller.unhook();
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_volume_process_is_started_anew_and_the_guest_goes_on() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let pids = lab.hosts[0].volume_pids();
    assert_eq!(pids.len(), 2, "a disk and a seed disk");
    for pid in &pids {
        assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    }
    lab.eventually("the disk stalls", async || lab.world.running(guest) == 0).await;
    lab.eventually("the guest runs again", async || lab.world.running(guest) == 1).await;
    lab.check(guest).await;
    assert!(lab.controller.has_event(GuestEventKind::DiskStalled));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_disk_does_not_answer_for_a_moment_moves_all_the_same() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    for pid in lab.hosts[0].volume_pids() {
        assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    }
    lab.eventually("the disk stalls", async || lab.world.running(guest) == 0).await;
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1);
}

/// However long blocks are copied ahead, the guest goes on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_does_not_answer_while_blocks_are_copied_ahead_stops_the_guest_for_a_moment_only() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    // Some MiB of blocks: that is minutes.
    lab.controller.limit_bandwidth(Some(64 << 10));
    let operation = lab.controller.operate(guest, lab.migrate(1));
    lab.eventually("blocks are copied ahead", async || {
        let progress = lab.controller.progress(operation);
        progress.is_some_and(|progress| progress.disk_bytes_before_resume.is_some_and(|bytes| bytes > 0))
    })
    .await;
    for pid in lab.hosts[0].volume_pids() {
        assert!(std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    }
    lab.eventually("the disk stalls", async || lab.world.running(guest) == 0).await;
    lab.eventually("the guest runs again", async || lab.world.running(guest) == 1).await;
    assert!(lab.controller.record(guest).operation.is_some(), "blocks are still copied ahead");
    assert!(lab.controller.abort(guest, operation));
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.controller.limit_bandwidth(None);
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_is_told_of_and_not_lost() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    lab.hosts[0].hypervisor.power_off(guest).await;
    lab.eventually("it is told", async || lab.controller.has_event(GuestEventKind::PoweredOff)).await;
    // What the controller makes of it.
    lab.done(guest, OperationKind::Stop).await;
    assert_eq!(lab.controller.record(guest).owner, Owner::Stopped);
    lab.start(guest, 0).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_while_it_moves_is_not_lost() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.world.piece_ms.store(1000, Ordering::SeqCst);
    let operation = lab.controller.operate(guest, lab.migrate(1));
    lab.eventually("memory is being copied", async || {
        lab.controller.progress(operation).is_some_and(|progress| progress.memory_sent_bytes > 0)
    })
    .await;
    lab.hosts[0].hypervisor.power_off(guest).await;
    lab.world.piece_ms.store(2, Ordering::SeqCst);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.eventually("it is told", async || lab.controller.has_event(GuestEventKind::PoweredOff)).await;
    is_stopped_and_starts_again(&lab, guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_powers_itself_off_while_nobody_listens_is_not_lost() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    lab.hosts[0].kill_agent().await;
    lab.hosts[0].hypervisor.power_off(guest).await;
    lab.hosts[0].start_agent();
    is_stopped_and_starts_again(&lab, guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_crashes_while_nobody_listens_is_lost() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.hosts[0].kill_agent().await;
    lab.hosts[0].hypervisor.crash(guest).await;
    lab.hosts[0].start_agent();
    lab.eventually("it is known as lost", async || matches!(lab.controller.record(guest).owner, Owner::Lost(_))).await;
}

async fn is_stopped_and_starts_again(lab: &Lab, guest: GuestId) {
    // What the controller makes of it.
    lab.done(guest, OperationKind::Stop).await;
    assert_eq!(lab.controller.record(guest).owner, Owner::Stopped);
    lab.start(guest, 0).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_stays_of_a_deleted_guest() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.done(guest, OperationKind::Stop).await;
    lab.controller.discard(lab.hosts[0].id, guest);
    lab.eventually("it is confirmed", async || lab.controller.is_discarded(guest)).await;
    lab.eventually("its folders are gone", async || lab.hosts[0].leftovers().is_empty()).await;
    assert!(lab.hosts[0].volume_pids().is_empty());
    assert!(lab.hosts[0].switch.attached.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_go_on_when_the_agent_leaves_and_the_next_one_finds_them() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let pids = lab.hosts[0].volume_pids();
    lab.hosts[0].leave().await;
    assert_eq!(lab.world.running(guest), 1);
    assert_eq!(lab.hosts[0].volume_pids(), pids);
    lab.hosts[0].start_agent();
    lab.check(guest).await;
    assert_eq!(lab.hosts[0].volume_pids(), pids);
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
}
