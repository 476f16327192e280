//! The real dom0: sysfs, hotplug scripts, block devices, packet sockets.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::announce::parse_mac;
use crate::disk::{Name, SAMPLE, Sample};
use crate::machine::{BlockDevice, BridgePort, Machine, Script};
use crate::netlink;

/// Bytes of a script's output that go into an error.
const OUTPUT_MAX: u64 = 4096;

/// This machine.
#[derive(Debug, Default, Clone, Copy)]
pub struct Dom0;

/// Adds a port to a bridge; the device's index is in the request (linux/sockios.h; the libc crate has none).
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
/// Flags that are an operator's to set: up, no ARP, multicast, all multicast. Promiscuous mode is the bridge's doing.
const SETTABLE_FLAGS: u16 = (libc::IFF_UP | libc::IFF_NOARP | libc::IFF_MULTICAST | libc::IFF_ALLMULTI) as u16;

/// A network device's folder in sysfs; `None` for a name that is none.
fn net(device: &str) -> Option<PathBuf> {
    let good =
        !device.is_empty() && device.len() < libc::IFNAMSIZ && !device.contains('/') && !device.starts_with("..");
    good.then(|| PathBuf::from("/sys/class/net").join(device))
}

/// A network device's index.
fn index(device: &str) -> io::Result<i32> {
    let base = net(device).ok_or(io::ErrorKind::InvalidInput)?;
    let text = fs::read_to_string(base.join("ifindex"))?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the device's index is no number"))
}

/// An ioctl on a network device with a `struct ifreq`.
fn request(
    socket: &OwnedFd,
    number: libc::c_ulong,
    device: &str,
    fill: impl FnOnce(&mut libc::__c_anonymous_ifr_ifru),
) -> io::Result<()> {
    // SAFETY: struct ifreq is plain data, for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name stays ended by NUL: one octet is never written.
    let room = libc::IFNAMSIZ - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    fill(&mut request.ifr_ifru);
    // SAFETY: the descriptor is a socket, and these requests read and write no more than the struct ifreq pointed to.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn driver_path(driver: &str, file: &str) -> PathBuf {
    PathBuf::from(format!("/sys/bus/xen-backend/drivers/{driver}/{file}"))
}

impl Machine for Dom0 {
    fn is_present(&self, device: &str) -> bool {
        PathBuf::from(format!("/sys/bus/xen-backend/devices/{device}")).exists()
    }

    fn is_bound(&self, driver: &str, device: &str) -> bool {
        driver_path(driver, device).exists()
    }

    fn unbind(&self, driver: &str, device: &str) -> io::Result<()> {
        fs::write(driver_path(driver, "unbind"), device)
    }

    fn bind(&self, driver: &str, device: &str) -> io::Result<()> {
        fs::write(driver_path(driver, "bind"), device)
    }

    fn run(&self, script: &Script, limit: Duration) -> Result<(), String> {
        run(script, limit)
    }

    fn is_program(&self, path: &str) -> bool {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    }

    fn is_bridge(&self, name: &str) -> bool {
        !name.contains('/') && PathBuf::from(format!("/sys/class/net/{name}/bridge")).is_dir()
    }

    fn bridge_port(&self, device: &str) -> Option<BridgePort> {
        let base = net(device)?;
        let text = |name: &str| fs::read_to_string(base.join(name)).ok().map(|text| text.trim().to_owned());
        let flags = u32::from_str_radix(text("flags")?.trim_start_matches("0x"), 16).ok()?;
        let bridge = fs::read_link(base.join("master")).ok()?.file_name()?.to_str()?.to_owned();
        // Open vSwitch and bonds are masters too.
        if !self.is_bridge(&bridge) {
            return None;
        }
        Some(BridgePort {
            bridge,
            address: parse_mac(&text("address")?)?,
            mtu: text("mtu")?.parse().ok()?,
            flags: flags as u16 & SETTABLE_FLAGS,
        })
    }

