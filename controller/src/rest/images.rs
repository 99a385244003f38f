//! Images: record, upload, import.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Code, Image, ImageCreate, ImageImport, ImagePart, ImageState, Operation, OperationKind, Page, Ref, Site,
    UploadDigest, Volume,
    ids::{ImageId, OperationId},
    unix_ms,
};

use super::{Api, Asker, Failure, Reply, body, uploads::MAX_DIGEST_BYTES};
use crate::{
    sites,
    state::{Change, EventDraft, GuestRecord, Named as _, OperationRecord, Stored, Work, keys, retry_conflicts},
};

/// Longest kernel command line, in bytes.
const MAX_CMDLINE_BYTES: usize = 2048;

/// The image as the API shows it: with what has been uploaded by now.
async fn shown(api: &Api, image: &Image) -> Result<Image, Failure> {
    let mut image = image.clone();
    if image.state == ImageState::Uploading {
        image.uploaded = api.uploads.sizes(image.id).await?;
    }
    Ok(image)
}

/// Images.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = Page<Image>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |image: &Image| scope.is_none_or(|project| image.project == project);
    let (found, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    let mut items = Vec::with_capacity(found.len());
    for image in &found {
        items.push(shown(&api, image).await?);
    }
    Reply::ok(&Page { items, next_page })
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{image}", tag = "images", responses((status = 200, body = Image)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(image): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Image>(&api.parts, &Ref::from(image)).await?;
    Ok(Reply::ok(&shown(&api, &found).await?)?.at(found.revision))
}

/// Where an image lies: in the controller's own store, and in the stores of clouds in which guests run from it.
#[utoipa::path(get, path = "/v1/images/{image}/sites", tag = "images", responses((status = 200, body = Page<Site>)))]
pub async fn sites(State(api): State<Api>, asker: Asker, Path(image): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Image>(&api.parts, &Ref::from(image)).await?;
    Reply::ok(&Page { items: sites::of_image(&api.parts, &found).await?, next_page: None })
}

/// Makes an image record. Its parts are uploaded next.
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = ImageCreate, responses((status = 201, body = Image)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: ImageCreate = body(&headers, &bytes)?;
    if let Some(cmdline) = &wanted.cmdline {
        if cmdline.len() > MAX_CMDLINE_BYTES {
            return Err(Failure::bad(format!("cmdline has {} bytes; at most {MAX_CMDLINE_BYTES}", cmdline.len())));
        }
        if cmdline.chars().any(char::is_control) {
            return Err(Failure::bad("cmdline has control characters"));
        }
    }
    let project = asker.project(&api.parts, wanted.project.as_ref()).await?.project.id;
    let image = Image {
        id: ImageId::generate(),
        project,
        name: wanted.name,
        state: ImageState::Uploading,
        cmdline: wanted.cmdline,
        parts: Vec::new(),
        uploaded: Vec::new(),
        created_at_ms: unix_ms(),
    };
    retry_conflicts(|| async {
        if api.parts.state.find::<Image>(Some(project), &Ref::from(image.name.as_str())).await?.is_some() {
            return Err(Failure::name_taken(Image::NOUN, &image.name));
        }
        let mut change = Change::new();
        change.create_named(&image).event(
            EventDraft::new("image.created")
                .project(project)
                .data(serde_json::json!({ "image": image.id, "name": image.name })),
        );
        let reply = Reply::created(format!("/v1/images/{}", image.id), &image)?;
        asker.commit(&api.parts, project, change, reply).await
    })
    .await
}

fn need_uploading(image: &Image) -> Result<(), Failure> {
    let now = match image.state {
        ImageState::Uploading => return Ok(()),
        ImageState::Importing => "is being imported",
        ImageState::Ready => "is ready, and does not change any more",
        ImageState::Failed => "failed to import; delete it and make it anew",
    };
    Err(Failure::new(Code::WrongState, format!("image {} {now}", image.name)))
}

/// The part that a path names.
pub(super) fn part_of(part: String) -> Result<ImagePart, Failure> {
    serde_json::from_value(serde_json::Value::String(part))
        .map_err(|_| Failure::bad("a part is disk, kernel or initrd"))
}

/// Uploads the next piece of a part: `?offset=` is how much of it is kept so far. At most 8 MiB.
#[utoipa::path(put, path = "/v1/images/{image}/parts/{part}", tag = "images", request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses((status = 200, body = Image)))]
pub async fn upload(
    State(api): State<Api>,
    asker: Asker,
    Path((image, part)): Path<(String, String)>,
    piece: Bytes,
) -> Result<Reply, Failure> {
    let part = part_of(part)?;
    let offset = asker.params.offset.ok_or_else(|| Failure::bad("say where the piece goes: ?offset=<bytes>"))?;
    if piece.is_empty() {
        return Err(Failure::bad("the piece is empty"));
    }
    let found = asker.find::<Image>(&api.parts, &Ref::from(image)).await?;
    need_uploading(&found)?;
    api.uploads.append(found.id, part, offset, piece).await?;
    Reply::ok(&shown(&api, &found).await?)
}

