//! Making the table of one build of Xen: offsets from its headers, sizes and first instructions of the functions that
//! the extension wraps from its symbol file.

use anyhow::{Context, Result, bail};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// Functions that are patched: constant in the table, name in Xen's own symbol table.
const WRAPPED: &[(&str, &str)] = &[
    ("arch_do_domctl", "arch_do_domctl"),
    ("update_vcpu_system_time", "arch/x86/time.c#__update_vcpu_system_time"),
    ("update_runstate_area", "update_runstate_area"),
    ("common_vcpu_op", "common_vcpu_op"),
    ("compat_common_vcpu_op", "compat_common_vcpu_op"),
    ("compat_vcpu_op", "compat_vcpu_op"),
    ("do_set_timer_op", "do_set_timer_op"),
    ("do_poll", "common/sched/core.c#do_poll"),
    ("do_hvm_op", "do_hvm_op"),
    ("arch_domain_destroy", "arch_domain_destroy"),
];

/// Functions that are replaced whole: nothing jumps back into them.
const REPLACED: &[(&str, &str)] = &[("update_domain_wallclock_time", "update_domain_wallclock_time")];

/// Bytes of the jump that Xen writes over a patched function.
const JUMP: usize = 5;

/// Most bytes that Xen can be told to expect (public/sysctl.h, `LIVEPATCH_OPAQUE_SIZE`).
const EXPECT_MAX: usize = 31;

/// A function of Xen, or a variable.
#[derive(Clone, Copy)]
pub struct Symbol {
    address: u64,
    size: u64,
}

/// Xen's symbols by the names that its own loader knows them by: a static one has its file in front.
pub struct Symbols {
    bytes: Vec<u8>,
    names: BTreeMap<String, Symbol>,
    ambiguous: BTreeSet<String>,
    build_id: String,
}

impl Symbols {
    /// Reads `xen-syms`, Xen's own ELF image.
    pub fn read(path: &Path) -> Result<Symbols> {
        let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        let file = object::File::parse(&*bytes).with_context(|| format!("{} is no ELF file", path.display()))?;
        let id = file.build_id().context("read the build-id")?.context("the symbol file has no build-id")?;
        let build_id = id.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let mut names = BTreeMap::new();
        let mut ambiguous = BTreeSet::new();
        let mut source = String::new();
        for symbol in file.symbols() {
            let Ok(name) = symbol.name() else { continue };
            if symbol.kind() == SymbolKind::File {
                name.clone_into(&mut source);
                continue;
            }
            if name.is_empty() || symbol.is_undefined() {
                continue;
            }
            let known =
                if symbol.is_local() && !source.is_empty() { format!("{source}#{name}") } else { name.to_owned() };
            let entry = Symbol { address: symbol.address(), size: symbol.size() };
            if names.insert(known.clone(), entry).is_some_and(|former: Symbol| former.address != entry.address) {
                ambiguous.insert(known);
            }
        }
        Ok(Symbols { bytes, names, ambiguous, build_id })
    }

    /// Build-id as hexadecimal digits.
    pub fn build_id(&self) -> &str {
        &self.build_id
    }

    /// The symbol of that name, which must be the only one.
    fn find(&self, name: &str) -> Result<Symbol> {
        if self.ambiguous.contains(name) {
            bail!("this Xen has several symbols named {name}");
        }
        // GCC's own linker puts files of the hidden symbols it adds last under no name; Xen's table does the same.
        self.names
            .get(name)
            .copied()
            .with_context(|| format!("this Xen has no symbol {name}: the extension does not fit it as it is"))
    }

    /// Whether the payload can import that name.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains_key(name) && !self.ambiguous.contains(name)
    }

    fn code(&self, symbol: Symbol) -> Result<Vec<u8>> {
        let file = object::File::parse(&*self.bytes).context("parse the symbol file")?;
        for section in file.sections() {
            if let Some(code) = section.data_range(symbol.address, symbol.size).context("read code")? {
                return Ok(code.to_vec());
            }
        }
        bail!("no section holds the code at {:#x}", symbol.address)
    }
}

