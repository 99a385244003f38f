//! Sweeps over it: nothing that lives goes, what does not live goes, killed at any request.

use std::collections::BTreeSet;

use futures::future::BoxFuture;

use super::*;
use crate::{
    BLOCK_BYTES,
    chunk::seal,
    key::{ChunkKind, ContentRoot, DataKeys, ProjectKey},
    manifest::{self, Manifest},
    scrub::scrub,
    source::{ChunkReader, ChunkSource, StoreSource},
    sweep::{self, Asked, Authority, AuthorityError, Live, Mark, SweepError, SweepOptions},
    volume::FetchLimit,
};

#[derive(Debug)]
struct Records {
    keys: Arc<DataKeys>,
    live: Mutex<BTreeMap<ContentRoot, bool>>,
}

impl Authority for Records {
    fn live<'a>(&'a self, _: ProjectId, asked: &'a Asked) -> BoxFuture<'a, Result<Live, AuthorityError>> {
        let live = Live {
            roots: self.live.lock().unwrap().clone(),
            oldest_writer: None,
            mark: Mark { seq: 1, hash: "h".into() },
            gone: asked.holders.iter().cloned().collect(),
        };
        Box::pin(async { Ok(live) })
    }

    fn names(
        &self,
        _: ProjectId,
        kind: ChunkKind,
        name: ChunkName,
        sealed: Option<Bytes>,
    ) -> BoxFuture<'_, Result<Option<Vec<ChunkName>>, AuthorityError>> {
        let names = sealed.and_then(|sealed| manifest::names_of(&self.keys, kind, name, &sealed).ok());
        Box::pin(async { Ok(names) })
    }
}

/// An image of so many blocks; blocks of the same number are the same.
async fn image(store: &dyn ObjectStore, keys: &Arc<DataKeys>, blocks: std::ops::Range<u8>) -> ContentRoot {
    let mut image = Manifest::zeros(64 * BLOCK_BYTES as u64).unwrap();
    let mut objects = Vec::new();
    for block in blocks {
        let (name, sealed) = seal(keys, ChunkKind::Data, &[block + 1; 900]).unwrap();
        image.set(block.into(), Some(name));
        objects.push((ObjectKey::chunk(keys.project(), &name), sealed));
    }
    sweep::put_chunks(store, keys.project(), objects).await.unwrap();
    image.store(keys, store).await.unwrap()
}

fn chunks_of(mem: &MemStore) -> BTreeSet<ObjectKey> {
    mem.objects.lock().unwrap().keys().filter(|key| key.chunk_name().is_some()).cloned().collect()
}

const OPTIONS: fn(&str) -> SweepOptions =
    |holder| SweepOptions { holder: holder.into(), grace: Duration::from_millis(1), pause: Duration::ZERO };

#[tokio::test(start_paused = true)]
async fn a_sweep_that_dies_anywhere_leaves_what_lives_and_the_next_one_ends_it() {
    for (crash_at, failing) in (0..60).step_by(3).zip((0..4).cycle()) {
        let market = Market::new(4, crash_at);
        let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
        let store = market.open();
        let kept = image(&store, &keys, 0..8).await;
        image(&store, &keys, 4..16).await;
        store.settle().await;
        // Things grow old.
        market.mems[0].clock_ms.fetch_add(10_000, Ordering::SeqCst);
        let records = Records { keys: keys.clone(), live: Mutex::new([(kept, true)].into()) };
        let cancel = CancellationToken::new();
        let crash_at = i64::try_from(crash_at).unwrap();
        let dying = Market::over(market.mems.clone(), 1, &Arc::new(Fuse(AtomicI64::new(crash_at)))).open();
        let dying: Arc<dyn ObjectStore> = Arc::new(dying);
        let options = OPTIONS("dying");
        let swept = sweep::sweep_project(&dying, keys.project(), &records, &options, &cancel);
        let _ = tokio::time::timeout(Duration::from_secs(30), swept).await;
        drop(dying);
        // One fails, and the next sweep comes; it may have to come again after one that did not know what it had deleted.
        let after = Market::over(market.mems.clone(), 2, &Fuse::long());
        let fault = [Mode::Down, Mode::Lying, Mode::Slow(Duration::from_secs(3)), Mode::Well][failing];
        after.providers[failing].set(fault);
        let next: Arc<dyn ObjectStore> = Arc::new(after.open());
        let options = OPTIONS("next");
        let swept = match sweep::sweep_project(&next, keys.project(), &records, &options, &cancel).await {
            // Of an intent that had come to one member only: it is whole now, and removed by the one that comes next.
            Err(SweepError::Held { .. }) => {
                sweep::sweep_project(&next, keys.project(), &records, &options, &cancel).await.unwrap()
            }
            swept => swept.unwrap(),
        };
        println!("{crash_at}, {failing} is {fault:?}: {swept:?}");
        let sources: Vec<Arc<dyn ChunkSource>> = vec![Arc::new(StoreSource::new(keys.project(), next.clone()))];
        let reader = ChunkReader::new(keys.clone(), sources);
        let found = scrub(&next, &reader, &[kept], &FetchLimit::default(), |_| ()).await.unwrap();
        assert_eq!((found.chunks, found.missing, found.damaged), (10, 0, 0), "{found:?}");
        for (index, mem) in after.mems.iter().enumerate() {
            let chunks = chunks_of(mem);
            assert!(fault != Mode::Well || chunks.len() == 10, "{index}: {}", chunks.len());
            // What cannot be asked in time is not told to delete.
            let is_late = matches!(fault, Mode::Down | Mode::Slow(_));
            assert!(index == failing && is_late || chunks.len() == 10, "{index}: {}", chunks.len());
        }
        // What the one that was down has kept goes when it is back.
        after.providers[failing].set(Mode::Well);
        sweep::sweep_project(&next, keys.project(), &records, &OPTIONS("last"), &cancel).await.unwrap();
        assert!(after.mems.iter().all(|mem| chunks_of(mem).len() == 10));
        assert_eq!(sweep::projects(&*next).await.unwrap(), [keys.project()]);
    }
}

