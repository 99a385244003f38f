//! The event stream.

use futures::StreamExt as _;
use supercloud_api::{Event, Role, client::Client};

use super::{TestController, guest};

async fn take(client: &Client, after: u64, count: usize) -> Vec<Event> {
    let mut stream = Box::pin(client.events(after).await.unwrap());
    let mut events = Vec::new();
    while events.len() < count {
        let next = tokio::time::timeout(std::time::Duration::from_secs(30), stream.next()).await;
        events.push(next.expect("an event in time").expect("the stream goes on").unwrap());
    }
    events
}

#[tokio::test]
async fn a_stream_tells_what_was_and_what_comes_and_goes_on_after_a_break() {
    let test = TestController::start().await;
    let admin = test.admin_client();
    test.cloud("a").await;
    let newest = test.state().head().await.unwrap().seq;
    let first = take(&admin, 0, usize::try_from(newest).unwrap()).await;
    assert_eq!(first.last().unwrap().seq, newest);
    let mut before: Option<&Event> = None;
    for event in &first {
        assert!(event.follows(before), "the chain holds at {}", event.seq);
        before = Some(event);
    }
    // What happens while nobody listens is told after the break, then what happens while one does.
    test.cloud("b").await;
    let (later, ()) = tokio::join!(take(&admin, newest, 2), async {
        test.cloud("c").await;
    });
    assert_eq!(later.iter().map(|event| event.seq).collect::<Vec<_>>(), [newest + 1, newest + 2]);
    assert!(later.iter().all(|event| event.kind == "cloud.created"));
    // A restart in between changes nothing.
    let test = TestController::start_in(test.stop().await).await;
    let again = take(&test.admin_client(), newest, 2).await;
    assert_eq!(again, later);
    test.stop().await;
}

#[tokio::test]
async fn a_stream_tells_only_of_ones_own_project() {
    let test = TestController::start().await;
    let world = test.world().await;
    let (_, stranger) = test.project("other").await;
    world.client.create_guest(&guest("web")).await.unwrap();
    let own = take(&world.client, 0, 3).await;
    assert!(own.iter().all(|event| event.project == Some(world.project)));
    let listed = test.client(&stranger).events_after(0).await.unwrap().items;
    assert!(listed.iter().all(|event| event.project != Some(world.project)) && !listed.is_empty());
    let viewer = test.client(&test.token("*", Role::Viewer).await.secret);
    let seen = viewer.events_after(0).await.unwrap().items;
    assert!(seen.iter().all(|event| event.project.is_some()) && seen.iter().any(|e| e.kind == "guest.created"));
    let admin = test.admin_client().events_after(0).await.unwrap().items;
    assert!(admin.iter().any(|event| event.project.is_none()));
    test.stop().await;
}

#[tokio::test]
async fn a_stream_ends_when_the_controller_does_and_a_bad_start_is_refused() {
    let test = TestController::start().await;
    let admin = test.admin_client();
    let request = test.raw(reqwest::Method::GET, "/v1/events/stream", Some(&test.admin_secret()));
    let bad = super::problem_of(request.header("Last-Event-ID", "x").send().await.unwrap()).await;
    assert_eq!(bad.status, 400);
    let newest = test.state().head().await.unwrap().seq;
    let mut stream = Box::pin(admin.events(newest).await.unwrap());
    let (_, next) = tokio::join!(test.stop(), stream.next());
    assert!(next.is_none_or(|event| event.is_err()));
}
