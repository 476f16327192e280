//! dom0's ramdisk.

use super::cpio::Archive;
use super::modules::Modules;
use crate::cache::{self, Cache};
use crate::packages::Unpacked;
use crate::progress::Step;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Loaded by the agent before anything else runs, in this order.
const LOAD: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio_blk",
    "bridge",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "xen-blkback",
    "xen-netback",
];

/// There for whoever wants them (`modprobe`).
const PRESENT: &[&str] = &[
    "dm-mod",
    "dm-delay",
    "dm-flakey",
    "loop",
    "brd",
    "ext4",
    "tun",
    "veth",
    "sch_netem",
    "sch_tbf",
    "vhost_net",
    "softdog",
    "ifb",
    "act_mirred",
    "xen-blkfront",
    "xen-netfront",
    "xen-pciback",
    "nbd",
    "netconsole",
];

/// Paths that are not packed.
const TRIMMED: &[&str] = &[
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/zoneinfo",
    "usr/share/bash-completion",
    "usr/share/common-licenses",
    "usr/share/python3",
    "usr/share/pixmaps",
    "usr/share/applications",
    "usr/share/bug",
    "usr/share/debconf",
    "usr/share/gcc",
    "usr/share/perl5",
    "usr/share/polkit-1",
    "usr/include",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl",
    "usr/lib/python3/dist-packages",
    "usr/lib/udev",
    "usr/lib/systemd",
    "usr/lib/locale",
    "usr/games",
    "usr/lib/python3.11/test",
    "usr/lib/python3.11/idlelib",
    "usr/lib/python3.11/tkinter",
    "usr/lib/python3.11/lib2to3",
    "usr/lib/python3.11/ensurepip",
    "usr/lib/python3.11/distutils",
    "usr/lib/python3.11/pydoc_data",
    "usr/lib/python3.11/unittest",
    "usr/lib/python3.11/asyncio",
    "usr/lib/python3.11/turtledemo",
    "etc/init.d",
    "etc/default",
    "etc/cron.daily",
    "etc/pam.d",
    "var/cache",
];

/// Content of small files that installation would have made.
const FILES: &[(&str, &str)] = &[
    ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"),
    ("etc/group", "root:x:0:\ntty:x:5:\ndisk:x:6:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1 localhost\n"),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
    ("etc/os-release", "NAME=\"Ferry lab dom0\"\nID=debian\n"),
    ("root/.bashrc", "PS1='\\h:\\w# '\nalias ll='ls -l'\n"),
    ("root/.profile", ". /root/.bashrc\n"),
];

/// How many ramdisks of each kind are kept in the cache; one takes 100 MB.
const KEPT: usize = 3;

/// Changes when the recipe in this file does, so that an older base is not taken for the new one.
const RECIPE: &str = concat!(include_str!("dom0.rs"), include_str!("cpio.rs"));

/// Makes (or finds) dom0's ramdisk with `agent` as its init. `extra` are packages that are packed after dom0's.
pub fn ramdisk(
    cache: &Cache,
    dom0: &Unpacked,
    extra: Option<&Unpacked>,
    kernel: &Unpacked,
    agent: &Path,
) -> Result<PathBuf> {
    let base = base(cache, dom0, kernel)?;
    let agent = stripped(agent)?;
    let stem = base.file_stem().and_then(|stem| stem.to_str()).context("the base has no name")?;
    let extra_key = extra.map(|extra| extra.key.as_str()).unwrap_or_default();
    let path = cache.path(format!("images/dom0-{}.cpio", cache::key([stem.as_bytes(), extra_key.as_bytes(), &agent])));
    if cache::touch(&path) {
        return Ok(path);
    }
    let _making = cache.make()?;
    let parent = path.parent().context("the cache has no folder for images")?;
    let mut fresh = tempfile::NamedTempFile::new_in(parent).context("make the ramdisk")?;
    io::copy(&mut File::open(&base).context("open the base")?, fresh.as_file_mut()).context("copy the base")?;
    if let Some(extra) = extra {
        let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, fresh.as_file_mut()));
        // Directories must be there before their content; what dom0 has already is not packed again.
        archive.tree(&extra.tree, &|path| {
            keep(path) && (extra.tree.join(path).is_dir() || dom0.tree.join(path).symlink_metadata().is_err())
        })?;
        archive.finish()?;
    }
    let mut overlay = Archive::new(fresh.as_file_mut());
    overlay.file("init", 0o755, &agent)?;
    overlay.finish()?;
    fresh.persist(&path).context("put the ramdisk in its place")?;
    cache::forget_oldest(parent, KEPT, |name| name.starts_with("dom0-") && !name.starts_with("dom0-base-"));
    cache::forget_oldest(parent, KEPT, |name| name.starts_with("dom0-base-"));
    Ok(path)
}

