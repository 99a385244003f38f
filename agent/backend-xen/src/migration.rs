//! [`LiveMigration`] on Xen domains.
//!
//! | our call | the source's domain | the destination's |
//! |---|---|---|
//! | `begin` | runs | |
//! | `prepare` | | none yet; who takes the stream waits for it |
//! | `perform` | runs (`live`), then **suspended**, everything sent | `xl restore -p` makes it |
//! | `complete` | suspended | **whole and paused** |
//! | *the caller's decision* | | |
//! | `Backend::resume` | | runs |
//! | `confirm` | destroyed, or resumed as if it had not been suspended | |
//!
//! A suspended domain stays as it is, whatever becomes of agents: only [`LiveMigration::confirm`] lets it run on or ends it. What was
//! only arriving when an agent begins is taken apart. A hypervisor without shadow page tables does not note which pages a guest writes: there
//! live moves are refused.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use supercloud_blanket::{
    Backend as _, BackendError, BackendResult, BoxFuture, Launch, LiveMigration,
    backend::{GuestInfo, PauseReason, RunState, StopReason},
    migrate::{Cookie, CopyLimits, CopyOptions, MemoryMode, Performed, Transfer, TransferProgress, Verdict},
};
use supercloud_ids::GuestId;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    time::timeout,
};

use crate::{
    XenBackend, arrive,
    guest::{Guest, Role, failed, words},
    inner::Inner,
    leave::{self, Load},
};

/// How long the carrier of a stream may take to accept.
const DIAL_BUDGET: Duration = Duration::from_secs(10);
/// How long a suspended domain's disks may take to do what it had asked for.
const REST_BUDGET: Duration = Duration::from_secs(30);

/// What the two halves tell each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    /// The version of this exchange.
    version: u16,
}

const OURS: Told = Told { version: 1 };

fn wrap() -> BackendResult<Cookie> {
    Cookie::new(serde_json::to_vec(&OURS).map_err(|error| failed("describe a guest")(error.into()))?)
}

fn check(cookie: &Cookie) -> BackendResult<()> {
    let foreign = |detail: String| BackendError::Foreign { what: "the cookie", detail };
    let told: Told = serde_json::from_slice(cookie.as_bytes()).map_err(|error| foreign(error.to_string()))?;
    if told != OURS {
        return Err(foreign(format!("version {}; this host knows {}", told.version, OURS.version)));
    }
    Ok(())
}

fn wrong(guest: GuestId, wants: &'static str, state: RunState) -> BackendError {
    BackendError::WrongState { guest, wants, is: words(state) }
}

impl Inner {
    async fn begin_move(&self, id: GuestId) -> BackendResult<Cookie> {
        let (guest, state) = self.expect(id).await?;
        if state != RunState::Running {
            return Err(wrong(id, "begin a move", state));
        }
        let _work = guest.work.lock().await;
        guest.mark(Role::Owner).await?;
        wrap()
    }

