//! The engine's end of the agent links: hellos, notices, queries.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::PoisonError,
    time::Duration,
};

use futures::future::BoxFuture;
use supercloud_api::{
    Code, Host, Operation, OperationKind, Problem, Room, Volume,
    handover::{self, AbortReason},
    ids::{Epoch, GuestId, HostId, OperationId, RequestId},
    link::{Announced, Answer, GuestReport, Hello, Holding, Notice, Query, Welcome},
    unix_ms,
};
use tokio::time::Instant;
use tracing::warn;

use super::{Engine, EngineError, sweeps::RootsAsked};
use crate::{
    chain,
    link::{LinkHandler, Unwelcome},
    notices, overlay,
    state::{Change, Context, EventDraft, GuestRecord, HostRecord, LiveHost, OperationRecord, Work, retry_conflicts},
};

/// How often agents send heartbeats.
const HEARTBEAT_MS: u64 = 2_000;
/// Things of one kind in a hello or heartbeat; more is a fault of the agent.
const REPORTS_AT_MOST: usize = 10_000;

/// That a removed host is back is written this often.
const RETURN_EVENT_EVERY: Duration = Duration::from_secs(3600);

pub(super) fn internal(error: &EngineError) -> Problem {
    Problem::new(Code::StoreUnavailable, chain(error))
}

/// What a guest's disk stands on is fetched in the background: when nothing of it has come for so long, people are told.
const BASE_PATIENCE: Duration = Duration::from_secs(300);

/// The largest probe that is kept, in bytes of JSON.
const PROBE_AT_MOST: usize = 64 << 10;

/// What an agent said, when it came, that it can; it holds from when its session is open.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Abilities {
    consoles: bool,
    paths: bool,
    flows: bool,
}

/// Where others can dial a host, of what its agent says: other hosts connect there, so it must be no place that means something else
/// to each of them, or another service of theirs. Loopback is kept for controllers and agents on one machine.
fn dialled(host: HostId, said: Option<SocketAddr>) -> Option<SocketAddr> {
    let address = said?;
    let is_one_of_a_host = match address.ip().to_canonical() {
        IpAddr::V4(ip) => !(ip.is_unspecified() || ip.is_link_local() || ip.is_multicast() || ip.is_broadcast()),
        IpAddr::V6(ip) => !(ip.is_unspecified() || ip.is_unicast_link_local() || ip.is_multicast()),
    };
    // `fd00:ec2::254`, where EC2 answers over IPv6 what it answers at the link-local address of IPv4.
    let is_metadata = address.ip() == IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254));
    if is_one_of_a_host && !is_metadata && address.port() != 0 {
        return Some(address);
    }
    warn!(%host, %address, "it says that it is dialled where no host can be; others are not told");
    None
}

