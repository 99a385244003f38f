//! The ways to the hosts with which this one would exchange guests: round-trip time and loss, as far as they can be told honestly.
//!
//! A probe opens a TCP connection to where the other agent takes moves, and closes it: one round trip, by the path and the port that
//! a move would take, answered by the other's kernel, so that neither a busy agent nor an old one changes what is measured. The
//! round-trip time is the kernel's own of the handshake (`TCP_INFO`), not what this process waited; a handshake whose opening packet
//! went again tells of loss and not of time. No byte is sent: who answers is not authenticated, and is told nothing.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    net::SocketAddr,
    time::Duration,
};

use supercloud_api::{
    link::{MAX_PATH_PEERS, Notice, PathMeasured, PathPeer},
    unix_ms,
};
use supercloud_ids::HostId;
use tokio::{
    net::TcpStream,
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{link::LinkHandle, socket};

/// Each way is probed this often.
const EVERY: Duration = Duration::from_secs(5);
/// How long a probe is waited for: the opening packet goes again after 1 s and, by most kernels, after 3 s.
const PATIENCE: Duration = Duration::from_millis(4500);
/// Probes of a way that count: two minutes.
const WINDOW: usize = 24;
/// What was measured is told this often.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How a probe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    /// The connection was opened; so many opening packets went again.
    Answered { rtt_us: u32, resent: u32 },
    /// The machine is there and refuses.
    Refused,
    /// Nothing came.
    Silent,
}

/// One way.
#[derive(Debug)]
struct Way {
    address: SocketAddr,
    probes: VecDeque<Probe>,
    answered_at_ms: Option<u64>,
}

impl Way {
    fn new(address: SocketAddr) -> Self {
        Self { address, probes: VecDeque::with_capacity(WINDOW), answered_at_ms: None }
    }

    fn note(&mut self, probe: Probe, now_ms: u64) {
        if self.probes.len() == WINDOW {
            self.probes.pop_front();
        }
        if matches!(probe, Probe::Answered { .. }) {
            self.answered_at_ms = Some(now_ms);
        }
        self.probes.push_back(probe);
    }

    fn measured(&self, to: HostId) -> PathMeasured {
        let (mut answered, mut resent_in_all, mut times) = (0_u16, 0_u32, Vec::with_capacity(self.probes.len()));
        for probe in &self.probes {
            let Probe::Answered { rtt_us, resent } = *probe else { continue };
            answered += 1;
            resent_in_all = resent_in_all.saturating_add(resent);
            if resent == 0 {
                times.push(rtt_us);
            }
        }
        times.sort_unstable();
        let count = |probes: usize| u16::try_from(probes).unwrap_or(u16::MAX);
        let is_miss = |probe: &&Probe| !matches!(probe, Probe::Answered { .. });
        PathMeasured {
            to,
            probes: count(self.probes.len()),
            answered,
            misses: count(self.probes.iter().rev().take_while(is_miss).count()),
            is_refused: self.probes.back() == Some(&Probe::Refused),
            sent: u32::from(answered).saturating_add(resent_in_all),
            resent: resent_in_all,
            rtt_us: times.get(times.len() / 2).copied(),
            rtt_least_us: times.first().copied(),
            answered_at_ms: self.answered_at_ms,
        }
    }
}

/// All ways that are to be measured, and whose turn it is.
#[derive(Debug, Default)]
struct Ways {
    by_host: HashMap<HostId, Way>,
    turns: VecDeque<HostId>,
    under_way: HashSet<HostId>,
}

impl Ways {
    /// Takes over whom to measure; what was measured of those that stay where they are is kept.
    fn replace(&mut self, peers: &[PathPeer]) {
        let mut before = std::mem::take(&mut self.by_host);
        self.turns.clear();
        for peer in peers.iter().take(MAX_PATH_PEERS) {
            let way = before.remove(&peer.host).filter(|way| way.address == peer.address);
            if self.by_host.insert(peer.host, way.unwrap_or_else(|| Way::new(peer.address))).is_none() {
                self.turns.push_back(peer.host);
            }
        }
    }

    /// The way whose turn it is, unless a probe of it is still waited for.
    fn next(&mut self) -> Option<(HostId, SocketAddr)> {
        let host = self.turns.pop_front()?;
        self.turns.push_back(host);
        let address = self.by_host.get(&host)?.address;
        self.under_way.insert(host).then_some((host, address))
    }

    /// A probe has ended; of a host that is not measured any more, or is elsewhere now, it tells nothing.
    fn ended(&mut self, host: HostId, address: SocketAddr, probe: Option<Probe>, now_ms: u64) {
        self.under_way.remove(&host);
        if let (Some(way), Some(probe)) = (self.by_host.get_mut(&host).filter(|way| way.address == address), probe) {
            way.note(probe, now_ms);
        }
    }

    /// So that each has its turn once in [`EVERY`].
    fn pause(&self) -> Duration {
        EVERY / u32::try_from(self.turns.len().max(1)).unwrap_or(1)
    }

    fn measured(&self) -> Vec<PathMeasured> {
        self.by_host.iter().filter(|(_, way)| !way.probes.is_empty()).map(|(host, way)| way.measured(*host)).collect()
    }
}

