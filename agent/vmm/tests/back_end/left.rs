//! Memory that a move leaves behind, between two back ends.

use supercloud_blanket::{
    Mirroring as _, PostCopy,
    migrate::{Cookie, MemoryMode, Transfer},
    mirror::MirrorOptions,
};

use super::{guest::CHECK, *};

/// Whether moves can leave memory behind here; says so if not.
async fn leaves(test: &str) -> bool {
    if !runs_guests(test) {
        return false;
    }
    let host = Host::new().await;
    let refused = host.back_end.post_copy().err();
    refused.inspect(|why| println!("SKIPPED: {test}: {why}")).is_none()
}

fn post_copy(host: &Host) -> &dyn PostCopy {
    host.back_end.post_copy().unwrap()
}

/// A host whose guests check their memory all the time.
async fn checking() -> Host {
    let host = Host::new().await;
    let mut image = Vec::new();
    let mut kernel = elf(CHECK);
    kernel.rewind().unwrap();
    kernel.read_to_end(&mut image).unwrap();
    std::fs::write(host.path("kernel"), image).unwrap();
    host
}

/// Carries bytes both ways, from where memory is served to where it is fetched; cut off when so many have come from there, or, if it
/// `starves`, when the end that serves is closed: what comes until then is lost.
async fn carry_both(from: UnixListener, to: PathBuf, most: u64, starves: bool) {
    let (here, _) = from.accept().await.unwrap();
    let there = UnixStream::connect(to).await.unwrap();
    let ((here_reads, mut here_writes), (mut there_reads, mut there_writes)) = (here.into_split(), there.into_split());
    let down = async move {
        let mut some = here_reads.take(most);
        let _ = tokio::io::copy(&mut some, &mut there_writes).await;
        if starves {
            let _ = tokio::io::copy(&mut some.into_inner(), &mut tokio::io::sink()).await;
        }
    };
    let up = async move {
        let _ = tokio::io::copy(&mut there_reads, &mut here_writes).await;
    };
    // Whichever ends ends both.
    tokio::select! { () = down => {}, () = up => {} }
}

/// Bytes on the wire that have at least one frame of pages, and not all.
const SOME: u64 = 20_000;

/// A guest that has come, but for memory that was left behind.
struct Left {
    source: Host,
    destination: Host,
    guest: GuestId,
    bytes: u64,
    connections: u32,
}

impl Left {
    async fn prepared() -> (Self, Cookie) {
        let (source, destination) = (checking().await, checking().await);
        let guest = source.started().await;
        echoes(&source, b'a').await;
        let cookie = source.back_end.live_migration().unwrap().begin(guest).await.unwrap();
        let launch = destination.launch(guest, 2).await;
        let listen = destination.path("in.sock");
        let cookie = destination.back_end.live_migration().unwrap().prepare(launch, cookie, listen).await.unwrap();
        (Self { source, destination, guest, bytes: 0, connections: 0 }, cookie)
    }

    async fn behind(memory: MemoryMode) -> Self {
        let (mut it, cookie) = Self::prepared().await;
        let listener = UnixListener::bind(it.source.path("out.sock")).unwrap();
        let carrier = tokio::spawn(carry(listener, it.destination.path("in.sock"), u64::MAX));
        // Slow enough for the guest to write all the while, also on a busy machine.
        let bandwidth_bytes_per_s = Some(256 << 10);
        let options = CopyOptions { max_downtime_ms: Some(1), memory, bandwidth_bytes_per_s, ..CopyOptions::default() };
        let moves = it.source.back_end.live_migration().unwrap();
        let transfer = moves.perform(it.guest, cookie, it.source.path("out.sock"), options).unwrap();
        let performed = timeout(PATIENCE, transfer.done).await.unwrap().unwrap();
        // More than 4 MiB are written all the time; after no round all that was ever written.
        assert!(performed.left_bytes > 1 << 20 && performed.left_bytes < 16 << 20, "{performed:?}");
        assert_eq!(it.source.state(it.guest).await, Some(RunState::Paused(PauseReason::Departed)));
        let moves = it.destination.back_end.live_migration().unwrap();
        let info = moves.complete(it.guest, performed.cookie).await.unwrap();
        assert_eq!(info.state, RunState::Paused(PauseReason::Arrived));
        carrier.abort();
        it.bytes = performed.left_bytes;
        assert_eq!(it.missing(), it.bytes);
        it
    }

