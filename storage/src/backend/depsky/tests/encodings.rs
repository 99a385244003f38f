//! What members keep from before: pieces of another encoding, and deletions that come late.

use super::*;

/// The pieces of one content, sealed by two versions of the program.
async fn encodings(store: &CloudOfClouds, key: &ObjectKey) -> ([Bytes; 2], [Vec<Bytes>; 2]) {
    let contents = [Bytes::from(vec![1; 900]), Bytes::from(vec![2; 911])];
    let mut pieces = [Vec::new(), Vec::new()];
    for (pieces, content) in pieces.iter_mut().zip(&contents) {
        *pieces = store.inner.cut(key, content.clone()).await.unwrap();
    }
    (contents, pieces)
}

fn set(market: &Market, index: usize, key: &ObjectKey, piece: &Bytes) {
    market.mems[index].objects.lock().unwrap().insert(key.clone(), piece.clone());
}

/// One has a stray piece of another encoding, one is out of reach when the chunk is put, and another one fails afterwards.
#[tokio::test(start_paused = true)]
async fn a_stray_piece_of_another_encoding_does_not_count() {
    for is_batch in [true, false] {
        for stray in 0..4 {
            for out in (0..4).filter(|out| *out != stray) {
                let market = Market::new(4, 21);
                let (key, _) = chunk(ProjectId::generate(), 1, 10);
                let store = market.open();
                let (contents, pieces) = encodings(&store, &key).await;
                set(&market, stray, &key, &pieces[0][stray]);
                market.providers[out].set(Mode::Down);
                match is_batch {
                    true => drop(store.put_batch(vec![(key.clone(), contents[1].clone())]).await.unwrap()),
                    false => drop(store.put_if_absent(key.clone(), contents[1].clone()).await.unwrap()),
                }
                market.providers[out].set(Mode::Well);
                for down in (0..4).filter(|down| *down != out) {
                    let after = Market::over(market.mems.clone(), 22, &Fuse::long());
                    after.providers[down].set(Mode::Down);
                    assert_eq!(after.open().get(key.clone(), 1000).await.unwrap(), contents[1], "{stray} {out} {down}");
                }
            }
        }
    }
}

/// What was acknowledged in one encoding stays in it: what is replaced never makes it unreadable.
#[tokio::test(start_paused = true)]
async fn what_can_be_read_keeps_its_encoding() {
    let market = Market::new(4, 23);
    let (key, _) = chunk(ProjectId::generate(), 1, 10);
    let store = market.open();
    let (contents, pieces) = encodings(&store, &key).await;
    (0..2).for_each(|index| set(&market, index, &key, &pieces[0][index]));
    store.put_batch(vec![(key.clone(), contents[1].clone())]).await.unwrap();
    store.settle().await;
    let objects = |index: usize| market.mems[index].objects.lock().unwrap()[&key].clone();
    let whole = [0, 1].map(|encoding| (0..4).filter(|index| objects(*index) == pieces[encoding][*index]).count());
    assert!(whole.iter().any(|count| *count >= 3), "{whole:?}");
}

/// Pieces that do not go together are no sign that there is nothing; who has the content brings it together.
#[tokio::test(start_paused = true)]
async fn pieces_of_different_encodings_are_damage_and_are_put_anew() {
    let market = Market::new(4, 24);
    let (key, _) = chunk(ProjectId::generate(), 1, 10);
    let store = market.open();
    let (contents, pieces) = encodings(&store, &key).await;
    set(&market, 0, &key, &pieces[0][0]);
    assert!(matches!(store.get(key.clone(), 1000).await, Err(StoreError::NotFound { .. })), "one piece is no object");
    set(&market, 1, &key, &pieces[1][1]);
    let error = store.get(key.clone(), 1000).await.unwrap_err();
    assert!(matches!(&error, StoreError::Damaged { why, .. } if why.contains("2 encodings")), "{error}");
    // Mending says so.
    let mending = store.mend_all(&crate::volume::FetchLimit::default(), |_| ()).await.unwrap();
    assert!(
        mending.unreadable == 1 && mending.shortfall().is_some_and(|why| why.contains("volume check")),
        "{mending:?}"
    );
    assert_eq!(store.refresh(vec![key.clone()]).await.unwrap(), std::slice::from_ref(&key));
    store.put_batch(vec![(key.clone(), contents[1].clone())]).await.unwrap();
    assert_eq!(store.get(key, 1000).await.unwrap(), contents[1]);
    let mending = store.mend_all(&crate::volume::FetchLimit::default(), |_| ()).await.unwrap();
    assert_eq!((mending.unreadable, mending.shortfall()), (0, None));
}

