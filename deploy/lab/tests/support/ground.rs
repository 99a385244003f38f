//! The lab in which things die: three hosts in three clouds, a server that moves between two of them, a client at the third.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use supercloud_api::{Guest, ids::GuestId};
use supercloud_lab::demo::verdict::Testimony;
use supercloud_lab::demo::witness::Witness;
use supercloud_lab::fleet::{Fleet, FleetSpec, GuestSpec, programs};
use supercloud_lab::leftovers::Snapshot;
use supercloud_lab::{CONTROLLER, Lab, LabSpec, LinkShape, LinkSpec};

/// The two hosts between which the server moves.
pub const SEATS: [&str; 2] = ["left", "right"];
/// The host of the client, which nothing happens to.
pub const THIRD: &str = "third";
/// The guest that moves.
pub const SERVER: &str = "web";
/// The guest that holds a stream to it.
pub const CLIENT: &str = "watcher";
/// The image and the network of both.
pub const IMAGE: &str = "lean";
/// See [`IMAGE`].
pub const NETWORK: &str = "lan";

const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 10);
/// How long guests may take to boot: emulated, on a busy machine.
const BOOT_BUDGET: Duration = Duration::from_secs(240);
/// How long something may take that the guests or the agents do by themselves every few seconds.
pub const SETTLE_BUDGET: Duration = Duration::from_secs(60);
/// Looks, a second apart, for which nothing may change until the lab counts as at rest: more than an agent remembers a guest of
/// which it has nothing.
const QUIET_LOOKS: usize = 18;

/// Whether a lab can be made here at all.
pub fn is_possible() -> bool {
    supercloud_lab::require::lab(&["libvirtd", "virsh", "ovs-vswitchd", "qemu-system-x86_64", "qemu-img"])
}

/// Builds the programs that run in the lab, unless it was told of another folder with them.
fn build_programs() -> Result<()> {
    if std::env::var_os("SUPERCLOUD_BIN_DIR").is_none() {
        programs::build()?;
    }
    Ok(())
}

/// The links: the controller is far from everybody, so that its words are under way for long enough to be struck down;
/// the hosts are near each other.
fn spec(name: &str) -> LabSpec {
    let mut spec = LabSpec::plain(name, 3);
    for (host, name) in spec.hosts.iter_mut().zip([SEATS[0], SEATS[1], THIRD]) {
        host.name = name.to_owned();
        host.cloud = format!("{name}-cloud");
    }
    let link = |a: &str, b: &str, rtt_ms| LinkSpec { a: a.into(), b: b.into(), shape: LinkShape::new(rtt_ms, 200) };
    spec.links = vec![
        link(SEATS[0], SEATS[1], 20.0),
        link(SEATS[0], THIRD, 10.0),
        link(SEATS[1], THIRD, 10.0),
        link(CONTROLLER, SEATS[0], 150.0),
        link(CONTROLLER, SEATS[1], 150.0),
        link(CONTROLLER, THIRD, 10.0),
    ];
    spec
}

/// Runs blocking work of the lab in place.
pub fn now<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

