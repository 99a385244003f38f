use std::sync::Arc;

use supercloud_api::{Cloud, Ref, ids::CloudId};
use supercloud_store::{SledOptions, SledStore};

use super::*;

async fn state() -> (tempfile::TempDir, Arc<SledStore>, State) {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(SledStore::open(folder.path(), SledOptions::default()).await.unwrap());
    let state = State::open(Arc::clone(&store) as Arc<dyn Store>).await.unwrap();
    (folder, store, state)
}

fn cloud(name: &str) -> Cloud {
    Cloud { id: CloudId::generate(), name: name.parse().unwrap(), provider: "lab".into(), created_at_ms: 1 }
}

fn creation(cloud: &Cloud) -> Change {
    let mut change = Change::new();
    change.create_named(cloud).event(EventDraft::new("cloud.created").data(serde_json::json!({ "id": cloud.id })));
    change
}

#[tokio::test]
async fn a_record_is_found_by_id_and_by_name_and_its_name_is_free_again_when_it_is_gone() {
    let (_folder, _store, state) = state().await;
    let east = cloud("east");
    state.commit(&Context::system(), creation(&east)).await.unwrap();
    for reference in [Ref::from("east"), Ref::from(east.id.to_string())] {
        assert_eq!(state.find::<Cloud>(None, &reference).await.unwrap().unwrap().value, east);
    }
    assert!(state.find::<Cloud>(None, &Ref::from("west")).await.unwrap().is_none());
    assert!(state.find::<Cloud>(None, &Ref::from("not/a\nname")).await.unwrap().is_none());
    let refused = state.commit(&Context::system(), creation(&cloud("east"))).await.unwrap_err();
    let StateError::Conflict { keys: found } = refused else { panic!("{refused}") };
    assert_eq!(found, [keys::name(None, "cloud", "east")]);
    let before = state.read::<Cloud>(&east.id).await.unwrap().unwrap();
    let mut change = Change::new();
    change.delete_named(&before);
    state.commit(&Context::system(), change).await.unwrap();
    state.commit(&Context::system(), creation(&cloud("east"))).await.unwrap();
}

#[tokio::test]
async fn what_changed_since_it_was_read_refuses_the_whole_change() {
    let (_folder, _store, state) = state().await;
    let east = cloud("east");
    state.commit(&Context::system(), creation(&east)).await.unwrap();
    let read = state.read::<Cloud>(&east.id).await.unwrap().unwrap();
    let mut first = Change::new();
    first.update(&read, &Cloud { provider: "ec2".into(), ..east.clone() });
    state.commit(&Context::system(), first).await.unwrap();
    let before = state.head().await.unwrap();
    let other = cloud("other");
    let mut second = creation(&other);
    second.update(&read, &Cloud { provider: "gcp".into(), ..east.clone() });
    assert!(state.commit(&Context::system(), second).await.unwrap_err().is_conflict());
    assert!(state.read::<Cloud>(&other.id).await.unwrap().is_none());
    assert_eq!(state.head().await.unwrap(), before, "no event of what did not happen");
    assert_eq!(state.read::<Cloud>(&east.id).await.unwrap().unwrap().provider, "ec2");
}

#[tokio::test]
async fn changes_at_once_make_one_chain_also_of_two_writers() {
    let (_folder, store, state) = state().await;
    // A second writer has its own idea of the head.
    let other = State::open(Arc::clone(&store) as Arc<dyn Store>).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..40 {
        let state = if n % 2 == 0 { state.clone() } else { other.clone() };
        tasks.spawn(async move {
            let mut change = creation(&cloud(&format!("c{n}")));
            change.event(EventDraft::new("second").data(serde_json::json!({ "n": n })));
            state.commit(&Context::system(), change).await.unwrap()
        });
    }
    while let Some(done) = tasks.join_next().await {
        let done = done.unwrap();
        assert_eq!(done.events[1].seq, done.events[0].seq + 1, "a change's events are together");
    }
    assert_eq!(verify_chain(&state).await.unwrap(), Ok(80));
}