    fn missing(&self) -> u64 {
        *post_copy(&self.destination).missing_bytes(self.guest).unwrap().borrow()
    }

    async fn runs(&self) {
        self.destination.back_end.resume(self.guest, Epoch(2)).await.unwrap();
    }

    /// One connection; how it ended at the source and at the destination.
    async fn fetch(&mut self, most: u64) -> (Result<(), BackendError>, Result<(), BackendError>) {
        let (serving, fetching, carrier) = self.begin(most, false);
        let both = async { tokio::join!(serving.done, fetching.done) };
        let ended = timeout(PATIENCE, both).await.unwrap();
        carrier.abort();
        ended
    }

    fn begin(&mut self, most: u64, starves: bool) -> (Transfer<()>, Transfer<()>, tokio::task::JoinHandle<()>) {
        self.connections += 1;
        let serve = self.source.path(&format!("serve{}.sock", self.connections));
        let fetch = self.destination.path("fetch.sock");
        let listener = UnixListener::bind(&serve).unwrap();
        let fetching = post_copy(&self.destination).fetch_memory(self.guest, fetch.clone()).unwrap();
        let serving = post_copy(&self.source).serve_memory(self.guest, serve).unwrap();
        (serving, fetching, tokio::spawn(carry_both(listener, fetch, most, starves)))
    }

    /// All is there, and as the guest left it.
    async fn is_whole(&self) {
        assert_eq!(self.missing(), 0);
        echoes(&self.destination, b'z').await;
        let said = std::fs::read_to_string(self.destination.path("console.log")).unwrap();
        assert!(!said.contains('!'), "a page is not as the guest left it: {said}");
        assert!(self.destination.back_end.live_migration().unwrap().begin(self.guest).await.is_ok());
    }
}

/// It goes round its memory, and all of it is as it left it.
async fn echoes(host: &Host, letter: u8) {
    timeout(PATIENCE, host.echoes(letter)).await.unwrap_or_else(|_| {
        let said = std::fs::read_to_string(host.path("console.log"));
        panic!("it does not go on; it said {said:?}");
    });
}

