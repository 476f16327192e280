//! What Xen tells this guest about itself, by hypercalls of its own through /dev/xen/privcmd, and grants of its own
//! through /dev/xen/gntalloc.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use witness::pattern::Rng;
use witness::report::{Grants, HvmParam, Item, OwnGrant, Port, Runstate};
use xen_abi::{event, grant, hvm_op, hypercall, shared};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Ports that are looked at, at most (a Linux guest has a few dozen).
const MOST_PORTS: u32 = 4096;
/// VCPUOP_get_runstate_info (xen/include/public/vcpu.h).
const VCPUOP_GET_RUNSTATE_INFO: u64 = 4;
/// GNTTABOP_copy and its flags (xen/include/public/grant_table.h).
const GNTTABOP_COPY: u64 = 5;
const GNTCOPY_SOURCE_GREF: u16 = 1;
const GNTCOPY_DEST_GREF: u16 = 2;
const PAGE: usize = 4096;

/// IOCTL_PRIVCMD_HYPERCALL: _IOC(_IOC_NONE, 'P', 0, sizeof(struct privcmd_hypercall)) (include/uapi/xen/privcmd.h).
const IOCTL_HYPERCALL: u64 = (size_of::<PrivcmdHypercall>() as u64) << 16 | (b'P' as u64) << 8;
/// IOCTL_GNTALLOC_ALLOC_GREF: _IOC(_IOC_NONE, 'G', 5, …) (include/uapi/xen/gntalloc.h).
const IOCTL_ALLOC_GREF: u64 = (size_of::<AllocGref>() as u64) << 16 | (b'G' as u64) << 8 | 5;
/// GNTALLOC_FLAG_WRITABLE.
const WRITABLE: u16 = 1;

/// struct privcmd_hypercall.
#[repr(C)]
struct PrivcmdHypercall {
    op: u64,
    arg: [u64; 5],
}

/// struct ioctl_gntalloc_alloc_gref, for one grant.
#[repr(C)]
struct AllocGref {
    domid: u16,
    flags: u16,
    count: u32,
    index: u64,
    gref: u32,
    _pad: u32,
}

/// struct gnttab_copy_ptr, by grant reference.
#[repr(C)]
#[derive(Clone, Copy, Default, IntoBytes, FromBytes, Immutable)]
struct CopyPtr {
    gref: u64,
    domid: u16,
    offset: u16,
    _pad: u32,
}

/// struct gnttab_copy.
#[repr(C)]
#[derive(Clone, Copy, Default, IntoBytes, FromBytes, Immutable)]
struct GrantCopy {
    source: CopyPtr,
    dest: CopyPtr,
    len: u16,
    flags: u16,
    status: i16,
    _pad: u16,
}

/// A page shared with Xen or the kernel; unmapped when dropped.
#[derive(Debug)]
struct Page(std::ptr::NonNull<u8>);

// SAFETY: the mapping belongs to this value alone; nothing in it is tied to a thread.
unsafe impl Send for Page {}

impl Page {
    /// A locked page: Xen copies to and from it and cannot fault it in.
    fn locked() -> io::Result<Page> {
        let page = Page::map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE, -1, 0)?;
        // SAFETY: the range was just mapped.
        if unsafe { libc::mlock(page.0.as_ptr().cast(), PAGE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(page)
    }

    fn map(flags: libc::c_int, fd: libc::c_int, offset: i64) -> io::Result<Page> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let p =
            unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        std::ptr::NonNull::new(p.cast()).map(Page).ok_or_else(|| io::Error::other("mapped at 0"))
    }

    fn put(&mut self, bytes: &[u8]) {
        let n = bytes.len().min(PAGE);
        // SAFETY: the page is mapped for writing and n is not more than its size; `bytes` is other memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_ptr(), n) };
    }

