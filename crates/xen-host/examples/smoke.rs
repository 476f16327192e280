//! Drives every part of [`xen_host::XenHost`] against a running guest and a shell domain of its own, in dom0 of a real Xen.
//! `smoke DOMID`: exits with 1 and says where at the first thing that is not as it must be.

use hypervisor::*;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use uuid::Uuid;
use xen_abi::{domctl, grant, hvm_op, hvm_save};
use xen_host::XenHost;
use zerocopy::{FromBytes, IntoBytes};

type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

fn need(what: &str, holds: bool) -> Outcome {
    if holds { Ok(()) } else { Err(what.into()) }
}

fn timed<T>(what: &str, f: impl FnOnce() -> hypervisor::Result<T>) -> hypervisor::Result<T> {
    let start = Instant::now();
    let r = f();
    println!("  {what}: {:?}", start.elapsed());
    r
}

fn host(h: &XenHost) -> Outcome {
    let info = h.host_info()?;
    println!("host: {info:?}");
    need("a build id of 20 bytes", info.build_id.len() == 40)?;
    let a = h.now()?;
    std::thread::sleep(Duration::from_millis(20));
    let b = h.now()?;
    println!("NOW() {a}, 20 ms later {} ns more", b - a);
    need("NOW() goes on", (15_000_000..1_000_000_000).contains(&(b - a)))?;
    for which in [HostPolicy::Raw, HostPolicy::Host, HostPolicy::HvmMax, HostPolicy::HvmDefault] {
        let p = h.host_cpu_policy(which)?;
        println!("policy {which:?}: {} leaves, {} MSRs", p.leaves.len(), p.msrs.len());
        need("a policy has leaves", p.leaves.len() > 5)?;
    }
    let domains = h.domains()?;
    need("dom0 is listed", domains.first().is_some_and(|d| d.domid == DomId::DOM0))?;
    let none = h.domain_info(DomId(0x7fe0)).expect_err("there is no such domain");
    need("an absent domain is ESRCH", none.is_no_such_domain())?;
    println!("an absent domain: {none}");
    Ok(())
}

fn ports(h: &XenHost, dom: DomId) -> Outcome {
    let ports = timed("port status of all", || h.ports(dom))?;
    for (port, s) in &ports {
        println!("  port {port}: {s:?}");
    }
    need("a guest has ports", !ports.is_empty())?;
    // Raise the guest's end of a channel to dom0: spurious events are allowed.
    if let Some((port, _)) =
        ports.iter().find(|(_, s)| matches!(s.state, PortState::Interdomain { remote: DomId(0), .. }))
    {
        h.raise_guest_port(dom, *port)?;
        println!("  raised port {port}");
    }
    let mut events = h.open_events()?;
    let local = events.bind_unbound(dom)?;
    need("nothing is raised", events.next(Some(Duration::from_millis(10)))?.is_none())?;
    events.unbind(local)?;
    Ok(())
}

fn grants(h: &XenHost, dom: DomId) -> Outcome {
    let size = h.grant_table_size(dom)?;
    let version = h.grant_table_version(dom)?;
    let gfns = h.grant_table_gfns(dom)?;
    println!("grant table: version {version}, {size:?}, at {gfns:?}");
    need("as many gfns as frames", gfns.len() == size.frames as usize)?;
    let bytes = timed("grant frames", || h.read_grant_frames(dom, GrantArray::Shared, 0, size.frames))?;
    let in_use = bytes
        .chunks_exact(size_of::<grant::EntryV1>())
        .filter_map(|c| grant::EntryV1::read_from_bytes(c).ok())
        .filter(|e| e.flags & grant::GTF_TYPE_MASK != grant::GTF_INVALID)
        .count();
    println!("  {in_use} entries in use");
    need("console and store are granted", in_use >= 2)?;
    let store = h.hvm_param(dom, hvm_op::PARAM_STORE_PFN)?;
    let ring = h.map_pages(dom, &[Gfn(store)], Access::Read)?;
    println!(
        "  store ring indexes: req {} {} rsp {} {}",
        ring.load_u32(2048),
        ring.load_u32(2052),
        ring.load_u32(2056),
        ring.load_u32(2060)
    );
    Ok(())
}

