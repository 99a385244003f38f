//! A volume process under its own user: what it may, who reaches it, and that it takes over what an earlier one left as root.
//!
//! Needs root (it becomes other users); without it says so and does nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashMap,
    io::{self, Read as _},
    os::unix::{fs::MetadataExt as _, fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use supercloud_agent::{
    accounts::Account,
    durable,
    volumes::{VolumeHome, VolumeRunner},
};
use supercloud_ids::{Epoch, ProjectId, VolumeId};
use supercloud_storage::process::{KeySource, NbdMode, StartRole, VolumeProcessConfig};

/// Numbers that no package takes: what counts is that they differ.
const VOLUME: Account = Account { uid: 61_001, gid: 61_001 };
const QEMU: Account = Account { uid: 61_002, gid: 61_002 };
const STRANGER: Account = Account { uid: 61_003, gid: 61_003 };

fn is_root() -> bool {
    // SAFETY: geteuid takes no arguments and cannot fail.
    let is_root = unsafe { libc::geteuid() } == 0;
    if !is_root {
        assert!(std::env::var_os("SUPERCLOUD_REQUIRE").is_none(), "this test needs root");
        println!("SKIPPED: needs root");
    }
    is_root
}

/// Does `work` as another user: rights are a thread's in Linux, and only the C library makes them the process's.
fn as_user<T: Send + 'static>(user: Account, work: impl FnOnce() -> T + Send + 'static) -> T {
    let done = std::thread::spawn(move || {
        // SAFETY: an empty list of groups, whose pointer is not read.
        let mut codes = vec![unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) }];
        for (call, id) in [(libc::SYS_setresgid, user.gid), (libc::SYS_setresuid, user.uid)] {
            // SAFETY: plain numbers.
            codes.push(unsafe { libc::syscall(call, id, id, id) });
        }
        assert_eq!(codes, [0, 0, 0]);
        work()
    });
    done.join().unwrap()
}

/// Connects and reads the server's greeting; none when it hangs up at once.
fn greeting(path: PathBuf, user: Account) -> io::Result<Option<[u8; 8]>> {
    as_user(user, move || {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut magic = [0; 8];
        match stream.read_exact(&mut magic) {
            Ok(()) => Ok(Some(magic)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    })
}

fn is_denied<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::PermissionDenied)
}

struct World {
    dir: tempfile::TempDir,
    home: VolumeHome,
    runner: VolumeRunner,
}

