//! Whether a disk of one host is the same as one of another: by what the storage says of itself, else by what stands on it.
//!
//! A name is what every host reads from the storage: a SCSI or NVMe disk's wwid, the UUID that a multipath, LVM or LUKS device has from it,
//! the serial number that a virtual disk was given. Names of one kind that differ settle it. That they are the same may be because one
//! disk is the other's clone: then most of the blocks at fixed places, if enough of them hold anything, must be the same too. Without names, all must. That some differ can
//! also mean that the guest wrote there in between: a refusal that was not needed harms nobody, the wrong disk does.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::{Class, Device};
use crate::machine::Machine;

/// Bytes in a sample, and what its place is a multiple of.
pub const SAMPLE: usize = 4096;
/// Where labels, partition tables and super-blocks are: bytes at the start, and bytes at the end.
const HEAD: u64 = 128 << 10;
const TAIL: u64 = 64 << 10;
/// Samples spread over what is between.
const SPREAD: u64 = 32;
/// Between two looks at the same blocks.
const PAUSE: Duration = Duration::from_millis(50);
/// Looks of the destination: storage that mirrors to another host may be behind for a moment.
const LOOKS: u32 = 3;
/// So many blocks must tell something before they speak against a name: the few of a disk that is nearly empty may be just those that the
/// guest writes to.
const ENOUGH: usize = 8;

/// What a storage says of itself, the same on every host that sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// `wwid`, `serial`, `lvm`, `luks`, `multipath`: only names of one kind can be compared.
    pub kind: String,
    /// As the storage writes it, with single blanks.
    pub value: String,
    /// First sector on it, for a partition.
    pub start: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.value)?;
        if self.start > 0 { write!(f, " from sector {} on", self.start) } else { Ok(()) }
    }
}

impl Name {
    /// Out of sysfs: `text` reads a file of the disk's folder, `None` if it is not there or can't be read.
    pub fn find(text: impl Fn(&str) -> Option<String>) -> Option<Name> {
        let text = |file: &str| {
            let words: Vec<String> = text(file)?.split_whitespace().map(str::to_owned).collect();
            // Placeholders of devices that have none.
            Some(words.join(" ")).filter(|t| t.chars().any(|c| c.is_alphanumeric() && c != '0'))
        };
        let name = |kind: &str, value: String| Some(Name { kind: kind.to_owned(), value, start: 0 });
        // NVMe has the first, SCSI the second.
        if let Some(wwid) = text("wwid").or_else(|| text("device/wwid")) {
            return name("wwid", wwid);
        }
        if let Some(uuid) = text("dm/uuid") {
            return of_mapping(&uuid).and_then(|(kind, value)| name(kind, value));
        }
        // virtio-blk's; `device/serial` is that of an NVMe controller or a card slot.
        name("serial", text("serial")?)
    }
}

/// The names among the UUIDs of device-mapper; others are made up by the host.
fn of_mapping(uuid: &str) -> Option<(&'static str, String)> {
    if let Some(id) = uuid.strip_prefix("mpath-") {
        // scsi_id's, whose first digit says of which kind: multipath on one host only is still the same disk.
        let (kind, rest) = id.split_at_checked(1)?;
        return Some(match kind {
            "3" => ("wwid", format!("naa.{rest}")),
            "2" => ("wwid", format!("eui.{rest}")),
            _ => ("multipath", id.to_owned()),
        });
    }
    if let Some(id) = uuid.strip_prefix("LVM-") {
        return Some(("lvm", id.to_owned()));
    }
    // CRYPT-LUKS2-<UUID>-<the name on this host>
    let mut parts = uuid.splitn(4, '-');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("CRYPT"), Some("LUKS1" | "LUKS2"), Some(id)) => Some(("luks", id.to_owned())),
        _ => None,
    }
}

/// One block's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Bytes from the start.
    pub at: u64,
    /// The first eight bytes of the SHA-256 of [`SAMPLE`] bytes, little-endian.
    pub hash: u64,
    /// All its bytes are the same: many disks have such a block.
    pub blank: bool,
}

impl Sample {
    /// Of a block's bytes.
    pub fn of(at: u64, block: &[u8]) -> Sample {
        use sha2::Digest;
        let digest = sha2::Sha256::digest(block);
        let hash = digest.first_chunk::<8>().map_or(0, |first| u64::from_le_bytes(*first));
        Sample { at, hash, blank: block.iter().all(|byte| Some(byte) == block.first()) }
    }
}

