//! Drives the hypervisor extension by hand, from dom0: loads it, shows and copies a domain's state, tries wrong requests.
//!
//! A program for the lab's scenarios (`programs = ["extension-trial"]`); called without arguments, it says what it can do.

use hypervisor::{Access, DomId, Errno, Gfn, Hypervisor};
use std::error::Error;
use std::time::{Duration, Instant};
use xen_abi::ext::{
    self, ClockOffset, DomainState, Fault, Info, PirqState, Plain, PortState, Request, VcpuState, domain_fields,
    domain_flags, op, port_flags, port_state, vcpu_fields, vcpu_flags,
};
use xen_abi::hypercall;
use xen_host::{XenHost, livepatch};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Hypercall result (0 or negative errno) and the request as it came back.
struct Answer {
    errno: i32,
    request: Request,
}

impl Answer {
    fn good(&self, what: &str) -> Outcome<()> {
        if self.errno == 0 {
            return Ok(());
        }
        let r = &self.request;
        Err(format!("{what}: errno {}, {} (fault {}), {} done", self.errno, Fault::describe(r.fault), r.fault, r.done)
            .into())
    }
}

/// Sends a request as it is, with a buffer of the caller's choice.
fn send(host: &XenHost, domid: u16, mut request: Request, data: &mut [u8]) -> Outcome<Answer> {
    // Room for the longest list that the extension may answer with, whatever the request says.
    let mut buffer = host.privcmd().buffer(data.len().max(ext::MAX_ENTRIES as usize * size_of::<PortState>()))?;
    buffer.bytes_mut()[..data.len()].copy_from_slice(data);
    if request.buffer == 0 {
        request.buffer = buffer.addr();
    }
    let mut call = host.privcmd().buffer(16 + ext::DOMCTL_UNION_SIZE)?;
    call.bytes_mut()[..16 + ext::DOMCTL_UNION_SIZE].fill(0);
    let head = [ext::DOMCTL, host.interface().domctl, u32::from(domid), 0];
    for (place, word) in call.bytes_mut().chunks_exact_mut(4).zip(head) {
        place.copy_from_slice(&word.to_ne_bytes());
    }
    // SAFETY: `Request` is 64 bytes of integers without padding.
    let bytes: [u8; 64] = unsafe { std::mem::transmute(request) };
    call.bytes_mut()[16..80].copy_from_slice(&bytes);
    let address = call.addr();
    // SAFETY: the operation lies in `call`, and its buffer is `buffer` or an address that Xen refuses; both are held.
    let result = unsafe { host.privcmd().hypercall(hypercall::DOMCTL, [address, 0, 0, 0, 0]) };
    let mut answered = [0; 64];
    answered.copy_from_slice(&call.bytes()[16..80]);
    let length = data.len();
    data.copy_from_slice(&buffer.bytes()[..length]);
    // SAFETY: as above; every bit pattern is a `Request`.
    let request: Request = unsafe { std::mem::transmute(answered) };
    Ok(Answer { errno: result.err().map_or(0, |Errno(e)| e), request })
}

fn request<T>(op: u32, index: u32, count: u32) -> Request {
    Request {
        magic: ext::MAGIC,
        version: ext::ABI_VERSION,
        op,
        index,
        count,
        entry_size: size_of::<T>() as u32,
        ..Request::default()
    }
}

fn to_bytes<T: Plain>(items: &[T]) -> Vec<u8> {
    // SAFETY: `Plain` promises integers without padding.
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast::<u8>(), size_of_val(items)) }.to_vec()
}

fn from_bytes<T: Plain>(bytes: &[u8]) -> Vec<T> {
    // SAFETY: `Plain` promises that every bit pattern is valid; the chunk has the type's size.
    bytes.chunks_exact(size_of::<T>()).map(|c| unsafe { std::ptr::read_unaligned(c.as_ptr().cast()) }).collect()
}

fn get_one<T: Plain>(host: &XenHost, domid: u16, op: u32, index: u32, empty: T) -> Outcome<T> {
    let mut data = to_bytes(&[empty]);
    send(host, domid, request::<T>(op, index, 0), &mut data)?.good(&format!("operation {op} on domain {domid}"))?;
    from_bytes(&data).pop().ok_or_else(|| "nothing came back".into())
}

fn get_list<T: Plain + Default>(host: &XenHost, domid: u16, op: u32, first: u32, at_once: u32) -> Outcome<Vec<T>> {
    let mut all = Vec::new();
    let mut index = first;
    loop {
        let mut data = to_bytes(&vec![T::default(); at_once as usize]);
        let answer = send(host, domid, request::<T>(op, index, at_once), &mut data)?;
        answer.good(&format!("operation {op} on domain {domid}"))?;
        all.extend(from_bytes::<T>(&data).into_iter().take(answer.request.done as usize));
        if answer.request.next == 0 {
            return Ok(all);
        }
        index = answer.request.next;
    }
}

fn set_one<T: Plain>(host: &XenHost, domid: u16, op: u32, index: u32, value: T) -> Outcome<Answer> {
    send(host, domid, request::<T>(op, index, 0), &mut to_bytes(&[value]))
}

fn set_list<T: Plain>(host: &XenHost, domid: u16, op: u32, values: &[T]) -> Outcome<Answer> {
    send(host, domid, request::<T>(op, 0, values.len() as u32), &mut to_bytes(values))
}

/// All of a domain.
struct State {
    domain: DomainState,
    vcpus: Vec<VcpuState>,
    ports: Vec<PortState>,
    pirqs: Vec<PirqState>,
}

