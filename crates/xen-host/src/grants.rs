//! /dev/xen/gntdev: pages that another domain grants to the control domain (Linux' `include/uapi/xen/gntdev.h`).

use crate::mapping::Pages;
use crate::privcmd::{ioc, ioctl, open_device};
use hypervisor::{Access, Cause, DomId, Errno, HypervisorError, Mapping, Result};
use std::fs::File;

/// Size of the ioctl's structure with one grant reference, which is what its number is made from.
const MAP_GRANT_REF: libc::c_ulong = ioc(b'G', 0, 24);
const UNMAP_GRANT_REF: libc::c_ulong = ioc(b'G', 1, 16);

/// Grants that one mapping may hold (Linux maps at most so many at once by default).
const MAX_GRANTS: usize = 1024;

/// A mapping of granted pages. The grants are given back when it is dropped.
#[derive(Debug)]
pub(crate) struct GrantedPages {
    /// Taken out first on drop: the kernel wants the pages unmapped before the grants are forgotten.
    pages: Option<Pages>,
    dev: File,
    index: u64,
    count: u32,
}

pub(crate) fn map(dom: DomId, refs: &[u32], access: Access) -> Result<GrantedPages> {
    const OP: &str = "GNTTABOP_map_grant_ref";
    if refs.is_empty() || refs.len() > MAX_GRANTS {
        return Err(HypervisorError::errno(OP, dom, Errno::EINVAL).with_detail(format!("{} grants", refs.len())));
    }
    let dev = open_device("/dev/xen/gntdev")?;
    let count = refs.len() as u32;
    // struct ioctl_gntdev_map_grant_ref: count, pad, index (64 bits), then domid and ref for each grant.
    let mut words = vec![count, 0, 0, 0];
    words.extend(refs.iter().flat_map(|&r| [u32::from(dom.0), r]));
    // The structure wants 8-byte alignment for its index; a vector of u64 has it.
    let mut args: Vec<u64> = words.chunks_exact(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32).collect();
    // SAFETY: the structure is the ioctl's, with `count` references behind its head; the kernel keeps no address.
    unsafe { ioctl(&dev, MAP_GRANT_REF, args.as_mut_ptr()) }.map_err(|e| HypervisorError::errno(OP, dom, e))?;
    let mut granted = GrantedPages { pages: None, dev, index: args[1], count };
    let pages = Pages::reserve(&granted.dev, refs.len(), access, granted.index)
        .map_err(|e| HypervisorError::new(OP, dom, Cause::Io(e)).with_detail(format!("grant references {refs:?}")))?;
    granted.pages = Some(pages);
    Ok(granted)
}

impl GrantedPages {
    fn pages(&self) -> &Pages {
        self.pages.as_ref().unwrap_or_else(|| unreachable!("only taken on drop"))
    }
}

impl Mapping for GrantedPages {
    fn len(&self) -> usize {
        self.pages().len()
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        self.pages().read(offset, buf);
    }

    fn write(&self, offset: usize, data: &[u8]) {
        self.pages().write(offset, data);
    }

    fn load_u32(&self, offset: usize) -> u32 {
        self.pages().load_u32(offset)
    }

    fn store_u32(&self, offset: usize, value: u32) {
        self.pages().store_u32(offset, value);
    }
}

impl Drop for GrantedPages {
    fn drop(&mut self) {
        drop(self.pages.take());
        let mut args = [self.index, u64::from(self.count)];
        // SAFETY: the structure (index, count, pad) is the ioctl's; the kernel keeps no address.
        let _ = unsafe { ioctl(&self.dev, UNMAP_GRANT_REF, args.as_mut_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ioctl_numbers_are_linuxs() {
        assert_eq!(MAP_GRANT_REF, 0x0018_4700);
        assert_eq!(UNMAP_GRANT_REF, 0x0010_4701);
    }
}
