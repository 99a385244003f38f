//! Names that people give, and references that are a name or an id.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

/// A name: 1 to 63 characters of `a-z`, `0-9`, `-`; starts with a letter, does not end with `-`. Unique per project and kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, pattern = "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a name: use 1 to 63 characters of a-z, 0-9 and '-', starting with a letter and not ending with '-'"
)]
pub struct NameError(String);

impl Name {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let good = (1..=63).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && text.as_bytes()[0].is_ascii_lowercase()
            && !text.ends_with('-')
            && !looks_like_id(text);
        if good { Ok(Self(text.to_owned())) } else { Err(NameError(text.chars().take(64).collect())) }
    }
}

/// Names work wherever ids do, so a name may not look like one: three letters, a dash and a UUID.
fn looks_like_id(text: &str) -> bool {
    text.len() == 40 && text.as_bytes()[3] == b'-' && text[4..].bytes().filter(|b| *b == b'-').count() == 4
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A reference to a resource: its id, or its name in the project at hand.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct Ref(pub String);

impl Ref {
    /// The text as given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Ref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<T: AsRef<str>> From<T> for Ref {
    fn from(text: T) -> Self {
        Self(text.as_ref().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels_that_start_with_a_letter() {
        for good in ["a", "web-1", "x234567890123456789012345678901234567890123456789012345678901ab"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "1web", "-a", "a-", "Web", "a_b", "a b", "ä", &"a".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_cannot_be_taken_for_an_id() {
        let id = supercloud_ids::GuestId::generate().to_string();
        assert!(id.parse::<Name>().is_err());
    }
}
