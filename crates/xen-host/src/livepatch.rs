//! Loading the hypervisor extension: `XEN_SYSCTL_livepatch_op` (xen/include/public/sysctl.h, docs/misc/livepatch.pandoc).
//!
//! A payload is uploaded (checked and linked by Xen), applied (its functions take over while every CPU waits), reverted and unloaded.
//! Xen carries the middle two out on its own time; they are waited for here.

use crate::XenHost;
use hypervisor::{Errno, HypervisorError, Result};
use std::time::{Duration, Instant};
use xen_abi::ext::REVERT_REFUSED_ERRNO;
use xen_abi::sysctl::LIVEPATCH_OP;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Name under which Xen knows the extension.
pub const NAME: &str = "ferry";

/// Time that Xen may take to gather its CPUs. Those that came wait for the others, and no guest runs on them meanwhile: so it is
/// short (Xen's own default), and a try that fails is repeated.
const GATHER: Duration = Duration::from_millis(30);

/// Time between two tries, for the guests.
const PAUSE: Duration = Duration::from_millis(50);

/// Time after which an action that Xen has not managed is given up.
const PATIENCE: Duration = Duration::from_secs(20);

// XEN_SYSCTL_LIVEPATCH_*
const UPLOAD: u32 = 0;
const GET: u32 = 1;
const ACTION: u32 = 3;

// LIVEPATCH_ACTION_*
const UNLOAD: u32 = 1;
const REVERT: u32 = 2;
const APPLY: u32 = 3;

// LIVEPATCH_STATE_*
const CHECKED: u32 = 1;
const APPLIED: u32 = 2;

/// `struct xen_livepatch_name`; the size counts the closing 0.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
struct PatchName {
    address: u64,
    size: u16,
    pad: [u16; 3],
}

/// `struct xen_sysctl_livepatch_op` with `struct xen_sysctl_livepatch_upload`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
struct Upload {
    cmd: u32,
    pad: u32,
    name: PatchName,
    size: u64,
    payload: u64,
}

/// ... with `struct xen_sysctl_livepatch_get`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
struct Get {
    cmd: u32,
    pad: u32,
    name: PatchName,
    state: u32,
    rc: i32,
}

/// ... with `struct xen_sysctl_livepatch_action`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
struct Action {
    cmd: u32,
    pad: u32,
    name: PatchName,
    action: u32,
    timeout_ns: u32,
    flags: u32,
    pad2: u32,
}

/// What Xen says of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadState {
    /// Not there.
    Absent,
    /// Uploaded, not applied.
    Uploaded,
    /// Applied: its functions run.
    Applied,
}

impl XenHost {
    /// State of the payload of that name.
    pub fn payload_state(&self, name: &str) -> Result<PayloadState> {
        Ok(match self.payload_status(name)? {
            None => PayloadState::Absent,
            Some((APPLIED, _)) => PayloadState::Applied,
            Some((CHECKED, _)) => PayloadState::Uploaded,
            Some((state, _)) => {
                return Err(HypervisorError::malformed(
                    "livepatch get",
                    None,
                    format!("{name} is in the unknown state {state}"),
                ));
            }
        })
    }

    /// Uploads a payload and applies it. One that is there already under that name is left as it is, and applied if it was not.
    pub fn load_payload(&self, name: &str, payload: &[u8]) -> Result<()> {
        let state = self.payload_state(name)?;
        if state == PayloadState::Absent {
            self.upload(name, payload)?;
        }
        if state != PayloadState::Applied
            && let Err(e) = self.act(name, APPLY, "livepatch apply", Some(APPLIED))
        {
            // Nothing of it runs: take it away again, so that another can be tried.
            let _ = self.act(name, UNLOAD, "livepatch unload", None);
            return Err(e);
        }
        Ok(())
    }

    /// Reverts a payload and unloads it. Nothing happens if it is not there. The extension refuses to go
    /// ([`REVERT_REFUSED_ERRNO`]) while a domain lives by its clock offset.
    pub fn unload_payload(&self, name: &str) -> Result<()> {
        match self.payload_state(name)? {
            PayloadState::Absent => return Ok(()),
            PayloadState::Uploaded => {}
            PayloadState::Applied => self.act(name, REVERT, "livepatch revert", Some(CHECKED)).map_err(|e| {
                if e.as_errno() == Some(Errno(REVERT_REFUSED_ERRNO)) {
                    e.with_detail("the extension is in use: a domain that migrated to this host has a clock offset; it can go when those domains have gone")
                } else {
                    e
                }
            })?,
        }
        self.act(name, UNLOAD, "livepatch unload", None)
    }

