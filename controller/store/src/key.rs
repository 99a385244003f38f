//! Keys, prefixes and values: checked when they are made, so that a store need not check again.

use std::{borrow::Borrow, fmt, str::FromStr};

use bytes::Bytes;

use crate::StoreError;

/// The longest key or prefix, in bytes.
pub const MAX_KEY_BYTES: usize = 512;
/// The largest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 1 << 20;

/// Where something is kept: a path of UTF-8 segments, `guests/gst-0192…`.
///
/// 1 to [`MAX_KEY_BYTES`] bytes, no control characters, no empty segment (so no slash at either end).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Box<str>);

impl Key {
    /// Checks and takes a path.
    pub fn new(path: impl Into<String>) -> Result<Self, StoreError> {
        let path = path.into();
        let reason = if path.is_empty() {
            "it is empty"
        } else if path.ends_with('/') {
            "it ends with a slash"
        } else if let Some(reason) = prefix_fault(&path) {
            reason
        } else {
            return Ok(Self(path.into_boxed_str()));
        };
        Err(refused(&path, reason))
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path's bytes, which give the order of keys.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// What follows `prefix`, if this key starts with it.
    pub fn strip_prefix(&self, prefix: &Prefix) -> Option<&str> {
        self.0.strip_prefix(prefix.as_str())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Key {
    type Err = StoreError;
    fn from_str(path: &str) -> Result<Self, StoreError> {
        Self::new(path)
    }
}

impl TryFrom<&str> for Key {
    type Error = StoreError;
    fn try_from(path: &str) -> Result<Self, StoreError> {
        Self::new(path)
    }
}

impl TryFrom<String> for Key {
    type Error = StoreError;
    fn try_from(path: String) -> Result<Self, StoreError> {
        Self::new(path)
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The beginning of keys, compared byte by byte: empty for all keys, `guests/` for what is below `guests`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Prefix(Box<str>);

impl Prefix {
    /// Checks and takes a prefix: empty, or something that a [`Key`] can begin with.
    pub fn new(text: impl Into<String>) -> Result<Self, StoreError> {
        let text = text.into();
        match prefix_fault(&text) {
            Some(reason) => Err(refused(&text, reason)),
            None => Ok(Self(text.into_boxed_str())),
        }
    }

    /// The prefix of every key.
    pub fn all() -> Self {
        Self("".into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Whether `key` starts with this prefix.
    pub fn matches(&self, key: &Key) -> bool {
        key.as_bytes().starts_with(self.as_bytes())
    }

    /// The first byte string after all those that start with `prefix`; `None` when there is none (an empty prefix, or
    /// one of 0xff bytes only).
    pub fn end_of(prefix: &[u8]) -> Option<Vec<u8>> {
        let last = prefix.iter().rposition(|&b| b != 0xff)?;
        let mut end = prefix[..=last].to_vec();
        end[last] += 1;
        Some(end)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<&str> for Prefix {
    type Error = StoreError;
    fn try_from(text: &str) -> Result<Self, StoreError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Prefix {
    type Error = StoreError;
    fn try_from(text: String) -> Result<Self, StoreError> {
        Self::new(text)
    }
}

/// What is kept at a key: at most [`MAX_VALUE_BYTES`] bytes, cheap to clone.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Value(Bytes);

impl Value {
    /// Checks and takes a value.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Self, StoreError> {
        let bytes = bytes.into();
        if bytes.len() > MAX_VALUE_BYTES {
            return Err(StoreError::ValueTooLarge { bytes: bytes.len(), limit: MAX_VALUE_BYTES });
        }
        Ok(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, owned.
    pub fn into_bytes(self) -> Bytes {
        self.0
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Values hold keys and tokens: only the size is shown.
impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Value({} bytes)", self.len())
    }
}

fn prefix_fault(text: &str) -> Option<&'static str> {
    if text.len() > MAX_KEY_BYTES {
        Some("it is longer than 512 bytes")
    } else if text.starts_with('/') {
        Some("it starts with a slash")
    } else if text.contains("//") {
        Some("it has an empty segment")
    } else if text.chars().any(char::is_control) {
        Some("it has a control character")
    } else {
        None
    }
}

fn refused(text: &str, reason: &'static str) -> StoreError {
    StoreError::InvalidKey { key: text.chars().take(64).flat_map(char::escape_default).collect(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_paths() {
        for good in ["a", "a/b", "guests/gst-1", "ü/\u{10ffff}", "a b/c", &"k".repeat(512)] {
            assert_eq!(Key::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "/", "/a", "a/", "a//b", "a\0b", "a\nb", "a/\u{85}", &"k".repeat(513)] {
            assert!(matches!(Key::new(bad), Err(StoreError::InvalidKey { .. })), "{bad:?}");
        }
    }

    #[test]
    fn prefixes_begin_keys() {
        for good in ["", "a", "a/", "a/b"] {
            assert!(Prefix::new(good).is_ok(), "{good:?}");
        }
        for bad in ["/", "a//", "\u{7f}"] {
            assert!(Prefix::new(bad).is_err(), "{bad:?}");
        }
        let key = Key::new("guests/1").unwrap();
        assert!(Prefix::new("guests").unwrap().matches(&key));
        assert_eq!(key.strip_prefix(&Prefix::new("guests/").unwrap()), Some("1"));
    }

    #[test]
    fn the_end_of_a_prefix_skips_ff_bytes() {
        assert_eq!(Prefix::end_of(b"a/"), Some(b"a0".to_vec()));
        assert_eq!(Prefix::end_of(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(Prefix::end_of(b"\xff\xff"), None);
        assert_eq!(Prefix::end_of(b""), None);
    }

    #[test]
    fn values_are_capped_and_not_shown() {
        assert!(Value::new(vec![0; MAX_VALUE_BYTES]).is_ok());
        assert!(matches!(Value::new(vec![0; MAX_VALUE_BYTES + 1]), Err(StoreError::ValueTooLarge { .. })));
        assert_eq!(format!("{:?}", Value::new("secret").unwrap()), "Value(6 bytes)");
    }
}