fn memory(h: &XenHost, dom: DomId) -> Outcome {
    let max = h.max_gfn(dom)?;
    let gfns: Vec<_> = (0..=max.0).map(Gfn).collect();
    let types = timed("page types", || h.page_types(dom, &gfns))?;
    let ram: Vec<_> = gfns.iter().zip(&types).filter(|(_, t)| **t == PageType::Ram).map(|(g, _)| *g).collect();
    let quick = timed("RAM gfns", || h.ram_gfns(dom))?;
    need("the quick way finds the same pages", quick == ram)?;
    let info = h.domain_info(dom)?;
    println!("max {max:?}, {} pages of RAM, domain has {}", ram.len(), info.total_pages);
    need(
        "page types see the domain's pages",
        ram.len() as u64 <= info.total_pages && ram.len() as u64 + 64 > info.total_pages,
    )?;
    let mut buf = vec![0xaa; 1024 * PAGE_SIZE];
    let some = &ram[..1024];
    let results = timed("read 4 MiB", || h.read_pages(dom, some, &mut buf))?;
    need("RAM can be read", results.iter().all(std::result::Result::is_ok))?;
    need("memory is not all zero", buf.iter().any(|&b| b != 0))?;
    let hole = gfns.iter().zip(&types).find(|(_, t)| **t == PageType::NotRam).map(|(g, _)| *g);
    if let Some(hole) = hole {
        let mut page = vec![1; PAGE_SIZE];
        let r = h.read_pages(dom, &[hole, ram[0]], &mut [page.clone(), page.clone()].concat())?;
        println!("  hole {hole:?}: {:?}", r[0]);
        page.fill(0);
        need("a hole does not spoil its neighbour", r[1].is_ok())?;
    }
    Ok(())
}

fn log_dirty(h: &XenHost, dom: DomId) -> Outcome {
    let pages = h.max_gfn(dom)?.0 + 1;
    timed("log-dirty enable", || h.log_dirty_enable(dom))?;
    let rounds = (|| -> Outcome {
        let again = h.log_dirty_enable(dom).expect_err("already on");
        println!("  a second enable: {again}");
        let mut bitmap = DirtyBitmap::new(pages);
        for round in 0..4 {
            std::thread::sleep(Duration::from_millis(200));
            let stats = timed("log-dirty clean", || h.log_dirty_clean(dom, &mut bitmap, false))?;
            println!("  round {round}: {stats:?}, {bitmap:?}");
        }
        h.log_dirty_peek(dom, &mut bitmap)?;
        let clean = h.ram_gfns(dom)?.into_iter().rev().find(|gfn| !bitmap.contains(*gfn)).unwrap_or(Gfn(1));
        timed("log-dirty mark", || h.log_dirty_mark(dom, &[clean]))?;
        h.log_dirty_peek(dom, &mut bitmap)?;
        need("a page that was marked is dirty", bitmap.contains(clean))?;
        h.pause(dom)?;
        h.log_dirty_clean(dom, &mut bitmap, true)?;
        let stats = h.log_dirty_clean(dom, &mut bitmap, true)?;
        h.unpause(dom)?;
        println!("  paused and cleaned twice: {stats:?}, {bitmap:?}");
        need("a paused guest dirties nothing of its own", bitmap.count() < 64)
    })();
    h.log_dirty_disable(dom)?;
    rounds
}

fn state(h: &XenHost, dom: DomId) -> std::result::Result<Vec<u8>, Box<dyn std::error::Error>> {
    let info = h.domain_info(dom)?;
    println!("domain: {info:?}");
    for v in 0..info.vcpus {
        println!("  {:?}", h.vcpu_info(dom, v)?);
    }
    println!(
        "  tsc {:?}, vm_assist {:#x}, paging pool {}",
        h.tsc_info(dom)?,
        h.vm_assist(dom)?,
        h.paging_pool_size(dom)?
    );
    for p in hvm_op::PARAMS {
        match h.hvm_param(dom, p.index) {
            Ok(0) => {}
            Ok(v) => println!("  HVM_PARAM_{} = {v:#x}", p.name),
            Err(e) => println!("  {e}"),
        }
    }
    h.pause(dom)?;
    let paused = h.domain_info(dom).map(|i| i.paused);
    let context = timed("HVM context", || h.hvm_context(dom));
    h.unpause(dom)?;
    need("pause shows", paused?)?;
    let context = context?;
    for r in hvm_save::records(&context)? {
        println!("  record {:?}[{}], {} bytes", hvm_save::code_name(r.code), r.instance, r.payload.len());
    }
    Ok(context)
}

