//! A provider whose every call ends in time.

use std::{future::Future, sync::Arc, time::Duration};

use supercloud_scheduler::money::NanoUsd;

use crate::{Abilities, Instance, InstanceType, LaunchOrder, Notice, PriceQuery, Provider, ProviderError, Series};

/// How long calls may take, paging and repeats of the driver included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budgets {
    /// A change: launch, terminate.
    pub change: Duration,
    /// A look: instances, notices, one price.
    pub look: Duration,
    /// A listing of many pages: the catalogue, price histories.
    pub listing: Duration,
}

impl Default for Budgets {
    fn default() -> Self {
        Self { change: Duration::from_secs(60), look: Duration::from_secs(30), listing: Duration::from_secs(180) }
    }
}

/// The only way in which the controller calls a driver. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bounded {
    provider: Arc<dyn Provider>,
    budgets: Budgets,
}

async fn within<T>(
    call: &'static str,
    budget: Duration,
    work: impl Future<Output = Result<T, ProviderError>>,
) -> Result<T, ProviderError> {
    tokio::time::timeout(budget, work).await.unwrap_or(Err(ProviderError::Deadline { call, budget }))
}

impl Bounded {
    /// A driver with the usual budgets.
    #[must_use]
    pub fn new(provider: Arc<dyn Provider>) -> Self {
        Self::with(provider, Budgets::default())
    }

    /// A driver with budgets of its own.
    #[must_use]
    pub fn with(provider: Arc<dyn Provider>, budgets: Budgets) -> Self {
        Self { provider, budgets }
    }

    /// See [`Provider::abilities`].
    #[must_use]
    pub fn abilities(&self) -> Abilities {
        self.provider.abilities()
    }

    /// See [`Provider::catalogue`].
    ///
    /// # Errors
    /// The driver's; [`ProviderError::Deadline`].
    pub async fn catalogue(&self) -> Result<Vec<InstanceType>, ProviderError> {
        within("for its catalogue", self.budgets.listing, self.provider.catalogue()).await
    }

    /// See [`Provider::spot_prices`].
    ///
    /// # Errors
    /// As [`Bounded::catalogue`].
    pub async fn spot_prices(&self, query: &PriceQuery) -> Result<Vec<Series>, ProviderError> {
        within("for its spot prices", self.budgets.listing, self.provider.spot_prices(query)).await
    }

    /// See [`Provider::on_demand_price`].
    ///
    /// # Errors
    /// As [`Bounded::catalogue`].
    pub async fn on_demand_price(&self, instance_type: &str) -> Result<Option<NanoUsd>, ProviderError> {
        within("for a price", self.budgets.look, self.provider.on_demand_price(instance_type)).await
    }

    /// See [`Provider::egress_price_per_gib`].
    #[must_use]
    pub fn egress_price_per_gib(&self, to: &str) -> Option<NanoUsd> {
        self.provider.egress_price_per_gib(to)
    }

    /// See [`Provider::launch`].
    ///
    /// # Errors
    /// As [`Bounded::catalogue`]; what is left behind says [`ProviderError::launch_outcome`].
    pub async fn launch(&self, order: &LaunchOrder) -> Result<Instance, ProviderError> {
        within("to a launch", self.budgets.change, self.provider.launch(order)).await
    }

    /// See [`Provider::terminate`].
    ///
    /// # Errors
    /// As [`Bounded::catalogue`].
    pub async fn terminate(&self, instance: &str) -> Result<(), ProviderError> {
        within("to a termination", self.budgets.change, self.provider.terminate(instance)).await
    }

    /// See [`Provider::instances`].
    ///
    /// # Errors
    /// As [`Bounded::catalogue`].
    pub async fn instances(&self, owner: &str) -> Result<Vec<Instance>, ProviderError> {
        within("for its instances", self.budgets.look, self.provider.instances(owner)).await
    }

    /// See [`Provider::notices`].
    ///
    /// # Errors
    /// As [`Bounded::catalogue`].
    pub async fn notices(&self, owner: &str) -> Result<Vec<Notice>, ProviderError> {
        within("for its notices", self.budgets.look, self.provider.notices(owner)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_silent_provider_is_an_error_and_its_launch_is_of_unknown_outcome() {
        let error = within("to a launch", Duration::from_secs(60), std::future::pending::<Result<(), _>>()).await;
        let error = error.unwrap_err();
        assert_eq!(error.to_string(), "the provider did not answer to a launch within 60 s");
        assert_eq!(error.launch_outcome(), crate::LaunchOutcome::Unknown);
    }
}
