//! The source's machine: a guest that runs here, and leaves.
//!
//! ```text
//!            Begin            GuestPaused        VolumesSealed
//!  Running ---------> Copying -----------> Sealing -----------> Sealed --(freeze stored / stop)--> Vacating
//!     ^                  |                    |                    |                                  |
//!     |   GuestResumed   |                StillYours: it can never be granted any more                |
//!     +---- Resuming <---+--------------------+--------------------+----------------------------------+
//!                        |                Elsewhere: somebody else owns it now                        |
//!                        +--------------------+--------------------+----------------------------------+
//!                                                                  v
//!                                     (still needed) Serving ------+-----> Releasing --VolumesDeleted--> Idle
//! ```
//! From `Sealing` on the guest does not run, and only an answer of the controller lets it run again.

mod vocabulary;

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, HostId, OperationId};

use crate::{
    Refusal,
    message::{
        AbortReason, Alarm, Found, LocalCopy, OperationKind, Owner, OwnerQuery, Report, SourceOrder, SourcePlan, Stamp,
        SwitchRequest, VolumeStamp,
    },
};

pub use vocabulary::{SourceEffect, SourceEvent, SourceState};

/// The source's machine for one guest on one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceHandover {
    guest: GuestId,
    host: HostId,
    epoch: Epoch,
    state: SourceState,
    copy: LocalCopy,
    lost_contact: bool,
    /// The last turn that is known to be over.
    ended: u64,
}

use SourceEffect as Effect;
use SourceState as State;

impl SourceHandover {
    /// The machine of a host that has nothing of the guest.
    #[must_use]
    pub const fn idle(guest: GuestId, host: HostId) -> Self {
        Self::with(guest, host, Epoch::ZERO, State::Idle, 0)
    }

    /// The machine of a host that runs the guest as its owner.
    #[must_use]
    pub const fn running(guest: GuestId, host: HostId, epoch: Epoch) -> Self {
        Self::with(guest, host, epoch, State::Running, 0)
    }

    pub(crate) const fn with(guest: GuestId, host: HostId, epoch: Epoch, state: State, ended: u64) -> Self {
        Self { guest, host, epoch, state, copy: LocalCopy::Intact, lost_contact: false, ended }
    }

    /// The guest.
    #[must_use]
    pub const fn guest(&self) -> GuestId {
        self.guest
    }

    /// The epoch at which this host owns, or last owned, the guest.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Where it is.
    #[must_use]
    pub const fn state(&self) -> &SourceState {
        &self.state
    }

    /// The plan of the operation under way, up to the answer that ends it.
    #[must_use]
    pub const fn plan(&self) -> Option<&SourcePlan> {
        match &self.state {
            State::Copying { plan, .. }
            | State::Sealing { plan }
            | State::Sealed { plan, .. }
            | State::Vacating { plan, .. } => Some(plan),
            _ => None,
        }
    }

