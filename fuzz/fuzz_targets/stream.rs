//! Any bytes as a saved domain: read, judged, shown, stripped; what is read typed must be written again as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migration_stream::{Decoder, Encoder, Event, Layer, check::Checker, hvm, libxc, show::Shower, strip::Stripper};

fuzz_target!(|data: &[u8]| {
    let (mut decoder, mut checker, mut shower, mut stripper) =
        (Decoder::default(), Checker::new(), Shower::new(), Stripper::new());
    // Cut into pieces whose length differs from input to input.
    for chunk in data.chunks(data.len() % 257 + 1) {
        decoder.feed(chunk);
        loop {
            let event = match decoder.next() {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(_) => return,
            };
            checker.event(&event);
            let _ = shower.event(&event);
            stripper.event(&event);
            let Event::Record(record) = event else { continue };
            let (mut raw, mut typed) = (Encoder::new(), Encoder::new());
            raw.event(&Event::Record(record));
            match record.layer {
                Layer::Libxc => {
                    let Ok(parsed) = record.libxc() else { continue };
                    if let libxc::Record::HvmContext(blob) = &parsed
                        && let Ok(context) = hvm::Context::decode(blob)
                    {
                        assert!(context.encode() == *blob);
                    }
                    typed.libxc(&parsed);
                }
                Layer::Libxl | Layer::Xl => {
                    let Ok(parsed) = record.libxl() else { continue };
                    typed.libxl(&parsed);
                }
            }
            assert!(raw.take() == typed.take(), "{record:?}");
        }
    }
    let _ = decoder.finish();
});