/// A copy of the guest's context in a shell domain: created like it, populated a little, filled, read back, destroyed.
fn shell(h: &XenHost, dom: DomId, context: &[u8]) -> Outcome {
    let source = h.domain_info(dom)?;
    let shell = DomId(h.domains()?.iter().map(|d| d.domid.0).max().unwrap_or(0) + 100);
    let size = h.grant_table_size(dom)?;
    let mut flags = domctl::CDF_HVM;
    if source.hap {
        flags |= domctl::CDF_HAP | domctl::CDF_OOS_OFF;
    }
    let config = DomainConfig {
        uuid: Uuid::from_u128(0x1234),
        ssidref: source.ssidref,
        flags,
        iommu_opts: 0,
        max_vcpus: source.vcpus,
        max_evtchn_port: 1023,
        max_grant_frames: size.max_frames as i32,
        max_maptrack_frames: 0,
        grant_opts: 1,
        cpupool: source.cpupool,
        emulation_flags: source.emulation_flags,
        misc_flags: source.misc_flags,
    };
    timed("create", || h.create_domain(shell, &config))?;
    let r = (|| -> Outcome {
        let taken = h.create_domain(shell, &config).expect_err("the id is taken");
        println!("  again: {taken}");
        h.set_paging_pool_size(shell, h.paging_pool_size(dom)?)?;
        h.set_cpu_policy(shell, &h.cpu_policy(dom)?)?;
        need("the same policy", h.cpu_policy(shell)? == h.cpu_policy(dom)?)?;
        h.set_max_vcpus(shell, source.vcpus)?;
        h.set_max_mem(shell, source.max_pages * 4)?;
        let tsc = h.tsc_info(dom)?;
        h.set_tsc_info(shell, &tsc)?;
        let back = h.tsc_info(shell)?;
        need("the same TSC", (back.mode, back.khz, back.incarnation) == (tsc.mode, tsc.khz, tsc.incarnation))?;
        h.set_vm_assist(shell, h.vm_assist(dom)?)?;
        h.set_memory_map(shell, &[MemoryRange { start: 0, size: 64 << 20, kind: 1 }])?;
        h.claim_pages(shell, 2048)?;
        let gfns: Vec<_> = (0..1024).map(|n| Gfn(n * 3)).collect();
        timed("populate 1024 pages", || h.populate(shell, &gfns, 0))?;
        h.populate(shell, &[Gfn(0x4000)], 9)?;
        h.claim_pages(shell, 0)?;
        let data: Vec<u8> = (0..1024 * PAGE_SIZE).map(|i| (i / 7) as u8).collect();
        let results = timed("write 4 MiB", || h.write_pages(shell, &gfns, &data))?;
        need("pages can be written", results.iter().all(std::result::Result::is_ok))?;
        let mut back = vec![0; data.len()];
        h.read_pages(shell, &gfns, &mut back)?;
        need("what was written is read", back == data)?;
        h.depopulate(shell, &gfns[10..20])?;
        let types = h.page_types(shell, &gfns[9..21])?;
        need(
            "depopulated pages are gone",
            types[0] == PageType::Ram
                && types[1..11].iter().all(|t| *t == PageType::NotRam)
                && types[11] == PageType::Ram,
        )?;
        let full =
            h.populate(shell, &(0x10_0000..0x14_0000).map(Gfn).collect::<Vec<_>>(), 0).expect_err("past its limit");
        println!("  past the limit: {full}");
        for (n, gfn) in (0u32..).zip([0x1000, 0x1001, 0x1005]) {
            h.place_xen_page(shell, XenPage::GrantFrame(n), Gfn(gfn))?;
        }
        need(
            "grant frames are placed",
            h.grant_table_gfns(shell)?[..3] == [0x1000, 0x1001, 0x1005].map(|g| Some(Gfn(g))),
        )?;
        let entry = grant::EntryV1 { flags: grant::GTF_PERMIT_ACCESS, domid: 0, frame: 3 };
        let mut frame = vec![0; PAGE_SIZE];
        frame[8..16].copy_from_slice(entry.as_bytes());
        h.write_grant_frames(shell, GrantArray::Shared, 2, &frame)?;
        need("grant entries are read back", h.read_grant_frames(shell, GrantArray::Shared, 2, 1)? == frame)?;
        // Grant reference 1025: the second entry of frame 2, which grants gfn 3, the second of our pages.
        let map = h.map_grants(shell, &[1025], Access::ReadWrite)?;
        let mut byte = [0; 16];
        map.read(32, &mut byte);
        need("the granted page is the right one", byte == data[PAGE_SIZE + 32..PAGE_SIZE + 48])?;
        map.store_u32(0, 0xfeed_f00d);
        drop(map);
        let mut page = vec![0; PAGE_SIZE];
        h.read_pages(shell, &[Gfn(3)], &mut page)?;
        need("a write through a grant arrives", page[..4] == 0xfeed_f00du32.to_le_bytes())?;
        h.place_xen_page(shell, XenPage::SharedInfo, Gfn(0x2000))?;
        need("shared_info is placed", h.domain_info(shell)?.shared_info == Some(Gfn(0x2000)))?;
        need("shared_info is no RAM of the image", h.page_types(shell, &[Gfn(0x2000)])? == [PageType::NotRam])?;
        let port = h.alloc_unbound_port(shell, DomId::DOM0)?;
        let mut events = h.open_events()?;
        let local = events.bind_interdomain(shell, port)?;
        println!("  port {port} bound to {local}: {:?}", h.port_status(shell, port)?);
        need("binding raises the local end", events.next(Some(Duration::from_secs(1)))? == Some(local))?;
        events.unmask(local)?;
        h.raise_guest_port(shell, port)?;
        drop(events);
        need(
            "closing leaves the guest's port unbound",
            h.port_status(shell, port)?.map(|s| s.state) == Some(PortState::Unbound { remote: DomId::DOM0 }),
        )?;
        timed("set HVM context", || h.set_hvm_context(shell, context))?;
        // Only an initialised vCPU shows its context, and the HVM context initialises it.
        need("the same assists", h.vm_assist(shell)? == h.vm_assist(dom)?)?;
        let back = h.hvm_context(shell)?;
        let (a, b) = (hvm_save::records(context)?, hvm_save::records(&back)?);
        need("the same records", a.len() == b.len())?;
        for (a, b) in a.iter().zip(&b) {
            if a.payload != b.payload {
                let at: Vec<_> = (0..a.payload.len()).filter(|&i| a.payload.get(i) != b.payload.get(i)).collect();
                println!("  record {:?}[{}] differs in bytes {at:?}", hvm_save::code_name(a.code), a.instance);
            }
        }
        for p in hvm_op::PARAMS.iter().filter(|p| p.role == hvm_op::ParamRole::Guest) {
            let v = h.hvm_param(dom, p.index)?;
            if v != h.hvm_param(shell, p.index)? {
                h.set_hvm_param(shell, p.index, v)?;
                need(p.name, h.hvm_param(shell, p.index)? == v)?;
            }
        }
        Ok(())
    })();
    timed("destroy", || h.destroy(shell))?;
    r?;
    need("the shell is gone", h.domain_info(shell).is_err_and(|e| e.is_no_such_domain()))
}

