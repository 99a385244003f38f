//! Mirrors that are fenced by a lease: their standbys go on by themselves, and never while the guest may run at its host.

use std::time::{Duration, Instant};

use supercloud_api::{
    Phase,
    handover::{Owner, Verdict},
    ids::{Epoch, GuestId, OperationId},
};

use crate::support::{
    agent::{Stage, lock},
    seed,
    world::World,
};

/// The shortest that there is.
const LEASE_MS: u64 = 5_000;

/// A guest at host 0 with a standby at host 1 that has a whole cut, under a lease.
async fn leased(world: &mut World) -> (GuestId, OperationId, Epoch) {
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    let mirror = world.mirror_by(guest, 1, Some(LEASE_MS)).await;
    world.phase(mirror, Phase::Copy).await;
    world.protected(guest, 1).await;
    let is_known = async |world: &World| {
        let standing = world.operation(mirror).await.progress.mirror.unwrap_or_default();
        standing.committed > 0 && standing.is_leased
    };
    world.until("that is known", is_known).await;
    let epoch = world.record(guest).await.owner.epoch;
    (guest, mirror, epoch)
}

async fn has_event(world: &World, kind: &str, guest: GuestId) -> bool {
    let (events, _) = world.state().events(0, 10_000).await.unwrap();
    events.iter().any(|event| event.kind == kind && event.guest == Some(guest))
}

/// It runs at host 1 by itself and nowhere else; the ground keeps account of copies that run at once.
async fn went_on(world: &World, guest: GuestId, mirror: OperationId, epoch: Epoch) {
    world.done(mirror).await;
    world.until("the guest runs", async |world| !lock(&world.ground).runs_at(guest).is_empty()).await;
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(1), epoch.next())]);
    assert_eq!(world.record(guest).await.owner.owner, Owner::Host(world.id(1)));
    assert!(has_event(world, "guest.failed_over_by_lease", guest).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_goes_on_by_itself_when_the_lease_is_over_and_a_host_that_comes_back_destroys_what_it_had() {
    let mut world = World::new(seed("lease", 90), 2).await;
    let (guest, mirror, epoch) = leased(&mut world).await;
    // Its renewals are the only thing that keeps it: it goes on for longer than a lease.
    tokio::time::sleep(Duration::from_millis(LEASE_MS + 1_500)).await;
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(0), epoch)]);
    // The host is cut off, and lives.
    world.kill_agent(0).await;
    went_on(&world, guest, mirror, epoch).await;
    assert!(has_event(&world, "guest.failover_waits", guest).await, "people were told before");
    world.start_agent(0);
    world.settled().await;
    assert!(lock(&world.ground).local(world.id(0), guest).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_was_restarted_waits_as_long_as_what_it_may_have_granted() {
    let mut world = World::new(seed("lease-restart", 91), 2).await;
    let (guest, mirror, epoch) = leased(&mut world).await;
    world.kill_agent(0).await;
    let mut began = Instant::now();
    for pause_ms in [2_000, 1_000] {
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        began = Instant::now();
        world.restart_controller().await;
    }
    went_on(&world, guest, mirror, epoch).await;
    assert!(began.elapsed() >= Duration::from_millis(LEASE_MS), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_heard_in_time_keeps_its_guest_and_no_lease_is_left_when_the_mirror_ends() {
    let mut world = World::new(seed("lease-heard", 92), 2).await;
    let (guest, mirror, epoch) = leased(&mut world).await;
    world.kill_agent(0).await;
    tokio::time::sleep(Duration::from_millis(LEASE_MS * 3 / 5)).await;
    world.start_agent(0);
    // An agent that was restarted ends its mirror; the guest runs on, without a lease.
    assert_eq!(world.end(mirror).await.phase, Phase::RolledBack);
    world.settled().await;
    world.until("no lease", async |world| lock(&world.ground).leases.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(LEASE_MS + 2_000)).await;
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(0), epoch)]);
    assert!(!has_event(&world, "guest.failed_over_by_lease", guest).await);
    // One that is ended by somebody leaves none either.
    let again = world.mirror_by(guest, 1, Some(LEASE_MS)).await;
    world.phase(again, Phase::Copy).await;
    world.protected(guest, 1).await;
    world.cancel(again).await;
    assert_eq!(world.end(again).await.phase, Phase::RolledBack);
    world.until("no lease", async |world| lock(&world.ground).leases.is_empty()).await;
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(0), epoch)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_happens_while_the_standby_is_silent_too_and_people_hear_of_it() {
    let mut world = World::new(seed("lease-both", 93), 2).await;
    let (guest, mirror, epoch) = leased(&mut world).await;
    world.kill_agent(0).await;
    world.kill_agent(1).await;
    world.until("an alarm", async |world| has_event(world, "guest.failover_blocked", guest).await).await;
    tokio::time::sleep(Duration::from_millis(LEASE_MS + 2_000)).await;
    assert_eq!(world.record(guest).await.owner.epoch, epoch);
    assert!(lock(&world.ground).runs_at(guest).is_empty(), "it stands still by itself");
    world.start_agent(1);
    went_on(&world, guest, mirror, epoch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_without_a_lease_waits_for_somebodys_word_as_ever() {
    let mut world = World::new(seed("lease-none", 94), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    let mirror = world.mirror(guest, 1).await;
    world.phase(mirror, Phase::Copy).await;
    world.protected(guest, 1).await;
    world.kill_agent(0).await;
    tokio::time::sleep(Duration::from_millis(2 * LEASE_MS)).await;
    assert_eq!(world.operation(mirror).await.phase, Phase::Copy);
    assert_eq!(lock(&world.ground).runs_at(guest).len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_was_called_off_takes_nothing_over_while_it_is_cleared_away() {
    let mut world = World::new(seed("lease-called-off", 95), 2).await;
    let (guest, mirror, epoch) = leased(&mut world).await;
    world.faults(1, |faults| {
        faults.stalled.insert(Stage::Clear);
    });
    // An agent that was restarted ends its mirror: the guest runs on without a lease, while the standby's host does not get done.
    world.kill_agent(0).await;
    world.start_agent(0);
    let is_called_off = async |world: &World| {
        let record = world.record(guest).await;
        let operation = record.owner.operation.as_ref();
        operation.is_some_and(|operation| matches!(operation.verdict, Verdict::Aborted(_)))
            && lock(&world.ground).leases.is_empty()
    };
    world.until("it is called off", is_called_off).await;
    assert_eq!(world.operation(mirror).await.phase, Phase::Copy);
    // Then nothing is heard of the guest's host. Neither by itself nor by somebody's word the standby has a say any more.
    world.kill_agent(0).await;
    tokio::time::sleep(Duration::from_millis(LEASE_MS + 3_000)).await;
    world.fail_over(mirror).await;
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    assert_eq!(world.record(guest).await.owner.owner, Owner::Host(world.id(0)));
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(0), epoch)]);
    assert!(!has_event(&world, "guest.failed_over_by_lease", guest).await);
    world.faults(1, |faults| {
        faults.stalled.remove(&Stage::Clear);
    });
    world.start_agent(0);
    assert_eq!(world.end(mirror).await.phase, Phase::RolledBack);
    world.settled().await;
    assert_eq!(lock(&world.ground).runs_at(guest), vec![(world.id(0), epoch)]);
}
