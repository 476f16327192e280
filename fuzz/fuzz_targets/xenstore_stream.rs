//! Any bytes as a xenstore-migration stream: what is taken is written again and read the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xenstore_wire::stream::{read_all, write_all};

fuzz_target!(|data: &[u8]| {
    let Ok((format, records)) = read_all(data) else { return };
    let bytes = write_all(format, &records).expect("what was read can be written");
    assert!(read_all(&bytes).expect("what was written can be read") == (format, records));
});
