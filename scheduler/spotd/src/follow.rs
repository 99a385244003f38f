//! One look at the markets: what the REST API says in, moves out.
//!
//! Everything the daemon needs to remember stands in the operations it asked for (the feed's time is part of their
//! reason), so that a restarted daemon goes on where the last one stopped.

use supercloud_api::{
    Guest, GuestState, Host, HostState, Market, Operation, OperationKind, Phase, Tenure, ids::GuestId,
};
use supercloud_scheduler::{
    money::NanoUsd,
    price::{Decision, Position, Quote},
};

use crate::{
    config::{Config, PolicyName},
    view::World,
};

/// What every reason of this policy starts with.
const REASON: &str = "price policy";

/// A move that the policy wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The guest.
    pub guest: GuestId,
    /// Its name.
    pub name: String,
    /// The cloud it shall go to.
    pub to: String,
    /// Why; also carries the feed's time.
    pub reason: String,
}

/// What was decided for each guest that follows prices: a move, or why it stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Move it.
    Move(Wanted),
    /// Leave it.
    Stay {
        /// The guest's name.
        name: String,
        /// Why.
        why: String,
    },
}

/// Decides for every guest that follows prices.
pub fn decide(
    config: &Config,
    markets: &[Market],
    guests: &[Guest],
    hosts: &[Host],
    operations: &[Operation],
) -> Vec<Verdict> {
    let of_tenure: Vec<&Market> = markets.iter().filter(|market| market.tenure == config.tenure).collect();
    let now_ms = markets.iter().map(|market| market.feed_now_ms).max().unwrap_or(0);
    let world = World::new(config, &of_tenure, guests, now_ms);
    guests
        .iter()
        .filter(|guest| guest.follow_prices && guest.state == GuestState::Running)
        .map(|guest| {
            let stay = |why: String| Verdict::Stay { name: guest.name.to_string(), why };
            if guest.operation.is_some() {
                return stay("an operation is in progress".into());
            }
            let Some(cloud) = guest.cloud_name.as_ref() else { return stay("it has no host".into()) };
            let quotes = quotes(&of_tenure, guest, hosts);
            let Some(here) = of_tenure.iter().find(|market| market.cloud_name == *cloud) else {
                return stay(format!("cloud {cloud} has no {:?} market", config.tenure));
            };
            let wanted = |market: &Market, why: String| {
                Verdict::Move(Wanted {
                    guest: guest.id,
                    name: guest.name.to_string(),
                    to: market.cloud_name.to_string(),
                    reason: format!("{REASON}: {why} at feed_ms={now_ms}"),
                })
            };
            if config.policy_name != PolicyName::Cheapest {
                let is_open = |market: &Market| is_open(market, guest, hosts);
                return match world.decide(guest, here, last_move(guest.id, operations), is_open) {
                    (Some(market), why) => wanted(market, format!("{} to {}: {why}", here.name, market.name)),
                    (None, why) => stay(why),
                };
            }
            let position = Position {
                market: here.name.clone(),
                last_move_ms: last_move(guest.id, operations),
                move_cost: config.move_cost(guest.shape.memory_bytes),
            };
            match config.policy.decide(now_ms, &position, &quotes) {
                Decision::Stay(reason) => stay(reason.to_string()),
                Decision::Move { to, saving_per_hour } => {
                    let Some(market) = of_tenure.iter().find(|market| market.name == to) else {
                        return stay("the market is gone".into());
                    };
                    wanted(market, format!("{} is {saving_per_hour}/h cheaper than {}", market.name, here.name))
                }
            }
        })
        .collect()
}

fn quotes(markets: &[&Market], guest: &Guest, hosts: &[Host]) -> Vec<Quote> {
    markets
        .iter()
        .map(|market| Quote {
            market: market.name.clone(),
            price: NanoUsd(market.price_nanousd_per_hour),
            since_ms: market.feed_time_ms,
            is_open: is_open(market, guest, hosts),
        })
        .collect()
}

fn is_open(market: &Market, guest: &Guest, hosts: &[Host]) -> bool {
    hosts.iter().any(|host| host.cloud == market.cloud && has_room(host, guest))
}

