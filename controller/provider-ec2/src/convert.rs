//! The SDK's types into ours.

use aws_sdk_ec2::{
    error::{DisplayErrorContext, ProvideErrorMetadata, SdkError},
    types::{self, InstanceLifecycleType, InstanceStateName, InstanceTypeInfo, UsageClassType},
};
use supercloud_api::Tenure;
use supercloud_provider::{FaultDomains, Instance, InstanceState, InstanceType, Nesting, ProviderError};

use crate::error_of_code;

/// Whose a machine is.
pub const OWNER_TAG: &str = "supercloud-owner";
/// Which order made it.
pub const TOKEN_TAG: &str = "supercloud-token";

const MIB: u64 = 1 << 20;

/// The SDK's error as ours.
#[expect(clippy::needless_pass_by_value, reason = "it stands in map_err, which gives the error away")]
pub fn error<E, R>(error: SdkError<E, R>) -> ProviderError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
    R: std::fmt::Debug,
{
    match &error {
        SdkError::ServiceError(service) => {
            let known = service.err();
            error_of_code(known.code().unwrap_or_default(), known.message().unwrap_or_default())
        }
        // Not sent at all: no credentials, no such name.
        SdkError::ConstructionFailure(_) => {
            ProviderError::Denied { what: DisplayErrorContext(&error).to_string().chars().take(300).collect() }
        }
        _ => ProviderError::Failed { what: DisplayErrorContext(&error).to_string().chars().take(300).collect() },
    }
}

fn nesting(info: &InstanceTypeInfo) -> Nesting {
    if info.bare_metal() == Some(true) {
        return Nesting::Always;
    }
    let features = info.processor_info().map(types::ProcessorInfo::supported_features).unwrap_or_default();
    match features.iter().any(|feature| feature.as_str() == "nested-virtualization") {
        true => Nesting::OnRequest,
        false => Nesting::Never,
    }
}

/// A type of the catalogue. `None`: it lacks what makes a machine, so that it is not offered.
pub fn instance_type(info: &InstanceTypeInfo) -> Option<InstanceType> {
    let cpu = info.processor_info().map(|cpu| {
        let clock = cpu.sustained_clock_speed_in_ghz().map(|ghz| format!(" {ghz} GHz")).unwrap_or_default();
        let architecture = cpu.supported_architectures().last().map_or("", types::ArchitectureType::as_str);
        format!("{} {architecture}{clock}", cpu.manufacturer().unwrap_or("?"))
    });
    Some(InstanceType {
        name: info.instance_type()?.as_str().to_owned(),
        vcpus: u32::try_from(info.v_cpu_info()?.default_v_cpus()?).ok().filter(|n| *n > 0)?,
        memory_bytes: u64::try_from(info.memory_info()?.size_in_mib()?).ok()?.checked_mul(MIB)?,
        cpu,
        nesting: nesting(info),
        spot: info.supported_usage_classes().contains(&UsageClassType::Spot),
    })
}

fn state(name: Option<&InstanceStateName>) -> InstanceState {
    match name {
        Some(InstanceStateName::Pending) => InstanceState::Starting,
        Some(InstanceStateName::Running) => InstanceState::Running,
        Some(InstanceStateName::Terminated) => InstanceState::Gone,
        // A stopped one still pays for its disk.
        _ => InstanceState::Ending,
    }
}

/// A machine. `None`: it carries no token or id, so that it is not one of ours.
pub fn instance(told: &types::Instance, region: &str) -> Option<Instance> {
    let tag = |key: &str| told.tags().iter().find(|tag| tag.key() == Some(key)).and_then(|tag| tag.value());
    let zone = told.placement().and_then(|placement| placement.availability_zone());
    let instance_type = told.instance_type().map(|of| of.as_str().to_owned()).unwrap_or_default();
    let tenure = match told.instance_lifecycle() {
        Some(InstanceLifecycleType::Spot) => Tenure::Spot,
        _ => Tenure::OnDemand,
    };
    let pool = zone.filter(|_| tenure == Tenure::Spot).map(|zone| format!("{zone}/{instance_type}"));
    Some(Instance {
        id: told.instance_id()?.to_owned(),
        token: tag(TOKEN_TAG)?.to_owned(),
        state: state(told.state().and_then(|state| state.name())),
        tenure,
        address: told.public_ip_address().or(told.private_ip_address()).and_then(|address| address.parse().ok()),
        launched_at_ms: told.launch_time().and_then(|at| at.to_millis().ok()).and_then(|ms| u64::try_from(ms).ok()),
        domains: FaultDomains {
            provider: "aws".to_owned(),
            region: Some(region.to_owned()),
            zone: zone.map(str::to_owned),
            pool,
            build: None,
        },
        instance_type,
    })
}
