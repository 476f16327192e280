//! Typed hypercalls: a structure in, the same structure out.

use crate::XenHost;
use hypervisor::{DomId, Errno, HypervisorError, Result};
use xen_abi::domctl::{DomctlRaw, PAYLOAD_LEN};
use xen_abi::hypercall;
use xen_abi::sysctl::SysctlRaw;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Puts a payload at the start of an operation's union.
fn pack<P: IntoBytes + Immutable>(payload: &P) -> [u64; PAYLOAD_LEN / 8] {
    let mut u = [0; PAYLOAD_LEN / 8];
    let bytes = payload.as_bytes();
    u.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
    u
}

/// Takes it out again.
fn unpack<P: FromBytes>(u: &[u64; PAYLOAD_LEN / 8]) -> P {
    P::read_from_prefix(u.as_bytes()).map(|(p, _)| p).unwrap_or_else(|_| unreachable!("payloads are at most 128 bytes"))
}

impl XenHost {
    /// A domctl whose addresses, if any, are those of buffers that the caller holds mutably. The payload is updated also when it fails, because
    /// Xen says there what it objects to. Answers the hypercall's result, 0 or more.
    pub(crate) fn domctl_raw<P: FromBytes + IntoBytes + Immutable>(
        &self,
        cmd: u32,
        dom: u16,
        payload: &mut P,
    ) -> Result<std::result::Result<i64, Errno>> {
        const { assert!(size_of::<P>() <= PAYLOAD_LEN) };
        let op =
            DomctlRaw { cmd, interface_version: self.interface.domctl, domain: dom, _pad: [0; 3], u: pack(payload) };
        let mut buffer = self.privcmd.buffer(size_of::<DomctlRaw>())?;
        buffer.put(0, &op);
        let addr = buffer.addr();
        // SAFETY: the operation lies in `buffer`, held mutably; what its payload points to is the caller's to vouch for, and all callers are in
        // this crate and point to buffers only.
        let r = unsafe { self.privcmd.hypercall(hypercall::DOMCTL, [addr, 0, 0, 0, 0]) };
        *payload = unpack(&buffer.get::<DomctlRaw>(0).u);
        Ok(r)
    }

    pub(crate) fn domctl<P: FromBytes + IntoBytes + Immutable>(
        &self,
        name: &'static str,
        cmd: u32,
        dom: DomId,
        payload: &mut P,
    ) -> Result<()> {
        self.domctl_raw(cmd, dom.0, payload)?.map(drop).map_err(|e| HypervisorError::errno(name, dom, e))
    }

    pub(crate) fn sysctl<P: FromBytes + IntoBytes + Immutable>(
        &self,
        name: &'static str,
        cmd: u32,
        payload: &mut P,
    ) -> Result<()> {
        const { assert!(size_of::<P>() <= PAYLOAD_LEN) };
        let op = SysctlRaw { cmd, interface_version: self.interface.sysctl, u: pack(payload) };
        let mut buffer = self.privcmd.buffer(size_of::<SysctlRaw>())?;
        buffer.put(0, &op);
        let addr = buffer.addr();
        // SAFETY: as in `domctl_raw`.
        let r = unsafe { self.privcmd.hypercall(hypercall::SYSCTL, [addr, 0, 0, 0, 0]) };
        *payload = unpack(&buffer.get::<SysctlRaw>(0).u);
        r.map(drop).map_err(|e| HypervisorError::errno(name, None, e))
    }

    /// A hypercall that takes a sub-command and one structure (memory_op, event_channel_op, hvm_op), and for grant_table_op their number.
    pub(crate) fn op<P: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u64,
        cmd: u64,
        arg: &mut P,
    ) -> Result<std::result::Result<i64, Errno>> {
        let mut buffer = self.privcmd.buffer(size_of::<P>())?;
        buffer.put(0, &*arg);
        let addr = buffer.addr();
        // SAFETY: the structure lies in `buffer`, held mutably; see `domctl_raw` for what it points to. The third argument counts
        // structures for grant_table_op and means nothing for the others.
        let r = unsafe { self.privcmd.hypercall(number, [cmd, addr, 1, 0, 0]) };
        *arg = buffer.get(0);
        Ok(r)
    }
}
