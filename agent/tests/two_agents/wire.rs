//! Peers that do not keep to the rules, and links that break under a question.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rand::{Rng as _, SeedableRng as _};
use supercloud_agent::{
    identity::{Identity, Request},
    link::{self, Facts, LinkEvent, QueryError},
};
use supercloud_api::{
    Room,
    data::{self, Channel, Open, Opened, kind},
    frame::{Frame, MAX_PAYLOAD_BYTES, read_frame, write_frame},
    ids::{CloudId, Epoch, GuestId, HostId, OperationId, ProjectId, VolumeId},
    link::{Answer, Hello, Notice, Query},
    ticket::{Party, Signer, Ticket},
    tls, unix_ms,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    controller::{Controller, HostInfo},
    lab::Lab,
};

/// A data connection to a host, with the certificate of another.
async fn dial(identity: &Identity, to: HostId, address: SocketAddr) -> TlsStream<TcpStream> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let config = identity.material().unwrap().dial;
    TlsConnector::from(config).connect(tls::host_server_name(to), tcp).await.unwrap()
}

/// Sends one frame; the answer, if one comes.
async fn say(identity: &Identity, to: HostId, address: SocketAddr, frame: &[u8]) -> Option<Opened> {
    let mut stream = dial(identity, to, address).await;
    stream.write_all(frame).await.ok()?;
    let answer = tokio::time::timeout(Duration::from_secs(30), read_frame(&mut stream)).await;
    answer.expect("the agent closes what it does not understand").ok()?.parse_json(kind::OPENED, data::VERSION).ok()
}

async fn wire(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_frame(&mut bytes, frame).await.unwrap();
    bytes
}

async fn open(ticket: String, channel: Channel) -> Vec<u8> {
    wire(&Frame::json(kind::OPEN, data::VERSION, &Open { ticket, channel }).unwrap()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_nonsense_do_not_disturb_the_data_plane() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let (victim, address) = (lab.hosts[0].id, lab.hosts[0].data_address());
    let stranger = lab.controller.join(HostId::generate());
    let mine = stranger.material().unwrap().fingerprint;

    // Not TLS at all, and silence: more of it than one address may have at once.
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    drop(silent);
    let mut raw = TcpStream::connect(address).await.unwrap();
    raw.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    // TLS without a certificate: with TLS 1.3 the client learns of it when it reads.
    let bare = rustls::ClientConfig::builder().with_root_certificates(tls::roots(&lab.controller.ca()).unwrap());
    let mut bare = bare.with_no_client_auth();
    bare.alpn_protocols = vec![tls::ALPN_DATA.to_vec()];
    let tcp = TcpStream::connect(address).await.unwrap();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(bare)).connect(tls::host_server_name(victim), tcp).await {
        assert!(read_frame(&mut stream).await.is_err());
    }

    // A host of ours that has no business here.
    let party = |host, certificate: &str| Party { host: Some(host), certificate_sha256: certificate.to_owned() };
    let ticket = Ticket {
        version: Ticket::VERSION,
        operation: Some(OperationId::generate()),
        project: ProjectId::generate(),
        guest: Some(guest),
        epoch: Epoch(1),
        source: party(victim, &lab.hosts[0].fingerprint()),
        destination: party(stranger.host, &mine),
        volumes: vec![VolumeId::generate()],
        expires_at_ms: unix_ms() + 60_000,
    };
    let refused = async |ticket: String, channel: Channel| {
        let frame = open(ticket, channel).await;
        say(&stranger, victim, address, &frame).await.expect("an answer").error.expect("a refusal").detail
    };
    let other = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
    assert!(refused("nonsense".into(), Channel::Control).await.contains("malformed"));
    assert!(refused(other.sign(&ticket), Channel::Control).await.contains("signature"));
    let expired = Ticket { expires_at_ms: unix_ms() - 1, ..ticket.clone() };
    assert!(refused(lab.controller.sign(&expired), Channel::Control).await.contains("expired"));
    let foreign = Ticket { destination: party(lab.hosts[1].id, &lab.hosts[1].fingerprint()), ..ticket.clone() };
    assert!(refused(lab.controller.sign(&foreign), Channel::Control).await.contains("other parties"));
    let volume = Channel::Volume { volume: VolumeId::generate() };
    assert!(refused(lab.controller.sign(&ticket), volume).await.contains("volume"));
    // Signed and bound to this very certificate, but for what is not under way here: another epoch, no operation, no guest.
    let late = Ticket { epoch: Epoch(9), ..ticket.clone() };
    assert!(refused(lab.controller.sign(&late), Channel::Control).await.contains("epoch"));
    assert!(refused(lab.controller.sign(&ticket), Channel::Memory).await.contains("take part"));
    let unknown = Ticket { guest: Some(GuestId::generate()), ..ticket.clone() };
    assert!(refused(lab.controller.sign(&unknown), Channel::Control).await.contains("nothing is here"));

    // Frames that are none.
    for header in [[0_u8; 8], [1, 0, 1, 0, 0xff, 0xff, 0xff, 0xff], [9, 0, 1, 0, 0, 0, 0, 0], [1, 0, 7, 0, 0, 0, 0, 0]]
    {
        assert!(say(&stranger, victim, address, &header).await.is_none(), "{header:?}");
    }
    let huge = wire(&Frame { kind: kind::OPEN, version: 1, payload: vec![b'x'; MAX_PAYLOAD_BYTES] }).await;
    assert!(say(&stranger, victim, address, &huge).await.is_none());
    let seed = 0x5eed_a902;
    println!("seed {seed:#x}");
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let good = open(lab.controller.sign(&ticket), Channel::Control).await;
    for _ in 0..100 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..8) {
            // Not the length: a frame that is promised and does not come is waited for, up to the deadline.
            let at = rng.random_range(8..bytes.len());
            bytes[at] = rng.random();
        }
        let opened = say(&stranger, victim, address, &bytes).await;
        assert!(opened.is_none_or(|opened| opened.error.is_some()));
    }
    drop(raw);

    lab.check(guest).await;
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
}

