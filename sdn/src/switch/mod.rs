//! The driver of one host's switch: the agent hands it views and taps; it keeps the switch so.
//!
//! One task owns the state. It holds the OpenFlow connection, makes tunnels, compiles flows, and sends the switch only
//! what differs, in one atomic bundle; it answers DHCP; and when the switch restarts, it connects anew and puts
//! everything back. `set-controller` is never used: Open vSwitch flushes all flows with the first and the last one.
//! A bridge in `secure` mode without flows drops everything, and a bundle takes effect at once, so a restarted switch
//! is never half programmed; a `flow-restore-wait` that an init script left is cleared when the flows are in.

mod actor;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use supercloud_ids::{Epoch, HostId, NetworkId, PortId};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::timeout,
};

use crate::{
    addr::Ipv4Prefix,
    connection::ConnectionError,
    openflow::{FlowStats, PortCounters},
    ovsdb::OvsdbError,
    shown::PortNames,
    tap::TapError,
    view::{OverlayView, ViewError},
    wireguard::{PeersError, WireguardConfig, WireguardError},
};

/// Which datapath the bridge uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Datapath {
    /// In the switch's own process: works on every kernel.
    #[default]
    Netdev,
    /// In the kernel (module `openvswitch`).
    System,
    /// In the kernel where the switch offers it, else in its process.
    Probe,
}

/// The bridge that carries tunnels to the wire, where the driver is to make it. The userspace datapath needs one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Its name; the overlay address is its interface's, which the host's set-up gives it.
    pub bridge: String,
    /// The interface to the wire.
    pub uplink: Option<String>,
}

/// What the driver must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// This host.
    pub host: HostId,
    /// The database's socket.
    pub ovsdb_socket: PathBuf,
    /// The bridge's OpenFlow management socket (`<rundir>/<bridge>.mgmt`).
    pub mgmt_socket: PathBuf,
    /// The integration bridge. It belongs to the driver: foreign flows are removed.
    pub bridge: String,
    /// The datapath.
    pub datapath: Datapath,
    /// This host's end of the tunnels.
    pub overlay_addr: Ipv4Addr,
    /// The underlay bridge, where the driver is to make it.
    pub underlay: Option<Underlay>,
    /// The interface by which the metadata service sees guests; none for no metadata.
    pub metadata_port: Option<String>,
    /// Destinations that guests must not reach: underlay, hosts, controllers.
    pub blocked: Vec<Ipv4Prefix>,
    /// How this host's tunnels are encrypted; none: not. It takes the kernel's datapath.
    pub encryption: Option<WireguardConfig>,
    /// How long each exchange with the switch may take.
    pub deadline: Duration,
}

impl SwitchConfig {
    /// The usual: bridge `br-int` with sockets in Open vSwitch's run directory, userspace datapath, `md0`.
    #[must_use]
    pub fn new(host: HostId, rundir: &Path, overlay_addr: Ipv4Addr) -> Self {
        Self {
            host,
            ovsdb_socket: rundir.join("db.sock"),
            mgmt_socket: rundir.join("br-int.mgmt"),
            bridge: "br-int".into(),
            datapath: Datapath::Netdev,
            overlay_addr,
            underlay: None,
            metadata_port: Some("md0".into()),
            blocked: vec![],
            encryption: None,
            deadline: Duration::from_secs(10),
        }
    }
}

