//! `namespace-migration`: a live move through our agents beside the bare hypervisor's.
//!
//! Two hosts, one link of 40 ms and 200 Mbit/s; on it the same lean guest twice, with the same memory being rewritten and
//! the same writes to its disk: one is ours, one is libvirt's alone ([`super::bare`]). They are moved in turn, there and back.

use anyhow::Context as _;
use supercloud_api::{Operation, Phase};

use super::Row;
use super::bare::Bare;
use super::stats::Sample;
use crate::demo::tell::Teller;
use crate::fleet::{Fleet, FleetSpec, GuestSpec, blocking};
use crate::image;
use crate::spec::{CONTROLLER, LabSpec, LinkShape, LinkSpec};

const MEMORY_MIB: u64 = 128;
const ROLE: &str = "sc.role=server sc.mem=24 sc.dirty=2";
const GUEST: &str = "ours";

#[derive(Debug, Default)]
struct Samples {
    total_ms: Sample,
    downtime_ms: Sample,
    memory_bytes: Sample,
}

/// How long our moves stayed in each phase.
#[derive(Debug, Default)]
struct Phases(Vec<(Phase, Sample)>);

impl Phases {
    fn push(&mut self, done: &Operation) {
        for pair in done.phase_times.windows(2) {
            let lasted = pair[1].at_ms.saturating_sub(pair[0].at_ms) as f64;
            match self.0.iter_mut().find(|(phase, _)| *phase == pair[0].phase) {
                Some((_, sample)) => sample.push(lasted),
                None => {
                    let mut sample = Sample::default();
                    sample.push(lasted);
                    self.0.push((pair[0].phase, sample));
                }
            }
        }
    }

    /// One line: each phase with its median.
    fn line(&self) -> String {
        let of = |(phase, sample): &(Phase, Sample)| {
            format!("{} {:.0}", format!("{phase:?}").to_lowercase(), sample.median().unwrap_or(0.0))
        };
        self.0.iter().map(of).collect::<Vec<_>>().join(", ")
    }
}

/// Measures each side `runs` times.
///
/// # Errors
/// When a part of the lab or a move fails; the lab is taken down.
pub async fn run(name: String, runs: u32) -> anyhow::Result<Vec<Row>> {
    let tell = Teller::default();
    let mut lab = LabSpec::plain(&name, 2);
    let link = |a: &str, b: &str, rtt_ms| LinkSpec { a: a.into(), b: b.into(), shape: LinkShape::new(rtt_ms, 200) };
    lab.links = vec![link("h1", "h2", 40.0), link(CONTROLLER, "h1", 20.0), link(CONTROLLER, "h2", 20.0)];
    tell.say("namespace-migration: two hosts, 40 ms and 200 Mbit/s apart");
    let fleet = tell.step("the lab, controller, agents", Fleet::up(FleetSpec::new(lab))).await?;
    let measured = measure(&fleet, runs, tell).await;
    fleet.down().await?;
    measured
}

async fn measure(fleet: &Fleet, runs: u32, tell: Teller) -> anyhow::Result<Vec<Row>> {
    let image = blocking(image::lean::ensure).await??;
    let ready = async {
        fleet.import_image("lean", &image).await?;
        fleet.create_network("lan", "10.20.0.0/24").await?;
        fleet.create_guest(&GuestSpec::new(GUEST, "lean", "lan", ROLE).at("h1")).await
    };
    let guest = tell.step("our guest", ready).await?;
    let class = guest.compat_class.context("our guest has no compat class")?;
    let role = format!("{ROLE} sc.address=10.20.0.11/24");
    let mut bare = tell.step("the bare guest", Bare::start(fleet, "h1", &image, &class, MEMORY_MIB, &role)).await?;
    let version = bare.version().await?;

    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    let mut phases = Phases::default();
    let both = async {
        for run in 0..runs {
            let to = if run.is_multiple_of(2) { "h2" } else { "h1" };
            let done = fleet.migrate(GUEST, to, |_| {}).await?;
            phases.push(&done);
            let total = done.ended_at_ms.unwrap_or(done.updated_at_ms).saturating_sub(done.created_at_ms);
            ours.total_ms.push(total as f64);
            let downtime = done.progress.downtime_ms.context("our move does not say its downtime")?;
            ours.downtime_ms.push(downtime as f64);
            ours.memory_bytes.push(done.progress.memory_sent_bytes as f64);

            let moved = bare.migrate(to).await?;
            peer.total_ms.push(moved.total_ms);
            peer.downtime_ms.push(moved.downtime_ms);
            peer.memory_bytes.push(moved.memory_bytes);
        }
        anyhow::Ok(())
    };
    tell.step(&format!("{runs} moves of each, in turn"), both).await?;
    bare.stop().await?;
    tell.say(&format!("     our moves by phase, median ms: {}", phases.line()));
    let peer_name = format!("{version}; shared disk, plain TCP");
    let rows = [
        ("total_ms", &ours.total_ms, &peer.total_ms),
        ("downtime_ms", &ours.downtime_ms, &peer.downtime_ms),
        ("memory_bytes", &ours.memory_bytes, &peer.memory_bytes),
    ];
    rows.into_iter()
        .map(|(metric, ours, peer)| {
            let metric = format!("namespace-migration/{metric}");
            Row::no_slower(&metric, ours, peer, &peer_name).with_context(|| format!("{metric} was not measured"))
        })
        .collect()
}
