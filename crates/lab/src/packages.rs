//! Debian packages without installing them: a private apt fetches them, `dpkg-deb` unpacks them into the cache.
//!
//! The private apt reads the machine's own sources (same addresses, same signing keys), restricted to one release, and
//! thinks that nothing is installed, so that all dependencies come along. apt checks every file against the signed
//! index. Nothing is installed system-wide, no maintainer script runs, and root is not needed.

mod sources;

use crate::cache::{self, Cache};
use crate::progress::{self, Step};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Free space that a fetch of everything needs, archives and trees together.
const SPACE: u64 = 1800 << 20;

/// The pins, as the project ships them.
const PINS: &str = include_str!("../packages.toml");

/// The pin file.
#[derive(Clone, Debug, Deserialize)]
pub struct Pins {
    /// Debian's code name of the release.
    pub release: String,
    #[serde(flatten)]
    sets: BTreeMap<String, Set>,
}

/// Packages that are unpacked into one tree.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Set {
    roots: Vec<Group>,
    #[serde(default = "yes")]
    dependencies: bool,
    #[serde(default)]
    leave_out: Vec<String>,
}

fn yes() -> bool {
    true
}

/// Packages of one version.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    /// The source package that must be there in the same version.
    source: Option<String>,
    version: Option<String>,
    packages: Vec<String>,
}

/// A set that is in the cache, unpacked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unpacked {
    /// The tree's root, with `/usr` merged.
    pub tree: PathBuf,
    /// Changes whenever any file in the tree may have changed.
    pub key: String,
    /// Name and version of everything unpacked.
    pub packages: BTreeMap<String, String>,
}

impl Unpacked {
    /// The version of a package in the set.
    pub fn version(&self, package: &str) -> Result<&str> {
        self.packages.get(package).map(String::as_str).with_context(|| format!("{package} is not among the packages"))
    }
}

impl Pins {
    /// The project's pins.
    pub fn load() -> Result<Pins> {
        toml::from_str(PINS).context("packages.toml")
    }

    /// Makes sure that the set is in the cache, fetching it if it is not.
    pub fn fetch(&self, cache: &Cache, name: &str) -> Result<Unpacked> {
        let set = self.sets.get(name).with_context(|| format!("packages.toml has no set {name}"))?;
        let definition = serde_json::to_vec(set).context("describe the set")?;
        let directory = cache.path(format!("trees/{name}-{}", cache::key([self.release.as_bytes(), &definition])));
        let manifest = directory.join("manifest.json");
        if let Some(unpacked) = read_manifest(&manifest, &directory) {
            return Ok(unpacked);
        }
        let _making = cache.make()?;
        if let Some(unpacked) = read_manifest(&manifest, &directory) {
            return Ok(unpacked);
        }
        cache.need_space(SPACE)?;
        let step = Step::begin(format!("fetching Debian packages for {name}"));
        let apt = Apt::set_up(cache, &self.release)?;
        let wanted = apt.choose(set)?;
        let archives = apt.download(&wanted, set.dependencies)?;
        let unpacked = unpack(&archives, set, &directory)?;
        step.done();
        Ok(unpacked)
    }

    /// Fetches a source package into the cache and unpacks it with its patches applied; the folder is returned.
    /// `version` is normally that of the binary that was fetched.
    pub fn fetch_source(&self, cache: &Cache, source: &str, version: &str) -> Result<PathBuf> {
        let directory = cache.path(format!("sources/{source}-{}", version.replace([':', '/'], "_")));
        let tree = directory.join("tree");
        if tree.exists() {
            return Ok(tree);
        }
        let _making = cache.make()?;
        if tree.exists() {
            return Ok(tree);
        }
        cache.need_space(SPACE)?;
        let step = Step::begin(format!("fetching the source of {source} {version}"));
        let apt = Apt::set_up(cache, &self.release)?;
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).context("make the source folder")?;
        let wanted = format!("{source}={version}");
        apt.run_in(&directory, "apt-get", &["-qq", "source", "--download-only", &wanted])
            .with_context(|| format!("the source {wanted} can't be fetched"))?;
        unpack_source(&directory, &tree)?;
        step.done();
        Ok(tree)
    }
}