    fn take(&self, n: usize) -> Vec<u8> {
        let mut out = vec![0; n.min(PAGE)];
        // SAFETY: the page is mapped for reading, `out` is not longer than it. Xen or another mapping may write it, so it
        // is copied by volatile reads instead of being borrowed.
        unsafe {
            for (i, b) in out.iter_mut().enumerate() {
                *b = self.0.as_ptr().add(i).read_volatile();
            }
        }
        out
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and nobody holds a reference into it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

/// A device and the page that hypercalls' arguments are in.
#[derive(Debug)]
pub struct Xen {
    privcmd: File,
    page: Page,
    /// Highest port that was ever seen in use.
    highest: u32,
}

impl Xen {
    pub fn open() -> Result<Xen, String> {
        let path = "/dev/xen/privcmd";
        let privcmd = File::options().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"))?;
        let page = Page::locked().map_err(|e| format!("a locked page: {e}"))?;
        Ok(Xen { privcmd, page, highest: 0 })
    }

    /// A hypercall whose argument `at` is the address of `value`, which is returned as Xen left it.
    pub fn call<T: IntoBytes + FromBytes + Immutable>(
        &mut self,
        op: u64,
        mut arg: [u64; 5],
        at: usize,
        value: T,
    ) -> io::Result<T> {
        self.page.put(value.as_bytes());
        if let Some(a) = arg.get_mut(at) {
            *a = self.page.0.as_ptr() as u64;
        }
        let mut h = PrivcmdHypercall { op, arg };
        // SAFETY: `h` is a privcmd_hypercall; the one address in it is of the locked page, which is longer than any T used
        // here, so Xen writes nowhere else. All operations used only read the guest's own state, copy between pages that
        // the witness owns, or raise an event channel.
        let rc = unsafe { libc::ioctl(self.privcmd.as_raw_fd(), IOCTL_HYPERCALL as _, std::ptr::from_mut(&mut h)) };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        T::read_from_bytes(&self.page.take(size_of::<T>())).map_err(|_| io::Error::other("argument of another size"))
    }

    /// All event channels that are in use.
    pub fn ports(&mut self) -> Result<Vec<Port>, String> {
        self.ports_below(MOST_PORTS)
    }

    /// Those known to be in use, and the few numbers after them from which Xen takes new ones (it gives out the lowest
    /// free one): a cheap look between two full ones.
    pub fn low_ports(&mut self) -> Result<Vec<Port>, String> {
        self.ports_below(self.highest + 4)
    }

    fn ports_below(&mut self, end: u32) -> Result<Vec<Port>, String> {
        let mut ports = Vec::new();
        for port in 1..end {
            let ask = event::Status { dom: hypercall::DOMID_SELF, port, ..event::Status::default() };
            let s = match self.call(hypercall::EVENT_CHANNEL_OP, [event::STATUS, 0, 0, 0, 0], 1, ask) {
                Ok(s) => s,
                // Past the last port.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && port > 1 => break,
                // Xen's own ports are none of the guest's business.
                Err(e) if e.raw_os_error() == Some(libc::EACCES) => continue,
                Err(e) => return Err(format!("EVTCHNOP_status of port {port}: {e}")),
            };
            let remote = matches!(s.status, event::STAT_UNBOUND | event::STAT_INTERDOMAIN);
            let numbered = matches!(s.status, event::STAT_PIRQ | event::STAT_VIRQ);
            if s.status != event::STAT_CLOSED {
                self.highest = self.highest.max(port);
                ports.push(Port {
                    port,
                    status: s.status,
                    vcpu: s.vcpu,
                    remote_dom: remote.then_some(s.u.dom),
                    remote_port: (s.status == event::STAT_INTERDOMAIN).then_some(s.u.port),
                    irq: numbered.then(|| s.u.number()),
                });
            }
        }
        Ok(ports)
    }

    /// Version and size of the grant table.
    pub fn grants(&mut self, own: Item<Vec<OwnGrant>>) -> Result<Grants, String> {
        let dom = hypercall::DOMID_SELF;
        let op = hypercall::GRANT_TABLE_OP;
        let size = self
            .call(op, [grant::QUERY_SIZE, 0, 1, 0, 0], 1, grant::QuerySize { dom, ..Default::default() })
            .map_err(|e| format!("GNTTABOP_query_size: {e}"))?;
        if size.status != grant::GNTST_OKAY {
            return Err(format!("GNTTABOP_query_size: status {}", size.status));
        }
        let version = self
            .call(op, [grant::GET_VERSION, 0, 1, 0, 0], 1, grant::GetVersion { dom, ..Default::default() })
            .map_err(|e| format!("GNTTABOP_get_version: {e}"))?;
        Ok(Grants { version: version.version, frames: size.nr_frames, max_frames: size.max_nr_frames, own })
    }

    /// HVM parameters that the guest may read.
    pub fn hvm_params(&mut self) -> Result<Vec<HvmParam>, String> {
        let mut params = Vec::new();
        let mut error = None;
        for index in 0..hvm_op::NR_PARAMS {
            let ask = hvm_op::HvmParam { domid: hypercall::DOMID_SELF, index, ..Default::default() };
            match self.call(hypercall::HVM_OP, [hvm_op::GET_PARAM, 0, 0, 0, 0], 1, ask) {
                Ok(p) => params.push(HvmParam { index, value: p.value }),
                Err(e) => error = Some(e),
            }
        }
        match error {
            Some(e) if params.is_empty() => Err(format!("HVMOP_get_param: {e}")),
            _ => Ok(params),
        }
    }

    /// Runstate of each vCPU.
    pub fn runstates(&mut self, vcpus: u32) -> Result<Vec<Runstate>, String> {
        (0..vcpus)
            .map(|vcpu| {
                let arg = [VCPUOP_GET_RUNSTATE_INFO, vcpu.into(), 0, 0, 0];
                let r = self
                    .call(hypercall::VCPU_OP, arg, 2, shared::VcpuRunstateInfo::default())
                    .map_err(|e| format!("VCPUOP_get_runstate_info of vCPU {vcpu}: {e}"))?;
                Ok(Runstate { vcpu, entry_ns: r.state_entry_time & !shared::RUNSTATE_UPDATE, time_ns: r.time })
            })
            .collect()
    }
}

/// Two pages granted to the own domid; Xen copies between them by their references. That works only as long as the grant
/// table's entries are what they were and the domid is too.
#[derive(Debug)]
pub struct OwnGrants {
    /// Keeps the grants alive.
    _device: File,
    grants: [OwnGrant; 2],
    pages: [Page; 2],
    rng: Rng,
}

impl OwnGrants {
    pub fn new(domid: u16, seed: u64) -> Result<OwnGrants, String> {
        let path = "/dev/xen/gntalloc";
        let device = File::options().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"))?;
        let one = || -> Result<(OwnGrant, Page), String> {
            let mut a = AllocGref { domid, flags: WRITABLE, count: 1, index: 0, gref: 0, _pad: 0 };
            // SAFETY: `a` is an ioctl_gntalloc_alloc_gref with room for the one reference that it asks for.
            let rc = unsafe { libc::ioctl(device.as_raw_fd(), IOCTL_ALLOC_GREF as _, std::ptr::from_mut(&mut a)) };
            if rc != 0 {
                return Err(format!("{path}: allocate a grant: {}", io::Error::last_os_error()));
            }
            let offset = i64::try_from(a.index).map_err(|_| format!("{path}: index {}", a.index))?;
            let page = Page::map(libc::MAP_SHARED, device.as_raw_fd(), offset)
                .map_err(|e| format!("{path}: map grant {}: {e}", a.gref))?;
            Ok((OwnGrant { gref: a.gref, domid }, page))
        };
        let ((from, from_page), (to, to_page)) = (one()?, one()?);
        Ok(OwnGrants { _device: device, grants: [from, to], pages: [from_page, to_page], rng: Rng::new(seed) })
    }

    pub fn list(&self) -> Vec<OwnGrant> {
        self.grants.to_vec()
    }

    pub fn references(&self) -> [u32; 2] {
        self.grants.map(|g| g.gref)
    }

    /// Writes fresh bytes to the first page, has Xen copy them to the second, and compares.
    pub fn copy(&mut self, xen: &mut Xen) -> Result<(), String> {
        let bytes: Vec<u8> = (0..PAGE / 8).flat_map(|_| self.rng.next().to_le_bytes()).collect();
        let [from, to] = &mut self.pages;
        from.put(&bytes);
        let end = |gref: u32| CopyPtr { gref: gref.into(), domid: hypercall::DOMID_SELF, ..CopyPtr::default() };
        let [a, b] = self.grants.map(|g| g.gref);
        let ask = GrantCopy {
            source: end(a),
            dest: end(b),
            len: PAGE as u16,
            flags: GNTCOPY_SOURCE_GREF | GNTCOPY_DEST_GREF,
            ..GrantCopy::default()
        };
        let done = xen
            .call(hypercall::GRANT_TABLE_OP, [GNTTABOP_COPY, 0, 1, 0, 0], 1, ask)
            .map_err(|e| format!("GNTTABOP_copy: {e}"))?;
        if done.status != grant::GNTST_OKAY {
            return Err(format!("GNTTABOP_copy: status {}", done.status));
        }
        if to.take(PAGE) != bytes {
            return Err("the copy is not what was written".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_headers() {
        // Computed with the C macros from include/uapi/xen/{privcmd,gntalloc}.h.
        assert_eq!(IOCTL_HYPERCALL, 0x0030_5000);
        assert_eq!(IOCTL_ALLOC_GREF, 0x0018_4705);
        assert_eq!(size_of::<GrantCopy>(), 40);
    }

    #[test]
    fn without_xen_it_says_so() {
        if !std::path::Path::new("/dev/xen/privcmd").exists() {
            assert!(Xen::open().unwrap_err().contains("/dev/xen/privcmd"));
        }
    }
}
