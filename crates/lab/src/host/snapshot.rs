//! Saved states: a host is saved once when its agent has come up for the first time, and later hosts that are made
//! alike go on from there instead of booting.
//!
//! At that point nothing in dom0 says which host it is: name, addresses, clock, files and the toolstack come after.

use super::{Assets, HostConfig};
use crate::cache::{self, Cache};
use crate::progress::Step;
use crate::qemu::Qemu;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// How many states are kept; one takes some hundred MiB.
const KEPT: usize = 6;

/// Changes when QEMU's command line may have.
const RECIPE: &str = include_str!("../qemu.rs");

/// The place of the saved state that fits a host.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
}

impl Snapshot {
    /// Where the state of such a host, booted with these command lines, is or would be.
    pub fn of(assets: &Assets, ramdisk: &Path, config: &HostConfig, command_lines: &[&str]) -> Result<Snapshot> {
        let cache = Cache::open()?;
        let sizes: Vec<u64> = config
            .disks
            .iter()
            .map(|disk| fs::metadata(&disk.image).map(|meta| meta.len()))
            .collect::<std::io::Result<_>>()
            .context("look at the disks")?;
        // Xen measured the processor's clock against this machine's; neither holds on another or after a reboot.
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let key = cache::key([
            RECIPE.to_owned(),
            boot,
            assets.qemu.key.clone(),
            assets.hypervisor.key.clone(),
            assets.kernel.key.clone(),
            ramdisk.display().to_string(),
            format!("{} {}", config.vcpus, config.memory_mib),
            command_lines.join("\n"),
            format!("{sizes:?} {}", config.nic.is_some()),
        ]);
        Ok(Snapshot { path: cache.path(format!("states/{key}")) })
    }

    /// The state's file if there is one.
    pub fn existing(&self) -> Option<PathBuf> {
        cache::touch(&self.path).then(|| self.path.clone())
    }

    /// Saves a host's state unless another was quicker.
    pub fn save(&self, host: &str, qemu: &Qemu) -> Result<()> {
        let cache = Cache::open()?;
        let _making = cache.make()?;
        if self.path.exists() {
            return Ok(());
        }
        cache.need_space(2 << 30)?;
        let step = Step::begin(format!("{host}: saving its state, so that the next one starts sooner"));
        let parent = self.path.parent().context("the cache has no folder for states")?;
        fs::create_dir_all(parent).context("make the folder for states")?;
        let fresh = tempfile::NamedTempFile::new_in(parent).context("make the state's file")?;
        qemu.save(fresh.path())?;
        fresh.persist(&self.path).context("put the state in its place")?;
        cache::forget_oldest(parent, KEPT, |name| !name.starts_with('.'));
        step.done();
        Ok(())
    }

    /// Removes a state that turned out not to work.
    pub fn forget(&self) {
        let _ = fs::remove_file(&self.path);
    }
}
