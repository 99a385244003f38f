//! What guests ask about themselves by their host's metadata service, by the rules of a guest's own token: the same handlers, the same
//! admission, the same kept answers. Its host carries it and must own it; the actor is the guest.

use std::time::Duration;

use futures::future::BoxFuture;
use supercloud_api::{
    Cloud, Code, Operation, Problem, Ref, Role, Token,
    guest_call::{GuestCall, GuestStanding},
    ids::{Epoch, GuestId, HostId, RequestId},
    link::Answer,
};

use super::{Api, Asker, Failure, Params, Reply, guest_operations, idempotency, operations};
use crate::{
    auth::{Caller, find_route, guest_token_id},
    operations::{GuestDoor, not_owned},
    state::{GuestRecord, HostRecord, StateError, Stored},
};

/// How long an answer may take; agents wait a little longer.
const CALL_BUDGET: Duration = Duration::from_secs(10);

/// The door for guests' calls.
#[derive(Debug, Clone)]
pub struct GuestCalls {
    api: Api,
}

impl GuestDoor for GuestCalls {
    fn call(
        &self,
        host: HostId,
        guest: GuestId,
        epoch: Epoch,
        call: GuestCall,
    ) -> BoxFuture<'_, Result<Answer, Problem>> {
        Box::pin(async move {
            let request_id = RequestId::generate();
            let answered = self.answer(request_id, host, guest, epoch, call);
            let answered = tokio::time::timeout(CALL_BUDGET, answered).await.unwrap_or_else(|_| {
                let detail =
                    "it took too long; nothing is known of the outcome, try again with the same Idempotency-Key";
                Err(Failure::new(Code::StoreUnavailable, detail))
            });
            answered.map_err(|failure| failure.problem().for_request(request_id))
        })
    }
}

impl GuestCalls {
    /// A door to these handlers.
    #[must_use]
    pub const fn new(api: Api) -> Self {
        Self { api }
    }

    async fn answer(
        &self,
        request_id: RequestId,
        host: HostId,
        guest: GuestId,
        epoch: Epoch,
        call: GuestCall,
    ) -> Result<Answer, Failure> {
        let record = self.api.parts.state.read::<GuestRecord>(&guest).await?;
        let record = record.filter(|record| record.owner.is_owned_by(host, epoch)).ok_or_else(not_owned)?;
        let caller = Caller { token: token_of(&record) };
        let mut asker = Asker {
            caller: Some(caller.clone()),
            request_id,
            params: Params::default(),
            idempotency: None,
            by: Some((host, epoch)),
        };
        match call {
            GuestCall::Look => Ok(Answer::GuestStanding { standing: Box::new(self.standing(&record).await?) }),
            GuestCall::Operation { operation } => {
                let found = operations::find(&self.api, &asker, &operation.to_string()).await?;
                Ok(Answer::GuestOperation { operation: Box::new(operations::shown(&self.api, &found)) })
            }
            GuestCall::Migrate { wanted, idempotency_key } => {
                check_migrate(&caller)?;
                let what = serde_json::to_vec(&wanted).map_err(|error| Failure::bad(error.to_string()))?;
                // Nothing of the host is in it: the same request from the next host is the same request.
                let what: [&[u8]; 2] = [b"guest/migrate", &what];
                let claim =
                    match idempotency::claim_key(&self.api.parts, caller.token.id, idempotency_key.as_bytes(), &what)
                        .await?
                    {
                        idempotency::Claim::Answered(reply) => return operation_of(&reply),
                        idempotency::Claim::New(claim) => claim,
                        idempotency::Claim::None => return Err(Failure::bad("an Idempotency-Key is needed")),
                    };
                asker.idempotency = Some(claim.clone());
                let reference = Ref::from(guest.to_string());
                match guest_operations::begin_migration(&self.api, &asker, &reference, &wanted).await {
                    Ok(reply) => operation_of(&reply),
                    // Refused perhaps because of what the very same request, sent twice at once, has done.
                    Err(failure) => match idempotency::kept_answer(&self.api.parts, &claim).await? {
                        Some(reply) => operation_of(&reply),
                        None => Err(failure),
                    },
                }
            }
        }
    }

    async fn standing(&self, record: &GuestRecord) -> Result<GuestStanding, StateError> {
        let guest = &record.guest;
        let state = &self.api.parts.state;
        let host = match guest.host {
            Some(host) => state.read::<HostRecord>(&host).await?.map(|host| host.value.host),
            None => None,
        };
        let cloud = match &host {
            Some(host) => state.read::<Cloud>(&host.cloud).await?.map(|cloud| cloud.value.name),
            None => None,
        };
        Ok(GuestStanding {
            id: guest.id,
            name: guest.name.clone(),
            state: guest.state,
            epoch: guest.epoch,
            host: host.map(|host| host.name),
            cloud,
            operation: guest.operation,
        })
    }
}

/// The guest's own token, as it would be if it had asked for one: kept answers are the same by either way.
fn token_of(record: &Stored<GuestRecord>) -> Token {
    let guest = &record.guest;
    Token {
        id: guest_token_id(guest.id),
        name: guest.name.clone(),
        project: Some(guest.project),
        guest: Some(guest.id),
        role: Role::Operator,
        expires_at_ms: None,
        created_at_ms: guest.created_at_ms,
    }
}

fn check_migrate(caller: &Caller) -> Result<(), Failure> {
    let route = find_route(&axum::http::Method::POST, "/v1/guests/{guest}/migrate");
    let route = route.ok_or_else(|| Failure::new(Code::Internal, "the role table has no row for moves"))?;
    caller.check(route).map_err(|denied| Failure::new(Code::Forbidden, denied.to_string()))
}

fn operation_of(reply: &Reply) -> Result<Answer, Failure> {
    let body = reply.body.as_deref().unwrap_or_default();
    let operation: Operation = serde_json::from_str(body)
        .map_err(|source| Failure::State(StateError::Encode { key: "a kept answer".to_owned(), source }))?;
    Ok(Answer::GuestOperation { operation: Box::new(operation) })
}
