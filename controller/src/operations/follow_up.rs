//! What follows from records by itself: every connected host has the overlay view that the records give.

use std::collections::HashMap;

use supercloud_api::{Guest, Host, Network, Port, ids::HostId, link::Directive};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Engine, EngineError};
use crate::{
    chain, overlay,
    state::{GuestRecord, HostRecord},
};

/// What a host was told last of the overlay, in the session that it has.
#[derive(Debug)]
struct Told {
    session: u64,
    revision: u64,
    content: serde_json::Value,
}

/// What is to be done with a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    /// The host has it.
    Not,
    /// It is new, and has no number of its own yet.
    Soon,
    /// It is to be told.
    Now,
}

/// A view's number is read before its records, which may have changed in between: then two views have one number, and of those an agent
/// takes the first only. The change has a number, which the next look finds.
fn due(told: Option<&Told>, revision: u64, content: &serde_json::Value) -> Due {
    match told {
        Some(told) if told.content == *content => Due::Not,
        Some(told) if told.revision >= revision => Due::Soon,
        _ => Due::Now,
    }
}

impl Engine {
    /// Keeps every host's view of the overlay as the records have it, until cancelled. Takes no input: it reads what is.
    pub(super) async fn push_overlay(&self, cancel: CancellationToken) {
        let mut told: HashMap<HostId, Told> = HashMap::new();
        loop {
            tokio::select! {
                () = self.overlay.notified() => {}
                () = tokio::time::sleep(self.pace.look) => {}
                () = cancel.cancelled() => return,
            }
            if let Err(error) = self.push_overlay_once(&mut told).await {
                warn!("the overlay cannot be pushed now: {}", chain(&error));
            }
        }
    }

    async fn push_overlay_once(&self, told: &mut HashMap<HostId, Told>) -> Result<(), EngineError> {
        // Read before the records, so that a view is never older than its number.
        let revision = self.state.health().await?.revision;
        let hosts: Vec<Host> = self
            .state
            .list::<HostRecord>()
            .await?
            .into_iter()
            .filter(|h| !h.is_removed)
            .map(|h| h.value.host)
            .collect();
        let networks: Vec<Network> = self.state.list::<Network>().await?.into_iter().map(|n| n.value).collect();
        let ports: Vec<Port> = self.state.list::<Port>().await?.into_iter().map(|p| p.value).collect();
        let guests: Vec<Guest> = self.state.list::<GuestRecord>().await?.into_iter().map(|g| g.value.guest).collect();
        let open = self.sessions.hosts();
        // A new session is told anew, whatever the one before was told.
        told.retain(|host, told| open.contains(&(*host, told.session)));
        for (host, session) in open {
            let view = match overlay::view_for(host, revision, &hosts, &networks, &ports, &guests) {
                Ok(view) => view,
                // The others' views may well be without fault.
                Err(error) => {
                    warn!(%host, "its overlay view cannot be made: {error}");
                    continue;
                }
            };
            // What is compared is the content: a new number alone is no news.
            let content = serde_json::to_value(supercloud_sdn::view::OverlayView { revision: 0, ..view.clone() })
                .map_err(|error| EngineError::Broken(error.to_string()))?;
            match due(told.get(&host), revision, &content) {
                Due::Not => continue,
                Due::Soon => {
                    self.overlay.notify_one();
                    continue;
                }
                Due::Now => {}
            }
            let json = serde_json::to_value(&view).map_err(|error| EngineError::Broken(error.to_string()))?;
            if self.sessions.send(host, Directive::Overlay { revision, view: json }) {
                told.insert(host, Told { session, revision, content });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_views_never_have_one_number() {
        let (before, after) = (serde_json::json!({ "ports": 1 }), serde_json::json!({ "ports": 2 }));
        let told = Told { session: 1, revision: 75, content: before.clone() };
        assert_eq!(due(None, 75, &before), Due::Now);
        assert_eq!(due(Some(&told), 80, &before), Due::Not, "a new number alone is no news");
        assert_eq!(due(Some(&told), 75, &after), Due::Soon, "it changed between the number and the records");
        assert_eq!(due(Some(&told), 76, &after), Due::Now);
    }
}
