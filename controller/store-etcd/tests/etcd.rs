//! The conformance suite and broken connections, on a real etcd of this machine's packages.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use supercloud_store::{
    Condition, Key, Prefix, Store, StoreError, Txn, TxnOutcome, Value, Versioned, WatchItem, conformance,
};
use supercloud_store_etcd::{EtcdOptions, EtcdStore};

/// An etcd with one member on loopback.
struct Etcd {
    dir: tempfile::TempDir,
    client_port: u16,
    peer_port: u16,
    process: Option<Child>,
}

impl Etcd {
    /// `None`, with the reason printed, where etcd is not installed.
    async fn start() -> Option<Self> {
        let version = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if let Err(e) = version {
            assert!(
                std::env::var_os("SUPERCLOUD_REQUIRE").is_none(),
                "SUPERCLOUD_REQUIRE is set, but etcd cannot be run ({e})"
            );
            println!("skipped: etcd cannot be run ({e}); Debian's package is etcd-server");
            return None;
        }
        for _ in 0..5 {
            // Ports that are free now; somebody can take them before etcd does, then others are tried.
            let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
            let [client_port, peer_port] = listeners.map(|l| l.local_addr().expect("an address").port());
            let dir = tempfile::tempdir().expect("a folder");
            let mut etcd = Self { dir, client_port, peer_port, process: None };
            if etcd.up().await {
                return Some(etcd);
            }
        }
        panic!("etcd does not start");
    }

    fn endpoints(&self) -> [String; 1] {
        [format!("http://127.0.0.1:{}", self.client_port)]
    }

