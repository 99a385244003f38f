//! From what shall be and what is to the steps between: pure. Nothing is deleted unless asked for, and then only what an earlier
//! `apply` made; what cannot be changed in place is refused by name.

use serde::Serialize;
use supercloud_api::{
    Cloud, Guest, GuestState, Host, HostState, Image, ImagePart, ImageState, Network, OnLoss, Port, Project, Quota,
    Volume, ids::OperationId,
};

use super::{
    fleet::{Fleet, Key, Kind, WantedGuest, WantedImage, WantedNetwork, WantedProject, WantedState},
    made::Made,
};

/// What is there.
#[derive(Debug, Clone, Default)]
pub struct Actual {
    /// Projects that the token sees.
    pub projects: Vec<Project>,
    /// Their networks.
    pub networks: Vec<Network>,
    /// Their images.
    pub images: Vec<Image>,
    /// Their guests.
    pub guests: Vec<Guest>,
    /// Their guests' ports.
    pub ports: Vec<Port>,
    /// Their guests' disks.
    pub volumes: Vec<Volume>,
    /// Hosts.
    pub hosts: Vec<Host>,
    /// Clouds.
    pub clouds: Vec<Cloud>,
    /// Imports under way.
    pub imports: Vec<(supercloud_api::ids::ImageId, OperationId)>,
    /// Mirrors that stand: operations that nobody waits for the end of.
    pub mirrors: Vec<OperationId>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// Make it.
    Create,
    /// Upload and import the image; `goes_on`: an upload that broke off.
    Import {
        /// The record is there already.
        goes_on: bool,
    },
    /// Wait for what is under way.
    Await {
        /// The operation.
        operation: OperationId,
    },
    /// Start it.
    Start {
        /// Where.
        place: Option<String>,
    },
    /// Stop it.
    Stop,
    /// Freeze it.
    Freeze,
    /// Thaw it.
    Thaw {
        /// Where.
        place: Option<String>,
    },
    /// Move it live.
    Migrate {
        /// Where.
        place: String,
    },
    /// Let price policies move it, or not.
    FollowPrices {
        /// Whether.
        follow: bool,
    },
    /// What is done by itself when its running copy is lost.
    OnLoss {
        /// What.
        what: OnLoss,
    },
    /// Delete it.
    Delete,
}

/// A step. Those of one wave do not need each other; a wave needs those before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Its turn.
    pub wave: u8,
    /// What it is about.
    pub kind: Kind,
    /// Its name.
    pub key: Key,
    /// Its id, where it is there already.
    pub id: Option<String>,
    /// What is done.
    #[serde(flatten)]
    pub action: Action,
    /// For people.
    pub detail: String,
}

/// What cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// What it is about.
    pub kind: Kind,
    /// Its name.
    pub key: Key,
    /// The field.
    pub field: &'static str,
    /// What is wrong, and what to do.
    pub detail: String,
}

/// What is between.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In the order of their waves.
    pub steps: Vec<Step>,
    /// What cannot be had; nothing is done while there are any.
    pub refusals: Vec<Refusal>,
    /// What was made and stands in the file no more, and is kept.
    pub kept: Vec<String>,
}

const WAVE_PROJECTS: u8 = 0;
const WAVE_BASE: u8 = 1;
const WAVE_GUESTS: u8 = 2;
const WAVE_THEN: u8 = 3;
const WAVE_PRUNE_STOP: u8 = 4;
const WAVE_PRUNE_GUESTS: u8 = 5;
const WAVE_PRUNE_BASE: u8 = 6;

/// The steps between. With `prune` what `made` lists and the fleet does not is deleted.
pub fn plan(fleet: &Fleet, actual: &Actual, made: &Made, prune: bool) -> Plan {
    let mut planner = Planner { fleet, actual, made, plan: Plan::default() };
    fleet.projects.iter().for_each(|wanted| planner.project(wanted));
    fleet.networks.iter().for_each(|wanted| planner.network(wanted));
    fleet.images.iter().for_each(|wanted| planner.image(wanted));
    fleet.guests.iter().for_each(|wanted| planner.guest(wanted));
    planner.left_over(prune);
    let mut plan = planner.plan;
    plan.steps.sort_by_key(|step| step.wave);
    plan
}

struct Planner<'a> {
    fleet: &'a Fleet,
    actual: &'a Actual,
    made: &'a Made,
    plan: Plan,
}

fn quota_words(quota: &Quota) -> String {
    use supercloud_cli::table::bytes;
    let Quota { guests, vcpus, memory_bytes, volume_bytes } = *quota;
    format!("{guests} guests, {vcpus} vCPUs, {} memory, {} volumes", bytes(memory_bytes), bytes(volume_bytes))
}