/// The agent without what differs between equal programs built in two places (symbols, debug information, build-id), so
/// that they share an image and saved states.
fn stripped(agent: &Path) -> Result<Vec<u8>> {
    let scratch = tempfile::NamedTempFile::new().context("make a scratch file")?;
    let strip = Command::new("strip")
        .args(["--strip-all", "--remove-section=.note.gnu.build-id", "-o"])
        .arg(scratch.path())
        .arg(agent)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // Without binutils the program as it is does as well.
    let path = if strip.is_ok_and(|status| status.success()) { scratch.path() } else { agent };
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn base(cache: &Cache, dom0: &Unpacked, kernel: &Unpacked) -> Result<PathBuf> {
    let key = cache::key([&dom0.key, &kernel.key, RECIPE]);
    let path = cache.path(format!("images/dom0-base-{key}.cpio"));
    if cache::touch(&path) {
        return Ok(path);
    }
    let _making = cache.make()?;
    if path.exists() {
        return Ok(path);
    }
    cache.need_space(600 << 20)?;
    let step = Step::begin("packing dom0's base image");
    let parent = path.parent().context("the cache has no folder for images")?;
    fs::create_dir_all(parent).context("make the folder for images")?;
    let fresh = tempfile::NamedTempFile::new_in(parent).context("make the base image")?;
    let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, fresh));
    for directory in ["dev", "proc", "sys", "run", "tmp", "root", "mnt", "var/log/xen", "var/lib/xen"] {
        let mut made = PathBuf::new();
        for part in Path::new(directory) {
            made.push(part);
            if !dom0.tree.join(&made).exists() {
                archive.directory(made.to_str().context("a directory's name is not text")?, 0o755)?;
            }
        }
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.device("dev/kmsg", 0o644, 1, 11)?;
    archive.tree(&dom0.tree, &keep)?;
    for (name, content) in FILES {
        archive.file(name, 0o644, content.as_bytes())?;
    }
    for (link, target) in [("usr/bin/sh", "dash"), ("usr/bin/awk", "mawk")] {
        if dom0.tree.join(link).symlink_metadata().is_err() {
            archive.link(link, target)?;
        }
    }
    if dom0.tree.join("var/run").symlink_metadata().is_err() {
        archive.link("var/run", "/run")?;
    }
    add_modules(&mut archive, dom0, kernel)?;
    let fresh =
        archive.finish()?.into_inner().map_err(io::IntoInnerError::into_error).context("write the base image")?;
    fresh.persist(&path).context("put the base image in its place")?;
    step.done();
    Ok(path)
}

fn keep(path: &Path) -> bool {
    !TRIMMED.iter().any(|trimmed| path.starts_with(trimmed))
        && path.file_name().is_none_or(|name| name != "__pycache__" && !name.to_string_lossy().ends_with(".a"))
}

