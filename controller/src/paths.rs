//! Ways between hosts: who measures which, and what agents told of it last. Nothing of it is durable: it is measured anew.
//!
//! Each connected agent that can is told whom to measure: all others that can be dialled where they are few, else one of each cloud,
//! then a second one of each, and so on, [`MAX_PATH_PEERS`] in all. Which ones is decided by a hash of both names, so that every
//! host is measured by about as many and a change of the fleet changes few of the choices.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Host, HostState, Link, LinkState,
    ids::{CloudId, HostId},
    link::{Directive, MAX_PATH_PEERS, PathMeasured, PathPeer},
    unix_ms,
};

use crate::{
    app::Parts,
    chain,
    state::{HostRecord, State, StateError},
};

/// Whether somebody has to be told anew is looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What was told longer ago than this is not shown: agents tell every ten seconds.
const FRESH_MS: u64 = 45_000;
/// So many probes without an answer, one after the other, are no chance.
const MISSES: u16 = 2;
/// Below so many packets a share of lost ones says nothing.
const LOSS_FROM: u32 = 20;

/// A host, as far as the choice of peers needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spot {
    host: HostId,
    cloud: CloudId,
    address: Option<SocketAddr>,
    is_connected: bool,
}

/// What decides between two that are as good as each other; the same for the pair at every look.
fn order<T: std::hash::Hash>(me: HostId, other: T) -> u64 {
    let mut hasher = DefaultHasher::new();
    (me, other).hash(&mut hasher);
    hasher.finish()
}

/// Whom a host is to measure, at most `most`.
fn peers_of(me: HostId, spots: &[Spot], most: usize) -> Vec<PathPeer> {
    let mut by_cloud: BTreeMap<CloudId, Vec<(&Spot, SocketAddr)>> = BTreeMap::new();
    for spot in spots.iter().filter(|spot| spot.host != me) {
        if let Some(address) = spot.address {
            by_cloud.entry(spot.cloud).or_default().push((spot, address));
        }
    }
    let mut ranked = Vec::new();
    for (cloud, mut own) in by_cloud {
        own.sort_by_key(|(spot, _)| (!spot.is_connected, order(me, spot.host)));
        let ranks = own.into_iter().enumerate();
        ranked.extend(ranks.map(|(rank, (spot, address))| (rank, order(me, cloud), spot.host, address)));
    }
    ranked.sort_unstable_by_key(|(rank, cloud, host, _)| (*rank, *cloud, *host));
    let mut peers: Vec<PathPeer> =
        ranked.into_iter().take(most).map(|(_, _, host, address)| PathPeer { host, address }).collect();
    peers.sort_unstable_by_key(|peer| peer.host);
    peers
}

#[derive(Debug, Default)]
struct Board {
    /// Hosts whose connected agents measure.
    capable: HashSet<HostId>,
    /// For each host, also those that cannot measure: what it would be told.
    peers: BTreeMap<HostId, Vec<PathPeer>>,
    /// What they told last, and when.
    told: HashMap<HostId, (u64, HashMap<HostId, PathMeasured>)>,
}

/// What is known of the ways between hosts. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct PathBoard(Arc<Mutex<Board>>);

impl PathBoard {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a host said of itself when it came.
    pub(crate) fn note_capable(&self, host: HostId, measures: bool) {
        let mut board = self.board();
        match measures {
            true => board.capable.insert(host),
            false => board.capable.remove(&host),
        };
    }

    /// A host is away: what it measured does not count any more.
    pub(crate) fn host_gone(&self, host: HostId) {
        let mut board = self.board();
        board.capable.remove(&host);
        board.told.remove(&host);
    }

    /// A host tells what it measured, at `now_ms`; of hosts that it was not asked for it tells nothing.
    pub(crate) fn told(&self, host: HostId, paths: Vec<PathMeasured>, now_ms: u64) {
        let mut board = self.board();
        let Some(peers) = board.peers.get(&host) else { return };
        let asked: HashSet<HostId> = peers.iter().map(|peer| peer.host).collect();
        let paths = paths.into_iter().filter(|path| asked.contains(&path.to)).map(|path| (path.to, path)).collect();
        board.told.insert(host, (now_ms, paths));
    }