#[tokio::test]
async fn a_forged_event_and_a_cut_chain_are_found() {
    let (_folder, store, state) = state().await;
    for n in 0..5 {
        state.commit(&Context::system(), creation(&cloud(&format!("c{n}")))).await.unwrap();
    }
    let raw =
        |key: Key, value: Vec<u8>| supercloud_store::Txn::new().put(key, supercloud_store::Value::new(value).unwrap());
    let kept = store.get(keys::event(3)).await.unwrap().unwrap().value;
    let mut event: Event = serde_json::from_slice(kept.as_bytes()).unwrap();
    event.actor = "token:eve".into();
    store.txn(raw(keys::event(3), serde_json::to_vec(&event).unwrap())).await.unwrap();
    assert_eq!(verify_chain(&state).await.unwrap(), Err(3));
    event.hash = event.expected_hash();
    store.txn(raw(keys::event(3), serde_json::to_vec(&event).unwrap())).await.unwrap();
    assert_eq!(verify_chain(&state).await.unwrap(), Err(4), "a recomputed hash breaks the next link");
    store.txn(raw(keys::event(3), kept.as_bytes().to_vec())).await.unwrap();
    assert_eq!(verify_chain(&state).await.unwrap(), Ok(5));
    store.txn(supercloud_store::Txn::new().delete(keys::event(5))).await.unwrap();
    assert_eq!(verify_chain(&state).await.unwrap(), Err(5), "a missing last event");
}

