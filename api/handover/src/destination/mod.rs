//! The destination's machine: a guest that comes here (moved, thawed, started), and runs only with a grant.
//!
//! ```text
//!        Prepare            Prepared             all received              Granted              GuestRunning
//!  Idle ---------> Preparing --------> Receiving ------------> Complete ------------> Granted ---------------> Running
//!    ^                 |                   |              asks for the switch    COMMIT POINT                     |
//!    |   Destroyed     |    failed, Cancel, Refused            |                 is behind it         NothingMissing
//!    +--- Destroying <-+-------------------+-------------------+                                                  v
//!                                          what was received is gone --> Orphaned       Finished <--Settled-- Fetched
//!                                                                           | Granted: Lost (an alarm) --Settled--^
//! ```

mod vocabulary;

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, HostId, OperationId};

use crate::{
    Refusal,
    message::{
        AbortReason, Alarm, DestinationOrder, DestinationPlan, Found, Grant, OperationKind, Owner, Report,
        SwitchRefusal, SwitchRequest,
    },
    source::{SourceHandover, SourceState},
};

pub use vocabulary::{DestinationEffect, DestinationEvent, DestinationState, Outcome};

/// The destination's machine for one guest on one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DestinationHandover {
    guest: GuestId,
    host: HostId,
    state: DestinationState,
    /// The last turn that is known to be over.
    ended: u64,
}

use DestinationEffect as Effect;
use DestinationState as State;

impl DestinationHandover {
    /// The machine of a host that receives nothing.
    #[must_use]
    pub const fn idle(guest: GuestId, host: HostId) -> Self {
        Self { guest, host, state: State::Idle, ended: 0 }
    }

    /// The guest.
    #[must_use]
    pub const fn guest(&self) -> GuestId {
        self.guest
    }

    /// Where it is.
    #[must_use]
    pub const fn state(&self) -> &DestinationState {
        &self.state
    }

    /// The operation that it takes part in.
    #[must_use]
    pub const fn operation(&self) -> Option<OperationId> {
        match &self.state {
            State::Idle => None,
            State::Preparing { plan }
            | State::Receiving { plan, .. }
            | State::Complete { plan, .. }
            | State::Orphaned { plan } => Some(plan.operation),
            State::Destroying { operation, .. } => Some(*operation),
            State::Granted { grant, .. }
            | State::Running { grant, .. }
            | State::Fetched { grant, .. }
            | State::Lost { grant }
            | State::Finished { grant, .. } => Some(grant.operation),
        }
    }

    /// The proof that it may run the guest, once it has it.
    #[must_use]
    pub const fn grant(&self) -> Option<&Grant> {
        match &self.state {
            State::Granted { grant, .. }
            | State::Running { grant, .. }
            | State::Fetched { grant, .. }
            | State::Lost { grant }
            | State::Finished { grant, .. } => Some(grant),
            _ => None,
        }
    }

    /// The epoch at which it owns the guest, or will if it is granted.
    #[must_use]
    pub const fn epoch(&self) -> Option<Epoch> {
        match &self.state {
            State::Idle | State::Destroying { .. } => None,
            State::Preparing { plan }
            | State::Receiving { plan, .. }
            | State::Complete { plan, .. }
            | State::Orphaned { plan } => Some(plan.epoch()),
            State::Granted { grant, .. }
            | State::Running { grant, .. }
            | State::Fetched { grant, .. }
            | State::Lost { grant }
            | State::Finished { grant, .. } => Some(grant.epoch),
        }
    }

    /// When its part is over: the machine of the guest that lives here now, and this one ready for the next operation.
    #[must_use]
    pub fn into_source(self) -> Option<(SourceHandover, DestinationHandover)> {
        let State::Finished { grant, outcome } = self.state else { return None };
        let state = match outcome {
            Outcome::Runs => SourceState::Running,
            Outcome::Gone => SourceState::Lost { operation: None },
            Outcome::Volumes => SourceState::Serving { guest_kept: false },
        };
        let source = SourceHandover::with(self.guest, self.host, grant.epoch, state, grant.turn);
        Some((source, Self { state: State::Idle, ended: self.ended.max(grant.turn), ..self }))
    }

