//! One lab at a time on a machine: two would starve each other and spoil every measured time.

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Held while a lab runs. The kernel releases it with the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

fn path() -> PathBuf {
    let standard = Path::new("/run/lock");
    let directory = if standard.is_dir() { standard.to_owned() } else { std::env::temp_dir() };
    directory.join("ferry-lab.lab")
}

/// Opens the lock's file, which any user may have made: in a folder like /run/lock the kernel lets nobody open another's
/// file with O_CREAT, so that is used only when there is none.
fn open(path: &Path) -> std::io::Result<File> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true);
    match options.open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let file = options.create(true).truncate(false).open(path)?;
            // The umask took the others' permission away.
            file.set_permissions(fs::Permissions::from_mode(0o666))?;
            Ok(file)
        }
        opened => opened,
    }
}

impl Lock {
    /// Takes the lock, waiting for at most `wait` if another lab runs.
    pub fn take(wait: Option<Duration>) -> Result<Lock> {
        let path = path();
        let mut file = open(&path).with_context(|| format!("open the lab's lock {}", path.display()))?;
        let end = wait.map(|wait| Instant::now() + wait);
        let mut said = false;
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let holder = fs::read_to_string(&path).unwrap_or_default();
            let holder = if holder.is_empty() { "another process".to_owned() } else { holder.trim().to_owned() };
            if end.is_none_or(|end| Instant::now() >= end) {
                bail!("a lab runs already: {holder}. One runs at a time; wait for it with --wait SECONDS, or end it.");
            }
            if !said {
                crate::progress::say(format!("waiting for the lab: {holder}"));
                said = true;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        file.set_len(0).context("clear the lab's lock")?;
        let command: Vec<String> = std::env::args().collect();
        write!(file, "process {}, {}", std::process::id(), command.join(" ")).context("sign the lab's lock")?;
        Ok(Lock { _file: file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self._file.set_len(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_for_every_user() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        let path = folder.path().join("lock");
        for _ in 0..2 {
            let file = open(&path).expect("opened");
            assert_eq!(file.metadata().expect("its data").permissions().mode() & 0o777, 0o666);
        }
    }
}
