//! The extension's operations (`xen_abi::ext`), and the guest-transparent state as the trait has it.

use crate::XenHost;
use hypervisor::*;
use xen_abi::ext::{
    self, ClockOffset, DomainState, Fault, Info, PirqState, Plain, PortState as ExtPort, Request, VcpuState,
    domain_fields, domain_flags, op, port_flags, port_state, vcpu_fields, vcpu_flags,
};
use xen_abi::{domctl::PAYLOAD_LEN, hypercall};

/// What an operation answered, and which value it objected to.
struct Answer {
    result: std::result::Result<i64, Errno>,
    request: Request,
}

/// The bytes of structures that cross the hypercall.
fn bytes_of<T: Plain>(items: &[T]) -> &[u8] {
    // SAFETY: `Plain` promises integers without padding, so all bytes are initialised.
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), size_of_val(items)) }
}

/// The first `count` structures in a buffer.
fn take<T: Plain>(bytes: &[u8], count: usize) -> Vec<T> {
    bytes
        .chunks_exact(size_of::<T>())
        .take(count)
        // SAFETY: `Plain` promises that every bit pattern is valid, and the chunk has the type's size.
        .map(|c| unsafe { std::ptr::read_unaligned(c.as_ptr().cast()) })
        .collect()
}

fn op_name(op: u32) -> &'static str {
    match op {
        op::INFO => "extension: info",
        op::GET_DOMAIN => "extension: get domain",
        op::GET_VCPU => "extension: get vCPU",
        op::GET_PORTS => "extension: get ports",
        op::GET_PIRQS => "extension: get pirqs",
        op::SET_DOMAIN => "extension: set domain",
        op::SET_VCPU => "extension: set vCPU",
        op::SET_PORTS => "extension: set ports",
        op::SET_PIRQS => "extension: set pirqs",
        _ => "extension: set clock",
    }
}

impl XenHost {
    /// One request with a buffer of `items`, which hold what came back.
    fn ext_raw<T: Plain>(&self, dom: DomId, op: u32, index: u32, list: bool, items: &mut Vec<T>) -> Result<Answer> {
        let mut data = self.privcmd.buffer(size_of_val(items.as_slice()))?;
        let bytes = bytes_of(items);
        data.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let request = Request {
            magic: ext::MAGIC,
            version: ext::ABI_VERSION,
            op,
            index,
            count: if list { items.len() as u32 } else { 0 },
            entry_size: size_of::<T>() as u32,
            buffer: data.addr(),
            ..Request::default()
        };
        let mut call = self.privcmd.buffer(16 + PAYLOAD_LEN)?;
        call.bytes_mut()[..16 + PAYLOAD_LEN].fill(0);
        call.put(0, &[ext::DOMCTL, self.interface.domctl, u32::from(dom.0), 0]);
        // SAFETY: `Request` is repr(C), 64 bytes of integers without padding (asserted beside its definition).
        let request_bytes =
            unsafe { std::slice::from_raw_parts((&raw const request).cast::<u8>(), size_of::<Request>()) };
        call.bytes_mut()[16..16 + request_bytes.len()].copy_from_slice(request_bytes);
        let addr = call.addr();
        // SAFETY: the operation lies in `call` and points to `data`, both held mutably.
        let result = unsafe { self.privcmd.hypercall(hypercall::DOMCTL, [addr, 0, 0, 0, 0]) };
        // SAFETY: 64 initialised bytes, every pattern of which is a valid `Request`.
        let request = unsafe { std::ptr::read_unaligned(call.bytes()[16..].as_ptr().cast::<Request>()) };
        *items = take(data.bytes(), items.len());
        Ok(Answer { result, request })
    }

    /// As an error that says which value was refused, or that the extension is not there.
    fn ext<T: Plain>(&self, dom: DomId, op: u32, index: u32, list: bool, items: &mut Vec<T>) -> Result<Request> {
        let answer = self.ext_raw(dom, op, index, list, items)?;
        match answer.result {
            Ok(_) => Ok(answer.request),
            Err(Errno::ENOSYS) => Err(HypervisorError::unsupported(
                op_name(op),
                dom,
                "the hypervisor extension is not loaded; load it with `ferry host load`",
            )),
            Err(e) => {
                let error = HypervisorError::errno(op_name(op), dom, e);
                Err(match (answer.request.fault, op) {
                    (Fault::NONE, _) => error,
                    (fault, op::SET_PORTS | op::SET_PIRQS) => {
                        error.with_detail(format!("{}, entry {}", Fault::describe(fault), answer.request.done))
                    }
                    (fault, op::SET_VCPU | op::GET_VCPU) => {
                        error.with_detail(format!("vCPU {index}: {}", Fault::describe(fault)))
                    }
                    (fault, _) => error.with_detail(Fault::describe(fault)),
                })
            }
        }
    }

