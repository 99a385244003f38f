//! A volume is checked: what is missing or damaged in its cloud's store is mended from where else it can be had.

use std::path::PathBuf;

use supercloud_api::link::Directive;
use supercloud_ids::{GuestId, VolumeId};

use crate::{lab::Lab, sweeps::aged};

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_of_a_guests_base_is_found_and_mended() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let host = &lab.hosts[0];
    lab.eventually("its base is here", async || {
        lab.controller.report(host.id, guest).is_some_and(|told| told.base_missing_bytes == Some(0))
    })
    .await;
    let volume = lab.controller.volume(guest);
    let check = async |guest: GuestId, volume: VolumeId, nth: usize| {
        lab.controller.direct(host.id, Directive::CheckVolume { guest, volume, bytes_per_s: 1 << 30 });
        lab.eventually("a check has ended", async || lab.controller.checked(host.id).len() == nth).await;
        let told = lab.controller.checked(host.id).remove(nth - 1);
        assert_eq!((told.guest, told.volume), (guest, volume));
        (told.found, told.problem)
    };
    let (sound, problem) = check(guest, volume, 1).await;
    assert!(problem.is_none() && sound.chunks > 2 && sound.sound_bytes > 0, "{sound:?} {problem:?}");
    assert_eq!(sound.fetched + sound.repaired + sound.missing + sound.damaged, 0);

    // Data, not a list: those are the largest.
    let mut files: Vec<(u64, PathBuf)> =
        aged(&host.config.store_dir).into_iter().map(|path| (path.metadata().unwrap().len(), path)).collect();
    files.sort();
    let (gone, bad) = (files.pop().unwrap().1, files.pop().unwrap().1);
    let whole = std::fs::read(&bad).unwrap();
    let mut spoiled = whole.clone();
    *spoiled.last_mut().unwrap() ^= 1;
    std::fs::write(&bad, spoiled).unwrap();
    std::fs::remove_file(&gone).unwrap();
    let (mended, problem) = check(guest, volume, 2).await;
    assert_eq!((mended.fetched, mended.repaired, mended.missing + mended.damaged), (1, 1, 0), "{mended:?} {problem:?}");
    assert!(gone.exists() && std::fs::read(&bad).unwrap() == whole);
    assert_eq!(check(guest, volume, 3).await, (sound, None));

    let (_, problem) = check(GuestId::generate(), volume, 4).await;
    assert!(problem.is_some_and(|problem| problem.contains("nothing is here")));
    lab.check(guest).await;
    lab.violations();
}
