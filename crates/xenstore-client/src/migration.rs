//! Ferry's own operations: a domain's connection frozen, exported, imported, attached.
//! Specified in docs/xenstore-migration-ops.md. A stock daemon answers all of them with `ENOSYS`.

use crate::{Client, Errno, Error, Result};
use xenstore_wire::{Op, PAYLOAD_MAX, payload};

/// Bytes of stream in one import request: the payload's limit less room for two numbers and their NULs.
const CHUNK: usize = PAYLOAD_MAX - 32;

/// A watch of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainWatch {
    /// As the domain gave it; may be relative.
    pub path: String,
    /// Its token.
    pub token: String,
    /// Levels below the path, if limited.
    pub depth: Option<u16>,
}

/// How an import treats watchers other than the domain itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// They see every node that changes, as if it had been written.
    Others,
    /// Nobody sees anything.
    Nobody,
}

impl Client {
    /// Names of the features of docs/xenstore-migration-ops.md that the daemon has; empty for a stock daemon.
    pub fn ferry_features(&mut self) -> Result<Vec<String>> {
        match self.request(Op::FerryFeatures, 0, &[0], "") {
            Ok(r) => Ok(payload::strings(&r).map(|s| String::from_utf8_lossy(s).into_owned()).collect()),
            Err(e) if e.errno() == Some(Errno::ENOSYS) => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    /// Stops serving the domain's connection and takes a snapshot of the store, which [`Client::export_domain`] reads.
    pub fn freeze_domain(&mut self, domid: u16) -> Result<()> {
        let b = payload::join([domid.to_string()]);
        self.request(Op::DomainFreeze, 0, &b, &format!("domain {domid}")).map(drop)
    }

    /// Serves the connection again. Events that came up meanwhile are delivered, but for those whose path lies at or
    /// below one of `drop_below`.
    pub fn thaw_domain(&mut self, domid: u16, drop_below: &[&str]) -> Result<()> {
        let mut b = payload::join([domid.to_string()]);
        b.extend(payload::join(drop_below));
        self.request(Op::DomainThaw, 0, &b, &format!("domain {domid}")).map(drop)
    }

    /// The frozen domain's connection (watches, transactions, bytes in flight), quotas, and the nodes at and below
    /// `prefixes` as they were at the freeze: a xenstore-migration stream of version 2.
    pub fn export_domain(&mut self, domid: u16, prefixes: &[&str]) -> Result<Vec<u8>> {
        let what = format!("domain {domid}");
        let bad = || Error::protocol(Op::DomainExport, "a chunk that does not fit the ones before");
        let mut stream = Vec::new();
        loop {
            let mut b = payload::join([domid.to_string(), stream.len().to_string()]);
            b.extend(payload::join(prefixes));
            let r = self.request(Op::DomainExport, 0, &b, &what)?;
            let (total, bytes) = payload::split_first(&r).map_err(|_| bad())?;
            let total: usize = payload::decimal(total).map_err(|_| bad())?;
            stream.extend_from_slice(bytes);
            if stream.len() == total {
                return Ok(stream);
            }
            if bytes.is_empty() || stream.len() > total {
                return Err(bad());
            }
        }
    }

    /// Brings a stream for a domain that is not introduced, and applies it. Its watches stay silent until
    /// [`Client::attach_domain`]. [`Client::abort_import`] undoes it.
    pub fn import_domain(&mut self, domid: u16, stream: &[u8], notify: Notify) -> Result<()> {
        let what = format!("domain {domid}");
        let mut offset = 0;
        for chunk in stream.chunks(CHUNK) {
            let mut b = payload::join([domid.to_string(), offset.to_string()]);
            b.extend_from_slice(chunk);
            self.request(Op::DomainImportData, 0, &b, &what)?;
            offset += chunk.len();
        }
        let notify = match notify {
            Notify::Others => "others",
            Notify::Nobody => "nobody",
        };
        let b = payload::join([domid.to_string(), stream.len().to_string(), notify.into()]);
        self.request(Op::DomainImport, 0, &b, &what).map(drop)
    }

    /// Connects the daemon with an imported domain: the ring's indexes stay, its watches count from now on, and nothing
    /// is sent but what the stream brought. `port` is the guest's port. Others see `@introduceDomain`.
    pub fn attach_domain(&mut self, domid: u16, port: u32) -> Result<()> {
        let b = payload::join([domid.to_string(), port.to_string()]);
        self.request(Op::DomainAttach, 0, &b, &format!("domain {domid}")).map(drop)
    }

    /// Undoes an import, or forgets what was brought: the nodes are as they were before. Not possible after the attach.
    pub fn abort_import(&mut self, domid: u16) -> Result<()> {
        let b = payload::join([domid.to_string()]);
        self.request(Op::DomainImportAbort, 0, &b, &format!("domain {domid}")).map(drop)
    }

    /// The watches of a connected (or imported) domain, in the order in which it registered them.
    pub fn domain_watches(&mut self, domid: u16) -> Result<Vec<DomainWatch>> {
        let bad = || Error::protocol(Op::DomainListWatches, "a list that can't be read");
        let mut all: Vec<DomainWatch> = Vec::new();
        loop {
            let b = payload::join([domid.to_string(), all.len().to_string()]);
            let r = self.request(Op::DomainListWatches, 0, &b, &format!("domain {domid}"))?;
            let mut s = payload::strings(&r);
            let total: usize = payload::decimal(s.next().ok_or_else(bad)?).map_err(|_| bad())?;
            let before = all.len();
            while let Some(path) = s.next() {
                let (token, depth) = (s.next().ok_or_else(bad)?, s.next().ok_or_else(bad)?);
                let depth = if depth.is_empty() { None } else { Some(payload::decimal(depth).map_err(|_| bad())?) };
                let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
                all.push(DomainWatch { path: text(path), token: text(token), depth });
            }
            if all.len() >= total {
                return Ok(all);
            }
            if all.len() == before {
                return Err(bad());
            }
        }
    }

    /// Registers a watch for another domain, which is not told. No initial event.
    pub fn set_domain_watch(&mut self, domid: u16, path: &str, token: &str, depth: Option<u16>) -> Result<()> {
        let mut b = payload::join([&domid.to_string(), path, token]);
        if let Some(d) = depth {
            b.extend(payload::join([d.to_string()]));
        }
        self.request(Op::DomainSetWatch, 0, &b, &format!("domain {domid} {path}")).map(drop)
    }
}
