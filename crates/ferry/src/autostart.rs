//! Guests that a host starts by itself when it boots (xendomains, `/etc/xen/auto`): one that has moved away would run twice then.

use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where xendomains looks (`XENDOMAINS_AUTO`).
pub const FOLDER: &str = "/etc/xen/auto";
/// Longest configuration that is read, bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// The configuration in that folder that would start this guest.
pub fn starts(folder: &Path, name: &str, guest: Uuid) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?;
    files.filter_map(|file| Some(file.ok()?.path())).find(|path| {
        let short = std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() <= CONFIG_MAX);
        short && std::fs::read_to_string(path).is_ok_and(|text| is_of(&text, name, guest))
    })
}

fn is_of(text: &str, name: &str, guest: Uuid) -> bool {
    text.lines().filter_map(|line| line.split_once('=')).any(|(key, value)| {
        let value = value.trim();
        // xl's strings are in quotes of either kind; what follows is a comment.
        let Some(quote) = value.chars().next().filter(|c| matches!(c, '"' | '\'')) else { return false };
        let value = value.get(1..).and_then(|rest| rest.split(quote).next()).unwrap_or_default();
        match key.trim() {
            "name" => value == name,
            "uuid" => value.parse() == Ok(guest),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_found_by_its_name_or_its_uuid() {
        let dir = tempfile::tempdir().unwrap();
        let guest = Uuid::from_u128(0x5eed);
        let starts = |text: &str| {
            std::fs::write(dir.path().join("g.cfg"), text).unwrap();
            starts(dir.path(), "web1", guest).is_some()
        };
        assert!(starts("type='pvh'\nname = \"web1\" # a comment\n"));
        assert!(starts("name='web1'"));
        assert!(starts(&format!("name='other'\nuuid = \"{guest}\"")));
        for other in ["name = \"web11\"", "#name = \"web1\"", "extra = \"name = web1\"", "name = web1", ""] {
            assert!(!starts(other), "{other}");
        }
        assert_eq!(super::starts(&dir.path().join("none"), "web1", guest), None);
    }
}
