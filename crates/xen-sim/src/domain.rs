//! One simulated domain.

use crate::guest::{COUNTER, Program, still_page};
use hypervisor::*;
use std::collections::{BTreeMap, BTreeSet};
use xen_abi::domctl::SCHEDULER_CREDIT2;
use xen_abi::hvm_save::{CODE_CPU, CODE_END, CODE_HEADER, Cpu, FILE_MAGIC, FILE_VERSION, Header, push_record};
use zerocopy::IntoBytes;

/// Rate of every simulated host's TSC.
pub const TSC_PER_NS: i64 = 2;

/// Page contents; `None` is a page of zeroes.
pub type Page = Option<Box<[u8; PAGE_SIZE]>>;

#[derive(Debug)]
pub struct Domain {
    pub config: DomainConfig,
    pub pages: BTreeMap<Gfn, Page>,
    /// Pages of Xen's own, where the guest sees them.
    pub placed: BTreeMap<Gfn, XenPage>,
    pub shared_info: Box<[u8; PAGE_SIZE]>,
    pub grant_frames: Vec<u8>,
    pub dirty: Option<BTreeSet<Gfn>>,
    pub share: Share,
    pub affinity: Vec<Affinity>,
    pub vnuma: bool,
    /// What gets its page when somebody first looks at it.
    pub on_demand: BTreeSet<Gfn>,
    pub pauses: u32,
    pub shutdown: Option<u8>,
    pub max_mem_kib: u64,
    pub paging_pool: u64,
    pub policy: CpuPolicy,
    pub tsc: TscInfo,
    pub vm_assist: u64,
    pub memory_map: Vec<MemoryRange>,
    pub context: Option<Vec<u8>>,
    pub params: BTreeMap<u32, u64>,
    pub gt: GtState,
    pub vcpus: u32,
    pub program: Option<Program>,
    pub raised: BTreeSet<Port>,
    /// Pages that the guest gives up at the second reading of its memory, and takes again, with contents, at the third.
    pub balloon: Vec<Gfn>,
    pub reads: u32,
    pub unreadable: Option<Gfn>,
}

impl Domain {
    pub fn new(config: DomainConfig) -> Domain {
        Domain {
            gt: GtState {
                max_evtchn_port: config.max_evtchn_port,
                create_flags: config.flags,
                grant_version: 1,
                ..GtState::default()
            },
            pages: BTreeMap::new(),
            placed: BTreeMap::new(),
            shared_info: Box::new([0; PAGE_SIZE]),
            grant_frames: vec![0; PAGE_SIZE],
            dirty: None,
            share: Share { scheduler: SCHEDULER_CREDIT2, weight: 256, cap: 0 },
            affinity: vec![Affinity::default(); config.max_vcpus as usize],
            vnuma: false,
            config,
            on_demand: BTreeSet::new(),
            pauses: 1,
            shutdown: None,
            max_mem_kib: 0,
            paging_pool: 0,
            policy: CpuPolicy::default(),
            tsc: TscInfo { mode: 0, khz: TSC_PER_NS as u32 * 1_000_000, incarnation: 0, elapsed_ns: 0 },
            vm_assist: 0,
            memory_map: Vec::new(),
            context: None,
            params: BTreeMap::new(),
            vcpus: 0,
            program: None,
            raised: BTreeSet::new(),
            balloon: Vec::new(),
            reads: 0,
            unreadable: None,
        }
    }

    pub fn read(&self, gfn: Gfn) -> Option<[u8; PAGE_SIZE]> {
        self.pages.get(&gfn).map(|page| page.as_deref().copied().unwrap_or([0; PAGE_SIZE]))
    }

    pub fn write(&mut self, gfn: Gfn, offset: usize, data: &[u8]) -> bool {
        let Some(page) = self.pages.get_mut(&gfn) else { return false };
        page.get_or_insert_with(|| Box::new([0; PAGE_SIZE]))[offset..offset + data.len()].copy_from_slice(data);
        true
    }

    /// The guest's own writes are marked, unlike the service domain's and Xen's.
    pub fn guest_write(&mut self, gfn: Gfn, offset: usize, data: &[u8]) {
        if self.write(gfn, offset, data)
            && let Some(dirty) = &mut self.dirty
        {
            dirty.insert(gfn);
        }
    }

    pub fn ticks(&self) -> u64 {
        self.read(COUNTER).map_or(0, |page| u64::from_le_bytes(page[..8].try_into().unwrap_or_default()))
    }

    pub fn run(&mut self) {
        let Some(program) = self.program.filter(|_| self.pauses == 0) else { return };
        for _ in 0..program.ticks {
            let n = self.ticks() + 1;
            let (gfn, offset) = program.target(n);
            self.guest_write(gfn, offset, &n.to_le_bytes());
            self.guest_write(COUNTER, 0, &n.to_le_bytes());
        }
    }