fn get(host: &XenHost, domid: u16) -> Outcome<State> {
    let domain = get_one(host, domid, op::GET_DOMAIN, 0, DomainState::default())?;
    let vcpus = (0..domain.max_vcpus)
        .map(|id| get_one(host, domid, op::GET_VCPU, id, VcpuState::default()))
        .collect::<Outcome<Vec<_>>>()?;
    Ok(State {
        domain,
        vcpus,
        ports: get_list(host, domid, op::GET_PORTS, 0, 64)?,
        pirqs: get_list(host, domid, op::GET_PIRQS, 0, 64)?,
    })
}

fn show(state: &State) {
    let d = &state.domain;
    let pages: Vec<String> = d.fifo_array.iter().take(d.fifo_pages as usize).map(|gfn| format!("{gfn:#x}")).collect();
    println!(
        "domain flags={:#x} shared_info={:#x} fifo_words={} array=[{}] max_port={} valid={} active={} xen={} pirqs={} vm_assist={:#x} now={} offset={} wc={}.{:09} time_offset={} stime_offset={} last_guest_time={} watchdogs={:?}",
        d.flags,
        d.shared_info_gfn,
        d.fifo_words,
        pages.join(" "),
        d.max_port,
        d.valid_ports,
        d.active_ports,
        d.xen_ports,
        d.pirqs,
        d.vm_assist,
        d.now,
        d.clock_offset,
        d.wc_sec,
        d.wc_nsec,
        d.time_offset,
        d.hvm_stime_offset,
        d.hvm_last_guest_time,
        d.watchdogs
    );
    for v in &state.vcpus {
        println!(
            "vcpu {} flags={:#x} info={:#x}+{:#x} upcall={:#x} runstate_area={:#x} time_area={:#x} runstate={} entry={} time={:?} poll={}",
            v.id,
            v.flags,
            v.vcpu_info_gfn,
            v.vcpu_info_offset,
            v.upcall_vector,
            v.runstate_area,
            v.time_area,
            v.runstate,
            v.runstate_entry,
            v.runstate_time,
            v.poll_port
        );
        println!(
            "  fifo={:#x}+{:#x} tails={:?} virqs={:?} singleshot={} periodic={}@{} pause_flags={:#x} tsc_offset={:#x}",
            v.fifo_control_gfn,
            v.fifo_control_offset,
            v.fifo_tails,
            v.virq_ports,
            v.singleshot_expires,
            v.periodic_period,
            v.periodic_last,
            v.pause_flags,
            v.tsc_offset
        );
    }
    for p in &state.ports {
        println!("port {p:?}");
    }
    for p in &state.pirqs {
        println!("pirq {p:?}");
    }
}

/// What a SET into `to` makes of a port of `from`: an interdomain one comes back unbound, but for a pair within the domain, which goes along;
/// what is in guest memory is not set.
fn to_set(p: &PortState, from: u16, to: u16) -> PortState {
    let flags = p.flags & port_flags::PENDING_EARLY;
    let remote_domid = if p.remote_domid == from { to } else { p.remote_domid };
    match p.state {
        port_state::INTERDOMAIN if p.remote_domid == from => PortState { flags, remote_domid, word: 0, ..*p },
        port_state::INTERDOMAIN => PortState { state: port_state::UNBOUND, flags, remote_port: 0, word: 0, ..*p },
        port_state::UNBOUND => PortState { flags, remote_domid, word: 0, ..*p },
        _ => PortState { flags, word: 0, ..*p },
    }
}