    fn join_bridge(&self, device: &str, port: &BridgePort) -> io::Result<()> {
        let device_index = index(device)?;
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
        let hardware = libc::sockaddr {
            sa_family: libc::ARPHRD_ETHER,
            sa_data: {
                let mut data = [0; 14];
                for (to, from) in data.iter_mut().zip(port.address) {
                    *to = from as libc::c_char;
                }
                data
            },
        };
        request(&socket, libc::SIOCSIFHWADDR, device, |u| u.ifru_hwaddr = hardware)?;
        request(&socket, libc::SIOCSIFMTU, device, |u| u.ifru_mtu = port.mtu as i32)?;
        let joined = request(&socket, SIOCBRADDIF, &port.bridge, |u| u.ifru_ifindex = device_index);
        // Already in it: a repeated rollback.
        joined.or_else(|error| if error.raw_os_error() == Some(libc::EBUSY) { Ok(()) } else { Err(error) })?;
        request(&socket, libc::SIOCSIFFLAGS, device, |u| u.ifru_flags = port.flags as i16)
    }

    fn block_device(&self, path: &str) -> io::Result<BlockDevice> {
        let meta = fs::metadata(device_path(path))?;
        if !meta.file_type().is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a block device"));
        }
        let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let base = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        let text = |name: &str| fs::read_to_string(base.join(name)).map(|text| text.trim().to_owned());
        let number = |name: &str| -> io::Result<u64> {
            text(name)?.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("sysfs {name}")))
        };
        // A partition has the queue of its disk.
        let queue = if base.join("queue").is_dir() { "queue" } else { "../queue" };
        let block = |name: &str| Ok::<_, io::Error>(u32::try_from(number(&format!("{queue}/{name}"))?).unwrap_or(0));
        Ok(BlockDevice {
            major,
            minor,
            sectors: number("size")?,
            logical_block: block("logical_block_size")?,
            physical_block: block("physical_block_size")?,
            write_back: text(&format!("{queue}/write_cache")).is_ok_and(|mode| mode == "write back"),
            read_only: number("ro")? != 0,
            name: name(&base),
        })
    }

    fn samples(&self, path: &str, places: &[u64]) -> io::Result<Vec<Sample>> {
        // The other host writes past this one's cache.
        let flags = libc::O_DIRECT | libc::O_CLOEXEC;
        let disk = fs::OpenOptions::new().read(true).custom_flags(flags).open(device_path(path))?;
        samples(&disk, places)
    }

    fn module_parameter(&self, module: &str, name: &str) -> Option<u32> {
        fs::read_to_string(format!("/sys/module/{module}/parameters/{name}")).ok()?.trim().parse().ok()
    }

    fn packets(&self, device: &str) -> Option<u64> {
        fs::read_to_string(net(device)?.join("statistics/rx_packets")).ok()?.trim().parse().ok()
    }

    fn teach_bridge(&self, device: &str, address: [u8; 6]) -> io::Result<()> {
        netlink::teach_bridge(index(device)?, address)
    }

    fn send_frames(&self, device: &str, frames: &[Vec<u8>]) -> io::Result<()> {
        let index = index(device)?;
        // SAFETY: socket(2) takes no pointers.
        let raw = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: raw is a descriptor that was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        for frame in frames {
            // SAFETY: sockaddr_ll is plain data, for which all zeroes are valid.
            let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            to.sll_family = libc::AF_PACKET as u16;
            to.sll_ifindex = index;
            to.sll_halen = 6;
            to.sll_addr[..6].copy_from_slice(&[0xff; 6]);
            // SAFETY: both pointers are to live memory of the lengths given, and sendto(2) only reads it.
            let sent = unsafe {
                libc::sendto(
                    socket.as_raw_fd(),
                    frame.as_ptr().cast(),
                    frame.len(),
                    0,
                    (&raw const to).cast(),
                    size_of::<libc::sockaddr_ll>() as libc::socklen_t,
                )
            };
            if sent < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// What the storage says of the disk with this folder in sysfs.
fn name(folder: &Path) -> Option<Name> {
    let text = |file: &str| fs::read_to_string(folder.join(file)).ok().map(|text| text.trim().to_owned());
    // A partition is a part of what its disk is.
    if folder.join("partition").exists() {
        let start = text("start")?.parse().ok()?;
        return Name::find(|file| text(&format!("../{file}"))).map(|name| Name { start, ..name });
    }
    Name::find(text).or_else(|| {
        // A mapping of one device that is as large as the device shows all of it, at its place. One that encrypts shows something else.
        let encrypts = text("dm/uuid")?.starts_with("CRYPT");
        let mut slaves = fs::read_dir(folder.join("slaves")).ok()?.filter_map(Result::ok);
        let (slave, None) = (slaves.next()?.path(), slaves.next()) else { return None };
        let size = |folder: &Path| fs::read_to_string(folder.join("size")).ok();
        (!encrypts && size(folder)? == size(&slave)?).then(|| name(&slave)).flatten()
    })
}

/// As the hotplug script does: a name without a directory is in /dev.
fn device_path(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/dev/{path}") }
}

/// Reads through an aligned buffer, as direct I/O wants it.
fn samples(disk: &fs::File, places: &[u64]) -> io::Result<Vec<Sample>> {
    let mut room = vec![0; 2 * SAMPLE];
    let start = room.as_ptr().align_offset(SAMPLE);
    let block = room.get_mut(start..).and_then(|rest| rest.get_mut(..SAMPLE)).ok_or(io::ErrorKind::OutOfMemory)?;
    places
        .iter()
        .map(|&at| {
            disk.read_exact_at(block, at)?;
            Ok(Sample::of(at, block))
        })
        .collect()
}

fn run(script: &Script, limit: Duration) -> Result<(), String> {
    let mut child = Command::new(&script.program)
        .args(&script.arguments)
        .envs(script.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    // A script that writes more than a pipe holds must not wait for us.
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.by_ref().take(OUTPUT_MAX).read_to_end(&mut text);
            let _ = io::copy(&mut stderr, &mut io::sink());
        }
        String::from_utf8_lossy(&text).trim().to_owned()
    });
    let end = Instant::now() + limit;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if Instant::now() >= end => {
                let _ = child.kill();
                let _ = child.wait();
                break Err(format!("it did not end within {} s and was killed", limit.as_secs()));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => break Err(error.to_string()),
        }
    };
    match status {
        Ok(status) if status.success() => Ok(()),
        // A grandchild may keep the pipe open after a kill, so the text is only waited for after a regular end.
        Ok(status) => {
            let text = reader.join().unwrap_or_default();
            Err(if text.is_empty() { status.to_string() } else { format!("{status}: {text}") })
        }
        Err(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_of_a_whole_disk_has_its_name() {
        let sysfs = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| {
            let file = sysfs.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        let found = || name(&sysfs.path().join("dm-0")).map(|name| name.to_string());
        put("vda/serial", "lun\n");
        put("vda/size", "2048\n");
        put("dm-0/dm/uuid", "\n");
        put("dm-0/size", "2048\n");
        fs::create_dir_all(sysfs.path().join("dm-0/slaves")).unwrap();
        assert_eq!(found(), None, "it maps nothing");
        std::os::unix::fs::symlink("../../vda", sysfs.path().join("dm-0/slaves/vda")).unwrap();
        assert_eq!(found().as_deref(), Some("serial lun"));
        put("dm-0/size", "2047\n");
        assert_eq!(found(), None, "a part, and nobody knows which");
        put("dm-0/size", "2048\n");
        put("dm-0/dm/uuid", "CRYPT-PLAIN-x\n");
        assert_eq!(found(), None, "other contents");
        put("dm-0/dm/uuid", "\n");
        put("dm-0/slaves/vdb/size", "2048\n");
        assert_eq!(found(), None, "of two disks");
        // A partition is not its disk.
        put("vda/vda1/partition", "1\n");
        put("vda/vda1/start", "34\n");
        assert_eq!(name(&sysfs.path().join("vda/vda1")).unwrap().to_string(), "serial lun from sector 34 on");
    }

    #[test]
    fn samples_are_of_the_places_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut bytes = vec![0; 3 * SAMPLE];
        bytes[SAMPLE + 5] = 9;
        fs::write(&path, &bytes).unwrap();
        let disk = fs::File::open(&path).unwrap();
        let read = samples(&disk, &[0, SAMPLE as u64]).unwrap();
        assert_eq!(read, [Sample::of(0, &bytes[..SAMPLE]), Sample::of(SAMPLE as u64, &bytes[SAMPLE..2 * SAMPLE])]);
        samples(&disk, &[3 * SAMPLE as u64]).unwrap_err();
    }
}
