//! Points of a volume's history: the content of a running guest's disk, whole in its cloud's store.

use supercloud_api::{
    handover::OperationKind,
    ids::FreezeId,
    link::{Directive, PointTaken},
};
use supercloud_ids::{GuestId, VolumeId};
use supercloud_storage::{
    key::ContentRoot,
    manifest::{self, Manifest},
};

use crate::lab::{Lab, TestHost};

async fn take(lab: &Lab, host: &TestHost, guest: GuestId, volume: VolumeId, nth: usize) -> PointTaken {
    lab.controller.direct(host.id, Directive::TakePoint { guest, volume, memory: false });
    lab.eventually("a point has ended", async || lab.controller.points(host.id).len() == nth).await;
    let told = lab.controller.points(host.id).remove(nth - 1);
    assert_eq!((told.guest, told.volume), (guest, volume));
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_of_a_running_guest_is_whole_in_its_clouds_store() {
    let lab = Lab::begin(&[true, true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.check(guest).await;
    let (host, volume) = (&lab.hosts[0], lab.controller.volume(guest));
    let first = take(&lab, host, guest, volume, 1).await;
    let content = first.content.expect("it was taken");
    assert!(content.sealed_blocks > 0 && content.sealed_blocks <= content.total_blocks, "{content:?}");
    // By this host's folder alone: what the image is made of, too.
    let reader = lab.controller.reader(guest, &host.config.store_dir);
    let root: ContentRoot = content.root.parse().unwrap();
    let verified = manifest::verify(&reader, root, true).await.unwrap();
    assert!(verified.chunks > content.total_blocks / 2, "{verified:?}");
    assert_eq!(Manifest::load(&reader, root).await.unwrap().chunks().count() as u64, verified.chunks);

    // What is known from the first is not read for the second, and the first stays as it was.
    lab.check(guest).await;
    let second = take(&lab, host, guest, volume, 2).await.content.expect("it was taken");
    assert!(second.version >= content.version && second.epoch == content.epoch, "{second:?}");
    assert!(second.sealed_blocks <= second.total_blocks);
    manifest::verify(&reader, root, true).await.unwrap();

    let stranger = take(&lab, host, GuestId::generate(), volume, 3).await;
    assert!(stranger.content.is_none() && stranger.problem.is_some_and(|why| why.contains("does not run here")));

    // A freeze right after the order to take one: its content is that of the freeze, not of the point.
    lab.controller.direct(host.id, Directive::TakePoint { guest, volume, memory: false });
    let freeze = FreezeId::generate();
    lab.done(guest, OperationKind::Freeze { freeze }).await;
    lab.done(guest, OperationKind::Thaw { freeze, to: lab.hosts[1].id }).await;
    lab.check(guest).await;
    let gone = take(&lab, host, guest, volume, 5).await;
    assert!(gone.content.is_none(), "{gone:?}");
    let there = take(&lab, &lab.hosts[1], guest, volume, 1).await;
    assert!(there.content.is_some_and(|there| there.epoch > content.epoch), "{:?}", there.problem);
    lab.check(guest).await;
    lab.violations();
}