/// That nothing is there is said only when enough have said so, whoever else was not heard of.
#[tokio::test]
async fn nothing_is_there_only_by_enough_words() {
    use super::chunks::Gathered;
    let store = Market::new(4, 25).open();
    let (key, _) = chunk(ProjectId::generate(), 1, 10);
    let is_absent = |absent: &[usize], wrong: &[usize]| {
        let gathered = Gathered { absent: absent.to_vec(), wrong: wrong.to_vec(), ..Gathered::default() };
        matches!(store.inner.not_gathered(&key, &gathered), StoreError::NotFound { .. })
    };
    assert!(is_absent(&[0, 1, 2, 3], &[]) && is_absent(&[0, 1, 2], &[]) && is_absent(&[0, 1, 3], &[2]));
    assert!(!is_absent(&[0, 1], &[]), "two were not heard of: their asking may have panicked");
    assert!(!is_absent(&[0, 1], &[2]) && !is_absent(&[], &[]));
}

/// A deletion whose answer did not come in time happens later: nobody counts on that member for this chunk until it has.
#[tokio::test(start_paused = true)]
async fn a_late_deletion_takes_nothing_that_counts() {
    let market = Market::new(4, 26);
    let store = market.open();
    let (key, bytes) = chunk(ProjectId::generate(), 1, 500);
    store.put(key.clone(), bytes.clone()).await.unwrap();
    store.settle().await;
    market.providers[3].set(Mode::HangingOnDelete);
    assert!(store.delete(key.clone()).await.is_err(), "it is not known");
    // One is out of reach: that member would have to count.
    market.providers[0].set(Mode::Down);
    let error = store.put_batch(vec![(key.clone(), bytes.clone())]).await.unwrap_err().to_string();
    assert!(error.contains("may still happen"), "{error}");
    assert!(store.refresh(vec![key.clone()]).await.is_err());
    market.providers[0].set(Mode::Well);
    store.put_batch(vec![(key.clone(), bytes.clone())]).await.unwrap();
    market.providers[3].set(Mode::Well);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!market.mems[3].objects.lock().unwrap().contains_key(&key), "it has happened");
    market.providers[1].set(Mode::Down);
    assert_eq!(store.get(key.clone(), 500).await.unwrap(), bytes);
    assert_eq!(store.refresh(vec![key]).await.unwrap(), []);
    // The intent of a sweep that died stands for as long as its deletions may.
    let members = market.providers.iter().map(|p| (String::new(), p.clone() as Arc<dyn ObjectStore>)).collect();
    let usual = CloudOfClouds::over(members, &StoreKey::from_bytes(KEY), ReadOrder::Listed).unwrap();
    assert_eq!(usual.delete_tail(), WRITE_BUDGET);
}

/// Who lists, after having been away, much that was swept meanwhile is left out and not called a liar.
#[tokio::test]
async fn who_was_away_is_no_liar() {
    let market = Market::new(4, 27);
    let store = market.open();
    let project = ProjectId::generate();
    assert!(store.inner.members[1].may_stray(100_000));
    let (stray, bytes) = chunk(project, 1, 100);
    let pieces = store.inner.cut(&stray, bytes).await.unwrap();
    let (kept, bytes) = chunk(project, 2, 100);
    store.put(kept.clone(), bytes).await.unwrap();
    store.settle().await;
    market.mems[1].objects.lock().unwrap().insert(stray, pieces[1].clone());
    let listed = store.list(&format!("{project}/"), None, 10).await.unwrap();
    assert_eq!(listed.into_iter().map(|entry| entry.key).collect::<Vec<_>>(), [kept]);
    assert!(store.members().iter().all(|member| member.wrong == 0 && !member.is_suspect));
}
