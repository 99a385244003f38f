//! Tokens: making, finding, and the first one.

use std::path::Path;

use base64::Engine as _;
use supercloud_api::{
    Guest, Name, Project, Quota, Role, Token,
    ids::{GuestId, HostId, ProjectId, TokenId},
    unix_ms,
};

use crate::{
    keys::{self, KeyFileError, RootKey},
    state::{Change, Context, EventDraft, ProjectRecord, State, StateError, Stored, TokenRecord, keys as places},
};

const PREFIX: &str = "sct_";
const ENCODING: base64::engine::GeneralPurpose = base64::engine::general_purpose::URL_SAFE_NO_PAD;
/// The file with the first admin token's secret.
pub const ADMIN_TOKEN_FILE: &str = "admin.token";
/// The name of the first admin token.
const ADMIN_TOKEN_NAME: &str = "bootstrap-admin";
/// The project that is there from the start, and at hand when a token that is good for all names none.
pub const DEFAULT_PROJECT: &str = "default";

/// SHA-256 of a secret, hexadecimal.
#[must_use]
pub fn secret_sha256(secret: &str) -> String {
    hex::encode(ring::digest::digest(&ring::digest::SHA256, secret.as_bytes()).as_ref())
}

/// The text of a host's join token: its id-to-be, its secret, and the fingerprint of the CA that the agent is to trust.
#[must_use]
pub fn join_token(host: HostId, secret: &str, ca_fingerprint: &str) -> String {
    format!("scjoin.{host}.{secret}.{ca_fingerprint}")
}

/// A fresh token and its secret. Nothing is stored: [`TokenRecord::store_in`].
#[must_use]
pub fn new_token(
    name: Name,
    project: Option<ProjectId>,
    guest: Option<GuestId>,
    role: Role,
    expires_at_ms: Option<u64>,
) -> (TokenRecord, String) {
    let secret = format!("{PREFIX}{}", ENCODING.encode(rand::random::<[u8; 32]>()));
    (record(&secret, name, project, guest, role, expires_at_ms), secret)
}

/// The id of a guest's own token: the guest's, so that there is one at a time, and a new secret replaces the one before.
#[must_use]
pub const fn guest_token_id(guest: GuestId) -> TokenId {
    TokenId::from_uuid(guest.uuid())
}

/// A guest's own token with a fresh secret. Nothing is stored: [`TokenRecord::store_in`], [`TokenRecord::replace_in`].
#[must_use]
pub fn new_guest_token(guest: &Guest, expires_at_ms: u64) -> (TokenRecord, String) {
    let (name, project) = (guest.name.clone(), Some(guest.project));
    let (mut record, secret) = new_token(name, project, Some(guest.id), Role::Operator, Some(expires_at_ms));
    record.token.id = guest_token_id(guest.id);
    (record, secret)
}

fn record(
    secret: &str,
    name: Name,
    project: Option<ProjectId>,
    guest: Option<GuestId>,
    role: Role,
    expires_at_ms: Option<u64>,
) -> TokenRecord {
    let token = Token { id: TokenId::generate(), name, project, guest, role, expires_at_ms, created_at_ms: unix_ms() };
    TokenRecord { token, secret_sha256: secret_sha256(secret) }
}

impl TokenRecord {
    /// Adds a new token to a change.
    pub fn store_in(&self, change: &mut Change) {
        let token = &self.token;
        change.create(self).claim(places::token_secret(&self.secret_sha256), token.id).event(
            EventDraft::new("token.created")
                .project(token.project)
                .guest(token.guest)
                .data(serde_json::json!({ "token": token.id, "name": token.name, "role": token.role })),
        );
    }

    /// Adds a token's new secret to a change: the one before stops working.
    pub fn replace_in(&self, before: &Stored<Self>, change: &mut Change) {
        let token = &self.token;
        change
            .update(before, self)
            .release(places::token_secret(&before.secret_sha256))
            .claim(places::token_secret(&self.secret_sha256), token.id)
            .event(
                EventDraft::new("token.renewed")
                    .project(token.project)
                    .guest(token.guest)
                    .data(serde_json::json!({ "token": token.id, "name": token.name })),
            );
    }

