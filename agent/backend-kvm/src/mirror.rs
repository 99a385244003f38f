//! [`Mirroring`] on processes of our own VMM.
//!
//! | our call | the source's process | the standby's process |
//! |---|---|---|
//! | `LiveMigration::prepare` | | was started, waits for a stream |
//! | `mirror` | `stream`, `mirror`: runs, is copied | receives; `staged` |
//! | `commit` | hears of it on the stream | `commit` |
//! | `end_mirror` | `end_mirror`: lets go what it held back | |
//! | `promote` | | `promote`: **whole and paused** |
//!
//! A source goes on being mirrored, and holds back what it must, whatever becomes of its agent; but the stream goes with the agent
//! that carries it. A standby that has committed a cut stays, too, when its agent goes.

use std::{path::PathBuf, time::Duration};

use supercloud_blanket::{
    BackendError, BackendResult, BoxFuture, Mirroring,
    backend::{GuestInfo, PauseReason, RunState},
    migrate::Cookie,
    mirror::{MirrorOptions, MirrorProgress, MirrorRun, Standing},
};
use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::{
    KvmBackend,
    backend::words,
    checkpoint::Turn,
    control::{self, Request},
    keeper::{Keeper, Seen},
    migration::{check, dial, verb},
};

/// As its user sees it.
fn shown(last: &MirrorProgress, seen: &Seen, memory_bytes: u64) -> MirrorProgress {
    let now: &control::MirrorProgress = &seen.mirror;
    MirrorProgress {
        cut: now.cut.max(last.cut),
        committed: now.committed.max(last.committed),
        committed_age_ms: now.committed_age_ms,
        pause_ms: now.pause_us.div_ceil(1000),
        sent_bytes: now.sent_bytes.max(last.sent_bytes),
        dirty_bytes_last_cut: now.dirty_bytes,
        memory_total_bytes: memory_bytes,
        memory_remaining_bytes: if now.cut == 0 { now.left_bytes } else { 0 },
        is_broken: last.is_broken.clone(),
    }
}

/// Follows a mirror to its end.
async fn follow(
    keeper: &Keeper,
    request: Request,
    progress: &watch::Sender<MirrorProgress>,
    what: &'static str,
    turn: Turn,
) -> BackendResult<()> {
    let memory_bytes = keeper.record().launch.spec.memory_bytes;
    progress.send_modify(|shown| shown.memory_total_bytes = memory_bytes);
    let before = keeper.seen().mirrors_over;
    keeper.ask(what, request, None).await?;
    drop(turn);
    loop {
        let last = keeper.seen().mirror;
        let news = |seen: &Seen| seen.gone.is_some() || seen.mirrors_over > before || seen.mirror != last;
        // As long as it takes: the process itself gives up a standby that is silent.
        let seen = keeper.until(what, Duration::MAX, news).await?;
        progress.send_modify(|last| *last = shown(last, &seen, memory_bytes));
        if seen.gone.is_some() {
            return Err(BackendError::NoSuchGuest { guest: keeper.guest() });
        }
        if seen.mirrors_over > before {
            return match seen.mirror_error {
                Some(detail) => Err(BackendError::Failed { what, detail }),
                None => Ok(()),
            };
        }
    }
}

/// The committed cut from which a process that waits could go on; 0: none, or it is of before this could be asked.
pub(crate) async fn committed(keeper: &Keeper) -> BackendResult<u64> {
    let status = keeper.ask("look for a standby's cuts", verb("status"), None).await?;
    Ok(status.committed.unwrap_or(0))
}

impl KvmBackend {
    async fn what_stands_by(&self, guest: GuestId) -> BackendResult<Standing> {
        let Some(keeper) = self.keeper(guest)? else { return Ok(Standing::Nothing) };
        Ok(match keeper.info().await?.map(|info| info.state) {
            Some(RunState::Paused(PauseReason::Incoming)) => match committed(&keeper).await? {
                0 => Standing::Nothing,
                cut => Standing::Committed(cut),
            },
            Some(RunState::Paused(PauseReason::Arrived)) => Standing::Promoted,
            _ => Standing::Nothing,
        })
    }

