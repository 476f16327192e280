//! The xenstore-migration stream (Xen `docs/designs/xenstore-migration.md`), versions 1 and 2, both byte orders.
//!
//! The stock daemon (4.17, `tools/xenstore/xenstored_*.c`) counts a record's padding into its length; the document
//! does not. The reader takes both, the writer does as the stock daemon does, so that it reads what we write.
//!
//! One record is ours and lies in the range reserved for future use: [`Record::NodeMeta`]. A stock daemon skips it.

use crate::perm::{Access, Perm, Perms};
use thiserror::Error;

const IDENT: &[u8; 8] = b"xenstore";
const PREAMBLE: usize = 16;
/// Depth of a watch without limit, as the wire has it.
pub const DEPTH_UNLIMITED: u16 = 0xffff;

mod kind {
    pub const END: u32 = 0;
    pub const GLOBAL: u32 = 1;
    pub const CONNECTION: u32 = 2;
    pub const WATCH: u32 = 3;
    pub const TRANSACTION: u32 = 4;
    pub const NODE: u32 = 5;
    pub const GLOBAL_QUOTA: u32 = 6;
    pub const DOMAIN: u32 = 7;
    pub const WATCH_EXTENDED: u32 = 8;
    /// "FERR" as a big-endian number.
    pub const NODE_META: u32 = 0x4645_5252;
}

/// Version and byte order of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// 1 or 2.
    pub version: u32,
    /// Big-endian fields in the records (the preamble always is big endian).
    pub big_endian: bool,
}

impl Format {
    /// What the stock daemons 4.17 to 4.20 write and read.
    pub const V1: Format = Format { version: 1, big_endian: false };
    /// With depths of watches and features of domains.
    pub const V2: Format = Format { version: 2, big_endian: false };
}

/// How a connection is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnSpec {
    /// A ring shared with a domain.
    Ring {
        /// The domain.
        domid: u16,
        /// The domain it acts for, or [`crate::DOMID_INVALID`].
        tdomid: u16,
        /// The daemon's local port.
        evtchn: u32,
    },
    /// A socket.
    Socket {
        /// Its descriptor.
        fd: i32,
    },
}

/// What a transaction did with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TxAccess {
    /// Read (0x0001).
    pub read: bool,
    /// Written (0x0002).
    pub written: bool,
}

/// A quota's name and value; 0 is "unlimited".
pub type Quota = (Vec<u8>, u32);

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Last record.
    End,
    /// Descriptors of the daemon, for live update.
    Global {
        /// Listening socket or -1.
        socket_fd: i32,
        /// Event channel device or -1.
        evtchn_fd: i32,
    },
    /// A connection and its bytes in flight.
    Connection {
        /// Non-zero; other records refer to it.
        conn_id: u32,
        /// Ring or socket.
        spec: ConnSpec,
        /// Bytes read and not processed.
        in_data: Vec<u8>,
        /// How many of `out_data` belong to a message whose beginning is already out.
        out_resp_len: u16,
        /// Bytes not yet written.
        out_data: Vec<u8>,
    },
    /// A watch of a connection.
    Watch {
        /// The connection.
        conn_id: u32,
        /// Path as the client gave it (may be relative), without NUL.
        path: Vec<u8>,
        /// Token without NUL.
        token: Vec<u8>,
        /// Depth; `Some` makes an extended record, which only version 2 has. [`DEPTH_UNLIMITED`] is no limit.
        depth: Option<u16>,
    },
    /// An open transaction.
    Transaction {
        /// The connection.
        conn_id: u32,
        /// Its id.
        tx_id: u32,
    },
    /// A node, committed (`conn_id` 0) or as a transaction sees it.
    Node {
        /// The connection whose transaction it is, or 0.
        conn_id: u32,
        /// The transaction, or 0.
        tx_id: u32,
        /// What the transaction did.
        access: TxAccess,
        /// Owner first; empty for a node deleted in a transaction.
        perms: Perms,
        /// Absolute path or a special event, without NUL.
        path: Vec<u8>,
        /// Value, any bytes.
        value: Vec<u8>,
    },
    /// Default quotas.
    GlobalQuota {
        /// Those of each domain.
        domain: Vec<Quota>,
        /// Those of the daemon as a whole.
        global: Vec<Quota>,
    },
    /// Quotas and features of one domain.
    Domain {
        /// The domain.
        domid: u16,
        /// Features at offset 2064 of its ring page; version 2.
        features: u32,
        /// Quotas.
        quotas: Vec<Quota>,
    },
    /// Ours: about the node record before it.
    NodeMeta {
        /// Generation that the node had (in a transaction: when it was first accessed). `u64::MAX`: it did not exist.
        generation: u64,
        /// For a node of a transaction: fire watches at commit (bit 0), only exact ones (bit 1), conflict found
        /// already (bit 2), modified (bit 3).
        flags: u32,
    },
    /// A type that we don't know.
    Unknown {
        /// The type.
        kind: u32,
        /// Its body, with padding if that was counted.
        body: Vec<u8>,
    },
}