    /// The ways that are measured, or would be, between these hosts, at `now_ms`; in the order of their ids.
    #[must_use]
    pub fn links(&self, hosts: &[Host], now_ms: u64) -> Vec<Link> {
        let known: HashMap<HostId, &Host> = hosts.iter().map(|host| (host.id, host)).collect();
        let board = self.board();
        let mut links = Vec::new();
        for (from, peers) in &board.peers {
            let Some(from) = known.get(from) else { continue };
            let is_capable = board.capable.contains(&from.id);
            let told = board.told.get(&from.id).filter(|(at_ms, _)| now_ms.saturating_sub(*at_ms) <= FRESH_MS);
            for to in peers.iter().filter_map(|peer| known.get(&peer.host)) {
                let path = told.and_then(|(at_ms, paths)| Some((*at_ms, paths.get(&to.id)?)));
                links.push(link(from, to, is_capable, path));
            }
        }
        links
    }
}

/// Why nobody has measured the ways from a host.
fn not_measured(from: &Host, is_capable: bool) -> String {
    let is_away = matches!(from.state, HostState::Unreachable | HostState::Removed);
    match (is_away, is_capable) {
        (true, _) => format!("{} is not connected", from.name),
        (false, false) => format!("the agent of {} is of a version that measures nothing", from.name),
        (false, true) => format!("{} has told nothing of it lately", from.name),
    }
}

fn link(from: &Host, to: &Host, is_capable: bool, told: Option<(u64, &PathMeasured)>) -> Link {
    let path = told.map(|(_, path)| path).filter(|path| path.probes > 0);
    let (state, why) = match path {
        None => (LinkState::NotMeasured, Some(not_measured(from, is_capable))),
        Some(path) if path.answered == 0 || path.misses >= MISSES => {
            let last = format!("the last {} probes", path.misses);
            let last = if path.misses == 1 { "the last probe".to_owned() } else { last };
            let why = match path.is_refused {
                true => format!("the machine is there, but no agent takes connections there ({last})"),
                false => format!("no answer to {last}"),
            };
            (LinkState::Silent, Some(why))
        }
        Some(_) => (LinkState::Answers, None),
    };
    // What cannot be is not shown: an agent may tell anything.
    let (sent, resent) = path.map_or((0, 0), |path| (path.sent, path.resent.min(path.sent)));
    Link {
        from: from.id,
        from_name: from.name.clone(),
        from_cloud: from.cloud,
        from_cloud_name: from.cloud_name.clone(),
        to: to.id,
        to_name: to.name.clone(),
        to_cloud: to.cloud,
        to_cloud_name: to.cloud_name.clone(),
        state,
        why,
        rtt_us: path.and_then(|path| path.rtt_us),
        rtt_least_us: path.and_then(|path| path.rtt_least_us),
        loss: (sent >= LOSS_FROM).then(|| f64::from(resent) / f64::from(sent)),
        probes: path.map_or(0, |path| path.probes.into()),
        answered: path.map_or(0, |path| path.answered.min(path.probes).into()),
        sent,
        resent,
        answered_at_ms: path.and_then(|path| path.answered_at_ms),
        told_at_ms: path.and(told).map(|(at_ms, _)| at_ms),
    }
}

/// The ways that are measured now, between hosts that were not removed.
///
/// # Errors
/// When the records cannot be read.
pub async fn links(parts: &Parts) -> Result<Vec<Link>, StateError> {
    let hosts = parts.state.list::<HostRecord>().await?;
    let shown: Vec<Host> = hosts.iter().filter(|host| !host.is_removed).map(|host| host.view(&parts.hosts)).collect();
    Ok(parts.paths.links(&shown, unix_ms()))
}

async fn spots(state: &State, parts: &Parts) -> Result<Vec<Spot>, StateError> {
    let hosts = state.list::<HostRecord>().await?;
    let spot = |record: &HostRecord| Spot {
        host: record.host.id,
        cloud: record.host.cloud,
        address: record.host.data_address,
        is_connected: parts.hosts.get(record.host.id).is_some(),
    };
    Ok(hosts.iter().filter(|record| !record.is_removed).map(|record| spot(record)).collect())
}

