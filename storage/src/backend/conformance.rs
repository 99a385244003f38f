//! What every store must do, whatever it lies on.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use supercloud_ids::ProjectId;

use super::*;

fn key(project: ProjectId, path: &str) -> ObjectKey {
    ObjectKey::other(project, path).unwrap()
}

/// Runs the whole suite. `settle` lasts as long as the store's clock needs to show a difference; `is_lazy`: what is young
/// is not refreshed.
pub(crate) async fn conforms(store: Arc<dyn ObjectStore>, settle: Duration, is_lazy: bool) {
    objects_come_and_go(&*store).await;
    of_many_conditional_puts_one_wins(&store).await;
    batches_store_what_is_new(&*store).await;
    answers_are_bounded(&*store).await;
    listings_are_in_order_and_in_pages(&*store).await;
    stamps_follow_puts(&*store, settle, is_lazy).await;
}

async fn objects_come_and_go(store: &dyn ObjectStore) {
    let key = key(ProjectId::generate(), "checkpoints/a.b-c_d");
    assert!(matches!(store.get(key.clone(), 10).await, Err(StoreError::NotFound { .. })));
    assert!(!store.exists(key.clone()).await.unwrap());
    assert_eq!(store.stat(key.clone()).await.unwrap(), None);
    assert!(!store.delete(key.clone()).await.unwrap());
    store.put(key.clone(), Bytes::from_static(b"one")).await.unwrap();
    store.put(key.clone(), Bytes::from_static(b"three")).await.unwrap();
    assert_eq!(store.get(key.clone(), 10).await.unwrap(), "three");
    assert!(store.exists(key.clone()).await.unwrap());
    let entry = store.stat(key.clone()).await.unwrap().unwrap();
    assert_eq!((&entry.key, entry.len), (&key, 5));
    assert_eq!(store.put_if_absent(key.clone(), Bytes::from_static(b"x")).await.unwrap(), PutOutcome::AlreadyThere);
    assert_eq!(store.get(key.clone(), 10).await.unwrap(), "three");
    assert!(store.delete(key.clone()).await.unwrap());
    assert!(!store.exists(key.clone()).await.unwrap());
    assert_eq!(store.put_if_absent(key.clone(), Bytes::new()).await.unwrap(), PutOutcome::Stored);
    assert_eq!(store.get(key, 0).await.unwrap(), "", "an empty object is one");
}

async fn of_many_conditional_puts_one_wins(store: &Arc<dyn ObjectStore>) {
    let key = key(ProjectId::generate(), "lease");
    let mut puts = tokio::task::JoinSet::new();
    for i in 0..10_u8 {
        let (store, key) = (store.clone(), key.clone());
        puts.spawn(async move { (i, store.put_if_absent(key, Bytes::from(vec![i; 1000])).await.unwrap()) });
    }
    let outcomes = puts.join_all().await;
    let winners: Vec<u8> =
        outcomes.iter().filter(|(_, outcome)| *outcome == PutOutcome::Stored).map(|(i, _)| *i).collect();
    assert_eq!(winners.len(), 1, "{outcomes:?}");
    assert_eq!(store.get(key, 1000).await.unwrap(), vec![winners[0]; 1000]);
}

async fn batches_store_what_is_new(store: &dyn ObjectStore) {
    let project = ProjectId::generate();
    assert_eq!(store.put_batch(Vec::new()).await.unwrap(), 0);
    let all: Vec<_> = (0..20_u8).map(|i| (key(project, &format!("b/{i:02}")), Bytes::from(vec![i; 100]))).collect();
    assert_eq!(store.put_batch(all[..12].to_vec()).await.unwrap(), 12);
    assert_eq!(store.put_batch(all.clone()).await.unwrap(), 8);
    assert_eq!(store.put_batch(all.clone()).await.unwrap(), 0);
    for (key, bytes) in &all {
        assert_eq!(store.get(key.clone(), 100).await.unwrap(), bytes);
    }
    let absent = key(project, "b/none");
    let mut keys: Vec<_> = all.iter().map(|(key, _)| key.clone()).collect();
    keys.insert(3, absent.clone());
    assert_eq!(store.refresh(keys).await.unwrap(), std::slice::from_ref(&absent));
    assert!(!store.exists(absent).await.unwrap(), "a refresh makes nothing");
}

