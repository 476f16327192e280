//! Whole streams: read, written again, judged, damaged.

mod support;

use migration_stream::gt::{self, LibxcRecord, LibxlRecord};
use migration_stream::{Encoder, ErrorKind, Event, Layer, OPTIONAL, libxc, libxl, show};
use proptest::prelude::*;
use support::*;

#[test]
fn a_stream_is_written_again_byte_for_byte() {
    for stream in [transparent(), ordinary()] {
        for piece in [1, 7, 4096, stream.len()] {
            let mut raw = Encoder::new();
            let mut typed = Encoder::new();
            decode(&stream, piece, |event| {
                raw.event(event);
                match event {
                    Event::Record(record) if record.layer == Layer::Libxc => typed.libxc(&record.libxc()?),
                    Event::Record(record) => typed.libxl(&record.libxl()?),
                    other => typed.event(other),
                }
                Ok(())
            })
            .unwrap();
            assert!(raw.take() == stream, "raw, pieces of {piece}");
            assert!(typed.take() == stream, "typed, pieces of {piece}");
        }
    }
}

#[test]
fn the_checksum_of_the_buffer_is_that_of_its_bytes_however_it_is_emptied() {
    let stream = transparent();
    let (mut encoder, mut all, mut number) = (Encoder::new(), Vec::new(), 0);
    decode(&stream, 4096, |event| {
        encoder.event(event);
        number += 1;
        assert_eq!(encoder.crc(), crc32fast::hash(encoder.bytes()), "event {number}");
        match number % 3 {
            0 => all.extend(encoder.take()),
            1 => {
                all.extend_from_slice(encoder.bytes());
                encoder.clear();
            }
            _ => {}
        }
        Ok(())
    })
    .unwrap();
    all.extend(encoder.take());
    assert!(all == stream);
    let mut empty = Encoder::new();
    empty.xl_header(b"{}");
    assert_eq!(empty.crc(), crc32fast::hash(empty.bytes()));
}

#[test]
fn good_streams_have_no_findings() {
    assert_eq!(findings(&transparent()), []);
    assert_eq!(findings(&ordinary()), []);
    let mut bare = Encoder::new();
    image(&mut bare, false);
    assert_eq!(findings(&bare.take()), []);
}

/// Written by stock xl of Xen 4.17.7 for a PVH guest with two vbds and a vif; the xl header and all PAGE_DATA records but
/// one without contents are left out.
const STOCK: &[u8] = include_bytes!("data/stock-4.17-pvh.libxl");

#[test]
fn a_stock_stream_is_read_typed_and_written_again_byte_for_byte() {
    assert_eq!(findings(STOCK), []);
    let mut typed = Encoder::new();
    let mut entries = Vec::new();
    decode(STOCK, 1000, |event| {
        match event {
            Event::Record(record) if record.layer == Layer::Libxc => {
                let parsed = record.libxc()?;
                if let libxc::Record::HvmContext(blob) = parsed {
                    let context = migration_stream::hvm::Context::decode(blob).unwrap();
                    assert_eq!(context.encode(), blob);
                    let raw = |e: &migration_stream::hvm::Entry| {
                        matches!(e.contents, migration_stream::hvm::Contents::Raw(_))
                    };
                    assert!(!context.entries.iter().any(raw), "{context:?}");
                    entries = context.entries.iter().map(|e| e.name()).collect();
                }
                typed.libxc(&parsed);
            }
            Event::Record(record) => typed.libxl(&record.libxl()?),
            other => typed.event(other),
        }
        Ok(())
    })
    .unwrap();
    assert!(typed.take() == STOCK);
    let wanted = ["HEADER", "CPU", "LAPIC", "LAPIC_REGS", "MTRR", "VMCE_VCPU", "TSC_ADJUST"];
    assert!(wanted.iter().all(|name| entries.iter().any(|entry| entry == name)), "{entries:?}");
}

#[test]
fn stripping_leaves_what_stock_tools_would_have_written() {
    let (stripped, removed) = stripped(&transparent());
    assert_eq!(findings(&stripped), []);
    // The image as stock libxc writes it, without xl's header.
    let ordinary = ordinary();
    let libxl = ordinary.windows(8).position(|w| w == b"LibxlFmt").unwrap();
    assert!(stripped == ordinary[libxl..]);
    // 12 + checksum in the image, 4 + checksum around it, and SHARED_INFO.
    assert_eq!(removed, 12 + 1 + 4 + 1 + 1);
}

