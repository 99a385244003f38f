//! The sockets by which a destination's volume processes reach the volumes at the source: each connection becomes a channel
//! of the meeting.

use std::{io, time::Duration};

use supercloud_api::data::Channel;
use supercloud_ids::VolumeId;
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    accounts::Account,
    plane::{bridge, meeting::MeetingHandle},
    socket,
    volumes::VolumeHome,
};

/// Connections of one volume process at once: one in use, and the same one again when it hangs.
const CONNECTIONS: usize = 4;

/// Offers a volume's way to its source to its process, which runs as `user`; ends when dropped.
///
/// # Errors
/// When the socket cannot be made.
pub fn offer(home: &VolumeHome, meeting: MeetingHandle, user: Account) -> io::Result<AbortOnDropHandle<()>> {
    let listener = socket::listen(&home.peer_dial(), user)?;
    Ok(AbortOnDropHandle::new(tokio::spawn(accept(listener, home.volume, meeting, user))))
}

async fn accept(listener: UnixListener, volume: VolumeId, meeting: MeetingHandle, user: Account) {
    let mut connections = JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%volume, %error, "cannot take a connection of a volume process");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        if socket::is_peer_allowed(&stream, user) && connections.len() < CONNECTIONS {
            connections.spawn(carry(stream, volume, meeting.clone()));
        }
    }
}

async fn carry(local: UnixStream, volume: VolumeId, meeting: MeetingHandle) {
    // An error ends the connection, which is what the volume process sees; it dials again.
    match meeting.open(Channel::Volume { volume }).await {
        Ok(remote) => {
            if let Err(error) = bridge::carry(local, remote).await {
                tracing::debug!(%volume, %error, "a volume's channel broke");
            }
        }
        Err(error) => tracing::debug!(%volume, error = crate::chain(&error), "no channel for a volume"),
    }
}
