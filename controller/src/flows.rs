//! What hosts' switches hold for ports: asked of the agent when somebody wants to know, kept for a second.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use supercloud_api::{
    Problem,
    ids::{HostId, PortId},
    link::{Directive, FlowsOf, FlowsTold, MAX_PORT_FLOWS},
    unix_ms,
};
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use crate::link::Sessions;

/// How long an agent may take: it gives its switch a little less.
const BUDGET: Duration = Duration::from_secs(5);
/// Questions to all hosts at once.
const ASKED_AT_MOST: usize = 64;
/// Of these, to one host.
const OF_ONE_HOST: usize = 8;
/// Who asks within so long of an answer is given the same: however many look at a port, its switch is asked about once a second.
const KEPT: Duration = Duration::from_secs(1);
/// The longest text of a flow, in characters.
const TEXT_AT_MOST: usize = 500;

/// Why flows are not told.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FlowsError {
    /// The host is not connected, or its agent is too old to tell.
    #[error("the port's host is not connected, or its agent is of a version that tells no flows")]
    NotThere,
    /// Too many ask.
    #[error("too many ask for flows; try again in a few seconds")]
    TooMany,
    /// It did not answer.
    #[error("the port's host did not answer within {} s", BUDGET.as_secs())]
    Deadline,
    /// It cannot tell.
    #[error("the port's host cannot tell: {}", .0.detail)]
    Refused(Problem),
}

type Answer = Result<FlowsTold, Problem>;

/// The last answer of a port's host: until when it is given again, when it was asked for (ms since 1970), what it was. Who asks holds
/// the lock, and others wait for the same answer.
type Kept = Arc<tokio::sync::Mutex<Option<(Instant, u64, Result<FlowsTold, FlowsError>)>>>;

#[derive(Debug, Default)]
struct Board {
    capable: HashSet<HostId>,
    asked: HashMap<u64, (HostId, oneshot::Sender<Answer>)>,
    next: u64,
    kept: HashMap<(HostId, PortId), Kept>,
}

/// The questions that are open. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FlowBoard {
    sessions: Sessions,
    board: Arc<Mutex<Board>>,
}

/// An open question; closed when dropped.
struct Asked<'a>(&'a FlowBoard, u64);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.board().asked.remove(&self.1);
    }
}