#[tokio::test]
async fn pages_hold_what_is_kept_in_order_and_end() {
    let (_folder, _store, state) = state().await;
    let clouds: Vec<Cloud> = (0..25).map(|n| cloud(&format!("c{n}"))).collect();
    for cloud in &clouds {
        state.commit(&Context::system(), creation(cloud)).await.unwrap();
    }
    let odd = |cloud: &Cloud| cloud.name.as_str()[1..].parse::<u32>().unwrap() % 2 == 1;
    let (mut seen, mut after) = (Vec::new(), None);
    loop {
        let (page, next) = state.page::<Cloud>(after.as_ref(), 5, odd).await.unwrap();
        seen.extend(page.into_iter().map(|cloud| cloud.value));
        let Some(next) = next else { break };
        after = Some(next.parse().unwrap());
    }
    let expected: Vec<Cloud> = clouds.into_iter().filter(|cloud| odd(cloud)).collect();
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn a_follower_sees_what_is_there_and_then_every_change_also_after_a_compaction() {
    let (_folder, store, state) = state().await;
    let (first, second) = (cloud("first"), cloud("second"));
    state.commit(&Context::system(), creation(&first)).await.unwrap();
    let mut follower = state.follow::<Cloud>();
    assert_eq!(follower.next().await.unwrap(), Seen::Restart);
    assert!(matches!(follower.next().await.unwrap(), Seen::Put(found) if found.value == first));
    assert_eq!(follower.next().await.unwrap(), Seen::CaughtUp);
    state.commit(&Context::system(), creation(&second)).await.unwrap();
    assert!(matches!(follower.next().await.unwrap(), Seen::Put(found) if found.value == second));
    let read = state.read::<Cloud>(&first.id).await.unwrap().unwrap();
    let mut change = Change::new();
    change.delete_named(&read);
    let revision = state.commit(&Context::system(), change).await.unwrap().revision;
    assert_eq!(follower.next().await.unwrap(), Seen::Gone(first.id.to_string()));
    // A lagging follower starts again.
    let mut late = state.follow_one::<Cloud>(&second.id);
    assert_eq!(late.next().await.unwrap(), Seen::Restart);
    let read = state.read::<Cloud>(&second.id).await.unwrap().unwrap();
    let mut change = Change::new();
    change.update(&read, &Cloud { provider: "x".into(), ..second.clone() });
    state.commit(&Context::system(), change).await.unwrap();
    store.compact(revision + 1).await.unwrap();
    let mut newest = None;
    while newest.as_ref().is_none_or(|c: &Cloud| c.provider != "x") {
        if let Seen::Put(found) = late.next().await.unwrap() {
            newest = Some(found.value);
        }
    }
}

#[tokio::test]
async fn an_answer_is_kept_with_its_change_and_only_once() {
    let (_folder, _store, state) = state().await;
    let claim = IdempotencyClaim {
        key: keys::answer(supercloud_api::ids::TokenId::generate(), "ab"),
        expired_revision: 0,
        request_hash: "h".into(),
    };
    let context = Context { idempotency: Some(claim), ..Context::system() };
    let answered = |cloud: &Cloud| {
        let mut change = creation(cloud);
        change.answer(Answer { status: 201, location: None, body: "{}".into(), is_sealed: false });
        change
    };
    state.commit(&context, answered(&cloud("a"))).await.unwrap();
    assert!(matches!(state.commit(&context, answered(&cloud("b"))).await, Err(StateError::AlreadyAnswered)));
    assert_eq!(verify_chain(&state).await.unwrap(), Ok(1));
}

#[tokio::test]
async fn a_layout_of_another_version_is_refused() {
    let (_folder, store, _state) = state().await;
    let value = supercloud_store::Value::new("2").unwrap();
    store.txn(supercloud_store::Txn::new().put(keys::format(), value)).await.unwrap();
    let refused = State::open(store as Arc<dyn Store>).await.unwrap_err();
    assert!(matches!(refused, StateError::Format(found) if found == "2"));
}

/// A store whose answers get lost: every third transaction is of unknown outcome, half of those did happen.
struct Forgetful {
    store: Arc<SledStore>,
    count: std::sync::atomic::AtomicU32,
}

impl Store for Forgetful {
    fn txn(
        &self,
        txn: supercloud_store::Txn,
    ) -> supercloud_store::BoxFuture<'_, Result<supercloud_store::TxnOutcome, supercloud_store::StoreError>> {
        let count = self.count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Box::pin(async move {
            if !count.is_multiple_of(3) {
                return self.store.txn(txn).await;
            }
            if count.is_multiple_of(2) {
                self.store.txn(txn).await?;
            }
            Err(supercloud_store::StoreError::UnknownOutcome { source: None })
        })
    }
    fn get(
        &self,
        key: Key,
    ) -> supercloud_store::BoxFuture<'_, Result<Option<Versioned>, supercloud_store::StoreError>> {
        self.store.get(key)
    }
    fn range(
        &self,
        prefix: Prefix,
        after: Option<Key>,
        limit: usize,
    ) -> supercloud_store::BoxFuture<'_, Result<supercloud_store::Page, supercloud_store::StoreError>> {
        self.store.range(prefix, after, limit)
    }
    fn range_back(
        &self,
        prefix: Prefix,
        before: Option<Key>,
        limit: usize,
    ) -> supercloud_store::BoxFuture<'_, Result<supercloud_store::Page, supercloud_store::StoreError>> {
        self.store.range_back(prefix, before, limit)
    }
    fn watch(&self, prefix: Prefix, from_revision: u64) -> supercloud_store::WatchStream {
        self.store.watch(prefix, from_revision)
    }
    fn compact(&self, revision: u64) -> supercloud_store::BoxFuture<'_, Result<(), supercloud_store::StoreError>> {
        self.store.compact(revision)
    }
    fn health(
        &self,
    ) -> supercloud_store::BoxFuture<'_, Result<supercloud_store::Health, supercloud_store::StoreError>> {
        self.store.health()
    }
}

#[tokio::test]
async fn lost_answers_make_nothing_happen_twice_or_not_at_all() {
    let (_folder, store, _state) = state().await;
    let forgetful = Forgetful { store, count: std::sync::atomic::AtomicU32::new(1) };
    let state = State::open(Arc::new(forgetful) as Arc<dyn Store>).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..60 {
        let state = state.clone();
        tasks.spawn(async move { state.commit(&Context::system(), creation(&cloud(&format!("c{n}")))).await });
    }
    let mut seqs = Vec::new();
    while let Some(done) = tasks.join_next().await {
        seqs.push(done.unwrap().unwrap().events[0].seq);
    }
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=60).collect::<Vec<u64>>(), "each told its own event");
    assert_eq!(state.list::<Cloud>().await.unwrap().len(), 60);
    assert_eq!(verify_chain(&state).await.unwrap(), Ok(60));
}