impl LinkHandler for Engine {
    fn is_member(&self, host: HostId) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            match self.state.read::<HostRecord>(&host).await {
                Ok(record) => record.is_some_and(|record| !record.is_removed),
                Err(error) => {
                    warn!(%host, "whether it is a member cannot be read: {}", chain(&error));
                    false
                }
            }
        })
    }

    fn hello(
        &self,
        host: HostId,
        certificate_sha256: String,
        hello: Hello,
    ) -> BoxFuture<'_, Result<Welcome, Unwelcome>> {
        Box::pin(async move {
            if hello.guests.len() > REPORTS_AT_MOST || hello.volumes.len() > REPORTS_AT_MOST {
                return Err(Problem::new(Code::TooLarge, "the hello lists too much").into());
            }
            let record = self.welcome(host, &certificate_sha256, &hello).await?;
            self.live.seen(host, LiveHost { last_seen_ms: unix_ms(), used: record.used });
            self.sweeps.note_capable(host, hello.takes_sweeps);
            self.live.note_mirroring(host, hello.takes_mirrors);
            self.live.note_post_copy(host, hello.takes_post_copy);
            self.live.note_lazy_thaw(host, hello.takes_lazy_thaw);
            self.live.note_leases(host, hello.takes_leases);
            self.live.note_holds(host, hello.takes_holds);
            self.leases.heard(host);
            self.checks.note_capable(host, hello.takes_checks);
            self.points.note_capable(host, hello.takes_points);
            self.live.note_checkpoints(host, hello.takes_checkpoints);
            let abilities =
                Abilities { consoles: hello.takes_consoles, paths: hello.measures_paths, flows: hello.tells_flows };
            self.abilities.lock().unwrap_or_else(PoisonError::into_inner).insert(host, abilities);
            {
                let mut knowing = self.knows_predictive.lock().unwrap_or_else(PoisonError::into_inner);
                if hello.knows_predictive {
                    knowing.insert(host)
                } else {
                    knowing.remove(&host)
                };
            }
            self.doubt_guests(host, &hello.guests).await.map_err(|error| internal(&error))?;
            let owned = self.owned_by(host).await.map_err(|error| internal(&error.into()))?;
            Ok(Welcome {
                host_name: record.name,
                cloud: record.cloud,
                ticket_key: self.keys.tickets.0.public_key_hex(),
                heartbeat_ms: HEARTBEAT_MS,
                owned,
            })
        })
    }

    fn opened(&self, host: HostId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.overlay.notify_one();
            // Noted now and not at the hello: between them the session before may have ended, and taken them away.
            let said = self.abilities.lock().unwrap_or_else(PoisonError::into_inner).get(&host).copied();
            let Abilities { consoles, paths, flows } = said.unwrap_or_default();
            self.consoles.note_capable(host, consoles);
            self.paths.note_capable(host, paths);
            self.flows.note_capable(host, flows);
            // The end of the session before may have come after this one's hello.
            if self.live.get(host).is_none() {
                self.live.seen(host, LiveHost { last_seen_ms: unix_ms(), used: Room::default() });
            }
            if let Err(error) = self.send_orders_to(host).await {
                warn!(%host, "its orders cannot be sent now: {}", chain(&error));
            }
        })
    }

    fn notice(&self, host: HostId, notice: Notice) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.leases.heard(host);
            let done = match notice {
                Notice::Report { guest, report, details } => self.report(host, guest, &report, &details).await,
                Notice::Heartbeat { used, guests, view_revision: _, announced } => {
                    if let Some(announced) = announced {
                        self.announced(host, announced).await;
                    }
                    if guests.len() <= REPORTS_AT_MOST {
                        self.live.seen(host, LiveHost { last_seen_ms: unix_ms(), used });
                        self.note_guests(host, guests).await
                    } else {
                        Ok(())
                    }
                }
                Notice::Progress { operation, progress } => self.take_progress(host, operation, &progress).await,
                Notice::GuestEvent { guest, epoch, event, times } => {
                    self.guest_event(host, guest, epoch, event, times.into()).await
                }
                Notice::Discarded { guest } => self.discarded(host, guest).await,
                Notice::Paths { paths } => {
                    self.paths.told(host, paths, unix_ms());
                    Ok(())
                }
                Notice::Flows { asked, told } => {
                    self.flows.told(host, asked, told.into());
                    Ok(())
                }
                Notice::Console { console, news } => {
                    self.consoles.told(host, console, news);
                    Ok(())
                }
            };
            if let Err(error) = done {
                // Reports are repeated by the agent until they have had their effect.
                warn!(%host, "a notice had no effect: {}", chain(&error));
            }
        })
    }

    fn query(&self, host: HostId, query: Query) -> BoxFuture<'_, Result<Answer, Problem>> {
        Box::pin(async move {
            match query {
                Query::GuestToken { guest, epoch } => self.guest_token(host, guest, epoch).await,
                Query::GuestCall { guest, epoch, call } => self.guest_call(host, guest, epoch, call).await,
                Query::RenewLease { guest, epoch, asked_ms, lease_ms } => {
                    self.renew_lease(host, (guest, epoch), asked_ms, lease_ms).await
                }
                Query::ChunkSources { guest } => self.fresh_chunk_sources(host, guest).await,
                Query::StoreRoots { project, seen, holder, after, also_seen, holders } => {
                    let asked =
                        RootsAsked { seen: seen.into_iter().chain(also_seen).collect(), holder, holders, after };
                    self.store_roots(host, project, asked).await
                }
                Query::StoreNames { project, part, name, sealed } => {
                    self.store_names(host, project, part, &name, sealed).await
                }
                Query::VolumeChecked { checked } => self.volume_checked(host, checked).await,
                Query::PointTaken { taken } => self.point_taken(host, taken).await,
                Query::StoreSwept { swept } => self.store_swept(host, swept).await,
                Query::RenewCertificate { csr_pem } => {
                    let certificate_pem = self
                        .authority
                        .sign_host(host, &csr_pem)
                        .map_err(|error| Problem::new(Code::BadRequest, chain(&error)))?;
                    Ok(Answer::Certificate { certificate_pem })
                }
            }
        })
    }

    fn closed(&self, host: HostId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // A new session may have been opened since the last one ended; what it can is not taken away.
            if !self.sessions.is_open(host) {
                self.consoles.host_gone(host);
                self.paths.host_gone(host);
                self.flows.host_gone(host);
            }
            self.sweeps.guard(|guard| guard.end_turn(host));
            let last_seen_ms = self.live.gone(host).map(|live| live.last_seen_ms);
            let context = Context::actor(format!("host:{host}"), RequestId::generate());
            let written = retry_conflicts(|| async {
                let mut change = Change::new();
                if let (Some(before), Some(last_seen_ms)) = (self.state.read::<HostRecord>(&host).await?, last_seen_ms)
                {
                    let mut now = before.value.clone();
                    now.host.last_seen_ms = now.host.last_seen_ms.max(last_seen_ms);
                    change.update(&before, &now);
                }
                let data = serde_json::json!({ "last_seen_ms": last_seen_ms });
                change.event(EventDraft::new("host.unreachable").host(host).data(data));
                self.state.commit(&context, change).await?;
                Ok::<_, EngineError>(())
            });
            if let Err(error) = written.await {
                warn!(%host, "that it is away could not be written: {}", chain(&error));
            }
        })
    }
}