    /// Takes one event and says what is to be done.
    ///
    /// The caller persists the machine BEFORE it carries out the effects, and carries them out in order, one batch after
    /// the other; an effect that fails ends its batch, and the next [`DestinationEvent::Tick`] asks for it again.
    pub fn step(&mut self, event: DestinationEvent) -> Vec<DestinationEffect> {
        match event {
            DestinationEvent::Order(order) => self.order(order),
            DestinationEvent::Tick => self.tick(),
            DestinationEvent::Restarted { found } => self.restarted(found),
            DestinationEvent::Prepared { operation } => match &self.state {
                State::Preparing { plan } if plan.operation == operation => {
                    self.state = State::Receiving { plan: plan.clone(), state_received: false, volumes: None };
                    self.tick()
                }
                _ => self.refuse(),
            },
            DestinationEvent::ReceiveFailed { operation } => match &self.state {
                State::Preparing { plan } | State::Receiving { plan, .. } if plan.operation == operation => {
                    let turn = plan.turn;
                    self.destroy(operation, turn)
                }
                // Complete needs its source no more.
                State::Complete { plan, .. } if plan.operation == operation => Vec::new(),
                _ => self.refuse(),
            },
            DestinationEvent::StateReceived { operation } => match &mut self.state {
                State::Receiving { plan, state_received, .. } if plan.operation == operation => {
                    *state_received = true;
                    self.complete()
                }
                _ => self.refuse(),
            },
            DestinationEvent::VolumeMapsReceived { operation, volumes: received } => match &mut self.state {
                State::Receiving { plan, volumes, .. } if plan.operation == operation => {
                    *volumes = Some(received);
                    self.complete()
                }
                _ => self.refuse(),
            },
            DestinationEvent::GuestRunning { epoch } => match &self.state {
                State::Granted { plan, grant } if grant.epoch == epoch => {
                    self.state = State::Running { plan: plan.clone(), grant: *grant };
                    self.tick()
                }
                State::Running { grant, .. } | State::Fetched { grant, .. } if grant.epoch == epoch => Vec::new(),
                _ => self.refuse(),
            },
            DestinationEvent::NothingMissing { epoch } => match &self.state {
                State::Running { grant, .. } if grant.epoch == epoch => {
                    self.state = State::Fetched { grant: *grant, gone: false };
                    self.tick()
                }
                State::Fetched { grant, .. } if grant.epoch == epoch => Vec::new(),
                _ => self.refuse(),
            },
            DestinationEvent::GuestGone => self.gone(),
            DestinationEvent::Destroyed { operation } => match &self.state {
                State::Destroying { operation: mine, turn } if *mine == operation => {
                    self.ended = self.ended.max(*turn);
                    self.state = State::Idle;
                    vec![Effect::Send(Report::Cleaned { operation })]
                }
                _ => self.refuse(),
            },
        }
    }

    fn refuse(&self) -> Vec<Effect> {
        vec![Effect::Refuse(Refusal::NotInThisState)]
    }

    fn order(&mut self, order: DestinationOrder) -> Vec<Effect> {
        match order {
            DestinationOrder::Prepare(plan) => self.prepare(plan),
            DestinationOrder::Granted(grant) => self.granted(grant),
            DestinationOrder::Cancel { operation, turn } => {
                if self.operation() == Some(operation) {
                    self.cancel(operation)
                } else {
                    // Nothing is here of that operation, nor shall be.
                    self.ended = self.ended.max(turn);
                    vec![Effect::Send(Report::Cleaned { operation })]
                }
            }
            DestinationOrder::Refused { operation, reason } => {
                if self.operation() == Some(operation) {
                    self.refused(operation, reason)
                } else {
                    vec![Effect::Refuse(Refusal::NoOperation)]
                }
            }
            DestinationOrder::Wait { .. } => Vec::new(),
            DestinationOrder::TakeOver { operation } => self.take_over(operation),
            DestinationOrder::SourceLost { operation } => match &self.state {
                State::Running { grant, .. } if grant.operation == operation => {
                    vec![Effect::GiveUpMemory { operation }]
                }
                _ => self.refuse(),
            },
            DestinationOrder::Settled { operation } => {
                if self.operation() == Some(operation) {
                    self.settled()
                } else {
                    self.refuse()
                }
            }
        }
    }

    fn prepare(&mut self, plan: DestinationPlan) -> Vec<Effect> {
        if plan.guest != self.guest {
            return vec![Effect::Refuse(Refusal::OtherGuest)];
        }
        if plan.to != self.host || plan.kind.destination() != Some(self.host) {
            return vec![Effect::Refuse(Refusal::OtherHost)];
        }
        let operation = plan.operation;
        match &self.state {
            _ if plan.turn <= self.ended => vec![Effect::Send(Report::Cleaned { operation })],
            State::Idle => {
                self.state = State::Preparing { plan: plan.clone() };
                vec![Effect::Prepare(plan)]
            }
            State::Preparing { plan: mine } if mine.operation == operation => Vec::new(),
            _ => {
                // The same operation: say again where it stands. Another: mine must be over, and asking tells how.
                let mut effects = self.reports();
                if let Some(mine) = self.operation().filter(|mine| *mine != operation) {
                    effects.push(Effect::Refuse(Refusal::OtherOperation(mine)));
                }
                effects
            }
        }
    }

