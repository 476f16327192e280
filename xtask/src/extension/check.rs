//! Proving a built payload sound: what Xen's loader would refuse, and what it would not see but the machine would.

use anyhow::{Context, Result};
use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register,
};
use object::elf;
use object::read::elf::{ElfFile64, FileHeader as _, SectionHeader as _};
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, RelocationFlags, SectionKind};
use std::collections::BTreeSet;

/// Relocations that Xen 4.17 applies (xen/arch/x86/livepatch.c, `arch_livepatch_perform_rela`).
const RELOCATIONS: &[elf::RelocationType] =
    &[elf::R_X86_64_NONE, elf::R_X86_64_64, elf::R_X86_64_PC32, elf::R_X86_64_PLT32];

/// Sections without which it is no payload.
const SECTIONS: &[&str] = &[
    ".livepatch.funcs",
    ".livepatch.depends",
    ".livepatch.xen_depends",
    ".note.gnu.build-id",
    ".livepatch.hooks.revert",
];

/// Xen's limit for a payload, and for its `.bss`.
const SIZE_MAX: u64 = 2 << 20;

/// Everything that is wrong with the object; nothing when it is sound. `known` are the names of Xen's that it may refer to.
pub fn findings(bytes: &[u8], known: &BTreeSet<&str>) -> Result<Vec<String>> {
    let file = ElfFile64::<LittleEndian>::parse(bytes).context("read the ELF object")?;
    let endian = LittleEndian;
    let header = file.elf_header();
    let mut wrong = Vec::new();
    if header.e_machine(endian) != elf::EM_X86_64 || header.e_type(endian) != elf::ET_REL {
        wrong.push("it is not a relocatable x86-64 object".to_owned());
    }
    if header.e_ident().os_abi != elf::ELFOSABI_NONE {
        wrong.push(format!(
            "its OS ABI is {}, Xen takes 0 only (a section with the flag SHF_GNU_RETAIN does that)",
            header.e_ident().os_abi
        ));
    }
    if bytes.len() as u64 > SIZE_MAX {
        wrong.push(format!("it has {} bytes, more than {SIZE_MAX}", bytes.len()));
    }
    for name in SECTIONS {
        if file.section_by_name(name).is_none_or(|section| section.size() == 0) {
            wrong.push(format!("it has no section {name}"));
        }
    }
    for section in file.sections() {
        let name = section.name().context("read a section's name")?.to_owned();
        let flags = section.elf_section_header().sh_flags(endian);
        if !flags.contains(elf::SHF_ALLOC) {
            continue;
        }
        if flags.contains(elf::SHF_WRITE) && flags.contains(elf::SHF_EXECINSTR) {
            wrong.push(format!("{name} is writable and executable"));
        }
        if name.contains("init_array") || name.contains("fini_array") || flags.contains(elf::SHF_TLS) {
            wrong.push(format!("{name} would need a run-time that Xen has not"));
        }
        if section.kind() == SectionKind::UninitializedData && section.size() > SIZE_MAX {
            wrong.push(format!("{name} has {} bytes, more than {SIZE_MAX}", section.size()));
        }
        for (offset, relocation) in section.relocations() {
            if let RelocationFlags::Elf { r_type } = relocation.flags()
                && !RELOCATIONS.contains(&r_type)
            {
                wrong.push(format!("{name}+{offset:#x}: relocation type {}, which Xen does not apply", r_type.0));
            }
        }
        if flags.contains(elf::SHF_EXECINSTR) {
            let relocated = section.relocations().map(|(offset, _)| offset).collect();
            check_code(&name, section.data().context("read code")?, &relocated, &mut wrong);
        }
    }
    for symbol in file.symbols() {
        let name = symbol.name().context("read a symbol's name")?;
        if !symbol.is_undefined() || name.is_empty() {
            continue;
        }
        if name.contains("panicking") {
            wrong.push(
                "it can panic (an index, a division, a slice or an unwrap that the compiler could not prove)"
                    .to_owned(),
            );
        } else if !known.contains(name) {
            wrong.push(format!("it refers to {name}, which this Xen has not"));
        }
    }
    Ok(wrong)
}

