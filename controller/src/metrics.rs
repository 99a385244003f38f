//! What Prometheus sees: requests counted here, operations counted by following their records, the rest read off the
//! records when asked.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::http::{Method, StatusCode};
use supercloud_api::{
    Cloud, Evacuation, EvacuationState, GuestState, HostState, Operation, OperationKind, Phase, Volume, VolumeHistory,
    handover::Owner,
    ids::{CloudId, GuestId, HostId, OperationId},
    unix_ms,
};

use crate::{
    app::Parts,
    operations::sweeps::{StoreCount, StoreOf},
    paths::Between,
    reliability::Window,
    state::{GuestRecord, HostRecord, OperationRecord, Seen, StateError, Stored, Work},
};

/// How far back it is told how good it was, in milliseconds.
const MONTH_MS: u64 = 30 * 24 * 3_600_000;
/// Upper bounds of request times, in milliseconds.
const REQUEST_BUCKETS_MS: [u64; 9] = [1, 5, 10, 50, 100, 500, 1000, 5000, 30_000];
/// Upper bounds of downtimes, in milliseconds.
const DOWNTIME_BUCKETS_MS: [u64; 10] = [50, 100, 200, 300, 500, 1000, 2000, 5000, 10_000, 60_000];

/// A histogram over whole milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Histogram<const N: usize> {
    bounds_ms: [u64; N],
    counts: [u64; N],
    count: u64,
    sum_ms: u64,
}

impl<const N: usize> Histogram<N> {
    const fn new(bounds_ms: [u64; N]) -> Self {
        Self { bounds_ms, counts: [0; N], count: 0, sum_ms: 0 }
    }

    fn observe(&mut self, value_ms: u64) {
        for (bound, count) in self.bounds_ms.iter().zip(&mut self.counts) {
            *count += u64::from(value_ms <= *bound);
        }
        self.count += 1;
        self.sum_ms = self.sum_ms.saturating_add(value_ms);
    }

    /// In seconds, as Prometheus wants it. `labels` without braces.
    fn write(&self, out: &mut String, name: &str, labels: &str) {
        let with = |more: &str| match (labels.is_empty(), more.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("{{{more}}}"),
            (false, true) => format!("{{{labels}}}"),
            (false, false) => format!("{{{labels},{more}}}"),
        };
        for (bound, count) in self.bounds_ms.iter().zip(&self.counts) {
            let bucket = with(&format!("le=\"{}\"", seconds(*bound)));
            let _infallible = writeln!(out, "{name}_bucket{bucket} {count}");
        }
        let (count, sum) = (self.count, seconds(self.sum_ms));
        let _infallible = writeln!(out, "{name}_bucket{} {count}", with("le=\"+Inf\""));
        let _infallible = writeln!(out, "{name}_sum{} {sum}", with(""));
        let _infallible = writeln!(out, "{name}_count{} {count}", with(""));
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

type RequestKey = (String, &'static str, u16);

#[derive(Debug, Default)]
struct Requests {
    counts: BTreeMap<RequestKey, u64>,
    times: BTreeMap<String, Histogram<9>>,
}

/// Operations as their records tell.
#[derive(Debug)]
struct Tally {
    open: HashMap<OperationId, (OperationKind, Phase)>,
    ended: BTreeMap<(&'static str, &'static str), u64>,
    downtime: Histogram<10>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { open: HashMap::new(), ended: BTreeMap::new(), downtime: Histogram::new(DOWNTIME_BUCKETS_MS) }
    }
}

impl Tally {
    fn see(&mut self, operation: &Operation) {
        if !operation.phase.is_terminal() {
            self.open.insert(operation.id, (operation.kind, operation.phase));
            return;
        }
        self.open.remove(&operation.id);
        *self.ended.entry((kind_name(operation.kind), phase_name(operation.phase))).or_default() += 1;
        let moved = operation.kind == OperationKind::GuestMigrate && operation.phase == Phase::Done;
        if let Some(downtime) = operation.progress.downtime_ms.filter(|_| moved) {
            self.downtime.observe(downtime);
        }
    }
}

/// The counts. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    requests: Arc<Mutex<Requests>>,
    /// Not there before all operations were seen once.
    tally: Arc<Mutex<Option<Tally>>>,
}

/// A mirror, as far as it is told of.
struct MirrorSeen {
    guest: GuestId,
    is_silent: bool,
    behind_ms: Option<u64>,
}

async fn mirrors(parts: &Parts) -> Result<Vec<MirrorSeen>, StateError> {
    let mut found = Vec::new();
    for id in parts.state.active_operations().await? {
        let Some(record) = parts.state.read::<OperationRecord>(&id).await? else { continue };
        let (Work::GuestMirror { options, .. }, Some(guest)) = (&record.work, record.operation.guest) else { continue };
        let silent_ms = record.operation.source.map_or(0, |host| parts.leases.silent_ms(host));
        let mut progress = record.operation.progress.clone();
        parts.progress.apply(id, &mut progress);
        let standing = progress.mirror.filter(|standing| standing.committed > 0);
        found.push(MirrorSeen {
            guest,
            is_silent: options.lease_ms.is_some_and(|lease_ms| silent_ms >= lease_ms / 2),
            behind_ms: standing.map(|standing| standing.committed_age_ms),
        });
    }
    Ok(found)
}

fn kind_name(kind: OperationKind) -> &'static str {
    match kind {
        OperationKind::ImageImport => "image_import",
        OperationKind::GuestStart => "guest_start",
        OperationKind::GuestStop => "guest_stop",
        OperationKind::GuestDelete => "guest_delete",
        OperationKind::GuestMigrate => "guest_migrate",
        OperationKind::GuestMirror => "guest_mirror",
        OperationKind::GuestFreeze => "guest_freeze",
        OperationKind::GuestThaw => "guest_thaw",
        OperationKind::GroupMigrate => "group_migrate",
        OperationKind::GroupFreeze => "group_freeze",
        OperationKind::GroupThaw => "group_thaw",
        OperationKind::HostRent => "host_rent",
        OperationKind::HostReturn => "host_return",
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Plan => "plan",
        Phase::Prepare => "prepare",
        Phase::Copy => "copy",
        Phase::Switch => "switch",
        Phase::Resume => "resume",
        Phase::Finish => "finish",
        Phase::Done => "done",
        Phase::RolledBack => "rolled_back",
        Phase::Failed => "failed",
    }
}