#[tokio::test]
async fn a_guest_that_does_not_converge_moves_and_its_memory_follows() {
    const NAME: &str = "a_guest_that_does_not_converge_moves_and_its_memory_follows";
    if !leaves(NAME).await {
        return;
    }
    // As it was before: it runs on where it is.
    let (it, cookie) = Left::prepared().await;
    let listener = UnixListener::bind(it.source.path("out.sock")).unwrap();
    let carrier = tokio::spawn(carry(listener, it.destination.path("in.sock"), u64::MAX));
    let options = CopyOptions { max_downtime_ms: Some(1), ..CopyOptions::default() };
    let moves = it.source.back_end.live_migration().unwrap();
    let transfer = moves.perform(it.guest, cookie, it.source.path("out.sock"), options).unwrap();
    let failed = timeout(PATIENCE, transfer.done).await.unwrap();
    assert!(matches!(&failed, Err(BackendError::Failed { detail, .. }) if detail.contains("converge")), "{failed:?}");
    carrier.abort();
    echoes(&it.source, b'b').await;

    for memory in [MemoryMode::Hybrid, MemoryMode::PostCopy] {
        let mut it = Left::behind(memory).await;
        it.runs().await;
        // What needs all of its memory says so.
        let back_end = &it.destination.back_end;
        let wants = |refused: Result<(), BackendError>| {
            let said = refused.unwrap_err().to_string();
            assert!(said.contains("left behind"), "{said}");
        };
        wants(back_end.live_migration().unwrap().begin(it.guest).await.map(drop));
        wants(back_end.pause(it.guest).await);
        wants(back_end.freeze(it.guest, it.destination.path("frozen")).unwrap().done.await.map(drop));
        let options =
            MirrorOptions { interval: Duration::from_millis(100), is_strict: false, bandwidth_bytes_per_s: None };
        let nowhere = Cookie::new(b"{\"version\":1}".to_vec()).unwrap();
        wants(back_end.mirror(it.guest, nowhere.clone(), it.destination.path("none"), options).map(drop));
        // Nor is it sent again from where it was, which would drop what is left there.
        let again = it.source.path("again.sock");
        let _listener = UnixListener::bind(&again).unwrap();
        let moves = it.source.back_end.live_migration().unwrap();
        let again = moves.perform(it.guest, nowhere, again, CopyOptions::default()).unwrap();
        wants(timeout(PATIENCE, again.done).await.unwrap().map(drop));
        let (served, fetched) = it.fetch(u64::MAX).await;
        served.unwrap();
        fetched.unwrap();
        it.is_whole().await;
        // Nothing is missing: at once.
        let fetch = post_copy(&it.destination).fetch_memory(it.guest, it.destination.path("fetch.sock")).unwrap();
        timeout(PATIENCE, fetch.done).await.unwrap().unwrap();
        assert!(!it.destination.path("fetch.sock").exists());
        it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Release).await.unwrap();
        assert_eq!(it.source.state(it.guest).await, None);
    }
}

#[tokio::test]
async fn connections_that_break_and_agents_that_are_killed_lose_nothing() {
    if !leaves("connections_that_break_and_agents_that_are_killed_lose_nothing").await {
        return;
    }
    for memory in [MemoryMode::Hybrid, MemoryMode::PostCopy] {
        let mut it = Left::behind(memory).await;
        it.runs().await;
        let mut least = it.bytes;
        for (most, restarts_source, restarts_destination) in
            [(0, true, false), (40, false, true), (3000, true, true), (SOME, false, false)]
        {
            let (served, fetched) = it.fetch(most).await;
            assert!(served.is_err() && fetched.is_err(), "{served:?} {fetched:?}");
            if restarts_source {
                it.source.restart().await;
                assert_eq!(it.source.state(it.guest).await, Some(RunState::Paused(PauseReason::Departed)));
            }
            if restarts_destination {
                it.destination.restart().await;
                assert_eq!(it.destination.state(it.guest).await, Some(RunState::Running));
            }
            let missing = it.missing();
            assert!(missing <= least && missing > 0, "{missing} of {least}");
            least = missing;
        }
        assert!(least < it.bytes, "something has come");
        // One that nothing goes over, whose agents are gone, gives way to the next.
        let (serving, fetching, stuck) = it.begin(60, true);
        let _ = timeout(Duration::from_millis(200), async { tokio::join!(serving.done, fetching.done) }).await;
        it.source.restart().await;
        it.destination.restart().await;
        assert!(it.destination.state(it.guest).await.is_some() && it.source.state(it.guest).await.is_some());
        let (served, fetched) = it.fetch(u64::MAX).await;
        served.unwrap();
        fetched.unwrap();
        stuck.abort();
        it.is_whole().await;
    }
}

