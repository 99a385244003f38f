//! Why a call failed, as data: the variant decides what is done next.

use std::time::Duration;

/// What a failed launch leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaunchOutcome {
    /// Nothing was launched, and asking again for the same changes nothing soon: the order is over.
    Refused,
    /// Nothing was launched; the same order may be granted later.
    NotYet,
    /// Nobody knows: look for the token, or repeat the order with the same one.
    Unknown,
}

/// Why a call to a provider failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProviderError {
    /// The provider has none of these now.
    #[error("the provider has no capacity: {what}")]
    NoCapacity {
        /// In the provider's words.
        what: String,
    },
    /// The account may not rent more.
    #[error("the account's quota is used up: {what}")]
    Quota {
        /// In the provider's words.
        what: String,
    },
    /// The price is above what was to be paid at most.
    #[error("the price is above the limit: {what}")]
    PriceTooHigh {
        /// In the provider's words.
        what: String,
    },
    /// The order is not acceptable.
    #[error("the provider does not take this order: {what}")]
    BadOrder {
        /// In the provider's words.
        what: String,
    },
    /// The credentials are missing, wrong, or not allowed to do this.
    #[error("the provider denies this: {what}")]
    Denied {
        /// In the provider's words.
        what: String,
    },
    /// This driver, or this provider, cannot do that.
    #[error("this provider cannot do that: {what}")]
    Unsupported {
        /// What it cannot do.
        what: String,
    },
    /// Too many calls.
    #[error("the provider asks for fewer calls: {what}")]
    Throttled {
        /// In the provider's words.
        what: String,
    },
    /// No answer came within the budget.
    #[error("the provider did not answer {call} within {} s", budget.as_secs())]
    Deadline {
        /// The call.
        call: &'static str,
        /// Its budget.
        budget: Duration,
    },
    /// The provider cannot be reached, failed, or was not understood.
    #[error("the provider failed: {what}")]
    Failed {
        /// What happened.
        what: String,
    },
}

impl ProviderError {
    /// What a launch that failed so leaves behind. Whatever is not known to have done nothing counts as unknown.
    #[must_use]
    pub const fn launch_outcome(&self) -> LaunchOutcome {
        match self {
            Self::NoCapacity { .. }
            | Self::Quota { .. }
            | Self::PriceTooHigh { .. }
            | Self::BadOrder { .. }
            | Self::Denied { .. }
            | Self::Unsupported { .. } => LaunchOutcome::Refused,
            Self::Throttled { .. } => LaunchOutcome::NotYet,
            Self::Deadline { .. } | Self::Failed { .. } => LaunchOutcome::Unknown,
        }
    }
}
