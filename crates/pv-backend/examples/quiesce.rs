//! Pauses a domain, makes its backends let go, proves it, gives them back, resumes: what the source does when a migration
//! is called off. With `rebuild` it gives them back as a destination does: both areas are made afresh, the backends
//! prepared, and connected. Prints what was found and what it took as JSON.
//!
//! `quiesce DOMID [TIMES [MILLISECONDS-BETWEEN]] [rebuild]` in dom0.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hypervisor::{DomId, Hypervisor};
use pv_backend::announce::announce;
use pv_backend::device::{discover, judge_channels};
use pv_backend::dom0::Dom0;
use pv_backend::source::{Limits, release, rollback, snapshot};
use pv_backend::store::Store;
use pv_backend::{console, destination, disk, drain, records};
use serde_json::json;

fn main() -> ExitCode {
    let arguments: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let Some(&domid) = arguments.first() else {
        eprintln!("usage: quiesce DOMID [TIMES [MILLISECONDS-BETWEEN]] [rebuild]");
        return ExitCode::from(2);
    };
    let times = arguments.get(1).copied().unwrap_or(1);
    let between = Duration::from_millis(arguments.get(2).copied().unwrap_or(1000));
    let rebuild = std::env::args().any(|text| text == "rebuild");
    for _ in 0..times {
        if let Err(error) = once(domid as u16, rebuild) {
            eprintln!("quiesce: domain {domid}: {error}");
            return ExitCode::FAILURE;
        }
        std::thread::sleep(between);
    }
    ExitCode::SUCCESS
}

fn once(domid: u16, rebuild: bool) -> Result<(), Box<dyn std::error::Error>> {
    let hypervisor = xen_host::XenHost::open()?;
    let mut store = xenstore_client::Client::open()?;
    let machine = Dom0;
    let limits = Limits::default();

    let uuid = hypervisor.domain_info(DomId(domid))?.uuid.to_string();
    let books = records::capture(&mut store, domid, &uuid, Path::new(records::USERDATA))?;
    hypervisor.pause(DomId(domid))?;
    let start = Instant::now();
    let found = discover(&mut store, domid)?;
    let found_after = start.elapsed();
    let hold = found.console.as_ref().map(console::hold).transpose()?.flatten();
    let refused = judge_channels(&hypervisor, &found)?;
    let before = drain::left(&hypervisor, &found)?;
    let fetched = console::wait_output(&machine, &hypervisor, domid, Duration::from_millis(200))?;
    let saved = snapshot(&machine, &mut store, &found)?;
    let released = release(&machine, &hypervisor, &found, &limits);
    let released_after = start.elapsed();
    let mut prepared_after = released_after;
    let back = if rebuild && released.is_ok() {
        let misfits = match disk::survey(&machine, &found.devices) {
            Ok(disks) => destination::check(&machine, &found.devices, &disks),
            Err(refused) => refused,
        };
        let prepared = destination::prepare(&machine, &mut store, &found.devices, &limits);
        // The guest's own nodes, which a destination imports.
        for device in &found.devices {
            for (name, value) in saved.areas.get(&device.frontend).into_iter().flatten() {
                if !name.is_empty() && name != "state" {
                    Store::write(&mut store, &format!("{}/{name}", device.frontend), value)?;
                }
            }
        }
        prepared_after = start.elapsed();
        if misfits.is_empty() {
            prepared.and_then(|()| destination::connect(&machine, &mut store, &found.devices, &limits))
        } else {
            Err(pv_backend::Error::Misfit(misfits))
        }
    } else {
        rollback(&machine, &mut store, &hypervisor, &found, &saved, &limits)
    };
    let back_after = start.elapsed();
    if rebuild {
        announce(&machine, &found.devices)?;
    }
    let now = snapshot(&machine, &mut store, &found)?;
    let differing: Vec<_> = saved
        .areas
        .iter()
        .flat_map(|(area, nodes)| {
            let present = now.areas.get(area);
            let names: BTreeSet<_> = nodes.keys().chain(present.into_iter().flat_map(|nodes| nodes.keys())).collect();
            names.into_iter().filter_map(move |name| {
                let (old, new) = (nodes.get(name), present.and_then(|nodes| nodes.get(name)));
                let text = |value: Option<&Vec<u8>>| value.map(|value| String::from_utf8_lossy(value).into_owned());
                (old != new).then(|| format!("{area}/{name}: {:?} is now {:?}", text(old), text(new)))
            })
        })
        .collect();
    drop(hold);
    hypervisor.unpause(DomId(domid))?;
    println!(
        "{}",
        json!({
            "devices": found.devices.iter().map(|d| format!("{} ports {:?} queues {} order {}", d.bus_id(), d.ports, d.queues, d.ring_order)).collect::<Vec<_>>(),
            "console_tty": found.console.as_ref().and_then(|c| c.tty.clone()),
            "refused": found.refused.iter().chain(&refused).map(ToString::to_string).collect::<Vec<_>>(),
            "held_before": before.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "console_fetched": fetched,
            "unbind_ms": released.as_ref().ok().map(|r| r.unbind.iter().map(|(n, t)| (n.clone(), ms(*t))).collect::<Vec<_>>()),
            "release_ms": released.as_ref().ok().map(|r| ms(r.total)),
            "discover_ms": ms(found_after),
            "until_released_ms": ms(released_after),
            "prepare_ms": ms(prepared_after - released_after),
            "back_ms": ms(back_after - prepared_after),
            "nodes_that_differ": differing,
            "libxl_nodes": books.nodes.len(),
            "userdata": books.userdata.iter().map(|(name, text)| format!("{name} {} bytes", text.len())).collect::<Vec<_>>(),
        })
    );
    released?;
    back?;
    Ok(())
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