    /// Takes one event and says what is to be done.
    ///
    /// The caller persists the machine BEFORE it carries out the effects, and carries them out in order, one batch after
    /// the other; an effect that fails ends its batch, and the next [`SourceEvent::Tick`] asks for it again.
    pub fn step(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        match event {
            SourceEvent::Order(order) => self.order(order),
            SourceEvent::Tick => self.tick(),
            SourceEvent::Restarted { found } => self.restarted(found),
            SourceEvent::CopyFailed { operation } => self.copy_failed(operation),
            SourceEvent::PeerLost { operation } => self.peer_lost(operation),
            SourceEvent::GuestPaused { operation } => match self.state {
                // A mirror's source never stands still for long.
                State::Copying { plan, .. }
                    if plan.operation == operation && !matches!(plan.kind, OperationKind::Mirror { .. }) =>
                {
                    self.paused(plan)
                }
                _ => self.refuse(),
            },
            SourceEvent::VolumesSealed { operation, volumes } => match self.state {
                State::Sealing { plan } if plan.operation == operation => self.sealed(plan, volumes),
                _ => self.refuse(),
            },
            SourceEvent::FreezeStored { operation } => match &mut self.state {
                State::Sealed { plan, volumes }
                    if plan.operation == operation && matches!(plan.kind, OperationKind::Freeze { .. }) =>
                {
                    self.state = State::Vacating { plan: *plan, volumes: std::mem::take(volumes) };
                    self.tick()
                }
                _ => self.refuse(),
            },
            SourceEvent::GuestResumed { epoch } => match self.state {
                State::Resuming { operation } if epoch == self.epoch => {
                    self.state = State::Running;
                    operation.map(|operation| Effect::Send(Report::Resumed { operation, epoch })).into_iter().collect()
                }
                State::Running if epoch == self.epoch => Vec::new(),
                _ => self.refuse(),
            },
            SourceEvent::MemoryServed { .. } => match self.state {
                State::Serving { guest_kept: true } => {
                    self.state = State::Serving { guest_kept: false };
                    vec![Effect::DestroyGuest { epoch: self.epoch }]
                }
                _ => self.refuse(),
            },
            SourceEvent::GuestGone => self.gone(),
            SourceEvent::VolumesDeleted { epoch } => match self.state {
                State::Releasing if epoch == self.epoch => {
                    self.state = State::Idle;
                    vec![Effect::Send(Report::Released { epoch })]
                }
                _ => self.refuse(),
            },
        }
    }

    fn refuse(&self) -> Vec<Effect> {
        vec![Effect::Refuse(Refusal::NotInThisState)]
    }

    fn order(&mut self, order: SourceOrder) -> Vec<Effect> {
        match order {
            SourceOrder::Begin(plan) => self.begin(plan),
            SourceOrder::StillYours { operation, turn, epoch } => self.still_yours(operation, turn, epoch),
            SourceOrder::Undecided { .. } => Vec::new(),
            SourceOrder::Elsewhere { now, yours, needed } => self.elsewhere(now, yours, needed),
        }
    }

    fn begin(&mut self, plan: SourcePlan) -> Vec<Effect> {
        if plan.guest != self.guest {
            return vec![Effect::Refuse(Refusal::OtherGuest)];
        }
        if !plan.kind.has_source() {
            return vec![Effect::Refuse(Refusal::OtherKind)];
        }
        if plan.epoch != self.epoch {
            return self.unknown_epoch(Some(plan.operation), plan.epoch);
        }
        match &self.state {
            State::Running if plan.turn <= self.ended => {
                vec![Effect::Send(Report::Resumed { operation: plan.operation, epoch: self.epoch })]
            }
            State::Running => {
                self.state = State::Copying { plan, broken: false };
                self.lost_contact = false;
                self.copy_effects(plan)
            }
            State::Lost { .. } => self.reports(),
            _ => match self.plan() {
                Some(mine) if plan.turn <= mine.turn => Vec::new(),
                // The controller has gone on to another operation: mine is over, and it will say how.
                Some(mine) => {
                    let other = Refusal::OtherOperation(mine.operation);
                    vec![Effect::Refuse(other), Effect::Send(Report::AskOwner(self.query(false)))]
                }
                None => self.refuse(),
            },
        }
    }

    fn copy_effects(&self, plan: SourcePlan) -> Vec<Effect> {
        match plan.kind {
            OperationKind::Stop => vec![Effect::ShutDownGuest { operation: plan.operation }],
            _ => vec![Effect::StartCopy(plan)],
        }
    }

    /// The controller believes that this host owns the guest at an epoch that this machine does not know.
    fn unknown_epoch(&self, operation: Option<OperationId>, epoch: Epoch) -> Vec<Effect> {
        let mut effects = vec![Effect::Refuse(Refusal::OtherEpoch { mine: self.epoch, theirs: epoch })];
        if matches!(self.state, State::Idle) && epoch > self.epoch {
            // This host's state was lost (a new disk): with it the guest.
            effects.push(Effect::Send(Report::GuestLost { operation, epoch }));
        }
        effects
    }