    /// Starts the process and waits until it answers.
    async fn up(&mut self) -> bool {
        let (client, peer) = (self.endpoints().concat(), format!("http://127.0.0.1:{}", self.peer_port));
        let mut command = Command::new("etcd");
        command.args(["--name", "one", "--data-dir"]).arg(self.dir.path().join("data"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("one={peer}")]);
        let log = std::fs::File::create(self.dir.path().join("log")).expect("a log");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.process = Some(command.spawn().expect("etcd runs"));
        for _ in 0..200 {
            let exited = self.process.as_mut().is_some_and(|p| p.try_wait().is_ok_and(|status| status.is_some()));
            if exited {
                return false;
            }
            if EtcdStore::connect(&self.endpoints(), &options("probe")).await.is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// Ends the process without notice.
    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may be gone already.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    fn signal(&self, signal: &str) {
        let id = self.process.as_ref().expect("it runs").id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().expect("kill runs").success());
    }

    /// Stops it, and returns when the last of its threads stands: until then one may answer.
    async fn stop(&self) {
        self.signal("-STOP");
        let tasks = format!("/proc/{}/task", self.process.as_ref().expect("it runs").id());
        // The state is the first word after the name, which is in parentheses.
        let stands = |stat: String| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'));
        for _ in 0..600 {
            let mut states = std::fs::read_dir(&tasks).expect("it runs").filter_map(Result::ok);
            if states.all(|task| std::fs::read_to_string(task.path().join("stat")).is_ok_and(stands)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("etcd does not stop");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn options(namespace: &str) -> EtcdOptions {
    let mut options = EtcdOptions::default();
    namespace.clone_into(&mut options.namespace);
    options
}

fn hurried(namespace: &str) -> EtcdOptions {
    let mut options = options(namespace);
    options.call_budget = Duration::from_secs(1);
    options
}

fn key(path: &str) -> Key {
    Key::new(path).expect("a key")
}

fn put(path: &str, value: &str) -> Txn {
    Txn::new().put(key(path), Value::new(value.to_owned()).expect("a value"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conforms() {
    let Some(etcd) = Etcd::start().await else { return };
    let (endpoints, number) = (etcd.endpoints(), AtomicU32::new(0));
    conformance::run_all(|| {
        // A namespace is a store; one sorts right after the other, so that a range that runs over shows.
        let namespace = format!("n{:03}", number.fetch_add(1, Ordering::Relaxed));
        let endpoints = endpoints.clone();
        Box::pin(async move {
            Arc::new(EtcdStore::connect(&endpoints, &options(&namespace)).await.unwrap()) as Arc<dyn Store>
        })
    })
    .await;
}

#[tokio::test]
async fn namespaces_do_not_see_each_other() {
    let Some(etcd) = Etcd::start().await else { return };
    let mut stores = Vec::new();
    for namespace in ["a", "a/b", "ab", "a0"] {
        let store = EtcdStore::connect(&etcd.endpoints(), &options(namespace)).await.unwrap();
        store.txn(put(&format!("own-{}", stores.len()), namespace)).await.unwrap();
        stores.push(store);
    }
    for (i, store) in stores.iter().enumerate().skip(1) {
        let page = store.range(Prefix::all(), None, 10).await.unwrap();
        let seen: Vec<_> = page.items.iter().map(|item| item.key.as_str().to_owned()).collect();
        assert_eq!(seen, [format!("own-{i}")]);
    }
    // One namespace inside another is part of it, and nothing hides that.
    assert_eq!(stores[0].range(Prefix::all(), None, 10).await.unwrap().items.len(), 2);
}

/// What a caller does about an unknown outcome or an unreachable store: read, then go on.
async fn put_surely(store: &EtcdStore, path: &str, value: &str) -> (u32, u32) {
    let (mut unknown, mut refused) = (0, 0);
    let wanted = Value::new(value.to_owned()).expect("a value");
    loop {
        let txn = put(path, value).require(key(path), Condition::Absent);
        match store.txn(txn).await {
            Ok(TxnOutcome::Committed { .. }) => return (unknown, refused),
            // An attempt whose answer was lost did happen.
            Ok(TxnOutcome::Conflict { current }) => {
                assert!(unknown > 0, "only an unknown outcome explains this");
                assert!(matches!(&current[..], [Some(Versioned { value, version: 1, .. })] if *value == wanted));
                return (unknown, refused);
            }
            Err(e) if e.is_unknown_outcome() => unknown += 1,
            Err(e) if e.is_retryable() => refused += 1,
            Err(e) => panic!("neither retryable nor unknown: {e:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_is_survived() {
    let Some(mut etcd) = Etcd::start().await else { return };
    let store = EtcdStore::connect(&etcd.endpoints(), &hurried("restart")).await.unwrap();
    let start = store.txn(put("first", "x")).await.unwrap().committed().unwrap();
    let watch = store.watch(Prefix::new("k/").unwrap(), start);
    let total = 150;
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        let (mut unknown, mut refused) = (0, 0);
        for i in 0..total {
            let (u, r) = put_surely(&writer, &format!("k/{i:04}"), "v").await;
            (unknown, refused) = (unknown + u, refused + r);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        (unknown, refused)
    });
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        etcd.kill();
        let read = store.get(key("first")).await;
        assert!(matches!(&read, Err(e) if e.is_retryable()), "{read:?}");
        let health = store.health().await;
        assert!(matches!(&health, Err(e) if e.is_retryable()), "{health:?}");
        let written = store.txn(put("other", "x")).await;
        assert!(matches!(&written, Err(e) if e.is_retryable() || e.is_unknown_outcome()), "{written:?}");
        assert!(etcd.up().await, "etcd comes back");
    }
    let (unknown, refused) = writing.await.unwrap();
    println!("{total} puts over 3 restarts: {unknown} unknown outcomes, {refused} refusals");
    assert!(unknown + refused > 0, "the restarts were felt");
    // The watch from before the restarts has each put exactly once, in order.
    let seen = watch.take(total).map(|item| match item {
        Ok(WatchItem::Changes { changes, .. }) => changes.iter().map(|c| c.key().to_string()).collect::<String>(),
        other => panic!("{other:?}"),
    });
    let seen = tokio::time::timeout(Duration::from_secs(60), seen.collect::<Vec<_>>()).await.unwrap();
    assert_eq!(seen, (0..total).map(|i| format!("k/{i:04}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_server_that_hangs_does_not_hang_the_caller() {
    let Some(etcd) = Etcd::start().await else { return };
    let store = EtcdStore::connect(&etcd.endpoints(), &hurried("hang")).await.unwrap();
    store.txn(put("a", "1")).await.unwrap();
    etcd.stop().await;
    let read = store.get(key("a")).await;
    assert!(matches!(&read, Err(e) if e.is_retryable()), "{read:?}");
    let written = store.txn(put("a", "2")).await;
    assert!(matches!(written, Err(StoreError::UnknownOutcome { .. })), "{written:?}");
    // A transaction that only compares has no outcome to be unsure of.
    let compared = store.txn(Txn::new().require(key("a"), Condition::Exists)).await;
    assert!(matches!(&compared, Err(e) if e.is_retryable()), "{compared:?}");
    etcd.signal("-CONT");
    let mut attempts = 0;
    let found = loop {
        match store.get(key("a")).await {
            Ok(found) => break found.unwrap(),
            Err(e) if e.is_retryable() && attempts < 60 => attempts += 1,
            Err(e) => panic!("{e:?}"),
        }
    };
    // Both are allowed; that it is one of them is what "unknown" means.
    assert!([1, 2].contains(&found.version), "{found:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let connected = EtcdStore::connect(&[format!("http://127.0.0.1:{port}")], &hurried("none")).await;
    assert!(matches!(&connected, Err(e) if e.is_retryable()), "{connected:?}");
    let far = EtcdStore::connect(&["http://192.0.2.1:2379".to_owned()], &hurried("none")).await;
    assert!(matches!(far, Err(StoreError::InvalidArgument { .. })), "{far:?}");
}