/// Looks again and again until there is an answer, or the budget is used up.
pub async fn until<T>(budget: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + budget;
    loop {
        if let Some(found) = look().await {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The lab with its two guests.
pub struct Ground {
    /// The fleet.
    pub fleet: Fleet,
    /// Hears the guests.
    pub witness: Witness,
    /// The server.
    pub server: GuestId,
    /// How often it has moved.
    pub moves: usize,
    /// What there is while the server is at a host and nothing goes on.
    homes: BTreeMap<String, Snapshot>,
    began: Instant,
}

impl Drop for Ground {
    fn drop(&mut self) {
        if std::thread::panicking() {
            match self.keep_logs() {
                Ok(folder) => eprintln!("the logs are kept in {}", folder.display()),
                Err(error) => eprintln!("the logs cannot be kept: {error}"),
            }
        }
    }
}

impl Ground {
    /// Brings it up: the server at the first seat, boots, and talks to the client.
    pub async fn up() -> Result<Self> {
        now(build_programs)?;
        let began = Instant::now();
        let fleet = Fleet::up(FleetSpec::new(spec(&format!("flt-{}", std::process::id())))).await?;
        fleet.import_lean_image(IMAGE).await?;
        fleet.create_network(NETWORK, "10.20.0.0/24").await?;
        let server = GuestSpec::new(SERVER, IMAGE, NETWORK, "sc.role=server sc.mem=24 sc.dirty=2")
            .at(SEATS[0])
            .with_ipv4(SERVER_ADDRESS);
        let client =
            GuestSpec::new(CLIENT, IMAGE, NETWORK, &format!("sc.role=client sc.peer={SERVER_ADDRESS}")).at(THIRD);
        let (server, client) = tokio::try_join!(fleet.create_guest(&server), fleet.create_guest(&client))?;
        let witness = Witness::listen(vec![fleet.console(server.id)?, fleet.console(client.id)?]);
        let mut ground = Self { fleet, witness, server: server.id, moves: 0, homes: BTreeMap::new(), began };
        let talks = |heard: &Testimony| {
            let writes = heard.server.last().is_some_and(|seen| seen.stats.acked > 0);
            writes && heard.client.last().is_some_and(|seen| seen.stats.connected && seen.stats.ticks > 10)
        };
        if !ground.witness.until(BOOT_BUDGET, talks).await {
            bail!("the guests did not begin to talk: {}", ground.witness.other_lines().join("\n  | "));
        }
        ground.say("the guests talk");
        ground.note_home(SEATS[0]);
        Ok(ground)
    }

    /// Says something, with the time since the beginning.
    pub fn say(&self, what: &str) {
        println!("[{:>4} s] {what}", self.began.elapsed().as_secs());
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        self.fleet.lab()
    }

    /// The other seat.
    pub fn other_seat(seat: &str) -> &'static str {
        if seat == SEATS[0] { SEATS[1] } else { SEATS[0] }
    }

    /// The server as the API has it.
    pub async fn guest(&self) -> Result<Guest> {
        Ok(self.fleet.guest(SERVER).await?)
    }

    /// Remembers what there is now, as what there is while the server is at `seat`.
    pub fn note_home(&mut self, seat: &str) {
        let snapshot = now(|| self.lab().snapshot());
        self.homes.insert(seat.to_owned(), snapshot);
    }

    /// What was left, or is missing, while the server is at `seat`.
    pub fn leftovers(&self, seat: &str) -> Vec<String> {
        match self.homes.get(seat) {
            Some(home) => now(|| self.lab().leftovers_since(home)),
            None => vec![format!("nothing is known of how {seat} should look")],
        }
    }

    /// Waits until what a move leaves for a while (an agent remembers a guest for some seconds) is gone, and remembers how it
    /// then is.
    pub async fn settle_and_note(&mut self, seat: &str) -> Result<()> {
        let mut last = now(|| self.lab().snapshot());
        let mut same = 0;
        let settled = until(SETTLE_BUDGET, async || {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let next = now(|| self.lab().snapshot());
            same = if next == last { same + 1 } else { 0 };
            last = next;
            (same >= QUIET_LOOKS).then_some(())
        });
        settled.await.context("the lab does not come to rest")?;
        self.homes.insert(seat.to_owned(), last);
        Ok(())
    }

    /// Takes the lab down; processes that name it and are still there.
    pub async fn down(self) -> Result<Vec<String>> {
        let name = self.lab().spec().name.clone();
        if std::env::var_os("SUPERCLOUD_LAB_KEEP").is_some() {
            println!("the lab {name} is left up; supercloud-lab --lab {name} down");
            return Ok(Vec::new());
        }
        now(|| supercloud_lab::down(&supercloud_lab::state::default_root(), &name))?;
        let lines = supercloud_lab::process::all().into_iter().map(|process| process.command_line());
        Ok(lines.filter(|line| line.contains(&name)).collect())
    }

    /// Copies all logs to where they outlive the lab.
    fn keep_logs(&self) -> std::io::Result<PathBuf> {
        let folder = std::env::temp_dir().join(format!("supercloud-failures-{}", std::process::id()));
        for site in self.lab().sites() {
            let to = folder.join(&site.name);
            std::fs::create_dir_all(&to)?;
            for from in ["log-supercloud", "log-libvirt", "log-libvirt/qemu", "log-openvswitch"] {
                for entry in std::fs::read_dir(site.dir.join(from)).into_iter().flatten().flatten() {
                    if entry.path().is_file() {
                        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
                    }
                }
            }
            let guests = site.dir.join("lib-supercloud/agent/guests");
            for entry in std::fs::read_dir(guests).into_iter().flatten().flatten() {
                for file in ["guest.json", "console.log"] {
                    let from = entry.path().join(file);
                    if from.is_file() {
                        std::fs::copy(&from, to.join(format!("{}-{file}", entry.file_name().display())))?;
                    }
                }
            }
        }
        Ok(folder)
    }
}
