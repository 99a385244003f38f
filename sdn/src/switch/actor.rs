//! The task that owns a switch.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use supercloud_ids::{HostId, NetworkId, PortId};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};

use super::{Applied, Datapath, PortLook, Request, SwitchConfig, SwitchError, SwitchStatus, answer_briefly};
use crate::{
    compile::{
        Cookie, CookieKind, LocalPorts, MAX_TAP_OFPORT, MD_LISTEN, MD_OFPORT, MD_PREFIX_LEN, TUNNEL_OFPORT_BASE,
        compile, gateway_mac, md_mac,
    },
    connection::{Connection, ConnectionError, Endpoint},
    dhcp::{self, Lease},
    flows::FlowTables,
    openflow::{Action, Field, Message, PacketIn, PacketOut, PortCounters, port},
    ovsdb::{BridgeSpec, Interface, InterfaceSpec, Vswitch},
    tap::{self, Reader},
    view::OverlayView,
    wireguard::{self, Device, WireguardError},
};

const PORT_MARK: &str = "supercloud-port";
const PEER_MARK: &str = "supercloud-peer";
/// A tunnel that leads through what encrypts.
const ENCRYPTED_MARK: &str = "supercloud-encrypted";
/// How often the switch is compared with what it should be and tunnels are kept warm. Open vSwitch forgets a
/// tunnel's neighbour after 15 minutes without use.
const UPKEEP: Duration = Duration::from_secs(60);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// Messages between two barriers outside bundles.
const METER_BATCH: usize = 512;

/// OFPET_METER_MOD_FAILED.
const METER_FAILED: u16 = 12;

type Link = (Connection, mpsc::Receiver<PacketIn>);

/// Removes tunnels that an earlier configuration has left: from another address, in the clear where this host encrypts now, or the other
/// way round. Before anything else: guests' packets go through them as long as they are there.
pub(super) async fn drop_other_tunnels(config: &SwitchConfig, encrypts: bool) -> Result<(), SwitchError> {
    let vswitch = Vswitch::new(&config.ovsdb_socket, config.deadline);
    if !vswitch.bridges().await?.contains(&config.bridge) {
        return Ok(());
    }
    let own = config.overlay_addr.to_string();
    let is_other = |tunnel: &Interface| {
        tunnel.external_ids.contains_key(PEER_MARK)
            && (tunnel.options.get("local_ip") != Some(&own)
                || tunnel.external_ids.contains_key(ENCRYPTED_MARK) != encrypts)
    };
    let interfaces = vswitch.interfaces(&config.bridge).await?;
    let gone: Vec<String> = interfaces.iter().filter(|one| is_other(one)).map(|one| one.name.clone()).collect();
    if !gone.is_empty() {
        tracing::info!(tunnels = gone.len(), encrypts, "tunnels of another configuration go");
        vswitch.delete_ports(&config.bridge, &gone).await?;
    }
    Ok(())
}

pub(super) struct Actor {
    config: SwitchConfig,
    vswitch: Vswitch,
    link: Option<Link>,
    view: Option<OverlayView>,
    /// Tap name and switch port; no number while the switch has not given one.
    taps: BTreeMap<PortId, (String, Option<u32>)>,
    /// Tunnels that the database holds: peer's address and switch port.
    tunnels: BTreeMap<HostId, (Ipv4Addr, Option<u32>)>,
    md0: Option<u32>,
    userspace: bool,
    /// What encrypts, if something does; and the task that puts it right, apart from everything that waits for the switch.
    device: Option<Arc<Device>>,
    renewal: JoinSet<Result<(), WireguardError>>,
    /// Whether the switch takes meters; found out by trying.
    meters: bool,
    status: watch::Sender<SwitchStatus>,
}