impl Engine {
    /// Keeps what a host's metadata say; what was heard before is not looked at again.
    async fn announced(&self, host: HostId, said: Announced) {
        let had = self.announcements.lock().unwrap_or_else(PoisonError::into_inner).get(&host).copied();
        if had == Some(said) {
            return;
        }
        match notices::note(&self.state, host, said).await {
            Ok(_) => drop(self.announcements.lock().unwrap_or_else(PoisonError::into_inner).insert(host, said)),
            Err(error) => warn!(%host, "what its provider has announced cannot be kept: {}", chain(&error)),
        }
    }

    /// Checks a hello and keeps what it says.
    async fn welcome(&self, host: HostId, certificate_sha256: &str, hello: &Hello) -> Result<Host, Unwelcome> {
        let written = retry_conflicts(|| async {
            let Some(before) = self.state.read::<HostRecord>(&host).await? else { return Ok(None) };
            if before.is_removed {
                return Ok(None);
            }
            let mut now = before.value.clone();
            let others = self.state.list::<HostRecord>().await?;
            let others = others.iter().filter(|one| !one.value.is_removed && one.value.host.id != host);
            let has_place = overlay::is_free(hello, others.map(|one| &one.value.host));
            let record = &mut now.host;
            record.data_address = dialled(host, hello.data_address);
            record.overlay_address = hello.overlay_address;
            record.overlay_encryption.clone_from(&hello.overlay_encryption);
            if let Err(why) = has_place {
                warn!(%host, name = %record.name, "it has no place in the overlay: {why}");
                (record.overlay_address, record.overlay_encryption) = (None, None);
            }
            record.capacity = hello.capacity;
            record.compat_classes =
                hello.compat_classes.iter().filter(|class| class.is_plausible()).take(16).cloned().collect();
            let probe_bytes = hello.probe.to_string().len();
            record.probe = if probe_bytes <= PROBE_AT_MOST { hello.probe.clone() } else { serde_json::json!({}) };
            record.moves_live = !hello.moves_none_live;
            record.agent_version = hello.agent_version.chars().take(64).collect();
            certificate_sha256.clone_into(&mut record.certificate_sha256);
            record.last_seen_ms = unix_ms();
            let mut change = Change::new();
            change.update(&before, &now);
            crate::ledger::keep_host(&self.state, &now.host, &mut change).await?;
            change.event(EventDraft::new("host.up").host(host).data(serde_json::json!({ "name": now.host.name })));
            let context = Context::actor(format!("host:{host}"), RequestId::generate());
            self.state.commit(&context, change).await?;
            Ok::<_, EngineError>(Some(now.host))
        })
        .await
        .map_err(|error| internal(&error))?;
        match written {
            Some(host) => Ok(host),
            None => Err(self.unwelcome(host, hello).await),
        }
    }