/// Whole instructions at the front of a function that can run elsewhere as they are, at least as long as the jump.
fn displaceable(name: &str, address: u64, code: &[u8]) -> Result<usize> {
    let mut decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut length = 0;
    while length < JUMP {
        if !decoder.can_decode() {
            bail!("{name} is shorter than a jump");
        }
        decoder.decode_out(&mut instruction);
        let moves = instruction.flow_control() == FlowControl::Next
            && !instruction.is_ip_rel_memory_operand()
            && instruction.mnemonic() != Mnemonic::INVALID
            // Xen patches fences and NOPs at boot, after the CPU it finds.
            && !matches!(instruction.mnemonic(), Mnemonic::Endbr64 | Mnemonic::Lfence | Mnemonic::Nop);
        if !moves {
            bail!("{name} begins with an instruction that cannot run elsewhere: {instruction}");
        }
        // A displaced use of the stack's contents would be fine too, but none is known; refuse the unknown.
        if instruction.op_kinds().any(|kind| kind == OpKind::Memory) && instruction.memory_base() == Register::RSP {
            bail!("{name} begins with an access to the stack: {instruction}");
        }
        length += instruction.len();
    }
    // Nothing may jump to a displaced instruction but the first.
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let target = instruction.near_branch_target();
        if target > address && target < address + length as u64 {
            bail!("{name} jumps back to its own beginning at {target:#x}");
        }
    }
    Ok(length)
}

/// The table's text.
pub fn write(symbols: &Symbols, version: &str, offsets: &BTreeMap<String, u64>) -> Result<String> {
    let mut text = String::new();
    let id = symbols.build_id();
    writeln!(text, "// SPDX-License-Identifier: GPL-2.0-only")?;
    writeln!(text, "// Xen {version}, build-id {id}.")?;
    writeln!(text, "// Written by `cargo xtask extension-table`; not to be edited.")?;
    writeln!(text)?;
    let bytes: Vec<String> =
        id.as_bytes().chunks(2).map(|pair| format!("0x{}", String::from_utf8_lossy(pair))).collect();
    if bytes.len() != 20 {
        bail!("the build-id has {} bytes, not 20", bytes.len());
    }
    writeln!(text, "pub const BUILD_ID: [u8; 20] = [{}];", bytes.join(", "))?;
    for (name, value) in offsets {
        writeln!(text, "pub const {name}: usize = {value};")?;
    }
    writeln!(text)?;
    let mut originals = String::new();
    for (name, known) in WRAPPED.iter().chain(REPLACED) {
        let symbol = symbols.find(known)?;
        let code = symbols.code(symbol)?;
        let wrapped = WRAPPED.iter().any(|(other, _)| other == name);
        let length = if wrapped { displaceable(known, symbol.address, &code)? } else { JUMP };
        let Some(head) = code.get(..length).filter(|head| head.len() <= EXPECT_MAX) else {
            bail!("{known} has too long a beginning");
        };
        let head: Vec<String> = head.iter().map(|byte| format!("{byte:#04x}")).collect();
        let head = head.join(", ");
        writeln!(
            text,
            "pub const {}: crate::patch::Original =\n    crate::patch::Original {{ name: \"{known}\\0\", size: {}, head: &[{head}] }};",
            name.to_uppercase(),
            symbol.size
        )?;
        if wrapped {
            writeln!(originals, "    ({name}) => {{ \".byte {head}\\njmp \\\"{known}\\\" + {length}\" }};")?;
        }
    }
    writeln!(text)?;
    writeln!(text, "/// The displaced beginning of a function, and the jump behind it.")?;
    writeln!(text, "macro_rules! original {{\n{originals}}}")?;
    writeln!(text, "pub(crate) use original;")?;
    Ok(text)
}

