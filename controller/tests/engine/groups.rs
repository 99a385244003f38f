//! Guests of a group: all or none, in one transaction, through deaths of everybody.

use std::{collections::HashMap, time::Duration};

use supercloud_api::{
    Code, GuestState, OperationKind, Phase,
    ids::{FreezeId, GuestId, OperationId},
    link::MigrationOptions,
};
use supercloud_controller::state::{OperationRecord, Work};

use crate::{
    plans::guests_on,
    support::{
        Random,
        agent::{Stage, lock},
        seed,
        world::World,
    },
};

/// The numbers of the events that tell of these parts' switches.
async fn switches(world: &World, whole: OperationId) -> Vec<u64> {
    let parts = world.operation(whole).await.parts;
    let (events, _) = world.state().events(0, 100_000).await.unwrap();
    let is_its = |id: Option<OperationId>| id.is_some_and(|id| parts.contains(&id));
    let told = events.iter().filter(|event| event.kind == "guest.switched" && is_its(event.operation));
    told.map(|event| event.seq).collect()
}

/// That all parts were switched by one transaction: what it told has numbers without a gap, in which nobody else tells anything.
async fn assert_one_transaction(world: &World, whole: OperationId) {
    let operation = world.operation(whole).await;
    let seqs = switches(world, whole).await;
    assert_eq!(seqs.len(), operation.parts.len(), "each once");
    let (first, last) = (seqs[0], seqs[seqs.len() - 1]);
    let (events, _) = world.state().events(first - 1, usize::try_from(last - first + 1).unwrap()).await.unwrap();
    let stranger = events.iter().find(|event| event.operation.is_none_or(|id| !operation.parts.contains(&id)));
    assert_eq!(stranger.map(|event| &event.kind), None, "in the middle of a group's switch");
    let at: Vec<u64> = events.iter().map(|event| event.at_ms).collect();
    assert!(at.iter().all(|one| *one == at[0]), "one transaction has one time: {at:?}");
}

