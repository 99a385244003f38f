//! Images out of the store.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use supercloud_api::{
    Code, Image, ImageCreate, ImageImport, ImagePart, Role,
    blocks::{BLOCK_BYTES, BlocksError, Item, digest},
    client::{Client, ClientError},
};

use super::{TestController, problem};

/// A disk with some random blocks, of no whole number of blocks.
fn disk() -> Vec<u8> {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(7);
    let mut disk = vec![0; 40 * BLOCK_BYTES + 1536];
    for block in [0, 3, 4, 17, 39] {
        rng.fill(&mut disk[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES]);
    }
    disk[40 * BLOCK_BYTES + 1000] = 9;
    disk
}

async fn imported(client: &Client, disk: &[u8], kernel: &[u8]) -> Image {
    let wanted = ImageCreate { name: "lean".parse().unwrap(), project: None, cmdline: None };
    client.create_image(&wanted).await.unwrap();
    for (part, content) in [(ImagePart::Disk, disk), (ImagePart::Kernel, kernel)] {
        client.upload_part("lean", part, 0, Bytes::copy_from_slice(content)).await.unwrap();
    }
    let operation = client.import_image("lean", &ImageImport::default()).await.unwrap();
    client.wait(operation.id, std::time::Duration::from_secs(60), |_| {}).await.unwrap();
    client.image("lean").await.unwrap()
}

/// All that comes, and how it ended.
async fn all(
    client: &Client,
    path: &str,
    range: std::ops::Range<u32>,
    digests: bool,
) -> (Vec<Item>, Option<ClientError>) {
    let mut stream = client.blocks(path, range, digests).await.unwrap();
    let mut items = Vec::new();
    loop {
        match stream.next().await {
            Ok(Item::End) => return (items, None),
            Ok(item) => items.push(item),
            Err(error) => return (items, Some(error)),
        }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

const DISK: &str = "/v1/images/lean/parts/disk/blocks";

#[tokio::test]
async fn an_image_comes_out_as_it_went_in_and_nothing_damaged_does() {
    let test = TestController::start().await;
    let (_, secret) = test.project("p").await;
    let client = test.client(&secret);
    let (disk, kernel) = (disk(), vec![7u8; 70_001]);
    let image = imported(&client, &disk, &kernel).await;

    let (items, error) = all(&client, DISK, 0..41, false).await;
    assert!(error.is_none(), "{error:?}");
    let Item::Head(head, map) = &items[0] else { panic!("no head") };
    assert_eq!((head.size_bytes, &head.root), (disk.len() as u64, &image.parts[0].root));
    let mut out = vec![0; 41 * BLOCK_BYTES];
    for item in &items[1..] {
        let Item::Block { block, data } = item else { panic!("{item:?}") };
        out[*block as usize * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(data);
    }
    assert!(out[..disk.len()] == disk && items.len() == 7 && map.count(0, 41) == 6);
    // A part of it, as digests.
    let (items, error) = all(&client, DISK, 4..40, true).await;
    assert!(error.is_none() && items.len() == 4, "{error:?}");
    let block_4 = &disk[4 * BLOCK_BYTES..][..BLOCK_BYTES];
    assert_eq!(items[1], Item::Digest { block: 4, digest: digest(4, block_4) });
    // A kernel's length is exact.
    let (items, _) = all(&client, "/v1/images/lean/parts/kernel/blocks", 0..0, false).await;
    assert!(matches!(&items[..], [Item::Head(head, _)] if head.size_bytes == 70_001), "{items:?}");

    // Who may only look does not get what a disk holds; nor does anybody what is not there.
    let viewer = test.client(&test.token("p", Role::Viewer).await.secret);
    assert_eq!(problem(viewer.blocks(DISK, 0..1, false).await).code, Code::Forbidden);
    assert_eq!(problem(client.blocks(DISK, 0..42, false).await).code, Code::BadRequest);
    let initrd = client.blocks("/v1/images/lean/parts/initrd/blocks", 0..1, false).await;
    assert_eq!(problem(initrd).code, Code::NotFound);
    let (_, other) = test.project("q").await;
    assert_eq!(problem(test.client(&other).blocks(DISK, 0..1, false).await).code, Code::NotFound);

    // A damaged chunk is not given out: what was sound before it is, then the reason.
    let chunks = test.parts().config.chunks_dir();
    let large = files(&chunks).into_iter().filter(|path| path.metadata().unwrap().len() > 60_000);
    for path in large.collect::<Vec<_>>() {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let (items, error) = all(&client, DISK, 0..41, false).await;
    let Some(ClientError::Blocks { source: BlocksError::Failed(told), .. }) = error else { panic!("{error:?}") };
    assert!(items.len() == 1 && told.detail.contains("block 0 cannot be read"), "{told:?}");
    // With the tree itself damaged nothing begins.
    for path in files(&chunks) {
        std::fs::write(&path, b"no chunk").unwrap();
    }
    assert_eq!(problem(client.blocks(DISK, 0..1, false).await).code, Code::Internal);
    test.stop().await;
}

#[tokio::test]
async fn who_does_not_read_takes_no_more_than_its_own_places() {
    let test = TestController::start().await;
    let (_, secret) = test.project("p").await;
    let client = test.client(&secret);
    // More than the sockets' buffers hold.
    let mut large = vec![0; 96 << 20];
    rand::rngs::SmallRng::seed_from_u64(8).fill(&mut large[..]);
    let wanted = ImageCreate { name: "lean".parse().unwrap(), project: None, cmdline: None };
    client.create_image(&wanted).await.unwrap();
    for (index, piece) in large.chunks(8 << 20).enumerate() {
        let offset = (index * (8 << 20)) as u64;
        client.upload_part("lean", ImagePart::Disk, offset, Bytes::copy_from_slice(piece)).await.unwrap();
    }
    let operation = client.import_image("lean", &ImageImport::default()).await.unwrap();
    client.wait(operation.id, std::time::Duration::from_secs(120), |_| {}).await.unwrap();
    let held = [client.blocks(DISK, 0..1536, false).await.unwrap(), client.blocks(DISK, 0..1536, false).await.unwrap()];
    assert_eq!(problem(client.blocks(DISK, 0..1536, false).await).code, Code::TooManyRequests);
    let own = test.client(&test.token("p", Role::Operator).await.secret);
    let (items, error) = all(&own, DISK, 0..1536, false).await;
    assert!(error.is_none() && items.len() == 1537, "{error:?}");
    // A reader that went away gives its place back.
    drop(held);
    for _ in 0..600 {
        if client.blocks(DISK, 0..1, false).await.is_ok() {
            return drop(test.stop().await);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("the places of readers that are gone are still taken");
}
