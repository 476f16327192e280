//! Permissions of a node: `<access><domid>`, the first entry is the owner and the rights of everybody not named.

use crate::errno::Errno;
use crate::payload::strings;
use std::fmt;

/// Rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Access {
    /// May read.
    pub read: bool,
    /// May write.
    pub write: bool,
}

impl Access {
    /// No access, `n`.
    pub const NONE: Access = Access { read: false, write: false };
    /// Read only, `r`.
    pub const READ: Access = Access { read: true, write: false };
    /// Write only, `w`.
    pub const WRITE: Access = Access { read: false, write: true };
    /// Both, `b`.
    pub const BOTH: Access = Access { read: true, write: true };

    /// The letter of the protocol.
    pub fn letter(self) -> char {
        match (self.read, self.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        }
    }

    /// From the letter of the protocol.
    pub fn from_letter(b: u8) -> Option<Access> {
        Some(match b {
            b'n' => Access::NONE,
            b'r' => Access::READ,
            b'w' => Access::WRITE,
            b'b' => Access::BOTH,
            _ => return None,
        })
    }
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Perm {
    /// Rights of `domid`; in the first entry, of every domain without an entry.
    pub access: Access,
    /// The domain.
    pub domid: u16,
    /// The domain it meant is gone: the entry is kept and shown, but gives nothing (stream: flag 0x01).
    pub stale: bool,
}

impl Perm {
    /// An entry that counts.
    pub fn new(access: Access, domid: u16) -> Perm {
        Perm { access, domid, stale: false }
    }

    /// Reads `<letter><domid>`.
    ///
    /// # Errors
    /// `EINVAL`; `ENOENT` for a number that no domain has.
    pub fn parse(s: &[u8]) -> Result<Perm, Errno> {
        let (&letter, digits) = s.split_first().ok_or(Errno::EINVAL)?;
        let access = Access::from_letter(letter).ok_or(Errno::EINVAL)?;
        // strtol(…, 0) of the C daemon takes hexadecimal too, and clients may have come to use it.
        let text = std::str::from_utf8(digits).map_err(|_| Errno::EINVAL)?;
        let domid: u32 = match text.strip_prefix("0x") {
            Some(hex) if !hex.starts_with('+') => u32::from_str_radix(hex, 16).map_err(|_| Errno::EINVAL)?,
            _ => crate::payload::decimal(digits)?,
        };
        Ok(Perm::new(access, u16::try_from(domid).map_err(|_| Errno::ENOENT)?))
    }
}

impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.access.letter(), self.domid)
    }
}

/// All entries of a node; never empty, the first is the owner.
pub type Perms = Vec<Perm>;

/// Reads the NUL-terminated entries of `SET_PERMS` or of a `GET_PERMS` reply.
pub fn parse_list(payload: &[u8]) -> Result<Perms, Errno> {
    let v = strings(payload).map(Perm::parse).collect::<Result<Vec<_>, _>>()?;
    if v.is_empty() { Err(Errno::EINVAL) } else { Ok(v) }
}

/// The NUL-terminated entries.
pub fn format_list(perms: &[Perm]) -> Vec<u8> {
    crate::payload::join(perms.iter().map(Perm::to_string))
}
