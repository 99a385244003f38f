//! Where things are kept: see the table in [`crate::state`].

use std::net::Ipv4Addr;

use supercloud_api::ids::{HostId, NetworkId, OperationId, PlanId, ProjectId, TokenId};
use supercloud_store::{Key, Prefix};

use super::Record;

/// A key made of ids, names and numbers, which all are printable and short.
fn key(text: String) -> Key {
    Key::new(text).expect("ids, names and numbers make keys")
}

/// What is below a folder.
#[must_use]
pub fn folder(name: &str) -> Prefix {
    Prefix::new(format!("{name}/")).expect("folder names make prefixes")
}

/// The layout's version.
#[must_use]
pub fn format() -> Key {
    key("format".to_owned())
}

/// A record.
#[must_use]
pub fn record<T: Record>(id: &T::Id) -> Key {
    key(format!("{}/{id}", T::FOLDER))
}

/// A name: of a project, or of the whole system (`None`).
#[must_use]
pub fn name(project: Option<ProjectId>, kind: &str, name: &str) -> Key {
    match project {
        Some(project) => key(format!("names/{project}/{kind}/{name}")),
        None => key(format!("names/-/{kind}/{name}")),
    }
}

/// All names of a kind in a project.
#[must_use]
pub fn names(project: ProjectId, kind: &str) -> Prefix {
    folder(&format!("names/{project}/{kind}"))
}

/// The token of a secret.
#[must_use]
pub fn token_secret(sha256_hex: &str) -> Key {
    key(format!("token-secrets/{sha256_hex}"))
}

/// The network of a number.
#[must_use]
pub fn vni(vni: u32) -> Key {
    key(format!("vni/{vni:08}"))
}

/// The host of an overlay index.
#[must_use]
pub fn host_index(index: u16) -> Key {
    key(format!("host-index/{index:04}"))
}

/// The port of an address.
#[must_use]
pub fn address(network: NetworkId, ip: Ipv4Addr) -> Key {
    key(format!("addresses/{network}/{ip}"))
}

/// All addresses of a network that are taken.
#[must_use]
pub fn addresses(network: NetworkId) -> Prefix {
    folder(&format!("addresses/{network}"))
}

/// The port of a hardware address.
#[must_use]
pub fn mac(mac: &str) -> Key {
    key(format!("macs/{mac}"))
}

/// The name of a host that is rented and may not have joined yet.
#[must_use]
pub fn renting_name(host_name: &str) -> Key {
    key(format!("names/-/renting/{host_name}"))
}

/// An operation that has not ended.
#[must_use]
pub fn active_operation(operation: OperationId) -> Key {
    key(format!("active-operations/{operation}"))
}

/// A plan of which something begins by itself.
#[must_use]
pub fn active_plan(plan: PlanId) -> Key {
    key(format!("active-plans/{plan}"))
}

/// What a project uses: whoever adds to it passes this guard.
#[must_use]
pub fn usage_guard(project: ProjectId) -> Key {
    key(format!("guards/usage/{project}"))
}

/// Room on a host: whoever places a guest there passes this guard.
#[must_use]
pub fn room_guard(host: HostId) -> Key {
    key(format!("guards/room/{host}"))
}

/// Which controller grants leases: the one that has passed this guard last.
#[must_use]
pub fn lease_guard() -> Key {
    key("guards/leases".to_owned())
}

/// A stored answer. `hash` is hexadecimal.
#[must_use]
pub fn answer(token: TokenId, hash: &str) -> Key {
    key(format!("idempotency/{token}/{hash}"))
}

/// An event.
#[must_use]
pub fn event(seq: u64) -> Key {
    key(format!("events/{seq:020}"))
}

/// The chain's head.
#[must_use]
pub fn events_head() -> Key {
    key("events-head".to_owned())
}
