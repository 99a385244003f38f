//! Mirrors between real processes, one of which is killed.

mod checkpoint;

use std::{
    io::{Read as _, Seek as _},
    os::unix::net::UnixListener as StdListener,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use supercloud_blanket::{
    Backend as _, BackendError, BackendResult, Launch,
    backend::{PauseReason, RunState, StopMode},
    device::{Boot, Disk, Mac, Nic},
    host::NbdSocket,
    migrate::{Cookie, CopyOptions, Verdict},
    mirror::{MirrorOptions, MirrorProgress, Standing},
    vmm::lease::boot_ms,
};
use supercloud_ids::{Epoch, GuestId};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    Host, PATIENCE,
    guest::{elf, runs_guests},
    volume::{self, Shared, number},
    wire::Wire,
    worker::counting,
};

const DISK_BYTES: usize = 64 << 10;
const PAGES: u32 = 64;

/// A host with a volume process.
struct Place {
    host: Host,
    disk: Shared,
    wire: Option<Wire>,
}

fn kill(pid: u32) {
    // SAFETY: a plain system call; the process is a guest's of this test.
    unsafe { libc::kill(libc::pid_t::try_from(pid).unwrap(), libc::SIGKILL) };
}

impl Place {
    async fn new() -> Self {
        let host = Host::new().await;
        let mut image = Vec::new();
        let mut kernel = elf(&counting(PAGES, 0));
        kernel.rewind().unwrap();
        kernel.read_to_end(&mut image).unwrap();
        std::fs::write(host.path("counting"), image).unwrap();
        let disk = volume::disk(DISK_BYTES);
        let listener = StdListener::bind(host.path("nbd.sock")).unwrap();
        let served = Arc::clone(&disk);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let served = Arc::clone(&served);
                std::thread::spawn(move || volume::serve_link(&stream, &served));
            }
        });
        // As many tests at once as there may be.
        static TAPS: AtomicU64 = AtomicU64::new(0);
        let name = format!("scm{}-{}", std::process::id() % 1_000_000, TAPS.fetch_add(1, Ordering::SeqCst));
        let wire = Wire::new(&name).inspect_err(|error| println!("no card: a tap cannot be made here: {error}")).ok();
        Self { host, disk, wire }
    }

    async fn launch(&self, guest: GuestId, epoch: u64) -> Launch {
        let mut launch = self.host.launch(guest, epoch).await;
        launch.spec.boot = Boot::Kernel { has_initrd: false, cmdline: String::new() };
        (launch.host.kernel, launch.host.initrd) = (Some(self.host.path("counting")), None);
        launch.spec.devices.disks.push(Disk { name: "root".to_owned(), is_read_only: false });
        let nbd = NbdSocket { socket: self.host.path("nbd.sock"), export: String::new() };
        launch.host.disks.insert("root".to_owned(), nbd);
        if let Some(wire) = &self.wire {
            let mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
            launch.spec.devices.nics.push(Nic { name: "eth0".to_owned(), mac, mtu: 1450 });
            launch.host.taps.insert("eth0".to_owned(), wire.name.clone());
        }
        launch
    }

    fn written(&self) -> u32 {
        number(&self.disk.lock().unwrap().bytes)
    }

    async fn counts_on(&self) {
        let before = self.written();
        until(|| self.written() > before + 2, "counting").await;
    }

    fn numbers(&self) -> Vec<u32> {
        self.wire.as_ref().map(Wire::numbers).unwrap_or_default()
    }
}

async fn until(is_so: impl Fn() -> bool, what: &str) {
    let so = async {
        while !is_so() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, so).await.unwrap_or_else(|_| panic!("there was no {what}"));
}

/// Carries a stream from one agent to the other and back, as the agents do; lets go of both when one ends.
async fn carry(from: UnixListener, to: PathBuf) {
    let (mut here, _) = from.accept().await.unwrap();
    let mut there = UnixStream::connect(to).await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
}

/// Two hosts, and a guest at the first one that is mirrored at the second.
struct Mirror {
    source: Place,
    standby: Place,
    guest: GuestId,
    progress: watch::Receiver<MirrorProgress>,
    done: JoinHandle<BackendResult<()>>,
    carrier: JoinHandle<()>,
    committed: Arc<AtomicU64>,
    committer: JoinHandle<()>,
    cookie: Cookie,
}

