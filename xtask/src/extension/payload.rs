//! Compiling and linking the payload.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The compiler that the payload is built with: the flags below need its unstable options, so another version may not do.
const COMPILER: &str = "1.95.0";

/// What each flag is for:
/// no red zone, for an interrupt runs on the same stack; no unwinding; position-independent code whose symbols are all taken to be in the
/// same image (no GOT, no PLT slot), which leaves only relocations that Xen's loader knows; no vector or x87 register, which belong to
/// the guest; returns and the absence of jump tables as Xen itself is compiled, for speculation.
const FLAGS: &[&str] = &[
    "--edition=2024",
    "--crate-type=lib",
    "-Copt-level=2",
    "-Cpanic=abort",
    "-Ccodegen-units=1",
    "-Cno-redzone=yes",
    "-Cforce-unwind-tables=no",
    "-Coverflow-checks=no",
    "-Cdebug-assertions=no",
    "-Cjump-tables=no",
    "-Crelocation-model=pie",
    "-Ctarget-feature=-mmx,-sse,-sse2,+soft-float",
    "-Zdefault-visibility=hidden",
    "-Zdirect-access-external-data=yes",
    "-Zplt=yes",
    "-Zfunction-return=thunk-extern",
];

/// Builds the payload for one build-id of Xen and gives its file.
pub fn build(build_id: &str) -> Result<PathBuf> {
    let table = super::tables()?.join(format!("{build_id}.rs"));
    let folder = output_folder()?;
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let object = folder.join(format!("{build_id}.o"));
    let linked = folder.join(format!("{build_id}.linked.o"));
    let payload = folder.join(format!("ferry-{build_id}.livepatch"));

    run(compilation(&compiler()?, &table)?.args(["--emit=obj", "-o"]).arg(&object))
        .with_context(|| format!("compile the extension for {build_id}"))?;
    run(Command::new("ld").args(["-r", "--build-id=sha1", "-z", "noexecstack", "-o"]).arg(&linked).arg(&object))
        .context("link the extension (binutils' ld)")?;
    let mut strip = Command::new("objcopy");
    strip.args(["--strip-debug", "--strip-unneeded"]);
    for section in
        [".comment", ".eh_frame", ".rela.eh_frame", ".note.GNU-stack", ".note.gnu.property", ".llvmbc", ".llvmcmd"]
    {
        strip.arg(format!("--remove-section={section}"));
    }
    run(strip.arg(&linked).arg(&payload)).context("strip the extension (binutils' objcopy)")?;
    for intermediate in [&object, &linked] {
        let _ = std::fs::remove_file(intermediate);
    }
    Ok(payload)
}

/// Has clippy look for what the crate itself denies: an `unsafe` without its reason. It is outside of the workspace and so is not among
/// what `cargo clippy` sees.
pub fn lint(build_id: &str) -> Result<()> {
    let table = super::tables()?.join(format!("{build_id}.rs"));
    let driver = compiler()?.with_file_name("clippy-driver");
    let unwanted = tempfile::tempdir().context("make a folder for what clippy compiles")?;
    run(compilation(&driver, &table)?
        .args(["--emit=metadata", "--allow=clippy::all", "--out-dir"])
        .arg(unwanted.path())
        // Where its clippy.toml lies.
        .current_dir(super::home()?))
    .with_context(|| format!("look through the extension for {build_id} with {}", driver.display()))
}

/// The crate, compiled with one table; what shall come of it is for the caller to add.
fn compilation(compiler: &Path, table: &Path) -> Result<Command> {
    let mut command = Command::new(compiler);
    command
        .args(FLAGS)
        .arg(format!("--remap-path-prefix={}=.", crate::build::root()?.display()))
        .arg("--crate-name=ferry_hypervisor_ext")
        .arg(super::home()?.join("src/lib.rs"))
        // The options above that begin with -Z, on a stable compiler of a pinned version.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("FERRY_XEN_TABLE", table);
    Ok(command)
}

fn output_folder() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| crate::build::root().map(|root| root.join("target")), |path| Ok(path.into()))?;
    Ok(target.join("extension"))
}

/// The pinned compiler: the one in use if it is of that version, else rustup's.
fn compiler() -> Result<PathBuf> {
    let version = |rustc: &Path| -> Option<String> {
        let output = Command::new(rustc).arg("--version").output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let wanted = format!("rustc {COMPILER} ");
    let default = PathBuf::from(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    if version(&default).is_some_and(|text| text.starts_with(&wanted)) {
        return Ok(default);
    }
    let output = Command::new("rustup").args(["which", "--toolchain", COMPILER, "rustc"]).output();
    if let Ok(output) = output
        && output.status.success()
    {
        return Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
    }
    bail!("the extension is built with rustc {COMPILER} and no other; `rustup toolchain install {COMPILER}` gets it")
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let warnings: Vec<&str> =
        said.lines().filter(|line| line.starts_with("warning") && !expected_warning(line)).collect();
    if !warnings.is_empty() {
        bail!("{}", said.trim());
    }
    Ok(())
}

/// rustc says that taking the vector registers away may one day be refused. The check on the object is what we trust, not the flag.
fn expected_warning(line: &str) -> bool {
    line.contains("target feature")
        || line.contains("-Ctarget-feature")
        || line.contains("warnings emitted")
        || line.contains("warning emitted")
}
