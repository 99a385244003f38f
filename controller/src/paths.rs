//! Ways between hosts: who measures which, and what agents told of it last. Nothing of it is durable: it is measured anew.
//!
//! Each connected agent that can is told whom to measure: all others that can be dialled where they are few, else one of each cloud,
//! then a second one of each, and so on, [`MAX_PATH_PEERS`] in all. Which ones is decided by a hash of both names, so that every
//! host is measured by about as many and a change of the fleet changes few of the choices.

mod round_trips;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::SocketAddr,
    ops::{Bound, ControlFlow},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Host, Link, LinkState,
    ids::{CloudId, HostId},
    link::{Directive, MAX_PATH_PEERS, PathMeasured, PathPeer},
    unix_ms,
};

use crate::{
    app::Parts,
    chain,
    state::{HostRecord, State, StateError, Stored},
};

pub use round_trips::RoundTrips;

/// Whether somebody has to be told anew is looked at this often.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// What was told longer ago than this is not shown: agents tell every ten seconds.
const FRESH_MS: u64 = 45_000;
/// So many probes without an answer, one after the other, are no chance.
const MISSES: u16 = 2;
/// Below so many packets a share of lost ones says nothing.
const LOSS_FROM: u32 = 20;
/// Pairs of clouds that are told of by name; the rest would make more series than anybody reads.
const CLOUD_PAIRS_AT_MOST: usize = 400;

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
        own.sort_by_cached_key(|(spot, _)| (!spot.is_connected, order(me, spot.host)));
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

    /// The round-trip times of the ways that answer, between these hosts.
    #[must_use]
    pub fn round_trips(&self, hosts: &[Host], now_ms: u64) -> RoundTrips {
        let board = self.board();
        let fresh = board.told.iter().filter(|(_, (at_ms, _))| now_ms.saturating_sub(*at_ms) <= FRESH_MS);
        let ways = fresh.flat_map(|(from, (at_ms, paths))| {
            paths.values().filter_map(|path| {
                let seen = Seen { from: *from, to: path.to, is_capable: true, told: Some((*at_ms, *path)) };
                Some((*from, path.to, path.rtt_us.filter(|_| seen.state() == LinkState::Answers)?))
            })
        });
        RoundTrips::new(ways, hosts)
    }

    /// Shows each way that is measured, or would be, between `known` hosts, in the order of their ids, until `show` says that it
    /// is enough. The board is held meanwhile: only what is copied belongs in there.
    fn each(
        &self,
        known: &HashMap<HostId, End<'_>>,
        which: Which,
        now_ms: u64,
        mut show: impl FnMut(Seen) -> ControlFlow<()>,
    ) {
        let board = self.board();
        let from = which.after.map_or(Bound::Unbounded, |(from, _)| Bound::Included(from));
        for (from, peers) in board.peers.range((from, Bound::Unbounded)) {
            if !known.contains_key(from) {
                continue;
            }
            let is_capable = board.capable.contains(from);
            let told = board.told.get(from).filter(|(at_ms, _)| now_ms.saturating_sub(*at_ms) <= FRESH_MS);
            // Peers are in the order of their ids.
            let only = which.only.filter(|only| only != from);
            let found = only.map(|only| peers.binary_search_by_key(&only, |peer| peer.host));
            let peers = match found {
                None => &peers[..],
                Some(Ok(at)) => &peers[at..=at],
                Some(Err(_)) => continue,
            };
            for to in peers.iter().map(|peer| peer.host).filter(|to| known.contains_key(to)) {
                if which.after.is_some_and(|after| (*from, to) <= after) {
                    continue;
                }
                let told = told.and_then(|(at_ms, paths)| Some((*at_ms, *paths.get(&to)?)));
                if show(Seen { from: *from, to, is_capable, told }).is_break() {
                    return;
                }
            }
        }
    }

    /// Ways between these hosts, and whether there are more behind the last.
    fn page(&self, known: &HashMap<HostId, End<'_>>, which: Which, now_ms: u64) -> (Vec<Link>, bool) {
        let mut found = Vec::new();
        self.each(known, which, now_ms, |seen| {
            found.push(seen);
            if found.len() > which.limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let is_more = found.len() > which.limit;
        found.truncate(which.limit);
        let shown = |seen: &Seen| Some(link(known.get(&seen.from)?, known.get(&seen.to)?, seen));
        (found.iter().filter_map(shown).collect(), is_more)
    }

    /// All of them in few figures.
    fn totals(&self, known: &HashMap<HostId, End<'_>>, now_ms: u64) -> Totals {
        let mut totals = Totals::default();
        self.each(known, Which::default(), now_ms, |seen| {
            if let (Some(from), Some(to)) = (known.get(&seen.from), known.get(&seen.to)) {
                totals.add(from, to, &seen);
            }
            ControlFlow::Continue(())
        });
        totals.between.values_mut().for_each(|between| between.times_us.sort_unstable());
        totals
    }
}

/// Which ways are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Which {
    /// Only those from and to this host.
    pub only: Option<HostId>,
    /// Only those behind this one, in the order of ids.
    pub after: Option<(HostId, HostId)>,
    /// At most so many.
    pub limit: usize,
}

impl Default for Which {
    fn default() -> Self {
        Self { only: None, after: None, limit: usize::MAX }
    }
}

/// A host at an end of a way.
#[derive(Debug, Clone, Copy)]
struct End<'a> {
    host: &'a Host,
    is_connected: bool,
}