    fn upload(&self, name: &str, payload: &[u8]) -> Result<()> {
        const OP: &str = "livepatch upload";
        let text = patch_name(name)?;
        let mut names = self.privcmd.buffer(text.len())?;
        names.bytes_mut()[..text.len()].copy_from_slice(&text);
        let mut data = self.privcmd.buffer(payload.len())?;
        data.bytes_mut()[..payload.len()].copy_from_slice(payload);
        let mut op = Upload {
            cmd: UPLOAD,
            pad: 0,
            name: PatchName { address: names.addr(), size: text.len() as u16, pad: [0; 3] },
            size: payload.len() as u64,
            payload: data.addr(),
        };
        self.sysctl(OP, LIVEPATCH_OP, &mut op).map_err(|e| match e.as_errno() {
            Some(Errno::EINVAL | Errno::ENOENT) => e.with_detail(
                "Xen refuses the payload: was it made for this very build of Xen? `xl dmesg` has Xen's reason",
            ),
            Some(Errno::ENOSYS) => e.with_detail("this Xen is built without livepatching (CONFIG_LIVEPATCH)"),
            _ => e,
        })
    }

    /// Carries out an action, again and again while Xen cannot gather its CPUs for it.
    fn act(&self, name: &str, action: u32, op_name: &'static str, goal: Option<u32>) -> Result<()> {
        let begun = Instant::now();
        loop {
            match self.act_once(name, action, op_name, goal) {
                Err(e) if e.as_errno() == Some(Errno::EBUSY) && begun.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
                Err(e) if e.as_errno() == Some(Errno::EBUSY) => {
                    return Err(e.with_detail("Xen's CPUs could not be gathered, or another live patch is being worked on; try again when the host is less busy"));
                }
                result => return result,
            }
        }
    }

    fn act_once(&self, name: &str, action: u32, op_name: &'static str, goal: Option<u32>) -> Result<()> {
        let text = patch_name(name)?;
        let mut names = self.privcmd.buffer(text.len())?;
        names.bytes_mut()[..text.len()].copy_from_slice(&text);
        let mut op = Action {
            cmd: ACTION,
            pad: 0,
            name: PatchName { address: names.addr(), size: text.len() as u16, pad: [0; 3] },
            action,
            timeout_ns: GATHER.as_nanos() as u32,
            flags: 0,
            pad2: 0,
        };
        self.sysctl(op_name, LIVEPATCH_OP, &mut op).map_err(|e| {
            if action == APPLY && e.as_errno() == Some(Errno::EINVAL) {
                e.with_detail(
                    "Xen refuses to apply it: another live patch may be in the way; `xl dmesg` has Xen's reason",
                )
            } else {
                e
            }
        })?;
        let Some(goal) = goal else { return Ok(()) };
        let begun = Instant::now();
        loop {
            match self.payload_status(name)? {
                Some((state, 0)) if state == goal => return Ok(()),
                // Still being done.
                Some((_, rc)) if rc == -Errno::EAGAIN.0 && begun.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Some((_, rc)) if rc < 0 => return Err(HypervisorError::errno(op_name, None, Errno(-rc))),
                other => {
                    let text = format!("{name} should be in state {goal}, Xen says {other:?}");
                    return Err(HypervisorError::malformed(op_name, None, text));
                }
            }
        }
    }

    /// State and result of the last action; `None` if there is no such payload.
    fn payload_status(&self, name: &str) -> Result<Option<(u32, i32)>> {
        let text = patch_name(name)?;
        let mut names = self.privcmd.buffer(text.len())?;
        names.bytes_mut()[..text.len()].copy_from_slice(&text);
        let mut op = Get {
            cmd: GET,
            pad: 0,
            name: PatchName { address: names.addr(), size: text.len() as u16, pad: [0; 3] },
            state: 0,
            rc: 0,
        };
        match self.sysctl("livepatch get", LIVEPATCH_OP, &mut op) {
            Ok(()) => Ok(Some((op.state, op.rc))),
            Err(e) if e.as_errno() == Some(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// A payload's name as Xen takes it: at most 128 bytes with the closing 0 (`XEN_LIVEPATCH_NAME_SIZE`).
fn patch_name(name: &str) -> Result<Vec<u8>> {
    let mut bytes = name.as_bytes().to_vec();
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= 128 {
        return Err(HypervisorError::malformed("livepatch", None, format!("{name:?} is no name for a payload")));
    }
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_xens_sizes() {
        assert_eq!(size_of::<PatchName>(), 16);
        assert_eq!(size_of::<Upload>(), 40);
        assert_eq!(size_of::<Get>(), 32);
        assert_eq!(size_of::<Action>(), 40);
    }

    #[test]
    fn names_are_closed_and_bounded() {
        assert_eq!(patch_name("ferry").unwrap(), b"ferry\0");
        assert!(patch_name("").is_err());
        assert!(patch_name("a\0b").is_err());
        assert!(patch_name(&"x".repeat(128)).is_err());
        assert!(patch_name(&"x".repeat(127)).is_ok());
    }
}
