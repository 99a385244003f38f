//! What is kept of the events. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Deserialize;
use supercloud_api::{
    Event, GuestStay, OperationKind, Phase, Reliability,
    handover::Owner,
    ids::{GuestId, HostId, OperationId, ProjectId},
};

use super::Window;

/// Whether a guest ran from a moment on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A host has it.
    At(HostId),
    /// Nobody has it, and somebody should.
    Lost,
    /// It is not to run: stopped, frozen, deleted.
    Still,
}

/// From a moment on, and by which operation.
#[derive(Debug, Clone, Copy)]
struct Turn {
    at_ms: u64,
    state: State,
    operation: Option<OperationId>,
}

/// A guest's life, in the order of time.
#[derive(Debug)]
struct Life {
    project: Option<ProjectId>,
    turns: Vec<Turn>,
    /// When it had a mirror whose copy was under way or whole, from and until.
    mirrors: Vec<(u64, Option<u64>)>,
    /// When it ran nowhere though a host had it: silent before it ran elsewhere.
    silences: Vec<(u64, u64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Moved(Option<u64>),
    RolledBack { is_late: bool },
    Failed,
}

#[derive(Debug, Clone, Copy)]
struct End {
    at_ms: u64,
    guest: GuestId,
    project: Option<ProjectId>,
    operation: Option<OperationId>,
    outcome: Outcome,
}

/// That a provider takes a host back.
#[derive(Debug, Clone, Copy)]
struct Notice {
    host: HostId,
    /// When.
    at_ms: u64,
    /// What it came to was added to [`Missed::by_notices`].
    is_counted: bool,
}

/// Deadlines that were missed ever: these numbers never become smaller, also over restarts, as they are made of all events there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Missed {
    /// Moves that had not switched in time.
    pub by_moves: u64,
    /// Guests that were on a host still when its provider took it.
    pub by_notices: u64,
}

/// So long after a host was taken it is settled who was on it still, in milliseconds: what happened before has been told by then.
const SETTLED_MS: u64 = 60_000;

/// Everything that is kept.
#[derive(Debug, Default)]
pub struct Book {
    seq: u64,
    lives: HashMap<GuestId, Life>,
    ends: Vec<End>,
    notices: Vec<Notice>,
    /// Since when hosts are silent.
    silent: BTreeMap<HostId, u64>,
    missed: Missed,
}

#[derive(Deserialize)]
struct Switched {
    to: To,
}

#[derive(Deserialize)]
struct To {
    owner: Owner,
}

#[derive(Deserialize)]
struct PhaseTold {
    kind: OperationKind,
    phase: Phase,
    #[serde(default)]
    downtime_ms: Option<u64>,
    #[serde(default)]
    missed_deadline: bool,
}

#[derive(Deserialize)]
struct NoticeTold {
    kind: supercloud_api::HostNoticeKind,
    at_ms: Option<u64>,
}

/// What of an event is of this form; what is not was written by another version, and tells nothing.
fn data<T: serde::de::DeserializeOwned>(event: &Event) -> Option<T> {
    T::deserialize(&event.data).ok()
}

/// What two stretches of time have in common, in milliseconds.
fn common(a: (u64, u64), b: (u64, u64)) -> u64 {
    a.1.min(b.1).saturating_sub(a.0.max(b.0))
}

impl Life {
    fn new(project: Option<ProjectId>) -> Self {
        Self { project, turns: Vec::new(), mirrors: Vec::new(), silences: Vec::new() }
    }

    fn state(&self) -> State {
        self.turns.last().map_or(State::Still, |turn| turn.state)
    }

    fn turn(&mut self, at_ms: u64, state: State, operation: Option<OperationId>) {
        if self.state() != state {
            // Clocks may go back between controllers: time as it is kept does not.
            let at_ms = self.turns.last().map_or(at_ms, |before| at_ms.max(before.at_ms));
            self.turns.push(Turn { at_ms, state, operation });
        }
    }

    /// Each state with its time; the last one goes on.
    fn stretches(&self) -> impl Iterator<Item = ((u64, u64), &Turn)> {
        let ends = self.turns.iter().skip(1).map(|turn| turn.at_ms).chain([u64::MAX]);
        self.turns.iter().zip(ends).map(|(turn, to_ms)| ((turn.at_ms, to_ms), turn))
    }

    fn at(&self, at_ms: u64) -> State {
        self.stretches()
            .find(|((from, to), _)| *from <= at_ms && at_ms < *to)
            .map_or(State::Still, |(_, turn)| turn.state)
    }

    fn is_mirrored(&self, at_ms: u64) -> bool {
        self.mirrors.iter().any(|(from, to)| *from <= at_ms && to.is_none_or(|to| at_ms <= to))
    }
}

