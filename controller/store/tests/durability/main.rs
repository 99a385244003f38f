//! What is acknowledged survives: a writer in a child process tells over a pipe what was acknowledged to it, and is
//! killed at a random moment; what is left on the disk must hold all of it.
//!
//! `kill -9` leaves the page cache as it is, so a second test also takes away everything that was not synced
//! (`powercut.c`), and a third damages the files. `SUPERCLOUD_SOAK_ROUNDS` sets how often each kills.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use supercloud_store::{
    Condition, Key, Prefix, SledOptions, SledStore, Store, StoreError, Txn, TxnOutcome, Value, WatchItem,
    conformance::Rng, list,
};

const WRITERS: u64 = 4;
const SLOTS: u64 = 40;
const CHILD_DIR: &str = "STORE_DURABILITY_DIR";

fn options() -> SledOptions {
    let mut options = SledOptions::default();
    // Small, so that dropping history is part of what is killed.
    options.history_revisions = 300;
    options
}

fn key(path: &str) -> Key {
    Key::new(path).expect("a key")
}

/// A number with padding of a size that depends on it: some values span many log entries.
fn padded(number: u64) -> Value {
    let padding = if number.is_multiple_of(97) { 200_000 } else { (number * 7919) % 3000 };
    let mut text = format!("{number} ");
    text.extend(std::iter::repeat_n('.', usize::try_from(padding).expect("small")));
    Value::new(text).expect("a value")
}

fn number(value: &Value) -> u64 {
    let text = std::str::from_utf8(value.as_bytes()).expect("text");
    let number = text.split(' ').next().expect("a word").parse().expect("a number");
    assert_eq!(*value, padded(number), "the value is whole");
    number
}

/// Not a test by itself: the writer that the others start and kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_writer() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let store = std::sync::Arc::new(SledStore::open(PathBuf::from(dir), options()).await.unwrap());
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let store = std::sync::Arc::clone(&store);
        writers.spawn(async move {
            let last = key(&format!("w/{writer}/last"));
            let found = store.get(last.clone()).await.unwrap();
            let (mut count, mut revision) = found.map_or((0, 0), |f| (number(&f.value), f.mod_revision));
            loop {
                count += 1;
                let txn = Txn::new()
                    .require(last.clone(), Condition::ModRevisionIs(revision))
                    .put(last.clone(), padded(count))
                    .put(key(&format!("w/{writer}/slot/{:03}", count % SLOTS)), padded(count))
                    .delete(key(&format!("w/{writer}/slot/{:03}", (count + 5) % SLOTS)));
                let TxnOutcome::Committed { revision: committed } = store.txn(txn).await.unwrap() else {
                    panic!("nobody else writes this key");
                };
                revision = committed;
                // One write call for a whole line.
                let line = format!("\nack {writer} {count} {revision}\n");
                std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
            }
        });
    }
    writers.join_next().await.unwrap().unwrap();
}

/// How often to kill: few times by default.
fn rounds(default: u32) -> u32 {
    match std::env::var("SUPERCLOUD_SOAK_ROUNDS") {
        Ok(text) => text.parse().expect("SUPERCLOUD_SOAK_ROUNDS is a number"),
        Err(_) => default,
    }
}

struct Acks {
    /// For each writer: its last acknowledged number.
    counts: BTreeMap<u64, u64>,
    revision: u64,
}

fn spawn(dir: &Path, extra: &[(&str, &Path)]) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args(["--exact", "child_writer", "--nocapture"]).env(CHILD_DIR, dir);
    command.envs(extra.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped());
    command.spawn().expect("the child starts")
}

/// Lets the child write, kills it some acknowledgements and microseconds later, returns what was acknowledged.
fn run_and_kill(mut child: Child, rng: &mut Rng) -> Acks {
    let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let (send, lines) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        // Ends with the pipe. A line that the kill cut off has no end and is not one.
        for line in stdout.split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    let mut acks = Acks { counts: BTreeMap::new(), revision: 0 };
    let take = |acks: &mut Acks, line: &str| {
        let mut words = line.split(' ');
        let is_ack = words.next() == Some("ack");
        let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        // A cut-off line ends in a smaller revision than a whole one; harmless, since it only weakens the check.
        if let (true, [writer, count, revision]) = (is_ack, numbers.as_slice()) {
            acks.counts.insert(*writer, *count);
            acks.revision = acks.revision.max(*revision);
        }
        is_ack
    };
    let most = if rng.below(8) == 0 { 3000 } else { 300 };
    let mut wanted = 1 + rng.below(most);
    while wanted > 0 {
        let line = lines.recv_timeout(Duration::from_secs(60)).expect("the child acknowledges");
        wanted -= usize::from(take(&mut acks, &line));
    }
    #[expect(
        clippy::disallowed_methods,
        reason = "a thread of the test's own; the moment of the kill is to be random"
    )]
    std::thread::sleep(Duration::from_micros(rng.bits() % 5000));
    child.kill().expect("the child is killed");
    child.wait().expect("the child is gone");
    lines.iter().for_each(|line| {
        take(&mut acks, &line);
    });
    reader.join().expect("the reader ends");
    acks
}

