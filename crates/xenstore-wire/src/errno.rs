//! The errors a xenstored may answer with. The wire carries the *name* (`xsd_errors` in `io/xs_wire.h`), never a number.

use std::fmt;

macro_rules! errnos {
    ($($name:ident = $num:literal, $text:literal;)*) => {
        /// An error as xenstored reports it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(clippy::upper_case_acronyms, reason = "the protocol's own names")]
        pub enum Errno { $(#[doc = $text] $name),* }

        impl Errno {
            /// Every error, in the order of `xsd_errors`.
            pub const ALL: &'static [Errno] = &[$(Errno::$name),*];

            /// The name on the wire, without its NUL.
            pub fn name(self) -> &'static str {
                match self { $(Errno::$name => stringify!($name)),* }
            }

            /// Linux' number for it, as libxenstore puts it into `errno`.
            pub fn number(self) -> i32 {
                match self { $(Errno::$name => $num),* }
            }

            fn text(self) -> &'static str {
                match self { $(Errno::$name => $text),* }
            }
        }
    };
}

errnos! {
    EINVAL = 22, "invalid argument";
    EACCES = 13, "permission denied";
    EEXIST = 17, "exists already";
    EISDIR = 21, "is a directory";
    ENOENT = 2, "no such node";
    ENOMEM = 12, "out of memory (or over the memory quota)";
    ENOSPC = 28, "quota exceeded";
    EIO = 5, "input/output error";
    ENOTEMPTY = 39, "not empty";
    ENOSYS = 38, "operation not known";
    EROFS = 30, "read only";
    EBUSY = 16, "busy";
    EAGAIN = 11, "conflict, try the transaction again";
    EISCONN = 106, "already connected";
    E2BIG = 7, "too big";
    EPERM = 1, "not permitted";
}

impl Errno {
    /// Reads a name as it stands in an `ERROR` reply, with or without its NUL.
    pub fn from_payload(payload: &[u8]) -> Option<Errno> {
        let name = payload.strip_suffix(&[0]).unwrap_or(payload);
        Errno::ALL.iter().copied().find(|e| e.name().as_bytes() == name)
    }

    /// Payload of the `ERROR` reply: the name and a NUL.
    pub fn payload(self) -> Vec<u8> {
        let mut v = self.name().as_bytes().to_vec();
        v.push(0);
        v
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.text())
    }
}

impl std::error::Error for Errno {}
