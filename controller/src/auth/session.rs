//! Sessions of browsers: what a sign-in with a token leaves in a cookie.
//!
//! A session is the token's id and an end, sealed with the root key; nothing is kept of it here. It is worth what its token is
//! worth at each request: a deleted token ends all its sessions at once. Signing out removes the cookie from the browser.
//!
//! A cookie is sent by the browser, not by the page, so that foreign pages must be kept from using it: `SameSite=Strict`, and
//! whatever is not a GET must carry the header [`CSRF_HEADER`], which no foreign page can send without a consent (CORS) that is
//! never given.

use axum::http::{HeaderMap, HeaderValue, header};
use supercloud_api::ids::TokenId;

use crate::keys::RootKey;

/// The header that a request with a cookie must carry unless it only reads.
pub const CSRF_HEADER: &str = "x-supercloud-csrf";
/// How long a session lasts.
pub const SESSION_MS: u64 = 12 * 3600 * 1000;
const PURPOSE: &str = "browser-session/1";
const SECURE_NAME: &str = "__Host-supercloud";
const PLAIN_NAME: &str = "supercloud";

/// A browser's session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// The token that signed in.
    pub token: TokenId,
    /// When the session ends.
    pub ends_at_ms: u64,
}

const fn name(is_tls: bool) -> &'static str {
    if is_tls { SECURE_NAME } else { PLAIN_NAME }
}

impl Session {
    /// The cookie's value.
    fn seal(self, root: &RootKey) -> String {
        let plain = format!("{} {}", self.token, self.ends_at_ms);
        hex::encode(root.seal(PURPOSE, plain.as_bytes()))
    }

    fn open(root: &RootKey, value: &str) -> Option<Self> {
        // Longer ones are not ours; nothing is decoded for them.
        let sealed = (value.len() <= 512).then(|| hex::decode(value).ok()).flatten()?;
        let plain = String::from_utf8(root.open(PURPOSE, &sealed)?).ok()?;
        let (token, ends_at_ms) = plain.split_once(' ')?;
        Some(Self { token: token.parse().ok()?, ends_at_ms: ends_at_ms.parse().ok()? })
    }

    /// The session of a request that has not ended at `now_ms`, if it carries one.
    #[must_use]
    pub fn of(root: &RootKey, headers: &HeaderMap, is_tls: bool, now_ms: u64) -> Option<Self> {
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut values = cookies
            .flat_map(|text| text.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .filter_map(|(found, value)| (found == name(is_tls)).then_some(value));
        values.find_map(|value| Self::open(root, value)).filter(|session| now_ms < session.ends_at_ms)
    }

    /// `Set-Cookie` of this session.
    #[must_use]
    pub fn cookie(self, root: &RootKey, is_tls: bool, now_ms: u64) -> Option<HeaderValue> {
        let seconds = self.ends_at_ms.saturating_sub(now_ms) / 1000;
        cookie(&self.seal(root), seconds, is_tls)
    }

    /// `Set-Cookie` that removes it.
    #[must_use]
    pub fn no_cookie(is_tls: bool) -> Option<HeaderValue> {
        cookie("", 0, is_tls)
    }
}

fn cookie(value: &str, seconds: u64, is_tls: bool) -> Option<HeaderValue> {
    let secure = if is_tls { "; Secure" } else { "" };
    let text = format!("{}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}", name(is_tls));
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn a_session_is_read_back_until_it_ends_and_with_its_own_key_only() {
        let root = RootKey::from_bytes(&[7; 32]);
        let session = Session { token: TokenId::generate(), ends_at_ms: 5_000 };
        for is_tls in [true, false] {
            let cookie = session.cookie(&root, is_tls, 1_000).unwrap();
            let text = cookie.to_str().unwrap();
            assert!(text.contains("Max-Age=4;") && text.contains("HttpOnly; SameSite=Strict"), "{text}");
            assert_eq!(text.contains("Secure"), is_tls);
            let pair = text.split(';').next().unwrap();
            let sent = headers(&format!("other=1; {pair}"));
            assert_eq!(Session::of(&root, &sent, is_tls, 4_999), Some(session));
            assert_eq!(Session::of(&root, &sent, is_tls, 5_000), None);
            assert_eq!(Session::of(&root, &sent, !is_tls, 1_000), None);
            assert_eq!(Session::of(&RootKey::from_bytes(&[8; 32]), &sent, is_tls, 1_000), None);
        }
    }

    #[test]
    fn what_is_not_ours_is_no_session() {
        let root = RootKey::from_bytes(&[7; 32]);
        let other = hex::encode(root.seal("another purpose", b"x 1"));
        for value in ["", "zz", "00", &"0".repeat(10_000), &other] {
            assert_eq!(Session::of(&root, &headers(&format!("supercloud={value}")), false, 0), None);
        }
    }
}
