//! The ways to the hosts with which this one would exchange guests: round-trip time and loss, as far as they can be told honestly.
//!
//! A probe opens a TCP connection to where the other agent takes moves, and closes it: one round trip, by the path and the port that
//! a move would take, answered by the other's kernel, so that neither a busy agent nor an old one changes what is measured. The
//! round-trip time is the kernel's own of the handshake (`TCP_INFO`), not what this process waited; a handshake whose opening packet
//! went again tells of loss and not of time. No byte is sent: who answers is not authenticated, and is told nothing.
//!
//! Nothing is told to a controller that did not ask in this session: it may be of a version that does not know what is told. Without
//! one that asks, probes end soon: the addresses may be somebody else's by then.

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
    time::{Instant, MissedTickBehavior, interval, timeout},
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

/// Without a controller that asks, ways are probed for so long.
const ALONE: Duration = Duration::from_secs(180);
/// Opening packets of a probe that was waited for in vain, at least: by most kernels they go after 0, 1 and 3 s, by others more often.
const SENT_IN_VAIN: u32 = 3;

/// How a probe ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    /// The connection was opened; so many opening packets went again.
    Answered { rtt_us: u32, resent: u32 },
    /// The machine is there and refuses.
    Refused,
    /// Nothing came to so many opening packets.
    Silent { lost: u32 },
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
        let (mut answered, mut lost_in_all, mut times) = (0_u16, 0_u32, Vec::with_capacity(self.probes.len()));
        for probe in &self.probes {
            let lost = match *probe {
                Probe::Answered { rtt_us, resent } => {
                    answered += 1;
                    if resent == 0 {
                        times.push(rtt_us);
                    }
                    resent
                }
                // Were only those counted that came through, loss would look the smaller the worse it is.
                Probe::Silent { lost } => lost,
                Probe::Refused => 0,
            };
            lost_in_all = lost_in_all.saturating_add(lost);
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
            sent: u32::from(answered).saturating_add(lost_in_all),
            resent: lost_in_all,
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
    /// The controller has asked in this session.
    is_asked: bool,
    /// When probing ends, while it has not.
    ends_at: Option<Instant>,
}

impl Ways {
    /// What the controller asks for; none when its session has ended or a new one has begun.
    fn heard(&mut self, peers: Option<&[PathPeer]>, now: Instant) {
        self.is_asked = peers.is_some();
        match peers {
            Some(peers) => {
                self.ends_at = None;
                self.replace(peers);
            }
            None => {
                self.ends_at.get_or_insert(now + ALONE);
            }
        }
    }

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
    fn next(&mut self, now: Instant) -> Option<(HostId, SocketAddr)> {
        if self.ends_at.is_some_and(|at| at <= now) {
            self.replace(&[]);
        }
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

    /// What there is to tell to who has asked.
    fn measured(&self) -> Vec<PathMeasured> {
        if !self.is_asked {
            return Vec::new();
        }
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
            io::ErrorKind::TimedOut => Some(Probe::Silent { lost: SENT_IN_VAIN }),
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Some(Probe::Silent { lost: 1 }),
            kind => {
                tracing::debug!(%address, ?kind, "a way could not be probed");
                None
            }
        },
        Err(_) => Some(Probe::Silent { lost: SENT_IN_VAIN }),
    }
}

