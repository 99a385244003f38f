//! Whether a guest could leave its host in time.

use axum::extract::{Path, State};
use supercloud_api::{Code, Evacuation, Ref};

use super::{Api, Asker, Failure, Reply};
use crate::evacuation::Outlook;

/// How long a guest would take to leave its host now, and whether that is within the notice. Looked at anew, not what was found last.
#[utoipa::path(get, path = "/v1/guests/{guest}/evacuation", tag = "guests", responses((status = 200, body = Evacuation)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    let all = Outlook::take(&api.parts).await?.all();
    match all.iter().find(|one| one.guest == found.guest.id) {
        Some(evacuation) => Reply::ok(evacuation),
        None => Err(Failure::new(Code::WrongState, format!("guest {} does not run", found.guest.name))),
    }
}
