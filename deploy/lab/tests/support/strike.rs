//! One failure: a move begins, something dies at its moment, and what follows is looked at.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use supercloud_api::{GuestMigrate, MemoryMode, Operation, Phase, ids::OperationId};
use supercloud_lab::{CONTROLLER, Which};

use super::case::{Case, Moment, Seat, Victim, judge_end};
use super::ground::{Ground, SERVER, now, until};

/// How long a move may take to reach a phase, or to end: what waits for a silent link waits half a minute, a paused guest is given
/// back after two.
const MOVE_BUDGET: Duration = Duration::from_secs(240);
/// How long it may take until what is to be killed is there.
const VICTIM_BUDGET: Duration = Duration::from_secs(20);
/// Time between two looks while the moment is awaited: the phases around the switch are short.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long what died stays away before a supervisor starts it again.
const AWAY: Duration = Duration::from_millis(1500);
/// How long a cut link stays cut.
const CUT: Duration = Duration::from_secs(6);

/// How a case went.
#[derive(Debug)]
pub struct Told {
    /// The phase that was seen when the blow fell.
    pub seen: Phase,
    /// How the operation ended.
    pub ended: Phase,
    /// How long it took in all.
    pub took: Duration,
}

impl Ground {
    /// Asks for a move of the server.
    pub async fn ask_for_move(&self, to: &str) -> Result<Operation> {
        let body = GuestMigrate {
            to: to.into(),
            bandwidth_bps: None,
            max_downtime_ms: None,
            auto_converge: true,
            deadline_ms: None,
            memory: MemoryMode::PreCopy,
            reason: Some("a failure test".into()),
        };
        Ok(self.fleet.client().migrate_guest(SERVER, &body).await?)
    }

    /// A move in which nothing dies.
    pub async fn move_well(&mut self, to: &str) -> Result<Operation> {
        let operation = self.fleet.migrate(SERVER, to, |_| {}).await?;
        self.moves += 1;
        Ok(operation)
    }

