//! Where a guest's vCPUs may run, and what share of the CPUs they get: its pool, affinities, weight and cap.
//!
//! None of it is part of what the guest can see, so what does not fit on the destination keeps no guest from moving: it is left out, and
//! said in the report. CPUs have the same numbers there, as with stock `xl migrate`; that they are the same CPUs is the operator's affair.

use crate::guest::Offer;
use crate::host::Host;
use crate::toolstack::Toolstack;
use crate::trouble::Result;
use hypervisor::{Affinity, CpuPool, DomId, DomainInfo, Hypervisor, Share};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use xen_abi::domctl::{SCHEDULER_ARINC653, SCHEDULER_CREDIT, SCHEDULER_CREDIT2, SCHEDULER_NULL, SCHEDULER_RTDS};

/// The pool that every host has.
const POOL_0: &str = "Pool-0";
/// What a guest has that nobody gave another share.
const USUAL: (u16, u16) = (256, 0);

/// What the source tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Name of its pool; pools have other numbers on other hosts.
    pub pool: Option<String>,
    /// How many CPUs that has there.
    pub cpus: usize,
    /// `XEN_SCHEDULER_*` of that pool.
    pub scheduler: u32,
    /// `None`: that scheduler has other parameters, or none.
    pub share: Option<Share>,
    /// One for each vCPU.
    pub vcpus: Vec<Affinity>,
}

/// What the destination makes of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Number of the pool here.
    pub pool: u32,
    pub share: Option<Share>,
    pub vcpus: Vec<Affinity>,
    /// What can't be as it was.
    pub warnings: Vec<String>,
}

/// Reads a guest's placement on its source.
pub fn capture(hv: &dyn Hypervisor, toolstack: &dyn Toolstack, info: &DomainInfo) -> Result<Placement> {
    let pool = hv.cpu_pool(info.cpupool)?;
    let name = toolstack.pool_name(info.cpupool)?;
    // One that was made without libxl has no name; it is found nowhere else.
    let unnamed = || (info.cpupool != 0).then(|| format!("number {}", info.cpupool));
    Ok(Placement {
        pool: name.or_else(unnamed),
        cpus: pool.cpus.len(),
        scheduler: pool.scheduler,
        share: if shares(pool.scheduler) { Some(hv.share(info.domid, pool.scheduler)?) } else { None },
        vcpus: (0..info.vcpus)
            .map(|vcpu| Ok(within(hv.affinity(info.domid, vcpu)?, &pool.cpus)))
            .collect::<Result<_>>()?,
    })
}

/// All CPUs of the pool are as good as any.
fn within(affinity: Affinity, cpus: &BTreeSet<u32>) -> Affinity {
    let some = |set: Option<BTreeSet<u32>>| set.filter(|set| !cpus.is_subset(set));
    Affinity { hard: some(affinity.hard), soft: some(affinity.soft) }
}

/// What of an offered placement this host can give. Changes nothing.
pub fn plan(host: &Host, offer: &Offer) -> Result<Plan> {
    let placement = &offer.placement;
    let mut warnings = Vec::new();
    let found = match &placement.pool {
        None => None,
        Some(name) => {
            let found = host.toolstack.pool_named(name)?;
            if found.is_none() && name != POOL_0 {
                warnings.push(format!("the CPU pool {name} is not on {}: it goes into {POOL_0}", host.name));
            }
            found
        }
    };
    let pool = host.hypervisor.cpu_pool(found.unwrap_or(0))?;
    let mut plan = fit(placement, &pool, offer.shell.config.max_vcpus, &offer.host, &host.name);
    warnings.append(&mut plan.warnings);
    Ok(Plan { warnings, ..plan })
}

fn fit(placement: &Placement, pool: &CpuPool, vcpus: u32, there: &str, here: &str) -> Plan {
    let mut warnings = Vec::new();
    let count = pool.cpus.len();
    if count < placement.cpus && count < vcpus as usize {
        warnings.push(format!(
            "its pool on {here} has {count} CPUs for its {vcpus} vCPUs, on {there} it had {}",
            placement.cpus
        ));
    }
    let share = match placement.share {
        Some(share) if shares(pool.scheduler) => Some(Share { scheduler: pool.scheduler, ..share }),
        Some(share) => {
            if (share.weight, share.cap) != USUAL {
                warnings.push(format!(
                    "its weight {} and cap {} mean nothing to the scheduler of its pool on {here}, {}",
                    share.weight,
                    share.cap,
                    scheduler(pool.scheduler)
                ));
            }
            None
        }
        None => {
            if matches!(placement.scheduler, SCHEDULER_ARINC653 | SCHEDULER_RTDS) {
                warnings.push(format!(
                    "on {there} its scheduler was {}, whose parameters are not carried",
                    scheduler(placement.scheduler)
                ));
            }
            None
        }
    };
    // The same thing of many vCPUs is said once.
    let mut lost: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    let mut take = |vcpu: u32, kind: &str, wanted: &Option<BTreeSet<u32>>| {
        let wanted = wanted.as_ref()?;
        let kept: BTreeSet<u32> = wanted.intersection(&pool.cpus).copied().collect();
        if kept.len() == wanted.len() {
            return Some(kept);
        }
        let what = if kept.is_empty() { "none of them: any CPU".into() } else { format!("{} of them", list(&kept)) };
        lost.entry(format!("{kind} affinity to CPUs {}, of which its pool on {here} has {what}", list(wanted)))
            .or_default()
            .insert(vcpu);
        Some(kept).filter(|kept| !kept.is_empty())
    };
    let vcpus = (0..vcpus)
        .zip(&placement.vcpus)
        .map(|(vcpu, a)| Affinity { hard: take(vcpu, "hard", &a.hard), soft: take(vcpu, "soft", &a.soft) })
        .collect();
    warnings.extend(lost.into_iter().map(|(what, vcpus)| format!("vCPUs {} had {what}", list(&vcpus))));
    Plan { pool: pool.id, share, vcpus, warnings }
}

