//! Reads many xenstore nodes with many requests under way, so that one wait serves a whole batch.
//!
//! Each request goes through a descriptor of its own. The kernel's device does take a second request while the first is
//! under way, but keeps one buffer for a descriptor and overwrites the first one's path if it had not gone out yet
//! (drivers/xen/xenbus/xenbus_dev_frontend.c, Linux 6.1: `xenbus_dev_request_and_reply` takes the body by reference). Seen:
//! values under other nodes' names.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use witness::report::StoreNode;
use witness::store_rules::escape;
use xenstore_wire::{Errno, FrameDecoder, Message, Op, payload, perm};

/// Nodes in a batch.
const BATCH: usize = 5;
/// What is asked of each node. The stock daemon holds a domain back at 20 requests under way.
const QUESTIONS: [Op; 3] = [Op::Read, Op::GetPerms, Op::Directory];

/// A node and the names of its children.
#[derive(Debug)]
pub struct Entry {
    pub node: StoreNode,
    pub children: Vec<String>,
}

/// One descriptor, with one request under way at most.
#[derive(Debug)]
struct Lane {
    device: File,
    decoder: FrameDecoder,
}

#[derive(Debug)]
pub struct Pipeline {
    lanes: Vec<Lane>,
    next_id: u32,
}

type Answer = Result<Vec<u8>, Errno>;

impl Lane {
    fn send(&mut self, op: Op, id: u32, path: &str) -> Result<(), String> {
        let message = Message::new(op.to_wire(), id, 0, payload::join([path]));
        self.device.write_all(&message.to_bytes()).map_err(|e| format!("{} {path}: {e}", op.name()))
    }

    fn answer(&mut self, id: u32) -> Result<Answer, String> {
        let mut buf = [0; 4096];
        loop {
            let n = match self.device.read(&mut buf) {
                Ok(0) => return Err("xenstore's device ended".into()),
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(format!("read a reply: {e}")),
            };
            let mut bytes = buf.get(..n).unwrap_or_default();
            while !bytes.is_empty() {
                let used = self.decoder.feed(bytes).map_err(|e| e.to_string())?;
                bytes = bytes.get(used..).unwrap_or_default();
                if let Some(m) = self.decoder.take() {
                    if m.header.req_id != id {
                        return Err(format!("a reply to request {}, where {id} is under way", m.header.req_id));
                    }
                    return Ok(if m.header.op == Op::Error.to_wire() {
                        Err(Errno::from_payload(&m.payload).unwrap_or(Errno::EIO))
                    } else {
                        Ok(m.payload)
                    });
                }
            }
        }
    }
}

impl Pipeline {
    pub fn open() -> Result<Pipeline, String> {
        let path = "/dev/xen/xenbus";
        let lane = |_| {
            let device = File::options().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"))?;
            Ok(Lane { device, decoder: FrameDecoder::new() })
        };
        let lanes = (0..BATCH * QUESTIONS.len()).map(lane).collect::<Result<_, String>>()?;
        Ok(Pipeline { lanes, next_id: 1 })
    }

    /// Reads nodes: value, permissions, children. `None` for what is not there or may not be read.
    pub fn nodes(&mut self, paths: &[String]) -> Result<Vec<Option<Entry>>, String> {
        let mut entries = Vec::with_capacity(paths.len());
        for batch in paths.chunks(BATCH) {
            let first = self.next_id;
            let asked = batch.iter().flat_map(|path| QUESTIONS.map(|op| (path, op)));
            for ((lane, id), (path, op)) in self.lanes.iter_mut().zip(first..).zip(asked) {
                lane.send(op, id, path)?;
            }
            self.next_id = first.wrapping_add(self.lanes.len() as u32);
            let mut answers = Vec::new();
            for (lane, id) in self.lanes.iter_mut().zip(first..).take(batch.len() * QUESTIONS.len()) {
                answers.push(lane.answer(id)?);
            }
            let mut answers = answers.into_iter();
            for path in batch {
                let mut next = || answers.next().unwrap_or(Err(Errno::EIO));
                entries.push(entry(path, next(), next(), next())?);
            }
        }
        Ok(entries)
    }
}

/// One node from its three answers.
fn entry(path: &str, value: Answer, perms: Answer, children: Answer) -> Result<Option<Entry>, String> {
    let value = match value {
        Ok(v) => v,
        Err(Errno::ENOENT | Errno::EACCES) => return Ok(None),
        Err(e) => return Err(format!("read {path}: {e}")),
    };
    let perms = match perms.and_then(|p| perm::parse_list(&p)) {
        Ok(list) => show_perms(&list),
        Err(e) => format!("? {}", e.name()),
    };
    let children = match children {
        Ok(list) => payload::strings(&list).map(|s| String::from_utf8_lossy(s).into_owned()).collect(),
        Err(Errno::ENOENT | Errno::EACCES) => Vec::new(),
        Err(e) => return Err(format!("list {path}: {e}")),
    };
    Ok(Some(Entry { node: StoreNode { path: path.to_owned(), value: escape(&value), perms }, children }))
}

/// Permissions as `n0 r5`.
pub fn show_perms(perms: &[perm::Perm]) -> String {
    perms.iter().map(|p| format!("{}{}", p.access.letter(), p.domid)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_made_from_their_answers() {
        let e = entry("/a", Ok(b"v\0".to_vec()), Ok(b"n0\0r5\0".to_vec()), Ok(b"x\0y\0".to_vec())).unwrap().unwrap();
        assert_eq!((e.node.value.as_str(), e.node.perms.as_str()), ("v\\x00", "n0 r5"));
        assert_eq!(e.children, ["x", "y"]);
        assert!(entry("/a", Err(Errno::EACCES), Ok(vec![]), Ok(vec![])).unwrap().is_none());
        let e = entry("/a", Ok(vec![]), Err(Errno::EACCES), Err(Errno::EACCES)).unwrap().unwrap();
        assert_eq!(e.node.perms, "? EACCES");
        assert!(entry("/a", Err(Errno::EIO), Ok(vec![]), Ok(vec![])).is_err());
    }
}
