//! Guests that are mirrored: who dies, and when, decides nothing but whether the standby goes on or the guest itself. Nothing that was
//! acknowledged is lost, and a guest whose mirror has ended speaks again.

use std::{sync::atomic::Ordering, time::Duration};

use supercloud_api::{
    handover::{OperationKind, Owner, Phase, Report},
    ids::{GuestId, OperationId},
};

use crate::{controller::Verdict, lab::Lab};

/// A guest at host 0 whose standby at host 1 has taken some cuts.
async fn mirrored(lab: &Lab) -> (GuestId, OperationId) {
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let operation = lab.controller.operate(guest, OperationKind::Mirror { to: lab.hosts[1].id });
    lab.eventually("some cuts", async || {
        let progress = lab.controller.progress(operation);
        progress.and_then(|progress| progress.mirror).is_some_and(|mirror| mirror.committed >= 3)
    })
    .await;
    (guest, operation)
}

/// It ends as if it had never been: the guest runs on at host 0, and what it does is heard of.
async fn ended_in_order(lab: &Lab, guest: GuestId, operation: OperationId) {
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.check(guest).await;
    let before = lab.world.newest(guest);
    lab.eventually("it speaks again", async || lab.world.newest(guest) > before + 20).await;
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_ended_leaves_the_guest_as_it_was() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    assert!(lab.controller.abort(guest, operation));
    ended_in_order(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standby_goes_on_when_the_host_is_lost() {
    let lab = Lab::begin(&[true, true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    let epoch = lab.controller.record(guest).epoch;
    lab.hosts[0].die(guest).await;
    // Silence alone is no reason.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(lab.controller.record(guest).epoch, epoch);
    assert_eq!(lab.world.running(guest), 0);
    lab.controller.lose(guest, lab.hosts[0].id);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    let record = lab.controller.record(guest);
    assert_eq!((record.owner, record.epoch), (Owner::Host(lab.hosts[1].id), epoch.next()));
    lab.check_at_owner(guest).await;
    // Mirrored again, to a third host, and moved.
    let again = lab.controller.operate(guest, OperationKind::Mirror { to: lab.hosts[2].id });
    lab.eventually("a cut of the second mirror", async || {
        let progress = lab.controller.progress(again);
        progress.and_then(|progress| progress.mirror).is_some_and(|mirror| mirror.committed >= 1)
    })
    .await;
    assert!(lab.controller.abort(guest, again));
    assert_eq!(lab.controller.ended(guest, again).await, Phase::RolledBack);
    lab.done(guest, lab.migrate(2)).await;
    lab.check_at_owner(guest).await;
}

/// From now on nobody hears host 0 ask for an abort of its mirror.
fn keep_the_mirror(lab: &Lab) {
    let source = lab.hosts[0].id;
    lab.controller.hook(move |from, report| match report {
        Report::RequestAbort { .. } if from == source => Verdict::Drop,
        _ => Verdict::Take,
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_agent_was_restarted_goes_on_when_the_host_is_lost() {
    // Before its host is dead and after.
    for is_before in [true, false] {
        let lab = Lab::begin(&[true, true]).await;
        let (guest, operation) = mirrored(&lab).await;
        keep_the_mirror(&lab);
        if !is_before {
            lab.hosts[0].die(guest).await;
        }
        lab.hosts[1].kill_agent().await;
        lab.hosts[1].start_agent();
        if is_before {
            lab.hosts[0].die(guest).await;
        }
        lab.controller.lose(guest, lab.hosts[0].id);
        assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
        assert_eq!(lab.controller.record(guest).owner, Owner::Host(lab.hosts[1].id));
        lab.check_at_owner(guest).await;
        assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was not booted again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_agent_is_restarted_again_and_again_while_it_takes_over_goes_on() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    keep_the_mirror(&lab);
    lab.hosts[0].die(guest).await;
    lab.controller.lose(guest, lab.hosts[0].id);
    // Whatever it was about to do.
    for pause_ms in [0, 5, 20, 60] {
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        lab.hosts[1].kill_agent().await;
        lab.hosts[1].start_agent();
    }
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    lab.check_at_owner(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was not booted again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_agent_was_restarted_is_ended_by_the_controller_alone() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    keep_the_mirror(&lab);
    lab.hosts[1].kill_agent().await;
    lab.hosts[1].start_agent();
    lab.eventually("it says what has become of the mirror", async || {
        lab.controller.progress(operation).is_some_and(|progress| progress.message.contains("restarted"))
    })
    .await;
    assert!(lab.hosts[1].hypervisor.epoch_of(guest).await.is_some(), "the standby is kept");
    assert!(lab.controller.record(guest).operation.is_some());
    lab.controller.unhook();
    assert!(lab.controller.abort(guest, operation));
    ended_in_order(&lab, guest, operation).await;
    let problems = lab.controller.problems();
    assert!(problems.iter().any(|problem| problem.detail.contains("begin a new mirror")), "{problems:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_lives_stops_its_guest_before_a_standby_goes_on_whose_agent_was_restarted() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    // It is cut off from the controller only; the world counts copies that run at once.
    lab.controller.cut(lab.hosts[0].id);
    lab.hosts[1].kill_agent().await;
    lab.hosts[1].start_agent();
    lab.controller.lose(guest, lab.hosts[0].id);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    lab.controller.heal(lab.hosts[0].id);
    lab.eventually("the old copy goes", async || lab.hosts[0].hypervisor.epoch_of(guest).await.is_none()).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_declared_lost_and_lives_stops_its_guest_before_the_standby_goes_on() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    // It is cut off from the controller only; the world counts copies that run at once.
    lab.controller.cut(lab.hosts[0].id);
    lab.controller.lose(guest, lab.hosts[0].id);
    lab.eventually("the standby owns it", async || lab.controller.record(guest).owner == Owner::Host(lab.hosts[1].id))
        .await;
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    lab.controller.heal(lab.hosts[0].id);
    lab.eventually("the old copy goes", async || lab.hosts[0].hypervisor.epoch_of(guest).await.is_none()).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_standby_goes_on_when_the_guests_process_is_gone() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    lab.hosts[0].hypervisor.crash(guest).await;
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    assert_eq!(lab.controller.record(guest).owner, Owner::Host(lab.hosts[1].id));
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_switches_itself_off_is_not_brought_back() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = mirrored(&lab).await;
    lab.hosts[0].hypervisor.power_off(guest).await;
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    assert_eq!(lab.world.running(guest), 0);
    lab.violations();
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_that_die_end_the_mirror_and_the_guest_speaks_again() {
    for victim in [0, 1] {
        let lab = Lab::begin(&[true, true]).await;
        let (guest, operation) = mirrored(&lab).await;
        lab.hosts[victim].kill_agent().await;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        lab.hosts[victim].start_agent();
        ended_in_order(&lab, guest, operation).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volume_processes_that_die_cost_the_mirror_at_most() {
    for victim in [0, 1] {
        let lab = Lab::begin(&[true, true]).await;
        let (guest, operation) = mirrored(&lab).await;
        for pid in lab.hosts[victim].volume_pids() {
            // SAFETY: kill takes no pointers; the process is a volume process that this test started.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        if lab.controller.record(guest).operation.is_some() {
            // It may go on, or be given up by itself; in any case it can be ended.
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            lab.controller.abort(guest, operation);
        }
        ended_in_order(&lab, guest, operation).await;
    }
}
