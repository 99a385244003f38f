//! Histories of volumes: what is kept, what an instant means, a point now.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use supercloud_api::{
    Code, DiskFrom, HistoryPolicy, Ref, Volume, VolumeAsOf, VolumeHistory,
    history::{AsOfRefusal, check_policy},
    ids::HostId,
    unix_ms,
};

use super::{Api, Asker, Failure, Reply, body};
use crate::{
    checkpoints,
    operations::points::askable,
    state::{Change, EventDraft, Stored, retry_conflicts},
};

fn none_of(volume: &Volume) -> Failure {
    Failure::new(
        Code::WrongState,
        format!("volume {} keeps no history; PUT /v1/volumes/{}/history begins one", volume.name, volume.name),
    )
}

fn refused(volume: &Volume, refusal: &AsOfRefusal) -> Failure {
    let code = match refusal {
        AsOfRefusal::Ahead { .. } => Code::BadRequest,
        _ => Code::WrongState,
    };
    Failure::new(code, format!("volume {}: {refusal}", volume.name))
}

/// What a guest's disk is to start from: the point that is meant, and the history that must not have changed by then.
pub(super) async fn meant(
    api: &Api,
    volume: &Volume,
    from: &DiskFrom,
) -> Result<(Stored<VolumeHistory>, VolumeAsOf), Failure> {
    let found = api.parts.state.read::<VolumeHistory>(&volume.id).await?;
    let history = found.ok_or_else(|| none_of(volume))?;
    let meant = match (from.as_of_ms, from.point) {
        (Some(asked_ms), None) => history.as_of(asked_ms, unix_ms()),
        (None, Some(number)) => {
            history.point(number).map(|point| VolumeAsOf { asked_ms: point.at_ms, point: point.clone(), older_ms: 0 })
        }
        _ => return Err(Failure::bad("disk_from: say one of as_of_ms and point")),
    };
    let meant = meant.map_err(|refusal| refused(volume, &refusal))?;
    Ok((history, meant))
}

/// The history of a volume: how points are taken and kept, and which there are.
#[utoipa::path(get, path = "/v1/volumes/{volume}/history", tag = "volumes", responses((status = 200, body = VolumeHistory)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let volume = asker.find::<Volume>(&api.parts, &Ref::from(volume)).await?;
    let found = api.parts.state.read::<VolumeHistory>(&volume.id).await?.ok_or_else(|| none_of(&volume))?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}

/// What a volume was as of `as_of_ms`: the newest point that is not younger, and how much older it is.
#[utoipa::path(get, path = "/v1/volumes/{volume}/as-of", tag = "volumes", responses((status = 200, body = VolumeAsOf)))]
pub async fn as_of(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let name = Ref::from(volume);
    let volume = asker.find::<Volume>(&api.parts, &name).await?;
    let Some(as_of_ms) = asker.params.as_of_ms else {
        return Err(Failure::bad("say as of when: ?as_of_ms=<milliseconds since 1970>"));
    };
    let from = DiskFrom { volume: name, as_of_ms: Some(as_of_ms), point: None };
    Reply::ok(&meant(&api, &volume, &from).await?.1)
}

/// Says how points of a volume are taken and kept, from now on; begins its history when there is none. What the new policy
/// does not keep goes at once.
#[utoipa::path(put, path = "/v1/volumes/{volume}/history", tag = "volumes", request_body = HistoryPolicy, responses((status = 200, body = VolumeHistory)))]
pub async fn set(
    State(api): State<Api>,
    asker: Asker,
    Path(volume): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let policy: HistoryPolicy = body(&headers, &bytes)?;
    check_policy(&policy).map_err(|fault| Failure::bad(fault.to_string()))?;
    let reference = Ref::from(volume);
    retry_conflicts(|| async {
        let volume = asker.find::<Volume>(&api.parts, &reference).await?;
        let found = api.parts.state.read::<VolumeHistory>(&volume.id).await?;
        let mut now = match &found {
            Some(found) => VolumeHistory { policy: policy.clone(), problem: None, ..found.value.clone() },
            None => VolumeHistory::begin(volume.id, volume.project, policy.clone(), volume.base.clone(), unix_ms()),
        };
        let thinned = now.thin_by_newest();
        if asker.params.dry_run {
            return Reply::ok(&now);
        }
        let mut change = Change::new();
        // A volume that is deleted meanwhile leaves no history behind.
        change.unchanged(&volume);
        match &found {
            Some(found) => change.update(found, &now),
            None => change.create(&now),
        };
        change.event(
            EventDraft::new("volume.history")
                .project(volume.project)
                .guest(volume.guest)
                .data(serde_json::json!({ "volume": volume.name, "policy": policy, "thinned": thinned })),
        );
        let reply = asker.commit(&api.parts, volume.project, change, Reply::ok(&now)?).await?;
        api.parts.points.reconsider(volume.id);
        Ok(reply)
    })
    .await
}

