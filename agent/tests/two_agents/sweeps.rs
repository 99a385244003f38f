//! What a freeze leaves in a cloud's store goes when a thaw has consumed it, and nothing that the guest stands on.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use supercloud_api::{handover::OperationKind, ids::FreezeId, link::Directive};
use supercloud_storage::{
    backend::{DirStore, ObjectKey},
    key::ChunkName,
    manifest, sweep,
};

use crate::lab::Lab;

/// Every file of a store; all are made an hour older.
pub fn aged(folder: &Path) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().is_dir() {
            files.extend(aged(&entry.path()));
        } else {
            let file = std::fs::File::options().write(true).open(entry.path()).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
            files.insert(entry.path());
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thawed_freeze_is_swept_and_what_the_guest_stands_on_stays() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    let host = &lab.hosts[0];
    let store = DirStore::open(&host.config.store_dir).unwrap();
    let content = lab.controller.frozen().unwrap();
    let project = lab.controller.project(guest);
    let path = |root: &str| {
        let name: ChunkName = root.parse().unwrap();
        store.root().join(ObjectKey::chunk(project, &name).as_str())
    };
    let (memory, disk) = (path(&content.memory.root), path(&content.volumes[0].root));

    // A freeze that no thaw has consumed is as alive as a guest.
    let mut frozen = aged(store.root());
    frozen.retain(|path| path.parent().and_then(Path::file_name).is_none_or(|folder| folder != "sweep"));
    assert!(frozen.contains(&memory) && frozen.contains(&disk));
    lab.controller.direct(host.id, Directive::SweepStore);
    lab.eventually("a sweep has ended", async || lab.controller.swept(host.id).len() == 1).await;
    let swept = lab.controller.swept(host.id).remove(0);
    assert_eq!((swept.problem, swept.freed_chunks), (None, 0));
    assert_eq!(swept.seen_chunks, frozen.len() as u64);

    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    aged(store.root());
    let memory_root = content.memory.root.clone();
    lab.controller.direct(host.id, Directive::DropFreeze { freeze, project, memory_root });
    lab.eventually("the freeze's sweep has ended", async || lab.controller.swept(host.id).len() == 2).await;
    let swept = lab.controller.swept(host.id).remove(1);
    assert!(swept.problem.is_none() && swept.freed_chunks > 0 && swept.freed_bytes > 0, "{swept:?}");
    assert!(!memory.exists() && disk.exists());
    lab.check(guest).await;

    lab.violations();
}

/// The records do not name what a guest stands on that runs: they were brought back from a backup. Once it is deleted nothing of it
/// stays.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_stands_on_stays_while_a_host_has_it_and_goes_with_it() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let host = &lab.hosts[0];
    // Only then does it stand on anything.
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.done(guest, OperationKind::Thaw { freeze, to: host.id }).await;
    let project = lab.controller.project(guest);
    lab.eventually("its base is here", async || {
        lab.controller.report(host.id, guest).is_some_and(|told| told.base_missing_bytes == Some(0))
    })
    .await;
    let store = DirStore::open(&host.config.store_dir).unwrap();
    let held = async || sweep::read_held(&store, project, &host.id.to_string()).await.unwrap();
    lab.eventually("it says what it holds", async || held().await.is_some_and(|held| !held.roots.is_empty())).await;
    lab.controller.forget_all();
    aged(store.root());
    lab.controller.direct(host.id, Directive::SweepStore);
    lab.eventually("a sweep has ended", async || lab.controller.swept(host.id).len() == 1).await;
    let swept = lab.controller.swept(host.id).remove(0);
    let left = swept.seen_chunks - swept.freed_chunks;
    assert!(swept.problem.is_none() && swept.freed_chunks > 0, "what the memory was in goes: {swept:?}");
    let base = lab.controller.base(guest);
    let whole = manifest::verify(&lab.controller.reader(guest, store.root()), base, true).await.unwrap();
    assert!(whole.chunks > 0 && left > whole.chunks, "{whole:?}, {left}");
    lab.check(guest).await;

    lab.controller.discard(host.id, guest);
    lab.eventually("it says that it holds nothing", async || held().await.is_some_and(|held| held.roots.is_empty()))
        .await;
    aged(store.root());
    lab.controller.direct(host.id, Directive::SweepStore);
    lab.eventually("another sweep has ended", async || lab.controller.swept(host.id).len() == 2).await;
    let last = lab.controller.swept(host.id).remove(1);
    assert_eq!((last.problem, last.seen_chunks, last.freed_chunks), (None, left, left));
}
