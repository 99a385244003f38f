//! The controller is killed: in every phase, and at any point of many operations at once.

use std::time::Duration;

use supercloud_api::{
    GuestState, MemoryMode, OperationKind, Phase, handover::Alarm, ids::GuestId, link::MigrationOptions,
};
use supercloud_controller::state::Work;

use crate::support::{
    Random,
    agent::{Stage, lock},
    seed,
    world::World,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_move_survives_the_controllers_death_in_every_phase() {
    let mut world = World::new(seed("deaths", 40), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    let stages = [
        (Stage::Prepare, Phase::Prepare),
        (Stage::Copy, Phase::Copy),
        (Stage::HandOver, Phase::Switch),
        (Stage::Run, Phase::Resume),
        (Stage::Fetch, Phase::Finish),
        (Stage::Release, Phase::Finish),
    ];
    for (n, (stage, phase)) in stages.into_iter().enumerate() {
        world.stall(stage, true);
        // Whether memory follows or not.
        let id = match n % 2 == 0 {
            true => world.migrate(guest, (n + 1) % 2).await,
            false => world.migrate_leaving(guest, (n + 1) % 2).await,
        };
        world.phase(id, phase).await;
        world.kill_controller().await;
        // Guests and what the agents do among themselves go on without it.
        world.stall(stage, false);
        tokio::time::sleep(Duration::from_millis(200)).await;
        world.start_controller().await;
        world.done(id).await;
        world.settled().await;
        assert_eq!(world.place(guest).await, Some((n + 1) % 2));
    }
    assert_eq!(lock(&world.ground).boots[&guest], 1);
}

/// What a random user wants of a guest in this state.
async fn want(world: &World, random: &mut Random, guest: GuestId) -> Option<(OperationKind, Work, Option<usize>)> {
    let record = world.record(guest).await;
    let to = random.below(world.hosts.len());
    let memory = if random.is_hit(500) { MemoryMode::Hybrid } else { MemoryMode::PreCopy };
    let options = MigrationOptions { memory, ..MigrationOptions::default() };
    Some(match (record.guest.state, random.below(8)) {
        (GuestState::Created | GuestState::Stopped | GuestState::Lost, _) => {
            (OperationKind::GuestStart, Work::GuestStart, Some(to))
        }
        (GuestState::Frozen, _) => {
            (OperationKind::GuestThaw, Work::GuestThaw { freeze: record.guest.freeze?, memory: None }, Some(to))
        }
        (GuestState::Running, 0) => (OperationKind::GuestStop, Work::GuestStop { grace_ms: 0 }, None),
        (GuestState::Running, 1 | 2) => {
            let freeze = supercloud_api::ids::FreezeId::generate();
            (OperationKind::GuestFreeze, Work::GuestFreeze { freeze }, None)
        }
        (GuestState::Running, _) => (OperationKind::GuestMigrate, Work::GuestMigrate { options }, Some(to)),
    })
}

/// A storm: operations at random, messages lost, links cut, agents and the controller killed. Returns how many operations
/// were accepted.
async fn storm(world: &mut World, random: &mut Random, guests: &[GuestId], wanted: usize, deaths: usize) -> usize {
    let mut accepted = Vec::new();
    let mut killed = 0;
    while accepted.len() < wanted {
        let guest = guests[random.below(guests.len())];
        if let Some((kind, work, to)) = want(world, random, guest).await
            && let Ok(id) = world.try_submit(guest, kind, work, to).await
        {
            accepted.push(id);
            if random.is_hit(200) {
                tokio::time::sleep(Duration::from_millis(random.next() % 300)).await;
                world.cancel(id).await;
            }
        }
        match random.below(10) {
            0 => {
                let host = random.below(world.hosts.len());
                world.kill_agent(host).await;
                tokio::time::sleep(Duration::from_millis(random.next() % 200)).await;
                world.start_agent(host);
            }
            // The peers do not see one another for a while.
            1 => {
                let host = world.id(random.below(world.hosts.len()));
                lock(&world.ground).away.insert(host);
                tokio::time::sleep(Duration::from_millis(random.next() % 200)).await;
                lock(&world.ground).away.remove(&host);
            }
            _ => {}
        }
        if accepted.len() * (deaths + 1) > wanted * (killed + 1) {
            killed += 1;
            world.kill_controller().await;
            tokio::time::sleep(Duration::from_millis(random.next() % 100)).await;
            world.start_controller().await;
        }
        tokio::time::sleep(Duration::from_millis(random.next() % 120)).await;
    }
    assert_eq!(killed, deaths, "the controller was to die so often");
    accepted.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_operations_through_kills_cuts_and_losses_all_end_true() {
    let seed = seed("storm", 41);
    let rounds: usize = std::env::var("SUPERCLOUD_STORM").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let mut random = Random::new(seed);
    let mut world = World::new(seed, 3).await;
    let mut guests = Vec::new();
    for _ in 0..6 {
        guests.push(world.guest().await);
    }
    for host in 0..3 {
        world.faults(host, |faults| (faults.lost, faults.cut, faults.crash) = (30, 5, 3));
    }
    let accepted = storm(&mut world, &mut random, &guests, rounds, 6).await;
    println!("{accepted} operations accepted; waiting for their ends");
    for host in 0..3 {
        world.faults(host, |faults| (faults.lost, faults.cut, faults.crash) = (0, 0, 0));
    }
    world.settled().await;
    // No guest's process ever ended by accident: no excuse for a lost one.
    let is_loss = |alarm: &Alarm| matches!(alarm, Alarm::GuestLost { .. } | Alarm::LostAfterSwitch { .. });
    assert!(!lock(&world.ground).alarms.iter().any(is_loss), "{}", world.picture().await);
    // And what comes next succeeds at the first attempt.
    for guest in guests {
        let to = match world.record(guest).await.guest.state {
            GuestState::Running => {
                let to = (world.place(guest).await.unwrap() + 1) % 3;
                world.done(world.migrate(guest, to).await).await;
                to
            }
            GuestState::Frozen => {
                world.done(world.thaw(guest, 0).await).await;
                0
            }
            _ => {
                world.done(world.start(guest, 1).await).await;
                1
            }
        };
        assert_eq!(world.place(guest).await, Some(to));
        world.done(world.stop(guest).await).await;
        world.done(world.delete(guest).await).await;
        world.gone(guest).await;
    }
    world.settled().await;
}
