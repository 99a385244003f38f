//! What a guest asks for by its host.

use supercloud_api::{
    Code, GuestMigrate, GuestState, Operation, Problem,
    guest_call::{GuestCall, GuestStanding},
    ids::{Epoch, HostId, OperationId},
    link::Answer,
};

use super::{TestController, guest};
use crate::{
    metrics::Metrics,
    operations::GuestDoor as _,
    rest::{Api, GuestCalls},
    state::OperationRecord,
};

fn door(test: &TestController) -> GuestCalls {
    GuestCalls::new(Api::new(test.parts(), &Metrics::default()))
}

fn to(place: &str, key: &str) -> GuestCall {
    let wanted: GuestMigrate = serde_json::from_value(serde_json::json!({ "to": place })).unwrap();
    GuestCall::Migrate { wanted: Box::new(wanted), idempotency_key: key.into() }
}

fn operation(answer: Result<Answer, Problem>) -> Operation {
    match answer.unwrap() {
        Answer::GuestOperation { operation } => *operation,
        other => panic!("{other:?}"),
    }
}

fn standing(answer: Result<Answer, Problem>) -> GuestStanding {
    match answer.unwrap() {
        Answer::GuestStanding { standing } => *standing,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_guest_moves_itself_there_and_back_and_a_repeated_wish_begins_nothing() {
    let test = TestController::start().await;
    let world = test.world().await;
    for name in ["web", "peer"] {
        world.client.create_guest(&guest(name)).await.unwrap();
    }
    let (web, peer) = (world.client.guest("web").await.unwrap().id, world.client.guest("peer").await.unwrap().id);
    let [east, west] = [world.hosts[0].id, world.hosts[1].id];
    test.run_on(web, &world.hosts[0]).await;
    let here = world.client.guest("web").await.unwrap().epoch;
    let door = door(&test);
    let at = |host, epoch, call| door.call(host, web, epoch, call);

    let seen = standing(at(east, here, GuestCall::Look).await);
    assert_eq!((seen.name.as_str(), seen.state, seen.epoch, seen.operation), ("web", GuestState::Running, here, None));
    assert_eq!((seen.host.unwrap().as_str(), seen.cloud.unwrap().as_str()), ("east-1", "east"));

    // Only its host at its epoch speaks for it.
    for (host, epoch) in [(west, here), (east, here.next()), (east, Epoch(0)), (HostId::generate(), here)] {
        for call in [GuestCall::Look, to("west", "k"), GuestCall::Operation { operation: OperationId::generate() }] {
            assert_eq!(at(host, epoch, call).await.unwrap_err().code, Code::Forbidden, "{host} at {epoch:?}");
        }
        assert!(door.call(host, peer, epoch, to("west", "k")).await.is_err());
    }

    let there = operation(at(east, here, to("west", "go")).await);
    assert_eq!(there.actor, format!("guest:{web}"));
    assert_eq!((there.source, there.destination), (Some(east), Some(west)));
    assert_eq!(operation(at(east, here, to("west", "go")).await).id, there.id);
    assert_eq!(at(east, here, to("east", "go")).await.unwrap_err().code, Code::IdempotencyKeyReused);
    let busy = at(east, here, to("west", "other")).await.unwrap_err();
    assert_eq!((busy.code, busy.retryable), (Code::OperationInProgress, true));
    assert!(busy.request_id.is_some());
    assert_eq!(standing(at(east, here, GuestCall::Look).await).operation, Some(there.id));
    let look = |operation| GuestCall::Operation { operation };
    assert_eq!(operation(at(east, here, look(there.id)).await).id, there.id);
    let others = world.client.operations().await.unwrap();
    let other = others.iter().find(|other| other.guest == Some(peer)).unwrap().id;
    assert_eq!(at(east, here, look(other)).await.unwrap_err().code, Code::NotFound);

    // It has moved: the wish said again by the new host is still the same wish.
    test.run_on(web, &world.hosts[1]).await;
    let count = test.state().list::<OperationRecord>().await.unwrap().len();
    assert_eq!(at(east, here, GuestCall::Look).await.unwrap_err().code, Code::Forbidden);
    assert_eq!(operation(at(west, here.next(), to("west", "go")).await).id, there.id);
    assert_eq!(test.state().list::<OperationRecord>().await.unwrap().len(), count);
    assert_eq!(standing(at(west, here.next(), GuestCall::Look).await).cloud.unwrap().as_str(), "west");
    assert_eq!(operation(at(west, here.next(), look(there.id)).await).id, there.id, "its own past it sees");
    let back = operation(at(west, here.next(), to("east", "back")).await);
    assert_eq!((back.source, back.destination), (Some(west), Some(east)));
    test.stop().await;
}

#[tokio::test]
async fn the_rules_are_those_of_the_guests_own_token() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let web = world.client.guest("web").await.unwrap().id;
    test.run_on(web, &world.hosts[0]).await;
    let epoch = world.client.guest("web").await.unwrap().epoch;
    let door = door(&test);
    let at = |call| door.call(world.hosts[0].id, web, epoch, call);
    for (place, code) in [("east", Code::WrongState), ("mars", Code::NotFound)] {
        assert_eq!(at(to(place, place)).await.unwrap_err().code, code, "{place}");
    }
    for key in [String::new(), "k".repeat(257)] {
        assert_eq!(at(to("west", &key)).await.unwrap_err().code, Code::BadRequest);
    }
    let wanted: GuestMigrate = serde_json::from_value(serde_json::json!({"to": "west", "deadline_ms": 1})).unwrap();
    let call = GuestCall::Migrate { wanted: Box::new(wanted), idempotency_key: "d".into() };
    assert!(at(call).await.unwrap_err().detail.contains("deadline_ms"));
    // The same wish twice at once is one.
    let (one, two) = tokio::join!(at(to("west", "twice")), at(to("west", "twice")));
    let one = operation(one);
    assert_eq!(one.id, operation(two).id);
    // What it asked for itself its token may cancel.
    let own = test.client(&test.guest_token(world.project, web).await);
    assert!(own.cancel_operation(one.id).await.unwrap().is_cancel_requested);
    test.stop().await;
}