    fn granted(&mut self, grant: Grant) -> Vec<Effect> {
        if grant.guest != self.guest {
            return vec![Effect::Refuse(Refusal::OtherGuest)];
        }
        if grant.owner != Owner::Host(self.host) {
            return vec![Effect::Refuse(Refusal::OtherHost)];
        }
        match &self.state {
            State::Idle if grant.turn <= self.ended => self.refuse(),
            State::Idle => vec![has_nothing(&grant)],
            _ if self.operation() != Some(grant.operation) => vec![Effect::Refuse(Refusal::NoOperation)],
            State::Complete { plan, .. } | State::Orphaned { plan } if plan.epoch() != grant.epoch => {
                vec![Effect::Refuse(Refusal::OtherEpoch { mine: plan.epoch(), theirs: grant.epoch })]
            }
            State::Complete { plan, .. } => {
                self.state = State::Granted { plan: plan.clone(), grant };
                self.tick()
            }
            State::Orphaned { .. } => self.lose(grant),
            State::Granted { .. } | State::Running { .. } | State::Fetched { .. } | State::Lost { .. } => {
                self.reports()
            }
            // Granted without having been complete: what is here is not what the grant is about.
            State::Preparing { .. } | State::Receiving { .. } => {
                // Not remembered as ended: the controller must go on hearing that nothing is here.
                let mut effects = self.destroy(grant.operation, grant.turn.saturating_sub(1));
                effects.push(has_nothing(&grant));
                effects
            }
            State::Destroying { .. } => vec![has_nothing(&grant)],
            State::Finished { .. } => self.refuse(),
        }
    }

    fn take_over(&self, operation: OperationId) -> Vec<Effect> {
        match &self.state {
            State::Receiving { plan, .. }
                if plan.operation == operation && matches!(plan.kind, OperationKind::Mirror { .. }) =>
            {
                vec![Effect::TakeOver { operation }]
            }
            State::Preparing { plan } if plan.operation == operation => Vec::new(),
            State::Idle => vec![Effect::Send(Report::Cleaned { operation })],
            _ if self.operation() == Some(operation) => self.reports(),
            _ => vec![Effect::Refuse(Refusal::NoOperation)],
        }
    }

    fn cancel(&mut self, operation: OperationId) -> Vec<Effect> {
        match &self.state {
            State::Preparing { plan }
            | State::Receiving { plan, .. }
            | State::Complete { plan, .. }
            | State::Orphaned { plan } => {
                let turn = plan.turn;
                self.destroy(operation, turn)
            }
            State::Destroying { .. } => Vec::new(),
            // A grant is for good; so one of the two is a lie, and running on is the safe answer.
            _ => vec![Effect::Refuse(Refusal::AlreadyGranted)],
        }
    }

    fn refused(&mut self, operation: OperationId, reason: SwitchRefusal) -> Vec<Effect> {
        match (&self.state, reason) {
            (
                State::Granted { grant, .. } | State::Running { grant, .. } | State::Fetched { grant, .. },
                SwitchRefusal::WrongOrigin(now),
            ) if now.epoch > grant.epoch => {
                let grant = *grant;
                self.state = State::Finished { grant, outcome: Outcome::Volumes };
                vec![
                    Effect::DestroyGuest { operation },
                    Effect::SealVolumes { epoch: grant.epoch },
                    Effect::Raise(Alarm::Superseded { had: grant.epoch, now: now.epoch }),
                ]
            }
            (State::Lost { grant }, SwitchRefusal::WrongOrigin(now)) if now.epoch > grant.epoch => {
                self.state = State::Finished { grant: *grant, outcome: Outcome::Volumes };
                Vec::new()
            }
            _ => self.cancel(operation),
        }
    }

    fn settled(&mut self) -> Vec<Effect> {
        let (grant, outcome) = match self.state {
            State::Fetched { grant, gone: false } => (grant, Outcome::Runs),
            State::Fetched { grant, gone: true } => (grant, Outcome::Gone),
            State::Lost { grant } => (grant, Outcome::Volumes),
            State::Finished { .. } => return Vec::new(),
            _ => return self.refuse(),
        };
        self.state = State::Finished { grant, outcome };
        Vec::new()
    }

    fn complete(&mut self) -> Vec<Effect> {
        match &mut self.state {
            State::Receiving { plan, state_received: true, volumes: Some(volumes) } => {
                self.state = State::Complete { plan: plan.clone(), volumes: std::mem::take(volumes) };
                self.tick()
            }
            _ => Vec::new(),
        }
    }

    fn destroy(&mut self, operation: OperationId, turn: u64) -> Vec<Effect> {
        self.state = State::Destroying { operation, turn };
        self.tick()
    }

    fn lose(&mut self, grant: Grant) -> Vec<Effect> {
        self.state = State::Lost { grant };
        let mut effects = vec![Effect::Raise(Alarm::LostAfterSwitch { host: self.host, epoch: grant.epoch })];
        effects.extend(self.tick());
        effects
    }