    async fn prepare_move(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BackendResult<Cookie> {
        check(&cookie)?;
        let listener = UnixListener::bind(&listen).map_err(|source| BackendError::File {
            what: "listen at",
            path: listen.clone(),
            source,
        })?;
        let (guest, _work) = match self.take_in(launch, Role::Incoming(None)).await {
            Ok(taken) => taken,
            Err(error) => {
                let _ = tokio::fs::remove_file(&listen).await;
                return Err(error);
            }
        };
        let (arriving, config) = (Arc::clone(&guest), self.domain_file(&guest));
        let arrival = async move {
            let (stream, _) = listener.accept().await.map_err(failed("wait for the stream of a guest"))?;
            // Its job is done; a later one makes its own.
            let _ = tokio::fs::remove_file(listen).await;
            arrive::restore(&arriving, &config, stream).await
        };
        guest.set_arrival(Some(tokio::spawn(arrival)));
        wrap()
    }

    async fn complete_move(&self, id: GuestId, cookie: Cookie) -> BackendResult<GuestInfo> {
        check(&cookie)?;
        let what = "take an incoming guest";
        let (guest, state) = self.expect(id).await?;
        match state {
            RunState::Paused(PauseReason::Arrived) => return self.info(&guest).await,
            RunState::Paused(PauseReason::Incoming) => {}
            state => return Err(wrong(id, "complete its move", state)),
        }
        // Its work is not held while its stream comes: nobody but the agent's own task of this guest asks for anything.
        let Some(mut arrival) = guest.take_arrival() else {
            return Err(BackendError::Failed { what, detail: "its stream was not waited for".to_owned() });
        };
        let budget = self.config.domain_budget;
        let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
        let came = match timeout(budget, &mut arrival).await {
            Ok(Ok(came)) => came,
            Ok(Err(broken)) => Err(BackendError::Failed { what, detail: broken.to_string() }),
            Err(_) => {
                arrival.abort();
                Err(BackendError::Deadline { what, budget_ms })
            }
        };
        let _work = guest.work.lock().await;
        let settled = match came {
            Ok(()) => self.settle_in(&guest).await,
            Err(error) => Err(error),
        };
        if let Err(error) = settled {
            self.release(&guest, StopReason::Failed).await?;
            return Err(error);
        }
        self.info(&guest).await
    }

    async fn discard_move(&self, id: GuestId) -> BackendResult<()> {
        let Some(guest) = self.settled(id).await? else { return Ok(()) };
        let _work = guest.work.lock().await;
        match self.state(&guest).await? {
            None | Some(RunState::Paused(PauseReason::Incoming | PauseReason::Arrived) | RunState::Crashed) => {
                self.release(&guest, StopReason::Failed).await
            }
            Some(state) => Err(wrong(id, "discard it as incoming", state)),
        }
    }

    async fn confirm_move(&self, id: GuestId, verdict: Verdict) -> BackendResult<()> {
        let wants = "end its move as the source";
        let gone = match verdict {
            Verdict::Release => Ok(()),
            Verdict::Keep => Err(BackendError::NoSuchGuest { guest: id }),
        };
        let Some(guest) = self.settled(id).await? else { return gone };
        // A copy that nobody waits for; who makes it holds this until it is over.
        guest.cancel();
        let _work = guest.work.lock().await;
        // One whose carrier is gone may still be about to let it run on.
        self.until_alone(&guest).await?;
        match (verdict, self.state(&guest).await?) {
            (_, None) => gone,
            (Verdict::Keep, Some(RunState::Running)) => Ok(()),
            (Verdict::Keep, Some(RunState::Paused(PauseReason::Departed))) => self.run_on(&guest).await,
            (Verdict::Release, Some(RunState::Paused(PauseReason::Departed))) => {
                self.release(&guest, StopReason::Departed).await
            }
            (_, Some(state)) => Err(wrong(id, wants, state)),
        }
    }

    fn perform_move(
        self: &Arc<Self>,
        id: GuestId,
        stream: PathBuf,
        options: &CopyOptions,
    ) -> BackendResult<Transfer<Performed>> {
        let guest = self.guest(id)?.ok_or(BackendError::NoSuchGuest { guest: id })?;
        let back_end = Arc::clone(self);
        let (limit, budget) = (options.bandwidth_bytes_per_s.unwrap_or(0), options.budget);
        let (sender, progress) = watch::channel(TransferProgress::default());
        let done = async move {
            let what = "copy a guest";
            let _work = guest.work.lock().await;
            let Some(_leaving) = guest.leave() else { return Err(wrong(id, "copy it", RunState::Running)) };
            guest.limit.store(limit, Ordering::Relaxed);
            let domain = back_end.running_domain(&guest, "copy it").await?;
            let budget_ms = u64::try_from(DIAL_BUDGET.as_millis()).unwrap_or(u64::MAX);
            let late = |_| BackendError::Deadline { what: "reach the carrier of the stream", budget_ms };
            let dialled = timeout(DIAL_BUDGET, UnixStream::connect(&stream)).await.map_err(late)?;
            let dialled = dialled.map_err(failed("reach the carrier of the stream"))?;
            let load = Load {
                config: &back_end.config,
                library: &back_end.library,
                guest: &guest,
                domain,
                is_live: true,
                budget,
                what,
            };
            let sent = match leave::send(load, dialled, &sender).await {
                Ok(sent) => sent,
                Err(error) => return back_end.roll_back(&guest, error).await,
            };
            if let Err(error) = guest.rest_disks(REST_BUDGET).await {
                return back_end.roll_back(&guest, error).await;
            }
            let progress = *sender.borrow();
            Ok(Performed { cookie: wrap()?, paused_for: sent.paused_at.elapsed(), progress, left_bytes: 0 })
        };
        Ok(Transfer { progress, done: Box::pin(done) })
    }

    /// Has a guest that was not sent run on, and gives why it was not.
    pub(crate) async fn roll_back<T>(&self, guest: &Arc<Guest>, error: BackendError) -> BackendResult<T> {
        let state = self.state(guest).await?;
        if matches!(state, Some(RunState::Paused(PauseReason::Departed | PauseReason::Saving))) {
            self.run_on(guest).await?;
        }
        Err(error)
    }
}

impl LiveMigration for XenBackend {
    fn begin(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(self.inner.begin_move(guest))
    }

    fn perform(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: CopyOptions,
    ) -> BackendResult<Transfer<Performed>> {
        check(&cookie)?;
        if options.memory != MemoryMode::PreCopy {
            // Refused by its name.
            self.post_copy()?;
        }
        self.inner.perform_move(guest, stream, &options)
    }

    fn set_limits(&self, guest: GuestId, limits: CopyLimits) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            let guest = self.inner.guest(guest)?.ok_or(BackendError::NoSuchGuest { guest })?;
            // How long the pause may be, libxl decides itself: it copies five rounds at most, or until fifty pages are left.
            if let Some(bytes) = limits.bandwidth_bytes_per_s {
                guest.limit.store(bytes.max(1), Ordering::Relaxed);
            }
            Ok(())
        })
    }

    fn cancel(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            if let Some(guest) = self.inner.guest(guest)? {
                guest.cancel();
            }
            Ok(())
        })
    }

    fn confirm(&self, guest: GuestId, verdict: Verdict) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.inner.confirm_move(guest, verdict))
    }

    fn prepare(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BoxFuture<'_, BackendResult<Cookie>> {
        Box::pin(self.inner.prepare_move(launch, cookie, listen))
    }

    fn complete(&self, guest: GuestId, cookie: Cookie) -> BoxFuture<'_, BackendResult<GuestInfo>> {
        Box::pin(self.inner.complete_move(guest, cookie))
    }

    fn discard(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(self.inner.discard_move(guest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_of_another_version_is_refused() {
        check(&wrap().unwrap()).unwrap();
        for other in [&b""[..], b"{\"version\":2}", b"supercloud-libvirt-qemu/1\n"] {
            assert!(check(&Cookie::new(other.to_vec()).unwrap()).is_err());
        }
    }
}