/// All kinds of operations.
const KINDS: [OperationKind; 13] = [
    OperationKind::ImageImport,
    OperationKind::GuestStart,
    OperationKind::GuestStop,
    OperationKind::GuestDelete,
    OperationKind::GuestMigrate,
    OperationKind::GuestMirror,
    OperationKind::GuestFreeze,
    OperationKind::GuestThaw,
    OperationKind::GroupMigrate,
    OperationKind::GroupFreeze,
    OperationKind::GroupThaw,
    OperationKind::HostRent,
    OperationKind::HostReturn,
];

const PHASES: [Phase; 9] = [
    Phase::Plan,
    Phase::Prepare,
    Phase::Copy,
    Phase::Switch,
    Phase::Resume,
    Phase::Finish,
    Phase::Done,
    Phase::RolledBack,
    Phase::Failed,
];

/// Every kind with every phase of a sort. All of them are told, with zeros: a series that is born with its first failure has not
/// increased, and one that is there only while something goes on hides that nothing did before.
fn series(of: fn(Phase) -> bool) -> impl Iterator<Item = (&'static str, &'static str)> {
    let phases = move || PHASES.into_iter().filter(move |phase| of(*phase)).map(phase_name);
    KINDS.into_iter().flat_map(move |kind| phases().map(move |phase| (kind_name(kind), phase)))
}

/// Verbs that are served; others count as one, so that nobody can make series at will.
fn verb(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        _ => "other",
    }
}

impl Metrics {
    /// A request was answered. `route` is the router's path, not the client's.
    pub fn observe_request(&self, method: &Method, route: Option<&str>, status: StatusCode, took: Duration) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let route = route.unwrap_or("none").to_owned();
        *requests.counts.entry((route.clone(), verb(method), status.as_u16())).or_default() += 1;
        let times = requests.times.entry(route).or_insert_with(|| Histogram::new(REQUEST_BUCKETS_MS));
        times.observe(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }

