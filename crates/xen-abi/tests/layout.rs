//! Every number, size and offset of this crate against Xen's own headers: one C file of static assertions, compiled for
//! 64-bit and (the structures a 32-bit guest uses) for 32-bit. Nothing is run, so no 32-bit C library is needed.
//!
//! The headers are those of the package libxen-dev: from `FERRY_XEN_HEADERS` (the folder that holds `xen/`), from
//! /usr/include, or unpacked into Ferry's cache, where the test downloads the package if need be.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use xen_abi::layout::StructLayout;
use xen_abi::{dm_op, domctl, event, grant, hvm_op, hvm_save, hypercall, memory, shared, sysctl, version, xenver};

const INCLUDES: &str = "#define __XEN_TOOLS__ 1
#define __XEN_INTERFACE_VERSION__ __XEN_LATEST_INTERFACE_VERSION__
#include <stddef.h>
#include <stdint.h>
#include <xen/xen-compat.h>
#include <xen/xen.h>
#include <xen/domctl.h>
#include <xen/sysctl.h>
#include <xen/platform.h>
#include <xen/memory.h>
#include <xen/version.h>
#include <xen/vcpu.h>
#include <xen/event_channel.h>
#include <xen/grant_table.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/dm_op.h>
#include <xen/hvm/params.h>
#include <xen/hvm/save.h>
#include <xen/arch-x86/hvm/start_info.h>
";

fn run(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if out.status.success() { Ok(text) } else { Err(format!("{command:?}: {}\n{text}", out.status)) }
}

fn cache() -> PathBuf {
    if let Some(dir) = std::env::var_os("FERRY_CACHE") {
        return dir.into();
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    base.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache")).join("ferry")
}

/// The folder that holds Xen 4.17's `xen/xen.h`, found or made once for all tests.
fn headers() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(find_headers)
}

fn find_headers() -> PathBuf {
    let have = |dir: &Path| dir.join("xen/domctl.h").is_file();
    if let Some(dir) = std::env::var_os("FERRY_XEN_HEADERS").map(PathBuf::from) {
        assert!(have(&dir), "FERRY_XEN_HEADERS is {dir:?}, but there is no xen/domctl.h in it");
        return dir;
    }
    if have(Path::new("/usr/include")) {
        return "/usr/include".into();
    }
    let root = cache().join("libxen-dev");
    let dir = root.join("usr/include");
    if !have(&dir) {
        std::fs::create_dir_all(&root).unwrap();
        let work = tempfile_in(&root);
        let get = || run(Command::new("apt-get").args(["download", "libxen-dev"]).current_dir(&work));
        // The package lists of a fresh machine may be missing: fetch them once.
        if let Err(first) = get() {
            let _ = run(Command::new("apt-get").arg("update"));
            get().unwrap_or_else(|e| {
                panic!(
                    "cannot download libxen-dev, whose headers this test needs (or set FERRY_XEN_HEADERS): {first}{e}"
                )
            });
        }
        let deb = std::fs::read_dir(&work)
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| p.extension().is_some_and(|e| e == "deb"))
            .expect("apt-get download leaves a .deb");
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&root)).unwrap();
        std::fs::remove_dir_all(&work).unwrap();
    }
    assert!(have(&dir), "libxen-dev has no usr/include/xen/domctl.h");
    dir
}

