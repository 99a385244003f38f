//! Joint renting: which hosts to rent, and how to pack a fleet into them, in one decision.
//!
//! The bound is the linear relaxation in vCPUs and memory: weights `y` that price both so that no offer is worth more than
//! it costs, and the whole demand as much as possible. It is solved exactly, because two dimensions have few corners. The
//! same weights say what a guest is worth, so that the packing can go for the offer that gives most worth for its price
//! (greedy covering); afterwards hosts are emptied into the others and changed for cheaper ones that still hold what is
//! on them. Packing is hard in general: the result is valid, and near the bound on real catalogues, not always the best.

use super::Room;
use crate::money::NanoUsd;

/// What can be rented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// What may be promised of one host.
    pub room: Room,
    /// What one costs per hour.
    pub price: NanoUsd,
    /// How many can be had.
    pub most: u32,
}

/// A rented host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rented {
    /// Which offer, by index.
    pub offer: usize,
    /// Which needs stand on it, by index.
    pub needs: Vec<usize>,
}

/// Rents and packs. `None`: a need fits no offer, or offers run out.
#[must_use]
pub fn rent(needs: &[Room], offers: &[Offer]) -> Option<Vec<Rented>> {
    let weights = weights(needs, offers);
    // Worth alone leaves what is hard to place for last; counting a need by its cheapest own host finds other ways.
    let ways = [
        cover(needs, offers, |need| weights.0 * f64::from(need.vcpus) + weights.1 * need.memory_bytes as f64),
        cover(needs, offers, |need| alone(need, offers).map_or(0.0, |price| price.0 as f64)),
    ];
    ways.into_iter().flatten().map(|hosts| improve(needs, offers, hosts)).min_by_key(|hosts| cost(hosts, offers))
}

/// What the hosts cost per hour.
#[must_use]
pub fn cost(hosts: &[Rented], offers: &[Offer]) -> NanoUsd {
    hosts.iter().map(|host| offers[host.offer].price).sum()
}

/// What nobody can pay less than, per hour: the relaxation, and the cheapest host of the need that is hardest to place.
#[must_use]
pub fn lower_bound(needs: &[Room], offers: &[Offer]) -> NanoUsd {
    let (y_vcpus, y_memory) = weights(needs, offers);
    let total = needs.iter().fold((0.0, 0.0), |(v, m), need| (v + f64::from(need.vcpus), m + need.memory_bytes as f64));
    // Rounding is a few units in the last place of a double; the bound stays below.
    let relaxed = ((y_vcpus * total.0 + y_memory * total.1) * (1.0 - 1e-9)).max(0.0) as u64;
    let largest = needs.iter().filter_map(|need| alone(need, offers)).max().unwrap_or_default();
    NanoUsd(relaxed).max(largest)
}

fn alone(need: &Room, offers: &[Offer]) -> Option<NanoUsd> {
    offers.iter().filter(|offer| offer.most > 0 && offer.room.holds(need)).map(|offer| offer.price).min()
}

/// The prices of a vCPU and of a byte of memory under which no offer is worth more than it costs and the needs are worth most.
fn weights(needs: &[Room], offers: &[Offer]) -> (f64, f64) {
    let rows: Vec<(f64, f64, f64)> = (offers.iter())
        .filter(|offer| offer.most > 0)
        .map(|offer| (f64::from(offer.room.vcpus), offer.room.memory_bytes as f64, offer.price.0 as f64))
        .collect();
    let total = needs.iter().fold((0.0, 0.0), |(v, m), need| (v + f64::from(need.vcpus), m + need.memory_bytes as f64));
    let least = |ratios: &mut dyn Iterator<Item = f64>| {
        let least = ratios.filter(|ratio| ratio.is_finite()).fold(f64::INFINITY, f64::min);
        if least.is_finite() { least } else { 0.0 }
    };
    // The corners of the feasible weights: on an axis, or where two offers are worth exactly their price.
    let mut corners = vec![
        (least(&mut rows.iter().map(|row| row.2 / row.0)), 0.0),
        (0.0, least(&mut rows.iter().map(|row| row.2 / row.1))),
    ];
    for (i, a) in rows.iter().enumerate() {
        for b in &rows[i + 1..] {
            let det = a.0 * b.1 - a.1 * b.0;
            if det != 0.0 {
                corners.push(((a.2 * b.1 - a.1 * b.2) / det, (a.0 * b.2 - a.2 * b.0) / det));
            }
        }
    }
    let is_feasible = |(v, m): &(f64, f64)| {
        *v >= 0.0 && *m >= 0.0 && rows.iter().all(|row| v * row.0 + m * row.1 <= row.2 * (1.0 + 1e-12))
    };
    let worth = |(v, m): &(f64, f64)| v * total.0 + m * total.1;
    corners.into_iter().filter(is_feasible).max_by(|a, b| worth(a).total_cmp(&worth(b))).unwrap_or((0.0, 0.0))
}