/// A deletion of which it is not known whether it still comes fails, so that the sweep leaves its intent standing.
#[tokio::test(start_paused = true)]
async fn a_deletion_without_an_answer_is_no_deletion() {
    let market = Market::new(4, 3);
    let store = market.open();
    let (key, bytes) = chunk(ProjectId::generate(), 1, 100);
    store.put(key.clone(), bytes).await.unwrap();
    store.settle().await;
    market.providers[2].set(Mode::Ungrateful);
    let error = store.delete(key.clone()).await.unwrap_err().to_string();
    assert!(error.contains("provider-2") && error.contains("may not have happened"), "{error}");
    market.providers[2].set(Mode::Well);
    assert!(!store.delete(key).await.unwrap(), "it had happened");
}

/// No f clocks make something young look old, or keep it for ever.
#[test]
fn stamps_stand_whatever_f_say() {
    let store = Market::new(4, 1).open();
    let at = |secs| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
    let stamp = |present: &[u64], answered| store.inner.stamp(present.iter().map(|secs| at(*secs)).collect(), answered);
    // Put at 100 at three of them, at least two of which are correct.
    assert_eq!(stamp(&[100, 100, 100, 5], 4), Some(at(100)));
    assert_eq!(stamp(&[100, 100, 0], 4), Some(at(100)), "one has it not, one says that it is old");
    assert_eq!(stamp(&[100, 0, 0], 3), Some(at(100)), "one is down, one lies, one missed the put");
    assert_eq!(stamp(&[9000, 7, 7, 7], 4), Some(at(7)), "one says that it is young");
    assert_eq!(stamp(&[], 4), None);
    let future = SystemTime::now() + Duration::from_secs(5000);
    assert!(store.inner.stamp(vec![future; 4], 4).unwrap() <= SystemTime::now(), "nothing is from the future");
}

#[tokio::test(start_paused = true)]
async fn a_check_mends_what_a_provider_has_lost_or_spoilt() {
    let market = Market::new(4, 4);
    let keys = Arc::new(DataKeys::derive(ProjectId::generate(), &ProjectKey::generate()));
    let store: Arc<dyn ObjectStore> = Arc::new(market.open());
    let root = image(&*store, &keys, 0..8).await;
    let chunks: Vec<ObjectKey> = chunks_of(&market.mems[0]).into_iter().collect();
    market.mems[0].objects.lock().unwrap().remove(&chunks[0]);
    market.mems[3].objects.lock().unwrap().insert(chunks[1].clone(), Bytes::from_static(b"spoilt"));
    let sources: Vec<Arc<dyn ChunkSource>> = vec![Arc::new(StoreSource::new(keys.project(), store.clone()))];
    let reader = ChunkReader::new(keys, sources);
    let found = scrub(&store, &reader, &[root], &FetchLimit::default(), |_| ()).await.unwrap();
    assert_eq!((found.chunks, found.repaired, found.missing, found.damaged), (10, 2, 0, 0));
    let found = scrub(&store, &reader, &[root], &FetchLimit::default(), |_| ()).await.unwrap();
    assert_eq!((found.chunks, found.repaired), (10, 0));
    assert!(market.mems.iter().all(|mem| chunks_of(mem).len() == 10));
}
