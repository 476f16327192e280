//! A guest's ramdisk: a static program as `/init`, and the modules of a Xen guest for it to load.

use super::cpio::Archive;
use super::modules::Modules;
use crate::packages::Unpacked;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// Where the modules lie in the ramdisk.
pub const MODULES: &str = "lib/modules";
/// The file, in [`MODULES`], that names the modules' files one a line, in the order to load them.
pub const ORDER: &str = "order";

/// What a guest with PV drivers needs.
pub const FRONTENDS: &[&str] =
    &["xen-blkfront", "xen-netfront", "xen-evtchn", "xen-gntalloc", "xen-gntdev", "xen-privcmd", "xenfs"];

/// Writes a guest's ramdisk to `path`. `files` are (path in the guest, mode, local file).
pub fn ramdisk(
    path: &Path,
    init: &Path,
    kernel: &Unpacked,
    modules: &[&str],
    files: &[(String, u32, PathBuf)],
) -> Result<()> {
    let out = File::create(path).with_context(|| format!("make {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(out));
    for directory in ["dev", "proc", "sys", "run", "tmp", "etc", "sbin", "lib", MODULES] {
        archive.directory(directory, 0o755)?;
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.device("dev/kmsg", 0o644, 1, 11)?;
    archive.file("init", 0o755, &fs::read(init).with_context(|| format!("read {}", init.display()))?)?;
    // The kernel runs these when the toolstack asks the guest to end.
    for name in ["poweroff", "reboot"] {
        archive.link(&format!("sbin/{name}"), "/init")?;
    }
    let found = Modules::find(&kernel.tree)?;
    let mut order = String::new();
    for module in found.closure(modules)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("a module has no name")?;
        archive.file(&format!("{MODULES}/{name}"), 0o644, &found.read(&module)?)?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file(&format!("{MODULES}/{ORDER}"), 0o644, order.as_bytes())?;
    for (target, mode, source) in files {
        let target = target.trim_start_matches('/');
        archive.file(target, *mode, &fs::read(source).with_context(|| format!("read {}", source.display()))?)?;
    }
    archive.finish()?;
    Ok(())
}
