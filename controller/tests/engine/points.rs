//! Points of volumes' histories: when they are asked for, which are believed, what lives because of them.

use supercloud_api::{
    HistoryBand, HistoryPolicy, Volume, VolumeHistory,
    history::verify,
    ids::{Epoch, GuestId},
    link::{Answer, PointContent, PointTaken, Query},
    unix_ms,
};
use supercloud_controller::{
    link::LinkHandler as _,
    operations::points::Asked,
    state::{Change, Context},
};

use crate::support::{seed, world::World};

fn root(byte: u8) -> String {
    hex::encode([byte; 32])
}

async fn begin(world: &World, volume: &Volume, every_s: Option<u64>) {
    let policy = HistoryPolicy { every_s, keep: vec![HistoryBand { for_s: 3600, every_s: 600 }], memory: None };
    let mut change = Change::new();
    change.create(&VolumeHistory::begin(volume.id, volume.project, policy, volume.base.clone(), unix_ms()));
    world.state().commit(&Context::system(), change).await.unwrap();
}

async fn history(world: &World, volume: &Volume) -> VolumeHistory {
    world.state().need::<VolumeHistory>(&volume.id).await.unwrap().value
}

fn content(volume: &Volume, version: u64, byte: u8, age_ms: u64) -> PointContent {
    PointContent {
        root: root(byte),
        epoch: volume.epoch,
        version,
        age_ms,
        total_blocks: 1,
        sealed_blocks: 1,
        stored_bytes: 10,
        memory: None,
    }
}

/// What the host tells.
async fn tell(world: &World, guest: GuestId, volume: &Volume, content: Option<PointContent>) {
    let problem = content.is_none().then(|| "the disk is full".to_owned());
    let taken = PointTaken { guest, volume: volume.id, content, problem };
    let engine = &world.controller.as_ref().unwrap().engine;
    assert!(matches!(engine.query(world.id(0), Query::PointTaken { taken }).await, Ok(Answer::Noted)));
}

/// Asks for a point.
fn ask(world: &World, guest: GuestId, volume: &Volume) {
    let asked =
        Asked { host: world.id(0), guest, project: world.project, at: tokio::time::Instant::now(), memory: false };
    assert!(world.controller.as_ref().unwrap().points.ask(volume.id, asked));
}

/// Asks, and has the host tell this as often as it takes: what is told before the question was passed on is no answer.
async fn ask_and_tell(world: &World, guest: GuestId, volume: &Volume, content: Option<PointContent>) {
    ask(world, guest, volume);
    world
        .until("it is over", async |world| {
            tell(world, guest, volume, content.clone()).await;
            oldest(world).await.is_none()
        })
        .await;
}

/// How old the oldest writer is that sweeps are told of, and whether the roots are among what lives at home.
async fn lives(world: &World, wanted: &[String]) -> (Option<u64>, Vec<bool>) {
    let query = Query::StoreRoots {
        project: world.project,
        seen: None,
        holder: None,
        after: None,
        also_seen: Vec::new(),
        holders: Vec::new(),
    };
    match world.controller.as_ref().unwrap().engine.query(world.id(0), query).await.unwrap() {
        Answer::StoreRoots { roots, oldest_writer_ms, .. } => {
            let is_home = |root: &String| roots.iter().any(|live| live.root == *root && live.is_home);
            (oldest_writer_ms, wanted.iter().map(is_home).collect())
        }
        other => panic!("{other:?}"),
    }
}

async fn oldest(world: &World) -> Option<u64> {
    lives(world, &[]).await.0
}

async fn kinds(world: &World, kind: &str) -> usize {
    let (events, _) = world.state().events(0, 10_000).await.unwrap();
    events.iter().filter(|event| event.kind == kind).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_recorded_when_its_host_has_it_and_nothing_else_is_believed() {
    let mut world = World::new(seed("points", 90), 1).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
    let id = world.record(guest).await.guest.volumes[0];
    let volume = world.state().need::<Volume>(&id).await.unwrap().value;
    begin(&world, &volume, Some(3600)).await;

    // The first is due at once, and asked for by itself; until it is recorded it counts as a writer.
    world.until("it is asked for", async |world| oldest(world).await.is_some()).await;
    let before = unix_ms();
    world
        .until("it is recorded", async |world| {
            tell(world, guest, &volume, Some(content(&volume, 5, 1, u64::MAX))).await;
            !history(world, &volume).await.points.is_empty()
        })
        .await;
    let now = history(&world, &volume).await;
    let point = now.points[0].clone();
    assert_eq!((point.number, point.version, &point.root, point.epoch), (1, 5, &root(1), volume.epoch));
    // However old the host says it is, it is not older than the question.
    assert!(point.at_ms + 60_000 > before, "{} {before}", point.at_ms);
    verify(&now).unwrap();
    assert_eq!(lives(&world, &[root(1), root(2)]).await, (None, vec![true, false]));
    // Nobody has asked for a second one.
    tell(&world, guest, &volume, Some(content(&volume, 6, 2, 0))).await;
    assert_eq!(history(&world, &volume).await, now);

    // What is wrong is no point, and is said once.
    let wrong = [
        (Some(PointContent { root: "x".into(), ..content(&volume, 6, 2, 0) }), "a root that is none"),
        (Some(content(&volume, 4, 2, 0)), "an older state"),
        (Some(PointContent { epoch: Epoch(99), ..content(&volume, 6, 2, 0) }), "changed hands"),
        (None, "the disk is full"),
        (None, "the disk is full"),
    ];
    for (told, why) in wrong {
        ask_and_tell(&world, guest, &volume, told).await;
        let now = history(&world, &volume).await;
        assert_eq!(now.points, std::slice::from_ref(&point));
        assert!(now.problem.as_ref().is_some_and(|problem| problem.contains(why)), "{:?}", now.problem);
    }
    assert_eq!(kinds(&world, "volume.no_point").await, 4);

    // More of them: those within the gap are thinned out, their contents live no more.
    for (version, byte) in [(6, 2), (7, 3), (8, 4)] {
        ask_and_tell(&world, guest, &volume, Some(content(&volume, version, byte, 0))).await;
    }
    let now = history(&world, &volume).await;
    assert_eq!(now.points.iter().map(|point| point.number).collect::<Vec<_>>(), [1, 4]);
    assert_eq!((verify(&now).unwrap().thinned, &now.problem), (2, &None));
    assert_eq!(lives(&world, &[1, 2, 3, 4].map(root)).await.1, [true, false, false, true]);
    assert_eq!(kinds(&world, "volume.point").await, 4);

    // A controller that was started anew knows of no question.
    ask(&world, guest, &volume);
    world.restart_controller().await;
    tell(&world, guest, &volume, Some(content(&volume, 9, 5, 0))).await;
    assert_eq!(history(&world, &volume).await.points, now.points);

    // A freeze is a point, with what it froze; deleting the guest ends it all.
    world.done(world.freeze(guest).await).await;
    world.until("the freeze is a point", async |world| history(world, &volume).await.next == 6).await;
    let frozen = world.state().need::<Volume>(&id).await.unwrap().value;
    let now = history(&world, &volume).await;
    verify(&now).unwrap();
    assert_eq!(now.points.last().map(|point| &point.root), frozen.base.as_ref());
    assert_eq!((now.seen_base, now.points.len()), (frozen.base, 2));
    world.done(world.delete(guest).await).await;
    assert!(world.state().read::<VolumeHistory>(&id).await.unwrap().is_none());
}
