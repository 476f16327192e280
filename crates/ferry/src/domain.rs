//! Which domain an operator means.

use crate::toolstack::STORE_ANSWERS;
use anyhow::{Context, Result, bail};
use hypervisor::{DomId, DomainInfo, Hypervisor};
use uuid::Uuid;

/// The domain of that domid, UUID or name. Names are those of xenstore, as `xl list` shows them.
pub fn find(hv: &dyn Hypervisor, name: &str) -> Result<DomId> {
    let domains = hv.domains()?;
    if let Some(dom) = by_number(&domains, name) {
        return dom;
    }
    let mut store = xenstore_client::Client::open_within(STORE_ANSWERS)
        .with_context(|| format!("can't look up the domain named {name}"))?;
    let named: Vec<_> = domains
        .iter()
        .map(|d| d.domid)
        .filter(|d| {
            use xenstore_client::Nodes;
            store.read_string(&format!("/local/domain/{d}/name")).is_ok_and(|n| n == name)
        })
        .collect();
    match named.as_slice() {
        [one] => Ok(*one),
        [] => bail!("there is no domain named {name}; `xl list` shows those that are"),
        more => bail!("domains {} are all named {name}; give the domid", list(more)),
    }
}

fn list(domids: &[DomId]) -> String {
    domids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// `None` if the text is neither a domid nor a UUID.
fn by_number(domains: &[DomainInfo], name: &str) -> Option<Result<DomId>> {
    let found = if let Ok(domid) = name.parse::<u16>() {
        domains.iter().find(|d| d.domid.0 == domid)
    } else if let Ok(uuid) = Uuid::parse_str(name) {
        domains.iter().find(|d| d.uuid == uuid)
    } else {
        return None;
    };
    Some(found.map(|d| d.domid).with_context(|| format!("there is no domain {name}; `xl list` shows those that are")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_a_domid_and_a_uuid_is_a_uuid() {
        let uuid = Uuid::from_u128(0x1a2f_2511_6a18_48ab_9e66_d859_06cd_6fcb);
        let d = DomainInfo {
            domid: DomId(5),
            uuid,
            hvm: true,
            hap: true,
            xs_domain: false,
            paused: false,
            dying: false,
            running: false,
            blocked: true,
            shutdown: None,
            total_pages: 0,
            max_pages: 0,
            outstanding_pages: 0,
            shared_pages: 0,
            paged_pages: 0,
            shared_info: None,
            cpu_time_ns: 0,
            online_vcpus: 1,
            vcpus: 1,
            ssidref: 0,
            cpupool: 0,
            gpaddr_bits: 48,
            emulation_flags: 1,
            misc_flags: 0,
        };
        let all = [d];
        assert_eq!(by_number(&all, "5").unwrap().unwrap(), DomId(5));
        assert_eq!(by_number(&all, &uuid.to_string()).unwrap().unwrap(), DomId(5));
        assert!(by_number(&all, "6").unwrap().unwrap_err().to_string().contains("no domain 6"));
        assert!(by_number(&all, "web1").is_none());
    }
}
