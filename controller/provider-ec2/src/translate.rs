//! EC2's words into ours, without asking anybody.
//!
//! Error codes: <https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html>.

use std::collections::BTreeMap;

use supercloud_provider::{PricePoint, ProviderError, Series};
use supercloud_scheduler::money::NanoUsd;

/// The longest text of EC2's that is kept.
const WORDS_AT_MOST: usize = 300;

/// What an error code means for us. A code that is not known to have done nothing counts as a failure of unknown outcome.
#[must_use]
pub fn error_of_code(code: &str, message: &str) -> ProviderError {
    let what: String = format!("{code}: {message}").chars().take(WORDS_AT_MOST).collect();
    match code {
        "InsufficientInstanceCapacity"
        | "InsufficientCapacity"
        | "InsufficientHostCapacity"
        | "InsufficientReservedInstanceCapacity"
        | "SpotInstanceCapacityNotAvailable" => ProviderError::NoCapacity { what },
        "InstanceLimitExceeded"
        | "VcpuLimitExceeded"
        | "MaxSpotInstanceCountExceeded"
        | "MaxSpotFleetRequestCountExceeded"
        | "VolumeLimitExceeded"
        | "AddressLimitExceeded"
        | "InsufficientFreeAddressesInSubnet"
        | "ResourceLimitExceeded" => ProviderError::Quota { what },
        "SpotMaxPriceTooLow" => ProviderError::PriceTooHigh { what },
        "UnauthorizedOperation"
        | "AuthFailure"
        | "OptInRequired"
        | "Blocked"
        | "PendingVerification"
        | "InvalidClientTokenId"
        | "SignatureDoesNotMatch"
        | "UnrecognizedClientException"
        | "MissingAuthenticationToken"
        | "ExpiredToken"
        | "RequestExpired" => ProviderError::Denied { what },
        "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequestsException"
        | "EC2ThrottledException"
        | "BandwidthLimitExceeded" => ProviderError::Throttled { what },
        "Unsupported" | "UnsupportedOperation" | "UnsupportedInstanceTypeOnCapacityReservation" => {
            ProviderError::Unsupported { what }
        }
        // The token was used with other settings: there is a machine, and the listing will tell of it.
        "IdempotentParameterMismatch" | "IdempotentInstanceTerminated" => ProviderError::Failed { what },
        "MissingParameter" | "UnknownParameter" | "ValidationError" | "MalformedQueryString" => {
            ProviderError::BadOrder { what }
        }
        _ if code.starts_with("Invalid") => ProviderError::BadOrder { what },
        _ => ProviderError::Failed { what },
    }
}

/// A price as EC2 writes it: `0.034500`.
///
/// # Errors
/// What is wrong with it.
pub fn price(text: &str) -> Result<NanoUsd, ProviderError> {
    NanoUsd::parse_usd(text).map_err(|error| ProviderError::Failed { what: format!("a price: {error}") })
}

/// A price as EC2 reads it, exact: `0.034500000`.
#[cfg(any(feature = "sdk", test))]
pub(crate) fn price_text(price: NanoUsd) -> String {
    format!("{}.{:09}", price.0 / 1_000_000_000, price.0 % 1_000_000_000)
}

/// Series made of a history's entries (zone, type, time in ms, price), which EC2 tells newest first and across pages. One that was
/// told twice counts once; of two prices at one time the later told one holds no longer.
#[must_use]
pub fn series(entries: impl IntoIterator<Item = (String, String, u64, NanoUsd)>) -> Vec<Series> {
    let mut by_market: BTreeMap<(String, String), BTreeMap<u64, NanoUsd>> = BTreeMap::new();
    for (zone, instance_type, at_ms, per_hour) in entries {
        by_market.entry((zone, instance_type)).or_default().entry(at_ms).or_insert(per_hour);
    }
    by_market
        .into_iter()
        .map(|((zone, instance_type), points)| Series {
            instance_type,
            zone,
            points: points.into_iter().map(|(at_ms, per_hour)| PricePoint { at_ms, per_hour }).collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use supercloud_provider::LaunchOutcome;

    use super::*;

    #[test]
    fn codes_say_whether_anything_was_launched() {
        let outcome = |code: &str| error_of_code(code, "m").launch_outcome();
        for refused in
            ["InsufficientInstanceCapacity", "VcpuLimitExceeded", "SpotMaxPriceTooLow", "InvalidAMIID.NotFound"]
        {
            assert_eq!(outcome(refused), LaunchOutcome::Refused, "{refused}");
        }
        assert_eq!(outcome("RequestLimitExceeded"), LaunchOutcome::NotYet);
        for unknown in ["InternalError", "Unavailable", "IdempotentParameterMismatch", "SomethingNew", ""] {
            assert_eq!(outcome(unknown), LaunchOutcome::Unknown, "{unknown}");
        }
        let long = error_of_code("InternalError", &"x".repeat(10_000)).to_string();
        assert!(long.len() < 400, "what a server says is cut");
    }

    #[test]
    fn histories_become_series_oldest_first_without_repeats() {
        let entry = |zone: &str, at, usd: &str| (zone.to_owned(), "m".to_owned(), at, price(usd).unwrap());
        let told = [entry("b", 5, "0.2"), entry("a", 9, "0.034500"), entry("a", 3, "0.03"), entry("a", 9, "0.034500")];
        let series = series(told);
        assert_eq!(series.len(), 2);
        let points: Vec<(u64, u64)> = series[0].points.iter().map(|point| (point.at_ms, point.per_hour.0)).collect();
        assert_eq!((series[0].zone.as_str(), points), ("a", vec![(3, 30_000_000), (9, 34_500_000)]));
        assert!(price("free").is_err());
        assert_eq!(price_text(NanoUsd(1_034_500_000)), "1.034500000");
    }
}
