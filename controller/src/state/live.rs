//! What is known of hosts only while their agents are connected: not durable, so that heartbeats cost no disk write and
//! nothing stale survives a restart.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use supercloud_api::{
    Room,
    ids::{Epoch, GuestId, HostId},
};

/// A connected host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveHost {
    /// When its agent was last heard of (wall time, for people).
    pub last_seen_ms: u64,
    /// What guests and reservations take, as the agent counts it.
    pub used: Room,
}

/// Of one guest: what its host's cloud lacks of what its volumes stand on.
#[derive(Debug, Clone, Copy)]
struct Base {
    epoch: Epoch,
    missing_bytes: u64,
    /// The least that was ever missing at this epoch: what is read and cannot be kept is missing again.
    least_bytes: u64,
    /// When less of it was missing than ever before, or it was first told of.
    got_on: Instant,
}

type Bases = HashMap<GuestId, Base>;

#[derive(Debug)]
struct Live {
    hosts: HashMap<HostId, LiveHost>,
    bases: HashMap<HostId, Bases>,
    /// Those whose guests can be mirrored, as their agents said last.
    mirroring: HashSet<HostId>,
    /// Those whose guests obey leases, likewise.
    leasing: HashSet<HostId>,
    holding: HashSet<HostId>,
    /// Those from and to which guests may move and leave memory behind, likewise.
    post_copying: HashSet<HostId>,
    /// Those that let a thawed guest run before its memory is there, likewise.
    lazy: HashSet<HostId>,
    /// Those that take checkpoints and thaw from them, likewise.
    checkpointing: HashSet<HostId>,
    /// Since when those hosts are away whose links ended under our eyes.
    away: HashMap<HostId, Instant>,
    /// Since when others may have been.
    began: Instant,
}

impl Default for Live {
    fn default() -> Self {
        let (hosts, bases, away) = (HashMap::new(), HashMap::new(), HashMap::new());
        let (mirroring, leasing, holding) = (HashSet::new(), HashSet::new(), HashSet::new());
        let (post_copying, lazy, checkpointing) = (HashSet::new(), HashSet::new(), HashSet::new());
        let began = Instant::now();
        Self { hosts, bases, away, mirroring, leasing, holding, post_copying, lazy, checkpointing, began }
    }
}

/// The connected hosts. Cheap to clone; the link writes, everybody reads.
#[derive(Debug, Clone, Default)]
pub struct LiveHosts(Arc<RwLock<Live>>);

