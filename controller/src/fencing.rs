//! Fail-over by the clock: a guest whose mirror is fenced by a lease goes on at its standby when its host is silent and the lease is surely
//! over. What is decided here is written once, and is then carried out as if an operator had said that the host is dead.
//!
//! | the host | the standby | then |
//! |---|---|---|
//! | is heard | | nothing |
//! | is silent | has no whole cut, or the guest does not obey its lease yet | an alarm: an operator must decide |
//! | is silent | is silent, too, or is back only just | an alarm; when it is back it takes over |
//! | is silent, and the lease may count | is there | people are told how long it waits |
//! | is silent, and the lease is surely over | is there | **it takes over** |
//!
//! # Two controllers
//! Only one controller is meant to work on a store. Should another one begin while this one still does (it was cut off, or slept), then
//! leases of both count, and neither knows the other's. So each says in the store that it is the newest ([`Claim`]), and begins to count
//! then; it grants nothing before, and nothing any more once another one has said the same: that one is left alone for ten minutes and more,
//! with an alarm. That a guest fails over is written in one
//! transaction with the claim.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use supercloud_api::{
    MirrorStanding, Phase,
    handover::OwnerRecord,
    ids::{GuestId, HostId, OperationId, RequestId},
};
use tokio::time::Instant;
use tracing::warn;

use crate::{
    chain,
    leases::LeaseBoard,
    operations::progress::ProgressBoard,
    state::{
        Change, Context, EventDraft, GuestRecord, LiveHosts, OperationRecord, State, StateError, Stored, Work, keys,
        retry_conflicts,
    },
};

/// In whose name it is done.
const ACTOR: &str = "fencing";
/// So many guests are decided about at once; the others a moment later.
const AT_ONCE: usize = 16;
/// For so long the newest of two controllers is left alone at first: enough for the longest lease to be over, and for decisions.
const LEFT_ALONE: Duration = Duration::from_secs(600);

/// How often it is looked, and how long is waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Between two looks.
    pub look: Duration,
    /// A standby must have been there for so long: one that was restarted and has nothing says so by then.
    pub settle: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { look: Duration::from_secs(1), settle: Duration::from_secs(5) }
    }
}

/// That this controller is the one that grants leases. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Claim(Arc<Claiming>);

#[derive(Debug)]
struct Claiming {
    /// Tells this controller, as it runs, from every other one.
    name: String,
    /// When it was written; 0: it does not hold.
    revision: AtomicU64,
    beaten: Mutex<Option<Beaten>>,
}

/// Another controller has said the same.
#[derive(Debug, Clone, Copy)]
struct Beaten {
    times: u32,
    /// Until then it is left alone.
    until: Instant,
}

/// What a look at the claim found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claimed {
    /// It holds, as before.
    Holds,
    /// It does from now on.
    Begun,
    /// It is another controller's; and whether that is news.
    Beaten { is_news: bool },
}

impl Default for Claim {
    fn default() -> Self {
        let name = RequestId::generate().to_string();
        Self(Arc::new(Claiming { name, revision: AtomicU64::new(0), beaten: Mutex::default() }))
    }
}

impl Claim {
    /// Whether nobody else has said the same since.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn holds(&self, state: &State) -> Result<bool, StateError> {
        let mine = self.revision();
        Ok(mine != 0 && state.revision_of(keys::lease_guard()).await? == mine)
    }

    fn revision(&self) -> u64 {
        self.0.revision.load(Ordering::SeqCst)
    }

    fn set(&self, revision: u64) {
        self.0.revision.store(revision, Ordering::SeqCst);
    }

    fn beaten(&self) -> MutexGuard<'_, Option<Beaten>> {
        self.0.beaten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says so, if it does not hold. Who was beaten leaves the other one alone, each time for longer: two that took it from each other
    /// again and again would decide about nothing.
    async fn renew(&self, state: &State, now: Instant) -> Result<Claimed, StateError> {
        let found = state.read_index(keys::lease_guard()).await?;
        let (seen, by) = found.map_or((0, String::new()), |found| (found.revision, found.value));
        let mine = self.revision();
        if mine != 0 && seen == mine {
            return Ok(Claimed::Holds);
        }
        self.set(0);
        // What this one wrote itself, without hearing that it was written, is nobody else's.
        if mine != 0 && by != self.0.name {
            let mut beaten = self.beaten();
            let times = beaten.map_or(0, |before| before.times);
            *beaten = Some(Beaten { times: times + 1, until: now + LEFT_ALONE * (1 << times.min(4)) });
            return Ok(Claimed::Beaten { is_news: true });
        }
        if self.beaten().is_some_and(|beaten| now < beaten.until) {
            return Ok(Claimed::Beaten { is_news: false });
        }
        let mut change = Change::new();
        change.guard_as(keys::lease_guard(), seen, &self.0.name);
        let committed = state.commit(&Context::system(), change).await?;
        self.set(committed.revision);
        Ok(Claimed::Begun)
    }
}

