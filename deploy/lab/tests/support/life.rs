//! Failures of what is no move: something dies while a guest is frozen, thawed, started or stopped.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use supercloud_api::{
    Code, Guest, GuestFreeze, GuestStart, GuestState, GuestStop, GuestThaw, Operation, Phase, ids::GuestId,
};
use supercloud_lab::fleet::{FleetError, GuestSpec, config};

use super::case::Victim;
use super::ground::{Ground, IMAGE, NETWORK, SEATS, SERVER, SETTLE_BUDGET, now, until};
use super::strike::Told;

/// The guest that is started and stopped.
const SPARE: &str = "spare";
/// How long a guest that does not listen is asked to stop: time enough for somebody to die.
const GRACE_MS: u64 = 4000;
/// Bytes of the memory's file that are there when the save is well under way.
const SAVING_BYTES: u64 = 1 << 20;
/// Time between two looks at what lasts for less than a second.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long it may take until the moment has come.
const MOMENT_BUDGET: Duration = Duration::from_secs(60);

/// What is done with the guest, up to the blow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It is frozen; its memory goes into a file of its host.
    FreezeSave,
    /// It is frozen; file and disk go into the store.
    FreezeStore,
    /// It is thawed at another host, which reads the memory from the store.
    Thaw,
    /// It is started.
    Start,
    /// It was asked to stop.
    Stop,
}

impl Stage {
    const NAMED: [(Self, &'static str); 5] = [
        (Self::FreezeSave, "freeze-save"),
        (Self::FreezeStore, "freeze-store"),
        (Self::Thaw, "thaw"),
        (Self::Start, "start"),
        (Self::Stop, "stop"),
    ];
}

/// One failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LifeCase {
    /// When.
    pub stage: Stage,
    /// What.
    pub victim: Victim,
}

impl LifeCase {
    /// Whether the victim takes part: one host is enough for everything here.
    pub fn is_possible(self) -> bool {
        match self.victim {
            Victim::Controller => true,
            Victim::SourceAgent | Victim::SourceLibvirtd | Victim::SourceVolume => {
                matches!(self.stage, Stage::FreezeSave | Stage::FreezeStore | Stage::Stop)
            }
            Victim::DestinationAgent | Victim::DestinationLibvirtd | Victim::DestinationVolume => {
                matches!(self.stage, Stage::Thaw | Stage::Start)
            }
            Victim::DestinationQemu | Victim::Wan => false,
        }
    }

    /// Every failure at every stage.
    pub fn all() -> impl Iterator<Item = Self> {
        let pairs = |(stage, _)| Victim::ALL.into_iter().map(move |(victim, _)| Self { stage, victim });
        Stage::NAMED.into_iter().flat_map(pairs).filter(|case| case.is_possible())
    }
}

impl fmt::Display for LifeCase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = Stage::NAMED.iter().find(|(stage, _)| *stage == self.stage).map_or("?", |(_, name)| name);
        let victim = Victim::ALL.iter().find(|(victim, _)| *victim == self.victim).map_or("?", |(_, name)| name);
        write!(f, "{stage}/{victim}")
    }
}

impl FromStr for LifeCase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (stage, victim) = text.split_once('/')?;
            let stage = Stage::NAMED.iter().find(|(_, name)| *name == stage)?.0;
            let victim = Victim::ALL.iter().find(|(_, name)| *name == victim)?.0;
            Some(Self { stage, victim }).filter(|case| case.is_possible())
        };
        parse().ok_or_else(|| format!("'{text}' is no case: STAGE/VICTIM"))
    }
}

impl Ground {
    /// Runs a case and brings its guest back to life; the server is checked afterwards by the caller.
    pub async fn run_life_case(&mut self, case: LifeCase) -> Result<Told> {
        match case.stage {
            Stage::FreezeSave | Stage::FreezeStore => self.freeze_under(case).await,
            Stage::Thaw => self.thaw_under(case).await,
            Stage::Start | Stage::Stop => self.spare_under(case).await,
        }
    }