/// Which blocks are looked at on a disk of so many sectors.
pub fn places(sectors: u64) -> Vec<u64> {
    let size = SAMPLE as u64;
    let end = sectors.min(u64::MAX / 512) / (size / 512) * size;
    let floor = |at: u64| at / size * size;
    let head = (0..HEAD.min(end)).step_by(SAMPLE);
    let spread = (1..=SPREAD).map(|n| floor(end / (SPREAD + 1) * n));
    let tail = (end.saturating_sub(TAIL)..end).step_by(SAMPLE);
    let mut all: Vec<u64> = head.chain(spread).chain(tail).filter(|at| at + size <= end).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What the source tells of a disk, and the destination compares with its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// What it is called, if it has a name.
    pub name: Option<Name>,
    /// Blocks that were the same at two looks.
    pub samples: Vec<Sample>,
}

impl Evidence {
    /// Looks at the disk at `path`; reads only.
    fn collect(machine: &dyn Machine, path: &str) -> io::Result<Evidence> {
        let disk = machine.block_device(path)?;
        let places = places(disk.sectors);
        let first = machine.samples(path, &places)?;
        machine.sleep(PAUSE);
        // What the guest is writing all the time would never be the same on the destination.
        let samples = machine.samples(path, &places)?.into_iter().filter(|sample| first.contains(sample)).collect();
        Ok(Evidence { sectors: disk.sectors, name: disk.name, samples })
    }

    /// Whether the disk at `path` is the same; why not, or why nobody knows.
    pub(crate) fn differs(&self, machine: &dyn Machine, path: &str) -> Option<String> {
        let here = match machine.block_device(path) {
            Ok(here) => here,
            Err(error) => return Some(format!("the disk {path} can't be used here: {error}")),
        };
        if here.sectors != self.sectors {
            let (here, there) = (here.sectors, self.sectors);
            return Some(format!(
                "the disk {path} has sectors {here} here and {there} on the source: it is not the same disk"
            ));
        }
        let named = match (&self.name, &here.name) {
            (Some(there), Some(here)) if there.kind != here.kind => None,
            (Some(there), Some(here)) if there != here => {
                return Some(format!(
                    "the disk {path} is {here} here and {there} on the source: it is not the same disk"
                ));
            }
            (Some(there), Some(_)) => Some(there),
            _ => None,
        };
        let places = places(here.sectors);
        // The peer has no say in what is read here.
        if self.samples.iter().any(|sample| !places.contains(&sample.at)) {
            return Some(format!("the offer's samples of the disk {path} are of no places that are looked at"));
        }
        if named.is_none() && !self.samples.iter().any(|sample| !sample.blank) {
            return Some(format!(
                "nothing tells whether the disk {path} is the same on both hosts: they have no name for it that they share (wwid, serial \
                 number, UUID), and it is blank wherever it was looked at; give it a partition table or a file system"
            ));
        }
        let at: Vec<u64> = self.samples.iter().map(|sample| sample.at).collect();
        let mut why = None;
        for look in 0..LOOKS {
            if look > 0 {
                machine.sleep(PAUSE);
            }
            let here = match machine.samples(path, &at) {
                Ok(here) => here,
                Err(error) => return Some(format!("the disk {path} can't be read here: {error}")),
            };
            why = self.judge(path, named, &here);
            why.as_ref()?;
        }
        why
    }

    /// Why one look at its blocks speaks against it.
    fn judge(&self, path: &str, named: Option<&Name>, here: &[Sample]) -> Option<String> {
        let differ: Vec<&Sample> = self.samples.iter().filter(|sample| !here.contains(sample)).collect();
        let at = differ.first()?.at;
        let Some(name) = named else {
            return Some(format!(
                "the disk {path} holds something else here than on the source (at byte {at}), and they have no name for it that they share: \
                 it is not the same disk, or the guest wrote there this moment; try again if you know that it is the same"
            ));
        };
        let tell = self.samples.iter().filter(|sample| !sample.blank || differ.contains(sample)).count();
        (tell >= ENOUGH && differ.len() * 2 > tell).then(|| {
            format!(
                "the disk {path} is {name} on both hosts, but holds something else here than on the source ({} of {tell} blocks that tell \
                 something differ, the first at byte {at}): one is a clone that has kept the other's name, so give it one of its own; or \
                 the guest is writing all over it, then try again",
                differ.len()
            )
        })
    }
}