/// Names that the object refers to and does not define, sorted.
pub fn imports(bytes: &[u8]) -> Result<Vec<String>> {
    let file = ElfFile64::<LittleEndian>::parse(bytes).context("read the ELF object")?;
    let mut names = BTreeSet::new();
    for symbol in file.symbols() {
        let name = symbol.name().context("read a symbol's name")?;
        if symbol.is_undefined() && !name.is_empty() {
            names.insert(name.to_owned());
        }
    }
    Ok(names.into_iter().collect())
}

/// Refers to a vector, mask, MMX or x87 register, whose contents are the guest's.
fn is_guests_register(register: Register) -> bool {
    register.is_vector_register()
        || register.is_k()
        || register.is_mm()
        || register.is_st()
        || register.is_tmm()
        || register.is_bnd()
}

/// Features whose instructions work on such registers, also those that name none.
fn is_guests_feature(feature: CpuidFeature) -> bool {
    matches!(
        feature,
        CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU387
            | CpuidFeature::MMX
            | CpuidFeature::SSE
            | CpuidFeature::SSE2
            | CpuidFeature::SSE3
            | CpuidFeature::SSSE3
            | CpuidFeature::SSE4_1
            | CpuidFeature::SSE4_2
            | CpuidFeature::AVX
            | CpuidFeature::AVX2
            | CpuidFeature::FXSR
            | CpuidFeature::XSAVE
    )
}