    /// Follows the operations and counts them, for ever.
    pub async fn operation_watcher(self, parts: Parts) {
        let mut follower = parts.state.follow::<OperationRecord>();
        // Told only once it is whole: until then what was told before stands.
        let mut anew = Some(Tally::default());
        loop {
            let seen = follower.next().await;
            let mut told = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            let tally = anew.as_mut().or(told.as_mut());
            match seen {
                Ok(Seen::Restart) => anew = Some(Tally::default()),
                Ok(Seen::Put(record)) => {
                    if let Some(tally) = tally {
                        tally.see(&record.operation);
                    }
                }
                Ok(Seen::Gone(id)) => {
                    if let (Some(tally), Ok(id)) = (tally, id.parse()) {
                        tally.open.remove(&id);
                    }
                }
                Ok(Seen::CaughtUp) => {
                    if let Some(whole) = anew.take() {
                        *told = Some(whole);
                    }
                }
                Err(error) => tracing::warn!(error = %crate::chain(&error), "an operation cannot be counted"),
            }
        }
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub async fn render(&self, parts: &Parts) -> Result<String, StateError> {
        let mut out = String::with_capacity(8192);
        let health = parts.state.health().await?;
        let mut gauge = |name: &str, help: &str, series: &[(String, u64)]| {
            let _infallible = writeln!(out, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (labels, value) in series {
                let _infallible = writeln!(out, "{name}{labels} {value}");
            }
        };
        let one = |value: u64| [(String::new(), value)];
        gauge("supercloud_store_revision", "Revision of the store.", &one(health.revision));
        if let Some(bytes) = health.size_bytes {
            gauge("supercloud_store_size_bytes", "Bytes of the store on disk.", &one(bytes));
        }
        let head = parts.state.head().await?;
        gauge("supercloud_events", "Number of the newest event.", &one(head.seq));
        let hosts = parts.state.list::<HostRecord>().await?;
        let by_state =
            |state: HostState| hosts.iter().filter(|record| record.view(&parts.hosts).state == state).count() as u64;
        let states = [
            ("up", HostState::Up),
            ("unreachable", HostState::Unreachable),
            ("cordoned", HostState::Cordoned),
            ("removed", HostState::Removed),
        ];
        let series = states.map(|(name, state)| (format!("{{state=\"{name}\"}}"), by_state(state)));
        gauge("supercloud_hosts", "Hosts by state.", &series);
        let guests = parts.state.list::<GuestRecord>().await?;
        let states = [
            ("created", GuestState::Created),
            ("running", GuestState::Running),
            ("stopped", GuestState::Stopped),
            ("frozen", GuestState::Frozen),
            ("lost", GuestState::Lost),
        ];
        let count = |state| guests.iter().filter(|record| record.guest.state == state).count() as u64;
        let series = states.map(|(name, state)| (format!("{{state=\"{name}\"}}"), count(state)));
        gauge("supercloud_guests", "Guests by state.", &series);
        let alarms = guests.iter().filter(|record| record.guest.alarm.is_some()).count() as u64;
        gauge("supercloud_guest_alarms", "Guests that need somebody.", &one(alarms));
        let evacuations = parts.evacuations.all();
        let count = |state| evacuations.iter().filter(|one| one.state == state).count() as u64;
        let states = [
            ("in_time", EvacuationState::InTime),
            ("late", EvacuationState::Late),
            ("covered", EvacuationState::Covered),
            ("unknown", EvacuationState::Unknown),
            ("not_needed", EvacuationState::NotNeeded),
        ];
        let series = states.map(|(name, state)| (format!("{{state=\"{name}\"}}"), count(state)));
        gauge("supercloud_guests_evacuable", "Running guests by whether they could leave within the notice.", &series);
        let leave = |one: &Evacuation| Some((format!("{{guest=\"{}\"}}", one.guest), one.leave_with_all_ms?));
        gauge(
            "supercloud_guest_leave_ms",
            "Predicted time until a guest has left its host, together with all others there.",
            &evacuations.iter().filter_map(leave).collect::<Vec<_>>(),
        );
        let mirrors = mirrors(parts).await?;
        gauge("supercloud_mirrors", "Mirrors that are kept.", &one(mirrors.len() as u64));
        let silent = mirrors.iter().filter(|mirror| mirror.is_silent).count() as u64;
        gauge(
            "supercloud_mirrors_silent",
            "Mirrors fenced by a lease whose guest's host was not heard for half of it: their standbys are about to take over.",
            &one(silent),
        );
        let behind = |mirror: &MirrorSeen| Some((format!("{{guest=\"{}\"}}", mirror.guest), mirror.behind_ms?));
        gauge(
            "supercloud_mirror_behind_ms",
            "How old what a standby has is: what taking over would lose.",
            &mirrors.iter().filter_map(behind).collect::<Vec<_>>(),
        );
        let leased: Vec<(String, u64)> =
            parts.leases.leases().into_iter().map(|(guest, ms)| (format!("{{guest=\"{guest}\"}}"), ms)).collect();
        gauge(
            "supercloud_lease_over_in_ms",
            "Until the lease of a mirrored guest is surely over, unless it is renewed.",
            &leased,
        );
        let histories = parts.state.list::<VolumeHistory>().await?;
        let now_ms = unix_ms();
        let newest = |history: &VolumeHistory| {
            let kept =
                history.points.iter().rev().find(|point| point.memory.as_ref().is_some_and(|memory| memory.is_kept));
            Some((format!("{{volume=\"{}\"}}", history.volume), now_ms.saturating_sub(kept?.at_ms)))
        };
        gauge(
            "supercloud_checkpoint_age_ms",
            "Age of the newest checkpoint of a guest's volume: what going back to it would lose.",
            &histories.iter().filter_map(|history| newest(history)).collect::<Vec<_>>(),
        );
        let problems = histories.iter().filter(|history| history.problem.is_some()).count() as u64;
        gauge(
            "supercloud_points_not_taken",
            "Volumes of which the last point that was due could not be taken.",
            &one(problems),
        );
        let window = Window { from_ms: now_ms.saturating_sub(MONTH_MS), to_ms: now_ms, project: None, guest: None };
        let good = parts.reliability.read(&parts.state, window).await?;
        let available: Vec<(String, u64)> = good.availability_ppm.map(|ppm| (String::new(), ppm)).into_iter().collect();
        gauge(
            "supercloud_availability_ppm",
            "Of the time that guests were to run in the last 30 days, what they ran, in millionths.",
            &available,
        );
        let missed = [("move", good.missed_by_moves), ("notice", good.missed_by_notices)];
        let missed = missed.map(|(of, count)| (format!("{{of=\"{of}\"}}"), count));
        gauge("supercloud_missed_deadlines", "Deadlines that were missed in the last 30 days.", &missed);
        let missed_ever = parts.reliability.missed().await;
        let volumes = parts.state.list::<Volume>().await?;
        let needed = volumes.iter().filter(|volume| volume.needed_source.is_some()).count() as u64;
        gauge(
            "supercloud_volumes_with_needed_source",
            "Volumes of which another host still holds blocks that the owner lacks.",
            &one(needed),
        );
        let mut memory: u64 = 0;
        for id in parts.state.active_operations().await? {
            let Some(record) = parts.state.read::<OperationRecord>(&id).await? else { continue };
            let mut progress = record.operation.progress.clone();
            parts.progress.apply(id, &mut progress);
            memory = memory.saturating_add(progress.memory_missing_bytes.unwrap_or(0));
        }
        gauge(
            "supercloud_memory_missing_bytes",
            "Bytes of running guests' memory that are still to come: out of the stores in which they were frozen, or from hosts that they \
             have left.",
            &one(memory),
        );
        let base_of = |guest: &GuestRecord| match guest.owner.owner {
            Owner::Host(host) => Some(parts.hosts.base_missing_bytes(host, guest.guest.id, guest.owner.epoch)),
            _ => None,
        };
        let bases: Vec<Option<u64>> = guests.iter().filter_map(|guest| base_of(guest)).collect();
        gauge(
            "supercloud_base_missing_bytes",
            "Bytes that the clouds of running guests still lack of what the disks stand on.",
            &one(bases.iter().flatten().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes))),
        );
        gauge(
            "supercloud_guests_base_unknown",
            "Running guests of which it is not known whether their cloud has all that the disks stand on.",
            &one(bases.iter().filter(|told| told.is_none()).count() as u64),
        );
        let links = crate::paths::totals(parts, &hosts);
        let states = [("answers", links.answer), ("silent", links.silent), ("not_measured", links.not_measured)];
        let series = states.map(|(name, count)| (format!("{{state=\"{name}\"}}"), count));
        gauge("supercloud_links", "Ways between hosts by what is known of them.", &series);
        gauge("supercloud_links_broken", "Silent ways to hosts whose agents are connected.", &one(links.broken));
        let series = |value: fn(&Between) -> Option<u64>| -> Vec<(String, u64)> {
            let label = |(from, to): &(String, String)| format!("{{from=\"{from}\",to=\"{to}\"}}");
            links.between.iter().filter_map(|(pair, found)| Some((label(pair), value(found)?))).collect()
        };
        gauge(
            "supercloud_link_rtt_us",
            "Median round-trip time between the hosts of two clouds, or of one, in microseconds.",
            &series(Between::rtt_us),
        );
        gauge(
            "supercloud_link_loss_ppm",
            "Opening packets between connected hosts of them that got lost, in millionths.",
            &series(Between::loss_ppm),
        );
        let rate = crate::ledger::rate(&parts.state).await?;
        gauge(
            "supercloud_paid_nanousd_per_hour",
            "What all rented hosts cost per hour at the prices that were looked up last.",
            &one(rate.paid.0),
        );
        gauge("supercloud_on_demand_nanousd_per_hour", "What they would cost on demand.", &one(rate.on_demand.0));
        gauge("supercloud_unpriced_hosts", "Rented hosts of which no price is known.", &one(rate.unpriced_hosts));
        let clouds = parts.state.list::<Cloud>().await?;
        let series: Vec<(String, u64)> = clouds
            .iter()
            .map(|cloud| (format!("{{cloud=\"{}\"}}", cloud.name), needing(cloud.id, &volumes, &hosts)))
            .collect();
        gauge(
            "supercloud_volumes_needing_cloud",
            "Volumes that stand on what lies in this cloud, and are not used there.",
            &series,
        );
        let stores = parts.sweeps.counts();
        let label = |store: &StoreOf| match store {
            StoreOf::Controller => "{store=\"controller\"}".to_owned(),
            StoreOf::Cloud(id) => {
                let name = clouds.iter().find(|cloud| cloud.id == *id).map(|cloud| cloud.name.to_string());
                format!("{{store=\"{}\"}}", name.unwrap_or_else(|| id.to_string()))
            }
        };
        let series = |value: fn(&StoreCount) -> u64| -> Vec<(String, u64)> {
            stores.iter().map(|(store, count)| (label(store), value(count))).collect()
        };
        gauge(
            "supercloud_chunk_store_bytes",
            "Bytes of chunks in a store after its last sweep.",
            &series(|count| count.bytes.values().sum()),
        );
        let mut counter = |name: &str, help: &str, series: &[(String, u64)]| {
            let _infallible = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter");
            for (labels, value) in series {
                let _infallible = writeln!(out, "{name}{labels} {value}");
            }
        };
        let freed = series(|count| count.freed_bytes);
        counter("supercloud_chunk_store_freed_bytes_total", "Bytes that sweeps have removed from a store.", &freed);
        let failures = series(|count| count.failures);
        counter("supercloud_chunk_store_sweep_failures_total", "Sweeps that did not come to their end.", &failures);
        let series = [("move", missed_ever.by_moves), ("notice", missed_ever.by_notices)];
        let series = series.map(|(of, count)| (format!("{{of=\"{of}\"}}"), count));
        counter("supercloud_deadlines_missed_total", "Deadlines that were ever missed.", &series);
        self.render_counts(&mut out);
        Ok(out)
    }