    /// Waits until the operation fulfils something; the operation as it was then.
    pub async fn operation_until(&self, id: OperationId, done: impl Fn(&Operation) -> bool) -> Result<Operation> {
        let end = Instant::now() + MOVE_BUDGET;
        let mut last = None;
        while Instant::now() < end {
            // A controller that is being killed answers nothing for a while.
            if let Ok(operation) = self.fleet.client().operation(id).await {
                if done(&operation) {
                    return Ok(operation);
                }
                last = Some(operation);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let last = last.map(|operation| (operation.phase, operation.progress.message));
        anyhow::bail!("operation {id} came no further than {last:?} in {} s", MOVE_BUDGET.as_secs())
    }

    /// Runs a case; the server is checked afterwards by the caller.
    pub async fn run_case(&mut self, case: Case) -> Result<Told> {
        let before = self.seat().await?;
        let to = Self::other_seat(&before.host);
        let began = Instant::now();
        let operation = self.ask_for_move(to).await?;
        let is_held = case.moment == Moment::BeforeSwitch;
        if is_held {
            self.operation_until(operation.id, |operation| operation.phase >= Phase::Copy).await?;
            now(|| self.lab().partition(CONTROLLER, to))?;
        }
        let seen = self.await_moment(&operation, case.moment).await?;
        self.strike(case.victim, &before.host, to).await?;
        self.mend(case.victim, &before.host, to, is_held).await?;
        let ended = self.operation_until(operation.id, |operation| operation.phase.is_terminal()).await?;
        let took = began.elapsed();
        let after = self.seat().await?;
        if after.host != before.host {
            self.moves += 1;
        }
        let told = Told { seen, ended: ended.phase, took };
        judge_end(seen, ended.phase, &before, &after, to)
            .map_err(|wrong| anyhow::anyhow!("{wrong}; the operation says: {:?}", ended.error))?;
        ensure!(
            ended.phase == Phase::Done || ended.error.is_some(),
            "it was rolled back and does not tell why: {ended:?}"
        );
        Ok(told)
    }

    async fn await_moment(&self, operation: &Operation, moment: Moment) -> Result<Phase> {
        let wanted = match moment {
            Moment::After(time) => {
                tokio::time::sleep(time).await;
                return Ok(self.fleet.client().operation(operation.id).await?.phase);
            }
            Moment::Prepare => Phase::Prepare,
            Moment::Copy => Phase::Copy,
            Moment::BeforeSwitch => Phase::Switch,
            Moment::AfterSwitch => Phase::Resume,
            Moment::Finish => Phase::Finish,
        };
        let memory_flows =
            |operation: &Operation| moment != Moment::Copy || operation.progress.memory_sent_bytes > 1 << 20;
        let is_there =
            |operation: &Operation| operation.phase > wanted || operation.phase == wanted && memory_flows(operation);
        let seen = self.operation_until(operation.id, is_there).await?.phase;
        ensure!(!seen.is_terminal(), "the move had ended ({seen:?}) before anything could die");
        Ok(seen)
    }

    /// Kills what is to die; an error when nothing was there to be killed.
    pub async fn strike(&self, victim: Victim, source: &str, destination: &str) -> Result<()> {
        let (host, which) = match victim {
            Victim::SourceAgent => (source, Which::Agent),
            Victim::DestinationAgent => (destination, Which::Agent),
            Victim::SourceVolume => (source, Which::Volume),
            Victim::DestinationVolume => (destination, Which::Volume),
            Victim::Controller => (CONTROLLER, Which::Controller),
            Victim::SourceLibvirtd => (source, Which::Libvirtd),
            Victim::DestinationLibvirtd => (destination, Which::Libvirtd),
            Victim::DestinationQemu => (destination, Which::Qemu),
            Victim::Wan => return Ok(now(|| self.lab().partition(source, destination))?),
        };
        let kill = async || match now(|| self.lab().kill_process(host, which, libc::SIGKILL)) {
            Ok(0) => None,
            Ok(count) => Some(Ok(count)),
            Err(error) => Some(Err(error)),
        };
        until(VICTIM_BUDGET, kill).await.with_context(|| format!("no {which:?} is at {host} to be killed"))??;
        Ok(())
    }

    /// Starts again what a supervisor starts again, and heals what was cut.
    pub async fn mend(&self, victim: Victim, source: &str, destination: &str, is_held: bool) -> Result<()> {
        tokio::time::sleep(if victim == Victim::Wan { CUT } else { AWAY }).await;
        let lab = self.lab();
        now(|| match victim {
            Victim::SourceAgent => lab.restart(source, "agent").map(drop),
            Victim::DestinationAgent => lab.restart(destination, "agent").map(drop),
            Victim::Controller => lab.restart(CONTROLLER, "controller").map(drop),
            Victim::SourceLibvirtd => lab.restart_libvirtd(source),
            Victim::DestinationLibvirtd => lab.restart_libvirtd(destination),
            // Theirs to bring back are the agents.
            Victim::SourceVolume | Victim::DestinationVolume | Victim::DestinationQemu => Ok(()),
            Victim::Wan => lab.heal(source, destination),
        })?;
        if is_held {
            now(|| lab.heal(CONTROLLER, destination))?;
        }
        // The API answers again before anything is concluded from what it says.
        for host in &lab.spec().hosts {
            self.fleet.await_host_up(&host.name).await?;
        }
        Ok(())
    }

    /// A second attempt, in which nothing dies, succeeds: to the other seat, from wherever the first one has left it.
    pub async fn try_again(&mut self) -> Result<Seat> {
        let before = self.seat().await?;
        let to = Self::other_seat(&before.host);
        let operation = self.move_well(to).await.context("the second attempt")?;
        let after = self.seat().await?;
        judge_end(Phase::Plan, operation.phase, &before, &after, to).map_err(anyhow::Error::msg)?;
        Ok(after)
    }
}