/// Rents, again and again, the offer that holds most worth for its price.
fn cover(needs: &[Room], offers: &[Offer], worth: impl Fn(&Room) -> f64) -> Option<Vec<Rented>> {
    let worths: Vec<f64> = needs.iter().map(|need| worth(need).max(1e-12)).collect();
    let mut rest: Vec<usize> = (0..needs.len()).collect();
    rest.sort_by(|a, b| worths[*b].total_cmp(&worths[*a]).then(a.cmp(b)));
    let mut left: Vec<u32> = offers.iter().map(|offer| offer.most).collect();
    let mut hosts = Vec::new();
    while !rest.is_empty() {
        let mut best: Option<(f64, usize, Vec<usize>)> = None;
        for (o, offer) in offers.iter().enumerate().filter(|(o, _)| left[*o] > 0) {
            for packed in [first_fit(needs, &rest, &offer.room), closest_fit(needs, &rest, &offer.room)] {
                let gain: f64 = packed.iter().map(|need| worths[*need]).sum();
                if packed.is_empty() {
                    continue;
                }
                let ratio = offer.price.0 as f64 / gain;
                if best.as_ref().is_none_or(|(so_far, _, _)| ratio < *so_far) {
                    best = Some((ratio, o, packed));
                }
            }
        }
        let (_, offer, packed) = best?;
        left[offer] -= 1;
        rest.retain(|need| !packed.contains(need));
        hosts.push(Rented { offer, needs: packed });
    }
    Some(hosts)
}

fn first_fit(needs: &[Room], order: &[usize], room: &Room) -> Vec<usize> {
    let mut free = *room;
    let mut packed = Vec::new();
    for need in order {
        if free.holds(&needs[*need]) {
            free = free.less(&needs[*need]);
            packed.push(*need);
        }
    }
    packed
}

/// Takes, again and again, the need whose proportions are closest to what is still free (the largest dot product).
fn closest_fit(needs: &[Room], order: &[usize], room: &Room) -> Vec<usize> {
    let share = |of: &Room| {
        let part = |x: f64, whole: f64| if whole > 0.0 { x / whole } else { 0.0 };
        (part(f64::from(of.vcpus), f64::from(room.vcpus)), part(of.memory_bytes as f64, room.memory_bytes as f64))
    };
    // Guests of one size are many: one stands for all of them.
    let mut sizes: Vec<(Room, Vec<usize>)> = Vec::new();
    let mut by_size = std::collections::HashMap::new();
    for need in order {
        let slot = *by_size.entry(needs[*need]).or_insert_with(|| {
            sizes.push((needs[*need], Vec::new()));
            sizes.len() - 1
        });
        sizes[slot].1.push(*need);
    }
    let mut free = *room;
    let mut packed = Vec::new();
    loop {
        let (v, m) = share(&free);
        let fitting = sizes.iter_mut().filter(|(size, these)| !these.is_empty() && free.holds(size));
        let product = |size: &Room| {
            let (a, b) = share(size);
            a * v + b * m
        };
        let Some((size, these)) = fitting.max_by(|a, b| product(&a.0).total_cmp(&product(&b.0))) else { return packed };
        free = free.less(size);
        packed.extend(these.pop());
    }
}

fn load(needs: &[Room], host: &Rented) -> Room {
    host.needs.iter().fold(Room::default(), |sum, need| sum.plus(&needs[*need]))
}

/// Empties hosts into the others where it can, and takes cheaper ones that hold the same.
fn improve(needs: &[Room], offers: &[Offer], mut hosts: Vec<Rented>) -> Vec<Rented> {
    let mut i = 0;
    // The dearest per load first: those are worth most to be rid of.
    hosts.sort_by_key(|host| (std::cmp::Reverse(offers[host.offer].price), host.needs.first().copied()));
    while i < hosts.len() {
        let mut trial = hosts.clone();
        let mut moving = trial.remove(i).needs;
        moving.sort_by_key(|need| (std::cmp::Reverse(needs[*need].memory_bytes), *need));
        let mut frees: Vec<Room> = trial.iter().map(|host| offers[host.offer].room.less(&load(needs, host))).collect();
        let is_empty = moving.into_iter().all(|need| {
            let fits = frees.iter().enumerate().filter(|(_, free)| free.holds(&needs[need]));
            let Some((to, _)) = fits.min_by_key(|(_, free)| free.memory_bytes) else { return false };
            frees[to] = frees[to].less(&needs[need]);
            trial[to].needs.push(need);
            true
        });
        if is_empty {
            hosts = trial;
        } else {
            i += 1;
        }
    }
    let mut left: Vec<u32> = offers.iter().map(|offer| offer.most).collect();
    for host in &hosts {
        left[host.offer] = left[host.offer].saturating_sub(1);
    }
    for host in &mut hosts {
        let load = load(needs, host);
        let cheaper = offers
            .iter()
            .enumerate()
            .filter(|(o, offer)| left[*o] > 0 && offer.room.holds(&load) && offer.price < offers[host.offer].price);
        if let Some((to, _)) = cheaper.min_by_key(|(_, offer)| offer.price) {
            left[host.offer] += 1;
            left[to] -= 1;
            host.offer = to;
        }
    }
    hosts
}