impl LiveHosts {
    /// The agent was heard of.
    pub fn seen(&self, host: HostId, live: LiveHost) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.away.remove(&host);
        all.hosts.insert(host, live);
    }

    /// The agent is away. Returns what was known last.
    pub fn gone(&self, host: HostId) -> Option<LiveHost> {
        let mut live = self.0.write().unwrap_or_else(PoisonError::into_inner);
        live.bases.remove(&host);
        let last = live.hosts.remove(&host);
        if last.is_some() {
            live.away.insert(host, Instant::now());
        }
        last
    }

    /// The agent says whether guests can be mirrored there.
    pub fn note_mirroring(&self, host: HostId, takes_mirrors: bool) {
        let mirroring = &mut self.0.write().unwrap_or_else(PoisonError::into_inner).mirroring;
        match takes_mirrors {
            true => mirroring.insert(host),
            false => mirroring.remove(&host),
        };
    }

    /// Whether it said so when it was last heard of.
    #[must_use]
    pub fn takes_mirrors(&self, host: HostId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).mirroring.contains(&host)
    }

    /// The agent says whether guests obey leases there.
    pub fn note_leases(&self, host: HostId, takes_leases: bool) {
        let leasing = &mut self.0.write().unwrap_or_else(PoisonError::into_inner).leasing;
        match takes_leases {
            true => leasing.insert(host),
            false => leasing.remove(&host),
        };
    }

    /// Whether it said so when it was last heard of.
    #[must_use]
    pub fn takes_leases(&self, host: HostId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).leasing.contains(&host)
    }

    /// The agent says whether moves can wait there with the guest's pause until they are told.
    pub fn note_holds(&self, host: HostId, takes_holds: bool) {
        let holding = &mut self.0.write().unwrap_or_else(PoisonError::into_inner).holding;
        match takes_holds {
            true => holding.insert(host),
            false => holding.remove(&host),
        };
    }

    /// Whether it said so when it was last heard of.
    #[must_use]
    pub fn takes_holds(&self, host: HostId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).holding.contains(&host)
    }

    /// The agent says whether guests may leave memory behind when they move from or to it.
    pub fn note_post_copy(&self, host: HostId, takes_post_copy: bool) {
        let post_copying = &mut self.0.write().unwrap_or_else(PoisonError::into_inner).post_copying;
        match takes_post_copy {
            true => post_copying.insert(host),
            false => post_copying.remove(&host),
        };
    }

    /// Whether it said so when it was last heard of.
    #[must_use]
    pub fn takes_post_copy(&self, host: HostId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).post_copying.contains(&host)
    }

    /// The agent says whether a thawed guest can run there before its memory is there.
    pub fn note_lazy_thaw(&self, host: HostId, takes_lazy_thaw: bool) {
        let lazy = &mut self.0.write().unwrap_or_else(PoisonError::into_inner).lazy;
        match takes_lazy_thaw {
            true => lazy.insert(host),
            false => lazy.remove(&host),
        };
    }

    /// Whether it said so when it was last heard of.
    #[must_use]
    pub fn takes_lazy_thaw(&self, host: HostId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).lazy.contains(&host)
    }

    /// The agent says whether it takes checkpoints of guests, and thaws from them.
    pub fn note_checkpoints(&self, host: HostId, takes_checkpoints: bool) {
        let checkpointing = &mut self.0.write().unwrap_or_else(PoisonError::into_inner).checkpointing;
        match takes_checkpoints {
            true => checkpointing.insert(host),
            false => checkpointing.remove(&host),
        };
    }

    /// Whether it said so when it was last heard of.
    #[must_use]
    pub fn takes_checkpoints(&self, host: HostId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).checkpointing.contains(&host)
    }

    /// For how long a host has had no link to this controller, as far as this process knows; `None`: it has one.
    #[must_use]
    pub fn away_for(&self, host: HostId, now: Instant) -> Option<Duration> {
        let live = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let since = live.away.get(&host).unwrap_or(&live.began);
        (!live.hosts.contains_key(&host)).then(|| now.saturating_duration_since(*since))
    }

    /// What is known, if the agent is connected.
    #[must_use]
    pub fn get(&self, host: HostId) -> Option<LiveHost> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).hosts.get(&host).copied()
    }

    /// How many hosts are connected.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).hosts.len()
    }

    /// What a host tells `now` of what its guests' volumes stand on; of guests that are not named nothing is known any more.
    pub fn note_bases(&self, host: HostId, told: impl IntoIterator<Item = (GuestId, Epoch, u64)>, now: Instant) {
        let mut live = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = live.bases.remove(&host).unwrap_or_default();
        let bases = told.into_iter().map(|(guest, epoch, missing_bytes)| {
            let known = before.get(&guest).filter(|base| base.epoch == epoch);
            let least_bytes = known.map_or(missing_bytes, |base| base.least_bytes.min(missing_bytes));
            let stood = known.filter(|base| base.least_bytes <= missing_bytes);
            (guest, Base { epoch, missing_bytes, least_bytes, got_on: stood.map_or(now, |base| base.got_on) })
        });
        let bases = bases.collect();
        live.bases.insert(host, bases);
    }

    /// How many bytes a guest's cloud lacks of what its volumes stand on, when none of them has come for longer than `patience`.
    #[must_use]
    pub fn base_stands_still(&self, host: HostId, guest: GuestId, now: Instant, patience: Duration) -> Option<u64> {
        let live = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let base = live.bases.get(&host)?.get(&guest)?;
        let is_still = base.missing_bytes > 0 && now.saturating_duration_since(base.got_on) > patience;
        is_still.then_some(base.missing_bytes)
    }

    /// Bytes that the cloud of a guest's owner lacks of what the volumes stand on; none when that owner has not told.
    #[must_use]
    pub fn base_missing_bytes(&self, owner: HostId, guest: GuestId, epoch: Epoch) -> Option<u64> {
        let live = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let base = live.bases.get(&owner)?.get(&guest)?;
        (base.epoch == epoch).then_some(base.missing_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_away_from_when_its_link_ended() {
        let (hosts, host) = (LiveHosts::default(), HostId::generate());
        let later = |seconds| Instant::now() + Duration::from_secs(seconds);
        let away = |now| hosts.away_for(host, now);
        assert!(away(later(60)).is_some_and(|gone| gone.as_secs() >= 60), "never seen by this process");
        hosts.seen(host, LiveHost { last_seen_ms: 1, used: Room::default() });
        assert_eq!(away(later(60)), None);
        let made = Instant::now();
        let before = std::iter::repeat_with(Instant::now).find(|now| *now > made).expect("time passes");
        assert!(hosts.gone(host).is_some());
        assert_eq!(away(before), Some(Duration::ZERO), "counted from its end, not from the beginning");
        assert!(hosts.away_for(HostId::generate(), before) > Some(Duration::ZERO));
        assert!(hosts.gone(host).is_none() && away(later(60)).is_some());
    }

    #[test]
    fn a_base_of_which_nothing_comes_stands_still() {
        let (hosts, host, guest) = (LiveHosts::default(), HostId::generate(), GuestId::generate());
        let begun = Instant::now();
        let patience = Duration::from_secs(300);
        let tell = |after_s: u64, epoch: u64, missing: u64| {
            let now = begun + Duration::from_secs(after_s);
            hosts.note_bases(host, [(guest, Epoch(epoch), missing)], now);
            hosts.base_stands_still(host, guest, now, patience)
        };
        assert_eq!(tell(0, 1, 500), None);
        assert_eq!(tell(300, 1, 500), None, "not for longer than that");
        assert_eq!(tell(301, 1, 500), Some(500));
        assert_eq!(tell(302, 1, 499), None, "it gets on");
        assert_eq!(tell(400, 1, 600), None);
        assert_eq!(tell(603, 1, 500), Some(500), "there was less: up and down is not getting on");
        assert_eq!(tell(604, 2, 600), None, "the guest came anew");
        assert_eq!(tell(1000, 2, 0), None, "all is there");
    }
}
