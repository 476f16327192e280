//! Messages, paths, permissions.

use proptest::prelude::*;
use xenstore_wire::perm::{Access, Perm, format_list, parse_list};
use xenstore_wire::*;

#[test]
fn operation_numbers_are_those_of_xs_wire_h() {
    let all: Vec<u32> = (0..27).filter(|&n| Op::from_wire(n).is_some()).collect();
    assert_eq!(all, (0..27).filter(|n| *n != 20).collect::<Vec<_>>(), "20 was RESTRICT and is gone");
    assert_eq!(Op::WatchEvent.to_wire(), 15);
    assert_eq!(Op::DirectoryPart.to_wire(), 22);
    for &op in Op::ALL {
        assert_eq!(Op::from_wire(op.to_wire()), Some(op));
    }
}

#[test]
fn errors_go_by_name() {
    for &e in Errno::ALL {
        assert_eq!(Errno::from_payload(&e.payload()), Some(e));
    }
    assert_eq!(Errno::from_payload(b"EWHAT\0"), None);
    assert_eq!(Errno::from_payload(b"EAGAIN\0"), Some(Errno::EAGAIN));
}

#[test]
fn paths() {
    let ok = |p: &str| path::is_valid(p.as_bytes(), REL_PATH_MAX);
    for p in ["/", "/a", "/local/domain/0/backend/vbd/1/51712", "/a-b_c@d/0"] {
        assert!(ok(p), "{p}");
    }
    for p in ["", "a", "/a/", "//", "/a//b", "/a b", "/a.b", "/ä", "/a\0"] {
        assert!(!ok(p), "{p:?}");
    }
    // What follows /local/domain/<domid>/ counts alone.
    let rel = "x".repeat(REL_PATH_MAX);
    assert!(ok(&format!("/local/domain/12/{rel}")));
    assert!(!ok(&format!("/local/domain/12/{rel}y")));
    assert!(!ok(&format!("/local/domian/12/{rel}")));
    assert!(path::is_child(b"/a/b", b"/a") && path::is_child(b"/a", b"/a") && path::is_child(b"/a", b"/"));
    assert!(!path::is_child(b"/ab", b"/a") && !path::is_child(b"/a", b"/a/b") && !path::is_child(b"@x", b"/"));
    assert_eq!(path::depth_below(b"/a/b/c", b"/a"), Some(2));
    assert_eq!(path::depth_below(b"/a", b"/"), Some(1));
    assert_eq!(path::depth_below(b"/", b"/"), Some(0));
    assert_eq!(path::depth_below(b"/a", b"/a"), Some(0));
    assert_eq!((path::parent(b"/a/b"), path::parent(b"/a"), path::parent(b"/")), (&b"/a"[..], &b"/"[..], &b"/"[..]));
    assert_eq!(path::join(b"/", b"a"), b"/a");
}

#[test]
fn permissions() {
    let p = parse_list(b"n0\0r5\0b0x10\0").unwrap();
    assert_eq!(p, [Perm::new(Access::NONE, 0), Perm::new(Access::READ, 5), Perm::new(Access::BOTH, 16)]);
    assert_eq!(format_list(&p), b"n0\0r5\0b16\0");
    for bad in [&b""[..], b"\0", b"n\0", b"x0\0", b"r4294967296\0", b"r-1\0", b"r0x+1\0", b"r 1\0"] {
        assert_eq!(parse_list(bad), Err(Errno::EINVAL), "{bad:?}");
    }
    assert_eq!(parse_list(b"r65536\0"), Err(Errno::ENOENT));
}

#[test]
fn numbers_as_c_reads_them() {
    for (s, n) in [("12", 12), ("-3", -3), (" 7x", 7), ("", 0), ("x", 0), ("+4", 4)] {
        assert_eq!(payload::atoi(s.as_bytes()), Some(n));
    }
    assert_eq!(payload::atoi(b"99999999999999999999"), None);
}

#[test]
fn a_length_beyond_the_limit_stops_the_connection() {
    let mut d = FrameDecoder::new();
    let h = Header { op: 2, req_id: 1, tx_id: 0, len: PAYLOAD_MAX as u32 + 1 };
    assert_eq!(d.feed(&h.to_bytes()), Err(FrameError { len: 4097 }));
    assert!(d.take().is_none());
    assert!(d.feed(b"x").is_err());
}

proptest! {
    #[test]
    fn messages_survive_any_cutting(
        payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 1..6),
        cuts in proptest::collection::vec(1usize..40, 1..60),
    ) {
        let msgs: Vec<Message> = payloads.into_iter().enumerate()
            .map(|(i, p)| Message::new(i as u32, i as u32 * 3, 7, p)).collect();
        let bytes: Vec<u8> = msgs.iter().flat_map(|m| m.to_bytes()).collect();
        let mut got = Vec::new();
        let mut d = FrameDecoder::new();
        let mut at = 0;
        let mut cuts = cuts.into_iter().cycle();
        while at < bytes.len() {
            let n = cuts.next().unwrap().min(bytes.len() - at);
            let wants = d.wants();
            let used = d.feed(&bytes[at..at + n]).unwrap();
            prop_assert!(used > 0 && (used <= wants || wants <= HEADER_LEN));
            at += used;
            prop_assert_eq!(d.is_partial(), !d.partial().is_empty());
            if let Some(m) = d.take() { got.push(m) }
        }
        prop_assert_eq!(got, msgs);
        prop_assert!(!d.is_partial());
    }

    #[test]
    fn any_bytes_are_framed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut d = FrameDecoder::new();
        let mut at = 0;
        while at < bytes.len() {
            match d.feed(&bytes[at..]) {
                Ok(n) => { at += n; if d.take().is_none() && n == 0 { break } }
                Err(_) => break,
            }
        }
        let _ = payload::one_arg(&bytes);
        let _ = payload::strings(&bytes).count();
        let _ = parse_list(&bytes);
        let _ = payload::atoi(&bytes);
        let _ = path::is_valid(&bytes, REL_PATH_MAX);
        let _ = path::depth_below(&bytes, b"/");
        let _ = (path::parent(&bytes), path::leaf(&bytes));
    }
}
