//! Who may open which channel: a pure function of the ticket, the live certificates and the time.

use supercloud_api::{
    Code, Problem,
    data::{Channel, Open},
    ticket::{Party, Ticket},
};
use supercloud_ids::HostId;

/// What a host is by a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It gives.
    Source,
    /// It takes.
    Destination,
}

/// A party of the connection as TLS knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// The host that its certificate names; none: the controller.
    pub host: Option<HostId>,
    /// SHA-256 of the certificate, hex.
    pub certificate_sha256: String,
}

impl Live {
    fn is(&self, party: &Party) -> bool {
        self.host == party.host && self.certificate_sha256 == party.certificate_sha256
    }
}

/// Decides about an [`Open`].
///
/// # Errors
/// The problem that the dialling side is told.
pub fn admit(
    open: &Open,
    ticket_key: Option<&str>,
    now_ms: u64,
    me: &Live,
    peer: &Live,
) -> Result<(Ticket, Role), Problem> {
    let forbidden = |detail: &str| Problem::new(Code::Forbidden, detail);
    let key = ticket_key.ok_or_else(|| {
        Problem::new(Code::HostUnavailable, "this host has not heard of its controller yet and cannot check tickets")
    })?;
    let ticket = Ticket::verify(&open.ticket, key, now_ms).map_err(|error| forbidden(&error.to_string()))?;
    let role = if me.is(&ticket.source) && peer.is(&ticket.destination) {
        Role::Source
    } else if me.is(&ticket.destination) && peer.is(&ticket.source) {
        Role::Destination
    } else {
        return Err(forbidden("the ticket names other parties than those of this connection"));
    };
    let is_for_a_guest = ticket.guest.is_some() && ticket.operation.is_some();
    match &open.channel {
        Channel::Control | Channel::Memory if !is_for_a_guest => Err(forbidden("the ticket is for chunks alone")),
        Channel::Volume { volume } if !is_for_a_guest || !ticket.volumes.contains(volume) => {
            Err(forbidden("the ticket does not name this volume"))
        }
        Channel::Chunks { project } if *project != ticket.project => {
            Err(forbidden("the ticket is for another project"))
        }
        Channel::Chunks { .. } if role != Role::Source => Err(forbidden("by the ticket this host takes chunks")),
        _ => Ok((ticket, role)),
    }
}

#[cfg(test)]
mod tests {
    use supercloud_api::ticket::Signer;
    use supercloud_ids::{Epoch, GuestId, OperationId, ProjectId, VolumeId};

    use super::*;

    struct Fixture {
        signer: Signer,
        ticket: Ticket,
        source: Live,
        destination: Live,
    }

    fn fixture() -> Fixture {
        let live = |c: &str| Live { host: Some(HostId::generate()), certificate_sha256: c.into() };
        let party = |live: &Live| Party { host: live.host, certificate_sha256: live.certificate_sha256.clone() };
        let (source, destination) = (live("aa"), live("bb"));
        let ticket = Ticket {
            version: Ticket::VERSION,
            operation: Some(OperationId::generate()),
            project: ProjectId::generate(),
            guest: Some(GuestId::generate()),
            epoch: Epoch(3),
            source: party(&source),
            destination: party(&destination),
            volumes: vec![VolumeId::generate()],
            expires_at_ms: 1000,
        };
        let signer = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
        Fixture { signer, ticket, source, destination }
    }

    impl Fixture {
        fn ask(&self, channel: Channel, me: &Live, peer: &Live, now_ms: u64) -> Result<Role, Problem> {
            let open = Open { ticket: self.signer.sign(&self.ticket), channel };
            admit(&open, Some(&self.signer.public_key_hex()), now_ms, me, peer).map(|(_, role)| role)
        }
    }

    #[test]
    fn the_role_follows_from_the_ticket_whoever_dials() {
        let f = fixture();
        let volume = Channel::Volume { volume: f.ticket.volumes[0] };
        for channel in [Channel::Control, Channel::Memory, volume] {
            assert_eq!(f.ask(channel.clone(), &f.source, &f.destination, 999), Ok(Role::Source));
            assert_eq!(f.ask(channel, &f.destination, &f.source, 999), Ok(Role::Destination));
        }
    }

    #[test]
    fn expired_foreign_and_rebound_tickets_are_refused() {
        let f = fixture();
        assert!(f.ask(Channel::Control, &f.source, &f.destination, 1000).is_err());
        let stranger = Live { host: Some(HostId::generate()), certificate_sha256: "bb".into() };
        assert!(f.ask(Channel::Control, &f.source, &stranger, 0).is_err());
        let rebound = Live { certificate_sha256: "cc".into(), ..f.destination.clone() };
        assert!(f.ask(Channel::Control, &f.source, &rebound, 0).is_err());
        assert!(f.ask(Channel::Control, &f.source, &f.source, 0).is_err());
        let open = Open { ticket: f.signer.sign(&f.ticket), channel: Channel::Control };
        assert!(admit(&open, None, 0, &f.source, &f.destination).is_err());
        let other = Signer::from_pkcs8(&Signer::generate_pkcs8().unwrap()).unwrap();
        assert!(admit(&open, Some(&other.public_key_hex()), 0, &f.source, &f.destination).is_err());
    }

    #[test]
    fn a_ticket_gives_its_own_volumes_and_project_only() {
        let mut f = fixture();
        let other = Channel::Volume { volume: VolumeId::generate() };
        assert!(f.ask(other, &f.source, &f.destination, 0).is_err());
        let project = f.ticket.project;
        assert_eq!(f.ask(Channel::Chunks { project }, &f.source, &f.destination, 0), Ok(Role::Source));
        assert!(f.ask(Channel::Chunks { project }, &f.destination, &f.source, 0).is_err());
        let foreign = Channel::Chunks { project: ProjectId::generate() };
        assert!(f.ask(foreign, &f.source, &f.destination, 0).is_err());
        let whole = f.ticket.clone();
        for ticket in [Ticket { guest: None, ..whole.clone() }, Ticket { operation: None, ..whole }] {
            f.ticket = ticket;
            for channel in [Channel::Control, Channel::Memory, Channel::Volume { volume: f.ticket.volumes[0] }] {
                assert!(f.ask(channel, &f.source, &f.destination, 0).is_err());
            }
            assert!(f.ask(Channel::Chunks { project }, &f.source, &f.destination, 0).is_ok());
        }
    }
}
