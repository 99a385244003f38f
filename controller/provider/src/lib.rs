//! What every provider driver gives: a catalogue, prices, launch and return of hosts, notices. No SDK and no policy.
//!
//! # Adding a driver
//! 1. A crate of its own beside this one when it needs a client library, behind a feature of the controller.
//! 2. Implement [`Provider`]; translate the provider's errors into [`ProviderError`], whose variants decide what the controller
//!    does next. Budgets are not the driver's work: the controller calls it through [`Bounded`] only.
//! 3. Whatever [`Provider::launch`] makes must carry the order's owner and token *from the moment it exists*, and
//!    [`Provider::instances`] must find it by them: that is how nothing launched is ever forgotten.
//! 4. Run [`conformance::check`] in its tests, against the most real server that there is.
//! 5. A `driver = "…"` in the controller's settings.
#![forbid(unsafe_code)]

mod bounded;
pub mod conformance;
mod error;
mod model;
mod own;

use std::fmt::Debug;

use futures::future::BoxFuture;
use supercloud_scheduler::money::NanoUsd;

pub use bounded::{Bounded, Budgets};
pub use error::{LaunchOutcome, ProviderError};
pub use model::{
    Abilities, FaultDomains, Instance, InstanceState, InstanceType, LaunchOrder, Nesting, Notice, NoticeKind,
    PricePoint, PriceQuery, Series,
};
pub use own::{Machine, OwnMachines};

/// A call to a provider.
pub type Call<'a, T> = BoxFuture<'a, Result<T, ProviderError>>;

/// A provider's zone or region in which hosts are rented. Calls may be dropped at any await and repeated at any time.
pub trait Provider: Debug + Send + Sync + 'static {
    /// What it can do at all.
    fn abilities(&self) -> Abilities;

    /// What can be rented.
    fn catalogue(&self) -> Call<'_, Vec<InstanceType>>;

    /// Spot prices of a span of time, all pages, oldest first within a series. Without a spot market: nothing.
    fn spot_prices<'a>(&'a self, query: &'a PriceQuery) -> Call<'a, Vec<Series>>;

    /// The on-demand price per hour, where the provider tells it.
    fn on_demand_price<'a>(&'a self, instance_type: &'a str) -> Call<'a, Option<NanoUsd>>;

    /// What a GiB costs that leaves for this other cloud (by its name), where that is known.
    fn egress_price_per_gib(&self, to: &str) -> Option<NanoUsd>;

    /// Launches one host. The same token again gives the same instance, however often and whoever was interrupted.
    fn launch<'a>(&'a self, order: &'a LaunchOrder) -> Call<'a, Instance>;

    /// Ends an instance. One that is gone already, or never was, is no error.
    fn terminate<'a>(&'a self, instance: &'a str) -> Call<'a, ()>;

    /// Every instance that carries this owner, all pages; those that ended lately may still be told as [`InstanceState::Gone`].
    fn instances<'a>(&'a self, owner: &'a str) -> Call<'a, Vec<Instance>>;

    /// What the provider has announced for instances of this owner and has not carried out yet.
    fn notices<'a>(&'a self, owner: &'a str) -> Call<'a, Vec<Notice>>;
}
