//! Guests' ports on this host: taps, and the switch that connects them.

use std::collections::BTreeMap;

use supercloud_api::{
    FlowPurpose, OverlayEncryption, PortFlow, PortTraffic,
    link::{FlowsOf, FlowsTold, MAX_PORT_FLOWS},
};
use supercloud_blanket::BoxFuture;
use supercloud_ids::{Epoch, HostId, PortId};
use supercloud_sdn::{
    compile::{Cookie, CookieKind},
    openflow::FlowStats,
    shown::{self, PortNames},
    switch::{PortLook, SwitchDriver, SwitchError},
    tap::{self, Reader, TapError},
    view::OverlayView,
};

/// Why a port could not be attached or changed.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The host has no overlay.
    #[error("this host has no overlay address (overlay_address in its configuration): its guests cannot have ports")]
    NoOverlay,
    /// The tap.
    #[error("port {port}: its tap failed")]
    Tap {
        /// The port.
        port: PortId,
        /// Why.
        #[source]
        source: TapError,
    },
    /// The switch.
    #[error("the switch failed")]
    Switch(#[from] SwitchError),
    /// A worker thread died.
    #[error("a worker died")]
    Worker(#[from] tokio::task::JoinError),
}

type PortResult<T> = Result<T, PortError>;

/// What the agent wants of its switch.
pub trait Switch: Send + Sync {
    /// Makes the port's tap and attaches it; gives the tap's name. Repeating it changes nothing.
    fn attach(&self, port: PortId, mtu: u16) -> BoxFuture<'_, PortResult<String>>;
    /// Removes flows, switch port and tap. `Ok` when there is none.
    fn detach(&self, port: PortId) -> BoxFuture<'_, PortResult<()>>;
    /// This host owns the port from this epoch on: it may speak.
    fn own(&self, port: PortId, epoch: Epoch) -> BoxFuture<'_, PortResult<()>>;
    /// Puts a view in force.
    fn apply(&self, view: OverlayView) -> BoxFuture<'_, PortResult<()>>;
    /// The ports that are attached: tap and switch port.
    fn attached(&self) -> BoxFuture<'_, PortResult<BTreeMap<PortId, (String, u32)>>>;
    /// What the switch holds for an attached port.
    fn flows(&self, of: FlowsOf) -> BoxFuture<'_, PortResult<FlowsTold>>;
    /// The revision of the view in force; 0 before the first.
    fn revision(&self) -> u64;
    /// How this host's tunnels are encrypted, as others must know it; none: not.
    fn encryption(&self) -> Option<OverlayEncryption>;
}

/// Open vSwitch.
pub struct OvsSwitch {
    driver: SwitchDriver,
    host: HostId,
    encryption: Option<OverlayEncryption>,
}

impl OvsSwitch {
    /// Around a driver that is open, and encrypts like this.
    #[must_use]
    pub fn new(driver: SwitchDriver, host: HostId, encryption: Option<OverlayEncryption>) -> Self {
        Self { driver, host, encryption }
    }
}

/// The longest text of a match or of actions that is told, in characters.
const TEXT_AT_MOST: usize = 400;

fn cut(text: String) -> String {
    match text.char_indices().nth(TEXT_AT_MOST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

fn purpose(cookie: u64) -> FlowPurpose {
    match Cookie(cookie).kind() {
        Some(CookieKind::Guest) => FlowPurpose::Guest,
        Some(CookieKind::Dhcp) => FlowPurpose::Dhcp,
        Some(CookieKind::Metadata) => FlowPurpose::Metadata,
        Some(CookieKind::Tunnel) => FlowPurpose::Tunnel,
        Some(CookieKind::Deliver) => FlowPurpose::Deliver,
        Some(CookieKind::Remote) => FlowPurpose::Remote,
        Some(CookieKind::Forward) => FlowPurpose::Forward,
        Some(CookieKind::Flood) => FlowPurpose::Flood,
        Some(CookieKind::Default | CookieKind::Answer | CookieKind::Blocked) | None => FlowPurpose::Other,
    }
}

fn flow(flow: &FlowStats, names: &PortNames) -> PortFlow {
    PortFlow {
        purpose: purpose(flow.cookie),
        table: flow.table,
        priority: flow.priority,
        packets: flow.packets,
        bytes: flow.bytes,
        age_s: flow.duration_s,
        matching: cut(shown::matching(&flow.matching, names)),
        actions: cut(shown::actions(&flow.instructions, names)),
    }
}

/// As it is told: in the order in which packets meet the flows, and no more of them than a message may hold.
fn told(look: PortLook) -> FlowsTold {
    let PortLook { counters, mut flows, names } = look;
    flows.sort_by(|a, b| (a.table, b.priority, &a.matching).cmp(&(b.table, a.priority, &b.matching)));
    let left_out = flows.len().saturating_sub(MAX_PORT_FLOWS);
    FlowsTold {
        traffic: PortTraffic {
            sent_packets: counters.rx_packets,
            sent_bytes: counters.rx_bytes,
            received_packets: counters.tx_packets,
            received_bytes: counters.tx_bytes,
            dropped_packets: counters.rx_dropped.saturating_add(counters.tx_dropped),
        },
        flows: flows.iter().take(MAX_PORT_FLOWS).map(|one| flow(one, &names)).collect(),
        left_out: u32::try_from(left_out).unwrap_or(u32::MAX),
    }
}

/// A switch that is away takes what it was told when it comes back.
fn or_later<T>(result: Result<T, SwitchError>) -> PortResult<()> {
    match result {
        Ok(_) => Ok(()),
        Err(SwitchError::Down) => {
            tracing::warn!("the switch is down; the change waits for it");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

impl Switch for OvsSwitch {
    fn attach(&self, port: PortId, mtu: u16) -> BoxFuture<'_, PortResult<String>> {
        Box::pin(async move {
            let name = tap::tap_name(port);
            let made = name.clone();
            let is_in_kernel = self.driver.status().borrow().is_in_kernel;
            let reader = if is_in_kernel { Reader::Kernel } else { Reader::Userspace };
            tokio::task::spawn_blocking(move || tap::create(&made, mtu, None, reader))
                .await?
                .map_err(|source| PortError::Tap { port, source })?;
            self.driver.attach_tap(port, &name).await?;
            Ok(name)
        })
    }

    fn detach(&self, port: PortId) -> BoxFuture<'_, PortResult<()>> {
        Box::pin(async move {
            or_later(self.driver.detach(port).await)?;
            let name = tap::tap_name(port);
            tokio::task::spawn_blocking(move || tap::remove(&name))
                .await?
                .map_err(|source| PortError::Tap { port, source })
        })
    }

    fn own(&self, port: PortId, epoch: Epoch) -> BoxFuture<'_, PortResult<()>> {
        Box::pin(async move { or_later(self.driver.note_switch(port, self.host, epoch).await) })
    }

    fn apply(&self, view: OverlayView) -> BoxFuture<'_, PortResult<()>> {
        Box::pin(async move { or_later(self.driver.apply(view).await) })
    }

    fn attached(&self) -> BoxFuture<'_, PortResult<BTreeMap<PortId, (String, u32)>>> {
        Box::pin(async move { Ok(self.driver.attached().await?) })
    }

    fn flows(&self, of: FlowsOf) -> BoxFuture<'_, PortResult<FlowsTold>> {
        Box::pin(async move { Ok(told(self.driver.look(of.port, of.network).await?)) })
    }

    fn revision(&self) -> u64 {
        self.driver.status().borrow().revision.unwrap_or(0)
    }

    fn encryption(&self) -> Option<OverlayEncryption> {
        self.encryption.clone()
    }
}

