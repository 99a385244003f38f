//! Renting: valid, never below the bound, near it.

use super::{super::rent::*, *};
use crate::sim::{fleet::Fleet, hazard::SplitMix};

fn offer(vcpus: u32, gib: u64, price: u64) -> Offer {
    Offer { room: room(vcpus, gib), price: NanoUsd(price), most: u32::MAX }
}

/// The cheapest way to rent, by trying every partition of the needs.
fn best(needs: &[Room], offers: &[Offer]) -> Option<u64> {
    fn put(i: usize, needs: &[Room], groups: &mut Vec<Room>, offers: &[Offer]) -> Option<u64> {
        let Some(need) = needs.get(i) else {
            let price = |load: &Room| offers.iter().filter(|o| o.room.holds(load)).map(|o| o.price.0).min();
            return groups.iter().map(price).sum();
        };
        let mut least = None;
        for g in 0..=groups.len() {
            if g == groups.len() {
                groups.push(*need)
            } else {
                groups[g] = groups[g].plus(need)
            }
            let found = put(i + 1, needs, groups, offers);
            if g + 1 == groups.len() && groups[g] == *need {
                groups.pop();
            } else {
                groups[g] = groups[g].less(need)
            }
            least = [least, found].into_iter().flatten().min();
        }
        least
    }
    put(0, needs, &mut Vec::new(), offers)
}

fn check(needs: &[Room], offers: &[Offer], hosts: &[Rented]) {
    let mut seen: Vec<usize> = hosts.iter().flat_map(|host| host.needs.clone()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..needs.len()).collect::<Vec<_>>(), "each stands on one host");
    for host in hosts {
        let load = host.needs.iter().fold(Room::default(), |sum, need| sum.plus(&needs[*need]));
        assert!(offers[host.offer].room.holds(&load) && !host.needs.is_empty());
    }
    for (o, offer) in offers.iter().enumerate() {
        assert!(hosts.iter().filter(|host| host.offer == o).count() as u64 <= u64::from(offer.most));
    }
}

#[test]
fn what_fits_nowhere_or_runs_out_is_said() {
    assert_eq!(rent(&[room(1, 9)], &[offer(4, 8, 1)]), None);
    let one = Offer { most: 1, ..offer(4, 8, 1) };
    assert_eq!(rent(&[room(1, 8), room(1, 8)], &[one]), None);
    assert_eq!(rent(&[], &[one]), Some(vec![]));
    assert_eq!(lower_bound(&[], &[]), NanoUsd(0));
}

#[test]
fn one_large_host_is_rented_where_it_is_cheaper_than_many_small_ones() {
    let offers = [offer(1, 2, 30), offer(8, 16, 100)];
    let hosts = rent(&[room(1, 2); 8], &offers).unwrap();
    assert_eq!((hosts.len(), cost(&hosts, &offers)), (1, NanoUsd(100)));
    let hosts = rent(&[room(1, 2); 9], &offers).unwrap();
    assert_eq!(cost(&hosts, &offers), NanoUsd(130), "the ninth gets a small one");
}

/// The seed fleet on list prices, and seeded fleets of 60 guests: near the bound.
#[test]
fn real_fleets_are_packed_near_the_bound() {
    // m5, c5 and r5 of 2021, large to 4xlarge, USD/1000 per hour.
    let offers: Vec<Offer> = (1u32..=8)
        .filter(|n| n.is_power_of_two())
        .flat_map(|n| {
            let of = |gib: u64, price: u64| offer(2 * n, gib * u64::from(n), price * u64::from(n));
            [of(8, 96), of(4, 85), of(16, 126)]
        })
        .collect();
    let ratio = |needs: &[Room]| {
        let hosts = rent(needs, &offers).unwrap();
        check(needs, &offers, &hosts);
        cost(&hosts, &offers).0 as f64 / lower_bound(needs, &offers).0 as f64
    };
    let shipped: Vec<Room> = (Fleet::default().guests().iter())
        .map(|guest| Room { vcpus: guest.vcpus, memory_bytes: guest.load.memory_bytes, disk_bytes: 0 })
        .collect();
    let found = ratio(&shipped);
    assert!(found <= 1.15, "the shipped fleet: {found}");
    let mut random = SplitMix(7);
    for _ in 0..50 {
        let needs: Vec<Room> = (0..60).map(|_| room(1 + random.below(4) as u32, 1 + random.below(24) as u64)).collect();
        let found = ratio(&needs);
        assert!(found <= 1.15, "{found}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// The packing is valid, never below the bound, nor is the best one; and never far from the best.
    #[test]
    fn renting_is_valid_and_between_the_bound_and_a_host_for_each(
        needs in prop::collection::vec((1u32..5, 1u64..9), 1..6),
        offers in prop::collection::vec((4u32..9, 8u64..17, 10u64..100), 1..4),
    ) {
        let needs: Vec<Room> = needs.into_iter().map(|(vcpus, gib)| room(vcpus, gib)).collect();
        let offers: Vec<Offer> = offers.into_iter().map(|(vcpus, gib, price)| offer(vcpus, gib, price)).collect();
        let hosts = rent(&needs, &offers).unwrap();
        check(&needs, &offers, &hosts);
        let (paid, bound, best) = (cost(&hosts, &offers).0, lower_bound(&needs, &offers).0, best(&needs, &offers).unwrap());
        prop_assert!(bound <= best && best <= paid, "{bound} {best} {paid}");
        let cheapest = offers.iter().map(|offer| offer.price.0).min().unwrap();
        prop_assert!(paid <= cheapest * needs.len() as u64);
        prop_assert!(paid <= 2 * best, "{paid} against {best}");
    }
}