#[tokio::test]
async fn a_source_that_dies_leaves_a_guest_that_waits_and_can_be_ended() {
    if !leaves("a_source_that_dies_leaves_a_guest_that_waits_and_can_be_ended").await {
        return;
    }
    for end in ["stop", "restart and stop", "power button"] {
        let mut it = Left::behind(MemoryMode::PostCopy).await;
        it.runs().await;
        let (serving, fetching, carrier) = it.begin(SOME, true);
        let mut missing = post_copy(&it.destination).missing_bytes(it.guest).unwrap();
        let all = it.bytes;
        let (serving, fetching) = (tokio::spawn(serving.done), tokio::spawn(fetching.done));
        timeout(PATIENCE, missing.wait_for(|missing| *missing < all)).await.unwrap().unwrap();
        let pid = it.source.back_end.status(it.guest).await.unwrap().unwrap().pid.unwrap();
        // SAFETY: a plain system call; the process is the guest's.
        unsafe { libc::kill(libc::pid_t::try_from(pid).unwrap(), libc::SIGKILL) };
        let (served, fetched) = timeout(PATIENCE, async { tokio::join!(serving, fetching) }).await.unwrap();
        assert!(served.unwrap().is_err() && fetched.unwrap().is_err());
        carrier.await.unwrap();
        assert!(it.missing() > 0);
        assert_eq!(it.destination.state(it.guest).await, Some(RunState::Running));
        let mode = match end {
            "power button" => StopMode::Graceful { budget: Duration::from_millis(200) },
            _ => StopMode::Kill,
        };
        if end == "restart and stop" {
            it.destination.restart().await;
            assert_eq!(it.destination.state(it.guest).await, Some(RunState::Running));
            assert!(it.missing() > 0);
        }
        timeout(PATIENCE, it.destination.back_end.stop(it.guest, mode)).await.unwrap().unwrap();
        assert_eq!(it.destination.state(it.guest).await, None);
        assert_eq!(it.destination.back_end.how_it_ended(it.guest).await.unwrap(), Some(StopReason::Killed));
    }
}

#[tokio::test]
async fn a_guest_that_is_reset_needs_nothing_of_its_old_memory() {
    if !leaves("a_guest_that_is_reset_needs_nothing_of_its_old_memory").await {
        return;
    }
    let mut it = Left::behind(MemoryMode::PostCopy).await;
    let mut events = it.destination.back_end.events();
    it.runs().await;
    it.destination.back_end.reset(it.guest).await.unwrap();
    event(&mut events, &GuestEvent::Rebooted).await;
    let (_, fetching, carrier) = it.begin(u64::MAX, false);
    timeout(PATIENCE, fetching.done).await.unwrap().unwrap();
    carrier.abort();
    it.is_whole().await;
}

#[tokio::test]
async fn a_move_that_is_refused_after_all_runs_on_where_it_was() {
    if !leaves("a_move_that_is_refused_after_all_runs_on_where_it_was").await {
        return;
    }
    let mut it = Left::behind(MemoryMode::Hybrid).await;
    it.destination.back_end.live_migration().unwrap().discard(it.guest).await.unwrap();
    assert_eq!(it.destination.state(it.guest).await, None);
    it.source.restart().await;
    it.source.back_end.live_migration().unwrap().confirm(it.guest, Verdict::Keep).await.unwrap();
    echoes(&it.source, b'c').await;
    // It serves nothing any more.
    let serve = it.source.path("late.sock");
    let _listener = UnixListener::bind(&serve).unwrap();
    let late = post_copy(&it.source).serve_memory(it.guest, serve).unwrap();
    let said = timeout(PATIENCE, late.done).await.unwrap().unwrap_err().to_string();
    assert!(said.contains("left behind"), "{said}");

    // A host that cannot fetch says so before anything goes.
    let moves = it.source.back_end.live_migration().unwrap();
    moves.begin(it.guest).await.unwrap();
    let cannot = Cookie::new(b"{\"version\":1}".to_vec()).unwrap();
    let options = CopyOptions { memory: MemoryMode::PostCopy, ..CopyOptions::default() };
    let refused = moves.perform(it.guest, cannot, it.source.path("out2.sock"), options).err().unwrap();
    assert!(matches!(refused, BackendError::Unsupported { .. }), "{refused}");
}
