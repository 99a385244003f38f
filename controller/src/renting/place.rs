//! The task of one provider: carries its rentings forward, looks after its machines, sweeps what was left behind.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use supercloud_api::{
    HostNoticeKind, Phase, Problem, Renting, RentingEnd, RentingState, Tenure,
    ids::{HostId, OperationId, RentingId},
    link::Announced,
    unix_ms,
};
use supercloud_provider::{Instance, LaunchOrder, LaunchOutcome, NoticeKind};
use supercloud_scheduler::money::NanoUsd;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::{
    machine::{self, Event, Limits, Todo},
    providers::Configured,
    text,
};
use crate::{
    auth::{join_token, secret_sha256},
    chain,
    keys::Keys,
    notices,
    state::{
        Change, Context, EventDraft, HostRecord, JoinRecord, Named as _, OperationRecord, RentingRecord, State,
        StateError, Stored, keys, retry_conflicts,
    },
};

/// How often it does what it repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// While a renting is on its way, its provider is asked this often.
    pub look: Duration,
    /// Otherwise machines are looked at this often.
    pub sweep: Duration,
    /// The first pause after a launch that did not succeed; doubled each time.
    pub pause: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { look: Duration::from_secs(5), sweep: Duration::from_secs(60), pause: Duration::from_secs(5) }
    }
}

/// The longest pause between launches of one order.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How long a machine's join token works after its launch was begun, in milliseconds.
const JOIN_MS: u64 = 900_000;

/// What a place is made of.
#[derive(Debug, Clone)]
pub struct PlaceParts {
    /// The records.
    pub state: State,
    /// Opens the rentings' secrets.
    pub keys: Arc<Keys>,
    /// The CA's fingerprint: the mark of this controller's machines, and part of join tokens.
    pub owner: String,
    /// What launched machines are told to dial.
    pub controller_url: String,
    /// Somebody has changed a renting.
    pub wake: Arc<Notify>,
    /// How long things may take.
    pub limits: Limits,
    /// How often it looks.
    pub pace: Pace,
}

/// One provider's task.
#[derive(Debug)]
pub struct Place {
    parts: PlaceParts,
    name: String,
    configured: Configured,
    listed_at: Option<Instant>,
    /// Machines that complete listings do not tell of, and since when.
    missing: HashMap<RentingId, Instant>,
    /// Launches that did not succeed: when to try again, and the pause after that.
    pauses: HashMap<RentingId, (Instant, Duration)>,
    /// Machines of which the store knows nothing; people were told.
    unknown: HashSet<String>,
    /// What was announced for which instance and has been noted.
    noted: HashMap<String, Announced>,
}

/// A renting that has not ended, as a listing found it.
type Open = Vec<Stored<RentingRecord>>;

impl Place {
    /// The task of a provider.
    #[must_use]
    pub fn new(parts: PlaceParts, name: &str, configured: Configured) -> Self {
        Self {
            parts,
            name: name.to_owned(),
            configured,
            listed_at: None,
            missing: HashMap::new(),
            pauses: HashMap::new(),
            unknown: HashSet::new(),
            noted: HashMap::new(),
        }
    }

    /// Carries rentings forward, for ever.
    pub async fn run(mut self) {
        let wake = Arc::clone(&self.parts.wake);
        loop {
            if let Err(error) = self.pass().await {
                warn!(provider = self.name, "rentings cannot go on now: {}", chain(&error));
            }
            tokio::select! {
                () = wake.notified() => {}
                () = tokio::time::sleep(self.parts.pace.look) => {}
            }
        }
    }

    async fn open(&self) -> Result<Open, StateError> {
        let mut all = self.parts.state.list::<RentingRecord>().await?;
        all.retain(|record| record.renting.provider == self.name && record.renting.state != RentingState::Ended);
        Ok(all)
    }

    /// Everything that can be done now, once.
    ///
    /// # Errors
    /// When the state cannot be read; a provider's errors are kept with the rentings.
    pub async fn pass(&mut self) -> Result<(), StateError> {
        for record in self.open().await? {
            self.without_asking(&record.renting).await?;
        }
        for record in self.open().await? {
            if machine::todo(&record.renting) == Todo::Ask
                && self.note(record.renting.id, Event::Asking).await?.is_some()
            {
                self.launch(record.renting.id).await?;
            }
        }
        if self.configured.provider.abilities().launches {
            self.hear().await?;
            self.look().await
        } else {
            // Nothing is launched here: asking again chooses again.
            for record in self.open().await? {
                if machine::todo(&record.renting) == Todo::LookThenLaunch {
                    self.launch(record.renting.id).await?;
                } else if record.renting.state == RentingState::Asked {
                    self.note(record.renting.id, Event::Unseen { for_ms: u64::MAX }).await?;
                }
            }
            Ok(())
        }
    }

