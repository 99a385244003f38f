//! Checkpoints of running guests: memory and disk of one instant, whole in their cloud's store, from which a lost guest goes on anywhere.

use std::{collections::HashMap, path::PathBuf, sync::atomic::Ordering, time::Duration};

use supercloud_api::{
    handover::{OperationKind, Owner},
    ids::FreezeId,
    link::{CheckpointContent, Directive, PointContent, PointTaken},
};
use supercloud_blanket::{
    BackendError, BackendResult,
    backend::{PauseReason, RunState},
    checkpoint::{CheckpointProgress, CheckpointRun, Checkpointed, Checkpointing},
};
use supercloud_ids::{GuestId, VolumeId};
use supercloud_storage::{key::ContentRoot, manifest};
use tokio::sync::watch;

use crate::{
    hypervisor::{Hypervisor, failed, saved},
    lab::{Lab, TestHost},
    nbd::Nbd,
};

/// What was acknowledged of a disk, as of a checkpoint of this name: slot to number.
pub type Disks = HashMap<GuestId, HashMap<u64, u64>>;

impl Checkpointing for Hypervisor {
    fn checkpoint(&self, guest: GuestId, file: PathBuf) -> BackendResult<CheckpointRun> {
        let inner = self.0.clone();
        let (_, progress) = watch::channel(CheckpointProgress::default());
        let done = async move {
            let what = "checkpoint";
            let wait = Duration::from_millis(inner.world.save_ms.load(Ordering::SeqCst));
            tokio::time::sleep(wait).await;
            let disk = match inner.guests.lock().await.get(&guest) {
                Some(found) if found.state == RunState::Running => found.launch.host.disks["disk0"].socket.clone(),
                _ => return Err(BackendError::NoSuchGuest { guest }),
            };
            let next = inner.pause(guest, PauseReason::Other).await?;
            // The first cut counts for nothing, as where another disk did not take it.
            let cut = async {
                let mut disk = Nbd::connect(&disk).await?;
                disk.cut(1).await?;
                disk.cut(2).await
            };
            let cut = cut.await;
            let disk = inner.world.acknowledged.lock().unwrap().get(&guest).cloned().unwrap_or_default();
            inner.world.checkpointed.lock().unwrap().insert(guest, disk);
            inner.go(guest).await;
            cut.map_err(failed(what))?;
            let bytes = saved(next);
            tokio::fs::write(&file, &bytes).await.map_err(failed(what))?;
            let (format, bytes) = ("test/1".to_owned(), bytes.len() as u64);
            Ok(Checkpointed { format, bytes, cut: 2, stood_still: Duration::from_millis(1) })
        };
        Ok(CheckpointRun { progress, done: Box::pin(done) })
    }
}

async fn take(lab: &Lab, host: &TestHost, guest: GuestId, volume: VolumeId) -> PointTaken {
    let before = lab.controller.points(host.id).len();
    lab.controller.direct(host.id, Directive::TakePoint { guest, volume, memory: true });
    lab.eventually("a checkpoint has ended", async || lab.controller.points(host.id).len() > before).await;
    lab.controller.points(host.id).remove(before)
}

async fn taken(lab: &Lab, host: &TestHost, guest: GuestId) -> (PointContent, CheckpointContent) {
    let told = take(lab, host, guest, lab.controller.volume(guest)).await;
    let content = told.content.unwrap_or_else(|| panic!("{:?}", told.problem));
    let memory = content.memory.clone().expect("memory was asked for");
    (content, memory)
}