/// The guest-transparent state of a guest, put into a fresh shell step by step through the trait, and read back.
fn gt(h: &XenHost, dom: DomId) -> Outcome {
    h.pause(dom)?;
    let copied = gt_of_paused(h, dom);
    h.unpause(dom)?;
    copied
}

fn gt_of_paused(h: &XenHost, dom: DomId) -> Outcome {
    let state = timed("GT state", || h.gt_state(dom))?;
    let source = h.domain_info(dom)?;
    let shell = DomId(h.domains()?.iter().map(|d| d.domid.0).max().unwrap_or(0) + 50);
    let config = DomainConfig {
        uuid: Uuid::from_u128(0x5678),
        ssidref: source.ssidref,
        flags: state.create_flags,
        iommu_opts: 0,
        max_vcpus: source.vcpus,
        max_evtchn_port: state.max_evtchn_port,
        max_grant_frames: 64,
        max_maptrack_frames: 0,
        grant_opts: state.grant_version,
        cpupool: source.cpupool,
        emulation_flags: source.emulation_flags,
        misc_flags: source.misc_flags,
    };
    h.create_domain(shell, &config)?;
    let r = (|| -> Outcome {
        h.set_max_vcpus(shell, source.vcpus)?;
        h.set_max_mem(shell, source.max_pages * 4)?;
        // The pages that Xen is told of, with what the guest has in them.
        let places = state.vcpus.iter().flat_map(|v| [v.vcpu_info, v.fifo.map(|f| f.control_block)]);
        let mut gfns: Vec<_> =
            places.flatten().map(|p| p.gfn).chain(state.event_array.iter().flatten().copied()).collect();
        gfns.sort();
        gfns.dedup();
        h.populate(shell, &gfns, 0)?;
        let mut pages = vec![0; gfns.len() * PAGE_SIZE];
        h.read_pages(dom, &gfns, &mut pages)?;
        h.write_pages(shell, &gfns, &pages)?;
        h.set_gt_state(shell, GtStep::AddressWidth, &state)?;
        if let Some(gfn) = source.shared_info {
            h.place_xen_page(shell, XenPage::SharedInfo, gfn)?;
        }
        let mut wanted = state.clone();
        wanted.clock_offset_ns = state.guest_now_ns() - i64::try_from(h.now()?)?;
        for v in &mut wanted.vcpus {
            v.runstate = v.runstate.at(state.guest_now_ns());
        }
        for step in GtStep::ALL {
            if step == GtStep::VcpuAreas {
                // It initialises the vCPUs and brings them up.
                h.set_hvm_context(shell, &h.hvm_context(dom)?)?;
            }
            timed(&format!("set {step:?}"), || h.set_gt_state(shell, step, &wanted))?;
        }
        let got = h.gt_state(shell)?;
        let json = |s: &GtState| serde_json::to_value(s).map(|gt| serde_json::json!({ "gt": gt }));
        let mut unexpected = 0;
        for d in hypervisor::inspect::diff(&json(&wanted)?, &json(&got)?) {
            println!("  {d}");
            unexpected += u32::from(d.expected.is_none());
        }
        need("the GT state is read back", unexpected == 0)?;
        let ahead = got.guest_now_ns() - state.guest_now_ns();
        println!("  guest's time went on by {ahead} ns");
        need("the guest's time goes on from where it was", (0..5_000_000_000).contains(&ahead))?;
        for (id, v) in got.vcpus.iter().enumerate() {
            let (a, b) = (&wanted.vcpus[id], v);
            need("the timer fires at the same time", a.singleshot_ns == b.singleshot_ns)?;
            need(
                "runstate counters go on",
                (0..4).all(|i| b.runstate.at(got.guest_now_ns()).time_ns[i] >= a.runstate.time_ns[i]),
            )?;
        }
        let taken = h.set_gt_state(shell, GtStep::Ports, &wanted).expect_err("the ports are taken");
        println!("  again: {taken}");
        wanted.clock_offset_ns = 0;
        h.set_gt_state(shell, GtStep::ClockOffset, &wanted)?;
        Ok(())
    })();
    h.destroy(shell)?;
    r
}

fn run() -> Outcome {
    let dom = DomId(std::env::args().nth(1).ok_or("usage: smoke DOMID")?.parse()?);
    let h = XenHost::open()?;
    let mut failed = Vec::new();
    let mut part = |name: &str, r: Outcome| match r {
        Ok(()) => println!("== {name}: good"),
        Err(e) => {
            println!("== {name}: FAILED: {e}");
            failed.push(name.to_owned());
        }
    };
    part("host", host(&h));
    part("ports", ports(&h, dom));
    part("grants", grants(&h, dom));
    part("memory", memory(&h, dom));
    part("log-dirty", log_dirty(&h, dom));
    match state(&h, dom) {
        Ok(context) => {
            part("state", Ok(()));
            part("shell", shell(&h, dom, &context));
        }
        Err(e) => part("state", Err(e)),
    }
    match h.extension()? {
        Some(info) => {
            println!("extension: {info:?}");
            part("GT state", gt(&h, dom));
        }
        None => println!("the extension is not loaded: GT state left out"),
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", ")).into()) }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("smoke: {e}");
            ExitCode::FAILURE
        }
    }
}