    /// What follows from our own records alone.
    async fn without_asking(&self, renting: &Renting) -> Result<(), StateError> {
        let operation = self.parts.state.read::<OperationRecord>(&renting.rent_operation).await?;
        if operation.is_some_and(|found| found.operation.is_cancel_requested && !found.operation.phase.is_terminal()) {
            self.note(renting.id, Event::ReturnWanted).await?;
        }
        let host = self.parts.state.read::<HostRecord>(&renting.host).await?;
        if host.is_some_and(|host| !host.is_removed) {
            self.note(renting.id, Event::Joined).await?;
        }
        self.note(renting.id, Event::Tick).await?;
        Ok(())
    }

    /// Hears what the provider has announced for hosts that it may take back.
    async fn hear(&mut self) -> Result<(), StateError> {
        let mut takeable = self.open().await?;
        takeable.retain(|record| record.renting.tenure == Tenure::Spot && record.renting.state == RentingState::Up);
        let is_there =
            |instance: &str| takeable.iter().any(|record| record.renting.instance.as_deref() == Some(instance));
        self.noted.retain(|instance, _| is_there(instance));
        if takeable.is_empty() {
            return Ok(());
        }
        let notices = match self.configured.provider.notices(&self.parts.owner).await {
            Ok(notices) => notices,
            Err(error) => {
                warn!(provider = self.name, "what it has announced cannot be heard now: {error}");
                return Ok(());
            }
        };
        for notice in notices {
            let of_this = |record: &&Stored<RentingRecord>| record.renting.instance.as_ref() == Some(&notice.instance);
            let Some(record) = takeable.iter().find(of_this) else { continue };
            let said = match notice.kind {
                NoticeKind::Interruption { at_ms } => Announced { kind: HostNoticeKind::Interruption, at_ms },
                NoticeKind::Rebalance => Announced { kind: HostNoticeKind::Rebalance, at_ms: None },
            };
            if self.noted.get(&notice.instance) != Some(&said) {
                notices::note(&self.parts.state, record.renting.host, said).await?;
                self.noted.insert(notice.instance, said);
            }
        }
        Ok(())
    }

    /// Compares what the provider has with what we know, and ends what should not be.
    async fn look(&mut self) -> Result<(), StateError> {
        let is_on_its_way = |record: &Stored<RentingRecord>| record.renting.state != RentingState::Up;
        let every =
            if self.open().await?.iter().any(is_on_its_way) { self.parts.pace.look } else { self.parts.pace.sweep };
        if self.listed_at.is_some_and(|at| at.elapsed() < every) {
            return Ok(());
        }
        self.listed_at = Some(Instant::now());
        let listing = match self.configured.provider.instances(&self.parts.owner).await {
            Ok(listing) => listing,
            Err(error) => {
                warn!(provider = self.name, "its machines cannot be listed: {error}");
                // Nothing is concluded from a listing that did not come.
                return Ok(());
            }
        };
        // Read after the listing: a machine in it was ordered before, and so is its renting's record here.
        let open = self.open().await?;
        self.missing.retain(|id, _| open.iter().any(|record| record.renting.id == *id));
        self.pauses.retain(|id, _| open.iter().any(|record| record.renting.id == *id));
        for record in &open {
            self.compare(&record.renting, &listing).await?;
        }
        self.sweep(&listing).await
    }

