//! One error type for everything a hypervisor can answer.

use crate::DomId;
use std::fmt;

/// A Xen error number. Xen uses Linux' numbers (`xen/include/public/errno.h`), always positive here.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        impl Errno {
            $(#[doc = $text] pub const $name: Errno = Errno($value);)*

            /// The symbolic name, or `None` for a number Xen does not define.
            pub fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some(stringify!($name)),)* _ => None }
            }

            fn text(self) -> &'static str {
                match self.0 { $($value => $text,)* _ => "unknown error" }
            }
        }
    };
}

errnos! {
    EPERM = 1, "operation not permitted";
    ENOENT = 2, "no such entry";
    ESRCH = 3, "no such domain";
    EINTR = 4, "interrupted";
    EIO = 5, "input/output error";
    ENXIO = 6, "no such address or index";
    E2BIG = 7, "argument too large";
    ENOEXEC = 8, "bad image format";
    EBADF = 9, "bad file descriptor";
    EAGAIN = 11, "try again";
    ENOMEM = 12, "out of memory";
    EACCES = 13, "access denied";
    EFAULT = 14, "bad address";
    EBUSY = 16, "busy";
    EEXIST = 17, "already exists";
    EXDEV = 18, "wrong device or domain";
    ENODEV = 19, "no such device or facility";
    ENOTDIR = 20, "not a directory";
    EINVAL = 22, "invalid argument";
    ENOTTY = 25, "unknown ioctl";
    ENOSPC = 28, "no space left";
    EROFS = 30, "read-only";
    EDOM = 33, "argument outside the domain";
    ERANGE = 34, "out of range";
    EDEADLK = 35, "deadlock";
    ENAMETOOLONG = 36, "name too long";
    ENOSYS = 38, "not implemented";
    ENODATA = 61, "no data";
    EADDRINUSE = 98, "address in use";
    EADDRNOTAVAIL = 99, "address not available";
    ENOBUFS = 105, "buffer too small";
    EOPNOTSUPP = 95, "operation not supported";
    ETIMEDOUT = 110, "timed out";
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({})", self.text()),
            None => write!(f, "error number {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

/// Why an operation did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The hypervisor (or the dom0 kernel on its behalf) answered with an error number.
    #[error("{0}")]
    Errno(Errno),
    /// The device node, the file or the mapping could not be used.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// This hypervisor cannot do that: wrong version, extension not loaded, feature not built in.
    /// The text says what is missing and what to do.
    #[error("{0}")]
    Unsupported(String),
    /// The hypervisor's answer, or the caller's argument, does not have the shape it must have.
    #[error("{0}")]
    Malformed(String),
}

/// A failed hypervisor operation: which one, on which domain, and why.
#[derive(Debug, thiserror::Error)]
pub struct HypervisorError {
    /// The operation, by its public name (`XEN_DOMCTL_createdomain`, `XENMEM_populate_physmap`, …).
    pub op: &'static str,
    /// The domain it was for; `None` for operations on the host.
    pub domid: Option<DomId>,
    /// What of the domain it was about (a gfn, port, vCPU, parameter), where that says more.
    pub detail: Option<String>,
    /// Part of the error's own text, so not its `source`: printing the chain would say it twice.
    pub cause: Cause,
}

impl fmt::Display for HypervisorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(domid) = self.domid {
            write!(f, "domain {domid}: ")?;
        }
        f.write_str(self.op)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        write!(f, ": {}", self.cause)
    }
}

impl HypervisorError {
    pub fn new(op: &'static str, domid: impl Into<Option<DomId>>, cause: Cause) -> Self {
        HypervisorError { op, domid: domid.into(), detail: None, cause }
    }

    pub fn errno(op: &'static str, domid: impl Into<Option<DomId>>, errno: Errno) -> Self {
        Self::new(op, domid, Cause::Errno(errno))
    }

    pub fn unsupported(op: &'static str, domid: impl Into<Option<DomId>>, text: impl Into<String>) -> Self {
        Self::new(op, domid, Cause::Unsupported(text.into()))
    }

    pub fn malformed(op: &'static str, domid: impl Into<Option<DomId>>, text: impl Into<String>) -> Self {
        Self::new(op, domid, Cause::Malformed(text.into()))
    }

    /// Says what of the domain the operation was about.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// The error number the hypervisor answered with, if it answered.
    pub fn as_errno(&self) -> Option<Errno> {
        match &self.cause {
            Cause::Errno(errno) => Some(*errno),
            Cause::Io(e) => e.raw_os_error().map(Errno),
            Cause::Unsupported(_) | Cause::Malformed(_) => None,
        }
    }

    /// The domain does not exist (any more).
    pub fn is_no_such_domain(&self) -> bool {
        self.as_errno() == Some(Errno::ESRCH)
    }
}

pub type Result<T> = std::result::Result<T, HypervisorError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_domain_operation_detail_and_cause() {
        let e = HypervisorError::errno("EVTCHNOP_status", DomId(7), Errno::EINVAL).with_detail("port 12");
        assert_eq!(e.to_string(), "domain 7: EVTCHNOP_status (port 12): EINVAL (invalid argument)");
        assert!(HypervisorError::errno("x", DomId(7), Errno::ESRCH).is_no_such_domain());
        assert_eq!(Errno(12345).to_string(), "error number 12345");
    }
}
