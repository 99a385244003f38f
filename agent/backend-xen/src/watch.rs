//! Looks after all guests: domains that ended, or want to boot again; disks whose volume process is gone.

use std::{sync::Arc, time::Duration};

use supercloud_blanket::{
    BackendResult,
    backend::{BackendEvent, GuestEvent, StopReason},
};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    backend::Inner,
    guest::{Guest, Role},
    xl::{self, Domain, Shutdown},
};

/// How often disks are looked at.
const EVERY: Duration = Duration::from_secs(1);
/// Domains are listed every so many looks: that starts a program.
const LIST_EVERY: u32 = 3;

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
    if let Role::Incoming(_) = role {
        return Step::Nothing;
    }
    match domain.map(|domain| domain.shutdown) {
        None => Step::End(StopReason::Crashed),
        // Who sent it, or wants to, decides.
        Some(None | Some(Shutdown::Suspend)) => Step::Nothing,
        Some(Some(Shutdown::PowerOff)) => Step::End(StopReason::PoweredOff),
        Some(Some(Shutdown::Crash)) => Step::End(StopReason::Crashed),
        Some(Some(Shutdown::Reboot)) => Step::BootAgain,
    }
}

/// Never ends; aborted with its back end.
pub async fn keep(back_end: Arc<Inner>) {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count = 0u32;
    loop {
        ticks.tick().await;
        let guests = back_end.all();
        for guest in &guests {
            mend(&back_end, guest).await;
        }
        count = count.wrapping_add(1);
        if count % LIST_EVERY == 0
            && !guests.is_empty()
            && let Err(error) = look(&back_end, &guests).await
        {
            tracing::warn!(%error, "the domains cannot be looked after now");
        }
    }
}

async fn mend(back_end: &Inner, guest: &Arc<Guest>) {
    match guest.mend_disks().await {
        Ok(away) => {
            for disk in away {
                // Its volume's process is started anew by who hears this.
                let what = GuestEvent::DiskError { disk };
                let _ = back_end.events.send(BackendEvent::Guest { guest: guest.id(), what });
            }
        }
        Err(error) => tracing::warn!(guest = %guest.id(), %error, "its disks cannot be looked after now"),
    }
}

async fn look(back_end: &Inner, guests: &[Arc<Guest>]) -> BackendResult<()> {
    // Those that nobody works on, from before the list was made until it was looked at.
    let free: Vec<_> = guests.iter().filter_map(|guest| Some((guest, guest.work.try_lock().ok()?))).collect();
    let domains = xl::list(back_end.config.call_budget).await?;
    for (guest, _work) in free {
        if back_end.guest(guest.id())?.is_none_or(|now| !Arc::ptr_eq(&now, guest)) {
            continue;
        }
        let name = guest.id().to_string();
        let domain = domains.iter().find(|domain| domain.name == name);
        match next_step(domain, &guest.record().role) {
            Step::Nothing => {}
            Step::End(reason) => back_end.release(guest, reason).await?,
            Step::BootAgain => {
                back_end.destroy(guest).await?;
                if let Err(error) = back_end.boot(guest).await {
                    tracing::error!(guest = %guest.id(), %error, "a guest cannot boot again");
                    back_end.release(guest, StopReason::Failed).await?;
                } else {
                    let _ = back_end.events.send(BackendEvent::Guest { guest: guest.id(), what: GuestEvent::Rebooted });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspended_domain_is_left_alone_and_a_vanished_one_has_crashed() {
        let step = |shutdown, role: &Role| {
            let domain =
                Domain { name: "x".to_owned(), id: 3, memory_mib: 64, is_paused: false, shutdown, is_dying: false };
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
        assert_eq!(next_step(None, &Role::Incoming(None)), Step::Nothing);
    }
}
