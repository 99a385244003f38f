//! Own machines: nothing is launched. Renting one reserves it; somebody starts the agent there with the join token.

use std::net::IpAddr;

use serde::Deserialize;
use supercloud_api::Tenure;
use supercloud_scheduler::money::NanoUsd;

use crate::{
    Abilities, Call, FaultDomains, Instance, InstanceState, InstanceType, LaunchOrder, Nesting, Notice, PriceQuery,
    Provider, ProviderError, Series,
};

/// A machine of one's own.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Where it is: for people, and its name here.
    pub address: IpAddr,
    /// What it is; machines of one type are interchangeable.
    #[serde(rename = "type")]
    pub instance_type: String,
    /// CPUs.
    pub vcpus: u32,
    /// Memory, in GiB.
    pub memory_gib: u32,
    /// What it costs per hour in USD, for comparisons; nothing when absent.
    #[serde(default)]
    pub usd_per_hour: Option<String>,
}

/// The driver `static`.
#[derive(Debug)]
pub struct OwnMachines {
    provider: String,
    machines: Vec<Machine>,
    prices: Vec<Option<NanoUsd>>,
}

/// GiB in bytes.
const GIB: u64 = 1 << 30;
/// Machines of one provider.
const MACHINES_AT_MOST: usize = 4094;

impl OwnMachines {
    /// The machines of one place.
    ///
    /// # Errors
    /// A sentence that says what is wrong with which machine.
    pub fn new(provider: &str, machines: Vec<Machine>) -> Result<Self, String> {
        if machines.len() > MACHINES_AT_MOST {
            return Err(format!("{} machines; at most {MACHINES_AT_MOST} are taken", machines.len()));
        }
        let mut prices = Vec::with_capacity(machines.len());
        for (n, machine) in machines.iter().enumerate() {
            let at = machine.address;
            if machines[..n].iter().any(|other| other.address == at) {
                return Err(format!("machine {at} is listed twice"));
            }
            if machine.instance_type.is_empty() || machine.instance_type.len() > 64 {
                return Err(format!("machine {at}: its type must have 1 to 64 characters"));
            }
            let same = |other: &&Machine| other.instance_type == machine.instance_type;
            if let Some(first) = machines[..n].iter().find(same)
                && (first.vcpus, first.memory_gib) != (machine.vcpus, machine.memory_gib)
            {
                return Err(format!("machine {at} has another size than {}, of the same type", first.address));
            }
            if machine.vcpus == 0 || machine.memory_gib == 0 {
                return Err(format!("machine {at}: vcpus and memory_gib must be at least 1"));
            }
            let price = machine.usd_per_hour.as_deref().map(NanoUsd::parse_usd).transpose();
            prices.push(price.map_err(|error| format!("machine {at}: usd_per_hour: {error}"))?);
        }
        Ok(Self { provider: provider.to_owned(), machines, prices })
    }

    fn choose(&self, order: &LaunchOrder) -> Result<Instance, ProviderError> {
        if order.tenure == Tenure::Spot {
            return Err(ProviderError::Unsupported { what: "own machines have no spot market".to_owned() });
        }
        let mut of_type =
            self.machines.iter().filter(|machine| machine.instance_type == order.instance_type).peekable();
        if of_type.peek().is_none() {
            return Err(ProviderError::BadOrder { what: format!("no machine is a '{}'", order.instance_type) });
        }
        let free = of_type.find(|machine| !order.taken.contains(&machine.address.to_string()));
        let machine = free
            .ok_or_else(|| ProviderError::NoCapacity { what: format!("every '{}' is taken", order.instance_type) })?;
        Ok(Instance {
            id: machine.address.to_string(),
            token: order.token.clone(),
            state: InstanceState::Running,
            instance_type: machine.instance_type.clone(),
            tenure: Tenure::OnDemand,
            address: Some(machine.address),
            launched_at_ms: None,
            domains: FaultDomains { provider: self.provider.clone(), ..FaultDomains::default() },
        })
    }
}

impl Provider for OwnMachines {
    fn abilities(&self) -> Abilities {
        Abilities { launches: false, spot: false }
    }

