//! The interface in the kernel, by `ip`, `wg` and `nft`.

use std::{collections::BTreeSet, io, net::Ipv4Addr, process::Stdio, time::Duration};

use serde::Deserialize;
use tokio::{io::AsyncWriteExt as _, process::Command, time::timeout};

use super::{BadKey, DEVICE_MTU, Peer, PrivateKey, PublicKey, WireguardConfig, routes, rules, settings};

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
    /// The kernel has no such interfaces.
    #[error("this kernel has no WireGuard (Linux 5.6 and newer have, as a module): {0}")]
    NotThere(String),
    /// Somebody else's interface has the name.
    #[error(
        "the interface {0} is there, and is no WireGuard interface: remove it, or say another [wireguard] interface"
    )]
    OtherInterface(String),
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

/// This host's interface.
#[derive(Debug)]
pub struct Device {
    config: WireguardConfig,
    overlay_addr: Ipv4Addr,
}

impl Device {
    /// Makes the interface, or takes the one that is there; gives it its address; and the rules by which nothing passes beside it.
    ///
    /// # Errors
    /// When this kernel has none, or a program fails. Nothing of the host's may be tunnelled then.
    pub async fn open(config: WireguardConfig, overlay_addr: Ipv4Addr) -> Result<Self, WireguardError> {
        let device = Self { config, overlay_addr };
        device.ensure().await?;
        Ok(device)
    }

    async fn ensure(&self) -> Result<(), WireguardError> {
        let name = self.config.interface.as_str();
        // First: a tunnel's packet that finds no interface must not go another way.
        run("nft", &["-f", "-"], &rules(name, self.overlay_addr)).await?;
        if run("ip", &["link", "show", "dev", name], "").await.is_err() {
            match run("ip", &["link", "add", "dev", name, "type", "wireguard"], "").await {
                Ok(_) => {}
                Err(WireguardError::Refused { said, .. }) => return Err(WireguardError::NotThere(said)),
                Err(other) => return Err(other),
            }
        } else if matches!(run("wg", &["show", name, "listen-port"], "").await, Err(WireguardError::Refused { .. })) {
            return Err(WireguardError::OtherInterface(name.to_owned()));
        }
        let shown = run("ip", &["-json", "-4", "address", "show", "dev", name], "").await?;
        let shown: Vec<Addresses> = serde_json::from_str(&shown).map_err(|_| WireguardError::Answer("ip address"))?;
        let mut batch = format!("address replace {}/32 dev {name}\n", self.overlay_addr);
        for old in shown.iter().flat_map(|one| &one.addr_info).filter(|one| one.local != self.overlay_addr) {
            batch += &format!("address delete {}/{} dev {name}\n", old.local, old.prefixlen);
        }
        batch += &format!("link set dev {name} mtu {DEVICE_MTU} up\n");
        run("ip", &["-batch", "-"], &batch).await.map(drop)
    }

    async fn routes(&self) -> Result<BTreeSet<Ipv4Addr>, WireguardError> {
        let name = self.config.interface.as_str();
        let shown = run("ip", &["-json", "-4", "route", "show", "dev", name, "scope", "link"], "").await?;
        // Without a route it says nothing at all.
        let shown = if shown.trim().is_empty() { "[]" } else { shown.as_str() };
        let shown: Vec<Route> = serde_json::from_str(shown).map_err(|_| WireguardError::Answer("ip route"))?;
        // A route to one address is shown without its length.
        Ok(shown.iter().filter_map(|route| route.dst.parse().ok()).collect())
    }

    /// Makes these the interface's peers, and routes to them. Routes to others stay until [`Device::forget`]: a packet that follows one
    /// is dropped there, for want of a peer.
    ///
    /// # Errors
    /// When a program fails; repeat it.
    pub async fn meet(&self, peers: &[Peer]) -> Result<(), WireguardError> {
        self.ensure().await?;
        let name = self.config.interface.as_str();
        run("wg", &["syncconf", name, "/proc/self/fd/0"], &settings(&self.config, peers)).await?;
        let (made, _) = routes(name, &self.routes().await?, peers);
        if made.is_empty() { Ok(()) } else { run("ip", &["-batch", "-"], &made).await.map(drop) }
    }

    /// Removes the routes to who is no peer any more. After its tunnel.
    ///
    /// # Errors
    /// When a program fails; repeat it.
    pub async fn forget(&self, peers: &[Peer]) -> Result<(), WireguardError> {
        let name = self.config.interface.as_str();
        let (_, removed) = routes(name, &self.routes().await?, peers);
        if removed.is_empty() { Ok(()) } else { run("ip", &["-batch", "-"], &removed).await.map(drop) }
    }
}
