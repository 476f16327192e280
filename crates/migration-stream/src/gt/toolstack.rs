//! Records of the libxl layer: state that the toolstack and the store hold.

use serde_json::Value;

use super::{Type, bad, begin, decode_checksum, encode_checksum, recognise, start};
use crate::error::{ErrorKind, Layer};
use crate::wire::{Field, Reader, hex, object, put_blob, put_text};

/// First eight octets of a xenstore-migration stream (docs/designs/xenstore-migration.md).
pub const XENSTORE_IDENT: &[u8; 8] = b"xenstore";

/// Kinds of domain; on the wire the numbers of `libxl_domain_type`: HVM 1, PVH 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainKind {
    /// `type="hvm"`.
    Hvm,
    /// `type="pvh"`.
    Pvh,
}

impl DomainKind {
    /// libxl's word, as in `/libxl/<domid>/type`.
    pub fn name(self) -> &'static str {
        match self {
            DomainKind::Hvm => "hvm",
            DomainKind::Pvh => "pvh",
        }
    }
}

/// GT_IDENTITY: which domain this is and where it comes from. First record, so that a receiver can refuse early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The domain's id, which it keeps.
    pub domid: u16,
    /// HVM or PVH.
    pub kind: DomainKind,
    /// UUID.
    pub uuid: [u8; 16],
    /// The domain's name.
    pub name: String,
    /// The sending host's name, for messages.
    pub host: String,
    /// Xen's version there: "4.17.5".
    pub xen_version: String,
    /// Build-id of the hypervisor there, in hexadecimal; empty if it has none.
    pub build_id: String,
    /// The program that wrote the stream, with its version.
    pub writer: String,
}

impl Identity {
    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        super::no_entries(begin(&mut reader)?)?;
        let domid: u16 = reader.get("domid")?;
        if !(1..0x7ff0).contains(&domid) {
            return Err(bad("domid", domid, "guests have ids from 1 to 0x7fef"));
        }
        let kind = match reader.get::<u16>("kind")? {
            1 => DomainKind::Hvm,
            3 => DomainKind::Pvh,
            other => return Err(bad("kind", other, "neither HVM (1) nor PVH (3)")),
        };
        reader.zero(4, "reserved")?;
        let identity = Identity {
            domid,
            kind,
            uuid: reader.get("uuid")?,
            name: reader.text("name")?,
            host: reader.text("host")?,
            xen_version: reader.text("xen_version")?,
            build_id: reader.text("build_id")?,
            writer: reader.text("writer")?,
        };
        reader.finish()?;
        Ok(identity)
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = start(0);
        self.domid.put(&mut body);
        match self.kind {
            DomainKind::Hvm => 1u16,
            DomainKind::Pvh => 3u16,
        }
        .put(&mut body);
        0u32.put(&mut body);
        self.uuid.put(&mut body);
        for text in [&self.name, &self.host, &self.xen_version, &self.build_id, &self.writer] {
            put_text(&mut body, text);
        }
        body
    }

    fn json(&self) -> Value {
        object([
            ("domid", self.domid.into()),
            ("kind", self.kind.name().into()),
            ("uuid", uuid_text(&self.uuid).into()),
            ("name", self.name.as_str().into()),
            ("host", self.host.as_str().into()),
            ("xen_version", self.xen_version.as_str().into()),
            ("build_id", self.build_id.as_str().into()),
            ("writer", self.writer.as_str().into()),
        ])
    }
}

/// A UUID in its usual form.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let digits = hex(uuid);
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// An entry of GT_DEVICES: a PV device that moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// libxl's device class: "vif", "vbd", "console".
    pub class: String,
    /// Device number.
    pub devid: u32,
    /// Domain with the backend.
    pub backend_domid: u16,
    /// The frontend's state node at the capture.
    pub frontend_state: u8,
    /// The backend's state node at the capture.
    pub backend_state: u8,
    /// The frontend's area in the store.
    pub frontend: String,
    /// The backend's area in the store.
    pub backend: String,
    /// What the destination must offer: "bridge", "params", "sectors", "sector-size" and so on.
    pub needs: Vec<(String, String)>,
}

