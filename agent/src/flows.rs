//! What the switch holds for a port, told when the controller asks.

use std::{sync::Arc, time::Duration};

use supercloud_api::{
    Code, Problem,
    link::{FlowsOf, Notice},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{chain, host::Host};

/// Questions that may wait.
const WAITING: usize = 16;
/// How long the switch may take; who asked waits little longer.
const BUDGET: Duration = Duration::from_secs(4);

/// A question of the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// By which the answer is known.
    pub number: u64,
    /// Whose flows.
    pub of: FlowsOf,
}

/// Where flows are asked for, and where that is answered: give it to [`run`].
#[must_use]
pub fn queue() -> (mpsc::Sender<Asked>, mpsc::Receiver<Asked>) {
    mpsc::channel(WAITING)
}

/// Answers, one after the other, until cancelled.
pub async fn run(host: Arc<Host>, mut asked: mpsc::Receiver<Asked>, cancel: CancellationToken) {
    loop {
        let next = tokio::select! {
            () = cancel.cancelled() => return,
            next = asked.recv() => next,
        };
        let Some(Asked { number, of }) = next else { return };
        let looked = tokio::select! {
            () = cancel.cancelled() => return,
            looked = timeout(BUDGET, host.switch.flows(of)) => looked,
        };
        let told = match looked {
            Ok(Ok(told)) => Ok(told),
            Ok(Err(error)) => Err(Problem::new(Code::HostUnavailable, chain(&error))),
            Err(_) => Err(Problem::new(Code::HostUnavailable, "the host's switch did not answer in time")),
        };
        host.link.tell(Notice::Flows { asked: number, told: told.into() });
    }
}
