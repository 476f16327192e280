//! The folder where everything fetched or made once is kept: `$FERRY_CACHE`, or `ferry` in the user's cache folder.

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The cache folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// While it lives no other process makes anything in the cache.
#[derive(Debug)]
pub struct Making {
    _file: File,
}

impl Cache {
    /// Opens the cache folder, making it if need be.
    pub fn open() -> Result<Cache> {
        let root = if let Some(path) = std::env::var_os("FERRY_CACHE") {
            PathBuf::from(path)
        } else if let Some(path) = std::env::var_os("XDG_CACHE_HOME") {
            PathBuf::from(path).join("ferry")
        } else if let Some(home) = std::env::var_os("HOME") {
            PathBuf::from(home).join(".cache/ferry")
        } else {
            bail!("no place for the cache: set FERRY_CACHE (or HOME)");
        };
        fs::create_dir_all(&root).with_context(|| {
            format!("the cache folder {} can't be made; set FERRY_CACHE to another", root.display())
        })?;
        Ok(Cache { root: root.canonicalize().context("resolve the cache folder")? })
    }

    /// A path in the cache.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// Waits until no other process makes anything in the cache.
    pub fn make(&self) -> Result<Making> {
        let path = self.path("lock");
        let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            crate::progress::say("another process fills the cache; waiting for it");
            flock(&file, FlockOperation::LockExclusive).context("wait for the cache")?;
        }
        Ok(Making { _file: file })
    }

    /// Fails with a clear message if less than `bytes` are free.
    pub fn need_space(&self, bytes: u64) -> Result<()> {
        need_space(&self.root, bytes, "set FERRY_CACHE to a folder that has it")
    }
}

/// Fails with a clear message if less than `bytes` are free in a folder; `otherwise` is what else can be done than make room.
pub fn need_space(folder: &Path, bytes: u64, otherwise: &str) -> Result<()> {
    let stat =
        rustix::fs::statvfs(folder).with_context(|| format!("ask for the free space in {}", folder.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < bytes {
        bail!(
            "{} has {} MiB free and the lab needs {} MiB there: make room, or {otherwise}",
            folder.display(),
            free >> 20,
            bytes.div_ceil(1 << 20)
        );
    }
    Ok(())
}

/// Says that a file of the cache was used now; `false` if it is not there.
pub fn touch(path: &Path) -> bool {
    fs::File::open(path).and_then(|file| file.set_modified(std::time::SystemTime::now())).is_ok()
}

/// Removes all but the `keep` last used files of a folder whose names `of_kind` accepts.
pub fn forget_oldest(folder: &Path, keep: usize, of_kind: impl Fn(&str) -> bool) {
    let mut files: Vec<_> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| of_kind(&entry.file_name().to_string_lossy()))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    for (_, path) in files.iter().take(files.len().saturating_sub(keep)) {
        let _ = fs::remove_file(path);
    }
}

/// A short key for content: the first 16 hex digits of the SHA-256 over all parts, each with its length.
pub fn key<T: AsRef<[u8]>>(parts: impl IntoIterator<Item = T>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn the_last_used_of_a_kind_stay() {
        let folder = tempfile::tempdir().expect("a scratch folder");
        for (age, name) in [(50, "a.x"), (40, "b.x"), (30, "c.y"), (20, "d.x")] {
            let file = File::create(folder.path().join(name)).expect("a file");
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("its time");
        }
        assert!(touch(&folder.path().join("a.x")));
        assert!(!touch(&folder.path().join("none")));
        forget_oldest(folder.path(), 2, |name| name.ends_with(".x"));
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).expect("readable").flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.x", "c.y", "d.x"]);
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
    }
}
