//! Whether every backend has let go of the guest, told by the hypervisor and by nobody else.

use std::fmt;

use hypervisor::{DomId, GrantArray, Hypervisor, PAGE_SIZE, PortState};

use crate::device::Inventory;
use crate::error::Result;

/// GTF_type_mask: 0 means that the entry is not in use (public/grant_table.h).
const TYPE_MASK: u16 = 3;
/// GTF_reading | GTF_writing: mapped, or being copied from or to.
const IN_USE: u16 = 1 << 3 | 1 << 4;
/// Entries of the console's and xenstored's rings (`GNTTAB_RESERVED_CONSOLE`, `GNTTAB_RESERVED_XENSTORE`), whose holders
/// are not drained: xenconsoled is held at its terminal, the store's connection is frozen.
const RESERVED: u32 = 2;

/// An entry of the grant table that is in use by the guest: a page that some domain may access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Grant reference.
    pub gref: u32,
    /// Who may access the page.
    pub domid: u16,
    /// Somebody does at this moment.
    pub in_use: bool,
}

/// Reads a table's entries: version 1 from the frames alone, version 2 with the status words.
///
/// The table is the guest's to write at any time; the answer is good for a paused guest.
pub fn grants(version: u32, frames: &[u8], status: &[u8]) -> Vec<Grant> {
    let size = if version == 2 { 16 } else { 8 };
    let word = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    frames
        .chunks_exact(size)
        .enumerate()
        .filter_map(|(index, entry)| {
            let flags = word(entry);
            let in_use = match version {
                2 => status.get(index * 2..index * 2 + 2).map_or(0, word),
                _ => flags,
            } & IN_USE
                != 0;
            // An entry that somebody holds counts whatever the guest has written over its type.
            (flags & TYPE_MASK != 0 || in_use).then(|| Grant { gref: index as u32, domid: word(&entry[2..]), in_use })
        })
        .collect()
}

/// What the hypervisor knows of a guest's channels to other domains. Every [`Hypervisor`] has it.
pub trait Channels {
    /// Every port of the guest that is not closed, ascending.
    fn ports(&self, domid: u16) -> Result<Vec<(u32, PortState)>>;
    /// One port; `None` past the last that can be there.
    fn port(&self, domid: u16, port: u32) -> Result<Option<PortState>>;
    /// The grant table's entries that are in use.
    fn grants(&self, domid: u16) -> Result<Vec<Grant>>;
}

impl<H: Hypervisor + ?Sized> Channels for H {
    fn ports(&self, domid: u16) -> Result<Vec<(u32, PortState)>> {
        Ok(Hypervisor::ports(self, DomId(domid))?.into_iter().map(|(port, status)| (port, status.state)).collect())
    }

    fn port(&self, domid: u16, port: u32) -> Result<Option<PortState>> {
        Ok(self.port_status(DomId(domid), port)?.map(|status| status.state))
    }

    fn grants(&self, domid: u16) -> Result<Vec<Grant>> {
        let dom = DomId(domid);
        let version = self.grant_table_version(dom)?;
        let frames = self.grant_table_size(dom)?.frames;
        let table = self.read_grant_frames(dom, GrantArray::Shared, 0, frames)?;
        let status = if version == 2 {
            // A status word is 2 bytes, an entry 16.
            let words = frames as usize * (PAGE_SIZE / 16);
            self.read_grant_frames(dom, GrantArray::Status, 0, words.div_ceil(PAGE_SIZE / 2) as u32)?
        } else {
            Vec::new()
        };
        Ok(grants(version, &table, &status))
    }
}

/// Something that a backend still holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// An event channel of the guest that is still connected to dom0.
    Port(u32),
    /// Grant references that dom0 still maps or copies.
    Grants(Vec<u32>),
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Left::Port(port) => write!(f, "event channel {port} is still connected to dom0"),
            Left::Grants(refs) => {
                let shown: Vec<_> = refs.iter().take(8).map(u32::to_string).collect();
                let more = if refs.len() > shown.len() { ", …" } else { "" };
                write!(
                    f,
                    "{} granted pages are still in use by dom0 (grant references {}{more})",
                    refs.len(),
                    shown.join(", ")
                )
            }
        }
    }
}

/// What is still held: event channels connected to dom0 other than the store's and the console's, and grants in use other
/// than those of their rings.
pub fn left(channels: &(impl Channels + ?Sized), inventory: &Inventory) -> Result<Vec<Left>> {
    let spared = [inventory.store_port, inventory.console.as_ref().map(|console| console.port)];
    let mut left = Vec::new();
    for (port, state) in channels.ports(inventory.domid)? {
        if is_connected_to_dom0(state) && !spared.contains(&Some(port)) {
            left.push(Left::Port(port));
        }
    }
    let held = channels.grants(inventory.domid)?.into_iter().filter(|grant| grant.in_use && grant.gref >= RESERVED);
    let held: Vec<u32> = held.map(|grant| grant.gref).collect();
    if !held.is_empty() {
        left.push(Left::Grants(held));
    }
    Ok(left)
}

/// The quick part of [`left`], for polling: whether any of the devices' own event channels is still connected.
pub fn device_ports_connected(channels: &(impl Channels + ?Sized), inventory: &Inventory) -> Result<bool> {
    for &port in inventory.devices.iter().flat_map(|device| &device.ports) {
        if channels.port(inventory.domid, port)?.is_some_and(is_connected_to_dom0) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_connected_to_dom0(state: PortState) -> bool {
    matches!(state, PortState::Interdomain { remote: DomId::DOM0, .. })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v1(flags: u16, domid: u16, frame: u32) -> Vec<u8> {
        [&flags.to_le_bytes()[..], &domid.to_le_bytes()[..], &frame.to_le_bytes()[..]].concat()
    }

    #[test]
    fn version_1_keeps_the_use_flags_in_the_entry() {
        let table = [v1(0, 0, 0), v1(1 | 8, 0, 5), v1(1, 3, 6), v1(1 | 4 | 16, 0, 7), v1(8, 0, 9)].concat();
        let grant = |gref, domid, in_use| Grant { gref, domid, in_use };
        assert_eq!(
            grants(1, &table, &[]),
            [grant(1, 0, true), grant(2, 3, false), grant(3, 0, true), grant(4, 0, true)]
        );
    }

    #[test]
    fn version_2_keeps_them_in_the_status_words() {
        let mut table = vec![0; 48];
        table[16..20].copy_from_slice(&[1 | 8, 0, 2, 0]);
        table[32..36].copy_from_slice(&[1, 0, 0, 0]);
        let status = [0, 0, 0, 0, 16, 0];
        let grant = |gref, domid, in_use| Grant { gref, domid, in_use };
        assert_eq!(grants(2, &table, &status), [grant(1, 2, false), grant(2, 0, true)]);
    }

    proptest! {
        #[test]
        fn no_table_makes_it_panic(version in 0u32..4, table in prop::collection::vec(any::<u8>(), 0..200),
                                   status in prop::collection::vec(any::<u8>(), 0..20)) {
            grants(version, &table, &status);
        }
    }
}
