//! Any bytes as a connection's stream: messages come out as they went in, however the bytes are cut, and what is in them is
//! judged without harm.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenstore_wire::{FrameDecoder, HEADER_LEN, Op, PAYLOAD_MAX, REL_PATH_MAX, path, payload, perm, ring};

fuzz_target!(|data: &[u8]| {
    let Some((&piece, stream)) = data.split_first() else { return };
    let mut decoder = FrameDecoder::new();
    let (mut at, mut taken) = (0, Vec::new());
    while at < stream.len() {
        let end = stream.len().min(at + usize::from(piece) + 1);
        let Ok(used) = decoder.feed(&stream[at..end]) else {
            assert!(decoder.feed(b"x").is_err() && decoder.take().is_none(), "a broken stream stays broken");
            break;
        };
        at += used;
        assert!(decoder.held() <= HEADER_LEN + PAYLOAD_MAX);
        let Some(m) = decoder.take() else {
            assert!(used > 0, "it takes nothing and gives nothing");
            continue;
        };
        assert_eq!(Op::from_wire(m.header.op).map_or(m.header.op, Op::to_wire), m.header.op);
        taken.extend(m.to_bytes());
        let p = &m.payload[..];
        for s in payload::strings(p).chain(payload::one_arg(p)) {
            let _ = (payload::atoi(s), payload::decimal::<u16>(s));
            if path::is_valid(s, REL_PATH_MAX) && s.starts_with(b"/") {
                let rebuilt = path::parts(s).fold(b"/".to_vec(), |p, leaf| path::join(&p, leaf));
                assert!(rebuilt == s, "{}", s.escape_ascii());
                assert!(path::is_child(s, path::parent(s)));
            }
        }
        if let Ok(list) = perm::parse_list(p) {
            assert!(perm::parse_list(&perm::format_list(&list)) == Ok(list));
        }
    }
    assert!(taken == stream[..taken.len()], "messages are not the bytes that came");
    if let Some(words) = stream.first_chunk::<8>() {
        let [a, b] = [0, 4].map(|i| u32::from_le_bytes([words[i], words[i + 1], words[i + 2], words[i + 3]]));
        assert_eq!(ring::used(a, b).is_some(), b.wrapping_sub(a) as usize <= ring::RING_SIZE);
        assert!(ring::offset(a) < ring::RING_SIZE);
    }
});
