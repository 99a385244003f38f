//! Whether anything may be swept now, and by whom: decisions without effects.
//!
//! Records that were brought back from a backup do not name what was made since. Signs of that, each of which stops all sweeps:
//! a connected host tells of a guest or of an epoch that the records do not have; a host that the records do not have shows
//! a certificate of ours; a host was told of a place in a history that is not this one (see
//! [`supercloud_storage::sweep::Held`]), and no operator has said that it does not count.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::{Duration, Instant},
};

use supercloud_api::{
    ids::{CloudId, Epoch, GuestId, HostId},
    link::{GuestReport, HistoryMark, Holding},
};

/// How long a host that is not known counts after it was here last: it tries every few seconds.
const STRANGER_FOR: Duration = Duration::from_secs(3600);
/// How long a turn stands when its host asks nothing.
const TURN_FOR: Duration = Duration::from_secs(120);
/// Places in other histories that are remembered.
const FOREIGN_AT_MOST: usize = 256;
/// Strangers that are remembered.
const STRANGERS_AT_MOST: usize = 1000;

/// What a host tells of its guests, as far as it matters here: the guest, its epoch, whether it is still coming.
type Told = BTreeSet<(GuestId, Epoch, bool)>;

#[derive(Debug)]
struct Turn {
    host: HostId,
    until: Instant,
}

/// What is known of the fleet since the controller's start.
#[derive(Debug, Default)]
pub(super) struct Guard {
    turns: HashMap<CloudId, Turn>,
    told: HashMap<HostId, (Told, Option<String>)>,
    strangers: HashMap<HostId, Instant>,
    foreign: BTreeSet<(u64, String)>,
}

/// What a host tells of its guests.
pub(super) fn told(reports: &[GuestReport]) -> Told {
    reports.iter().map(|report| (report.guest, report.epoch, report.holding == Holding::Incoming)).collect()
}

/// Whether the records know of what a host holds, when they have the guest at `known`: a copy that is coming has the epoch that
/// it will have.
pub(super) fn is_known(known: Option<Epoch>, epoch: Epoch, is_incoming: bool) -> bool {
    known.is_some_and(|known| epoch.0 <= known.0.saturating_add(u64::from(is_incoming)))
}

