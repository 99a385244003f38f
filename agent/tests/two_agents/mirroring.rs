//! The test hypervisor's mirrors: always strict. A write counts as acknowledged, for whoever asks the world, when the cut that it
//! belongs to was.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use supercloud_blanket::{
    BackendError, BackendResult, BoxFuture, Mirroring,
    backend::{GuestInfo, PauseReason, RunState},
    migrate::Cookie,
    mirror::{MirrorOptions, MirrorProgress, MirrorRun, Standing},
};
use supercloud_ids::GuestId;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::watch,
};

use crate::{
    hypervisor::{Hypervisor, Inner, failed},
    nbd::Nbd,
};

/// The first byte of a stream that is a mirror's.
pub const MIRROR: u8 = 7;

/// Slot and number of writes that nobody has been told of.
type Unsaid = Vec<(u64, u64)>;

/// What a mirrored guest has not said yet; none: it speaks freely.
#[derive(Default)]
pub struct Held(Mutex<Option<Unsaid>>);

impl Held {
    /// A write was done; whether it must not be told of yet.
    pub fn keeps(&self, slot: u64, number: u64) -> bool {
        self.0.lock().unwrap().as_mut().map(|unsaid| unsaid.push((slot, number))).is_some()
    }

    /// At a cut: what belongs to it. From now on everything is held; nothing of a mirror that was ended meanwhile.
    fn cut(&self, is_over: &AtomicBool) -> Option<Unsaid> {
        let mut held = self.0.lock().unwrap();
        (!is_over.load(Ordering::SeqCst)).then(|| held.replace(Vec::new()).unwrap_or_default())
    }

    /// What was cut and not acknowledged; gives what may be said, because the mirror was ended meanwhile.
    fn give_back(&self, mut unsaid: Unsaid) -> Unsaid {
        match self.0.lock().unwrap().as_mut() {
            Some(held) => {
                unsaid.append(held);
                *held = unsaid;
                Vec::new()
            }
            None => unsaid,
        }
    }

    fn let_go(&self) -> Unsaid {
        self.0.lock().unwrap().take().unwrap_or_default()
    }
}

/// A standby: the next number that its guest would write, by cuts.
pub struct Standby {
    staged: watch::Sender<u64>,
    cuts: Mutex<HashMap<u64, u64>>,
    /// The newest committed cut and its number.
    committed: Mutex<Option<(u64, u64)>>,
    back: tokio::sync::Mutex<OwnedWriteHalf>,
}

impl Standby {
    /// Whether it outlives its agent.
    pub fn has_cut(&self) -> bool {
        self.committed.lock().unwrap().is_some()
    }
}

impl Inner {
    /// Takes cuts until the stream ends.
    pub async fn stand_by(&self, guest: GuestId, stream: UnixStream) -> std::io::Result<()> {
        let (mut read, back) = stream.into_split();
        let standby = std::sync::Arc::new(Standby {
            staged: self.staged(guest),
            cuts: Mutex::default(),
            committed: Mutex::default(),
            back: tokio::sync::Mutex::new(back),
        });
        // Of a mirror before.
        standby.staged.send_replace(0);
        self.standbys.lock().unwrap().insert(guest, standby.clone());
        loop {
            let (cut, next) = (read.read_u64().await?, read.read_u64().await?);
            standby.cuts.lock().unwrap().insert(cut, next);
            standby.staged.send_replace(cut);
        }
    }

    /// Where it is told what is staged of a guest, from before its stream is there.
    fn staged(&self, guest: GuestId) -> watch::Sender<u64> {
        self.staged.lock().unwrap().entry(guest).or_insert_with(|| watch::Sender::new(0)).clone()
    }

    /// One cut: the guest stands still, its disk cuts, its memory goes.
    async fn cut(
        self: &std::sync::Arc<Self>,
        id: GuestId,
        number: u64,
        is_over: &AtomicBool,
    ) -> BackendResult<Option<(u64, Unsaid)>> {
        let what = "mirror";
        let (held, disk) = {
            let guests = self.guests.lock().await;
            let guest = guests.get(&id).ok_or(BackendError::NoSuchGuest { guest: id })?;
            if guest.state != RunState::Running {
                return Ok(None);
            }
            (guest.held.clone(), guest.launch.host.disks["disk0"].socket.clone())
        };
        let next = self.pause(id, PauseReason::Other).await?;
        let cut = async { Nbd::connect(&disk).await?.cut(number).await }.await;
        let unsaid = cut.is_ok().then(|| held.cut(is_over)).flatten();
        // Unless somebody has paused it meanwhile.
        let state = self.guests.lock().await.get(&id).map(|guest| guest.state);
        if state == Some(RunState::Paused(PauseReason::Other)) {
            self.go(id).await;
        }
        match unsaid {
            Some(unsaid) => Ok(Some((next, unsaid))),
            // The guest runs on; the next cut has it all.
            None => {
                eprintln!("{}: {what}: the disk does not cut: {cut:?}", self.name);
                Ok(None)
            }
        }
    }

