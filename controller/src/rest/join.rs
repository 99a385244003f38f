//! Hosts join: an admin makes a one-time token, an agent exchanges it for a certificate of a key that it made itself.
//!
//! The token is used by compare-and-set of its record. The agent that used it may repeat the request (its answer may have been
//! lost): the same token with the same key gives the same host; with another key it is worth nothing.

use axum::{body::Bytes, extract::State, http::HeaderMap};
use base64::Engine as _;
use supercloud_api::{
    Cloud, Code, Host, HostState, JoinRequest, JoinResponse, JoinToken, JoinTokenCreate, Ref, Room, ids::HostId, tls,
    unix_ms,
};
use x509_parser::{certification_request::X509CertificationRequest, pem::parse_x509_pem, prelude::FromDer as _};

use super::{Api, Asker, Failure, Reply, body};
use crate::{
    auth::{join_token, secret_sha256},
    ca::CaError,
    state::{Change, EventDraft, HostRecord, JoinRecord, Named as _, StateError, Stored, keys, retry_conflicts},
};

/// The longest life of a join token, in seconds.
const MAX_SECONDS: u32 = 900;
/// Numbers of hosts in the overlay: 1 to this.
const MAX_INDEX: u16 = 4094;
const PREFIX: &str = "scjoin";
const ENCODING: base64::engine::GeneralPurpose = base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// A one-time token for an agent to join with. Its secret is shown this once.
#[utoipa::path(post, path = "/v1/join-tokens", tag = "hosts", request_body = JoinTokenCreate, responses((status = 201, body = JoinToken)))]
pub async fn create_token(
    State(api): State<Api>,
    asker: Asker,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: JoinTokenCreate = body(&headers, &bytes)?;
    if !(1..=MAX_SECONDS).contains(&wanted.expires_in_s) {
        return Err(Failure::bad(format!("expires_in_s is {}; it must be 1 to {MAX_SECONDS}", wanted.expires_in_s)));
    }
    let secret = new_secret();
    let host = HostId::generate();
    retry_conflicts(|| async {
        let cloud = asker.find::<Cloud>(&api.parts, &wanted.cloud).await?;
        let taken = api.parts.state.find::<HostRecord>(None, &Ref::from(wanted.host_name.as_str())).await?;
        if taken.is_some() {
            return Err(Failure::name_taken(HostRecord::NOUN, &wanted.host_name));
        }
        let record = JoinRecord {
            secret_sha256: secret_sha256(&secret),
            host,
            host_name: wanted.host_name.clone(),
            cloud: cloud.id,
            expires_at_ms: unix_ms().saturating_add(u64::from(wanted.expires_in_s) * 1000),
            used_for_key: None,
        };
        let mut change = Change::new();
        change.create(&record).event(
            EventDraft::new("host.join_token")
                .host(host)
                .data(serde_json::json!({ "name": record.host_name, "cloud": cloud.name })),
        );
        let token = join_token(host, &secret, &api.parts.authority.fingerprint());
        let answer = JoinToken { host, token, expires_at_ms: record.expires_at_ms };
        let reply = Reply::created(format!("/v1/hosts/{host}"), &answer)?.secret();
        asker.commit(&api.parts, None, change, reply).await
    })
    .await
}

/// The secret of a join token: 32 random bytes.
pub(super) fn new_secret() -> String {
    ENCODING.encode(rand::random::<[u8; 32]>())
}

fn invalid() -> Failure {
    // One answer for unknown, used and expired: nothing is learnt by trying.
    Failure::new(Code::Unauthenticated, "this join token is not valid (any more); make a new one")
}

/// Host and secret of a token's text.
fn parse_token(text: &str) -> Option<(HostId, &str)> {
    let mut parts = text.trim().split('.');
    let (prefix, host, secret, fingerprint) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_whole = prefix == PREFIX && secret.len() == 43 && fingerprint.len() == 64 && parts.next().is_none();
    if is_whole { Some((host.parse().ok()?, secret)) } else { None }
}

/// SHA-256 of a CSR's public key (SubjectPublicKeyInfo, DER), hex.
fn key_sha256(csr_pem: &str) -> Option<String> {
    let (_, pem) = parse_x509_pem(csr_pem.as_bytes()).ok()?;
    let (_, csr) = X509CertificationRequest::from_der(&pem.contents).ok()?;
    let key = csr.certification_request_info.subject_pki.raw;
    Some(hex::encode(ring::digest::digest(&ring::digest::SHA256, key).as_ref()))
}

