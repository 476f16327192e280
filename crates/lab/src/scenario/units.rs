//! Durations, sizes and rates as people write them in a scenario.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

fn split_unit(text: &str) -> Option<(f64, &str)> {
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().ok()?;
    number.is_finite().then_some((number, unit))
}

/// A duration, written with its unit: `"250us"`, `"20ms"`, `"1.5s"`, `"2m"`, `"1h"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Span(pub Duration);

impl Span {
    /// Parses the written form.
    pub fn parse(text: &str) -> Option<Span> {
        let (number, unit) = split_unit(text)?;
        let seconds = match unit {
            "us" => number / 1e6,
            "ms" => number / 1e3,
            "s" => number,
            "m" => number * 60.0,
            "h" => number * 3600.0,
            _ => return None,
        };
        Duration::try_from_secs_f64(seconds).ok().map(Span)
    }
}

/// A duration that may be negative: `"-2h"`, `"30s"`. Kept in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Skew(pub f64);

impl Skew {
    /// Parses the written form.
    pub fn parse(text: &str) -> Option<Skew> {
        let (sign, rest) = text.strip_prefix('-').map_or((1.0, text), |rest| (-1.0, rest));
        Span::parse(rest).map(|span| Skew(sign * span.0.as_secs_f64()))
    }
}

/// A number of bytes, written with its unit: `"512K"`, `"256M"`, `"2G"` (powers of 1024), or `"0"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    /// So many MiB.
    pub const fn mib(n: u64) -> Size {
        Size(n << 20)
    }

    /// In MiB, rounded down.
    pub const fn as_mib(self) -> u64 {
        self.0 >> 20
    }

    /// Parses the written form.
    pub fn parse(text: &str) -> Option<Size> {
        let (number, unit) = split_unit(text)?;
        let shift = match unit {
            "" if number == 0.0 => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            _ => return None,
        };
        let bytes = number * f64::from(1u32 << shift);
        // f64 holds whole numbers up to 2^53: 8 PiB, far above any lab.
        (bytes.fract() == 0.0 && bytes < 9e15).then_some(Size(bytes as u64))
    }
}

macro_rules! from_text {
    ($type:ty, $what:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        <$type>::parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
    };
}

from_text!(Span, "a duration with its unit, such as \"250us\", \"20ms\", \"1.5s\", \"2m\" or \"1h\"");
from_text!(Skew, "a duration with its unit and perhaps a minus, such as \"30s\" or \"-2h\"");
from_text!(Size, "a size with its unit, such as \"512K\", \"256M\" or \"2G\"");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read() {
        assert_eq!(Span::parse("250us"), Some(Span(Duration::from_micros(250))));
        assert_eq!(Span::parse("1.5s"), Some(Span(Duration::from_millis(1500))));
        assert_eq!(Span::parse("2m"), Some(Span(Duration::from_secs(120))));
        assert_eq!(Skew::parse("-2h"), Some(Skew(-7200.0)));
        assert_eq!(Size::parse("256M"), Some(Size::mib(256)));
        assert_eq!(Size::parse("0"), Some(Size(0)));
        assert_eq!(Size::parse("1.5G"), Some(Size::mib(1536)));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "5", "s", "5 s", "-5s", "1e3s", "5sec", "NaNs", "99999999999999999999999h"] {
            assert_eq!(Span::parse(text), None, "{text}");
        }
        for text in ["", "256", "M", "256MB", "-1M", "0.3K", "99999999G"] {
            assert_eq!(Size::parse(text), None, "{text}");
        }
    }
}
