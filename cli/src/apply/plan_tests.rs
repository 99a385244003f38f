//! The planner against a small world that takes steps as the API would.

use std::{collections::BTreeMap, path::Path};

use proptest::prelude::*;
use supercloud_api::{
    Durability, ImageContent, Name,
    ids::{CloudId, Epoch, GuestId, HostId, ImageId, NetworkId, PortId, ProjectId, VolumeId},
};

use super::*;
use crate::apply::made::MadeThing;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn fleet(text: &str) -> Fleet {
    Fleet::load(text, Path::new("/nowhere"), name("shop")).unwrap()
}

const BASE: &str = "[[project]]\nname = \"shop\"\n[[network]]\nname = \"lan\"\ncidr = \"10.20.0.0/24\"\n\
    [[image]]\nname = \"debian\"\ndisk = \"d.qcow2\"\n";

fn guest(name: &str, more: &str) -> String {
    format!("[[guest]]\nname = \"{name}\"\nimage = \"debian\"\nnetwork = \"lan\"\nshape = \"1x512\"\n{more}")
}

/// Two clouds with a host each, and whatever the steps have made.
#[derive(Clone)]
struct World {
    actual: Actual,
    made: Made,
}

impl World {
    fn new() -> Self {
        let mut actual = Actual::default();
        for (cloud_name, host_name) in [("east", "h1"), ("west", "h2")] {
            let cloud =
                Cloud { id: CloudId::generate(), name: name(cloud_name), provider: "static".into(), created_at_ms: 0 };
            let host = serde_json::json!({
                "id": HostId::generate(), "name": host_name, "cloud": cloud.id, "cloud_name": cloud_name, "state": "up",
                "data_address": null, "overlay_address": null, "overlay_index": 1,
                "capacity": { "vcpus": 8, "memory_bytes": 0, "disk_bytes": 0 },
                "used": { "vcpus": 0, "memory_bytes": 0, "disk_bytes": 0 },
                "compat_classes": [], "probe": {}, "agent_version": "1", "certificate_sha256": "", "last_seen_ms": 0,
                "created_at_ms": 0,
            });
            actual.clouds.push(cloud);
            actual.hosts.push(serde_json::from_value(host).unwrap());
        }
        Self { actual, made: Made::default() }
    }

    fn project(&self, name: &Name) -> ProjectId {
        self.actual.projects.iter().find(|project| project.name == *name).expect("its project is there").id
    }

    fn note(&mut self, id: &impl ToString, step: &Step, hidden_inputs: Option<String>) {
        let thing = MadeThing { kind: step.kind, key: step.key.clone(), hidden_inputs };
        self.made.things.insert(id.to_string(), thing);
    }

    /// The guest goes to a place, or anywhere.
    fn settle(&mut self, key: &Key, place: Option<&String>) {
        let host =
            self.actual.hosts.iter().find(|host| {
                place.is_none_or(|place| host.name.as_str() == place || host.cloud_name.as_str() == place)
            });
        let host = host.expect("the place is there").clone();
        let guest = self.guest(key);
        (guest.host, guest.host_name) = (Some(host.id), Some(host.name));
        (guest.cloud, guest.cloud_name) = (Some(host.cloud), Some(host.cloud_name));
        guest.state = GuestState::Running;
    }

    fn guest(&mut self, key: &Key) -> &mut Guest {
        let project = self.project(&key.project);
        let found = self.actual.guests.iter_mut().find(|guest| guest.project == project && guest.name == key.name);
        found.expect("the guest is there")
    }

