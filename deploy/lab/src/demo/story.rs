//! What happens in the demo, in order.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use supercloud_api::{FeedClock, Operation};
use supercloud_cli::table::{bytes, duration};
use supercloud_feed::Feed;
use supercloud_scheduler::money::NanoUsd;
use supercloud_scheduler::price::CheapestWithHysteresis;

use super::Options;
use super::prices::{Follower, next_turn};
use super::report::{Kind, Move, Report};
use super::tell::{LiveBar, Teller};
use super::verdict::{Evidence, Testimony, has_risen, judge};
use super::witness::{Witness, ticks_of};
use crate::fleet::{FEED, FeedStart, Fleet, FleetError, FleetSpec, GuestSpec, PROJECT};
use crate::spec::LabSpec;

/// The guest that is moved.
const SERVER: &str = "web";
/// The guest that watches it.
const CLIENT: &str = "watcher";
const IMAGE: &str = "lean";
const NETWORK: &str = "lan";
const CIDR: &str = "10.20.0.0/24";
const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 10);
/// Memory that the server rewrites and checks all the while (MiB, and MiB per second), so that there is something to copy.
const SERVER_MEMORY: &str = "sc.mem=24 sc.dirty=2";
/// The same where a guest's processor is translated twice.
const SLOW_SERVER_MEMORY: &str = "sc.mem=8 sc.dirty=1";
/// How long guests may take to boot: emulated, two at a time, on a busy machine.
const BOOT_BUDGET: Duration = Duration::from_secs(180);
/// How long the server may take to read back its disk: it does so every five seconds.
const CHECK_BUDGET: Duration = Duration::from_secs(60);
/// How long a fault that was asked for may take to happen.
const SABOTAGE_BUDGET: Duration = Duration::from_secs(120);
/// What a move is taken to cost: a list price of egress between regions, per GiB.
const MOVE_NANOUSD_PER_GIB: u64 = 20_000_000;
/// Feed seconds per second while the policy watches.
const FEED_SPEED: f64 = 15.0;
const CHAPTERS: usize = 5;

/// The story and what it has brought about so far.
#[derive(Debug)]
pub struct Story {
    spec: LabSpec,
    options: Options,
    tell: Teller,
    fleet: Option<Fleet>,
    report: Report,
}

impl Story {
    /// Before its beginning.
    #[must_use]
    pub fn new(spec: LabSpec, options: Options) -> Self {
        Self { spec, options, tell: Teller::default(), fleet: None, report: Report::default() }
    }

    /// What was found, and the fleet if it was made.
    #[must_use]
    pub fn into_parts(self) -> (Report, Option<Fleet>) {
        (self.report, self.fleet)
    }

    /// Tells it from beginning to end.
    ///
    /// # Errors
    /// What went wrong; the report holds what was found until then.
    pub async fn run(&mut self) -> anyhow::Result<()> {
        self.tell.say(
            "Supercloud: a running guest moves between three clouds with its disk, its address and its connections.",
        );
        self.lab().await?;
        let Some(fleet) = self.fleet.take() else { bail!("there is no fleet") };
        let told = self.with_fleet(&fleet).await;
        self.fleet = Some(fleet);
        told
    }

