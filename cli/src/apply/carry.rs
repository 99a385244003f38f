//! Carrying out the steps of a plan. What was made is noted at once, so that another run goes on where this one ended.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, bail};
use serde::{Serialize, de::DeserializeOwned};
use supercloud_api::{
    Guest, GuestCreate, GuestFreeze, GuestMigrate, GuestPatch, GuestStart, GuestStop, GuestThaw, Image, ImageCreate,
    MemoryMode, Network, NetworkCreate, Operation, Phase, Project, ProjectCreate, Ref, client::Client,
};

use super::{
    begun,
    fleet::{Fleet, Key, Kind, WantedGuest},
    made::{Begun, Made, MadeThing},
    plan::{Action, Step},
};
use crate::{
    exit::{OperationFailed, WatchLeft},
    show, uploads,
};

/// Why a move is asked for, in the audit trail.
const REASON: &str = "supercloud apply";

/// What carries a plan out.
pub struct Carrier<'a> {
    /// The controller.
    pub client: &'a Client,
    /// What shall be.
    pub fleet: &'a Fleet,
    /// What was made.
    pub made: &'a mut Made,
    /// Where that is kept.
    pub made_path: &'a Path,
    /// Guests that were made on the way, for the steps that follow.
    new_guests: BTreeMap<Key, String>,
}

impl<'a> Carrier<'a> {
    /// Nothing is done yet.
    pub fn new(client: &'a Client, fleet: &'a Fleet, made: &'a mut Made, made_path: &'a Path) -> Self {
        Self { client, fleet, made, made_path, new_guests: BTreeMap::new() }
    }

    /// Carries out the steps, wave by wave: those of a wave are begun together, then waited for.
    ///
    /// # Errors
    /// What went wrong first; what was begun beside it was waited for.
    pub async fn carry(&mut self, steps: &[Step]) -> anyhow::Result<()> {
        for wave in steps.chunk_by(|one, next| one.wave == next.wave) {
            let mut begun = Vec::new();
            let mut trouble = None;
            for step in wave {
                eprintln!("{} {}: {}", step.kind, step.key, words(&step.action));
                match self.begin(step).await {
                    Ok(operation) => begun.extend(operation.map(|operation| (step, operation))),
                    Err(error) => {
                        trouble = Some(error.context(format!("{} {}: {}", step.kind, step.key, words(&step.action))));
                        break;
                    }
                }
            }
            for (step, operation) in begun {
                match self.wait(step, operation).await {
                    // Who looks no longer looks at none of them.
                    Err(error) if error.is::<WatchLeft>() => return Err(error),
                    ended => trouble = trouble.or(ended.err()),
                }
            }
            if let Some(trouble) = trouble {
                return Err(
                    trouble.context("not all was done; once the cause is gone, the same command goes on from here")
                );
            }
        }
        Ok(())
    }

    async fn wait(&mut self, step: &Step, operation: Operation) -> anyhow::Result<()> {
        let operation = if operation.phase.is_terminal() {
            operation
        } else {
            eprintln!("{} {}: {}", step.kind, step.key, wait_words(&step.action));
            show::watch_operation(self.client, operation).await?
        };
        if operation.phase != Phase::Done && !matches!(step.action, Action::Await { .. }) {
            let what = format!("{} {}: {}", step.kind, step.key, words(&step.action));
            return Err(anyhow::Error::new(OperationFailed(Box::new(operation))).context(what));
        }
        // What somebody else began may end as it likes: what is left is seen afterwards.
        if let (Action::Delete, Some(id)) = (&step.action, &step.id) {
            self.forget(id)?;
        }
        Ok(())
    }