    fn still_yours(&mut self, operation: Option<OperationId>, turn: u64, epoch: Epoch) -> Vec<Effect> {
        if epoch != self.epoch {
            return self.unknown_epoch(operation, epoch);
        }
        if let Some(plan) = self.plan().copied() {
            if turn < plan.turn {
                return vec![Effect::Refuse(Refusal::OtherOperation(plan.operation))];
            }
            self.ended = self.ended.max(turn);
            let operation = Some(plan.operation);
            let mut effects = vec![Effect::StopCopy { operation: plan.operation }];
            if self.copy == LocalCopy::Gone {
                effects.extend(self.lose(operation));
            } else {
                self.state = State::Resuming { operation };
                self.lost_contact = false;
                effects.extend(self.tick());
            }
            return effects;
        }
        match self.state {
            State::Running => {
                self.ended = self.ended.max(turn);
                let resumed = operation.map(|operation| Effect::Send(Report::Resumed { operation, epoch }));
                // A guest that was found paused after a restart waits for this answer.
                let resume = std::mem::take(&mut self.lost_contact).then_some(Effect::ResumeGuest { epoch });
                resumed.into_iter().chain(resume).collect()
            }
            State::Resuming { .. } => Vec::new(),
            State::Lost { .. } => self.reports(),
            _ => self.refuse(),
        }
    }

    fn elsewhere(&mut self, now: Stamp, yours: Epoch, needed: bool) -> Vec<Effect> {
        let epoch = self.epoch;
        if matches!(self.state, State::Idle) || yours < epoch {
            // Nothing is here of that epoch (any more).
            return vec![Effect::Send(Report::Released { epoch: yours })];
        }
        let replaced = match now.owner {
            Owner::Host(_) => now.epoch > epoch,
            Owner::Frozen(_) | Owner::Stopped | Owner::Lost(_) => now.epoch >= epoch,
            Owner::Unowned => false,
        };
        if yours != epoch || !replaced {
            return vec![Effect::Refuse(Refusal::OtherEpoch { mine: epoch, theirs: yours })];
        }
        let mut effects = Vec::new();
        let kept = match &self.state {
            State::Releasing => return effects,
            State::Serving { guest_kept } => *guest_kept,
            State::Sealed { plan, .. } => matches!(plan.kind, OperationKind::Migrate { post_copy: true, .. }),
            State::Copying { plan, .. } => {
                effects.push(Effect::StopCopy { operation: plan.operation });
                effects.push(Effect::Raise(Alarm::Superseded { had: epoch, now: now.epoch }));
                false
            }
            State::Running | State::Resuming { .. } => {
                effects.push(Effect::Raise(Alarm::Superseded { had: epoch, now: now.epoch }));
                false
            }
            State::Idle | State::Sealing { .. } | State::Vacating { .. } | State::Lost { .. } => false,
        };
        // Pages are kept for an owner that fetches them, not for one that is lost itself.
        let is_wanted = kept && matches!(now.owner, Owner::Host(_));
        let kept = is_wanted && self.copy == LocalCopy::Intact;
        let was_serving = matches!(self.state, State::Serving { guest_kept } if guest_kept == kept);
        if now.owner == Owner::Host(self.host) {
            // It came back to this very host under a new epoch: the volumes are the new owner's.
            self.state = State::Idle;
            effects.push(Effect::DestroyGuest { epoch });
        } else if !needed {
            self.state = State::Releasing;
            effects.extend(self.tick());
        } else if !was_serving {
            if is_wanted && !kept {
                effects.push(Effect::Raise(Alarm::NeededCopyLost { host: self.host, epoch }));
            }
            self.state = State::Serving { guest_kept: kept };
            effects.push(if kept { Effect::ServeMemory { epoch } } else { Effect::DestroyGuest { epoch } });
            effects.push(Effect::SealVolumes { operation: None, epoch });
            effects.push(Effect::ServeVolumes { epoch });
        }
        effects
    }

