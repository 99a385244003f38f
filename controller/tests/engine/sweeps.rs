//! Sweeps: of the controller's own store, and what it tells hosts that sweep theirs.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use supercloud_api::{
    Code, DiskFormat, Freeze, FrozenVolume, GuestState, Image, OperationKind, Phase, Problem,
    ids::{Epoch, FreezeId, GuestId, HostId, ImageId, ProjectId, VolumeId},
    link::{Answer, HistoryMark, ManifestPart, Query, StoreRoot, StoreSwept},
};
use supercloud_controller::{
    link::LinkHandler as _,
    state::{AcceptedMark, Change, Context, Work},
};
use supercloud_storage::{
    backend::{ObjectKey, ObjectStore},
    key::{ChunkName, ContentRoot, DataKeys, ProjectKey},
    manifest,
    source::ChunkReader,
};
use tokio_util::sync::CancellationToken;

use crate::support::{
    Random,
    agent::{Stage, lock},
    seed,
    world::World,
};

/// Everything in a store was written an hour earlier than it was.
fn age(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            age(&entry.path());
        } else {
            let file = std::fs::File::options().write(true).open(entry.path()).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        }
    }
}

async fn chunks(world: &World) -> BTreeSet<ChunkName> {
    let store = &world.controller.as_ref().unwrap().chunks;
    let listed = store.list("", None, 10_000).await.unwrap();
    listed.into_iter().filter_map(|entry| entry.key.chunk_name()).collect()
}

async fn sweep(world: &World) {
    age(&world.folder.path().join("store"));
    let engine = &world.controller.as_ref().unwrap().engine;
    engine.sweep_own(Duration::ZERO, &CancellationToken::new()).await;
}

async fn delete(world: &World, id: ImageId) {
    let found = world.state().need::<Image>(&id).await.unwrap();
    let mut change = Change::new();
    change.delete_named(&found);
    world.state().commit(&Context::system(), change).await.unwrap();
}

async fn ask(world: &World, host: HostId, query: Query) -> Result<Answer, Problem> {
    world.controller.as_ref().unwrap().engine.query(host, query).await
}

fn of_roots(project: ProjectId, seen: Option<HistoryMark>) -> Query {
    Query::StoreRoots { project, seen, holder: None, after: None, also_seen: Vec::new(), holders: Vec::new() }
}

