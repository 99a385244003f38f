//! What ids are called. Names are a courtesy: where they cannot be had soon, the ids stand alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::Value;
use supercloud_api::{Evacuation, Market, Renting, RentingState, client::Client, ids::HostId};
use supercloud_cli::fields::{Names, nameless_ids};

/// How long names are waited for.
const NAMES_BUDGET: Duration = Duration::from_secs(5);
/// Of one kind: more ids than this are looked up by the listing, fewer one by one.
const ONE_BY_ONE_AT_MOST: usize = 3;

/// The names of the hosts, clouds, projects, networks, images and guests that a thing, or a list of things, refers to.
pub async fn of_ids_in(client: &Client, value: &Value) -> Names {
    let mut kinds = BTreeMap::<&str, BTreeSet<&str>>::new();
    let ids = nameless_ids(value);
    for id in &ids {
        kinds.entry(&id[..3]).or_default().insert(id);
    }
    let lookups = kinds.into_iter().filter_map(|(kind, ids)| Some(names_of(client, noun(kind)?, ids)));
    let found = tokio::time::timeout(NAMES_BUDGET, futures::future::join_all(lookups)).await;
    found.unwrap_or_default().into_iter().flatten().collect()
}

fn noun(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "hst" => "hosts",
        "cld" => "clouds",
        "prj" => "projects",
        "net" => "networks",
        "img" => "images",
        "gst" => "guests",
        "grp" => "groups",
        _ => return None,
    })
}

async fn names_of(client: &Client, noun: &str, ids: BTreeSet<&str>) -> Vec<(String, String)> {
    let things: Vec<Value> = if ids.len() > ONE_BY_ONE_AT_MOST {
        client.list(&format!("/v1/{noun}?limit=1000")).await.unwrap_or_default()
    } else {
        let reads = ids.iter().map(|id| async move { client.get::<Value>(&format!("/v1/{noun}/{id}")).await });
        futures::future::join_all(reads).await.into_iter().filter_map(Result::ok).collect()
    };
    let name_of = |thing: &Value| Some((thing["id"].as_str()?.to_owned(), thing["name"].as_str()?.to_owned()));
    things.iter().filter_map(name_of).filter(|(id, _)| ids.contains(id.as_str())).collect()
}

/// What is known of the price of hosts: how each is rented, and its market.
pub type Rented = BTreeMap<HostId, (Renting, Option<Market>)>;

/// The hosts that are rented, as far as the token may know (rentings are for those who see all projects).
pub async fn rented(client: &Client) -> Rented {
    let markets = tokio::time::timeout(NAMES_BUDGET, client.markets()).await;
    let Ok(Ok(markets)) = markets else { return Rented::new() };
    rented_in(client, &markets).await
}

/// The same with the markets that are known already.
pub async fn rented_in(client: &Client, markets: &[Market]) -> Rented {
    let rentings = tokio::time::timeout(NAMES_BUDGET, client.rentings()).await;
    let Ok(Ok(rentings)) = rentings else { return Rented::new() };
    let running = rentings.into_iter().filter(|renting| renting.state != RentingState::Ended);
    running.map(|renting| (renting.host, (renting.clone(), market_of(markets, &renting)))).collect()
}

/// Whether guests could leave in time, as far as that can be had soon.
pub async fn evacuations(client: &Client) -> Vec<Evacuation> {
    let found = tokio::time::timeout(NAMES_BUDGET, client.evacuations()).await;
    found.ok().and_then(Result::ok).unwrap_or_default()
}

fn market_of(markets: &[Market], renting: &Renting) -> Option<Market> {
    let is_its = |market: &&Market| {
        market.cloud == renting.cloud
            && market.instance_type == renting.instance_type
            && market.tenure == renting.tenure
    };
    markets.iter().find(is_its).cloned()
}
