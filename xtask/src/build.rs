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
    ("xen-host", "extension-trial"),
];

/// A 32-bit guest of our own for trying the extension: its source, and how it is linked.
const GUEST32: &str = "hypervisor-ext/tests/guest32.c";
const GUEST32_FLAGS: &[&str] = &[
    "-m32",
    "-ffreestanding",
    "-fno-pic",
    "-no-pie",
    "-fno-stack-protector",
    "-mgeneral-regs-only",
    "-O2",
    "-nostdlib",
    "-static",
    "-Wl,--build-id=none",
    "-Wl,-m,elf_i386,-Ttext-segment=0x200000",
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
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| root().map(|root| root.join("target")), |path| Ok(path.into()))?;
    // Beside the other programs for dom0, which hands it to `xl` as a kernel.
    let guest32 = target.join(TARGET).join("lab/guest32");
    run(Command::new("gcc").args(GUEST32_FLAGS).arg("-o").arg(&guest32).arg(root()?.join(GUEST32)))
        .context("build the 32-bit guest")?;
    crate::extension::build(false).context("build the hypervisor extension")?;
    run(cargo()?.args(["build", "--quiet", "--package", "lab", "--bin", "ferry-lab"])).context("build ferry-lab")?;
    Ok(target.join("debug/ferry-lab"))
}