/// SETs all that was read from one domain into another, in the order of a restore, and reads it back.
fn copy(host: &XenHost, from: u16, to: u16) -> Outcome<()> {
    let s = get(host, from)?;
    // A domain that a toolstack made has its store and console ports already, and those of its device model, which stay.
    let made: Vec<PortState> = get_list::<PortState>(host, to, op::GET_PORTS, 0, 64)?
        .iter()
        .filter(|p| p.state != port_state::RESERVED && p.flags & port_flags::XEN == 0)
        .map(|p| PortState { port: p.port, state: port_state::FREE, ..PortState::default() })
        .collect();
    if !made.is_empty() {
        set_list(host, to, op::SET_PORTS, &made)?.good("closing the ports that are there")?;
    }
    let width = DomainState {
        fields: domain_fields::WIDTH_32,
        flags: s.domain.flags & domain_flags::WIDTH_32,
        ..DomainState::default()
    };
    set_one(host, to, op::SET_DOMAIN, 0, width)?.good("32-bit flag")?;
    for v in s.vcpus.iter().filter(|v| v.flags & vcpu_flags::FIFO_CONTROL != 0) {
        set_one(host, to, op::SET_VCPU, v.id, VcpuState { fields: vcpu_fields::FIFO_CONTROL, ..*v })?
            .good("FIFO control")?;
    }
    if !s.pirqs.is_empty() {
        set_list(host, to, op::SET_PIRQS, &s.pirqs)?.good("pirqs")?;
    }
    let ports: Vec<PortState> = s
        .ports
        .iter()
        .filter(|p| p.state != port_state::RESERVED && p.flags & port_flags::XEN == 0)
        .map(|p| to_set(p, from, to))
        .collect();
    for part in ports.chunks(100) {
        set_list(host, to, op::SET_PORTS, part)?.good("ports")?;
    }
    if s.domain.flags & domain_flags::FIFO != 0 {
        set_one(host, to, op::SET_DOMAIN, 0, DomainState { fields: domain_fields::FIFO_ARRAY, ..s.domain })?
            .good("event array")?;
    }
    let offset = s.domain.guest_now() - get_one(host, to, op::INFO, 0, Info::default())?.now;
    let wall = (s.domain.wc_sec * 1_000_000_000) as i64 + i64::from(s.domain.wc_nsec);
    // A host that is wrong by a second and a bit must not show.
    let wall = wall + 1_000_000_007;
    let clock = ClockOffset { size: size_of::<ClockOffset>() as u32, version: ext::ABI_VERSION, offset, wall };
    set_one(host, to, op::SET_CLOCK, 0, clock)?.good("clock")?;
    for v in &s.vcpus {
        let fields = vcpu_fields::SETTABLE & !vcpu_fields::FIFO_CONTROL;
        let fields = if s.domain.flags & domain_flags::FIFO == 0 { fields & !vcpu_fields::FIFO_TAILS } else { fields };
        set_one(host, to, op::SET_VCPU, v.id, VcpuState { fields, ..*v })?.good("vCPU")?;
    }
    set_one(host, to, op::SET_DOMAIN, 0, DomainState { fields: domain_fields::WATCHDOGS, ..s.domain })?
        .good("watchdogs")?;

    let back = get(host, to)?;
    let khz = host.tsc_info(DomId(from))?.khz;
    let mut differ = Vec::new();
    let (a, b) = (&s.domain, &back.domain);
    let mut compare = |what: String, a: String, b: String| {
        if a != b {
            differ.push(format!("{what}: {a} became {b}"));
        }
    };
    let settable = domain_flags::FIFO | domain_flags::WIDTH_32 | domain_flags::HVM;
    compare("domain flags".into(), format!("{:#x}", a.flags & settable), format!("{:#x}", b.flags & settable));
    let wall_of = |d: &DomainState| d.wc_sec * 1_000_000_000 + u64::from(d.wc_nsec);
    compare("wall clock".into(), (wall_of(a) + 1_000_000_007).to_string(), wall_of(b).to_string());
    compare("event array".into(), format!("{:x?}", a.fifo_array), format!("{:x?}", b.fifo_array));
    compare("event words".into(), a.fifo_words.to_string(), b.fifo_words.to_string());
    compare(
        "watchdogs".into(),
        format!("{:?}", a.watchdogs.map(|w| w.in_use)),
        format!("{:?}", b.watchdogs.map(|w| w.in_use)),
    );
    for (a, b) in s.vcpus.iter().zip(&back.vcpus) {
        let flags =
            vcpu_flags::VCPU_INFO_PLACED | vcpu_flags::FIFO_CONTROL | vcpu_flags::SINGLESHOT | vcpu_flags::PERIODIC;
        // Those differ by their nature: what the scheduler and the HVM context hold.
        let plain = |v: &VcpuState| VcpuState {
            flags: v.flags & flags,
            runstate: 0,
            runstate_entry: 0,
            poll_port: 0,
            pause_flags: 0,
            hvm_stime_offset: 0,
            tsc_offset: 0,
            // Two points, of the same line.
            tsc: 0,
            tsc_at: 0,
            ..*v
        };
        compare(format!("vcpu {}'s TSC", a.id), format!("{:?}", tsc_odds(a, b, khz)), "None".to_owned());
        compare(format!("vcpu {}", a.id), format!("{:x?}", plain(a)), format!("{:x?}", plain(b)));
    }
    let ours = |ports: &[PortState], of: u16| -> Vec<PortState> {
        ports.iter().filter(|p| p.flags & port_flags::XEN == 0).map(|p| to_set(p, of, to)).collect()
    };
    compare("ports".into(), format!("{:?}", ours(&s.ports, from)), format!("{:?}", ours(&back.ports, to)));
    compare("pirqs".into(), format!("{:?}", s.pirqs), format!("{:?}", back.pirqs));
    for line in &differ {
        println!("DIFFER {line}");
    }
    println!(
        "copied {} vCPUs, {} ports, {} pirqs; {} differences",
        s.vcpus.len(),
        ports.len(),
        s.pirqs.len(),
        differ.len()
    );
    if differ.is_empty() { Ok(()) } else { Err("the copy differs".into()) }
}

/// How far two points of a TSC are from the same line, in ticks; `None` when that is less than a microsecond's, which is rounding.
fn tsc_odds(a: &VcpuState, b: &VcpuState, khz: u32) -> Option<i128> {
    let expected = i128::from(a.tsc) + i128::from(b.tsc_at - a.tsc_at) * i128::from(khz) / 1_000_000;
    let odds = i128::from(b.tsc) - expected;
    (odds.abs() > i128::from(khz / 1000)).then_some(odds)
}

