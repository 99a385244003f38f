//! Points of the history beside what else the disk is for.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::World;
use crate::{
    BLOCK_BYTES,
    backend::{DirStore, ObjectStore},
    volume::{POINT_RESERVE_BYTES, VolumeError, sim::SimDisk},
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
