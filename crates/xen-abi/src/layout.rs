//! How the ABI's structures are declared, and a table of their layout that a test compares with Xen's own headers.

/// One field: its C name and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldLayout {
    /// As C writes it in `offsetof`, with points for members of members. Empty: not in C under one name (bit fields, padding).
    pub c_name: &'static str,
    /// Bytes from the start of the structure.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// One structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructLayout {
    /// As C writes it: `struct xen_domctl_createdomain`, `grant_entry_v1_t`.
    pub c_type: &'static str,
    /// Bytes.
    pub size: usize,
    pub fields: &'static [FieldLayout],
}

/// What a structure holds, by the names of its fields: for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shown {
    /// An unsigned number of so many bytes.
    Unsigned(u64, usize),
    Signed(i64),
    Octets(Vec<u8>),
    List(Vec<Shown>),
    Fields(Vec<(&'static str, Shown)>),
}

/// Every structure of the ABI, and what its fields are made of.
pub trait Show {
    fn show(&self) -> Shown;
}

macro_rules! show_numbers {
    ($($t:ty => $kind:expr;)*) => {$(
        impl Show for $t {
            fn show(&self) -> Shown {
                $kind(*self)
            }
        }
    )*};
}

show_numbers! {
    u8 => |n| Shown::Unsigned(u64::from(n), 1);
    u16 => |n| Shown::Unsigned(u64::from(n), 2);
    u32 => |n| Shown::Unsigned(u64::from(n), 4);
    u64 => |n| Shown::Unsigned(n, 8);
    i8 => |n| Shown::Signed(i64::from(n));
    i16 => |n| Shown::Signed(i64::from(n));
    i32 => |n| Shown::Signed(i64::from(n));
    i64 => Shown::Signed;
}

impl<T: Show + zerocopy::IntoBytes + zerocopy::Immutable, const N: usize> Show for [T; N] {
    fn show(&self) -> Shown {
        if size_of::<T>() == 1 {
            Shown::Octets(zerocopy::IntoBytes::as_bytes(self).to_vec())
        } else {
            Shown::List(self.iter().map(Show::show).collect())
        }
    }
}

/// Declares `#[repr(C)]` structures of the ABI without implicit padding (zerocopy refuses it, so no uninitialised byte can reach the
/// hypervisor), all-zero defaults, and the table `LAYOUTS` of what the test compares.
///
/// A field that starts with `_pad`, or whose C name is given as `""`, is only counted in the size.
macro_rules! abi_structs {
    ($($(#[$m:meta])* struct $Name:ident = $c:literal {
        $($(#[$fm:meta])* $f:ident : $t:ty $(= $cf:literal)?,)*
    })*) => {
        $(
            $(#[$m])*
            #[doc = concat!("C: `", $c, "`.")]
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq,
                zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable,
            )]
            #[repr(C)]
            pub struct $Name { $($(#[$fm])* pub $f: $t,)* }

            impl Default for $Name {
                fn default() -> Self { zerocopy::FromZeros::new_zeroed() }
            }

            impl crate::layout::Show for $Name {
                fn show(&self) -> crate::layout::Shown {
                    crate::layout::Shown::Fields(vec![$((stringify!($f), self.$f.show()),)*])
                }
            }
        )*

        /// What the layout test compares with Xen's headers.
        pub static LAYOUTS: &[crate::layout::StructLayout] = &[$(
            crate::layout::StructLayout {
                c_type: $c,
                size: size_of::<$Name>(),
                fields: &[$(
                    crate::layout::FieldLayout {
                        c_name: crate::layout::c_name(stringify!($f), &[$($cf)?]),
                        offset: core::mem::offset_of!($Name, $f),
                        size: size_of::<$t>(),
                    },
                )*],
            },
        )*];
    };
}

/// Declares the ABI's numbers, and the table `NUMBERS` that the test compares with Xen's headers.
macro_rules! abi_numbers {
    ($($(#[$m:meta])* $Name:ident : $t:ty = $v:expr $(, $c:literal)?;)*) => {
        $($(#[$m])* pub const $Name: $t = $v;)*

        /// C expression and value of each number, for the test.
        pub static NUMBERS: &[(&str, i128)] = &[$(
            (crate::layout::c_name(stringify!($Name), &[$($c)?]), $Name as i128),
        )*];
    };
}

pub(crate) use {abi_numbers, abi_structs};

/// The C name of a field: the given one, else the Rust one, but none for padding.
pub(crate) const fn c_name(rust: &'static str, given: &[&'static str]) -> &'static str {
    if let [name] = given {
        return name;
    }
    let b = rust.as_bytes();
    if b.len() >= 4 && b[0] == b'_' && b[1] == b'p' && b[2] == b'a' && b[3] == b'd' {
        return "";
    }
    rust
}