/// Tells agents whom to measure, whenever that changes, for ever.
pub async fn path_teller(parts: Parts) {
    let mut last = Vec::new();
    // By host: the session in which it was told, and what.
    let mut told: HashMap<HostId, (u64, Vec<PathPeer>)> = HashMap::new();
    loop {
        match spots(&parts.state, &parts).await {
            Ok(spots) => {
                if spots != last {
                    let peers = spots.iter().map(|spot| (spot.host, peers_of(spot.host, &spots, MAX_PATH_PEERS)));
                    let peers = peers.collect();
                    parts.paths.board().peers = peers;
                    last = spots;
                }
                tell(&parts, &mut told);
            }
            Err(error) => tracing::warn!("who is to measure whom cannot be told now: {}", chain(&error)),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn tell(parts: &Parts, told: &mut HashMap<HostId, (u64, Vec<PathPeer>)>) {
    let open: HashMap<HostId, u64> = parts.sessions.hosts().into_iter().collect();
    told.retain(|host, (serial, _)| open.get(host) == Some(serial));
    for (host, serial) in open {
        let peers = {
            let board = parts.paths.board();
            board.peers.get(&host).filter(|_| board.capable.contains(&host)).cloned()
        };
        let Some(peers) = peers else { continue };
        if told.get(&host).is_some_and(|(_, before)| *before == peers) {
            continue;
        }
        if parts.sessions.send(host, Directive::MeasurePaths { peers: peers.clone() }) {
            told.insert(host, (serial, peers));
        }
    }
}

#[cfg(test)]
mod tests {
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

    fn host(name: &str, state: HostState) -> Host {
        let room = serde_json::json!({"vcpus": 1, "memory_bytes": 1, "disk_bytes": 1});
        serde_json::from_value(serde_json::json!({
            "id": HostId::generate(), "name": name, "cloud": CloudId::generate(), "cloud_name": "c", "state": state,
            "data_address": null, "overlay_address": null, "overlay_index": 1, "capacity": room, "used": room,
            "compat_classes": [], "probe": {}, "agent_version": "", "certificate_sha256": "", "last_seen_ms": 0,
            "created_at_ms": 0,
        }))
        .unwrap()
    }

    #[test]
    fn what_is_told_is_shown_while_it_is_fresh_and_only_what_was_asked_for() {
        let hosts = [host("a", HostState::Up), host("b", HostState::Up), host("c", HostState::Unreachable)];
        let [a, b, c] = [hosts[0].id, hosts[1].id, hosts[2].id];
        let board = PathBoard::default();
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
        let silent = PathMeasured { to: c, probes: 9, answered: 7, misses: 2, sent: 7, resent: 0, ..path };
        let unasked = PathMeasured { to: HostId::generate(), ..path };
        board.told(a, vec![path, silent, unasked], 1000);
        board.told(HostId::generate(), vec![path], 1000);
        let links = board.links(&hosts, 2000);
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
        let links = board.links(&hosts, 3000);
        assert!(links.iter().any(|link| link.to == b && link.state == LinkState::Answers));
        assert!(links.iter().any(|link| link.to == c && link.why.as_ref().unwrap().contains("no agent")));
        // Nonsense is not shown as such.
        board.told(a, vec![PathMeasured { sent: 30, resent: 90, answered: 99, ..path }], 3000);
        let links = board.links(&hosts, 3000);
        let odd = links.iter().find(|link| link.to == b && link.from == a).unwrap();
        assert_eq!((odd.loss, odd.answered, odd.probes), (Some(1.0), 24, 24));
        assert!(board.links(&hosts, 3000 + FRESH_MS + 1).iter().all(|link| link.state == LinkState::NotMeasured));
        board.host_gone(a);
        assert!(board.links(&hosts, 3000).iter().all(|link| link.state == LinkState::NotMeasured));
        assert!(board.links(&hosts[..1], 3000).is_empty(), "hosts that were removed are not shown");
    }
}
