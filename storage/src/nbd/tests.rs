//! Hostile clients, over streams in memory.

use std::{sync::Arc, time::Duration};

use rand::{Rng as _, SeedableRng as _};
use supercloud_ids::{Epoch, ProjectId, VolumeId};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use super::{
    NbdError,
    proto::{
        CMD_CUT, CMD_DISC, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, MAX_REQUEST_BYTES, OPT_GO,
        OPT_INFO, OPT_LIST, OPT_STRUCTURED_REPLY, OPTION_MAGIC, REQUEST_MAGIC,
    },
    serve_nbd,
};
use crate::{
    backend::mem::MemStore,
    key::{DataKeys, ProjectKey},
    source::ChunkReader,
    volume::{Volume, VolumeParams, disk::FolderDisk, role::Role},
};

const SIZE: u64 = 1 << 20;

struct Bench {
    _dir: tempfile::TempDir,
    volume: Volume,
}

impl Bench {
    async fn new(start: Role) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
        let params = VolumeParams {
            volume: VolumeId::generate(),
            size_bytes: SIZE,
            base: None,
            reader: ChunkReader::of_store(keys, Arc::new(MemStore::default())),
            start,
            cache_bytes: 0,
        };
        let volume = Volume::open(Arc::new(FolderDisk::open(dir.path()).unwrap()), params).await.unwrap();
        Self { _dir: dir, volume }
    }

    fn connect(&self) -> (DuplexStream, JoinHandle<Result<(), NbdError>>, CancellationToken) {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (volume, cancel) = (self.volume.clone(), CancellationToken::new());
        let token = cancel.clone();
        (ours, tokio::spawn(async move { serve_nbd(&volume, theirs, &token).await }), cancel)
    }
}

async fn ended(server: JoinHandle<Result<(), NbdError>>) -> Result<(), NbdError> {
    tokio::time::timeout(Duration::from_secs(30), server).await.expect("the server hangs").unwrap()
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [&OPTION_MAGIC.to_be_bytes()[..], &kind.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

fn request(command: u16, offset: u64, len: u32) -> Vec<u8> {
    let magic = REQUEST_MAGIC.to_be_bytes();
    let cookie = offset ^ u64::from(len);
    let fields = [&magic[..], &[0, 0], &command.to_be_bytes(), &cookie.to_be_bytes(), &offset.to_be_bytes()].concat();
    [&fields[..], &len.to_be_bytes()].concat()
}

/// A whole, right conversation.
fn conversation() -> Vec<u8> {
    let mut wire = 3u32.to_be_bytes().to_vec();
    wire.extend(option(OPT_STRUCTURED_REPLY, &[]));
    wire.extend(option(OPT_LIST, &[]));
    wire.extend(option(OPT_INFO, &[0, 0, 0, 0, 0, 1, 0, 3]));
    wire.extend(option(99, b"unknown"));
    wire.extend(option(OPT_GO, &[0, 0, 0, 0, 0, 0]));
    wire.extend(request(CMD_WRITE, 4096, 512));
    wire.extend([7; 512]);
    wire.extend(request(CMD_READ, 0, 65536));
    wire.extend(request(CMD_TRIM, 0, 4096));
    wire.extend(request(CMD_WRITE_ZEROES, 100, 70_000));
    wire.extend(request(CMD_CUT, 1, 0));
    wire.extend(request(CMD_FLUSH, 0, 0));
    wire.extend(request(CMD_DISC, 0, 0));
    wire
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn mutated_conversations_end_without_panic_or_hang() {
    let seed = 0x5eed_0009;
    println!("seed {seed:#x}");
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let bench = Bench::new(Role::Active { epoch: Epoch(1) }).await;
    let good = conversation();
    for round in 0..600 {
        let mut wire = good.clone();
        if round > 0 {
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..wire.len());
                wire[at] = rng.random();
            }
            if rng.random_bool(0.3) {
                wire.truncate(rng.random_range(0..wire.len()));
            }
        }
        let (mut client, server, _cancel) = bench.connect();
        // It may hang up in the middle.
        let _ = client.write_all(&wire).await;
        let _ = client.shutdown().await;
        let mut answers = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(30), client.read_to_end(&mut answers)).await;
        assert!(read.is_ok(), "round {round}: the server hangs");
        let result = ended(server).await;
        assert!(round > 0 || result.is_ok(), "{result:?}");
        assert!(answers.len() < 64 << 20);
    }
}

/// Through the handshake, simple replies.
async fn attach(client: &mut DuplexStream) {
    client.write_all(&3u32.to_be_bytes()).await.unwrap();
    client.write_all(&option(1, &[])).await.unwrap();
    let mut hello = [0; 18 + 10];
    client.read_exact(&mut hello).await.unwrap();
}