/// Measures the ways to the newest peers, and tells, until `cancel`. `peers` is none while no controller has asked in its session.
pub async fn run(link: LinkHandle, mut peers: watch::Receiver<Option<Vec<PathPeer>>>, cancel: CancellationToken) {
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
                ways.heard(peers.borrow_and_update().as_deref(), Instant::now());
                turn = interval(ways.pause());
                turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
            }
            _ = turn.tick() => {
                if let Some((host, address)) = ways.next(Instant::now()) {
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

    const IN_VAIN: Probe = Probe::Silent { lost: SENT_IN_VAIN };

    /// Packets of a way that loses `percent` of its round trips, as a kernel that sends three would see it.
    fn loss_told(percent: u32, seed: u64) -> (u32, u32) {
        let mut state = seed | 1;
        let mut is_lost = || {
            // xorshift64, Marsaglia 2003.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % 100 < u64::from(percent)
        };
        let (mut sent, mut lost) = (0, 0);
        for _ in 0..400 {
            let probes: Vec<Probe> = (0..WINDOW)
                .map(|_| match (0..SENT_IN_VAIN).find(|_| !is_lost()) {
                    Some(resent) => Probe::Answered { rtt_us: 9, resent },
                    None => IN_VAIN,
                })
                .collect();
            let told = way(&probes);
            (sent, lost) = (sent + told.sent, lost + told.resent);
        }
        (sent, lost)
    }

    #[test]
    fn the_share_that_is_told_is_the_share_that_is_lost() {
        for percent in [0_u32, 5, 30, 60, 90] {
            let seed = unix_ms();
            let (sent, lost) = loss_told(percent, seed);
            let share = f64::from(lost) / f64::from(sent);
            let wanted = f64::from(percent) / 100.0;
            assert!((share - wanted).abs() < 0.03, "{percent} % are told as {share}, seed {seed}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_did_not_ask_is_told_nothing_and_without_anybody_probes_end() {
        let now = Instant::now();
        let peer = PathPeer { host: HostId::generate(), address: address(1) };
        let mut ways = Ways::default();
        let probed = |ways: &mut Ways, at| {
            let found = ways.next(at).is_some();
            ways.ended(peer.host, peer.address, found.then_some(OK(3)), 1);
            found
        };
        ways.heard(Some(&[peer]), now);
        assert!(probed(&mut ways, now) && ways.measured().len() == 1);
        // The session ends, another begins: maybe with a controller of an older version.
        ways.heard(None, now);
        ways.heard(None, now + ALONE / 2);
        assert!(ways.measured().is_empty());
        assert!(probed(&mut ways, now + ALONE / 2), "it may be back soon");
        // It asks: what was measured counts.
        ways.heard(Some(&[peer]), now + ALONE / 2);
        assert_eq!(ways.measured()[0].probes, 2);
        assert!(probed(&mut ways, now + 9 * ALONE));
        ways.heard(None, now + 10 * ALONE);
        ways.heard(None, now + 11 * ALONE - Duration::from_secs(1));
        assert!(!probed(&mut ways, now + 11 * ALONE), "the address may be somebody else's by now");
        ways.heard(Some(&[peer]), now + 12 * ALONE);
        assert!(ways.measured().is_empty(), "what was measured is too old");
        assert!(probed(&mut ways, now + 12 * ALONE));
    }

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
        let told = way(&[OK(300), lossy, OK(100), OK(200), IN_VAIN]);
        assert_eq!((told.probes, told.answered, told.sent, told.resent), (5, 4, 9, 5));
        assert_eq!((told.rtt_us, told.rtt_least_us), (Some(200), Some(100)));
        assert_eq!((told.misses, told.is_refused, told.answered_at_ms), (1, false, Some(4)));
        let away = way(&[OK(9), IN_VAIN, Probe::Refused]);
        assert_eq!((away.misses, away.is_refused, away.answered_at_ms), (2, true, Some(1)));
        let never = way(&[IN_VAIN]);
        assert_eq!((never.rtt_us, never.sent, never.resent, never.answered_at_ms), (None, 3, 3, None));
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
        let now = Instant::now();
        assert!(ways.next(now).is_none(), "nobody to measure");
        ways.heard(Some(&peers), now);
        assert_eq!(ways.by_host.len(), MAX_PATH_PEERS);
        assert!(ways.pause() * u32::try_from(MAX_PATH_PEERS).unwrap() <= EVERY);
        let first: HashSet<HostId> = (0..MAX_PATH_PEERS).filter_map(|_| ways.next(now)).map(|(host, _)| host).collect();
        assert_eq!(first.len(), MAX_PATH_PEERS, "each once");
        assert!(ways.next(now).is_none(), "and not again before its probe has ended");
        let one = peers[0];
        ways.ended(one.host, one.address, Some(OK(3)), 1);
        assert_eq!(ways.next(now), None, "another one's turn");
        assert_eq!(ways.measured().len(), 1);
        // Who moved is measured anew, who stays is not, a late answer of the old place tells nothing.
        let moved = PathPeer { address: address(999), ..one };
        ways.replace(&[moved, peers[1], peers[1]]);
        assert_eq!((ways.by_host.len(), ways.turns.len()), (2, 2));
        ways.ended(one.host, one.address, Some(OK(3)), 2);
        assert!(ways.measured().is_empty());
        ways.replace(&[]);
        assert!(ways.next(now).is_none());
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