/// Requests that must be refused, each with the errno and the fault expected.
fn bad(host: &XenHost, paused: u16, running: u16) -> Outcome<()> {
    let mut failures = 0;
    let mut expect = |what: &str, answer: Outcome<Answer>, errno: Errno, fault: u32| match answer {
        Ok(a) if a.errno == errno.0 && a.request.fault == fault => println!("ok   {what}: {}", Fault::describe(fault)),
        Ok(a) => {
            failures += 1;
            println!("FAIL {what}: errno {} fault {}, wanted {} {fault}", a.errno, a.request.fault, errno.0);
        }
        Err(e) => {
            failures += 1;
            println!("FAIL {what}: {e}");
        }
    };
    let before = get(host, paused)?;
    let size = size_of::<ClockOffset>() as u32;
    let clock = |offset| ClockOffset { size, version: ext::ABI_VERSION, offset, wall: 0 };
    let vcpu = |fields| VcpuState { fields, ..VcpuState::default() };
    let port = |port, state| PortState { port, state, ..PortState::default() };
    let far = before.domain.max_port + 1;
    let taken = before.ports.iter().find(|p| p.state != port_state::RESERVED).map_or(1, |p| p.port);
    let free = (1..far).rev().find(|n| before.ports.iter().all(|p| p.port != *n)).unwrap_or(0);

    expect("running target", set_one(host, running, op::SET_CLOCK, 0, clock(5)), Errno::EBUSY, Fault::NOT_PAUSED);
    expect("own domain", set_one(host, 0, op::SET_CLOCK, 0, clock(5)), Errno::EPERM, Fault::TARGET);
    expect("no such domain", set_one(host, 0x7abc, op::SET_CLOCK, 0, clock(5)), Errno::ESRCH, Fault::NONE);
    expect("huge offset", set_one(host, paused, op::SET_CLOCK, 0, clock(i64::MIN)), Errno::EINVAL, Fault::CLOCK);
    let wrong_size = ClockOffset { size: 8, ..clock(5) };
    expect(
        "structure of another size",
        set_one(host, paused, op::SET_CLOCK, 0, wrong_size),
        Errno::EINVAL,
        Fault::SIZE,
    );
    let wrong_version = ClockOffset { version: 99, ..clock(5) };
    expect(
        "structure of another version",
        set_one(host, paused, op::SET_CLOCK, 0, wrong_version),
        Errno::EINVAL,
        Fault::VERSION,
    );
    let short = Request { entry_size: 8, ..request::<ClockOffset>(op::SET_CLOCK, 0, 0) };
    expect("truncated buffer", send(host, paused, short, &mut [0; 16]), Errno::ENOBUFS, Fault::SIZE);
    let long = Request { entry_size: 4096, ..request::<ClockOffset>(op::SET_CLOCK, 0, 0) };
    expect("oversized buffer", send(host, paused, long, &mut [0; 4096]), Errno::EINVAL, Fault::SIZE);
    let counted = request::<ClockOffset>(op::SET_CLOCK, 0, 3);
    expect("count with a single structure", send(host, paused, counted, &mut [0; 48]), Errno::EINVAL, Fault::COUNT);
    let nowhere = Request { buffer: 0x10, ..request::<VcpuState>(op::GET_VCPU, 0, 0) };
    expect("buffer that is not there", send(host, paused, nowhere, &mut []), Errno::EFAULT, Fault::BUFFER);
    let reserved = Request { reserved: [0, 0, 1, 0, 0], ..request::<VcpuState>(op::GET_VCPU, 0, 0) };
    expect("reserved field", send(host, paused, reserved, &mut [0; 512]), Errno::EINVAL, Fault::RESERVED);
    expect(
        "unknown operation",
        send(host, paused, request::<VcpuState>(77, 0, 0), &mut [0; 512]),
        Errno::EOPNOTSUPP,
        Fault::OP,
    );
    expect(
        "unknown operation of GET",
        send(host, paused, request::<VcpuState>(9, 0, 0), &mut [0; 512]),
        Errno::EOPNOTSUPP,
        Fault::OP,
    );
    let old = Request { version: 0, ..request::<VcpuState>(op::GET_VCPU, 0, 0) };
    expect("request of another version", send(host, paused, old, &mut [0; 512]), Errno::EINVAL, Fault::VERSION);
    let empty = request::<PortState>(op::SET_PORTS, 0, 0);
    expect("empty list", send(host, paused, empty, &mut []), Errno::EINVAL, Fault::COUNT);
    let crowd = request::<PortState>(op::SET_PORTS, 0, ext::MAX_ENTRIES + 1);
    expect("long list", send(host, paused, crowd, &mut [0; 64]), Errno::EINVAL, Fault::COUNT);

    expect("port 0", set_list(host, paused, op::SET_PORTS, &[port(0, port_state::IPI)]), Errno::EINVAL, Fault::PORT);
    expect(
        "port past the limit",
        set_list(host, paused, op::SET_PORTS, &[port(far, port_state::IPI)]),
        Errno::ENOSPC,
        Fault::PORT,
    );
    expect(
        "port far past the limit",
        set_list(host, paused, op::SET_PORTS, &[port(u32::MAX, port_state::IPI)]),
        Errno::EINVAL,
        Fault::PORT,
    );
    expect(
        "taken port",
        set_list(host, paused, op::SET_PORTS, &[port(taken, port_state::IPI)]),
        Errno::EBUSY,
        Fault::PORT,
    );
    expect(
        "interdomain port",
        set_list(host, paused, op::SET_PORTS, &[port(free, port_state::INTERDOMAIN)]),
        Errno::EOPNOTSUPP,
        Fault::PORT_REMOTE,
    );
    for (what, remote_port, errno) in [
        ("pair with port 0", 0, Errno::EINVAL),
        ("pair of a port with itself", free, Errno::EINVAL),
        ("pair with a port far past the limit", u32::MAX, Errno::EINVAL),
        ("pair with a port that is taken", taken, Errno::EBUSY),
    ] {
        let pair = PortState { remote_domid: paused, remote_port, ..port(free, port_state::INTERDOMAIN) };
        expect(what, set_list(host, paused, op::SET_PORTS, &[pair]), errno, Fault::PORT_REMOTE);
    }
    expect(
        "unknown state",
        set_list(host, paused, op::SET_PORTS, &[port(free, 200)]),
        Errno::EOPNOTSUPP,
        Fault::PORT_STATE,
    );
    let xen = PortState { flags: port_flags::XEN, ..port(free, port_state::UNBOUND) };
    expect("port of Xen's", set_list(host, paused, op::SET_PORTS, &[xen]), Errno::EOPNOTSUPP, Fault::PORT_STATE);
    let vcpu_9 = PortState { notify_vcpu: 4000, ..port(free, port_state::IPI) };
    expect("port's vCPU", set_list(host, paused, op::SET_PORTS, &[vcpu_9]), Errno::ENOENT, Fault::PORT_VCPU);
    let last_9 = PortState { last_vcpu: 4000, ..port(free, port_state::IPI) };
    expect("port's last vCPU", set_list(host, paused, op::SET_PORTS, &[last_9]), Errno::ENOENT, Fault::PORT_VCPU);
    let urgent = PortState { priority: 16, ..port(free, port_state::IPI) };
    expect("port's priority", set_list(host, paused, op::SET_PORTS, &[urgent]), Errno::EINVAL, Fault::PORT_PRIORITY);
    let self_ = PortState { remote_domid: 0x7ff0, ..port(free, port_state::UNBOUND) };
    expect("port's remote", set_list(host, paused, op::SET_PORTS, &[self_]), Errno::EINVAL, Fault::PORT_REMOTE);
    let virq = PortState { irq: 24, ..port(free, port_state::VIRQ) };
    expect("VIRQ's number", set_list(host, paused, op::SET_PORTS, &[virq]), Errno::EINVAL, Fault::PORT_VIRQ);
    let pirq = PortState { irq: u32::MAX, ..port(free, port_state::PIRQ) };
    expect("port's pirq", set_list(host, paused, op::SET_PORTS, &[pirq]), Errno::EINVAL, Fault::PORT_PIRQ);
    let pirq = PirqState { pirq: u32::MAX, ..PirqState::default() };
    expect("pirq's number", set_list(host, paused, op::SET_PIRQS, &[pirq]), Errno::EINVAL, Fault::PIRQ);

    expect(
        "vCPU's number",
        set_one(host, paused, op::SET_VCPU, 4000, VcpuState { id: 4000, ..vcpu(0) }),
        Errno::ENOENT,
        Fault::VCPU,
    );
    expect(
        "vCPU that is not the request's",
        set_one(host, paused, op::SET_VCPU, 0, VcpuState { id: 1, ..vcpu(0) }),
        Errno::EINVAL,
        Fault::VCPU,
    );
    expect("unknown field", set_one(host, paused, op::SET_VCPU, 0, vcpu(1 << 40)), Errno::EINVAL, Fault::FIELDS);
    let info = |gfn, offset| VcpuState { vcpu_info_gfn: gfn, vcpu_info_offset: offset, ..vcpu(vcpu_fields::VCPU_INFO) };
    let placed = before.vcpus.first().is_some_and(|v| v.flags & vcpu_flags::VCPU_INFO_PLACED != 0);
    let (errno, gfn) = if placed { (Errno::EBUSY, 0x1000) } else { (Errno::EINVAL, 0xffff_ffff_ffff) };
    expect(
        "vcpu_info that is placed, or of a foreign gfn",
        set_one(host, paused, op::SET_VCPU, 0, info(gfn, 0)),
        errno,
        Fault::VCPU_INFO,
    );
    expect(
        "vcpu_info across a page",
        set_one(host, paused, op::SET_VCPU, 0, info(1, 4090)),
        Errno::EINVAL,
        Fault::VCPU_INFO,
    );
    let control = |gfn, offset| VcpuState {
        fifo_control_gfn: gfn,
        fifo_control_offset: offset,
        ..vcpu(vcpu_fields::FIFO_CONTROL)
    };
    expect(
        "control block across a page",
        set_one(host, paused, op::SET_VCPU, 0, control(1, 4088)),
        Errno::EINVAL,
        Fault::FIFO_CONTROL,
    );
    expect(
        "control block out of line",
        set_one(host, paused, op::SET_VCPU, 0, control(1, 4)),
        Errno::EINVAL,
        Fault::FIFO_CONTROL,
    );
    let placed = before.vcpus.first().is_some_and(|v| v.flags & vcpu_flags::FIFO_CONTROL != 0);
    let (errno, gfn) = if placed { (Errno::EBUSY, 0x1000) } else { (Errno::EINVAL, 0xffff_ffff_ffff) };
    expect(
        "control block that is placed, or of a foreign gfn",
        set_one(host, paused, op::SET_VCPU, 0, control(gfn, 0)),
        errno,
        Fault::FIFO_CONTROL,
    );
    let tails = VcpuState { fifo_tails: [u32::MAX; 16], ..vcpu(vcpu_fields::FIFO_TAILS) };
    expect("tail past the array", set_one(host, paused, op::SET_VCPU, 0, tails), Errno::EINVAL, Fault::FIFO_TAIL);
    let area = VcpuState { runstate_area: 0x8000_0000_0000, ..vcpu(vcpu_fields::RUNSTATE_AREA) };
    expect("runstate area", set_one(host, paused, op::SET_VCPU, 0, area), Errno::EINVAL, Fault::RUNSTATE_AREA);
    let area = VcpuState { time_area: 0x8000_0000_0000, ..vcpu(vcpu_fields::TIME_AREA) };
    expect("time area", set_one(host, paused, op::SET_VCPU, 0, area), Errno::EINVAL, Fault::TIME_AREA);
    let back = VcpuState { runstate_time: [-1, 0, 0, 0], ..vcpu(vcpu_fields::RUNSTATE) };
    expect("negative runstate", set_one(host, paused, op::SET_VCPU, 0, back), Errno::EINVAL, Fault::RUNSTATE);
    let vector = VcpuState { upcall_vector: 15, ..vcpu(vcpu_fields::UPCALL) };
    expect("upcall vector", set_one(host, paused, op::SET_VCPU, 0, vector), Errno::EINVAL, Fault::UPCALL);
    let shot =
        VcpuState { flags: vcpu_flags::SINGLESHOT, singleshot_expires: i64::MAX, ..vcpu(vcpu_fields::SINGLESHOT) };
    expect("singleshot far ahead", set_one(host, paused, op::SET_VCPU, 0, shot), Errno::EINVAL, Fault::SINGLESHOT);
    let tsc = VcpuState { tsc_at: i64::MAX, ..vcpu(vcpu_fields::TSC) };
    expect("TSC of a far moment", set_one(host, paused, op::SET_VCPU, 0, tsc), Errno::EINVAL, Fault::TSC);
    let fast = VcpuState { periodic_period: 999_999, ..vcpu(vcpu_fields::PERIODIC) };
    expect("short period", set_one(host, paused, op::SET_VCPU, 0, fast), Errno::EINVAL, Fault::PERIODIC);

    let array = DomainState { fields: domain_fields::FIFO_ARRAY, fifo_pages: 129, ..DomainState::default() };
    expect("too many array pages", set_one(host, paused, op::SET_DOMAIN, 0, array), Errno::EINVAL, Fault::FIFO_ARRAY);
    let mut dog = DomainState { fields: domain_fields::WATCHDOGS, ..DomainState::default() };
    dog.watchdogs[0] = ext::Watchdog { remaining: -5, in_use: 1, reserved: 0 };
    expect("watchdog", set_one(host, paused, op::SET_DOMAIN, 0, dog), Errno::EINVAL, Fault::WATCHDOG);

    for op in [op::GET_PORTS, op::GET_PIRQS] {
        let size = if op == op::GET_PORTS { size_of::<PortState>() } else { size_of::<PirqState>() };
        let beyond = Request { op, entry_size: size as u32, ..request::<PortState>(op, u32::MAX, 4) };
        let answer = send(host, paused, beyond, &mut [0; 128])?;
        let ends = answer.errno == 0 && answer.request.done == 0 && answer.request.next == 0;
        println!("{} a list from beyond its end is empty", if ends { "ok  " } else { "FAIL" });
        failures += u32::from(!ends);
    }
    let after = get(host, paused)?;
    let same = before.ports == after.ports
        && before.pirqs == after.pirqs
        && before.domain.clock_offset == after.domain.clock_offset;
    let settled = |v: &VcpuState| VcpuState {
        flags: v.flags & !vcpu_flags::SINGLESHOT,
        singleshot_expires: 0,
        pause_flags: 0,
        tsc: 0,
        tsc_at: 0,
        ..*v
    };
    let khz = host.tsc_info(DomId(paused))?.khz;
    let same = same && before.vcpus.iter().zip(&after.vcpus).all(|(a, b)| tsc_odds(a, b, khz).is_none());
    let same = same && before.vcpus.iter().map(settled).eq(after.vcpus.iter().map(settled));
    println!("{} the target is {}", if same { "ok  " } else { "FAIL" }, if same { "unchanged" } else { "changed" });
    if failures == 0 && same {
        Ok(())
    } else {
        Err(format!("{failures} requests were not refused as they should").into())
    }
}