    fn ext_one<T: Plain>(&self, dom: DomId, op: u32, index: u32, item: T) -> Result<T> {
        let mut items = vec![item];
        self.ext(dom, op, index, false, &mut items)?;
        items.pop().ok_or_else(|| HypervisorError::malformed(op_name(op), dom, "no answer"))
    }

    /// A whole list, in parts of what one request may carry.
    fn ext_list<T: Plain + Default>(&self, dom: DomId, op: u32, first: u32) -> Result<Vec<T>> {
        let mut all = Vec::new();
        let mut index = first;
        loop {
            let mut part = vec![T::default(); ext::MAX_ENTRIES as usize];
            let request = self.ext(dom, op, index, true, &mut part)?;
            part.truncate(request.done as usize);
            all.append(&mut part);
            match request.next {
                0 => return Ok(all),
                next if next > index => index = next,
                next => {
                    let text = format!("the list goes back from {index} to {next}");
                    return Err(HypervisorError::malformed(op_name(op), dom, text));
                }
            }
        }
    }

    fn ext_send<T: Plain>(&self, dom: DomId, op: u32, items: &[T]) -> Result<()> {
        for part in items.chunks(ext::MAX_ENTRIES as usize) {
            self.ext(dom, op, 0, true, &mut part.to_vec())?;
        }
        Ok(())
    }

    /// What the loaded extension says of itself; `None` if none is loaded.
    pub(crate) fn extension_info(&self) -> Result<Option<ExtensionInfo>> {
        let info = Info { size: size_of::<Info>() as u32, version: ext::ABI_VERSION, ..Info::default() };
        let mut items = vec![info];
        let answer = self.ext_raw(DomId::DOM0, op::INFO, 0, false, &mut items)?;
        Ok(match (answer.result, answer.request.fault) {
            (Ok(_), _) => items.pop().map(|info| ExtensionInfo { abi_version: info.version }),
            (Err(Errno::ENOSYS), _) => None,
            // One of another version says no more than that.
            (Err(_), Fault::VERSION | Fault::SIZE) => Some(ExtensionInfo { abi_version: 0 }),
            (Err(e), fault) => {
                return Err(HypervisorError::errno(op_name(op::INFO), None, e).with_detail(Fault::describe(fault)));
            }
        })
    }

    /// The loaded extension's own description, `None` if none is loaded. One of another version answers an error that says so.
    pub fn extension(&self) -> Result<Option<Info>> {
        let info = Info { size: size_of::<Info>() as u32, version: ext::ABI_VERSION, ..Info::default() };
        let mut items = vec![info];
        // A domctl looks its domain up before anything else; the control domain always exists.
        let answer = self.ext_raw(DomId::DOM0, op::INFO, 0, false, &mut items)?;
        match answer.result {
            Ok(_) => Ok(items.pop()),
            Err(Errno::ENOSYS) => Ok(None),
            Err(e) => {
                Err(HypervisorError::errno(op_name(op::INFO), None, e)
                    .with_detail(Fault::describe(answer.request.fault)))
            }
        }
    }