impl Book {
    /// The number of the last event that was looked at.
    pub const fn seq(&self) -> u64 {
        self.seq
    }

    /// Looks at the event that follows.
    pub fn see(&mut self, event: &Event) {
        self.seq = event.seq;
        match event.kind.as_str() {
            "guest.switched" => self.switched(event),
            "guest.deleted" => {
                if let Some(life) = event.guest.and_then(|guest| self.lives.get_mut(&guest)) {
                    life.turn(event.at_ms, State::Still, event.operation);
                }
            }
            "operation.phase" => self.phase(event),
            "host.unreachable" => {
                if let Some(host) = event.host {
                    self.silent.entry(host).or_insert(event.at_ms);
                }
            }
            "host.up" | "host.removed" => {
                if let Some(host) = event.host {
                    self.silent.remove(&host);
                }
            }
            "host.notice" => {
                let told =
                    data::<NoticeTold>(event).filter(|told| told.kind == supercloud_api::HostNoticeKind::Interruption);
                if let (Some(host), Some(at_ms)) = (event.host, told.and_then(|told| told.at_ms)) {
                    self.withdraw(host, event.at_ms);
                    // One that is told twice is one.
                    if !self.notices.iter().any(|known| (known.host, known.at_ms) == (host, at_ms)) {
                        self.notices.push(Notice { host, at_ms, is_counted: false });
                    }
                }
            }
            "host.uncordoned" => {
                if let Some(host) = event.host {
                    self.withdraw(host, event.at_ms);
                }
            }
            _ => {}
        }
    }

    /// What was announced for later does not come, or comes at another time.
    fn withdraw(&mut self, host: HostId, now_ms: u64) {
        self.notices.retain(|notice| notice.host != host || notice.at_ms <= now_ms);
    }

    fn switched(&mut self, event: &Event) {
        let (Some(guest), Some(Switched { to })) = (event.guest, data::<Switched>(event)) else { return };
        let life = self.lives.entry(guest).or_insert_with(|| Life::new(event.project));
        let now = match to.owner {
            Owner::Host(host) => State::At(host),
            Owner::Lost(_) => State::Lost,
            Owner::Unowned | Owner::Frozen(_) | Owner::Stopped => State::Still,
        };
        if let (State::At(before), State::At(_) | State::Lost) = (life.state(), now)
            && now != State::At(before)
            && let Some(since) = self.silent.get(&before)
        {
            let begun = life.turns.last().map_or(*since, |turn| turn.at_ms).max(*since);
            life.silences.push((begun, event.at_ms.max(begun)));
        }
        life.turn(event.at_ms, now, event.operation);
    }

    fn phase(&mut self, event: &Event) {
        let (Some(guest), Some(told)) = (event.guest, data::<PhaseTold>(event)) else { return };
        if told.kind == OperationKind::GuestMirror {
            let life = self.lives.entry(guest).or_insert_with(|| Life::new(event.project));
            match told.phase {
                Phase::Copy => life.mirrors.push((event.at_ms, None)),
                phase if phase.is_terminal() => {
                    if let Some((_, end @ None)) = life.mirrors.last_mut() {
                        *end = Some(event.at_ms);
                    }
                }
                _ => {}
            }
        }
        if told.kind != OperationKind::GuestMigrate {
            return;
        }
        let outcome = match told.phase {
            Phase::Done => Outcome::Moved(told.downtime_ms),
            Phase::RolledBack => {
                self.missed.by_moves += u64::from(told.missed_deadline);
                Outcome::RolledBack { is_late: told.missed_deadline }
            }
            Phase::Failed => Outcome::Failed,
            _ => return,
        };
        self.ends.push(End { at_ms: event.at_ms, guest, project: event.project, operation: event.operation, outcome });
    }