/// Why the driver could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The switch's database.
    #[error(transparent)]
    Ovsdb(#[from] OvsdbError),
    /// The switch's OpenFlow.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The view does not pass its check. The former one stays in force.
    #[error(transparent)]
    View(#[from] ViewError),
    /// An interface of the host.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A host of the view is of the other kind.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The interface that encrypts.
    #[error("the encryption of the overlay failed: {0}")]
    Wireguard(WireguardError),
    /// No tap is attached for the port.
    #[error("no tap is attached for port {0}")]
    NotAttached(PortId),
    /// Another tap is attached for the port.
    #[error("port {port} has the tap {tap} already")]
    OtherTap {
        /// The port.
        port: PortId,
        /// Its tap.
        tap: String,
    },
    /// All switch ports for taps are taken.
    #[error("the switch has no port left for a tap")]
    Full,
    /// The switch is not there now; what was asked takes effect when it is back.
    #[error("the switch is down; the change waits for it")]
    Down,
    /// The driver has ended, or did not get to it in time.
    #[error("the switch driver did not answer")]
    Gone,
}

/// What applying a view changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// The revision now in force.
    pub revision: u64,
    /// Flows in the switch.
    pub flows: usize,
    /// Flows added or replaced.
    pub added: usize,
    /// Flows removed.
    pub removed: usize,
}

/// How the switch is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SwitchStatus {
    /// Whether it is connected and programmed.
    pub connected: bool,
    /// The datapath is the kernel's.
    pub is_in_kernel: bool,
    /// The view's revision in force.
    pub revision: Option<u64>,
    /// Times that the switch was found anew and put right.
    pub reconciled: u64,
    /// Flows in the switch.
    pub flows: usize,
    /// The last thing that went wrong, until something goes right.
    pub error: Option<String>,
}

/// What the switch holds for a port at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortLook {
    /// What has passed by it: `rx` is what the guest sent.
    pub counters: PortCounters,
    /// The flows that are for it, and those that carry its network's broadcasts.
    pub flows: Vec<FlowStats>,
    /// What the switch's ports are called.
    pub names: PortNames,
}

pub(crate) type Reply<T> = oneshot::Sender<Result<T, SwitchError>>;

/// How long the switch may take for a look; what guests need, a cut-over for one, waits for it.
const LOOK_BUDGET: Duration = Duration::from_millis(500);

/// Answers a question that is asked of curiosity: not at all when nobody waits any more, and in [`LOOK_BUDGET`] in all.
async fn answer_briefly<T>(reply: Reply<T>, looking: impl Future<Output = Result<T, SwitchError>>) {
    if reply.is_closed() {
        return;
    }
    let deadline = ConnectionError::Deadline { what: "a look at a port", deadline: LOOK_BUDGET };
    let looked = tokio::time::timeout(LOOK_BUDGET, looking).await.unwrap_or_else(|_| Err(deadline.into()));
    // The asker may have left meanwhile.
    drop(reply.send(looked));
}

pub(crate) enum Request {
    Attach { port: PortId, tap: String, reply: Reply<u32> },
    Detach { port: PortId, reply: Reply<()> },
    Apply { view: Box<OverlayView>, reply: Reply<Applied> },
    NoteSwitch { port: PortId, owner: HostId, epoch: Epoch, reply: Reply<Applied> },
    Reconcile { reply: Reply<Applied> },
    Counters { port: PortId, reply: Reply<PortCounters> },
    Look { port: PortId, network: NetworkId, reply: Reply<PortLook> },
    Attached { reply: Reply<BTreeMap<PortId, (String, u32)>> },
}

/// The driver. Dropping it ends its task; the switch goes on as it is.
#[derive(Debug)]
pub struct SwitchDriver {
    requests: mpsc::Sender<Request>,
    status: watch::Receiver<SwitchStatus>,
    patience: Duration,
    _task: JoinSet<()>,
}

/// Removes the tunnels that an earlier configuration of this host has left and that are not what this one asks for: from another overlay
/// address, in the clear where it `encrypts` now, or the other way round. Say it before the driver is opened, so that nothing that then
/// fails leaves guests talking in the clear. Others are made anew with the first view.
///
/// # Errors
/// When the switch's database is away.
pub async fn drop_other_tunnels(config: &SwitchConfig, encrypts: bool) -> Result<(), SwitchError> {
    timeout(config.deadline.saturating_mul(2), actor::drop_other_tunnels(config, encrypts))
        .await
        .map_err(|_| SwitchError::Gone)?
}