/// Whether a text is an event's hash.
pub(super) fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Guard {
    /// Whether a host told just this before.
    pub(super) fn is_told(&self, host: HostId, told: &Told) -> bool {
        self.told.get(&host).is_some_and(|(before, doubt)| before == told && doubt.is_none())
    }

    /// What a host tells, and what of it the records do not have.
    pub(super) fn tell(&mut self, host: HostId, told: Told, doubt: Option<String>) {
        self.told.insert(host, (told, doubt));
    }

    /// A host has a certificate of ours and no record.
    pub(super) fn note_stranger(&mut self, host: HostId, now: Instant) {
        if self.strangers.len() < STRANGERS_AT_MOST || self.strangers.contains_key(&host) {
            self.strangers.insert(host, now);
        }
    }

    /// Somebody was told of places that are in no history of ours.
    pub(super) fn note_foreign(&mut self, marks: impl Iterator<Item = HistoryMark>) {
        for mark in marks {
            // What is no hash can never become part of a key.
            if self.foreign.len() < FOREIGN_AT_MOST && is_hash(&mark.hash) {
                self.foreign.insert((mark.seq, mark.hash));
            }
        }
    }

    /// An operator says that these do not count.
    pub(super) fn take_foreign(&mut self) -> Vec<HistoryMark> {
        std::mem::take(&mut self.foreign).into_iter().map(|(seq, hash)| HistoryMark { seq, hash }).collect()
    }

    /// Why nothing may be swept now. `is_removed` knows the hosts of which nothing counts any more.
    pub(super) fn doubt(&self, is_removed: impl Fn(HostId) -> bool, now: Instant) -> Option<String> {
        let stranger = self.strangers.iter().find(|(_, seen)| now.saturating_duration_since(**seen) < STRANGER_FOR);
        if let Some((host, _)) = stranger {
            return Some(format!("host {host} has a certificate of this controller's and is not known to its records"));
        }
        let mut doubts = self.told.iter().filter(|(host, _)| !is_removed(**host));
        doubts.find_map(|(host, (_, doubt))| doubt.as_ref().map(|doubt| format!("host {host} {doubt}")))
    }

    /// Hosts that have told nothing since the controller's start.
    pub(super) fn unheard(&self, hosts: impl Iterator<Item = HostId>) -> HashSet<HostId> {
        hosts.filter(|host| !self.told.contains_key(host)).collect()
    }

    /// A cloud's store is swept by one host at a time: this one's turn begins or goes on.
    ///
    /// # Errors
    /// The host whose turn it is.
    pub(super) fn take_turn(&mut self, cloud: CloudId, host: HostId, now: Instant) -> Result<(), HostId> {
        match self.turns.get(&cloud) {
            Some(turn) if turn.host != host && now < turn.until => Err(turn.host),
            _ => {
                self.turns.insert(cloud, Turn { host, until: now + TURN_FOR });
                Ok(())
            }
        }
    }

    /// A host's turns are over.
    pub(super) fn end_turn(&mut self, host: HostId) {
        self.turns.retain(|_, turn| turn.host != host);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_at_a_time_sweeps_a_clouds_store() {
        let (mut guard, now) = (Guard::default(), Instant::now());
        let (cloud, a, b) = (CloudId::generate(), HostId::generate(), HostId::generate());
        let later = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(guard.take_turn(cloud, a, now), Ok(()));
        assert_eq!(guard.take_turn(cloud, b, later(1)), Err(a));
        assert_eq!(guard.take_turn(CloudId::generate(), b, later(1)), Ok(()));
        assert_eq!(guard.take_turn(cloud, a, later(100)), Ok(()), "it goes on");
        assert_eq!(guard.take_turn(cloud, b, later(219)), Err(a));
        assert_eq!(guard.take_turn(cloud, b, later(220)), Ok(()), "the other one asks nothing any more");
        guard.end_turn(b);
        assert_eq!(guard.take_turn(cloud, a, later(221)), Ok(()));
    }

    #[test]
    fn what_the_records_do_not_have_stops_sweeps() {
        let (mut guard, now) = (Guard::default(), Instant::now());
        let (host, guest) = (HostId::generate(), GuestId::generate());
        let nobody = |_: HostId| false;
        assert_eq!(guard.doubt(nobody, now), None);
        assert_eq!(guard.unheard([host].into_iter()).len(), 1);
        let told = Told::from([(guest, Epoch(3), false)]);
        guard.tell(host, told.clone(), Some("has a guest".into()));
        assert!(guard.doubt(nobody, now).is_some_and(|doubt| doubt.contains("has a guest")));
        assert_eq!(guard.doubt(|removed| removed == host, now), None, "of a removed host nothing counts");
        assert!(!guard.is_told(host, &told), "looked at again: the records may have it by now");
        guard.tell(host, told.clone(), None);
        assert!(guard.doubt(nobody, now).is_none() && guard.is_told(host, &told));
        assert!(guard.unheard([host].into_iter()).is_empty());
        let mark = |hash: &str| HistoryMark { seq: 1, hash: hash.into() };
        guard.note_foreign([mark("/"), mark(&"/".repeat(64)), mark(&"0a".repeat(32))].into_iter());
        assert_eq!(guard.take_foreign(), [mark(&"0a".repeat(32))]);
        guard.note_stranger(HostId::generate(), now);
        assert!(guard.doubt(nobody, now + Duration::from_secs(3599)).is_some());
        assert_eq!(guard.doubt(nobody, now + Duration::from_secs(3600)), None);
    }

    #[test]
    fn an_epoch_is_known_up_to_the_next_one_of_a_copy_that_comes() {
        assert!(is_known(Some(Epoch(3)), Epoch(3), false) && is_known(Some(Epoch(3)), Epoch(4), true));
        assert!(!is_known(Some(Epoch(3)), Epoch(4), false) && !is_known(Some(Epoch(3)), Epoch(5), true));
        assert!(!is_known(None, Epoch(0), true));
    }
}
