//! Checkpoints as they are asked for, and guests that are set back to them.

use supercloud_api::{
    Code, Freeze, GuestState, GuestThaw, PointMemory, Role, Volume, VolumeHistory,
    handover::Owner,
    history::{Taken, verify},
    ids::Epoch,
    unix_ms,
};

use super::{TestController, guest, problem};
use crate::state::GuestRecord;

fn checkpoint(point: Option<u64>) -> GuestThaw {
    GuestThaw { checkpoint: true, point, ..GuestThaw::default() }
}

#[tokio::test]
async fn a_guest_that_may_run_is_not_set_back_and_another_one_is_once() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    let id = client.guest("web").await.unwrap().id;
    let volume = client.volume("web").await.unwrap();

    // One that does not run has none taken, and one that runs only where its host knows how.
    let refused = problem(client.checkpoint_guest("web").await);
    assert!(refused.code == Code::WrongState && refused.detail.contains("no host holds"), "{refused:?}");
    test.run_on(id, &world.hosts[0]).await;
    test.edit::<Volume>(&volume.id, |volume| (volume.host, volume.epoch) = (Some(world.hosts[0].id), Epoch(1))).await;
    test.parts().points.note_capable(world.hosts[0].id, true);
    let refused = problem(client.checkpoint_guest("web").await);
    assert!(refused.detail.contains("takes no checkpoints"), "{refused:?}");
    assert_eq!(problem(client.volume_history("web").await).code, Code::WrongState, "no history is begun in vain");
    test.parts().hosts.note_checkpoints(world.hosts[0].id, true);
    let viewer = test.client(&test.token("p", Role::Viewer).await.secret);
    assert_eq!(problem(viewer.checkpoint_guest("web").await).code, Code::Forbidden);
    let begun = client.checkpoint_guest("web").await.unwrap();
    assert_eq!((begun.policy.memory, begun.next, &client.volume_history("web").await.unwrap()), (None, 1, &begun));

    test.parts().hosts.note_checkpoints(world.hosts[0].id, false);

    // As the engine records them: one of the disk, one with memory, one of the disk.
    let cloud = world.hosts[0].cloud;
    test.edit::<VolumeHistory>(&volume.id, |history| {
        for version in 1..=3u64 {
            let memory = PointMemory {
                root: format!("{:064x}", version + 10),
                bytes: 7,
                format: "an-image/1".into(),
                is_kept: true,
            };
            history.append(Taken {
                wall_ms: unix_ms() - 10_000 + version,
                epoch: Epoch(1),
                version,
                root: format!("{version:064x}"),
                cloud,
                stored_bytes: 0,
                memory: (version == 2).then_some(memory),
            });
        }
    })
    .await;
    let running = problem(client.thaw_guest("web", &checkpoint(None)).await);
    assert!(running.code == Code::WrongState && running.detail.contains("set back to a checkpoint"), "{running:?}");

    test.edit::<GuestRecord>(&id, |record| {
        let owner = supercloud_api::handover::note_host_lost(&record.owner, world.hosts[0].id).record.unwrap();
        record.set_owner(owner, None);
    })
    .await;
    let before = test.state().need::<GuestRecord>(&id).await.unwrap();
    assert_eq!(before.guest.state, GuestState::Lost);
    for (wanted, code, why) in [
        (GuestThaw { point: Some(2), ..GuestThaw::default() }, Code::BadRequest, "only with checkpoint"),
        (GuestThaw::default(), Code::WrongState, "that is lost cannot be thawed"),
        (checkpoint(Some(1)), Code::WrongState, "point 1 has no memory"),
        (checkpoint(Some(9)), Code::WrongState, "there is no point 9"),
        (
            GuestThaw { freeze: Some(supercloud_api::ids::FreezeId::generate()), ..checkpoint(None) },
            Code::BadRequest,
            "exclude",
        ),
        (checkpoint(None), Code::HostUnavailable, "no host thaws from checkpoints"),
    ] {
        let request = test.raw(reqwest::Method::POST, "/v1/guests/web/thaw", Some(&world.secret));
        let refused = super::problem_of(request.json(&wanted).send().await.unwrap()).await;
        assert!(refused.code == code && refused.detail.contains(why), "{wanted:?}: {refused:?}");
    }
    test.parts().hosts.note_checkpoints(world.hosts[1].id, true);
    let policy = test.client(&test.token("p", Role::Policy).await.secret);
    assert_eq!(problem(policy.thaw_guest("web", &checkpoint(None)).await).code, Code::Forbidden);
    let dry: supercloud_api::Operation =
        client.call(reqwest::Method::POST, "/v1/guests/web/thaw?dry_run=true", &checkpoint(None)).await.unwrap();
    assert_eq!(dry.destination, Some(world.hosts[1].id));
    assert_eq!(test.state().need::<GuestRecord>(&id).await.unwrap().value, before.value, "it was only tried");

    let operation = client.thaw_guest("web", &checkpoint(None)).await.unwrap();
    assert!(operation.reason.as_ref().is_some_and(|reason| reason.contains("point 2")), "{:?}", operation.reason);
    let after = test.state().need::<GuestRecord>(&id).await.unwrap().value;
    let freeze = after.guest.freeze.expect("frozen as of the point");
    assert_eq!((after.owner.owner, after.owner.epoch, after.guest.host), (Owner::Frozen(freeze), Epoch(1), None));
    assert_eq!(after.guest.operation, Some(operation.id));
    let made = test.state().need::<Freeze>(&freeze).await.unwrap().value;
    assert_eq!((made.memory_root, made.memory_bytes, made.point), (format!("{:064x}", 12), 7, Some(2)));
    let volume = client.volume("web").await.unwrap();
    assert_eq!((volume.base, volume.base_cloud, volume.host), (Some(format!("{:064x}", 2)), Some(cloud), None));
    let history = client.volume_history("web").await.unwrap();
    verify(&history).unwrap();
    assert_eq!((history.points.len(), history.seen_base), (3, Some(format!("{:064x}", 2))));
    assert_eq!(problem(client.thaw_guest("web", &checkpoint(None)).await).code, Code::OperationInProgress);
    let events = test.admin_client().events_after(0).await.unwrap();
    let told = events.items.iter().find(|event| event.kind == "guest.set_back").unwrap();
    assert_eq!((told.data["point"].as_u64(), told.guest), (Some(2), Some(id)));
    test.stop().await;
}
