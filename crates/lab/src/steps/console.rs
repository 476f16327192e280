//! From the logs that the hosts' xenconsoled wrote of one guest to the witness's lines on it.

use std::collections::BTreeMap;

use witness::wire::{REPORT_BEGINS, from_console};

/// How what the witness says besides its reports begins.
const SAYS: &str = "witness: ";

/// What was read of one guest's console so far.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Bytes read of each host's log of it.
    read: BTreeMap<String, u64>,
    /// The host whose log was read last.
    pub(super) host: Option<String>,
    /// The beginning of a line whose end has not come.
    partial: String,
    /// The beginning of a line of the witness in which a kernel message stands.
    cut: Option<String>,
}

impl Reader {
    /// Bytes of a host's log that were read already.
    pub(super) fn read(&self, host: &str) -> u64 {
        self.read.get(host).copied().unwrap_or(0)
    }

    /// Takes what came next and gives the witness's lines of which an end has come, whole or not, without the kernel's.
    pub(super) fn take(&mut self, host: &str, text: &str) -> Vec<String> {
        self.host = Some(host.to_owned());
        *self.read.entry(host.to_owned()).or_default() += text.len() as u64;
        self.partial.push_str(text);
        let Some(end) = self.partial.rfind('\n') else { return Vec::new() };
        let rest = self.partial.split_off(end + 1);
        let whole = std::mem::replace(&mut self.partial, rest);
        whole.lines().flat_map(|line| self.join(line)).collect()
    }

    /// Puts a line together again into which the kernel wrote. It writes whole lines of its own, but anywhere.
    fn join(&mut self, line: &str) -> Vec<String> {
        let stamp = if from_console(line).is_ok() { None } else { kernel_stamp(line) };
        let mut ended = Vec::new();
        if stamp == Some(0) {
            return ended;
        }
        let own = &line[..stamp.unwrap_or(line.len())];
        let begins = [REPORT_BEGINS, SAYS].iter().any(|b| {
            // The kernel may have cut the very beginning; what goes on with such a line is no beginning.
            own.starts_with(b) || stamp.is_some() && self.cut.is_none() && b.starts_with(own)
        });
        if begins {
            // Whatever was cut has no end any more.
            ended.extend(self.cut.take());
        } else if self.cut.is_none() {
            return ended;
        }
        let mut joined = self.cut.take().unwrap_or_default();
        joined.push_str(own);
        if stamp.is_some() {
            self.cut = Some(joined);
        } else {
            ended.push(joined.trim_end_matches('\r').to_owned());
        }
        ended
    }
}

/// Where in a line the kernel's time stamp stands: `[   12.345678] `.
fn kernel_stamp(line: &str) -> Option<usize> {
    line.match_indices('[').map(|(at, _)| at).find(|at| {
        let Some((stamp, _)) = line[at + 1..].split_once("] ") else { return false };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        stamp.trim_start_matches(' ').split_once('.').is_some_and(|(s, us)| digits(s) && us.len() == 6 && digits(us))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use witness::wire::console_line;

    fn report(n: u32) -> String {
        String::from_utf8(console_line(format!("{{\"v\":1,\"seq\":{n}}}").as_bytes())).unwrap().trim_end().to_owned()
    }

    #[test]
    fn the_witness_lines_are_found_between_others_and_over_two_hosts() {
        let mut reader = Reader::default();
        let (one, two) = (report(1), report(2));
        let first = format!("[    1.000001] hello\r\n{one}\r\n{}", &two[..9]);
        let second = format!("{}\r\nping\r\nwitness: pong\r\n", &two[9..]);
        assert_eq!(reader.take("a", &first), [one]);
        assert_eq!(reader.take("b", &second), [two, "witness: pong".to_owned()]);
        assert_eq!((reader.read("a"), reader.read("b")), (first.len() as u64, second.len() as u64));
    }

    #[test]
    fn a_kernel_message_within_a_line_is_taken_out() {
        let line = report(1);
        for at in 1..=line.len() {
            let mut reader = Reader::default();
            let text = format!(
                "{}[   16.729082] clocksource: skipped [x]\r\n[  117.000000] again\r\n{}\r\n{}\r\n",
                &line[..at],
                &line[at..],
                report(2)
            );
            assert_eq!(reader.take("a", &text), [line.clone(), report(2)], "cut at {at}");
        }
        let mut reader = Reader::default();
        let text = "witness: po[    1.000000] x\r\n[    2.000000] y\r\nng\r\n";
        assert_eq!(reader.take("a", text), ["witness: pong"]);
        // What looks like one but was in the report itself.
        let own = String::from_utf8(console_line(b"{\"v\":1,\"text\":\"[    1.000000] x\"}")).unwrap();
        assert_eq!(reader.take("a", &own), [own.trim_end()]);
    }

    #[test]
    fn a_line_that_a_kernel_message_cut_and_that_has_no_end_is_given_as_it_is() {
        let mut reader = Reader::default();
        let text = format!("{{\"v\":1,\"se[    1.000000] x\r\n{}\r\n", report(2));
        assert_eq!(reader.take("a", &text), ["{\"v\":1,\"se".to_owned(), report(2)]);
    }
}