async fn roots(world: &World, host: HostId, seen: Option<HistoryMark>) -> Result<(Vec<StoreRoot>, HistoryMark), Code> {
    let query = of_roots(world.project, seen);
    match ask(world, host, query).await {
        Ok(Answer::StoreRoots { roots, more: false, mark, is_holder_gone: false, .. }) => Ok((roots, mark)),
        Ok(other) => panic!("{other:?}"),
        Err(problem) => Err(problem.code),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_images_chunks_go_and_those_that_another_shares_stay() {
    let world = World::new(seed("sweep-own", 70), 0).await;
    // One whose content is nowhere: while it is there, nothing goes.
    let nowhere = world.image;
    let mut random = Random::new(world.seed);
    let noise: Vec<u8> = (0..(2 << 20) / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    // The second half is the same.
    let mut other = noise.clone();
    other[..1 << 20].fill(0x5a);
    let (first, operation) = world.import(&noise, Some(DiskFormat::Raw)).await;
    world.done(operation).await;
    let (second, operation) = world.import(&other, Some(DiskFormat::Raw)).await;
    world.done(operation).await;
    let before = chunks(&world).await;
    // 32 + 16 + 1 blocks fewer the shared ones, two leaves, two roots.
    assert_eq!(before.len(), 32 + 1 + 4);
    sweep(&world).await;
    assert_eq!(chunks(&world).await, before);
    delete(&world, first).await;
    sweep(&world).await;
    assert_eq!(chunks(&world).await, before);
    delete(&world, nowhere).await;
    // A young chunk stays, whatever it was.
    let engine = &world.controller.as_ref().unwrap().engine;
    engine.sweep_own(Duration::from_secs(7200), &CancellationToken::new()).await;
    assert_eq!(chunks(&world).await, before);
    sweep(&world).await;
    assert_eq!(chunks(&world).await.len(), 16 + 1 + 2);
    let root: ContentRoot = world.state().need::<Image>(&second).await.unwrap().parts[0].root.parse().unwrap();
    let keys = Arc::new(DataKeys::derive(world.project, &ProjectKey::from_bytes(world.project_key)));
    let store: Arc<dyn ObjectStore> = world.controller.as_ref().unwrap().chunks.clone();
    manifest::verify(&ChunkReader::of_store(keys, store), root, true).await.unwrap();
    let (events, _) = world.state().events(0, 1000).await.unwrap();
    let swept: Vec<_> = events.iter().filter(|event| event.kind == "store.swept").collect();
    assert_eq!((swept.len(), &swept[0].data["freed_chunks"]), (1, &serde_json::json!(18)));
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_are_told_what_lives_and_an_older_copy_of_the_records_is_not_believed() {
    let world = World::new(seed("sweep-told", 71), 1).await;
    let host = world.id(0);
    let cloud = world.state().need::<supercloud_controller::state::HostRecord>(&host).await.unwrap().host.cloud;
    let (image, operation) = world.import(&[7; 100_000], Some(DiskFormat::Raw)).await;
    world.done(operation).await;
    let part = world.state().need::<Image>(&image).await.unwrap().parts[0].root.clone();
    let root = |byte: u8| hex::encode([byte; 32]);
    let freeze = |is_consumed: bool, byte: u8| Freeze {
        id: FreezeId::generate(),
        guest: GuestId::generate(),
        project: world.project,
        epoch: Epoch(1),
        cloud,
        memory_root: root(byte),
        memory_bytes: 1,
        memory_format: "x".into(),
        volumes: vec![FrozenVolume { volume: VolumeId::generate(), root: root(byte + 1), stored_bytes: 0 }],
        is_consumed,
        created_at_ms: 1,
        point: None,
    };
    let mut change = Change::new();
    change.create(&freeze(false, 1)).create(&freeze(true, 3));
    world.state().commit(&Context::system(), change).await.unwrap();

    let (live, mark) = roots(&world, host, None).await.unwrap();
    let told: Vec<(String, bool)> = live.iter().map(|live| (live.root.clone(), live.is_home)).collect();
    assert!(told.contains(&(root(1), true)) && told.contains(&(root(2), true)), "{told:?}");
    assert!(told.contains(&(part.clone(), false)), "an image is at home at the controller: {told:?}");
    assert!(!told.iter().any(|(live, _)| *live == root(3) || *live == root(4)), "{told:?}");
    assert!(told.is_sorted());

    assert!(roots(&world, host, Some(mark.clone())).await.is_ok());
    let other = HistoryMark { hash: root(9), ..mark.clone() };
    assert_eq!(roots(&world, host, Some(other)).await.unwrap_err(), Code::WrongState);
    let later = HistoryMark { seq: mark.seq + 1000, ..mark.clone() };
    assert_eq!(roots(&world, host, Some(later.clone())).await.unwrap_err(), Code::WrongState);
    // One of several is enough; an operator may say that it does not count.
    let Query::StoreRoots { project, holder, after, holders, .. } = of_roots(world.project, None) else { panic!() };
    let also_seen = vec![mark.clone(), later.clone()];
    let query = Query::StoreRoots { project, seen: Some(mark), holder, after, also_seen, holders };
    assert_eq!(ask(&world, host, query.clone()).await.unwrap_err().code, Code::WrongState);
    let foreign = world.controller.as_ref().unwrap().sweeps.take_foreign();
    assert!(foreign.contains(&later), "{foreign:?}");
    let accepted = AcceptedMark { seq: later.seq, hash: later.hash, accepted_at_ms: 1 };
    world
        .state()
        .commit(&Context::system(), {
            let mut change = Change::new();
            change.create(&accepted);
            change
        })
        .await
        .unwrap();
    assert!(ask(&world, host, query).await.is_ok());

    // The controller opens the parts of its own manifests for who has no key, and nothing that is damaged.
    let query =
        |part, name: &str, sealed| Query::StoreNames { project: world.project, part, name: name.into(), sealed };
    let names = async |query| match ask(&world, host, query).await.unwrap() {
        Answer::StoreNames { names } => names,
        other => panic!("{other:?}"),
    };
    let leaf = names(query(ManifestPart::Root, &part, None)).await.unwrap();
    assert_eq!(leaf.len(), 64);
    assert!(!names(query(ManifestPart::Leaf, &leaf, None)).await.unwrap().is_empty());
    assert_eq!(names(query(ManifestPart::Leaf, &part, None)).await, None);
    assert_eq!(names(query(ManifestPart::Root, &root(1), None)).await, None);
    let name: ChunkName = leaf.parse().unwrap();
    let store = &world.controller.as_ref().unwrap().chunks;
    let mut sealed = store.get(ObjectKey::chunk(world.project, &name), 1 << 20).await.unwrap().to_vec();
    assert!(names(query(ManifestPart::Leaf, &leaf, Some(hex::encode(&sealed)))).await.is_some());
    sealed[30] ^= 1;
    assert_eq!(names(query(ManifestPart::Leaf, &leaf, Some(hex::encode(&sealed)))).await, None);
    for bad in [query(ManifestPart::Leaf, "x", None), query(ManifestPart::Leaf, &leaf, Some("zz".into()))] {
        assert_eq!(ask(&world, host, bad).await.unwrap_err().code, Code::BadRequest);
    }

    // Of a project that is not known everything stays.
    let unknown = of_roots(ProjectId::generate(), None);
    assert_eq!(ask(&world, host, unknown).await.unwrap_err().code, Code::WrongState);
    let swept = StoreSwept {
        project: world.project,
        seen_chunks: 5,
        seen_bytes: 500,
        freed_chunks: 2,
        freed_bytes: 200,
        young_chunks: 1,
        problem: None,
        wrong: vec!["aws gave bytes that were not written there".into(); 20],
    };
    for _ in 0..3 {
        ask(&world, host, Query::StoreSwept { swept: swept.clone() }).await.unwrap();
    }
    let (events, _) = world.state().events(0, 1000).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.kind == "store.swept").count(), 1, "a host cannot flood the chain");
    let wrong: Vec<_> = events.iter().filter(|event| event.kind == "store.wrong").collect();
    assert_eq!(wrong.len(), 1, "who lies is named, once");
    let named = wrong[0].data["wrong"].as_array().unwrap();
    assert_eq!((named.len(), named[0].as_str().unwrap()), (16, "aws gave bytes that were not written there"));
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_come_in_pages_and_a_removed_host_is_gone() {
    let mut world = World::new(seed("sweep-pages", 72), 2).await;
    let host = world.id(0);
    let ask_for = |holder: HostId, after: Option<String>| Query::StoreRoots {
        project: world.project,
        seen: None,
        holder: Some(holder.to_string()),
        after,
        also_seen: Vec::new(),
        holders: Vec::new(),
    };
    let (other, after) = (world.id(1), hex::encode([0xff; 32]));
    for (query, gone) in [(ask_for(other, Some(after)), false), (ask_for(HostId::generate(), None), false)] {
        let answer = ask(&world, host, query).await.unwrap();
        let Answer::StoreRoots { roots, more, is_holder_gone, .. } = answer else { panic!("{answer:?}") };
        assert_eq!((more, is_holder_gone), (false, gone));
        assert!(roots.is_empty() || roots.len() < 10);
    }
    let query = ask_for(other, None);
    world.kill_agent(1).await;
    world.remove_host(1).await;
    let answer = ask(&world, host, query).await.unwrap();
    assert!(matches!(answer, Answer::StoreRoots { is_holder_gone: true, .. }), "{answer:?}");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// The records come back from a backup: an image was imported, and a guest started, since.
#[tokio::test(flavor = "multi_thread")]
async fn records_that_do_not_know_what_hosts_hold_sweep_nothing() {
    let mut world = World::new(seed("sweep-restored", 73), 1).await;
    let (state, backup) = (world.folder.path().join("state"), world.folder.path().join("backup"));
    // Its content is nowhere: nothing would be swept while it is there.
    delete(&world, world.image).await;
    world.stop_controller().await;
    copy(&state, &backup);
    world.start_controller().await;
    let (image, operation) = world.import(&[7; 300_000], Some(DiskFormat::Raw)).await;
    world.done(operation).await;
    world.image = image;
    let guest = world.guest().await;
    let operation = world.start(guest, 0).await;
    world.done(operation).await;
    let before = chunks(&world).await;
    world.stop_controller().await;
    std::fs::remove_dir_all(&state).unwrap();
    std::fs::rename(&backup, &state).unwrap();
    world.start_controller().await;
    // Before the host is back nothing goes, and nothing when it is.
    sweep(&world).await;
    assert_eq!(chunks(&world).await, before);
    let host = world.id(0);
    world
        .until("the host is back", async |world| {
            let answer = ask(world, host, of_roots(world.project, None)).await;
            answer.is_err_and(|problem| problem.detail.contains(&guest.to_string()))
        })
        .await;
    sweep(&world).await;
    assert_eq!(chunks(&world).await, before);
    let (events, _) = world.state().events(0, 1000).await.unwrap();
    let told = events.iter().filter(|event| event.kind == "store.not_swept");
    let problems: Vec<String> = told.map(|event| event.data["problem"].to_string()).collect();
    assert_eq!(problems.len(), 2);
    assert!(problems[0].contains("has told nothing") && problems[1].contains(&guest.to_string()), "{problems:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_frozen_lives_until_nothing_of_it_is_missing() {
    let mut world = World::new(seed("sweep-thaw", 73), 2).await;
    let guest = world.guest().await;
    world.done(world.start(guest, 0).await).await;
    world.done(world.freeze(guest).await).await;
    world.settled().await;
    let freeze = async |world: &World| {
        let id = world.record(guest).await.guest.freeze.unwrap();
        world.state().need::<Freeze>(&id).await.unwrap().value
    };
    let lives = async |world: &World, freeze: &Freeze| {
        let (live, _) = roots(world, world.id(0), None).await.unwrap();
        live.iter().any(|live| live.root == freeze.memory_root && live.is_home)
    };
    let is_consumed =
        async |world: &World, freeze: &Freeze| world.state().need::<Freeze>(&freeze.id).await.unwrap().is_consumed;
    let first = freeze(&world).await;
    assert!(lives(&world, &first).await);
    // It runs, and its memory has still to come: also for a controller that begins anew.
    world.stall(Stage::Fetch, true);
    let thaw = world.thaw(guest, 1).await;
    world.until("it runs", async |world| lock(&world.ground).runs_at(guest).len() == 1).await;
    world.until("and is told to", async |world| world.operation(thaw).await.phase >= Phase::Resume).await;
    for is_again in [false, true] {
        if is_again {
            world.restart_controller().await;
        }
        assert!(!is_consumed(&world, &first).await && lives(&world, &first).await);
        assert!(!lock(&world.ground).frozen[&first.id].is_dropped);
        assert!(!world.operation(thaw).await.phase.is_terminal());
    }
    // Nothing else is done with it meanwhile.
    let other = Work::GuestFreeze { freeze: FreezeId::generate() };
    let busy = world.try_submit(guest, OperationKind::GuestFreeze, other, None).await.unwrap_err();
    assert_eq!((busy.code, busy.retryable), (Code::OperationInProgress, true));
    world.stall(Stage::Fetch, false);
    world.done(thaw).await;
    world.until("it is over", async |world| is_consumed(world, &first).await).await;
    world.until("and dropped", async |world| lock(&world.ground).frozen[&first.id].is_dropped).await;
    assert!(!lives(&world, &first).await);
    world.settled().await;

    // A guest that dies while its memory is missing: it is lost, and what was frozen is no way back to a disk that is newer.
    world.done(world.freeze(guest).await).await;
    world.settled().await;
    let second = freeze(&world).await;
    world.stall(Stage::Fetch, true);
    let thaw = world.thaw(guest, 0).await;
    world.until("it runs", async |world| lock(&world.ground).runs_at(guest).len() == 1).await;
    world.until("and is told to", async |world| world.operation(thaw).await.phase >= Phase::Resume).await;
    assert!(!is_consumed(&world, &second).await);
    world.crash(guest, 0).await;
    world.until("it is lost", async |world| world.record(guest).await.guest.state == GuestState::Lost).await;
    assert_eq!(world.end(thaw).await.phase, Phase::Failed);
    assert!(is_consumed(&world, &second).await);
    world.stall(Stage::Fetch, false);
    let again = Work::GuestThaw { freeze: second.id, memory: None };
    let again = world.submit(guest, OperationKind::GuestThaw, again, Some(1)).await;
    world.undone(again, Code::WrongState).await;
    world.done(world.start(guest, 0).await).await;
    world.settled().await;
}
