//! Writes the demo's feed: `cargo run -p supercloud-feed --example generate -- 12 > deploy/lab/feed/three-markets.csv`.

fn main() {
    let seed = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(12);
    let feed = supercloud_feed::generate(&supercloud_feed::Model::demo(), seed);
    print!(
        "{}",
        feed.to_text(&format!(
            "Generated, not recorded. Model: `Model::demo()` of scheduler/feed/src/generate.rs, seed {seed}.\n\
             Spot = on-demand x clamp(mean x daily wave x exp(AR(1) noise), 0.05, 1); three waves a third of a day apart."
        ))
    );
}
