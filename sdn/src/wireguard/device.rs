//! The interface in the kernel, by `ip`, `wg` and `nft`.

use std::{collections::BTreeSet, io, net::Ipv4Addr, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::{io::AsyncWriteExt as _, process::Command, sync::Mutex, time::timeout};

use super::{
    BadKey, DEVICE_MTU, GROUP, PRIORITY, Peer, PrivateKey, PublicKey, RULES, TABLE, WireguardConfig, routes, rules,
    settings,
};

/// How long a command may take; hosts that are emulated start programs slowly.
const BUDGET: Duration = Duration::from_secs(10);
/// How much of a command's complaint is told on, in characters.
const SAID: usize = 300;

/// Why the interface is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum WireguardError {
    /// A program is not there, or cannot be started.
    #[error("cannot run '{program}' (packages wireguard-tools, iproute2 and nftables)")]
    Start {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It did not end in time.
    #[error("'{0}' did not end within {BUDGET:?}")]
    Deadline(String),
    /// It refused.
    #[error("'{command}' failed: {said}")]
    Refused {
        /// With its arguments.
        command: String,
        /// What it said.
        said: String,
    },
    /// The kernel has no such interfaces, or does not let this process make one.
    #[error("this kernel makes no WireGuard interface (Linux 5.6 and newer have them, as a module): {0}")]
    NotThere(String),
    /// Somebody else's interface has the name.
    #[error(
        "the interface {name} is there, and 'wg' does not take it for a WireGuard interface ({said}): remove it, or say another \
         [wireguard] interface"
    )]
    OtherInterface {
        /// Which.
        name: String,
        /// What `wg` says of it.
        said: String,
    },
    /// What a program said is not understood.
    #[error("what '{0}' said is not understood")]
    Answer(&'static str),
    /// A key that is none.
    #[error(transparent)]
    Key(#[from] BadKey),
}

/// Runs a program; its standard output.
async fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<String, WireguardError> {
    let command = || format!("{program} {}", arguments.join(" "));
    let start = |source| WireguardError::Start { program, source };
    let work = async {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        let stdin = child.stdin.take();
        // Written while its answer is read, so that neither waits for the other.
        let feed = async {
            if let Some(mut stdin) = stdin {
                // One that does not read to the end says itself why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        let (output, ()) = tokio::join!(child.wait_with_output(), feed);
        output.map_err(start)
    };
    let output = timeout(BUDGET, work).await.map_err(|_| WireguardError::Deadline(command()))??;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().chars().take(SAID).collect();
        return Err(WireguardError::Refused { command: command(), said });
    }
    String::from_utf8(output.stdout).map_err(|_| WireguardError::Answer(program))
}

/// Commands for `ip`, one per line; none is fine.
async fn batch(commands: &str) -> Result<(), WireguardError> {
    if commands.is_empty() { Ok(()) } else { run("ip", &["-batch", "-"], commands).await.map(drop) }
}

/// A new private key.
///
/// # Errors
/// When `wg` cannot be run.
pub async fn make_key() -> Result<PrivateKey, WireguardError> {
    Ok(run("wg", &["genkey"], "").await?.parse()?)
}

/// The public key of a private one.
///
/// # Errors
/// When `wg` cannot be run.
pub async fn public_key(of: &PrivateKey) -> Result<PublicKey, WireguardError> {
    Ok(run("wg", &["pubkey"], &of.reveal()).await?.trim_ascii_end().parse()?)
}

/// Removes what earlier configurations have left: interfaces of ours but `kept`, and without that the packet rules, too, by which tunnels
/// in the clear are dropped.
///
/// # Errors
/// When something is left that cannot be removed. That there is no `nft` at all means that there are no rules.
pub async fn remove_others(kept: Option<&str>) -> Result<(), WireguardError> {
    if kept.is_none() {
        match run("nft", &["-f", "-"], &format!("add table {RULES}\ndelete table {RULES}\n")).await {
            Ok(_) => {}
            Err(WireguardError::Start { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            // Whatever the kernel cannot do it has not done before.
            Err(error) => tracing::debug!(%error, "no packet rules to remove"),
        }
    }
    let group = GROUP.to_string();
    let shown = run("ip", &["-json", "link", "show", "group", &group], "").await?;
    let ours: Vec<Interface> = parse(&shown, "ip link")?;
    for old in ours.iter().filter(|one| !one.ifname.is_empty() && Some(one.ifname.as_str()) != kept) {
        run("ip", &["link", "delete", "dev", &old.ifname], "").await?;
    }
    Ok(())
}

/// What `ip -json` says; nothing at all means: none.
fn parse<T: for<'de> Deserialize<'de>>(said: &str, program: &'static str) -> Result<Vec<T>, WireguardError> {
    let said = if said.trim().is_empty() { "[]" } else { said };
    serde_json::from_str(said).map_err(|_| WireguardError::Answer(program))
}

#[derive(Deserialize)]
struct Interface {
    /// Interfaces of other groups are shown as nothing, but shown.
    #[serde(default)]
    ifname: String,
}

#[derive(Deserialize)]
struct Addresses {
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    local: Ipv4Addr,
    prefixlen: u8,
}

#[derive(Deserialize)]
struct Route {
    dst: String,
}

#[derive(Deserialize)]
struct Rule {
    priority: u32,
    #[serde(default)]
    src: String,
    #[serde(default)]
    dport: Option<u16>,
    #[serde(default)]
    sport: Option<u16>,
}

/// This host's interface.
#[derive(Debug)]
pub struct Device {
    config: WireguardConfig,
    overlay_addr: Ipv4Addr,
    /// Whom it speaks with, once that is known. One at a time changes the kernel.
    peers: Mutex<Option<Vec<Peer>>>,
}

impl Device {
    /// Makes the interface, or takes the one that is there; gives it its address; and the rules by which nothing passes beside it.
    ///
    /// # Errors
    /// When this kernel has none, or a program fails. Nothing of the host's may be tunnelled then.
    pub async fn open(config: WireguardConfig, overlay_addr: Ipv4Addr) -> Result<Self, WireguardError> {
        let device = Self { config, overlay_addr, peers: Mutex::new(None) };
        device.ensure().await?;
        Ok(device)
    }

    async fn ensure(&self) -> Result<(), WireguardError> {
        let name = self.config.interface.as_str();
        // First: a tunnel's packet that finds no interface must not go another way.
        run("nft", &["-f", "-"], &rules(name, self.overlay_addr)).await?;
        self.ensure_link().await?;
        let shown = run("ip", &["-json", "-4", "address", "show", "dev", name], "").await?;
        let shown: Vec<Addresses> = parse(&shown, "ip address")?;
        let mut commands = format!("address replace {}/32 dev {name}\n", self.overlay_addr);
        for old in shown.iter().flat_map(|one| &one.addr_info).filter(|one| one.local != self.overlay_addr) {
            commands += &format!("address delete {}/{} dev {name}\n", old.local, old.prefixlen);
        }
        commands += &format!("link set dev {name} group {GROUP} mtu {DEVICE_MTU} up\n");
        // A tunnel's packet for which the table has no peer goes nowhere.
        commands += &format!("route replace blackhole default table {TABLE}\n");
        batch(&commands).await?;
        self.ensure_rules().await
    }

    async fn ensure_link(&self) -> Result<(), WireguardError> {
        let name = self.config.interface.as_str();
        match run("ip", &["link", "add", "dev", name, "type", "wireguard"], "").await {
            Ok(_) => Ok(()),
            Err(WireguardError::Refused { said, .. }) if said.contains("exists") => {
                let kind = run("wg", &["show", name, "listen-port"], "").await;
                kind.map(drop).map_err(|error| match error {
                    WireguardError::Refused { said, .. } => WireguardError::OtherInterface { name: name.into(), said },
                    other => other,
                })
            }
            Err(WireguardError::Refused { said, .. }) => Err(WireguardError::NotThere(said)),
            Err(other) => Err(other),
        }
    }

    /// That tunnels' packets of this host, and only they, follow the table: on their way out; and in the question where a packet that came
    /// in would be answered to (a strict `rp_filter`), in which the ports are the other way round.
    async fn ensure_rules(&self) -> Result<(), WireguardError> {
        let (priority, table) = (PRIORITY.to_string(), TABLE.to_string());
        let shown = run("ip", &["-json", "-4", "rule", "show"], "").await?;
        let shown: Vec<Rule> = parse(&shown, "ip rule")?;
        let own = self.overlay_addr.to_string();
        let ours: Vec<&Rule> = shown.iter().filter(|rule| rule.priority == PRIORITY).collect();
        for (side, is_there) in [
            ("dport", ours.iter().any(|rule| rule.src == own && rule.dport.is_some())),
            ("sport", ours.iter().any(|rule| rule.src == own && rule.sport.is_some())),
        ] {
            if !is_there {
                let rule = ["priority", &priority, "from", &own, "ipproto", "udp", side, "4789", "lookup", &table];
                run("ip", &[&["rule", "add"][..], &rule].concat(), "").await?;
            }
        }
        // Those of another address go after these are there: they are told apart by it.
        for old in ours.iter().filter(|rule| rule.src != own) {
            run("ip", &["rule", "delete", "priority", &priority, "from", &old.src], "").await?;
        }
        Ok(())
    }

    async fn routes(&self) -> Result<BTreeSet<Ipv4Addr>, WireguardError> {
        let (name, table) = (self.config.interface.as_str(), TABLE.to_string());
        let shown = run("ip", &["-json", "-4", "route", "show", "dev", name, "table", &table], "").await?;
        let shown: Vec<Route> = parse(&shown, "ip route")?;
        // A route to one address is shown without its length.
        Ok(shown.iter().filter_map(|route| route.dst.parse().ok()).collect())
    }

    /// The commands that make the routes to the peers, and those that remove the others.
    async fn changes(&self, peers: &[Peer]) -> Result<(String, String), WireguardError> {
        Ok(routes(&self.config.interface, &self.routes().await?, peers))
    }

    /// Makes these the interface's peers.
    async fn tell(&self, peers: &[Peer]) -> Result<(), WireguardError> {
        self.ensure().await?;
        let name = self.config.interface.as_str();
        run("wg", &["syncconf", name, "/proc/self/fd/0"], &settings(&self.config, peers)).await.map(drop)
    }

    /// Makes these the interface's peers, and routes to them; whether they were not so already. Routes to others stay until
    /// [`Device::forget`]: a packet that follows one is dropped there, for want of a peer.
    ///
    /// # Errors
    /// When a program fails; repeat it.
    pub async fn meet(&self, peers: &[Peer]) -> Result<bool, WireguardError> {
        let mut met = self.peers.lock().await;
        if met.as_deref() == Some(peers) {
            return Ok(false);
        }
        self.tell(peers).await?;
        batch(&self.changes(peers).await?.0).await?;
        *met = Some(peers.to_vec());
        Ok(true)
    }

    /// Removes the routes to who is no peer any more. After their tunnels.
    ///
    /// # Errors
    /// When a program fails; repeat it.
    pub async fn forget(&self) -> Result<(), WireguardError> {
        let met = self.peers.lock().await;
        match met.as_deref() {
            Some(peers) => batch(&self.changes(peers).await?.1).await,
            None => Ok(()),
        }
    }

    /// Puts the interface, its rules, its peers and its routes right, should somebody have changed them.
    ///
    /// # Errors
    /// When a program fails; repeat it.
    pub async fn renew(&self) -> Result<(), WireguardError> {
        let met = self.peers.lock().await;
        match met.as_deref() {
            Some(peers) => {
                self.tell(peers).await?;
                let (made, removed) = self.changes(peers).await?;
                batch(&(made + &removed)).await
            }
            None => self.ensure().await,
        }
    }
}