/// What a stretch of the uploaded part is, from `?offset=` on for `?bytes=` (at most 1 GiB; so much when absent): for who goes on
/// with an upload.
#[utoipa::path(get, path = "/v1/images/{image}/parts/{part}", tag = "images", responses((status = 200, body = UploadDigest)))]
pub async fn uploaded(
    State(api): State<Api>,
    asker: Asker,
    Path((image, part)): Path<(String, String)>,
) -> Result<Reply, Failure> {
    let part = part_of(part)?;
    let (offset, bytes) = (asker.params.offset.unwrap_or(0), asker.params.bytes.unwrap_or(MAX_DIGEST_BYTES));
    if !(1..=MAX_DIGEST_BYTES).contains(&bytes) {
        return Err(Failure::bad(format!("bytes is {bytes}; it must be 1 to {MAX_DIGEST_BYTES}")));
    }
    let found = asker.find::<Image>(&api.parts, &Ref::from(image)).await?;
    need_uploading(&found)?;
    // Two at a time for each token, and few in all: each reads a GiB, to its end also when nobody waits for it any more.
    let turn = api.exports.take(&asker)?;
    let (bytes, digest) = api.uploads.digest(found.id, part, offset, bytes, turn).await?;
    Reply::ok(&UploadDigest { part, offset, bytes, blake3: digest.to_hex().to_string() })
}

fn import_operation(asker: &Asker, image: &Image) -> Operation {
    let planned = asker.context(image.project).planned(OperationId::generate(), OperationKind::ImageImport);
    Operation { project: Some(image.project), image: Some(image.id), ..planned }
}

/// Starts the import of what was uploaded.
#[utoipa::path(post, path = "/v1/images/{image}/import", tag = "images", request_body = ImageImport, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn import(
    State(api): State<Api>,
    asker: Asker,
    Path(image): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: ImageImport = body(&headers, &bytes)?;
    let reference = Ref::from(image);
    retry_conflicts(|| async {
        let found = asker.find::<Image>(&api.parts, &reference).await?;
        need_uploading(&found)?;
        let uploaded = api.uploads.sizes(found.id).await?;
        if !uploaded.iter().any(|part| part.part == ImagePart::Disk && part.bytes > 0) {
            return Err(Failure::new(
                Code::WrongState,
                "upload the disk first: PUT /v1/images/{id}/parts/disk?offset=0",
            ));
        }
        let operation = import_operation(&asker, &found);
        if asker.params.dry_run {
            return Reply::ok(&operation);
        }
        let mut change = Change::new();
        let now = Image { state: ImageState::Importing, uploaded, ..found.value.clone() };
        let record =
            OperationRecord { operation: operation.clone(), work: Work::ImageImport { format: wanted.format } };
        change.update(&found, &now).create_operation(&record);
        asker.commit(&api.parts, found.project, change, Reply::accepted(&operation)?).await
    })
    .await
}

/// What still needs an image, in words.
async fn needed_by(api: &Api, image: &Stored<Image>) -> Result<Option<String>, Failure> {
    let guests = api.parts.state.list::<GuestRecord>().await?;
    if let Some(guest) = guests.iter().find(|record| record.guest.image == image.id) {
        return Ok(Some(format!("guest {}", guest.guest.name)));
    }
    let volumes = api.parts.state.list::<Volume>().await?;
    Ok(volumes.iter().find(|volume| volume.image == Some(image.id)).map(|volume| format!("volume {}", volume.name)))
}

/// Deletes an image that nothing needs.
#[utoipa::path(delete, path = "/v1/images/{image}", tag = "images", responses((status = 204)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(image): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(image);
    let (reply, image) = retry_conflicts(|| async {
        let found = asker.find::<Image>(&api.parts, &reference).await?;
        if found.state == ImageState::Importing {
            return Err(Failure::new(Code::OperationInProgress, "the image is being imported"));
        }
        // Whoever makes a guest from it passes the same guard.
        let guard = keys::usage_guard(found.project);
        let guarded = api.parts.state.revision_of(guard.clone()).await?;
        if let Some(user) = needed_by(&api, &found).await? {
            return Err(Failure::new(Code::WrongState, format!("{user} needs image {}", found.name)));
        }
        let mut change = Change::new();
        change.delete_named(&found).guard(guard, guarded).event(
            EventDraft::new("image.deleted")
                .project(found.project)
                .data(serde_json::json!({ "image": found.id, "name": found.name })),
        );
        Ok((asker.commit(&api.parts, found.project, change, Reply::nothing()).await?, found.id))
    })
    .await?;
    if !asker.params.dry_run {
        api.uploads.remove(image).await?;
    }
    Ok(reply)
}
