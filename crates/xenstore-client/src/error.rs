use thiserror::Error;
use xenstore_wire::{Errno, Op};

/// What can go wrong.
#[derive(Debug, Error)]
pub enum Error {
    /// The daemon said no.
    #[error("xenstore {} {what}: {errno}", op.name())]
    Refused {
        /// The operation.
        op: Op,
        /// The path or domain.
        what: String,
        /// Its answer.
        errno: Errno,
    },
    /// No connection.
    #[error("cannot connect to xenstored at {path} (is it running?)")]
    Connect {
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke, and no daemon came back in time.
    #[error("connection to xenstored lost (was it killed?)")]
    Io(#[source] std::io::Error),
    /// The daemon has not answered within the limit ([`crate::Client::open_within`]), or another request before.
    #[error("xenstore {} {what}: no answer within {limit:?}; xenstored hangs or is stopped, see to it on this host", op.name())]
    TimedOut {
        /// The operation.
        op: Op,
        /// The path or domain.
        what: String,
        /// How long was waited.
        limit: std::time::Duration,
    },
    /// The connection broke, and there is another. Nobody can say whether the request was carried out.
    #[error(
        "xenstore {} {what}: xenstored was started anew before it answered, and has done this or not; look, and do it again if need be",
        op.name()
    )]
    Unsure {
        /// The operation.
        op: Op,
        /// The path or domain.
        what: String,
    },
    /// The connection broke, and the daemon that is there now does not let the watch be. The client has forgotten it.
    #[error(
        "xenstore WATCH {path} (token {token}): xenstored was started anew and refuses it: {errno}; nothing is heard of that path any more \
         until it is watched again"
    )]
    WatchLost {
        /// Of the watch.
        path: String,
        /// Of the watch.
        token: String,
        /// The daemon's answer.
        errno: Errno,
    },
    /// The daemon does not speak the protocol.
    #[error("xenstore {}: unexpected answer: {what}", op.name())]
    Protocol {
        /// The operation.
        op: Op,
        /// What came.
        what: &'static str,
    },
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn refused(op: Op, what: &str, errno: Errno) -> Error {
        Error::Refused { op, what: what.into(), errno }
    }

    pub(crate) fn unsure(op: Op, what: &str) -> Error {
        Error::Unsure { op, what: what.into() }
    }

    /// `watch`: path and token, as they were sent.
    pub(crate) fn watch_lost(watch: &[u8], errno: Errno) -> Error {
        let mut parts = xenstore_wire::payload::strings(watch).map(|part| String::from_utf8_lossy(part).into_owned());
        let mut next = || parts.next().unwrap_or_default();
        Error::WatchLost { path: next(), token: next(), errno }
    }

    pub(crate) fn protocol(op: Op, what: &'static str) -> Error {
        Error::Protocol { op, what }
    }

    /// The daemon's answer, if it is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } | Error::WatchLost { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}