    /// Why a host is not welcome; that a removed one is back with guests is an alarm.
    async fn unwelcome(&self, host: HostId, hello: &Hello) -> Unwelcome {
        let before = match self.state.read::<HostRecord>(&host).await {
            Ok(Some(before)) if before.is_removed => before,
            // A host of which nothing is known may be known again when the right store is back: nothing of it must end.
            Ok(None) => {
                self.sweeps.guard(|guard| guard.note_stranger(host, Instant::now().into_std()));
                return Problem::new(Code::Forbidden, "this host is not known").into();
            }
            Ok(Some(_)) => return Problem::new(Code::Forbidden, "this host is not known").into(),
            Err(error) => return internal(&error.into()).into(),
        };
        let name = &before.host.name;
        let holds = |guest: &&GuestReport| matches!(guest.holding, Holding::Running | Holding::Paused);
        let running: Vec<GuestId> = hello.guests.iter().filter(holds).map(|guest| guest.guest).take(100).collect();
        if self.is_return_news(host) {
            let mut change = Change::new();
            change.event(
                EventDraft::new("host.removed_is_back")
                    .host(host)
                    .data(serde_json::json!({ "name": name, "guests": running })),
            );
            if let Err(error) =
                self.state.commit(&Context::actor(format!("host:{host}"), RequestId::generate()), change).await
            {
                warn!(%host, "that it is back could not be written: {}", chain(&error));
            }
        }
        let detail = format!("host {name} was removed by an operator; its guests were given up and may run elsewhere");
        Unwelcome::Removed(Problem::new(Code::Forbidden, detail))
    }

