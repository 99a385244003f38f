//! Two guests that talk to each other go together: moved live from two clouds to a third, frozen and thawed elsewhere. Their stream goes
//! on, and neither knows of anything that the other has forgotten. Real guests, switches and hypervisors.
//!
//! Needs root and the packages of ./deploy/setup; without them the test says why it does nothing.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use supercloud_api::{GroupCreate, GroupThaw, GuestFreeze, GuestMigrate, GuestState, MemoryMode, Operation, Phase};
use supercloud_lab::{
    LabSpec,
    fleet::{ClientStats, Console, Fleet, FleetSpec, GuestSpec, Said, ServerStats, programs},
    require, state,
};

/// For what guests say, emulated, on a busy machine.
const SAY_BUDGET: Duration = Duration::from_secs(240);

/// Takes the lab down, whatever became of the test.
struct Sweep(String);

impl Drop for Sweep {
    fn drop(&mut self) {
        // It is gone when all went well.
        let _ = supercloud_lab::down(&state::default_root(), &self.0);
    }
}

/// What the two say.
struct Pair {
    client: Console,
    server: Console,
    /// The most that the client was told of the server's writes.
    told: u64,
    /// The most that the server has said it wrote.
    written: u64,
    /// Bytes that the client has checked.
    bytes: u64,
    boots: Vec<String>,
}

impl Pair {
    fn note_boot(&mut self, boot: &str) {
        if !self.boots.iter().any(|known| known == boot) {
            self.boots.push(boot.to_owned());
        }
    }

    fn client_says(&mut self, stats: &ClientStats) -> Result<()> {
        ensure!(stats.is_unharmed(), "the client: {stats:?}");
        self.note_boot(&stats.boot_id);
        self.told = self.told.max(stats.acked_seen);
        self.bytes = self.bytes.max(stats.bytes);
        Ok(())
    }

    fn server_says(&mut self, stats: &ServerStats) -> Result<()> {
        ensure!(stats.is_whole(), "the server: {stats:?}");
        self.note_boot(&stats.boot_id);
        self.written = self.written.max(stats.acked);
        Ok(())
    }

    /// Listens until `is_enough`.
    async fn listen(&mut self, what: &str, is_enough: impl Fn(&Self) -> bool) -> Result<()> {
        let end = Instant::now() + SAY_BUDGET;
        while Instant::now() < end {
            let heard = tokio::task::block_in_place(|| (self.client.poll(), self.server.poll()));
            for one in heard.0.into_iter().chain(heard.1) {
                match &one.said {
                    Said::Client(stats) => self.client_says(stats)?,
                    Said::Server(stats) => self.server_says(stats)?,
                    _ => {}
                }
            }
            if is_enough(self) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        bail!("{what}: not in time; {} bytes, {} told, {} written", self.bytes, self.told, self.written)
    }

    /// Sees the stream go on, and the server have written all that the client knows of.
    async fn goes_on(&mut self, after: &str) -> Result<()> {
        let (bytes, told, boots) = (self.bytes, self.told, self.boots.len());
        self.listen(after, |now| now.bytes > bytes + 50_000 && now.told > told && now.written >= told).await?;
        ensure!(self.boots.len() == boots, "{after}: one of them was started anew: {:?}", self.boots);
        Ok(())
    }
}

/// That all parts of a group's operation were switched at one instant.
async fn at_once(fleet: &Fleet, whole: &Operation) -> Result<()> {
    let mut at = Vec::new();
    for part in &whole.parts {
        let part = fleet.client().operation(*part).await?;
        ensure!(part.phase == Phase::Done && part.part_of == Some(whole.id), "{part:?}");
        let switched = part.phase_times.iter().find(|time| time.phase > Phase::Switch);
        at.push(switched.context("it has no time of its switch")?.at_ms);
        println!("  {:?}: stood still for {:?} ms", part.kind, part.progress.downtime_ms);
    }
    // Each record notes its own time, a moment apart, in one transaction.
    let (first, last) = (at.iter().min().copied().unwrap_or(0), at.iter().max().copied().unwrap_or(0));
    println!("{:?} of {} guests: {} ms between their switches as written", whole.kind, at.len(), last - first);
    Ok(())
}

async fn go_together(fleet: &Fleet) -> Result<()> {
    fleet.import_lean_image("lean").await?;
    fleet.create_network("lan", "10.20.0.0/24").await?;
    let address = "10.20.0.10".parse()?;
    let server = GuestSpec::new("web", "lean", "lan", "sc.role=server").at("h1").with_ipv4(address);
    let client = GuestSpec::new("watcher", "lean", "lan", &format!("sc.role=client sc.peer={address}")).at("h2");
    let (server, client) = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client))?;
    let (server_console, client_console) = (fleet.console(server.id)?, fleet.console(client.id)?);
    let mut pair =
        Pair { client: client_console, server: server_console, told: 0, written: 0, bytes: 0, boots: Vec::new() };
    pair.listen("they talk", |now| now.bytes > 20_000 && now.told > 0).await?;

    let api = fleet.client();
    let guests = vec!["web".into(), "watcher".into()];
    api.create_group(&GroupCreate { name: "shop".parse()?, project: None, guests }).await?;
    let wish = GuestMigrate {
        to: "c3".into(),
        bandwidth_bps: None,
        max_downtime_ms: None,
        auto_converge: true,
        deadline_ms: None,
        memory: MemoryMode::PreCopy,
        reason: Some("together".into()),
    };
    let moved = fleet.finish("the group's move", api.migrate_group("shop", &wish).await?, |_| ()).await?;
    at_once(fleet, &moved).await?;
    for guest in ["web", "watcher"] {
        let now = fleet.guest(guest).await?;
        ensure!(now.host_name.as_ref().is_some_and(|host| host.as_str() == "h3"), "{now:?}");
    }
    pair.goes_on("after the move").await?;

    let frozen =
        fleet.finish("the group's freeze", api.freeze_group("shop", &GuestFreeze::default()).await?, |_| ()).await?;
    at_once(fleet, &frozen).await?;
    for guest in ["web", "watcher"] {
        ensure!(fleet.guest(guest).await?.state == GuestState::Frozen);
    }
    let thaw = GroupThaw { to: Some("c2".into()), ..GroupThaw::default() };
    let thawed = fleet.finish("the group's thaw", api.thaw_group("shop", &thaw).await?, |_| ()).await?;
    at_once(fleet, &thawed).await?;
    pair.goes_on("after the thaw").await?;
    ensure!(api.group("shop").await?.operation.is_none());
    println!("{} bytes checked, {} writes told, {} written", pair.bytes, pair.told, pair.written);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_that_talk_go_together_and_know_the_same() -> Result<()> {
    if !require::lab(&["libvirtd", "ovs-vswitchd", "qemu-system-x86_64"]) {
        return Ok(());
    }
    if std::env::var_os("SUPERCLOUD_BIN_DIR").is_none() {
        tokio::task::block_in_place(programs::build)?;
    }
    let name = format!("t-group-{}", std::process::id());
    let _sweep = Sweep(name.clone());
    let fleet = Fleet::up(FleetSpec::new(LabSpec::plain(&name, 3))).await?;
    go_together(&fleet).await?;
    fleet.down().await?;
    Ok(())
}
