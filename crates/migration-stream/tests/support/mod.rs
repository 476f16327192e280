//! A small but complete stream of a guest-transparent migration, and readers for the tests.
#![allow(dead_code, reason = "each test file uses a part of it")]

use migration_stream::gt::{self, LibxcRecord as Gt, LibxlRecord};
use migration_stream::libxc::{self, PageEntry};
use migration_stream::wire::Field;
use migration_stream::{Decoder, Encoder, Event, StreamError, check, hvm, libxl, strip};

pub const DOMID: u16 = 1234;
pub const UUID: [u8; 16] = *b"\x9f\x3c\x11\x52\x05\x6e\x4c\xde\x8a\x01\xfe\xed\xbe\xef\x00\x01";
/// The head of a xenstore-migration stream: ident, version 1, little-endian.
pub const XENSTORE: &[u8] = b"xenstore\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0";

/// A context with a header, a CPU, and entries of the kinds that are kept raw.
pub fn context() -> hvm::Context {
    let mut cpu = hvm::Cpu::decode(&[0; hvm::Cpu::SIZE]).unwrap();
    cpu.rip = 0xffff_ffff_8100_0000;
    cpu.tsc = 123_456_789;
    let header =
        hvm::Header { magic: hvm::FILE_MAGIC, version: 1, changeset: 0, cpuid: 0x80_0f12, gtsc_khz: 2_600_000 };
    let entry = |typecode, contents| hvm::Entry { typecode, instance: 0, contents };
    hvm::Context {
        entries: vec![
            entry(1, hvm::Contents::Header(Box::new(header))),
            entry(2, hvm::Contents::Cpu(Box::new(cpu))),
            entry(19, hvm::Contents::TscAdjust(Box::new(hvm::TscAdjust { tsc_adjust: 5 }))),
            entry(20, hvm::Contents::CpuMsr(vec![hvm::Msr { index: 0xc000_0103, rsvd: 0, val: 1 }])),
            entry(77, hvm::Contents::Raw(vec![1, 2, 3])),
        ],
    }
}

pub fn domain() -> gt::Domain {
    gt::Domain {
        domid: DOMID.into(),
        ssidref: 0,
        handle: UUID,
        create_flags: 3,
        iommu_opts: 0,
        max_vcpus: 1,
        max_evtchn_port: 1023,
        max_grant_frames: 64,
        max_maptrack_frames: 1024,
        grant_opts: 2,
        cpupool_id: 0,
        emulation_flags: 1,
        misc_flags: 0,
        max_mem_kib: 262_144,
        total_pages: 3,
        paging_pool_bytes: 4 << 20,
    }
}

pub fn vcpu() -> gt::Vcpu {
    gt::Vcpu {
        vcpu_id: 0,
        flags: gt::vcpu_flags::VCPU_INFO | gt::vcpu_flags::RUNSTATE_AREA | gt::vcpu_flags::SINGLESHOT,
        vcpu_info_gfn: 0xf831,
        vcpu_info_offset: 0x3c0,
        upcall_vector: 0xf3,
        runstate_area: 0xffff_8880_0fa0_0000,
        time_area: 0,
        runstate: 2,
        reserved: 0,
        runstate_entry: 7_000_000_000,
        runstate_time: [1, 2, 3, 4],
        singleshot_expiry: 7_100_000_000,
        periodic_period: 0,
        periodic_last: 0,
    }
}

pub fn ports() -> Vec<gt::Port> {
    let port = |port, kind, remote_domid, detail| gt::Port {
        port,
        kind,
        priority: 7,
        xen_consumer: 0,
        pending: 0,
        notify_vcpu: 0,
        remote_domid,
        last_vcpu: 0,
        detail,
        last_priority: 7,
        reserved: [0; 3],
    };
    vec![
        port(1, gt::port_kind::INTERDOMAIN, 0, 40),
        port(2, gt::port_kind::UNBOUND, 0, 0),
        port(5, gt::port_kind::VIRQ, 0, 0),
        port(900, gt::port_kind::IPI, 0, 0),
    ]
}

pub fn identity() -> gt::Identity {
    gt::Identity {
        domid: DOMID,
        kind: gt::DomainKind::Pvh,
        uuid: UUID,
        name: "guest".into(),
        host: "alpha".into(),
        xen_version: "4.17.5".into(),
        build_id: "39a640e6".into(),
        writer: "ferry 0.1.0".into(),
    }
}

/// Every GT record of the libxc layer, in the order of a stream, checksum left out.
pub fn image_records() -> (Vec<Gt>, Vec<Gt>) {
    let fixed = vec![
        Gt::Domain(domain()),
        Gt::MemoryMap(vec![gt::MemoryRange { start: 0, size: 256 << 20, kind: 1, reserved: 0 }]),
    ];
    let mut frames = vec![0; 4096];
    frames[8 * 8] = 1;
    let state = vec![
        Gt::GrantTable(gt::GrantTable { table_version: 1, frames: vec![0x20], status_frames: vec![] }),
        Gt::GrantFrames(gt::GrantFrames { status: false, first: 0, contents: frames }),
        Gt::SharedInfo(gt::SharedInfo { gfn: 0x10, vm_assist: 0x20, flags: 0, reserved: 0 }),
        Gt::Emuirq(vec![gt::Emuirq { pirq: 16, emuirq: -1 }]),
        Gt::EvtchnFifo(gt::EvtchnFifo {
            controls: vec![gt::FifoControl { gfn: 0x51b3, offset: 0, vcpu_id: 0, tails: [3; 16] }],
            array: vec![0x51b4],
        }),
        Gt::Evtchn(gt::Evtchn { fifo: true, ports: ports() }),
        Gt::Vcpu(vcpu()),
        Gt::Clock(gt::Clock {
            system_time: 7_050_000_000,
            wall_clock: 1_795_000_000_000_000_000,
            time_offset: 0,
            tsc_khz: 2_600_000,
            reserved: 0,
        }),
        Gt::Watchdog(vec![gt::Watchdog { id: 1, reserved: 0, remaining: 20_000_000_000 }]),
        Gt::HvmParamsLate(vec![libxc::HvmParam { index: 0, value: 0x0200_0000_0000_00f3 }]),
    ];
    (fixed, state)
}