async fn answer(client: &mut DuplexStream) -> u32 {
    let mut reply = [0; 16];
    client.read_exact(&mut reply).await.unwrap();
    u32::from_be_bytes(reply[4..8].try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn impossible_requests_are_answered_with_errors_and_the_session_goes_on() {
    let bench = Bench::new(Role::Active { epoch: Epoch(1) }).await;
    let (mut client, server, _cancel) = bench.connect();
    attach(&mut client).await;
    for (wire, error) in [
        (request(CMD_READ, SIZE, 1), 22),
        (request(CMD_READ, u64::MAX, u32::MAX), 75),
        (request(CMD_WRITE_ZEROES, SIZE - 1, 2), 28),
        (request(CMD_TRIM, SIZE, 1), 22),
        (request(77, 0, 0), 22),
        (request(CMD_FLUSH, 0, 0), 0),
        ([request(CMD_WRITE, SIZE - 1, 2), vec![1; 2]].concat(), 28),
        ([request(CMD_WRITE, SIZE - 2, 2), vec![1; 2]].concat(), 0),
    ] {
        client.write_all(&wire).await.unwrap();
        assert_eq!(answer(&mut client).await, error, "{wire:?}");
    }
    // Longer than is possible: read past, answered, and the session goes on.
    client.write_all(&request(CMD_WRITE, 0, MAX_REQUEST_BYTES + 4096)).await.unwrap();
    let junk = vec![1; 1 << 20];
    let mut left = MAX_REQUEST_BYTES as usize + 4096;
    while left > 0 {
        let len = left.min(junk.len());
        client.write_all(&junk[..len]).await.unwrap();
        left -= len;
    }
    assert_eq!(answer(&mut client).await, 75);
    client.write_all(&request(CMD_DISC, 0, 0)).await.unwrap();
    ended(server).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_that_floods_a_waiting_volume_is_held_back_and_leaves_nothing() {
    let bench = Bench::new(Role::Standby).await;
    let (mut client, server, cancel) = bench.connect();
    attach(&mut client).await;
    // None is answered; the server stops reading when its caps are reached, long before this ends.
    let flood = async {
        for i in 0..100_000u64 {
            client.write_all(&request(CMD_READ, i % 64 * 4096, 1 << 20 >> (i % 8))).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let flooded = tokio::time::timeout(Duration::from_millis(500), flood).await;
    assert!(flooded.is_err(), "everything was taken");
    cancel.cancel();
    ended(server).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_silent_client_is_let_go_by_its_leaving() {
    let bench = Bench::new(Role::Standby).await;
    let (mut client, server, _cancel) = bench.connect();
    attach(&mut client).await;
    client.write_all(&request(CMD_READ, 0, 4096)).await.unwrap();
    drop(client);
    ended(server).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cut_has_what_was_asked_for_before_it_and_nothing_after() {
    let bench = Bench::new(Role::Active { epoch: Epoch(1) }).await;
    let (mut client, server, _cancel) = bench.connect();
    attach(&mut client).await;
    for number in 1..=40u8 {
        // One after the other without waiting for an answer.
        let (before, after) = (vec![number; 70_000], vec![number + 100; 70_000]);
        let write = request(CMD_WRITE, 512, 70_000);
        let cut = request(CMD_CUT, number.into(), 0);
        client.write_all(&[&write[..], &before, &cut, &write, &after].concat()).await.unwrap();
        for _ in 0..3 {
            assert_eq!(answer(&mut client).await, 0);
        }
        let known = u64::from(number) - 1;
        let told = bench.volume.await_cut(known, 0).await.unwrap().unwrap();
        assert_eq!(told.number, u64::from(number));
        for block in [0, 1] {
            let kept = bench.volume.cut_block(told.number, block).await.unwrap().data.unwrap();
            let at = if block == 0 { 512..65536 } else { 0..70_000 + 512 - 65536 };
            assert!(kept[at].iter().all(|byte| *byte == number), "cut {number} differs");
        }
        assert_eq!(bench.volume.read(512, 1).await.unwrap()[0], number + 100);
    }
    for wire in [request(CMD_CUT, 40, 0), request(CMD_CUT, 0, 0), request(CMD_CUT, 50, 512)] {
        client.write_all(&wire).await.unwrap();
        assert_eq!(answer(&mut client).await, 22);
    }
    drop(client);
    ended(server).await.unwrap();
}

/// Also to a client that takes structured replies: one form, whatever was agreed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cut_is_answered_in_the_simple_form() {
    let bench = Bench::new(Role::Active { epoch: Epoch(1) }).await;
    let (mut client, _server, _cancel) = bench.connect();
    let hello = [3u32.to_be_bytes().to_vec(), option(OPT_STRUCTURED_REPLY, &[]), option(OPT_GO, &[0; 6])].concat();
    client.write_all(&hello).await.unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).await.unwrap();
    let mut acks = 0;
    while acks < 2 {
        let mut reply = [0; 20];
        client.read_exact(&mut reply).await.unwrap();
        acks += u32::from(reply[12..16] == 1u32.to_be_bytes());
        let mut rest = vec![0; u32::from_be_bytes(reply[16..20].try_into().unwrap()) as usize];
        client.read_exact(&mut rest).await.unwrap();
    }
    client.write_all(&request(CMD_CUT, 1, 0)).await.unwrap();
    let mut reply = [0; 16];
    client.read_exact(&mut reply).await.unwrap();
    assert_eq!(reply, [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &1u64.to_be_bytes()].concat()[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_cut_does_not_wait_for_a_change_that_cannot_end() {
    let bench = Bench::new(Role::Standby).await;
    let (mut client, _server, _cancel) = bench.connect();
    attach(&mut client).await;
    client.write_all(&request(CMD_CUT, 1, 0)).await.unwrap();
    assert_eq!(answer(&mut client).await, 22, "a volume that is not active was cut");
    // Waits for the volume to be active.
    client.write_all(&[request(CMD_WRITE, 0, 512), vec![1; 512], request(CMD_CUT, 1, 0)].concat()).await.unwrap();
    assert_eq!(answer(&mut client).await, 5);
    client.write_all(&request(CMD_FLUSH, 0, 0)).await.unwrap();
    assert_eq!(answer(&mut client).await, 0);
}