fn add_modules(archive: &mut Archive<impl Write>, dom0: &Unpacked, kernel: &Unpacked) -> Result<()> {
    let modules = Modules::find(&kernel.tree)?;
    let load = modules.closure(LOAD)?;
    let all: Vec<&str> = LOAD.iter().chain(PRESENT).copied().collect();
    let present = modules.closure(&all)?;
    // modprobe needs depmod's index, made here with dom0's own depmod over a copy of just these modules.
    let staging = tempfile::tempdir().context("make a scratch folder")?;
    for path in &present {
        let target = staging.path().join(path);
        fs::create_dir_all(target.parent().context("a module lies nowhere")?).context("stage a module")?;
        fs::copy(kernel.tree.join(path), &target).with_context(|| format!("stage {}", path.display()))?;
    }
    let directory = PathBuf::from("usr/lib/modules").join(&modules.version);
    for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        let from = kernel.tree.join(&directory).join(list);
        if from.exists() {
            fs::copy(&from, staging.path().join(&directory).join(list)).with_context(|| format!("stage {list}"))?;
        }
    }
    std::os::unix::fs::symlink("usr/lib", staging.path().join("lib")).context("link the staged modules")?;
    let output = Command::new(dom0.tree.join("lib64/ld-linux-x86-64.so.2"))
        .args(["--argv0", "depmod", "--library-path"])
        .arg(dom0.tree.join("usr/lib/x86_64-linux-gnu"))
        .arg(dom0.tree.join("usr/bin/kmod"))
        .arg("-b")
        .arg(staging.path())
        .arg(&modules.version)
        .stdin(Stdio::null())
        .output()
        .context("run depmod")?;
    if !output.status.success() {
        bail!("depmod failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let lib = staging.path().join("usr/lib/modules");
    archive.directory("usr/lib/modules", 0o755)?;
    let mut names = Vec::new();
    for path in &load {
        names.push(format!("/{}\n", path.display()));
    }
    let mut moved = Moved { archive, prefix: "usr/lib/modules" };
    moved.tree(&lib, Path::new(""))?;
    archive.directory("etc/lab", 0o755)?;
    archive.file("etc/lab/modules", 0o644, names.concat().as_bytes())
}

/// Puts a directory's content under another path of the archive.
struct Moved<'a, W: Write> {
    archive: &'a mut Archive<W>,
    prefix: &'a str,
}

impl<W: Write> Moved<'_, W> {
    fn tree(&mut self, root: &Path, path: &Path) -> Result<()> {
        let mut entries: Vec<_> = fs::read_dir(root.join(path)).context("read the staged modules")?.flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = path.join(entry.file_name());
            let name = format!("{}/{}", self.prefix, path.display());
            if entry.file_type().context("look at the staged modules")?.is_dir() {
                self.archive.directory(&name, 0o755)?;
                self.tree(root, &path)?;
            } else {
                self.archive.file(&name, 0o644, &fs::read(root.join(&path)).context("read a staged module")?)?;
            }
        }
        Ok(())
    }
}

/// The hypervisor's image, ungzipped, because QEMU's multiboot loader takes only that.
pub fn hypervisor(cache: &Cache, package: &Unpacked) -> Result<PathBuf> {
    let path = cache.path(format!("images/xen-{}", package.key));
    if path.exists() {
        return Ok(path);
    }
    let boot = package.tree.join("boot");
    let packed = fs::read_dir(&boot)
        .with_context(|| format!("read {}", boot.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "gz"))
        .with_context(|| format!("no hypervisor in {}", boot.display()))?;
    let mut image = Vec::new();
    flate2::read::GzDecoder::new(File::open(&packed).context("open the hypervisor")?)
        .read_to_end(&mut image)
        .with_context(|| format!("ungzip {}", packed.display()))?;
    let parent = path.parent().context("the cache has no folder for images")?;
    fs::create_dir_all(parent).context("make the folder for images")?;
    let mut fresh = tempfile::NamedTempFile::new_in(parent).context("make the hypervisor's image")?;
    fresh.write_all(&image).context("write the hypervisor's image")?;
    fresh.persist(&path).context("put the hypervisor's image in its place")?;
    Ok(path)
}

/// The kernel's image.
pub fn kernel(package: &Unpacked) -> Result<PathBuf> {
    let boot = package.tree.join("boot");
    fs::read_dir(&boot)
        .with_context(|| format!("read {}", boot.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .with_context(|| format!("no kernel in {}", boot.display()))
}
