//! An application inside a guest asks for its own move to another cloud and back, over HTTP at the metadata address, and sees by the
//! answers where it is. Real guests, switches and hypervisors.
//!
//! Needs root and the packages of ./deploy/setup; without them the test says why it does nothing.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use supercloud_api::{OperationKind, Phase};
use supercloud_lab::LabSpec;
use supercloud_lab::fleet::{Console, Fleet, FleetSpec, GuestSpec, Said, TravellerStats, programs};
use supercloud_lab::state;

/// Boot and two moves, emulated, on a busy machine.
const JOURNEY_BUDGET: Duration = Duration::from_secs(420);

fn is_possible() -> bool {
    supercloud_lab::require::lab(&["libvirtd", "ovs-vswitchd", "qemu-system-x86_64"])
}

/// Takes the lab down, whatever became of the test.
struct Sweep(String);

impl Drop for Sweep {
    fn drop(&mut self) {
        // It is gone when all went well.
        let _ = supercloud_lab::down(&state::default_root(), &self.0);
    }
}

/// Listens until the traveller is back, or gives up; every boot of it that was heard.
async fn journey(console: &mut Console) -> Result<(TravellerStats, Vec<String>)> {
    let end = Instant::now() + JOURNEY_BUDGET;
    let mut boots: Vec<String> = Vec::new();
    let mut last = None;
    while Instant::now() < end {
        for heard in tokio::task::block_in_place(|| console.poll()) {
            let Said::Traveller(stats) = heard.said else { continue };
            if !boots.contains(&stats.boot_id) {
                boots.push(stats.boot_id.clone());
            }
            if !stats.failed.is_empty() {
                bail!("the traveller says: {stats:?}");
            }
            if !stats.back.is_empty() {
                return Ok((stats, boots));
            }
            last = Some(stats);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!("it is not back in time; it said {last:?}; else {:#?}", console.other_lines())
}

async fn travels(fleet: &Fleet) -> Result<()> {
    fleet.import_lean_image("lean").await?;
    fleet.create_network("lan", "10.20.0.0/24").await?;
    let guest =
        fleet.create_guest(&GuestSpec::new("traveller", "lean", "lan", "sc.role=traveller sc.to=c2").at("h1")).await?;
    let mut console = fleet.console(guest.id)?;
    let (seen, boots) = journey(&mut console).await?;
    println!("{seen:?}");
    assert_eq!((seen.home.as_str(), seen.there.as_str(), seen.back.as_str()), ("c1", "c2", "c1"));
    assert_eq!(seen.repeated, seen.operation_there, "the same wish again began nothing");
    assert_ne!(seen.operation_there, seen.operation_back);
    assert_eq!((boots.len(), seen.clock_back), (1, 0), "it was moved, not started anew: {boots:?}");

    let now = fleet.guest("traveller").await?;
    assert_eq!(now.epoch.0, guest.epoch.0 + 2);
    let operations = fleet.client().operations().await.context("asking for operations")?;
    let moves: Vec<_> = operations.iter().filter(|one| one.kind == OperationKind::GuestMigrate).collect();
    let ids: Vec<String> = moves.iter().map(|one| one.id.to_string()).collect();
    assert_eq!(ids, [seen.operation_there, seen.operation_back]);
    for one in moves {
        assert_eq!((one.phase, one.actor.as_str()), (Phase::Done, format!("guest:{}", guest.id).as_str()));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_in_a_guest_has_itself_moved_there_and_back() -> Result<()> {
    if !is_possible() {
        return Ok(());
    }
    if std::env::var_os("SUPERCLOUD_BIN_DIR").is_none() {
        tokio::task::block_in_place(programs::build)?;
    }
    let name = format!("t-travel-{}", std::process::id());
    let _sweep = Sweep(name.clone());
    let fleet = Fleet::up(FleetSpec::new(LabSpec::plain(&name, 2))).await?;
    travels(&fleet).await?;
    fleet.down().await?;
    Ok(())
}
