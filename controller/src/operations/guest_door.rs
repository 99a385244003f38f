//! What a guest may ask of the controller by its host: a token of its own, and what REST would let it do with that.

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use supercloud_api::{
    Code, Problem,
    guest_call::GuestCall,
    ids::{Epoch, GuestId, HostId, RequestId},
    link::Answer,
    unix_ms,
};

use super::{Engine, EngineError, handler::internal};
use crate::{
    auth,
    state::{Change, Context, GuestRecord, TokenRecord, retry_conflicts},
};

/// How long a guest's own token holds; it asks for another when it needs one.
const GUEST_TOKEN_MS: u64 = 3_600_000;

/// What carries out what guests ask about themselves. REST does, by its own rules.
pub trait GuestDoor: fmt::Debug + Send + Sync {
    /// A guest asks, by the host that says it owns it at this epoch.
    fn call(
        &self,
        host: HostId,
        guest: GuestId,
        epoch: Epoch,
        call: GuestCall,
    ) -> BoxFuture<'_, Result<Answer, Problem>>;
}

/// What a host is told that asks for a guest which is not its own.
#[must_use]
pub fn not_owned() -> Problem {
    Problem::new(Code::Forbidden, "this host does not own the guest at this epoch")
}

impl Engine {
    /// From now on guests' calls go there.
    pub fn open_guest_door(&self, door: Arc<dyn GuestDoor>) {
        // Once, at the start.
        let _first = self.guest_door.set(door);
    }

    pub(super) async fn guest_call(
        &self,
        host: HostId,
        guest: GuestId,
        epoch: Epoch,
        call: GuestCall,
    ) -> Result<Answer, Problem> {
        match self.guest_door.get() {
            Some(door) => door.call(host, guest, epoch, call).await,
            None => Err(Problem::new(Code::StoreUnavailable, "the controller is starting; try again in a second")),
        }
    }

    /// A token with which a guest may move, freeze and look at itself, and nothing else. It replaces the one before.
    pub(super) async fn guest_token(&self, host: HostId, guest: GuestId, epoch: Epoch) -> Result<Answer, Problem> {
        let context = Context::actor(format!("guest:{guest}"), RequestId::generate());
        let made = retry_conflicts(|| async {
            let record = self.state.read::<GuestRecord>(&guest).await?;
            let Some(record) = record.filter(|record| record.owner.is_owned_by(host, epoch)) else { return Ok(None) };
            let (token, secret) = auth::new_guest_token(&record.guest, unix_ms() + GUEST_TOKEN_MS);
            let mut change = Change::new();
            change.unchanged(&record);
            match self.state.read::<TokenRecord>(&token.token.id).await? {
                Some(before) => token.replace_in(&before, &mut change),
                None => token.store_in(&mut change),
            }
            self.state.commit(&context, change).await?;
            Ok::<_, EngineError>(Some(secret))
        })
        .await
        .map_err(|error| internal(&error))?;
        let secret = made.ok_or_else(not_owned)?;
        let (api_url, ca_pem) = (self.reach.api_url.clone(), self.authority.pem().to_owned());
        Ok(Answer::GuestToken { secret, api_url, ca_pem, life_ms: GUEST_TOKEN_MS })
    }
}
