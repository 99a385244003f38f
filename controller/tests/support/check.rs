//! What must hold when everything has come to rest.

use std::fmt::Write as _;

use supercloud_api::{GuestState, Network, Phase, Port, Volume, handover::Owner, ids::GuestId};
use supercloud_controller::{
    overlay,
    state::{GuestRecord, HostRecord, OperationRecord, verify_chain},
};

use super::{
    agent::lock,
    ground::{Access, Mode},
    world::World,
};

impl World {
    /// Everything, for a message.
    pub async fn picture(&self) -> String {
        let mut text = String::new();
        if self.controller.is_some() {
            for guest in self.state().list::<GuestRecord>().await.unwrap() {
                writeln!(text, "guest {} operation {:?}\n  {:?}", guest.guest.name, guest.guest.operation, guest.owner)
                    .unwrap();
                if !guest.discarding.is_empty() {
                    writeln!(text, "  discarding {:?}", guest.discarding).unwrap();
                }
            }
            for id in self.state().active_operations().await.unwrap() {
                let operation = self.operation(id).await;
                writeln!(
                    text,
                    "active {id} {:?} {:?} cancel {}",
                    operation.kind, operation.phase, operation.is_cancel_requested
                )
                .unwrap();
            }
        }
        for host in &self.hosts {
            writeln!(text, "host {} {}", host.seat.host, if host.process.is_some() { "up" } else { "down" }).unwrap();
            let machines: Vec<_> =
                lock(&host.seat.disk).guests.iter().map(|(id, kept)| (*id, kept.machine.clone())).collect();
            for (id, machine) in machines {
                writeln!(text, "  {id} {:?} | {:?}", machine.source().state(), machine.destination().state()).unwrap();
            }
        }
        let ground = lock(&self.ground);
        for ((host, guest), local) in &ground.locals {
            writeln!(text, "ground {guest} at {host}: {local:?}").unwrap();
        }
        writeln!(text, "alarms {:?}\nviolations {:#?}", ground.alarms, ground.violations).unwrap();
        text
    }

    /// Whether nothing is under way anywhere any more.
    async fn is_at_rest(&self) -> bool {
        if !self.state().active_operations().await.unwrap().is_empty() {
            return false;
        }
        for guest in self.state().list::<GuestRecord>().await.unwrap() {
            let keeps_volumes = matches!(guest.owner.owner, Owner::Stopped | Owner::Lost(_));
            if guest.owner.operation.is_some() || !(guest.owner.holders.is_empty() || keeps_volumes) {
                return false;
            }
        }
        let is_quiet = |host: &super::world::Host| {
            let is_dead = lock(&self.ground).dead.contains(&host.seat.host);
            let disk = lock(&host.seat.disk);
            is_dead
                || disk.guests.values().all(|kept| {
                    kept.machine.is_quiet()
                        || matches!(
                            kept.machine.source().state(),
                            supercloud_api::handover::SourceState::Serving { .. }
                        )
                })
        };
        self.hosts.iter().all(is_quiet)
    }

    /// Waits for rest, then checks records, hosts and events against each other.
    pub async fn settled(&self) {
        self.until("rest", async |world| world.is_at_rest().await).await;
        self.until("the overlay in step", async |world| world.is_overlay_told().await).await;
        let picture = self.picture().await;
        assert!(lock(&self.ground).violations.is_empty(), "seed {}\n{picture}", self.seed);
        let mut running = 0;
        for guest in self.state().list::<GuestRecord>().await.unwrap() {
            self.check_guest(&guest.value, &picture).await;
            running += usize::from(matches!(guest.owner.owner, Owner::Host(_)));
        }
        for record in self.state().list::<OperationRecord>().await.unwrap() {
            check_operation(&record.value, &picture);
        }
        let all = lock(&self.ground).locals.clone();
        let dead = lock(&self.ground).dead.clone();
        let copies = all.iter().filter(|((host, _), l)| l.is_running() && !dead.contains(host)).count();
        assert_eq!(copies, running, "{picture}");
        let chain = verify_chain(self.state()).await.unwrap();
        assert!(chain.is_ok(), "the chain of events breaks at {chain:?}");
    }

    async fn check_guest(&self, record: &GuestRecord, picture: &str) {
        let (guest, owner) = (&record.guest, &record.owner);
        owner.check().unwrap();
        let at = match owner.owner {
            Owner::Host(host) => Some(host),
            _ => None,
        };
        let state = match owner.owner {
            Owner::Unowned => GuestState::Created,
            Owner::Host(_) => GuestState::Running,
            Owner::Frozen(_) => GuestState::Frozen,
            Owner::Stopped => GuestState::Stopped,
            Owner::Lost(_) => GuestState::Lost,
        };
        assert_eq!((guest.operation, guest.epoch, guest.state), (None, owner.epoch, state), "{picture}");
        if guest.state != GuestState::Lost {
            assert_eq!(guest.host, at, "{picture}");
        }
        for id in &guest.ports {
            let port = self.state().need::<Port>(id).await.unwrap().value;
            assert_eq!((port.host, port.prepared_at, port.moved_from), (at, None, None), "{picture}");
            assert_eq!(port.epoch, owner.epoch, "{picture}");
        }
        for id in &guest.volumes {
            let volume = self.state().need::<Volume>(id).await.unwrap().value;
            assert_eq!((volume.needed_source, volume.epoch), (None, owner.epoch), "{volume:?}\n{picture}");
            match owner.owner {
                Owner::Host(host) => assert_eq!(volume.host, Some(host), "{picture}"),
                Owner::Frozen(_) => assert_eq!(volume.host, None, "{picture}"),
                _ => {}
            }
        }
        self.check_ground(record, picture);
    }