    fn render_counts(&self, out: &mut String) {
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        // Half a count would look like one that began anew when the rest comes.
        if let Some(tally) = &*self.tally.lock().unwrap_or_else(PoisonError::into_inner) {
            let mut open: BTreeMap<(&str, &str), u64> =
                series(|phase| !phase.is_terminal()).map(|of| (of, 0)).collect();
            for (kind, phase) in tally.open.values() {
                *open.entry((kind_name(*kind), phase_name(*phase))).or_default() += 1;
            }
            line("# HELP supercloud_operations_open Operations that have not ended.".into());
            line("# TYPE supercloud_operations_open gauge".into());
            for ((kind, phase), count) in open {
                line(format!("supercloud_operations_open{{kind=\"{kind}\",phase=\"{phase}\"}} {count}"));
            }
            line("# HELP supercloud_operations_ended_total Operations that have ended.".into());
            line("# TYPE supercloud_operations_ended_total counter".into());
            let mut ended: BTreeMap<(&str, &str), u64> = series(Phase::is_terminal).map(|of| (of, 0)).collect();
            ended.extend(&tally.ended);
            for ((kind, phase), count) in ended {
                line(format!("supercloud_operations_ended_total{{kind=\"{kind}\",phase=\"{phase}\"}} {count}"));
            }
            let moves = tally.ended.get(&("guest_migrate", "done")).copied().unwrap_or(0);
            line("# HELP supercloud_moves_total Live migrations that were completed.".into());
            line("# TYPE supercloud_moves_total counter".into());
            line(format!("supercloud_moves_total {moves}"));
            line("# HELP supercloud_move_downtime_seconds Time in which no vCPU of a moved guest ran.".into());
            line("# TYPE supercloud_move_downtime_seconds histogram".into());
            tally.downtime.write(out, "supercloud_move_downtime_seconds", "");
        }
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = |text: String| {
            out.push_str(&text);
            out.push('\n');
        };
        line("# HELP supercloud_http_requests_total Requests answered.".into());
        line("# TYPE supercloud_http_requests_total counter".into());
        for ((route, method, status), count) in &requests.counts {
            let labels = format!("route=\"{route}\",method=\"{method}\",status=\"{status}\"");
            line(format!("supercloud_http_requests_total{{{labels}}} {count}"));
        }
        line("# HELP supercloud_http_request_seconds Time to answer.".into());
        line("# TYPE supercloud_http_request_seconds histogram".into());
        for (route, times) in &requests.times {
            times.write(out, "supercloud_http_request_seconds", &format!("route=\"{route}\""));
        }
    }
}

