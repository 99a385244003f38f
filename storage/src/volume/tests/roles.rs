//! Who may write, through restarts.

use std::time::Duration;

use rand::SeedableRng as _;
use supercloud_ids::Epoch;

use super::{World, read_all, until};
use crate::volume::{VolumeError, role::Role, sim::SimDisk};

#[tokio::test]
async fn the_role_survives_kills_and_power_cuts() {
    let world = World::new(true).await;
    let disk = SimDisk::new();
    let volume = world.active(disk.clone()).await;
    volume.write(0, vec![1; 512].into(), false).await.unwrap();
    let sealed = volume.seal(Epoch(1)).await.unwrap();
    let mut rng = rand::rngs::SmallRng::from_seed([1; 32]);
    for disk in [disk.after_kill(), disk.after_power_cut(&mut rng)] {
        let volume = world.open(disk, Role::Standby).await.unwrap();
        assert_eq!(volume.role(), Role::Sealed { epoch: Epoch(1) });
        assert_eq!(volume.seal(Epoch(1)).await.unwrap(), sealed, "the same map after a restart");
        assert!(matches!(volume.activate(Epoch(2)).await, Err(VolumeError::Role(_))));
        volume.unseal(Epoch(1)).await.unwrap();
        volume.write(512, vec![2; 512].into(), false).await.unwrap();
        assert_ne!(volume.seal(Epoch(1)).await.unwrap().root, sealed.root);
    }
}

/// Whoever asks for a seal may be gone before it is answered; the next one who asks gets the answer.
#[tokio::test]
async fn a_seal_that_was_given_up_anywhere_is_durable_when_it_is_asked_for_again() {
    let world = World::new(true).await;
    let mut rng = rand::rngs::SmallRng::from_seed([2; 32]);
    for polls in 0..60 {
        let disk = SimDisk::new();
        let volume = world.active(disk.clone()).await;
        volume.write(0, vec![1; 512].into(), false).await.unwrap();
        {
            let mut given_up = std::pin::pin!(volume.seal(Epoch(1)));
            for _ in 0..polls {
                tokio::select! {
                    biased;
                    _ = &mut given_up => break,
                    () = tokio::task::yield_now() => {}
                }
            }
        }
        let sealed = volume.seal(Epoch(1)).await.unwrap();
        let volume = world.open(disk.after_power_cut(&mut rng), Role::Standby).await.unwrap();
        assert_eq!(volume.role(), Role::Sealed { epoch: Epoch(1) }, "given up after {polls} polls");
        assert_eq!(volume.seal(Epoch(1)).await.unwrap(), sealed);
    }
}

#[tokio::test]
async fn a_sealed_volume_serves_no_guest_until_it_is_unsealed() {
    let world = World::new(true).await;
    let volume = world.active(SimDisk::new()).await;
    volume.seal(Epoch(1)).await.unwrap();
    let waiting = {
        let volume = volume.clone();
        tokio::spawn(async move { volume.write(0, vec![9; 512].into(), true).await })
    };
    let read = tokio::time::timeout(Duration::from_millis(50), volume.read(0, 512)).await;
    assert!(read.is_err(), "a sealed volume answered a read");
    assert!(!waiting.is_finished(), "a sealed volume took a write");
    volume.flush().await.unwrap();
    volume.unseal(Epoch(1)).await.unwrap();
    waiting.await.unwrap().unwrap();
    assert_eq!(read_all(&volume).await[..512], [9; 512]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_written_after_the_seal_is_answered() {
    let world = World::new(true).await;
    for _ in 0..20 {
        let volume = world.active(SimDisk::new()).await;
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..4u64 {
            let volume = volume.clone();
            writers.spawn(async move {
                for i in 0u64.. {
                    let at = (i * 7 + writer) % 700 * 512;
                    volume.write(at, vec![writer as u8 + 1; 512].into(), false).await.unwrap();
                }
            });
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        let sealed = volume.seal(Epoch(1)).await.unwrap();
        let again = volume.seal(Epoch(1)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(sealed, again);
        assert_eq!(sealed, volume.seal(Epoch(1)).await.unwrap());
        writers.shutdown().await;
    }
}

#[tokio::test]
async fn a_base_that_cannot_be_had_stalls_with_an_alarm_and_comes_back() {
    use crate::process::control::AlarmCode;
    let world = World::new(true).await;
    let volume = world.active(SimDisk::new()).await;
    world.store.is_down.store(true, std::sync::atomic::Ordering::SeqCst);
    let reading = {
        let volume = volume.clone();
        tokio::spawn(async move { read_all(&volume).await })
    };
    until("the alarm", || volume.alarm().is_some_and(|alarm| alarm.code == AlarmCode::BaseUnavailable)).await;
    assert!(!reading.is_finished());
    // What is not of the base goes on.
    volume.write(2 * 65536, vec![1; 512].into(), true).await.unwrap();
    world.store.is_down.store(false, std::sync::atomic::Ordering::SeqCst);
    let read = reading.await.unwrap();
    assert!(read[..65536] == world.content[..65536]);
    assert_eq!(volume.alarm(), None);
}

/// A version names one content: after a power cut, when a block may hold what was never flushed, it has a new one.
#[tokio::test]
async fn no_version_is_given_out_twice() {
    let world = World::new(true).await;
    let mut disk = SimDisk::new();
    let mut rng = rand::rngs::SmallRng::seed_from_u64(3);
    let mut highest = 0;
    for round in 0..6 {
        let volume = world.active(disk.clone()).await;
        let found = volume.map_page(0, 0).await.unwrap();
        if round > 0 {
            assert!(!found.entries.is_empty());
            assert!(found.entries.iter().all(|entry| entry.version > highest), "{found:?}");
        }
        volume.write(0, vec![1; 512].into(), true).await.unwrap();
        volume.write(0, vec![2; 512].into(), false).await.unwrap();
        volume.write(70_000, vec![2; 512].into(), false).await.unwrap();
        highest = volume.map_page(0, 0).await.unwrap().version;
        disk = disk.after_power_cut(&mut rng);
    }
}
