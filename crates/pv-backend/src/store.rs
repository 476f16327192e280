//! The part of xenstore that is needed here.

use std::collections::BTreeMap;

use xenstore_client::{Client, Errno, Nodes, Perm};

use crate::error::Result;

/// A store, seen from dom0.
pub trait Store {
    /// The value of a node, `None` if there is no such node.
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>>;
    /// Sets a value; makes the node (with its parent's permissions) and its parents.
    fn write(&mut self, path: &str, value: &[u8]) -> Result<()>;
    /// Removes a node and all below it; no error if it is not there.
    fn remove(&mut self, path: &str) -> Result<()>;
    /// Names of the children; `None` if there is no such node.
    fn list(&mut self, path: &str) -> Result<Option<Vec<String>>>;
    /// Permissions, the owner first.
    fn permissions(&mut self, path: &str) -> Result<Vec<Perm>>;
    /// Sets permissions.
    fn set_permissions(&mut self, path: &str, permissions: &[Perm]) -> Result<()>;

    /// A value as text without surrounding blanks; `None` if there is no such node.
    fn text(&mut self, path: &str) -> Result<Option<String>> {
        Ok(self.read(path)?.map(|value| String::from_utf8_lossy(&value).trim().to_owned()))
    }

    /// A value as a number; `None` if the node is not there or holds none.
    fn number(&mut self, path: &str) -> Result<Option<u32>> {
        Ok(self.text(path)?.and_then(|text| text.parse().ok()))
    }

    /// Every node below `root` by its path relative to it, `root` itself as "". Empty if it is not there.
    ///
    /// The depth is bounded by the protocol's longest path, the number of nodes by the store's quotas.
    fn tree(&mut self, root: &str) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut nodes = BTreeMap::new();
        let mut open = vec![String::new()];
        while let Some(relative) = open.pop() {
            let path = join(root, &relative);
            // A node may go away between the listing and here.
            let (Some(value), Some(children)) = (self.read(&path)?, self.list(&path)?) else { continue };
            open.extend(children.iter().map(|child| join_relative(&relative, child)));
            nodes.insert(relative, value);
        }
        Ok(nodes)
    }
}

/// `root` with a relative path below it.
pub fn join(root: &str, relative: &str) -> String {
    if relative.is_empty() { root.to_owned() } else { format!("{root}/{relative}") }
}

fn join_relative(parent: &str, child: &str) -> String {
    if parent.is_empty() { child.to_owned() } else { format!("{parent}/{child}") }
}

/// Makes the nodes below `root` hold what `wanted` holds: writes those that differ or are missing, removes those that
/// are too many, leaves `keep` (relative paths) alone. Gives the number of changes.
pub fn restore(store: &mut dyn Store, root: &str, wanted: &BTreeMap<String, Vec<u8>>, keep: &[&str]) -> Result<usize> {
    let mut changes = 0;
    let present = store.tree(root)?;
    for (relative, value) in wanted {
        if !keep.contains(&relative.as_str()) && present.get(relative) != Some(value) {
            store.write(&join(root, relative), value)?;
            changes += 1;
        }
    }
    for relative in present.keys().filter(|relative| !relative.is_empty()) {
        if !keep.contains(&relative.as_str()) && !wanted.contains_key(relative) {
            store.remove(&join(root, relative))?;
            changes += 1;
        }
    }
    Ok(changes)
}

impl Store for Client {
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.read_opt(path)?)
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<()> {
        Ok(Nodes::write(self, path, value)?)
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        match self.rm(path) {
            // Its parent is not there either.
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(()),
            other => Ok(other?),
        }
    }

    fn list(&mut self, path: &str) -> Result<Option<Vec<String>>> {
        match self.directory(path) {
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(None),
            other => Ok(other.map(Some)?),
        }
    }

    fn permissions(&mut self, path: &str) -> Result<Vec<Perm>> {
        Ok(self.get_perms(path)?)
    }

    fn set_permissions(&mut self, path: &str, permissions: &[Perm]) -> Result<()> {
        Ok(self.set_perms(path, permissions)?)
    }
}