#[test]
fn a_stream_cut_anywhere_is_an_error() {
    let stream = transparent();
    for cut in 0..stream.len() {
        let found = findings(&stream[..cut]);
        assert!(!found.is_empty(), "cut at byte {cut} of {}", stream.len());
    }
}

#[test]
fn a_flipped_byte_anywhere_is_an_error() {
    let stream = transparent();
    for at in 0..stream.len() {
        let mut damaged = stream.clone();
        damaged[at] ^= 0x10;
        assert!(!findings(&damaged).is_empty(), "byte {at} flipped");
    }
}

#[test]
fn garbage_and_trailing_bytes_are_errors() {
    let kind = |bytes: &[u8]| findings(bytes).into_iter().next().map(|f| f.kind);
    assert_eq!(kind(b"GET / HTTP/1.1\r\n"), Some(ErrorKind::NotAStream { found: *b"GET / HT" }));
    assert_eq!(kind(b""), Some(ErrorKind::Truncated));
    let mut long = ordinary();
    long.push(0);
    assert_eq!(kind(&long), Some(ErrorKind::AfterEnd));
}

#[test]
fn a_length_past_the_limit_is_refused_before_the_bytes_come() {
    let mut decoder = migration_stream::Decoder::new(migration_stream::Limits { record: 1000, config: 10 });
    let mut e = Encoder::new();
    e.libxl_header();
    decoder.feed(&e.take());
    assert!(matches!(decoder.next(), Ok(Some(Event::Libxl(_)))));
    decoder.feed(&[3, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f]);
    let error = decoder.next().unwrap_err();
    assert_eq!(error.kind, ErrorKind::OverLimit { length: 0x7fff_ffff, limit: 1000 });
    assert_eq!(
        error.to_string(),
        "byte 0x10: libxl record EMULATOR_CONTEXT (0x00000003): length 2147483647 is more than the 1000 bytes that are allowed"
    );
    // And it stays refused.
    decoder.feed(&[0; 64]);
    assert!(decoder.next().is_err() && decoder.finish().is_err());
}

#[test]
fn a_receiver_that_knows_only_stock_records_refuses_every_mandatory_gt_record() {
    for gt in gt::Type::ALL {
        // What a stock receiver sees: a number that it does not know, without the bit that lets it skip.
        assert_eq!(gt.number() & OPTIONAL, 0, "{}", gt.name());
        assert!(gt.number() > 0x12, "{} would be taken for a stock record", gt.name());
    }
    // As we do with theirs.
    assert_eq!(libxc::Record::decode(0x13, &[]), Err(ErrorKind::UnknownMandatory));
    assert_eq!(libxl::Record::decode(6, &[]), Err(ErrorKind::UnknownMandatory));
    assert!(matches!(libxc::Record::decode(OPTIONAL | 0x13, &[]), Ok(libxc::Record::UnknownOptional(..))));
}

#[test]
fn event_channels_cannot_ride_in_an_ordinary_stream() {
    let (number, body) = LibxcRecord::Evtchn(gt::Evtchn { fifo: false, ports: ports() }).encode();
    assert_eq!(libxc::Record::decode(number | OPTIONAL, &body), Err(ErrorKind::MustBeMandatory));
    let (number, body) = LibxlRecord::Xenstore(XENSTORE.to_vec()).encode();
    assert_eq!(libxl::Record::decode(number | OPTIONAL, &body), Err(ErrorKind::MustBeMandatory));
    // Mandatory, but without GT_DOMAIN before it: not the stream of a transparent migration.
    let mut e = Encoder::new();
    e.image(&libxc::DomainHeader::hvm(4, 17));
    e.libxc(&libxc::Record::StaticDataEnd);
    e.gt_libxc(&LibxcRecord::Evtchn(gt::Evtchn { fifo: false, ports: ports() }));
    let first = findings(&e.take()).into_iter().next().unwrap();
    assert_eq!(first.kind, ErrorKind::OutOfOrder { why: "GT_DOMAIN must come first" });
}