    /// Whether people have not been told lately that a removed host is back: its certificate holds on, and it may dial as
    /// often as it likes.
    fn is_return_news(&self, host: HostId) -> bool {
        let mut told = self.returns.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| at.elapsed() < RETURN_EVENT_EVERY);
        let is_news = !told.contains_key(&host);
        if is_news {
            told.insert(host, Instant::now());
        }
        is_news
    }

    /// Progress counts only from a host that takes part.
    async fn take_progress(
        &self,
        host: HostId,
        operation: supercloud_api::ids::OperationId,
        progress: &supercloud_api::Progress,
    ) -> Result<(), EngineError> {
        let Some(record) = self.state.read::<OperationRecord>(&operation).await? else { return Ok(()) };
        let is_party = [record.operation.source, record.operation.destination].contains(&Some(host));
        if is_party && !record.operation.phase.is_terminal() {
            let mut progress = progress.clone();
            if record.operation.source != Some(host) {
                // Whether it obeys a lease, and what of it is safe elsewhere, is the word of the host where the guest runs.
                progress.mirror = None;
            }
            self.progress.tell(operation, &progress);
            if progress.is_holding
                && let Some(whole) = record.operation.part_of
            {
                self.release_parts(whole).await?;
            }
        }
        Ok(())
    }

    /// What an agent says of its guests, again and again: what people should see, and what must follow.
    async fn note_guests(
        &self,
        host: HostId,
        reports: Vec<supercloud_api::link::GuestReport>,
    ) -> Result<(), EngineError> {
        let told = |report: &GuestReport| Some((report.guest, report.epoch, report.base_missing_bytes?));
        let now = std::time::Instant::now();
        self.live.note_bases(host, reports.iter().filter_map(told), now);
        self.doubt_guests(host, &reports).await?;
        for report in reports {
            let Some(before) = self.state.read::<GuestRecord>(&report.guest).await? else { continue };
            if !before.owner.is_owned_by(host, report.epoch) {
                continue;
            }
            if report.holding == Holding::Down {
                // Level, not edge: the word of the event itself may have been lost.
                self.stop_after_power_off(host, report.guest, report.epoch).await?;
                continue;
            }
            if report.base_missing_bytes == Some(0) {
                self.base_is_here(host, &before, report.epoch).await?;
            }
            let still = self.live.base_stands_still(host, report.guest, now, BASE_PATIENCE);
            let still = still.map(|bytes| {
                let minutes = BASE_PATIENCE.as_secs() / 60;
                format!(
                    "of the {bytes} bytes that its cloud lacks of its disk's base none has come for {minutes} minutes"
                )
            });
            let alarm = report.alarm.map(|text| text.chars().take(300).collect::<String>()).or(still);
            if before.owner.alarm().is_some() || before.guest.alarm == alarm {
                continue;
            }
            let mut now = before.value.clone();
            now.guest.alarm.clone_from(&alarm);
            let mut change = Change::new();
            change.update(&before, &now);
            change.event(
                EventDraft::new(if alarm.is_some() { "guest.alarm" } else { "guest.alarm_over" })
                    .project(now.guest.project)
                    .guest(report.guest)
                    .host(host)
                    .data(serde_json::json!({ "text": alarm })),
            );
            match self.state.commit(&Context::system(), change).await {
                Ok(_) => {}
                // The next heartbeat says it again.
                Err(error) if error.is_conflict() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The cloud of the guest's host has all that its volumes stand on: it needs no other cloud for it any more.
    async fn base_is_here(&self, host: HostId, guest: &GuestRecord, epoch: Epoch) -> Result<(), EngineError> {
        let id = guest.guest.id;
        // Told with every heartbeat; looked at once for each epoch, because the base changes with the epoch only.
        if self.settled_bases.lock().unwrap_or_else(PoisonError::into_inner).get(&id) == Some(&epoch) {
            return Ok(());
        }
        let cloud = self.state.need::<HostRecord>(&host).await?.host.cloud;
        retry_conflicts(|| async {
            let Some(now) = self.state.read::<GuestRecord>(&id).await? else { return Ok(()) };
            if !now.owner.is_owned_by(host, epoch) {
                return Ok(());
            }
            let mut change = Change::new();
            change.unchanged(&now);
            let mut is_changed = false;
            for volume in &now.guest.volumes {
                let before = self.state.need::<Volume>(volume).await?;
                if before.base_cloud.is_some_and(|from| from != cloud) {
                    change.update(&before, &Volume { base_cloud: Some(cloud), ..before.value.clone() });
                    is_changed = true;
                }
            }
            if is_changed {
                change.event(EventDraft::new("guest.base_here").project(now.guest.project).guest(id).host(host));
                self.state.commit(&Context::actor(format!("host:{host}"), RequestId::generate()), change).await?;
            }
            Ok::<_, EngineError>(())
        })
        .await?;
        self.settled_bases.lock().unwrap_or_else(PoisonError::into_inner).insert(id, epoch);
        Ok(())
    }

    /// A guest that powered itself off is stopped, as if asked for: its volumes are sealed, it owns nothing. While another
    /// operation holds it nothing happens; the agent says it again.
    pub(super) async fn stop_after_power_off(
        &self,
        host: HostId,
        guest: GuestId,
        epoch: Epoch,
    ) -> Result<(), EngineError> {
        let context = Context::actor(format!("guest:{guest}"), RequestId::generate());
        retry_conflicts(|| async {
            let Some(before) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(()) };
            let is_free = before.guest.operation.is_none() && before.owner.operation.is_none();
            if !before.owner.is_owned_by(host, epoch) {
                return Ok(());
            }
            if let Some(mirror) = before.owner.operation.as_ref().filter(|op| op.is_mirrored()).map(|op| op.id) {
                // It wanted to be off: its standby must not go on. The agent says so again.
                return self.cancel(mirror).await;
            }
            if !is_free {
                return Ok(());
            }
            let operation = power_off(&before, host, &context);
            let mut now = before.value.clone();
            now.guest.operation = Some(operation.id);
            let mut change = Change::new();
            change.update(&before, &now);
            change.create_operation(&OperationRecord { operation, work: Work::GuestStop { grace_ms: 0 } });
            self.state.commit(&context, change).await?;
            Ok::<_, EngineError>(())
        })
        .await
    }

    /// Lets the standby of this mirror take over from its dead source, unless the mirror was called off meanwhile: then the guest may well
    /// run, and is not lost. Idempotent.
    pub(super) async fn promote(
        &self,
        guest: GuestId,
        source: HostId,
        mirror: supercloud_api::ids::OperationId,
    ) -> Result<(), EngineError> {
        self.decide(guest, |record| {
            record.operation.as_ref().filter(|operation| operation.id == mirror && operation.is_mirrored())?;
            let loss = handover::note_host_lost(record, source);
            loss.record.map(|record| (record, loss.alarms))
        })
        .await
    }

    /// What follows for a guest when an operator has removed a host (the proof that it is gone is the operator's). Idempotent.
    pub(super) async fn note_lost(&self, guest: GuestId, host: HostId) -> Result<(), EngineError> {
        let decide = |record: &handover::OwnerRecord| {
            let loss = handover::note_host_lost(record, host);
            loss.record.map(|record| (record, loss.alarms))
        };
        let Some(found) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(()) };
        let whole = found.owner.operation.as_ref().and_then(|operation| Some((operation.group?, operation.id)));
        if let Some((whole, part)) = whole.filter(|_| handover::note_host_lost(&found.owner, host).abort_group) {
            self.abort_parts(whole, Some(part), AbortReason::HostLost, None).await?;
        }
        self.decide(guest, decide).await
    }
}