    fn query(&self, wants_back: bool) -> OwnerQuery {
        let operation = self.plan().map(|plan| plan.operation);
        OwnerQuery { operation, epoch: self.epoch, copy: self.copy, wants_back }
    }

    fn tick(&self) -> Vec<Effect> {
        let epoch = self.epoch;
        let ask = |wants_back| Effect::Send(Report::AskOwner(self.query(wants_back)));
        match &self.state {
            State::Idle => Vec::new(),
            State::Running if self.lost_contact => vec![ask(false)],
            State::Running => Vec::new(),
            State::Copying { plan, broken: true } if plan.kind != OperationKind::Stop => {
                let (operation, reason) = (plan.operation, AbortReason::SourceFailed);
                vec![Effect::Send(Report::RequestAbort { operation, reason, owned: Some(epoch) })]
            }
            // Should the operation be over, this is how a source learns of it that was told to begin too late.
            State::Copying { .. } => vec![ask(false)],
            State::Sealing { plan } => {
                let seal = Effect::SealVolumes { operation: Some(plan.operation), epoch };
                if self.lost_contact { vec![seal, ask(true)] } else { vec![seal] }
            }
            State::Sealed { plan, .. } => {
                let operation = plan.operation;
                let hand_over = match plan.kind {
                    // Also after lost contact, and after the process is gone: what the destination has may be all there is.
                    OperationKind::Migrate { to, .. } => Some(Effect::SendVolumeMaps { operation, to }),
                    OperationKind::Freeze { freeze } => Some(Effect::StoreFreeze { operation, freeze }),
                    _ => None,
                };
                hand_over.into_iter().chain([ask(self.lost_contact)]).collect()
            }
            State::Vacating { plan, volumes } => vec![Effect::Send(Report::RequestSwitch(SwitchRequest {
                guest: self.guest,
                operation: plan.operation,
                from: Stamp { owner: Owner::Host(self.host), epoch },
                to: plan.kind.target(),
                volumes: volumes.clone(),
            }))],
            State::Resuming { .. } => vec![Effect::UnsealVolumes { epoch }, Effect::ResumeGuest { epoch }],
            State::Serving { guest_kept: true } => vec![Effect::ServeMemory { epoch }, ask(false)],
            State::Serving { .. } => vec![ask(false)],
            State::Releasing => vec![Effect::DestroyGuest { epoch }, Effect::DeleteVolumes { epoch }],
            State::Lost { operation } => {
                let operation = *operation;
                vec![
                    Effect::SealVolumes { operation: None, epoch },
                    Effect::Send(Report::GuestLost { operation, epoch }),
                ]
            }
        }
    }

    /// What is said on the timer, without what is done: for an order that only repeats what is known.
    fn reports(&self) -> Vec<Effect> {
        self.tick().into_iter().filter(|effect| matches!(effect, Effect::Send(_))).collect()
    }

    fn restarted(&mut self, found: Found) -> Vec<Effect> {
        let epoch = self.epoch;
        self.lost_contact = true;
        if found == Found::Nothing {
            return self.gone();
        }
        self.copy = LocalCopy::Intact;
        match &mut self.state {
            // What ran here and was replaced must not be left.
            State::Idle | State::Releasing => vec![Effect::DestroyGuest { epoch }],
            // The copy went through the agent, so it broke with it.
            State::Copying { plan, broken } => {
                *broken = true;
                let plan = *plan;
                match plan.kind {
                    OperationKind::Stop => self.copy_effects(plan),
                    _ => self.tick(),
                }
            }
            State::Sealed { plan, .. } if matches!(plan.kind, OperationKind::Freeze { .. }) => self.tick(),
            State::Serving { guest_kept } => {
                let memory = if *guest_kept { Effect::ServeMemory { epoch } } else { Effect::DestroyGuest { epoch } };
                vec![memory, Effect::SealVolumes { operation: None, epoch }, Effect::ServeVolumes { epoch }]
            }
            _ => self.tick(),
        }
    }