async fn run_at(world: &World, guests: &[GuestId], places: &[usize]) {
    for (guest, place) in guests.iter().zip(places) {
        world.until("it runs", async |world| world.place(*guest).await == Some(*place)).await;
        assert_eq!(lock(&world.ground).boots[guest], 1, "it never started anew");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_changes_over_at_once_or_waits() {
    let mut world = World::new(seed("group", 90), 3).await;
    let mut guests = guests_on(&mut world, 0, 2).await;
    guests.extend(guests_on(&mut world, 1, 1).await);
    // One of three is not ready.
    world.faults(1, |faults| faults.stalled = [Stage::HandOver].into());
    let whole = world.migrate_together(&guests, 2).await;
    let parts = world.operation(whole).await.parts;
    for part in &parts[..2] {
        world.phase(*part, Phase::Switch).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(switches(&world, whole).await.is_empty(), "nobody goes before all can");
    assert!(world.operation(whole).await.phase <= Phase::Switch);
    // Nothing of who is ready is kept, and nothing is lost with it.
    world.kill_controller().await;
    world.faults(1, |faults| faults.stalled.clear());
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.start_controller().await;
    assert_eq!(world.end_together(whole).await, Phase::Done);
    assert_one_transaction(&world, whole).await;
    world.settled().await;
    run_at(&world, &guests, &[2, 2, 2]).await;
    let told = world.operation(whole).await;
    assert_eq!(told.progress.message, "3 of 3 guests standing still for the switch, or past it");
    assert!(told.error.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_ready_first_runs_on_until_the_others_are() {
    let mut world = World::new(seed("group-hold", 94), 4).await;
    for host in [0, 1] {
        world.faults(host, |faults| faults.takes_holds = true);
        // What a host can do it says when it comes.
        world.kill_agent(host).await;
        world.start_agent(host);
    }
    let mut guests = guests_on(&mut world, 0, 1).await;
    guests.extend(guests_on(&mut world, 1, 1).await);
    // One that cannot wait so, as an older agent's, is among them.
    guests.extend(guests_on(&mut world, 2, 1).await);
    world.faults(1, |faults| faults.stalled = [Stage::Copy].into());
    world.faults(2, |faults| faults.stalled = [Stage::Copy].into());
    let whole = world.migrate_together(&guests, 3).await;
    let parts = world.operation(whole).await.parts;
    let holds = async |world: &World, part: usize| world.operation(parts[part]).await.progress.is_holding;
    world.until("the first is ready", async |world| holds(world, 0).await).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.operation(parts[0]).await.phase, Phase::Copy, "it runs on");
    world.kill_controller().await;
    world.start_controller().await;
    world.faults(1, |faults| faults.stalled.clear());
    world.until("the second is ready", async |world| holds(world, 1).await).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.operation(parts[1]).await.phase, Phase::Copy, "the third still copies");
    world.faults(2, |faults| faults.stalled.clear());
    assert_eq!(world.end_together(whole).await, Phase::Done);
    assert_one_transaction(&world, whole).await;
    // A guest that goes alone waits for nobody.
    world.settled().await;
    world.done(world.migrate(guests[0], 0).await).await;
    world.done(world.migrate(guests[0], 1).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_stays_whole_when_one_cannot_go_or_somebody_cancels() {
    let mut world = World::new(seed("group-stay", 91), 3).await;
    let mut guests = guests_on(&mut world, 0, 2).await;
    guests.extend(guests_on(&mut world, 1, 1).await);
    let places = [0, 0, 1];

    // Somebody cancels the whole, then a part: with two of them paused.
    for is_part in [false, true] {
        world.faults(1, |faults| faults.stalled = [Stage::HandOver].into());
        let whole = world.migrate_together(&guests, 2).await;
        let parts = world.operation(whole).await.parts;
        world.phase(parts[0], Phase::Switch).await;
        world.cancel(if is_part { parts[2] } else { whole }).await;
        world.faults(1, |faults| faults.stalled.clear());
        assert_eq!(world.end_together(whole).await, Phase::RolledBack);
        assert!(switches(&world, whole).await.is_empty());
        world.settled().await;
        run_at(&world, &guests, &places).await;
    }

    // A destination has no room for its guest.
    world.faults(1, |faults| faults.is_full = true);
    let move_of = |guest: usize, to: usize| {
        let options = MigrationOptions::default();
        (guests[guest], OperationKind::GuestMigrate, Work::GuestMigrate { options }, Some(to))
    };
    let parts = [move_of(0, 1), move_of(1, 2), move_of(2, 2)];
    let whole = world.try_together(OperationKind::GroupMigrate, &parts).await.unwrap();
    assert_eq!(world.end_together(whole).await, Phase::RolledBack);
    world.settled().await;
    run_at(&world, &guests, &places).await;
    let ended = world.operation(whole).await;
    let because = world.operation(ended.parts[0]).await.error;
    assert!(
        because.is_some() && ended.error == because,
        "the whole says what the part says that could not: {ended:#?}"
    );
    let other = world.operation(ended.parts[1]).await.error.unwrap();
    assert_eq!(other.code, Code::WrongState, "{other:?}");
    world.faults(1, |faults| faults.is_full = false);

    // A host to which one of them goes is removed in the middle.
    world.faults(2, |faults| faults.stalled = [Stage::Copy].into());
    world.faults(0, |faults| faults.stalled = [Stage::Copy].into());
    let parts = [move_of(0, 1), move_of(1, 2), move_of(2, 0)];
    let whole = world.try_together(OperationKind::GroupMigrate, &parts).await.unwrap();
    let second = world.operation(whole).await.parts[1];
    world.phase(second, Phase::Copy).await;
    world.remove_host(2).await;
    assert_eq!(world.end_together(whole).await, Phase::RolledBack);
    world.faults(0, |faults| faults.stalled.clear());
    run_at(&world, &guests, &places).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_frozen_and_thawed_as_one() {
    let mut world = World::new(seed("group-freeze", 92), 3).await;
    let mut guests = guests_on(&mut world, 0, 2).await;
    guests.extend(guests_on(&mut world, 1, 1).await);
    world.faults(1, |faults| faults.stalled = [Stage::Store].into());
    let whole = world.freeze_together(&guests).await;
    let parts = world.operation(whole).await.parts;
    world.phase(parts[1], Phase::Switch).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(switches(&world, whole).await.is_empty(), "none is frozen before all are");
    world.cancel(whole).await;
    world.faults(1, |faults| faults.stalled.clear());
    let ended = world.end_together(whole).await;
    assert_eq!(ended, Phase::RolledBack);
    world.settled().await;
    run_at(&world, &guests, &[0, 0, 1]).await;

    let whole = world.freeze_together(&guests).await;
    world.kill_controller().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.start_controller().await;
    assert_eq!(world.end_together(whole).await, Phase::Done);
    assert_one_transaction(&world, whole).await;
    world.settled().await;
    for guest in &guests {
        assert_eq!(world.record(*guest).await.guest.state, GuestState::Frozen);
    }

    // One of them finds no room: all stay frozen.
    world.faults(2, |faults| faults.is_full = true);
    let whole = world.thaw_together(&guests, 2).await;
    assert_eq!(world.end_together(whole).await, Phase::RolledBack);
    world.settled().await;
    for guest in &guests {
        assert_eq!(world.record(*guest).await.guest.state, GuestState::Frozen);
    }
    world.faults(2, |faults| faults.is_full = false);
    let whole = world.thaw_together(&guests, 2).await;
    assert_eq!(world.end_together(whole).await, Phase::Done);
    assert_one_transaction(&world, whole).await;
    world.settled().await;
    run_at(&world, &guests, &[2, 2, 2]).await;
}

/// Something for a group whose guests are all in the same state.
async fn want(world: &World, random: &mut Random, guests: &[GuestId]) -> Option<OperationId> {
    let mut states = Vec::new();
    for guest in guests {
        states.push(world.record(*guest).await.guest.state);
    }
    let mut parts = Vec::new();
    for guest in guests {
        let to = random.below(world.hosts.len());
        parts.push(match states[0] {
            GuestState::Running if states.len() > 2 => {
                let options = MigrationOptions::default();
                (*guest, OperationKind::GuestMigrate, Work::GuestMigrate { options }, Some(to))
            }
            GuestState::Running => {
                (*guest, OperationKind::GuestFreeze, Work::GuestFreeze { freeze: FreezeId::generate() }, None)
            }
            GuestState::Frozen => {
                let freeze = world.record(*guest).await.guest.freeze?;
                (*guest, OperationKind::GuestThaw, Work::GuestThaw { freeze, memory: None }, Some(to))
            }
            _ => return None,
        });
    }
    let kind = match parts[0].1 {
        OperationKind::GuestMigrate => OperationKind::GroupMigrate,
        OperationKind::GuestFreeze => OperationKind::GroupFreeze,
        _ => OperationKind::GroupThaw,
    };
    if states.iter().any(|state| *state != states[0]) {
        return None;
    }
    world.try_together(kind, &parts).await.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_through_kills_cuts_and_losses_are_all_here_or_all_there() {
    let seed = seed("group-storm", 93);
    let rounds: usize = std::env::var("SUPERCLOUD_STORM").ok().and_then(|n| n.parse().ok()).unwrap_or(30);
    let mut random = Random::new(seed);
    let mut world = World::new(seed, 3).await;
    // A pair is frozen and thawed, three are moved; each by itself, too.
    let pair = guests_on(&mut world, 0, 2).await;
    let three = guests_on(&mut world, 1, 3).await;
    for host in 0..3 {
        // On two of them who is ready first runs on.
        world.faults(host, |faults| {
            (faults.lost, faults.cut, faults.crash, faults.takes_holds) = (30, 5, 3, host < 2);
        });
        world.kill_agent(host).await;
        world.start_agent(host);
    }
    let mut wholes = Vec::new();
    while wholes.len() < rounds {
        let guests = if random.is_hit(500) { &pair } else { &three };
        if let Some(whole) = want(&world, &mut random, guests).await {
            wholes.push(whole);
            if random.is_hit(200) {
                tokio::time::sleep(Duration::from_millis(random.next() % 300)).await;
                world.cancel(whole).await;
            }
            if wholes.len() % 6 == 0 {
                world.kill_controller().await;
                tokio::time::sleep(Duration::from_millis(random.next() % 100)).await;
                world.start_controller().await;
            }
        }
        match random.below(12) {
            0 => {
                let host = random.below(3);
                world.kill_agent(host).await;
                tokio::time::sleep(Duration::from_millis(random.next() % 200)).await;
                world.start_agent(host);
            }
            // One of them goes alone, if nobody holds it.
            1 => {
                let guest = three[random.below(3)];
                let options = MigrationOptions::default();
                let work = Work::GuestMigrate { options };
                let _ = world.try_submit(guest, OperationKind::GuestMigrate, work, Some(random.below(3))).await;
            }
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(random.next() % 120)).await;
    }
    for host in 0..3 {
        world.faults(host, |faults| (faults.lost, faults.cut, faults.crash) = (0, 0, 0));
    }
    world.settled().await;
    let mut ends = HashMap::<Phase, usize>::new();
    for whole in wholes {
        let ended = world.end_together(whole).await;
        *ends.entry(ended).or_default() += 1;
        match ended {
            Phase::Done => assert_one_transaction(&world, whole).await,
            _ => assert!(switches(&world, whole).await.is_empty()),
        }
    }
    println!("{ends:?}");
    assert!(ends.contains_key(&Phase::Done) && !ends.contains_key(&Phase::Failed), "{ends:?}");
    let open = world.state().list::<OperationRecord>().await.unwrap();
    assert!(open.iter().all(|record| record.operation.phase.is_terminal()), "nothing is left under way");
}
