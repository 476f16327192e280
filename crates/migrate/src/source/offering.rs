//! Whether a guest can leave: what both hosts say before anything is touched.

use super::WhyDetails;
use crate::capture;
use crate::guest::Offer;
use crate::handshake::{ToDestination, ToSource};
use crate::host::Host;
use crate::placement;
use crate::precopy::Limits;
use crate::preflight;
use crate::report::millis;
use crate::toolstack::Description;
use crate::trouble::{Doing, Result, Trouble};
use crate::wire::{Frame, Said};
use hypervisor::DomId;
use uuid::Uuid;

/// Judges whether a guest can leave, changing nothing: what it is and, if it can't, why.
pub fn judge(host: &Host, dom: DomId, limits: &Limits) -> Result<(Offer, Description, Vec<String>)> {
    let hv = &*host.hypervisor;
    let info = hv.domain_info(dom)?;
    let here = hv.host_info()?;
    let Some(extension) = &here.extension else {
        return Err(Trouble::new("the hypervisor extension is not loaded on this host").todo("run `ferry host load`"));
    };
    let guest = host.toolstack.describe(dom)?;
    // Xen knows nothing of the kind for a PV guest, which is refused as such.
    if info.hvm {
        preflight::populated(hv, dom)?;
    }
    let gt = hv.gt_state(dom)?;
    let why = preflight::source(hv, &here, &info, &gt, &guest)?;
    preflight::reach(hv, &info)?;
    let ram = hv.ram_gfns(dom)?;
    let offer = Offer {
        identity: guest.identity.clone(),
        host: host.name.clone(),
        host_id: host.id,
        writer: host.writer.clone(),
        xen: here.version.clone(),
        build_id: here.build_id.clone(),
        extension_abi: extension.abi_version,
        shell: capture::shell(hv, &info, &gt, &ram)?,
        placement: placement::capture(hv, &*host.toolstack, &info).doing("read where it may run")?,
        devices: guest.devices.clone(),
        toolstack: guest.details.clone(),
        downtime_limit_ms: millis(limits.downtime),
        dry_run: false,
    };
    Ok((offer, guest, why))
}

/// Asks the destination what it would say to an offer: why not, or nothing, and what would not be as it was. Nothing is made there.
pub fn ask(host: &Host, peer: &str, offer: &Offer) -> Result<WhyDetails> {
    let link = host.connector.connect(peer).map_err(|e| unreachable_peer(peer, e))?;
    let (sender, mut receiver) = link.greet().doing(format!("talk to {peer}"))?;
    let details = serde_json::to_value(Offer { dry_run: true, ..offer.clone() })?;
    sender.send(&Frame::ToDestination(Said { id: Uuid::new_v4(), word: ToDestination::Offer, details }))?;
    let answer = receiver.receive();
    sender.close();
    match answer? {
        Some(Frame::ToSource(Said { word: ToSource::Refuse, details, .. })) => Ok(serde_json::from_value(details)?),
        other => Err(Trouble::new(format!("{peer} answered something else than was asked: {other:?}"))),
    }
}

pub(super) fn unreachable_peer(peer: &str, error: std::io::Error) -> Trouble {
    Trouble::because(format!("connect to {peer}"), error).todo("is ferryd running there, and reachable?")
}
