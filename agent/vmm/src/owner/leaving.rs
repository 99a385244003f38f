//! The stream by which the guest comes and leaves, and the guest on its way to another process.

use std::{net::Shutdown, os::unix::net::UnixStream, process::ExitCode};

use anyhow::Context as _;

use super::Owner;
use crate::{
    control::{Event, Line, Request, State},
    travel::{self, Arrival, Sending},
};

impl Owner<'_> {
    /// Takes who connected as the stream, in place of the one before, if nobody uses that just now.
    pub(super) fn connect(&mut self, stream: UnixStream) -> anyhow::Result<()> {
        if self.is_stream_used() || self.state == State::Ended {
            // Closed: who connected it finds out.
            return Ok(());
        }
        self.take_stream(Some(stream))?;
        self.client.tell(&Line { event: Some(Event::Stream), state: Some(self.state), ..Line::default() });
        Ok(())
    }

    pub(super) fn take_stream(&mut self, stream: Option<UnixStream>) -> anyhow::Result<()> {
        let stream = stream.context("no socket came with it")?;
        anyhow::ensure!(self.state != State::Ended, "the guest has ended");
        anyhow::ensure!(!self.is_stream_used(), "there is a stream, and it is being used");
        stream.set_nonblocking(false).context("setting up the stream")?;
        self.drop_stream();
        self.held.stream = Some(stream);
        if self.state == State::Arriving { self.receive().context("receiving the guest") } else { Ok(()) }
    }

    pub(super) fn is_stream_used(&self) -> bool {
        self.sending.is_some() || self.receiving.is_some() || self.mirrored.is_on() || self.standby.is_some()
    }

    /// Lets go of a stream, so that the other end hears of it whoever else has it.
    pub(super) fn drop_stream(&mut self) {
        if let Some(old) = self.held.stream.take() {
            let _ = old.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        anyhow::ensure!(!self.mirrored.is_there(), "it is mirrored; end that first");
        self.leavings.must_be_whole()?;
        // The destination may run already, and has nobody else to fetch it from.
        self.leavings.must_not_be_needed()?;
        let stream = self.held.stream.as_ref().context("there is no stream, or it broke")?;
        let stream = stream.try_clone().context("copying a descriptor")?;
        let was_running = self.state == State::Running;
        let sending = Sending::start(&mut self.machine, stream, request, was_running, self.inputs.clone())?;
        self.sending = Some(sending);
        self.state = State::Sending;
        Ok(())
    }

    /// The machine is back; what the process would exit with if nobody controlled it.
    pub(super) fn traveled(&mut self, Arrival { machine, outcome }: Arrival) -> Option<ExitCode> {
        let was_running = self.sending.take().is_some_and(|sending| sending.was_running);
        if self.state != State::Sending {
            return None;
        }
        self.machine = Some(machine);
        self.state = State::Paused;
        let line = match outcome {
            Ok(sent) => {
                self.state = State::Sent;
                let mut progress = travel::shown(&sent.progress, Some(sent.paused_for));
                progress.left_behind_bytes = Some(self.leavings.leave(sent.left));
                Line { event: Some(Event::Sent), progress: Some(progress), ..Line::default() }
            }
            Err(error) => {
                // Cut off in a frame: what comes next would not be understood.
                if !error.leaves_stream_whole() {
                    self.drop_stream();
                }
                // Also when it was paused already: nobody else has all of it.
                if was_running && self.missed.is_none() && self.asked.is_none() {
                    self.resume();
                }
                let error = Some(format!("{:#}", anyhow::Error::from(error)));
                Line { event: Some(Event::NotSent), error, ..Line::default() }
            }
        };
        let asked = self.asked.take();
        let mut failed = None;
        if asked.is_some() && self.missed.is_none() && self.state == State::Paused {
            // It may run still: it was paused only if it had come that far.
            failed = self.machine.as_ref().and_then(|machine| machine.pause().err()).map(|error| error.to_string());
            if failed.is_some() && was_running {
                self.resume();
            }
        }
        self.client.tell(&Line { state: Some(self.state), ..line });
        self.answer_late(asked, failed);
        if was_running && self.missed.is_some() && asked.is_none() {
            self.state = State::Running;
        }
        self.missed.take().and_then(|outcome| self.take(outcome))
    }
}
