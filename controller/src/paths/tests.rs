use super::*;

fn spot(cloud: CloudId, at: u16) -> Spot {
    let address = Some(SocketAddr::from(([192, 0, 2, 1], 1000 + at)));
    Spot { host: HostId::generate(), cloud, address, is_connected: true }
}

#[test]
fn few_hosts_all_measure_each_other() {
    let clouds = [CloudId::generate(), CloudId::generate()];
    let mut spots: Vec<Spot> = (0..5).map(|at| spot(clouds[usize::from(at % 2)], at)).collect();
    spots[4].address = None;
    for me in &spots {
        let peers: Vec<HostId> = peers_of(me.host, &spots, 64).iter().map(|peer| peer.host).collect();
        let mut wanted: Vec<HostId> = spots[..4].iter().map(|spot| spot.host).filter(|h| *h != me.host).collect();
        wanted.sort_unstable();
        assert_eq!(peers, wanted, "all that can be dialled, and not itself");
    }
}

#[test]
fn of_many_each_cloud_has_its_turn_and_everybody_is_measured_by_somebody() {
    let clouds: Vec<CloudId> = (0..10).map(|_| CloudId::generate()).collect();
    let mut spots: Vec<Spot> = (0..400_u16).map(|at| spot(clouds[usize::from(at % 10)], at)).collect();
    for away in spots.iter_mut().step_by(7) {
        away.is_connected = false;
    }
    let cloud_of: HashMap<HostId, CloudId> = spots.iter().map(|spot| (spot.host, spot.cloud)).collect();
    let away: HashSet<HostId> = spots.iter().filter(|spot| !spot.is_connected).map(|spot| spot.host).collect();
    let mut measured_by: HashMap<HostId, usize> = HashMap::new();
    for me in &spots {
        let peers = peers_of(me.host, &spots, 20);
        assert_eq!(peers, peers_of(me.host, &spots, 20), "the same at every look");
        for cloud in &clouds {
            let count = peers.iter().filter(|peer| cloud_of[&peer.host] == *cloud).count();
            assert_eq!(count, 2, "two of each cloud");
        }
        for peer in peers {
            assert!(!away.contains(&peer.host), "who is there is asked first");
            *measured_by.entry(peer.host).or_default() += 1;
        }
    }
    let most = measured_by.values().max().copied().unwrap();
    assert_eq!(measured_by.len(), spots.len() - away.len());
    assert!(most < 80, "by 20 on average, not all by the same: {most}");
    // One host more changes few choices.
    let before: Vec<_> = spots.iter().map(|me| peers_of(me.host, &spots, 20)).collect();
    let mut more = spots.clone();
    more.push(spot(clouds[0], 999));
    let is_same = |(me, before): (&Spot, &Vec<PathPeer>)| peers_of(me.host, &more, 20) == *before;
    assert!(spots.iter().zip(&before).filter(|pair| is_same(*pair)).count() > 300);
}

fn host(name: &str) -> Host {
    let room = serde_json::json!({"vcpus": 1, "memory_bytes": 1, "disk_bytes": 1});
    serde_json::from_value(serde_json::json!({
        "id": HostId::generate(), "name": name, "cloud": CloudId::generate(), "cloud_name": "c", "state": "up",
        "data_address": null, "overlay_address": null, "overlay_index": 1, "capacity": room, "used": room,
        "compat_classes": [], "probe": {}, "agent_version": "", "certificate_sha256": "", "last_seen_ms": 0,
        "created_at_ms": 0,
    }))
    .unwrap()
}

fn end(host: &Host, away: HostId) -> (HostId, End<'_>) {
    (host.id, End { host, is_connected: host.id != away })
}

#[test]
fn what_is_told_is_shown_while_it_is_fresh_and_only_what_was_asked_for() {
    let hosts = [host("a"), host("b"), host("c")];
    let [a, b, c] = [hosts[0].id, hosts[1].id, hosts[2].id];
    let board = PathBoard::default();
    let all = |now_ms| board.page(&hosts.iter().map(|host| end(host, c)).collect(), Which::default(), now_ms).0;
    let address = SocketAddr::from(([192, 0, 2, 1], 1));
    let peer = |host| PathPeer { host, address };
    board.board().peers = [(a, vec![peer(b), peer(c)]), (b, vec![peer(a)]), (c, vec![peer(a)])].into();
    board.note_capable(a, true);
    let path = PathMeasured {
        to: b,
        probes: 24,
        answered: 24,
        misses: 0,
        is_refused: false,
        sent: 25,
        resent: 1,
        rtt_us: Some(900),
        rtt_least_us: Some(700),
        answered_at_ms: Some(5),
    };
    let silent = PathMeasured { to: c, probes: 9, answered: 7, misses: 2, sent: 13, resent: 6, ..path };
    let unasked = PathMeasured { to: HostId::generate(), ..path };
    board.told(a, vec![path, silent, unasked], 1000);
    board.told(HostId::generate(), vec![path], 1000);
    let links = all(2000);
    let find = |from, to| links.iter().find(|link| (link.from, link.to) == (from, to)).unwrap();
    assert_eq!(links.len(), 4);
    let there = find(a, b);
    assert_eq!((there.state, there.rtt_us, there.loss), (LinkState::Answers, Some(900), Some(0.04)));
    assert_eq!((there.told_at_ms, there.answered_at_ms), (Some(1000), Some(5)));
    let away = find(a, c);
    assert_eq!((away.state, away.loss), (LinkState::Silent, None), "too few packets for a share");
    assert_eq!(away.why.as_deref(), Some("no answer to the last 2 probes"));
    let why = |link: &Link| link.why.clone().unwrap();
    assert_eq!(find(b, a).state, LinkState::NotMeasured);
    assert!(why(find(b, a)).contains("version") && why(find(c, a)).contains("not connected"));
    // Once is chance; a machine that refuses is there.
    board.told(a, vec![PathMeasured { misses: 1, ..path }, PathMeasured { is_refused: true, ..silent }], 3000);
    let links = all(3000);
    assert!(links.iter().any(|link| link.to == b && link.state == LinkState::Answers));
    assert!(links.iter().any(|link| link.to == c && link.why.as_ref().unwrap().contains("no agent")));
    // Nonsense is not shown as such.
    board.told(a, vec![PathMeasured { sent: 30, resent: 90, answered: 99, ..path }], 3000);
    let links = all(3000);
    let odd = links.iter().find(|link| link.to == b && link.from == a).unwrap();
    assert_eq!((odd.loss, odd.answered, odd.probes), (Some(1.0), 24, 24));
    assert!(all(3000 + FRESH_MS + 1).iter().all(|link| link.state == LinkState::NotMeasured));
    board.host_gone(a);
    assert!(all(3000).iter().all(|link| link.state == LinkState::NotMeasured));
    assert!(
        board.page(&hosts[..1].iter().map(|host| end(host, c)).collect(), Which::default(), 3000).0.is_empty(),
        "hosts that were removed are not shown"
    );
}

