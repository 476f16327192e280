//! Who has which address, and a guest's `xl` configuration. No I/O.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use witness::config::{Cidr, Config, ConsoleLevel};

use crate::net::Mac;
use crate::net::peer::{GuestLink, PeerConfig, Rates};
use crate::scenario::{Guest, GuestType, Scenario, Vbd, Vif};

/// Folder in dom0 for what the lab puts there.
pub const DOM0_FOLDER: &str = "/root/lab";
/// The peer's card.
pub const PEER_MAC: Mac = Mac([0x02, 0x66, 0x65, 0x72, 0x00, 0x01]);
/// The peer's address.
pub const PEER_ADDR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Length of the network's prefix.
pub const PREFIX: u8 = 24;
/// The first host's address; the others follow.
const FIRST_HOST: u8 = 101;
/// The first guest's address; each has two.
const FIRST_GUEST: u8 = 10;

/// The card of the `index`th host.
pub fn host_mac(index: usize) -> Mac {
    Mac([0x02, 0x66, 0x65, 0x72, 0x01, index as u8])
}

/// The address of the `index`th host's dom0.
pub fn host_addr(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, FIRST_HOST.wrapping_add(index as u8))
}

/// The address with which the `index`th guest talks, and the one with which it only receives.
pub fn guest_addrs(index: usize) -> (Ipv4Addr, Ipv4Addr) {
    let first = FIRST_GUEST.wrapping_add(2 * index as u8);
    (Ipv4Addr::new(10, 77, 0, first), Ipv4Addr::new(10, 77, 0, first.wrapping_add(1)))
}

/// The witness's settings for the `index`th guest.
pub fn witness_config(index: usize, guest: &Guest) -> Config {
    let (addr, quiet) = guest_addrs(index);
    // They were checked when the scenario was read.
    let mut config = guest.workload.settings().unwrap_or_default();
    config.peer = PEER_ADDR;
    config.addr = Some(Cidr { addr, prefix: PREFIX });
    config.rx = (guest.vifs.len() > 1).then_some(Cidr { addr: quiet, prefix: PREFIX });
    if guest.vifs.is_empty() {
        // All that is left is the console.
        (config.addr, config.tcp, config.udp) = (None, 0, 0);
        config.console = ConsoleLevel::All;
    }
    // What the scenario itself says of a disk stays.
    let device = |vbd: Option<&Vbd>| vbd.map_or_else(|| "none".to_owned(), |vbd| format!("/dev/{}", vbd.target));
    if config.disk == Config::default().disk {
        config.disk = device(guest.vbds.first());
    }
    if config.mirror == Config::default().mirror {
        config.mirror = device(guest.vbds.get(1));
    }
    config
}

/// What the peer must know.
pub fn peer_config(scenario: &Scenario, log_dir: Option<std::path::PathBuf>) -> PeerConfig {
    let guests = scenario.guests.iter().enumerate().filter(|(_, guest)| guest.witness).map(|(index, guest)| {
        let (addr, quiet) = guest_addrs(index);
        GuestLink {
            name: guest.name.get_ref().clone(),
            addr,
            quiet: guest.vifs.get(1).map(|vif| (*vif.mac.get_ref(), quiet)),
            rates: Rates { tcp: guest.peer.tcp, udp: guest.peer.udp, quiet: guest.peer.quiet },
        }
    });
    PeerConfig {
        mac: PEER_MAC,
        addr: PEER_ADDR,
        prefix: PREFIX,
        port: witness::wire::DEFAULT_PORT,
        guests: guests.collect(),
        log_dir,
    }
}

/// Where a guest's files are in each dom0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFiles {
    pub kernel: String,
    pub ramdisk: String,
    pub config: String,
}

impl GuestFiles {
    /// For a guest with files of its own (`own_kernel`, `own_ramdisk`) or the lab's.
    pub fn new(guest: &Guest) -> Self {
        let name = guest.name.get_ref();
        let of = |own: bool, kind: &str| {
            if own { format!("{DOM0_FOLDER}/{name}.{kind}") } else { format!("{DOM0_FOLDER}/{kind}") }
        };
        let ramdisk = match &guest.init {
            Some(init) => init_ramdisk(init.get_ref()),
            None => of(guest.ramdisk.is_some(), "ramdisk"),
        };
        Self { kernel: of(guest.kernel.is_some(), "kernel"), ramdisk, config: format!("{DOM0_FOLDER}/{name}.cfg") }
    }
}

/// Where the ramdisk with another init than the witness is in each dom0.
pub fn init_ramdisk(init: &str) -> String {
    format!("{DOM0_FOLDER}/{init}.ramdisk")
}

