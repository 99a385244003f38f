//! Points of the history beside what else the disk is for.

use std::sync::Arc;

use supercloud_ids::Epoch;
use tokio_util::sync::CancellationToken;

use super::{World, model::contents};
use crate::{
    BLOCK_BYTES,
    backend::{DirStore, ObjectStore},
    volume::{CutOf, POINT_RESERVE_BYTES, VolumeError, sim::SimDisk},
};

#[tokio::test]
async fn a_point_leaves_the_reserve_free_and_a_freeze_does_not_care() {
    let world = World::new(true).await;
    let volume = world.active(SimDisk::new()).await;
    let store: Arc<dyn ObjectStore> = world.store.clone();
    let never = CancellationToken::new();
    for block in 0..3 {
        volume.write(block * BLOCK_BYTES as u64, vec![7 + block as u8; 512].into(), false).await.unwrap();
    }
    let needed = 3 * BLOCK_BYTES as u64;
    let count = || world.store.objects.lock().unwrap().len();
    let before = count();
    *world.store.free.lock().unwrap() = Some(POINT_RESERVE_BYTES + needed - 1);
    match volume.point(&store, &never, |_| ()).await {
        Err(error @ VolumeError::NoRoom { needed_bytes, .. }) => {
            assert_eq!(needed_bytes, needed);
            assert!(error.to_string().contains("are free in the store"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(count(), before, "nothing of it was stored");

    *world.store.free.lock().unwrap() = Some(POINT_RESERVE_BYTES + needed);
    assert_eq!(volume.point(&store, &never, |_| ()).await.unwrap().sealed_blocks, 3);
    // What is there already needs no room, however much it is; what was written since does.
    *world.store.free.lock().unwrap() = Some(POINT_RESERVE_BYTES);
    assert_eq!(volume.point(&store, &never, |_| ()).await.unwrap().sealed_blocks, 0);
    volume.write(0, vec![99; 512].into(), false).await.unwrap();
    assert!(matches!(volume.point(&store, &never, |_| ()).await, Err(VolumeError::NoRoom { .. })));
    // A freeze leaves the host, and is not refused.
    volume.publish(&store, &never, |_| ()).await.unwrap();
}

#[tokio::test]
async fn a_folder_knows_its_free_space() {
    let folder = tempfile::tempdir().unwrap();
    let store = DirStore::open(&folder.path().join("store")).unwrap();
    assert!(store.free_bytes().await.unwrap().is_some());
}

/// What a checkpoint's disk is must be of the checkpoint's instant: whatever else is done with cuts meanwhile, it is that or none.
#[tokio::test]
async fn a_point_of_a_cut_is_of_its_instant_or_is_none() {
    let world = World::new(true).await;
    let volume = world.active(SimDisk::new()).await;
    let store: Arc<dyn ObjectStore> = world.store.clone();
    let never = CancellationToken::new();
    let write = async |number: u8| {
        volume.write(0, vec![number; 512].into(), false).await.unwrap();
        super::read_all(&volume).await
    };
    let point = async |series, number| volume.point_of_cut(CutOf { series, number }, &store, &never, |_| ()).await;
    volume.begin_cuts(7).await.unwrap();
    let first = write(1).await;
    volume.cut(1).await.unwrap();
    write(2).await;
    let taken = point(7, 1).await.unwrap();
    assert_eq!(contents(&world, taken.root).await, first);
    assert!(matches!(point(7, 1).await, Err(VolumeError::Cut { .. })), "once");

    // A cut that failed elsewhere, and the one after it.
    write(3).await;
    volume.cut(2).await.unwrap();
    let fourth = write(4).await;
    volume.cut(3).await.unwrap();
    write(5).await;
    assert!(point(7, 2).await.is_err());
    assert_eq!(contents(&world, point(7, 3).await.unwrap().root).await, fourth);

    // A mirror begins: its cuts have the same numbers, and are none of the checkpoint's.
    volume.begin_cuts(8).await.unwrap();
    volume.cut(1).await.unwrap();
    volume.end_cuts().await.unwrap();
    volume.cut(1).await.unwrap();
    assert!(point(8, 1).await.is_err() && point(0, 1).await.is_err());

    // A point that has begun goes on when a mirror begins, and a mirror's cut stays when a point begins.
    volume.begin_cuts(9).await.unwrap();
    let sixth = write(6).await;
    volume.cut(1).await.unwrap();
    write(7).await;
    let (taken, ()) = tokio::join!(point(9, 1), async {
        tokio::task::yield_now().await;
        volume.end_cuts().await.unwrap();
        volume.cut(1).await.unwrap();
    });
    if let Ok(taken) = taken {
        assert_eq!(contents(&world, taken.root).await, sixth);
    }

    // What a standby is about to fetch is not thrown away for a checkpoint.
    volume.end_cuts().await.unwrap();
    volume.cut(1).await.unwrap();
    assert_eq!(volume.await_cut(0, 0).await.unwrap().map(|cut| cut.number), Some(1));
    assert!(matches!(volume.begin_cuts(10).await, Err(VolumeError::Cut { .. })));
    volume.cut_page(1, 0, 0).await.unwrap();
    volume.end_cuts_of(10).await.unwrap();
    volume.cut_page(1, 0, 0).await.unwrap();
    volume.end_cuts().await.unwrap();

    // Sealed and active again, it is another writer's.
    volume.begin_cuts(10).await.unwrap();
    volume.cut(1).await.unwrap();
    volume.seal(Epoch(1)).await.unwrap();
    assert!(point(10, 1).await.is_err());
}
