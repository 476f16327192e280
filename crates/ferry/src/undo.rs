//! What a roll-back of a frozen guest needs, on disk: one file for each guest, which a daemon that was started again finds.

use migrate::{Doing, Result, Trouble};
use pv_backend::source::Snapshot;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Changes with every boot of the kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Debug, Serialize, Deserialize)]
struct Undo {
    /// It is of no use after a restart of the host, nor for a guest that was started anew: their nodes are others.
    boot: String,
    domid: u16,
    snapshot: Snapshot,
}

fn path(dir: &Path, guest: Uuid) -> PathBuf {
    dir.join(guest.to_string())
}

fn boot() -> String {
    std::fs::read_to_string(BOOT_ID).unwrap_or_default()
}

/// The file is whole on disk when this returns, or as it was before.
pub fn write(dir: &Path, guest: Uuid, domid: u16, snapshot: &Snapshot) -> Result<()> {
    let undo = Undo { boot: boot(), domid, snapshot: snapshot.clone() };
    let new = path(dir, guest).with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec(&undo)?)?;
    file.sync_all()?;
    std::fs::rename(new, path(dir, guest))?;
    Ok(File::open(dir)?.sync_all()?)
}

/// `None`: there is none for this domain, so nothing of it was touched.
pub fn read(dir: &Path, guest: Uuid, domid: u16) -> Result<Option<Snapshot>> {
    let path = path(dir, guest);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Trouble::because(format!("read {}", path.display()), error)),
    };
    let undo: Undo =
        serde_json::from_slice(&text).doing(format!("read {}, which a roll-back needs", path.display()))?;
    Ok((undo.boot == boot() && undo.domid == domid).then_some(undo.snapshot))
}

pub fn remove(dir: &Path, guest: Uuid) -> Result<()> {
    match std::fs::remove_file(path(dir, guest)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_for_this_very_domain_is_undone() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, guest) = (dir.path(), Uuid::from_u128(7));
        assert_eq!(read(dir, guest, 5).unwrap(), None);
        let mut snapshot = Snapshot::default();
        snapshot.areas.insert("/local/domain/5/device/vif/0".into(), [(String::new(), Vec::new())].into());
        write(dir, guest, 5, &snapshot).unwrap();
        assert_eq!(read(dir, guest, 5).unwrap(), Some(snapshot.clone()));
        assert_eq!(read(dir, guest, 6).unwrap(), None, "started anew");
        let old = Undo { boot: "another".into(), domid: 5, snapshot };
        std::fs::write(path(dir, guest), serde_json::to_vec(&old).unwrap()).unwrap();
        assert_eq!(read(dir, guest, 5).unwrap(), None, "from before a restart of the host");
        std::fs::write(path(dir, guest), b"{").unwrap();
        assert!(read(dir, guest, 5).is_err(), "damage is not taken for nothing to do");
        remove(dir, guest).unwrap();
        remove(dir, guest).unwrap();
        assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0);
    }
}
