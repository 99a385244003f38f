//! Projects.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{Page, Project, ProjectCreate, Ref};

use super::{Api, Asker, Failure, Reply, body};
use crate::{
    auth::new_project,
    state::{Change, Named as _, ProjectRecord, retry_conflicts},
};

/// The projects that the token can see.
#[utoipa::path(get, path = "/v1/projects", tag = "projects", responses((status = 200, body = Page<Project>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |record: &ProjectRecord| scope.is_none_or(|project| record.project.id == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|record| record.value.project).collect(), next_page })
}

/// One project.
#[utoipa::path(get, path = "/v1/projects/{project}", tag = "projects", responses((status = 200, body = Project)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(project): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<ProjectRecord>(&api.parts, &Ref::from(project)).await?;
    Ok(Reply::ok(&found.project)?.at(found.revision))
}

/// Makes a project.
#[utoipa::path(post, path = "/v1/projects", tag = "projects", request_body = ProjectCreate, responses((status = 201, body = Project)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: ProjectCreate = body(&headers, &bytes)?;
    let record = new_project(wanted.name, wanted.quota.unwrap_or_default(), &api.parts.keys.root);
    let project = &record.project;
    retry_conflicts(|| async {
        if api.parts.state.find::<ProjectRecord>(None, &Ref::from(project.name.as_str())).await?.is_some() {
            return Err(Failure::name_taken(ProjectRecord::NOUN, &project.name));
        }
        let mut change = Change::new();
        record.store_in(&mut change);
        let reply = Reply::created(format!("/v1/projects/{}", project.id), project)?;
        asker.commit(&api.parts, project.id, change, reply).await
    })
    .await
}
