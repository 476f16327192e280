//! Takes the GT records out of a stream, so that stock tools read the rest.

use crate::decoder::Event;
use crate::encoder::Encoder;
use crate::error::Layer;
use crate::libxc;

/// Writes a stream again without its GT records.
///
/// SHARED_INFO goes too where the domain is HVM or PVH: stock libxc knows it for PV domains only and would refuse it.
/// What is left restores like any ordinary stream: the guest must take part, as after `xl save`.
#[derive(Debug, Default)]
pub struct Stripper {
    encoder: Encoder,
    hvm: bool,
    removed: usize,
}

impl Stripper {
    /// At the start of a stream.
    pub fn new() -> Self {
        Stripper::default()
    }

    /// Takes the next event; gives the bytes to write for it, none for a record that goes.
    pub fn event(&mut self, event: &Event<'_>) -> Vec<u8> {
        match event {
            Event::Domain(header) => self.hvm = header.domain_type == libxc::DOMAIN_X86_HVM,
            Event::Record(record)
                if record.gt_type().is_some()
                    || self.hvm && record.layer == Layer::Libxc && record.rtype == libxc::rec::SHARED_INFO =>
            {
                self.removed += 1;
                return Vec::new();
            }
            _ => {}
        }
        self.encoder.event(event);
        self.encoder.take()
    }

    /// Records removed so far.
    pub fn removed(&self) -> usize {
        self.removed
    }
}