/// A fleet of `count` hosts in two clouds that all measure each other; `path` for each way.
fn fleet(count: usize, path: impl Fn(usize, usize) -> PathMeasured) -> (PathBoard, Vec<Host>) {
    let mut hosts: Vec<Host> = (0..count).map(|at| host(&format!("h{at}"))).collect();
    hosts.sort_by_key(|host| host.id);
    for (at, host) in hosts.iter_mut().enumerate() {
        host.cloud_name = if at % 2 == 0 { "east" } else { "west" }.parse().unwrap();
    }
    let board = PathBoard::default();
    let address = SocketAddr::from(([192, 0, 2, 1], 1));
    let ids: Vec<HostId> = hosts.iter().map(|host| host.id).collect();
    let others = |me: HostId| ids.iter().filter(move |host| **host != me);
    let peers = |me| others(me).map(|host| PathPeer { host: *host, address }).collect();
    board.board().peers = ids.iter().map(|me| (*me, peers(*me))).collect();
    for (from, me) in ids.iter().enumerate() {
        let paths = ids.iter().enumerate().filter(|(_, to)| *to != me);
        board.told(*me, paths.map(|(at, to)| PathMeasured { to: *to, ..path(from, at) }).collect(), 1);
    }
    (board, hosts)
}

fn good() -> PathMeasured {
    PathMeasured {
        to: HostId::generate(),
        probes: 24,
        answered: 24,
        misses: 0,
        is_refused: false,
        sent: 24,
        resent: 0,
        rtt_us: Some(900),
        rtt_least_us: Some(700),
        answered_at_ms: Some(5),
    }
}

#[test]
fn pages_hold_every_way_once_and_those_of_one_host_alone() {
    let (board, hosts) = fleet(5, |_, _| good());
    let known = hosts.iter().map(|host| (host.id, End { host, is_connected: true })).collect();
    let pair = |link: &Link| (link.from, link.to);
    let walk = |only, limit| {
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let (found, is_more) = board.page(&known, Which { only, after, limit }, 2);
            assert!(found.len() <= limit && (found.len() == limit || !is_more));
            seen.extend(found.iter().map(pair));
            after = seen.last().copied();
            if !is_more {
                return seen;
            }
        }
    };
    for limit in [1, 3, 4, 20, 100] {
        let all = walk(None, limit);
        assert_eq!(all.len(), 20, "limit {limit}");
        assert!(all.is_sorted() && all.windows(2).all(|two| two[0] != two[1]));
        let own = walk(Some(hosts[2].id), limit);
        assert_eq!(own, all.into_iter().filter(|(a, b)| [*a, *b].contains(&hosts[2].id)).collect::<Vec<_>>());
        assert_eq!(own.len(), 8);
    }
}

#[test]
fn totals_count_what_is_lost_but_not_hosts_that_are_away() {
    let dead = PathMeasured { answered: 0, misses: 24, sent: 72, resent: 72, rtt_us: None, ..good() };
    // All that leads to host 1 is silent.
    let (board, hosts) = fleet(4, |_, to| if to == 1 { dead } else { good() });
    let totals = |away: Option<usize>| {
        let ends = hosts.iter().enumerate();
        let known = ends.map(|(at, host)| (host.id, End { host, is_connected: away != Some(at) })).collect();
        board.totals(&known, 2)
    };
    let key = |from: &str, to: &str| (from.to_owned(), to.to_owned());
    let broken = totals(None);
    assert_eq!((broken.answer, broken.silent, broken.broken, broken.not_measured), (9, 3, 3, 0));
    let to_west = &broken.between[&key("east", "west")];
    // From two hosts in the east to two in the west: half of the ways answer.
    assert_eq!((to_west.rtt_us(), to_west.loss_ppm()), (Some(900), Some(144 * 1_000_000 / 192)));
    assert_eq!(broken.between[&key("west", "east")].loss_ppm(), Some(0));
    let away = totals(Some(1));
    assert_eq!((away.silent, away.broken), (3, 0));
    assert_eq!(away.between[&key("east", "west")].loss_ppm(), Some(0));
    let (few, hosts) = fleet(2, |_, _| PathMeasured { sent: 9, resent: 1, ..good() });
    let known = hosts.iter().map(|host| (host.id, End { host, is_connected: true })).collect();
    assert_eq!(few.totals(&known, 2).between[&key("east", "west")].loss_ppm(), None, "few packets are no share");
}
