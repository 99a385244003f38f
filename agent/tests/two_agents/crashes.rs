//! Agents that die, links that break, switches that are refused: at each step of a move. Whatever happens, one copy of the
//! guest goes on, nothing acknowledged is lost, nothing is left behind, and the second attempt succeeds.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use supercloud_api::{
    handover::{Phase, Report},
    ids::{FreezeId, HostId},
};
use tokio::sync::mpsc;

use crate::{controller::Verdict, lab::Lab};

/// The reports of a move, in their order: the steps at which something can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Prepared,
    Paused,
    RequestSwitch,
    Running,
    NothingMissing,
    Released,
}

const STEPS: [Step; 6] =
    [Step::Prepared, Step::Paused, Step::RequestSwitch, Step::Running, Step::NothingMissing, Step::Released];

fn step_of(report: &Report) -> Option<Step> {
    Some(match report {
        Report::Prepared { .. } => Step::Prepared,
        Report::Paused { .. } => Step::Paused,
        Report::RequestSwitch(_) => Step::RequestSwitch,
        Report::Running { .. } => Step::Running,
        Report::NothingMissing { .. } => Step::NothingMissing,
        Report::Released { .. } => Step::Released,
        _ => return None,
    })
}

/// Tells when the first report of a step comes in.
fn watch_for(lab: &Lab, step: Step, verdict: Verdict) -> mpsc::UnboundedReceiver<HostId> {
    let (seen, first) = mpsc::unbounded_channel();
    lab.controller.hook(move |host, report| {
        if step_of(report) == Some(step) && !seen.is_closed() {
            let _ = seen.send(host);
            return verdict;
        }
        Verdict::Take
    });
    first
}

async fn moved_or_rolled_back(
    lab: &Lab,
    guest: supercloud_api::ids::GuestId,
    operation: supercloud_api::ids::OperationId,
) {
    let phase = lab.controller.ended(guest, operation).await;
    assert!(matches!(phase, Phase::Done | Phase::RolledBack), "{phase}");
    println!("ended as {phase}");
    lab.controller.unhook();
    lab.check(guest).await;
    // The second attempt, from wherever it is.
    let record = lab.controller.record(guest);
    let to = usize::from(record.owner == supercloud_api::handover::Owner::Host(lab.hosts[0].id));
    lab.done(guest, lab.migrate(to)).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was booted again");
}

