//! Any bytes as what a peer sends: as they are, and as the payloads of frames whose checksums are right. A frame that is read is written
//! again and read the same; what a word says of a guest is taken apart without harm.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migrate::guest::Offer;
use migrate::source::{GoDetails, StepsDetails, WhyDetails};
use migrate::wire::{Frame, MAX_PAYLOAD, WireError};
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let mut raw = data;
    while let Ok(Some(frame)) = Frame::read(&mut raw) {
        same(&frame);
    }
    let Some((&kind, payload)) = data.split_first() else { return };
    let mut header = [0; 8];
    header[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    header[4] = kind;
    let mut bytes = [&header, payload].concat();
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let mut from = &bytes[..];
    match Frame::read(&mut from) {
        Ok(Some(frame)) => {
            assert!(from.is_empty(), "{} bytes of the frame are left", from.len());
            same(&frame);
            details(&frame);
        }
        Ok(None) => panic!("there is a frame"),
        Err(WireError::Kind(_)) => assert!(!(1..=5).contains(&kind)),
        Err(WireError::TooLong(n)) => assert!(n > MAX_PAYLOAD),
        Err(WireError::Malformed { .. }) => {}
        Err(other) => panic!("a whole frame with its checksum: {other}"),
    }
    // Cut anywhere it is no frame, and no end either.
    let cut = usize::from(kind) % bytes.len();
    assert!(cut == 0 || Frame::read(&mut &bytes[..cut]).is_err());
    // A byte that was flipped is noticed.
    bytes[cut] ^= 0x40;
    assert!(Frame::read(&mut &bytes[..]).is_err());
});

fn same(frame: &Frame) {
    let mut bytes = Vec::new();
    frame.write(&mut bytes).expect("it was short enough to be read");
    let again = Frame::read(&mut &bytes[..]).expect("what was written can be read");
    // serde_json reads a float only almost as it was written. There is none in any word.
    assert!(again.as_ref() == Some(frame) || said(frame).is_some_and(has_float), "{frame:?} became {again:?}");
}

fn said(frame: &Frame) -> Option<&Value> {
    match frame {
        Frame::ToDestination(said) => Some(&said.details),
        Frame::ToSource(said) => Some(&said.details),
        _ => None,
    }
}

fn has_float(value: &Value) -> bool {
    match value {
        Value::Number(n) => n.is_f64(),
        Value::Array(all) => all.iter().any(has_float),
        Value::Object(all) => all.values().any(has_float),
        _ => false,
    }
}

fn details(frame: &Frame) {
    let Some(details) = said(frame) else { return };
    if let Ok(offer) = serde_json::from_value::<Offer>(details.clone()) {
        let text = serde_json::to_value(&offer).expect("an offer is JSON");
        let again = serde_json::from_value::<Offer>(text);
        assert!(again.is_ok_and(|again| again == offer) || has_float(details));
    }
    let _ = serde_json::from_value::<GoDetails>(details.clone());
    let _ = serde_json::from_value::<StepsDetails>(details.clone());
    let _ = serde_json::from_value::<WhyDetails>(details.clone());
}
