//! Seeded histories with failing providers and dying writers: what is read is right, and who lies is named.

use std::collections::BTreeSet;

use super::*;

fn seeds() -> std::ops::Range<u64> {
    match std::env::var("SUPERCLOUD_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..60,
    }
}

/// One writer, one reader of another process, f providers that begin to fail at some time: every read gives what was written last.
#[tokio::test(start_paused = true)]
async fn whatever_f_providers_do_reads_are_right() {
    for seed in seeds() {
        let mut rng = SmallRng::seed_from_u64(seed);
        let n = if rng.random_bool(0.7) { 4 } else { 7 };
        let market = Market::new(n, seed);
        let (writer, reader) = (market.open(), market.open());
        let project = ProjectId::generate();
        let mut failing = BTreeSet::new();
        while failing.len() < (n - 1) / 3 {
            failing.insert(rng.random_range(0..n));
        }
        let from = rng.random_range(0..40);
        let mut registers: BTreeMap<ObjectKey, Option<Bytes>> = BTreeMap::new();
        let mut chunks: Vec<(ObjectKey, Bytes)> = Vec::new();
        for step in 0..60_u64 {
            if step == from {
                for index in &failing {
                    let fault = FAULTS[rng.random_range(0..FAULTS.len())];
                    println!("seed {seed}: from step {step} on, {index} of {n} is {fault:?}");
                    market.providers[*index].set(fault);
                }
            }
            let register = ObjectKey::other(project, &format!("sweep/r{}", rng.random_range(0..3))).unwrap();
            match rng.random_range(0..8) {
                0 => {
                    let bytes = Bytes::from(vec![u8::try_from(step).unwrap(); rng.random_range(0..300)]);
                    writer.put(register.clone(), bytes.clone()).await.unwrap();
                    registers.insert(register, Some(bytes));
                }
                1 => {
                    let bytes = Bytes::from(format!("absent before {step}"));
                    let was_there = registers.get(&register).is_some_and(Option::is_some);
                    let outcome = writer.put_if_absent(register.clone(), bytes.clone()).await.unwrap();
                    let expected = if was_there { PutOutcome::AlreadyThere } else { PutOutcome::Stored };
                    assert_eq!(outcome, expected, "seed {seed}, step {step}");
                    if !was_there {
                        registers.insert(register, Some(bytes));
                    }
                }
                2 => {
                    let was_there = registers.insert(register.clone(), None).flatten().is_some();
                    assert_eq!(writer.delete(register).await.unwrap(), was_there, "seed {seed}, step {step}");
                }
                3 => {
                    let some: Vec<_> = (0..rng.random_range(1..5))
                        .map(|i| chunk(project, seed * 1000 + step * 10 + i, rng.random_range(1..3000)))
                        .collect();
                    writer.put_batch(some.clone()).await.unwrap();
                    chunks.extend(some);
                }
                4 if !chunks.is_empty() => {
                    let keys: Vec<_> = chunks.iter().map(|(key, _)| key.clone()).collect();
                    assert_eq!(writer.refresh(keys).await.unwrap(), [], "seed {seed}, step {step}");
                }
                _ => {
                    let expected = registers.get(&register).cloned().flatten();
                    let who = if rng.random_bool(0.5) { &writer } else { &reader };
                    match who.get(register, 1000).await {
                        Ok(bytes) => assert_eq!(Some(bytes), expected, "seed {seed}, step {step}"),
                        Err(StoreError::NotFound { .. }) => assert_eq!(None, expected, "seed {seed}, step {step}"),
                        Err(error) => panic!("seed {seed}, step {step}: {error}"),
                    }
                    if !chunks.is_empty() {
                        let (key, bytes) = &chunks[rng.random_range(0..chunks.len())];
                        assert_eq!(who.get(key.clone(), 3000).await.unwrap(), bytes, "seed {seed}, step {step}");
                        assert!(who.exists(key.clone()).await.unwrap());
                        assert!(who.stat(key.clone()).await.unwrap().is_some());
                    }
                }
            }
        }
        let listed = reader.list("", None, 10_000).await.unwrap();
        let listed: BTreeSet<ObjectKey> = listed.into_iter().map(|entry| entry.key).collect();
        let there = registers.iter().filter(|(_, content)| content.is_some()).map(|(key, _)| key.clone());
        let there: BTreeSet<ObjectKey> = there.chain(chunks.iter().map(|(key, _)| key.clone())).collect();
        assert!(listed.is_superset(&there), "seed {seed}: a listing lacks something");
        // Only what liars invent is more than that.
        let is_inventing =
            failing.iter().any(|index| *market.providers[*index].mode.lock().unwrap() == Mode::Inventing);
        assert!(is_inventing || listed == there, "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_lies_is_named_and_nobody_else() {
    for (fault, text) in [
        (Mode::Lying, "were not written there"),
        (Mode::Swapping, "were not written there"),
        (Mode::RolledBack, "older state"),
        (Mode::Inventing, "a listing that cannot be"),
    ] {
        let market = Market::new(4, 9);
        let store = market.open();
        let project = ProjectId::generate();
        let register = ObjectKey::other(project, "sweep/seen").unwrap();
        let (key, bytes) = chunk(project, 1, 5000);
        let (other, more) = chunk(project, 2, 5000);
        store.put_batch(vec![(key.clone(), bytes.clone()), (other, more)]).await.unwrap();
        store.put(register.clone(), Bytes::from_static(b"one")).await.unwrap();
        store.settle().await;
        market.providers[1].set(fault);
        store.put(register.clone(), Bytes::from_static(b"two")).await.unwrap();
        store.settle().await;
        for _ in 0..5 {
            assert_eq!(store.get(key.clone(), 5000).await.unwrap(), bytes);
            assert_eq!(store.get(register.clone(), 100).await.unwrap(), "two");
        }
        store.settle().await;
        let members = store.members();
        for (index, member) in members.iter().enumerate() {
            assert_eq!(member.wrong > 0, index == 1, "{fault:?}: {member:?}");
        }
        let told = members[1].last_wrong.clone().unwrap();
        assert!(told.contains(text), "{fault:?}: {told}");
        assert!(members[1].is_suspect && members[1].name == "provider-1");
    }
}

/// A writer dies after any number of its requests; then one provider fails, too. What was answered is there, what was not is
/// there as a whole or not at all, and the next writer goes on.
#[tokio::test(start_paused = true)]
async fn a_writer_may_die_between_any_two_requests() {
    let project = ProjectId::generate();
    let register = ObjectKey::other(project, "sweep/intent").unwrap();
    let (key, bytes) = chunk(project, 1, 4000);
    let mut outcomes = BTreeSet::new();
    for crash_at in 0..40 {
        for seed in 0..4 {
            let whole = Market::new(4, seed);
            whole.open().put(register.clone(), Bytes::from_static(b"zero")).await.unwrap();
            let fuse = Arc::new(Fuse(AtomicI64::new(crash_at)));
            let dying = Market::over(whole.mems.clone(), seed + 10, &fuse).open();
            let done = Arc::new(AtomicU64::new(0));
            let told = done.clone();
            let (key2, bytes2, register2) = (key.clone(), bytes.clone(), register.clone());
            let mut writing = tokio::spawn(async move {
                dying.put_batch(vec![(key2, bytes2)]).await.unwrap();
                told.store(1, Ordering::SeqCst);
                dying.put(register2.clone(), Bytes::from_static(b"one")).await.unwrap();
                told.store(2, Ordering::SeqCst);
                dying.delete(register2.clone()).await.unwrap();
                told.store(3, Ordering::SeqCst);
                dying.put_if_absent(register2, Bytes::from_static(b"three")).await.unwrap();
                told.store(4, Ordering::SeqCst);
                dying.settle().await;
            });
            let _ = tokio::time::timeout(Duration::from_secs(10), &mut writing).await;
            writing.abort();
            let done = done.load(Ordering::SeqCst);
            // Another process, and one of the providers fails.
            let after = Market::over(whole.mems.clone(), seed + 20, &Fuse::long());
            let failing = usize::try_from(seed).unwrap();
            after.providers[failing]
                .set([Mode::Down, Mode::Lying, Mode::Forgetful, Mode::Hanging][(failing + crash_at as usize) % 4]);
            let store = after.open();
            let read = match store.get(key.clone(), 4000).await {
                Ok(read) => Some(read),
                Err(StoreError::NotFound { .. }) => None,
                Err(error) => panic!("{error}"),
            };
            assert!(
                read.as_ref().is_none_or(|read| *read == bytes) && (done == 0 || read.is_some()),
                "{crash_at} {seed}"
            );
            let read = match store.get(register.clone(), 100).await {
                Ok(read) => String::from_utf8(read.to_vec()).unwrap(),
                Err(StoreError::NotFound { .. }) => "-".to_owned(),
                Err(error) => panic!("{error}"),
            };
            let may_be: &[&str] = match done {
                0 => &["zero"],
                1 => &["zero", "one"],
                2 => &["one", "-"],
                3 => &["-", "three"],
                _ => &["three"],
            };
            assert!(may_be.contains(&read.as_str()), "{crash_at} {seed}: {read} after {done}");
            outcomes.insert((done, read.clone()));
            // The next one is not kept from anything, and what it has read once it reads again.
            store.put_batch(vec![(key.clone(), bytes.clone())]).await.unwrap();
            assert_eq!(store.get(key.clone(), 4000).await.unwrap(), bytes);
            store.put(register.clone(), Bytes::from_static(b"four")).await.unwrap();
            assert_eq!(store.get(register.clone(), 100).await.unwrap(), "four");
            assert!(store.delete(register.clone()).await.unwrap());
            assert_eq!(store.put_if_absent(register.clone(), Bytes::new()).await.unwrap(), PutOutcome::Stored);
        }
    }
    assert!(outcomes.len() >= 7, "the crashes met all stages: {outcomes:?}");
}

/// Many processes want the same register; one provider fails, but tells nobody that he was first who was not: exactly one gets it.
#[tokio::test(start_paused = true)]
async fn of_many_processes_one_wins_unless_a_provider_tells_several_that_they_were_first() {
    for (seed, fault) in
        (0..6).flat_map(|seed| FAULTS.map(|fault| (seed, fault))).filter(|(_, fault)| !Provider::is_deaf(*fault))
    {
        let whole = Market::new(4, seed);
        let key = ObjectKey::other(ProjectId::generate(), "sweep/intent").unwrap();
        for round in 0..2 {
            let mut puts = tokio::task::JoinSet::new();
            let failing = usize::try_from(seed).unwrap() % 4;
            for process in 0..4_u64 {
                let market = Market::over(whole.mems.clone(), seed * 50 + process, &Fuse::long());
                market.providers[failing].set(fault);
                let (store, key) = (market.open(), key.clone());
                puts.spawn(async move {
                    let outcome = store.put_if_absent(key, Bytes::from(vec![u8::try_from(process).unwrap()])).await;
                    store.settle().await;
                    (process, outcome.unwrap())
                });
            }
            let outcomes = puts.join_all().await;
            let winners: Vec<u64> =
                outcomes.iter().filter(|(_, outcome)| *outcome == PutOutcome::Stored).map(|(p, _)| *p).collect();
            assert_eq!(winners.len(), 1, "seed {seed}, round {round}, {fault:?}: {outcomes:?}");
            let store = whole.open();
            assert_eq!(store.get(key.clone(), 10).await.unwrap(), [u8::try_from(winners[0]).unwrap()].as_slice());
            assert!(store.delete(key.clone()).await.unwrap());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn more_than_f_that_fail_are_told_and_nothing_is_invented() {
    let market = Market::new(4, 11);
    let store = market.open();
    let project = ProjectId::generate();
    let (key, bytes) = chunk(project, 1, 5000);
    let register = ObjectKey::other(project, "sweep/seen").unwrap();
    store.put(key.clone(), bytes).await.unwrap();
    store.put(register.clone(), Bytes::from_static(b"x")).await.unwrap();
    store.settle().await;
    for fault in [Mode::Down, Mode::Hanging] {
        market.providers[..3].iter().for_each(|provider| provider.set(fault));
        for error in [
            store.get(key.clone(), 5000).await.unwrap_err(),
            store.get(register.clone(), 5000).await.unwrap_err(),
            store.put(register.clone(), Bytes::new()).await.unwrap_err(),
            store.delete(key.clone()).await.unwrap_err(),
            store.list("", None, 10).await.unwrap_err(),
            store.refresh(vec![key.clone()]).await.unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(matches!(error, StoreError::Unreachable { .. }) && text.contains("provider-0"), "{text}");
        }
    }
    market.providers[..3].iter().for_each(|provider| provider.set(Mode::Lying));
    assert!(matches!(store.get(key, 5000).await, Err(StoreError::Damaged { .. })));
}

/// A provider is left for another: the new one is filled while chunks are read and written, and the one that was left is not
/// needed any more.
#[tokio::test(start_paused = true)]
async fn a_member_is_replaced_and_filled() {
    let mut market = Market::new(4, 12);
    let project = ProjectId::generate();
    let all: Vec<_> = (0..80).map(|i| chunk(project, i, 3000)).collect();
    let register = ObjectKey::other(project, "sweep/seen").unwrap();
    {
        let store = market.open();
        store.put_batch(all.clone()).await.unwrap();
        store.put(register.clone(), Bytes::from_static(b"kept")).await.unwrap();
        store.settle().await;
    }
    // Its disk is damaged in places, and another one is new.
    market.mems[1]
        .objects
        .lock()
        .unwrap()
        .values_mut()
        .step_by(7)
        .for_each(|bytes| *bytes = Bytes::from_static(b"rot"));
    market.mems[2] = Arc::new(MemStore::default());
    let market = Market::over(market.mems, 13, &Fuse::long());
    let store = market.open();
    let (more, bytes) = chunk(project, 500, 3000);
    let (mending, ()) =
        tokio::join!(async { store.mend_all(&crate::volume::FetchLimit::default(), |_| ()).await.unwrap() }, async {
            store.put(more.clone(), bytes.clone()).await.unwrap();
            for (key, bytes) in all.iter().rev() {
                assert_eq!(store.get(key.clone(), 3000).await.unwrap(), bytes);
            }
        });
    assert!(mending.objects >= 81 && mending.unreadable == 0 && mending.unanswered == 0, "{mending:?}");
    assert!(mending.mended >= 80 + 80 / 7, "{mending:?}");
    assert_eq!(store.mend_all(&crate::volume::FetchLimit::default(), |_| ()).await.unwrap().mended, 0, "all is well");
    // Without two of the old ones, the new one and a mended one are enough.
    assert!(store.members()[2].mended >= 80);
    let rest = Market::over(market.mems.clone(), 14, &Fuse::long());
    rest.providers[0].set(Mode::Down);
    let store = rest.open();
    for (key, bytes) in &all {
        let pieces: Vec<usize> = (0..4).filter(|i| rest.mems[*i].objects.lock().unwrap().contains_key(key)).collect();
        assert_eq!(pieces, [0, 1, 2, 3]);
        assert_eq!(store.get(key.clone(), 3000).await.unwrap(), bytes);
    }
    assert_eq!(store.get(register, 100).await.unwrap(), "kept");
}