/// xorshift64*, so that a run can be repeated from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// A number that is more likely to be near an edge than not.
    fn edgy(&mut self) -> u64 {
        match self.next() % 8 {
            0 => 0,
            1 => self.next() % 4,
            2 => self.next() % 64,
            3 => self.next() % 5000,
            4 => u64::MAX - self.next() % 4,
            5 => 1 << (self.next() % 64),
            6 => u64::from(self.next() as u32),
            _ => self.next(),
        }
    }
}

/// Throws well-formed requests with wild contents at a paused domain, and now and then wholly wild ones.
fn fuzz(host: &XenHost, domid: u16, seconds: u64, seed: u64) -> Outcome<()> {
    let mut random = Random(seed | 1);
    let begun = Instant::now();
    let (mut sent, mut taken) = (0u64, 0u64);
    let mut by_fault = std::collections::BTreeMap::new();
    while begun.elapsed() < Duration::from_secs(seconds) {
        let ops = [
            op::INFO,
            op::GET_DOMAIN,
            op::GET_VCPU,
            op::GET_PORTS,
            op::GET_PIRQS,
            op::SET_DOMAIN,
            op::SET_VCPU,
            op::SET_PORTS,
            op::SET_PIRQS,
            op::SET_CLOCK,
        ];
        let op = ops[(random.next() % ops.len() as u64) as usize];
        let (size, list) = match op {
            op::INFO => (size_of::<Info>(), false),
            op::GET_DOMAIN | op::SET_DOMAIN => (size_of::<DomainState>(), false),
            op::GET_VCPU | op::SET_VCPU => (size_of::<VcpuState>(), false),
            op::GET_PORTS | op::SET_PORTS => (size_of::<PortState>(), true),
            op::GET_PIRQS | op::SET_PIRQS => (size_of::<PirqState>(), true),
            _ => (size_of::<ClockOffset>(), false),
        };
        let count = if list { (random.next() % 8 + 1) as u32 } else { 0 };
        let mut data: Vec<u8> = Vec::new();
        while data.len() < size * count.max(1) as usize {
            let n = random.edgy();
            if random.one_in(2) { data.extend(n.to_le_bytes()) } else { data.extend((n as u32).to_le_bytes()) }
        }
        data.truncate(size * count.max(1) as usize);
        if !list && !random.one_in(16) {
            data[0..4].copy_from_slice(&(size as u32).to_le_bytes());
            data[4..8].copy_from_slice(&ext::ABI_VERSION.to_le_bytes());
            if size > 16 && !random.one_in(4) {
                // A small set of fields, so that not every request stumbles over the same one.
                data[8..16].copy_from_slice(&(1u64 << (random.next() % 10)).to_le_bytes());
            }
            if op == op::SET_VCPU || op == op::GET_VCPU {
                data[16..20].copy_from_slice(&0u32.to_le_bytes());
            }
        }
        let index = if random.one_in(2) { 0 } else { random.edgy() as u32 };
        let mut request = Request {
            magic: ext::MAGIC,
            version: ext::ABI_VERSION,
            op,
            index,
            count,
            entry_size: size as u32,
            ..Request::default()
        };
        if random.one_in(32) {
            request.entry_size = random.edgy() as u32;
            request.count = random.edgy() as u32;
        }
        if random.one_in(64) {
            request.op = random.edgy() as u32;
        }
        let answer = send(host, domid, request, &mut data)?;
        sent += 1;
        if answer.errno == 0 {
            taken += 1;
        }
        *by_fault.entry((answer.errno, answer.request.fault)).or_insert(0u64) += 1;
    }
    println!("sent {sent}, taken {taken}, seed {seed}");
    for ((errno, fault), times) in by_fault {
        println!("  errno {errno:3} {:6} times: {}", times, Fault::describe(fault));
    }
    // A target that has gone would refuse all of it. Nearly a quarter is usual.
    if taken * 20 < sent {
        return Err(format!("of {sent} requests only {taken} were taken: is domain {domid} there?").into());
    }
    Ok(())
}

