//! The suite that every driver must pass: call [`check`] in its tests, against the most real server that there is.
//!
//! It launches and ends machines; it leaves none. It panics with a sentence at the first promise that is broken.

use std::time::Duration;

use supercloud_api::Tenure;

use crate::{Instance, InstanceState, LaunchOrder, PriceQuery, Provider, ProviderError};

/// How often and how long it looks for something that should happen.
const LOOKS: u32 = 60;
const PAUSE: Duration = Duration::from_millis(500);

/// Checks a driver with an order that it should be able to carry out (its token and owner new to the provider).
///
/// # Panics
/// When a promise is broken.
pub async fn check(provider: &dyn Provider, order: &LaunchOrder) {
    catalogue(provider, order).await;
    prices(provider).await;
    refusals(provider, order).await;
    if provider.abilities().launches {
        life(provider, order).await;
        others_are_not_told(provider, order).await;
    }
    let gone = provider.terminate("i-00000000000000000").await;
    assert_eq!(gone, Ok(()), "ending what never was is no error");
    assert!(provider.notices(&order.owner).await.is_ok(), "notices of nothing are no error");
}

async fn catalogue(provider: &dyn Provider, order: &LaunchOrder) {
    let types = provider.catalogue().await.expect("the catalogue can be had");
    assert!(!types.is_empty(), "a catalogue without types rents nothing");
    let mut names: Vec<&str> = types.iter().map(|of| of.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), types.len(), "a type is told once, however many pages there are");
    for of in &types {
        assert!(of.vcpus > 0 && of.memory_bytes >= 1 << 27, "{of:?} is no machine");
        assert!(provider.abilities().spot || !of.spot, "{of:?} is on a market that is not there");
    }
    assert!(types.iter().any(|of| of.name == order.instance_type), "what is ordered is in the catalogue");
}

async fn prices(provider: &dyn Provider) {
    let query = PriceQuery { instance_types: Vec::new(), from_ms: 0, to_ms: u64::from(u32::MAX) * 1000 };
    let series = provider.spot_prices(&query).await.expect("prices can be had");
    assert!(provider.abilities().spot || series.is_empty(), "prices of a market that is not there");
    for one in &series {
        let is_ordered = one.points.windows(2).all(|pair| pair[0].at_ms < pair[1].at_ms);
        assert!(is_ordered, "{}/{}: oldest first, one price per time", one.zone, one.instance_type);
    }
}

async fn refusals(provider: &dyn Provider, order: &LaunchOrder) {
    let unknown =
        LaunchOrder { instance_type: "no.such".to_owned(), token: format!("{}-x", order.token), ..order.clone() };
    match provider.launch(&unknown).await {
        Err(ProviderError::BadOrder { .. }) => {}
        other => panic!("an unknown type is a bad order, as data: {other:?}"),
    }
    if !provider.abilities().spot {
        let spot = LaunchOrder { tenure: Tenure::Spot, token: format!("{}-y", order.token), ..order.clone() };
        let refused = provider.launch(&spot).await;
        assert!(matches!(refused, Err(ProviderError::Unsupported { .. })), "no spot market: {refused:?}");
    }
}

async fn find(provider: &dyn Provider, order: &LaunchOrder) -> Vec<Instance> {
    let all = provider.instances(&order.owner).await.expect("instances can be listed");
    all.into_iter().filter(|one| one.token == order.token && one.state.may_cost()).collect()
}

async fn life(provider: &dyn Provider, order: &LaunchOrder) {
    assert!(find(provider, order).await.is_empty(), "the suite's token is new");
    let launched = provider.launch(order).await.expect("the order is carried out");
    assert_eq!((launched.token.as_str(), launched.tenure), (order.token.as_str(), order.tenure));
    assert_eq!(launched.instance_type, order.instance_type);
    assert!(!launched.domains.provider.is_empty(), "it stands somewhere");
    let again = provider.launch(order).await.expect("the same order again");
    assert_eq!(again.id, launched.id, "the same token gives the same instance");
    let found = find(provider, order).await;
    assert_eq!(found.len(), 1, "one order is one machine: {found:?}");
    assert_eq!(found[0].id, launched.id);
    provider.terminate(&launched.id).await.expect("it can be ended");
    provider.terminate(&launched.id).await.expect("ending it again is no error");
    for _ in 0..LOOKS {
        let left = find(provider, order).await;
        if left.is_empty() {
            return;
        }
        assert!(left.iter().all(|one| one.state != InstanceState::Starting), "what was ended does not start");
        tokio::time::sleep(PAUSE).await;
    }
    panic!("what was ended is not gone");
}

async fn others_are_not_told(provider: &dyn Provider, order: &LaunchOrder) {
    let other = provider.instances("somebody-else").await.expect("listing for an owner without instances");
    assert!(other.iter().all(|one| one.token != order.token), "instances of other owners are not ours to end");
}
