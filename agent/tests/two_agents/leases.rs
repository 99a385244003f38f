//! Mirrored guests that run by a lease: they stand still by themselves when their host is not heard, whoever of it is there, and go on when
//! they still may.

use supercloud_api::{
    handover::{OperationKind, Owner, Phase},
    ids::{GuestId, OperationId},
};

use crate::lab::Lab;

/// Far shorter than one may be outside of tests.
const LEASE_MS: u64 = 3_000;

/// A guest at host 0 that runs by a lease and whose standby at host 1 has taken some cuts.
async fn leased(lab: &Lab) -> (GuestId, OperationId) {
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.controller.fence(LEASE_MS);
    let operation = lab.controller.operate(guest, OperationKind::Mirror { to: lab.hosts[1].id });
    lab.eventually("some cuts under a lease", async || {
        let progress = lab.controller.progress(operation);
        progress.and_then(|progress| progress.mirror).is_some_and(|mirror| mirror.committed >= 3 && mirror.is_leased)
    })
    .await;
    assert!(has_lease(lab, guest) && lab.controller.granted() > 0);
    (guest, operation)
}

fn has_lease(lab: &Lab, guest: GuestId) -> bool {
    lab.hosts[0].hypervisor.0.leases.lock().unwrap().contains_key(&guest)
}

/// By itself: cuts stop it, too, for a moment.
fn stands_still(lab: &Lab, guest: GuestId) -> bool {
    lab.hosts[0].hypervisor.0.stands_still(guest) && lab.world.running(guest) == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_host_is_heard_runs_on_and_an_ended_mirror_leaves_no_lease() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = leased(&lab).await;
    tokio::time::sleep(std::time::Duration::from_millis(LEASE_MS + 1_500)).await;
    let before = lab.world.newest(guest);
    lab.eventually("it goes on", async || lab.world.newest(guest) > before).await;
    assert!(lab.controller.abort(guest, operation));
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.eventually("no lease is left", async || !has_lease(&lab, guest)).await;
    tokio::time::sleep(std::time::Duration::from_millis(LEASE_MS)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_host_is_cut_off_stands_still_and_goes_on_when_it_is_heard_again() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = leased(&lab).await;
    lab.controller.cut(lab.hosts[0].id);
    lab.eventually("it stands still", async || stands_still(&lab, guest)).await;
    assert!(lab.controller.record(guest).operation.is_some(), "nobody has decided anything");
    lab.controller.heal(lab.hosts[0].id);
    lab.eventually("it goes on", async || lab.world.running(guest) == 1).await;
    lab.controller.abort(guest, operation);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.eventually("no lease is left", async || !has_lease(&lab, guest)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_agent_is_killed_stands_still_and_its_standby_goes_on() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = leased(&lab).await;
    lab.hosts[0].kill_agent().await;
    lab.eventually("it stands still", async || stands_still(&lab, guest)).await;
    // By the clock, as the controller's own tests see to.
    lab.controller.lose(guest, lab.hosts[0].id);
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    assert_eq!(lab.controller.record(guest).owner, Owner::Host(lab.hosts[1].id));
    lab.eventually("it runs at its standby", async || lab.world.running(guest) == 1).await;
    // An agent that comes back asks, hears who owns the guest now, and destroys what it had; it lets nothing run before.
    lab.hosts[0].start_agent();
    lab.eventually("the old copy goes", async || lab.hosts[0].hypervisor.epoch_of(guest).await.is_none()).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_restarted_keeps_the_lease_until_the_mirror_is_over_and_leaves_none() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, operation) = leased(&lab).await;
    lab.hosts[0].kill_agent().await;
    lab.eventually("it stands still", async || stands_still(&lab, guest)).await;
    lab.hosts[0].start_agent();
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    lab.eventually("no lease is left", async || !has_lease(&lab, guest)).await;
    lab.check(guest).await;
}
