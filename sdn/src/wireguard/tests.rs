use super::*;
use crate::view::HostView;

const KEYS: [&str; 3] = [
    "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=",
    "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=",
    "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=",
];

fn config(endpoint: Option<&str>) -> WireguardConfig {
    WireguardConfig {
        interface: INTERFACE.into(),
        listen_port: 51_820,
        private_key: "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=".parse().unwrap(),
        endpoint: endpoint.map(|at| at.parse().unwrap()),
    }
}

fn end(key: usize, endpoint: Option<&str>) -> End {
    End { public_key: KEYS[key].parse().unwrap(), endpoint: endpoint.map(|at| at.parse().unwrap()) }
}

fn host(index: u8, encryption: Option<End>) -> HostView {
    let overlay_addr = Ipv4Addr::new(10, 99, 0, index);
    HostView { host: HostId::generate(), overlay_addr, index: index.into(), encryption }
}

#[test]
fn each_peer_may_use_its_own_address_only() {
    let peers = [
        Peer { overlay_addr: "10.99.0.2".parse().unwrap(), end: end(1, Some("[2001:db8::7]:51821")) },
        Peer { overlay_addr: "10.99.0.1".parse().unwrap(), end: end(0, Some("203.0.113.7:51820")) },
        Peer { overlay_addr: "10.99.0.3".parse().unwrap(), end: end(2, None) },
    ];
    let expected = "[Interface]
PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=
ListenPort = 51820

[Peer]
PublicKey = HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
AllowedIPs = 10.99.0.1/32
Endpoint = 203.0.113.7:51820

[Peer]
PublicKey = TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0=
AllowedIPs = 10.99.0.3/32

[Peer]
PublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=
AllowedIPs = 10.99.0.2/32
Endpoint = [2001:db8::7]:51821
";
    assert_eq!(settings(&config(Some("203.0.113.9:51820")), &peers), expected);
    // Who cannot be dialled speaks before it is forgotten, to those who can.
    let behind_nat = settings(&config(None), &peers);
    assert_eq!(behind_nat.matches("PersistentKeepalive = 25").count(), 2);
}

#[test]
fn nothing_goes_to_a_host_of_the_other_kind() {
    let (own, plain, secret) = (host(1, Some(end(0, None))), host(2, None), host(3, Some(end(2, None))));
    let view = |hosts: &[&HostView]| OverlayView {
        hosts: hosts.iter().map(|host| (*host).clone()).collect(),
        ..OverlayView::default()
    };
    let found = peers(&view(&[&own, &secret]), own.host, true).unwrap();
    assert_eq!(found, [Peer { overlay_addr: secret.overlay_addr, end: end(2, None) }]);
    assert_eq!(peers(&view(&[&own, &plain]), own.host, true), Err(PeersError::Plain(plain.host)));
    assert_eq!(peers(&view(&[&own, &secret]), own.host, false), Err(PeersError::Encrypted(secret.host)));
    assert_eq!(peers(&view(&[&own, &plain]), own.host, false), Ok(vec![]));
}

#[test]
fn routes_are_made_before_and_removed_after() {
    let peer = |last| Peer { overlay_addr: Ipv4Addr::new(10, 99, 0, last), end: end(0, None) };
    let have = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 9)].into();
    let (made, removed) = routes("sc-wg", &have, &[peer(1), peer(2)]);
    assert_eq!(made, "route replace 10.99.0.2/32 dev sc-wg table 47890\n");
    assert_eq!(removed, "route delete 10.99.0.9/32 dev sc-wg table 47890\n");
    let (made, removed) = routes("sc-wg", &have, &[peer(1), peer(9)]);
    assert_eq!((made.as_str(), removed.as_str()), ("", ""));
}

#[test]
fn an_endpoint_is_an_address_of_a_machine() {
    assert!(end(0, None).is_usable());
    assert!(end(0, Some("203.0.113.7:51820")).is_usable());
    for bad in [
        "0.0.0.0:1",
        "203.0.113.7:0",
        "127.0.0.1:5",
        "224.0.0.1:5",
        "255.255.255.255:5",
        "[::]:5",
        "[ff02::1]:5",
        "[::ffff:127.0.0.1]:5",
        "203.0.113.7:4789",
    ] {
        assert!(!end(0, Some(bad)).is_usable(), "{bad}");
    }
}

#[test]
fn an_endpoint_inside_the_overlay_is_refused() {
    let view = |endpoint| OverlayView {
        hosts: vec![host(1, Some(end(0, None))), host(2, Some(end(1, Some(endpoint))))],
        ..OverlayView::default()
    };
    assert!(view("10.99.0.3:51820").check().is_ok());
    for inside in ["10.99.0.1:51820", "10.99.0.2:51820", "[::ffff:10.99.0.1]:51820"] {
        assert!(view(inside).check().is_err(), "{inside}");
    }
    let mut twice = view("10.99.0.3:51820");
    twice.hosts[1].encryption = twice.hosts[0].encryption;
    assert!(twice.check().is_err(), "one key, two hosts");
}
