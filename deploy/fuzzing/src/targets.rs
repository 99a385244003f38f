//! The targets: each reads bytes that in life come from another host, a guest, a switch, a user's file or the store.

use std::net::Ipv4Addr;
use std::sync::LazyLock;

use crate::guest;
use bytes::Bytes;
use serde_json::json;
use supercloud_api::blocks::{self, BlockMap, Decoder, Encoder, Item};
use supercloud_api::frame::{Frame, read_frame, write_frame};
use supercloud_api::ids::{GuestId, HostId, ProjectId, VolumeId};
use supercloud_api::link::{Directive, Envelope, Hello, Notice, Query, Welcome, kind};
use supercloud_api::{data, guest_call::GuestCall, resources::GuestMigrate, ticket::Ticket};
use supercloud_feed::recorded;
use supercloud_sdn::dhcp::{self, Lease};
use supercloud_sdn::openflow::{Action, Field, FlowCommand, FlowMod, Instruction, Match, Message, PacketIn, PacketOut};
use supercloud_storage::key::{ChunkKind, DataKeys, ProjectKey};
use supercloud_storage::transfer::qcow2::Qcow2Header;
use supercloud_storage::{chunk, peer, wire};

/// One target.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Whose words it reads.
    pub about: &'static str,
    /// Good inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Reads an input; panics when a promise is broken.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "frame", about: "frames of the links between agents and controller", seeds: frames, run: frame },
    Target { name: "link", about: "what agent and controller say to each other", seeds: link_seeds, run: link },
    Target { name: "blocks", about: "a disk that is read out of the controller", seeds: block_seeds, run: read_blocks },
    Target { name: "ticket", about: "tickets that a peer shows", seeds: tickets, run: ticket },
    Target { name: "volume-peer", about: "what another host's volume says", seeds: peer_seeds, run: volume_peer },
    Target { name: "chunk", about: "sealed chunks out of a store", seeds: chunks, run: unseal },
    Target { name: "qcow2", about: "the header of a user's disk image", seeds: qcow2_seeds, run: qcow2 },
    Target { name: "openflow", about: "what a switch says", seeds: openflow_seeds, run: openflow },
    Target { name: "dhcp", about: "what a guest broadcasts", seeds: dhcp_seeds, run: dhcp_answer },
    Target { name: "virtio", about: "what a guest does to a device", seeds: guest::virtio_seeds, run: guest::virtio },
    Target { name: "boot", about: "the kernel that a guest brings", seeds: guest::boot_seeds, run: guest::boot_file },
    Target { name: "travel", about: "a machine from another host", seeds: guest::travel_seeds, run: guest::travel },
    Target { name: "image", about: "a frozen machine out of a store", seeds: guest::image_seeds, run: guest::image },
    Target { name: "mirror", about: "a mirror from another host", seeds: guest::mirror_seeds, run: guest::mirror },
    Target { name: "feed", about: "price feeds, recorded prices, catalogues, probes", seeds: feeds, run: feed },
];

static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    #[expect(clippy::expect_used, reason = "without a runtime nothing can be tried")]
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
});

fn frames() -> Vec<Vec<u8>> {
    let write = |frame: Frame| {
        let mut bytes = Vec::new();
        // Writing to memory cannot fail; a seed less if it did.
        let _ = RUNTIME.block_on(write_frame(&mut bytes, &frame));
        bytes
    };
    let query = Query::GuestToken { guest: GuestId::generate(), epoch: supercloud_api::ids::Epoch(1) };
    [(kind::QUERY, json!({"number": 1, "body": query})), (kind::NOTICE, json!({"notice": "discarded"}))]
        .into_iter()
        .filter_map(|(kind, body)| Frame::json(kind, 1, &body).ok().map(write))
        .collect()
}