fn read_manifest(manifest: &Path, directory: &Path) -> Option<Unpacked> {
    let mut unpacked: Unpacked = serde_json::from_slice(&fs::read(manifest).ok()?).ok()?;
    // The cache may have been moved since.
    unpacked.tree = directory.join("root");
    unpacked.tree.is_dir().then_some(unpacked)
}

/// A private apt.
struct Apt {
    configuration: PathBuf,
    archives: PathBuf,
}

/// One file that apt would fetch.
struct Archive {
    name: String,
    version: String,
    path: PathBuf,
}

impl Apt {
    fn set_up(cache: &Cache, release: &str) -> Result<Apt> {
        for tool in ["apt-get", "apt-cache", "dpkg-deb"] {
            if Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
                bail!("{tool} is not on this machine: the lab needs Debian (or a relative) to fetch packages with");
            }
        }
        let base = cache.path(format!("apt-{release}"));
        let archives = base.join("cache/archives");
        for directory in ["state/lists/partial", "cache/archives/partial", "sources", "conf"] {
            fs::create_dir_all(base.join(directory)).context("make apt's folders")?;
        }
        fs::write(base.join("status"), "").context("make apt's empty list of installed packages")?;
        let sources = sources::for_release(Path::new("/etc/apt"), release)?;
        fs::write(base.join("sources/lab.sources"), sources).context("write apt's sources")?;
        // The machine's own configuration holds (its proxy, its rules), but not its hooks: they act on the machine.
        let parts = base.join("conf");
        for entry in fs::read_dir(&parts).context("read apt's configuration")?.flatten() {
            let _ = fs::remove_file(entry.path());
        }
        for entry in fs::read_dir("/etc/apt/apt.conf.d").into_iter().flatten().flatten() {
            let _ = fs::copy(entry.path(), parts.join(entry.file_name()));
        }
        let dir = base.display();
        let own = format!(
            "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n\
             #clear DPkg::Pre-Invoke;\n#clear DPkg::Post-Invoke;\n#clear DPkg::Pre-Install-Pkgs;\n\
             #clear Acquire::IndexTargets::deb::DEP-11;\n#clear Acquire::IndexTargets::deb::DEP-11-icons-small;\n\
             Dir::State \"{dir}/state\";\nDir::State::status \"{dir}/status\";\nDir::Cache \"{dir}/cache\";\n\
             Dir::Cache::archives \"{dir}/cache/archives\";\n\
             Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{dir}/sources\";\n\
             Dir::Etc::preferencesparts \"/dev/null\";\nAPT::Architecture \"amd64\";\n\
             APT::Sandbox::User \"\";\nAPT::Install-Recommends \"false\";\nAPT::Get::Assume-Yes \"true\";\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nDebug::NoLocking \"true\";\n"
        );
        fs::write(parts.join("zz-lab"), own).context("write apt's configuration")?;
        let configuration = base.join("apt.conf");
        fs::write(&configuration, format!("Dir::Etc::Parts \"{dir}/conf\";\n")).context("write apt's configuration")?;
        let apt = Apt { configuration, archives };
        apt.run("apt-get", &["-qq", "update"]).context(
            "the package lists can't be fetched; is the network there, and do the sources in /etc/apt work (apt-get update)?",
        )?;
        Ok(apt)
    }

    fn run(&self, tool: &str, arguments: &[&str]) -> Result<String> {
        self.run_in(Path::new("/"), tool, arguments)
    }

    fn run_in(&self, directory: &Path, tool: &str, arguments: &[&str]) -> Result<String> {
        let output = Command::new(tool)
            .args(arguments)
            .env("APT_CONFIG", &self.configuration)
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .current_dir(directory)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("run {tool}"))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("E:") || line.contains("404")).collect();
            bail!(
                "{tool} {}: {}",
                arguments.join(" "),
                if lines.is_empty() { text.trim().to_owned() } else { lines.join("; ") }
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Names with versions, as apt-get takes them. Pins that are no longer there are replaced, aloud.
    fn choose(&self, set: &Set) -> Result<Vec<String>> {
        let mut wanted = Vec::new();
        for group in &set.roots {
            let Some(pinned) = &group.version else {
                wanted.extend(group.packages.iter().cloned());
                continue;
            };
            let first = group.packages.first().context("a group of packages.toml is empty")?;
            let version = self.available(first, group, pinned)?;
            if version != *pinned {
                progress::say(format!(
                    "NOTE: {first} {pinned} is no longer in the registry; taking {version}. Results may differ from those of the pinned version."
                ));
            }
            wanted.extend(group.packages.iter().map(|package| format!("{package}={version}")));
        }
        Ok(wanted)
    }

    fn available(&self, package: &str, group: &Group, pinned: &str) -> Result<String> {
        let versions = self.versions(package, "Packages")?;
        if versions.iter().any(|version| version == pinned) {
            return Ok(pinned.to_owned());
        }
        for version in &versions {
            let Some(source) = &group.source else { return Ok(version.clone()) };
            let scratch = tempfile::tempdir().context("make a scratch folder")?;
            let wanted = format!("{source}={version}");
            // Listed is not enough: the newest source has been seen listed and missing.
            if self
                .run_in(scratch.path(), "apt-get", &["-qq", "source", "--download-only", "--dsc-only", &wanted])
                .is_ok()
            {
                return Ok(version.clone());
            }
        }
        bail!(
            "{package} is not to be had in the pinned version {pinned}, nor in any other with its source: does this machine's apt know the release's main and security archives?"
        )
    }

    /// Versions of a package in the registry, newest first.
    fn versions(&self, package: &str, kind: &str) -> Result<Vec<String>> {
        let table = self.run("apt-cache", &["madison", package])?;
        Ok(table
            .lines()
            .filter_map(|line| {
                let mut columns = line.split('|').map(str::trim);
                let (name, version, from) = (columns.next()?, columns.next()?, columns.next()?);
                (name == package && from.ends_with(kind)).then(|| version.to_owned())
            })
            .collect())
    }

    fn download(&self, wanted: &[String], dependencies: bool) -> Result<Vec<Archive>> {
        let mut arguments = vec!["-qq"];
        let words = wanted.iter().map(String::as_str);
        if dependencies {
            arguments.extend(["install", "--download-only"]);
            arguments.extend(words.clone());
            self.run("apt-get", &arguments).context("packages can't be fetched")?;
        } else {
            arguments.push("download");
            arguments.extend(words.clone());
            self.run_in(&self.archives, "apt-get", &arguments).context("packages can't be fetched")?;
        }
        // What it fetched: the same request again, now only printed.
        let mut arguments = vec!["-qq", "--print-uris", "-o", "Dir::Cache::archives=/nonexistent"];
        arguments.extend(if dependencies { ["install"] } else { ["download"] });
        arguments.extend(words);
        let listing = self.run("apt-get", &arguments).context("list the packages")?;
        let mut archives = Vec::new();
        for line in listing.lines().filter(|line| line.starts_with('\'')) {
            let file = line.split_whitespace().nth(1).with_context(|| format!("apt printed {line:?}"))?;
            let stem = file.strip_suffix(".deb").with_context(|| format!("{file} is no package"))?;
            let mut parts = stem.split('_');
            let (Some(name), Some(version)) = (parts.next(), parts.next()) else { bail!("{file} has no version") };
            let path = self.archives.join(file);
            if !path.is_file() {
                bail!("apt did not fetch {file}");
            }
            archives.push(Archive { name: name.to_owned(), version: version.replace("%3a", ":"), path });
        }
        if archives.is_empty() {
            bail!("apt named no package for {}", wanted.join(" "));
        }
        Ok(archives)
    }
}

