//! Sweeps of stores and checks of volumes, as they are asked for.

use supercloud_api::{Code, Role, Volume, link::HistoryMark};

use super::{TestController, guest, problem};
use crate::state::{AcceptedMark, Record as _};

#[tokio::test]
async fn a_check_is_asked_of_the_host_that_holds_the_volume() {
    let test = TestController::start().await;
    let world = test.world().await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let volume = world.client.volumes().await.unwrap().remove(0);
    let check = async |bytes: u64| problem(world.client.check_volume(volume.name.as_str(), bytes).await);
    assert_eq!(check(1).await.code, Code::WrongState, "it is nowhere");
    let away = world.hosts[1].id;
    test.parts().hosts.gone(away);
    for host in [away, world.hosts[0].id] {
        test.edit::<Volume>(&volume.id, |volume| volume.host = Some(host)).await;
        assert_eq!(check(1).await.code, Code::WrongState, "it is away, or of a version that checks nothing");
    }
    test.parts().checks.note_capable(world.hosts[0].id, true);
    assert_eq!(check(0).await.code, Code::BadRequest);
    let shown = world.client.check_volume(volume.name.as_str(), 1_000_000).await.unwrap();
    assert_eq!(shown.id, volume.id);
    let viewer = test.client(&test.token("p", Role::Viewer).await.secret);
    assert_eq!(problem(viewer.check_volume(volume.name.as_str(), 1).await).code, Code::Forbidden);
    test.stop().await;
}

#[tokio::test]
async fn an_operator_may_say_that_what_hosts_were_told_before_does_not_count() {
    let test = TestController::start().await;
    let admin = test.admin_client();
    let told = |seq: u64| HistoryMark { seq, hash: format!("{seq:064x}") };
    test.parts().sweeps.note_foreign([told(7), told(9)].into_iter());
    admin.sweep_store("controller", false).await.unwrap();
    let id = |seq: u64| AcceptedMark { seq, hash: told(seq).hash, accepted_at_ms: 0 }.id();
    assert!(test.state().read::<AcceptedMark>(&id(7)).await.unwrap().is_none());
    admin.sweep_store("controller", true).await.unwrap();
    for seq in [7, 9] {
        assert!(test.state().read::<AcceptedMark>(&id(seq)).await.unwrap().is_some());
    }
    let accepted = async || {
        let events = admin.events_after(0).await.unwrap();
        events.items.iter().filter(|event| event.kind == "store.records_accepted").count()
    };
    assert_eq!(accepted().await, 1);
    // There is nothing more to accept.
    admin.sweep_store("controller", true).await.unwrap();
    assert_eq!(accepted().await, 1);
    test.stop().await;
}
