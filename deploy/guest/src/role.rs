//! What a guest is told to do: one line `role=server`, `role=client peer=ADDRESS` or `role=traveller to=PLACE`, with options: `mem=MIB` and `dirty=MIB_PER_S`
//! (memory rewritten and checked all the time), for the server `sabotage=tcp|bytes|writes|restart` and `after=SECONDS`.
//!
//! The line comes from the kernel's command line (words `sc.role=...`, `sc.peer=...`), from the file /etc/role, or from the user
//! data of the metadata service; there it may stand anywhere, so that the same user data can be a cloud-init file for
//! other images (`#role=server` is a comment to cloud-init).

use std::net::Ipv4Addr;

use crate::sabotage::{Kind, Plan};

/// What the server does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// Memory that is rewritten and checked all the time, MiB.
    pub memory_mib: u32,
    /// How much of it per second, MiB.
    pub dirty_mib_per_s: u32,
    /// A fault to make on purpose.
    pub sabotage: Option<Plan>,
}

/// What the client does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientOptions {
    /// The server's address.
    pub peer: Ipv4Addr,
    /// As the server's.
    pub memory: ServerOptions,
}

/// What the traveller does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TravellerOptions {
    /// The host or cloud to which it asks to be moved, before it asks to be moved back.
    pub to: String,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Serves, writes, ticks.
    Server(ServerOptions),
    /// Holds a stream to the server.
    Client(ClientOptions),
    /// Asks for its own moves.
    Traveller(TravellerOptions),
}

/// When a fault is due if it is not said.
const DEFAULT_AFTER_S: u32 = 20;

const AFTER_CAP_S: u32 = 86_400;

const MEMORY_CAP_MIB: u32 = 4096;

/// Finds the first complete role in a text.
pub fn parse(text: &str) -> Option<Role> {
    text.lines().find_map(parse_line)
}

/// The address `sc.address=A/PREFIX` on the kernel's command line, for networks without DHCP.
pub fn static_address(text: &str) -> Option<(Ipv4Addr, u8)> {
    let value = text.split_whitespace().find_map(|word| word.strip_prefix(ADDRESS))?;
    let (address, prefix) = value.split_once('/')?;
    Some((address.parse().ok()?, prefix.parse().ok().filter(|prefix| *prefix <= 32)?))
}

const ADDRESS: &str = "sc.address=";

/// The role on the kernel's command line.
pub fn from_kernel_command_line(text: &str) -> Option<Role> {
    let ours = text.split_whitespace().filter(|word| !word.starts_with(ADDRESS));
    let words: Vec<&str> = ours.filter_map(|word| word.strip_prefix("sc.")).collect();
    parse_line(&words.join(" "))
}

fn parse_line(line: &str) -> Option<Role> {
    let line = line.trim().trim_start_matches('#').trim_start();
    let (mut kind, mut peer, mut to) = (None, None, None);
    let mut memory = ServerOptions { memory_mib: 8, dirty_mib_per_s: 1, sabotage: None };
    let mut after_s = DEFAULT_AFTER_S;
    for word in line.split_whitespace() {
        let (key, value) = word.split_once('=')?;
        match key {
            "role" => kind = Some(value),
            "peer" => peer = value.parse().ok(),
            "to" => to = Some(value).filter(|value| is_name(value)),
            "mem" => memory.memory_mib = value.parse().ok().filter(|mib| *mib <= MEMORY_CAP_MIB)?,
            "dirty" => memory.dirty_mib_per_s = value.parse().ok()?,
            "sabotage" => memory.sabotage = Some(Plan { kind: Kind::parse(value)?, after_s }),
            "after" => after_s = value.parse().ok().filter(|after| *after <= AFTER_CAP_S)?,
            _ => return None,
        }
    }
    if let Some(plan) = &mut memory.sabotage {
        plan.after_s = after_s;
    }
    match kind? {
        "server" => Some(Role::Server(memory)),
        "client" => Some(Role::Client(ClientOptions { peer: peer?, memory })),
        "traveller" => Some(Role::Traveller(TravellerOptions { to: to?.to_owned() })),
        _ => None,
    }
}

/// Whether it can stand in JSON as it is.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn static_addresses() {
        let line = "quiet sc.address=10.0.0.7/24 sc.role=server";
        assert_eq!(static_address(line), Some((Ipv4Addr::new(10, 0, 0, 7), 24)));
        assert!(matches!(from_kernel_command_line(line), Some(Role::Server(_))));
        assert_eq!(static_address("sc.address=10.0.0.7/33"), None);
    }

    #[test]
    fn roles_are_found_where_they_stand() {
        let server = Role::Server(ServerOptions { memory_mib: 8, dirty_mib_per_s: 1, sabotage: None });
        assert_eq!(parse("role=server"), Some(server.clone()));
        assert_eq!(parse("#cloud-config\n# role=server mem=8\npackages: []\n"), Some(server.clone()));
        assert_eq!(from_kernel_command_line("console=ttyS0 sc.role=server quiet"), Some(server));
        let memory = ServerOptions { memory_mib: 64, dirty_mib_per_s: 20, sabotage: None };
        let client = Role::Client(ClientOptions { peer: Ipv4Addr::new(10, 0, 0, 2), memory });
        assert_eq!(parse("role=client peer=10.0.0.2 mem=64 dirty=20"), Some(client.clone()));
        assert_eq!(from_kernel_command_line("sc.role=client sc.peer=10.0.0.2 sc.mem=64 x=y sc.dirty=20"), Some(client));
        let traveller = Role::Traveller(TravellerOptions { to: "gcp-west".into() });
        assert_eq!(from_kernel_command_line("sc.role=traveller sc.to=gcp-west"), Some(traveller));
        for wrong in [
            "role=traveller",
            "role=traveller to=a\"b",
            "",
            "role=",
            "role=client",
            "role=client peer=x",
            "role=server mem=9999999",
            "role=server x",
            "rôle=server",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