/// Unpacks into a fresh folder that gets its name only when it is complete.
fn unpack(archives: &[Archive], set: &Set, directory: &Path) -> Result<Unpacked> {
    let parent = directory.parent().context("the cache has no folder for trees")?;
    fs::create_dir_all(parent).context("make the folder for trees")?;
    let fresh =
        tempfile::Builder::new().prefix(".unpacking-").tempdir_in(parent).context("make a folder to unpack in")?;
    let root = fresh.path().join("root");
    for path in ["bin", "sbin", "lib", "lib64"] {
        // Bookworm's packages still carry files in both places; the links make them one, as on an installed system.
        fs::create_dir_all(root.join("usr").join(path)).context("make the tree")?;
        std::os::unix::fs::symlink(format!("usr/{path}"), root.join(path)).context("link the tree")?;
    }
    let mut packages = BTreeMap::new();
    for archive in archives.iter().filter(|archive| !set.leave_out.contains(&archive.name)) {
        extract(&archive.path, &root)?;
        packages.insert(archive.name.clone(), archive.version.clone());
    }
    let key = cache::key(packages.iter().map(|(name, version)| format!("{name}={version}")));
    let unpacked = Unpacked { tree: directory.join("root"), key, packages };
    fs::write(fresh.path().join("manifest.json"), serde_json::to_vec_pretty(&unpacked).context("write the manifest")?)
        .context("write the manifest")?;
    let _ = fs::remove_dir_all(directory);
    fs::rename(fresh.path(), directory).context("put the tree in its place")?;
    Ok(unpacked)
}

