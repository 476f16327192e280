//! Pauses a domain, makes its backends let go, proves it, gives them back, resumes: what the source does when a migration
//! is called off. Prints what was found and what it took as JSON.
//!
//! `quiesce DOMID [TIMES [MILLISECONDS-BETWEEN]]` in dom0.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hypervisor::{DomId, Hypervisor};
use pv_backend::device::{discover, judge_channels};
use pv_backend::dom0::Dom0;
use pv_backend::source::{Limits, release, rollback, snapshot};
use pv_backend::{console, drain, records};
use serde_json::json;

fn main() -> ExitCode {
    let arguments: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let Some(&domid) = arguments.first() else {
        eprintln!("usage: quiesce DOMID [TIMES [MILLISECONDS-BETWEEN]]");
        return ExitCode::from(2);
    };
    let times = arguments.get(1).copied().unwrap_or(1);
    let between = Duration::from_millis(arguments.get(2).copied().unwrap_or(1000));
    for _ in 0..times {
        if let Err(error) = once(domid as u16) {
            eprintln!("quiesce: domain {domid}: {error}");
            return ExitCode::FAILURE;
        }
        std::thread::sleep(between);
    }
    ExitCode::SUCCESS
}

fn once(domid: u16) -> Result<(), Box<dyn std::error::Error>> {
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
    let saved = snapshot(&mut store, &found)?;
    let released = release(&machine, &hypervisor, &found, &limits);
    let released_after = start.elapsed();
    let back = rollback(&machine, &mut store, &hypervisor, &found, &saved, &limits);
    let back_after = start.elapsed();
    let same = snapshot(&mut store, &found)? == saved;
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
            "rollback_ms": ms(back_after - released_after),
            "nodes_as_before": same,
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
