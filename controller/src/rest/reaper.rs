//! Removes what has expired: kept answers, join tokens, access tokens (guests' own ones come and go in numbers).

use std::time::Duration;

use supercloud_api::unix_ms;

use super::{idempotency, join};
use crate::{
    app::Parts,
    chain,
    state::{Change, Context, StateError, TokenRecord},
};

/// How often it looks.
const SWEEP_EVERY: Duration = Duration::from_secs(600);
/// Expired tokens are shown for this long, so that people see why they stopped working.
const SHOWN_MS: u64 = 24 * 3600 * 1000;

/// Removes what has expired, for ever.
pub async fn expiry_reaper(parts: Parts) {
    loop {
        let now_ms = unix_ms();
        let done = [
            ("answers", idempotency::sweep(&parts, now_ms).await),
            ("join tokens", join::sweep(&parts, now_ms).await),
            ("tokens", sweep_tokens(&parts, now_ms).await),
        ];
        for (what, outcome) in done {
            match outcome {
                Ok(0) => {}
                Ok(removed) => tracing::debug!(removed, "expired {what} removed"),
                Err(error) => tracing::warn!(error = %chain(&error), "expired {what} cannot be removed now"),
            }
        }
        tokio::time::sleep(SWEEP_EVERY).await;
    }
}

async fn sweep_tokens(parts: &Parts, now_ms: u64) -> Result<usize, StateError> {
    let mut removed = 0;
    for record in parts.state.list::<TokenRecord>().await? {
        if record.token.expires_at_ms.is_some_and(|at| now_ms >= at.saturating_add(SHOWN_MS)) {
            let mut change = Change::new();
            TokenRecord::remove_in(&record, &mut change);
            match parts.state.commit(&Context::system(), change).await {
                Ok(_) => removed += 1,
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest::tests::TestController;

    #[tokio::test]
    async fn expired_tokens_go_a_day_later_and_others_stay() {
        let test = TestController::start().await;
        let end = unix_ms();
        let (record, _) =
            crate::auth::new_token("old".parse().unwrap(), None, None, supercloud_api::Role::Viewer, Some(end));
        let mut change = Change::new();
        record.store_in(&mut change);
        test.state().commit(&Context::system(), change).await.unwrap();
        assert_eq!(sweep_tokens(test.parts(), end + SHOWN_MS - 1).await.unwrap(), 0);
        assert_eq!(sweep_tokens(test.parts(), end + SHOWN_MS).await.unwrap(), 1);
        assert_eq!(test.admin_client().tokens().await.unwrap().len(), 1);
        test.stop().await;
    }
}