/// One probe; none when this host itself could not make it.
async fn probe(address: SocketAddr) -> Option<Probe> {
    match timeout(PATIENCE, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => {
            let opening = socket::opening(&stream).ok()?;
            Some(Probe::Answered { rtt_us: opening.rtt_us, resent: opening.resent })
        }
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Some(Probe::Refused),
            io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                Some(Probe::Silent)
            }
            kind => {
                tracing::debug!(%address, ?kind, "a way could not be probed");
                None
            }
        },
        Err(_) => Some(Probe::Silent),
    }
}

/// Measures the ways to the newest peers, and tells, until `cancel`.
pub async fn run(link: LinkHandle, mut peers: watch::Receiver<Vec<PathPeer>>, cancel: CancellationToken) {
    let mut ways = Ways::default();
    let mut probes = JoinSet::new();
    let mut tell = interval(TELL_EVERY);
    tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut turn = interval(EVERY);
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = peers.changed() => {
                if changed.is_err() {
                    return;
                }
                ways.replace(&peers.borrow_and_update());
                turn = interval(ways.pause());
                turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
            }
            _ = turn.tick() => {
                if let Some((host, address)) = ways.next() {
                    probes.spawn(async move { (host, address, probe(address).await) });
                }
            }
            Some(ended) = probes.join_next() => {
                if let Ok((host, address, probe)) = ended {
                    ways.ended(host, address, probe, unix_ms());
                }
            }
            _ = tell.tick() => {
                let paths = ways.measured();
                if !paths.is_empty() {
                    link.tell(Notice::Paths { paths });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: fn(u32) -> Probe = |rtt_us| Probe::Answered { rtt_us, resent: 0 };

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], port))
    }

    fn way(probes: &[Probe]) -> PathMeasured {
        let mut way = Way::new(address(1));
        for (at, probe) in probes.iter().enumerate() {
            way.note(*probe, at as u64 + 1);
        }
        way.measured(HostId::generate())
    }

    #[test]
    fn loss_is_what_went_again_and_tells_nothing_of_time() {
        let lossy = Probe::Answered { rtt_us: 1_000_000, resent: 2 };
        let told = way(&[OK(300), lossy, OK(100), OK(200), Probe::Silent]);
        assert_eq!((told.probes, told.answered, told.sent, told.resent), (5, 4, 6, 2));
        assert_eq!((told.rtt_us, told.rtt_least_us), (Some(200), Some(100)));
        assert_eq!((told.misses, told.is_refused, told.answered_at_ms), (1, false, Some(4)));
        let away = way(&[OK(9), Probe::Silent, Probe::Refused]);
        assert_eq!((away.misses, away.is_refused, away.answered_at_ms), (2, true, Some(1)));
        let never = way(&[Probe::Silent]);
        assert_eq!((never.rtt_us, never.sent, never.answered_at_ms), (None, 0, None));
        assert_eq!(way(&[lossy]).rtt_us, None, "a handshake with loss has no time of its own");
    }

    #[test]
    fn only_the_last_probes_count() {
        let mut many = vec![OK(5_000_000); 3 * WINDOW];
        many.extend([OK(7); WINDOW]);
        let told = way(&many);
        assert_eq!((usize::from(told.probes), told.rtt_us, told.rtt_least_us), (WINDOW, Some(7), Some(7)));
    }

    #[test]
    fn peers_have_their_turns_and_no_more_of_them_than_are_allowed() {
        let peers: Vec<PathPeer> = (0..3 * MAX_PATH_PEERS)
            .map(|port| PathPeer { host: HostId::generate(), address: address(u16::try_from(port).unwrap()) })
            .collect();
        let mut ways = Ways::default();
        assert!(ways.next().is_none(), "nobody to measure");
        ways.replace(&peers);
        assert_eq!(ways.by_host.len(), MAX_PATH_PEERS);
        assert!(ways.pause() * u32::try_from(MAX_PATH_PEERS).unwrap() <= EVERY);
        let first: HashSet<HostId> = (0..MAX_PATH_PEERS).filter_map(|_| ways.next()).map(|(host, _)| host).collect();
        assert_eq!(first.len(), MAX_PATH_PEERS, "each once");
        assert!(ways.next().is_none(), "and not again before its probe has ended");
        let one = peers[0];
        ways.ended(one.host, one.address, Some(OK(3)), 1);
        assert_eq!(ways.next(), None, "another one's turn");
        assert_eq!(ways.measured().len(), 1);
        // Who moved is measured anew, who stays is not, a late answer of the old place tells nothing.
        let moved = PathPeer { address: address(999), ..one };
        ways.replace(&[moved, peers[1], peers[1]]);
        assert_eq!((ways.by_host.len(), ways.turns.len()), (2, 2));
        ways.ended(one.host, one.address, Some(OK(3)), 2);
        assert!(ways.measured().is_empty());
        ways.replace(&[]);
        assert!(ways.next().is_none());
    }

    #[tokio::test]
    async fn a_listener_answers_and_a_closed_port_refuses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        let Some(Probe::Answered { rtt_us, resent: 0 }) = probe(open).await else { panic!("no answer") };
        assert!(rtt_us > 0, "the kernel has measured the handshake");
        drop(listener);
        assert_eq!(probe(open).await, Some(Probe::Refused));
    }
}