fn tempfile_in(root: &Path) -> PathBuf {
    let dir = root.join(format!("download-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn assert_structs(c: &mut String, layouts: &[StructLayout]) -> usize {
    let mut n = 0;
    for s in layouts {
        writeln!(c, "_Static_assert(sizeof({t}) == {n}, \"sizeof {t}\");", t = escape_free(s.c_type), n = s.size)
            .unwrap();
        n += 1;
        for f in s.fields.iter().filter(|f| !f.c_name.is_empty()) {
            let t = s.c_type;
            let name = f.c_name;
            writeln!(c, "_Static_assert(offsetof({t}, {name}) == {}, \"offset {t} {name}\");", f.offset).unwrap();
            writeln!(c, "_Static_assert(sizeof((({t} *)0)->{name}) == {}, \"size {t} {name}\");", f.size).unwrap();
            n += 2;
        }
    }
    n
}

/// C types go into string literals too; none of them needs escaping.
fn escape_free(t: &str) -> &str {
    assert!(!t.contains(['"', '\\']));
    t
}

fn assert_numbers(c: &mut String, numbers: &[(&str, i128)]) -> usize {
    for (name, value) in numbers {
        // Compared as 64-bit patterns: some of the macros are unsigned, some signed.
        writeln!(c, "_Static_assert((uint64_t)({name}) == {:#x}ull, \"number {name}\");", *value as u64).unwrap();
    }
    numbers.len()
}

/// Compiles; the answer is the failed assertions, if any.
fn compile(headers: &Path, name: &str, bits: &str, c: &str) -> Result<(), String> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let file = dir.join(format!("{name}.c"));
    std::fs::write(&file, c).unwrap();
    run(Command::new("cc")
        .args(["-std=gnu11", "-ffreestanding", "-fsyntax-only", "-w", bits, "-I"])
        .arg(headers)
        .arg(&file))
    .map(drop)
}

#[test]
fn every_number_size_and_offset_is_that_of_xens_headers() {
    let headers = headers();
    let mut c = INCLUDES.to_owned();
    let mut n = 0;
    for numbers in [
        hypercall::NUMBERS,
        domctl::NUMBERS,
        sysctl::NUMBERS,
        memory::NUMBERS,
        hvm_op::NUMBERS,
        dm_op::NUMBERS,
        hvm_save::NUMBERS,
        event::NUMBERS,
        grant::NUMBERS,
        shared::NUMBERS,
        xenver::NUMBERS,
    ] {
        n += assert_numbers(&mut c, numbers);
    }
    for layouts in [
        hypercall::LAYOUTS,
        domctl::LAYOUTS,
        sysctl::LAYOUTS,
        memory::LAYOUTS,
        hvm_op::LAYOUTS,
        dm_op::LAYOUTS,
        hvm_save::LAYOUTS,
        event::LAYOUTS,
        grant::LAYOUTS,
        shared::LAYOUTS,
    ] {
        n += assert_structs(&mut c, layouts);
    }
    let v = version::interface(4, 17).unwrap();
    writeln!(c, "_Static_assert(XEN_DOMCTL_INTERFACE_VERSION == {}, \"domctl\");", v.domctl).unwrap();
    writeln!(c, "_Static_assert(XEN_SYSCTL_INTERFACE_VERSION == {}, \"sysctl\");", v.sysctl).unwrap();
    writeln!(c, "_Static_assert(XENPF_INTERFACE_VERSION == {}, \"platform\");", v.platform).unwrap();
    writeln!(c, "_Static_assert(sizeof(struct hvm_hw_lapic) == {}, \"lapic\");", v.lapic_record_len).unwrap();
    assert!(n > 600, "only {n} assertions: a table is missing");
    compile(headers, "layout64", "-m64", &c).unwrap_or_else(|e| panic!("{e}"));

    // A test that cannot fail proves nothing: the same file with one number off must be refused, for that number.
    let wrong = c.replacen("struct xen_domctl_shadow_op, pages) == 24", "struct xen_domctl_shadow_op, pages) == 20", 1);
    assert_ne!(wrong, c);
    let e = compile(headers, "layout64-wrong", "-m64", &wrong).unwrap_err();
    assert!(e.contains("offset struct xen_domctl_shadow_op pages"), "{e}");
}

#[test]
fn a_32_bit_guests_structures_are_those_of_xens_headers() {
    let headers = headers();
    let mut c = INCLUDES.replace("#define __XEN_TOOLS__ 1\n", "#define XEN_HAVE_PV_UPCALL_MASK 1\n");
    c = c.replace("#include <xen/domctl.h>\n#include <xen/sysctl.h>\n#include <xen/platform.h>\n", "");
    c = c.replace("#include <xen/hvm/save.h>\n", "");
    let n = assert_structs(&mut c, shared::bits32::LAYOUTS);
    let n = n + assert_structs(
        &mut c,
        event::LAYOUTS.iter().filter(|l| l.c_type.contains("fifo")).copied().collect::<Vec<_>>().as_slice(),
    );
    assert!(n > 50, "only {n} assertions");
    compile(headers, "layout32", "-m32", &c).unwrap_or_else(|e| panic!("{e}"));
}

/// What 4.20 changed, against its headers. No registry that this project may use has them for Debian 12, so they are given by hand:
/// `FERRY_XEN_HEADERS_4_20` is a folder that holds 4.20's `xen/`.
#[test]
#[ignore = "needs the headers of Xen 4.20 in FERRY_XEN_HEADERS_4_20"]
fn what_4_20_changed_is_that_of_its_headers() {
    let dir = std::env::var_os("FERRY_XEN_HEADERS_4_20").expect("FERRY_XEN_HEADERS_4_20 is set");
    let mut c = INCLUDES.to_owned();
    for numbers in [
        hypercall::NUMBERS,
        domctl::NUMBERS,
        sysctl::NUMBERS,
        memory::NUMBERS,
        hvm_op::NUMBERS,
        dm_op::NUMBERS,
        hvm_save::NUMBERS,
        event::NUMBERS,
        grant::NUMBERS,
        shared::NUMBERS,
        xenver::NUMBERS,
    ] {
        assert_numbers(&mut c, numbers);
    }
    assert_structs(&mut c, domctl::v17::LAYOUTS);
    // All else is as in 4.17, but for the record that grew.
    for layouts in [
        hypercall::LAYOUTS,
        domctl::LAYOUTS,
        sysctl::LAYOUTS,
        memory::LAYOUTS,
        hvm_op::LAYOUTS,
        dm_op::LAYOUTS,
        hvm_save::LAYOUTS,
        event::LAYOUTS,
        grant::LAYOUTS,
        shared::LAYOUTS,
    ] {
        let same: Vec<_> = layouts
            .iter()
            .filter(|l| !["struct xen_domctl_createdomain", "struct hvm_hw_lapic"].contains(&l.c_type))
            .copied()
            .collect();
        assert_structs(&mut c, &same);
    }
    let v = version::interface(4, 20).unwrap();
    writeln!(c, "_Static_assert(XEN_DOMCTL_INTERFACE_VERSION == {}, \"domctl\");", v.domctl).unwrap();
    writeln!(c, "_Static_assert(XEN_SYSCTL_INTERFACE_VERSION == {}, \"sysctl\");", v.sysctl).unwrap();
    writeln!(c, "_Static_assert(XENPF_INTERFACE_VERSION == {}, \"platform\");", v.platform).unwrap();
    writeln!(c, "_Static_assert(sizeof(struct hvm_hw_lapic) == {}, \"lapic\");", v.lapic_record_len).unwrap();
    compile(Path::new(&dir), "layout420", "-m64", &c).unwrap_or_else(|e| panic!("{e}"));
}
