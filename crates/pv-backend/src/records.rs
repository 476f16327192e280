//! libxl's books about a domain, so that stock `xl` manages it on the host it came to: nodes under `/libxl/<domid>`,
//! `/vm/<uuid>` and the console's backend area, and files of userdata.
//!
//! The domain keeps its id and UUID, so the books are copied as they are, but for values of the host: those of
//! [`dropped`].

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use xenstore_client::Perm;

use crate::error::{Error, Result};
use crate::store::{Store, join};

/// Where libxl keeps userdata (`XEN_LIB_DIR`).
pub const USERDATA: &str = "/var/lib/xen";
/// Where libxl keeps the list of ids that were in use lately (`XEN_RUN_DIR`).
pub const RUN: &str = "/run/xen";
/// Largest file of userdata that is taken over; libxl's JSON has some kilobytes.
const FILE_MAX: u64 = 1 << 20;

/// A node with its permissions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Absolute.
    pub path: String,
    /// Its value.
    pub value: Vec<u8>,
    /// As the protocol writes them, the owner first: "n0", "r7".
    pub permissions: Vec<String>,
}

/// The books.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    /// Nodes, parents before children.
    pub nodes: Vec<Node>,
    /// Userdata by name ("libxl-json").
    pub userdata: Vec<(String, Vec<u8>)>,
}

/// Values that belong to the host: not copied.
fn dropped(path: &str) -> bool {
    path.ends_with("/console/tty") || path.ends_with("/vnc-port") || path.ends_with("/image/device-model-pid")
}

fn roots(domid: u16, uuid: &str) -> [String; 3] {
    [format!("/libxl/{domid}"), format!("/vm/{uuid}"), format!("/local/domain/0/backend/console/{domid}")]
}

/// Reads the books on the source. `directory` is [`USERDATA`].
pub fn capture(store: &mut dyn Store, domid: u16, uuid: &str, directory: &Path) -> Result<Records> {
    let mut records = Records::default();
    for root in roots(domid, uuid) {
        for (relative, value) in store.tree(&root)? {
            let path = join(&root, &relative);
            if dropped(&path) {
                continue;
            }
            let permissions = store.permissions(&path)?.iter().map(ToString::to_string).collect();
            records.nodes.push(Node { path, value, permissions });
        }
    }
    let prefix = format!("userdata-d.{domid}.{uuid}.");
    let failed = |source| Error::Machine { what: format!("read libxl's userdata in {}", directory.display()), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let file = entry.file_name();
        let Some(name) = file.to_str().and_then(|file| file.strip_prefix(&prefix)) else { continue };
        if entry.metadata().map_err(failed)?.len() <= FILE_MAX {
            records.userdata.push((name.to_owned(), fs::read(entry.path()).map_err(failed)?));
        }
    }
    records.userdata.sort();
    Ok(records)
}

/// Writes the books on the destination. Refuses nodes outside their places and names that are no file names: they come
/// from the peer.
pub fn install(store: &mut dyn Store, domid: u16, uuid: &str, records: &Records, directory: &Path) -> Result<()> {
    let roots = roots(domid, uuid);
    let mut permissions = Vec::new();
    for node in &records.nodes {
        let inside = roots.iter().any(|root| {
            node.path == *root || node.path.strip_prefix(root.as_str()).is_some_and(|rest| rest.starts_with('/'))
        });
        let perms: Vec<Perm> = node.permissions.iter().filter_map(|perm| Perm::parse(perm.as_bytes()).ok()).collect();
        if !inside || perms.is_empty() || perms.len() != node.permissions.len() {
            let why = format!("the peer sent it among libxl's records of domain {domid}, where it has no place");
            return Err(Error::Node { path: node.path.clone(), why });
        }
        permissions.push(perms);
    }
    if let Some((name, _)) = records.userdata.iter().find(|(name, _)| !is_plain(name)) {
        let why = "the peer sent userdata of that name, which is none".to_owned();
        return Err(Error::Node { path: name.clone(), why });
    }
    for (node, perms) in records.nodes.iter().zip(&permissions) {
        store.write(&node.path, &node.value)?;
        store.set_permissions(&node.path, perms)?;
    }
    for (name, contents) in &records.userdata {
        write_file(directory, domid, uuid, name, contents).map_err(|source| Error::Machine {
            what: format!("write libxl's userdata {name} of domain {domid}"),
            source,
        })?;
    }
    Ok(())
}

fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.len() < 100 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// As libxl does: a new file beside the old one, then renamed.
fn write_file(directory: &Path, domid: u16, uuid: &str, name: &str, contents: &[u8]) -> io::Result<()> {
    let path = |kind: char| -> PathBuf { directory.join(format!("userdata-{kind}.{domid}.{uuid}.{name}")) };
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path('n'))?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(path('n'), path('d'))
}

/// Takes the books away: on the source after the guest has gone, on the destination after an abort. With the domain's own
/// part of the store.
pub fn remove(store: &mut dyn Store, domid: u16, uuid: &str, directory: &Path) -> Result<()> {
    for root in roots(domid, uuid).into_iter().chain([format!("/local/domain/{domid}")]) {
        store.remove(&root)?;
    }
    let failed = |source| Error::Machine { what: format!("remove libxl's userdata of domain {domid}"), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let file = entry.file_name();
        let ours = file.to_str().is_some_and(|file| {
            file.strip_prefix("userdata-")
                .is_some_and(|rest| rest.get(1..).is_some_and(|rest| rest.starts_with(&format!(".{domid}.{uuid}."))))
        });
        if ours {
            fs::remove_file(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// Marks an id as used just now in libxl's list, so that stock `xl` does not give it to a new domain for a while.
/// `directory` is [`RUN`]. Lock and format are libxl's (`libxl__mark_domid_recent`): `<seconds since boot> <domid>`.
pub fn quarantine(domid: u16, directory: &Path) -> Result<()> {
    let failed = |source| Error::Machine { what: format!("note domain {domid} in libxl's domid-history"), source };
    quarantine_in(domid, directory).map_err(failed)
}

fn quarantine_in(domid: u16, directory: &Path) -> io::Result<()> {
    let path = |suffix: &str| directory.join(format!("domid-history{suffix}"));
    let lock_path = path(".lock");
    // libxl unlinks its lock file when it lets go, so a lock counts only while its file is still the one at the path.
    let _lock = loop {
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock_path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        let (ours, there) = (rustix::fs::fstat(&file)?, rustix::fs::stat(&lock_path));
        if there.is_ok_and(|there| (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)) {
            break file;
        }
    };
    let now = clock_gettime(ClockId::Monotonic).tv_sec;
    let mut text = match fs::read_to_string(path("")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    text.push_str(&format!("{now} {domid}\n"));
    fs::write(path(".new"), text)?;
    let renamed = fs::rename(path(".new"), path(""));
    // Before the lock is let go, as libxl does.
    let _ = fs::remove_file(&lock_path);
    renamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quarantine_appends_in_libxls_format_and_leaves_no_lock() {
        let dir = std::env::temp_dir().join(format!("pv-backend-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("domid-history"), "12 7\n").unwrap();
        quarantine(9, &dir).unwrap();
        let text = fs::read_to_string(dir.join("domid-history")).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "12 7");
        let (seconds, domid) = lines[1].split_once(' ').unwrap();
        assert!(seconds.parse::<u64>().is_ok() && domid == "9");
        assert!(!dir.join("domid-history.lock").exists() && !dir.join("domid-history.new").exists());
        fs::remove_dir_all(&dir).unwrap();
    }
}
