//! Guests that follow their clients over the day: settings, the counts of their requests, and what is decided for one.
//!
//! Nothing in the API tells where clients are. The counts come from a file that the operator's front ends, load balancer or DNS
//! keep: CSV `timestamp_utc,place,requests`, one row per place and slot of time, which is read again when it changes.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Deserialize;
use supercloud_feed::loads::{self, Loads};
use supercloud_scheduler::{
    evacuable,
    money::NanoUsd,
    policy,
    sun::{CloudView, FollowTheSun, MOST_CLOUDS, SunPlan, SunView},
};

/// The section `[sun]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SunConfig {
    /// The guests that follow their clients, by name; they must be allowed to be moved by policies (`follow_prices`).
    pub guests: Vec<String>,
    /// The counts of requests (CSV, also .gz).
    pub loads_file: PathBuf,
    /// How long a request and its answer are under way, in milliseconds: place, then cloud.
    pub latency_ms: BTreeMap<String, BTreeMap<String, u32>>,
    /// What it goes by.
    #[serde(default)]
    pub policy: FollowTheSun,
}

impl SunConfig {
    /// What is wrong, if anything: a sentence that names the field.
    pub fn check(&self) -> Result<(), String> {
        self.policy.check().map_err(|what| format!("policy: {what}"))?;
        if self.guests.is_empty() {
            return Err("guests is empty; name the guests that follow their clients".into());
        }
        let mut rows = self.latency_ms.iter();
        let Some((first, clouds)) = rows.next() else {
            return Err("latency_ms is empty; add latency_ms.PLACE = { CLOUD = MILLISECONDS, ... }".into());
        };
        if clouds.len() < 2 || clouds.len() > MOST_CLOUDS {
            return Err(format!("latency_ms.{first} names {} clouds; it must name 2 to {MOST_CLOUDS}", clouds.len()));
        }
        for (place, of) in rows {
            if !of.keys().eq(clouds.keys()) {
                return Err(format!("latency_ms.{place} does not name the same clouds as latency_ms.{first}"));
            }
        }
        match self.latency_ms.values().flatten().find(|(_, ms)| **ms > 60_000) {
            Some((cloud, ms)) => Err(format!("latency_ms of {cloud} is {ms}; it must be at most 60000")),
            None => Ok(()),
        }
    }

    /// The clouds, in the order in which [`SunConfig::view`] has them.
    pub fn clouds(&self) -> impl Iterator<Item = &String> {
        self.latency_ms.values().take(1).flat_map(BTreeMap::keys)
    }
}

/// The counts, with what was learned of them.
#[derive(Debug, Clone)]
pub struct Counted {
    loads: Loads,
    period: Option<usize>,
}

impl Counted {
    /// Reads counts and learns their period.
    ///
    /// # Errors
    /// What is wrong with them, and in which line; places for which the settings have no latency.
    pub fn read(bytes: &[u8], config: &SunConfig) -> Result<Self, String> {
        let text = supercloud_feed::recorded::text_of(bytes).map_err(|error| error.to_string())?;
        let loads = loads::loads(&text).map_err(|error| error.to_string())?;
        if let Some(place) = loads.places.iter().find(|place| !config.latency_ms.contains_key(*place)) {
            return Err(format!("place {place} has no latency_ms.{place} in [sun]"));
        }
        let period = loads.demand.period();
        Ok(Self { loads, period })
    }

    /// After how many milliseconds the counts repeat themselves.
    pub fn period_ms(&self) -> Option<u64> {
        Some(self.period? as u64 * self.loads.demand.slot_ms())
    }
}

/// A cloud of the settings as it is now.
#[derive(Debug, Clone, Copy)]
pub struct CloudNow {
    /// The guest could be there.
    pub is_open: bool,
    /// The rent per hour; `None`: it has no market.
    pub price: Option<NanoUsd>,
}

/// What is decided for one guest: the number of the cloud it goes to, if any, and why. `now` has the clouds in the order of the settings.
pub fn decide(
    config: &SunConfig,
    counted: &Counted,
    guest: &policy::Guest,
    (here, now): (usize, &[CloudNow]),
    bytes_cost: NanoUsd,
    (wall_ms, moves): (u64, &[(u64, NanoUsd)]),
) -> SunPlan {
    let live = evacuable::predict(&guest.load, &guest.path);
    let (move_ms, pause_ms) =
        live.map_or((u64::MAX, 0), |live| (live.copy_ms.saturating_add(guest.path.host_ready_ms), live.downtime_ms));
    let clouds: Vec<CloudView> = (config.clouds().zip(now))
        .map(|(cloud, now)| CloudView {
            is_open: now.is_open && now.price.is_some(),
            price: now.price.unwrap_or_default(),
            // The hosts are there already, and paid by whoever rented them: a move costs its bytes.
            move_cost: bytes_cost,
            latency_ms: (counted.loads.places.iter())
                .filter_map(|place| config.latency_ms.get(place)?.get(cloud).copied())
                .collect(),
        })
        .collect();
    config.policy.decide(&SunView {
        now_ms: wall_ms,
        demand: &counted.loads.demand,
        period: counted.period,
        clouds: &clouds,
        here,
        move_ms,
        pause_ms,
        moves,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> SunConfig {
        toml::from_str(text).unwrap()
    }

    const GOOD: &str =
        "guests = ['web']\nloads_file = 'l.csv'\n[latency_ms]\nus = { a = 20, b = 90 }\neu = { a = 90, b = 20 }\n";

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(config(GOOD).check(), Ok(()));
        for (wrong, what) in [
            (GOOD.replace("'web'", ""), "guests is empty"),
            (GOOD.replace("us = { a = 20, b = 90 }", "us = { a = 20 }"), "latency_ms.us does not name the same clouds"),
            (
                GOOD.replace("eu = { a = 90, b = 20 }", "eu = { a = 90 }"),
                "latency_ms.eu names 1 clouds; it must name 2 to",
            ),
            (GOOD.replace("b = 90", "b = 90000"), "latency_ms of b is 90000"),
            (format!("{GOOD}[policy]\nmax_moves_per_day = 0"), "policy: max_moves_per_day is 0; it must be 1 to 24"),
            ("guests = ['w']\nloads_file = 'l'\nlatency_ms = {}".to_owned(), "latency_ms is empty"),
        ] {
            let said = config(&wrong).check().unwrap_err();
            assert!(said.contains(what), "{said}");
        }
    }

    #[test]
    fn counts_of_a_place_without_a_latency_are_refused() {
        let read = |text: &str| Counted::read(text.as_bytes(), &config(GOOD)).map(|counted| counted.period_ms());
        let head = "timestamp_utc,place,requests\n";
        assert_eq!(
            read(&format!("{head}2026-01-01T00:00:00Z,us,5\n2026-01-01T01:00:00Z,us,6\n")),
            Ok(None),
            "too little for a period"
        );
        let said = read(&format!("{head}2026-01-01T00:00:00Z,asia,5\n2026-01-01T01:00:00Z,us,6\n")).unwrap_err();
        assert!(said.contains("latency_ms.asia"), "{said}");
    }
}
