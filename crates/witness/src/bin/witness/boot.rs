//! What an init must do before anything else runs: mounts, kernel modules, addresses.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use witness::config::{Cidr, Config};

/// Mounts /proc, /sys and /dev. What is mounted already (by the kernel, or by an earlier try) is left as it is.
pub fn mount_all() -> Result<(), String> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target).map_err(|e| format!("make {target}: {e}"))?;
        let (kind_c, target_c) = (c_string(kind)?, c_string(target)?);
        // SAFETY: all pointers are to NUL-terminated strings that live through the call, or null where mount(2) allows.
        let rc = unsafe { libc::mount(kind_c.as_ptr(), target_c.as_ptr(), kind_c.as_ptr(), 0, std::ptr::null()) };
        if rc != 0 {
            let e = io::Error::last_os_error();
            if e.raw_os_error() != Some(libc::EBUSY) {
                return Err(format!("mount {kind} on {target}: {e}"));
            }
        }
    }
    Ok(())
}

fn c_string(s: &str) -> Result<CString, String> {
    CString::new(s).map_err(|_| format!("{s:?} has a NUL in it"))
}

/// Parameters that a module is loaded with. Since XSA-482 a guest's privcmd takes no hypercall of its own unless told so.
fn parameters(file: &str) -> &'static str {
    if file.starts_with("xen-privcmd.") || file.starts_with("xen_privcmd.") { "unrestricted=1" } else { "" }
}

fn load(path: &Path) -> io::Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let file = File::open(path)?;
    let params = CString::new(parameters(&name)).unwrap_or_default();
    // MODULE_INIT_COMPRESSED_FILE (include/uapi/linux/module.h)
    let flags: libc::c_int = if name.ends_with(".ko") { 0 } else { 4 };
    // SAFETY: the descriptor is open and `params` is NUL-terminated; the kernel checks the file itself.
    let rc = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), params.as_ptr(), flags) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Loads all modules of a directory, in the order of its file `order` (one name a line), else by trying: a module whose
/// symbols are not there yet is tried again after the others. Returns what could not be loaded.
pub fn load_modules(dir: &Path) -> Vec<String> {
    let listed = fs::read_to_string(dir.join("order"))
        .map(|o| o.lines().map(str::trim).filter(|l| !l.is_empty()).map(|l| dir.join(l)).collect::<Vec<_>>());
    let mut left: Vec<PathBuf> = listed.unwrap_or_else(|_| {
        let mut all: Vec<PathBuf> =
            fs::read_dir(dir).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
        all.retain(|p| p.to_string_lossy().contains(".ko"));
        all.sort();
        all
    });
    loop {
        let before = left.len();
        let mut failed = Vec::new();
        for path in left {
            match load(&path) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
                Err(e) => failed.push((path, e)),
            }
        }
        if failed.is_empty() || failed.len() == before {
            return failed.into_iter().map(|(p, e)| format!("module {}: {e}", p.display())).collect();
        }
        left = failed.into_iter().map(|(p, _)| p).collect();
    }
}

/// Waits for a path.
pub fn wait_for(path: &str, most: Duration) -> bool {
    let end = Instant::now() + most;
    while !Path::new(path).exists() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Has what is typed on the console not written back: it would stand in the middle of a report that is on its way out.
/// An input that is no terminal writes nothing back.
pub fn no_echo() {
    // SAFETY: termios is plain old data, for which all zeros is a value.
    let mut t: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `t` is a termios that lives through the call.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut t) } == 0 {
        t.c_lflag &= !libc::ECHO;
        // SAFETY: as above.
        let _ = unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const t) };
    }
}

fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes numbers only.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn request(dev: &str) -> libc::ifreq {
    // SAFETY: ifreq is made of numbers and arrays of them; all zeroes is a valid value.
    let mut r: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = r.ifr_name.len() - 1;
    for (to, from) in r.ifr_name.iter_mut().take(room).zip(dev.bytes()) {
        *to = from as libc::c_char;
    }
    r
}

fn ioctl(fd: &OwnedFd, what: libc::c_ulong, r: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every request used here reads or writes one ifreq.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), what as _, std::ptr::from_mut(r)) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn sockaddr(addr: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: sockaddr is made of numbers; all zeroes is a valid value.
    let mut s: libc::sockaddr = unsafe { std::mem::zeroed() };
    s.sa_family = libc::AF_INET as libc::sa_family_t;
    // Bytes 0..2 of sa_data are the port, 2..6 the address in network order (struct sockaddr_in).
    for (to, from) in s.sa_data.iter_mut().skip(2).zip(addr.octets()) {
        *to = from as libc::c_char;
    }
    s
}

fn mask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0))
}

/// Gives a device its address and takes it up.
fn set_address(dev: &str, cidr: Cidr) -> Result<(), String> {
    let at = |what: &str, e: io::Error| format!("network: {dev} {cidr}: {what}: {e}");
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).map_err(|e| at("socket", e))?;
    let mut r = request(dev);
    r.ifr_ifru.ifru_addr = sockaddr(cidr.addr);
    ioctl(&fd, libc::SIOCSIFADDR, &mut r).map_err(|e| at("set address", e))?;
    let mut r = request(dev);
    r.ifr_ifru.ifru_netmask = sockaddr(mask(cidr.prefix));
    ioctl(&fd, libc::SIOCSIFNETMASK, &mut r).map_err(|e| at("set netmask", e))?;
    up(dev)
}

