//! Hosts that are away, hosts that are gone, and deletions in spite of them.

use supercloud_api::{
    Code, Freeze, FrozenVolume, GuestState, Phase, Volume,
    handover::{Owner, Report},
    ids::{CloudId, Epoch, FreezeId, GuestId},
    link::{Directive, Query},
};
use supercloud_controller::state::{Change, Context};

use crate::support::{
    agent::{Stage, lock, query},
    liar::Liar,
    seed,
    world::World,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_waits_for_a_host_that_is_away_and_leaves_nothing() {
    let mut world = World::new(seed("delete", 20), 2).await;
    let (guest, other) = (world.guest().await, world.guest().await);
    world.done(world.start(guest, 0).await).await;
    // A guest that runs is not deleted.
    world.undone(world.delete(guest).await, Code::WrongState).await;
    world.done(world.freeze(guest).await).await;
    world.done(world.thaw(guest, 1).await).await;
    world.done(world.stop(guest).await).await;
    world.settled().await;
    world.kill_agent(1).await;
    let id = world.delete(guest).await;
    world.phase(id, Phase::Finish).await;
    world.restart_controller().await;
    assert_eq!(world.record(guest).await.discarding.len(), 1);
    // Its words about what it holds change the record of who owns, and not that the deletion holds the guest.
    let epoch = world.record(guest).await.owner.holders[0].epoch;
    let mut host = Liar::dial(&world.hosts[1].seat).await.expect("a host of ours");
    host.report(guest, Report::Released { epoch }).await;
    world.until("released", async |world| world.record(guest).await.owner.holders.is_empty()).await;
    assert_eq!(world.record(guest).await.guest.operation, Some(id));
    drop(host);
    world.start_agent(1);
    world.done(id).await;
    world.gone(guest).await;
    // One that was never started has nobody to ask; its name and address are free again.
    world.done(world.delete(other).await).await;
    world.gone(other).await;
    world.settled().await;
    let _same_names = world.guest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_frozen_hundreds_of_times_can_be_deleted() {
    let mut world = World::new(seed("freezes", 21), 1).await;
    let guest = world.guest().await;
    let record = world.record(guest).await;
    for _ in 0..5 {
        let mut change = Change::new();
        for _ in 0..30 {
            change.create(&Freeze {
                id: FreezeId::generate(),
                guest,
                project: world.project,
                epoch: supercloud_api::ids::Epoch(1),
                cloud: CloudId::generate(),
                memory_root: "0".repeat(64),
                memory_bytes: 1,
                memory_format: "fake/1".into(),
                volumes: vec![FrozenVolume { volume: record.guest.volumes[0], root: "0".repeat(64), stored_bytes: 1 }],
                is_consumed: true,
                created_at_ms: 1,
                point: None,
            });
        }
        world.state().commit(&Context::system(), change).await.unwrap();
    }
    world.done(world.delete(guest).await).await;
    world.gone(guest).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_removed_is_never_heard_again_and_its_guests_start_elsewhere() {
    let mut world = World::new(seed("removed", 22), 3).await;
    let (guest, stopped, deleted) = (world.guest().await, world.guest().await, world.guest().await);
    for guest in [guest, stopped, deleted] {
        world.done(world.start(guest, 0).await).await;
    }
    world.done(world.stop(stopped).await).await;
    world.done(world.stop(deleted).await).await;
    world.settled().await;
    world.kill_agent(0).await;
    let deletion = world.delete(deleted).await;
    world.phase(deletion, Phase::Finish).await;
    world.bury(0);
    world.remove_host(0).await;
    world.done(deletion).await;
    world.gone(deleted).await;
    for guest in [guest, stopped] {
        world.until("lost", async |world| world.record(guest).await.guest.state == GuestState::Lost).await;
        assert!(world.record(guest).await.guest.alarm.is_some());
    }
    world.settled().await;
    // Its certificate still holds, and is worth nothing: no link, no chunks.
    assert!(Liar::dial(&world.hosts[0].seat).await.is_none());
    let farewell = Liar::farewell(&world.hosts[0].seat).await.expect("it is told that it was removed");
    assert_eq!(farewell.host, world.id(0));
    assert!(Liar::farewell(&world.hosts[1].seat).await.is_none());
    // However often it dials, people are told once.
    for _ in 0..20 {
        assert!(Liar::dial(&world.hosts[0].seat).await.is_none());
    }
    let (events, _) = world.state().events(0, 10_000).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.kind == "host.removed_is_back").count(), 1);
    for (guest, to) in [(guest, 1), (stopped, 2)] {
        world.done(world.start(guest, to).await).await;
        assert_eq!(world.record(guest).await.owner.owner, Owner::Host(world.id(to)));
    }
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destination_of_a_move_is_removed_in_each_phase() {
    for (n, (stage, phase)) in [
        (Stage::Prepare, Phase::Prepare),
        (Stage::Copy, Phase::Copy),
        (Stage::HandOver, Phase::Switch),
        (Stage::Run, Phase::Resume),
        (Stage::Fetch, Phase::Finish),
    ]
    .into_iter()
    .enumerate()
    {
        let mut world = World::new(seed("removed-destination", 23 + n as u64), 3).await;
        let guest = world.guest().await;
        world.done(world.start(guest, 0).await).await;
        world.stall(stage, true);
        let id = world.migrate(guest, 1).await;
        world.phase(id, phase).await;
        world.kill_agent(1).await;
        world.bury(1);
        world.remove_host(1).await;
        let ended = world.end(id).await;
        world.stall(stage, false);
        assert!(ended.error.is_some(), "{ended:#?}");
        if phase < Phase::Resume {
            assert_eq!(ended.phase, Phase::RolledBack);
            world.settled().await;
            assert_eq!(world.place(guest).await, Some(0));
            world.done(world.migrate(guest, 2).await).await;
        } else {
            // It was the owner, and is gone: an alarm; the source still has what it handed over.
            assert_eq!(ended.phase, Phase::Failed);
            let lost = world.record(guest).await;
            assert_eq!((lost.guest.state, lost.guest.alarm.is_some()), (GuestState::Lost, true));
            world.done(world.start(guest, 2).await).await;
        }
        world.settled().await;
        assert_eq!(world.place(guest).await, Some(2));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_source_of_a_move_is_removed_and_what_the_destination_holds_decides() {
    for (n, (stage, phase)) in
        [(Stage::Copy, Phase::Copy), (Stage::Run, Phase::Resume), (Stage::Fetch, Phase::Finish)].into_iter().enumerate()
    {
        let mut world = World::new(seed("removed-source", 30 + n as u64), 3).await;
        let guest = world.guest().await;
        world.done(world.start(guest, 0).await).await;
        world.stall(stage, true);
        let id = world.migrate(guest, 1).await;
        world.phase(id, phase).await;
        world.kill_agent(0).await;
        world.bury(0);
        world.remove_host(0).await;
        let ended = world.end(id).await;
        assert!(ended.error.is_some(), "{ended:#?}");
        world.stall(stage, false);
        match phase {
            Phase::Copy => {
                assert_eq!(ended.phase, Phase::RolledBack);
                assert_eq!(world.record(guest).await.guest.state, GuestState::Lost);
                world.done(world.start(guest, 2).await).await;
                world.settled().await;
            }
            // It runs on with what it has; blocks that nobody has any more are told of.
            _ => {
                assert_eq!(ended.phase, Phase::Failed);
                assert_eq!(world.record(guest).await.owner.owner, Owner::Host(world.id(1)));
                world.until("it runs", async |world| lock(&world.ground).runs_at(guest).len() == 1).await;
                let volume = world.record(guest).await.guest.volumes[0];
                let volume = world.state().need::<Volume>(&volume).await.unwrap();
                assert_eq!(volume.needed_source, Some(world.id(0)), "needed and not to be had");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_has_of_a_guest_is_destroyed_only_when_the_guest_was_deleted() {
    let mut world = World::new(seed("unknown", 40), 2).await;
    let deleted = world.guest().await;
    world.done(world.start(deleted, 1).await).await;
    world.done(world.stop(deleted).await).await;
    world.settled().await;
    world.done(world.delete(deleted).await).await;
    world.kill_agent(0).await;
    let mut host = Liar::dial(&world.hosts[0].seat).await.unwrap();
    // As of a guest that is younger than the backup from which the store came.
    let younger = GuestId::generate();
    for guest in [younger, deleted] {
        host.report(guest, Report::AskOwner(query(None, Epoch(1)))).await;
        assert!(host.ask(Query::ChunkSources { guest }).await.is_err());
    }
    let discarded = |guest| {
        let is_it = |directive: &&Directive| matches!(directive, Directive::Discard { guest: at } if *at == guest);
        host.heard.iter().filter(is_it).count()
    };
    assert_eq!((discarded(younger), discarded(deleted)), (0, 1));
}
