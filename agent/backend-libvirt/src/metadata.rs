//! The mark that our guests carry in libvirt's metadata: which guest it is, under which epoch, in which role.
//!
//! It tells our machines from those of others, and, after a restart of the agent, a source that waits for a decision
//! from a destination that does.

use std::fmt;

use supercloud_ids::{Epoch, GuestId};

/// The namespace of our element.
pub(crate) const NAMESPACE: &str = "https://supercloud.dev/xmlns/libvirt/1";
/// The prefix it is written with.
pub(crate) const PREFIX: &str = "supercloud";

/// What a machine is for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// It was started here, or its switch was granted.
    Owner,
    /// A stream is still to come.
    Incoming,
    /// It is complete and waits for the grant.
    Arrived,
}

impl Role {
    const ALL: [(Role, &'static str); 3] =
        [(Role::Owner, "owner"), (Role::Incoming, "incoming"), (Role::Arrived, "arrived")];
}

impl fmt::Display for Role {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = Self::ALL.iter().find(|(role, _)| role == self).map_or("owner", |(_, text)| text);
        out.write_str(text)
    }
}

/// The mark itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub guest: GuestId,
    pub epoch: Epoch,
    pub role: Role,
}

impl Mark {
    /// As an element of `<metadata>` in a domain's XML.
    pub(crate) fn to_xml(self) -> String {
        let Self { guest, epoch, role } = self;
        format!("<{PREFIX}:guest xmlns:{PREFIX}='{NAMESPACE}' id='{guest}' epoch='{epoch}' role='{role}'/>")
    }

    /// As `virDomainSetMetadata` takes it: it adds prefix and namespace itself.
    pub(crate) fn to_element(self) -> String {
        let Self { guest, epoch, role } = self;
        format!("<guest id='{guest}' epoch='{epoch}' role='{role}'/>")
    }

    /// From what `virDomainGetMetadata` gives. `None`: not ours.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let guest = attribute(text, "id")?.parse().ok()?;
        let epoch = Epoch(attribute(text, "epoch")?.parse().ok()?);
        let role = attribute(text, "role")?;
        let role = Role::ALL.iter().find(|(_, name)| *name == role)?.0;
        Some(Self { guest, epoch, role })
    }
}

/// The value of an attribute in one element's text; good for values that need no escaping.
pub(crate) fn attribute<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = text;
    while let Some(at) = rest.find(name) {
        let before_is_blank = rest[..at].ends_with(char::is_whitespace);
        let after = &rest[at + name.len()..];
        if before_is_blank
            && let Some(value) = after.strip_prefix('=')
            && let Some(quote) = value.chars().next().filter(|c| matches!(c, '\'' | '"'))
        {
            return value[1..].split(quote).next();
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_back_in_both_forms() {
        let mark = Mark { guest: GuestId::generate(), epoch: Epoch(7), role: Role::Incoming };
        assert_eq!(Mark::parse(&mark.to_xml()), Some(mark));
        assert_eq!(Mark::parse(&mark.to_element()), Some(mark));
    }

    #[test]
    fn what_others_wrote_is_not_ours() {
        for text in
            ["", "<guest/>", "<guest id='x' epoch='1' role='owner'/>", "<g xid='gst-1' epoch='' role=owner>", "id"]
        {
            assert_eq!(Mark::parse(text), None, "{text}");
        }
        let id = GuestId::generate();
        assert_eq!(Mark::parse(&format!("<guest id='{id}' epoch='-1' role='owner'/>")), None);
        assert_eq!(Mark::parse(&format!("<guest id='{id}' epoch='1' role='king'/>")), None);
    }
}