    async fn lab(&mut self) -> anyhow::Result<()> {
        let tell = self.tell;
        tell.chapter(1, CHAPTERS, "The lab: three hosts in three clouds, on this machine");
        for link in self.spec.links.iter().filter(|link| link.a != crate::CONTROLLER) {
            let shape = link.shape;
            tell.remark(&format!(
                "{:<22} {} ms round trip, {} Mbit/s, {} % loss",
                format!("{} - {}", link.a, link.b),
                shape.rtt_ms,
                shape.rate_mbit,
                f64::from(shape.loss_ppm) / 10_000.0
            ));
        }
        let spec = FleetSpec { feed: FeedStart { start_ms: 0, speed: 0.0 }, ..FleetSpec::new(self.spec.clone()) };
        let hardware: Vec<String> =
            self.spec.hosts.iter().filter_map(|host| Some(format!("{} {}", host.name, host.vm?))).collect();
        let what = if hardware.is_empty() {
            "network namespaces, an emulated WAN, a switch and a hypervisor daemon per host"
        } else {
            tell.remark("each host is a virtual machine with a kernel, a switch and a /dev/kvm of its own; guests run in our own VMM");
            tell.remark(&hardware.join("; "));
            tell.remark("QEMU translates the hosts (TCG) and what they virtualize: all times below are 20 to 80 times what they would be");
            "an emulated WAN, and three virtual machines that boot from Debian's packages"
        };
        let lab = tell.step(what, Fleet::start_lab(spec.lab.clone())).await?;
        let fleet = tell.step("the controller, on its embedded store", Fleet::start_controller(lab, &spec)).await?;
        // From here on it is the caller's to take down.
        let fleet = self.fleet.insert(fleet);
        tell.step("an agent on each host, joined by a one-time token", fleet.join_hosts()).await?;
        Ok(())
    }

    async fn with_fleet(&mut self, fleet: &Fleet) -> anyhow::Result<()> {
        let witness = self.guests(fleet).await?;
        self.live_moves(fleet, &witness).await?;
        if !self.options.quick {
            self.freeze_and_thaw(fleet, &witness).await?;
            self.price_moves(fleet, &witness).await?;
        }
        self.last_checks(fleet, &witness).await
    }