fn block_seeds() -> Vec<Vec<u8>> {
    let mut map = BlockMap::zeros(9);
    [1, 2, 8].into_iter().for_each(|block| map.set(block));
    let stream = |digests| {
        let (mut encoder, mut frames) = Encoder::begin("r".into(), 9 << 16, &map, 1..9, digests).ok()?;
        for block in [1, 2, 8] {
            let data = [7; blocks::BLOCK_BYTES];
            frames.extend(if digests { encoder.digest(block, &data).ok()? } else { encoder.block(block, &data).ok() });
        }
        frames.extend(encoder.end().ok()?);
        Some(frames.concat())
    };
    [stream(true), stream(false)].into_iter().flatten().collect()
}

/// However the bytes are cut, the same comes of them; and what comes is in order and of the map.
fn read_blocks(input: &[u8]) {
    let read = |piece: usize| {
        let (mut decoder, mut items) = (Decoder::default(), Vec::new());
        for piece in input.chunks(piece) {
            decoder.push(piece);
            loop {
                match decoder.next_item() {
                    Ok(Some(item)) => items.push(item),
                    Ok(None) => break,
                    Err(_) => return items,
                }
            }
        }
        items
    };
    let items = read(input.len().max(1));
    assert!(items == read(1021));
    let mut last = None;
    for item in &items[1.min(items.len())..] {
        let Some(Item::Head(head, map)) = items.first() else { panic!("something came before the head") };
        match item {
            Item::Block { block, .. } | Item::Digest { block, .. } => {
                assert!(
                    map.has(*block) && (head.from..head.to).contains(block) && last.is_none_or(|last| last < *block)
                );
                last = Some(*block);
            }
            Item::End => assert_eq!(last, (head.from..head.to).rfind(|block| map.has(*block))),
            Item::Head(..) => panic!("a second head"),
        }
    }
}

fn frame(input: &[u8]) {
    let mut reader = input;
    RUNTIME.block_on(async {
        while let Ok(frame) = read_frame(&mut reader).await {
            assert_ne!(frame.kind, 0);
            let mut again = Vec::new();
            assert!(write_frame(&mut again, &frame).await.is_ok());
            let back = read_frame(&mut again.as_slice()).await;
            assert!(back.is_ok_and(|back| (back.kind, &back.payload) == (frame.kind, &frame.payload)));
        }
    });
}

fn link_seeds() -> Vec<Vec<u8>> {
    let guest = GuestId::generate();
    let texts = [
        json!({"number": 1, "body": {"query": "guest_token", "guest": guest, "epoch": 3}}),
        json!({"number": 2, "body": {"query": "guest_call", "guest": guest, "epoch": 3,
            "call": {"call": "migrate", "wanted": {"to": "east"}, "idempotency_key": "k"}}}),
        json!({"notice": "guest_event", "guest": guest, "epoch": 1, "event": "rebooted"}),
        json!({"notice": "heartbeat", "used": {"vcpus": 1, "memory_bytes": 2, "disk_bytes": 3}, "view_revision": 1,
            "guests": [{"guest": guest, "epoch": 1, "holding": "running", "operation": null, "alarm": null,
                "missing_bytes": 0, "volumes": [{"volume": VolumeId::generate(), "root": "00", "version": 1}]}]}),
        json!({"directive": "discard", "guest": guest}),
        json!({"host": HostId::generate(), "agent_version": "1", "data_address": "10.0.0.1:1", "overlay_address": null,
            "capacity": {"vcpus": 1, "memory_bytes": 2, "disk_bytes": 3}, "compat_classes": [], "probe": {},
            "guests": [], "volumes": [], "view_revision": 0}),
        json!({"to": "east", "max_downtime_ms": 300, "reason": "x"}),
    ];
    texts.iter().map(|text| text.to_string().into_bytes()).collect()
}

/// What is read is written, read again and the same.
fn round_trip<T>(input: &[u8])
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(read) = serde_json::from_slice::<T>(input) else { return };
    let text = serde_json::to_vec(&read).unwrap_or_default();
    let again = serde_json::from_slice::<T>(&text);
    assert!(again.as_ref().is_ok_and(|again| *again == read), "{read:?} became {again:?}");
}

fn link(input: &[u8]) {
    round_trip::<Envelope<Query>>(input);
    round_trip::<Notice>(input);
    round_trip::<Directive>(input);
    round_trip::<Hello>(input);
    round_trip::<Welcome>(input);
    round_trip::<GuestCall>(input);
    round_trip::<GuestMigrate>(input);
    round_trip::<data::HandoverMessage>(input);
}