/// What is known of a way.
#[derive(Debug, Clone, Copy)]
struct Seen {
    from: HostId,
    to: HostId,
    is_capable: bool,
    told: Option<(u64, PathMeasured)>,
}

impl Seen {
    fn path(&self) -> Option<&PathMeasured> {
        self.told.as_ref().map(|(_, path)| path).filter(|path| path.probes > 0)
    }

    fn state(&self) -> LinkState {
        match self.path() {
            None => LinkState::NotMeasured,
            Some(path) if path.answered == 0 || path.misses >= MISSES => LinkState::Silent,
            Some(_) => LinkState::Answers,
        }
    }

    /// Opening packets, and those of them that got lost. What cannot be is not shown: an agent may tell anything.
    fn packets(&self) -> (u32, u32) {
        self.path().map_or((0, 0), |path| (path.sent, path.resent.min(path.sent)))
    }
}

/// What was measured between the hosts of two clouds, or of one, in one direction.
#[derive(Debug, Default)]
pub struct Between {
    times_us: Vec<u32>,
    sent: u64,
    lost: u64,
}

impl Between {
    /// The median of the ways' round-trip times, in microseconds.
    #[must_use]
    pub fn rtt_us(&self) -> Option<u64> {
        self.times_us.get(self.times_us.len() / 2).copied().map(u64::from)
    }

    /// Lost opening packets, in millionths; none of too few packets.
    #[must_use]
    pub fn loss_ppm(&self) -> Option<u64> {
        (self.sent >= u64::from(LOSS_FROM)).then(|| self.lost * 1_000_000 / self.sent)
    }
}

/// All ways in few figures.
#[derive(Debug, Default)]
pub struct Totals {
    /// Ways that answer.
    pub answer: u64,
    /// Ways that do not.
    pub silent: u64,
    /// Of these, those to hosts whose agents are connected: it is the way that is broken.
    pub broken: u64,
    /// Ways that nobody measures.
    pub not_measured: u64,
    /// By the names of the clouds from and to which they lead.
    pub between: BTreeMap<(String, String), Between>,
}

impl Totals {
    fn add(&mut self, from: &End<'_>, to: &End<'_>, seen: &Seen) {
        let state = seen.state();
        match state {
            LinkState::Answers => self.answer += 1,
            LinkState::Silent => self.silent += 1,
            LinkState::NotMeasured => self.not_measured += 1,
        }
        self.broken += u64::from(state == LinkState::Silent && to.is_connected);
        // To a host that is away everything is lost; that tells nothing of the way.
        if state == LinkState::NotMeasured || state == LinkState::Silent && !to.is_connected {
            return;
        }
        let pair = (from.host.cloud_name.to_string(), to.host.cloud_name.to_string());
        if self.between.len() >= CLOUD_PAIRS_AT_MOST && !self.between.contains_key(&pair) {
            return;
        }
        let between = self.between.entry(pair).or_default();
        between.times_us.extend(seen.path().filter(|_| state == LinkState::Answers).and_then(|path| path.rtt_us));
        let (sent, lost) = seen.packets();
        between.sent += u64::from(sent);
        between.lost += u64::from(lost);
    }
}

/// Why nobody has measured the ways from a host.
fn not_measured(from: &End<'_>, is_capable: bool) -> String {
    let name = &from.host.name;
    match (from.is_connected, is_capable) {
        (false, _) => format!("{name} is not connected"),
        (true, false) => format!("the agent of {name} is of a version that measures nothing"),
        (true, true) => format!("{name} has told nothing of it lately"),
    }
}

fn no_answer(path: &PathMeasured) -> String {
    let last = match path.misses {
        1 => "the last probe".to_owned(),
        misses => format!("the last {misses} probes"),
    };
    match path.is_refused {
        true => format!("the machine is there, but no agent takes connections there ({last})"),
        false => format!("no answer to {last}"),
    }
}

fn link(from: &End<'_>, to: &End<'_>, seen: &Seen) -> Link {
    let (path, state) = (seen.path(), seen.state());
    let why = match state {
        LinkState::NotMeasured => Some(not_measured(from, seen.is_capable)),
        LinkState::Silent => path.map(no_answer),
        LinkState::Answers => None,
    };
    let (sent, resent) = seen.packets();
    let (from, to) = (from.host, to.host);
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
        told_at_ms: path.and(seen.told.as_ref()).map(|(at_ms, _)| *at_ms),
    }
}

/// The ends that ways may have: hosts that were not removed.
fn ends<'a>(parts: &Parts, hosts: &'a [Stored<HostRecord>]) -> HashMap<HostId, End<'a>> {
    let end = |record: &'a Stored<HostRecord>| {
        let host = &record.value.host;
        (host.id, End { host, is_connected: parts.hosts.get(host.id).is_some() })
    };
    hosts.iter().filter(|record| !record.is_removed).map(end).collect()
}

/// A page of the ways that are measured now, between hosts that were not removed, and whether there are more behind it.
///
/// # Errors
/// When the records cannot be read.
pub async fn links(parts: &Parts, which: Which) -> Result<(Vec<Link>, bool), StateError> {
    let hosts = parts.state.list::<HostRecord>().await?;
    Ok(parts.paths.page(&ends(parts, &hosts), which, unix_ms()))
}

/// All ways between these hosts in few figures.
#[must_use]
pub fn totals(parts: &Parts, hosts: &[Stored<HostRecord>]) -> Totals {
    parts.paths.totals(&ends(parts, hosts), unix_ms())
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
mod tests;