impl Mirror {
    async fn start(is_strict: bool) -> Self {
        let (source, standby) = (Place::new().await, Place::new().await);
        let guest = GuestId::generate();
        source.host.back_end.start(source.launch(guest, 1).await).await.unwrap();
        source.counts_on().await;
        let cookie = source.host.back_end.live_migration().unwrap().begin(guest).await.unwrap();
        let listen = standby.host.path("in.sock");
        let moves = standby.host.back_end.live_migration().unwrap();
        let cookie = moves.prepare(standby.launch(guest, 2).await, cookie, listen.clone()).await.unwrap();
        let mirrors = standby.host.back_end.mirroring().unwrap();
        assert!(mirrors.promote(guest).await.is_err() && mirrors.commit(guest, 1).await.is_err());

        let stream = source.host.path("out.sock");
        let carrier = tokio::spawn(carry(UnixListener::bind(&stream).unwrap(), listen));
        let options = MirrorOptions { interval: Duration::from_millis(20), is_strict, bandwidth_bytes_per_s: None };
        let run = source.host.back_end.mirroring().unwrap().mirror(guest, cookie.clone(), stream, options).unwrap();
        let (progress, done) = (run.progress, tokio::spawn(run.done));
        // What an agent does when all volumes have the cut, too.
        let committed = Arc::new(AtomicU64::new(0));
        let (newest, mut staged) = (Arc::clone(&committed), mirrors.staged(guest).unwrap());
        let back_end = Arc::clone(&standby.host.back_end);
        let committer = tokio::spawn(async move {
            while staged.changed().await.is_ok() {
                let cut = *staged.borrow_and_update();
                if back_end.mirroring().unwrap().commit(guest, cut).await.is_err() {
                    return;
                }
                newest.store(cut, Ordering::SeqCst);
            }
        });
        Self { source, standby, guest, progress, done, carrier, committed, committer, cookie }
    }

    fn committed(&self) -> u64 {
        self.committed.load(Ordering::SeqCst)
    }

    async fn await_commits(&self, more: u64) {
        let least = self.committed() + more;
        until(|| self.committed() >= least, &format!("commit of {least}")).await;
    }

    /// Nothing more comes to the standby; the newest cut that it has.
    async fn settled(&mut self) -> u64 {
        timeout(PATIENCE, &mut self.carrier).await.unwrap().unwrap();
        // What was staged before that is committed by now or soon.
        let mirrors = self.standby.host.back_end.mirroring().unwrap();
        let staged = mirrors.staged(self.guest).unwrap();
        sleep(Duration::from_millis(100)).await;
        until(|| self.committed() >= *staged.borrow(), "commit of what was staged").await;
        self.committer.abort();
        self.committed()
    }

    /// Makes of the standby the guest; its volume is as at that cut.
    async fn promote(&mut self, cut: u64) -> u32 {
        let disk = self.source.disk.lock().unwrap().cuts[&cut].clone();
        let on_disk = number(&disk);
        self.standby.disk.lock().unwrap().bytes = disk;
        let mirrors = self.standby.host.back_end.mirroring().unwrap();
        for _ in 0..2 {
            let info = mirrors.promote(self.guest).await.unwrap();
            assert_eq!((info.state, info.epoch), (RunState::Paused(PauseReason::Arrived), Epoch(2)));
        }
        on_disk
    }

