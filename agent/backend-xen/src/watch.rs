//! Looks after all guests: domains that ended, or want to boot again; disks whose volume process is gone.

use std::{sync::Arc, time::Duration};

use supercloud_blanket::{
    BackendResult,
    backend::{GuestEvent, StopReason},
};
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{MissedTickBehavior, interval},
};

use crate::{
    guest::{Guest, Role},
    inner::Inner,
    xl::{self, Domain, Shutdown},
};

/// How often disks are looked at.
const EVERY: Duration = Duration::from_secs(1);
/// Domains are listed every so many looks: that starts a program, which on a slow host takes seconds of the processor.
const LIST_EVERY: u32 = 10;

/// What is to be done with a guest whose domain is this.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Its domain is made anew.
    BootAgain,
    /// It is over.
    End(StopReason),
}

fn next_step(domain: Option<&Domain>, role: &Role) -> Step {
    match role {
        // Who makes it, or takes it in, decides.
        Role::Incoming(_) | Role::Starting => return Step::Nothing,
        Role::Frozen => return Step::End(StopReason::Frozen),
        Role::Booting => return Step::BootAgain,
        Role::Owner | Role::Arrived | Role::Freezing(_) => {}
    }
    match domain {
        None => Step::End(StopReason::Crashed),
        Some(domain) => match domain.shutdown {
            // Somebody else has ended it: then it is gone soon.
            _ if domain.is_dying => Step::Nothing,
            // Who sent it, or wants to, decides.
            None | Some(Shutdown::Suspend) => Step::Nothing,
            Some(Shutdown::PowerOff) => Step::End(StopReason::PoweredOff),
            Some(Shutdown::Crash) => Step::End(StopReason::Crashed),
            Some(Shutdown::Reboot) => Step::BootAgain,
        },
    }
}

/// Never ends; what it has begun ends with it.
pub async fn keep(back_end: Arc<Inner>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tasks = JoinSet::new();
    let mut listing: Option<AbortHandle> = None;
    let mut count = 0u32;
    loop {
        ticks.tick().await;
        while tasks.try_join_next().is_some() {}
        let guests: Vec<_> = back_end.known().into_iter().filter(|guest| guest.is_settled()).collect();
        for guest in &guests {
            tasks.spawn(mend(Arc::clone(&back_end), Arc::clone(guest)));
        }
        count = count.wrapping_add(1);
        let is_listing = listing.as_ref().is_some_and(|task| !task.is_finished());
        if count.is_multiple_of(LIST_EVERY) && !guests.is_empty() && !is_listing {
            listing = Some(tasks.spawn(look(Arc::clone(&back_end), guests)));
        }
    }
}

async fn mend(back_end: Arc<Inner>, guest: Arc<Guest>) {
    match guest.mend_disks().await {
        Ok(mended) => {
            for disk in mended.away {
                back_end.tell(guest.id(), GuestEvent::DiskError { disk });
            }
            if mended.are_all_back {
                // What had waited for them goes on.
                back_end.tell(guest.id(), GuestEvent::Resumed);
            }
        }
        Err(error) => tracing::warn!(guest = %guest.id(), %error, "its disks cannot be looked after now"),
    }
}

/// Looks at all domains, and does for each guest what there is to be done. A guest that somebody works on is left to the next look.
async fn look(back_end: Arc<Inner>, guests: Vec<Arc<Guest>>) {
    let domains = match xl::list(back_end.config.call_budget).await {
        Ok(domains) => domains,
        Err(error) => {
            tracing::warn!(%error, "the domains cannot be looked after now");
            return;
        }
    };
    let mut tasks = JoinSet::new();
    for guest in guests {
        // What a list shows is only why one looks closer.
        let seen = xl::pick(&domains, &guest.uuid());
        if !matches!(seen.map(|seen| next_step(seen, &guest.record().role)), Ok(Step::Nothing)) {
            let back_end = Arc::clone(&back_end);
            tasks.spawn(async move {
                if let Err(error) = attend(&back_end, &guest).await {
                    tracing::warn!(guest = %guest.id(), %error, "a guest cannot be looked after now");
                }
            });
        }
    }
    tasks.join_all().await;
}

/// Does what is to be done with one guest, unless somebody else has it in hand.
async fn attend(back_end: &Arc<Inner>, guest: &Arc<Guest>) -> BackendResult<()> {
    let Ok(_work) = guest.work.try_lock() else { return Ok(()) };
    if back_end.guest(guest.id())?.is_none_or(|now| !Arc::ptr_eq(&now, guest)) {
        return Ok(());
    }
    let domain = back_end.domain(guest).await?;
    match next_step(domain.as_ref(), &guest.record().role) {
        Step::Nothing => Ok(()),
        Step::End(reason) => {
            tracing::info!(guest = %guest.id(), ?reason, "a guest has ended");
            back_end.release(guest, reason).await
        }
        Step::BootAgain => back_end.boot_again(guest).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspended_domain_is_left_alone_and_a_vanished_one_has_crashed() {
        let step = |shutdown, role: &Role| {
            let domain =
                Domain { uuid: "x".to_owned(), id: 3, memory_mib: 64, is_paused: false, shutdown, is_dying: false };
            next_step(Some(&domain), role)
        };
        for role in [Role::Owner, Role::Arrived, Role::Freezing("/f".into())] {
            assert_eq!(step(None, &role), Step::Nothing);
            assert_eq!(step(Some(Shutdown::Suspend), &role), Step::Nothing);
            assert_eq!(step(Some(Shutdown::PowerOff), &role), Step::End(StopReason::PoweredOff));
            assert_eq!(step(Some(Shutdown::Reboot), &role), Step::BootAgain);
            assert_eq!(step(Some(Shutdown::Crash), &role), Step::End(StopReason::Crashed));
            assert_eq!(next_step(None, &role), Step::End(StopReason::Crashed));
        }
        for role in [Role::Incoming(None), Role::Starting] {
            assert_eq!((next_step(None, &role), step(Some(Shutdown::Crash), &role)), (Step::Nothing, Step::Nothing));
        }
        // The file is the guest: what is here never runs again, whatever it looks like.
        for domain in [None, Some(None), Some(Some(Shutdown::Suspend)), Some(Some(Shutdown::Reboot))] {
            let next = domain.map_or_else(|| next_step(None, &Role::Frozen), |shutdown| step(shutdown, &Role::Frozen));
            assert_eq!(next, Step::End(StopReason::Frozen));
        }
        assert_eq!((next_step(None, &Role::Booting), step(None, &Role::Booting)), (Step::BootAgain, Step::BootAgain));
    }
}