/// Everything acknowledged is there, and every transaction is whole. Opening checks the store's own structure.
async fn check(dir: &Path, acks: &Acks) -> u64 {
    let store = SledStore::open(dir, options()).await.expect("the store opens");
    let (_, revision) = list(&store, &Prefix::all()).await.expect("list");
    assert!(revision >= acks.revision, "revision {} was acknowledged, the store is at {revision}", acks.revision);
    let mut total = 0;
    for (writer, acknowledged) in &acks.counts {
        let last = store.get(key(&format!("w/{writer}/last"))).await.expect("get").expect("it was written");
        let count = number(&last.value);
        // At most one more was under way.
        assert!((*acknowledged..=acknowledged + 1).contains(&count), "writer {writer}: {acknowledged}, has {count}");
        let (slots, _) =
            list(&store, &Prefix::new(format!("w/{writer}/slot/")).expect("a prefix")).await.expect("list");
        let mut slots: Vec<u64> = slots.iter().map(|slot| number(&slot.value)).collect();
        slots.sort_unstable();
        // Each put takes one slot and clears the one five ahead.
        let expected: Vec<u64> = (count.saturating_sub(SLOTS - 6).max(1)..=count).collect();
        assert_eq!(slots, expected, "writer {writer}");
        total += acknowledged;
    }
    let oldest = revision.saturating_sub(200).max(2);
    let mut watch = store.watch(Prefix::all(), oldest);
    for expected in oldest..=revision {
        let item = futures::StreamExt::next(&mut watch).await.expect("an item").expect("no error");
        assert!(matches!(item, WatchItem::Changes { revision, .. } if revision == expected), "{item:?}");
    }
    store.close().await;
    total
}

#[tokio::test]
async fn kill_dash_nine_loses_nothing_acknowledged() {
    let mut rng = Rng::from_env("kill_dash_nine_loses_nothing_acknowledged", 0x9111);
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let mut total = 0;
    for _ in 0..rounds(12) {
        let acks = run_and_kill(spawn(&store, &[]), &mut rng);
        total = check(&store, &acks).await;
    }
    println!("{total} acknowledged transactions, none lost");
}

#[tokio::test]
async fn a_power_cut_loses_nothing_acknowledged() {
    let mut rng = Rng::from_env("a_power_cut_loses_nothing_acknowledged", 0x9c07);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let (library, source) = (dir.join("powercut.so"), dir.join("powercut.c"));
    fs::write(&source, include_str!("powercut.c")).unwrap();
    let mut compile = Command::new("cc");
    compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl");
    match compile.status() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            assert!(
                std::env::var_os("SUPERCLOUD_REQUIRE").is_none(),
                "SUPERCLOUD_REQUIRE is set, but there is no C compiler"
            );
            println!("skipped: no C compiler (cc) to build the power-cut library with");
            return;
        }
        status => assert!(status.unwrap().success(), "the power-cut library compiles"),
    }
    let (mut store, mut total) = (dir.join("0"), 0);
    for round in 1..=rounds(10) {
        let shadow = dir.join(round.to_string());
        if store.exists() {
            copy_folder(&store, &shadow);
        } else {
            fs::create_dir(&shadow).unwrap();
        }
        let extra: [(&str, &Path); 3] =
            [("LD_PRELOAD", &library), ("POWERCUT_DIR", &store), ("POWERCUT_SHADOW", &shadow)];
        let acks = run_and_kill(spawn(&store, &extra), &mut rng);
        // All that was not synced is lost, or a random part of it.
        if rng.below(2) == 0 {
            mix(&store.join("sled/db"), &shadow.join("sled/db"), &mut rng);
        }
        total = check(&shadow, &acks).await;
        fs::remove_dir_all(&store).unwrap();
        store = shadow;
    }
    println!("{total} acknowledged transactions, none lost");
}

/// Lets a random part of what was written but not synced reach the disk after all.
fn mix(written: &Path, synced: &Path, rng: &mut Rng) {
    let (written, mut mixed) = (fs::read(written).expect("read"), fs::read(synced).expect("read"));
    if rng.below(2) == 0 {
        mixed.resize(written.len(), 0);
    }
    for (new, old) in written.chunks(4096).zip(mixed.chunks_mut(4096)) {
        if new.len() == old.len() && rng.below(2) == 0 {
            old.copy_from_slice(new);
        }
    }
    fs::write(synced, mixed).expect("write");
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_folder(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("a copy");
        }
    }
}

/// A damaged store opens with all its content or says that it is damaged; it never opens with less.
#[tokio::test]
async fn damage_is_told_and_never_hidden() {
    let mut rng = Rng::from_env("damage_is_told_and_never_hidden", 0xda3a);
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good");
    let store = SledStore::open(&good, options()).await.unwrap();
    for i in 0..400_u64 {
        let txn = Txn::new().put(key(&format!("k/{:03}", i % 150)), padded(i));
        store.txn(txn).await.unwrap();
    }
    let content = list(&store, &Prefix::all()).await.unwrap();
    store.close().await;
    let (mut told, mut harmless) = (0, 0);
    for round in 0..rounds(40) {
        let copy = dir.path().join(format!("copy-{round}"));
        copy_folder(&good, &copy);
        let path = copy.join("sled/db");
        let size = fs::metadata(&path).unwrap().len();
        let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        match round % 4 {
            0 => file.set_len(rng.bits() % size).unwrap(),
            kind => {
                let (at, mut bytes) = (rng.bits() % size, [0; 64]);
                let len = if kind == 1 { 1 } else { file.read_at(&mut bytes, at).unwrap() };
                for byte in &mut bytes[..len] {
                    *byte = if kind == 3 { 0 } else { !*byte };
                }
                file.write_all_at(&bytes[..len], at).unwrap();
            }
        }
        match SledStore::open(&copy, options()).await {
            Ok(store) => {
                assert_eq!(list(&store, &Prefix::all()).await.unwrap(), content, "round {round}");
                store.close().await;
                harmless += 1;
            }
            Err(StoreError::Damaged { .. }) => told += 1,
            Err(other) => panic!("round {round}: {other:?}"),
        }
        fs::remove_dir_all(&copy).unwrap();
    }
    println!("{told} damages told, {harmless} harmless");
    assert!(told > 0, "no damage was told");
}
