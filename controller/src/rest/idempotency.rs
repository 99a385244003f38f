//! `Idempotency-Key`: the answer to a change is kept for 24 hours in the transaction of the change itself, so a request
//! that is sent again after a broken connection, or a crash, gets the same answer and changes nothing twice.

use axum::http::{HeaderMap, StatusCode};
use supercloud_api::{Code, ids::TokenId, unix_ms};
use supercloud_store::{Compare, Condition, Op, Txn};

use super::reply::{Failure, Reply};
use crate::{
    app::Parts,
    state::{AnswerRecord, IdempotencyClaim, StateError, keys},
};

/// How long answers are kept.
const KEPT_MS: u64 = 24 * 3600 * 1000;
/// The longest key.
const MAX_KEY_BYTES: usize = 256;

/// What a request's key comes to.
#[derive(Debug)]
pub enum Claim {
    /// The request has none.
    None,
    /// It is new: keep the answer there.
    New(IdempotencyClaim),
    /// It was answered.
    Answered(Reply),
}

/// Looks a request's key up. `what` is everything that makes the request: method, path, query, body.
///
/// # Errors
/// When the key is malformed or was used for another request.
pub async fn claim(parts: &Parts, token: TokenId, headers: &HeaderMap, what: &[&[u8]]) -> Result<Claim, Failure> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(Claim::None) };
    claim_key(parts, token, value.as_bytes(), what).await
}

/// As [`claim`], with the key.
pub(super) async fn claim_key(parts: &Parts, token: TokenId, bytes: &[u8], what: &[&[u8]]) -> Result<Claim, Failure> {
    if bytes.is_empty() || bytes.len() > MAX_KEY_BYTES {
        return Err(Failure::bad(format!("Idempotency-Key must have 1 to {MAX_KEY_BYTES} bytes")));
    }
    let mut hasher = blake3::Hasher::new();
    for part in what {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    let request_hash = hasher.finalize().to_hex().to_string();
    let key = keys::answer(token, blake3::hash(bytes).to_hex().as_str());
    let Some((record, revision)) = read(parts, &key).await? else {
        return Ok(Claim::New(IdempotencyClaim { key, expired_revision: 0, request_hash }));
    };
    if unix_ms().saturating_sub(record.created_at_ms) >= KEPT_MS {
        return Ok(Claim::New(IdempotencyClaim { key, expired_revision: revision, request_hash }));
    }
    if record.request_hash != request_hash {
        return Err(Failure::new(
            Code::IdempotencyKeyReused,
            "this Idempotency-Key was used for another request; use a fresh one for each",
        ));
    }
    reply_of(parts, &key, record).map(Claim::Answered)
}

async fn read(parts: &Parts, key: &supercloud_store::Key) -> Result<Option<(AnswerRecord, u64)>, StateError> {
    let found = parts.state.store().get(key.clone()).await?;
    found.map(|found| Ok((crate::state::decode(&found)?, found.mod_revision))).transpose()
}

fn reply_of(parts: &Parts, key: &supercloud_store::Key, record: AnswerRecord) -> Result<Reply, Failure> {
    let body = if record.is_sealed {
        let sealed = hex::decode(&record.body).unwrap_or_default();
        let open = parts.keys.root.open(key.as_str(), &sealed).and_then(|bytes| String::from_utf8(bytes).ok());
        open.ok_or_else(|| Failure::new(Code::Internal, "the answer was sealed with another root key"))?
    } else {
        record.body
    };
    Ok(Reply {
        status: StatusCode::from_u16(record.status).unwrap_or(StatusCode::OK),
        location: record.location,
        etag: None,
        body: Some(body).filter(|body| !body.is_empty()),
        is_secret: record.is_sealed,
    })
}

/// The answer that was kept for this very request, if one was.
pub(super) async fn kept_answer(parts: &Parts, claim: &IdempotencyClaim) -> Result<Option<Reply>, Failure> {
    match read(parts, &claim.key).await? {
        Some((record, _)) if record.request_hash == claim.request_hash => reply_of(parts, &claim.key, record).map(Some),
        Some(_) => Err(Failure::new(Code::IdempotencyKeyReused, "this Idempotency-Key was used for another request")),
        None => Ok(None),
    }
}

/// Removes the answers that are too old at a time.
pub(super) async fn sweep(parts: &Parts, now_ms: u64) -> Result<usize, StateError> {
    let store = parts.state.store();
    let prefix = keys::folder("idempotency");
    let (mut after, mut removed) = (None, 0);
    loop {
        let page = store.range(prefix.clone(), after, supercloud_store::MAX_TXN_OPS).await?;
        let mut txn = Txn::new();
        for item in &page.items {
            let record: AnswerRecord = crate::state::decode(item)?;
            if now_ms.saturating_sub(record.created_at_ms) >= KEPT_MS {
                let condition = Condition::ModRevisionIs(item.mod_revision);
                txn.compares.push(Compare { key: item.key.clone(), condition });
                txn.ops.push(Op::Delete { key: item.key.clone() });
            }
        }
        let count = txn.ops.len();
        if count > 0 && store.txn(txn).await?.committed().is_some() {
            removed += count;
        }
        if !page.more {
            return Ok(removed);
        }
        after = page.items.last().map(|item| item.key.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rest::tests::TestController;

    #[tokio::test]
    async fn answers_are_removed_after_a_day_and_not_before() {
        let test = TestController::start().await;
        let parts = test.parts();
        let admin = test.admin_client();
        let body = supercloud_api::CloudCreate { name: "east".parse().unwrap(), provider: "lab".into() };
        admin.create_cloud(&body).await.unwrap();
        assert_eq!(sweep(parts, unix_ms()).await.unwrap(), 0);
        assert_eq!(sweep(parts, unix_ms() + KEPT_MS).await.unwrap(), 1);
        assert_eq!(sweep(parts, unix_ms() + KEPT_MS).await.unwrap(), 0);
        test.stop().await;
    }
}