async fn agent_dies(victim: usize, step: Step) {
    println!("the agent of host {victim} dies at {step:?}");
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let mut first = watch_for(&lab, step, Verdict::Take);
    let operation = lab.controller.operate(guest, lab.migrate(1));
    first.recv().await.unwrap();
    lab.hosts[victim].kill_agent().await;
    first.close();
    tokio::time::sleep(Duration::from_millis(300)).await;
    lab.hosts[victim].start_agent();
    moved_or_rolled_back(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sources_agent_dies_at_each_step() {
    for step in STEPS {
        agent_dies(0, step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destinations_agent_dies_at_each_step() {
    for step in STEPS {
        agent_dies(1, step).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_to_the_controller_breaks_at_each_step() {
    for step in STEPS {
        for victim in [0, 1] {
            println!("host {victim} loses its controller at {step:?}, and the report with it");
            let lab = Lab::begin(&[true, true]).await;
            let guest = lab.add_guest();
            lab.start(guest, 0).await;
            let mut first = watch_for(&lab, step, Verdict::Drop);
            let operation = lab.controller.operate(guest, lab.migrate(1));
            first.recv().await.unwrap();
            lab.controller.cut(lab.hosts[victim].id);
            first.close();
            tokio::time::sleep(Duration::from_millis(1500)).await;
            lab.controller.heal(lab.hosts[victim].id);
            moved_or_rolled_back(&lab, guest, operation).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_switch_lets_the_source_go_on() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let mut first = watch_for(&lab, Step::RequestSwitch, Verdict::AbortFirst);
    let operation = lab.controller.operate(guest, lab.migrate(1));
    first.recv().await.unwrap();
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::RolledBack);
    moved_or_rolled_back(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_report_may_be_lost_once() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let lost = seen.clone();
    lab.controller.hook(move |host, report| {
        let mut lost = lost.lock().unwrap();
        let mark = (host, std::mem::discriminant(report));
        if lost.contains(&mark) {
            return Verdict::Take;
        }
        lost.push(mark);
        Verdict::Drop
    });
    let operation = lab.controller.operate(guest, lab.migrate(1));
    assert_eq!(lab.controller.ended(guest, operation).await, Phase::Done);
    assert!(seen.lock().unwrap().len() >= STEPS.len());
    moved_or_rolled_back(&lab, guest, operation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_while_a_freeze_is_made() {
    for step in [Step::Paused, Step::RequestSwitch] {
        println!("the agent dies at {step:?} of a freeze");
        let lab = Lab::begin(&[true, true]).await;
        let guest = lab.add_guest();
        lab.start(guest, 0).await;
        let mut first = watch_for(&lab, step, Verdict::Take);
        let freeze = FreezeId::generate();
        let operation = lab.controller.operate(guest, supercloud_api::handover::OperationKind::Freeze { freeze });
        first.recv().await.unwrap();
        lab.hosts[0].kill_agent().await;
        first.close();
        lab.hosts[0].start_agent();
        let phase = lab.controller.ended(guest, operation).await;
        println!("ended as {phase}");
        if phase == Phase::Done {
            let thaw = supercloud_api::handover::OperationKind::Thaw { freeze, to: lab.hosts[1].id };
            lab.eventually("the frozen guest's host is free", async || lab.hosts[0].leftovers().is_empty()).await;
            lab.done(guest, thaw).await;
        }
        lab.check(guest).await;
        assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was booted again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volume_processes_die_during_a_move() {
    for victim in [0, 1] {
        println!("the volume processes of host {victim} die");
        let lab = Lab::begin(&[true, true]).await;
        let guest = lab.add_guest();
        lab.start(guest, 0).await;
        lab.world.piece_ms.store(50, Ordering::SeqCst);
        let operation = lab.controller.operate(guest, lab.migrate(1));
        lab.eventually("memory is being copied", async || {
            lab.controller.progress(operation).is_some_and(|progress| progress.memory_sent_bytes > 0)
        })
        .await;
        for pid in lab.hosts[victim].volume_pids() {
            let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        lab.world.piece_ms.store(2, Ordering::SeqCst);
        moved_or_rolled_back(&lab, guest, operation).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_host_that_comes_back_ends_its_guests_and_keeps_their_files() {
    let lab = Lab::begin(&[true, true]).await;
    let (guest, other) = (lab.add_guest(), lab.add_guest());
    lab.start(guest, 0).await;
    lab.start(other, 1).await;
    lab.controller.cut(lab.hosts[0].id);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert_eq!(lab.world.running(guest), 1, "a controller that is away stops nothing");
    lab.controller.remove(lab.hosts[0].id);
    lab.controller.heal(lab.hosts[0].id);
    let host = &lab.hosts[0];
    lab.eventually("the agent ends", async || host.has_ended()).await;
    assert_eq!(lab.world.running(guest), 0);
    assert_eq!(host.hypervisor.epoch_of(guest).await, None);
    assert!(host.volume_pids().is_empty() && host.switch.attached.lock().unwrap().is_empty());
    assert!(!host.leftovers().is_empty(), "what it wrote is kept");
    // Neither does the next agent run anything, nor does it dial.
    lab.controller.cut(host.id);
    host.start_agent();
    lab.eventually("the next agent ends at once", async || host.has_ended()).await;
    assert_eq!((lab.world.running(guest), lab.world.running(other)), (0, 1));
    lab.violations();
}
