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

impl Engine {
    /// Keeps every host's view of the overlay as the records have it, until cancelled. Takes no input: it reads what is.
    pub(super) async fn push_overlay(&self, cancel: CancellationToken) {
        let mut told: HashMap<HostId, (u64, serde_json::Value)> = HashMap::new();
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

    async fn push_overlay_once(&self, told: &mut HashMap<HostId, (u64, serde_json::Value)>) -> Result<(), EngineError> {
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
        told.retain(|host, (serial, _)| open.contains(&(*host, *serial)));
        for (host, serial) in open {
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
            if told.get(&host).is_some_and(|(_, before)| *before == content) {
                continue;
            }
            let json = serde_json::to_value(&view).map_err(|error| EngineError::Broken(error.to_string()))?;
            if self.sessions.send(host, Directive::Overlay { revision, view: json }) {
                told.insert(host, (serial, content));
            }
        }
        Ok(())
    }
}
