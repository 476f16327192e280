//! The stream against a dump of the stock daemon, and against hostile bytes.

use proptest::prelude::*;
use xenstore_wire::perm::{Access, Perm};
use xenstore_wire::stream::*;

/// Written by the C xenstored of Xen 4.17 at a live update.
const STOCK: &[u8] = include_bytes!("stock-4.17-v1.bin");

#[test]
fn a_dump_of_the_stock_daemon_is_read_and_written_again_byte_for_byte() {
    let (format, records) = read_all(STOCK).unwrap();
    assert_eq!(format, Format::V1);
    assert_eq!(records[0], Record::Global { socket_fd: 4, evtchn_fd: 7 });
    assert!(
        matches!(&records[3], Record::Watch { conn_id: 2, path, token, .. } if path == b"/foo" && token == b"/foo")
    );
    let Record::Connection { conn_id: 3, spec: ConnSpec::Socket { fd: 9 }, in_data, out_resp_len: 0, out_data } =
        &records[4]
    else {
        panic!("{:?}", records[4])
    };
    assert_eq!((in_data.len(), out_data.len()), (0, 19));
    assert!(
        matches!(records.last().unwrap(), Record::Node { path, value, .. } if path == b"/foo/bar" && value == b"baz")
    );
    assert_eq!(records.len(), 12);
    assert_eq!(write_all(format, &records).unwrap(), STOCK);
}

#[test]
fn a_length_that_does_not_count_the_padding_is_read_too() {
    let watch = Record::Watch { conn_id: 1, path: b"/a".to_vec(), token: b"t".to_vec(), depth: None };
    let mut bytes = write_all(Format::V1, [&watch]).unwrap();
    // 8 bytes of fields and 5 of strings: written as 16, allowed as 13.
    assert_eq!(bytes[20], 16);
    bytes[20] = 13;
    assert_eq!(read_all(&bytes).unwrap().1, [watch]);
}

#[test]
fn what_is_cut_off_is_refused_at_every_length() {
    for n in 0..STOCK.len() {
        assert!(read_all(&STOCK[..n]).is_err(), "{n} bytes were taken");
    }
}

#[test]
fn a_depth_needs_version_2() {
    let w = Record::Watch { conn_id: 1, path: b"/a".to_vec(), token: b"t".to_vec(), depth: Some(3) };
    assert!(write_all(Format::V1, [&w]).is_err());
    let mut bytes = write_all(Format::V2, [&w]).unwrap();
    assert_eq!(read_all(&bytes).unwrap().1, [w]);
    bytes[11] = 1;
    assert!(matches!(read_all(&bytes), Err(StreamError::Invalid { .. })));
}

fn bytes_without_nul(max: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(1u8..=255, 1..max)
}

fn perms(min: usize) -> impl Strategy<Value = Vec<Perm>> {
    let access = prop_oneof![Just(Access::NONE), Just(Access::READ), Just(Access::WRITE), Just(Access::BOTH)];
    proptest::collection::vec(
        (access, any::<u16>(), any::<bool>()).prop_map(|(access, domid, stale)| Perm { access, domid, stale }),
        min..6,
    )
}

fn quotas() -> impl Strategy<Value = Vec<Quota>> {
    proptest::collection::vec((bytes_without_nul(9), any::<u32>()), 0..4)
}

fn record() -> impl Strategy<Value = Record> {
    let data = || proptest::collection::vec(any::<u8>(), 0..40);
    let spec = prop_oneof![
        (any::<u16>(), any::<u16>(), any::<u32>()).prop_map(|(domid, tdomid, evtchn)| ConnSpec::Ring {
            domid,
            tdomid,
            evtchn
        }),
        any::<i32>().prop_map(|fd| ConnSpec::Socket { fd }),
    ];
    prop_oneof![
        (any::<i32>(), any::<i32>()).prop_map(|(socket_fd, evtchn_fd)| Record::Global { socket_fd, evtchn_fd }),
        (1u32.., spec, data(), data()).prop_map(|(conn_id, spec, in_data, out_data)| Record::Connection {
            conn_id,
            spec,
            in_data,
            out_resp_len: out_data.len() as u16 / 2,
            out_data,
        }),
        (any::<u32>(), bytes_without_nul(20), bytes_without_nul(20), any::<Option<u16>>())
            .prop_map(|(conn_id, path, token, depth)| Record::Watch { conn_id, path, token, depth }),
        (any::<u32>(), any::<u32>()).prop_map(|(conn_id, tx_id)| Record::Transaction { conn_id, tx_id }),
        (1u32.., any::<u32>(), any::<(bool, bool)>(), perms(0), bytes_without_nul(30), data()).prop_map(
            |(conn_id, tx_id, (read, written), perms, path, value)| Record::Node {
                conn_id,
                tx_id,
                access: TxAccess { read, written },
                perms,
                path,
                value,
            }
        ),
        (quotas(), quotas()).prop_map(|(domain, global)| Record::GlobalQuota { domain, global }),
        (any::<u16>(), any::<u32>(), quotas()).prop_map(|(domid, features, quotas)| Record::Domain {
            domid,
            features,
            quotas
        }),
        (any::<u64>(), any::<u32>()).prop_map(|(generation, flags)| Record::NodeMeta { generation, flags }),
    ]
}

#[test]
fn a_record_that_is_only_passed_on_keeps_its_length() {
    let f = Format { version: 1, big_endian: false };
    for n in 0..17 {
        let records = [Record::Unknown { kind: 77, body: vec![7; n] }];
        let bytes = write_all(f, &records).unwrap();
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(read_all(&bytes).unwrap().1, records);
    }
}

fn in_version_1(record: &Record) -> bool {
    match record {
        Record::Global { .. } | Record::Connection { .. } | Record::Transaction { .. } | Record::Node { .. } => true,
        Record::Watch { depth, .. } => depth.is_none(),
        _ => false,
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(mut records in proptest::collection::vec(record(), 0..12), version in 1u32..=2, big in any::<bool>()) {
        if version == 1 {
            records.retain(in_version_1);
        }
        let f = Format { version, big_endian: big };
        let bytes = write_all(f, &records).unwrap();
        prop_assert_eq!(bytes.len() % 8, 0);
        let (g, back) = read_all(&bytes).unwrap();
        prop_assert_eq!(f, g);
        prop_assert_eq!(records, back);
    }

    #[test]
    fn any_bytes_are_read_without_panic(tail in proptest::collection::vec(any::<u8>(), 0..300), version in 0u8..4, flags in 0u8..3) {
        let mut b = b"xenstore\0\0\0".to_vec();
        b.extend([version, 0, 0, 0, flags]);
        b.extend(tail);
        let _ = read_all(&b);
    }

    #[test]
    fn a_damaged_stream_is_read_without_panic(at in 0usize..STOCK.len(), value in any::<u8>()) {
        let mut b = STOCK.to_vec();
        b[at] = value;
        if let Ok((f, r)) = read_all(&b) {
            // What was taken can be written again.
            prop_assert!(write_all(f, &r).is_ok());
        }
    }
}