    pub(crate) fn get_gt(&self, dom: DomId) -> Result<GtState> {
        let d = self.ext_one(dom, op::GET_DOMAIN, 0, DomainState::default())?;
        let vcpus = (0..d.max_vcpus)
            .map(|v| self.ext_one(dom, op::GET_VCPU, v, VcpuState { id: v, ..VcpuState::default() }))
            .collect::<Result<Vec<_>>>()?;
        let ports: Vec<ExtPort> = self.ext_list(dom, op::GET_PORTS, 1)?;
        let pirqs: Vec<PirqState> = self.ext_list(dom, op::GET_PIRQS, 0)?;
        let fifo = d.flags & domain_flags::FIFO != 0;
        let pages = d.fifo_array.get(..d.fifo_pages as usize).ok_or_else(|| {
            HypervisorError::malformed(op_name(op::GET_DOMAIN), dom, format!("{} event-array pages", d.fifo_pages))
        })?;
        Ok(GtState {
            guest_is_32bit: d.flags & domain_flags::WIDTH_32 != 0,
            host_now_ns: d.now,
            clock_offset_ns: d.clock_offset,
            wall_clock: WallClock { sec: d.wc_sec, nsec: d.wc_nsec },
            grant_version: self.table_version(dom)?,
            max_evtchn_port: d.max_port,
            create_flags: d.create_flags,
            event_array: fifo.then(|| pages.iter().map(|&g| Gfn(g)).collect()),
            ports: ports.iter().filter_map(|p| port(dom, p).transpose()).collect::<Result<_>>()?,
            vcpus: vcpus.iter().map(vcpu).collect(),
            watchdogs: d
                .watchdogs
                .iter()
                .zip(1..)
                .filter(|(w, _)| w.in_use != 0)
                .map(|(w, id)| Watchdog { id, remaining_ns: w.remaining })
                .collect(),
            emuirqs: pirqs
                .iter()
                .filter(|p| p.emuirq != ext::EMUIRQ_UNBOUND)
                .map(|p| EmuIrq { pirq: p.pirq, emuirq: p.emuirq })
                .collect(),
        })
    }

    pub(crate) fn put_gt(&self, dom: DomId, step: GtStep, s: &GtState) -> Result<()> {
        let set_domain = |d: DomainState| self.ext_one(dom, op::SET_DOMAIN, 0, d).map(drop);
        let set_vcpus = |fill: &dyn Fn(&GtVcpu) -> Option<VcpuState>| {
            for (id, v) in (0u32..).zip(&s.vcpus) {
                if let Some(state) = fill(v) {
                    self.ext_one(dom, op::SET_VCPU, id, VcpuState { id, ..state })?;
                }
            }
            Ok(())
        };
        match step {
            GtStep::AddressWidth => set_domain(DomainState {
                fields: domain_fields::WIDTH_32,
                flags: if s.guest_is_32bit { domain_flags::WIDTH_32 } else { 0 },
                ..DomainState::default()
            }),
            GtStep::GrantVersion => match self.table_version(dom)? {
                v if v == s.grant_version => Ok(()),
                v => Err(HypervisorError::unsupported(
                    "set grant table version",
                    dom,
                    format!("the guest uses version {}, and a new domain has version {v}", s.grant_version),
                )),
            },
            GtStep::FifoControlBlocks => set_vcpus(&|v| {
                let place = v.fifo?.control_block;
                Some(VcpuState {
                    fields: vcpu_fields::FIFO_CONTROL,
                    fifo_control_gfn: place.gfn.0,
                    fifo_control_offset: place.offset,
                    ..VcpuState::default()
                })
            }),
            GtStep::EmuIrqs => {
                let pirqs: Vec<_> = s
                    .emuirqs
                    .iter()
                    .map(|e| PirqState { pirq: e.pirq, emuirq: e.emuirq, ..PirqState::default() })
                    .collect();
                self.ext_send(dom, op::SET_PIRQS, &pirqs)
            }
            GtStep::Ports => {
                let ports =
                    s.ports.iter().filter(|p| !p.xen_consumer).map(|p| ext_port(dom, p)).collect::<Result<Vec<_>>>()?;
                self.ext_send(dom, op::SET_PORTS, &ports)
            }
            GtStep::EventArray => {
                let Some(pages) = &s.event_array else { return Ok(()) };
                let mut d = DomainState {
                    fields: domain_fields::FIFO_ARRAY,
                    fifo_pages: pages.len() as u32,
                    ..DomainState::default()
                };
                let room = d.fifo_array.get_mut(..pages.len()).ok_or_else(|| {
                    HypervisorError::malformed("set event array", dom, format!("{} pages", pages.len()))
                })?;
                for (slot, gfn) in room.iter_mut().zip(pages) {
                    *slot = gfn.0;
                }
                set_domain(d)
            }
            GtStep::FifoTails => set_vcpus(&|v| {
                Some(VcpuState { fields: vcpu_fields::FIFO_TAILS, fifo_tails: v.fifo?.tails, ..VcpuState::default() })
            }),
            GtStep::VcpuAreas => {
                if let Some(v) = s.vcpus.iter().find(|v| {
                    let physical = |a: Option<GuestArea>| matches!(a, Some(GuestArea::Physical(_)));
                    physical(v.runstate_area) || physical(v.time_area)
                }) {
                    let text = format!("areas by guest-physical address are for Xen 4.18 and later: {v:?}");
                    return Err(HypervisorError::unsupported("set vCPU areas", dom, text));
                }
                set_vcpus(&|v| {
                    let mut fields = vcpu_fields::RUNSTATE_AREA | vcpu_fields::TIME_AREA | vcpu_fields::UPCALL;
                    if v.vcpu_info.is_some() {
                        fields |= vcpu_fields::VCPU_INFO;
                    }
                    Some(VcpuState {
                        fields,
                        vcpu_info_gfn: v.vcpu_info.map_or(ext::NO_GFN, |p| p.gfn.0),
                        vcpu_info_offset: v.vcpu_info.map_or(0, |p| p.offset),
                        runstate_area: virtual_address(v.runstate_area),
                        time_area: virtual_address(v.time_area),
                        upcall_vector: v.upcall_vector.into(),
                        ..VcpuState::default()
                    })
                })
            }
            GtStep::ClockOffset => {
                let clock = ClockOffset {
                    size: size_of::<ClockOffset>() as u32,
                    version: ext::ABI_VERSION,
                    offset: s.clock_offset_ns,
                    wall: s.wall_clock.ns(),
                };
                self.ext_one(dom, op::SET_CLOCK, 0, clock).map(drop)
            }
            GtStep::VcpuTimes => set_vcpus(&|v| {
                Some(VcpuState {
                    fields: vcpu_fields::RUNSTATE | vcpu_fields::SINGLESHOT | vcpu_fields::PERIODIC | vcpu_fields::TSC,
                    flags: if v.singleshot_ns.is_some() { vcpu_flags::SINGLESHOT } else { 0 },
                    runstate_time: v.runstate.time_ns,
                    singleshot_expires: v.singleshot_ns.unwrap_or(0),
                    periodic_period: v.periodic_period_ns,
                    periodic_last: v.periodic_last_ns,
                    tsc: v.tsc.ticks,
                    tsc_at: v.tsc.at_ns,
                    ..VcpuState::default()
                })
            }),
            GtStep::Watchdogs => {
                let mut d = DomainState { fields: domain_fields::WATCHDOGS, ..DomainState::default() };
                for w in &s.watchdogs {
                    let slot =
                        (w.id as usize).checked_sub(1).and_then(|i| d.watchdogs.get_mut(i)).ok_or_else(|| {
                            HypervisorError::malformed("set watchdogs", dom, format!("there is no watchdog {}", w.id))
                        })?;
                    *slot = ext::Watchdog { remaining: w.remaining_ns, in_use: 1, reserved: 0 };
                }
                set_domain(d)
            }
        }
    }
}

