//! The hypervisor extension: building it, proving the object sound, and making the tables that it is built from.
//!
//! The payload is one Rust crate without dependencies (`hypervisor-ext/`), compiled by the pinned compiler with flags of its own, once for
//! each build of Xen that has a table in `hypervisor-ext/offsets/`. No Xen source is needed for that; making a table needs it.

pub mod check;
pub mod payload;
pub mod table;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// `hypervisor-ext/`.
fn home() -> Result<PathBuf> {
    Ok(crate::build::root()?.join("hypervisor-ext"))
}

/// Where tables lie: one `<build-id>.rs` each, and `<build-id>.imports` beside it.
fn tables() -> Result<PathBuf> {
    Ok(home()?.join("offsets"))
}

/// Build-ids that there are tables for.
pub fn build_ids() -> Result<Vec<String>> {
    let folder = tables()?;
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let name = entry.context("read the folder of tables")?.file_name().to_string_lossy().into_owned();
        if let Some(id) = name.strip_suffix(".rs") {
            ids.push(id.to_owned());
        }
    }
    ids.sort();
    if ids.is_empty() {
        bail!("{} has no table; `cargo xtask extension-table` makes one", folder.display());
    }
    Ok(ids)
}

/// Builds the payload for every table; with `check`, proves each object sound and each `unsafe` reasoned. Gives the files.
pub fn build(check: bool) -> Result<Vec<PathBuf>> {
    let mut built = Vec::new();
    for id in build_ids()? {
        let path = payload::build(&id)?;
        if check {
            payload::lint(&id)?;
            let imports = tables()?.join(format!("{id}.imports"));
            let known = std::fs::read_to_string(&imports).with_context(|| format!("read {}", imports.display()))?;
            let findings = check_file(&path, &known)?;
            if !findings.is_empty() {
                bail!("{} is not fit to be loaded:\n  {}", path.display(), findings.join("\n  "));
            }
        }
        println!("{}", path.display());
        built.push(path);
    }
    Ok(built)
}

/// Everything that is wrong with a payload.
fn check_file(path: &Path, known: &str) -> Result<Vec<String>> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    check::findings(&bytes, &known.lines().collect()).with_context(|| format!("check {}", path.display()))
}

/// Makes the table of one build of Xen. What is not given is fetched in the version that the lab is pinned to.
pub fn make_table(source: Option<PathBuf>, symbols: Option<PathBuf>, config: Option<PathBuf>) -> Result<()> {
    // Xen is configured and partly built in its own tree, so a fetched one is copied; the copy goes with `_work`.
    let (_work, source, symbols, config) = match (source, symbols, config) {
        (Some(source), Some(symbols), Some(config)) => (None, source, symbols, config),
        _ => {
            let work = tempfile::tempdir().context("make a folder for Xen's source")?;
            let (source, symbols, config) = fetch(work.path())?;
            (Some(work), source, symbols, config)
        }
    };
    let version = source_version(&source)?;
    let symbols = table::Symbols::read(&symbols)?;
    let offsets = table::offsets(&source, &config)?;
    let id = symbols.build_id().to_owned();
    let path = tables()?.join(format!("{id}.rs"));
    std::fs::write(&path, table::write(&symbols, &version, &offsets)?)
        .with_context(|| format!("write {}", path.display()))?;
    // What the payload refers to is known once it is built; each name must be this Xen's.
    let payload = payload::build(&id)?;
    let bytes = std::fs::read(&payload).with_context(|| format!("read {}", payload.display()))?;
    let imports = check::imports(&bytes)?;
    let missing: Vec<&str> = imports.iter().map(String::as_str).filter(|name| !symbols.has(name)).collect();
    if !missing.is_empty() {
        bail!("Xen {version} ({id}) has no {}", missing.join(", no "));
    }
    let list = path.with_extension("imports");
    std::fs::write(&list, imports.join("\n") + "\n").with_context(|| format!("write {}", list.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// Debian's source (a copy in `work`), symbol file and configuration of the pinned hypervisor.
fn fetch(work: &Path) -> Result<(PathBuf, PathBuf, PathBuf)> {
    let cache = lab::cache::Cache::open()?;
    let pins = lab::packages::Pins::load()?;
    let set = pins.fetch(&cache, "hypervisor-symbols")?;
    let version = set.version("xen-hypervisor-4.17-amd64")?;
    let pristine = pins.fetch_source(&cache, "xen", version)?;
    let copied = std::process::Command::new("cp").args(["-a", "--"]).arg(&pristine).arg(work.join("xen")).status();
    if !copied.context("run cp")?.success() {
        bail!("Xen's source can't be copied to {}", work.display());
    }
    let boot = set.tree.join("boot");
    let symbols = set.tree.join("usr/lib/debug/boot/xen-syms-4.17-amd64");
    Ok((work.join("xen"), symbols, boot.join("xen-4.17-amd64.config")))
}

/// Version in the first line of Debian's change log.
fn source_version(source: &Path) -> Result<String> {
    let path = source.join("debian/changelog");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let version = text.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(version, _)| version);
    version.map(str::to_owned).with_context(|| format!("{} names no version", path.display()))
}
