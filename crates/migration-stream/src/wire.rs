//! Little-endian fields, read from hostile bytes and written back.

use serde_json::{Map, Value};

use crate::error::ErrorKind;

/// Reads fields from the front of a body. Every failure names the field.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// A reader over a whole body.
    pub fn new(body: &'a [u8]) -> Self {
        Reader { rest: body }
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize, field: &'static str) -> Result<&'a [u8], ErrorKind> {
        match self.rest.split_at_checked(n) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(ErrorKind::TooShort { field, wanted: n, have: self.rest.len() }),
        }
    }

    /// The next field.
    pub fn get<T: Field>(&mut self, field: &'static str) -> Result<T, ErrorKind> {
        T::get(self, field)
    }

    /// A reserved field of `n` bytes, which must be zero.
    pub fn zero(&mut self, n: usize, field: &'static str) -> Result<(), ErrorKind> {
        if self.bytes(n, field)?.iter().any(|&b| b != 0) {
            return Err(ErrorKind::NotZero { field });
        }
        Ok(())
    }

    /// `count` entries of one size. The memory taken is bounded by the bytes that are really there.
    pub fn list<T: Field>(&mut self, count: usize, field: &'static str) -> Result<Vec<T>, ErrorKind> {
        let wanted = count.saturating_mul(T::SIZE);
        if wanted > self.left() {
            return Err(ErrorKind::TooShort { field, wanted, have: self.left() });
        }
        (0..count).map(|_| self.get(field)).collect()
    }

    /// A string: its length in bytes (u16), then UTF-8 without NUL.
    pub fn text(&mut self, field: &'static str) -> Result<String, ErrorKind> {
        let len: u16 = self.get(field)?;
        let bytes = self.bytes(usize::from(len), field)?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
            _ => Err(ErrorKind::BadText { field }),
        }
    }

    /// A blob: its length in bytes (u32), then the bytes.
    pub fn blob(&mut self, field: &'static str) -> Result<&'a [u8], ErrorKind> {
        let len: u32 = self.get(field)?;
        self.bytes(len as usize, field)
    }

    /// Everything that is left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// The body must end here.
    pub fn finish(self) -> Result<(), ErrorKind> {
        if self.rest.is_empty() { Ok(()) } else { Err(ErrorKind::TooLong { extra: self.rest.len() }) }
    }
}

/// Writes a string as [`Reader::text`] reads it. Longer than 65535 bytes is cut at a character's end.
pub fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut len = text.len().min(usize::from(u16::MAX));
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out.extend_from_slice(&(len as u16).to_le_bytes());
    out.extend_from_slice(&text.as_bytes()[..len]);
}

/// Writes a blob as [`Reader::blob`] reads it.
pub fn put_blob(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// A value of fixed size on the wire: integers little-endian, arrays element by element, structures field by field
/// without any padding of the compiler's.
pub trait Field: Sized {
    /// Size on the wire in bytes.
    const SIZE: usize;
    /// Reads one from the front of `reader`; `field` is its name for the error.
    fn get(reader: &mut Reader<'_>, field: &'static str) -> Result<Self, ErrorKind>;
    /// Appends it to `out`.
    fn put(&self, out: &mut Vec<u8>);
    /// The value for reports: small numbers as numbers, 64-bit values and octet strings as hexadecimal text.
    fn json(&self) -> Value;

    /// Reads one that must fill `body` exactly.
    fn decode(body: &[u8]) -> Result<Self, ErrorKind> {
        let mut reader = Reader::new(body);
        let value = Self::get(&mut reader, "body")?;
        reader.finish()?;
        Ok(value)
    }

    /// The bytes of it.
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        self.put(&mut out);
        out
    }
}

macro_rules! integer {
    ($($t:ty => $json:expr),* $(,)?) => {$(
        impl Field for $t {
            const SIZE: usize = size_of::<$t>();
            fn get(reader: &mut Reader<'_>, field: &'static str) -> Result<Self, ErrorKind> {
                let mut raw = [0; size_of::<$t>()];
                raw.copy_from_slice(reader.bytes(size_of::<$t>(), field)?);
                Ok(<$t>::from_le_bytes(raw))
            }
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn json(&self) -> Value {
                let show: fn($t) -> Value = $json;
                show(*self)
            }
        }
    )*};
}

integer! {
    u8 => |v| v.into(),
    u16 => |v| v.into(),
    u32 => |v| v.into(),
    i32 => |v| v.into(),
    i64 => |v| v.into(),
    // JSON readers that keep numbers as doubles would lose the low bits of an address.
    u64 => |v| format!("{v:#x}").into(),
}

impl<T: Field, const N: usize> Field for [T; N] {
    const SIZE: usize = T::SIZE * N;
    fn get(reader: &mut Reader<'_>, field: &'static str) -> Result<Self, ErrorKind> {
        let items = reader.list::<T>(N, field)?;
        items.try_into().map_err(|_| ErrorKind::TooShort { field, wanted: Self::SIZE, have: 0 })
    }
    fn put(&self, out: &mut Vec<u8>) {
        self.iter().for_each(|item| item.put(out));
    }
    fn json(&self) -> Value {
        if T::SIZE == 1 {
            let mut raw = Vec::with_capacity(N);
            self.put(&mut raw);
            return hex(&raw).into();
        }
        self.iter().map(Field::json).collect()
    }
}

/// Octets as hexadecimal digits, two each, no separator.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// An object from pairs, keys in the order given.
pub fn object<const N: usize>(pairs: [(&str, Value); N]) -> Value {
    Value::Object(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>())
}

/// Defines a structure whose wire form is its fields in order, with nothing between them.
macro_rules! wire_struct {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),* }

        impl $crate::wire::Field for $name {
            const SIZE: usize = 0 $(+ <$ty as $crate::wire::Field>::SIZE)*;
            fn get(
                reader: &mut $crate::wire::Reader<'_>, _: &'static str,
            ) -> Result<Self, $crate::error::ErrorKind> {
                Ok(Self { $($field: reader.get(stringify!($field))?),* })
            }
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }
            fn json(&self) -> serde_json::Value {
                $crate::wire::object([$((stringify!($field), self.$field.json())),*])
            }
        }
    };
}
pub(crate) use wire_struct;
