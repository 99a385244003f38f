//! What an earlier run was about to make when it was killed, interrupted, or heard no answer. Its calls were noted before they were sent
//! ([`Made::begun`]); whether they were done the controller alone knows, by their idempotency keys, for a day.

use serde::de::DeserializeOwned;
use supercloud_api::{
    Code,
    client::{Client, ClientError},
    ids::RequestId,
};

use super::{
    made::{Begun, Made},
    plan::Actual,
};

/// What the answer to a call that makes something says of it.
#[derive(serde::Deserialize)]
struct Answer {
    id: String,
    /// Of an operation: the guest that it makes.
    #[serde(default)]
    guest: Option<String>,
}

/// Repeats a call with its key.
pub async fn send<T: DeserializeOwned>(client: &Client, key: RequestId, call: &Begun) -> Result<T, ClientError> {
    client.post_once(key, &call.path, &call.body).await
}

/// Whether the answer says that the call was not done, and will not be.
pub fn was_refused(error: &ClientError) -> bool {
    let Some(problem) = error.problem() else { return false };
    // Known by its key, with another body: something was done.
    (400..500).contains(&problem.status)
        && !matches!(problem.status, 401 | 403 | 408 | 429)
        && problem.code != Code::IdempotencyKeyReused
}

/// Finds out what became of calls without an answer whose things are there now. A call whose name is taken makes nothing any more: it
/// is answered as it was, by the id of what it made, or refused, as somebody else made that. Calls of which nothing is there are kept:
/// they are sent with their keys when their steps come.
///
/// # Errors
/// When the controller cannot say it now.
pub async fn settle(client: &Client, actual: &Actual, made: &mut Made) -> Result<(), ClientError> {
    for (key, call) in made.begun.clone() {
        if !actual.has(call.thing.kind, &call.thing.key) {
            continue;
        }
        match send::<Answer>(client, key, &call).await {
            Ok(answer) => {
                eprintln!("{} {}: made by an earlier run, which heard no answer", call.thing.kind, call.thing.key);
                made.end(key, answer.guest.unwrap_or(answer.id));
            }
            Err(error) if was_refused(&error) => {
                made.begun.remove(&key);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
