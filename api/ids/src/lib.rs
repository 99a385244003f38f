//! Typed identities: every id is a UUIDv7 in a type of its own, so that a guest's id cannot be passed for a volume's.
//!
//! Text form: a prefix that names the kind, a dash, and the UUID in its hyphenated form (`gst-0192…`). The
//! prefix is required when parsing, so that a mixed-up id is an error at the boundary and not a 404 later.
//! Ids are never reused.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// Why a text is not the id that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The text does not start with the kind's prefix.
    #[error("'{text}' is not {kind} id: it should start with '{prefix}-'")]
    Prefix {
        /// What was given (cut to 64 characters).
        text: String,
        /// The kind with its article, for example `a guest`.
        kind: &'static str,
        /// The prefix that was expected.
        prefix: &'static str,
    },
    /// What follows the prefix is not a hyphenated UUID.
    #[error("'{text}' is not {kind} id: what follows the prefix is no UUID")]
    Uuid {
        /// What was given (cut to 64 characters).
        text: String,
        /// The kind with its article.
        kind: &'static str,
    },
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// The prefix of the text form.
            pub const PREFIX: &'static str = $prefix;

            /// A new id: UUIDv7, ordered by time of making.
            #[must_use]
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }

            /// An id made of a given UUID; for stores and tests.
            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID below the text form.
            #[must_use]
            pub const fn uuid(&self) -> Uuid {
                self.0
            }

            /// The first characters of the random part: short, for folder and device names and tables. Not unique by promise.
            #[must_use]
            pub fn short(&self) -> String {
                self.0.simple().to_string()[22..32].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0.hyphenated())
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let cut = || text.chars().take(64).collect::<String>();
                let rest = text
                    .strip_prefix(concat!($prefix, "-"))
                    .ok_or_else(|| IdError::Prefix { text: cut(), kind: $kind, prefix: $prefix })?;
                // `parse_str` also takes braced and simple forms; one id has one text form.
                match Uuid::parse_str(rest) {
                    Ok(uuid) if rest.len() == 36 => Ok(Self(uuid)),
                    _ => Err(IdError::Uuid { text: cut(), kind: $kind }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .pattern(Some(concat!("^", $prefix, "-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")))
                    .into()
            }
        }

        impl utoipa::ToSchema for $name {
            fn name() -> std::borrow::Cow<'static, str> {
                std::borrow::Cow::Borrowed(stringify!($name))
            }
        }
    )*};
}

ids! {
    /// A provider region or zone in which hosts are rented.
    CloudId, "cld", "a cloud";
    /// A machine that runs an agent.
    HostId, "hst", "a host";
    /// A user's virtual machine.
    GuestId, "gst", "a guest";
    /// The tenant that owns guests, volumes, networks, tokens.
    ProjectId, "prj", "a project";
    /// Immutable content a volume can start from.
    ImageId, "img", "an image";
    /// A guest's writable disk.
    VolumeId, "vol", "a volume";
    /// A point in a volume's history.
    SnapshotId, "snp", "a snapshot";
    /// A project's private L2 segment.
    NetworkId, "net", "a network";
    /// A guest's attachment to a network.
    PortId, "prt", "a port";
    /// A durable, resumable piece of work.
    OperationId, "opn", "an operation";
    /// Guests that go together.
    GroupId, "grp", "a group";
    /// A guest suspended into the image store.
    FreezeId, "frz", "a freeze";
    /// An access token (the secret itself is never an id).
    TokenId, "tok", "a token";
    /// A host rented from a provider, from the order to its end.
    RentingId, "rnt", "a renting";
    /// Moves of many guests, decided together.
    PlanId, "pln", "a plan";
    /// One request, for tracing an effect back to its cause.
    RequestId, "req", "a request";
}

/// The generation of a guest's ownership. Whoever writes, serves or announces for a guest carries it; what is below
/// the current one is refused (design: "One owner").
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch before a guest was ever started.
    pub const ZERO: Epoch = Epoch(0);

    /// The epoch after this one. Saturates: 2^64 switches do not happen.
    #[must_use]
    pub const fn next(self) -> Epoch {
        Epoch(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_names_its_kind() {
        let id = GuestId::generate();
        assert_eq!(id.to_string().parse::<GuestId>(), Ok(id));
        assert!(id.to_string().starts_with("gst-"));
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<GuestId>(&json).unwrap(), id);
    }

    #[test]
    fn an_id_of_another_kind_is_refused_by_name() {
        let err = HostId::generate().to_string().parse::<GuestId>().unwrap_err();
        assert!(err.to_string().contains("not a guest id"), "{err}");
    }

    #[test]
    fn only_the_hyphenated_form_is_an_id() {
        for bad in
            ["gst-", "gst-00000000000000000000000000000000", "gst-{0192d6a0-0000-7000-8000-000000000000}", "", "gst"]
        {
            assert!(bad.parse::<GuestId>().is_err(), "{bad}");
        }
    }
}