    fn make_guest(&mut self, step: &Step, wanted: &WantedGuest) {
        let project = self.project(&step.key.project);
        let image = self.actual.images.iter().find(|image| image.project == project && image.name == wanted.image);
        let image = image.expect("its image is there");
        assert_eq!(image.state, ImageState::Ready, "an image is used when it can be");
        let network = self.actual.networks.iter().find(|net| net.project == project && net.name == wanted.network);
        let network = network.expect("its network is there").id;
        let (id, volume, port) = (GuestId::generate(), VolumeId::generate(), PortId::generate());
        let size_bytes = wanted.disk_bytes.unwrap_or(0).max(image.parts[0].size_bytes);
        self.actual.volumes.push(Volume {
            id: volume,
            project,
            name: step.key.name.clone(),
            size_bytes,
            base: None,
            image: Some(image.id),
            guest: Some(id),
            epoch: Epoch::ZERO,
            host: None,
            needed_source: None,
            base_cloud: None,
            map_root: None,
            map_version: 0,
            durability: Durability::Host,
            propagation: wanted.propagation,
            created_at_ms: 0,
        });
        self.actual.ports.push(Port {
            id: port,
            network,
            project,
            guest: id,
            mac: String::new(),
            ipv4: "10.20.0.5".parse().unwrap(),
            host: None,
            epoch: Epoch::ZERO,
            prepared_at: None,
            moved_from: None,
        });
        self.actual.guests.push(Guest {
            id,
            project,
            name: step.key.name.clone(),
            state: GuestState::Created,
            alarm: None,
            shape: wanted.shape,
            image: image.id,
            host: None,
            host_name: None,
            cloud: None,
            cloud_name: None,
            epoch: Epoch::ZERO,
            compat_class: None,
            cpu: wanted.cpu.unwrap_or_default(),
            volumes: vec![volume],
            ports: vec![port],
            ipv4: Some("10.20.0.5".parse().unwrap()),
            operation: None,
            freeze: None,
            follow_prices: wanted.follow_prices,
            on_loss: wanted.on_loss,
            kept_mirror: None,
            starts: 0,
            base_missing_bytes: None,
            created_at_ms: 0,
        });
        self.note(&id, step, Some(wanted.hidden_inputs()));
    }

    /// As the API would: what it would refuse fails the test.
    fn take(&mut self, fleet: &Fleet, step: &Step) {
        let key = &step.key;
        match (step.kind, &step.action) {
            (Kind::Project, Action::Create) => {
                let id = ProjectId::generate();
                let quota = fleet.projects.iter().find(|one| one.key == *key).unwrap().quota.unwrap_or_default();
                self.actual.projects.push(Project { id, name: key.name.clone(), quota, created_at_ms: 0 });
                self.note(&id, step, None);
            }
            (Kind::Network, Action::Create) => {
                let wanted = fleet.networks.iter().find(|one| one.key == *key).unwrap();
                let network = Network {
                    id: NetworkId::generate(),
                    project: self.project(&key.project),
                    name: key.name.clone(),
                    cidr: wanted.cidr.clone(),
                    gateway: "10.20.0.1".parse().unwrap(),
                    dns: wanted.dns.clone().unwrap_or_default(),
                    vni: 1,
                    mtu: 1400,
                    created_at_ms: 0,
                };
                self.note(&network.id, step, None);
                self.actual.networks.push(network);
            }
            (Kind::Image, Action::Import { goes_on: false }) => {
                let wanted = fleet.images.iter().find(|one| one.key == *key).unwrap();
                let disk =
                    ImageContent { part: ImagePart::Disk, root: String::new(), size_bytes: 1 << 30, stored_bytes: 0 };
                let image = Image {
                    id: ImageId::generate(),
                    project: self.project(&key.project),
                    name: key.name.clone(),
                    state: ImageState::Ready,
                    cmdline: wanted.cmdline.clone(),
                    parts: vec![disk],
                    uploaded: vec![],
                    created_at_ms: 0,
                };
                self.note(&image.id, step, wanted.files.clone());
                self.actual.images.push(image);
            }
            (Kind::Image, Action::Import { goes_on: true }) => {
                let image = self.actual.images.iter_mut().find(|image| Some(image.id.to_string()) == step.id).unwrap();
                assert_eq!(image.state, ImageState::Uploading);
                image.state = ImageState::Ready;
            }
            (Kind::Guest, Action::Create) => {
                let wanted = fleet.guests.iter().find(|one| one.key == *key).unwrap();
                self.make_guest(step, wanted);
                if wanted.state != WantedState::Stopped {
                    self.settle(key, wanted.place.as_ref());
                }
            }
            (Kind::Guest, Action::Await { operation }) => {
                let guest = self.guest(key);
                assert_eq!(guest.operation.take(), Some(*operation));
            }
            (Kind::Guest, Action::FollowPrices { follow }) => self.guest(key).follow_prices = *follow,
            (Kind::Guest, Action::OnLoss { what }) => self.guest(key).on_loss = *what,
            (Kind::Guest, action) => self.take_of_guest(step, action),
            other => panic!("no such step: {other:?}"),
        }
    }

