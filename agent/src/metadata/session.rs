//! Session tokens: keyed, so that none has to be stored; good for one guest and a time. They end with the agent, or when the
//! guest moves: clients ask for another when one is refused.

use ring::{hmac, rand::SystemRandom};
use supercloud_ids::GuestId;

/// The longest life of a token, in seconds; as IMDSv2.
pub const MAX_SECONDS: u64 = 21_600;

/// Makes and checks session tokens.
pub struct Sessions(hmac::Key);

impl Sessions {
    /// With a fresh key.
    pub fn new() -> Self {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        // Without randomness no token can be trusted; a key of the time of day would be one.
        #[expect(clippy::expect_used, reason = "the system's randomness is there on every Linux that runs this")]
        Self(key.expect("the system gives randomness"))
    }

    fn sign(&self, guest: GuestId, expires_at_ms: u64) -> hmac::Tag {
        hmac::sign(&self.0, format!("{guest} {expires_at_ms}").as_bytes())
    }

    /// A token for a guest.
    pub fn make(&self, guest: GuestId, seconds: u64, now_ms: u64) -> String {
        let expires_at_ms = now_ms.saturating_add(seconds.min(MAX_SECONDS) * 1000);
        format!("{expires_at_ms:x}.{}", hex::encode(self.sign(guest, expires_at_ms)))
    }

    /// Whether a token is this guest's and still good.
    pub fn is_good(&self, token: &str, guest: GuestId, now_ms: u64) -> bool {
        if token.len() > 128 {
            return false;
        }
        let Some((expires, tag)) = token.split_once('.') else { return false };
        let (Ok(expires_at_ms), Ok(tag)) = (u64::from_str_radix(expires, 16), hex::decode(tag)) else { return false };
        let said = format!("{guest} {expires_at_ms}");
        expires_at_ms > now_ms && hmac::verify(&self.0, said.as_bytes(), &tag).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_one_guest_and_a_time() {
        let sessions = Sessions::new();
        let (guest, other) = (GuestId::generate(), GuestId::generate());
        let token = sessions.make(guest, 60, 1_000);
        assert!(sessions.is_good(&token, guest, 1_000));
        assert!(sessions.is_good(&token, guest, 60_999));
        assert!(!sessions.is_good(&token, guest, 61_000));
        assert!(!sessions.is_good(&token, other, 1_000));
        assert!(!Sessions::new().is_good(&token, guest, 1_000));
        let later = token.replacen(|c: char| c.is_ascii_hexdigit(), "f", 1);
        assert!(!sessions.is_good(&later, guest, 1_000));
        for bad in ["", ".", "1.", "x.y", &"f".repeat(300)] {
            assert!(!sessions.is_good(bad, guest, 0), "{bad}");
        }
    }
}