fn up(dev: &str) -> Result<(), String> {
    let at = |e: io::Error| format!("network: take {dev} up: {e}");
    let fd = socket(libc::AF_INET, libc::SOCK_DGRAM, 0).map_err(at)?;
    let mut r = request(dev);
    ioctl(&fd, libc::SIOCGIFFLAGS, &mut r).map_err(at)?;
    // SAFETY: SIOCGIFFLAGS filled this member; every bit pattern of it is valid.
    let flags = unsafe { r.ifr_ifru.ifru_flags };
    r.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(&fd, libc::SIOCSIFFLAGS, &mut r).map_err(at)
}

fn sysctl(path: &str, value: &str) -> Result<(), String> {
    let path = format!("/proc/sys/net/{path}");
    fs::write(&path, value).map_err(|e| format!("network: write {value} to {path}: {e}"))
}

/// Addresses of the loads' device and of the one that only receives. Returns what went wrong; the rest is set up.
pub fn set_up_network(config: &Config) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut note = |r: Result<(), String>| wrong.extend(r.err());
    // IPv6 would send (router solicitations, multicast reports) from the address that must stay silent.
    for conf in ["all", "default"] {
        let path = format!("ipv6/conf/{conf}/disable_ipv6");
        if Path::new(&format!("/proc/sys/net/{path}")).exists() {
            note(sysctl(&path, "1"));
        }
    }
    note(up("lo"));
    if let Some(cidr) = config.addr {
        if wait_for(&format!("/sys/class/net/{}", config.dev), Duration::from_secs(20)) {
            // Answer for this device's own address only: else it would answer for the silent one.
            note(sysctl(&format!("ipv4/conf/{}/arp_ignore", config.dev), "1"));
            note(set_address(&config.dev, cidr));
        } else {
            note(Err(format!("network: no device {}", config.dev)));
        }
    }
    if let Some(cidr) = config.rx {
        if wait_for(&format!("/sys/class/net/{}", config.rxdev), Duration::from_secs(20)) {
            note(sysctl(&format!("ipv4/conf/{}/arp_ignore", config.rxdev), "8"));
            // No route of its own, so that nothing is ever sent from here.
            note(set_address(&config.rxdev, Cidr { prefix: 32, ..cidr }));
            note(announce(&config.rxdev, cidr.addr).map_err(|e| format!("network: announce {}: {e}", config.rxdev)));
        } else {
            note(Err(format!("network: no device {}", config.rxdev)));
        }
    }
    wrong
}

/// Sends one gratuitous ARP request (RFC 5227, section 3), so that the switches learn where the MAC is.
fn announce(dev: &str, addr: Ipv4Addr) -> io::Result<()> {
    // The link must be up before a frame goes out; a frontend gets its carrier when the backend has connected.
    let end = Instant::now() + Duration::from_secs(10);
    while fs::read_to_string(format!("/sys/class/net/{dev}/carrier")).map_or(true, |c| c.trim() != "1") {
        if Instant::now() > end {
            return Err(io::Error::other("no carrier"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let protocol = (libc::ETH_P_ARP as u16).to_be();
    let fd = socket(libc::AF_PACKET, libc::SOCK_RAW, libc::c_int::from(protocol))?;
    let mut r = request(dev);
    ioctl(&fd, libc::SIOCGIFHWADDR, &mut r)?;
    // SAFETY: SIOCGIFHWADDR filled this member.
    let hw = unsafe { r.ifr_ifru.ifru_hwaddr.sa_data };
    let mac: [u8; 6] = std::array::from_fn(|i| hw[i] as u8);
    ioctl(&fd, libc::SIOCGIFINDEX, &mut r)?;
    // SAFETY: SIOCGIFINDEX filled this member.
    let index = unsafe { r.ifr_ifru.ifru_ifindex };

    let mut frame = [0u8; 60];
    frame[0..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // EtherType ARP; Ethernet, IPv4, lengths 6 and 4, request.
    frame[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&addr.octets());
    frame[38..42].copy_from_slice(&addr.octets());

    // SAFETY: sockaddr_ll is made of numbers; all zeroes is a valid value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = protocol;
    to.sll_ifindex = index;
    to.sll_halen = 6;
    to.sll_addr[..6].fill(0xff);
    // SAFETY: frame and address are valid for the lengths given.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            std::ptr::from_ref(&to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Powers the guest off; returns only if that failed.
pub fn power_off() -> io::Error {
    end(libc::RB_POWER_OFF)
}

/// Starts the guest anew; returns only if that failed.
pub fn reboot() -> io::Error {
    end(libc::RB_AUTOBOOT)
}

fn end(how: libc::c_int) -> io::Error {
    // SAFETY: sync and reboot take no pointers; the witness is the only program here.
    unsafe {
        libc::sync();
        libc::reboot(how);
    }
    io::Error::last_os_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        assert_eq!(mask(24), Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(mask(32), Ipv4Addr::BROADCAST);
        assert_eq!(mask(0), Ipv4Addr::UNSPECIFIED);
    }

    #[test]
    fn privcmd_is_told_to_take_hypercalls() {
        assert_eq!(parameters("xen-privcmd.ko"), "unrestricted=1");
        assert_eq!(parameters("xen-evtchn.ko"), "");
    }
}
