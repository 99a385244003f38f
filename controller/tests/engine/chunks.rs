//! The controller's chunk service: sealed chunks for whoever shows a ticket that names it, its certificate and the project.

use std::{io, sync::Arc};

use bytes::Bytes;
use supercloud_api::{
    Problem,
    data::{self, Channel, Open, Opened},
    frame::{Frame, read_frame, write_frame},
    ids::{Epoch, OperationId, ProjectId, VolumeId},
    ticket::{Party, Signer, Ticket},
    tls, unix_ms,
};
use supercloud_controller::keys::Keys;
use supercloud_storage::{
    backend::{ObjectKey, ObjectStore as _, StoreError},
    key::ChunkName,
    peer::{Dial, DialFuture, Stream, chunks::ChunkClient},
    source::ChunkSource as _,
};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::{agent::Seat, seed, world::World};

async fn open(seat: &Seat, ticket: &str, channel: Channel) -> Result<TlsStream<TcpStream>, Option<Problem>> {
    let mut stream = seat.dial(tls::ALPN_DATA).await.map_err(|_| None)?;
    let open = Open { ticket: ticket.into(), channel };
    let frame = Frame::json(data::kind::OPEN, data::VERSION, &open).unwrap();
    write_frame(&mut stream, &frame).await.map_err(|_| None)?;
    let answer = read_frame(&mut stream).await.map_err(|_| None)?;
    let opened: Opened = answer.parse_json(data::kind::OPENED, data::VERSION).unwrap();
    match opened.error {
        None => Ok(stream),
        Some(problem) => Err(Some(problem)),
    }
}

#[derive(Debug)]
struct ByTicket {
    seat: Seat,
    ticket: String,
    project: ProjectId,
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Seat({})", self.host)
    }
}

impl Dial for ByTicket {
    fn dial(&self) -> DialFuture<'_> {
        Box::pin(async move {
            let stream = open(&self.seat, &self.ticket, Channel::Chunks { project: self.project }).await;
            stream.map(|stream| Box::new(stream) as Box<dyn Stream>).map_err(|_| io::Error::other("refused"))
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_given_for_the_right_ticket_only() {
    let world = World::new(seed("chunks", 70), 2).await;
    let (mine, foreign) = (world.project, ProjectId::generate());
    let (name, other) = (ChunkName([1; 32]), ChunkName([2; 32]));
    let content = Bytes::from(vec![9; 700_000]);
    let chunks = &world.controller.as_ref().unwrap().chunks;
    chunks.put(ObjectKey::chunk(mine, &name), content.clone()).await.unwrap();
    chunks.put(ObjectKey::chunk(foreign, &other), content.clone()).await.unwrap();

    let folder = world.folder.path().to_owned();
    let keys = tokio::task::spawn_blocking(move || Keys::open_or_make(&folder).unwrap()).await.unwrap();
    let (seat, neighbour) = (world.hosts[0].seat.clone(), world.hosts[1].seat.clone());
    let stream = seat.dial(tls::ALPN_DATA).await.unwrap();
    let controller = tls::fingerprint(&stream.get_ref().1.peer_certificates().unwrap()[0]);
    let good = Ticket {
        version: Ticket::VERSION,
        operation: Some(OperationId::generate()),
        project: mine,
        guest: None,
        epoch: Epoch(1),
        source: Party { host: None, certificate_sha256: controller },
        destination: Party { host: Some(seat.host), certificate_sha256: tls::fingerprint(&seat.identity.chain[0]) },
        volumes: Vec::new(),
        expires_at_ms: unix_ms() + 600_000,
    };
    let sign = |ticket: &Ticket| keys.tickets.0.sign(ticket);
    let channel = Channel::Chunks { project: mine };

    let dial = Arc::new(ByTicket { seat: seat.clone(), ticket: sign(&good), project: mine });
    let client = ChunkClient::new(dial, mine);
    assert_eq!(client.sealed(name).await.unwrap(), content);
    // Not there, and another project's: a name does not fetch what the project did not store.
    assert!(matches!(client.sealed(other).await, Err(StoreError::NotFound { .. })));
    let dial = Arc::new(ByTicket { seat: seat.clone(), ticket: sign(&good), project: mine });
    let thief = ChunkClient::new(dial, foreign);
    assert!(matches!(thief.sealed(other).await, Err(StoreError::Unreachable { .. })));

    // The same ticket in other hands, for something else, too late, or not ours.
    assert!(open(&neighbour, &sign(&good), channel.clone()).await.is_err());
    assert!(open(&seat, &sign(&good), Channel::Chunks { project: foreign }).await.is_err());
    for channel in [Channel::Control, Channel::Memory, Channel::Volume { volume: VolumeId::generate() }] {
        assert!(open(&seat, &sign(&good), channel).await.is_err());
    }
    let changed = |change: &dyn Fn(&mut Ticket)| {
        let mut ticket = good.clone();
        change(&mut ticket);
        ticket
    };
    let wrong = [
        changed(&|ticket| ticket.project = foreign),
        changed(&|ticket| ticket.expires_at_ms = unix_ms()),
        changed(&|ticket| ticket.destination.host = Some(neighbour.host)),
        changed(&|ticket| ticket.source.host = Some(neighbour.host)),
        changed(&|ticket| ticket.source.certificate_sha256 = "00".repeat(32)),
        changed(&|ticket| ticket.destination.certificate_sha256 = tls::fingerprint(&neighbour.identity.chain[0])),
        changed(&|ticket| ticket.version = 9),
    ];
    for ticket in wrong {
        assert!(open(&seat, &sign(&ticket), channel.clone()).await.is_err(), "{ticket:?}");
    }
    let stranger = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
    for text in [stranger.sign(&good), String::new(), ".".into(), "x".repeat(100_000)] {
        assert!(open(&seat, &text, channel.clone()).await.is_err());
    }
    // A host that was removed has a certificate and a ticket, and gets nothing.
    assert!(open(&seat, &sign(&good), channel.clone()).await.is_ok());
    world.remove_host(0).await;
    assert!(open(&seat, &sign(&good), channel).await.is_err());
}
