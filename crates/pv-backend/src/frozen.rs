//! The store as it was when a domain was frozen, held in memory.
//!
//! A round trip to xenstored costs some 50 µs, several ms on a busy host, and looking at a guest's devices takes hundreds.
//! Within the blackout they are read from an export of the frozen store instead (`Client::export_domain` with
//! [`prefixes`]), which takes a handful. Everything here that reads a store reads this one too.

use std::collections::BTreeMap;

use xenstore_client::Perm;
use xenstore_wire::stream::{Record, read_all};

use crate::error::{Error, Result};
use crate::store::Store;

/// What to export so that [`crate::device::discover`], [`crate::source::snapshot`] and [`crate::records::capture`] find all
/// they look for.
pub fn prefixes(domid: u16, uuid: &str) -> Vec<String> {
    let mut prefixes = vec![format!("/local/domain/{domid}"), format!("/libxl/{domid}"), format!("/vm/{uuid}")];
    prefixes.extend(["vif", "vbd", "console"].map(|kind| format!("/local/domain/0/backend/{kind}/{domid}")));
    prefixes
}

/// Of [`prefixes`], those that a destination can import as they are. The backends' areas of vifs and vbds it makes itself, so
/// that dom0's drivers take them up; importing the rest saves it `records::install`'s round trips.
pub fn importable(domid: u16, uuid: &str) -> Vec<String> {
    let made_there = ["vif", "vbd"].map(|kind| format!("/local/domain/0/backend/{kind}/{domid}"));
    prefixes(domid, uuid).into_iter().filter(|prefix| !made_there.contains(prefix)).collect()
}

/// Refuses a stream from the peer that would touch other parts of this host's store than the guest's ([`importable`]), by its
/// nodes or by what its open transactions have written.
pub fn check_import(stream: &[u8], domid: u16, uuid: &str) -> Result<()> {
    let bad = |path: String, why: &str| Err(Error::Node { path, why: why.to_owned() });
    let allowed = importable(domid, uuid);
    let records = match read_all(stream) {
        Ok((_, records)) => records,
        Err(error) => return bad("(the guest's part of the store, as it came)".to_owned(), &error.to_string()),
    };
    for record in records {
        let Record::Node { conn_id, access, path, .. } = record else { continue };
        let Ok(path) = String::from_utf8(path) else {
            return bad("(the guest's part of the store, as it came)".to_owned(), "a path that is no text");
        };
        let inside = allowed.iter().any(|prefix| {
            path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        if !inside && (conn_id == 0 || access.written) {
            return bad(path, "the peer sent it as part of the guest's store, which it is not");
        }
    }
    Ok(())
}

/// Nodes of a store that can only be read.
#[derive(Debug, Clone, Default)]
pub struct Frozen {
    nodes: BTreeMap<String, (Vec<u8>, Vec<Perm>)>,
}

impl Frozen {
    /// From a xenstore-migration stream. Nodes of open transactions are left out.
    pub fn from_stream(stream: &[u8]) -> Result<Frozen> {
        let bad = |why: String| Error::Node { path: "(export of the frozen store)".to_owned(), why };
        let (_, records) = read_all(stream).map_err(|error| bad(error.to_string()))?;
        let mut nodes = BTreeMap::new();
        for record in records {
            if let Record::Node { conn_id: 0, tx_id: 0, perms, path, value, .. } = record {
                let path = String::from_utf8(path).map_err(|_| bad("a path that is no text".to_owned()))?;
                nodes.insert(path, (value, perms));
            }
        }
        Ok(Frozen { nodes })
    }

    fn read_only<T>(path: &str) -> Result<T> {
        Err(Error::Node { path: path.to_owned(), why: "a frozen store can't be written".to_owned() })
    }
}

impl Store for Frozen {
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.nodes.get(path).map(|(value, _)| value.clone()))
    }

    fn write(&mut self, path: &str, _value: &[u8]) -> Result<()> {
        Frozen::read_only(path)
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        Frozen::read_only(path)
    }

    /// An ancestor of exported nodes counts as there, with those children that lead to them.
    fn list(&mut self, path: &str) -> Result<Option<Vec<String>>> {
        let below = format!("{}/", path.trim_end_matches('/'));
        let mut names: Vec<String> = Vec::new();
        for node in self.nodes.range(below.clone()..).map(|(node, _)| node).take_while(|node| node.starts_with(&below))
        {
            let name = node[below.len()..].split('/').next().unwrap_or_default();
            if names.last().is_none_or(|last| last != name) {
                names.push(name.to_owned());
            }
        }
        // Siblings with a name that sorts between a node and its children ("a", "a-b", "a/c") split a run.
        names.sort();
        names.dedup();
        Ok((!names.is_empty() || self.nodes.contains_key(path)).then_some(names))
    }

    fn permissions(&mut self, path: &str) -> Result<Vec<Perm>> {
        match self.nodes.get(path) {
            Some((_, perms)) => Ok(perms.clone()),
            None => Err(Error::Node { path: path.to_owned(), why: "it was not exported".to_owned() }),
        }
    }

    fn set_permissions(&mut self, path: &str, _permissions: &[Perm]) -> Result<()> {
        Frozen::read_only(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xenstore_wire::stream::{Format, TxAccess, write_all};

    fn stream(path: &str, conn_id: u32, written: bool) -> Vec<u8> {
        let node = Record::Node {
            conn_id,
            tx_id: conn_id,
            access: TxAccess { read: true, written },
            perms: vec![Perm::parse(b"n0").unwrap()],
            path: path.as_bytes().to_vec(),
            value: b"x".to_vec(),
        };
        write_all(Format::V2, &[node]).unwrap()
    }

    #[test]
    fn an_import_may_touch_the_guests_own_nodes_only() {
        let check = |path, conn, written| check_import(&stream(path, conn, written), 7, "u-u").is_ok();
        for path in ["/local/domain/7", "/local/domain/7/device/vif/0/state", "/libxl/7/type", "/vm/u-u/name"] {
            assert!(check(path, 0, false), "{path}");
        }
        for path in
            ["/local/domain/70/x", "/local/domain/0/backend/vbd/7/51712/params", "/libxl/71", "/vm/u-u2", "/tool", "@x"]
        {
            assert!(!check(path, 0, false), "{path}");
            // What a transaction has only read does no harm.
            assert!(check(path, 1, false) && !check(path, 1, true), "{path}");
        }
        assert!(check_import(b"xenstore, or not", 7, "u-u").is_err());
    }
}
