//! Memory that a move has left behind, as the owner of the machine has it; what is needed of it is in [`crate::left`].

use std::{os::unix::net::UnixStream, process::ExitCode};

use supercloud_blanket::vmm::{Outcome, travel::left::News};

use super::Owner;
use crate::{
    control::{Event, Line, Request, State, Verb},
    left::LeftNews,
};

impl Owner<'_> {
    /// Serves or fetches over the socket that came with it.
    pub(super) fn answer_left(&mut self, request: &Request, socket: Option<UnixStream>) {
        let begun = match (request.verb, self.state) {
            (Verb::Serve, State::Sent) => self.leavings.serve(self.machine.as_ref(), socket, &self.inputs).map(Some),
            (Verb::Fetch, State::Running | State::Paused) => self.leavings.fetch(socket),
            _ => Err(anyhow::anyhow!("nothing of it was left behind")),
        };
        let (connection, error) = match begun {
            Ok(connection) => (connection, None),
            Err(failed) => (None, Some(format!("{failed:#}"))),
        };
        let missing_bytes = Some(self.leavings.missing_bytes());
        let (id, state) = (Some(request.id), Some(self.state));
        self.client.tell(&Line { id, state, connection, missing_bytes, error, ..Line::default() });
    }

    /// What the process would exit with if nobody controlled it.
    pub(super) fn hear_of_left(&mut self, news: LeftNews) -> Option<ExitCode> {
        let mut line = Line { state: Some(self.state), ..Line::default() };
        match news {
            LeftNews::Fetch(News::Missing(bytes)) => {
                line.missing_bytes = Some(bytes);
                line.event = Some(Event::Progress);
            }
            LeftNews::Fetch(News::Broken(number, error)) => {
                self.leavings.over(number);
                line.missing_bytes = Some(self.leavings.missing_bytes());
                (line.event, line.connection) = (Some(Event::NotFetched), Some(number));
                line.error = Some(format!("{:#}", anyhow::Error::from(error)));
            }
            LeftNews::Fetch(News::Spoilt(number, error)) => {
                self.leavings.over(number);
                let reason = format!("{:#}", anyhow::Error::from(error));
                line.missing_bytes = Some(self.leavings.missing_bytes());
                (line.event, line.connection) = (Some(Event::NotFetched), Some(number));
                line.error = Some(reason.clone());
                self.client.tell(&line);
                // Never a step further: what it has there is not its memory.
                return if self.state == State::Ended { None } else { self.take(Outcome::Broken { reason }) };
            }
            LeftNews::Fetch(News::Fetched(_)) => {
                self.leavings.whole();
                (line.event, line.missing_bytes) = (Some(Event::Fetched), Some(0));
            }
            LeftNews::Serving(progress) => (line.event, line.progress) = (Some(Event::Progress), Some(progress)),
            LeftNews::Served(number, outcome) => {
                self.leavings.over(number);
                line.connection = Some(number);
                line.event = Some(if outcome.is_ok() { Event::Served } else { Event::NotServed });
                line.error = outcome.err().map(|error| format!("{:#}", anyhow::Error::from(error)));
            }
            LeftNews::Parted(boot, outcome) => {
                self.leavings.parted();
                let is_newest = boot == self.boots && self.state != State::Ended;
                return if is_newest && outcome == Outcome::Reset { self.take(outcome) } else { None };
            }
        }
        self.client.tell(&line);
        None
    }

    /// The run of a machine that may wait for what is missing is over: whether it is on its way out, and what is to be done then
    /// comes when it is gone ([`LeftNews::Parted`]). Who has switched itself off is not waited for: what its devices have not ended by
    /// then was never acknowledged, and ends with the process.
    pub(super) fn parts(&mut self, outcome: &Outcome) -> bool {
        if self.leavings.is_parting() {
            return *outcome == Outcome::Reset;
        }
        if !self.leavings.is_missing() {
            return false;
        }
        let Some(machine) = self.machine.take() else { return false };
        // What it says from now on counts for nothing.
        self.boots += 1;
        match self.leavings.part(machine, self.boots, outcome.clone(), &self.inputs) {
            Ok(()) => *outcome == Outcome::Reset,
            // Without a thread it was let go here.
            Err(_) => false,
        }
    }
}
