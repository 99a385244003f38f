//! The OpenFlow client against a switch that does what the test says, good and bad.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{path::PathBuf, time::Duration};

use supercloud_sdn::{
    connection::{Connection, ConnectionError, Endpoint, PACKET_IN_QUEUE},
    openflow::{
        BundleControl, FlowCommand, FlowMod, HEADER_LEN, Match, Message, MultipartReply, PacketIn, PortCounters,
        decode_header,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

const PATIENCE: Duration = Duration::from_secs(5);
const IMPATIENCE: Duration = Duration::from_millis(200);

struct Peer(UnixStream);

impl Peer {
    async fn read(&mut self) -> Option<(u32, Message)> {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header).await.ok()?;
        let (_, len, _) = decode_header(&header).unwrap().unwrap();
        let mut whole = header.to_vec();
        whole.resize(len, 0);
        self.0.read_exact(&mut whole[HEADER_LEN..]).await.ok()?;
        Some(Message::decode(&whole).unwrap())
    }

    async fn write(&mut self, xid: u32, message: Message) {
        let _ = self.0.write_all(&message.encode(xid).unwrap()).await;
    }
}

/// Listens, shakes hands, and then gives each message to `answer`, which says what to send back.
fn switch(
    mut answer: impl FnMut(u32, Message) -> Vec<(u32, Message)> + Send + 'static,
) -> (tempfile::TempDir, Endpoint) {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("switch.mgmt");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let mut peer = Peer(listener.accept().await.unwrap().0);
        peer.write(1, Message::Hello { versions: Some(0x12) }).await;
        while let Some((xid, message)) = peer.read().await {
            let replies = match message {
                Message::FeaturesRequest => {
                    let reply = Message::FeaturesReply { datapath_id: 42, buffers: 0, tables: 254, capabilities: 0 };
                    vec![(xid, reply)]
                }
                Message::BarrierRequest => vec![(xid, Message::BarrierReply)],
                Message::Hello { .. } | Message::SetConfig { .. } => vec![],
                other => answer(xid, other),
            };
            for (xid, reply) in replies {
                // An echo request without data stands for "hang up".
                if reply == Message::EchoRequest(vec![]) {
                    return;
                }
                peer.write(xid, reply).await;
            }
        }
    });
    (dir, Endpoint::Unix(path))
}

fn hang_up() -> Vec<(u32, Message)> {
    vec![(0, Message::EchoRequest(vec![]))]
}

fn flow(priority: u16) -> Message {
    Message::FlowMod(FlowMod {
        command: FlowCommand::Add,
        table: 0,
        priority,
        cookie: 0,
        cookie_mask: 0,
        idle_timeout_s: 0,
        hard_timeout_s: 0,
        flags: 0,
        matching: Match::any(),
        instructions: vec![],
    })
}

#[tokio::test]
async fn a_refused_message_of_a_bundle_is_named() {
    let mut seen = 0;
    let (_dir, endpoint) = switch(move |xid, message| match message {
        Message::BundleControl { bundle, control: BundleControl::OpenRequest, flags } => {
            vec![(xid, Message::BundleControl { bundle, control: BundleControl::OpenReply, flags })]
        }
        Message::BundleAdd { .. } => {
            seen += 1;
            if seen == 2 { vec![(xid, Message::Error { kind: 4, code: 6, data: vec![] })] } else { vec![] }
        }
        Message::BundleControl { .. } => vec![(xid, Message::Error { kind: 17, code: 15, data: vec![] })],
        _ => vec![],
    });
    let (connection, _packets) = Connection::open(&endpoint, PATIENCE).await.unwrap();
    assert_eq!(connection.datapath_id(), 42);
    let refused = connection.apply_bundle(&[flow(1), flow(2), flow(3)]).await.unwrap_err();
    assert!(
        matches!(&refused, ConnectionError::Refused { what, kind: 4, code: 6 } if what.contains("message 1 ")),
        "{refused}"
    );
    assert!(!connection.is_closed());
}