impl SwitchDriver {
    /// Makes or finds the bridge, takes up the taps that an earlier driver attached, and connects. Flows stay as they
    /// are until the first view comes.
    pub async fn open(config: SwitchConfig) -> Result<Self, SwitchError> {
        let patience = config.deadline.saturating_mul(6);
        let (requests, queue) = mpsc::channel(64);
        let (status_tx, status) = watch::channel(SwitchStatus::default());
        let actor = timeout(patience, actor::Actor::open(config, status_tx)).await.map_err(|_| SwitchError::Gone)??;
        let mut task = JoinSet::new();
        task.spawn(actor.run(queue));
        Ok(Self { requests, status, patience, _task: task })
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, SwitchError> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.requests.send(request(reply)).await.map_err(|_| SwitchError::Gone)?;
            answer.await.map_err(|_| SwitchError::Gone)?
        };
        timeout(self.patience, exchange).await.map_err(|_| SwitchError::Gone)?
    }

    /// Attaches a tap that exists as the port's; returns its switch port, which stays the same over restarts. The
    /// same tap again changes nothing. The guest can be heard when the view says that it runs here.
    pub async fn attach_tap(&self, port: PortId, tap: &str) -> Result<u32, SwitchError> {
        let tap = tap.to_owned();
        self.ask(|reply| Request::Attach { port, tap, reply }).await
    }

    /// Removes a port's flows and its tap from the switch; the tap itself stays. One that is not there counts as done.
    pub async fn detach(&self, port: PortId) -> Result<(), SwitchError> {
        self.ask(|reply| Request::Detach { port, reply }).await
    }

    /// Puts a view in force: tunnels, then flows, the differences only, at once. When the switch is down it takes
    /// effect when it is back, and `Down` is returned.
    pub async fn apply(&self, view: OverlayView) -> Result<Applied, SwitchError> {
        self.ask(|reply| Request::Apply { view: Box::new(view), reply }).await
    }

    /// Takes in a switch of ownership before the controller's view tells it, see [`OverlayView::note_switch`]. Views
    /// with an older epoch of the port do not undo it.
    pub async fn note_switch(&self, port: PortId, owner: HostId, epoch: Epoch) -> Result<Applied, SwitchError> {
        self.ask(|reply| Request::NoteSwitch { port, owner, epoch, reply }).await
    }

    /// Compares the switch with what it should be and puts it right.
    pub async fn reconcile(&self) -> Result<Applied, SwitchError> {
        self.ask(|reply| Request::Reconcile { reply }).await
    }

    /// Counters of a port: `rx` is what the guest sent.
    pub async fn port_counters(&self, port: PortId) -> Result<PortCounters, SwitchError> {
        self.ask(|reply| Request::Counters { port, reply }).await
    }

    /// What the switch holds for a port whose tap is attached.
    pub async fn look(&self, port: PortId, network: NetworkId) -> Result<PortLook, SwitchError> {
        self.ask(|reply| Request::Look { port, network, reply }).await
    }

    /// The attached taps: name and switch port.
    pub async fn attached(&self) -> Result<BTreeMap<PortId, (String, u32)>, SwitchError> {
        self.ask(|reply| Request::Attached { reply }).await
    }

    /// How the switch is, and every change of that.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<SwitchStatus> {
        self.status.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_look_holds_nobody_up() {
        let (reply, asker) = oneshot::channel::<Result<(), SwitchError>>();
        drop(asker);
        answer_briefly(reply, async { panic!("nobody waits for it") }).await;
        let (reply, asker) = oneshot::channel::<Result<(), SwitchError>>();
        answer_briefly(reply, std::future::pending()).await;
        let told = asker.await.unwrap();
        assert!(matches!(told, Err(SwitchError::Connection(ConnectionError::Deadline { .. }))), "{told:?}");
        let (reply, asker) = oneshot::channel();
        answer_briefly(reply, async { Ok(7) }).await;
        assert_eq!(asker.await.unwrap().unwrap(), 7);
    }
}
