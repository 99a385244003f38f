//! Histories of volumes as they are asked for, and disks as of past instants.

use supercloud_api::{
    Code, DiskFrom, GuestCreate, HistoryBand, HistoryPolicy, Operation, Role, Volume, VolumeHistory,
    client::ClientError,
    history::{Taken, verify},
    ids::{CloudId, Epoch},
    unix_ms,
};

use super::{TestController, guest, problem};

fn policy(every_s: Option<u64>, keep: &[(u64, u64)]) -> HistoryPolicy {
    HistoryPolicy {
        every_s,
        keep: keep.iter().map(|(for_s, every_s)| HistoryBand { for_s: *for_s, every_s: *every_s }).collect(),
        memory: None,
    }
}

fn clone(name: &str, as_of_ms: Option<u64>, point: Option<u64>) -> GuestCreate {
    GuestCreate { disk_from: Some(DiskFrom { volume: "web".into(), as_of_ms, point }), ..guest(name) }
}

#[tokio::test]
async fn a_volume_is_cloned_as_of_an_instant() {
    let test = TestController::start().await;
    let world = test.world().await;
    let client = &world.client;
    client.create_guest(&guest("web")).await.unwrap();
    let volume = client.volume("web").await.unwrap();

    // None until somebody wants one, within ranges.
    assert_eq!(problem(client.volume_history("web").await).code, Code::WrongState);
    assert_eq!(problem(client.create_guest(&clone("then", Some(1), None)).await).code, Code::WrongState);
    for wrong in [policy(Some(1), &[(3600, 600)]), policy(None, &[]), policy(None, &[(86_400, 60)])] {
        assert_eq!(problem(client.set_volume_history("web", &wrong).await).code, Code::BadRequest);
    }
    let wanted = policy(Some(900), &[(3600, 600), (86_400, 3600)]);
    let dry: Result<VolumeHistory, ClientError> =
        client.call(reqwest::Method::PUT, "/v1/volumes/web/history?dry_run=true", &wanted).await;
    assert_eq!(dry.unwrap().policy, wanted);
    assert_eq!(problem(client.volume_history("web").await).code, Code::WrongState, "it was only tried");
    let viewer = test.client(&test.token("p", Role::Viewer).await.secret);
    assert_eq!(problem(viewer.set_volume_history("web", &wanted).await).code, Code::Forbidden);
    let begun = client.set_volume_history("web", &wanted).await.unwrap();
    assert_eq!((begun.volume, begun.next, begun.points.len()), (volume.id, 1, 0));
    assert_eq!(viewer.volume_history("web").await.unwrap(), begun);
    let refused = problem(client.take_volume_point("web").await);
    assert!(refused.code == Code::WrongState && refused.detail.contains("no host holds"), "{refused:?}");
    assert!(problem(client.volume_as_of("web", 1).await).detail.contains("no point yet"));

    // Points, as the engine records them.
    let (cloud, now_ms) = (CloudId::generate(), unix_ms());
    let at = [now_ms - 7_200_000, now_ms - 3_000_000, now_ms - 1_000_000];
    test.edit::<VolumeHistory>(&volume.id, |history| {
        for (version, at_ms) in at.iter().enumerate() {
            history.append(Taken {
                wall_ms: *at_ms,
                epoch: Epoch(1),
                version: version as u64,
                root: format!("{version:064x}"),
                cloud,
                stored_bytes: 0,
                memory: None,
            });
        }
    })
    .await;
    verify(&client.volume_history("web").await.unwrap()).unwrap();
    let meant = client.volume_as_of("web", at[2] - 1).await.unwrap();
    assert_eq!((meant.point.number, meant.older_ms), (2, at[2] - 1 - at[1]));
    let early = problem(client.volume_as_of("web", at[0] - 1).await);
    assert!(early.code == Code::WrongState && early.detail.contains("the oldest point is 1"), "{early:?}");
    assert_eq!(problem(client.volume_as_of("web", now_ms + 3_600_000).await).code, Code::BadRequest);

    // Only tried, then made: over the point's content, in its cloud; the image stays what its kernel comes from.
    let dry: Operation = client
        .call(reqwest::Method::POST, "/v1/guests?dry_run=true", &clone("then", Some(at[2] - 1), None))
        .await
        .unwrap();
    assert!(dry.reason.as_ref().is_some_and(|reason| reason.contains("point 2 of volume web")), "{:?}", dry.reason);
    assert!(client.guest("then").await.is_err());
    let made = client.create_guest(&clone("then", Some(at[2] - 1), None)).await.unwrap();
    assert_eq!(made.reason, dry.reason);
    let then = client.volume("then").await.unwrap();
    assert_eq!((then.base.as_deref(), then.base_cloud), (Some(format!("{:064x}", 1).as_str()), Some(cloud)));
    assert_eq!((then.size_bytes, then.image), (volume.size_bytes, volume.image));
    client.create_guest(&clone("last", None, Some(3))).await.unwrap();
    assert_eq!(client.volume("last").await.unwrap().base, Some(format!("{:064x}", 2)));
    let events = test.admin_client().events_after(0).await.unwrap();
    let told = events.items.iter().rev().find(|event| event.kind == "guest.created").unwrap();
    assert_eq!(told.data["disk_from"]["point"], 3);
    for (wrong, code) in [
        (clone("x", None, None), Code::BadRequest),
        (clone("x", Some(at[2]), Some(3)), Code::BadRequest),
        (clone("x", None, Some(4)), Code::WrongState),
        (clone("x", Some(now_ms + 3_600_000), None), Code::BadRequest),
    ] {
        assert_eq!(problem(client.create_guest(&wrong).await).code, code);
    }
    let (_, stranger) = test.project("other").await;
    assert_eq!(problem(test.client(&stranger).volume_history(&volume.id.to_string()).await).code, Code::NotFound);

    // Thinned by a coarser policy: refused by name. The clone does not need the point any more.
    let thinned = client.set_volume_history("web", &policy(None, &[(86_400, 86_400)])).await.unwrap();
    assert_eq!(thinned.points.iter().map(|point| point.number).collect::<Vec<_>>(), [1, 3]);
    verify(&thinned).unwrap();
    let gone = problem(client.create_guest(&clone("x", None, Some(2))).await);
    assert!(gone.code == Code::WrongState && gone.detail.contains("was thinned out"), "{gone:?}");
    client.end_volume_history("web").await.unwrap();
    assert_eq!(problem(client.volume_history("web").await).code, Code::WrongState);
    assert_eq!(problem(client.end_volume_history("web").await).code, Code::WrongState);
    assert_eq!(test.state().need::<Volume>(&then.id).await.unwrap().value, then);
    test.stop().await;
}