#[test]
fn the_grant_table_can_ride_in_an_ordinary_stream() {
    let table = gt::GrantTable { table_version: 1, frames: vec![0x20], status_frames: vec![] };
    let mut e = Encoder::new();
    e.image(&libxc::DomainHeader::hvm(4, 17));
    e.libxc(&libxc::Record::StaticDataEnd);
    e.page_data(&[libxc::PageEntry::normal(1)], &[0; 4096]);
    e.libxc(&libxc::Record::HvmParams(vec![]));
    e.libxc(&libxc::Record::HvmContext(&context().encode()));
    e.libxc(&libxc::Record::Gt(LibxcRecord::GrantTable(table), true));
    e.checksum(true);
    e.libxc(&libxc::Record::End);
    assert_eq!(findings(&e.take()), []);
}

/// Leaves one record out of the good stream, for each record, and expects the checker to name it.
#[test]
fn every_missing_record_is_named() {
    let stream = transparent();
    let mut names = Vec::new();
    decode(&stream, 65_536, |event| {
        if let Event::Record(record) = event {
            names.push((record.layer, record.rtype, record.name()));
        }
        Ok(())
    })
    .unwrap();
    for (layer, rtype, name) in names {
        // Each of these may be absent.
        let dispensable = [
            "X86_CPUID_POLICY",
            "X86_MSR_POLICY",
            "GT_MEMORY_MAP",
            "GT_EMUIRQ",
            "GT_WATCHDOG",
            "GT_HVM_PARAMS_LATE",
            "GT_TOOLSTACK",
        ];
        let mut e = Encoder::new();
        decode(&stream, 65_536, |event| {
            match event {
                Event::Record(record) if (record.layer, record.rtype) == (layer, rtype) => {}
                // The checksums follow what is left.
                Event::Record(record) if record.name() == "GT_CHECKSUM" => e.checksum(false),
                Event::Record(record) if record.name() == "GT_STREAM_CHECKSUM" => e.stream_checksum(false),
                other => e.event(other),
            }
            Ok(())
        })
        .unwrap();
        let found = findings(&e.take());
        assert_eq!(found.is_empty(), dispensable.contains(&name), "without {name}: {found:?}");
    }
}

#[test]
fn every_pair_of_neighbours_out_of_order_is_found_or_harmless() {
    // The order that docs/stream-format.md fixes: swapping state before memory, params after context, ports before FIFO.
    let bad_orders: [(&str, &str); 6] = [
        ("GT_EVTCHN", "GT_EVTCHN_FIFO"),
        ("GT_GRANT_FRAMES", "GT_GRANT_TABLE"),
        ("GT_DOMAIN", "STATIC_DATA_END"),
        ("HVM_PARAMS", "HVM_CONTEXT"),
        ("PAGE_DATA", "X86_TSC_INFO"),
        ("GT_VCPU", "HVM_CONTEXT"),
    ];
    let stream = transparent();
    for (moved, behind) in bad_orders {
        let (moved_first, mut held) =
            (moved != "GT_EVTCHN" && moved != "GT_GRANT_FRAMES" && moved != "GT_VCPU", Vec::new());
        let mut e = Encoder::new();
        decode(&stream, 65_536, |event| {
            if let Event::Record(record) = event {
                // Swap: hold back the one that comes first in the good stream until the other has been written.
                let (first, second) = if moved_first { (moved, behind) } else { (behind, moved) };
                if record.name() == first {
                    held.push((record.layer, record.rtype, record.body.to_vec()));
                    return Ok(());
                }
                match record.name() {
                    "GT_CHECKSUM" => e.checksum(false),
                    "GT_STREAM_CHECKSUM" => e.stream_checksum(false),
                    _ => e.event(event),
                }
                if record.name() == second {
                    for (layer, rtype, body) in held.drain(..) {
                        e.raw(layer, rtype, &body);
                    }
                }
                return Ok(());
            }
            e.event(event);
            Ok(())
        })
        .unwrap();
        assert!(!findings(&e.take()).is_empty(), "{moved} and {behind} swapped");
    }
}