/// Looks at every disk of the guest on its source; by device number. What is wrong with one is told with the device's name.
pub fn survey(machine: &dyn Machine, devices: &[Device]) -> Result<BTreeMap<u32, Evidence>, Vec<crate::Refusal>> {
    let (mut found, mut refused) = (BTreeMap::new(), Vec::new());
    for device in devices.iter().filter(|device| device.class == Class::Vbd) {
        // The destination refuses one without a medium.
        let Some(path) = device.node("params").filter(|path| !path.is_empty()) else { continue };
        match look(machine, device, path) {
            Ok(evidence) => drop(found.insert(device.devid, evidence)),
            Err(why) => refused.push(crate::Refusal::new(format!("vbd {}", device.devid), why)),
        }
    }
    if refused.is_empty() { Ok(found) } else { Err(refused) }
}

fn look(machine: &dyn Machine, device: &Device, path: &str) -> Result<Evidence, String> {
    let error = |error: io::Error| format!("its disk {path} can't be looked at on the source: {error}");
    let disk = machine.block_device(path).map_err(error)?;
    // The path is a name; what the backend has open is a number.
    let number = format!("{:x}:{:x}", disk.major, disk.minor);
    if let Some(open) = device.node("physical-device")
        && open != number
    {
        return Err(format!(
            "its backend has block device {open} open, and {path} is {number} now; attach the disk again by a path that stays"
        ));
    }
    Evidence::collect(machine, path).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(files: &[(&str, &str)]) -> Option<String> {
        Name::find(|file| files.iter().find(|(name, _)| *name == file).map(|(_, text)| (*text).to_owned()))
            .map(|name| name.to_string())
    }

    #[test]
    fn storage_is_named_by_what_every_host_reads_from_it() {
        let named = |files: &[(&str, &str)]| find(files).unwrap_or_default();
        assert_eq!(named(&[("device/wwid", "naa.600140 5abc\n")]), "wwid naa.600140 5abc");
        assert_eq!(named(&[("device/wwid", "t10.ATA     QEMU    QM00001\n")]), "wwid t10.ATA QEMU QM00001");
        assert_eq!(named(&[("wwid", "eui.0025388b910"), ("device/serial", "S4EW")]), "wwid eui.0025388b910");
        assert_eq!(named(&[("serial", "lun\n")]), "serial lun");
        let lvm = "LVM-0vPGb8cAbYp1KXXGcqlTu1qz9aQyTp7s0123456789abcdef0123456789abcdef";
        assert_eq!(named(&[("dm/uuid", lvm)]), format!("lvm {}", &lvm[4..]));
        // Multipath is the SCSI disk under it; a LUKS device's name is each host's own affair.
        assert_eq!(named(&[("dm/uuid", "mpath-3600140 5abc")]), "wwid naa.600140 5abc");
        assert_eq!(named(&[("dm/uuid", "mpath-1ATA_X")]), "multipath 1ATA_X");
        assert_eq!(named(&[("dm/uuid", "CRYPT-LUKS2-00ff-backup-disk")]), "luks 00ff");
        for none in [
            &[("serial", "\n")][..],
            &[("wwid", "0000")],
            &[("dm/uuid", "CRYPT-PLAIN-x")],
            &[("dm/uuid", "mpath-")],
            &[("device/serial", "controller's")],
            &[],
        ] {
            assert_eq!(find(none), None, "{none:?}");
        }
    }

    #[test]
    fn samples_lie_on_the_disk_and_cover_its_labels() {
        for sectors in [0, 7, 8, 9, 255, 131_072, 1 << 31, u64::MAX] {
            let places = places(sectors);
            assert!(places.len() <= 32 + 16 + 32, "{}", places.len());
            assert!(places.iter().all(|at| at % 4096 == 0 && at / 512 + 8 <= sectors), "{sectors}: {places:?}");
        }
        let places = places(131_072);
        // MBR and GPT, btrfs' and LVM's labels, the second GPT, and something in the middle.
        for at in [0, 64 << 10, (64 << 20) - 4096] {
            assert!(places.contains(&at), "{at}");
        }
        assert_eq!(places.len(), 80);
    }

    #[test]
    fn a_block_of_one_byte_tells_nothing() {
        assert!(Sample::of(0, &[0xff; SAMPLE]).blank);
        let mut block = [0; SAMPLE];
        block[77] = 1;
        assert!(!Sample::of(0, &block).blank);
        assert_ne!(Sample::of(0, &block).hash, Sample::of(0, &[0; SAMPLE]).hash);
    }
}