/// Gives a domain that has its vCPUs what was planned. What Xen refuses all the same is answered.
pub fn apply(hv: &dyn Hypervisor, dom: DomId, plan: &Plan) -> Vec<String> {
    let share = plan.share.map(|share| hv.set_share(dom, &share).err());
    let wanted = |a: &&Affinity| **a != Affinity::default();
    let vcpus =
        (0u32..).zip(&plan.vcpus).filter(|(_, a)| wanted(a)).map(|(vcpu, a)| hv.set_affinity(dom, vcpu, a).err());
    share.into_iter().chain(vcpus).flatten().map(|error| error.to_string()).collect()
}

/// Whether a scheduler gives domains a weight and a cap.
fn shares(scheduler: u32) -> bool {
    matches!(scheduler, SCHEDULER_CREDIT | SCHEDULER_CREDIT2)
}

fn scheduler(number: u32) -> String {
    match number {
        SCHEDULER_CREDIT => "credit".into(),
        SCHEDULER_CREDIT2 => "credit2".into(),
        SCHEDULER_ARINC653 => "arinc653".into(),
        SCHEDULER_RTDS => "rtds".into(),
        SCHEDULER_NULL => "null".into(),
        other => format!("number {other}"),
    }
}

/// As xl writes sets of CPUs: `0-3,6`.
fn list(cpus: &BTreeSet<u32>) -> String {
    let runs = crate::guest::ranges(cpus.iter().map(|cpu| hypervisor::Gfn(u64::from(*cpu))));
    let text = runs.into_iter().map(|(first, count)| match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    });
    text.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(list: impl IntoIterator<Item = u32>) -> BTreeSet<u32> {
        list.into_iter().collect()
    }

    fn pool(scheduler: u32, list: impl IntoIterator<Item = u32>) -> CpuPool {
        CpuPool { id: 3, scheduler, cpus: cpus(list) }
    }

    fn pinned(hard: impl IntoIterator<Item = u32>) -> Affinity {
        Affinity { hard: Some(cpus(hard)), soft: None }
    }

    fn placement() -> Placement {
        Placement {
            pool: Some("db".into()),
            cpus: 8,
            scheduler: SCHEDULER_CREDIT2,
            share: Some(Share { scheduler: SCHEDULER_CREDIT2, weight: 512, cap: 50 }),
            vcpus: vec![pinned([0, 1, 2]), pinned([0, 1, 2]), pinned([7])],
        }
    }

    #[test]
    fn what_fits_is_taken_as_it_was() {
        let plan = fit(&placement(), &pool(SCHEDULER_CREDIT, 0..8), 3, "a", "b");
        let share = Some(Share { scheduler: SCHEDULER_CREDIT, weight: 512, cap: 50 });
        assert_eq!(plan, Plan { pool: 3, share, vcpus: placement().vcpus, warnings: Vec::new() });
    }

    #[test]
    fn what_does_not_fit_is_said_once() {
        let plan = fit(&placement(), &pool(SCHEDULER_NULL, 0..2), 3, "a", "b");
        assert_eq!(plan.vcpus, [pinned([0, 1]), pinned([0, 1]), Affinity::default()]);
        assert_eq!(plan.share, None);
        assert_eq!(
            plan.warnings,
            [
                "its pool on b has 2 CPUs for its 3 vCPUs, on a it had 8",
                "its weight 512 and cap 50 mean nothing to the scheduler of its pool on b, null",
                "vCPUs 0-1 had hard affinity to CPUs 0-2, of which its pool on b has 0-1 of them",
                "vCPUs 2 had hard affinity to CPUs 7, of which its pool on b has none of them: any CPU",
            ]
        );
        let rtds = Placement { scheduler: SCHEDULER_RTDS, share: None, ..Placement::default() };
        let plan = fit(&rtds, &pool(SCHEDULER_CREDIT2, 0..8), 3, "a", "b");
        assert_eq!(plan.warnings, ["on a its scheduler was rtds, whose parameters are not carried"]);
    }

    #[test]
    fn all_cpus_of_a_pool_are_any() {
        let here = cpus([2, 3]);
        assert_eq!(within(pinned([0, 1, 2, 3]), &here), Affinity::default());
        assert_eq!(within(pinned([2]), &here), pinned([2]));
    }

    /// More vCPUs than the guest has are a peer's invention.
    #[test]
    fn an_offer_has_no_more_vcpus_than_the_guest() {
        assert_eq!(fit(&placement(), &pool(SCHEDULER_CREDIT2, 0..8), 1, "a", "b").vcpus.len(), 1);
    }
}