    /// Its memory is being read once more. As in Xen, nothing marks pages that come, nor what is written into them before the next look.
    pub fn read_again(&mut self) {
        self.reads += 1;
        for gfn in &self.balloon {
            match self.reads {
                2 => drop(self.pages.remove(gfn)),
                3 => drop(self.pages.insert(*gfn, Some(Box::new([0x77; PAGE_SIZE])))),
                _ => {}
            }
        }
    }

    /// What a PVH guest under way looks like: FIFO event channels, vcpu_info of its own, store and console.
    pub fn boot(&mut self, dom: DomId, program: Program, host_now: i64) {
        self.pages = (0..program.pages).map(|gfn| (Gfn(gfn), None)).collect();
        self.max_mem_kib = program.pages * 4;
        self.paging_pool = 1 << 20;
        self.vcpus = self.config.max_vcpus;
        self.program = Some(program);
        self.placed.insert(Gfn(0x2_0000), XenPage::SharedInfo);
        self.placed.insert(Gfn(0x2_0010), XenPage::GrantFrame(0));
        self.shared_info[3076..3084].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let grant =
            |gfn: u32, use_: u16| [&(1 | use_).to_le_bytes()[..], &0u16.to_le_bytes(), &gfn.to_le_bytes()].concat();
        self.grant_frames[..8].copy_from_slice(&grant(7, 0x18));
        self.grant_frames[8..16].copy_from_slice(&grant(6, 0x18));
        self.params = [(0, 0x0200_0000_0000_00f3), (1, 6), (2, 1), (17, 7), (18, 2)].into();
        self.vm_assist = 1 << 4;
        self.policy.leaves = vec![CpuidLeaf { leaf: 1, subleaf: CpuidLeaf::NO_SUBLEAF, a: 1, b: 2, c: 3, d: 4 }];
        self.context = Some(context(self.vcpus, 1_000_000));
        let port = |port, kind, vcpu| GtPort {
            port,
            kind,
            vcpu,
            priority: 7,
            last_vcpu: 0,
            last_priority: 7,
            pending_early: false,
            xen_consumer: false,
        };
        let dom0 = DomId::DOM0;
        self.gt.ports = vec![
            port(1, GtPortKind::Interdomain { remote: dom0, remote_port: 20 }, 0),
            port(2, GtPortKind::Interdomain { remote: dom0, remote_port: 21 }, 0),
            port(3, GtPortKind::Virq(0), 0),
            port(5, GtPortKind::Ipi, 1),
            port(6, GtPortKind::Interdomain { remote: dom, remote_port: 8 }, 1),
            port(8, GtPortKind::Interdomain { remote: dom, remote_port: 6 }, 0),
        ];
        self.gt.event_array = Some(vec![Gfn(8)]);
        self.gt.vcpus = (0..self.vcpus)
            .map(|vcpu| GtVcpu {
                initialised: true,
                vcpu_info: Some(GuestPlace { gfn: Gfn(9), offset: vcpu * 64 }),
                runstate_area: Some(GuestArea::Virtual(0xffff_8000_0000_1000)),
                runstate: Runstate { state: 2, entry_time_ns: host_now, time_ns: [10, 20, 30, 40] },
                upcall_vector: 0xf3,
                fifo: Some(FifoVcpu { control_block: GuestPlace { gfn: Gfn(10), offset: vcpu * 128 }, tails: [0; 16] }),
                singleshot_ns: Some(host_now + 1_000_000_000),
                tsc: TscPoint { ticks: 1_000_000, at_ns: host_now },
                ..GtVcpu::default()
            })
            .collect();
        for gfn in program.still_gfns() {
            self.write(gfn, 0, &still_page(gfn));
        }
        // Xen writes there by itself, and nothing marks it.
        for gfn in [8, 9, 10] {
            self.write(Gfn(gfn), 0, &[gfn as u8; 64]);
        }
        self.gt.wall_clock = WallClock { sec: 1_795_000_000, nsec: 77 };
        self.gt.watchdogs = vec![Watchdog { id: 1, remaining_ns: 30_000_000_000 }];
        self.pauses = 0;
    }
}

/// An HVM context of nothing but vCPUs.
pub fn context(vcpus: u32, tsc: u64) -> Vec<u8> {
    let mut stream = Vec::new();
    let header = Header { magic: FILE_MAGIC, version: FILE_VERSION, ..Header::default() };
    push_record(&mut stream, CODE_HEADER, 0, header.as_bytes());
    for vcpu in 0..vcpus {
        push_record(
            &mut stream,
            CODE_CPU,
            vcpu as u16,
            Cpu { tsc, rip: 0x1000 + u64::from(vcpu), ..Cpu::default() }.as_bytes(),
        );
    }
    push_record(&mut stream, CODE_END, 0, &[]);
    stream
}
