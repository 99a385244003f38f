//! One look at the markets: what the REST API says in, moves out.
//!
//! Everything the daemon needs to remember stands in the operations it asked for (the feed's time is part of their
//! reason), so that a restarted daemon goes on where the last one stopped.

use std::sync::Arc;

use supercloud_api::{
    Guest, GuestState, Host, HostState, Market, Operation, OperationKind, Phase, Tenure, VERDICT_TEXT_BYTES,
    Verdict as Told, ids::GuestId,
};
use supercloud_scheduler::{
    money::NanoUsd,
    price::{Decision, Position, Quote},
};

use crate::{
    config::{Config, PolicyName},
    learned::Learned,
    sun::{self, CloudNow, Counted, SunConfig},
    view::World,
};

/// What is known beside this look: it changes slowly, or is not read from the API.
#[derive(Debug)]
pub struct Known {
    /// What the rentings tell of interruptions.
    pub learned: Arc<Learned>,
    /// What was counted of clients' requests.
    pub counted: Option<Arc<Counted>>,
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

/// What every reason of a price policy starts with.
const REASON: &str = "price policy";
/// What every reason of following the sun starts with.
const SUN_REASON: &str = "follow the sun";

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

/// What is to be told of decisions: where each guest is, the market that is chosen for it, and the one that comes after.
pub fn told(
    config: &Config,
    markets: &[Market],
    guests: &[Guest],
    hosts: &[Host],
    verdicts: &[(GuestId, Verdict)],
) -> Vec<Told> {
    let of_tenure: Vec<&Market> = markets.iter().filter(|market| market.tenure == config.tenure).collect();
    let in_cloud = |name: &str| {
        of_tenure.iter().find(|market| market.cloud_name.as_str() == name).map(|market| market.name.clone())
    };
    let tell = |(id, verdict): &(GuestId, Verdict)| {
        let guest = guests.iter().find(|guest| guest.id == *id)?;
        let market = guest.cloud_name.as_ref().and_then(|cloud| in_cloud(cloud.as_str()));
        let (chosen, is_move, reason) = match verdict {
            Verdict::Move(wanted) => (in_cloud(&wanted.to), true, &wanted.reason),
            Verdict::Stay { why, .. } => (market.clone(), false, why),
        };
        let others = of_tenure.iter().filter(|other| {
            chosen.as_ref() != Some(&other.name) && is_open(other, guest, hosts) && !is_avoided(config, other)
        });
        let runner_up =
            others.min_by_key(|other| (other.price_nanousd_per_hour, &other.name)).map(|other| other.name.clone());
        let reason = reason.chars().filter(|c| !c.is_control()).take(VERDICT_TEXT_BYTES / 4).collect();
        Some(Told { guest: *id, market, chosen, runner_up, is_move, reason })
    };
    verdicts.iter().filter_map(tell).collect()
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
    known: &Known,
) -> Vec<(GuestId, Verdict)> {
    let of_tenure: Vec<&Market> = markets.iter().filter(|market| market.tenure == config.tenure).collect();
    let now_ms = markets.iter().map(|market| market.feed_now_ms).max().unwrap_or(0);
    let world = World::new(config, &of_tenure, guests, now_ms, (&known.learned, known.wall_ms));
    let verdict_on = |guest: &Guest| {
        let stay = |why: String| Verdict::Stay { name: guest.name.to_string(), why };
        if guest.operation.is_some() {
            return stay("an operation is in progress".into());
        }
        let Some(cloud) = guest.cloud_name.as_ref() else { return stay("it has no host".into()) };
        if let Some(sun) = config.sun.as_ref().filter(|sun| sun.guests.iter().any(|name| name == guest.name.as_str())) {
            let seen = Seen { config, markets: &of_tenure, hosts, operations, known };
            return seen.follow_the_sun(sun, &world, guest, cloud.as_str());
        }
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
        let is_open = |market: &Market| is_open(market, guest, hosts) && !is_avoided(config, market);
        if is_avoided(config, here) {
            let open = of_tenure.iter().filter(|market| is_open(market));
            let cheapest = open.min_by_key(|market| (market.price_nanousd_per_hour, &market.name));
            return match cheapest {
                Some(market) => wanted(market, format!("{} is to be avoided", here.cloud_name)),
                None => stay(format!("{} is to be avoided, but no other cloud has room", here.cloud_name)),
            };
        }
        if config.policy_name != PolicyName::Cheapest {
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
        match config.policy.decide(now_ms, &position, &quotes(&of_tenure, is_open)) {
            Decision::Stay(reason) => stay(reason.to_string()),
            Decision::Move { to, saving_per_hour } => {
                let Some(market) = of_tenure.iter().find(|market| market.name == to) else {
                    return stay("the market is gone".into());
                };
                wanted(market, format!("{} is {saving_per_hour}/h cheaper than {}", market.name, here.name))
            }
        }
    };
    guests
        .iter()
        .filter(|guest| guest.follow_prices && guest.state == GuestState::Running)
        .map(|guest| (guest.id, verdict_on(guest)))
        .collect()
}

fn quotes(markets: &[&Market], is_open: impl Fn(&Market) -> bool) -> Vec<Quote> {
    markets
        .iter()
        .map(|market| Quote {
            market: market.name.clone(),
            price: NanoUsd(market.price_nanousd_per_hour),
            since_ms: market.feed_time_ms,
            is_open: is_open(market),
        })
        .collect()
}

fn is_avoided(config: &Config, market: &Market) -> bool {
    config.avoid.iter().any(|cloud| cloud == market.cloud_name.as_str())
}

fn is_open(market: &Market, guest: &Guest, hosts: &[Host]) -> bool {
    hosts.iter().any(|host| host.cloud == market.cloud && has_room(host, guest))
}

fn has_room(host: &Host, guest: &Guest) -> bool {
    host.state == HostState::Up
        && host.capacity.memory_bytes.saturating_sub(host.used.memory_bytes) >= guest.shape.memory_bytes
        && host.capacity.vcpus.saturating_sub(host.used.vcpus) >= guest.shape.vcpus
        && guest.compat_class.as_ref().is_none_or(|class| host.serves(class))
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

/// What a look sees, for a guest that follows the sun.
struct Seen<'a> {
    config: &'a Config,
    markets: &'a [&'a Market],
    hosts: &'a [Host],
    operations: &'a [Operation],
    known: &'a Known,
}

impl Seen<'_> {
    fn follow_the_sun(&self, sun: &SunConfig, world: &World<'_>, guest: &Guest, cloud: &str) -> Verdict {
        let stay = |why: String| Verdict::Stay { name: guest.name.to_string(), why };
        let Some(counted) = &self.known.counted else {
            return stay(format!("{SUN_REASON}: {} could not be read yet", sun.loads_file.display()));
        };
        let Some(here) = sun.clouds().position(|name| name == cloud) else {
            return stay(format!("{SUN_REASON}: cloud {cloud} is not in [sun.latency_ms]"));
        };
        let now: Vec<CloudNow> = (sun.clouds())
            .map(|name| {
                let market = self.markets.iter().find(|market| market.cloud_name.as_str() == name.as_str());
                CloudNow {
                    is_open: market
                        .is_some_and(|market| is_open(market, guest, self.hosts) && !is_avoided(self.config, market)),
                    price: market.map(|market| NanoUsd(market.price_nanousd_per_hour)),
                }
            })
            .collect();
        let cost = self.config.move_cost(guest.shape.memory_bytes);
        let moves = sun_moves(guest.id, self.operations);
        let plan = sun::decide(sun, counted, &world.subject(guest), (here, &now), cost, (self.known.wall_ms, &moves));
        let forecast = format!("95 of 100 requests of the coming day within {} ms", plan.planned_p95_ms);
        match plan.to.and_then(|to| sun.clouds().nth(to)) {
            Some(to) => Verdict::Move(Wanted {
                guest: guest.id,
                name: guest.name.to_string(),
                to: to.clone(),
                reason: format!(
                    "{SUN_REASON}: {}; {forecast}, {} ms if it stayed; at cost_nanousd={} wall_ms={}",
                    plan.reason, plan.fixed_p95_ms, cost.0, self.known.wall_ms
                ),
            }),
            None => stay(format!("{SUN_REASON}: {}", plan.reason)),
        }
    }
}