/// Text in double quotes as `xl` reads it.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The `xl` configuration of the `index`th guest. `disks` gives each disk's path in dom0.
pub fn xl_config(index: usize, guest: &Guest, disks: &BTreeMap<String, String>) -> String {
    let files = GuestFiles::new(guest);
    let mut command_line = "console=hvc0".to_owned();
    if guest.witness {
        let words = witness_config(index, guest).command_line();
        let _ = write!(command_line, " rdinit=/init {words}");
    }
    if !guest.command_line.is_empty() {
        let _ = write!(command_line, " {}", guest.command_line);
    }
    let kind = match guest.kind {
        GuestType::Pvh => "pvh",
        GuestType::Hvm => "hvm",
    };
    let mut text = String::new();
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "{key} = {value}");
    };
    line("name", quoted(guest.name.get_ref()));
    line("type", quoted(kind));
    line("kernel", quoted(&files.kernel));
    line("ramdisk", quoted(&files.ramdisk));
    line("extra", quoted(&command_line));
    line("vcpus", guest.vcpus.to_string());
    line("memory", guest.memory.as_mib().to_string());
    line("cpuid", quoted(&guest.cpuid));
    // A crashed guest stays to be looked at; one that reboots would hide that it did.
    line("on_crash", quoted("preserve"));
    line("on_reboot", quoted("preserve"));
    if guest.kind == GuestType::Hvm {
        line("vga", quoted("none"));
        line("nographic", "1".to_owned());
        line("serial", quoted("pty"));
    }
    let list = |items: Vec<String>| format!("[ {} ]", items.iter().map(|i| quoted(i)).collect::<Vec<_>>().join(", "));
    // Without an MTU of its own a vif would get its bridge's, which is for what the hosts send each other.
    let vif = |vif: &Vif| format!("mac={},bridge={},mtu=1500", vif.mac.get_ref(), vif.bridge);
    let vifs = guest.vifs.iter().map(vif).collect();
    line("vif", list(vifs));
    let vbds = guest.vbds.iter().map(|vbd| {
        let path = disks.get(vbd.disk.get_ref()).map_or("", String::as_str);
        let access = if vbd.read_only { "ro" } else { "rw" };
        format!("format=raw,vdev={},access={access},backendtype=phy,target={path}", vbd.target)
    });
    line("disk", list(vbds.collect()));
    for extra in &guest.xl {
        let _ = writeln!(text, "{extra}");
    }
    text
}

/// Where `ferry migrate` leaves its report of the run's `index`th move, in the source's dom0.
pub fn report_file(index: usize) -> String {
    format!("/run/ferry-report-{index}.json")
}

/// A word for the shell, quoted so that it stays one word.
pub fn shell_word(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_guests_configuration_is_what_the_scenario_says() {
        let text = r#"
about = "x"
[[host]]
name = "a"
[[disk]]
name = "lun"
[[guest]]
name = "g"
vcpus = 2
command-line = "quiet say=\"hi\""
xl = ["maxvcpus = 4"]
[guest.workload]
seed = 9
[[guest.vif]]
mac = "00:16:3e:00:00:01"
[[guest.vif]]
mac = "00:16:3e:00:00:02"
[[guest.vbd]]
disk = "lun"
[[guest]]
name = "other"
witness = false
kernel = "bzImage"
"#;
        let scenario = Scenario::parse(Path::new("x"), text).unwrap();
        let disks = BTreeMap::from([("lun".to_owned(), "/dev/disk/by-id/lun".to_owned())]);
        let config = xl_config(0, &scenario.guests[0], &disks);
        for want in [
            "name = \"g\"\n",
            "type = \"pvh\"\n",
            "kernel = \"/root/lab/kernel\"\n",
            "vcpus = 2\n",
            "memory = 256\n",
            "cpuid = \"host,rdtscp=0\"\n",
            "vif = [ \"mac=00:16:3e:00:00:01,bridge=xenbr0,mtu=1500\", \"mac=00:16:3e:00:00:02,bridge=xenbr0,mtu=1500\" ]\n",
            "disk = [ \"format=raw,vdev=xvda,access=rw,backendtype=phy,target=/dev/disk/by-id/lun\" ]\n",
            "maxvcpus = 4\n",
            " quiet say=\\\"hi\\\"\"\n",
        ] {
            assert!(config.contains(want), "{want} in\n{config}");
        }
        let extra = config.lines().find(|l| l.starts_with("extra")).unwrap();
        let read = Config::from_command_line(extra).unwrap();
        assert_eq!(read.addr.unwrap().to_string(), "10.77.0.10/24");
        assert_eq!((read.disk.as_str(), read.mirror.as_str()), ("/dev/xvda", "none"));
        assert_eq!(read.rx.unwrap().to_string(), "10.77.0.11/24");
        assert_eq!((read.peer, read.seed), (PEER_ADDR, 9));

        let other = xl_config(1, &scenario.guests[1], &disks);
        assert!(other.contains("kernel = \"/root/lab/other.kernel\"\n"), "{other}");
        assert!(!other.contains("witness."), "{other}");
        let peer = peer_config(&scenario, None);
        assert_eq!(peer.guests.len(), 1);
        assert_eq!(peer.guests[0].quiet, Some((Mac([0, 0x16, 0x3e, 0, 0, 2]), Ipv4Addr::new(10, 77, 0, 11))));
    }

    #[test]
    fn shell_words_stay_words() {
        assert_eq!(shell_word("it's"), "'it'\\''s'");
    }
}