    fn say(&self, id: GuestId, unsaid: Unsaid) {
        let mut all = self.world.acknowledged.lock().unwrap();
        let slots = all.entry(id).or_default();
        for (slot, number) in unsaid {
            let newest = slots.entry(slot).or_default();
            *newest = number.max(*newest);
        }
    }
}

impl Mirroring for Hypervisor {
    fn mirror(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: MirrorOptions,
    ) -> BackendResult<MirrorRun> {
        assert_eq!(cookie.as_bytes(), b"two");
        assert!(options.is_strict);
        let (told, progress) = watch::channel(MirrorProgress::default());
        let is_over = std::sync::Arc::new(AtomicBool::new(false));
        self.0.cancels.lock().unwrap().insert(guest, is_over.clone());
        let inner = self.0.clone();
        // The hypervisor's own work: it goes on whoever waits for it.
        let work = tokio::spawn(async move {
            let what = "mirror";
            let mut socket = UnixStream::connect(&stream).await.map_err(failed(what))?;
            socket.write_u8(MIRROR).await.map_err(failed(what))?;
            let mut number = 0;
            while !is_over.load(Ordering::SeqCst) {
                tokio::time::sleep(options.interval).await;
                number += 1;
                let Some((next, unsaid)) = inner.cut(guest, number, &is_over).await? else { continue };
                told.send_modify(|told| told.cut = number);
                let acknowledged = async {
                    socket.write_u64(number).await?;
                    socket.write_u64(next).await?;
                    socket.read_u64().await
                };
                let held = inner.guests.lock().await.get(&guest).map(|guest| guest.held.clone());
                match acknowledged.await {
                    Ok(acknowledged) => {
                        assert_eq!(acknowledged, number);
                        inner.say(guest, unsaid);
                        told.send_modify(|told| told.committed = number);
                    }
                    Err(error) => {
                        if let Some(held) = held {
                            inner.say(guest, held.give_back(unsaid));
                        }
                        return Err(failed(what)(error));
                    }
                }
            }
            Ok(())
        });
        let done = Box::pin(async move {
            work.await.unwrap_or_else(|error| Err(BackendError::Failed { what: "mirror", detail: error.to_string() }))
        });
        Ok(MirrorRun { progress, done })
    }

    fn end_mirror(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let held = self.0.guests.lock().await.get(&guest).map(|guest| guest.held.clone());
            if let Some(is_over) = self.0.cancels.lock().unwrap().get(&guest) {
                is_over.store(true, Ordering::SeqCst);
            }
            if let Some(held) = held {
                self.0.say(guest, held.let_go());
            }
            Ok(())
        })
    }

    fn takes_leases(&self) -> bool {
        true
    }

    fn lease(&self, guest: GuestId, until_ms: Option<u64>) -> BoxFuture<'_, BackendResult<()>> {
        let mut leases = self.0.leases.lock().unwrap();
        match until_ms {
            Some(until_ms) => {
                let had = leases.entry(guest).or_default();
                *had = until_ms.max(*had);
            }
            None => drop(leases.remove(&guest)),
        }
        Box::pin(async { Ok(()) })
    }

    fn staged(&self, guest: GuestId) -> BackendResult<watch::Receiver<u64>> {
        Ok(self.0.staged(guest).subscribe())
    }

    fn standing(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Standing>> {
        Box::pin(async move {
            let state = self.0.guests.lock().await.get(&guest).map(|guest| guest.state);
            let standby = self.0.standbys.lock().unwrap().get(&guest).cloned();
            let committed = standby.and_then(|standby| *standby.committed.lock().unwrap());
            Ok(match (state, committed) {
                (Some(RunState::Paused(PauseReason::Arrived)), _) => Standing::Promoted,
                (Some(_), Some((cut, _))) => Standing::Committed(cut),
                _ => Standing::Nothing,
            })
        })
    }

    fn commit(&self, guest: GuestId, cut: u64) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let standby = self.0.standbys.lock().unwrap().get(&guest).cloned();
            let standby = standby.ok_or(BackendError::NoSuchGuest { guest })?;
            let next = standby.cuts.lock().unwrap()[&cut];
            let before = standby.committed.lock().unwrap().replace((cut, next));
            if before.is_none_or(|(had, _)| had < cut) {
                // A source that is gone hears nothing.
                let _ = standby.back.lock().await.write_u64(cut).await;
            }
            Ok(())
        })
    }

    fn promote(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(async move {
            if let Some(task) = self.0.incoming.lock().unwrap().remove(&guest) {
                task.abort();
            }
            let mut guests = self.0.guests.lock().await;
            // At once, whoever asked for it and died meanwhile.
            let standby = self.0.standbys.lock().unwrap().remove(&guest);
            let found = guests.get_mut(&guest).ok_or(BackendError::NoSuchGuest { guest })?;
            if let Some((_, next)) = standby.and_then(|standby| *standby.committed.lock().unwrap()) {
                found.next.store(next, Ordering::SeqCst);
                found.was_standby = true;
                found.state = RunState::Paused(PauseReason::Arrived);
            }
            assert_eq!(found.state, RunState::Paused(PauseReason::Arrived), "nothing was committed");
            Ok(GuestInfo { guest, epoch: found.epoch, state: found.state, pid: None })
        })
    }
}