/// The guest's disk is to be what it was then, and nothing that was written since is missed.
fn forget_what_came_after(lab: &Lab, guest: GuestId, disk: HashMap<u64, u64>) {
    lab.world.acknowledged.lock().unwrap().insert(guest, disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_from_its_checkpoint_wherever_it_was_lost_and_as_often_as_one_likes() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let host = &lab.hosts[0];
    let (first, memory) = taken(&lab, host, guest).await;
    assert!(first.sealed_blocks > 0 && memory.filled_blocks > 0 && memory.stored_blocks > 0, "{first:?} {memory:?}");
    assert!(!lab.hosts[0].checkpoint_file(guest).exists(), "the file is not removed");
    let reader = lab.controller.reader(guest, &host.config.store_dir);
    for root in [&first.root, &memory.root] {
        manifest::verify(&reader, root.parse::<ContentRoot>().unwrap(), true).await.unwrap();
    }
    let disk = lab.world.checkpointed.lock().unwrap()[&guest].clone();
    // It runs on, and the next one has only what is new.
    let before = lab.world.newest(guest);
    lab.eventually("it writes on", async || lab.world.newest(guest) > before + 20).await;
    let (second, next) = taken(&lab, host, guest).await;
    assert!(second.version > first.version && next.root != memory.root, "{second:?}");
    assert!(next.stored_blocks < next.filled_blocks, "memory that did not change is stored again: {next:?}");
    lab.check(guest).await;

    // Lost by itself: it goes on at the other host, and its own lets go of what it had.
    host.hypervisor.crash(guest).await;
    lab.eventually("it is lost", async || matches!(lab.controller.record(guest).owner, Owner::Lost(_))).await;
    let freeze = FreezeId::generate();
    lab.controller.set_back(guest, freeze, &first, host.id);
    forget_what_came_after(&lab, guest, disk.clone());
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was booted again");

    // A checkpoint there; lost again, it goes on where it was lost.
    let there = &lab.hosts[1];
    let (third, _) = taken(&lab, there, guest).await;
    assert!(third.epoch > second.epoch);
    let disk = lab.world.checkpointed.lock().unwrap()[&guest].clone();
    there.hypervisor.crash(guest).await;
    lab.eventually("it is lost", async || matches!(lab.controller.record(guest).owner, Owner::Lost(_))).await;
    let freeze = FreezeId::generate();
    lab.controller.set_back(guest, freeze, &third, there.id);
    forget_what_came_after(&lab, guest, disk);
    lab.done(guest, OperationKind::Thaw { freeze, to: there.id }).await;
    lab.check(guest).await;
    assert_eq!(lab.world.boots.load(Ordering::SeqCst), 1, "it was booted again");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_with_a_guest_ends_its_checkpoint_and_leaves_nothing() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let volume = lab.controller.volume(guest);
    // It moves while its memory is being copied: there is none of that instant.
    lab.world.save_ms.store(1500, Ordering::SeqCst);
    lab.controller.direct(lab.hosts[0].id, Directive::TakePoint { guest, volume, memory: true });
    lab.done(guest, lab.migrate(1)).await;
    lab.eventually("it has ended", async || !lab.controller.points(lab.hosts[0].id).is_empty()).await;
    let told = lab.controller.points(lab.hosts[0].id).remove(0);
    assert!(told.content.is_none() && told.problem.is_some(), "{told:?}");
    lab.check(guest).await;

    // The agent dies meanwhile, and comes back: the next one is whole, and the file of the one before is gone.
    lab.controller.direct(lab.hosts[1].id, Directive::TakePoint { guest, volume, memory: true });
    tokio::time::sleep(Duration::from_millis(300)).await;
    lab.hosts[1].kill_agent().await;
    std::fs::write(lab.hosts[1].checkpoint_file(guest), b"half").unwrap();
    lab.hosts[1].start_agent();
    lab.eventually("what was left is removed", async || !lab.hosts[1].checkpoint_file(guest).exists()).await;
    lab.world.save_ms.store(0, Ordering::SeqCst);
    lab.check(guest).await;
    let (point, _) = taken(&lab, &lab.hosts[1], guest).await;
    assert!(point.epoch > supercloud_ids::Epoch(1));
    // And of the disk alone as ever.
    let before = lab.controller.points(lab.hosts[1].id).len();
    lab.controller.direct(lab.hosts[1].id, Directive::TakePoint { guest, volume, memory: false });
    lab.eventually("a point has ended", async || lab.controller.points(lab.hosts[1].id).len() > before).await;
    let plain = lab.controller.points(lab.hosts[1].id).remove(before).content.expect("it was taken");
    assert!(plain.memory.is_none() && plain.version >= point.version);
    lab.check(guest).await;
}