    /// Makes something: noted with its idempotency key before it is asked for, and with its id when that is known, so that a run that
    /// ends in between forgets nothing.
    async fn make<B: Serialize, T: DeserializeOwned>(
        &mut self,
        step: &Step,
        hidden_inputs: Option<String>,
        (path, body): (&str, &B),
        id: impl FnOnce(&T) -> Option<String>,
    ) -> anyhow::Result<T> {
        let thing = MadeThing { kind: step.kind, key: step.key.clone(), hidden_inputs };
        let call = Begun { thing, path: path.into(), body: serde_json::to_value(body).context("what is asked for")? };
        let key = self.made.begin(call.clone());
        self.made.write(self.made_path)?;
        match begun::send(self.client, key, &call).await {
            Ok(made) => {
                let id = id(&made).context("the controller does not say what it made")?;
                self.made.end(key, id);
                self.made.write(self.made_path)?;
                Ok(made)
            }
            Err(error) => {
                if begun::was_refused(&error) {
                    self.made.begun.remove(&key);
                    self.made.write(self.made_path)?;
                }
                Err(error.into())
            }
        }
    }

    fn forget(&mut self, id: &str) -> anyhow::Result<()> {
        self.made.things.remove(id);
        self.made.write(self.made_path)
    }

    /// Begins a step; what takes time is answered with its operation.
    async fn begin(&mut self, step: &Step) -> anyhow::Result<Option<Operation>> {
        if let Action::Await { operation } = step.action {
            return Ok(Some(self.client.operation(operation).await?));
        }
        match step.kind {
            Kind::Project => self.make_project(step).await.map(|()| None),
            Kind::Network => self.network(step).await.map(|()| None),
            Kind::Image => self.image(step).await,
            Kind::Guest => self.guest(step).await,
        }
    }

    async fn make_project(&mut self, step: &Step) -> anyhow::Result<()> {
        let wanted = self.fleet.projects.iter().find(|one| one.key == step.key).context("it is not in the file")?;
        let body = ProjectCreate { name: wanted.key.name.clone(), quota: wanted.quota };
        let id = |project: &Project| Some(project.id.to_string());
        self.make(step, None, ("/v1/projects", &body), id).await.map(drop)
    }

    async fn network(&mut self, step: &Step) -> anyhow::Result<()> {
        if let (Action::Delete, Some(id)) = (&step.action, &step.id) {
            self.client.delete_network(id).await?;
            return self.forget(id);
        }
        let wanted = self.fleet.networks.iter().find(|one| one.key == step.key).context("it is not in the file")?;
        let body = NetworkCreate {
            name: wanted.key.name.clone(),
            project: Some(Ref::from(wanted.key.project.as_str())),
            cidr: wanted.cidr.clone(),
            dns: wanted.dns.clone().unwrap_or_default(),
        };
        let id = |network: &Network| Some(network.id.to_string());
        self.make(step, None, ("/v1/networks", &body), id).await.map(drop)
    }

    async fn image(&mut self, step: &Step) -> anyhow::Result<Option<Operation>> {
        if let (Action::Delete, Some(id)) = (&step.action, &step.id) {
            self.client.delete_image(id).await?;
            return self.forget(id).map(|()| None);
        }
        let wanted = self.fleet.images.iter().find(|one| one.key == step.key).context("it is not in the file")?;
        // All there before anything is made of it.
        let files = uploads::open(wanted.disk.clone(), wanted.kernel.clone(), wanted.initrd.clone()).await?;
        let image: Image = match &step.id {
            Some(id) => self.client.image(id).await?,
            None => {
                let body = ImageCreate {
                    name: wanted.key.name.clone(),
                    project: Some(Ref::from(wanted.key.project.as_str())),
                    cmdline: wanted.cmdline.clone(),
                };
                let id = |image: &Image| Some(image.id.to_string());
                self.make(step, wanted.files.clone(), ("/v1/images", &body), id).await?
            }
        };
        uploads::send(self.client, &image, files).await.map(Some)
    }