/// As `dpkg-deb -x`, but a link to a directory stays a link where the package has a directory.
fn extract(package: &Path, root: &Path) -> Result<()> {
    let unpacking = || format!("{} can't be unpacked", package.display());
    let mut reader = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("run dpkg-deb")?;
    let archive = reader.stdout.take().context("dpkg-deb has no output")?;
    let output = Command::new("tar")
        .args(["--extract", "--keep-directory-symlink", "--no-same-owner", "--file=-", "--directory"])
        .arg(root)
        .stdin(archive)
        .output()
        .context("run tar")?;
    let read = reader.wait().with_context(unpacking)?;
    if !output.status.success() || !read.success() {
        bail!("{}: {}", unpacking(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// `dpkg-source -x` is in dpkg-dev, which a machine with gcc has but need not; what 3.0 (quilt) means is simple:
/// the upstream archive, then `debian/`, then the patches of `debian/patches/series`.
fn unpack_source(directory: &Path, tree: &Path) -> Result<()> {
    let run = |command: &mut Command| -> Result<()> {
        let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
        if !output.status.success() {
            bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    };
    let mut upstream = None;
    let mut debian = None;
    for entry in fs::read_dir(directory).context("read the source folder")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains(".orig.tar.") && !name.ends_with(".asc") {
            upstream = Some(entry.path());
        } else if name.contains(".debian.tar.") {
            debian = Some(entry.path());
        }
    }
    let (Some(upstream), Some(debian)) = (upstream, debian) else {
        bail!("the source package is not of the form 3.0 (quilt)");
    };
    let fresh = directory.join(".unpacking");
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh).context("make a folder to unpack in")?;
    run(Command::new("tar").arg("-xf").arg(upstream).arg("--strip-components=1").arg("-C").arg(&fresh))?;
    run(Command::new("tar").arg("-xf").arg(debian).arg("-C").arg(&fresh))?;
    let patches = fresh.join("debian/patches");
    let series = fs::read_to_string(patches.join("series")).unwrap_or_default();
    for patch in series.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let name = patch.split_whitespace().next().unwrap_or(patch);
        run(Command::new("patch").args(["-p1", "-s", "-i"]).arg(patches.join(name)).arg("-d").arg(&fresh))?;
    }
    fs::rename(&fresh, tree).context("put the source in its place")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_pins_are_read() {
        let pins = Pins::load().expect("packages.toml is well formed");
        for set in ["hypervisor", "kernel", "qemu", "dom0", "device-model", "pyxs"] {
            assert!(pins.sets.contains_key(set), "set {set}");
        }
    }

    #[test]
    fn hypervisor_and_tools_are_pinned_to_one_version() {
        let pins = Pins::load().expect("packages.toml is well formed");
        let versions: std::collections::BTreeSet<_> = pins
            .sets
            .values()
            .flat_map(|set| &set.roots)
            .filter(|group| group.source.as_deref() == Some("xen"))
            .map(|group| group.version.clone())
            .collect();
        assert_eq!(versions.len(), 1, "{versions:?}");
    }
}