/// Compiles the probe with Xen's own makefiles and gives what it found. `source` is Debian's source, patches applied;
/// `config` the configuration that the hypervisor's package brings.
pub fn offsets(source: &Path, config: &Path) -> Result<BTreeMap<String, u64>> {
    for (tool, package) in
        [("gcc", "gcc"), ("make", "make"), ("flex", "flex"), ("bison", "bison"), ("bc", "bc"), ("python3", "python3")]
    {
        if Command::new(tool).arg("--version").output().is_err() {
            bail!("{tool} is not on this machine, and Xen's makefiles need it: install the package {package}");
        }
    }
    let xen = source.join("xen");
    std::fs::copy(config, xen.join(".config")).context("put Xen's configuration in place")?;
    let place = xen.join("arch/x86/x86_64/asm-offsets.c");
    let kept = xen.join("arch/x86/x86_64/asm-offsets.c.ferry-kept");
    if !kept.exists() {
        std::fs::copy(&place, &kept).context("keep Xen's own asm-offsets.c")?;
    }
    let mut probe = std::fs::read_to_string(&kept).context("read Xen's asm-offsets.c")?;
    probe.push_str(&std::fs::read_to_string(super::home()?.join("probe/layout.c")).context("read probe/layout.c")?);
    std::fs::write(&place, probe).context("write the probe")?;
    let rules = super::home()?.join("probe/offsets.mk");
    for target in ["olddefconfig", "ferry-offsets"] {
        let output = Command::new("make")
            .args(["-j2", "-f", "Makefile", "-f"])
            .arg(&rules)
            .arg(target)
            .current_dir(&xen)
            .env("DEB_MAINTAINER", "nobody <nobody@localhost>")
            .output()
            .context("run make")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last: Vec<&str> = said.lines().rev().take(20).collect();
            bail!("Xen's makefiles failed at {target}:\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
    let chosen = std::fs::read_to_string(xen.join(".config")).context("read Xen's configuration")?;
    let shipped = std::fs::read_to_string(config).context("read the package's configuration")?;
    if settings(&chosen) != settings(&shipped) {
        bail!("this compiler changes Xen's configuration; use Debian's gcc of the same release");
    }
    parse(&std::fs::read_to_string(xen.join("asm-offsets.s")).context("read what the probe found")?)
}

/// What is switched on, without what tells of the compiler only.
fn settings(config: &str) -> BTreeSet<&str> {
    config.lines().filter(|line| line.starts_with("CONFIG_") && !line.contains("VERSION")).collect()
}

fn parse(assembly: &str) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    for line in assembly.lines() {
        let Some((_, rest)) = line.split_once("\"FERRY ") else { continue };
        let Some((entry, _)) = rest.split_once(" YRREF") else { continue };
        let mut words = entry.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next()) else { bail!("the probe printed {entry:?}") };
        let value: i64 =
            value.trim_start_matches('$').parse().with_context(|| format!("the probe printed {entry:?}"))?;
        if found.insert(name.to_owned(), value.cast_unsigned()).is_some() {
            bail!("the probe has {name} twice");
        }
    }
    if found.is_empty() {
        bail!("the probe found nothing");
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_instructions_are_displaced() {
        // push r15; push r14; mov r14, rsi; nop
        assert_eq!(displaceable("f", 0x1000, &[0x41, 0x57, 0x41, 0x56, 0x49, 0x89, 0xf6, 0x90]).ok(), Some(7));
    }

    #[test]
    fn instructions_bound_to_their_place_are_not() {
        // push rbp; lea rbp, [rip + 1]
        assert!(displaceable("f", 0x1000, &[0x55, 0x48, 0x8d, 0x2d, 1, 0, 0, 0, 0x90]).is_err());
        // call
        assert!(displaceable("f", 0x1000, &[0xe8, 0, 0, 0, 0, 0x90]).is_err());
        // Five NOPs and a jump back to the second of them.
        assert!(displaceable("f", 0x1000, &[0x90, 0x90, 0x90, 0x90, 0x90, 0xeb, 0xfa]).is_err());
    }

    #[test]
    fn the_probe_is_read_back() {
        let found = parse("\t.ascii \"FERRY D_ID $0 YRREF\"\n\t.ascii \"FERRY M2P_BASE $-139085434912768 YRREF\"\n");
        let found = found.expect("well formed");
        assert_eq!(found.get("D_ID"), Some(&0));
        assert_eq!(found.get("M2P_BASE"), Some(&(-139_085_434_912_768_i64).cast_unsigned()));
        assert!(parse("nothing").is_err());
    }
}