    fn gone(&mut self) -> Vec<Effect> {
        self.copy = LocalCopy::Gone;
        match &mut self.state {
            State::Idle => Vec::new(),
            State::Running | State::Resuming { .. } => {
                let operation = match self.state {
                    State::Resuming { operation } => operation,
                    _ => None,
                };
                self.lose(operation)
            }
            // A stop wanted just this.
            State::Copying { plan, .. } if plan.kind == OperationKind::Stop => {
                let plan = *plan;
                self.paused(plan)
            }
            State::Copying { plan, .. } => {
                let operation = plan.operation;
                let mut effects = vec![Effect::StopCopy { operation }];
                effects.extend(self.lose(Some(operation)));
                effects
            }
            State::Serving { guest_kept } => {
                let epoch = self.epoch;
                // The destination may not have all of it.
                let alarm = Effect::Raise(Alarm::NeededCopyLost { host: self.host, epoch });
                let was_kept = std::mem::take(guest_kept).then_some(alarm);
                let serve = [Effect::SealVolumes { operation: None, epoch }, Effect::ServeVolumes { epoch }];
                was_kept.into_iter().chain(serve).collect()
            }
            // Paused already: the destination or the store may hold everything. The controller knows.
            State::Sealing { .. }
            | State::Sealed { .. }
            | State::Vacating { .. }
            | State::Releasing
            | State::Lost { .. } => self.tick(),
        }
    }

    fn lose(&mut self, operation: Option<OperationId>) -> Vec<Effect> {
        self.state = State::Lost { operation };
        let mut effects = vec![Effect::Raise(Alarm::GuestLost { host: self.host, epoch: self.epoch })];
        effects.extend(self.tick());
        effects
    }

    fn copy_failed(&mut self, operation: OperationId) -> Vec<Effect> {
        match &mut self.state {
            State::Copying { plan, broken } if plan.operation == operation => {
                *broken = true;
                self.tick()
            }
            State::Sealed { plan, .. }
                if plan.operation == operation && matches!(plan.kind, OperationKind::Freeze { .. }) =>
            {
                let (reason, owned) = (AbortReason::SourceFailed, Some(self.epoch));
                vec![Effect::Send(Report::RequestAbort { operation, reason, owned })]
            }
            _ => self.peer_lost(operation),
        }
    }

    fn peer_lost(&mut self, operation: OperationId) -> Vec<Effect> {
        match &self.state {
            State::Copying { plan, .. } if plan.operation == operation => self.copy_failed(operation),
            State::Sealing { plan } | State::Sealed { plan, .. } if plan.operation == operation => {
                self.lost_contact = true;
                vec![Effect::Send(Report::AskOwner(self.query(true)))]
            }
            // Post-copy pages are asked for again by a destination that comes back.
            State::Serving { .. } => Vec::new(),
            _ => self.refuse(),
        }
    }

    fn paused(&mut self, plan: SourcePlan) -> Vec<Effect> {
        let operation = plan.operation;
        if plan.kind == OperationKind::Stop {
            self.copy = LocalCopy::Gone;
        }
        self.state = State::Sealing { plan };
        vec![
            Effect::Send(Report::Paused { operation }),
            Effect::SealVolumes { operation: Some(operation), epoch: self.epoch },
        ]
    }

    fn sealed(&mut self, plan: SourcePlan, volumes: Vec<VolumeStamp>) -> Vec<Effect> {
        self.state = match plan.kind {
            OperationKind::Stop => State::Vacating { plan, volumes },
            _ => State::Sealed { plan, volumes },
        };
        self.tick()
    }
}