pub fn devices() -> Vec<gt::Device> {
    vec![gt::Device {
        class: "vif".into(),
        devid: 0,
        backend_domid: 0,
        frontend_state: 4,
        backend_state: 4,
        frontend: "/local/domain/1234/device/vif/0".into(),
        backend: "/local/domain/0/backend/vif/1234/0".into(),
        needs: vec![("bridge".into(), "xenbr0".into())],
    }]
}

pub fn toolstack() -> gt::Toolstack {
    gt::Toolstack {
        nodes: vec![gt::Node { path: "/libxl/1234/type".into(), value: b"pvh".to_vec(), perms: vec!["n0".into()] }],
        userdata: vec![gt::Userdata { name: "libxl-json".into(), contents: b"{}".to_vec() }],
    }
}

/// The whole stream.
pub fn transparent() -> Vec<u8> {
    let mut e = Encoder::new();
    e.libxl_header();
    e.gt_libxl(&LibxlRecord::Identity(identity()));
    e.gt_libxl(&LibxlRecord::Devices(devices()));
    e.libxl(&libxl::Record::LibxcContext);
    image(&mut e, true);
    e.gt_libxl(&LibxlRecord::Toolstack(toolstack()));
    e.gt_libxl(&LibxlRecord::Xenstore(XENSTORE.to_vec()));
    e.stream_checksum(false);
    e.libxl(&libxl::Record::End);
    e.take()
}

/// The image inside it; without GT records, what stock libxc would have written.
pub fn image(e: &mut Encoder, transparent: bool) {
    let (fixed, state) = image_records();
    e.image(&libxc::DomainHeader::hvm(4, 17));
    e.libxc(&libxc::Record::CpuidPolicy(vec![libxc::CpuidLeaf {
        leaf: 0,
        subleaf: u32::MAX,
        a: 13,
        b: 1,
        c: 2,
        d: 3,
    }]));
    e.libxc(&libxc::Record::MsrPolicy(vec![libxc::MsrEntry { idx: 0xce, flags: 0, val: 0 }]));
    if transparent {
        fixed.iter().for_each(|record| e.gt_libxc(record));
    }
    e.libxc(&libxc::Record::StaticDataEnd);
    let xtab = libxc::PageData::decode(&[1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0xf0]).unwrap();
    e.page_data(&[PageEntry::normal(1), PageEntry::normal(0x51b3)], &[0xa5; 8192]);
    e.libxc(&libxc::Record::PageData(xtab));
    e.libxc(&libxc::Record::TscInfo(libxc::TscInfo { mode: 0, khz: 2_600_000, nsec: 0, incarnation: 1, reserved: 0 }));
    e.libxc(&libxc::Record::HvmParams(vec![libxc::HvmParam { index: 1, value: 0xfeff_c000 }]));
    let blob = context().encode();
    if !transparent {
        e.libxc(&libxc::Record::HvmContext(&blob));
        e.libxc(&libxc::Record::End);
        return;
    }
    for record in &state {
        if matches!(record, Gt::Vcpu(_)) {
            e.libxc(&libxc::Record::HvmContext(&blob));
        }
        e.gt_libxc(record);
        if matches!(record, Gt::SharedInfo(_)) {
            e.libxc(&libxc::Record::SharedInfo(&[7; 4096]));
        }
    }
    e.checksum(false);
    e.libxc(&libxc::Record::End);
}

/// What `xl save` would have written for the same domain.
pub fn ordinary() -> Vec<u8> {
    let mut e = Encoder::new();
    e.xl_header(br#"{"c_info":{"type":"pvh","name":"guest"}}"#);
    e.libxl_header();
    e.libxl(&libxl::Record::LibxcContext);
    image(&mut e, false);
    e.libxl(&libxl::Record::End);
    e.take()
}

/// Feeds `bytes` in pieces of `piece` bytes and calls `each` for every event.
pub fn decode(
    bytes: &[u8],
    piece: usize,
    mut each: impl FnMut(&Event<'_>) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    let mut decoder = Decoder::default();
    for (number, chunk) in bytes.chunks(piece.max(1)).enumerate() {
        // Turn and turn about, as neither may make a difference.
        match number % 2 {
            0 => decoder.feed_owned(chunk.to_vec()),
            _ => decoder.feed(chunk),
        }
        while let Some(event) = decoder.next()? {
            each(&event)?;
        }
    }
    decoder.finish()
}

/// Decodes and judges; what is wrong, in order.
pub fn findings(bytes: &[u8]) -> Vec<StreamError> {
    let mut checker = check::Checker::new();
    let end = decode(bytes, 65_536, |event| {
        checker.event(event);
        Ok(())
    });
    checker.finish(end)
}

/// The stream without GT records, and how many went.
pub fn stripped(bytes: &[u8]) -> (Vec<u8>, usize) {
    let mut stripper = strip::Stripper::new();
    let mut out = Vec::new();
    decode(bytes, 65_536, |event| {
        out.extend(stripper.event(event));
        Ok(())
    })
    .unwrap();
    (out, stripper.removed())
}
