//! What an agent needs to carry out an order: the guest as it must be run, permissions, where chunks are.

use std::{net::SocketAddr, sync::PoisonError};

use supercloud_api::{
    Code, Freeze, Host, Image, ImagePart, Network, Port, Problem, Propagation, Volume,
    handover::{DestinationOrder, Order, OrderBody, SourceOrder},
    ids::{CloudId, GuestId, HostId, OperationId},
    link::{
        Answer, Assignment, BootSpec, ChunkSource, FrozenMemory, GuestSpec, MigrationOptions, Peer, PortSpec, Secret,
        ThawWish, VolumeSpec,
    },
    ticket::{Party, Ticket},
    unix_ms,
};

use super::{Engine, EngineError, handler::internal};
use crate::state::{GuestRecord, GuestSeed, HostRecord, OperationRecord, Work};

/// How long a ticket of an operation is good. It is worth nothing once the operation is over or the epoch another, and a
/// destination that still fetches must be able to dial its source anew however long the controller is away.
const TICKET_MS: u64 = 24 * 3_600_000;
/// How long a ticket for chunks is good; a host that needs more asks ([`Engine::fresh_chunk_sources`]).
const CHUNK_TICKET_MS: u64 = 15 * 60_000;
/// The most agents that are named as sources of chunks.
const CHUNK_SOURCES_AT_MOST: usize = 4;

