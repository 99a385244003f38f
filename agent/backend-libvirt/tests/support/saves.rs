//! Saves of a guest's memory that are held in the middle: libvirt writes the file through a helper process, which is
//! stopped as soon as it is there.

use std::{path::Path, time::Duration};

use supercloud_blanket::{
    Backend, BackendError,
    backend::{PauseReason, RunState, StopReason},
    migrate::Verdict,
};

use crate::{
    ARRIVED, World,
    agent::Agent,
    is_guest_event,
    support::{pause, processes},
    wait_for,
};

const SAVING: RunState = RunState::Paused(PauseReason::Saving);

/// The helper that writes a file, stopped.
struct Held(i32);

impl Held {
    async fn catch(file: &Path) -> Self {
        let file = file.to_string_lossy().into_owned();
        let caught = tokio::task::spawn_blocking(move || {
            for _ in 0..20_000 {
                let is_it = |line: &str| line.contains("iohelper") && line.contains(&file);
                if let Some((pid, _)) = processes().into_iter().find(|(_, line)| is_it(line)) {
                    // SAFETY: a process that writes this test's own file.
                    unsafe { libc::kill(pid, libc::SIGSTOP) };
                    return pid;
                }
                pause(1);
            }
            panic!("nobody writes {file}");
        });
        Self(caught.await.unwrap())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: as above; it cannot have ended, so the id is still its own.
        unsafe { libc::kill(self.0, libc::SIGCONT) };
    }
}

/// Does `work` while the save is held for a moment more.
async fn while_held<T>(held: Held, work: impl Future<Output = T>) -> T {
    let (done, ()) = tokio::join!(work, async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(held);
    });
    done
}

pub async fn a_cancelled_save_lets_the_guest_run_on(world: &mut World) {
    println!("a save, cancelled in the middle");
    let file = world.lab.dir.join("cancelled");
    let transfer = world.a.freeze(world.guest, file.clone()).unwrap();
    let done = tokio::spawn(transfer.done);
    let held = Held::catch(&file).await;
    assert_eq!(world.state(&world.a).await, Some(SAVING));
    assert_eq!(world.a.frozen_in(file.clone()).await.unwrap(), None);
    while_held(held, world.a.live_migration().unwrap().cancel(world.guest)).await.unwrap();
    let done = done.await.unwrap();
    assert!(matches!(done, Err(BackendError::Cancelled { .. })), "{done:?}");
    assert_eq!(world.state(&world.a).await, Some(RunState::Running));
    assert_eq!(world.a.frozen_in(file).await.unwrap(), None);
    world.must_tick(&world.lab.a).await;
}

pub async fn a_save_outlives_its_agent(world: &mut World) {
    for keep in [true, false] {
        println!(
            "kill -9 of the agent in the middle of a save; it is {}",
            if keep { "given up" } else { "left alone" }
        );
        let file = world.lab.dir.join(if keep { "given-up" } else { "left-alone" });
        let launch = world.lab.launch(&world.lab.a, world.guest, world.epoch);
        let mut events = world.a.events();
        let mut agent = Agent::new(&world.lab, &launch, true);
        agent.tell(&format!("freeze {}", file.display()));
        let held = Held::catch(&file).await;
        drop(agent);
        pause(300);
        assert_eq!(world.state(&world.a).await, Some(SAVING), "libvirt goes on");
        assert_eq!(world.a.frozen_in(file.clone()).await.unwrap(), None);
        if keep {
            let kept = while_held(held, world.a.live_migration().unwrap().confirm(world.guest, Verdict::Keep)).await;
            kept.unwrap();
            assert_eq!(world.a.frozen_in(file).await.unwrap(), None);
        } else {
            drop(held);
            let frozen = supercloud_blanket::backend::GuestEvent::Stopped(StopReason::Frozen);
            wait_for(&mut events, "frozen", |event| is_guest_event(event, &frozen)).await;
            assert_eq!(world.state(&world.a).await, None);
            let found = world.a.frozen_in(file.clone()).await.unwrap().expect("the file is whole");
            let info = world.a.thaw(launch, file, found.format).await.unwrap();
            assert_eq!(info.state, ARRIVED);
            world.a.resume(world.guest, world.epoch).await.unwrap();
        }
        assert_eq!(world.state(&world.a).await, Some(RunState::Running));
        world.must_tick(&world.lab.a).await;
    }
}
