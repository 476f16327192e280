//! A part of a store in memory: read from a daemon or from a stream.

use anyhow::Context;
use std::collections::BTreeMap;
use xenstore_client::{Client, Errno, Nodes, Perm};
use xenstore_wire::stream::{Format, Record, TxAccess, read_all, write_all};

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Any bytes.
    pub value: Vec<u8>,
    /// Owner first.
    pub perms: Vec<Perm>,
}

/// Paths and nodes, and the paths in the order in which a client lists them.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    /// By path.
    pub nodes: BTreeMap<String, Node>,
    /// Parents first, children in their order.
    pub order: Vec<String>,
}

impl Tree {
    /// Reads all at and below `path`, node by node.
    ///
    /// # Errors
    /// There is no such node, or the daemon can't be asked.
    pub fn read(c: &mut Client, path: &str) -> anyhow::Result<Tree> {
        let mut tree = Tree::default();
        let mut todo = vec![path.to_owned()];
        while let Some(p) = todo.pop() {
            let node = (|| -> xenstore_client::Result<(Node, Vec<String>)> {
                Ok((Node { value: c.read(&p)?, perms: c.get_perms(&p)? }, c.directory(&p)?))
            })();
            let (node, children) = match node {
                // Gone since its parent was listed.
                Err(e) if e.errno() == Some(Errno::ENOENT) && p != path => continue,
                r => r?,
            };
            let slash = if p == "/" { "" } else { "/" };
            todo.extend(children.iter().rev().map(|n| format!("{p}{slash}{n}")));
            tree.push(p, node);
        }
        Ok(tree)
    }

    fn push(&mut self, path: String, node: Node) {
        if self.nodes.insert(path.clone(), node).is_none() {
            self.order.push(path);
        }
    }

    /// Committed nodes of a xenstore-migration stream.
    ///
    /// # Errors
    /// It is none.
    pub fn from_stream(bytes: &[u8]) -> anyhow::Result<Tree> {
        let mut tree = Tree::default();
        for r in read_all(bytes)?.1 {
            if let Record::Node { conn_id: 0, perms, path, value, .. } = r
                && path.first() == Some(&b'/')
            {
                let path = String::from_utf8(path).context("a path that is no text")?;
                tree.push(path, Node { value, perms });
            }
        }
        Ok(tree)
    }

    /// As a xenstore-migration stream.
    ///
    /// # Errors
    /// A value of more than 65535 bytes.
    pub fn to_stream(&self) -> anyhow::Result<Vec<u8>> {
        let records: Vec<Record> = self
            .order
            .iter()
            .filter_map(|p| Some((p, self.nodes.get(p)?)))
            .map(|(p, n)| Record::Node {
                conn_id: 0,
                tx_id: 0,
                access: TxAccess::default(),
                perms: n.perms.clone(),
                path: p.clone().into_bytes(),
                value: n.value.clone(),
            })
            .collect();
        Ok(write_all(Format::V1, &records)?)
    }

    /// Writes all nodes, in one transaction, with their permissions.
    ///
    /// # Errors
    /// As the daemon says.
    pub fn write(&self, c: &mut Client) -> anyhow::Result<()> {
        c.transaction(|t| {
            for p in &self.order {
                if let Some(n) = self.nodes.get(p) {
                    t.write(p, &n.value)?;
                    t.set_perms(p, &n.perms)?;
                }
            }
            Ok(())
        })?;
        Ok(())
    }
}

/// A difference between two trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Only in the second.
    Added(Node),
    /// Only in the first.
    Removed(Node),
    /// In both, not the same.
    Changed(Node, Node),
}

/// What is different, by path.
pub fn diff(a: &Tree, b: &Tree) -> BTreeMap<String, Change> {
    let mut out = BTreeMap::new();
    for (p, n) in &a.nodes {
        match b.nodes.get(p) {
            None => drop(out.insert(p.clone(), Change::Removed(n.clone()))),
            Some(m) if m != n => drop(out.insert(p.clone(), Change::Changed(n.clone(), m.clone()))),
            Some(_) => {}
        }
    }
    for (p, m) in b.nodes.iter().filter(|(p, _)| !a.nodes.contains_key(*p)) {
        out.insert(p.clone(), Change::Added(m.clone()));
    }
    out
}

/// A value for people: printable characters as they are, others escaped.
pub fn shown(value: &[u8]) -> String {
    let mut s = String::from("\"");
    for &b in value {
        match b {
            b'"' | b'\\' => s.extend(['\\', b as char]),
            b' '..=b'~' => s.push(b as char),
            b'\n' => s.push_str("\\n"),
            b'\t' => s.push_str("\\t"),
            _ => s.push_str(&format!("\\x{b:02x}")),
        }
    }
    s.push('"');
    s
}

/// Permissions for people, as `xenstore-ls -p` writes them.
pub fn shown_perms(perms: &[Perm]) -> String {
    perms.iter().map(|p| if p.stale { format!("{p} (stale)") } else { p.to_string() }).collect::<Vec<_>>().join(",")
}