impl Engine {
    /// The assignment that goes with an order; none where the receiver has all it needs.
    pub(super) async fn assignment_for(
        &self,
        guest: &GuestRecord,
        order: &Order,
    ) -> Result<Option<Assignment>, EngineError> {
        let operation = match &order.body {
            OrderBody::Source(SourceOrder::Begin(plan)) => plan.operation,
            OrderBody::Destination(DestinationOrder::Prepare(plan)) => plan.operation,
            OrderBody::Destination(DestinationOrder::Granted(grant)) => grant.operation,
            // A source that is the one who can dial needs fresh tickets for as long as it serves.
            OrderBody::Source(SourceOrder::Elsewhere { needed: true, .. }) => match &guest.owner.operation {
                Some(op) if op.source() == Some(order.to) && op.kind.destination().is_some() => op.id,
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        let Some(record) = self.state.read::<OperationRecord>(&operation).await? else { return Ok(None) };
        let volumes = self.volumes(guest).await?;
        let me = self.need_host(order.to).await?;
        let peer = self.peer_of(guest, &record.value, &volumes, order.to).await?;
        let frozen = self.frozen(&record.work).await?;
        let clouds = clouds_with_chunks(&volumes, frozen.as_ref());
        let chunk_sources = self.chunk_sources(guest, Some(operation), &me, &clouds).await?;
        let ticket = peer.as_ref().map(|peer| self.ticket(guest, operation, &record.value, &volumes, &me, peer));
        let (migration, grace_ms) = match &record.work {
            Work::GuestMigrate { options } => {
                // Who goes with others waits for them without standing still, where that can be.
                let holds = record.operation.part_of.is_some()
                    && record.operation.source.is_some_and(|source| self.live.takes_holds(source));
                (MigrationOptions { holds, ..options.clone() }, 0)
            }
            Work::GuestStop { grace_ms } => (MigrationOptions::default(), *grace_ms),
            _ => (MigrationOptions::default(), 0),
        };
        let mirror = match &record.work {
            Work::GuestMirror { options, .. } => Some(*options),
            _ => None,
        };
        Ok(Some(Assignment {
            operation,
            spec: self.understood(self.spec(guest, &volumes).await?, order.to, peer.as_ref()),
            peer,
            ticket,
            chunk_sources,
            migration,
            mirror,
            grace_ms,
            frozen: frozen.map(|freeze| FrozenMemory {
                freeze: freeze.id,
                root: freeze.memory_root,
                bytes: freeze.memory_bytes,
                format: freeze.memory_format,
            }),
            thaw: match &record.work {
                Work::GuestThaw { memory, .. } => (*memory).into(),
                _ => ThawWish::default(),
            },
        }))
    }

    /// Where a host that has to do with a guest gets its chunks from, with fresh tickets.
    ///
    /// # Errors
    /// When the host has nothing to do with the guest.
    pub(super) async fn fresh_chunk_sources(&self, host: HostId, guest: GuestId) -> Result<Answer, Problem> {
        let read = async {
            let Some(record) = self.state.read::<GuestRecord>(&guest).await? else { return Ok(None) };
            let owner = &record.owner;
            let operation = owner.operation.as_ref();
            let takes_part = owner.is_owned_by(host, owner.epoch)
                || owner.holders.iter().any(|holder| holder.host == host)
                || operation.is_some_and(|op| op.source() == Some(host) || op.kind.destination() == Some(host));
            let me = self.need_host_record(host).await?;
            if !takes_part || me.is_removed {
                return Ok(None);
            }
            let frozen = match operation {
                Some(op) => match self.state.read::<OperationRecord>(&op.id).await? {
                    Some(record) => self.frozen(&record.work).await?,
                    None => None,
                },
                None => None,
            };
            let clouds = clouds_with_chunks(&self.volumes(&record).await?, frozen.as_ref());
            let id = operation.map(|op| op.id);
            Ok::<_, EngineError>(Some(self.chunk_sources(&record, id, &me.host, &clouds).await?))
        };
        match read.await {
            Ok(Some(sources)) => Ok(Answer::ChunkSources { sources }),
            Ok(None) => Err(Problem::new(Code::Forbidden, "this host has nothing to do with the guest")),
            Err(error) => Err(internal(&error)),
        }
    }

    /// What a thaw brings back.
    async fn frozen(&self, work: &Work) -> Result<Option<Freeze>, EngineError> {
        let Work::GuestThaw { freeze, .. } = work else { return Ok(None) };
        Ok(self.state.read::<Freeze>(freeze).await?.map(|freeze| freeze.value))
    }

    async fn volumes(&self, guest: &GuestRecord) -> Result<Vec<Volume>, EngineError> {
        let mut volumes = Vec::new();
        for id in &guest.guest.volumes {
            volumes.push(self.state.need::<Volume>(id).await?.value);
        }
        Ok(volumes)
    }

    async fn need_host(&self, id: HostId) -> Result<Host, EngineError> {
        Ok(self.need_host_record(id).await?.host)
    }

    async fn need_host_record(&self, id: HostId) -> Result<HostRecord, EngineError> {
        Ok(self.state.need::<HostRecord>(&id).await?.value)
    }

    /// The other agent: of a migration, or the host that has the volumes of a guest that starts elsewhere.
    async fn peer_of(
        &self,
        guest: &GuestRecord,
        record: &OperationRecord,
        volumes: &[Volume],
        me: HostId,
    ) -> Result<Option<Peer>, EngineError> {
        let other = match &record.work {
            Work::GuestMigrate { .. } | Work::GuestMirror { .. } => {
                let source = guest.owner.operation.as_ref().and_then(|op| op.source()).or(record.operation.source);
                if source == Some(me) { record.operation.destination } else { source }
            }
            Work::GuestStart => self.host_with_blocks(volumes, me).await?,
            _ => None,
        };
        let Some(other) = other.filter(|other| *other != me) else { return Ok(None) };
        let host = self.need_host(other).await?;
        Ok(Some(Peer {
            host: host.id,
            name: host.name,
            data_address: host.data_address,
            certificate_sha256: host.certificate_sha256,
        }))
    }

    /// The other host with the newest blocks of a guest's volumes. What a removed host had is not to be had.
    async fn host_with_blocks(&self, volumes: &[Volume], me: HostId) -> Result<Option<HostId>, EngineError> {
        let hosts: Vec<HostId> =
            volumes.iter().flat_map(|volume| [volume.host, volume.needed_source]).flatten().collect();
        for host in hosts {
            if host != me && !self.state.need::<HostRecord>(&host).await?.is_removed {
                return Ok(Some(host));
            }
        }
        Ok(None)
    }

    /// The permission for both parties of an operation.
    fn ticket(
        &self,
        guest: &GuestRecord,
        operation: OperationId,
        record: &OperationRecord,
        volumes: &[Volume],
        me: &Host,
        peer: &Peer,
    ) -> String {
        let mine = Party { host: Some(me.id), certificate_sha256: me.certificate_sha256.clone() };
        let other = Party { host: Some(peer.host), certificate_sha256: peer.certificate_sha256.clone() };
        let is_destination = record.operation.destination == Some(me.id);
        let (source, destination) = if is_destination { (other, mine) } else { (mine, other) };
        let epoch = guest.owner.operation.as_ref().map_or(guest.owner.epoch, |op| op.from.epoch);
        self.keys.tickets.0.sign(&Ticket {
            version: Ticket::VERSION,
            operation: Some(operation),
            project: guest.guest.project,
            guest: Some(guest.guest.id),
            epoch,
            source,
            destination,
            volumes: volumes.iter().map(|volume| volume.id).collect(),
            expires_at_ms: unix_ms() + TICKET_MS,
        })
    }

    /// Where the project's chunks can be had: agents of the clouds named, and the controller's own store.
    async fn chunk_sources(
        &self,
        guest: &GuestRecord,
        operation: Option<OperationId>,
        me: &Host,
        clouds: &[CloudId],
    ) -> Result<Vec<ChunkSource>, EngineError> {
        let sign = |source: Party| {
            self.keys.tickets.0.sign(&Ticket {
                version: Ticket::VERSION,
                operation,
                project: guest.guest.project,
                guest: None,
                epoch: guest.owner.epoch,
                source,
                destination: Party { host: Some(me.id), certificate_sha256: me.certificate_sha256.clone() },
                volumes: Vec::new(),
                expires_at_ms: unix_ms() + CHUNK_TICKET_MS,
            })
        };
        let mut sources = Vec::new();
        for record in self.state.list::<HostRecord>().await? {
            let host = &record.host;
            let is_there = clouds.contains(&host.cloud) && host.cloud != me.cloud && !record.is_removed;
            let Some(address) = host.data_address.filter(|_| is_there && self.sessions.is_open(host.id)) else {
                continue;
            };
            let certificate_sha256 = host.certificate_sha256.clone();
            let ticket = sign(Party { host: Some(host.id), certificate_sha256: certificate_sha256.clone() });
            sources.push(ChunkSource { address, certificate_sha256, ticket });
            if sources.len() == CHUNK_SOURCES_AT_MOST {
                break;
            }
        }
        let certificate_sha256 = self.reach.certificate_sha256.clone();
        let ticket = sign(Party { host: None, certificate_sha256: certificate_sha256.clone() });
        sources.push(ChunkSource { address: self.link_address().await?, certificate_sha256, ticket });
        Ok(sources)
    }

    async fn link_address(&self) -> Result<SocketAddr, EngineError> {
        let text = &self.reach.link_address;
        if let Ok(address) = text.parse() {
            return Ok(address);
        }
        let broken = |why: String| EngineError::Broken(format!("link_address '{text}' cannot be resolved: {why}"));
        let mut found = tokio::net::lookup_host(text).await.map_err(|error| broken(error.to_string()))?;
        found.next().ok_or_else(|| broken("no address".into()))
    }

    /// A specification as these hosts understand it: one of the version before knows no `predictive`.
    fn understood(&self, mut spec: GuestSpec, to: HostId, peer: Option<&Peer>) -> GuestSpec {
        let hosts = std::iter::once(to).chain(peer.map(|peer| peer.host));
        let knowing = self.knows_predictive.lock().unwrap_or_else(PoisonError::into_inner);
        if !hosts.into_iter().all(|host| knowing.contains(&host)) {
            for volume in spec.volumes.iter_mut().filter(|volume| volume.propagation == Propagation::Predictive) {
                volume.propagation = Propagation::HotStandby;
            }
        }
        spec
    }

    /// The guest as it must be run, the same wherever it runs.
    async fn spec(&self, guest: &GuestRecord, volumes: &[Volume]) -> Result<GuestSpec, EngineError> {
        let shown = &guest.guest;
        let image = self.state.need::<Image>(&shown.image).await?.value;
        let seed = self.state.read::<GuestSeed>(&shown.id).await?.map(|seed| seed.value);
        let mut ports = Vec::new();
        for id in &shown.ports {
            let port = self.state.need::<Port>(id).await?.value;
            let network = self.state.need::<Network>(&port.network).await?.value;
            ports.push(PortSpec {
                port: port.id,
                network: network.id,
                mac: port.mac,
                ipv4: port.ipv4,
                mtu: network.mtu,
            });
        }
        let extra = seed.as_ref().and_then(|seed| seed.cmdline_extra.clone());
        Ok(GuestSpec {
            guest: shown.id,
            name: shown.name.clone(),
            project: shown.project,
            project_key: Secret(self.state.project_key(&self.keys.root, shown.project).await?),
            shape: shown.shape,
            compat_class: shown.compat_class.clone(),
            boot: boot(&image, extra.as_deref()),
            volumes: volumes
                .iter()
                .map(|volume| VolumeSpec {
                    volume: volume.id,
                    size_bytes: volume.size_bytes,
                    base_root: volume.base.clone(),
                    propagation: volume.propagation,
                })
                .collect(),
            ports,
            user_data: seed.and_then(|seed| seed.user_data),
        })
    }
}

/// The clouds whose stores hold what a guest's volumes and memory are made of.
fn clouds_with_chunks(volumes: &[Volume], frozen: Option<&Freeze>) -> Vec<CloudId> {
    volumes.iter().filter_map(|volume| volume.base_cloud).chain(frozen.map(|freeze| freeze.cloud)).collect()
}

/// How a guest of this image boots: by its kernel if it has one, else from its disk.
fn boot(image: &Image, extra: Option<&str>) -> BootSpec {
    let root = |part| image.parts.iter().find(|content| content.part == part).map(|content| content.root.clone());
    match root(ImagePart::Kernel) {
        None => BootSpec::Disk,
        Some(kernel_root) => {
            let words = [image.cmdline.as_deref().unwrap_or_default(), extra.unwrap_or_default()];
            BootSpec::Kernel {
                image: image.id,
                kernel_root,
                initrd_root: root(ImagePart::Initrd),
                cmdline: words.join(" ").trim().to_owned(),
            }
        }
    }
}
