//! What was seen of markets: what became of the machines that we rented there. Nothing is known of a market before that.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use supercloud_api::{
    Market, MarketSeen, Renting, RentingEnd, Tenure,
    ids::{CloudId, HostId},
};

use tokio::{sync::Mutex, time::Instant};

use crate::state::{HostRecord, RentingRecord, State, StateError};

/// All rentings are read at most this often.
const KEPT: Duration = Duration::from_secs(5);

type Key = (CloudId, String, Tenure);
type Found = Arc<HashMap<Key, MarketSeen>>;

/// By market; `is_announced`: the provider has said of this host that it takes it back, or may.
fn seen<'a>(
    rentings: impl IntoIterator<Item = &'a Renting>,
    is_announced: impl Fn(HostId) -> bool,
    now_ms: u64,
) -> HashMap<Key, MarketSeen> {
    let mut found: HashMap<Key, MarketSeen> = HashMap::new();
    for renting in rentings {
        let Some(since_ms) = renting.launched_at_ms else { continue };
        let key = (renting.cloud, renting.instance_type.clone(), renting.tenure);
        let seen = found.entry(key).or_default();
        let ran_ms = renting.ended_at_ms.unwrap_or(now_ms).saturating_sub(since_ms);
        seen.machines = seen.machines.saturating_add(1);
        seen.ran_ms = seen.ran_ms.saturating_add(ran_ms);
        seen.taken += u32::from(renting.end == Some(RentingEnd::Taken));
        seen.announced += u32::from(renting.ended_at_ms.is_none() && is_announced(renting.host));
    }
    found
}

async fn read(state: &State, now_ms: u64) -> Result<HashMap<Key, MarketSeen>, StateError> {
    let rentings = state.list::<RentingRecord>().await?;
    if rentings.is_empty() {
        return Ok(HashMap::new());
    }
    let hosts = state.list::<HostRecord>().await?;
    let announced: HashSet<HostId> =
        hosts.iter().filter(|host| !host.is_removed && host.host.notice.is_some()).map(|host| host.host.id).collect();
    Ok(seen(rentings.iter().map(|record| &record.renting), |host| announced.contains(&host), now_ms))
}

/// What was seen of all markets, read again every five seconds when somebody asks. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct SeenMarkets(Arc<Mutex<Option<(Instant, Found)>>>);

impl SeenMarkets {
    async fn found(&self, state: &State, now_ms: u64) -> Result<Found, StateError> {
        // Held while it is read: others wait for the same.
        let mut kept = self.0.lock().await;
        if let Some((until, found)) = &*kept
            && *until > Instant::now()
        {
            return Ok(Arc::clone(found));
        }
        let found = Arc::new(read(state, now_ms).await?);
        *kept = Some((Instant::now() + KEPT, Arc::clone(&found)));
        Ok(found)
    }

    /// Notes with each market what was seen there.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn note(&self, state: &State, markets: &mut [Market], now_ms: u64) -> Result<(), StateError> {
        let found = self.found(state, now_ms).await?;
        for market in markets {
            let key = (market.cloud, market.instance_type.clone(), market.tenure);
            market.seen = found.get(&key).copied();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use supercloud_api::ids::{OperationId, RentingId};

    use super::*;

    fn renting(cloud: CloudId, span: (u64, Option<u64>), end: Option<&str>) -> Renting {
        serde_json::from_value(serde_json::json!({
            "id": RentingId::generate(), "cloud": cloud, "cloud_name": "c", "provider": "p", "host": HostId::generate(),
            "host_name": "h", "instance_type": "m", "tenure": "spot", "max_price_nanousd_per_hour": null,
            "state": if span.1.is_some() { "ended" } else { "up" }, "end": end, "instance": null, "address": null,
            "is_started_by_hand": false, "ending_as": null, "error": null, "rent_operation": OperationId::generate(),
            "return_operation": null, "created_at_ms": 0, "launched_at_ms": span.0, "up_at_ms": null, "ended_at_ms": span.1,
        }))
        .unwrap()
    }

    #[test]
    fn a_market_is_as_risky_as_what_became_of_the_machines_there() {
        let cloud = CloudId::generate();
        let mut refused = renting(cloud, (0, Some(9)), Some("refused"));
        refused.launched_at_ms = None;
        let other = renting(CloudId::generate(), (0, Some(50)), Some("returned"));
        let rentings = [
            renting(cloud, (100, Some(400)), Some("taken")),
            renting(cloud, (100, Some(200)), Some("returned")),
            renting(cloud, (900, None), None),
            refused,
            other.clone(),
        ];
        let leaving = rentings[2].host;
        let found = seen(&rentings, |host| host == leaving || host == rentings[0].host, 1000);
        let expected = MarketSeen { machines: 3, ran_ms: 300 + 100 + 100, taken: 1, announced: 1 };
        assert_eq!(found[&(cloud, "m".to_owned(), Tenure::Spot)], expected);
        let calm = MarketSeen { machines: 1, ran_ms: 50, taken: 0, announced: 0 };
        assert_eq!(found[&(other.cloud, "m".to_owned(), Tenure::Spot)], calm);
        assert_eq!(found.len(), 2, "of a market without a machine nothing is known");
    }
}