fn has_room(host: &Host, guest: &Guest) -> bool {
    host.state == HostState::Up
        && host.capacity.memory_bytes.saturating_sub(host.used.memory_bytes) >= guest.shape.memory_bytes
        && host.capacity.vcpus.saturating_sub(host.used.vcpus) >= guest.shape.vcpus
        && guest.compat_class.as_ref().is_none_or(|class| host.compat_classes.contains(class))
}

/// When this policy last moved the guest, on the feed's clock. A move that was rolled back counts too: it is not tried
/// again before the cool-down is over.
fn last_move(guest: GuestId, operations: &[Operation]) -> Option<u64> {
    operations
        .iter()
        .filter(|op| op.guest == Some(guest) && op.kind == OperationKind::GuestMigrate && op.phase != Phase::Plan)
        .filter_map(|op| {
            let reason = op.reason.as_deref()?.strip_prefix(REASON)?;
            reason.rsplit_once("feed_ms=")?.1.parse().ok()
        })
        .max()
}

/// The name of a tenure as the API writes it.
pub fn tenure_name(tenure: Tenure) -> &'static str {
    match tenure {
        Tenure::Spot => "spot",
        Tenure::OnDemand => "on_demand",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use supercloud_api::ids::{CloudId, HostId, ImageId, OperationId, ProjectId, RequestId};

    use super::*;

    struct World {
        clouds: [(CloudId, &'static str); 2],
        markets: Vec<Market>,
        guest: Guest,
        hosts: Vec<Host>,
    }

    fn world(prices: [u64; 2]) -> World {
        let clouds = [(CloudId::generate(), "aws-east"), (CloudId::generate(), "home")];
        let market = |i: usize| {
            serde_json::from_value(json!({
                "name": format!("{}/demo.large/spot", clouds[i].1), "cloud": clouds[i].0, "cloud_name": clouds[i].1,
                "instance_type": "demo.large", "tenure": "spot", "price_nanousd_per_hour": prices[i],
                "on_demand_nanousd_per_hour": null, "feed_time_ms": 0, "feed_now_ms": 7_200_000,
            }))
            .unwrap()
        };
        let host = |i: usize| {
            serde_json::from_value(json!({
                "id": HostId::generate(), "name": clouds[i].1, "cloud": clouds[i].0, "cloud_name": clouds[i].1,
                "state": "up", "data_address": null, "overlay_address": null, "overlay_index": 1,
                "capacity": {"vcpus": 4, "memory_bytes": 1u64 << 32, "disk_bytes": 1u64 << 40},
                "used": {"vcpus": 0, "memory_bytes": 0, "disk_bytes": 0}, "compat_classes": [], "probe": {},
                "agent_version": "0", "certificate_sha256": "", "last_seen_ms": 0, "created_at_ms": 0,
            }))
            .unwrap()
        };
        let guest = serde_json::from_value(json!({
            "id": GuestId::generate(), "project": ProjectId::generate(), "name": "web", "state": "running",
            "alarm": null, "shape": {"vcpus": 1, "memory_bytes": 1u64 << 28}, "image": ImageId::generate(),
            "host": null, "host_name": null, "cloud": clouds[0].0, "cloud_name": clouds[0].1, "epoch": 1,
            "compat_class": null, "volumes": [], "ports": [], "ipv4": null, "operation": null, "freeze": null,
            "follow_prices": true, "starts": 1, "created_at_ms": 0,
        }))
        .unwrap();
        World { clouds, markets: vec![market(0), market(1)], guest, hosts: vec![host(0), host(1)] }
    }

    fn config() -> Config {
        toml::from_str("url = 'https://c'\ntoken_file = 't'").unwrap()
    }

    fn one(world: &World, operations: &[Operation]) -> Verdict {
        decide(&config(), &world.markets, std::slice::from_ref(&world.guest), &world.hosts, operations).remove(0)
    }

    fn past_move(guest: GuestId, reason: &str) -> Operation {
        serde_json::from_value(json!({
            "id": OperationId::generate(), "kind": "guest_migrate", "project": null, "phase": "done", "guest": guest,
            "image": null, "volume": null, "source": null, "destination": null, "progress": {},
            "is_cancel_requested": false, "error": null, "actor": "token:spotd", "request_id": RequestId::generate(),
            "reason": reason, "created_at_ms": 0, "updated_at_ms": 0, "ended_at_ms": 0,
        }))
        .unwrap()
    }

    #[test]
    fn moves_to_the_cheaper_cloud_and_says_why() {
        let world = world([90_000_000, 30_000_000]);
        let Verdict::Move(wanted) = one(&world, &[]) else { panic!("it stays") };
        assert_eq!((wanted.to.as_str(), wanted.guest), (world.clouds[1].1, world.guest.id));
        assert!(wanted.reason.ends_with("feed_ms=7200000"), "{}", wanted.reason);
    }

    #[test]
    fn a_restarted_daemon_remembers_its_last_move_by_the_operations() {
        let world = world([90_000_000, 30_000_000]);
        let stays = |reason: &str| matches!(one(&world, &[past_move(world.guest.id, reason)]), Verdict::Stay { .. });
        assert!(stays("price policy: x at feed_ms=7000000"), "within the cool-down");
        assert!(!stays("price policy: x at feed_ms=1000"), "long ago");
        assert!(!stays("by hand feed_ms=7000000"), "not a move of this policy");
    }

    #[test]
    fn every_policy_goes_to_the_cheaper_cloud_and_remembers_its_moves() {
        let world = world([90_000_000, 30_000_000]);
        for name in [PolicyName::SmartSpot, PolicyName::Greedy] {
            let config = Config { policy_name: name, ..config() };
            let decide = |operations: &[Operation]| {
                decide(&config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, operations).remove(0)
            };
            let Verdict::Move(wanted) = decide(&[]) else { panic!("{name:?} stays") };
            assert_eq!(wanted.to, world.clouds[1].1);
            assert!(
                wanted.reason.starts_with(REASON) && wanted.reason.ends_with("feed_ms=7200000"),
                "{}",
                wanted.reason
            );
            let again = decide(&[past_move(world.guest.id, "price policy: x at feed_ms=7000000")]);
            assert_eq!(matches!(again, Verdict::Stay { .. }), name == PolicyName::SmartSpot, "{again:?}");
        }
    }

    #[test]
    fn smart_spot_stays_where_a_move_does_not_pay_or_no_host_has_room() {
        let smart = Config { policy_name: PolicyName::SmartSpot, ..config() };
        let mut world = world([90_000_000, 89_000_000]);
        let verdict = |world: &World, config: &Config| {
            decide(config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, &[]).remove(0)
        };
        let Verdict::Stay { why, .. } = verdict(&world, &smart) else { panic!("it moves") };
        assert_eq!(why, "no market is cheaper by enough");
        world.markets[1].price_nanousd_per_hour = 30_000_000;
        assert!(matches!(verdict(&world, &smart), Verdict::Move(_)));
        // Bytes so dear that a day of savings does not pay for them.
        let dear = Config { move_nanousd_per_gib: 1 << 40, ..smart.clone() };
        assert!(matches!(verdict(&world, &dear), Verdict::Stay { .. }));
        world.hosts[1].used = world.hosts[1].capacity;
        assert!(matches!(verdict(&world, &smart), Verdict::Stay { .. }));
    }

    #[test]
    fn a_price_near_the_bid_is_left_in_an_auction() {
        let text = "url = 'https://c'\ntoken_file = 't'\npolicy_name = 'smart-spot'\n[assume]\nregime = 'auction'\n\
                    bid_permille = 1000";
        let config: Config = toml::from_str(text).unwrap();
        let mut world = world([99_000_000, 80_000_000]);
        world.markets[0].on_demand_nanousd_per_hour = Some(100_000_000);
        world.markets[1].on_demand_nanousd_per_hour = Some(100_000_000);
        let verdict = |world: &World| {
            decide(&config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, &[]).remove(0)
        };
        let Verdict::Move(wanted) = verdict(&world) else { panic!("it stays") };
        assert!(wanted.reason.contains("the price nears the bid"), "{}", wanted.reason);
        world.markets[1].price_nanousd_per_hour = 98_000_000;
        assert!(matches!(verdict(&world), Verdict::Stay { .. }), "no better there");
    }

    #[test]
    fn a_cloud_without_room_is_not_open() {
        let mut world = world([90_000_000, 30_000_000]);
        world.hosts[1].used = world.hosts[1].capacity;
        assert!(matches!(one(&world, &[]), Verdict::Stay { .. }));
        world.guest.follow_prices = false;
        assert!(decide(&config(), &world.markets, &[world.guest.clone()], &world.hosts, &[]).is_empty());
    }
}