/// What is known of a guest whose mirror is fenced by a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sight {
    lease_ms: u64,
    /// For how long nothing was heard of its host.
    silent_ms: u64,
    /// The standby has a whole cut.
    is_whole: bool,
    /// The guest has once obeyed this mirror's lease.
    is_leased: bool,
    /// The standby has been there for long enough.
    is_standby_there: bool,
    /// Until every lease is surely over.
    over_in_ms: u64,
}

/// What is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Nothing,
    /// Somebody must look: nothing can take over, because.
    Blocked(&'static str),
    /// It takes over in so many milliseconds, unless the host is heard.
    Waits(u64),
    FailOver,
}

/// Decides. Pure.
const fn judge(sight: Sight) -> Verdict {
    // Several questions for a lease, or heartbeats, were missed then.
    if sight.silent_ms < sight.lease_ms / 2 {
        return Verdict::Nothing;
    }
    match sight {
        Sight { is_whole: false, .. } => Verdict::Blocked("its standby has no whole cut"),
        Sight { is_leased: false, .. } => Verdict::Blocked("it was not heard to obey its lease"),
        Sight { is_standby_there: false, .. } => Verdict::Blocked("its standby is silent, too"),
        Sight { over_in_ms: 0, .. } => Verdict::FailOver,
        Sight { over_in_ms, .. } => Verdict::Waits(over_in_ms),
    }
}

/// A guest whose mirror is fenced by a lease.
#[derive(Debug, Clone, Copy)]
struct Leased {
    operation: OperationId,
    guest: GuestId,
    source: HostId,
    destination: HostId,
    lease_ms: u64,
}

fn leased(record: &OperationRecord) -> Option<Leased> {
    let operation = &record.operation;
    let Work::GuestMirror { options, is_failing_over: false } = &record.work else { return None };
    if operation.phase != Phase::Copy || operation.is_cancel_requested {
        return None;
    }
    Some(Leased {
        operation: operation.id,
        guest: operation.guest?,
        source: operation.source?,
        destination: operation.destination?,
        lease_ms: options.lease_ms?,
    })
}

/// Whether the standby of this mirror may still be let run: a mirror that was called off is under way until both its hosts have said so,
/// and its guest runs without a lease by then.
fn is_standing(owner: &OwnerRecord, mirror: OperationId) -> bool {
    owner.operation.as_ref().is_some_and(|operation| operation.id == mirror && operation.is_mirrored())
}

/// Looks after guests whose mirrors are fenced by leases. One per controller.
#[derive(Debug)]
pub struct Fencing {
    state: State,
    live: LiveHosts,
    board: LeaseBoard,
    claim: Claim,
    progress: ProgressBoard,
    pace: Pace,
    /// What people were told, without numbers.
    told: HashMap<OperationId, &'static str>,
    /// Since when hosts that stand by are there.
    there: HashMap<HostId, Instant>,
}

impl Fencing {
    /// Nothing was decided yet.
    #[must_use]
    pub fn new(
        state: State,
        live: LiveHosts,
        board: LeaseBoard,
        claim: Claim,
        progress: ProgressBoard,
        pace: Pace,
    ) -> Self {
        Self { state, live, board, claim, progress, pace, told: HashMap::new(), there: HashMap::new() }
    }

