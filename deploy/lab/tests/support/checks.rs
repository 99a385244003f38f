//! What must be true after every failure.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use supercloud_api::{GuestState, ids::GuestId};
use supercloud_lab::demo::verdict::Testimony;

use super::case::Seat;
use super::ground::{CLIENT, Ground, SERVER, SETTLE_BUDGET, now, until};
use super::stints::stints;

impl Ground {
    /// Where the server is, as the API has it.
    pub async fn seat(&self) -> Result<Seat> {
        let guest = self.guest().await?;
        let host = guest.host_name.with_context(|| format!("guest {SERVER} is nowhere: {:?}", guest.state))?;
        Ok(Seat { host: host.to_string(), epoch: guest.epoch.0 })
    }

    /// The hypervisor processes of a guest on all hosts, with what QEMU itself says of its vCPUs.
    fn copies(&self, guest: GuestId) -> Vec<(String, String)> {
        let mut copies = Vec::new();
        let id = guest.to_string();
        for host in &self.lab().spec().hosts {
            for process in self.fleet.hypervisors(&host.name) {
                if process.command_line().contains(&id) {
                    let ask = ["virsh", "-c", "qemu:///system", "qemu-monitor-command", &id];
                    let argv = [&ask[..], &[r#"{"execute":"query-status"}"#]].concat();
                    let said = self.lab().exec(&host.name, &argv, std::time::Duration::from_secs(15));
                    let state = match said.map(|text| serde_json::from_str::<Value>(&text)) {
                        Ok(Ok(answer)) => answer["return"]["status"].as_str().unwrap_or("?").to_owned(),
                        Ok(Err(error)) => error.to_string(),
                        Err(error) => supercloud_lab::lab::chain(&error),
                    };
                    copies.push((host.name.clone(), state));
                }
            }
        }
        copies
    }

    /// Exactly these copies of a guest are there: host, and what their vCPUs do.
    pub async fn check_copies(&self, guest: GuestId, wanted: &[(&str, &str)]) -> Result<()> {
        let wanted: Vec<_> = wanted.iter().map(|(host, state)| ((*host).to_owned(), (*state).to_owned())).collect();
        let mut last = Vec::new();
        let found = until(SETTLE_BUDGET, async || {
            last = now(|| self.copies(guest));
            (last == wanted).then_some(())
        });
        found.await.with_context(|| format!("copies of the guest: {last:?}, wanted: {wanted:?}"))
    }

    /// The records say that nothing is under way and nothing is owed.
    async fn check_records(&self) -> Result<()> {
        let mut last = String::new();
        let settled = until(SETTLE_BUDGET, async || {
            last = self.unsettled().await.unwrap_or_else(|error| format!("{error:#}"));
            last.is_empty().then_some(())
        });
        settled.await.with_context(|| format!("the records do not settle: {last}"))
    }

    async fn unsettled(&self) -> Result<String> {
        let guest = self.guest().await?;
        let mut wrong = Vec::new();
        let mut expect = |holds: bool, what: String| {
            if !holds {
                wrong.push(what);
            }
        };
        expect(guest.state == GuestState::Running, format!("state {:?}", guest.state));
        expect(guest.operation.is_none(), format!("operation {:?}", guest.operation));
        expect(guest.alarm.is_none(), format!("alarm {:?}", guest.alarm));
        expect(guest.starts == 1, format!("{} starts", guest.starts));
        for volume in self.fleet.client().volumes().await?.iter().filter(|volume| guest.volumes.contains(&volume.id)) {
            expect(volume.host == guest.host && volume.epoch == guest.epoch, format!("volume {volume:?}"));
            expect(volume.needed_source.is_none(), format!("a source is still needed: {volume:?}"));
        }
        for port in self.fleet.client().ports().await?.iter().filter(|port| guest.ports.contains(&port.id)) {
            expect(port.host == guest.host && port.epoch == guest.epoch, format!("port {port:?}"));
            expect(port.moved_from.is_none() && port.prepared_at.is_none(), format!("a port is not settled: {port:?}"));
        }
        Ok(wrong.join("; "))
    }

    /// The stream flows on, unbroken and unspoilt; nobody has rebooted.
    async fn check_stream(&self) -> Result<()> {
        let lines = self.witness.counts().1;
        let flows = |heard: &Testimony| {
            let new = heard.client.get(lines..).unwrap_or_default();
            new.first().zip(new.last()).is_some_and(|(first, last)| last.stats.ticks > first.stats.ticks)
        };
        let flowed = self.witness.until(SETTLE_BUDGET, flows).await;
        let heard = self.witness.testimony();
        let client = &heard.client.last().context("the client was never heard")?.stats;
        let server = &heard.server.last().context("the server was never heard")?.stats;
        ensure!(flowed, "no data flows any more: {client:?}");
        ensure!(client.connects == 1 && client.resets == 0 && client.connected, "the stream broke: {client:?}");
        ensure!(client.http_failed == 0, "requests failed: {client:?}");
        ensure!(client.bad == 0 && client.mem_bad == 0, "bytes are corrupt: {client:?}");
        ensure!(server.mem_bad == 0 && server.sabotaged == 0, "the server's memory is corrupt: {server:?}");
        ensure!(client.clock_back == 0 && server.clock_back == 0, "a clock went back: {client:?} {server:?}");
        let boots = |ids: Vec<&str>| ids.windows(2).filter(|pair| pair[0] != pair[1]).count();
        let servers = boots(heard.server.iter().map(|seen| seen.stats.boot_id.as_str()).collect());
        let clients = boots(heard.client.iter().map(|seen| seen.stats.boot_id.as_str()).collect());
        ensure!(servers + clients == 0, "somebody booted again: server {servers}, client {clients}");
        Ok(())
    }

    /// What the server has acknowledged until now is on its disk when it is read back.
    async fn check_writes(&self) -> Result<u64> {
        let heard = self.witness.testimony();
        let acked = heard.server.iter().map(|seen| seen.stats.acked).max().unwrap_or(0);
        let lines = heard.server.len();
        let read_back = |heard: &Testimony| {
            let new = heard.server.get(lines..).unwrap_or_default();
            new.iter().any(|seen| seen.stats.verified + seen.stats.verify_bad >= acked)
        };
        let is_read = self.witness.until(SETTLE_BUDGET, read_back).await;
        let heard = self.witness.testimony();
        let last = &heard.server.last().context("the server was never heard")?.stats;
        ensure!(is_read, "{acked} acknowledged writes were not read back: {last:?}");
        let worst = heard.server.iter().map(|seen| seen.stats.verify_bad.max(seen.stats.write_errors)).max();
        ensure!(worst == Some(0), "acknowledged writes are not on the disk, or writes failed: {last:?}");
        let mut highest = 0;
        let mut by_time: Vec<_> = heard.server.iter().map(|seen| (seen.stats.t_ms, seen.stats.acked)).collect();
        by_time.sort_unstable();
        for (t_ms, acked) in by_time {
            ensure!(acked >= highest, "at {t_ms} ms the server has acknowledged {acked}, and {highest} before");
            highest = acked;
        }
        Ok(acked)
    }

    /// By the guest's own words it was at one place at a time.
    fn check_stints(&self) -> Result<()> {
        let found = stints(&self.witness.testimony().server);
        if found.len() != self.moves + 1 {
            let found: Vec<String> = found.iter().map(ToString::to_string).collect();
            bail!("{} moves, but it was at {}", self.moves, found.join(", "));
        }
        Ok(())
    }

    /// Nothing is left behind: processes, interfaces, sockets, ports, flows as they were, files of the guest at its host
    /// alone.
    async fn check_leftovers(&self, seat: &Seat) -> Result<()> {
        let mut last = Vec::new();
        let clean = until(SETTLE_BUDGET, async || {
            last = self.leftovers(&seat.host);
            for host in self.lab().spec().hosts.iter().filter(|host| host.name != seat.host) {
                let folder = format!("{}/guests/{}", supercloud_lab::fleet::config::AGENT_DIR, self.server);
                let folder = self.lab().host(&host.name).ok().and_then(|site| site.outside(&folder));
                if folder.is_some_and(|folder| folder.exists()) {
                    last.push(format!("left: {}: the guest's folder", host.name));
                }
            }
            last.is_empty().then_some(())
        });
        clean.await.with_context(|| format!("something is left behind:\n  {}", last.join("\n  ")))
    }

    /// Everything that must be true of the server while nothing goes on.
    pub async fn check_all(&self) -> Result<u64> {
        let seat = self.seat().await?;
        self.check_copies(self.server, &[(&seat.host, "running")]).await?;
        self.check_records().await?;
        self.check_stream().await?;
        self.check_stints()?;
        let acked = self.check_writes().await?;
        self.check_leftovers(&seat).await?;
        let client = self.fleet.guest(CLIENT).await?;
        ensure!(client.starts == 1 && client.alarm.is_none(), "the client: {client:?}");
        Ok(acked)
    }
}
