//! Checkpoints by real processes: a guest goes on from them at any host, and nothing waits for one.

use std::{os::unix::fs::FileExt as _, path::Path};

use supercloud_blanket::{
    checkpoint::{CheckpointRun, Checkpointed},
    vmm::travel::image::BLOCK_BYTES,
};

use super::*;

impl Place {
    fn begin_checkpoint(&self, guest: GuestId, file: &str) -> CheckpointRun {
        // As volumes do when a series of cuts is begun.
        self.disk.lock().unwrap().cuts.clear();
        self.host.back_end.checkpointing().unwrap().checkpoint(guest, self.host.path(file)).unwrap()
    }

    /// One, and the disk of its instant.
    async fn checkpoint(&self, guest: GuestId, file: &str) -> (Checkpointed, Vec<u8>) {
        let taken = timeout(PATIENCE, self.begin_checkpoint(guest, file).done).await.unwrap().unwrap();
        let disk = self.disk.lock().unwrap().cuts[&taken.cut].clone();
        assert_eq!(std::fs::metadata(self.host.path(file)).unwrap().len(), taken.bytes);
        (taken, disk)
    }

    async fn started(&self) -> GuestId {
        let guest = GuestId::generate();
        self.host.back_end.start(self.launch(guest, 1).await).await.unwrap();
        self.counts_on().await;
        guest
    }