/// A host without an overlay: guests without ports only.
pub struct NoSwitch;

impl Switch for NoSwitch {
    fn attach(&self, _port: PortId, _mtu: u16) -> BoxFuture<'_, PortResult<String>> {
        Box::pin(async { Err(PortError::NoOverlay) })
    }

    fn detach(&self, _port: PortId) -> BoxFuture<'_, PortResult<()>> {
        Box::pin(async { Ok(()) })
    }

    fn own(&self, _port: PortId, _epoch: Epoch) -> BoxFuture<'_, PortResult<()>> {
        Box::pin(async { Err(PortError::NoOverlay) })
    }

    fn apply(&self, _view: OverlayView) -> BoxFuture<'_, PortResult<()>> {
        Box::pin(async { Ok(()) })
    }

    fn attached(&self) -> BoxFuture<'_, PortResult<BTreeMap<PortId, (String, u32)>>> {
        Box::pin(async { Ok(BTreeMap::new()) })
    }

    fn flows(&self, _of: FlowsOf) -> BoxFuture<'_, PortResult<FlowsTold>> {
        Box::pin(async { Err(PortError::NoOverlay) })
    }

    fn revision(&self) -> u64 {
        0
    }

    fn encryption(&self) -> Option<OverlayEncryption> {
        None
    }
}