fn virtual_address(area: Option<GuestArea>) -> u64 {
    match area {
        Some(GuestArea::Virtual(va)) => va,
        Some(GuestArea::Physical(_)) | None => ext::NO_ADDRESS,
    }
}

fn vcpu(v: &VcpuState) -> GtVcpu {
    let flag = |f: u32| v.flags & f != 0;
    let area = |va: u64| (va != ext::NO_ADDRESS).then_some(GuestArea::Virtual(va));
    GtVcpu {
        initialised: flag(vcpu_flags::INITIALISED),
        down: flag(vcpu_flags::DOWN),
        polling: flag(vcpu_flags::POLLING),
        vcpu_info: flag(vcpu_flags::VCPU_INFO_PLACED)
            .then_some(GuestPlace { gfn: Gfn(v.vcpu_info_gfn), offset: v.vcpu_info_offset }),
        runstate_area: area(v.runstate_area),
        time_area: area(v.time_area),
        runstate: Runstate { state: v.runstate, entry_time_ns: v.runstate_entry, time_ns: v.runstate_time },
        upcall_vector: v.upcall_vector as u8,
        fifo: flag(vcpu_flags::FIFO_CONTROL).then_some(FifoVcpu {
            control_block: GuestPlace { gfn: Gfn(v.fifo_control_gfn), offset: v.fifo_control_offset },
            tails: v.fifo_tails,
        }),
        singleshot_ns: flag(vcpu_flags::SINGLESHOT).then_some(v.singleshot_expires),
        periodic_period_ns: v.periodic_period,
        periodic_last_ns: v.periodic_last,
        tsc: TscPoint { ticks: v.tsc, at_ns: v.tsc_at },
    }
}

