//! Building what the lab runs.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Target of the programs that run in dom0 and guests.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The programs for dom0 and guests, as package and binary. They are linked statically (glibc's static libraries come
/// with Debian's gcc), because dom0's image has other libraries than this machine.
const STATIC: &[(&str, &str)] = &[
    ("lab-agent", "lab-agent"),
    ("lab-agent", "lab-remote"),
    ("witness", "witness"),
    ("witness", "vandal"),
    ("ferry", "ferry"),
    ("xenstored", "xenstored"),
];

/// The workspace's root.
pub fn root() -> Result<&'static Path> {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")
}

/// cargo, in the workspace's root.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()?);
    Ok(command)
}

/// Runs a command to its end; another exit code than 0 is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    Ok(())
}

/// Builds all; gives the path of `ferry-lab`.
pub fn everything() -> Result<PathBuf> {
    let mut statics = cargo()?;
    statics.args(["build", "--quiet", "--profile", "lab", "--target", TARGET]);
    for (package, binary) in STATIC {
        statics.args(["--package", package, "--bin", binary]);
    }
    // Only for this target: build scripts and procedural macros can't be static.
    statics.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", "-C target-feature=+crt-static");
    run(&mut statics).context("build the static programs")?;
    crate::extension::build(false).context("build the hypervisor extension")?;
    run(cargo()?.args(["build", "--quiet", "--package", "lab", "--bin", "ferry-lab"])).context("build ferry-lab")?;
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().map(|root| root.join("target")), |path| Ok(path.into()))?;
    Ok(target.join("debug/ferry-lab"))
}