/// SETs on a domain that is dying: it is destroyed while one of its pages is mapped here, so that it cannot go.
fn dying(host: &XenHost, domid: u16) -> Outcome<()> {
    let page = host.map_pages(DomId(domid), &[Gfn(0x100)], Access::Read)?;
    host.destroy(DomId(domid))?;
    let flags = get_one(host, domid, op::GET_DOMAIN, 0, DomainState::default())?.flags;
    if flags & domain_flags::DYING == 0 {
        return Err(format!("domain {domid} is not dying (flags {flags:#x})").into());
    }
    let clock = ClockOffset { size: size_of::<ClockOffset>() as u32, version: ext::ABI_VERSION, offset: 5, wall: 0 };
    let port = PortState { port: 1, state: port_state::IPI, ..PortState::default() };
    let pirq = PirqState { pirq: 16, ..PirqState::default() };
    for (what, answer) in [
        ("clock", set_one(host, domid, op::SET_CLOCK, 0, clock)?),
        ("domain", set_one(host, domid, op::SET_DOMAIN, 0, DomainState::default())?),
        ("vCPU", set_one(host, domid, op::SET_VCPU, 0, VcpuState::default())?),
        ("ports", set_list(host, domid, op::SET_PORTS, &[port])?),
        ("pirqs", set_list(host, domid, op::SET_PIRQS, &[pirq])?),
    ] {
        if answer.errno != Errno::EINVAL.0 || answer.request.fault != Fault::DYING {
            let fault = Fault::describe(answer.request.fault);
            return Err(format!("{what} of a dying domain: errno {}, {fault}", answer.errno).into());
        }
        println!("ok   {what} of a dying domain");
    }
    drop(page);
    Ok(())
}