    /// Looks for ever. It can be dropped at any await: nothing is half done.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.pass().await {
                warn!("whether guests must go on elsewhere cannot be told now: {}", chain(&error));
            }
            tokio::time::sleep(self.pace.look).await;
        }
    }

    async fn pass(&mut self) -> Result<(), StateError> {
        match self.claim.renew(&self.state, Instant::now()).await? {
            Claimed::Holds => {}
            // Only now nobody else grants any more.
            Claimed::Begun => self.board.begin_anew(),
            Claimed::Beaten { is_news } => {
                if is_news {
                    self.tell_beaten().await?;
                }
                return Ok(());
            }
        }
        let mut guests = Vec::new();
        let mut active = HashSet::new();
        for id in self.state.active_operations().await? {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { continue };
            active.insert(id);
            let Some(leased) = leased(&record) else { continue };
            let guest = self.state.read::<GuestRecord>(&leased.guest).await?;
            if guest.is_some_and(|guest| is_standing(&guest.owner, leased.operation)) {
                guests.push((leased, self.standing(&record)));
            }
        }
        self.board.tidy(&active);
        let standbys: HashSet<HostId> = guests.iter().map(|(leased, _)| leased.destination).collect();
        self.there.retain(|host, _| standbys.contains(host));
        for host in standbys {
            match self.live.get(host) {
                Some(_) => drop(self.there.entry(host).or_insert_with(Instant::now)),
                None => drop(self.there.remove(&host)),
            }
        }
        self.told.retain(|operation, _| guests.iter().any(|(leased, _)| leased.operation == *operation));
        let mut decided = 0;
        for (leased, standing) in guests {
            let is_there = |since: &Instant| since.elapsed() >= self.pace.settle;
            let verdict = judge(Sight {
                lease_ms: leased.lease_ms,
                silent_ms: self.board.silent_ms(leased.source),
                is_whole: standing.committed > 0,
                is_leased: standing.is_leased,
                is_standby_there: self.there.get(&leased.destination).is_some_and(is_there),
                over_in_ms: self.board.over_in_ms(leased.guest, leased.lease_ms),
            });
            if verdict != Verdict::FailOver {
                // Others wait for what is decided about them.
                if let Err(error) = self.tell(leased, verdict).await {
                    warn!(guest = %leased.guest, "what happens to it cannot be told now: {}", chain(&error));
                }
            } else if decided < AT_ONCE {
                decided += 1;
                if let Err(error) = self.fail_over(leased).await {
                    warn!(guest = %leased.guest, "its standby cannot be told to take over now: {}", chain(&error));
                }
            }
        }
        Ok(())
    }

    async fn tell_beaten(&self) -> Result<(), StateError> {
        let why = "another controller works on the same store, and grants leases now: stop one of them; guests of hosts that are linked to \
                   this one stand still when their leases end";
        warn!("ALARM: {why}");
        let mut change = Change::new();
        change.event(EventDraft::new("controller.beaten").data(serde_json::json!({ "why": why })));
        self.state.commit(&context(), change).await.map(drop)
    }

    fn standing(&self, record: &OperationRecord) -> MirrorStanding {
        let mut progress = record.operation.progress.clone();
        self.progress.apply(record.operation.id, &mut progress);
        progress.mirror.unwrap_or_default()
    }

    /// Tells people, once for each thing that there is to tell.
    async fn tell(&mut self, leased: Leased, verdict: Verdict) -> Result<(), StateError> {
        let (kind, message, data) = match verdict {
            Verdict::Blocked(why) => (
                "guest.failover_blocked",
                format!("its host is silent, and nothing takes over: {why}"),
                serde_json::json!({ "why": why }),
            ),
            Verdict::Waits(in_ms) => (
                "guest.failover_waits",
                format!("fail-over in {} s unless its host is heard", in_ms.div_ceil(1000)),
                serde_json::json!({ "in_ms": in_ms }),
            ),
            Verdict::Nothing | Verdict::FailOver => {
                ("guest.failover_called_off", "its host is heard again".to_owned(), serde_json::json!({}))
            }
        };
        let mark = match verdict {
            Verdict::Blocked(why) => why,
            _ => kind,
        };
        let is_calm = verdict == Verdict::Nothing;
        if is_calm && !self.told.contains_key(&leased.operation) {
            return Ok(());
        }
        let progress = supercloud_api::Progress { message: message.clone(), ..supercloud_api::Progress::default() };
        self.progress.tell(leased.operation, &progress);
        if self.told.get(&leased.operation) == Some(&mark) {
            return Ok(());
        }
        warn!(guest = %leased.guest, host = %leased.source, standby = %leased.destination, "ALARM: {message}");
        let mut change = Change::new();
        change.event(event(kind, leased).data(data));
        self.state.commit(&context(), change).await?;
        match is_calm {
            true => self.told.remove(&leased.operation),
            false => self.told.insert(leased.operation, mark),
        };
        Ok(())
    }

    /// The decision: one durable write. What follows from it, the engine does.
    async fn fail_over(&mut self, leased: Leased) -> Result<(), StateError> {
        if !self.board.close(leased.guest, leased.operation, leased.lease_ms) {
            return Ok(());
        }
        let written = retry_conflicts(|| async {
            // The claim first: it is compared with what is written.
            let claim = self.claim.revision();
            if !self.claim.holds(&self.state).await? {
                return Ok(None);
            }
            let Some(before) = self.state.read::<OperationRecord>(&leased.operation).await? else { return Ok(None) };
            let Some(guest) = self.state.read::<GuestRecord>(&leased.guest).await? else { return Ok(None) };
            if self::leased(&before).is_none() || !is_standing(&guest.owner, leased.operation) {
                return Ok(None);
            }
            let mut change = decision(&before, leased, (claim, &self.claim.0.name));
            // Whether it is a mirror still is said there, and nothing of that changes meanwhile.
            change.unchanged(&guest);
            Ok::<_, StateError>(Some(self.state.commit(&context(), change).await?))
        });
        match written.await {
            Ok(Some(committed)) => {
                self.claim.set(committed.revision);
                warn!(guest = %leased.guest, host = %leased.source, standby = %leased.destination,
                    "ALARM: its host is silent and its lease is over: its standby takes over");
                Ok(())
            }
            // Somebody has ended the mirror, or another controller decides: nothing was written.
            Ok(None) => {
                self.board.open(leased.guest);
                Ok(())
            }
            Err(error) => {
                // It may have been written. It stays closed, and is decided again.
                Err(error)
            }
        }
    }
}

