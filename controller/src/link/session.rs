//! One agent's session.

use std::time::Duration;

use supercloud_api::{
    frame::{Frame, FrameError, read_frame, write_frame},
    ids::HostId,
    link::{self, Answer, Directive, Envelope, Farewell, Hello, Notice, Outcome, Query, kind},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{SemaphorePermit, mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{OPENING_BUDGET, Shared, Unwelcome};

/// A link that brought nothing for this long is dead; agents send heartbeats far more often.
const SILENCE_BUDGET: Duration = Duration::from_secs(30);
/// How long one frame may take to leave.
const WRITE_BUDGET: Duration = Duration::from_secs(20);
/// Answers that may wait to be written.
const ANSWERS_AT_MOST: usize = 64;

/// The ends that others write to.
pub(super) struct Outbound {
    pub(super) directives: mpsc::Receiver<Directive>,
    pub(super) overlay: watch::Receiver<Option<Directive>>,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("nothing was heard for {} s", SILENCE_BUDGET.as_secs())]
    Silent,
    #[error("it does not read what is sent")]
    NotReading,
    #[error("the session is closed from this side")]
    Closed,
    #[error("unexpected frame of kind {0}")]
    Kind(u16),
}

/// Runs a session to its end; the serial if it was ever open.
pub(super) async fn run<S: AsyncRead + AsyncWrite + Send>(
    shared: &Shared,
    host: HostId,
    fingerprint: String,
    stream: S,
    opening: SemaphorePermit<'_>,
    cancel: CancellationToken,
) -> Option<u64> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let first = tokio::select! {
        first = tokio::time::timeout(OPENING_BUDGET, read_frame(&mut reader)) => first,
        () = cancel.cancelled() => return None,
    };
    let hello = match first {
        Ok(Ok(frame)) => match frame.parse_json::<Hello>(kind::HELLO, link::VERSION) {
            Ok(hello) => hello,
            Err(error) => {
                warn!(%host, "the hello is not acceptable: {error}");
                return None;
            }
        },
        Ok(Err(error)) => {
            debug!(%host, "no hello: {error}");
            return None;
        }
        Err(_) => return None,
    };
    if hello.host != host {
        warn!(%host, claimed = %hello.host, "the hello names another host than the certificate");
        return None;
    }
    let agent_version = hello.agent_version.chars().take(64).collect::<String>();
    let welcomed = tokio::select! {
        welcomed = shared.handler.hello(host, fingerprint, hello) => welcomed,
        () = cancel.cancelled() => return None,
    };
    let welcome = match welcomed {
        Ok(welcome) => welcome,
        Err(Unwelcome::Refused(problem)) => {
            warn!(%host, "not welcome: {problem}");
            return None;
        }
        Err(Unwelcome::Removed(problem)) => {
            error!(%host, "a host that was removed is back: {problem}");
            let sent = async {
                let frame = Frame::json(kind::FAREWELL, link::VERSION, &Farewell { host, problem })?;
                write_frame(&mut writer, &frame).await
            };
            if let Ok(Err(_)) | Err(_) = tokio::time::timeout(WRITE_BUDGET, sent).await {
                debug!(%host, "it did not hear that it was removed; it is told again");
            }
            return None;
        }
    };
    let sent = async {
        let frame = Frame::json(kind::WELCOME, link::VERSION, &welcome)?;
        write_frame(&mut writer, &frame).await
    };
    if let Ok(Err(_)) | Err(_) = tokio::time::timeout(WRITE_BUDGET, sent).await {
        return None;
    }
    drop(opening);
    let (serial, outbound) = shared.sessions.open(host, cancel.clone());
    info!(%host, name = %welcome.host_name, agent_version, "agent connected");
    let (answers, answers_out) = mpsc::channel(ANSWERS_AT_MOST);
    let reading = async {
        shared.handler.opened(host).await;
        read(shared, host, &mut reader, answers).await
    };
    let why = tokio::select! {
        why = reading => why,
        why = write(host, &mut writer, outbound, answers_out) => why,
        () = cancel.cancelled() => Ended::Closed,
    };
    debug!(%host, "session ended: {why}");
    Some(serial)
}

async fn read<R: AsyncRead + Unpin>(
    shared: &Shared,
    host: HostId,
    reader: &mut R,
    answers: mpsc::Sender<Envelope<Outcome<Answer>>>,
) -> Ended {
    loop {
        let frame = match tokio::time::timeout(SILENCE_BUDGET, read_frame(reader)).await {
            Ok(Ok(frame)) => frame,
            Ok(Err(error)) => return error.into(),
            Err(_) => return Ended::Silent,
        };
        match frame.kind {
            kind::NOTICE => match frame.parse_json::<Notice>(kind::NOTICE, link::VERSION) {
                Ok(notice) => shared.handler.notice(host, notice).await,
                Err(error) => return error.into(),
            },
            kind::QUERY => match frame.parse_json::<Envelope<Query>>(kind::QUERY, link::VERSION) {
                Ok(Envelope { number, body }) => {
                    let body = shared.handler.query(host, body).await.into();
                    if answers.send(Envelope { number, body }).await.is_err() {
                        return Ended::NotReading;
                    }
                }
                Err(error) => return error.into(),
            },
            other => return Ended::Kind(other),
        }
    }
}

async fn write<W: AsyncWrite + Unpin>(
    host: HostId,
    writer: &mut W,
    mut outbound: Outbound,
    mut answers: mpsc::Receiver<Envelope<Outcome<Answer>>>,
) -> Ended {
    loop {
        let frame = tokio::select! {
            biased;
            directive = outbound.directives.recv() => match directive {
                Some(directive) => Frame::json(kind::DIRECTIVE, link::VERSION, &directive),
                None => return Ended::Closed,
            },
            Ok(()) = outbound.overlay.changed() => {
                let Some(view) = outbound.overlay.borrow_and_update().clone() else { continue };
                Frame::json(kind::DIRECTIVE, link::VERSION, &view)
            }
            Some(answer) = answers.recv() => Frame::json(kind::ANSWER, link::VERSION, &answer),
        };
        let frame = match frame {
            // Nothing a new connection could mend: the agent would come back for ever and hear nothing else.
            Err(FrameError::TooLong(bytes)) => {
                error!(%host, bytes, "a message is over the limit and cannot be sent");
                continue;
            }
            frame => frame,
        };
        let written = async { write_frame(writer, &frame?).await };
        match tokio::time::timeout(WRITE_BUDGET, written).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return Ended::NotReading,
        }
    }
}
