//! A guest as it travels: what the source tells before it sends memory, and what a hypervisor holds of it besides memory.

use crate::placement::Placement;
use hypervisor::{CpuPolicy, DomId, DomainConfig, Gfn, GtState, MemoryRange, TscInfo, XenVersion};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A run of guest frames: first and number.
pub type GfnRange = (u64, u64);

/// HVM or PVH.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestKind {
    Hvm,
    Pvh,
}

/// A PV device that moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `vif`, `vbd` or `console`.
    pub class: String,
    pub devid: u32,
    pub backend_domid: u16,
    /// Paths in the store.
    pub frontend: String,
    pub backend: String,
    /// The frontend's own state node; it keeps its value, whatever that is.
    pub frontend_state: u8,
    pub backend_state: u8,
    /// What the destination must offer: `bridge`, `mac`, `params`, `sectors`, `multi-queue-num-queues`, ….
    pub needs: Vec<(String, String)>,
}

impl Device {
    /// For messages: `vif 0`.
    pub fn title(&self) -> String {
        format!("{} {}", self.class, self.devid)
    }
}

/// Who the guest is, and what it has outside the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub domid: DomId,
    pub uuid: Uuid,
    pub name: String,
    pub kind: GuestKind,
}

/// What the source says of the guest before it sends anything; the destination's preflight judges it and makes the shell from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub identity: Identity,
    /// The sending host: a name for messages, and a number that tells hosts apart.
    pub host: String,
    pub host_id: Uuid,
    /// The program that sends.
    pub writer: String,
    pub xen: XenVersion,
    pub build_id: String,
    pub extension_abi: u32,
    pub shell: Shell,
    /// What can be given there and is not refused where it can't.
    #[serde(default)]
    pub placement: Placement,
    pub devices: Vec<Device>,
    /// What the toolstack needs to make devices and store nodes for the shell; its own JSON.
    pub toolstack: serde_json::Value,
    /// How long the destination should expect the guest to be away at most, milliseconds.
    pub downtime_limit_ms: u64,
    /// Only judge it: the answer is a refusal, with no reason if there is none.
    #[serde(default)]
    pub dry_run: bool,
}

/// All that a domain is made from before its memory comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shell {
    pub config: DomainConfig,
    pub max_mem_kib: u64,
    pub total_pages: u64,
    /// Bytes.
    pub paging_pool: u64,
    pub policy: CpuPolicy,
    pub tsc: TscInfo,
    pub memory_map: Vec<MemoryRange>,
    /// Where the guest has memory now; it may gain or lose some before the pause.
    pub ram: Vec<GfnRange>,
}

/// The grant table and where the guest sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// 1 or 2.
    pub version: u32,
    /// `None`: the guest has not placed that frame.
    pub gfns: Vec<Option<Gfn>>,
    /// Version 2 only.
    pub status_gfns: Vec<Option<Gfn>>,
    /// Whole frames of entries.
    pub shared: Vec<u8>,
    /// Version 2 only: whole frames of status words.
    pub status: Vec<u8>,
}

/// What the hypervisor holds of a paused guest, besides memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestState {
    pub vm_assist: u64,
    /// The TSC's mode, rate and, where Xen emulates it, what it has counted; as of the pause.
    pub tsc: TscInfo,
    /// HVM save records, with the TSC as of the pause.
    pub hvm_context: Vec<u8>,
    /// HVM parameters that are not 0, those that must be set last among them; see [`xen_abi::hvm_op::PARAMS`].
    pub params: Vec<(u32, u64)>,
    /// Where shared_info is, and the page.
    pub shared_info: Option<(Gfn, Vec<u8>)>,
    /// Its times are in the **guest's** system time here (`clock_offset_ns` is 0), so that no host's clock travels.
    pub gt: GtState,
    pub grants: Grants,
    /// The guest's system time at the pause, ns.
    pub system_time: i64,
}

/// Groups ascending gfns into ranges.
pub fn ranges(gfns: impl IntoIterator<Item = Gfn>) -> Vec<GfnRange> {
    let mut ranges: Vec<GfnRange> = Vec::new();
    for Gfn(gfn) in gfns {
        match ranges.last_mut() {
            Some((first, count)) if *first + *count == gfn => *count += 1,
            _ => ranges.push((gfn, 1)),
        }
    }
    ranges
}

/// The gfns of ranges.
pub fn gfns(ranges: &[GfnRange]) -> impl Iterator<Item = Gfn> + '_ {
    ranges.iter().flat_map(|&(first, count)| (first..first.saturating_add(count)).map(Gfn))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_back() {
        let list: Vec<_> = [0, 1, 2, 9, 11, 12].map(Gfn).into();
        let grouped = ranges(list.clone());
        assert_eq!(grouped, [(0, 3), (9, 1), (11, 2)]);
        assert_eq!(gfns(&grouped).collect::<Vec<_>>(), list);
    }
}