    async fn guests(&self, fleet: &Fleet) -> anyhow::Result<Witness> {
        let tell = self.tell;
        tell.chapter(2, CHAPTERS, "Two guests of one project on one network");
        let image = tell
            .step(
                "an image from Debian's kernel and a small disk, made here and imported",
                fleet.import_lean_image(IMAGE),
            )
            .await?;
        for part in &image.parts {
            let (size, stored) = (bytes(part.size_bytes), bytes(part.stored_bytes));
            tell.remark(&format!("  {:?}: {size}, stored as {stored} of sealed chunks", part.part));
        }
        let network = fleet.create_network(NETWORK, CIDR).await?;
        tell.remark(&format!("network {NETWORK}: {}, MTU {}, spans all clouds", network.cidr, network.mtu));

        let sabotage = self.options.sabotage.map(|kind| format!(" sc.sabotage={}", kind.word())).unwrap_or_default();
        let memory = if fleet.is_of_vms() { SLOW_SERVER_MEMORY } else { SERVER_MEMORY };
        let server = GuestSpec::new(SERVER, IMAGE, NETWORK, &format!("sc.role=server {memory}{sabotage}"))
            .at("aws-east")
            .with_ipv4(SERVER_ADDRESS);
        let client =
            GuestSpec::new(CLIENT, IMAGE, NETWORK, &format!("sc.role=client sc.peer={SERVER_ADDRESS}")).at("home");
        let start = async { tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client)) };
        let how = if fleet.is_of_vms() {
            "web starts in aws-east, watcher in home (each in our own VMM, in a virtual machine)"
        } else {
            "web starts in aws-east, watcher in home (emulated: no hardware help is needed)"
        };
        let (server, client) = tell.step(how, start).await?;
        let witness = Witness::listen(vec![fleet.console(server.id)?, fleet.console(client.id)?]);
        let works = |testimony: &Testimony| {
            let writes = testimony.server.last().is_some_and(|seen| seen.stats.acked > 0);
            writes && testimony.client.last().is_some_and(|seen| seen.stats.connected && seen.stats.ticks > 10)
        };
        let is_up = tell
            .step("they boot, get their addresses and begin to talk", witness.until(fleet.patient(BOOT_BUDGET), works))
            .await;
        if !is_up {
            let said = witness.other_lines().join("\n  | ");
            bail!(
                "the guests did not begin to talk within {} s; their consoles end with:\n  | {said}",
                fleet.patient(BOOT_BUDGET).as_secs()
            );
        }
        tell.remark("web serves HTTP and a stream, and appends a number to a file with fsync every 100 ms;");
        tell.remark("watcher holds one TCP stream to it, checks each byte and measures each silence.");
        Ok(witness)
    }

    async fn live_moves(&mut self, fleet: &Fleet, witness: &Witness) -> anyhow::Result<()> {
        self.tell.chapter(3, CHAPTERS, "web moves live, with its disk and its address");
        let round = ["gcp-west", "home", "aws-east"];
        let count = if self.options.quick { 1 } else { round.len() };
        for to in &round[..count] {
            let from = cloud_of(fleet).await?;
            let window = witness.open().await;
            let mut bar = LiveBar::default();
            let operation = fleet.migrate(SERVER, to, |operation| bar.show(operation)).await?;
            drop(bar);
            let downtime_ms = witness.close(window).await;
            self.add(Move { downtime_ms, ..Move::of(Kind::Live, &from, to, &operation) });
        }
        Ok(())
    }

    async fn freeze_and_thaw(&mut self, fleet: &Fleet, witness: &Witness) -> anyhow::Result<()> {
        self.tell.chapter(4, CHAPTERS, "web is frozen in one cloud and thawed in another; then prices decide");
        let from = cloud_of(fleet).await?;
        let window = witness.open().await;
        let mut bar = LiveBar::default();
        let (operation, freeze) = fleet.freeze(SERVER, |operation| bar.show(operation)).await?;
        drop(bar);
        let downtime_ms = witness.silence(window).await;
        let volumes = fleet.client().volumes().await.context("asking for volumes")?;
        self.add(Move { downtime_ms, ..Move::of_freeze(&from, &operation, &freeze, &volumes) });

        let to = "gcp-west";
        let mut bar = LiveBar::default();
        let asked = Instant::now();
        let before = witness.ticks();
        let answered = async {
            let is_answered = witness.until(fleet.patient(BOOT_BUDGET), |now| ticks_of(now) > before).await;
            Ok::<_, FleetError>(is_answered.then(|| u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX)))
        };
        let thaw = fleet.thaw(SERVER, to, |operation| bar.show(operation));
        let (operation, answered_ms) = tokio::try_join!(thaw, answered)?;
        drop(bar);
        let downtime_ms = witness.close(window).await;
        if let Some(answered_ms) = answered_ms {
            let over = operation.ended_at_ms.map(|end| end.saturating_sub(operation.created_at_ms)).unwrap_or(0);
            self.tell.remark(&format!(
                "web answered its peer {} after the thaw was asked for; all of its memory was there after {}",
                duration(answered_ms),
                duration(over)
            ));
        }
        self.add(Move { downtime_ms, answered_ms, ..Move::of(Kind::Thaw, &from, to, &operation) });
        Ok(())
    }

    async fn price_moves(&mut self, fleet: &Fleet, witness: &Witness) -> anyhow::Result<()> {
        let tell = self.tell;
        let feed = Feed::parse(FEED).context("the shipped price feed")?;
        let policy = CheapestWithHysteresis::default();
        let guest = fleet.follow_prices(SERVER, true).await?;
        let cost = (u128::from(MOVE_NANOUSD_PER_GIB) * u128::from(guest.shape.memory_bytes)) >> 30;
        let mut follower = Follower {
            cloud: cloud_of(fleet).await?,
            last_move_ms: None,
            move_cost: NanoUsd(u64::try_from(cost).unwrap_or(u64::MAX)),
        };
        let mut known = fleet.operations().await?;
        let mut from_ms = 0;
        for round in 0..2 {
            let turn = next_turn(&feed, &policy, &follower, from_ms).context("the price feed has no further turn")?;
            let prices: Vec<String> = turn.prices.iter().map(|(cloud, price)| format!("{cloud} {price}/h")).collect();
            tell.remark(&format!("feed at {}: {}", clock(turn.at_ms), prices.join(", ")));
            // The silence is measured from before the policy can act.
            let window = witness.open().await;
            fleet.set_feed_clock(FeedClock { feed_now_ms: Some(turn.before_ms), speed: Some(FEED_SPEED) }).await?;
            if round == 0 {
                fleet.start_spotd(&policy, MOVE_NANOUSD_PER_GIB).await?;
            }
            let decided = tell
                .step("the price daemon watches; it decides by itself", fleet.await_foreign_move(&guest, &known))
                .await?;
            // Held while the guest moves, so that the next turn is not passed meanwhile.
            let held = fleet.set_feed_clock(FeedClock { feed_now_ms: None, speed: Some(0.0) }).await?;
            if let Some(reason) = &decided.reason {
                tell.remark(&format!("it says: {reason}"));
            }
            let mut bar = LiveBar::default();
            let operation = fleet.finish("the price policy's move", decided, |operation| bar.show(operation)).await?;
            drop(bar);
            let to = cloud_of(fleet).await?;
            let downtime_ms = witness.close(window).await;
            self.add(Move { downtime_ms, ..Move::of(Kind::Price, &follower.cloud, &to, &operation) });
            if to == follower.cloud {
                bail!("the price policy's move left {SERVER} in {to}");
            }
            let now_ms = held.feed_now_ms.unwrap_or(turn.at_ms);
            follower.last_move_ms = Some(decided_at(&operation).unwrap_or(now_ms));
            follower.cloud = to;
            from_ms = now_ms;
            known.push(operation);
        }
        fleet.follow_prices(SERVER, false).await?;
        fleet.stop_spotd().await?;
        Ok(())
    }

    /// Waits for what the verdict needs, and judges.
    async fn last_checks(&mut self, fleet: &Fleet, witness: &Witness) -> anyhow::Result<()> {
        let tell = self.tell;
        tell.chapter(5, CHAPTERS, "The verdict");
        if let Some(kind) = self.options.sabotage {
            let made = |testimony: &Testimony| testimony.server.iter().any(|seen| seen.stats.sabotaged > 0);
            let text = format!("the fault that was asked for ({}) happens", kind.word());
            if !tell.step(&text, witness.until(fleet.patient(SABOTAGE_BUDGET), made)).await {
                let seconds = fleet.patient(SABOTAGE_BUDGET).as_secs();
                bail!("the fault did not happen within {seconds} s: the sabotage itself is broken");
            }
        }
        let (server_lines, client_lines) = witness.counts();
        let acked = witness.testimony().server.iter().map(|seen| seen.stats.acked).max().unwrap_or(0);
        let is_read_back = |testimony: &Testimony| {
            let is_checked = |checked: u64, bad: u64| checked + bad >= acked;
            let after = testimony.server.get(server_lines..).unwrap_or_default();
            let client_is_heard = testimony.client.len() > client_lines + 1;
            let is_memory_checked =
                has_risen(&testimony.server, server_lines, |stats| (&stats.boot_id, stats.mem_checked))
                    && has_risen(&testimony.client, client_lines, |stats| (&stats.boot_id, stats.mem_checked));
            client_is_heard
                && is_memory_checked
                && after.iter().any(|seen| is_checked(seen.stats.verified, seen.stats.verify_bad))
        };
        let text = format!("web reads its {acked} acknowledged writes back from its disk");
        tell.step(&text, witness.until(fleet.patient(CHECK_BUDGET), is_read_back)).await;
        let (server, client) = (fleet.guest(SERVER).await?, fleet.guest(CLIENT).await?);
        let testimony = witness.testimony();
        let (verdict, checked) = judge(&Evidence {
            testimony: &testimony,
            server_lines_before: server_lines,
            client_lines_before: client_lines,
            starts: (server.starts, client.starts),
        });
        self.report.verdict = verdict;
        self.report.checked = checked;
        if let (Some(server), Some(client)) = (testimony.server.last(), testimony.client.last()) {
            let (server, client) = (&server.stats, &client.stats);
            tell.remark(&format!(
                "also: {} pages of web's memory rewritten and checked, {} HTTP requests answered, {} clocks gone back",
                server.mem_checked,
                client.http_ok,
                server.clock_back + client.clock_back
            ));
        }
        self.overheard(fleet).await
    }

    /// Whether anybody on the way could read what the guests said to each other, where the hosts encrypt.
    async fn overheard(&self, fleet: &Fleet) -> anyhow::Result<()> {
        if fleet.admin().host("home").await?.overlay_encryption.is_none() {
            return Ok(());
        }
        let lab = fleet.lab().clone();
        let (links, _) = tokio::task::spawn_blocking(move || lab.links()).await.context("a worker died")??;
        let plain: u64 = links.iter().map(|link| link.counters.plain_tunnel_frames).sum();
        let encrypted: u64 = links.iter().map(|link| link.counters.encrypted_frames).sum();
        self.tell.remark(&format!(
            "also: the guests' frames on the WAN: {encrypted} encrypted (WireGuard), {plain} in the clear"
        ));
        if plain > 0 || encrypted == 0 {
            bail!("the hosts' tunnels are to be encrypted, and {plain} frames of guests crossed the WAN in the clear");
        }
        Ok(())
    }

    fn add(&mut self, row: Move) {
        let silence = row.downtime_ms.map_or_else(|| "not measured".to_owned(), duration);
        let total = row.total_ms.map_or_else(|| "an unknown time".to_owned(), duration);
        self.tell.remark(&format!("{} -> {}: {total} in all; watcher saw a silence of {silence}", row.from, row.to));
        self.report.moves.push(row);
    }
}