    fn take_of_guest(&mut self, step: &Step, action: &Action) {
        let key = &step.key;
        let (state, operation) = (self.guest(key).state, self.guest(key).operation);
        assert_eq!(operation, None, "nothing is begun while an operation holds it");
        match action {
            Action::Start { place } => {
                assert!(matches!(state, GuestState::Created | GuestState::Stopped), "{state:?}");
                self.settle(key, place.as_ref());
            }
            Action::Thaw { place } => {
                assert_eq!(state, GuestState::Frozen);
                self.settle(key, place.as_ref());
            }
            Action::Migrate { place } => {
                assert_eq!(state, GuestState::Running);
                assert!(!is_at(self.guest(key), place), "a move goes elsewhere");
                self.settle(key, Some(place));
            }
            Action::Stop | Action::Freeze => {
                assert_eq!(state, GuestState::Running);
                let guest = self.guest(key);
                guest.state = if *action == Action::Stop { GuestState::Stopped } else { GuestState::Frozen };
                (guest.host, guest.host_name, guest.cloud, guest.cloud_name) = (None, None, None, None);
            }
            Action::Delete => {
                assert_ne!(state, GuestState::Running);
                let id = step.id.clone().unwrap();
                self.actual.guests.retain(|guest| guest.id.to_string() != id);
                self.made.things.remove(&id);
            }
            other => panic!("no such step of a guest: {other:?}"),
        }
    }

    fn plan(&self, fleet: &Fleet, prune: bool) -> Plan {
        plan(fleet, &self.actual, &self.made, prune)
    }

    /// Takes all steps, looking again as often as `apply` does.
    fn converge(&mut self, fleet: &Fleet, prune: bool) {
        for _ in 0..4 {
            let plan = self.plan(fleet, prune);
            assert_eq!(plan.refusals, vec![]);
            plan.steps.iter().for_each(|step| self.take(fleet, step));
        }
        assert_eq!(self.plan(fleet, prune).steps, vec![], "nothing is left");
    }
}

fn words(plan: &Plan) -> Vec<String> {
    let word = |step: &Step| format!("{} {} {}", crate::apply::carry::words(&step.action), step.kind, step.key);
    plan.steps.iter().map(word).collect()
}

#[test]
fn from_nothing_everything_is_made_in_the_order_in_which_it_is_needed() {
    // The guest stands first in the file.
    let text = format!("{}{BASE}", guest("web", "where = \"east\"\n"));
    let mut world = World::new();
    let plan = world.plan(&fleet(&text), false);
    let expected = ["make project shop", "make network shop/lan", "import image shop/debian", "make guest shop/web"];
    assert_eq!(words(&plan), expected);
    world.converge(&fleet(&text), false);
}

#[test]
fn what_cannot_be_changed_is_refused_by_name() {
    let mut world = World::new();
    world.converge(&fleet(&format!("{BASE}{}", guest("web", ""))), false);
    let web = |from: &str, to: &str| format!("{BASE}{}", guest("web", "").replace(from, to));
    for (text, field) in [
        (web("1x512", "1x1024"), "shape"),
        (web("shape", "disk = \"9G\"\nshape"), "disk"),
        (web("shape", "propagation = \"on-demand\"\nshape"), "propagation"),
        (web("shape", "ipv4 = \"10.20.0.9\"\nshape"), "ipv4"),
        (web("shape", "cmdline_extra = \"quiet\"\nshape"), "cloud_init or cmdline_extra"),
        (BASE.replace("10.20.", "10.30."), "cidr"),
        (BASE.replace("[[image]]", "dns = [\"10.20.0.9\"]\n[[image]]"), "dns"),
        (BASE.replace("d.qcow2\"", "d.qcow2\"\nkernel = \"k\"\ncmdline = \"x\""), "cmdline"),
        (format!("{BASE}{}", guest("new", "where = \"north\"\n")), "where"),
        (format!("{BASE}{}", guest("new", "").replace("debian", "other")), "image"),
        (format!("{BASE}{}", guest("new", "").replace("\"lan\"", "\"wan\"")), "network"),
        (format!("{BASE}{}", guest("new", "project = \"none\"\n")), "project"),
    ] {
        let plan = world.plan(&fleet(&text), true);
        let fields: Vec<&str> = plan.refusals.iter().map(|refusal| refusal.field).collect();
        assert_eq!(fields, [field], "{text}");
    }
}

#[test]
fn a_disk_no_larger_than_the_images_is_as_it_shall_be() {
    let mut world = World::new();
    world.converge(&fleet(&format!("{BASE}{}", guest("web", "disk = \"512M\"\n"))), false);
}

#[test]
fn a_lost_guest_is_for_somebody_to_look_at() {
    let mut world = World::new();
    let text = format!("{BASE}{}", guest("web", ""));
    world.converge(&fleet(&text), false);
    world.actual.guests[0].state = GuestState::Lost;
    let plan = world.plan(&fleet(&text), false);
    assert_eq!((plan.refusals.len(), plan.steps.len()), (1, 0));
    assert!(plan.refusals[0].detail.contains("guest start web"), "{:?}", plan.refusals);
}

