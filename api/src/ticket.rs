//! Tickets: what the controller permits two agents to do with each other.
//!
//! A ticket names operation, guest, epoch, both hosts with their certificates' fingerprints, the volumes, the project and
//! an expiry, and is signed with the controller's Ed25519 key (RFC 8032). Without the matching certificate it is worth nothing.
//! Text form: `base64url(JSON) . base64url(signature)`.

use base64::Engine as _;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, HostId, OperationId, ProjectId, VolumeId};

const ENCODING: base64::engine::GeneralPurpose = base64::engine::general_purpose::URL_SAFE_NO_PAD;
/// Longest text that is looked at, in bytes.
const MAX_TEXT_BYTES: usize = 64 << 10;

/// A party of a ticket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    /// The host; absent: the controller itself (its chunk store).
    pub host: Option<HostId>,
    /// SHA-256 of its certificate (DER), hex.
    pub certificate_sha256: String,
}

/// What is permitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// Version of this structure.
    pub version: u16,
    /// The operation; absent for the chunks that a guest needs between operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<OperationId>,
    /// The project.
    pub project: ProjectId,
    /// The guest; absent for chunks alone.
    pub guest: Option<GuestId>,
    /// The epoch at the source.
    pub epoch: Epoch,
    /// Who gives.
    pub source: Party,
    /// Who takes.
    pub destination: Party,
    /// The volumes.
    pub volumes: Vec<VolumeId>,
    /// After this it is worth nothing (wall time).
    pub expires_at_ms: u64,
}

/// Why a ticket is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not in the text form.
    #[error("the ticket is malformed")]
    Malformed,
    /// The signature is not the controller's.
    #[error("the ticket's signature is not the controller's")]
    Signature,
    /// Too old.
    #[error("the ticket has expired")]
    Expired,
    /// A version this side does not know.
    #[error("the ticket's version is not known here")]
    Version,
    /// The peer's certificate is not the one it names.
    #[error("the ticket is bound to another certificate")]
    WrongParty,
}

/// The controller's signing key.
pub struct Signer(Ed25519KeyPair);

impl Signer {
    /// A fresh key in PKCS#8 form, to be kept 0600.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate_pkcs8() -> Result<Vec<u8>, ring::error::Unspecified> {
        Ok(Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new())?.as_ref().to_vec())
    }

    /// From PKCS#8.
    ///
    /// # Errors
    /// When the bytes are no such key.
    pub fn from_pkcs8(bytes: &[u8]) -> Result<Self, ring::error::KeyRejected> {
        Ed25519KeyPair::from_pkcs8(bytes).map(Self)
    }

    /// The public key, hex: what agents check with.
    #[must_use]
    pub fn public_key_hex(&self) -> String {
        hex::encode(self.0.public_key().as_ref())
    }

    /// The ticket in text form.
    ///
    /// # Panics
    /// Never: the type always serialises.
    #[must_use]
    pub fn sign(&self, ticket: &Ticket) -> String {
        let body = serde_json::to_vec(ticket).unwrap_or_default();
        let signature = self.0.sign(&body);
        format!("{}.{}", ENCODING.encode(&body), ENCODING.encode(signature.as_ref()))
    }
}

impl Ticket {
    /// The newest version of this structure.
    pub const VERSION: u16 = 1;

    /// Reads and checks a ticket: form, signature, version and expiry. Who the peer is must be checked with
    /// [`Ticket::check_peer`].
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn verify(text: &str, public_key_hex: &str, now_ms: u64) -> Result<Self, TicketError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(TicketError::Malformed);
        }
        let (body, signature) = text.split_once('.').ok_or(TicketError::Malformed)?;
        let body = ENCODING.decode(body).map_err(|_| TicketError::Malformed)?;
        let signature = ENCODING.decode(signature).map_err(|_| TicketError::Malformed)?;
        let key = hex::decode(public_key_hex).map_err(|_| TicketError::Signature)?;
        UnparsedPublicKey::new(&ED25519, key).verify(&body, &signature).map_err(|_| TicketError::Signature)?;
        let ticket: Self = serde_json::from_slice(&body).map_err(|_| TicketError::Malformed)?;
        if ticket.version != Self::VERSION {
            return Err(TicketError::Version);
        }
        if ticket.expires_at_ms <= now_ms {
            return Err(TicketError::Expired);
        }
        Ok(ticket)
    }

    /// Checks that the peer (by the SHA-256 of its certificate) is the other party than `me`, and that `me` is one.
    ///
    /// # Errors
    /// [`TicketError::WrongParty`].
    pub fn check_peer(&self, me_sha256: &str, peer_sha256: &str) -> Result<(), TicketError> {
        let (s, d) = (self.source.certificate_sha256.as_str(), self.destination.certificate_sha256.as_str());
        if (s, d) == (me_sha256, peer_sha256) || (d, s) == (me_sha256, peer_sha256) {
            Ok(())
        } else {
            Err(TicketError::WrongParty)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket() -> Ticket {
        let party = |c: &str| Party { host: Some(HostId::generate()), certificate_sha256: c.into() };
        Ticket {
            version: Ticket::VERSION,
            operation: Some(OperationId::generate()),
            project: ProjectId::generate(),
            guest: Some(GuestId::generate()),
            epoch: Epoch(4),
            source: party("aa"),
            destination: party("bb"),
            volumes: vec![VolumeId::generate()],
            expires_at_ms: 1000,
        }
    }

    #[test]
    fn a_ticket_holds_only_signed_unexpired_and_for_its_parties() {
        let signer = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
        let other = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
        let ticket = ticket();
        let text = signer.sign(&ticket);
        let key = signer.public_key_hex();
        assert_eq!(Ticket::verify(&text, &key, 999), Ok(ticket.clone()));
        assert_eq!(Ticket::verify(&text, &key, 1000), Err(TicketError::Expired));
        assert_eq!(Ticket::verify(&text, &other.public_key_hex(), 0), Err(TicketError::Signature));
        assert_eq!(ticket.check_peer("bb", "aa"), Ok(()));
        assert_eq!(ticket.check_peer("bb", "cc"), Err(TicketError::WrongParty));
        assert_eq!(ticket.check_peer("aa", "aa"), Err(TicketError::WrongParty));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let signer = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
        let text = signer.sign(&ticket()).into_bytes();
        for i in 0..text.len() {
            let mut bad = text.clone();
            bad[i] ^= 1;
            let Ok(bad) = String::from_utf8(bad) else { continue };
            // The last character of a base64 part has unused bits, but the strict decoder refuses them set.
            assert!(Ticket::verify(&bad, &signer.public_key_hex(), 0).is_err(), "byte {i}");
        }
    }
}