impl Actor {
    pub(super) async fn open(config: SwitchConfig, status: watch::Sender<SwitchStatus>) -> Result<Self, SwitchError> {
        let vswitch = Vswitch::new(&config.ovsdb_socket, config.deadline);
        let mut actor = Self {
            config,
            vswitch,
            link: None,
            view: None,
            taps: BTreeMap::new(),
            tunnels: BTreeMap::new(),
            md0: None,
            userspace: true,
            device: None,
            renewal: JoinSet::new(),
            meters: true,
            status,
        };
        actor.ensure_bridge().await?;
        actor.open_encryption().await?;
        actor.read_ports().await?;
        actor.hand_taps().await?;
        actor.connect().await?;
        actor.status.send_modify(|s| s.connected = true);
        Ok(actor)
    }

    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        let mut upkeep = interval_at(Instant::now() + UPKEEP, UPKEEP);
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut retry = FIRST_RETRY;
        let mut retry_at = Instant::now();
        loop {
            if self.link.as_ref().is_some_and(|(c, _)| c.is_closed()) {
                tracing::warn!(bridge = self.config.bridge, "the switch went away");
                self.link = None;
                self.status.send_modify(|s| s.connected = false);
                (retry, retry_at) = (FIRST_RETRY, Instant::now() + FIRST_RETRY);
            }
            tokio::select! {
                request = queue.recv() => match request {
                    Some(request) => self.handle(request).await,
                    None => return,
                },
                packet = next_packet(&mut self.link) => {
                    if let Some(packet) = packet {
                        self.packet_in(&packet).await;
                    }
                }
                () = sleep_until(retry_at), if self.link.is_none() => {
                    match self.come_back().await {
                        Ok(()) => retry = FIRST_RETRY,
                        Err(err) => {
                            tracing::debug!(%err, "the switch is not back yet");
                            self.link = None;
                            self.note_error(&err);
                            retry = (retry * 2).min(LAST_RETRY);
                        }
                    }
                    retry_at = Instant::now() + retry;
                }
                Some(renewed) = self.renewal.join_next(), if !self.renewal.is_empty() => {
                    if let Ok(Err(error)) = renewed {
                        tracing::warn!(%error, "the encryption of the overlay could not be put right");
                        self.note_error(&SwitchError::Wireguard(error));
                    }
                }
                _ = upkeep.tick() => {
                    if let (Some(device), true) = (self.device.clone(), self.renewal.is_empty()) {
                        self.renewal.spawn(async move { device.renew().await });
                    }
                    if self.link.is_none() {
                        continue;
                    }
                    if let Err(err) = self.sync().await {
                        tracing::warn!(%err, "the switch could not be put right");
                        self.note_error(&err);
                    }
                    self.warm(None).await;
                }
            }
        }
    }

    fn note_error(&self, err: &SwitchError) {
        self.status.send_modify(|s| s.error = Some(err.to_string()));
    }

    async fn ensure_bridge(&mut self) -> Result<(), SwitchError> {
        let types = self.vswitch.datapath_types().await?;
        let has_kernel = types.iter().any(|t| t == "system");
        self.userspace = match self.config.datapath {
            // What encrypts cannot be left by a switch that comes back otherwise.
            _ if self.config.encryption.is_some() => false,
            Datapath::Netdev => true,
            Datapath::System => false,
            Datapath::Probe => !has_kernel,
        };
        self.status.send_modify(|status| status.is_in_kernel = !self.userspace);
        let datapath_type = if self.userspace { "netdev" } else { "system" }.to_owned();
        if let Some(underlay) = &self.config.underlay {
            let spec = BridgeSpec {
                name: underlay.bridge.clone(),
                datapath_type: datapath_type.clone(),
                fail_mode: "standalone".into(),
                protocols: vec![],
                other_config: BTreeMap::new(),
            };
            self.vswitch.ensure_bridge(&spec).await?;
            if let Some(uplink) = &underlay.uplink {
                let spec = InterfaceSpec { name: uplink.clone(), ..InterfaceSpec::default() };
                self.vswitch.ensure_port(&underlay.bridge, &spec).await?;
            }
        }
        let spec = BridgeSpec {
            name: self.config.bridge.clone(),
            datapath_type,
            fail_mode: "secure".into(),
            protocols: ["OpenFlow13", "OpenFlow14", "OpenFlow15"].map(String::from).to_vec(),
            other_config: [("disable-in-band".to_owned(), "true".to_owned())].into(),
        };
        self.vswitch.ensure_bridge(&spec).await?;
        self.ensure_md0().await
    }

    async fn ensure_md0(&mut self) -> Result<(), SwitchError> {
        let Some(name) = self.config.metadata_port.clone() else { return Ok(()) };
        let spec = InterfaceSpec {
            name: name.clone(),
            kind: "internal".into(),
            ofport_request: Some(MD_OFPORT),
            mac: Some(md_mac().to_string()),
            ..InterfaceSpec::default()
        };
        self.md0 = Some(self.vswitch.ensure_port(&self.config.bridge, &spec).await?);
        let set = move || {
            tap::set_ipv4(&name, MD_LISTEN, MD_PREFIX_LEN)?;
            tap::set_up(&name, None)
        };
        tokio::task::spawn_blocking(set).await.map_err(|_| SwitchError::Gone)??;
        Ok(())
    }

    /// Makes what encrypts, or removes what an earlier configuration has left of it.
    async fn open_encryption(&mut self) -> Result<(), SwitchError> {
        let kept = self.config.encryption.as_ref().map(|encryption| encryption.interface.as_str());
        wireguard::remove_others(kept).await.map_err(SwitchError::Wireguard)?;
        if let Some(encryption) = self.config.encryption.clone() {
            let device = Device::open(encryption, self.config.overlay_addr).await.map_err(SwitchError::Wireguard)?;
            self.device = Some(Arc::new(device));
        }
        Ok(())
    }

    /// Guests' taps from before a change of the datapath are read by another one now.
    async fn hand_taps(&self) -> Result<(), SwitchError> {
        let reader = if self.userspace { Reader::Userspace } else { Reader::Kernel };
        let names: Vec<String> = self.taps.values().map(|(name, _)| name.clone()).collect();
        let hand = move || names.iter().try_for_each(|name| tap::hand_to(name, reader));
        tokio::task::spawn_blocking(hand).await.map_err(|_| SwitchError::Gone)??;
        Ok(())
    }

    /// Takes up what the database holds of ours.
    async fn read_ports(&mut self) -> Result<Vec<Interface>, SwitchError> {
        let interfaces = self.vswitch.interfaces(&self.config.bridge).await?;
        self.taps.clear();
        self.tunnels.clear();
        for i in &interfaces {
            if let Some(port) = i.external_ids.get(PORT_MARK).and_then(|v| v.parse().ok()) {
                self.taps.insert(port, (i.name.clone(), i.ofport));
            }
            let peer = i.external_ids.get(PEER_MARK).and_then(|v| v.parse().ok());
            let addr = i.options.get("remote_ip").and_then(|v| v.parse().ok());
            if let (Some(peer), Some(addr)) = (peer, addr) {
                self.tunnels.insert(peer, (addr, i.ofport));
            }
        }
        Ok(interfaces)
    }

    async fn connect(&mut self) -> Result<(), SwitchError> {
        let endpoint = Endpoint::Unix(self.config.mgmt_socket.clone());
        self.link = Some(Connection::open(&endpoint, self.config.deadline).await?);
        Ok(())
    }

    /// After a restart of the switch: new connection, new port numbers, all flows.
    async fn come_back(&mut self) -> Result<(), SwitchError> {
        self.connect().await?;
        self.ensure_bridge().await?;
        self.settle_ports().await?;
        if self.view.is_some() {
            self.sync().await?;
        }
        self.vswitch.clear_restore_wait().await?;
        self.warm(None).await;
        tracing::info!(bridge = self.config.bridge, "the switch is back");
        self.status.send_modify(|s| {
            s.connected = true;
            s.reconciled += 1;
            s.error = None;
        });
        Ok(())
    }

    /// Waits until the switch has numbered what it can; a tap whose guest is gone never gets a number.
    async fn settle_ports(&mut self) -> Result<(), SwitchError> {
        let deadline = Instant::now() + self.config.deadline;
        loop {
            let interfaces = self.read_ports().await?;
            let waiting = interfaces.iter().any(|i| i.ofport.is_none() && i.error.is_none());
            if !waiting || Instant::now() >= deadline {
                return Ok(());
            }
            sleep_until(Instant::now() + Duration::from_millis(20)).await;
        }
    }

    async fn handle(&mut self, request: Request) {
        // Whoever asked may have stopped waiting.
        match request {
            Request::Attach { port, tap, reply } => drop(reply.send(self.attach(port, tap).await)),
            Request::Detach { port, reply } => drop(reply.send(self.detach(port).await)),
            Request::Apply { view, reply } => drop(reply.send(self.apply(*view).await)),
            Request::NoteSwitch { port, owner, epoch, reply } => {
                let changed = self.view.as_mut().is_some_and(|v| v.note_switch(port, owner, epoch));
                let done = if changed { self.sync().await } else { Ok(self.in_force()) };
                drop(reply.send(done));
            }
            Request::Reconcile { reply } => {
                let done = match self.settle_ports().await {
                    Ok(()) => self.sync().await,
                    Err(err) => Err(err),
                };
                drop(reply.send(done));
            }
            Request::Counters { port, reply } => drop(reply.send(self.counters(port).await)),
            Request::Look { port, network, reply } => answer_briefly(reply, self.look(port, network)).await,
            Request::Attached { reply } => {
                let list = self.taps.iter().filter_map(|(p, (name, of))| Some((*p, (name.clone(), (*of)?)))).collect();
                drop(reply.send(Ok(list)));
            }
        }
    }

    fn in_force(&self) -> Applied {
        Applied { revision: self.view.as_ref().map_or(0, |v| v.revision), ..Applied::default() }
    }

    async fn attach(&mut self, port: PortId, name: String) -> Result<u32, SwitchError> {
        if let Some((tap, _)) = self.taps.get(&port)
            && *tap != name
        {
            return Err(SwitchError::OtherTap { port, tap: tap.clone() });
        }
        let interfaces = self.vswitch.interfaces(&self.config.bridge).await?;
        let mine = interfaces.iter().find(|i| i.name == name).and_then(|i| i.ofport_request);
        let taken: BTreeSet<u32> = interfaces.iter().flat_map(|i| [i.ofport, i.ofport_request]).flatten().collect();
        let number = match mine {
            Some(number) => number,
            None => (1..=MAX_TAP_OFPORT).find(|n| !taken.contains(n)).ok_or(SwitchError::Full)?,
        };
        let spec = InterfaceSpec {
            name: name.clone(),
            ofport_request: Some(number),
            external_ids: [(PORT_MARK.to_owned(), port.to_string())].into(),
            ..InterfaceSpec::default()
        };
        let number = match self.vswitch.ensure_port(&self.config.bridge, &spec).await {
            Ok(number) => number,
            Err(err) => {
                // A port that does not work must not stay; its removal may fail for the same reason.
                let _ = self.vswitch.delete_ports(&self.config.bridge, &[name]).await;
                return Err(err.into());
            }
        };
        self.taps.insert(port, (name, Some(number)));
        if self.view.is_some() {
            self.sync().await?;
        }
        Ok(number)
    }

    async fn detach(&mut self, port: PortId) -> Result<(), SwitchError> {
        let Some((name, _)) = self.taps.remove(&port) else { return Ok(()) };
        // Flows first: a port number may be given to another tap. Where the switch is down its flows are gone.
        let flows = if self.view.is_some() { self.sync().await.map(drop) } else { Ok(()) };
        let gone = self.vswitch.delete_ports(&self.config.bridge, std::slice::from_ref(&name)).await;
        if let Err(err) = gone {
            self.taps.insert(port, (name, None));
            return Err(err.into());
        }
        match flows {
            Err(SwitchError::Down) | Ok(()) => Ok(()),
            Err(err) => Err(err),
        }
    }

    async fn apply(&mut self, mut view: OverlayView) -> Result<Applied, SwitchError> {
        view.check()?;
        if let Some(have) = &self.view {
            view.keep_newer(have);
            // What was kept may name hosts that the new view does not hold.
            view.check()?;
        }
        self.view = Some(view);
        let applied = self.sync().await;
        match &applied {
            Ok(_) => self.status.send_modify(|s| s.error = None),
            Err(err) => self.note_error(err),
        }
        applied
    }

    fn local_ports(&self) -> LocalPorts {
        LocalPorts {
            taps: self.taps.iter().filter_map(|(p, (_, n))| Some((*p, (*n)?))).collect(),
            tunnels: self.tunnels.iter().filter_map(|(h, (_, n))| Some((*h, (*n)?))).collect(),
            md0: self.md0,
            blocked: self.config.blocked.clone(),
            nd_responder: self.userspace,
            meters: self.meters,
        }
    }

    /// Brings the switch to what the view says. A switch that does not answer counts as gone.
    async fn sync(&mut self) -> Result<Applied, SwitchError> {
        let done = self.try_sync().await;
        if matches!(
            done,
            Err(SwitchError::Connection(ConnectionError::Deadline { .. } | ConnectionError::Closed { .. }))
        ) {
            self.link = None;
            self.status.send_modify(|s| s.connected = false);
        }
        done
    }

    async fn try_sync(&mut self) -> Result<Applied, SwitchError> {
        let Some(view) = self.view.clone() else { return Ok(self.in_force()) };
        if self.link.as_ref().is_none_or(|(c, _)| c.is_closed()) {
            return Err(SwitchError::Down);
        }
        let peers = wireguard::peers(&view, self.config.host, self.device.is_some())?;
        let is_met = match &self.device {
            Some(device) => device.meet(&peers).await.map_err(SwitchError::Wireguard)?,
            None => false,
        };
        let new_tunnels = self.ensure_tunnels(&view).await?;
        let mut tables = compile(&view, self.config.host, &self.local_ports())?;
        let mut programmed = self.program(&tables).await;
        if self.meters
            && matches!(programmed, Err(SwitchError::Connection(ConnectionError::Refused { kind: METER_FAILED, .. })))
        {
            tracing::warn!("the switch has no meters: DHCP requests are limited by the queue alone");
            self.meters = false;
            tables = compile(&view, self.config.host, &self.local_ports())?;
            programmed = self.program(&tables).await;
        }
        let mut applied = programmed?;
        applied.revision = view.revision;
        self.drop_tunnels(&view).await?;
        if let (Some(device), true) = (&self.device, is_met) {
            device.forget().await.map_err(SwitchError::Wireguard)?;
        }
        self.warm(Some(&new_tunnels)).await;
        self.status.send_modify(|s| {
            s.revision = Some(view.revision);
            s.flows = tables.len();
        });
        Ok(applied)
    }

    async fn program(&self, tables: &FlowTables) -> Result<Applied, SwitchError> {
        let Some((connection, _)) = &self.link else { return Err(SwitchError::Down) };
        let flows = connection.dump_flows().await?;
        let meters = connection.dump_meters().await?;
        let changes = tables.changes_from(&flows, &meters);
        for batch in changes.meters_before.chunks(METER_BATCH) {
            let messages: Vec<Message> = batch.iter().cloned().map(Message::MeterMod).collect();
            connection.tell(&messages, "meters").await?;
        }
        connection.apply_bundle(&changes.bundle()).await?;
        for batch in changes.meters_after.chunks(METER_BATCH) {
            let messages: Vec<Message> = batch.iter().cloned().map(Message::MeterMod).collect();
            connection.tell(&messages, "meters").await?;
        }
        let (added, removed) = changes.counts();
        if added + removed > 0 {
            tracing::debug!(added, removed, total = tables.len(), "flows changed");
        }
        Ok(Applied { revision: 0, flows: tables.len(), added, removed })
    }

    /// Makes the tunnels that the view wants and that are not there; returns the new ones.
    async fn ensure_tunnels(&mut self, view: &OverlayView) -> Result<Vec<HostId>, SwitchError> {
        let peers: Vec<_> = view.hosts.iter().filter(|h| h.host != self.config.host).collect();
        let missing: Vec<_> = peers
            .into_iter()
            .filter(|h| !matches!(self.tunnels.get(&h.host), Some((addr, Some(_))) if *addr == h.overlay_addr))
            .collect();
        if missing.is_empty() {
            return Ok(vec![]);
        }
        let specs: Vec<InterfaceSpec> = missing
            .iter()
            .map(|h| InterfaceSpec {
                name: format!("vx{}", h.index),
                kind: "vxlan".into(),
                options: [
                    ("remote_ip".to_owned(), h.overlay_addr.to_string()),
                    ("local_ip".to_owned(), self.config.overlay_addr.to_string()),
                    ("key".to_owned(), "flow".to_owned()),
                ]
                .into(),
                ofport_request: Some(TUNNEL_OFPORT_BASE + u32::from(h.index)),
                external_ids: std::iter::once((PEER_MARK.to_owned(), h.host.to_string()))
                    .chain(self.device.is_some().then(|| (ENCRYPTED_MARK.to_owned(), "wireguard".to_owned())))
                    .collect(),
                ..InterfaceSpec::default()
            })
            .collect();
        self.vswitch.ensure_ports(&self.config.bridge, &specs).await?;
        for (peer, spec) in missing.iter().zip(&specs) {
            let number = self.vswitch.wait_ofport(&spec.name).await?;
            // An index that went to another host took the interface with it.
            self.tunnels.retain(|_, (_, n)| *n != Some(number));
            self.tunnels.insert(peer.host, (peer.overlay_addr, Some(number)));
        }
        Ok(missing.iter().map(|h| h.host).collect())
    }

    /// Removes tunnels to hosts that the view does not hold. After the flows: nothing leads there any more.
    async fn drop_tunnels(&mut self, view: &OverlayView) -> Result<(), SwitchError> {
        let wanted: BTreeSet<HostId> = view.hosts.iter().map(|h| h.host).collect();
        if self.tunnels.keys().all(|h| wanted.contains(h)) {
            return Ok(());
        }
        let interfaces = self.vswitch.interfaces(&self.config.bridge).await?;
        let gone: Vec<String> = interfaces
            .iter()
            .filter(|i| {
                let peer = i.external_ids.get(PEER_MARK).and_then(|v| v.parse::<HostId>().ok());
                peer.is_some_and(|p| !wanted.contains(&p))
            })
            .map(|i| i.name.clone())
            .collect();
        self.vswitch.delete_ports(&self.config.bridge, &gone).await?;
        self.tunnels.retain(|h, _| wanted.contains(h));
        Ok(())
    }

    /// Sends a frame that the peer drops through each tunnel: the userspace datapath loses the first packet to a peer
    /// whose Ethernet address it does not know, and this one is not missed.
    async fn warm(&self, peers: Option<&[HostId]>) {
        let Some((connection, _)) = &self.link else { return };
        for (host, (_, number)) in &self.tunnels {
            let (Some(number), true) = (number, peers.is_none_or(|p| p.contains(host))) else { continue };
            let mut data = vec![0x02, 0x5c, 0xff, 0, 0, 3];
            data.extend(gateway_mac().0);
            // IEEE 802, local experimental ethertype 1.
            data.extend([0x88, 0xb5]);
            data.resize(60, 0);
            let actions = vec![Action::SetField(Field::TunnelId, 0), Action::output(*number)];
            let packet = PacketOut { in_port: port::CONTROLLER, actions, data };
            if let Err(err) = connection.packet_out(packet).await {
                tracing::debug!(%err, %host, "a tunnel could not be warmed");
            }
        }
    }

    async fn counters(&self, port: PortId) -> Result<PortCounters, SwitchError> {
        let Some((_, Some(number))) = self.taps.get(&port) else { return Err(SwitchError::NotAttached(port)) };
        let Some((connection, _)) = &self.link else { return Err(SwitchError::Down) };
        let list = connection.port_counters(*number).await?;
        let unexpected = SwitchError::Connection(ConnectionError::Unexpected { what: "port counters" });
        list.into_iter().find(|c| c.port == *number).ok_or(unexpected)
    }

    async fn look(&self, port: PortId, network: NetworkId) -> Result<PortLook, SwitchError> {
        let counters = self.counters(port).await?;
        let Some((connection, _)) = &self.link else { return Err(SwitchError::Down) };
        let own = Cookie::new(CookieKind::Guest, port.uuid().as_bytes());
        let mut flows = connection.dump_flows_of(own.0, Cookie::OWNER_BITS).await?;
        let flood = Cookie::new(CookieKind::Flood, network.uuid().as_bytes());
        flows.extend(connection.dump_flows_of(flood.0, u64::MAX).await?);
        let taps = self.taps.values().filter_map(|(name, number)| Some(((*number)?, name.clone())));
        let tunnels =
            self.tunnels.iter().filter_map(|(host, (_, number))| Some(((*number)?, format!("tunnel({host})"))));
        let names = taps.chain(tunnels).chain(self.md0.map(|number| (number, "metadata".to_owned()))).collect();
        Ok(PortLook { counters, flows, names })
    }

    /// A DHCP request of a local guest. The port is known by the switch port, whatever the frame says.
    async fn packet_in(&self, packet: &PacketIn) {
        let (Some(view), Some((connection, _))) = (&self.view, &self.link) else { return };
        if !Cookie(packet.cookie).is(CookieKind::Dhcp) {
            return;
        }
        let Some((number, _)) = packet.matching.get(Field::InPort) else { return };
        let number = number as u32;
        let Some(id) = self.taps.iter().find(|(_, (_, n))| *n == Some(number)).map(|(id, _)| *id) else { return };
        let Some(guest) = view.ports.iter().find(|p| p.port == id && p.host == Some(self.config.host)) else { return };
        let Some(net) = view.networks.iter().find(|n| n.network == guest.network) else { return };
        match dhcp::respond(&packet.data, &Lease::of(guest, net)) {
            Ok(data) => {
                let actions = vec![Action::output(number)];
                let answer = PacketOut { in_port: port::CONTROLLER, actions, data };
                if let Err(err) = connection.packet_out(answer).await {
                    tracing::warn!(%err, port = %id, "a DHCP answer could not be sent");
                }
            }
            Err(reason) => tracing::debug!(%reason, port = %id, "no DHCP answer"),
        }
    }
}

/// The next packet for the controller, or that the connection has ended; never, without one.
async fn next_packet(link: &mut Option<Link>) -> Option<PacketIn> {
    match link {
        Some((connection, packets)) => tokio::select! {
            packet = packets.recv() => packet,
            () = connection.closed() => None,
        },
        None => std::future::pending().await,
    }
}