    /// Adds the removal of a token to a change.
    pub fn remove_in(before: &Stored<Self>, change: &mut Change) {
        let token = &before.token;
        change.delete(before).release(places::token_secret(&before.secret_sha256)).event(
            EventDraft::new("token.deleted")
                .project(token.project)
                .guest(token.guest)
                .data(serde_json::json!({ "token": token.id, "name": token.name })),
        );
    }
}

/// The token of a secret, if there is one and it has not expired.
///
/// # Errors
/// When the store does not answer.
pub async fn token_of_secret(state: &State, secret: &str, now_ms: u64) -> Result<Option<Token>, StateError> {
    // What does not look like one is not worth a look-up.
    if secret.len() != PREFIX.len() + 43 || !secret.starts_with(PREFIX) {
        return Ok(None);
    }
    let Some(id) = state.read_index(places::token_secret(&secret_sha256(secret))).await? else { return Ok(None) };
    let Ok(id) = id.parse::<TokenId>() else { return Ok(None) };
    token_of_id(state, id, now_ms).await
}

/// The token of an id, if it has not expired.
///
/// # Errors
/// When the store does not answer.
pub async fn token_of_id(state: &State, id: TokenId, now_ms: u64) -> Result<Option<Token>, StateError> {
    let token = state.read::<TokenRecord>(&id).await?.map(|found| found.value.token);
    Ok(token.filter(|token| token.expires_at_ms.is_none_or(|at| now_ms < at)))
}

/// Why the first start failed.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The token's file.
    #[error("the bootstrap token's file")]
    File(#[from] KeyFileError),
    /// The state.
    #[error("the bootstrap token cannot be stored")]
    State(#[from] StateError),
    /// The file holds something else.
    #[error("{0} does not hold a token's secret")]
    Content(String),
}

/// At the first start (no project yet): writes the secret of an admin token to `admin.token` (0600) and stores the token
/// and the project `default`. A start that broke off in between goes on with the file that is there.
///
/// # Errors
/// When file or store cannot be written.
pub async fn bootstrap(state: &State, root: &RootKey, folder: &Path) -> Result<(), BootstrapError> {
    let reference = supercloud_api::Ref::from(DEFAULT_PROJECT);
    if state.find::<ProjectRecord>(None, &reference).await?.is_some() {
        return Ok(());
    }
    let path = folder.join(ADMIN_TOKEN_FILE);
    let name: Name = ADMIN_TOKEN_NAME.parse().expect("a constant name");
    let file = path.clone();
    let (token, secret) = new_token(name.clone(), None, None, Role::Admin, None);
    let secret = tokio::task::spawn_blocking(move || match keys::read_secret(&file)? {
        Some(kept) => Ok(String::from_utf8_lossy(kept.trim_ascii()).into_owned()),
        None => keys::write_file(&file, format!("{secret}\n").as_bytes(), 0o600).map(|()| secret),
    })
    .await
    .map_err(|_| BootstrapError::Content(path.display().to_string()))??;
    if secret.len() != PREFIX.len() + 43 || !secret.starts_with(PREFIX) {
        return Err(BootstrapError::Content(path.display().to_string()));
    }
    let token = TokenRecord { secret_sha256: secret_sha256(&secret), ..token };
    let project = new_project(DEFAULT_PROJECT.parse().expect("a constant name"), Quota::default(), root);
    let mut change = Change::new();
    token.store_in(&mut change);
    project.store_in(&mut change);
    match state.commit(&Context::system(), change).await {
        // Another controller on the same store was first.
        Err(StateError::Conflict { .. }) => Ok(()),
        other => other.map(drop).map_err(BootstrapError::State),
    }
}

/// A fresh project with a key of its own. Nothing is stored.
#[must_use]
pub fn new_project(name: Name, quota: Quota, root: &RootKey) -> ProjectRecord {
    let id = ProjectId::generate();
    let sealed = root.seal(&format!("project-key/{id}"), &rand::random::<[u8; 32]>());
    ProjectRecord { project: Project { id, name, quota, created_at_ms: unix_ms() }, sealed_key: hex::encode(sealed) }
}

impl ProjectRecord {
    /// Adds a new project to a change.
    pub fn store_in(&self, change: &mut Change) {
        let project = &self.project;
        change.create_named(self).event(
            EventDraft::new("project.created").project(project.id).data(serde_json::json!({ "name": project.name })),
        );
    }
}