    /// It goes on as the guest that it was at that cut.
    async fn goes_on(&self, on_disk: u32) {
        let before = self.standby.disk.lock().unwrap().written.len();
        self.standby.host.back_end.resume(self.guest, Epoch(2)).await.unwrap();
        self.standby.counts_on().await;
        let written = self.standby.disk.lock().unwrap().written[before..].to_vec();
        assert!(written.windows(2).all(|pair| pair[1] == pair[0] + 1), "{written:?}");
        // What its memory has is what its disk has, or the next.
        assert!((on_disk..=on_disk + 2).contains(&written[0]), "{on_disk}: {written:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_is_killed_is_gone_on_with_where_it_was_heard_last() {
    if !runs_guests("a_source_that_is_killed_is_gone_on_with_where_it_was_heard_last") {
        return;
    }
    let rounds: u64 = std::env::var("SUPERCLOUD_MIRROR_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    for seed in 1..=rounds {
        let random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let (cuts, after) = (1 + random % 7, Duration::from_micros((random >> 32) % 50_000));
        println!("seed {seed}: killed {after:?} after the commit of cut {cuts}");
        let mut it = Mirror::start(true).await;
        it.await_commits(cuts).await;
        let pid = it.source.host.back_end.status(it.guest).await.unwrap().unwrap().pid.unwrap();
        sleep(after).await;
        kill(pid);
        let cut = it.settled().await;
        let heard = it.source.numbers();
        let broken = timeout(PATIENCE, &mut it.done).await.unwrap().unwrap();
        assert!(broken.is_err() && it.progress.borrow().is_broken.is_some(), "{broken:?}");
        assert_eq!(
            it.standby.host.state(it.guest).await,
            Some(RunState::Paused(PauseReason::Incoming)),
            "it never runs by itself"
        );
        let on_disk = it.promote(cut).await;
        let last = heard.last().copied().unwrap_or(0);
        println!("cut {cut}: {on_disk} on disk, {last} heard");
        assert!(last <= on_disk, "{last} was heard, {on_disk} is on the standby's disk");
        assert!(it.source.wire.is_none() || cut < 3 || last > 0, "strict does not mean silent");
        // What was promoted outlives its agent.
        it.standby.host.restart().await;
        assert_eq!(it.standby.host.state(it.guest).await, Some(RunState::Paused(PauseReason::Arrived)));
        it.goes_on(on_disk).await;
        it.standby.host.back_end.stop(it.guest, StopMode::Kill).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_guest_boots_again_is_not_moved_and_is_let_go_at_the_end() {
    if !runs_guests("a_mirrored_guest_boots_again_is_not_moved_and_is_let_go_at_the_end") {
        return;
    }
    let mut it = Mirror::start(false).await;
    it.await_commits(2).await;
    let moves = it.source.host.back_end.live_migration().unwrap();
    let refused = moves.perform(it.guest, it.cookie.clone(), it.source.host.path("other.sock"), CopyOptions::default());
    let _listener = UnixListener::bind(it.source.host.path("other.sock")).unwrap();
    let refused = timeout(PATIENCE, refused.unwrap().done).await.unwrap();
    assert!(matches!(refused, Err(BackendError::Failed { .. })), "{refused:?}");
    // It boots again, and the mirror goes on with the new one, whose memory is another.
    let high = it.source.written();
    it.source.host.back_end.reset(it.guest).await.unwrap();
    until(|| it.source.written() < high, "counting from the start").await;
    it.await_commits(3).await;
    // Paused, it is mirrored on; resumed, it goes on.
    it.source.host.back_end.pause(it.guest).await.unwrap();
    it.await_commits(2).await;
    it.source.host.back_end.resume(it.guest, Epoch(1)).await.unwrap();
    it.source.counts_on().await;
    it.await_commits(2).await;
    let progress = it.progress.borrow().clone();
    assert!(
        progress.committed > 0 && progress.memory_total_bytes == 64 << 20 && progress.sent_bytes > 0,
        "{progress:?}"
    );
    for _ in 0..2 {
        it.source.host.back_end.mirroring().unwrap().end_mirror(it.guest).await.unwrap();
    }
    timeout(PATIENCE, &mut it.done).await.unwrap().unwrap().unwrap();
    it.source.counts_on().await;
    let cut = it.settled().await;
    let on_disk = it.promote(cut).await;
    it.goes_on(on_disk).await;
    // And it can be mirrored, or moved, anew.
    let moves = it.source.host.back_end.live_migration().unwrap();
    moves.confirm(it.guest, Verdict::Keep).await.unwrap();
    assert_eq!(it.source.host.state(it.guest).await, Some(RunState::Running));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_that_are_killed_leave_a_source_that_holds_back_and_a_standby_that_can_go_on() {
    if !runs_guests("agents_that_are_killed_leave_a_source_that_holds_back_and_a_standby_that_can_go_on") {
        return;
    }
    let mut it = Mirror::start(true).await;
    it.await_commits(3).await;
    // The source's: its streams go with it, and the next one finds the guest running and holding back.
    it.carrier.abort();
    it.done.abort();
    it.source.host.restart().await;
    assert_eq!(it.source.host.state(it.guest).await, Some(RunState::Running));
    it.source.counts_on().await;
    // What was acknowledged may still be on its way.
    sleep(Duration::from_millis(300)).await;
    it.source.numbers();
    it.source.counts_on().await;
    assert!(it.source.numbers().is_empty());
    let before = it.source.written();
    it.source.host.back_end.mirroring().unwrap().end_mirror(it.guest).await.unwrap();
    if it.source.wire.is_some() {
        until(|| it.source.numbers().last().is_some_and(|last| *last >= before), "frame that was held").await;
    }
    it.source.counts_on().await;
    // The standby's: nothing more comes to it, and what it has committed is what it goes on from.
    it.committer.abort();
    it.standby.host.restart().await;
    assert_eq!(it.standby.host.state(it.guest).await, Some(RunState::Paused(PauseReason::Incoming)));
    let back_end = Arc::clone(&it.standby.host.back_end);
    let mirrors = back_end.mirroring().unwrap();
    let Standing::Committed(cut) = mirrors.standing(it.guest).await.unwrap() else { panic!("nothing was committed") };
    assert!(cut >= it.committed(), "{cut}, and {} was acknowledged", it.committed());
    assert!(*mirrors.staged(it.guest).unwrap().borrow() >= cut);
    it.source.host.back_end.stop(it.guest, StopMode::Kill).await.unwrap();
    let on_disk = it.promote(cut).await;
    assert_eq!(mirrors.standing(it.guest).await.unwrap(), Standing::Promoted);
    // And once more, before it runs.
    it.standby.host.restart().await;
    let back_end = Arc::clone(&it.standby.host.back_end);
    assert_eq!(back_end.mirroring().unwrap().standing(it.guest).await.unwrap(), Standing::Promoted);
    it.goes_on(on_disk).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirrored_guest_stands_still_and_silent_when_its_lease_is_over_and_nobody_is_there() {
    if !runs_guests("a_mirrored_guest_stands_still_and_silent_when_its_lease_is_over_and_nobody_is_there") {
        return;
    }
    let mut it = Mirror::start(false).await;
    it.await_commits(2).await;
    {
        let mirrors = it.source.host.back_end.mirroring().unwrap();
        assert!(mirrors.takes_leases());
        mirrors.lease(it.guest, Some(boot_ms() + 1_000)).await.unwrap();
        mirrors.lease(it.guest, Some(boot_ms() + 60_000)).await.unwrap();
        sleep(Duration::from_millis(1_500)).await;
        it.source.counts_on().await;
        mirrors.lease(it.guest, None).await.unwrap();
        mirrors.lease(it.guest, Some(boot_ms() + 1_500)).await.unwrap();
    }
    // Cuts go on while it stands still, and do not let it go on.
    sleep(Duration::from_millis(3_000)).await;
    it.await_commits(2).await;
    let stands_still = async |it: &Mirror| {
        it.source.numbers();
        let before = it.source.written();
        sleep(Duration::from_millis(700)).await;
        assert_eq!(it.source.written(), before, "it writes without a lease");
        assert!(it.source.numbers().is_empty(), "it speaks without a lease");
    };
    stands_still(&it).await;
    it.carrier.abort();
    it.done.abort();
    it.source.host.restart().await;
    stands_still(&it).await;
    let back_end = Arc::clone(&it.source.host.back_end);
    let mirrors = back_end.mirroring().unwrap();
    mirrors.end_mirror(it.guest).await.unwrap();
    stands_still(&it).await;
    mirrors.lease(it.guest, Some(boot_ms() + 60_000)).await.unwrap();
    it.source.counts_on().await;
    mirrors.lease(it.guest, Some(boot_ms() + 1)).await.unwrap();
    mirrors.lease(it.guest, None).await.unwrap();
    it.source.counts_on().await;
    back_end.stop(it.guest, StopMode::Kill).await.unwrap();
    mirrors.lease(it.guest, None).await.unwrap();
    assert!(mirrors.lease(it.guest, Some(boot_ms() + 60_000)).await.is_err());
}