impl FlowBoard {
    /// Nothing asked yet.
    #[must_use]
    pub fn new(sessions: Sessions) -> Self {
        // Not the numbers that the controller before gave.
        let board = Board { next: unix_ms() << 8, ..Board::default() };
        Self { sessions, board: Arc::new(Mutex::new(board)) }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a host said of itself when it came. What it was asked before is lost.
    pub(crate) fn note_capable(&self, host: HostId, tells_flows: bool) {
        let mut board = self.board();
        board.asked.retain(|_, (asked, _)| *asked != host);
        match tells_flows {
            true => board.capable.insert(host),
            false => board.capable.remove(&host),
        };
    }

    /// A host is away: it answers nothing any more.
    pub(crate) fn host_gone(&self, host: HostId) {
        self.note_capable(host, false);
    }

    /// A host answers; what it was not asked is no answer, and no more is taken than an honest one tells.
    pub(crate) fn told(&self, host: HostId, number: u64, told: Answer) {
        let mut board = self.board();
        if board.asked.get(&number).is_none_or(|(asked, _)| *asked != host) {
            return;
        }
        let told = told.map(|mut told| {
            told.flows.truncate(MAX_PORT_FLOWS);
            for text in told.flows.iter_mut().flat_map(|flow| [&mut flow.matching, &mut flow.actions]) {
                if let Some((at, _)) = text.char_indices().nth(TEXT_AT_MOST) {
                    text.truncate(at);
                }
            }
            told
        });
        if let Some((_, waiting)) = board.asked.remove(&number) {
            // Whoever asked may have stopped waiting.
            let _ = waiting.send(told);
        }
    }

    /// What a host's switch holds for a port, and when it was asked, in milliseconds since 1970: now, or within [`KEPT`].
    ///
    /// # Errors
    /// [`FlowsError`].
    pub async fn look(&self, host: HostId, of: FlowsOf) -> Result<(u64, FlowsTold), FlowsError> {
        let kept = {
            let mut board = self.board();
            let now = Instant::now();
            // Those that somebody holds or waits for stay.
            let is_needed = |kept: &Kept| {
                let is_fresh = |last: &Option<(Instant, _, _)>| last.as_ref().is_some_and(|(until, _, _)| *until > now);
                Arc::strong_count(kept) > 1 || kept.try_lock().is_ok_and(|last| is_fresh(&last))
            };
            board.kept.retain(|_, kept| is_needed(kept));
            Arc::clone(board.kept.entry((host, of.port)).or_default())
        };
        let mut last = kept.lock().await;
        if let Some((until, at_ms, told)) = &*last
            && *until > Instant::now()
        {
            return told.clone().map(|told| (*at_ms, told));
        }
        let at_ms = unix_ms();
        let told = self.ask(host, of).await;
        // That it could not be asked is no answer of it.
        *last = match &told {
            Err(FlowsError::NotThere | FlowsError::TooMany) => None,
            answer => Some((Instant::now() + KEPT, at_ms, answer.clone())),
        };
        told.map(|told| (at_ms, told))
    }

    /// Asks a host what its switch holds for a port.
    async fn ask(&self, host: HostId, of: FlowsOf) -> Result<FlowsTold, FlowsError> {
        let (answer, told) = oneshot::channel();
        let asked = {
            let mut board = self.board();
            if !board.capable.contains(&host) {
                return Err(FlowsError::NotThere);
            }
            let of_host = board.asked.values().filter(|(asked, _)| *asked == host).count();
            if board.asked.len() >= ASKED_AT_MOST || of_host >= OF_ONE_HOST {
                return Err(FlowsError::TooMany);
            }
            board.next += 1;
            let number = board.next;
            board.asked.insert(number, (host, answer));
            Asked(self, number)
        };
        if !self.sessions.send(host, Directive::TellFlows { asked: asked.1, of }) {
            return Err(FlowsError::NotThere);
        }
        match timeout(BUDGET, told).await {
            Ok(Ok(Ok(told))) => Ok(told),
            Ok(Ok(Err(mut problem))) => {
                problem.detail = problem.detail.chars().take(TEXT_AT_MOST).collect();
                Err(FlowsError::Refused(problem))
            }
            // The host went away under the question.
            Ok(Err(_)) => Err(FlowsError::NotThere),
            Err(_) => Err(FlowsError::Deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use supercloud_api::{
        Code, FlowPurpose, PortFlow, PortTraffic,
        ids::{NetworkId, PortId},
    };

    use super::*;

    fn of() -> FlowsOf {
        FlowsOf { port: PortId::generate(), network: NetworkId::generate() }
    }

    fn told(flows: usize, text: usize) -> FlowsTold {
        let flow = PortFlow {
            purpose: FlowPurpose::Guest,
            table: 0,
            priority: 1,
            packets: 2,
            bytes: 3,
            age_s: 4,
            matching: "é".repeat(text),
            actions: String::new(),
        };
        FlowsTold { traffic: PortTraffic::default(), flows: vec![flow; flows], left_out: 0 }
    }

    fn number(directive: Option<Directive>) -> u64 {
        match directive {
            Some(Directive::TellFlows { asked, .. }) => asked,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_host_that_was_asked_answers_and_not_without_bounds() {
        let sessions = Sessions::default();
        let flows = FlowBoard::new(sessions.clone());
        let (host, other) = (HostId::generate(), HostId::generate());
        let mut orders = sessions.open_for_tests(host);
        assert_eq!(flows.ask(host, of()).await, Err(FlowsError::NotThere), "it never said that it tells flows");
        flows.note_capable(host, true);
        let answering = async {
            let asked = number(orders.recv().await);
            flows.told(other, asked, Ok(told(1, 1)));
            flows.told(host, asked + 1, Ok(told(2, 1)));
            flows.told(host, asked, Ok(told(MAX_PORT_FLOWS + 9, TEXT_AT_MOST + 9)));
        };
        let (answer, ()) = tokio::join!(flows.ask(host, of()), answering);
        let answer = answer.unwrap();
        assert_eq!(answer.flows.len(), MAX_PORT_FLOWS);
        assert_eq!(answer.flows[0].matching.chars().count(), TEXT_AT_MOST);

        let refusing = async {
            let asked = number(orders.recv().await);
            flows.told(host, asked, Err(Problem::new(Code::HostUnavailable, "no switch")));
        };
        let (answer, ()) = tokio::join!(flows.ask(host, of()), refusing);
        assert!(answer.unwrap_err().to_string().contains("no switch"));

        assert_eq!(flows.ask(host, of()).await, Err(FlowsError::Deadline));
        assert!(flows.board().asked.is_empty(), "nothing is left of it");
        let _ = orders.recv().await;

        let going = async {
            let _ = number(orders.recv().await);
            flows.host_gone(host);
        };
        let (answer, ()) = tokio::join!(flows.ask(host, of()), going);
        assert_eq!(answer, Err(FlowsError::NotThere));
    }

    #[tokio::test(start_paused = true)]
    async fn one_host_is_asked_by_no_more_than_it_can_answer() {
        let sessions = Sessions::default();
        let flows = FlowBoard::new(sessions.clone());
        let host = HostId::generate();
        let _orders = sessions.open_for_tests(host);
        flows.note_capable(host, true);
        let many = futures::future::join_all((0..=OF_ONE_HOST).map(|_| flows.ask(host, of()))).await;
        let count = |error: FlowsError| many.iter().filter(|told| **told == Err(error.clone())).count();
        assert_eq!((count(FlowsError::Deadline), count(FlowsError::TooMany)), (OF_ONE_HOST, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_look_at_a_port_its_host_is_asked_once_a_second() {
        let sessions = Sessions::default();
        let flows = FlowBoard::new(sessions.clone());
        let host = HostId::generate();
        let mut orders = sessions.open_for_tests(host);
        flows.note_capable(host, true);
        let port = of();
        for round in 1..=3 {
            let answering = async {
                let asked = number(orders.recv().await);
                tokio::time::sleep(KEPT / 4).await;
                flows.told(host, asked, Ok(told(round, 1)));
            };
            let many = futures::future::join_all((0..100).map(|_| flows.look(host, port)));
            let (many, ()) = tokio::join!(many, answering);
            assert!(many.iter().all(|told| told.as_ref().is_ok_and(|(_, told)| told.flows.len() == round)), "{round}");
            assert_eq!(flows.look(host, port).await.unwrap().1.flows.len(), round, "a little later, too");
            assert!(orders.try_recv().is_err(), "once for all of them");
            tokio::time::sleep(KEPT).await;
        }
        // Silence is shared, too: nobody waits a second time for it.
        let began = Instant::now();
        let many = futures::future::join_all((0..100).map(|_| flows.look(host, port))).await;
        assert!(many.iter().all(|told| *told == Err(FlowsError::Deadline)));
        assert!(began.elapsed() < 2 * BUDGET);
        flows.host_gone(host);
        tokio::time::sleep(KEPT).await;
        assert_eq!(flows.look(host, port).await.unwrap_err(), FlowsError::NotThere);
        tokio::time::sleep(KEPT).await;
        assert_eq!(flows.look(host, of()).await.unwrap_err(), FlowsError::NotThere);
        assert_eq!(flows.board().kept.len(), 1, "old answers are given up");
    }
}