/// `None` for a port that is not in use.
fn port(dom: DomId, p: &ExtPort) -> Result<Option<GtPort>> {
    let remote = DomId(p.remote_domid);
    let kind = match p.state {
        port_state::FREE | port_state::RESERVED => return Ok(None),
        port_state::UNBOUND => GtPortKind::Unbound { remote },
        port_state::INTERDOMAIN => GtPortKind::Interdomain { remote, remote_port: p.remote_port },
        port_state::PIRQ => GtPortKind::Pirq(p.irq),
        port_state::VIRQ => GtPortKind::Virq(p.irq),
        port_state::IPI => GtPortKind::Ipi,
        other => {
            let text = format!("port {} has the unknown state {other}", p.port);
            return Err(HypervisorError::malformed(op_name(op::GET_PORTS), dom, text));
        }
    };
    Ok(Some(GtPort {
        port: p.port,
        kind,
        vcpu: p.notify_vcpu.into(),
        priority: p.priority,
        last_vcpu: p.last_vcpu,
        last_priority: p.last_priority,
        pending_early: p.flags & port_flags::PENDING_EARLY != 0,
        xen_consumer: p.flags & port_flags::XEN != 0,
    }))
}

fn ext_port(dom: DomId, p: &GtPort) -> Result<ExtPort> {
    let (state, remote, remote_port, irq) = match p.kind {
        // Nobody else would bind the two ends of a pair within the guest.
        GtPortKind::Interdomain { remote, remote_port } if remote == dom => {
            (port_state::INTERDOMAIN, remote.0, remote_port, 0)
        }
        // Its backend binds it again.
        GtPortKind::Unbound { remote } | GtPortKind::Interdomain { remote, .. } => {
            (port_state::UNBOUND, remote.0, 0, 0)
        }
        GtPortKind::Virq(virq) => (port_state::VIRQ, 0, 0, virq),
        GtPortKind::Ipi => (port_state::IPI, 0, 0, 0),
        GtPortKind::Pirq(pirq) => (port_state::PIRQ, 0, 0, pirq),
    };
    let notify_vcpu = u16::try_from(p.vcpu).map_err(|_| {
        HypervisorError::malformed(op_name(op::SET_PORTS), dom, format!("port {} notifies vCPU {}", p.port, p.vcpu))
    })?;
    Ok(ExtPort {
        port: p.port,
        state,
        flags: if p.pending_early { port_flags::PENDING_EARLY } else { 0 },
        notify_vcpu,
        priority: p.priority,
        last_priority: p.last_priority,
        last_vcpu: p.last_vcpu,
        remote_domid: remote,
        remote_port,
        irq,
        ..ExtPort::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_survives_the_way_to_the_extension_and_back() {
        let dom = DomId(5);
        for kind in [
            GtPortKind::Unbound { remote: DomId(3) },
            GtPortKind::Virq(1),
            GtPortKind::Ipi,
            GtPortKind::Pirq(17),
            GtPortKind::Interdomain { remote: DomId(0), remote_port: 44 },
            GtPortKind::Interdomain { remote: dom, remote_port: 10 },
        ] {
            let p = GtPort {
                port: 9,
                kind,
                vcpu: 1,
                priority: 3,
                last_vcpu: 1,
                last_priority: 4,
                pending_early: true,
                xen_consumer: false,
            };
            let kind = match kind {
                GtPortKind::Interdomain { remote, .. } if remote != dom => GtPortKind::Unbound { remote },
                k => k,
            };
            assert_eq!(port(dom, &ext_port(dom, &p).unwrap()).unwrap(), Some(GtPort { kind, ..p }));
        }
        assert!(port(dom, &ExtPort { state: 77, ..ExtPort::default() }).is_err());
        let far = GtPort {
            port: 9,
            kind: GtPortKind::Ipi,
            vcpu: 1 << 16,
            priority: 7,
            last_vcpu: 0,
            last_priority: 7,
            pending_early: false,
            xen_consumer: false,
        };
        assert!(ext_port(dom, &far).is_err());
    }
}