impl<'a> Planner<'a> {
    fn step(&mut self, wave: u8, kind: Kind, key: &Key, id: Option<String>, action: Action, detail: impl Into<String>) {
        self.plan.steps.push(Step { wave, kind, key: key.clone(), id, action, detail: detail.into() });
    }

    fn refuse(&mut self, kind: Kind, key: &Key, field: &'static str, detail: impl Into<String>) {
        self.plan.refusals.push(Refusal { kind, key: key.clone(), field, detail: detail.into() });
    }

    /// Says that a field of a thing is another than it shall be, and cannot be changed.
    fn refuse_change(&mut self, kind: Kind, key: &Key, field: &'static str, is: &str, wanted: &str) {
        let what_to_do = match kind {
            Kind::Project => "the API changes no quotas: make the file say what is".to_owned(),
            Kind::Network => {
                "a network cannot be changed: make another one, or delete this one and its guests first".to_owned()
            }
            Kind::Image => "an image cannot be changed: give the new one a new name".to_owned(),
            Kind::Guest => {
                format!(
                    "delete the guest first (`supercloud --project {} guest delete {}`: its disk goes, too), or make the file say what is",
                    key.project, key.name
                )
            }
        };
        self.refuse(kind, key, field, format!("is {is}, shall be {wanted}; {what_to_do}"));
    }

