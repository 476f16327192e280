//! What process 1 does before the agent starts: file systems, device links, modules.

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Where the image keeps the modules to load: one path a line, in order.
const MODULE_ORDER: &str = "/etc/lab/modules";

/// Writes a line to the kernel log, which dom0's console shows and the lab keeps.
pub fn log(text: &str) {
    if let Ok(mut kmsg) = fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = writeln!(kmsg, "<4>lab-agent: {text}");
    } else {
        eprintln!("lab-agent: {text}");
    }
}

/// Mounts, links, modules and limits.
pub fn set_up() -> Result<()> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    for (source, target, kind, flags, options) in [
        ("proc", "/proc", "proc", plain, c""),
        ("sysfs", "/sys", "sysfs", plain, c""),
        ("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=0755"),
        ("devpts", "/dev/pts", "devpts", MountFlags::NOSUID, c"gid=5,mode=0620,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "tmpfs", plain, c"mode=1777"),
        ("tmpfs", "/run", "tmpfs", plain, c"mode=0755"),
        ("debugfs", "/sys/kernel/debug", "debugfs", plain, c""),
    ] {
        fs::create_dir_all(target).with_context(|| format!("make {target}"))?;
        match mount(source, target, kind, flags, Some(options)) {
            // devtmpfs may have been mounted by the kernel itself.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => log(&format!("mount {target}: {error}")),
        }
    }
    // The hotplug scripts read /dev/stdin and /dev/fd; a bare devtmpfs has neither and they spin until libxl's
    // time-out.
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
        ("/run", "/var/run"),
        ("/run/lock", "/var/lock"),
    ] {
        if !Path::new(link).exists() {
            let _ = symlink(target, link);
        }
    }
    for directory in [
        "/run/lock",
        "/run/xen",
        "/run/xenstored",
        "/var/lib/xen",
        "/var/lib/xenstored",
        "/var/log/xen/console",
        "/root",
        "/tmp",
    ] {
        fs::create_dir_all(directory).with_context(|| format!("make {directory}"))?;
    }
    // SAFETY: set_var is unsound only while other threads read the environment; process 1 has one thread here.
    unsafe {
        std::env::set_var("PATH", search_path());
        std::env::set_var("HOME", "/root");
        std::env::set_var("LANG", "C.UTF-8");
        std::env::set_var("TERM", "xterm");
        if let Some(tree) = xen_directory() {
            std::env::set_var("PYTHONPATH", format!("{tree}/lib/python"));
        }
    }
    load_modules();
    if Path::new("/proc/xen").exists()
        && let Err(error) = mount("xenfs", "/proc/xen", "xenfs", plain, None)
    {
        log(&format!("mount /proc/xen: {error}"));
    }
    raise_limits();
    Ok(())
}

/// `/usr/lib/xen-4.17` or whichever version the image has.
pub fn xen_directory() -> Option<String> {
    let mut found: Vec<String> = fs::read_dir("/usr/lib")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("xen-") && name != "xen-common")
        .filter(|name| Path::new("/usr/lib").join(name).join("bin/xenstored").exists())
        .map(|name| format!("/usr/lib/{name}"))
        .collect();
    found.sort();
    found.pop()
}

fn search_path() -> String {
    let standard = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    match xen_directory() {
        // First, so that the programs themselves are found and not the slower version-choosing wrappers.
        Some(tree) => format!("{tree}/bin:{standard}"),
        None => standard.to_owned(),
    }
}

fn load_modules() {
    let Ok(order) = fs::read_to_string(MODULE_ORDER) else {
        log(&format!("{MODULE_ORDER} can't be read: no module is loaded"));
        return;
    };
    for path in order.lines().filter(|line| !line.is_empty()) {
        match fs::File::open(path) {
            Ok(file) => match rustix::system::finit_module(&file, c"", 0) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => log(&format!("module {path}: {error}")),
            },
            Err(error) => log(&format!("module {path}: {error}")),
        }
    }
}

/// qemu, xenstored and Ferry hold many descriptors and lock memory.
fn raise_limits() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let many = Rlimit { current: Some(65536), maximum: Some(65536) };
    let _ = setrlimit(Resource::Nofile, many);
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: None });
}