/// When following the sun moved the guest, and at what cost. Moves that were rolled back count, too.
fn sun_moves(guest: GuestId, operations: &[Operation]) -> Vec<(u64, NanoUsd)> {
    let of_guest = operations
        .iter()
        .filter(|op| op.guest == Some(guest) && op.kind == OperationKind::GuestMigrate && op.phase != Phase::Plan);
    let read = |op: &Operation| {
        let reason = op.reason.as_deref()?.strip_prefix(SUN_REASON)?;
        let (before, at_ms) = reason.rsplit_once(" wall_ms=")?;
        let cost = before.rsplit_once("cost_nanousd=")?.1;
        Some((at_ms.parse().ok()?, NanoUsd(cost.parse().ok()?)))
    };
    of_guest.filter_map(read).collect()
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

    fn known() -> Known {
        Known { learned: Arc::new(Learned::from(&[], 24, 0)), counted: None, wall_ms: 0 }
    }

    fn config() -> Config {
        toml::from_str("url = 'https://c'\ntoken_file = 't'").unwrap()
    }

    fn one(world: &World, operations: &[Operation]) -> Verdict {
        decide(&config(), &world.markets, std::slice::from_ref(&world.guest), &world.hosts, operations, &known())
            .remove(0)
            .1
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
                decide(&config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, operations, &known())
                    .remove(0)
                    .1
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
            decide(config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, &[], &known()).remove(0).1
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
            decide(&config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, &[], &known()).remove(0).1
        };
        let Verdict::Move(wanted) = verdict(&world) else { panic!("it stays") };
        assert!(wanted.reason.contains("the price nears the bid"), "{}", wanted.reason);
        world.markets[1].price_nanousd_per_hour = 98_000_000;
        assert!(matches!(verdict(&world), Verdict::Stay { .. }), "no better there");
    }

    #[test]
    fn what_is_told_names_the_chosen_market_and_the_cheapest_other_that_has_room() {
        let mut world = world([90_000_000, 30_000_000]);
        let tell = |world: &World| {
            let guests = std::slice::from_ref(&world.guest);
            let verdicts = decide(&config(), &world.markets, guests, &world.hosts, &[], &known());
            told(&config(), &world.markets, guests, &world.hosts, &verdicts).remove(0)
        };
        let moves = tell(&world);
        assert!(moves.is_move && moves.guest == world.guest.id);
        let named = [moves.market.as_deref(), moves.chosen.as_deref(), moves.runner_up.as_deref()];
        assert_eq!(
            named,
            [Some("aws-east/demo.large/spot"), Some("home/demo.large/spot"), Some("aws-east/demo.large/spot")]
        );
        assert!(moves.reason.contains("feed_ms"), "{}", moves.reason);
        world.hosts[1].used = world.hosts[1].capacity;
        let stays = tell(&world);
        assert!(!stays.is_move);
        assert_eq!((stays.chosen.as_deref(), stays.runner_up), (Some("aws-east/demo.large/spot"), None));
    }

    #[test]
    fn a_cloud_without_room_is_not_open() {
        let mut world = world([90_000_000, 30_000_000]);
        world.hosts[1].used = world.hosts[1].capacity;
        assert!(matches!(one(&world, &[]), Verdict::Stay { .. }));
        world.guest.follow_prices = false;
        assert!(decide(&config(), &world.markets, &[world.guest.clone()], &world.hosts, &[], &known()).is_empty());
    }

    #[test]
    fn a_cloud_that_is_avoided_is_left_at_once_and_not_gone_to() {
        let avoid = |cloud: &str| Config { avoid: vec![cloud.to_owned()], ..config() };
        let dearer = world([30_000_000, 90_000_000]);
        let verdict = |config: &Config, world: &World, operations: &[Operation]| {
            decide(config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, operations, &known())
                .remove(0)
                .1
        };
        let just_moved = [past_move(dearer.guest.id, "price policy: x at feed_ms=7200000")];
        let Verdict::Move(wanted) = verdict(&avoid("aws-east"), &dearer, &just_moved) else { panic!("it stays") };
        assert!(wanted.to == "home" && wanted.reason.contains("aws-east is to be avoided"), "{}", wanted.reason);
        let cheaper = world([90_000_000, 30_000_000]);
        assert!(matches!(verdict(&config(), &cheaper, &[]), Verdict::Move(_)));
        for name in [PolicyName::Cheapest, PolicyName::SmartSpot, PolicyName::Greedy] {
            let config = Config { policy_name: name, ..avoid("home") };
            assert!(matches!(verdict(&config, &cheaper, &[]), Verdict::Stay { .. }), "{name:?}");
        }
        let both = Config { avoid: vec!["home".into(), "aws-east".into()], ..config() };
        let Verdict::Stay { why, .. } = verdict(&both, &dearer, &[]) else { panic!("it moves") };
        assert!(why.contains("no other cloud has room"), "{why}");
    }

    #[test]
    fn a_guest_of_the_sun_goes_ahead_of_its_clients_and_remembers_its_moves() {
        let text = "url = 'https://c'\ntoken_file = 't'\n[sun]\nguests = ['web']\nloads_file = 'l.csv'\n\
                    [sun.latency_ms]\neast = { aws-east = 10, home = 200 }\nwest = { aws-east = 200, home = 10 }\n\
                    [sun.policy]\nmax_moves_per_day = 2\n";
        let config: Config = toml::from_str(text).unwrap();
        assert_eq!(config.sun.as_ref().unwrap().check(), Ok(()));
        // Ten days; the east asks in the first half of each, the west in the second.
        let mut rows = "timestamp_utc,place,requests\n".to_owned();
        for hour in 0..240 {
            let at = format!("2026-01-{:02}T{:02}:00:00Z", 1 + hour / 24, hour % 24);
            let (east, west) = if hour % 24 < 12 { (100, 0) } else { (0, 100) };
            rows.push_str(&format!("{at},east,{east}\n{at},west,{west}\n"));
        }
        let counted = Arc::new(Counted::read(rows.as_bytes(), config.sun.as_ref().unwrap()).unwrap());
        assert_eq!(counted.period_ms(), Some(24 * 3_600_000));
        let world = world([50_000_000, 50_000_000]);
        let start = supercloud_scheduler::calendar::parse_utc("2026-01-11T00:00:00Z").unwrap();
        let at = |hour: u64, operations: &[Operation]| {
            let known = Known { wall_ms: start + hour * 3_600_000, counted: Some(counted.clone()), ..known() };
            decide(&config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, operations, &known)
                .remove(0)
                .1
        };
        assert!(matches!(at(5, &[]), Verdict::Stay { why, .. } if why.contains("planned for later")));
        let Verdict::Move(wanted) = at(11, &[]) else { panic!("it stays") };
        assert_eq!(wanted.to, "home");
        // The bound holds over a restart: what was done stands in the operations.
        let done: Vec<Operation> = [1, 2]
            .map(|back| {
                past_move(
                    world.guest.id,
                    &wanted.reason.replace(
                        &format!("wall_ms={}", start + 11 * 3_600_000),
                        &format!("wall_ms={}", start + (11 - back) * 3_600_000),
                    ),
                )
            })
            .into();
        assert!(matches!(at(11, &done), Verdict::Stay { .. }), "two moves a day and no more");
        let unread = decide(&config, &world.markets, std::slice::from_ref(&world.guest), &world.hosts, &[], &known());
        assert!(matches!(&unread[0].1, Verdict::Stay { why, .. } if why.contains("l.csv could not be read")));
    }
}
