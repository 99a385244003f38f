//! The agent's back end `kvm` on real processes, with a small program instead of a kernel.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "shared with the library's own tests, which use more of it")]
#[path = "../../../../blanket-drivers/tests/machine/guest.rs"]
mod guest;

#[expect(dead_code, reason = "likewise")]
#[path = "../../../../blanket-drivers/tests/machine/volume.rs"]
mod volume;
#[expect(dead_code, reason = "likewise")]
#[path = "../../../../blanket-drivers/tests/machine/worker.rs"]
mod worker;

#[path = "../support/boot_disk.rs"]
mod boot_disk;
mod disks;
mod lazy;
mod left;
mod mirror;
mod wire;

use std::{
    io::{Read as _, Seek as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use guest::{TALK, elf, runs_guests};
use supercloud_api::frame::read_frame;
use supercloud_blanket::{
    Backend, BackendError, HostArgs, Launch, MachineSpec,
    backend::{BackendEvent, GuestEvent, PauseReason, RunState, StopMode, StopReason},
    device::{Boot, Clock, Console, Disk, GuestDevices},
    host::NbdSocket,
    migrate::{Cookie, CopyLimits, CopyOptions, TransferPhase, Verdict},
};
use supercloud_ids::{Epoch, GuestId};
use supercloud_kvm::{KvmBackend, KvmConfig};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::broadcast,
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A host: a folder, and the back end of the agent that is there now.
struct Host {
    folder: tempfile::TempDir,
    back_end: Arc<KvmBackend>,
    call_budget: Duration,
}

/// A program and something behind it that cannot be compressed: what is sent of a guest is more than a frame.
fn laden(code: &[u8]) -> Vec<u8> {
    let mut word = 1u64;
    let noise = std::iter::repeat_with(|| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    });
    code.iter().copied().chain(noise.take(32 << 10).flatten()).collect()
}

impl Host {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut image = Vec::new();
        let mut kernel = elf(&laden(TALK));
        kernel.rewind().unwrap();
        kernel.read_to_end(&mut image).unwrap();
        std::fs::write(folder.path().join("kernel"), image).unwrap();
        std::fs::write(folder.path().join("initrd"), b"up.").unwrap();
        let back_end = Arc::new(KvmBackend::open(config(&folder)).await.unwrap());
        Self { folder, back_end, call_budget: Duration::from_secs(15) }
    }

    /// An agent that is killed, and the next one.
    async fn restart(&mut self) {
        let config = KvmConfig { call_budget: self.call_budget, ..config(&self.folder) };
        self.back_end = Arc::new(KvmBackend::open(config).await.unwrap());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn launch(&self, guest: GuestId, epoch: u64) -> Launch {
        let class = self.back_end.capabilities().await.unwrap().classes.remove(0);
        let devices = GuestDevices {
            disks: Vec::new(),
            nics: Vec::new(),
            console: Console::Serial,
            has_rng: true,
            has_balloon: false,
        };
        let boot = Boot::Kernel { has_initrd: true, cmdline: "hello ".to_owned() };
        Launch {
            guest,
            epoch: Epoch(epoch),
            spec: MachineSpec { class, vcpus: 1, memory_bytes: 64 << 20, boot, clock: Clock::Utc, devices },
            host: HostArgs {
                kernel: Some(self.path("kernel")),
                initrd: Some(self.path("initrd")),
                console_socket: Some(self.path("console.sock")),
                console_log: Some(self.path("console.log")),
                ..HostArgs::default()
            },
        }
    }

    async fn started(&self) -> GuestId {
        let guest = GuestId::generate();
        let info = self.back_end.start(self.launch(guest, 1).await).await.unwrap();
        assert_eq!((info.guest, info.epoch, info.state), (guest, Epoch(1), RunState::Running));
        guest
    }

    /// Types a letter and waits for its echo: the guest runs, and is the one that ran before.
    async fn echoes(&self, letter: u8) {
        let mut console = UnixStream::connect(self.path("console.sock")).await.unwrap();
        // Until it is our turn, what is typed may go nowhere; a letter that is echoed twice does no harm.
        let mut heard = [0];
        loop {
            console.write_all(&[letter]).await.unwrap();
            match timeout(Duration::from_secs(2), console.read_exact(&mut heard)).await {
                Ok(Ok(_)) if heard[0] == letter => return,
                Ok(Ok(_)) | Err(_) => {}
                Ok(Err(error)) => panic!("the console: {error}"),
            }
        }
    }

    async fn types(&self, letter: u8) {
        let mut console = UnixStream::connect(self.path("console.sock")).await.unwrap();
        console.write_all(&[letter]).await.unwrap();
        // It hangs up when the guest's process ends or another client comes.
        let _ = timeout(Duration::from_secs(2), console.read_u8()).await;
    }

    async fn state(&self, guest: GuestId) -> Option<RunState> {
        self.back_end.status(guest).await.unwrap().map(|info| info.state)
    }
}

/// No guest outlives its test.
impl Drop for Host {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.path("run")).unwrap() {
            let Ok(text) = std::fs::read(entry.unwrap().path().join("record.json")) else { continue };
            let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
            let pid = libc::pid_t::try_from(record["process"]["pid"].as_i64().unwrap()).unwrap();
            // SAFETY: a plain system call; the record of a process goes when the process does.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

fn config(folder: &tempfile::TempDir) -> KvmConfig {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_supercloud-vmm"));
    // SAFETY: no arguments, and they cannot fail.
    let own = unsafe { (libc::geteuid(), libc::getegid()) };
    KvmConfig::new(program, folder.path().join("run"), own)
}

async fn event(events: &mut broadcast::Receiver<BackendEvent>, wanted: &GuestEvent) {
    let found = async {
        loop {
            if let BackendEvent::Guest { what, .. } = events.recv().await.unwrap()
                && what == *wanted
            {
                return;
            }
        }
    };
    timeout(PATIENCE, found).await.unwrap_or_else(|_| panic!("{wanted:?} did not happen"));
}

/// Whether guests run here; says so if not.
macro_rules! needs_guests {
    ($name:literal) => {
        if !runs_guests($name) {
            return;
        }
    };
}

#[tokio::test]
async fn a_guest_outlives_its_agent_and_tells_how_it_ended() {
    needs_guests!("a_guest_outlives_its_agent_and_tells_how_it_ended");
    let mut host = Host::new().await;
    let guest = host.started().await;
    host.echoes(b'a').await;
    let again = host.launch(guest, 1).await;
    assert!(matches!(host.back_end.start(again).await, Err(BackendError::AlreadyThere { .. })));
    host.restart().await;
    let all = host.back_end.list().await.unwrap();
    assert_eq!(all.iter().map(|info| (info.guest, info.state)).collect::<Vec<_>>(), [(guest, RunState::Running)]);
    host.echoes(b'b').await;
    assert!(host.back_end.memory_stats(guest).await.unwrap().resident_bytes > Some(0));
    host.back_end.pause(guest).await.unwrap();
    assert_eq!(host.state(guest).await, Some(RunState::Paused(PauseReason::Asked)));
    host.back_end.resume(guest, Epoch(2)).await.unwrap();
    assert_eq!(host.back_end.status(guest).await.unwrap().unwrap().epoch, Epoch(2));
    let mut events = host.back_end.events();
    host.types(b'r').await;
    event(&mut events, &GuestEvent::Rebooted).await;
    host.echoes(b'c').await;
    host.back_end.reset(guest).await.unwrap();
    event(&mut events, &GuestEvent::Rebooted).await;
    host.echoes(b'c').await;
    host.types(b'o').await;
    event(&mut events, &GuestEvent::Stopped(StopReason::PoweredOff)).await;
    assert_eq!((host.state(guest).await, host.back_end.list().await.unwrap()), (None, Vec::new()));
    assert_eq!(host.back_end.how_it_ended(guest).await.unwrap(), Some(StopReason::PoweredOff));
    let said = std::fs::read_to_string(host.path("console.log")).unwrap();
    assert_eq!(said.matches("hello up.").count(), 3, "{said}");
    // It powers off while no agent is there: the next one tells.
    host.started_as(guest).await;
    assert_eq!(host.back_end.how_it_ended(guest).await.unwrap(), None);
    host.echoes(b'd').await;
    host.types(b'o').await;
    host.restart().await;
    let gone = async {
        while host.state(guest).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    assert_eq!(host.back_end.how_it_ended(guest).await.unwrap(), Some(StopReason::PoweredOff));
}

impl Host {
    async fn started_as(&self, guest: GuestId) {
        self.back_end.start(self.launch(guest, 3).await).await.unwrap();
    }
}

#[tokio::test]
async fn a_process_that_is_killed_is_seen_by_this_agent_or_the_next() {
    needs_guests!("a_process_that_is_killed_is_seen_by_this_agent_or_the_next");
    let mut host = Host::new().await;
    for next in [false, true] {
        let guest = host.started().await;
        let mut events = host.back_end.events();
        let pid = host.back_end.status(guest).await.unwrap().unwrap().pid.unwrap();
        // SAFETY: a plain system call; the process is the guest's.
        unsafe { libc::kill(libc::pid_t::try_from(pid).unwrap(), libc::SIGKILL) };
        if next {
            host.restart().await;
        } else {
            event(&mut events, &GuestEvent::Stopped(StopReason::Crashed)).await;
        }
        let gone = async {
            while host.state(guest).await.is_some() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, gone).await.unwrap();
        assert_eq!(host.back_end.how_it_ended(guest).await.unwrap(), Some(StopReason::Crashed));
    }
    // A program that does not listen for its power button is ended when the time is over.
    let guest = host.started().await;
    host.back_end.stop(guest, StopMode::Graceful { budget: Duration::from_millis(200) }).await.unwrap();
    assert_eq!((host.state(guest).await, host.back_end.list().await.unwrap()), (None, Vec::new()));
    let guest = host.started().await;
    host.back_end.stop(guest, StopMode::Kill).await.unwrap();
    host.back_end.stop(guest, StopMode::Kill).await.unwrap();
    assert_eq!(host.back_end.how_it_ended(guest).await.unwrap(), Some(StopReason::Killed));
}

/// What one guest's process does keeps no agent from starting, and no other guest from being found.
#[tokio::test]
async fn an_agent_starts_whatever_a_guests_process_does() {
    needs_guests!("an_agent_starts_whatever_a_guests_process_does");
    let mut host = Host::new().await;
    let silent = host.started().await;
    let pid = host.back_end.status(silent).await.unwrap().unwrap().pid.unwrap();
    let signal = |signal| {
        // SAFETY: a plain system call; the process is the guest's.
        unsafe { libc::kill(libc::pid_t::try_from(pid).unwrap(), signal) };
    };
    let garbled = host.started().await;
    let record = host.path("run").join(garbled.to_string()).join("record.json");
    let good = std::fs::read(&record).unwrap();
    let talks = host.started().await;
    signal(libc::SIGSTOP);
    std::fs::write(&record, b"{\"version\": 99}").unwrap();
    host.call_budget = Duration::from_millis(500);
    host.restart().await;
    assert_eq!(host.state(talks).await, Some(RunState::Running));
    // They may well run: whoever asks is not told that they are gone.
    assert!(matches!(host.back_end.status(silent).await, Err(BackendError::Deadline { .. })));
    assert!(host.back_end.status(garbled).await.unwrap_err().to_string().contains("record"));
    assert!(host.back_end.start(host.launch(garbled, 2).await).await.is_err());
    assert!(host.back_end.stop(garbled, StopMode::Kill).await.is_err());
    signal(libc::SIGCONT);
    let answers = async {
        while host.back_end.status(silent).await.is_err() {}
        host.state(silent).await
    };
    assert_eq!(timeout(PATIENCE, answers).await.unwrap(), Some(RunState::Running));
    std::fs::write(&record, good).unwrap();
    host.restart().await;
    assert_eq!(host.state(garbled).await, Some(RunState::Running));
}

#[tokio::test]
async fn what_is_lacking_or_away_is_named_and_leaves_nothing() {
    needs_guests!("what_is_lacking_or_away_is_named_and_leaves_nothing");
    let host = Host::new().await;
    let guest = GuestId::generate();
    let good = host.launch(guest, 1).await;
    type Spoil = fn(&mut Launch);
    let cases: [(&str, Spoil); 8] = [
        ("balloon", |launch| {
            launch.spec.devices.has_balloon = true;
            launch.spec.class.machine_version = "1".to_owned();
        }),
        ("kvm/kvm/3", |launch| launch.spec.class.machine_version = "3".to_owned()),
        ("/nowhere/nbd", |launch| launch.spec.boot = Boot::Disk),
        ("host-other", |launch| launch.spec.class.cpu_baseline = "host-other".to_owned()),
        ("libvirt-qemu", |launch| launch.spec.class.back_end = "libvirt-qemu".to_owned()),
        ("/nowhere/kernel", |launch| launch.host.kernel = Some("/nowhere/kernel".into())),
        ("/dev/null", |launch| launch.host.initrd = Some("/dev/null/initrd".into())),
        ("/nowhere/nbd", |launch| {
            launch
                .host
                .disks
                .insert("root".to_owned(), NbdSocket { socket: "/nowhere/nbd".into(), export: String::new() });
        }),
    ];
    for (word, spoil) in cases {
        let mut launch = good.clone();
        launch.spec.devices.disks.push(Disk { name: "root".to_owned(), is_read_only: false });
        let nbd = NbdSocket { socket: "/nowhere/nbd".into(), export: String::new() };
        launch.host.disks.insert("root".to_owned(), nbd);
        spoil(&mut launch);
        let said = host.back_end.start(launch).await.unwrap_err().to_string();
        assert!(said.contains(word), "{said} should name {word}");
        assert_eq!((host.state(guest).await, host.back_end.list().await.unwrap()), (None, Vec::new()));
    }
    // A server that is no volume process: the guest's own process says so.
    let mut launch = good.clone();
    launch.spec.devices.disks.push(Disk { name: "root".to_owned(), is_read_only: false });
    let (socket, export) = (host.path("nbd.sock"), String::new());
    let server = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move { server.accept().await.unwrap().0.write_all(&[b'x'; 64]).await });
    launch.host.disks.insert("root".to_owned(), NbdSocket { socket, export });
    let said = host.back_end.start(launch).await.unwrap_err().to_string();
    assert!(said.contains("disk 'root'") || said.contains("NBD"), "{said}");
    host.back_end.start(good).await.unwrap();
}

/// Carries a stream from one agent to the other, as the agents do; cut off after so many bytes.
async fn carry(from: UnixListener, to: PathBuf, most: u64) {
    let (mut here, _) = from.accept().await.unwrap();
    let mut there = UnixStream::connect(to).await.unwrap();
    let _ = tokio::io::copy(&mut (&mut here).take(most), &mut there).await;
    if most < u64::MAX {
        return;
    }
    // Held until somebody drops it.
    std::future::pending::<()>().await;
}

struct Move {
    source: Host,
    destination: Host,
    guest: GuestId,
    carrier: tokio::task::JoinHandle<()>,
}

impl Move {
    /// Up to where memory can be copied.
    async fn prepared(most: u64) -> (Self, supercloud_blanket::migrate::Cookie) {
        let (source, destination) = (Host::new().await, Host::new().await);
        let guest = source.started().await;
        source.echoes(b'a').await;
        let moves = source.back_end.live_migration().unwrap();
        let cookie = moves.begin(guest).await.unwrap();
        let launch = destination.launch(guest, 2).await;
        let listen = destination.path("in.sock");
        let cookie =
            destination.back_end.live_migration().unwrap().prepare(launch, cookie, listen.clone()).await.unwrap();
        assert_eq!(destination.state(guest).await, Some(RunState::Paused(PauseReason::Incoming)));
        let listener = UnixListener::bind(source.path("out.sock")).unwrap();
        let carrier = tokio::spawn(carry(listener, listen, most));
        (Self { source, destination, guest, carrier }, cookie)
    }

    async fn performed() -> Self {
        let (it, cookie) = Self::prepared(u64::MAX).await;
        let options = CopyOptions { max_downtime_ms: Some(2000), ..CopyOptions::default() };
        let moves = it.source.back_end.live_migration().unwrap();
        let transfer = moves.perform(it.guest, cookie, it.source.path("out.sock"), options).unwrap();
        let performed = timeout(PATIENCE, transfer.done).await.unwrap().unwrap();
        assert_eq!(transfer.progress.borrow().phase, TransferPhase::Done);
        assert!(performed.progress.memory_processed_bytes > 0);
        assert_eq!(it.source.state(it.guest).await, Some(RunState::Paused(PauseReason::Departed)));
        assert!(matches!(it.source.back_end.resume(it.guest, Epoch(1)).await, Err(BackendError::WrongState { .. })));
        let info =
            it.destination.back_end.live_migration().unwrap().complete(it.guest, performed.cookie).await.unwrap();
        assert_eq!(info.state, RunState::Paused(PauseReason::Arrived));
        it.carrier.abort();
        it
    }
}

#[tokio::test]
async fn a_guest_moves_and_the_decision_is_the_callers() {
    needs_guests!("a_guest_moves_and_the_decision_is_the_callers");
    let it = Move::performed().await;
    it.destination.back_end.resume(it.guest, Epoch(2)).await.unwrap();
    it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Release).await.unwrap();
    it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Release).await.unwrap();
    assert_eq!(it.source.back_end.how_it_ended(it.guest).await.unwrap(), Some(StopReason::Departed));
    it.destination.echoes(b'b').await;
    let said = std::fs::read_to_string(it.destination.path("console.log")).unwrap();
    assert!(!said.contains("hello"), "it was not booted anew: {said}");
    let refused = it.destination.back_end.live_migration().unwrap().discard(it.guest).await;
    assert!(matches!(refused, Err(BackendError::WrongState { .. })));

    let it = Move::performed().await;
    it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Keep).await.unwrap();
    it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Keep).await.unwrap();
    it.destination.back_end.live_migration().unwrap().discard(it.guest).await.unwrap();
    it.destination.back_end.live_migration().unwrap().discard(it.guest).await.unwrap();
    assert_eq!(it.destination.state(it.guest).await, None);
    it.source.echoes(b'b').await;
}