    /// The guest goes on from the file, with this disk.
    async fn goes_on_from(&self, guest: GuestId, epoch: u64, file: &Path, format: &str, disk: Vec<u8>) {
        let on_disk = number(&disk);
        self.disk.lock().unwrap().bytes = disk;
        let before = self.disk.lock().unwrap().written.len();
        let launch = self.launch(guest, epoch).await;
        let info = self.host.back_end.thaw(launch, file.to_owned(), format.to_owned()).await.unwrap();
        assert_eq!((info.state, info.epoch), (RunState::Paused(PauseReason::Arrived), Epoch(epoch)));
        self.host.back_end.resume(guest, Epoch(epoch)).await.unwrap();
        until(|| self.disk.lock().unwrap().written.len() > before + 2, "going on").await;
        let written = self.disk.lock().unwrap().written[before..].to_vec();
        assert!(written.windows(2).all(|pair| pair[1] == pair[0] + 1), "{written:?}");
        // What its memory has is what its disk has, or the next.
        assert!((on_disk..=on_disk + 2).contains(&written[0]), "{on_disk}: {written:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_goes_on_from_any_checkpoint_at_any_host_and_the_next_one_is_mostly_the_same() {
    if !runs_guests("a_guest_goes_on_from_any_checkpoint_at_any_host_and_the_next_one_is_mostly_the_same") {
        return;
    }
    let (source, other) = (Place::new().await, Place::new().await);
    let guest = source.started().await;
    let mut taken = Vec::new();
    for file in ["first", "second", "third"] {
        let (checkpoint, disk) = source.checkpoint(guest, file).await;
        println!("{file}: the guest stood still for {:?}", checkpoint.stood_still);
        assert_eq!(source.host.state(guest).await, Some(RunState::Running));
        source.counts_on().await;
        taken.push((source.host.path(file), checkpoint, disk));
    }
    let blocks = |path: &Path| {
        let (file, mut blocks) = (std::fs::File::open(path).unwrap(), Vec::new());
        let length = file.metadata().unwrap().len();
        for at in (0..length).step_by(usize::try_from(BLOCK_BYTES).unwrap()) {
            let mut block = vec![0; usize::try_from(BLOCK_BYTES.min(length - at)).unwrap()];
            file.read_exact_at(&mut block, at).unwrap();
            blocks.push(block);
        }
        blocks
    };
    let (first, second) = (blocks(&taken[0].0), blocks(&taken[1].0));
    let filled = first.iter().filter(|block| block.iter().any(|byte| *byte != 0)).count();
    let differ = first.iter().zip(&second).filter(|(a, b)| a != b).count();
    println!("{filled} blocks of {} have something, {differ} differ in the next one", first.len());
    assert!(filled < first.len() / 2 && differ < 20, "{filled}, {differ}");
    // Its host is lost. Wherever it goes on, it is from whichever is asked for, and as often as that is.
    source.host.back_end.stop(guest, StopMode::Kill).await.unwrap();
    for (epoch, (place, which)) in (2..).zip([(&other, 0), (&source, 2), (&other, 0), (&other, 1)]) {
        let (file, checkpoint, disk) = &taken[which];
        place.goes_on_from(guest, epoch, file, &checkpoint.format, disk.clone()).await;
        place.host.back_end.stop(guest, StopMode::Kill).await.unwrap();
    }
    // What is no image is refused, by name, and nothing is left of it.
    let broken = other.host.path("broken");
    let whole = std::fs::read(&taken[0].0).unwrap();
    for bytes in [&whole[..whole.len() - 1], &whole[..100], b"", b"supercloud-image{}"] {
        std::fs::write(&broken, bytes).unwrap();
        let launch = other.launch(guest, 9).await;
        let refused = other.host.back_end.thaw(launch, broken.clone(), taken[0].1.format.clone()).await.unwrap_err();
        assert!(matches!(refused, BackendError::File { .. }), "{refused:?}");
        assert_eq!(other.host.state(guest).await, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_is_in_nobodys_way() {
    if !runs_guests("a_checkpoint_is_in_nobodys_way") {
        return;
    }
    let mut place = Place::new().await;
    let guest = place.started().await;
    // A disk that refuses: it is tried again for some seconds, and the guest runs on.
    place.disk.lock().unwrap().refuses = true;
    let begin = |place: &Place, file: &str| tokio::spawn(place.begin_checkpoint(guest, file).done);
    let tried = async |place: &Place| {
        let before = place.disk.lock().unwrap().refused;
        until(|| place.disk.lock().unwrap().refused > before + 1, "tries").await;
    };
    let going = begin(&place, "one");
    tried(&place).await;
    place.counts_on().await;
    // One at a time, and never over a file that is there.
    let second = place.begin_checkpoint(guest, "two").done.await;
    assert!(matches!(&second, Err(BackendError::WrongState { is, .. }) if is.contains("checkpointed")), "{second:?}");
    // A freeze ends it.
    let frozen = place.host.path("frozen");
    let transfer = place.host.back_end.freeze(guest, frozen.clone()).unwrap();
    let format = timeout(PATIENCE, transfer.done).await.unwrap().unwrap().format;
    let ended = timeout(PATIENCE, going).await.unwrap().unwrap();
    assert!(ended.is_err(), "{ended:?}");
    assert_eq!(place.host.state(guest).await, None);
    let disk = place.disk.lock().unwrap().bytes.clone();
    place.goes_on_from(guest, 2, &frozen, &format, disk).await;

    // Dropped half way, it is given up, and another one is begun; a mirror begins in the place of that, and then there is no checkpoint.
    for file in ["three", "three-again"] {
        let going = begin(&place, file);
        tried(&place).await;
        assert!(!going.is_finished(), "{file}");
        going.abort();
        let _ = going.await;
    }
    let moves = place.host.back_end.live_migration().unwrap();
    let cookie = moves.begin(guest).await.unwrap();
    let (stream, nowhere) = (place.host.path("out.sock"), place.host.path("nowhere.sock"));
    let (_listener, theirs) = (UnixListener::bind(&nowhere).unwrap(), UnixListener::bind(&stream).unwrap());
    let carrier = tokio::spawn(carry(theirs, nowhere));
    let options = MirrorOptions { interval: Duration::from_millis(20), is_strict: false, bandwidth_bytes_per_s: None };
    let run = place.host.back_end.mirroring().unwrap().mirror(guest, cookie, stream, options).unwrap();
    let (progress, mirror) = (run.progress, tokio::spawn(run.done));
    until(|| progress.borrow().sent_bytes > 0, "a mirror that sends").await;
    let refused = place.begin_checkpoint(guest, "four").done.await;
    assert!(matches!(&refused, Err(BackendError::WrongState { is, .. }) if is.contains("mirrored")), "{refused:?}");
    place.host.back_end.mirroring().unwrap().end_mirror(guest).await.unwrap();
    let _ = timeout(PATIENCE, mirror).await.unwrap().unwrap();
    carrier.abort();

    // Its agent dies: the guest runs on, and the next agent takes one.
    let going = begin(&place, "five");
    tried(&place).await;
    going.abort();
    let _ = going.await;
    place.host.restart().await;
    place.counts_on().await;
    place.disk.lock().unwrap().refuses = false;
    let again = async {
        loop {
            // That the agent is gone is heard of in a moment.
            let _ = std::fs::remove_file(place.host.path("six"));
            if let Ok(taken) = place.begin_checkpoint(guest, "six").done.await {
                return taken;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let taken = timeout(PATIENCE, again).await.unwrap();
    let disk = place.disk.lock().unwrap().cuts[&taken.cut].clone();
    let there = place.begin_checkpoint(guest, "six").done.await;
    assert!(matches!(there, Err(BackendError::File { .. })), "{there:?}");
    place.counts_on().await;
    // Switched off meanwhile: there is none.
    place.disk.lock().unwrap().refuses = true;
    let going = begin(&place, "seven");
    tried(&place).await;
    place.host.back_end.stop(guest, StopMode::Kill).await.unwrap();
    let ended = timeout(PATIENCE, going).await.unwrap().unwrap();
    assert!(matches!(ended, Err(BackendError::NoSuchGuest { .. } | BackendError::Failed { .. })), "{ended:?}");
    place.disk.lock().unwrap().refuses = false;
    place.goes_on_from(guest, 3, &place.host.path("six"), &taken.format, disk).await;
}