/// The stop of a guest that has powered itself off.
fn power_off(guest: &GuestRecord, host: HostId, context: &Context) -> Operation {
    Operation {
        project: Some(guest.guest.project),
        guest: Some(guest.guest.id),
        source: Some(host),
        reason: Some("the guest powered itself off".into()),
        ..context.planned(OperationId::generate(), OperationKind::GuestStop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_not_sent_to_dial_what_is_no_host() {
        let is_kept = |text: &str| dialled(HostId::generate(), Some(text.parse().unwrap())).is_some();
        for good in
            ["192.0.2.1:7443", "10.0.0.1:1", "198.18.0.2:7443", "127.0.0.1:7443", "[2001:db8::1]:7", "[fd00::1]:7"]
        {
            assert!(is_kept(good), "{good}");
        }
        for bad in [
            "192.0.2.1:0",
            "0.0.0.0:7443",
            "169.254.169.254:80",
            "224.0.0.1:7",
            "255.255.255.255:7",
            "[::]:7",
            "[fe80::1]:7",
            "[ff02::1]:7",
            "[::ffff:169.254.169.254]:80",
            "[fd00:ec2::254]:80",
        ] {
            assert!(!is_kept(bad), "{bad}");
        }
        assert_eq!(dialled(HostId::generate(), None), None);
    }
}