    fn check_ground(&self, record: &GuestRecord, picture: &str) {
        let (id, owner) = (record.guest.id, &record.owner);
        let ground = lock(&self.ground);
        let expected: Vec<_> = match owner.owner {
            Owner::Host(host) => vec![(host, owner.epoch)],
            _ => Vec::new(),
        };
        assert_eq!(ground.runs_at(id), expected, "{picture}");
        for ((host, guest), local) in &ground.locals {
            if *guest != id || ground.dead.contains(host) {
                continue;
            }
            let is_owner = owner.is_owned_by(*host, owner.epoch);
            for process in &local.processes {
                assert!(is_owner && process.mode == Mode::Running, "a stray process at {host}:\n{picture}");
            }
            let Some(volume) = local.volume else { continue };
            let is_right = match volume.access {
                Access::Active(epoch) => is_owner && epoch == owner.epoch && !volume.lacks,
                Access::Sealed(epoch) => owner.holder(*host, epoch).is_some(),
                Access::Standby => false,
            };
            assert!(is_right, "a stray volume at {host}: {volume:?}\n{picture}");
        }
    }

    /// What the switch transaction holds, while the source is still needed.
    pub async fn switched(&self, guest: GuestId, from: usize, to: usize) {
        let (from, to) = (self.id(from), self.id(to));
        let record = self.record(guest).await;
        assert_eq!((record.owner.owner, record.guest.host), (Owner::Host(to), Some(to)));
        let epoch = record.owner.epoch;
        let port = self.state().need::<Port>(&record.guest.ports[0]).await.unwrap();
        assert_eq!((port.host, port.prepared_at, port.moved_from, port.epoch), (Some(to), None, Some(from), epoch));
        let volume = self.state().need::<Volume>(&record.guest.volumes[0]).await.unwrap();
        assert_eq!((volume.host, volume.needed_source, volume.epoch), (Some(to), Some(from), epoch));
    }

    /// Whether every connected host's view of the overlay is what the records give.
    async fn is_overlay_told(&self) -> bool {
        let hosts: Vec<_> = self.state().list::<HostRecord>().await.unwrap();
        let hosts: Vec<_> = hosts.into_iter().filter(|h| !h.is_removed).map(|h| h.value.host).collect();
        let networks: Vec<Network> = self.state().list().await.unwrap().into_iter().map(|n| n.value).collect();
        let ports: Vec<Port> = self.state().list().await.unwrap().into_iter().map(|p| p.value).collect();
        let guests: Vec<_> = self.state().list::<GuestRecord>().await.unwrap();
        let guests: Vec<_> = guests.into_iter().map(|g| g.value.guest).collect();
        self.hosts.iter().filter(|host| host.process.is_some()).all(|host| {
            if !hosts.iter().any(|known| known.id == host.seat.host) {
                return true;
            }
            let mut expected = overlay::view_for(host.seat.host, 0, &hosts, &networks, &ports, &guests).unwrap();
            lock(&host.seat.disk).view.as_ref().is_some_and(|told| {
                expected.revision = told.revision;
                *told == expected
            })
        })
    }

    /// That nothing at all is left of a guest.
    pub async fn gone(&self, guest: GuestId) {
        assert!(self.state().read::<GuestRecord>(&guest).await.unwrap().is_none());
        let picture = self.picture().await;
        let is_mine = |id: GuestId| id == guest;
        assert!(
            !self.state().list::<Volume>().await.unwrap().iter().any(|v| v.guest.is_some_and(is_mine)),
            "{picture}"
        );
        assert!(!self.state().list::<Port>().await.unwrap().iter().any(|p| p.guest == guest), "{picture}");
        assert!(!self.state().list::<supercloud_api::Freeze>().await.unwrap().iter().any(|f| f.guest == guest));
        let ground = lock(&self.ground);
        let left =
            ground.locals.iter().any(|((host, of), l)| *of == guest && !l.is_empty() && !ground.dead.contains(host));
        assert!(!left, "{picture}");
    }
}

/// An operation that has ended says so in every field.
fn check_operation(record: &OperationRecord, picture: &str) {
    let operation = &record.operation;
    let phases: Vec<Phase> = operation.phase_times.iter().map(|time| time.phase).collect();
    assert!(operation.phase.is_terminal() && operation.ended_at_ms.is_some(), "{operation:#?}\n{picture}");
    assert!(phases.is_sorted_by(|a, b| a < b), "phases go forward only: {phases:?}");
    assert_eq!(phases.last(), Some(&operation.phase), "{operation:#?}");
    let has_error = operation.error.is_some();
    assert_eq!(has_error, operation.phase != Phase::Done, "{operation:#?}\n{picture}");
    if operation.phase == Phase::RolledBack {
        assert!(!phases.contains(&Phase::Resume) && !phases.contains(&Phase::Finish), "{operation:#?}");
    }
}
