//! Feeds made from a model, for demos, tests and samples.

use supercloud_scheduler::money::NanoUsd;

use crate::{Feed, MarketKey, Step};

/// How one market's prices behave.
#[derive(Debug, Clone, PartialEq)]
pub struct MarketModel {
    /// The cloud's name.
    pub cloud: String,
    /// The instance type.
    pub instance_type: String,
    /// The on-demand price: constant, and the cap of the spot price.
    pub on_demand: NanoUsd,
    /// The spot price around which the market moves, as a share of on-demand.
    pub spot_mean: f64,
    /// How far it swings around that mean (amplitude of the daily wave, as a share of the mean).
    pub swing: f64,
    /// Where in the day the wave peaks, as a share of a day.
    pub peak: f64,
    /// Standard deviation of the noise per step, as a share of the mean.
    pub noise: f64,
}

/// A whole feed's model.
///
/// Spot price at step *k* = on-demand × clamp(m × (1 + swing × cos(2π(t − peak))) × exp(x_k), 0.05, 1), with
/// x_k = 0.8 x_{k−1} + noise × N(0,1): a daily wave with mean-reverting multiplicative noise (AR(1)), capped by the
/// on-demand price as today's markets are. Prices are rounded to 0.0001 USD and written only when they change.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The markets.
    pub markets: Vec<MarketModel>,
    /// Time between steps.
    pub step_ms: u64,
    /// Length of the feed.
    pub length_ms: u64,
}

impl Model {
    /// The demo's model: three markets whose daily waves are a third of a day apart, so that each is the cheapest for
    /// some hours; two days in steps of five minutes.
    #[must_use]
    pub fn demo() -> Self {
        let market = |cloud: &str, on_demand: u64, spot_mean: f64, peak: f64| MarketModel {
            cloud: cloud.into(),
            instance_type: "demo.large".into(),
            on_demand: NanoUsd(on_demand),
            spot_mean,
            swing: 0.6,
            peak,
            noise: 0.03,
        };
        Self {
            markets: vec![
                market("aws-east", 96_000_000, 0.40, 0.50),
                market("gcp-west", 97_000_000, 0.40, 0.83),
                market("home", 90_000_000, 0.45, 0.17),
            ],
            step_ms: 300_000,
            length_ms: 2 * 86_400_000,
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, seeded, the same on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller 1958).
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
}

/// Makes a feed of a model; the same seed gives the same feed.
#[must_use]
pub fn generate(model: &Model, seed: u64) -> Feed {
    const DAY_MS: f64 = 86_400_000.0;
    let mut feed = Feed::default();
    for (index, market) in model.markets.iter().enumerate() {
        let mut random = SplitMix(seed ^ (index as u64).wrapping_mul(0xA24B_AED4_963E_E407));
        let key = |tenure: &str| MarketKey {
            cloud: market.cloud.clone(),
            instance_type: market.instance_type.clone(),
            tenure: tenure.into(),
        };
        feed.push(key("on_demand"), Step { at_ms: 0, price: market.on_demand });
        let (mut x, mut last) = (0.0f64, None);
        let mut at_ms = 0;
        while at_ms <= model.length_ms {
            x = 0.8 * x + market.noise * random.normal();
            let wave = 1.0 + market.swing * (std::f64::consts::TAU * (at_ms as f64 / DAY_MS - market.peak)).cos();
            let share = (market.spot_mean * wave * x.exp()).clamp(0.05, 1.0);
            // Rounded to 0.0001 USD, never above on-demand.
            let units = (market.on_demand.0 as f64 * share / 100_000.0).round() as u64;
            let price = NanoUsd((units * 100_000).clamp(100_000, market.on_demand.0));
            if last != Some(price) {
                feed.push(key("spot"), Step { at_ms, price });
                last = Some(price);
            }
            at_ms += model.step_ms;
        }
    }
    feed
}