fn tickets() -> Vec<Vec<u8>> {
    vec![b"e30.AAAA".to_vec(), b"eyJ2ZXJzaW9uIjoxfQ.c2lnbmF0dXJl".to_vec()]
}

fn ticket(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let key = "00".repeat(32);
    assert!(Ticket::verify(text, &key, 0).is_err(), "nobody has signed it");
}

fn peer_seeds() -> Vec<Vec<u8>> {
    let hello =
        peer::Hello { volume: VolumeId::generate(), project: ProjectId::generate(), size_bytes: 1 << 20, base: None };
    let messages = [
        peer::Message::Hello(hello),
        peer::Message::GetMap { request: 1, from: 0, since: 0 },
        peer::Message::GetBlocks { request: 2, blocks: vec![(0, 1), (7, 2)] },
        peer::Message::Block { request: 2, block: 7, version: 2, digest: None, data: None },
        peer::Message::Block { request: 2, block: 7, version: 2, digest: None, data: Some(Bytes::from(vec![5; 4096])) },
    ];
    let bytes = |message: &peer::Message| {
        let frame = message.encode();
        let mut bytes = frame.kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&frame.version.to_le_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "a frame is short")]
        bytes.extend_from_slice(&(frame.payload.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&frame.payload);
        bytes
    };
    messages.iter().map(bytes).collect()
}

fn volume_peer(input: &[u8]) {
    let mut reader = input;
    RUNTIME.block_on(async {
        while let Ok(frame) = wire::read_frame(&mut reader).await {
            if let Ok(message) = peer::Message::decode(&frame) {
                let again = peer::Message::decode(&message.encode());
                assert!(again.is_ok_and(|again| again == message), "{message:?}");
            }
        }
    });
}

static KEYS: LazyLock<DataKeys> =
    LazyLock::new(|| DataKeys::derive(ProjectId::generate(), &ProjectKey::from_bytes([7; 32])));

fn chunks() -> Vec<Vec<u8>> {
    let seal = |plain: &[u8]| chunk::seal(&KEYS, ChunkKind::Data, plain).ok().map(|(_, sealed)| sealed.to_vec());
    [seal(b"short"), seal(&[0; 5000])].into_iter().flatten().collect()
}

fn unseal(input: &[u8]) {
    let keys = &*KEYS;
    for plain in [b"short".as_slice(), &[0; 5000]] {
        let name = keys.name(ChunkKind::Data, plain);
        if let Ok(found) = chunk::unseal(keys, ChunkKind::Data, &name, input) {
            assert_eq!(found, plain, "a chunk is what its name says");
        }
    }
}