    /// Guests that were on a host still, without a mirror, when its provider took it.
    fn left_behind<'a>(notice: (HostId, u64), lives: impl Iterator<Item = &'a Life>) -> u64 {
        let (host, at_ms) = notice;
        lives.filter(|life| life.at(at_ms) == State::At(host) && !life.is_mirrored(at_ms)).count() as u64
    }

    /// Counts what is past for good as of a time. Before anything of it is forgotten.
    pub fn settle(&mut self, now_ms: u64) {
        let mut notices = std::mem::take(&mut self.notices);
        let due = |notice: &&mut Notice| !notice.is_counted && notice.at_ms.saturating_add(SETTLED_MS) <= now_ms;
        for notice in notices.iter_mut().filter(due) {
            notice.is_counted = true;
            self.missed.by_notices += Self::left_behind((notice.host, notice.at_ms), self.lives.values());
        }
        self.notices = notices;
    }

    /// What was missed ever, as far as it is settled.
    pub const fn missed(&self) -> Missed {
        self.missed
    }

    /// Forgets what was over before.
    pub fn forget(&mut self, before_ms: u64) {
        self.ends.retain(|end| end.at_ms >= before_ms);
        self.notices.retain(|notice| notice.at_ms >= before_ms);
        self.lives.retain(|_, life| {
            let over = life.turns.iter().skip(1).take_while(|turn| turn.at_ms <= before_ms).count();
            life.turns.drain(..over);
            life.silences.retain(|(_, to)| *to > before_ms);
            life.mirrors.retain(|(_, to)| to.is_none_or(|to| to > before_ms));
            life.turns.len() > 1 || life.state() != State::Still || life.turns.iter().any(|turn| turn.at_ms > before_ms)
        });
    }

    /// Where a guest lived.
    fn stays(&self, life: &Life, span: (u64, u64)) -> Vec<GuestStay> {
        let paused = |operation: OperationId| {
            let end = self.ends.iter().rev().find(|end| end.operation == Some(operation))?;
            if let Outcome::Moved(downtime_ms) = end.outcome { downtime_ms } else { None }
        };
        let stay = |(stretch, turn): ((u64, u64), &Turn)| GuestStay {
            from_ms: stretch.0.max(span.0),
            until_ms: stretch.1.min(span.1),
            host: if let State::At(host) = turn.state { Some(host) } else { None },
            is_lost: turn.state == State::Lost,
            operation: turn.operation,
            downtime_ms: turn.operation.and_then(paused),
        };
        life.stretches().filter(|(stretch, _)| common(*stretch, span) > 0).map(stay).collect()
    }

    /// How good it was.
    pub fn tell(&self, window: &Window) -> Reliability {
        let mut told = Reliability { from_ms: window.from_ms, to_ms: window.to_ms, ..Reliability::default() };
        let span = (window.from_ms, window.to_ms);
        let is_asked_for = |project: Option<ProjectId>, guest: GuestId| {
            window.project.is_none_or(|wanted| project == Some(wanted))
                && window.guest.is_none_or(|wanted| guest == wanted)
        };
        let lives =
            || self.lives.iter().filter(|(guest, life)| is_asked_for(life.project, **guest)).map(|(_, life)| life);
        for life in lives() {
            let mut wanted_ms = 0_u64;
            for (stretch, turn) in life.stretches() {
                let ms = common(stretch, span);
                match turn.state {
                    State::Still => {}
                    State::At(_) => wanted_ms += ms,
                    State::Lost => {
                        wanted_ms += ms;
                        told.lost_ms += ms;
                    }
                }
            }
            told.lost_ms += life.silences.iter().map(|silence| common(*silence, span)).sum::<u64>();
            told.wanted_ms = told.wanted_ms.saturating_add(wanted_ms);
            told.guests += u64::from(wanted_ms > 0);
        }
        if window.guest.is_some() {
            told.stays = lives().flat_map(|life| self.stays(life, span)).collect();
        }
        let mut pauses = Vec::new();
        let is_in = |at_ms: u64| (window.from_ms..window.to_ms).contains(&at_ms);
        for end in self.ends.iter().filter(|end| is_in(end.at_ms) && is_asked_for(end.project, end.guest)) {
            match end.outcome {
                Outcome::Moved(downtime_ms) => {
                    told.moves += 1;
                    pauses.extend(downtime_ms);
                }
                Outcome::RolledBack { is_late } => {
                    told.rolled_back += 1;
                    told.missed_by_moves += u64::from(is_late);
                }
                Outcome::Failed => told.failed += 1,
            }
        }
        pauses.sort_unstable();
        let rank = |of_hundred: usize| pauses.get((pauses.len() * of_hundred).div_ceil(100).saturating_sub(1)).copied();
        (told.downtime_p50_ms, told.downtime_p99_ms) = (rank(50), rank(99));
        told.paused_ms = pauses.iter().fold(0, |sum: u64, pause| sum.saturating_add(*pause));
        // One that is told twice is one.
        let notices: BTreeSet<(HostId, u64)> =
            self.notices.iter().filter(|one| is_in(one.at_ms)).map(|one| (one.host, one.at_ms)).collect();
        for notice in notices {
            told.missed_by_notices += Self::left_behind(notice, lives());
        }
        let missed = told.lost_ms.saturating_add(told.paused_ms).min(told.wanted_ms);
        told.availability_ppm = (told.wanted_ms > 0).then(|| {
            let ran = u128::from(told.wanted_ms - missed) * 1_000_000 / u128::from(told.wanted_ms);
            u64::try_from(ran).unwrap_or(1_000_000)
        });
        told
    }
}

#[cfg(test)]
mod tests;
