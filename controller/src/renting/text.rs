//! What people and machines are told: problems, the first boot's script.

use supercloud_api::{Code, Phase, Problem, Renting, RentingEnd, RentingState, ids::HostId};
use supercloud_provider::ProviderError;

/// What a client is told of a provider's error.
#[must_use]
pub fn problem(error: &ProviderError) -> Problem {
    let code = match error {
        ProviderError::NoCapacity { .. } | ProviderError::PriceTooHigh { .. } => Code::NoCapacity,
        ProviderError::Quota { .. } => Code::QuotaExceeded,
        ProviderError::BadOrder { .. } => Code::BadRequest,
        ProviderError::Unsupported { .. } => Code::Unsupported,
        ProviderError::Throttled { .. } => Code::TooManyRequests,
        _ => Code::HostUnavailable,
    };
    // A provider's words may be of any length.
    Problem::new(code, error.to_string().chars().take(500).collect::<String>())
}

/// Where the operation is that rents it, and what went wrong.
pub(super) fn rent_phase(renting: &Renting) -> (Phase, Option<Problem>) {
    match renting.state {
        RentingState::Recorded => (Phase::Plan, None),
        RentingState::Asked => (Phase::Prepare, None),
        _ if renting.up_at_ms.is_some() => (Phase::Done, None),
        RentingState::Ended => {
            let end = match renting.end {
                Some(RentingEnd::NeverJoined) => Problem::new(
                    Code::HostUnavailable,
                    "the host's agent did not join in time; the host was given back",
                ),
                Some(RentingEnd::Taken) => {
                    Problem::new(Code::NoCapacity, "the provider took the machine before its agent had joined")
                }
                _ => Problem::new(Code::WrongState, "it was given back before its agent had joined"),
            };
            (Phase::RolledBack, Some(renting.error.clone().unwrap_or(end)))
        }
        RentingState::Launched | RentingState::Up | RentingState::Returning => (Phase::Copy, None),
    }
}

/// Where the operation is that gives it back.
pub(super) fn return_phase(renting: &Renting) -> Phase {
    if renting.state == RentingState::Ended { Phase::Done } else { Phase::Finish }
}

/// The script of a machine whose image has an agent installed; for others an operator writes one.
pub(super) const USER_DATA: &str = "\
#cloud-config
hostname: {{host_name}}
write_files:
- path: /etc/supercloud/join-token
  permissions: '0600'
  content: '{{join_token}}'
runcmd:
- [systemctl, enable, --now, supercloud-agent]
";

/// A script with the names in it replaced.
pub(super) fn user_data(template: &str, controller_url: &str, host_name: &str, join_token: &str) -> String {
    template
        .replace("{{controller_url}}", controller_url)
        .replace("{{host_name}}", host_name)
        .replace("{{join_token}}", join_token)
}

/// The kind of the event that tells of a new state.
pub(super) const fn event_kind(state: RentingState) -> &'static str {
    match state {
        RentingState::Recorded => "renting.recorded",
        RentingState::Asked => "renting.asked",
        RentingState::Launched => "renting.launched",
        RentingState::Up => "renting.up",
        RentingState::Returning => "renting.returning",
        RentingState::Ended => "renting.ended",
    }
}

/// What a renting's secret is sealed for.
#[must_use]
pub fn secret_purpose(host: HostId) -> String {
    format!("renting-secret/{host}")
}