#[tokio::test]
async fn a_host_that_was_not_upgraded_gets_a_stream_that_it_reads() {
    needs_guests!("a_host_that_was_not_upgraded_gets_a_stream_that_it_reads");
    // What an agent of before says, and what one of now does.
    for (cookie, version) in [(Some(&br#"{"version":1,"fetches":true}"#[..]), 1), (None, 2)] {
        let (it, now) = Move::prepared(0).await;
        let cookie = cookie.map_or(now, |cookie| Cookie::new(cookie.to_vec()).unwrap());
        let listener = UnixListener::bind(it.source.path("through.sock")).unwrap();
        let to = it.destination.path("in.sock");
        let carrier = tokio::spawn(async move {
            let (mut here, _) = listener.accept().await.unwrap();
            let mut there = UnixStream::connect(to).await.unwrap();
            let hello = read_frame(&mut here).await.unwrap();
            let pages = read_frame(&mut here).await.unwrap();
            for frame in [&hello, &pages] {
                there.write_all(&frame.to_bytes().unwrap()).await.unwrap();
            }
            let _ = tokio::io::copy(&mut here, &mut there).await;
            (hello.version, pages.kind)
        });
        let options = CopyOptions { max_downtime_ms: Some(2000), ..CopyOptions::default() };
        let moves = it.source.back_end.live_migration().unwrap();
        let transfer = moves.perform(it.guest, cookie, it.source.path("through.sock"), options).unwrap();
        let performed = timeout(PATIENCE, transfer.done).await.unwrap().unwrap();
        let there = it.destination.back_end.live_migration().unwrap();
        there.complete(it.guest, performed.cookie).await.unwrap();
        it.destination.back_end.resume(it.guest, Epoch(2)).await.unwrap();
        moves.confirm(it.guest, Verdict::Release).await.unwrap();
        it.destination.echoes(b'b').await;
        let kind = if version == 1 { 2 } else { 9 };
        assert_eq!(timeout(PATIENCE, carrier).await.unwrap().unwrap(), (version, kind));
    }
}

#[tokio::test]
async fn agents_that_are_killed_in_the_middle_lose_nothing() {
    needs_guests!("agents_that_are_killed_in_the_middle_lose_nothing");
    // Both, when everything is across.
    let mut it = Move::performed().await;
    it.source.restart().await;
    it.destination.restart().await;
    assert_eq!(it.source.state(it.guest).await, Some(RunState::Paused(PauseReason::Departed)));
    assert_eq!(it.destination.state(it.guest).await, Some(RunState::Paused(PauseReason::Arrived)));
    it.destination.back_end.resume(it.guest, Epoch(2)).await.unwrap();
    it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Release).await.unwrap();
    it.destination.echoes(b'b').await;

    // The destination's, when nothing has come: what was only prepared is gone.
    let (mut it, _) = Move::prepared(u64::MAX).await;
    it.destination.restart().await;
    let gone = async {
        while it.destination.state(it.guest).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
    it.source.echoes(b'b').await;

    // The carrier, in the middle.
    let (it, cookie) = Move::prepared(2000).await;
    let moves = it.source.back_end.live_migration().unwrap();
    // What is sent fits into buffers, all of it: slowly, so that it is not sent before the carrier is gone.
    let slow = CopyOptions { bandwidth_bytes_per_s: Some(20_000), ..CopyOptions::default() };
    let transfer = moves.perform(it.guest, cookie.clone(), it.source.path("out.sock"), slow).unwrap();
    let failed = timeout(PATIENCE, transfer.done).await.unwrap();
    assert!(matches!(failed, Err(BackendError::Failed { .. })), "{failed:?}");
    it.source.echoes(b'b').await;
    moves.confirm(it.guest, Verdict::Keep).await.unwrap();
    let failed = it.destination.back_end.live_migration().unwrap().complete(it.guest, cookie).await;
    assert!(failed.is_err(), "{failed:?}");
    assert_eq!(it.destination.state(it.guest).await, None);
}

#[tokio::test]
async fn a_copy_can_be_slowed_down_and_cancelled() {
    needs_guests!("a_copy_can_be_slowed_down_and_cancelled");
    let (it, cookie) = Move::prepared(u64::MAX).await;
    let moves = it.source.back_end.live_migration().unwrap();
    let slow = CopyOptions { bandwidth_bytes_per_s: Some(1000), ..CopyOptions::default() };
    let mut transfer = moves.perform(it.guest, cookie, it.source.path("out.sock"), slow).unwrap();
    let mut progress = transfer.progress.clone();
    let watch = async { progress.wait_for(|seen| seen.phase == TransferPhase::Copy).await.map(|seen| *seen).unwrap() };
    let seen = tokio::select! {
        seen = watch => seen,
        ended = &mut transfer.done => panic!("{ended:?}"),
    };
    assert!(seen.memory_total_bytes == 64 << 20 && seen.memory_remaining_bytes > 0, "{seen:?}");
    moves
        .set_limits(
            it.guest,
            CopyLimits { bandwidth_bytes_per_s: Some(2000), max_downtime_ms: Some(9), ..CopyLimits::default() },
        )
        .await
        .unwrap();
    moves.cancel(it.guest).await.unwrap();
    let ended = timeout(PATIENCE, transfer.done).await.unwrap();
    assert!(matches!(ended, Err(BackendError::Cancelled { .. })), "{ended:?}");
    moves.cancel(it.guest).await.unwrap();
    it.source.echoes(b'b').await;
}

#[tokio::test]
async fn a_guest_that_waits_for_others_runs_on_until_it_is_told() {
    needs_guests!("a_guest_that_waits_for_others_runs_on_until_it_is_told");
    let (it, cookie) = Move::prepared(u64::MAX).await;
    let moves = it.source.back_end.live_migration().unwrap();
    assert!(moves.takes_holds());
    let held = CopyOptions { max_downtime_ms: Some(2000), holds: true, ..CopyOptions::default() };
    let mut transfer = moves.perform(it.guest, cookie, it.source.path("out.sock"), held).unwrap();
    let mut progress = transfer.progress.clone();
    let rounds = async {
        let ready = progress.wait_for(|seen| seen.is_holding).await.map(|seen| *seen).unwrap();
        // It says something, which is memory that it writes, and that goes over, too.
        it.source.echoes(b'b').await;
        progress.wait_for(|seen| seen.iteration >= ready.iteration + 3).await.map(|seen| (ready, *seen)).unwrap()
    };
    let (ready, later) = tokio::select! {
        seen = timeout(PATIENCE, rounds) => seen.unwrap(),
        ended = &mut transfer.done => panic!("it did not wait: {ended:?}"),
    };
    assert_eq!((ready.phase, later.phase, later.is_holding), (TransferPhase::Copy, TransferPhase::Copy, true));
    assert_eq!(it.source.state(it.guest).await, Some(RunState::Running));
    let told = CopyLimits { holds: Some(false), ..CopyLimits::default() };
    moves.set_limits(it.guest, told).await.unwrap();
    let performed = timeout(PATIENCE, transfer.done).await.unwrap().unwrap();
    let there = it.destination.back_end.live_migration().unwrap();
    there.complete(it.guest, performed.cookie).await.unwrap();
    it.destination.back_end.resume(it.guest, Epoch(2)).await.unwrap();
    moves.confirm(it.guest, Verdict::Release).await.unwrap();
    it.destination.echoes(b'c').await;

    // Who waits can be called off.
    let (it, cookie) = Move::prepared(u64::MAX).await;
    let moves = it.source.back_end.live_migration().unwrap();
    let held = CopyOptions { max_downtime_ms: Some(2000), holds: true, ..CopyOptions::default() };
    let mut transfer = moves.perform(it.guest, cookie, it.source.path("out.sock"), held).unwrap();
    let mut progress = transfer.progress.clone();
    tokio::select! {
        seen = timeout(PATIENCE, progress.wait_for(|seen| seen.is_holding)) => drop(seen.unwrap().unwrap()),
        ended = &mut transfer.done => panic!("it did not wait: {ended:?}"),
    }
    moves.cancel(it.guest).await.unwrap();
    let ended = timeout(PATIENCE, transfer.done).await.unwrap();
    assert!(matches!(ended, Err(BackendError::Cancelled { .. })), "{ended:?}");
    it.source.echoes(b'b').await;
}

#[tokio::test]
async fn a_guest_is_frozen_into_a_file_and_thawed_elsewhere() {
    needs_guests!("a_guest_is_frozen_into_a_file_and_thawed_elsewhere");
    let mut host = Host::new().await;
    let guest = host.started().await;
    host.echoes(b'a').await;
    let file = host.path("frozen");
    assert_eq!(host.back_end.frozen_in(file.clone()).await.unwrap(), None);
    let frozen = timeout(PATIENCE, host.back_end.freeze(guest, file.clone()).unwrap().done).await.unwrap().unwrap();
    assert_eq!(host.state(guest).await, None);
    assert_eq!(host.back_end.how_it_ended(guest).await.unwrap(), Some(StopReason::Frozen));
    assert_eq!(host.back_end.frozen_in(file.clone()).await.unwrap(), Some(frozen.clone()));
    let other = Host::new().await;
    let refused = other.back_end.thaw(other.launch(guest, 2).await, file.clone(), "other/1".to_owned()).await;
    assert!(refused.unwrap_err().to_string().contains("other/1"));
    let broken = other.path("broken");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&broken, &bytes[..bytes.len() - 40]).unwrap();
    assert!(other.back_end.thaw(other.launch(guest, 2).await, broken, frozen.format.clone()).await.is_err());
    assert_eq!(other.state(guest).await, None);
    assert_eq!(frozen.format, "supercloud-kvm-image/1");
    // What agents of before froze is a stream, and taken too; what the stream says of itself is what counts.
    let streamed = other.path("streamed");
    supercloud_blanket::vmm::travel::image::send(
        &std::fs::File::open(&file).unwrap(),
        std::fs::File::create(&streamed).unwrap(),
    )
    .unwrap();
    let found = other.back_end.frozen_in(streamed.clone()).await.unwrap().unwrap();
    assert_eq!(found.format, "supercloud-kvm-stream/2");
    let format = "supercloud-kvm-stream/1".to_owned();
    let info = other.back_end.thaw(other.launch(guest, 2).await, streamed, format).await.unwrap();
    assert_eq!((info.state, info.epoch), (RunState::Paused(PauseReason::Arrived), Epoch(2)));
    other.back_end.resume(guest, Epoch(2)).await.unwrap();
    other.echoes(b'b').await;

    // A file that is there is not overwritten, and the guest runs on; so it does after a freeze that was broken off.
    let guest = host.started().await;
    let taken = timeout(PATIENCE, host.back_end.freeze(guest, file).unwrap().done).await.unwrap();
    assert!(matches!(taken, Err(BackendError::File { .. })), "{taken:?}");
    let nowhere = timeout(PATIENCE, host.back_end.freeze(guest, "/nowhere/frozen".into()).unwrap().done).await.unwrap();
    assert!(nowhere.is_err());
    host.echoes(b'c').await;
    let transfer = host.back_end.freeze(guest, host.path("second")).unwrap();
    // Its agent dies in the middle: as soon as it is being polled.
    let _ = timeout(Duration::from_millis(5), transfer.done).await;
    host.restart().await;
    let ends = async {
        loop {
            match (host.state(guest).await, host.back_end.frozen_in(host.path("second")).await.unwrap()) {
                (Some(RunState::Running), None) => return true,
                (None, Some(_)) => return false,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    if timeout(PATIENCE, ends).await.unwrap() {
        host.echoes(b'd').await;
    }
}