impl Device {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, ErrorKind> {
        let devid = reader.get("devid")?;
        let backend_domid = reader.get("backend_domid")?;
        let frontend_state: u8 = reader.get("frontend_state")?;
        let backend_state: u8 = reader.get("backend_state")?;
        if frontend_state.max(backend_state) > 8 {
            return Err(bad("state", frontend_state.max(backend_state), "states of the xenbus end at 8"));
        }
        let class = reader.text("class")?;
        let frontend = reader.text("frontend")?;
        let backend = reader.text("backend")?;
        let count: u16 = reader.get("needs")?;
        let needs = (0..count).map(|_| Ok((reader.text("key")?, reader.text("value")?))).collect::<Result<_, _>>()?;
        Ok(Device { class, devid, backend_domid, frontend_state, backend_state, frontend, backend, needs })
    }

    fn put(&self, body: &mut Vec<u8>) {
        self.devid.put(body);
        self.backend_domid.put(body);
        self.frontend_state.put(body);
        self.backend_state.put(body);
        for text in [&self.class, &self.frontend, &self.backend] {
            put_text(body, text);
        }
        let needs = &self.needs[..self.needs.len().min(usize::from(u16::MAX))];
        (needs.len() as u16).put(body);
        for (key, value) in needs {
            put_text(body, key);
            put_text(body, value);
        }
    }

    fn json(&self) -> Value {
        object([
            ("class", self.class.as_str().into()),
            ("devid", self.devid.into()),
            ("backend_domid", self.backend_domid.into()),
            ("frontend_state", self.frontend_state.into()),
            ("backend_state", self.backend_state.into()),
            ("frontend", self.frontend.as_str().into()),
            ("backend", self.backend.as_str().into()),
            ("needs", Value::Object(self.needs.iter().map(|(k, v)| (k.clone(), v.as_str().into())).collect())),
        ])
    }
}

/// A node of the store that the toolstack keeps about the domain, outside what the guest can see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Absolute path on the source.
    pub path: String,
    /// Its value; any bytes.
    pub value: Vec<u8>,
    /// Its permissions as the store's protocol writes them, the owner first: "n0", "r7".
    pub perms: Vec<String>,
}

/// A file of libxl's userdata (`/var/lib/xen/userdata-d.<domid>.<uuid>.<name>`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Userdata {
    /// libxl's name for it: "libxl-json".
    pub name: String,
    /// The file's contents.
    pub contents: Vec<u8>,
}

/// GT_TOOLSTACK: libxl's own records, so that stock `xl` manages the domain on the destination.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Toolstack {
    /// Nodes of `/libxl/<domid>`, `/vm/<uuid>` and the backends' areas.
    pub nodes: Vec<Node>,
    /// Userdata files.
    pub userdata: Vec<Userdata>,
}

impl Toolstack {
    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let count = begin(&mut reader)?;
        let files: u32 = reader.get("userdata")?;
        reader.zero(4, "reserved")?;
        let mut toolstack = Toolstack::default();
        for _ in 0..count {
            let path = reader.text("path")?;
            if !path.starts_with('/') {
                return Err(ErrorKind::BadText { field: "path" });
            }
            let value = reader.blob("value")?.to_vec();
            let perms: u16 = reader.get("perms")?;
            let perms = (0..perms).map(|_| reader.text("perm")).collect::<Result<_, _>>()?;
            toolstack.nodes.push(Node { path, value, perms });
        }
        for _ in 0..files {
            let name = reader.text("name")?;
            // The name becomes part of a file name.
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
                return Err(ErrorKind::BadText { field: "name" });
            }
            toolstack.userdata.push(Userdata { name, contents: reader.blob("contents")?.to_vec() });
        }
        reader.finish()?;
        Ok(toolstack)
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = start(self.nodes.len());
        (self.userdata.len() as u32).put(&mut body);
        0u32.put(&mut body);
        for node in &self.nodes {
            put_text(&mut body, &node.path);
            put_blob(&mut body, &node.value);
            (node.perms.len() as u16).put(&mut body);
            node.perms.iter().for_each(|perm| put_text(&mut body, perm));
        }
        for file in &self.userdata {
            put_text(&mut body, &file.name);
            put_blob(&mut body, &file.contents);
        }
        body
    }

    fn json(&self) -> Value {
        let nodes: Value = self
            .nodes
            .iter()
            .map(|node| {
                object([
                    ("path", node.path.as_str().into()),
                    ("value", String::from_utf8_lossy(&node.value).into()),
                    ("perms", node.perms.join(",").into()),
                ])
            })
            .collect();
        let files: Value = self
            .userdata
            .iter()
            .map(|file| object([("name", file.name.as_str().into()), ("bytes", file.contents.len().into())]))
            .collect();
        object([("nodes", nodes), ("userdata", files)])
    }
}

