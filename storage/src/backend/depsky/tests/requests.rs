//! What is asked of providers: round trips, bytes, who.

use tokio::time::Instant;

use super::*;

const TRIP: u64 = 100;

/// How many round trips something takes, when every request takes the same time.
async fn trips<T>(work: impl Future<Output = T>) -> (T, u64) {
    let began = Instant::now();
    let done = work.await;
    let took = u64::try_from(began.elapsed().as_millis()).unwrap();
    (done, took / TRIP)
}

#[tokio::test(start_paused = true)]
async fn no_read_or_write_takes_more_than_two_round_trips_and_chunks_take_one() {
    for n in [4, 7] {
        let market = Market::new(n, 5);
        market.providers.iter().for_each(|provider| provider.latency_ms.store(TRIP, Ordering::SeqCst));
        let store = market.open();
        let project = ProjectId::generate();
        let (key, bytes) = chunk(project, 1, 60_000);
        assert_eq!(trips(store.put_batch(vec![(key.clone(), bytes.clone())])).await.1, 1);
        assert_eq!(trips(store.put(key.clone(), bytes.clone())).await.1, 1);
        store.settle().await;
        let before: u64 = market.providers.iter().map(|provider| provider.requests.load(Ordering::SeqCst)).sum();
        let (read, took) = trips(store.get(key.clone(), 60_000)).await;
        assert_eq!((read.unwrap(), took), (bytes, 1));
        let after: u64 = market.providers.iter().map(|provider| provider.requests.load(Ordering::SeqCst)).sum();
        assert_eq!(after - before, store.inner.quorum.pieces() as u64, "f + 1 requests for a read");
        let register = ObjectKey::other(project, "sweep/clock").unwrap();
        for _ in 0..3 {
            assert_eq!(trips(store.put(register.clone(), Bytes::from_static(b"now"))).await.1, 2);
            store.settle().await;
            assert_eq!(trips(store.get(register.clone(), 10)).await.1, 2);
        }
        assert_eq!(trips(store.refresh(vec![key])).await.1, 1);
    }
}

/// What is stored, metadata included, against the bytes that are stored: sealed chunks of the sizes that images have.
#[tokio::test(start_paused = true)]
async fn it_stores_little_more_than_twice_the_bytes_and_reads_no_more_than_once() {
    let market = Market::new(4, 6);
    let store = market.open();
    let project = ProjectId::generate();
    let lens = [65_576, 48_000, 30_000, 25_000, 20_000];
    let all: Vec<_> = lens.iter().zip(0..).map(|(len, i)| chunk(project, i, *len)).collect();
    store.put_batch(all.clone()).await.unwrap();
    store.settle().await;
    for (key, bytes) in &all {
        let stored: usize = market.mems.iter().map(|mem| mem.objects.lock().unwrap()[key].len()).sum();
        let ratio = stored as f64 / bytes.len() as f64;
        assert!(ratio <= 2.05, "{ratio} of {}", bytes.len());
        let before: u64 = market.providers.iter().map(|provider| provider.bytes.load(Ordering::SeqCst)).sum();
        store.get(key.clone(), bytes.len()).await.unwrap();
        let after: u64 = market.providers.iter().map(|provider| provider.bytes.load(Ordering::SeqCst)).sum();
        assert!((after - before) as f64 <= 1.02 * bytes.len() as f64, "two halves of {}", bytes.len());
    }
}

#[tokio::test(start_paused = true)]
async fn who_is_slow_is_overtaken_and_then_asked_last() {
    let market = Market::new(4, 7);
    market.providers.iter().for_each(|provider| provider.latency_ms.store(TRIP, Ordering::SeqCst));
    let members = market.providers.iter().enumerate();
    let members = members.map(|(i, p)| (format!("provider-{i}"), p.clone() as Arc<dyn ObjectStore>)).collect();
    let store = CloudOfClouds::over(members, &StoreKey::from_bytes(KEY), ReadOrder::Fastest).unwrap();
    let (key, bytes) = chunk(ProjectId::generate(), 1, 1000);
    store.put(key.clone(), bytes.clone()).await.unwrap();
    for _ in 0..3 {
        assert_eq!(trips(store.get(key.clone(), 1000)).await.1, 1);
    }
    market.providers[0].set(Mode::Hanging);
    let mut slow = Vec::new();
    for _ in 0..10 {
        let (read, took) = trips(store.get(key.clone(), 1000)).await;
        assert_eq!(read.unwrap(), bytes);
        slow.extend((took > 1).then_some(took));
    }
    // Three times the usual, then another one's answer; then it is not asked first any more.
    assert!(slow.len() == 1 && slow[0] <= 5, "{slow:?}");
    // Much later it is tried again.
    tokio::time::advance(Duration::from_secs(3600)).await;
    market.providers[0].set(Mode::Well);
    let before = market.providers[0].requests.load(Ordering::SeqCst);
    for _ in 0..10 {
        store.get(key.clone(), 1000).await.unwrap();
    }
    assert!(market.providers[0].requests.load(Ordering::SeqCst) > before);
}

/// Who does not take what it is given holds up nobody, and what waits for it has a bound.
#[tokio::test(start_paused = true)]
async fn what_waits_for_a_hanging_member_is_bounded() {
    let market = Market::new(4, 8);
    let store = market.open();
    market.providers[2].set(Mode::Hanging);
    let project = ProjectId::generate();
    let began = Instant::now();
    for i in 0..200 {
        let (key, bytes) = chunk(project, i, 1 << 20);
        store.put(key, bytes).await.unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(1), "nobody waited for it");
    assert!(store.inner.tasks.len() <= 130, "{} wait", store.inner.tasks.len());
    let left_out = store.members()[2].left_out;
    assert!((60..100).contains(&left_out), "{left_out} of 200 went without it");
    // Closed, nothing goes on.
    let tasks = store.inner.tasks.clone();
    drop(store);
    tasks.close();
    tokio::time::timeout(Duration::from_secs(1), tasks.wait()).await.expect("no task outlives its store");
}
