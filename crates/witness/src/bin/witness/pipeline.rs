//! Reads many xenstore nodes with many requests under way: the kernel's device queues them and hands out the replies in
//! order of their arrival, so that one wait serves a whole batch.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use witness::report::StoreNode;
use witness::store_rules::escape;
use xenstore_wire::{Errno, FrameDecoder, Message, Op, payload, perm};

/// Nodes in a batch; each takes three requests, and the stock daemon holds a domain back at 20.
const BATCH: usize = 5;

/// A node and the names of its children.
#[derive(Debug)]
pub struct Entry {
    pub node: StoreNode,
    pub children: Vec<String>,
}

#[derive(Debug)]
pub struct Pipeline {
    device: File,
    decoder: FrameDecoder,
    next_id: u32,
}

type Answer = Result<Vec<u8>, Errno>;

impl Pipeline {
    pub fn open() -> Result<Pipeline, String> {
        let path = "/dev/xen/xenbus";
        let device = File::options().read(true).write(true).open(path).map_err(|e| format!("{path}: {e}"))?;
        Ok(Pipeline { device, decoder: FrameDecoder::new(), next_id: 1 })
    }

    /// Reads nodes: value, permissions, children. `None` for what is not there or may not be read.
    pub fn nodes(&mut self, paths: &[String]) -> Result<Vec<Option<Entry>>, String> {
        let mut entries = Vec::with_capacity(paths.len());
        for batch in paths.chunks(BATCH) {
            let first = self.next_id;
            for path in batch {
                for op in [Op::Read, Op::GetPerms, Op::Directory] {
                    self.send(op, path)?;
                }
            }
            let mut answers = self.answers(first, batch.len() * 3)?;
            for (path, id) in batch.iter().zip((first..).step_by(3)) {
                let mut take = |id| answers.remove(&id).unwrap_or(Err(Errno::EIO));
                entries.push(entry(path, take(id), take(id + 1), take(id + 2))?);
            }
        }
        Ok(entries)
    }

    fn send(&mut self, op: Op, path: &str) -> Result<(), String> {
        let message = Message::new(op.to_wire(), self.next_id, 0, payload::join([path]));
        self.next_id += 1;
        // One message a write: the device takes no more at a time.
        self.device.write_all(&message.to_bytes()).map_err(|e| format!("{} {path}: {e}", op.name()))
    }

    /// The answers to `count` requests from `first` on.
    fn answers(&mut self, first: u32, count: usize) -> Result<BTreeMap<u32, Answer>, String> {
        let mut answers = BTreeMap::new();
        let mut buf = [0; 4096];
        while answers.len() < count {
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
                    let id = m.header.req_id;
                    if !(first..self.next_id).contains(&id) {
                        return Err(format!("a reply to request {id}, which is not under way"));
                    }
                    let answer = if m.header.op == Op::Error.to_wire() {
                        Err(Errno::from_payload(&m.payload).unwrap_or(Errno::EIO))
                    } else {
                        Ok(m.payload)
                    };
                    answers.insert(id, answer);
                }
            }
        }
        Ok(answers)
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