fn qcow2_seeds() -> Vec<Vec<u8>> {
    let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
    header.extend_from_slice(&[0; 12]);
    header.extend_from_slice(&16_u32.to_be_bytes());
    header.extend_from_slice(&(1_u64 << 30).to_be_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(&2_u32.to_be_bytes());
    header.extend_from_slice(&(3_u64 << 16).to_be_bytes());
    header.extend_from_slice(&(1_u64 << 16).to_be_bytes());
    header.extend_from_slice(&1_u32.to_be_bytes());
    header.resize(96, 0);
    header.extend_from_slice(&4_u32.to_be_bytes());
    header.extend_from_slice(&104_u32.to_be_bytes());
    header.extend_from_slice(&[0; 64]);
    vec![header]
}

fn qcow2(input: &[u8]) {
    for file_len in [input.len() as u64, 1 << 20, u64::MAX] {
        if let Ok(header) = Qcow2Header::parse(input, file_len) {
            assert!((2..=3).contains(&header.version) && (9..=21).contains(&header.cluster_bits), "{header:?}");
        }
    }
}

fn openflow_seeds() -> Vec<Vec<u8>> {
    let matching = Match::any().with(Field::InPort, 3_u32).with(Field::EthType, 0x0800_u16);
    let actions = vec![Action::Output { port: 2, max_len: 0xffff }];
    let flow = FlowMod {
        command: FlowCommand::Add,
        table: 1,
        priority: 100,
        cookie: 5,
        cookie_mask: 0,
        idle_timeout_s: 0,
        hard_timeout_s: 0,
        flags: 0,
        matching: matching.clone(),
        instructions: vec![Instruction::Apply(actions.clone()), Instruction::GotoTable(2), Instruction::Meter(1)],
    };
    let messages = [
        Message::Hello { versions: Some(1 << 4) },
        Message::Error { kind: 1, code: 2, data: vec![1, 2, 3] },
        Message::EchoRequest(vec![1; 8]),
        Message::FeaturesReply { datapath_id: 7, buffers: 0, tables: 254, capabilities: 0x4f },
        Message::PacketIn(PacketIn { reason: 1, table: 2, cookie: 9, total_len: 60, matching, data: vec![2; 60] }),
        Message::PacketOut(PacketOut { in_port: 1, actions, data: vec![3; 60] }),
        Message::FlowMod(flow),
    ];
    messages.iter().filter_map(|message| message.encode(7).ok()).collect()
}

fn openflow(input: &[u8]) {
    let Ok((xid, message)) = Message::decode(input) else { return };
    if let Ok(bytes) = message.encode(xid) {
        let again = Message::decode(&bytes);
        assert!(again.as_ref().is_ok_and(|again| *again == (xid, message.clone())), "{message:?} became {again:?}");
    }
}

fn lease() -> Option<Lease> {
    Some(Lease {
        mac: "02:00:00:00:00:07".parse().ok()?,
        ipv4: Ipv4Addr::new(10, 0, 0, 7),
        prefix_len: 24,
        gateway: Ipv4Addr::new(10, 0, 0, 1),
        dns: vec![Ipv4Addr::new(10, 0, 0, 2)],
        mtu: 1450,
        hostname: Some("web".into()),
        lease_s: 3600,
    })
}

fn dhcp_seeds() -> Vec<Vec<u8>> {
    let request = |kind: u8| {
        let mut frame = vec![0xff; 6];
        frame.extend_from_slice(&[2, 0, 0, 0, 0, 7, 8, 0]);
        frame.extend_from_slice(&[0x45, 0, 1, 24, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
        frame.extend_from_slice(&[0, 68, 0, 67, 1, 4, 0, 0]);
        let mut bootp = vec![0; 240];
        bootp[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
        bootp[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 7]);
        bootp[236..].copy_from_slice(&[99, 130, 83, 99]);
        bootp.extend_from_slice(&[53, 1, kind, 50, 4, 10, 0, 0, 7, 55, 3, 1, 3, 6, 255]);
        frame.extend_from_slice(&bootp);
        frame
    };
    vec![request(1), request(3), request(8)]
}

fn dhcp_answer(input: &[u8]) {
    let Some(lease) = lease() else { return };
    if let Ok(answer) = dhcp::respond(input, &lease) {
        assert!((14..=1514).contains(&answer.len()), "an answer fits a frame");
    }
}

fn feeds() -> Vec<Vec<u8>> {
    let shipped = include_str!("../../lab/feed/three-markets.csv");
    let head: Vec<&str> = shipped.lines().take(60).collect();
    vec![
        head.join("\n").into_bytes(),
        b"era,region,instance_type,vcpus,memory_gib,usd_per_hour\nclassic,us-east-1,m1.small,1,1.7,0.044\n".to_vec(),
        b"timestamp_utc,zone,instance_type,usd_per_hour\n2015-01-01T00:00:00Z,us-east-1a,m1.small,0.0071\n".to_vec(),
        b"trace,zone,resource,gap_seconds,start_offset_seconds,instances_available\nt,z,v100,600,0,1\n".to_vec(),
    ]
}

fn feed(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // Whether it is taken or refused is theirs to say.
    let _ = supercloud_feed::Feed::parse(text);
    let types = recorded::catalogue(text).unwrap_or_default();
    let _ = recorded::prices(text, &types, None);
    let _ = recorded::capacity(text, None);
    let _ = recorded::text_of(input);
}