    async fn compare(&mut self, renting: &Renting, listing: &[Instance]) -> Result<(), StateError> {
        let token = renting.id.to_string();
        // Of several (a provider that broke its promise) the one that we know, or that lives; the sweep ends no other while the
        // renting is open, and all when it has ended.
        let found = listing
            .iter()
            .filter(|one| one.token == token)
            .max_by_key(|one| (renting.instance.as_deref() == Some(one.id.as_str()), one.state.may_cost()));
        let now = match found {
            Some(one) => {
                self.missing.remove(&renting.id);
                self.note(renting.id, Event::Seen(one)).await?
            }
            None => {
                let since = *self.missing.entry(renting.id).or_insert_with(Instant::now);
                let for_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.note(renting.id, Event::Unseen { for_ms }).await?
            }
        };
        let now = now.unwrap_or_else(|| renting.clone());
        match machine::todo(&now) {
            Todo::LookThenLaunch if found.is_none() => self.launch(renting.id).await,
            Todo::Terminate => {
                if let Some(instance) = &now.instance
                    && let Err(error) = self.configured.provider.terminate(instance).await
                {
                    warn!(provider = self.name, instance, "it cannot be ended now: {error}");
                    self.note(renting.id, Event::Troubled(&text::problem(&error))).await?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Ends machines whose renting has ended, and tells of those that nobody ordered.
    async fn sweep(&mut self, listing: &[Instance]) -> Result<(), StateError> {
        for one in listing.iter().filter(|one| one.state.may_cost()) {
            let renting = match one.token.parse::<RentingId>() {
                Ok(id) => self.parts.state.read::<RentingRecord>(&id).await?,
                Err(_) => None,
            };
            let data = serde_json::json!({ "provider": self.name, "instance": one.id });
            match renting {
                Some(found) if found.renting.state == RentingState::Ended => {
                    warn!(provider = self.name, instance = one.id, "ended: its renting is over");
                    match self.configured.provider.terminate(&one.id).await {
                        Ok(()) => {
                            self.tell(EventDraft::new("renting.swept").host(found.renting.host).data(data)).await?
                        }
                        Err(error) => warn!(provider = self.name, instance = one.id, "it cannot be ended now: {error}"),
                    }
                }
                Some(_) => {}
                None => {
                    if self.unknown.insert(one.id.clone()) {
                        warn!(
                            "ALARM: {} of provider {} is ours by its mark, and the store knows nothing of it",
                            one.id, self.name
                        );
                        self.tell(EventDraft::new("renting.unknown").data(data)).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn tell(&self, event: EventDraft) -> Result<(), StateError> {
        let mut change = Change::new();
        change.event(event);
        self.parts.state.commit(&Context::system(), change).await?;
        Ok(())
    }

    /// Gives the order. That it is given is durable already.
    async fn launch(&mut self, id: RentingId) -> Result<(), StateError> {
        if self.pauses.get(&id).is_some_and(|(at, _)| Instant::now() < *at) {
            return Ok(());
        }
        let Some(record) = self.parts.state.read::<RentingRecord>(&id).await? else { return Ok(()) };
        if !matches!(machine::todo(&record.renting), Todo::LookThenLaunch) {
            return Ok(());
        }
        let order = match self.order(&record.value).await? {
            Ok(order) => order,
            Err(problem) => return self.note(id, Event::Refused(&problem)).await.map(drop),
        };
        match self.configured.provider.launch(&order).await {
            Ok(instance) => {
                let by_hand = !self.configured.provider.abilities().launches;
                info!(provider = self.name, renting = %id, instance = instance.id, "rented");
                self.note(id, Event::Launched { instance: &instance, by_hand }).await?;
            }
            Err(error) => {
                warn!(provider = self.name, renting = %id, "not rented: {error}");
                let problem = text::problem(&error);
                let event = match error.launch_outcome() {
                    LaunchOutcome::Refused => Event::Refused(&problem),
                    LaunchOutcome::NotYet | LaunchOutcome::Unknown => Event::Troubled(&problem),
                };
                let pause = self.pauses.get(&id).map_or(self.parts.pace.pause, |(_, pause)| *pause);
                self.pauses.insert(id, (Instant::now() + pause, (pause * 2).min(LONGEST_PAUSE)));
                self.note(id, event).await?;
            }
        }
        Ok(())
    }

    /// The order of a renting: every time the same one. Its join token works from now on for a quarter of an hour.
    async fn order(&self, record: &RentingRecord) -> Result<Result<LaunchOrder, Problem>, StateError> {
        let renting = &record.renting;
        let sealed = hex::decode(&record.sealed_secret).unwrap_or_default();
        let opened = self.parts.keys.root.open(&text::secret_purpose(renting.host), &sealed);
        let Some(secret) = opened.and_then(|bytes| String::from_utf8(bytes).ok()) else {
            let what = "the join secret was sealed with another root key";
            return Ok(Err(Problem::new(supercloud_api::Code::Internal, what)));
        };
        renew_join(&self.parts.state, renting, &secret).await?;
        let all = self.open().await?;
        let others = all.iter().filter(|other| other.renting.id != renting.id);
        Ok(Ok(LaunchOrder {
            token: renting.id.to_string(),
            owner: self.parts.owner.clone(),
            name: renting.host_name.to_string(),
            instance_type: renting.instance_type.clone(),
            tenure: renting.tenure,
            max_price: renting.max_price_nanousd_per_hour.map(NanoUsd),
            user_data: text::user_data(
                &self.configured.user_data,
                &self.parts.controller_url,
                renting.host_name.as_str(),
                &join_token(renting.host, &secret, &self.parts.owner),
            ),
            taken: others.filter_map(|other| other.renting.instance.clone()).collect(),
        }))
    }

    /// Writes what an event makes of a renting, with all that hangs on it, in one transaction. `None`: nothing changed.
    async fn note(&self, id: RentingId, event: Event<'_>) -> Result<Option<Renting>, StateError> {
        retry_conflicts(|| async {
            let Some(before) = self.parts.state.read::<RentingRecord>(&id).await? else { return Ok(None) };
            let now = machine::after(&before.renting, event, &self.parts.limits, unix_ms());
            if now == before.renting {
                return Ok(None);
            }
            let mut change = Change::new();
            write(&self.parts.state, &before, &now, &mut change).await?;
            self.parts.state.commit(&Context::system(), change).await?;
            Ok(Some(now))
        })
        .await
    }
}

/// The join token's record, good for a quarter of an hour from now, unless it was used.
pub(crate) async fn renew_join(state: &State, renting: &Renting, secret: &str) -> Result<u64, StateError> {
    retry_conflicts(|| async {
        let fresh = JoinRecord {
            secret_sha256: secret_sha256(secret),
            host: renting.host,
            host_name: renting.host_name.clone(),
            cloud: renting.cloud,
            expires_at_ms: unix_ms().saturating_add(JOIN_MS),
            used_for_key: None,
        };
        let mut change = Change::new();
        match state.read::<JoinRecord>(&fresh.secret_sha256).await? {
            Some(used) if used.used_for_key.is_some() => return Ok(used.expires_at_ms),
            Some(old) => change.update(&old, &fresh),
            None => change.create(&fresh),
        };
        state.commit(&Context::system(), change).await?;
        Ok::<_, StateError>(fresh.expires_at_ms)
    })
    .await
}

/// A renting's next state and what hangs on it: its operations, its name, its host, the event.
pub(crate) async fn write(
    state: &State,
    before: &Stored<RentingRecord>,
    now: &Renting,
    change: &mut Change,
) -> Result<(), StateError> {
    change.update(before, &RentingRecord { renting: now.clone(), ..before.value.clone() });
    let (phase, error) = text::rent_phase(now);
    advance(state, now.rent_operation, phase, error, change).await?;
    if let Some(operation) = now.return_operation {
        advance(state, operation, text::return_phase(now), None, change).await?;
    }
    if now.state == before.renting.state {
        return Ok(());
    }
    crate::ledger::keep_renting(state, &before.renting, now, change).await?;
    change.event(EventDraft::new(text::event_kind(now.state)).host(now.host).data(serde_json::json!({
        "renting": now.id, "provider": now.provider, "name": now.host_name, "instance_type": now.instance_type,
        "instance": now.instance, "end": now.end,
    })));
    if now.state == RentingState::Ended {
        change.release(keys::renting_name(now.host_name.as_str()));
        if now.end == Some(RentingEnd::Taken) {
            host_taken(state, now.host, change).await?;
        }
    }
    Ok(())
}

async fn advance(
    state: &State,
    operation: OperationId,
    phase: Phase,
    error: Option<Problem>,
    change: &mut Change,
) -> Result<(), StateError> {
    let Some(before) = state.read::<OperationRecord>(&operation).await? else { return Ok(()) };
    if before.operation.phase.is_terminal() || phase <= before.operation.phase {
        return Ok(());
    }
    let mut now = before.value.clone();
    now.operation.phase = phase;
    now.operation.error = error;
    change.update_operation(&before, &mut now);
    Ok(())
}

/// The provider says that the machine is gone: what it ran alone is lost, and its certificate is denied.
async fn host_taken(state: &State, host: HostId, change: &mut Change) -> Result<(), StateError> {
    let guard = keys::room_guard(host);
    let guarded = state.revision_of(guard.clone()).await?;
    let Some(found) = state.read::<HostRecord>(&host).await? else { return Ok(()) };
    if found.is_removed {
        return Ok(());
    }
    let now = HostRecord { is_removed: true, ..found.value.clone() };
    let data = serde_json::json!({ "name": now.host.name, "taken_by_provider": true });
    change.update(&found, &now).guard(guard, guarded).event(EventDraft::new("host.removed").host(host).data(data));
    if let Some(key) = found.value.name_key() {
        change.release(key);
    }
    Ok(())
}