    async fn promote_standby(&self, guest: GuestId) -> BackendResult<GuestInfo> {
        let (keeper, state) = self.expect(guest).await?;
        match state {
            // Nothing more is taken from who carries the stream.
            RunState::Paused(PauseReason::Incoming) => {
                keeper.ask("promote a standby", verb("promote"), None).await?;
                self.arrivals.set(guest, None);
            }
            RunState::Paused(PauseReason::Arrived) => {}
            state => return Err(BackendError::WrongState { guest, wants: "promote it", is: words(state) }),
        }
        keeper.info().await?.ok_or(BackendError::NoSuchGuest { guest })
    }
}

impl Mirroring for KvmBackend {
    fn mirror(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: MirrorOptions,
    ) -> BackendResult<MirrorRun> {
        check(&cookie)?;
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        keeper.seen().must_be_whole(guest, "mirror it")?;
        let (sender, progress) = watch::channel(MirrorProgress::default());
        let done = async move {
            let what = "mirror a guest";
            let request = Request {
                interval_ms: Some(u64::try_from(options.interval.as_millis()).unwrap_or(u64::MAX)),
                strict: Some(options.is_strict),
                max_bytes_per_s: options.bandwidth_bytes_per_s,
                ..verb("mirror")
            };
            let outcome = async {
                let socket = dial(&stream).await?;
                let turn = keeper.make_way().await?;
                keeper.ask(what, verb("stream"), Some(socket)).await?;
                follow(&keeper, request, &sender, what, turn).await
            };
            let outcome = outcome.await;
            if let Err(error) = &outcome {
                sender.send_modify(|shown| shown.is_broken = Some(error.to_string()));
            }
            outcome
        };
        Ok(MirrorRun { progress, done: Box::pin(done) })
    }

    fn end_mirror(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let Some(keeper) = self.keeper(guest)? else { return Ok(()) };
            let knows = match keeper.ask("look for a guest's mirror", verb("status"), None).await {
                Ok(status) => status.is_mirrored.is_some(),
                Err(BackendError::NoSuchGuest { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            if !knows {
                // A process of before there were mirrors: it would hang up.
                return Ok(());
            }
            match keeper.ask("end a guest's mirror", verb("end_mirror"), None).await {
                Err(BackendError::NoSuchGuest { .. }) => Ok(()),
                ended => ended.map(drop),
            }
        })
    }

    fn takes_leases(&self) -> bool {
        true
    }

    fn lease(&self, guest: GuestId, until_ms: Option<u64>) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let Some(keeper) = self.keeper(guest)? else {
                return if until_ms.is_none() { Ok(()) } else { Err(BackendError::NoSuchGuest { guest }) };
            };
            let status = match keeper.ask("look for a guest's lease", verb("status"), None).await {
                Err(BackendError::NoSuchGuest { .. }) if until_ms.is_none() => return Ok(()),
                status => status?,
            };
            match (status.takes_leases, until_ms) {
                (Some(true), _) => {}
                // A process of before there were leases has none; it would hang up.
                (_, None) => return Ok(()),
                (_, Some(_)) => {
                    let option = "a lease for this guest, whose process was started by an older version".to_owned();
                    return Err(BackendError::Unsupported { back_end: crate::BACK_END, option });
                }
            }
            let request = Request { lease_until_ms: Some(until_ms.unwrap_or(0)), ..verb("lease") };
            keeper.ask("renew a guest's lease", request, None).await.map(drop)
        })
    }

    fn staged(&self, guest: GuestId) -> BackendResult<watch::Receiver<u64>> {
        let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
        Ok(keeper.staged())
    }

    fn standing(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Standing>> {
        Box::pin(self.what_stands_by(guest))
    }

    fn commit(&self, guest: GuestId, cut: u64) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let keeper = self.keeper(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
            let request = Request { cut: Some(cut), ..verb("commit") };
            keeper.ask("commit a mirror's cut", request, None).await.map(drop)
        })
    }

    fn promote(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.promote_standby(guest))
    }
}