#[test]
fn show_tells_of_every_record() {
    let stream = transparent();
    let mut shower = show::Shower::new();
    let mut items = Vec::new();
    decode(&stream, 1000, |event| {
        items.extend(shower.event(event)?);
        Ok(())
    })
    .unwrap();
    items.extend(shower.finish());
    let lines: Vec<_> = items.iter().map(show::Item::line).collect();
    let text = lines.join("\n");
    for wanted in [
        "GT_IDENTITY",
        "domain 1234 (guest), pvh from host alpha, Xen 4.17.5",
        "GT_EVTCHN ",
        "4 ports, FIFO",
        "2 records, 2 pages with contents, 1 without",
        "GT_STREAM_CHECKSUM",
        "5 entries, 1 vCPUs",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
    let offsets: Vec<_> = items.iter().map(|item| item.offset).collect();
    assert!(offsets.is_sorted() && offsets[0] == 0 && offsets[1] == 16, "{offsets:?}");
    let vcpu = items.iter().find(|item| item.name == "GT_VCPU").unwrap().json();
    assert_eq!(vcpu["detail"]["vcpu_info_gfn"], "0xf831");
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_or_the_checker_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        findings(&bytes);
        findings(&[&STOCK[..64], &bytes[..]].concat());
    }

    #[test]
    fn no_damage_to_a_good_stream_makes_them_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20), piece in 1usize..5000,
    ) {
        let mut stream = transparent();
        for (at, value) in changes {
            let at = at.index(stream.len());
            stream[at] = value;
        }
        let mut shower = show::Shower::new();
        let _ = decode(&stream, piece, |event| shower.event(event).map(drop));
        findings(&stream);
    }

    #[test]
    fn every_body_of_every_type_is_read_or_refused(
        rtype in prop_oneof![0u32..0x16, (0u32..0x10).prop_map(|n| 0x4754_0000 + n), (0u32..8).prop_map(|n| 0x4754_0100 + n)],
        optional in any::<bool>(), body in prop::collection::vec(any::<u8>(), 0..300), start in any::<bool>(),
    ) {
        let mut body = body;
        if start && body.len() >= 8 {
            body[..4].copy_from_slice(&[1, 0, 0, 0]);
            body[5..8].fill(0);
        }
        let rtype = rtype | if optional { OPTIONAL } else { 0 };
        // What is read is written again as it was.
        if let Ok(record) = libxc::Record::decode(rtype, &body) {
            prop_assert_eq!(record.encode(), (rtype, body.clone()));
        }
        if let Ok(record) = libxl::Record::decode(rtype, &body) {
            prop_assert_eq!(record.encode(), (rtype, body.clone()));
        }
        if let Ok(context) = migration_stream::hvm::Context::decode(&body) {
            prop_assert_eq!(context.encode(), body);
        }
    }

    #[test]
    fn a_context_of_any_entries_is_written_again_as_it_was(
        entries in prop::collection::vec((1u16..24, any::<u16>(), prop::collection::vec(any::<u8>(), 0..1100)), 0..6),
    ) {
        let mut blob = context().encode();
        blob.truncate(blob.len() - 8);
        for (typecode, instance, body) in entries {
            blob.extend(typecode.to_le_bytes());
            blob.extend(instance.to_le_bytes());
            blob.extend((body.len() as u32).to_le_bytes());
            blob.extend(body);
        }
        blob.extend([0; 8]);
        let context = migration_stream::hvm::Context::decode(&blob).unwrap();
        prop_assert_eq!(context.encode(), blob);
    }
}

/// The fuzz target begins with a stream of each kind. `WRITE_SEEDS=1` writes ours again after the format has changed.
#[test]
fn the_seeds_are_what_is_written_now() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/stream");
    for (name, bytes) in [("transparent.libxl", support::transparent()), ("ordinary.xl", support::ordinary())] {
        let file = folder.join(name);
        if std::env::var_os("WRITE_SEEDS").is_some() {
            std::fs::write(&file, &bytes).unwrap();
        }
        assert!(bytes.len() < 64 << 10, "{name} has {} bytes", bytes.len());
        let seed = std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(seed == bytes, "{name} is of another format; WRITE_SEEDS=1 writes it again");
    }
}
