//! Mirrors, as the owner of the machine has them; what they need of it is in [`crate::mirror`].

use std::ops::ControlFlow;

use anyhow::Context as _;
use supercloud_blanket::vmm::travel::{TravelError, mirror::StagedCut};

use super::Owner;
use crate::control::{Event, Line, Request, State, Verb};

impl Owner<'_> {
    /// Does what is asked for; why not, if not. `Break` when it is answered later.
    pub(super) fn answer_mirror(&mut self, client: u64, request: &Request) -> ControlFlow<(), Option<String>> {
        let done = match request.verb {
            Verb::EndMirror if !self.mirrored.end((client, request.id)) => return ControlFlow::Break(()),
            Verb::EndMirror => Ok(()),
            Verb::Mirror => self.mirror(request),
            Verb::Commit => self.commit(request.cut.unwrap_or(0)),
            _ => self.promote(),
        };
        ControlFlow::Continue(done.err().map(|failed| format!("{failed:#}")))
    }

    fn mirror(&mut self, request: &Request) -> anyhow::Result<()> {
        anyhow::ensure!(matches!(self.state, State::Running | State::Paused), "it is not here to be mirrored");
        self.leavings.must_be_whole()?;
        let stream = self.held.stream.as_ref().context("there is no stream, or it broke")?;
        let stream = stream.try_clone().context("copying a descriptor")?;
        self.mirrored.start(self.config()?, stream, request, &self.inputs)
    }

    /// The thread that mirrored the guest is over; the guest runs on.
    pub(super) fn mirror_over(&mut self, outcome: Result<(), TravelError>) {
        let waiting = self.mirrored.over();
        self.drop_stream();
        if let Some(machine) = &self.machine {
            // What is noted in vain costs a little; the next one that needs it begins anew.
            let _ = machine.note_writes(false);
            if self.state == State::Running {
                machine.resume();
            }
        }
        let error = outcome.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
        let event = if error.is_some() { Event::MirrorBroken } else { Event::MirrorEnded };
        self.client.tell(&Line { event: Some(event), state: Some(self.state), error, ..Line::default() });
        for asked in waiting {
            self.answer_late(Some(asked), None);
        }
    }

    /// Lets the guest run until this time of the boot clock (0: without end); why not, if not.
    pub(super) fn keep_lease(&mut self, until_ms: u64) -> Option<String> {
        if until_ms == 0 {
            self.lease.end();
            return None;
        }
        self.lease.renew(until_ms).err().map(|failed| format!("{failed:#}"))
    }

    /// A cut of a mirror is whole here.
    pub(super) fn staged(&mut self, cut: StagedCut) {
        let Some(standby) = &mut self.standby else { return };
        match standby.stage(cut) {
            Ok(number) => {
                let (event, state) = (Some(Event::Staged), Some(self.state));
                self.client.tell(&Line { event, state, cut: Some(number), ..Line::default() });
            }
            Err(error) => self.standby_over(Err(error)),
        }
    }

    /// Nothing more comes of a mirror; what was staged or committed stays.
    pub(super) fn standby_over(&mut self, outcome: Result<(), TravelError>) {
        self.receiving = None;
        if self.state != State::Arriving || self.held.stream.is_none() {
            return;
        }
        self.drop_stream();
        let error = match outcome {
            Ok(()) => "the other end has ended it".to_owned(),
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        let state = Some(self.state);
        let line = Line { event: Some(Event::MirrorBroken), state, error: Some(error), ..Line::default() };
        self.client.tell(&line);
    }

    fn commit(&mut self, number: u64) -> anyhow::Result<()> {
        let standby = self.standby.as_mut().context("this is no mirror's standby")?;
        Ok(standby.commit(number)?)
    }

    /// The newest committed cut becomes the guest; nothing more is taken from the stream.
    fn promote(&mut self) -> anyhow::Result<()> {
        let standby = self.standby.take_if(|standby| standby.can_be_promoted());
        let standby = standby.context("this is no mirror's standby, or no cut was committed")?;
        self.drop_stream();
        self.receiving = None;
        self.take_up(standby.promote()?)?;
        self.state = State::Paused;
        Ok(())
    }
}