/// How many volumes stand on what lies in a cloud's store while no host of that cloud has them.
fn needing(cloud: CloudId, volumes: &[Stored<Volume>], hosts: &[Stored<HostRecord>]) -> u64 {
    let cloud_of = |id: HostId| hosts.iter().find(|record| record.host.id == id).map(|record| record.host.cloud);
    let is_needing =
        |volume: &Volume| volume.base_cloud == Some(cloud) && volume.host.and_then(cloud_of) != Some(cloud);
    volumes.iter().filter(|volume| is_needing(volume)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative_and_in_seconds() {
        let mut histogram = Histogram::new([100, 1000]);
        for value in [50, 100, 101, 5000] {
            histogram.observe(value);
        }
        let mut text = String::new();
        histogram.write(&mut text, "x_seconds", "a=\"b\"");
        let expected = "x_seconds_bucket{a=\"b\",le=\"0.100\"} 2\nx_seconds_bucket{a=\"b\",le=\"1.000\"} 3\n\
             x_seconds_bucket{a=\"b\",le=\"+Inf\"} 4\nx_seconds_sum{a=\"b\"} 5.251\nx_seconds_count{a=\"b\"} 4\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn operations_are_told_with_zeros_and_only_when_all_of_them_were_seen() {
        let metrics = Metrics::default();
        let told = |metrics: &Metrics| {
            let mut text = String::new();
            metrics.render_counts(&mut text);
            text
        };
        assert!(!told(&metrics).contains("supercloud_operations"), "half a count is none");
        *metrics.tally.lock().unwrap() = Some(Tally::default());
        let text = told(&metrics);
        // A kind or a phase that is added is one that the tables here lack.
        let lines = |name: &str| text.lines().filter(|line| line.starts_with(name) && line.ends_with(" 0")).count();
        assert_eq!((lines("supercloud_operations_open{"), lines("supercloud_operations_ended_total{")), (78, 39));
        let kinds = BTreeMap::from(KINDS.map(|kind| (kind_name(kind), kind)));
        let phases = BTreeMap::from(PHASES.map(|phase| (phase_name(phase), phase)));
        assert_eq!((kinds.len(), phases.len()), (KINDS.len(), PHASES.len()));
    }
}