/// Payloads that Xen must refuse: one that is made for another build-id, and one that was cut off. Nothing may be loaded afterwards.
fn wrong_payloads(host: &XenHost, file: &str) -> Outcome<()> {
    let good = std::fs::read(file)?;
    let id = get_one(host, 0, op::INFO, 0, Info::default())?.build_id;
    host.unload_payload(livepatch::NAME)?;
    let mut other = good.clone();
    let places: Vec<usize> = good.windows(id.len()).enumerate().filter(|(_, w)| *w == id).map(|(at, _)| at).collect();
    for at in &places {
        if let Some(byte) = other.get_mut(*at) {
            *byte ^= 1;
        }
    }
    // Two notes bind a payload: to what it is put upon, and to the hypervisor.
    if places.len() < 2 {
        return Err(format!("{file} names this Xen's build-id {} times", places.len()).into());
    }
    let half = good.get(..good.len() / 2).unwrap_or_default();
    for (what, payload) in [("another build-id", other.as_slice()), ("cut in half", half)] {
        match host.load_payload(livepatch::NAME, payload) {
            Ok(()) => return Err(format!("a payload was loaded: {what}").into()),
            Err(e) => println!("ok   {what}: {e}"),
        }
        if host.extension()?.is_some() {
            return Err(format!("the extension answers after a payload was refused: {what}").into());
        }
    }
    host.load_payload(livepatch::NAME, &good)?;
    get_one(host, 0, op::INFO, 0, Info::default())?;
    println!("ok   the right one is loaded");
    Ok(())
}

/// One round of `hypervisor-ext/tests/guest32.c`, as it stands in Xen's log: `(d5) T32 now=… … bad=…`.
#[derive(Debug, PartialEq, Eq)]
struct Round {
    /// The guest's own clock, ns of its system time.
    now: i64,
    /// A bit for each time that made no sense to it.
    bad: u64,
}

fn parse_rounds(log: &str, domid: u16) -> Outcome<Vec<Round>> {
    let front = format!("(d{domid}) T32 ");
    let mut rounds = Vec::new();
    for line in log.lines().filter_map(|line| line.split_once(front.as_str()).map(|(_, rest)| rest)) {
        if line.starts_with("FAILED") {
            return Err(format!("a hypercall of the guest's failed: {line}").into());
        }
        let field = |name: &str| {
            let text = line.split_whitespace().find_map(|word| word.strip_prefix(name));
            text.and_then(|hex| u64::from_str_radix(hex, 16).ok()).ok_or_else(|| format!("no {name} in {line:?}"))
        };
        rounds.push(Round { now: field("now=")?.cast_signed(), bad: field("bad=")? });
    }
    Ok(rounds)
}

