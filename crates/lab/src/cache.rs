//! The folder where everything fetched or made once is kept: `$FERRY_CACHE`, or `ferry` in the user's cache folder.

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
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
        let stat = rustix::fs::statvfs(&self.root).context("ask for the cache folder's free space")?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < bytes {
            bail!(
                "{} has {} MiB free and the lab needs {} MiB there: make room, or set FERRY_CACHE to a folder that has it",
                self.root.display(),
                free >> 20,
                bytes >> 20
            );
        }
        Ok(())
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

/// SHA-256 of a file, as hex.
pub fn file_hash(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    io::copy(&mut file, &mut hash).with_context(|| format!("read {}", path.display()))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