    fn find_project(&self, name: &supercloud_api::Name) -> Option<&'a Project> {
        self.actual.projects.iter().find(|project| project.name == *name)
    }

    fn find_network(&self, key: &Key) -> Option<&'a Network> {
        let project = self.find_project(&key.project)?.id;
        self.actual.networks.iter().find(|network| network.project == project && network.name == key.name)
    }

    fn find_image(&self, key: &Key) -> Option<&'a Image> {
        let project = self.find_project(&key.project)?.id;
        self.actual.images.iter().find(|image| image.project == project && image.name == key.name)
    }

    fn find_guest(&self, key: &Key) -> Option<&'a Guest> {
        let project = self.find_project(&key.project)?.id;
        self.actual.guests.iter().find(|guest| guest.project == project && guest.name == key.name)
    }

    /// Refuses what is in a project that is neither there nor in the file.
    fn check_project(&mut self, kind: Kind, key: &Key) -> bool {
        let project = Key { project: key.project.clone(), name: key.project.clone() };
        let is_there = self.find_project(&key.project).is_some() || self.fleet.has(Kind::Project, &project);
        if !is_there {
            let detail = format!("there is no project {}; add it to the file as a [[project]]", key.project);
            self.refuse(kind, key, "project", detail);
        }
        is_there
    }

    fn project(&mut self, wanted: &WantedProject) {
        match (self.find_project(&wanted.key.name), &wanted.quota) {
            (None, quota) => {
                let detail = quota.as_ref().map(quota_words).unwrap_or_default();
                self.step(WAVE_PROJECTS, Kind::Project, &wanted.key, None, Action::Create, detail);
            }
            (Some(project), Some(quota)) if project.quota != *quota => {
                let (is, shall) = (quota_words(&project.quota), quota_words(quota));
                self.refuse_change(Kind::Project, &wanted.key, "quota", &is, &shall);
            }
            _ => {}
        }
    }

    fn network(&mut self, wanted: &WantedNetwork) {
        if !self.check_project(Kind::Network, &wanted.key) {
            return;
        }
        let Some(network) = self.find_network(&wanted.key) else {
            return self.step(WAVE_BASE, Kind::Network, &wanted.key, None, Action::Create, &wanted.cidr);
        };
        if network.cidr != wanted.cidr {
            self.refuse_change(Kind::Network, &wanted.key, "cidr", &network.cidr, &wanted.cidr);
        }
        if let Some(dns) = wanted.dns.as_ref().filter(|dns| **dns != network.dns) {
            self.refuse_change(Kind::Network, &wanted.key, "dns", &format!("{:?}", network.dns), &format!("{dns:?}"));
        }
    }

    fn image(&mut self, wanted: &WantedImage) {
        if !self.check_project(Kind::Image, &wanted.key) {
            return;
        }
        let key = &wanted.key;
        let from = format!("from {}", wanted.disk.display());
        let Some(image) = self.find_image(key) else {
            return self.step(WAVE_BASE, Kind::Image, key, None, Action::Import { goes_on: false }, from);
        };
        if image.cmdline != wanted.cmdline {
            let word = |cmdline: &Option<String>| cmdline.clone().unwrap_or_else(|| "none".into());
            self.refuse_change(Kind::Image, key, "cmdline", &word(&image.cmdline), &word(&wanted.cmdline));
        }
        let id = Some(image.id.to_string());
        match image.state {
            ImageState::Ready => {}
            // Pieces of two files make no image: it must be our upload, of what the files still are.
            ImageState::Uploading if self.is_our_upload(image, wanted) => {
                self.step(WAVE_BASE, Kind::Image, key, id, Action::Import { goes_on: true }, from);
            }
            ImageState::Uploading => {
                let detail = format!(
                    "is half uploaded, by somebody else or from files that have changed since; wait, or \
                     `supercloud --project {} image delete {}` and apply again",
                    key.project, key.name
                );
                self.refuse(Kind::Image, key, "state", detail);
            }
            ImageState::Importing => match self.actual.imports.iter().find(|(of, _)| *of == image.id) {
                Some((_, operation)) => {
                    let action = Action::Await { operation: *operation };
                    self.step(WAVE_BASE, Kind::Image, key, id, action, "its import is under way");
                }
                None => self.refuse(Kind::Image, key, "state", "is being imported by nobody; apply again in a moment"),
            },
            ImageState::Failed => {
                let detail = format!(
                    "its import failed; `supercloud --project {} image delete {}`, then apply again",
                    key.project, key.name
                );
                self.refuse(Kind::Image, key, "state", detail);
            }
        }
    }

    fn is_our_upload(&self, image: &Image, wanted: &WantedImage) -> bool {
        let made = self.made.things.get(&image.id.to_string());
        made.is_some_and(|made| made.hidden_inputs.is_some() && made.hidden_inputs == wanted.files)
    }

    /// What a guest refers to must be there, or be in the file.
    fn check_references(&mut self, wanted: &WantedGuest) -> bool {
        let before = self.plan.refusals.len();
        let beside = |name: &supercloud_api::Name| Key { project: wanted.key.project.clone(), name: name.clone() };
        let (image, network) = (beside(&wanted.image), beside(&wanted.network));
        if self.find_image(&image).is_none() && !self.fleet.has(Kind::Image, &image) {
            self.refuse(Kind::Guest, &wanted.key, "image", format!("there is no image {image}"));
        }
        if self.find_network(&network).is_none() && !self.fleet.has(Kind::Network, &network) {
            self.refuse(Kind::Guest, &wanted.key, "network", format!("there is no network {network}"));
        }
        if let Some(place) = &wanted.place {
            let is_host =
                self.actual.hosts.iter().any(|h| h.state != HostState::Removed && is_called(place, &h.name, &h.id));
            if !is_host && !self.actual.clouds.iter().any(|cloud| is_called(place, &cloud.name, &cloud.id)) {
                self.refuse(Kind::Guest, &wanted.key, "where", format!("there is no host or cloud {place}"));
            }
        }
        self.plan.refusals.len() == before
    }

    fn guest(&mut self, wanted: &WantedGuest) {
        if !self.check_project(Kind::Guest, &wanted.key) || !self.check_references(wanted) {
            return;
        }
        let key = &wanted.key;
        let Some(guest) = self.find_guest(key) else {
            let place = wanted.place.as_ref().map_or_else(String::new, |place| format!(", at {place}"));
            let detail = format!(
                "of {} on {}, {}x{}M{place}{}",
                wanted.image,
                wanted.network,
                wanted.shape.vcpus,
                wanted.shape.memory_bytes >> 20,
                if wanted.state == WantedState::Stopped { ", not started" } else { "" },
            );
            self.step(WAVE_GUESTS, Kind::Guest, key, None, Action::Create, detail);
            if wanted.state == WantedState::Frozen {
                self.step(WAVE_THEN, Kind::Guest, key, None, Action::Freeze, "once it runs");
            }
            return;
        };
        self.check_unchangeable(wanted, guest);
        let id = || Some(guest.id.to_string());
        if guest.follow_prices != wanted.follow_prices {
            let action = Action::FollowPrices { follow: wanted.follow_prices };
            let detail =
                if wanted.follow_prices { "let price policies move it" } else { "let no price policy move it" };
            self.step(WAVE_GUESTS, Kind::Guest, key, id(), action, detail);
        }
        if guest.on_loss != wanted.on_loss {
            let action = Action::OnLoss { what: wanted.on_loss };
            let detail = match wanted.on_loss {
                OnLoss::Nothing => "when it is lost, leave it to people",
                OnLoss::RestartFromVolume => "when it is lost, start it again by itself",
                OnLoss::ThawCheckpoint => "when it is lost, have it go on from its newest checkpoint by itself",
            };
            self.step(WAVE_GUESTS, Kind::Guest, key, id(), action, detail);
        }
        if guest.operation.is_some_and(|operation| self.actual.mirrors.contains(&operation)) {
            return self.mirrored(wanted, guest);
        }
        if let Some(operation) = guest.operation {
            let action = Action::Await { operation };
            return self.step(
                WAVE_GUESTS,
                Kind::Guest,
                key,
                id(),
                action,
                "an operation holds it; what is left is seen then",
            );
        }
        self.state(wanted, guest);
    }

    /// A guest with a mirror runs, and stays where it is as long as it has that: a mirror ends when somebody ends it.
    fn mirrored(&mut self, wanted: &WantedGuest, guest: &Guest) {
        let key = &wanted.key;
        let first = format!("it is mirrored: `supercloud --project {} guest unmirror {}` first", key.project, key.name);
        if wanted.state != WantedState::Running {
            return self.refuse(Kind::Guest, key, "state", first);
        }
        let elsewhere = wanted.place.as_ref().filter(|place| !wanted.follow_prices && !is_at(guest, place));
        if let Some(place) = elsewhere {
            self.refuse(Kind::Guest, key, "where", format!("it is not at {place}; {first}"));
        }
    }

    /// From the state in which it is to the one that is wanted.
    fn state(&mut self, wanted: &WantedGuest, guest: &Guest) {
        let key = &wanted.key;
        let place = wanted.place.clone();
        let mut step = |wave, action, detail: String| {
            self.step(wave, Kind::Guest, key, Some(guest.id.to_string()), action, detail)
        };
        let at = place.as_ref().map_or_else(String::new, |place| format!(" at {place}"));
        match (guest.state, wanted.state) {
            (GuestState::Lost, _) => {
                let detail = format!(
                    "is lost{}; `supercloud --project {} guest start {}` starts it again from its disk",
                    guest.alarm.as_ref().map_or_else(String::new, |alarm| format!(" ({alarm})")),
                    key.project,
                    key.name
                );
                self.refuse(Kind::Guest, key, "state", detail);
            }
            (GuestState::Created | GuestState::Stopped, WantedState::Stopped)
            | (GuestState::Frozen, WantedState::Frozen) => {}
            (GuestState::Created | GuestState::Stopped, WantedState::Running) => {
                step(WAVE_GUESTS, Action::Start { place }, format!("start{at}"));
            }
            (GuestState::Created | GuestState::Stopped, WantedState::Frozen) => {
                step(WAVE_GUESTS, Action::Start { place }, format!("start{at}"));
                step(WAVE_THEN, Action::Freeze, "freeze".into());
            }
            (GuestState::Running, WantedState::Stopped) => step(WAVE_GUESTS, Action::Stop, "stop".into()),
            (GuestState::Running, WantedState::Frozen) => step(WAVE_GUESTS, Action::Freeze, "freeze".into()),
            (GuestState::Frozen, WantedState::Running) => {
                step(WAVE_GUESTS, Action::Thaw { place }, format!("thaw{at}"))
            }
            (GuestState::Frozen, WantedState::Stopped) => {
                step(WAVE_GUESTS, Action::Thaw { place }, format!("thaw{at}"));
                step(WAVE_THEN, Action::Stop, "stop".into());
            }
            (GuestState::Running, WantedState::Running) => {
                // What follows prices goes where they are low: the place says only where it starts.
                if let Some(place) = place.filter(|place| !wanted.follow_prices && !is_at(guest, place)) {
                    let from = guest.host_name.as_ref().map_or_else(|| "?".into(), ToString::to_string);
                    let detail = format!("move live from {from} to {place}");
                    step(WAVE_GUESTS, Action::Migrate { place }, detail);
                }
            }
        }
    }

    /// What stays as it was made. Volumes and ports that the token does not see are not compared.
    fn check_unchangeable(&mut self, wanted: &WantedGuest, guest: &Guest) {
        let (key, actual, made) = (&wanted.key, self.actual, self.made);
        let mut differs = |field, is: String, shall: String| {
            if is != shall {
                self.refuse_change(Kind::Guest, key, field, &is, &shall);
            }
        };
        let shape = |shape: &supercloud_api::Shape| {
            // A shape is whole MiB: no two look the same.
            format!("{}x{}M", shape.vcpus, shape.memory_bytes >> 20)
        };
        differs("shape", shape(&guest.shape), shape(&wanted.shape));
        let image = actual.images.iter().find(|image| image.id == guest.image);
        if let Some(image) = image {
            differs("image", image.name.to_string(), wanted.image.to_string());
        }
        let port = guest.ports.first().and_then(|id| actual.ports.iter().find(|port| port.id == *id));
        let network = port.and_then(|port| actual.networks.iter().find(|network| network.id == port.network));
        if let Some(network) = network {
            differs("network", network.name.to_string(), wanted.network.to_string());
        }
        if let Some(shall) = wanted.cpu {
            differs("cpu", guest.cpu.to_string(), shall.to_string());
        }
        if let (Some(is), Some(shall)) = (guest.ipv4, wanted.ipv4) {
            differs("ipv4", is.to_string(), shall.to_string());
        }
        let volume = guest.volumes.first().and_then(|id| actual.volumes.iter().find(|volume| volume.id == *id));
        if let Some(volume) = volume {
            let word = |propagation| serde_json::to_string(&propagation).unwrap_or_default();
            differs("propagation", word(volume.propagation), word(wanted.propagation));
            // The disk is at least as large as the image's.
            let least = image.and_then(|image| image.parts.iter().find(|part| part.part == ImagePart::Disk));
            let shall = wanted.disk_bytes.map(|bytes| bytes.max(least.map_or(0, |part| part.size_bytes)));
            if let Some(shall) = shall.filter(|shall| shall.div_ceil(1 << 20) != volume.size_bytes.div_ceil(1 << 20)) {
                let words = [volume.size_bytes, shall].map(|bytes| format!("{} MiB", bytes.div_ceil(1 << 20)));
                let [is, shall] = words;
                differs("disk", is, shall);
            }
        }
        let hidden = made.things.get(&guest.id.to_string()).and_then(|made| made.hidden_inputs.as_ref());
        if let Some(hidden) = hidden {
            let word = |hash: &str| format!("what hashes to {}", hash.get(..8).unwrap_or(hash));
            differs("cloud_init or cmdline_extra", word(hidden), word(&wanted.hidden_inputs()));
        }
    }

    /// What was made and is in the file no more.
    fn left_over(&mut self, prune: bool) {
        for (id, thing) in &self.made.things {
            if self.fleet.has(thing.kind, &thing.key) {
                continue;
            }
            let guest = self.actual.guests.iter().find(|guest| guest.id.to_string() == *id);
            let is_there = match thing.kind {
                Kind::Guest => guest.is_some(),
                Kind::Network => self.actual.networks.iter().any(|network| network.id.to_string() == *id),
                Kind::Image => self.actual.images.iter().any(|image| image.id.to_string() == *id),
                // The API deletes no projects.
                Kind::Project => false,
            };
            if !is_there {
                continue;
            }
            let (kind, key) = (thing.kind, &thing.key);
            if !prune {
                self.plan.kept.push(format!("{kind} {key}"));
                continue;
            }
            let id = || Some(id.clone());
            let detail = "made by this file, which has it no more";
            match guest {
                Some(Guest { operation: Some(operation), .. }) if self.actual.mirrors.contains(operation) => {
                    let first = format!("supercloud --project {} guest unmirror {}", key.project, key.name);
                    self.refuse(kind, key, "mirror", format!("it is to be deleted and is mirrored: `{first}` first"));
                    continue;
                }
                Some(Guest { operation: Some(operation), .. }) => {
                    let action = Action::Await { operation: *operation };
                    self.step(WAVE_PRUNE_STOP, kind, key, id(), action, "an operation holds it");
                    continue;
                }
                Some(guest) if guest.state == GuestState::Running => {
                    self.step(WAVE_PRUNE_STOP, kind, key, id(), Action::Stop, "before it is deleted");
                }
                _ => {}
            }
            let wave = if kind == Kind::Guest { WAVE_PRUNE_GUESTS } else { WAVE_PRUNE_BASE };
            self.step(wave, kind, key, id(), Action::Delete, detail);
        }
    }
}

fn is_called(place: &str, name: &supercloud_api::Name, id: &impl ToString) -> bool {
    place == name.as_str() || place == id.to_string()
}

/// Whether a guest runs at a place. As for the API a host goes before a cloud of the same name.
fn is_at(guest: &Guest, place: &str) -> bool {
    let is = |name: &Option<supercloud_api::Name>, id: Option<String>| {
        name.as_ref().is_some_and(|name| name.as_str() == place) || id.as_deref() == Some(place)
    };
    is(&guest.host_name, guest.host.map(|id| id.to_string()))
        || is(&guest.cloud_name, guest.cloud.map(|id| id.to_string()))
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