#[test]
fn what_follows_prices_is_not_moved_back() {
    let mut world = World::new();
    let text = format!("{BASE}{}", guest("web", "follow_prices = true\nwhere = \"east\"\n"));
    world.converge(&fleet(&text), false);
    let key = Key { project: name("shop"), name: name("web") };
    world.settle(&key, Some(&"west".to_owned()));
    assert_eq!(world.plan(&fleet(&text), false).steps, vec![]);
    let stays = text.replace("follow_prices = true\n", "");
    assert_eq!(words(&world.plan(&fleet(&stays), false)), ["change guest shop/web", "move guest shop/web"]);
}

#[test]
fn an_operation_under_way_is_waited_for_first() {
    let mut world = World::new();
    let text = format!("{BASE}{}", guest("web", ""));
    world.converge(&fleet(&text), false);
    world.actual.guests[0].operation = Some(OperationId::generate());
    let stopped = fleet(&text.replace("shape", "state = \"stopped\"\nshape"));
    assert_eq!(words(&world.plan(&stopped, false)), ["wait guest shop/web"]);
    world.converge(&stopped, false);
    assert_eq!(world.actual.guests[0].state, GuestState::Stopped);
}

/// What holds a guest of the property tests.
fn mirror(world: &mut World) -> OperationId {
    let operation = OperationId::generate();
    world.actual.guests[0].operation = Some(operation);
    world.actual.mirrors.insert(operation);
    operation
}

#[test]
fn a_mirrored_guest_runs_and_what_its_mirror_forbids_is_refused_by_name() {
    let mut world = World::new();
    let text = format!("{BASE}{}", guest("web", "where = \"east\"\n"));
    world.converge(&fleet(&text), false);
    mirror(&mut world);
    assert_eq!(world.plan(&fleet(&text), true), Plan::default(), "nothing to change, and nothing to wait for");
    for (wanted, field, what) in [
        (text.replace("shape", "state = \"stopped\"\nshape"), "state", "be stopped"),
        (text.replace("shape", "state = \"frozen\"\nshape"), "state", "be frozen"),
        (text.replace("\"east\"", "\"west\""), "where", "be moved to west"),
        (format!("{BASE}# {}", "no guest"), "mirror", "be deleted"),
    ] {
        let plan = world.plan(&fleet(&wanted), true);
        assert_eq!((plan.steps, plan.refusals.len()), (vec![], 1), "{wanted}");
        let refusal = &plan.refusals[0];
        assert!(refusal.field == field && refusal.detail.contains(what), "{refusal:?}");
        assert!(refusal.detail.contains("--project shop guest unmirror web"), "{refusal:?}");
    }
    // What a mirror does not forbid is changed as of any other guest; kept without --prune.
    let follows = text.replace("shape", "follow_prices = true\nshape");
    assert_eq!(words(&world.plan(&fleet(&follows), false)), ["change guest shop/web"]);
    assert_eq!(world.plan(&fleet(BASE), false).kept, ["guest shop/web"]);
    // A second guest is begun while the mirror stands; the mirror is ended: it may be stopped.
    let two = format!("{text}{}", guest("two", ""));
    assert_eq!(words(&world.plan(&fleet(&two), false)), ["make guest shop/two"]);
    world.actual.mirrors.clear();
    assert_eq!(words(&world.plan(&fleet(&text), false)), ["wait guest shop/web"]);
}

#[test]
fn only_a_mirror_that_stands_has_no_end() {
    let operation = |kind, phase, is_cancel_requested| {
        let operation = serde_json::json!({ "id": OperationId::generate(), "kind": kind, "phase": phase, "progress": {},
            "is_cancel_requested": is_cancel_requested, "actor": "token:a",
            "request_id": "req-01a1fea9-e617-7305-957c-ad553aef0867", "created_at_ms": 1, "updated_at_ms": 1 });
        is_standing_mirror(&serde_json::from_value(operation).unwrap())
    };
    for phase in ["plan", "prepare", "copy"] {
        assert!(operation("guest_mirror", phase, false), "{phase}");
        assert!(!operation("guest_mirror", phase, true), "it is being ended: {phase}");
        assert!(!operation("guest_migrate", phase, false), "{phase}");
    }
    for phase in ["switch", "resume", "finish", "done", "rolled_back", "failed"] {
        assert!(!operation("guest_mirror", phase, false), "{phase}");
    }
}

