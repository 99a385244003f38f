//! Renting hosts and giving them back. The provider is not asked here: see [`crate::renting`].

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Cloud, Code, HostRent, JoinToken, Operation, OperationKind, Page, Phase, PhaseTime, Ref, Renting, RentingEnd,
    RentingState, Tenure,
    ids::{HostId, OperationId, RentingId},
    unix_ms,
};

use super::{Api, Asker, Failure, Reply, body, join};
use crate::{
    auth::join_token,
    renting::machine::{self, Event, Limits},
    state::{
        Change, EventDraft, HostRecord, Named as _, OperationRecord, RentingRecord, Stored, Work, keys, retry_conflicts,
    },
};

/// Rentings that have not ended, at most: a loop somewhere should not rent a data center.
const OPEN_AT_MOST: usize = 1000;

fn operation(asker: &Asker, kind: OperationKind, host: HostId) -> Operation {
    Operation { destination: Some(host), ..asker.context(None).planned(OperationId::generate(), kind) }
}

/// All rentings, oldest first, also those that have ended.
#[utoipa::path(get, path = "/v1/rentings", tag = "hosts", responses((status = 200, body = Page<Renting>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let (items, next_page) =
        api.parts.state.page::<RentingRecord>(asker.params.page()?.as_ref(), asker.params.limit()?, |_| true).await?;
    Reply::ok(&Page { items: items.into_iter().map(|record| record.value.renting).collect(), next_page })
}

async fn find(api: &Api, asker: &Asker, id: &str) -> Result<Stored<RentingRecord>, Failure> {
    asker.find::<RentingRecord>(&api.parts, &Ref::from(id)).await
}

/// One renting.
#[utoipa::path(get, path = "/v1/rentings/{renting}", tag = "hosts", responses((status = 200, body = Renting)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    let found = find(&api, &asker, &id).await?;
    Ok(Reply::ok(&found.renting)?.at(found.revision))
}

/// Whether the settings can do this at all; the provider itself has the last word.
fn check(api: &Api, cloud: &Cloud, wanted: &HostRent) -> Result<(), Failure> {
    let Some(configured) = api.parts.providers.get(&cloud.provider) else {
        let what = format!(
            "nothing is rented in cloud {}: no provider '{}' is in [[providers]] of the controller's settings; hosts join \
             there with a join token",
            cloud.name, cloud.provider
        );
        return Err(Failure::new(Code::Unsupported, what));
    };
    if wanted.tenure == Tenure::Spot && !configured.provider.abilities().spot {
        let what = format!("tenure: provider '{}' has no spot market", cloud.provider);
        return Err(Failure::new(Code::Unsupported, what));
    }
    if wanted.tenure == Tenure::OnDemand && wanted.max_price_nanousd_per_hour.is_some() {
        return Err(Failure::bad("max_price_nanousd_per_hour is for tenure spot"));
    }
    if !(1..=64).contains(&wanted.instance_type.len()) || !wanted.instance_type.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Failure::bad("instance_type must be 1 to 64 printable characters"));
    }
    Ok(())
}

/// Rents a host: the order is durable when this answers, and is carried out by an operation.
#[utoipa::path(post, path = "/v1/clouds/{cloud}/rent", tag = "hosts", request_body = HostRent, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn rent(
    State(api): State<Api>,
    asker: Asker,
    Path(cloud): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: HostRent = body(&headers, &bytes)?;
    let reference = Ref::from(cloud);
    let (id, host, secret) = (RentingId::generate(), HostId::generate(), join::new_secret());
    let operation = operation(&asker, OperationKind::HostRent, host);
    let reply = retry_conflicts(|| async {
        let state = &api.parts.state;
        let cloud = asker.find::<Cloud>(&api.parts, &reference).await?;
        check(&api, &cloud, &wanted)?;
        let name = Ref::from(wanted.host_name.as_str());
        let rented = state.read_index(keys::renting_name(wanted.host_name.as_str())).await?;
        if rented.is_some() || state.find::<HostRecord>(None, &name).await?.is_some() {
            return Err(Failure::name_taken(HostRecord::NOUN, &wanted.host_name));
        }
        let all = state.list::<RentingRecord>().await?;
        if all.iter().filter(|record| record.renting.state != RentingState::Ended).count() >= OPEN_AT_MOST {
            return Err(Failure::new(Code::QuotaExceeded, format!("{OPEN_AT_MOST} hosts are rented")));
        }
        if asker.params.dry_run {
            return Reply::ok(&operation);
        }
        let renting = machine::recorded(id, &cloud, host, &wanted, operation.id);
        let purpose = crate::renting::secret_purpose(host);
        let sealed_secret = hex::encode(api.parts.keys.root.seal(&purpose, secret.as_bytes()));
        let mut change = Change::new();
        change
            .unchanged(&cloud)
            .claim(keys::renting_name(wanted.host_name.as_str()), id)
            .create(&RentingRecord { renting, sealed_secret })
            .create_operation(&OperationRecord { operation: operation.clone(), work: Work::HostRent })
            .event(EventDraft::new("renting.recorded").host(host).operation(operation.id).data(serde_json::json!({
                "renting": id, "cloud": cloud.name, "name": wanted.host_name, "instance_type": wanted.instance_type,
                "tenure": wanted.tenure,
            })));
        asker.commit(&api.parts, None, change, Reply::accepted(&operation)?).await
    })
    .await?;
    api.parts.renting_wake.notify_waiters();
    Ok(reply)
}

