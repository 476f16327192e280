//! A crowd of event channels with holes between them, for a guest that has many.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// IOCTL_EVTCHN_BIND_UNBOUND_PORT and IOCTL_EVTCHN_UNBIND: _IOC(_IOC_NONE, 'E', 2 and 3, 4) (include/uapi/xen/evtchn.h).
const BIND_UNBOUND_PORT: u64 = 4 << 16 | (b'E' as u64) << 8 | 2;
const UNBIND: u64 = 4 << 16 | (b'E' as u64) << 8 | 3;

/// Open as long as this lives.
#[derive(Debug)]
pub struct Crowd {
    _device: File,
}

impl Crowd {
    /// Opens so many ports, each waiting for domain 0, and closes each third again.
    pub fn open(ports: u32) -> Result<Option<Crowd>, String> {
        if ports == 0 {
            return Ok(None);
        }
        let path = "/dev/xen/evtchn";
        let device = File::options().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"))?;
        // Both requests take one u32: the remote domain, or the port.
        let ask = |request: u64, mut argument: u32| {
            // SAFETY: `argument` is the whole structure of the request, and lives as long as the call.
            let answer = unsafe { libc::ioctl(device.as_raw_fd(), request as _, std::ptr::from_mut(&mut argument)) };
            u32::try_from(answer).map_err(|_| io::Error::last_os_error())
        };
        let mut opened = Vec::new();
        for number in 1..=ports {
            let port = ask(BIND_UNBOUND_PORT, 0).map_err(|e| format!("{path}: port {number} of {ports}: {e}"))?;
            opened.push(port);
        }
        for port in opened.iter().step_by(3) {
            ask(UNBIND, *port).map_err(|e| format!("{path}: close port {port}: {e}"))?;
        }
        Ok(Some(Crowd { _device: device }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_headers() {
        // Computed with the C macros from include/uapi/xen/evtchn.h.
        assert_eq!((BIND_UNBOUND_PORT, UNBIND), (0x0004_4502, 0x0004_4503));
    }

    #[test]
    fn none_are_wanted_by_default() {
        assert!(Crowd::open(0).unwrap().is_none());
    }
}
