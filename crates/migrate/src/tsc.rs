//! The vCPUs' TSCs in an HVM context (CPU record, `struct hvm_hw_cpu`, public/arch-x86/hvm/save.h).

use crate::trouble::{Result, Trouble};
use xen_abi::hvm_save::{CODE_CPU, CODE_END, CODE_HEADER, Cpu, push_record, records};

/// Ticks in so many nanoseconds at a rate in kHz.
pub fn ticks(ns: u64, khz: u32) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

/// Which records the new context has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    All,
    /// Those of the vCPUs alone, and what frames them.
    Cpus,
}

/// The context with every vCPU's TSC changed.
///
/// # Errors
/// The records do not follow each other, or a CPU record is too short.
pub fn shifted(context: &[u8], keep: Keep, change: impl Fn(u64) -> u64) -> Result<Vec<u8>> {
    let mut new = Vec::with_capacity(context.len());
    for record in records(context)? {
        match record.code {
            CODE_CPU => {
                let mut cpu: Cpu =
                    record.get().ok_or_else(|| Trouble::new("a CPU record of the HVM context is too short"))?;
                cpu.tsc = change(cpu.tsc);
                let bytes = zerocopy::IntoBytes::as_bytes(&cpu);
                let rest = record.payload.get(bytes.len()..).unwrap_or_default();
                push_record(&mut new, record.code, record.instance, &[bytes, rest].concat());
            }
            CODE_END => {}
            CODE_HEADER => push_record(&mut new, record.code, record.instance, record.payload),
            _ if keep == Keep::All => push_record(&mut new, record.code, record.instance, record.payload),
            _ => {}
        }
    }
    push_record(&mut new, CODE_END, 0, &[]);
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xen_abi::hvm_save::{FILE_MAGIC, FILE_VERSION, Header};
    use zerocopy::{FromZeros, IntoBytes};

    #[test]
    fn ticks_of_long_absences_do_not_overflow() {
        assert_eq!(ticks(1_000_000_000, 2_000_000), 2_000_000_000);
        assert_eq!(ticks(86_400_000_000_000 * 365, 3_000_000), 3_000_000_000 * 86_400 * 365);
    }

    #[test]
    fn only_the_tsc_changes() {
        let mut context = Vec::new();
        let header = Header { magic: FILE_MAGIC, version: FILE_VERSION, ..Header::new_zeroed() };
        push_record(&mut context, CODE_HEADER, 0, header.as_bytes());
        let mut cpu = Cpu::new_zeroed();
        cpu.rip = 0x1234;
        cpu.tsc = 1000;
        push_record(&mut context, CODE_CPU, 1, cpu.as_bytes());
        push_record(&mut context, 9, 0, b"other");
        push_record(&mut context, CODE_END, 0, &[]);
        assert_eq!(shifted(&context, Keep::All, |tsc| tsc).unwrap(), context);
        let earlier = shifted(&context, Keep::All, |tsc| tsc - 400).unwrap();
        let changed: Vec<Cpu> =
            records(&earlier).unwrap().iter().filter(|r| r.code == CODE_CPU).filter_map(|r| r.get()).collect();
        assert_eq!((changed[0].tsc, changed[0].rip, changed.len()), (600, 0x1234, 1));
        assert_eq!(earlier.len(), context.len());
        assert!(shifted(&context, Keep::Cpus, |tsc| tsc).unwrap().len() < context.len());
    }
}