/// A GT record of the libxl layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LibxlRecord {
    Identity(Identity),
    Devices(Vec<Device>),
    /// A xenstore-migration stream with the guest's part of the store.
    Xenstore(Vec<u8>),
    Toolstack(Toolstack),
    /// CRC-32 of every byte of the libxl layer before this record: header and records, the libxc image left out.
    Checksum(u32),
}

impl LibxlRecord {
    /// Which record it is.
    pub fn gt_type(&self) -> Type {
        match self {
            LibxlRecord::Identity(_) => Type::Identity,
            LibxlRecord::Devices(_) => Type::Devices,
            LibxlRecord::Xenstore(_) => Type::Xenstore,
            LibxlRecord::Toolstack(_) => Type::Toolstack,
            LibxlRecord::Checksum(_) => Type::StreamChecksum,
        }
    }

    /// Reads a body; `None` if the type is not a GT record. The bool tells whether the optional bit was set.
    pub fn decode(rtype: u32, body: &[u8]) -> Result<Option<(Self, bool)>, ErrorKind> {
        let Some((gt, optional)) = recognise(Layer::Libxl, rtype)? else { return Ok(None) };
        let record = match gt {
            Type::Identity => LibxlRecord::Identity(Identity::decode(body)?),
            Type::Devices => {
                let mut reader = Reader::new(body);
                let count = begin(&mut reader)?;
                let devices = (0..count).map(|_| Device::decode(&mut reader)).collect::<Result<_, _>>()?;
                reader.finish()?;
                LibxlRecord::Devices(devices)
            }
            Type::Xenstore => {
                let mut reader = Reader::new(body);
                super::no_entries(begin(&mut reader)?)?;
                let stream = reader.rest();
                if !stream.starts_with(XENSTORE_IDENT) {
                    return Err(ErrorKind::Missing { what: "the ident of a xenstore-migration stream" });
                }
                LibxlRecord::Xenstore(stream.to_vec())
            }
            Type::Toolstack => LibxlRecord::Toolstack(Toolstack::decode(body)?),
            Type::StreamChecksum => LibxlRecord::Checksum(decode_checksum(body)?),
            _ => return Ok(None),
        };
        Ok(Some((record, optional)))
    }

    /// Type on the wire, without the optional bit, and body.
    pub fn encode(&self) -> (u32, Vec<u8>) {
        let body = match self {
            LibxlRecord::Identity(identity) => identity.encode(),
            LibxlRecord::Devices(devices) => {
                let mut body = start(devices.len());
                devices.iter().for_each(|device| device.put(&mut body));
                body
            }
            LibxlRecord::Xenstore(stream) => {
                let mut body = start(0);
                body.extend_from_slice(stream);
                body
            }
            LibxlRecord::Toolstack(toolstack) => toolstack.encode(),
            LibxlRecord::Checksum(crc) => encode_checksum(*crc),
        };
        (self.gt_type().number(), body)
    }

    /// The record for reports.
    pub fn json(&self) -> Value {
        match self {
            LibxlRecord::Identity(identity) => identity.json(),
            LibxlRecord::Devices(devices) => devices.iter().map(Device::json).collect(),
            LibxlRecord::Xenstore(stream) => object([("bytes", stream.len().into())]),
            LibxlRecord::Toolstack(toolstack) => toolstack.json(),
            LibxlRecord::Checksum(crc) => object([("crc32", format!("{crc:#010x}").into())]),
        }
    }
}