fn context() -> Context {
    Context::actor(ACTOR.to_owned(), RequestId::generate())
}

fn event(kind: &'static str, leased: Leased) -> EventDraft {
    EventDraft::new(kind).guest(Some(leased.guest)).operation(leased.operation).host(leased.source)
}

fn decision(before: &Stored<OperationRecord>, leased: Leased, (claim, name): (u64, &str)) -> Change {
    let mut now = before.value.clone();
    if let Work::GuestMirror { is_failing_over, .. } = &mut now.work {
        *is_failing_over = true;
    }
    let mut change = Change::new();
    let data = serde_json::json!({ "standby": leased.destination, "lease_ms": leased.lease_ms });
    change.event(event("guest.failed_over_by_lease", leased).project(now.operation.project).data(data));
    change.guard_as(keys::lease_guard(), claim, name);
    change.update_operation(before, &mut now);
    change
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: Sight = Sight {
        lease_ms: 15_000,
        silent_ms: 20_000,
        is_whole: true,
        is_leased: true,
        is_standby_there: true,
        over_in_ms: 0,
    };

    #[tokio::test]
    async fn the_newest_of_two_controllers_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let options = supercloud_store::SledOptions::default();
        let store = supercloud_store::SledStore::open(folder.path(), options).await.unwrap();
        let state = State::open(Arc::new(store)).await.unwrap();
        let (old, new) = (Claim::default(), Claim::default());
        let mut now = Instant::now();
        assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Begun);
        assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Holds);
        assert_eq!(new.renew(&state, now).await.unwrap(), Claimed::Begun);
        assert!(!old.holds(&state).await.unwrap() && new.holds(&state).await.unwrap());
        for is_news in [true, false, false] {
            assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Beaten { is_news });
        }
        now += LEFT_ALONE - Duration::from_secs(1);
        assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Beaten { is_news: false });
        assert_eq!(new.renew(&state, now).await.unwrap(), Claimed::Holds);
        // The new one may be gone by then. If it is not, it is beaten in its turn, and leaves alone who has it.
        now += Duration::from_secs(2);
        assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Begun);
        assert_eq!(new.renew(&state, now).await.unwrap(), Claimed::Beaten { is_news: true });
        // Each time for longer.
        now += LEFT_ALONE * 3 / 2;
        assert_eq!(new.renew(&state, now).await.unwrap(), Claimed::Begun);
        assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Beaten { is_news: true });
        now += LEFT_ALONE * 3 / 2;
        assert_eq!(old.renew(&state, now).await.unwrap(), Claimed::Beaten { is_news: false });
        // What it wrote itself, without hearing that it was written, is nobody else's.
        let seen = state.revision_of(keys::lease_guard()).await.unwrap();
        let mut change = Change::new();
        change.guard_as(keys::lease_guard(), seen, &new.0.name);
        state.commit(&Context::system(), change).await.unwrap();
        assert_eq!(new.renew(&state, now).await.unwrap(), Claimed::Begun);
    }

    #[test]
    fn a_standby_takes_over_when_the_host_is_silent_and_the_lease_is_surely_over() {
        assert_eq!(judge(DEAD), Verdict::FailOver);
        assert_eq!(judge(Sight { over_in_ms: 1, ..DEAD }), Verdict::Waits(1));
        // Heard just now, whatever was granted.
        assert_eq!(judge(Sight { silent_ms: 0, ..DEAD }), Verdict::Nothing);
        for blocked in [
            Sight { is_whole: false, ..DEAD },
            Sight { is_leased: false, ..DEAD },
            Sight { is_standby_there: false, ..DEAD },
            Sight { is_standby_there: false, over_in_ms: 5, ..DEAD },
        ] {
            assert!(matches!(judge(blocked), Verdict::Blocked(_)), "{blocked:?}");
            assert_eq!(judge(Sight { silent_ms: 1_000, ..blocked }), Verdict::Nothing);
        }
    }
}
