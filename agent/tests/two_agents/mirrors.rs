//! Guests that are mirrored: who dies, and when, decides nothing but whether the standby goes on or the guest itself. Nothing that was
//! acknowledged is lost, and a guest whose mirror has ended speaks again.

use supercloud_api::{
    handover::{OperationKind, Owner, Phase},
    ids::{GuestId, OperationId},
};

use crate::lab::Lab;

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
