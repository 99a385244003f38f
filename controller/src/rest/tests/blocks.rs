//! Images out of the store.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use rand::{Rng as _, SeedableRng as _};
use supercloud_api::{
    Code, Image, ImageCreate, ImageImport, ImagePart, Role, Volume,
    blocks::{BLOCK_BYTES, BlocksError, Item, digest},
    client::{Client, ClientError},
    data::{Channel, Open, Opened, VERSION, kind},
    frame::{Frame, read_frame, write_frame},
    ids::HostId,
    ticket::Ticket,
    tls::{self, Identity},
    unix_ms,
};
use supercloud_storage::{
    backend::{DirStore, ObjectStore},
    key::{DataKeys, ProjectKey},
    peer::chunks::{ServedProjects, serve_chunks},
    transfer::{ImportOptions, import_image},
};
use tokio_util::sync::CancellationToken;

use super::{TestController, guest, problem};
use crate::state::HostRecord;

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

/// An agent that gives chunks out of a store to whoever shows a ticket for it; where it listens, and its certificate's hash.
async fn agent(test: &TestController, host: HostId, store: Arc<DirStore>) -> (SocketAddr, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let signed = test.parts().authority.sign_host(host, &super::joins::csr(&key)).unwrap();
    let chain = tls::certificates_of_pem(&signed).unwrap();
    let me = tls::fingerprint(&chain[0]);
    let identity = Identity { chain, key: tls::key_of_pem(&key.serialize_pem()).unwrap() };
    let ca = [test.parts().authority.certificate().clone()];
    let config = tls::server_config(&ca, identity, &[tls::ALPN_DATA]).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (acceptor, own) = (tokio_rustls::TlsAcceptor::from(Arc::new(config)), me.clone());
    let ticket_key = test.parts().keys.tickets.0.public_key_hex();
    tokio::spawn(async move {
        loop {
            let tcp = listener.accept().await.unwrap().0;
            let mut stream = acceptor.accept(tcp).await.unwrap();
            let peer = tls::fingerprint(&stream.get_ref().1.peer_certificates().unwrap()[0]);
            let open: Open = read_frame(&mut stream).await.unwrap().parse_json(kind::OPEN, VERSION).unwrap();
            // As an agent judges it (`agent/src/plane/admission.rs`).
            let ticket = Ticket::verify(&open.ticket, &ticket_key, unix_ms()).unwrap();
            assert_eq!((ticket.source.host, ticket.source.certificate_sha256), (Some(host), own.clone()));
            assert_eq!((ticket.destination.host, ticket.destination.certificate_sha256), (None, peer));
            let Channel::Chunks { project } = open.channel else { panic!("{open:?}") };
            assert_eq!(project, ticket.project);
            write_frame(&mut stream, &Frame::json(kind::OPENED, VERSION, &Opened { error: None }).unwrap())
                .await
                .unwrap();
            let projects = ServedProjects::default();
            projects.add(project);
            let store = Arc::clone(&store) as Arc<dyn ObjectStore>;
            tokio::spawn(async move { serve_chunks(store, projects, stream, &CancellationToken::new()).await });
        }
    });
    (address, me)
}

#[tokio::test]
async fn a_frozen_volume_comes_out_of_its_clouds_store_by_an_agent() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let volume = world.client.volumes().await.unwrap().remove(0);
    // What a freeze would have stored in the cloud, and no controller has.
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(DirStore::open(folder.path()).unwrap());
    let key = test.state().project_key(&test.parts().keys.root, world.project).await.unwrap();
    let keys = Arc::new(DataKeys::derive(world.project, &ProjectKey::from_bytes(key)));
    let (disk, cancel) = (disk(), CancellationToken::new());
    let raw = folder.path().join("disk.raw");
    std::fs::write(&raw, &disk).unwrap();
    let options = ImportOptions {
        format: Some(supercloud_storage::transfer::DiskFormat::Raw),
        work_folder: folder.path().to_owned(),
        convert_budget: std::time::Duration::from_secs(1),
    };
    let stored = import_image(&raw, &options, keys, Arc::clone(&store) as _, &cancel, |_| {}).await.unwrap();
    let path = format!("/v1/volumes/{}/blocks", volume.id);
    // Larger than what it stands on: the rest is zeros.
    let size_bytes = 50 * BLOCK_BYTES as u64;
    let is_at = |host: Option<HostId>| {
        let (test, root, cloud) = (&test, stored.root.to_string(), world.hosts[0].cloud);
        async move {
            test.edit::<Volume>(&volume.id, |volume| {
                (volume.base, volume.base_cloud) = (Some(root.clone()), Some(cloud));
                (volume.host, volume.size_bytes) = (host, size_bytes);
            })
            .await;
        }
    };
    is_at(Some(world.hosts[0].id)).await;
    let busy = problem(world.client.blocks(&path, 0..1, false).await);
    assert!(busy.code == Code::WrongState && busy.detail.contains("freeze its guest first"), "{busy:?}");
    is_at(None).await;
    // Nobody of that cloud is there.
    assert_eq!(problem(world.client.blocks(&path, 0..1, false).await).code, Code::HostUnavailable);
    let host = world.hosts[0].id;
    let (address, certificate_sha256) = agent(&test, host, store).await;
    test.edit::<HostRecord>(&host, |record| {
        record.host.data_address = Some(address);
        record.host.certificate_sha256.clone_from(&certificate_sha256);
    })
    .await;
    let _session = test.parts().sessions.open_for_tests(host);
    let (items, error) = all(&world.client, &path, 0..50, false).await;
    assert!(error.is_none(), "{error:?}");
    let mut out = vec![0; 50 * BLOCK_BYTES];
    for item in &items[1..] {
        let Item::Block { block, data } = item else { panic!("{item:?}") };
        out[*block as usize * BLOCK_BYTES..][..BLOCK_BYTES].copy_from_slice(data);
    }
    assert!(out[..disk.len()] == disk && out[disk.len()..].iter().all(|byte| *byte == 0) && items.len() == 7);
    // It went through, and was not kept here.
    let own = files(&test.parts().config.chunks_dir());
    assert!(own.iter().all(|path| path.metadata().unwrap().len() < 60_000), "{own:?}");
    // Another certificate than the host's own is not talked to.
    test.edit::<HostRecord>(&host, |record| record.host.certificate_sha256 = "ab".repeat(32)).await;
    assert_eq!(problem(world.client.blocks(&path, 0..1, false).await).code, Code::HostUnavailable);
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
    // A token that is revoked meanwhile reads no more than what is under way.
    let short = test.token("p", Role::Operator).await;
    let mut stream = test.client(&short.secret).blocks(DISK, 0..1536, false).await.unwrap();
    test.admin_client().delete_token(&short.token.id.to_string()).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let error = loop {
        match stream.next().await {
            Ok(Item::End) => panic!("all of it came"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    let ClientError::Blocks { source: BlocksError::Failed(told), .. } = error else { panic!("{error:?}") };
    assert_eq!(told.code, Code::Unauthenticated, "{told:?}");
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