fn check_code(section: &str, code: &[u8], relocated: &BTreeSet<u64>, wrong: &mut Vec<String>) {
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        let at = format!("{section}+{:#x}: {instruction}", instruction.ip());
        if instruction.is_invalid() {
            wrong.push(format!("{section}+{:#x}: no instruction", instruction.ip()));
            return;
        }
        let info = factory.info(&instruction);
        // LFENCE counts as SSE2 and touches no register; it is what keeps speculation out.
        let fence = matches!(instruction.mnemonic(), Mnemonic::Lfence | Mnemonic::Pause | Mnemonic::Endbr64);
        let vector = info.used_registers().iter().any(|used| is_guests_register(used.register()))
            || (!fence && instruction.cpuid_features().iter().any(|feature| is_guests_feature(*feature)));
        if vector {
            wrong.push(format!("{at} uses the guest's vector or x87 state"));
        }
        let below = instruction.op_kinds().any(|kind| kind == OpKind::Memory)
            && instruction.memory_base() == Register::RSP
            && instruction.memory_displacement64().cast_signed() < 0
            && instruction.mnemonic() != Mnemonic::Lea;
        if below {
            wrong.push(format!("{at} uses the red zone, where an interrupt writes"));
        }
        match instruction.flow_control() {
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                wrong.push(format!("{at} branches through a register or memory without a thunk"));
            }
            FlowControl::Return => wrong.push(format!("{at} returns without Xen's return thunk")),
            FlowControl::Interrupt | FlowControl::Exception if instruction.mnemonic() != Mnemonic::Ud2 => {
                wrong.push(format!("{at} traps"));
            }
            // A call or jump out of the section has a relocation on its operand; one without it stays inside, where code is.
            FlowControl::Call | FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                let operand = instruction.next_ip().wrapping_sub(4);
                if !relocated.contains(&operand) && instruction.near_branch_target() >= code.len() as u64 {
                    wrong.push(format!("{at} leaves the section without a relocation"));
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object::write::{Object as Writer, Relocation, StandardSection, Symbol, SymbolSection};
    use object::{Architecture, BinaryFormat, Endianness, SymbolFlags, SymbolKind, SymbolScope};

    /// An object with the sections of a payload and the given code, whose first operand refers to `import` with a relocation of that type.
    fn payload(code: &[u8], import: Option<(&str, elf::RelocationType)>) -> Vec<u8> {
        let mut object = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        for name in SECTIONS {
            let section = object.add_section(vec![], name.as_bytes().to_vec(), SectionKind::ReadOnlyData);
            object.append_section_data(section, &[0; 8], 8);
        }
        let text = object.section_id(StandardSection::Text);
        object.append_section_data(text, code, 16);
        if let Some((name, r_type)) = import {
            let symbol = object.add_symbol(Symbol {
                name: name.as_bytes().to_vec(),
                value: 0,
                size: 0,
                kind: SymbolKind::Text,
                scope: SymbolScope::Unknown,
                weak: false,
                section: SymbolSection::Undefined,
                flags: SymbolFlags::None,
            });
            let relocation = Relocation { offset: 1, symbol, addend: -4, flags: RelocationFlags::Elf { r_type } };
            object.add_relocation(text, relocation).expect("a relocation of a known type");
        }
        object.write().expect("a small object")
    }

    fn check(code: &[u8], import: Option<(&str, elf::RelocationType)>) -> String {
        let known = BTreeSet::from(["get_s_time"]);
        findings(&payload(code, import), &known).expect("an object").join("; ")
    }

    const CALL: &[u8] = &[0xe8, 0, 0, 0, 0];

    #[test]
    fn sound_code_passes() {
        assert_eq!(check(CALL, Some(("get_s_time", elf::R_X86_64_PLT32))), "");
        // lfence; sub rsp, 8; mov [rsp], rax
        assert_eq!(check(&[0x0f, 0xae, 0xe8, 0x48, 0x83, 0xec, 8, 0x48, 0x89, 0x04, 0x24], None), "");
    }

    #[test]
    fn planted_faults_are_found() {
        let cases: &[(&str, &[u8], &str)] = &[
            ("movaps xmm0, xmm1", &[0x0f, 0x28, 0xc1], "vector or x87"),
            ("vzeroupper", &[0xc5, 0xf8, 0x77], "vector or x87"),
            ("fld1", &[0xd9, 0xe8], "vector or x87"),
            ("fxsave [rax]", &[0x0f, 0xae, 0x00], "vector or x87"),
            ("mov [rsp - 8], rax", &[0x48, 0x89, 0x44, 0x24, 0xf8], "red zone"),
            ("lock or dword [rsp - 64], 0", &[0xf0, 0x83, 0x4c, 0x24, 0xc0, 0x00], "red zone"),
            ("call rax", &[0xff, 0xd0], "without a thunk"),
            ("jmp [rax]", &[0xff, 0x20], "without a thunk"),
            ("ret", &[0xc3], "return thunk"),
            ("int3", &[0xcc], "traps"),
            ("jmp +127", &[0xeb, 0x7f], "leaves the section"),
            ("nothing", &[0x06], "no instruction"),
        ];
        for (name, code, expected) in cases {
            let found = check(code, None);
            assert!(found.contains(expected), "{name}: {found:?}");
        }
    }

    #[test]
    fn planted_references_are_found() {
        assert!(check(CALL, Some(("no_such_function", elf::R_X86_64_PLT32))).contains("this Xen has not"));
        assert!(check(CALL, Some(("get_s_time", elf::R_X86_64_GOTPCREL))).contains("relocation type 9"));
        assert!(
            check(CALL, Some(("_ZN4core9panicking18panic_bounds_check", elf::R_X86_64_PLT32))).contains("can panic")
        );
    }

    #[test]
    fn a_missing_section_is_found() {
        let mut object = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let text = object.section_id(StandardSection::Text);
        object.append_section_data(text, CALL, 16);
        let bytes = object.write().expect("a small object");
        let found = findings(&bytes, &BTreeSet::new()).expect("an object").join("; ");
        assert!(found.contains(".livepatch.depends"), "{found}");
    }
}
