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
//! then; it grants nothing before, and nothing any more once another one has said the same. That a guest fails over is written in one
//! transaction with the claim.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use supercloud_api::{
    MirrorStanding, Phase,
    ids::{GuestId, HostId, OperationId, RequestId},
};
use tokio::time::Instant;
use tracing::warn;

use crate::{
    chain,
    leases::LeaseBoard,
    operations::progress::ProgressBoard,
    state::{
        Change, Context, EventDraft, LiveHosts, OperationRecord, State, StateError, Stored, Work, keys, retry_conflicts,
    },
};

/// In whose name it is done.
const ACTOR: &str = "fencing";
/// So many guests are decided about at once; the others a moment later.
const AT_ONCE: usize = 16;

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
#[derive(Debug, Clone, Default)]
pub struct Claim(Arc<AtomicU64>);

impl Claim {
    /// Whether nobody else has said the same since.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn holds(&self, state: &State) -> Result<bool, StateError> {
        let mine = self.0.load(Ordering::SeqCst);
        Ok(mine != 0 && state.revision_of(keys::lease_guard()).await? == mine)
    }

    /// Says so, if it does not hold; whether it did not.
    async fn renew(&self, state: &State) -> Result<bool, StateError> {
        let seen = state.revision_of(keys::lease_guard()).await?;
        let mine = self.0.load(Ordering::SeqCst);
        if mine != 0 && seen == mine {
            return Ok(false);
        }
        self.0.store(0, Ordering::SeqCst);
        let mut change = Change::new();
        change.guard(keys::lease_guard(), seen);
        let committed = state.commit(&Context::system(), change).await?;
        self.0.store(committed.revision, Ordering::SeqCst);
        Ok(true)
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
        if self.claim.renew(&self.state).await? {
            // Only now nobody else grants any more.
            self.board.begin_anew();
        }
        let mut guests = Vec::new();
        let mut active = HashSet::new();
        for id in self.state.active_operations().await? {
            let Some(record) = self.state.read::<OperationRecord>(&id).await? else { continue };
            active.insert(id);
            if let Some(leased) = leased(&record) {
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
                self.tell(leased, verdict).await?;
            } else if decided < AT_ONCE {
                decided += 1;
                if let Err(error) = self.fail_over(leased).await {
                    warn!(guest = %leased.guest, "its standby cannot be told to take over now: {}", chain(&error));
                }
            }
        }
        Ok(())
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
            let claim = self.claim.0.load(Ordering::SeqCst);
            if !self.claim.holds(&self.state).await? {
                return Ok(None);
            }
            let Some(before) = self.state.read::<OperationRecord>(&leased.operation).await? else { return Ok(None) };
            if self::leased(&before).is_none() {
                return Ok(None);
            }
            let change = decision(&before, leased, claim);
            Ok::<_, StateError>(Some(self.state.commit(&context(), change).await?))
        });
        match written.await {
            Ok(Some(committed)) => {
                self.claim.0.store(committed.revision, Ordering::SeqCst);
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

fn decision(before: &Stored<OperationRecord>, leased: Leased, claim: u64) -> Change {
    let mut now = before.value.clone();
    if let Work::GuestMirror { is_failing_over, .. } = &mut now.work {
        *is_failing_over = true;
    }
    let mut change = Change::new();
    let data = serde_json::json!({ "standby": leased.destination, "lease_ms": leased.lease_ms });
    change.event(event("guest.failed_over_by_lease", leased).project(now.operation.project).data(data));
    change.guard(keys::lease_guard(), claim);
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
