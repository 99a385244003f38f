//! Imports: what is good is ready, what is not is told, and an import survives the controller.

use std::sync::Arc;

use supercloud_api::{Code, DiskFormat, Image, ImageState, Phase, ids::ImageId};
use supercloud_storage::{
    backend::{DirStore, ObjectStore},
    key::{DataKeys, ProjectKey},
    transfer::{self, ImportOptions},
};

use crate::support::{Random, seed, world::World};

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..bytes / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// The first cluster of a qcow2 image with a backing file's name.
fn with_backing_file() -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    bytes[8..16].copy_from_slice(&512u64.to_be_bytes());
    bytes[16..20].copy_from_slice(&11u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
    bytes[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
    bytes[512..523].copy_from_slice(b"/etc/passwd");
    bytes
}

async fn image(world: &World, id: ImageId) -> Image {
    world.state().need::<Image>(&id).await.unwrap().value
}

/// The root that the content must have, made by an import of its own.
async fn root_of(world: &World, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, bytes).unwrap();
    let keys = Arc::new(DataKeys::derive(world.project, &ProjectKey::from_bytes(world.project_key)));
    let store: Arc<dyn ObjectStore> = Arc::new(DirStore::open(&folder.path().join("store")).unwrap());
    let options = ImportOptions {
        format: Some(transfer::DiskFormat::Raw),
        work_folder: folder.path().to_owned(),
        convert_budget: std::time::Duration::from_secs(60),
    };
    let made = transfer::import_image(&path, &options, keys, store, &Default::default(), |_| {}).await.unwrap();
    made.root.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_disk_is_ready_and_its_upload_gone() {
    let world = World::new(seed("import", 60), 0).await;
    let disk = noise(world.seed, 3 << 20);
    let (id, operation) = world.import(&disk, None).await;
    world.done(operation).await;
    let image = image(&world, id).await;
    assert_eq!(image.state, ImageState::Ready);
    assert_eq!((image.parts.len(), image.parts[0].size_bytes), (1, 3 << 20));
    assert_eq!(image.parts[0].root, root_of(&world, &disk).await);
    world.until("the upload removed", async |world| !world.folder.path().join(format!("uploads/{id}")).exists()).await;
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_not_acceptable_is_named() {
    let world = World::new(seed("import-bad", 61), 0).await;
    let mut torn = with_backing_file();
    torn[8..20].fill(0);
    let cases = [
        (with_backing_file(), None, "backing file"),
        (with_backing_file(), Some(DiskFormat::Qcow2), "backing file"),
        (noise(1, 4096), Some(DiskFormat::Qcow2), "qcow2"),
        (torn, None, ""),
        (Vec::new(), None, ""),
    ];
    for (bytes, format, why) in cases {
        let (id, operation) = world.import(&bytes, format).await;
        let ended = world.end(operation).await;
        let error = ended.error.clone().expect("a reason");
        assert_eq!((ended.phase, error.code), (Phase::Failed, Code::BadContent), "{ended:#?}");
        assert!(error.detail.contains(why), "{error}");
        assert_eq!(image(&world, id).await.state, ImageState::Failed);
    }
    // Said to be raw it is bytes like others: no parser sees it.
    let (id, operation) = world.import(&with_backing_file(), Some(DiskFormat::Raw)).await;
    world.done(operation).await;
    assert_eq!(image(&world, id).await.state, ImageState::Ready);
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_goes_on_after_the_controllers_end_of_either_kind_and_others_wait_their_turn() {
    let mut world = World::new(seed("import-restart", 62), 0).await;
    let disk = noise(world.seed, 48 << 20);
    let (id, operation) = world.import(&disk, Some(DiskFormat::Raw)).await;
    let (waiting, after) = world.import(&noise(3, 1 << 20), None).await;
    world.phase(operation, Phase::Copy).await;
    world.stop_controller().await;
    world.start_controller().await;
    assert!(!world.operation(operation).await.phase.is_terminal(), "an interrupted import is no failed one");
    world.phase(operation, Phase::Copy).await;
    world.restart_controller().await;
    world.done(operation).await;
    world.done(after).await;
    assert_eq!(image(&world, id).await.parts[0].root, root_of(&world, &disk).await);
    assert_eq!(image(&world, waiting).await.state, ImageState::Ready);
    world.settled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_is_cancelled() {
    let world = World::new(seed("import-cancel", 63), 0).await;
    let (_, first) = world.import(&noise(world.seed, 48 << 20), Some(DiskFormat::Raw)).await;
    let (id, second) = world.import(&noise(4, 48 << 20), Some(DiskFormat::Raw)).await;
    world.cancel(second).await;
    world.phase(first, Phase::Copy).await;
    world.cancel(first).await;
    for operation in [first, second] {
        let ended = world.end(operation).await;
        // The first may have been through before anybody looked for the wish.
        assert!(ended.phase == Phase::RolledBack || (operation == first && ended.phase == Phase::Done), "{ended:#?}");
    }
    assert_eq!(image(&world, id).await.state, ImageState::Failed);
    world.settled().await;
}