/// What is wrong with a stream.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StreamError {
    /// Not `xenstore`.
    #[error("this is no xenstore-migration stream (it does not begin with \"xenstore\")")]
    Ident,
    /// A version beyond 2 or 0.
    #[error("version {0} of the xenstore-migration stream is not known (1 and 2 are)")]
    Version(u32),
    /// Reserved flags are set.
    #[error("unknown flags {0:#x} in the preamble of the xenstore-migration stream")]
    Flags(u32),
    /// It ends early.
    #[error("xenstore-migration stream ends at byte {offset} inside {what}")]
    Truncated {
        /// Offset of what is incomplete, in bytes from the stream's start.
        offset: usize,
        /// What it is.
        what: &'static str,
    },
    /// A field contradicts the rest.
    #[error("xenstore-migration stream, record at byte {offset}: {what}")]
    Invalid {
        /// Offset of the record.
        offset: usize,
        /// Which field.
        what: &'static str,
    },
}

/// A record that the format can't carry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("cannot be written to a xenstore-migration stream of version {version}: {what}")]
pub struct EncodeError {
    /// Version asked for.
    pub version: u32,
    /// What does not fit.
    pub what: &'static str,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    big: bool,
    record: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &'static str) -> Result<&'a [u8], StreamError> {
        if n > self.bytes.len() {
            return Err(StreamError::Invalid { offset: self.record, what });
        }
        let (a, b) = self.bytes.split_at(n);
        self.bytes = b;
        Ok(a)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StreamError> {
        let mut a = [0; N];
        a.copy_from_slice(self.take(N, what)?);
        Ok(a)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, StreamError> {
        Ok(self.array::<1>(what)?[0])
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, StreamError> {
        let a = self.array(what)?;
        Ok(if self.big { u16::from_be_bytes(a) } else { u16::from_le_bytes(a) })
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, StreamError> {
        let a = self.array(what)?;
        Ok(if self.big { u32::from_be_bytes(a) } else { u32::from_le_bytes(a) })
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, StreamError> {
        let a = self.array(what)?;
        Ok(if self.big { u64::from_be_bytes(a) } else { u64::from_le_bytes(a) })
    }

    /// A string whose length counts its NUL.
    fn string(&mut self, len: u16, what: &'static str) -> Result<Vec<u8>, StreamError> {
        let s = self.take(usize::from(len), what)?;
        match s.split_last() {
            Some((0, s)) if !s.contains(&0) => Ok(s.to_vec()),
            _ => Err(StreamError::Invalid { offset: self.record, what }),
        }
    }

    fn quotas(&mut self, n: usize) -> Result<Vec<u32>, StreamError> {
        if n > self.bytes.len() / 4 {
            return Err(StreamError::Invalid { offset: self.record, what: "number of quota values" });
        }
        (0..n).map(|_| self.u32("quota value")).collect()
    }

    fn names(&mut self, values: Vec<u32>) -> Result<Vec<Quota>, StreamError> {
        let mut out = Vec::with_capacity(values.len());
        for v in values {
            let (name, rest) = crate::payload::split_first(self.bytes)
                .map_err(|_| StreamError::Invalid { offset: self.record, what: "quota names" })?;
            self.bytes = rest;
            out.push((name.to_vec(), v));
        }
        Ok(out)
    }
}

/// Reads a stream record by record. Ends after the END record or at the first error.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    pos: usize,
    format: Format,
    done: bool,
}

impl<'a> Reader<'a> {
    /// Checks the preamble.
    pub fn new(bytes: &'a [u8]) -> Result<Reader<'a>, StreamError> {
        let pre: &[u8; PREAMBLE] =
            bytes.first_chunk().ok_or(StreamError::Truncated { offset: 0, what: "the preamble" })?;
        if &pre[..8] != IDENT {
            return Err(StreamError::Ident);
        }
        let be = |i: usize| u32::from_be_bytes([pre[i], pre[i + 1], pre[i + 2], pre[i + 3]]);
        let version = be(8);
        if !(1..=2).contains(&version) {
            return Err(StreamError::Version(version));
        }
        let flags = be(12);
        if flags & !1 != 0 {
            return Err(StreamError::Flags(flags));
        }
        Ok(Reader { bytes, pos: PREAMBLE, format: Format { version, big_endian: flags & 1 != 0 }, done: false })
    }

    /// Version and byte order.
    pub fn format(&self) -> Format {
        self.format
    }

    fn next_record(&mut self) -> Result<Record, StreamError> {
        let at = self.pos;
        let mut c = Cursor { bytes: self.bytes.get(at..).unwrap_or(&[]), big: self.format.big_endian, record: at };
        let truncated = |what| StreamError::Truncated { offset: at, what };
        let kind = c.u32("").map_err(|_| truncated("a record's header (no END record)"))?;
        let len = c.u32("").map_err(|_| truncated("a record's header"))? as usize;
        let body = c.take(len, "").map_err(|_| truncated("a record's body"))?;
        // Padding that the length does not count. The last record may lack it.
        let pad = len.next_multiple_of(8) - len;
        self.pos = (at + 8 + len + pad).min(self.bytes.len());
        let c = Cursor { bytes: body, big: self.format.big_endian, record: at };
        decode(self.format, kind, body, c)
    }
}

fn decode(format: Format, type_: u32, body: &[u8], mut c: Cursor<'_>) -> Result<Record, StreamError> {
    let record = c.record;
    let invalid = |what| StreamError::Invalid { offset: record, what };
    Ok(match type_ {
        kind::END => Record::End,
        kind::GLOBAL => {
            Record::Global { socket_fd: c.u32("rw-socket-fd")? as i32, evtchn_fd: c.u32("evtchn-fd")? as i32 }
        }
        kind::CONNECTION => {
            let conn_id = c.u32("conn-id")?;
            let conn_type = c.u16("conn-type")?;
            c.u16("pad")?;
            let spec = match conn_type {
                0 => ConnSpec::Ring { domid: c.u16("domid")?, tdomid: c.u16("tdomid")?, evtchn: c.u32("evtchn")? },
                1 => {
                    let fd = c.u32("socket-fd")? as i32;
                    c.u32("pad")?;
                    ConnSpec::Socket { fd }
                }
                _ => return Err(invalid("conn-type is not known")),
            };
            let in_len = usize::from(c.u16("in-data-len")?);
            let out_resp_len = c.u16("out-resp-len")?;
            let out_len = c.u32("out-data-len")? as usize;
            if conn_id == 0 {
                return Err(invalid("conn-id is 0"));
            }
            if usize::from(out_resp_len) > out_len {
                return Err(invalid("out-resp-len is more than out-data-len"));
            }
            let in_data = c.take(in_len, "in-data-len is more than there is")?.to_vec();
            let out_data = c.take(out_len, "out-data-len is more than there is")?.to_vec();
            Record::Connection { conn_id, spec, in_data, out_resp_len, out_data }
        }
        kind::WATCH | kind::WATCH_EXTENDED => {
            let conn_id = c.u32("conn-id")?;
            let path_len = c.u16("wpath-len")?;
            let token_len = c.u16("token-len")?;
            let depth = if type_ == kind::WATCH_EXTENDED {
                if format.version < 2 {
                    return Err(invalid("WATCH_DATA_EXTENDED in a stream of version 1"));
                }
                let d = c.u16("depth")?;
                c.u16("pad")?;
                Some(d)
            } else {
                None
            };
            let path = c.string(path_len, "wpath")?;
            let token = c.string(token_len, "token")?;
            Record::Watch { conn_id, path, token, depth }
        }
        kind::TRANSACTION => Record::Transaction { conn_id: c.u32("conn-id")?, tx_id: c.u32("tx-id")? },
        kind::NODE => {
            let conn_id = c.u32("conn-id")?;
            let tx_id = c.u32("tx-id")?;
            let path_len = c.u16("path-len")?;
            let value_len = usize::from(c.u16("value-len")?);
            let access = c.u16("access")?;
            let count = usize::from(c.u16("perm-count")?);
            if count > c.bytes.len() / 4 {
                return Err(invalid("perm-count is more than there is"));
            }
            if count == 0 && conn_id == 0 {
                return Err(invalid("a node without an owner"));
            }
            let mut perms = Vec::with_capacity(count);
            for _ in 0..count {
                let letter = c.u8("perm")?;
                let flags = c.u8("flags")?;
                let domid = c.u16("domid")?;
                let access = Access::from_letter(letter)
                    .ok_or(StreamError::Invalid { offset: c.record, what: "permission is none of w, r, b, n" })?;
                perms.push(Perm { access, domid, stale: flags & 1 != 0 });
            }
            let path = c.string(path_len, "path")?;
            let value = c.take(value_len, "value-len is more than there is")?.to_vec();
            let access = TxAccess { read: access & 1 != 0, written: access & 2 != 0 };
            Record::Node { conn_id, tx_id, access, perms, path, value }
        }
        kind::GLOBAL_QUOTA => {
            let nd = usize::from(c.u16("n-dom-quota")?);
            let ng = usize::from(c.u16("n-glob-quota")?);
            let mut domain = c.quotas(nd + ng)?;
            let global = domain.split_off(nd);
            let domain = c.names(domain)?;
            Record::GlobalQuota { domain, global: c.names(global)? }
        }
        kind::DOMAIN => {
            let domid = c.u16("domain-id")?;
            let n = usize::from(c.u16("n-quota")?);
            let features = c.u32("features")?;
            let values = c.quotas(n)?;
            Record::Domain { domid, features, quotas: c.names(values)? }
        }
        kind::NODE_META => Record::NodeMeta { generation: c.u64("generation")?, flags: c.u32("flags")? },
        kind => Record::Unknown { kind, body: body.to_vec() },
    })
}

impl Iterator for Reader<'_> {
    type Item = Result<Record, StreamError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let r = self.next_record();
        self.done = matches!(r, Err(_) | Ok(Record::End));
        Some(r)
    }
}

/// Reads all records up to END, which is left out.
pub fn read_all(bytes: &[u8]) -> Result<(Format, Vec<Record>), StreamError> {
    let r = Reader::new(bytes)?;
    let format = r.format();
    let mut v = r.collect::<Result<Vec<_>, _>>()?;
    v.pop();
    Ok((format, v))
}

/// Writes a stream into memory.
#[derive(Debug, Clone)]
pub struct Writer {
    format: Format,
    out: Vec<u8>,
}

impl Writer {
    /// Begins with the preamble.
    pub fn new(format: Format) -> Writer {
        let mut out = IDENT.to_vec();
        out.extend_from_slice(&format.version.to_be_bytes());
        out.extend_from_slice(&u32::from(format.big_endian).to_be_bytes());
        Writer { format, out }
    }

    fn u16(&mut self, v: u16) {
        let b = if self.format.big_endian { v.to_be_bytes() } else { v.to_le_bytes() };
        self.out.extend_from_slice(&b);
    }

    fn u32(&mut self, v: u32) {
        let b = if self.format.big_endian { v.to_be_bytes() } else { v.to_le_bytes() };
        self.out.extend_from_slice(&b);
    }

    fn len(&mut self, n: usize, what: &'static str) -> Result<(), EncodeError> {
        let n = u16::try_from(n).map_err(|_| EncodeError { version: self.format.version, what })?;
        self.u16(n);
        Ok(())
    }

    fn quota_values(&mut self, q: &[Quota]) {
        for (_, v) in q {
            self.u32(*v);
        }
    }

    fn quota_names(&mut self, q: &[Quota]) {
        for (n, _) in q {
            self.out.extend_from_slice(n);
            self.out.push(0);
        }
    }

    /// Appends a record. On an error nothing is appended.
    pub fn record(&mut self, r: &Record) -> Result<(), EncodeError> {
        let start = self.out.len();
        let done = self.try_record(r);
        match done {
            Ok(()) => {
                let body = (self.out.len() - start - 8).next_multiple_of(8);
                self.out.resize(start + 8 + body, 0);
                // The length of a known record counts its padding, as the stock daemon has it; one that is only passed on keeps
                // its own, or its reader would take the padding for a part of it.
                let counted = if let Record::Unknown { body, .. } = r { body.len() } else { body };
                let len = u32::try_from(counted)
                    .map_err(|_| EncodeError { version: self.format.version, what: "a record of more than 4 GiB" });
                let len = match len {
                    Ok(n) if self.format.big_endian => n.to_be_bytes(),
                    Ok(n) => n.to_le_bytes(),
                    Err(e) => {
                        self.out.truncate(start);
                        return Err(e);
                    }
                };
                self.out[start + 4..start + 8].copy_from_slice(&len);
                Ok(())
            }
            Err(e) => {
                self.out.truncate(start);
                Err(e)
            }
        }
    }

    fn try_record(&mut self, r: &Record) -> Result<(), EncodeError> {
        let fail = |w: &Writer, what| Err(EncodeError { version: w.format.version, what });
        let kind = match r {
            Record::End => kind::END,
            Record::Global { .. } => kind::GLOBAL,
            Record::Connection { .. } => kind::CONNECTION,
            Record::Watch { depth: None, .. } => kind::WATCH,
            Record::Watch { depth: Some(_), .. } => kind::WATCH_EXTENDED,
            Record::Transaction { .. } => kind::TRANSACTION,
            Record::Node { .. } => kind::NODE,
            Record::GlobalQuota { .. } => kind::GLOBAL_QUOTA,
            Record::Domain { .. } => kind::DOMAIN,
            Record::NodeMeta { .. } => kind::NODE_META,
            Record::Unknown { kind, .. } => *kind,
        };
        self.u32(kind);
        self.u32(0);
        match r {
            Record::End => {}
            Record::Global { socket_fd, evtchn_fd } => {
                self.u32(*socket_fd as u32);
                self.u32(*evtchn_fd as u32);
            }
            Record::Connection { conn_id, spec, in_data, out_resp_len, out_data } => {
                self.u32(*conn_id);
                self.u16(matches!(spec, ConnSpec::Socket { .. }).into());
                self.u16(0);
                match *spec {
                    ConnSpec::Ring { domid, tdomid, evtchn } => {
                        self.u16(domid);
                        self.u16(tdomid);
                        self.u32(evtchn);
                    }
                    ConnSpec::Socket { fd } => {
                        self.u32(fd as u32);
                        self.u32(0);
                    }
                }
                self.len(in_data.len(), "more than 65535 unprocessed bytes")?;
                self.u16(*out_resp_len);
                match u32::try_from(out_data.len()) {
                    Ok(n) => self.u32(n),
                    Err(_) => return fail(self, "more than 4 GiB of unwritten bytes"),
                }
                self.out.extend_from_slice(in_data);
                self.out.extend_from_slice(out_data);
            }
            Record::Watch { conn_id, path, token, depth } => {
                if depth.is_some() && self.format.version < 2 {
                    return fail(self, "a watch with a depth");
                }
                self.u32(*conn_id);
                self.len(path.len() + 1, "the path of a watch")?;
                self.len(token.len() + 1, "the token of a watch")?;
                if let Some(d) = depth {
                    self.u16(*d);
                    self.u16(0);
                }
                self.out.extend_from_slice(path);
                self.out.push(0);
                self.out.extend_from_slice(token);
                self.out.push(0);
            }
            Record::Transaction { conn_id, tx_id } => {
                self.u32(*conn_id);
                self.u32(*tx_id);
            }
            Record::Node { conn_id, tx_id, access, perms, path, value } => {
                self.u32(*conn_id);
                self.u32(*tx_id);
                self.len(path.len() + 1, "the path of a node")?;
                self.len(value.len(), "the value of a node")?;
                self.u16(u16::from(access.read) | u16::from(access.written) << 1);
                self.len(perms.len(), "the permissions of a node")?;
                for p in perms {
                    self.out.push(p.access.letter() as u8);
                    self.out.push(p.stale.into());
                    self.u16(p.domid);
                }
                self.out.extend_from_slice(path);
                self.out.push(0);
                self.out.extend_from_slice(value);
            }
            Record::GlobalQuota { domain, global } => {
                self.len(domain.len(), "the number of quotas")?;
                self.len(global.len(), "the number of quotas")?;
                self.quota_values(domain);
                self.quota_values(global);
                self.quota_names(domain);
                self.quota_names(global);
            }
            Record::Domain { domid, features, quotas } => {
                self.u16(*domid);
                self.len(quotas.len(), "the number of quotas")?;
                self.u32(*features);
                self.quota_values(quotas);
                self.quota_names(quotas);
            }
            Record::NodeMeta { generation, flags } => {
                let b = if self.format.big_endian { generation.to_be_bytes() } else { generation.to_le_bytes() };
                self.out.extend_from_slice(&b);
                self.u32(*flags);
            }
            Record::Unknown { body, .. } => self.out.extend_from_slice(body),
        }
        Ok(())
    }

    /// Ends the stream and hands it out.
    pub fn finish(mut self) -> Vec<u8> {
        self.u32(kind::END);
        self.u32(0);
        self.out
    }
}

/// Writes records (without END) as one stream.
pub fn write_all<'a>(format: Format, records: impl IntoIterator<Item = &'a Record>) -> Result<Vec<u8>, EncodeError> {
    let mut w = Writer::new(format);
    for r in records {
        w.record(r)?;
    }
    Ok(w.finish())
}
