//! A volume is checked: what is missing or damaged in its cloud's store is mended from where else it can be had.

use supercloud_api::{handover::OperationKind, ids::FreezeId, link::Directive};
use supercloud_ids::{GuestId, VolumeId};

use supercloud_storage::{backend::ObjectKey, manifest::Manifest};

use crate::lab::Lab;

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_chunk_of_a_guests_base_is_found_and_mended() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    // What it stands on from then on is in both clouds.
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    let host = &lab.hosts[1];
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

    let manifest =
        Manifest::load(&lab.controller.reader(guest, &host.config.store_dir), lab.controller.base(guest)).await;
    let names: Vec<_> = manifest.unwrap().chunks().map(|(_, name)| name).collect();
    let project = lab.controller.project(guest);
    let path = |name| host.config.store_dir.join(ObjectKey::chunk(project, name).as_str());
    let (gone, bad) = (path(&names[0]), path(names.iter().find(|name| **name != names[0]).unwrap()));
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