    async fn guest(&mut self, step: &Step) -> anyhow::Result<Option<Operation>> {
        if step.action == Action::Create {
            let wanted = self.fleet.guests.iter().find(|one| one.key == step.key).context("it is not in the file")?;
            let (call, hidden) = (creation(wanted), wanted.hidden_inputs());
            let id = |operation: &Operation| operation.guest.map(|guest| guest.to_string());
            let operation = self.make(step, Some(hidden), ("/v1/guests", &call), id).await?;
            self.new_guests.extend(id(&operation).map(|id| (step.key.clone(), id)));
            return Ok(Some(operation));
        }
        let id = step.id.as_ref().or_else(|| self.new_guests.get(&step.key)).context("it was not made")?;
        let place = |place: &Option<String>| place.as_ref().map(Ref::from);
        let operation = match &step.action {
            Action::Start { place: to } => {
                self.client.start_guest(id, &GuestStart { place: place(to), cpu: None }).await?
            }
            Action::Stop => self.client.stop_guest(id, &GuestStop::default()).await?,
            Action::Freeze => self.client.freeze_guest(id, &GuestFreeze { reason: Some(REASON.into()) }).await?,
            Action::Thaw { place: to } => {
                self.client.thaw_guest(id, &GuestThaw { to: place(to), ..GuestThaw::default() }).await?
            }
            Action::Migrate { place } => self.client.migrate_guest(id, &move_to(place)).await?,
            Action::FollowPrices { follow } => {
                let body = GuestPatch { follow_prices: Some(*follow), ..GuestPatch::default() };
                let _guest: Guest = self.client.patch_guest(id, &body).await?;
                return Ok(None);
            }
            Action::OnLoss { what } => {
                let body = GuestPatch { on_loss: Some(*what), ..GuestPatch::default() };
                let _guest: Guest = self.client.patch_guest(id, &body).await?;
                return Ok(None);
            }
            Action::Delete => self.client.delete_guest(id).await?,
            Action::Create | Action::Import { .. } | Action::Await { .. } => bail!("no step of a guest that is there"),
        };
        Ok(Some(operation))
    }
}

fn move_to(place: &str) -> GuestMigrate {
    GuestMigrate {
        to: Ref::from(place),
        bandwidth_bps: None,
        max_downtime_ms: None,
        auto_converge: true,
        deadline_ms: None,
        memory: MemoryMode::PreCopy,
        reason: Some(REASON.into()),
    }
}

fn creation(wanted: &WantedGuest) -> GuestCreate {
    GuestCreate {
        name: wanted.key.name.clone(),
        project: Some(Ref::from(wanted.key.project.as_str())),
        image: Ref::from(wanted.image.as_str()),
        shape: wanted.shape,
        disk_from: None,
        network: Ref::from(wanted.network.as_str()),
        ipv4: wanted.ipv4,
        place: wanted.place.as_ref().map(Ref::from),
        disk_bytes: wanted.disk_bytes,
        user_data: wanted.user_data.clone(),
        cmdline_extra: wanted.cmdline_extra.clone(),
        propagation: wanted.propagation,
        follow_prices: wanted.follow_prices,
        cpu: wanted.cpu.unwrap_or_default(),
        on_loss: wanted.on_loss,
        start: wanted.state != super::fleet::WantedState::Stopped,
    }
}

/// What is done, in a word.
pub fn words(action: &Action) -> &'static str {
    match action {
        Action::Create => "make",
        Action::Import { goes_on: false } => "import",
        Action::Import { goes_on: true } => "go on importing",
        Action::Await { .. } => "wait",
        Action::Start { .. } => "start",
        Action::Stop => "stop",
        Action::Freeze => "freeze",
        Action::Thaw { .. } => "thaw",
        Action::Migrate { .. } => "move",
        Action::FollowPrices { .. } | Action::OnLoss { .. } => "change",
        Action::Delete => "delete",
    }
}

const fn wait_words(action: &Action) -> &'static str {
    match action {
        Action::Create => "starting",
        Action::Import { .. } => "importing",
        Action::Start { .. } => "starting",
        Action::Stop => "stopping",
        Action::Freeze => "freezing",
        Action::Thaw { .. } => "thawing",
        Action::Migrate { .. } => "moving",
        Action::Delete => "deleting",
        Action::Await { .. } | Action::FollowPrices { .. } | Action::OnLoss { .. } => "waiting",
    }
}