/// Gives a rented host back: its certificate is denied at once, and the machine is ended until the provider confirms it. Refused as
/// removing the host would be.
#[utoipa::path(post, path = "/v1/rentings/{renting}/return", tag = "hosts", responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn give_back(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    let reply = retry_conflicts(|| async {
        let found = find(&api, &asker, &id).await?;
        if found.renting.state == RentingState::Ended {
            return Err(Failure::new(Code::WrongState, "the renting has ended already"));
        }
        if let Some(running) = found.renting.return_operation {
            let what = format!("it is being given back already: operation {running}");
            return Err(Failure::new(Code::OperationInProgress, what));
        }
        let operation = operation(&asker, OperationKind::HostReturn, found.renting.host);
        let mut change = Change::new();
        let host = api.parts.state.read::<HostRecord>(&found.renting.host).await?;
        if let Some(host) = host.filter(|host| !host.is_removed) {
            super::hosts::removal(&api, &host, asker.params.force, &mut change).await?;
        }
        if asker.params.dry_run {
            return Reply::ok(&operation);
        }
        let wanted = Renting { return_operation: Some(operation.id), ..found.renting.clone() };
        let now = machine::after(&wanted, Event::ReturnWanted, &Limits::default(), unix_ms());
        // One transaction: where the renting ends at once (nothing was launched), this operation begins and ends in it.
        let mut record = OperationRecord { operation: operation.clone(), work: Work::HostReturn };
        crate::renting::write(&api.parts.state, &found, &now, &mut change).await?;
        if now.end == Some(RentingEnd::Returned) {
            let at_ms = unix_ms();
            record.operation.phase = Phase::Done;
            record.operation.ended_at_ms = Some(at_ms);
            record.operation.phase_times.push(PhaseTime { phase: Phase::Done, at_ms });
            change.create(&record);
        } else {
            change.create_operation(&record);
        }
        asker.commit(&api.parts, None, change, Reply::accepted(&record.operation)?).await
    })
    .await?;
    api.parts.renting_wake.notify_waiters();
    Ok(reply)
}

/// The join token of a machine that somebody starts the agent on. It works for a quarter of an hour from now.
#[utoipa::path(post, path = "/v1/rentings/{renting}/join-token", tag = "hosts", responses((status = 201, body = JoinToken)))]
pub async fn new_join_token(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    let found = find(&api, &asker, &id).await?;
    let renting = &found.renting;
    if renting.state != RentingState::Launched || !renting.is_started_by_hand {
        let what = "only a machine that was reserved, that is started by hand and whose agent has not joined has a token to show";
        return Err(Failure::new(Code::WrongState, what));
    }
    let sealed = hex::decode(&found.sealed_secret).unwrap_or_default();
    let opened = api.parts.keys.root.open(&crate::renting::secret_purpose(renting.host), &sealed);
    let secret = opened
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| Failure::new(Code::Internal, "the join secret was sealed with another root key"))?;
    let expires_at_ms = crate::renting::renew_join(&api.parts.state, renting, &secret).await?;
    let token = join_token(renting.host, &secret, &api.parts.authority.fingerprint());
    Ok(Reply::created(format!("/v1/hosts/{}", renting.host), &JoinToken { host: renting.host, token, expires_at_ms })?
        .secret())
}
