//! All that a host remembers of one guest: its two machines, and how the one becomes the other.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GuestId, HostId};

use crate::{
    DestinationEffect, DestinationEvent, DestinationHandover, DestinationState, SourceEffect, SourceEvent,
    SourceHandover, SourceState,
    message::{DestinationOrder, OrderBody, Report, SourceOrder},
};

/// One guest on one host. What an agent persists, and drives.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LocalHandover {
    source: SourceHandover,
    destination: DestinationHandover,
}

/// An event for one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalEvent {
    /// For the source.
    Source(SourceEvent),
    /// For the destination.
    Destination(DestinationEvent),
}

/// An effect of one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalEffect {
    /// Of the source.
    Source(SourceEffect),
    /// Of the destination.
    Destination(DestinationEffect),
}

impl From<OrderBody> for LocalEvent {
    fn from(body: OrderBody) -> Self {
        match body {
            OrderBody::Source(order) => Self::Source(SourceEvent::Order(order)),
            OrderBody::Destination(order) => Self::Destination(DestinationEvent::Order(order)),
        }
    }
}

impl LocalEffect {
    /// What is to be sent to the controller, if that is what it is.
    #[must_use]
    pub const fn report(&self) -> Option<&Report> {
        match self {
            Self::Source(SourceEffect::Send(report)) | Self::Destination(DestinationEffect::Send(report)) => {
                Some(report)
            }
            _ => None,
        }
    }
}

impl LocalHandover {
    /// A host that has nothing of the guest.
    #[must_use]
    pub const fn idle(guest: GuestId, host: HostId) -> Self {
        Self { source: SourceHandover::idle(guest, host), destination: DestinationHandover::idle(guest, host) }
    }

    /// A host with this source machine and nothing received.
    #[must_use]
    pub const fn of(source: SourceHandover, host: HostId) -> Self {
        let destination = DestinationHandover::idle(source.guest(), host);
        Self { source, destination }
    }

    /// The source's machine.
    #[must_use]
    pub const fn source(&self) -> &SourceHandover {
        &self.source
    }

    /// The destination's machine.
    #[must_use]
    pub const fn destination(&self) -> &DestinationHandover {
        &self.destination
    }

    /// Whether nothing of the guest is here, so that the agent may forget it.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        matches!(self.source.state(), SourceState::Idle) && matches!(self.destination.state(), DestinationState::Idle)
    }

    /// Whether nothing is under way: nothing here, or a guest that runs.
    #[must_use]
    pub const fn is_quiet(&self) -> bool {
        matches!(self.source.state(), SourceState::Idle | SourceState::Running)
            && matches!(self.destination.state(), DestinationState::Idle)
    }

    /// Takes one event and says what is to be done; same contract as [`SourceHandover::step`]. A destination whose part
    /// is over becomes the source of what comes next.
    pub fn step(&mut self, event: LocalEvent) -> Vec<LocalEffect> {
        let mut effects = Vec::new();
        match event {
            LocalEvent::Source(event) => {
                if let (SourceEvent::Order(order), Some(epoch)) = (&event, self.destination.epoch()) {
                    let concerns_the_next = match order {
                        SourceOrder::Begin(plan) => plan.epoch == epoch,
                        SourceOrder::StillYours { epoch: theirs, .. } => *theirs == epoch,
                        SourceOrder::Elsewhere { yours, .. } => *yours == epoch,
                        SourceOrder::Undecided { .. } => false,
                    };
                    if concerns_the_next {
                        effects.extend(self.overtaken());
                        if self.destination.epoch().is_some() {
                            return effects;
                        }
                    }
                }
                effects.extend(self.source.step(event).into_iter().map(LocalEffect::Source));
            }
            LocalEvent::Destination(event) => {
                effects.extend(self.destination.step(event).into_iter().map(LocalEffect::Destination));
            }
        }
        effects.extend(self.turn());
        effects
    }

    /// The controller speaks to the owner that this destination became: so it has recorded the destination's part, and
    /// only the word of it was lost.
    fn overtaken(&mut self) -> Vec<LocalEffect> {
        let done = matches!(self.destination.state(), DestinationState::Fetched { .. } | DestinationState::Lost { .. });
        let effects = match self.destination.operation().filter(|_| done) {
            Some(operation) => self.destination.step(DestinationEvent::Order(DestinationOrder::Settled { operation })),
            // Not before everything is fetched: say where it stands.
            None => self.destination.reports(),
        };
        let turned = self.turn();
        effects.into_iter().map(LocalEffect::Destination).chain(turned).collect()
    }

    fn turn(&mut self) -> Option<LocalEffect> {
        let (source, destination) = self.destination.clone().into_source()?;
        let before = std::mem::replace(&mut self.source, source);
        self.destination = destination;
        // The guest came back before this host had heard that it was gone: what was kept of the old copy goes.
        let was_here = !matches!(before.state(), SourceState::Idle);
        was_here.then_some(LocalEffect::Source(SourceEffect::DestroyGuest { epoch: before.epoch() }))
    }
}