/// Reads Xen's log from the standard input: the 32-bit guest made at least so many rounds, its clock is the host's plus its offset, and
/// hardly any time made no sense to it. Under emulation a few do, with or without an offset; more than one in twenty is a fault.
fn rounds(host: &XenHost, domid: u16, least: usize) -> Outcome<()> {
    let rounds = parse_rounds(&std::io::read_to_string(std::io::stdin())?, domid)?;
    let info = get_one(host, 0, op::INFO, 0, Info::default())?;
    let offset = get_one(host, domid, op::GET_DOMAIN, 0, DomainState::default())?.clock_offset;
    let odd: Vec<_> = rounds.iter().filter(|round| round.bad != 0).collect();
    println!("{} rounds, {} of them odd: {odd:x?}", rounds.len(), odd.len());
    if rounds.len() < least {
        return Err(format!("{} rounds, {least} wanted", rounds.len()).into());
    }
    if odd.len() * 20 > rounds.len() {
        return Err(format!("{} of {} rounds were odd", odd.len(), rounds.len()).into());
    }
    let last = rounds.last().ok_or("no round at all")?;
    // A round takes about 2 s, and the log is read after it.
    let behind = info.now.wrapping_add(offset).wrapping_sub(last.now);
    println!("offset {offset} ns; the last round began {behind} ns ago");
    if !(0..20_000_000_000).contains(&behind) {
        return Err(format!("the guest's clock is {behind} ns behind the host's plus its offset").into());
    }
    Ok(())
}

const USAGE: &str = "extension-trial WHAT
  load FILE | unload | info        the extension itself
  cycle FILE TIMES                 load, ask and unload it so many times
  get DOMID | time DOMID           a domain's state; how long reading it takes
  clock DOMID NS                   set a paused domain's clock offset
  copy FROM TO                     write FROM's state into TO, which never ran, read it back and compare
  bad PAUSED RUNNING               send wrong requests
  dying DOMID                      destroy it, and send it SETs while it is dying
  wrong-payloads FILE              upload payloads that must be refused, then FILE
  fuzz DOMID SECONDS SEED          throw wild requests at a paused domain
  rounds DOMID LEAST               judge the rounds of guest32 in Xen's log on the standard input";

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let host = XenHost::open()?;
    match words.as_slice() {
        ["load", file] => host.load_payload(livepatch::NAME, &std::fs::read(file)?)?,
        ["unload"] => host.unload_payload(livepatch::NAME)?,
        ["cycle", file, times] => {
            let payload = std::fs::read(file)?;
            let begun = Instant::now();
            for _ in 0..times.parse::<u32>()? {
                host.load_payload(livepatch::NAME, &payload)?;
                get_one(&host, 0, op::INFO, 0, Info::default())?;
                host.unload_payload(livepatch::NAME)?;
            }
            println!("{times} times loaded, asked and unloaded in {:?}", begun.elapsed());
        }
        ["info"] => println!("{:x?}", get_one(&host, 0, op::INFO, 0, Info::default())?),
        ["get", domid] => show(&get(&host, domid.parse()?)?),
        ["time", domid] => {
            let domid = domid.parse()?;
            let begun = Instant::now();
            let domain = get_one(&host, domid, op::GET_DOMAIN, 0, DomainState::default())?;
            let vcpus_at = begun.elapsed();
            for id in 0..domain.max_vcpus {
                get_one(&host, domid, op::GET_VCPU, id, VcpuState::default())?;
            }
            let ports_at = begun.elapsed();
            let ports = get_list::<PortState>(&host, domid, op::GET_PORTS, 0, ext::MAX_ENTRIES)?.len();
            let pirqs_at = begun.elapsed();
            let pirqs = get_list::<PirqState>(&host, domid, op::GET_PIRQS, 0, ext::MAX_ENTRIES)?.len();
            let end = begun.elapsed();
            println!(
                "{end:?}: domain {vcpus_at:?}, {} vCPUs {:?}, {ports} ports {:?}, {pirqs} pirqs {:?}",
                domain.max_vcpus,
                ports_at - vcpus_at,
                pirqs_at - ports_at,
                end - pirqs_at
            );
        }
        ["clock", domid, ns] => {
            let clock = ClockOffset {
                size: size_of::<ClockOffset>() as u32,
                version: ext::ABI_VERSION,
                offset: ns.parse()?,
                wall: 0,
            };
            set_one(&host, domid.parse()?, op::SET_CLOCK, 0, clock)?.good("clock")?;
        }
        ["copy", from, to] => copy(&host, from.parse()?, to.parse()?)?,
        ["bad", paused, running] => bad(&host, paused.parse()?, running.parse()?)?,
        ["dying", domid] => dying(&host, domid.parse()?)?,
        ["wrong-payloads", file] => wrong_payloads(&host, file)?,
        ["rounds", domid, least] => rounds(&host, domid.parse()?, least.parse()?)?,
        ["fuzz", domid, seconds, seed] => fuzz(&host, domid.parse()?, seconds.parse()?, seed.parse()?)?,
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_read() {
        let log = "(XEN) x\n(d5) T32 now=ffffffffffffff9c hvm=1 rs=2 poll=3 bad=0\n(d6) T32 now=1 bad=1\n(d5) T32 now=64 bad=c\n";
        assert_eq!(parse_rounds(log, 5).unwrap(), [Round { now: -100, bad: 0 }, Round { now: 100, bad: 12 }]);
        assert!(parse_rounds("(d5) T32 FAILED poll 16", 5).is_err());
        assert!(parse_rounds("(d5) T32 now=1", 5).is_err());
    }
}
