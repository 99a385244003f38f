//! Keys of WireGuard: 32 bytes in base64.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

/// The text is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a WireGuard key is 32 bytes in base64, not all of them zero")]
pub struct BadKey;

fn parse(text: &str) -> Result<[u8; 32], BadKey> {
    // 44 characters; said first, so that nobody decodes megabytes.
    if text.len() != 44 {
        return Err(BadKey);
    }
    let bytes: [u8; 32] = STANDARD.decode(text).map_err(|_| BadKey)?.try_into().map_err(|_| BadKey)?;
    if bytes == [0; 32] { Err(BadKey) } else { Ok(bytes) }
}

/// A host's public key (Curve25519).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        parse(text).map(Self)
    }
}

impl TryFrom<String> for PublicKey {
    type Error = BadKey;

    fn try_from(text: String) -> Result<Self, BadKey> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> Self {
        key.to_string()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A host's private key. It is never shown, and never leaves the host.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey([u8; 32]);

impl FromStr for PrivateKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        parse(text.trim_ascii_end()).map(Self)
    }
}

impl PrivateKey {
    /// The text that `wg` takes, and that a file keeps.
    #[must_use]
    pub fn reveal(&self) -> String {
        STANDARD.encode(self.0)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=";

    #[test]
    fn a_key_is_32_bytes_in_base64() {
        let key: PublicKey = KEY.parse().unwrap();
        assert_eq!(key.to_string(), KEY);
        assert_eq!(serde_json::from_str::<PublicKey>(&format!("\"{KEY}\"")).unwrap(), key);
        let zeros = STANDARD.encode([0; 32]);
        let short = STANDARD.encode([1; 31]);
        let injected = format!("{}\nAA=", &KEY[..40]);
        for bad in ["", "AAAA", &KEY[..43], &zeros, &short, &injected, &"A".repeat(1 << 20)] {
            assert_eq!(bad.parse::<PublicKey>(), Err(BadKey), "{bad:.60}");
        }
    }

    #[test]
    fn a_private_key_is_not_shown() {
        let key: PrivateKey = format!("{KEY}\n").parse().unwrap();
        assert!(!format!("{key:?}").contains("HIgo"));
        assert_eq!(key.reveal(), KEY);
    }
}
