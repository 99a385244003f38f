//! Round-trip times between hosts, for predictions.

use std::collections::HashMap;

use supercloud_api::{
    Host,
    ids::{CloudId, HostId},
};

/// What was measured lately: between two hosts where one of them measures the other, else between their clouds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoundTrips {
    ways: HashMap<(HostId, HostId), u32>,
    clouds: HashMap<(CloudId, CloudId), u32>,
}

/// A way there is as long as the way back.
fn pair<T: Ord>(a: T, b: T) -> (T, T) {
    if a <= b { (a, b) } else { (b, a) }
}

impl RoundTrips {
    /// Of ways that answer, with their times in microseconds.
    #[must_use]
    pub fn new(ways: impl IntoIterator<Item = (HostId, HostId, u32)>, hosts: &[Host]) -> Self {
        let cloud_of: HashMap<HostId, CloudId> = hosts.iter().map(|host| (host.id, host.cloud)).collect();
        let mut made = Self::default();
        let mut between: HashMap<(CloudId, CloudId), Vec<u32>> = HashMap::new();
        for (from, to, us) in ways {
            // The slower of both directions: a prediction does not promise.
            let way = made.ways.entry(pair(from, to)).or_insert(us);
            *way = us.max(*way);
            if let Some((a, b)) = cloud_of.get(&from).zip(cloud_of.get(&to)) {
                between.entry(pair(*a, *b)).or_default().push(us);
            }
        }
        for (clouds, mut times) in between {
            times.sort_unstable();
            if let Some(median) = times.get(times.len() / 2) {
                made.clouds.insert(clouds, *median);
            }
        }
        made
    }

    /// The round-trip time between two hosts, in microseconds; `None`: nobody has measured it.
    #[must_use]
    pub fn between_us(&self, from: &Host, to: &Host) -> Option<u64> {
        let way = self.ways.get(&pair(from.id, to.id));
        way.or_else(|| self.clouds.get(&pair(from.cloud, to.cloud))).copied().map(u64::from)
    }
}