#[test]
fn images_go_on_where_they_stopped() {
    let mut world = World::new();
    let mut fleet_of_files = fleet(BASE);
    fleet_of_files.images[0].files = Some("5@1".into());
    world.converge(&fleet_of_files, false);
    let image = world.actual.images[0].id;
    world.actual.images[0].state = ImageState::Uploading;
    assert_eq!(world.plan(&fleet_of_files, false).steps[0].action, Action::Import { goes_on: true });
    // From another file, or somebody else's: pieces of two make no image.
    for other in [Some("5@2".into()), None] {
        fleet_of_files.images[0].files = other;
        let plan = world.plan(&fleet_of_files, false);
        assert!(plan.steps.is_empty() && plan.refusals[0].detail.contains("half uploaded"), "{plan:?}");
    }
    world.made = Made::default();
    assert_eq!(world.plan(&fleet_of_files, false).refusals.len(), 1);
    world.actual.images[0].state = ImageState::Failed;
    assert!(world.plan(&fleet(BASE), false).refusals[0].detail.contains("image delete debian"));
    world.actual.images[0].state = ImageState::Importing;
    let operation = OperationId::generate();
    world.actual.imports.push((image, operation));
    assert_eq!(world.plan(&fleet(BASE), false).steps[0].action, Action::Await { operation });
}

/// What a guest of the property tests shall do.
fn wishes() -> impl Strategy<Value = BTreeMap<&'static str, (&'static str, Option<&'static str>, bool)>> {
    let state = prop::sample::select(vec!["running", "stopped", "frozen"]);
    let place = prop::option::of(prop::sample::select(vec!["east", "west", "h1", "h2"]));
    let names = prop::sample::select(vec!["a", "b", "c"]);
    prop::collection::btree_map(names, (state, place, any::<bool>()), 0..4)
}

fn text_of(wishes: &BTreeMap<&str, (&str, Option<&str>, bool)>) -> String {
    let guests = wishes.iter().map(|(name, (state, place, follow))| {
        let place = place.map_or_else(String::new, |place| format!("where = \"{place}\"\n"));
        guest(name, &format!("state = \"{state}\"\nfollow_prices = {follow}\n{place}"))
    });
    format!("{BASE}{}", guests.collect::<String>())
}

proptest! {
    /// From any fleet to any other, broken off anywhere: the next run goes on, and the one after has nothing to do.
    #[test]
    fn any_fleet_becomes_any_other_also_after_a_break(
        first in wishes(), second in wishes(), broken_at in 0_usize..12, busy in any::<bool>(), prune in any::<bool>(),
    ) {
        let (first, second) = (fleet(&text_of(&first)), fleet(&text_of(&second)));
        let mut world = World::new();
        world.converge(&first, false);
        if let (true, Some(guest)) = (busy, world.actual.guests.first_mut()) {
            guest.operation = Some(OperationId::generate());
        }
        let plan = world.plan(&second, prune);
        plan.steps.iter().take(broken_at).for_each(|step| world.take(&second, step));
        world.converge(&second, prune);
        for wanted in &second.guests {
            let state = world.guest(&wanted.key).state;
            let is_as_wanted = match wanted.state {
                WantedState::Running => state == GuestState::Running,
                WantedState::Stopped => matches!(state, GuestState::Stopped | GuestState::Created),
                WantedState::Frozen => state == GuestState::Frozen,
            };
            prop_assert!(is_as_wanted, "{} is {state:?}", wanted.key);
        }
        let left_over = world.actual.guests.iter().filter(|guest| !second.guests.iter().any(|w| w.key.name == guest.name));
        let expected = if prune { 0 } else { first.guests.iter().filter(|g| !second.has(Kind::Guest, &g.key)).count() };
        prop_assert_eq!(left_over.count(), expected);
    }

    /// Nothing is deleted without `prune`, nor what no run of this file made.
    #[test]
    fn nothing_of_others_is_ever_deleted(first in wishes(), second in wishes(), prune in any::<bool>(), forgets in any::<bool>()) {
        let (first, second) = (fleet(&text_of(&first)), fleet(&text_of(&second)));
        let mut world = World::new();
        world.converge(&first, false);
        if forgets {
            // As if somebody else had made them.
            world.made = Made::default();
        }
        let plan = world.plan(&second, prune);
        let deleted: Vec<&Step> = plan.steps.iter().filter(|step| step.action == Action::Delete).collect();
        prop_assert!(deleted.is_empty() || (prune && !forgets));
        for step in deleted {
            prop_assert!(!second.has(step.kind, &step.key));
            prop_assert!(world.made.things.contains_key(step.id.as_ref().unwrap()));
        }
    }
}