    /// Strikes when the moment has come, mends, and waits for the end.
    async fn strike_life(&self, case: LifeCase, operation: &Operation, guest: GuestId, host: &str) -> Result<Told> {
        let began = Instant::now();
        let seen = self.await_stage(case.stage, operation, guest, host).await?;
        self.strike(case.victim, host, host).await?;
        self.mend(case.victim, host, host, false).await?;
        let ended = self.operation_until(operation.id, |operation| operation.phase.is_terminal()).await?;
        let is_told = ended.phase == Phase::Done || ended.error.is_some();
        ensure!(is_told, "it did not come to its end and does not tell why: {ended:?}");
        ensure!(ended.error.as_ref().is_none_or(|problem| problem.code != Code::Internal), "{ended:?}");
        Ok(Told { seen, ended: ended.phase, took: began.elapsed() })
    }

    async fn await_stage(&self, stage: Stage, operation: &Operation, guest: GuestId, host: &str) -> Result<Phase> {
        let memory = format!("{}/guests/{guest}/memory", config::AGENT_DIR);
        let memory = self.lab().host(host)?.outside(&memory).context("no such place")?;
        let end = Instant::now() + MOMENT_BUDGET;
        loop {
            let has_come = |operation: &Operation| match stage {
                Stage::FreezeSave => std::fs::metadata(&memory).is_ok_and(|file| file.len() >= SAVING_BYTES),
                Stage::FreezeStore => operation.progress.message.starts_with("storing"),
                Stage::Thaw => std::fs::metadata(&memory).is_ok_and(|file| file.len() >= SAVING_BYTES),
                Stage::Start | Stage::Stop => operation.phase >= Phase::Prepare,
            };
            // The file first: asking for the operation takes as long as a save may.
            let is_in_file = matches!(stage, Stage::FreezeSave | Stage::Thaw);
            if is_in_file && has_come(operation) {
                return Ok(Phase::Copy);
            }
            let known = self.fleet.client().operation(operation.id).await?;
            ensure!(!known.phase.is_terminal(), "it had ended ({:?}) before anything could die", known.phase);
            if !is_in_file && has_come(&known) {
                return Ok(known.phase);
            }
            ensure!(Instant::now() < end, "the moment did not come; {:?}: {}", known.phase, known.progress.message);
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn freeze_under(&mut self, case: LifeCase) -> Result<Told> {
        let before = self.seat().await?;
        let operation = self.fleet.client().freeze_guest(SERVER, &GuestFreeze::default()).await?;
        let told = self.strike_life(case, &operation, self.server, &before.host).await?;
        match told.ended {
            Phase::Done => {}
            Phase::RolledBack => {
                ensure!(
                    self.seat().await? == before,
                    "rolled back, but it was at {before:?}: {:?}",
                    self.seat().await?
                );
                self.check_running(self.server, &before.host).await.context("after the freeze was rolled back")?;
                self.fleet.freeze(SERVER, |_| {}).await.context("the second attempt to freeze")?;
            }
            other => bail!("it ended as {other:?}"),
        }
        self.check_frozen().await?;
        self.thaw_well(Self::other_seat(&before.host)).await.context("the thaw of what was frozen")?;
        Ok(told)
    }

    async fn thaw_under(&mut self, case: LifeCase) -> Result<Told> {
        let before = self.seat().await?;
        self.fleet.freeze(SERVER, |_| {}).await?;
        self.check_frozen().await?;
        let to = Self::other_seat(&before.host);
        let body = GuestThaw { to: Some(to.into()), ..GuestThaw::default() };
        let operation = self.fleet.client().thaw_guest(SERVER, &body).await?;
        let told = self.strike_life(case, &operation, self.server, to).await?;
        match told.ended {
            Phase::Done => {
                ensure!(self.seat().await?.host == to, "thawed, but not at {to}: {:?}", self.seat().await?);
                self.moves += 1;
            }
            Phase::RolledBack => {
                self.check_frozen().await.context("after the thaw was rolled back")?;
                self.thaw_well(to).await.context("the second attempt to thaw")?;
            }
            other => bail!("it ended as {other:?}"),
        }
        Ok(told)
    }

    /// A guest of its own, whose boots nobody counts, is started or stopped; it is deleted at the end.
    async fn spare_under(&mut self, case: LifeCase) -> Result<Told> {
        let host = SEATS[0];
        let spare = self.fleet.create_guest(&GuestSpec::new(SPARE, IMAGE, NETWORK, "sc.role=idle").at(host)).await?;
        let client = self.fleet.client();
        let stop = GuestStop { force: true, grace_ms: None };
        let start = GuestStart { place: Some(host.into()), cpu: None };
        let told = match case.stage {
            Stage::Stop => {
                let gently = GuestStop { force: false, grace_ms: Some(GRACE_MS) };
                let operation = client.stop_guest(SPARE, &gently).await?;
                let told = self.strike_life(case, &operation, spare.id, host).await?;
                if told.ended == Phase::RolledBack {
                    self.check_running(spare.id, host).await.context("after the stop was rolled back")?;
                    self.done(client.stop_guest(SPARE, &stop).await?).await.context("the second attempt to stop")?;
                }
                told
            }
            _ => {
                self.done(client.stop_guest(SPARE, &stop).await?).await?;
                let operation = client.start_guest(SPARE, &start).await?;
                let told = self.strike_life(case, &operation, spare.id, host).await?;
                if told.ended == Phase::RolledBack {
                    self.check_nowhere(spare.id).await.context("after the start was rolled back")?;
                    self.done(client.start_guest(SPARE, &start).await?).await.context("the second attempt to start")?;
                }
                self.check_running(spare.id, host).await?;
                self.done(client.stop_guest(SPARE, &stop).await?).await?;
                told
            }
        };
        ensure!(matches!(told.ended, Phase::Done | Phase::RolledBack), "it ended as {:?}", told.ended);
        self.check_nowhere(spare.id).await?;
        // Stopped for good or for a while: it starts again.
        self.done(client.start_guest(SPARE, &start).await?).await.context("a start after all that")?;
        self.check_running(spare.id, host).await?;
        self.done(client.stop_guest(SPARE, &stop).await?).await?;
        self.done(client.delete_guest(SPARE).await?).await?;
        self.check_forgotten(spare.id).await?;
        Ok(told)
    }

    async fn done(&self, operation: Operation) -> Result<Operation, FleetError> {
        let what = format!("operation {}", operation.id);
        self.fleet.finish(&what, operation, |_| {}).await
    }

    async fn thaw_well(&mut self, to: &str) -> Result<()> {
        self.fleet.thaw(SERVER, to, |_| {}).await?;
        ensure!(self.seat().await?.host == to, "thawed, but not at {to}: {:?}", self.seat().await?);
        self.moves += 1;
        Ok(())
    }

    /// The server is in the store and nowhere else.
    async fn check_frozen(&self) -> Result<()> {
        let guest = self.guest().await?;
        let is_frozen = guest.state == GuestState::Frozen && guest.freeze.is_some() && guest.host.is_none();
        ensure!(is_frozen && guest.alarm.is_none(), "{guest:?}");
        self.check_copies(self.server, &[]).await
    }

    async fn check_nowhere(&self, id: GuestId) -> Result<()> {
        let guest: Guest = self.fleet.guest(&id.to_string()).await?;
        ensure!(guest.state == GuestState::Stopped && guest.alarm.is_none(), "{guest:?}");
        self.check_copies(id, &[]).await
    }

    async fn check_running(&self, id: GuestId, host: &str) -> Result<()> {
        let guest: Guest = self.fleet.guest(&id.to_string()).await?;
        let is_there = guest.host_name.as_ref().is_some_and(|name| name.to_string() == host);
        ensure!(guest.state == GuestState::Running && is_there && guest.alarm.is_none(), "{guest:?}");
        self.check_copies(id, &[(host, "running")]).await
    }

    /// No host has a folder of a guest that was deleted.
    async fn check_forgotten(&self, id: GuestId) -> Result<()> {
        let folder = format!("{}/guests/{id}", config::AGENT_DIR);
        let mut left = Vec::new();
        let forgotten = until(SETTLE_BUDGET, async || {
            let hosts = self.lab().spec().hosts.iter().map(|host| &host.name);
            let has = |host: &&String| {
                self.lab().host(host).ok().and_then(|site| site.outside(&folder)).is_some_and(|path| path.exists())
            };
            left = now(|| hosts.filter(has).cloned().collect());
            left.is_empty().then_some(())
        });
        forgotten.await.with_context(|| format!("a deleted guest's folder is left at {left:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_written_as_they_are_read() {
        assert_eq!(LifeCase::all().count(), 5 * 4);
        for case in LifeCase::all() {
            assert_eq!(case.to_string().parse(), Ok(case));
        }
        assert!("thaw/source-agent".parse::<LifeCase>().is_err() && "copy/wan".parse::<LifeCase>().is_err());
    }
}