    fn tick(&self) -> Vec<Effect> {
        match &self.state {
            State::Idle | State::Finished { .. } => Vec::new(),
            State::Preparing { plan } => vec![Effect::Prepare(plan.clone())],
            // Also how a destination learns that its operation was over before it began.
            State::Receiving { plan, .. } => vec![Effect::Send(Report::Prepared { operation: plan.operation })],
            State::Complete { plan, volumes } => vec![Effect::Send(Report::RequestSwitch(SwitchRequest {
                guest: self.guest,
                operation: plan.operation,
                from: plan.from,
                to: Owner::Host(self.host),
                volumes: volumes.clone(),
            }))],
            State::Granted { grant, .. } => {
                let epoch = grant.epoch;
                vec![Effect::ActivateVolumes { epoch }, Effect::ActivatePorts { epoch }, Effect::RunGuest { epoch }]
            }
            State::Running { plan, grant } => {
                let (operation, epoch) = (grant.operation, grant.epoch);
                let is_post_copy = matches!(plan.kind, OperationKind::Migrate { post_copy: true, .. });
                let fetches = is_post_copy.then_some(Effect::Send(Report::FetchesMemory { operation, epoch }));
                let mut effects =
                    vec![Effect::Send(Report::Running { operation, epoch }), Effect::StartFetch { epoch }];
                effects.extend(fetches);
                effects
            }
            State::Fetched { grant, .. } => {
                let (operation, epoch) = (grant.operation, grant.epoch);
                vec![Effect::Send(Report::NothingMissing { operation, epoch })]
            }
            State::Destroying { operation, .. } => vec![Effect::DestroyReceived { operation: *operation }],
            State::Orphaned { plan } => {
                let (operation, reason) = (plan.operation, AbortReason::DestinationFailed);
                vec![Effect::Send(Report::RequestAbort { operation, reason, owned: None })]
            }
            State::Lost { grant } => {
                let (operation, epoch) = (grant.operation, grant.epoch);
                vec![Effect::SealVolumes { epoch }, Effect::Send(Report::LostAfterSwitch { operation, epoch })]
            }
        }
    }

    /// What is said on the timer, without what is done: for an order that only repeats what is known.
    pub(crate) fn reports(&self) -> Vec<Effect> {
        self.tick().into_iter().filter(|effect| matches!(effect, Effect::Send(_))).collect()
    }

    fn restarted(&mut self, found: Found) -> Vec<Effect> {
        match (&self.state, found) {
            // A standby needs no stream to go on from its last cut; whether it is to, the controller says.
            (State::Receiving { plan, .. }, Found::Paused) if matches!(plan.kind, OperationKind::Mirror { .. }) => {
                self.tick()
            }
            // The stream went through the agent, so it broke with it; nothing was asked for yet.
            (State::Preparing { plan } | State::Receiving { plan, .. }, _) => {
                let (operation, turn) = (plan.operation, plan.turn);
                self.destroy(operation, turn)
            }
            (_, Found::Nothing) => self.gone(),
            (State::Complete { plan, .. }, Found::Running) => {
                // Never asked of the process; whatever it did, it is not the state that was received any more.
                let operation = plan.operation;
                let mut effects = vec![Effect::DestroyGuest { operation }, Effect::Raise(Alarm::RanWithoutGrant)];
                effects.extend(self.gone());
                effects
            }
            (State::Running { grant, .. } | State::Fetched { grant, .. }, Found::Paused) => {
                let epoch = grant.epoch;
                let mut effects = vec![Effect::ActivateVolumes { epoch }, Effect::RunGuest { epoch }];
                effects.extend(self.tick());
                effects
            }
            _ => self.tick(),
        }
    }

    fn gone(&mut self) -> Vec<Effect> {
        match &mut self.state {
            State::Idle | State::Finished { .. } => Vec::new(),
            State::Preparing { plan } | State::Receiving { plan, .. } => {
                let (operation, turn) = (plan.operation, plan.turn);
                self.destroy(operation, turn)
            }
            State::Complete { plan, .. } => {
                self.state = State::Orphaned { plan: plan.clone() };
                self.tick()
            }
            State::Granted { grant, .. } | State::Running { grant, .. } => {
                let grant = *grant;
                self.lose(grant)
            }
            State::Fetched { gone, .. } => {
                *gone = true;
                self.tick()
            }
            State::Destroying { .. } | State::Orphaned { .. } | State::Lost { .. } => self.tick(),
        }
    }
}

/// Granted to what this host held before its own state was lost; or a word from long ago. The controller knows which, and
/// raises the alarm if it is one.
fn has_nothing(grant: &Grant) -> Effect {
    Effect::Send(Report::LostAfterSwitch { operation: grant.operation, epoch: grant.epoch })
}