impl World {
    fn new(user: Account) -> Self {
        let dir = tempfile::Builder::new().prefix("cfd-").tempdir_in("/tmp").unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let volume = VolumeId::generate();
        let home =
            VolumeHome { volume, folder: dir.path().join("volumes").join("v"), run: dir.path().join("run").join("v") };
        for folder in ["volumes", "run"] {
            durable::make_passage(&dir.path().join(folder)).unwrap();
        }
        let program = env!("CARGO_BIN_EXE_supercloud-volume").into();
        Self { dir, home, runner: VolumeRunner { program, user, qemu: QEMU } }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    async fn configure(&self) {
        durable::make_folder(&self.store()).unwrap();
        let config = VolumeProcessConfig {
            volume: self.home.volume,
            project: ProjectId::generate(),
            size_bytes: 8 << 20,
            base: None,
            start: StartRole::Active { epoch: Epoch(1) },
            data_folder: self.home.data(),
            run_folder: self.home.run.clone(),
            store_folder: self.store(),
            key: KeySource::File(self.home.key_file()),
            peer_dial: None,
            chunk_dial: None,
            nbd: NbdMode::Replace,
            nbd_uids: Vec::new(),
            agent_uid: None,
            cache_bytes: 1 << 20,
        };
        self.runner.configure(&self.home, config, "07".repeat(32)).await.unwrap();
    }

    fn process(&self) -> HashMap<String, String> {
        let pid = self.home.pid().expect("the process runs");
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().replace('\t', " ")))
            .collect()
    }

    fn owner(&self, path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().uid()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_process_has_no_rights_and_serves_qemu_alone() {
    if !is_root() {
        return;
    }
    let world = World::new(VOLUME);
    world.configure().await;
    durable::share_store(&world.store(), VOLUME).unwrap();
    world.runner.ensure(&world.home).await.unwrap();

    let process = world.process();
    for id in ["Uid", "Gid"] {
        assert_eq!(process[id], "61001 61001 61001 61001", "{id}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(process[set], "0000000000000000", "{set}");
    }
    assert_eq!((&*process["Groups"], &*process["NoNewPrivs"], &*process["Seccomp"]), ("", "1", "2"));

    let (nbd, home) = (world.home.nbd_socket(), &world.home);
    assert_eq!(greeting(nbd.clone(), QEMU).unwrap().as_ref(), Some(b"NBDMAGIC"));
    assert!(is_denied(&greeting(nbd.clone(), STRANGER)));
    // Past the rights of files: who is in QEMU's group, and the volume processes of others. They are asked who they are.
    let in_group = Account { gid: QEMU.gid, ..STRANGER };
    assert_eq!(greeting(nbd.clone(), in_group).unwrap(), None);
    assert_eq!(greeting(nbd.clone(), VOLUME).unwrap(), None);
    for socket in [home.run.join("control.sock"), home.peer_socket()] {
        for user in [QEMU, STRANGER] {
            assert!(is_denied(&greeting(socket.clone(), user)), "{} for {user:?}", socket.display());
        }
        assert_eq!(greeting(socket, VOLUME).unwrap(), None);
    }
    // Configuration and key are not its to read again.
    for file in [home.folder.join("config.json"), home.key_file()] {
        assert!(is_denied(&as_user(VOLUME, move || std::fs::read(file))));
    }

    // Its work, under the filter: sealing syncs, publishing puts into the store, ending removes the sockets.
    let client = home.client();
    client.seal(Epoch(1)).await.unwrap();
    client.publish(|_, _| {}).await.unwrap();
    // What is there already is made young again.
    client.publish(|_, _| {}).await.unwrap();
    let stored = as_user(VOLUME, {
        let store = world.store();
        move || std::fs::read_dir(store).unwrap().count()
    });
    assert!(stored > 1, "nothing was published");
    world.runner.delete(home).await.unwrap();
    assert!(!home.folder.exists() && !home.run.exists() && home.pid().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_process_left_as_root_is_taken_over() {
    if !is_root() {
        return;
    }
    let mut world = World::new(Account::ROOT);
    world.configure().await;
    world.runner.ensure(&world.home).await.unwrap();
    world.home.client().seal(Epoch(1)).await.unwrap();
    world.home.client().publish(|_, _| {}).await.unwrap();
    assert_eq!(world.process()["Uid"], "0 0 0 0");
    assert_eq!(world.process()["Seccomp"], "2", "the filter does not depend on the user");
    world.home.client().shutdown(false, false).await.unwrap();
    while world.home.pid().is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let journal = std::fs::read_dir(world.home.data()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(world.owner(&journal), 0);

    world.runner.user = VOLUME;
    for _ in 0..2 {
        // Once is enough, and twice does no harm.
        durable::share_store(&world.store(), VOLUME).unwrap();
    }
    let status = world.runner.ensure(&world.home).await.unwrap();
    assert_eq!(status.volume, world.home.volume);
    assert_eq!(world.process()["Uid"], "61001 61001 61001 61001");
    assert_eq!(world.owner(&journal), VOLUME.uid);
    world.home.client().unseal(Epoch(1)).await.unwrap();
    world.home.client().activate(Epoch(2)).await.unwrap();
    world.home.client().seal(Epoch(2)).await.unwrap();
    world.home.client().publish(|_, _| {}).await.unwrap();
    world.runner.delete(&world.home).await.unwrap();
}
