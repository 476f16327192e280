//! Payloads: NUL-terminated strings and what follows them.

use crate::errno::Errno;

/// The only string of a payload that must hold exactly one NUL, at its end.
pub fn one_arg(payload: &[u8]) -> Result<&[u8], Errno> {
    match payload.iter().position(|&b| b == 0) {
        Some(i) if i + 1 == payload.len() => Ok(&payload[..i]),
        _ => Err(Errno::EINVAL),
    }
}

/// Splits off the first string; the rest begins behind its NUL.
pub fn split_first(payload: &[u8]) -> Result<(&[u8], &[u8]), Errno> {
    let i = payload.iter().position(|&b| b == 0).ok_or(Errno::EINVAL)?;
    Ok((&payload[..i], &payload[i + 1..]))
}

/// All NUL-terminated strings. Bytes behind the last NUL are left out, as xenstored does.
pub fn strings(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        let (first, r) = split_first(rest).ok()?;
        rest = r;
        Some(first)
    })
}

/// Strings joined, each followed by a NUL.
pub fn join<I>(parts: I) -> Vec<u8>
where
    I: IntoIterator,
    I::Item: AsRef<[u8]>,
{
    let mut v = Vec::new();
    for p in parts {
        v.extend_from_slice(p.as_ref());
        v.push(0);
    }
    v
}

/// A number in the way of C's `atoi`, which is what existing daemons read numbers with: blanks, a sign, digits; what
/// follows is ignored, and nothing at all is 0. Values out of range become `None`.
pub fn atoi(s: &[u8]) -> Option<i64> {
    let s = s.trim_ascii_start();
    let (neg, s) = match s.first() {
        Some(b'-') => (true, &s[1..]),
        Some(b'+') => (false, &s[1..]),
        _ => (false, s),
    };
    let mut n: i64 = 0;
    for d in s.iter().take_while(|b| b.is_ascii_digit()) {
        n = n.checked_mul(10)?.checked_add(i64::from(d - b'0'))?;
    }
    Some(if neg { -n } else { n })
}

/// A strict decimal number.
pub fn decimal<T: std::str::FromStr>(s: &[u8]) -> Result<T, Errno> {
    if s.is_empty() || !s.iter().all(u8::is_ascii_digit) {
        return Err(Errno::EINVAL);
    }
    std::str::from_utf8(s).ok().and_then(|s| s.parse().ok()).ok_or(Errno::EINVAL)
}