struct Nothing(HostId);

impl Facts for Nothing {
    fn hello(&self) -> Hello {
        Hello {
            host: self.0,
            agent_version: "test".into(),
            data_address: None,
            overlay_address: None,
            overlay_encryption: None,
            capacity: Room::default(),
            compat_classes: Vec::new(),
            probe: serde_json::Value::Null,
            guests: Vec::new(),
            volumes: Vec::new(),
            view_revision: 0,
            takes_sweeps: false,
            takes_consoles: false,
            knows_predictive: false,
            takes_checks: false,
            takes_points: false,
            takes_checkpoints: false,
            moves_none_live: false,
            takes_mirrors: false,
            takes_post_copy: false,
            takes_lazy_thaw: false,
            takes_holds: false,
            measures_paths: false,
            tells_flows: false,
            takes_leases: false,
        }
    }

    fn heartbeat(&self) -> Notice {
        Notice::Heartbeat { used: Room::default(), guests: Vec::new(), view_revision: 0, announced: None }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_is_answered_although_the_link_breaks_under_it() {
    let controller = Controller::begin().await;
    let host = HostId::generate();
    let identity = controller.join(host);
    controller.add_host(HostInfo {
        id: host,
        name: "one".into(),
        data_address: None,
        certificate_sha256: identity.material().unwrap().fingerprint,
        cloud: CloudId::generate(),
    });
    let (handle, queues) = link::channel();
    let (_identity, identities) = watch::channel(Arc::new(identity));
    let (events, mut happened) = mpsc::channel(16);
    let cancel = CancellationToken::new();
    let run = link::run(Arc::new(Nothing(host)), identities, queues, events, cancel.clone());
    let _run = AbortOnDropHandle::new(tokio::spawn(run));
    controller.lose_queries(2);
    let request = Request::make(host).unwrap();
    let renew = Query::RenewCertificate { csr_pem: request.csr_pem.clone() };
    let answer = handle.query(renew, Duration::from_secs(60)).await.unwrap();
    assert!(matches!(answer, Answer::Certificate { .. }), "{answer:?}");
    let (mut ups, mut downs) = (0, 0);
    while let Ok(event) = happened.try_recv() {
        match event {
            LinkEvent::Up(_) => ups += 1,
            LinkEvent::Down => downs += 1,
            LinkEvent::Directive(_) | LinkEvent::Removed(_) => {}
        }
    }
    assert_eq!((ups, downs), (3, 2), "the link broke twice");
    // A refusal is an answer; no answer in time is an error.
    let token = Query::GuestToken { guest: GuestId::generate(), epoch: Epoch(1) };
    let refused = handle.query(token.clone(), Duration::from_secs(60)).await;
    assert!(matches!(refused, Err(QueryError::Refused(_))), "{refused:?}");
    controller.cut(host);
    let unanswered = handle.query(token, Duration::from_millis(300)).await;
    assert!(matches!(unanswered, Err(QueryError::Deadline)), "{unanswered:?}");
}