/// Ends a volume's history: all its points go.
#[utoipa::path(delete, path = "/v1/volumes/{volume}/history", tag = "volumes", responses((status = 204)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(volume);
    retry_conflicts(|| async {
        let volume = asker.find::<Volume>(&api.parts, &reference).await?;
        let found = api.parts.state.read::<VolumeHistory>(&volume.id).await?.ok_or_else(|| none_of(&volume))?;
        if asker.params.dry_run {
            return Ok(Reply::nothing());
        }
        let mut change = Change::new();
        change.delete(&found).event(
            EventDraft::new("volume.history_ended")
                .project(volume.project)
                .guest(volume.guest)
                .data(serde_json::json!({ "volume": volume.name, "points": found.points.len(), "head": found.head })),
        );
        asker.commit(&api.parts, volume.project, change, Reply::nothing()).await
    })
    .await
}

/// Has a point of a running guest's volume taken now. An event tells when it is: `volume.point`, or `volume.no_point` with why.
#[utoipa::path(post, path = "/v1/volumes/{volume}/points", tag = "volumes", responses((status = 202, body = VolumeHistory)))]
pub async fn take(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let volume = asker.find::<Volume>(&api.parts, &Ref::from(volume)).await?;
    let found = api.parts.state.read::<VolumeHistory>(&volume.id).await?.ok_or_else(|| none_of(&volume))?;
    let is_open = |host| api.parts.hosts.get(host).is_some();
    ask(&api, &asker, &volume, false, is_open).await?;
    let answer = Reply::json(StatusCode::ACCEPTED, &found.value)?;
    Ok(if asker.params.dry_run { answer.tried() } else { answer })
}

async fn ask(
    api: &Api,
    asker: &Asker,
    volume: &Volume,
    memory: bool,
    is_open: impl Fn(HostId) -> bool,
) -> Result<(), Failure> {
    let asked = askable(&api.parts.state, &api.parts.points, &api.parts.hosts, volume, memory, is_open).await;
    let asked = asked.map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
    let asked = asked.map_err(|why| Failure::new(Code::WrongState, why))?;
    if let Some(since) = api.parts.points.since(volume.id) {
        let why = format!("a point of volume {} has been under way for {} s", volume.name, since.as_secs());
        return Err(Failure::new(Code::WrongState, why));
    }
    if !asker.params.dry_run && !api.parts.points.ask(volume.id, asked) {
        return Err(Failure::new(Code::TooManyRequests, "too many points are under way"));
    }
    Ok(())
}

/// Has a checkpoint of a running guest taken now: memory, devices and disk of one instant, while it runs on. It is a point of its
/// volume's history, which is begun if there is none. An event tells when it is: `volume.point`, or `volume.no_point` with why.
#[utoipa::path(post, path = "/v1/guests/{guest}/checkpoints", tag = "guests", responses((status = 202, body = VolumeHistory)))]
pub async fn checkpoint(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let guest = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    let Some(volume) = guest.guest.volumes.first() else {
        return Err(Failure::new(Code::WrongState, format!("guest {} has no volume", guest.guest.name)));
    };
    let is_open = |host| api.parts.hosts.get(host).is_some();
    let volume = api.parts.state.need::<Volume>(volume).await?;
    // Before a history is begun in vain.
    let asked = askable(&api.parts.state, &api.parts.points, &api.parts.hosts, &volume, true, is_open).await;
    let asked = asked.map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
    asked.map_err(|why| Failure::new(Code::WrongState, why))?;
    let history = retry_conflicts(|| async {
        let volume = api.parts.state.need::<Volume>(&volume.id).await?;
        if let Some(found) = api.parts.state.read::<VolumeHistory>(&volume.id).await? {
            return Ok(found.value);
        }
        let mut change = Change::new();
        let begun = checkpoints::begin_history(&volume, &mut change);
        if asker.params.dry_run {
            return Ok(begun);
        }
        asker.commit(&api.parts, volume.project, change, Reply::ok(&begun)?).await?;
        Ok::<_, Failure>(begun)
    })
    .await?;
    ask(&api, &asker, &volume, true, is_open).await?;
    let answer = Reply::json(StatusCode::ACCEPTED, &history)?;
    Ok(if asker.params.dry_run { answer.tried() } else { answer })
}