/// Joins a host: called by an agent with its one-time token and a CSR.
#[utoipa::path(post, path = "/v1/join", tag = "hosts", request_body = JoinRequest, responses((status = 200, body = JoinResponse)))]
pub async fn join(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: JoinRequest = body(&headers, &bytes)?;
    let (host, secret) = parse_token(&wanted.token).ok_or_else(invalid)?;
    let hash = secret_sha256(secret);
    retry_conflicts(|| async {
        let state = &api.parts.state;
        let found = state.read::<JoinRecord>(&hash).await?.filter(|record| record.host == host);
        let record = found.filter(|record| unix_ms() < record.expires_at_ms).ok_or_else(invalid)?;
        // The token is good: now what came with it may be looked at.
        let key = key_sha256(&wanted.csr_pem).ok_or_else(|| Failure::bad("csr_pem is no PKCS#10 request in PEM"))?;
        if record.used_for_key.as_ref().is_some_and(|used| *used != key) {
            return Err(invalid());
        }
        let certificate_pem = api.parts.authority.sign_host(host, &wanted.csr_pem).map_err(|error| match error {
            CaError::Csr(what) => Failure::bad(format!("csr_pem: {what}")),
            other => {
                tracing::error!(error = %crate::chain(&other), "a host's certificate cannot be made");
                Failure::new(Code::Internal, "the certificate cannot be made; see the controller's log")
            }
        })?;
        let fingerprint = tls::certificates_of_pem(&certificate_pem)
            .ok()
            .and_then(|chain| chain.first().map(tls::fingerprint))
            .ok_or_else(|| Failure::new(Code::Internal, "the certificate cannot be read back"))?;
        let mut change = Change::new();
        match state.read::<HostRecord>(&host).await? {
            None => first_join(&api, &record, &fingerprint, key, &mut change).await?,
            Some(before) if before.is_removed => return Err(invalid()),
            Some(before) => {
                let mut now = before.value.clone();
                now.host.certificate_sha256 = fingerprint;
                change.update(&before, &now).unchanged(&record);
            }
        }
        let answer = JoinResponse {
            host,
            certificate_pem,
            ca_pem: api.parts.authority.pem().to_owned(),
            link_address: api.parts.link_address.get().cloned().unwrap_or_else(|| api.parts.config.link_address()),
        };
        let mut context = asker.context(None);
        context.actor = format!("host:{host}");
        state.commit(&context, change).await?;
        Reply::ok(&answer)
    })
    .await
}

/// The host's record comes to be, and the token is used.
async fn first_join(
    api: &Api,
    record: &Stored<JoinRecord>,
    fingerprint: &str,
    key: String,
    change: &mut Change,
) -> Result<(), Failure> {
    let state = &api.parts.state;
    if state.find::<HostRecord>(None, &Ref::from(record.host_name.as_str())).await?.is_some() {
        return Err(Failure::name_taken(HostRecord::NOUN, &record.host_name));
    }
    let cloud = state.need::<Cloud>(&record.cloud).await?;
    let index = free_index(api).await?;
    let host = Host {
        id: record.host,
        name: record.host_name.clone(),
        cloud: cloud.id,
        cloud_name: cloud.name.clone(),
        state: HostState::Unreachable,
        data_address: None,
        overlay_address: None,
        overlay_encryption: None,
        overlay_index: index,
        capacity: Room::default(),
        used: Room::default(),
        compat_classes: Vec::new(),
        probe: serde_json::Value::Null,
        agent_version: String::new(),
        certificate_sha256: fingerprint.to_owned(),
        last_seen_ms: 0,
        moves_live: true,
        notice: None,
        created_at_ms: unix_ms(),
    };
    crate::ledger::keep_host(state, &host, change).await?;
    let used = JoinRecord { used_for_key: Some(key), ..record.value.clone() };
    change
        .update(record, &used)
        .unchanged(&cloud)
        .claim(keys::host_index(index), host.id)
        .create_named(&HostRecord { host, is_cordoned: false, is_removed: false, withdrawn: None })
        .event(
            EventDraft::new("host.joined")
                .host(record.host)
                .data(serde_json::json!({ "name": record.host_name, "cloud": cloud.name })),
        );
    Ok(())
}

/// The smallest overlay number that no host has, or ever had.
async fn free_index(api: &Api) -> Result<u16, Failure> {
    let taken: std::collections::HashSet<u16> = api
        .parts
        .state
        .index(&keys::folder("host-index"))
        .await?
        .iter()
        .filter_map(|(index, _)| index.parse().ok())
        .collect();
    (1..=MAX_INDEX)
        .find(|index| !taken.contains(index))
        .ok_or_else(|| Failure::new(Code::QuotaExceeded, format!("there have been {MAX_INDEX} hosts")))
}

/// Removes join tokens that have expired.
pub(super) async fn sweep(parts: &crate::app::Parts, now_ms: u64) -> Result<usize, StateError> {
    let mut removed = 0;
    for record in parts.state.list::<JoinRecord>().await? {
        if now_ms >= record.expires_at_ms {
            let mut change = Change::new();
            change.delete(&record);
            match parts.state.commit(&crate::state::Context::system(), change).await {
                Ok(_) => removed += 1,
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_tokens_are_looked_up() {
        let host = HostId::generate();
        let (secret, fingerprint) = ("s".repeat(43), "f".repeat(64));
        let good = format!("scjoin.{host}.{secret}.{fingerprint}");
        assert_eq!(parse_token(&format!("{good}\n")), Some((host, secret.as_str())));
        for bad in [
            String::new(),
            good.replace("scjoin", "sct"),
            format!("{good}.x"),
            format!("scjoin.{host}.{secret}"),
            format!("scjoin.x.{secret}.{fingerprint}"),
            format!("scjoin.{host}.short.{fingerprint}"),
        ] {
            assert_eq!(parse_token(&bad), None, "{bad}");
        }
    }
}
