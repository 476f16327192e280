//! Paths: which ones are valid, and which lie below which.

use crate::{ABS_PATH_MAX, REL_PATH_MAX};

/// Whether an absolute path names a possible node. `rel_max` limits what follows `/local/domain/<domid>/`, or the whole
/// path if it does not begin so (the quota `path-max`, at most [`REL_PATH_MAX`]).
pub fn is_valid(path: &[u8], rel_max: usize) -> bool {
    if path.first() != Some(&b'/') || path.len() > ABS_PATH_MAX {
        return false;
    }
    if path.len() > 1 && path.last() == Some(&b'/') {
        return false;
    }
    if path.len() > local_prefix_len(path) + rel_max.min(REL_PATH_MAX) {
        return false;
    }
    let mut prev = 0;
    path.iter().all(|&b| {
        let ok = (b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_' | b'@')) && !(b == b'/' && prev == b'/');
        prev = b;
        ok
    })
}

/// Length of `/local/domain/<up to five digits>/`, or 0.
fn local_prefix_len(path: &[u8]) -> usize {
    const PREFIX: &[u8] = b"/local/domain/";
    let Some(rest) = path.strip_prefix(PREFIX) else { return 0 };
    let digits = rest.iter().take(5).take_while(|b| b.is_ascii_digit()).count();
    if digits > 0 && rest.get(digits) == Some(&b'/') { PREFIX.len() + digits + 1 } else { 0 }
}

/// Whether `child` is `parent` or lies below it.
pub fn is_child(child: &[u8], parent: &[u8]) -> bool {
    if parent == b"/" {
        return child.first() == Some(&b'/');
    }
    match child.strip_prefix(parent) {
        Some(rest) => rest.is_empty() || rest[0] == b'/',
        None => false,
    }
}

/// How many levels `child` lies below `parent`; `None` if it does not.
pub fn depth_below(child: &[u8], parent: &[u8]) -> Option<usize> {
    if !is_child(child, parent) {
        return None;
    }
    let from = if parent == b"/" { 0 } else { parent.len() };
    if child.len() == 1 { Some(0) } else { Some(child[from..].iter().filter(|&&b| b == b'/').count()) }
}

/// The parent of a path; that of `/` is `/`.
pub fn parent(path: &[u8]) -> &[u8] {
    match path.iter().rposition(|&b| b == b'/') {
        None | Some(0) => b"/",
        Some(i) => &path[..i],
    }
}

/// The last part of a path; empty for `/`.
pub fn leaf(path: &[u8]) -> &[u8] {
    match path.iter().rposition(|&b| b == b'/') {
        None => path,
        Some(i) => &path[i + 1..],
    }
}

/// The parts of an absolute path; none for `/`.
pub fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&b| b == b'/').filter(|p| !p.is_empty())
}

/// The path of a child.
pub fn join(parent: &[u8], leaf: &[u8]) -> Vec<u8> {
    let mut v = Vec::with_capacity(parent.len() + 1 + leaf.len());
    if parent != b"/" {
        v.extend_from_slice(parent);
    }
    v.push(b'/');
    v.extend_from_slice(leaf);
    v
}