    fn catalogue(&self) -> Call<'_, Vec<InstanceType>> {
        let mut types: Vec<InstanceType> = Vec::new();
        for machine in &self.machines {
            if !types.iter().any(|known| known.name == machine.instance_type) {
                types.push(InstanceType {
                    name: machine.instance_type.clone(),
                    vcpus: machine.vcpus,
                    memory_bytes: u64::from(machine.memory_gib) * GIB,
                    cpu: None,
                    nesting: Nesting::Unknown,
                    spot: false,
                });
            }
        }
        Box::pin(async { Ok(types) })
    }

    fn spot_prices<'a>(&'a self, _query: &'a PriceQuery) -> Call<'a, Vec<Series>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn on_demand_price<'a>(&'a self, instance_type: &'a str) -> Call<'a, Option<NanoUsd>> {
        let of_type = self.machines.iter().zip(&self.prices).find(|(m, _)| m.instance_type == instance_type);
        let price = of_type.and_then(|(_, price)| *price);
        Box::pin(async move { Ok(price) })
    }

    fn egress_price_per_gib(&self, _to: &str) -> Option<NanoUsd> {
        None
    }

    fn launch<'a>(&'a self, order: &'a LaunchOrder) -> Call<'a, Instance> {
        let chosen = self.choose(order);
        Box::pin(async { chosen })
    }

    fn terminate<'a>(&'a self, _instance: &'a str) -> Call<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn instances<'a>(&'a self, _owner: &'a str) -> Call<'a, Vec<Instance>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn notices<'a>(&'a self, _owner: &'a str) -> Call<'a, Vec<Notice>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(last: u8, instance_type: &str) -> Machine {
        Machine {
            address: IpAddr::from([192, 0, 2, last]),
            instance_type: instance_type.to_owned(),
            vcpus: 8,
            memory_gib: 32,
            usd_per_hour: Some("0.05".to_owned()),
        }
    }

    fn order(instance_type: &str, taken: &[&str]) -> LaunchOrder {
        LaunchOrder {
            token: "t".into(),
            owner: "o".into(),
            name: "n".into(),
            instance_type: instance_type.into(),
            tenure: Tenure::OnDemand,
            max_price: None,
            user_data: String::new(),
            taken: taken.iter().map(|&text| text.to_owned()).collect(),
        }
    }

    #[tokio::test]
    async fn a_free_machine_of_the_type_is_chosen_and_a_taken_one_never() {
        let own = OwnMachines::new("home", vec![machine(1, "big"), machine(2, "big"), machine(3, "small")]).unwrap();
        assert_eq!(own.launch(&order("big", &[])).await.unwrap().id, "192.0.2.1");
        assert_eq!(own.launch(&order("big", &["192.0.2.1"])).await.unwrap().id, "192.0.2.2");
        let none = own.launch(&order("big", &["192.0.2.1", "192.0.2.2"])).await;
        assert!(matches!(none, Err(ProviderError::NoCapacity { .. })), "{none:?}");
        assert!(matches!(own.launch(&order("huge", &[])).await, Err(ProviderError::BadOrder { .. })));
        assert_eq!(own.catalogue().await.unwrap().len(), 2);
        assert_eq!(own.on_demand_price("small").await.unwrap(), Some(NanoUsd(50_000_000)));
    }

    #[test]
    fn machines_that_contradict_each_other_are_refused_by_address() {
        let twice = OwnMachines::new("h", vec![machine(1, "a"), machine(1, "b")]).unwrap_err();
        assert!(twice.contains("192.0.2.1 is listed twice"), "{twice}");
        let other = Machine { vcpus: 4, ..machine(2, "a") };
        assert!(OwnMachines::new("h", vec![machine(1, "a"), other]).unwrap_err().contains("192.0.2.2"));
        let price = Machine { usd_per_hour: Some("1e3".into()), ..machine(1, "a") };
        assert!(OwnMachines::new("h", vec![price]).unwrap_err().contains("usd_per_hour"));
    }

    #[tokio::test]
    async fn it_keeps_what_every_driver_promises() {
        let own = OwnMachines::new("home", vec![machine(1, "big")]).unwrap();
        crate::conformance::check(&own, &order("big", &[])).await;
    }
}
