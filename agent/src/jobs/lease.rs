//! A mirrored guest's lease: asked of the controller again and again, and handed on to the guest's process, which stands still by itself
//! when that does not happen any more. Nothing here needs to be in time for that.

use std::time::Duration;

use supercloud_api::{
    lease,
    link::{Answer, Query},
};
use supercloud_ids::Epoch;
use tokio::sync::watch;

use super::Job;

/// It is asked so many times while a lease runs: some questions may be lost.
const ASKS_PER_LEASE: u32 = 5;
/// The pause after a question that was refused or not answered, up to twice that: all guests of a host would ask at once again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// The longest that one question is waited for: then it is asked with a newer date.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Until when the guest's process was told that the guest may run, on this host's boot clock in milliseconds; `None`: not yet.
pub type Held = watch::Receiver<Option<u64>>;

/// A lease that an answer gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadAnswer {
    /// It is no answer to this.
    #[error("the controller answers something else")]
    Other,
    /// It is dated otherwise than the question.
    #[error("the controller answers a question of another time")]
    OtherDate,
}

/// Until when a guest may run by an answer to what was asked at `asked_ms`. Pure. It counts from then, so that what the answer took
/// only shortens it; and it is never longer than was asked for.
///
/// # Errors
/// When it is no answer to that.
pub fn until_ms(asked_ms: u64, wanted_ms: u64, answer: &Answer) -> Result<u64, BadAnswer> {
    match answer {
        Answer::Lease { asked_ms: dated, lease_ms } if *dated == asked_ms => {
            Ok(lease::holds_until_ms(asked_ms, (*lease_ms).min(wanted_ms)))
        }
        Answer::Lease { .. } => Err(BadAnswer::OtherDate),
        _ => Err(BadAnswer::Other),
    }
}

/// Whether a guest stands still because its lease is over.
#[must_use]
pub fn is_over(held: &Held) -> bool {
    held.borrow().is_some_and(|until_ms| lease::boot_ms() >= until_ms)
}

/// Keeps the lease until it is cancelled.
pub async fn keep(job: Job, epoch: Epoch, lease_ms: u64, held: watch::Sender<Option<u64>>) {
    let between = Duration::from_millis(lease_ms) / ASKS_PER_LEASE;
    let mut had = false;
    let mut connected = job.host.link.connected();
    loop {
        // At once when the controller is there again; a question that waited for that would only have grown older.
        tokio::select! {
            () = job.cancel.cancelled() => return,
            is_there = connected.wait_for(|is_there| *is_there) => if is_there.is_err() {
                return;
            },
        }
        let pause = match renew(&job, epoch, lease_ms, between.clamp(RETRY_PAUSE, LONGEST_WAIT) * 2).await {
            Ok(until_ms) => {
                // Answers may have overtaken one another; the process goes by the latest, too.
                held.send_modify(|had| *had = Some(had.unwrap_or(0).max(until_ms)));
                if !std::mem::replace(&mut had, true) {
                    tracing::info!(guest = %job.guest, lease_ms, "the guest runs by a lease");
                }
                between
            }
            Err(why) => {
                if std::mem::take(&mut had) {
                    tracing::warn!(guest = %job.guest, why, "the guest's lease is not renewed; without it it stands still");
                }
                RETRY_PAUSE.mul_f64(rand::random_range(1.0..2.0))
            }
        };
        tokio::select! {
            () = job.cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn renew(job: &Job, epoch: Epoch, lease_ms: u64, budget: Duration) -> Result<u64, String> {
    let asked_ms = lease::boot_ms();
    let query = Query::RenewLease { guest: job.guest, epoch, asked_ms, lease_ms };
    let answer = tokio::select! {
        () = job.cancel.cancelled() => return Err("it is not wanted any more".to_owned()),
        answer = job.host.link.query(query, budget) => answer.map_err(|error| crate::chain(&error))?,
    };
    let until_ms = until_ms(asked_ms, lease_ms, &answer).map_err(|error| error.to_string())?;
    let mirroring = job.host.backend.mirroring().map_err(|error| crate::chain(&error))?;
    // Not broken off: a lease that is on its way must not come after its end.
    mirroring.lease(job.guest, Some(until_ms)).await.map_err(|error| crate::chain(&error))?;
    Ok(until_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_from_the_question_and_is_never_longer_than_that() {
        for asked_ms in [0, 7, 1 << 40, u64::MAX - 3] {
            for granted_ms in [0, 4_999, 5_000, 15_000, u64::MAX] {
                let answer = |asked_ms| Answer::Lease { asked_ms, lease_ms: granted_ms };
                let until = until_ms(asked_ms, 15_000, &answer(asked_ms)).unwrap();
                assert!(until >= asked_ms && until - asked_ms <= 15_000.min(granted_ms));
                assert_eq!(until_ms(asked_ms, 15_000, &answer(asked_ms ^ 1)), Err(BadAnswer::OtherDate));
            }
            assert_eq!(until_ms(asked_ms, 15_000, &Answer::Noted), Err(BadAnswer::Other));
        }
    }

    #[test]
    fn a_guest_without_a_lease_does_not_stand_still() {
        let (told, held) = watch::channel(None);
        assert!(!is_over(&held));
        told.send_replace(Some(1));
        assert!(is_over(&held));
        told.send_replace(Some(u64::MAX));
        assert!(!is_over(&held));
    }
}
