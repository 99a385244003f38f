//! How much of the controller a guest may take by its host: calls come out of a bucket, few are open at once, and its token is
//! kept here, so that asking again and again makes none anew.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use supercloud_ids::{Epoch, GuestId};
use tokio::{sync::Semaphore, time::Instant};

/// Calls that may come in a row.
const BURST: u32 = 20;
/// The time in which one more comes.
const REFILL: Duration = Duration::from_secs(1);
/// Calls of a guest that wait for the controller at once.
const OPEN_CALLS: usize = 2;
/// The least time between two tokens of one guest.
pub const MINT_EVERY: Duration = Duration::from_secs(60);
/// What was not used for so long is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(2 * 3600);

/// Calls that are left (a token bucket).
#[derive(Debug)]
struct Bucket {
    left: u32,
    since: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let gained = now.saturating_duration_since(self.since).as_millis() / REFILL.as_millis();
        let gained = u32::try_from(gained).unwrap_or(BURST).min(BURST);
        if self.left + gained >= BURST {
            (self.left, self.since) = (BURST, now);
        } else {
            self.left += gained;
            self.since += REFILL * gained;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

/// A token of the API as it was given.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Whose: another epoch is another owner, who has perhaps replaced it.
    pub epoch: Epoch,
    /// The answer.
    pub body: serde_json::Value,
    /// When it came.
    pub since: Instant,
    /// How long it is good.
    pub life: Duration,
}

/// What is to be done when a guest asks for its token.
#[derive(Debug, PartialEq)]
pub enum Token {
    /// This is still good for a while.
    Kept(serde_json::Value),
    /// Ask the controller.
    Mint,
    /// The last one came a moment ago.
    TooSoon,
}

/// Decides about a token: one is given until half its life is over, and not made twice a minute.
pub fn token(kept: Option<&Kept>, epoch: Epoch, now: Instant) -> Token {
    let Some(kept) = kept.filter(|kept| kept.epoch == epoch) else { return Token::Mint };
    let age = now.saturating_duration_since(kept.since);
    if age < kept.life / 2 {
        Token::Kept(kept.body.clone())
    } else if age < MINT_EVERY {
        Token::TooSoon
    } else {
        Token::Mint
    }
}

/// One guest's share.
#[derive(Debug)]
pub struct Share {
    bucket: Mutex<Bucket>,
    /// A place per call that waits for the controller.
    pub open: Semaphore,
    /// Its token; held while one is being made, so that two are not.
    pub token: tokio::sync::Mutex<Option<Kept>>,
}

impl Share {
    /// Whether one more call may be made now.
    pub fn take(&self, now: Instant) -> bool {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(now)
    }
}

/// All guests' shares.
#[derive(Debug, Default)]
pub struct Shares(Mutex<HashMap<GuestId, (Instant, Arc<Share>)>>);

impl Shares {
    /// A guest's.
    pub fn of(&self, guest: GuestId, now: Instant) -> Arc<Share> {
        let mut shares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shares.retain(|_, (used, _)| now.saturating_duration_since(*used) < FORGET_AFTER);
        let (used, share) = shares.entry(guest).or_insert_with(|| {
            let bucket = Mutex::new(Bucket { left: BURST, since: now });
            let (open, token) = (Semaphore::new(OPEN_CALLS), tokio::sync::Mutex::default());
            (now, Arc::new(Share { bucket, open, token }))
        });
        *used = now;
        Arc::clone(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_come_in_a_burst_and_then_one_by_one() {
        let (shares, guest, start) = (Shares::default(), GuestId::generate(), Instant::now());
        let taken = |at: Duration, tries: u32| {
            let share = shares.of(guest, start + at);
            (0..tries).filter(|_| share.take(start + at)).count()
        };
        assert_eq!(taken(Duration::ZERO, 100), 20);
        assert_eq!(taken(Duration::from_millis(999), 5), 0);
        assert_eq!(taken(Duration::from_millis(2500), 5), 2);
        assert_eq!(taken(Duration::from_millis(3000), 5), 1, "half a second was not lost");
        assert_eq!(taken(Duration::from_secs(3600), 100), 20);
        assert!(shares.of(GuestId::generate(), start).take(start), "another guest has its own");
    }

    #[test]
    fn a_token_is_kept_for_half_its_life_at_its_epoch() {
        let now = Instant::now();
        let kept = |life_s| Kept { epoch: Epoch(3), body: "x".into(), since: now, life: Duration::from_secs(life_s) };
        let hour = kept(3600);
        let at = |kept: &Kept, epoch, s| token(Some(kept), Epoch(epoch), now + Duration::from_secs(s));
        assert_eq!(token(None, Epoch(3), now), Token::Mint);
        assert_eq!(at(&hour, 3, 1799), Token::Kept("x".into()));
        assert_eq!(at(&hour, 3, 1800), Token::Mint);
        assert_eq!(at(&hour, 4, 0), Token::Mint, "its host before may have had another made");
        assert_eq!(at(&kept(0), 3, 59), Token::TooSoon);
        assert_eq!(at(&kept(0), 3, 60), Token::Mint);
    }
}
