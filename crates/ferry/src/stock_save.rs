//! Stock tools that are at work on a guest's memory already: Xen keeps one log of a guest's writes, and beginning ours would empty theirs
//! without a word. Theirs beginning after ours shows (`migrate::dirty_log`).
//!
//! Whatever of libxl's saves or migrates a guest (`xl save`, `xl migrate`, `xl remus`, libvirt) has a process do it that says so in its
//! arguments: `libxl-save-helper --save-domain STREAM BACK-CHANNEL DOMID …` (tools/libs/light/libxl_save_callout.c).

use hypervisor::DomId;
use migrate::{Doing, Result, Trouble};
use std::fs::File;
use std::io::Read;
use std::path::Path;

pub const PROC: &str = "/proc";
const HELPER: &str = "libxl-save-helper";
const SAVES: &[u8] = b"--save-domain";
/// Where the domid stands after that.
const DOMID: usize = 3;
/// Longest arguments that are looked at, bytes: the helper's are numbers.
const ARGUMENTS_MAX: u64 = 4096;

/// Refuses a guest that stock tools are saving or migrating.
pub fn refuse(proc: &Path, dom: DomId) -> Result<()> {
    match helper_of(proc, dom)? {
        None => Ok(()),
        Some(pid) => Err(Trouble::new(format!(
            "it is being saved or migrated by stock tools already ({HELPER} is at work on domain {dom}, process {pid}), and a second \
             migration would spoil theirs"
        ))
        .todo("wait until that `xl migrate` or `xl save` is over, or end it; then try again")),
    }
}

/// The process that saves this guest.
fn helper_of(proc: &Path, dom: DomId) -> Result<Option<u32>> {
    const LOOKING: &str = "look for stock tools that save it";
    for process in std::fs::read_dir(proc).doing(LOOKING)? {
        let process = process.doing(LOOKING)?;
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let mut arguments = Vec::new();
        // One that has ended meanwhile saves nothing.
        let read = File::open(process.path().join("cmdline"))
            .and_then(|file| file.take(ARGUMENTS_MAX).read_to_end(&mut arguments));
        if read.is_ok() && saves(&arguments, dom) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

fn saves(arguments: &[u8], dom: DomId) -> bool {
    let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
    // Something may stand before it: its path can be set (`LIBXL_SAVE_HELPER`), to a script too.
    let Some(mode) = arguments.iter().position(|argument| *argument == SAVES) else { return false };
    let helper = mode.checked_sub(1).and_then(|at| arguments.get(at));
    let named = helper.is_some_and(|path| path.rsplit(|byte| *byte == b'/').next() == Some(HELPER.as_bytes()));
    let domid = arguments.get(mode + DOMID).and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
    named && domid == Some(dom.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proc_with(processes: &[(&str, &[u8])]) -> tempfile::TempDir {
        let proc = tempfile::tempdir().unwrap();
        for (name, arguments) in processes {
            std::fs::create_dir(proc.path().join(name)).unwrap();
            std::fs::write(proc.path().join(name).join("cmdline"), arguments).unwrap();
        }
        // A process that has just ended, and what is no process.
        std::fs::create_dir(proc.path().join("77")).unwrap();
        std::fs::write(proc.path().join("cmdline"), "quiet").unwrap();
        proc
    }

    /// As Xen 4.17's libxl starts it for domain 5.
    const SAVE: &[u8] = b"/usr/lib/xen-4.17/bin/libxl-save-helper\0--save-domain\x008\0-1\x005\x001\x0012\x000\0";

    #[test]
    fn a_guest_that_stock_tools_save_is_refused() {
        let proc = proc_with(&[("1", b"/sbin/init\0"), ("4711", SAVE), ("self", SAVE)]);
        let error = refuse(proc.path(), DomId(5)).unwrap_err().to_string();
        assert!(error.contains("libxl-save-helper is at work on domain 5, process 4711"), "{error}");
        assert!(error.contains("or end it; then try again"), "{error}");
        for other in [1, 8, 12, 50] {
            refuse(proc.path(), DomId(other)).unwrap();
        }
        let script = [b"/bin/sh\0".as_slice(), SAVE].concat();
        refuse(proc_with(&[("9", &script)]).path(), DomId(5)).unwrap_err();
    }

    #[test]
    fn what_saves_nothing_stops_nothing() {
        let restore = b"libxl-save-helper\0--restore-domain\x008\0-1\x005\x001\x000\x002\x000\x003\x000\0".as_slice();
        let long = [&[b'x'; ARGUMENTS_MAX as usize], b"\0".as_slice(), SAVE].concat();
        let others: [&[u8]; 7] = [
            b"",
            restore,
            b"libxl-save-helper\0--save-domain\x008\0-1\0",
            b"--save-domain\x008\0-1\x005\0",
            b"grep\0--save-domain\x008\0-1\x005\0",
            b"libxl-save-helper\0--save-domain\x008\0-1\0\xff5\0",
            &long,
        ];
        for arguments in others {
            refuse(proc_with(&[("4711", arguments)]).path(), DomId(5)).unwrap();
        }
    }

    #[test]
    fn where_nobody_can_look_nothing_is_begun() {
        let proc = tempfile::tempdir().unwrap();
        let error = refuse(&proc.path().join("none"), DomId(5)).unwrap_err().to_string();
        assert!(error.contains("look for stock tools that save it"), "{error}");
    }
}