#[tokio::test]
async fn a_refusal_comes_back_to_who_asked() {
    let (_dir, endpoint) = switch(|xid, message| match message {
        Message::FlowMod(f) if f.priority == 9 => vec![(xid, Message::Error { kind: 5, code: 1, data: vec![] })],
        _ => vec![],
    });
    let (connection, _packets) = Connection::open(&endpoint, PATIENCE).await.unwrap();
    connection.tell(&[flow(8)], "a flow").await.unwrap();
    let refused = connection.tell(&[flow(8), flow(9), flow(10)], "flows").await.unwrap_err();
    assert!(matches!(refused, ConnectionError::Refused { kind: 5, code: 1, .. }), "{refused}");
    connection.tell(&[flow(10)], "a flow").await.unwrap();
}

#[tokio::test]
async fn silence_and_hanging_up_are_errors_of_their_own() {
    let (_dir, endpoint) = switch(|_, _| vec![]);
    let (connection, _packets) = Connection::open(&endpoint, IMPATIENCE).await.unwrap();
    assert!(matches!(connection.dump_flows().await, Err(ConnectionError::Deadline { .. })));
    let (_dir, endpoint) = switch(|_, _| hang_up());
    let (connection, _packets) = Connection::open(&endpoint, PATIENCE).await.unwrap();
    assert!(matches!(connection.dump_flows().await, Err(ConnectionError::Closed { .. })));
    connection.closed().await;
    assert!(matches!(connection.echo().await, Err(ConnectionError::Closed { .. })));
    let nowhere = Connection::open(&Endpoint::Unix("/nonexistent/switch".into()), PATIENCE).await;
    assert!(matches!(nowhere, Err(ConnectionError::Connect { .. })));
}

#[tokio::test]
async fn another_version_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.mgmt");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[1, 0, 0, 8, 0, 0, 0, 1]).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let refused = Connection::open(&Endpoint::Unix(path), PATIENCE).await.map(drop);
    assert!(matches!(refused, Err(ConnectionError::Version(_))), "{refused:?}");
}

#[tokio::test]
async fn garbage_ends_the_connection() {
    for garbage in [vec![4, 2, 0, 7, 0, 0, 0, 1], vec![0xff; 4096], vec![9, 9, 0, 16, 0, 0, 0, 1]] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bad.mgmt");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&garbage).await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        let refused = Connection::open(&Endpoint::Unix(path), PATIENCE).await.map(drop);
        assert!(matches!(refused, Err(ConnectionError::Closed { .. })), "{refused:?}");
    }
}

#[tokio::test]
async fn lists_come_in_parts_and_packets_are_bounded() {
    let counters = |port| PortCounters { port, ..PortCounters::default() };
    let (_dir, endpoint) = switch(move |xid, message| match message {
        Message::MultipartRequest(_) => (1..=3)
            .map(|n| {
                let part = MultipartReply::PortStats(vec![counters(n), counters(n + 10)]);
                (xid, Message::MultipartReply { more: n < 3, part })
            })
            .collect(),
        Message::EchoRequest(data) => {
            let packet =
                PacketIn { reason: 1, table: 0, cookie: 0, total_len: 1, matching: Match::any(), data: vec![0] };
            let mut replies = vec![(0, Message::PacketIn(packet)); PACKET_IN_QUEUE + 10];
            replies.push((xid, Message::EchoReply(data)));
            replies
        }
        _ => vec![],
    });
    let (connection, mut packets) = Connection::open(&endpoint, PATIENCE).await.unwrap();
    let ports: Vec<u32> = connection.port_counters(0).await.unwrap().into_iter().map(|c| c.port).collect();
    assert_eq!(ports, [1, 11, 2, 12, 3, 13]);
    connection.echo().await.unwrap();
    assert_eq!(connection.dropped_packets(), 10, "nobody takes them in");
    let mut taken = 0;
    while packets.try_recv().is_ok() {
        taken += 1;
    }
    assert_eq!(taken, PACKET_IN_QUEUE);
}