async fn answers_are_bounded(store: &dyn ObjectStore) {
    let key = key(ProjectId::generate(), "large");
    store.put(key.clone(), Bytes::from(vec![7; 4096])).await.unwrap();
    assert_eq!(store.get(key.clone(), 4096).await.unwrap().len(), 4096);
    assert!(matches!(store.get(key, 4095).await, Err(StoreError::TooLarge { len: 4096, cap: 4095, .. })));
}

async fn listings_are_in_order_and_in_pages(store: &dyn ObjectStore) {
    let (project, other) = (ProjectId::generate(), ProjectId::generate());
    // '-' and '.' sort before '/', '_' after it.
    let paths = ["a-b", "a.b", "a/b", "a/b-c", "a/c/d", "a_b", "ab", "b/a", "sweep/clock"];
    let mut keys: Vec<ObjectKey> = paths.iter().map(|path| key(project, path)).collect();
    keys.sort();
    for (size, at) in keys.iter().enumerate() {
        store.put(at.clone(), Bytes::from(vec![0; size])).await.unwrap();
    }
    store.put(key(other, "a/b"), Bytes::new()).await.unwrap();
    let folder = format!("{project}/");
    let all = store.list(&folder, None, 1000).await.unwrap();
    assert_eq!(all.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>(), keys);
    assert!(all.iter().enumerate().all(|(size, entry)| entry.len == size as u64));
    for limit in [1, 2, 3, 100] {
        let (mut paged, mut after) = (Vec::new(), None::<String>);
        loop {
            let page = store.list(&folder, after.as_deref(), limit).await.unwrap();
            assert!(page.len() <= limit);
            let Some(last) = page.last() else { break };
            after = Some(last.key.as_str().to_owned());
            paged.extend(page);
        }
        assert_eq!(paged, all, "pages of {limit}");
    }
    let below = store.list(&format!("{project}/a/"), None, 100).await.unwrap();
    assert_eq!(below.len(), 3);
    assert_eq!(store.list(&format!("{project}/a"), None, 100).await.unwrap().len(), 7);
    assert_eq!(store.list(&format!("{project}/zz"), None, 100).await.unwrap(), []);
    assert_eq!(store.list(&folder, Some(&format!("{project}/~")), 100).await.unwrap(), []);
    let projects: BTreeSet<_> = crate::sweep::projects(store).await.unwrap().into_iter().collect();
    assert!(projects.contains(&project) && projects.contains(&other));
}

async fn stamps_follow_puts(store: &dyn ObjectStore, settle: Duration, is_lazy: bool) {
    let project = ProjectId::generate();
    let (early, late) = (key(project, "t/early"), key(project, "t/late"));
    let stamp = async |key: &ObjectKey| store.stat(key.clone()).await.unwrap().unwrap().modified;
    store.put(early.clone(), Bytes::from_static(b"e")).await.unwrap();
    tokio::time::sleep(settle).await;
    store.put(late.clone(), Bytes::from_static(b"l")).await.unwrap();
    assert!(stamp(&early).await < stamp(&late).await);
    // Afterwards none looks older than the last put by more than what the store allows itself.
    for again in [true, false] {
        let begun = stamp(&late).await;
        tokio::time::sleep(settle).await;
        match again {
            true => drop(store.put_batch(vec![(early.clone(), Bytes::from_static(b"e"))]).await.unwrap()),
            false => drop(store.refresh(vec![early.clone()]).await.unwrap()),
        }
        assert!(stamp(&early).await + store.stamp_slack() >= begun);
        assert!(is_lazy || stamp(&early).await > begun, "it is refreshed");
        store.put(late.clone(), Bytes::from_static(b"l")).await.unwrap();
    }
}