async fn cloud_of(fleet: &Fleet) -> anyhow::Result<String> {
    let guest = fleet.guest(SERVER).await?;
    Ok(guest.cloud_name.with_context(|| format!("guest {SERVER} is in no cloud"))?.to_string())
}

/// The feed's time at which the daemon decided, as its reason says.
fn decided_at(operation: &Operation) -> Option<u64> {
    operation.reason.as_deref()?.rsplit_once("feed_ms=")?.1.parse().ok()
}

/// A time of the feed for people: `day 1, 07:35`.
fn clock(feed_ms: u64) -> String {
    let minutes = feed_ms / 60_000;
    format!("day {}, {:02}:{:02}", minutes / 1440 + 1, minutes / 60 % 24, minutes % 60)
}

/// What can be done with a fleet that was left up.
///
/// # Errors
/// Never in practice.
pub fn how_to_go_on(fleet: &Fleet) -> anyhow::Result<String> {
    let bin = crate::lab::program_dir();
    let bin = bin.display();
    let lab = &fleet.lab().spec().name;
    let url = fleet.url();
    let address = url.trim_start_matches("https://");
    let (operator, admin, ca) = (fleet.operator_token_file(), fleet.admin_token_file()?, fleet.ca_file()?);
    let (operator, admin, ca) = (operator.display(), admin.display(), ca.display());
    Ok(format!(
        "
Everything is still up. The API and the dashboard: {url}

  export PATH={bin}:$PATH SUPERCLOUD_LAB={lab}
  export SUPERCLOUD_URL={url}
  export SUPERCLOUD_CA={ca}
  export SUPERCLOUD_TOKEN_FILE={operator}
  # an admin's rights instead: SUPERCLOUD_TOKEN_FILE={admin} SUPERCLOUD_PROJECT={PROJECT}

  supercloud guest list
  supercloud guest migrate {SERVER} --to home --watch
  supercloud guest freeze {SERVER} --watch && supercloud guest thaw {SERVER} --to aws-east --watch
  supercloud operation list
  supercloud market list
  supercloud-lab status                          # links and daemons
  supercloud-lab partition aws-east gcp-west     # cuts a link; `supercloud-lab heal` heals all

The dashboard wants a token: cat $SUPERCLOUD_TOKEN_FILE. Only this machine reaches the lab; from another one:
ssh -L 8443:{address} THIS-MACHINE, then https://localhost:8443.

When you have seen enough, this takes everything down: supercloud-lab --lab {lab} down"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_the_feed_are_for_people() {
        assert_eq!(clock(0), "day 1, 00:00");
        assert_eq!(clock(86_400_000 + 7 * 3_600_000 + 35 * 60_000 + 59_999), "day 2, 07:35");
    }
}
