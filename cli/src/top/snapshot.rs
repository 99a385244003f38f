//! What `top` shows: the fleet as it was at one moment.

use std::collections::BTreeSet;

use supercloud_api::{
    Guest, Host, Market, Operation,
    client::{Client, ClientError},
    ids::OperationId,
    unix_ms,
};

use crate::names::{self, Rented};

/// Operations that are looked at one by one; of more only these are shown.
const OPERATIONS_AT_MOST: usize = 16;

/// The fleet at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// When it was taken; 0: never.
    pub taken_at_ms: u64,
    /// The controller.
    pub url: String,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// Guests.
    pub guests: Vec<Guest>,
    /// What is under way with guests.
    pub operations: Vec<Operation>,
    /// How many operations are under way that are not among them.
    pub more_operations: usize,
    /// Markets with their prices.
    pub markets: Vec<Market>,
    /// How hosts are rented.
    pub rented: Rented,
    /// Why it is older than it should be.
    pub trouble: Option<String>,
}

impl Snapshot {
    /// Looks once.
    ///
    /// # Errors
    /// As every call.
    pub async fn take(client: &Client) -> Result<Self, ClientError> {
        // The largest pages: this is asked for again and again.
        let (hosts, guests, markets) = tokio::try_join!(
            client.list::<Host>("/v1/hosts?limit=1000"),
            client.list::<Guest>("/v1/guests?limit=1000"),
            client.list::<Market>("/v1/markets?limit=1000"),
        )?;
        // Rentings are for those who see all projects: for others hosts have no price.
        let rented = names::rented_in(client, &markets).await;
        let under_way: BTreeSet<OperationId> = guests.iter().filter_map(|guest| guest.operation).collect();
        let shown = under_way.iter().take(OPERATIONS_AT_MOST);
        let found = futures::future::join_all(shown.map(|id| client.operation(*id))).await;
        // One that ended meanwhile is still shown as it ended; one that is gone is not.
        let operations: Vec<Operation> = found.into_iter().filter_map(Result::ok).collect();
        Ok(Self {
            taken_at_ms: unix_ms(),
            url: client.config().url.clone(),
            hosts,
            guests,
            more_operations: under_way.len().saturating_sub(OPERATIONS_AT_MOST),
            operations,
            markets,
            rented,
            trouble: None,
        })
    }

    /// Whether something moves.
    pub fn is_busy(&self) -> bool {
        !self.operations.is_empty()
    }
}
