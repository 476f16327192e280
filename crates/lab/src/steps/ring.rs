//! What went through the ring of a guest's console: the reports that the witness numbers, and the commands that it answers.
//!
//! Both hosts' logs are judged as one: a report that the source's xenconsoled did not take must come from the destination's,
//! and one that it took must not come again.

use std::collections::VecDeque;
use std::time::Duration;

use witness::wire::{Command, REPORT_BEGINS, UNKNOWN, from_console, parse_report};

/// Characters of a torn line that are shown of its beginning and of its end.
const SHOWN: usize = 60;

/// A line that came as it should.
#[derive(Clone, Debug)]
pub struct Line {
    /// When the lab read it, on the run's time line.
    pub at: Duration,
    /// The host whose log it is in.
    pub host: String,
    pub bytes: u64,
    /// Of a report; an answer has none.
    pub number: Option<u64>,
}

/// Something else than that.
#[derive(Clone, Debug)]
pub struct Fault {
    pub at: Duration,
    pub what: String,
}

/// One guest's console, as far as its log was read.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    pub lines: Vec<Line>,
    pub faults: Vec<Fault>,
    /// What may have come or not, in a log that can't be read.
    pub unseen: Vec<Fault>,
    run: Option<u64>,
    /// Number of the last report.
    last: u64,
    /// Commands that were typed and not answered, the oldest first; `None` is no command.
    asked: VecDeque<(Duration, Option<Command>)>,
    /// The beginning of a line that is being typed.
    typing: String,
    /// Why the end of a log was not seen; until the next report.
    blind: Option<String>,
}

impl Ring {
    /// A text is typed on the console.
    pub(crate) fn typed(&mut self, at: Duration, text: &str) {
        self.typing.push_str(text);
        while let Some(end) = self.typing.find(['\n', '\r']) {
            let rest = self.typing.split_off(end + 1);
            let line = std::mem::replace(&mut self.typing, rest);
            if !line.trim().is_empty() {
                self.asked.push_back((at, Command::parse(&line)));
            }
        }
    }

    /// The end of a log can't be seen: what is missing until the next report may be in it.
    pub(crate) fn blind(&mut self, why: String) {
        self.asked.clear();
        self.blind = Some(why);
    }

    /// Takes a line of the witness; gives the report in it, if it is a whole one.
    pub(crate) fn take<'l>(&mut self, at: Duration, host: &str, line: &'l str) -> Option<&'l str> {
        let bytes = line.len() as u64;
        if !line.starts_with(REPORT_BEGINS) {
            if self.answered(at, host, line) {
                self.lines.push(Line { at, host: host.to_owned(), bytes, number: None });
            }
            return None;
        }
        let whole = from_console(line).and_then(|text| Ok((text, parse_report(text.as_bytes())?)));
        let (text, report) = match whole {
            Ok(whole) => whole,
            Err(error) => {
                let last = self.last;
                self.odd(at, format!("a report came torn on {host} after report {last}: {error}: {}", shown(line)));
                return None;
            }
        };
        if self.run.replace(report.run).is_some_and(|run| run != report.run) {
            // That it was started anew is judged by itself.
            self.last = 0;
        }
        self.numbered(at, host, report.seq);
        self.blind = None;
        self.lines.push(Line { at, host: host.to_owned(), bytes, number: Some(report.seq) });
        Some(text)
    }

    fn numbered(&mut self, at: Duration, host: &str, number: u64) {
        let last = self.last;
        if number <= last {
            let again = self.lines.iter().rev().any(|l| l.number == Some(number));
            let how = if again { "twice" } else { "late" };
            self.odd(at, format!("report {number} came {how}: on {host} after report {last}"));
            return;
        }
        if number > last + 1 {
            let lost = if number == last + 2 {
                format!("report {}", last + 1)
            } else {
                format!("reports {} to {}", last + 1, number - 1)
            };
            self.odd(at, format!("{lost} did not come: on {host} came {number} after {last}"));
        }
        self.last = number;
    }

    /// True if it is the answer that was due.
    fn answered(&mut self, at: Duration, host: &str, line: &str) -> bool {
        let answer = |asked: &Option<Command>| asked.map_or(UNKNOWN, Command::answer);
        let Some(due) = self.asked.iter().position(|(_, asked)| answer(asked) == line) else {
            if line == UNKNOWN || Command::ALL.into_iter().any(|c| c.answer() == line) {
                self.odd(at, format!("\"{line}\" came on {host} for nothing that was typed then"));
            }
            return false;
        };
        let passed_over: Vec<_> = self.asked.drain(..=due).take(due).collect();
        for (typed, asked) in passed_over {
            let what = asked.map_or("what was no command", Command::text);
            self.odd(
                at,
                format!(
                    "\"{what}\", typed at {:.1} s, was not answered before \"{line}\" on {host}",
                    typed.as_secs_f64()
                ),
            );
        }
        true
    }

    fn odd(&mut self, at: Duration, what: String) {
        match &self.blind {
            Some(why) => self.unseen.push(Fault { at, what: format!("{what} ({why})") }),
            None => self.faults.push(Fault { at, what }),
        }
    }
}

/// A line's beginning and end.
fn shown(line: &str) -> String {
    let count = line.chars().count();
    if count <= 2 * SHOWN {
        return line.to_owned();
    }
    let (head, tail): (String, String) =
        (line.chars().take(SHOWN).collect(), line.chars().skip(count - SHOWN).collect());
    format!("{head}…{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use witness::report::{Beat, Body, Envelope};
    use witness::wire::console_line;

    const NOW: Duration = Duration::from_secs(1);

    fn report(run: u64, seq: u64) -> String {
        let body = Body::Beat(Beat::default());
        let report = Envelope { v: witness::wire::VERSION, run, seq, mono_ns: seq, real_ns: seq, body };
        String::from_utf8(console_line(&serde_json::to_vec(&report).unwrap())).unwrap().trim_end().to_owned()
    }

    fn faults(lines: &[(&str, String)]) -> Vec<String> {
        let mut ring = Ring::default();
        for (host, line) in lines {
            ring.take(NOW, host, line);
        }
        ring.faults.into_iter().map(|f| f.what).collect()
    }

    #[test]
    fn each_report_comes_once_whole_and_at_its_turn() {
        let r = |n| report(7, n);
        let is = |lines: &[(&str, String)], want: &[&str]| assert_eq!(faults(lines), want);
        is(&[("a", r(1)), ("a", r(2)), ("b", r(3)), ("b", r(4))], &[]);
        is(&[("a", r(1)), ("b", r(3))], &["report 2 did not come: on b came 3 after 1"]);
        is(&[("a", r(1)), ("b", r(5)), ("b", r(6))], &["reports 2 to 4 did not come: on b came 5 after 1"]);
        is(&[("a", r(1)), ("a", r(2)), ("b", r(2)), ("b", r(3))], &["report 2 came twice: on b after report 2"]);
        is(&[("a", r(2))], &["report 1 did not come: on a came 2 after 0"]);
        let late = ["report 2 did not come: on b came 3 after 1", "report 2 came late: on b after report 3"];
        is(&[("a", r(1)), ("b", r(3)), ("b", r(2)), ("b", r(4))], &late);
        // Started anew.
        is(&[("a", r(1)), ("a", r(2)), ("a", report(8, 1)), ("a", report(8, 2))], &[]);
    }

    #[test]
    fn a_torn_report_is_none_and_is_named() {
        let mut ring = Ring::default();
        ring.take(NOW, "a", &report(7, 1));
        // What stays is JSON.
        let torn = report(7, 2).replace("\"up_ms\":0,", "");
        assert!(serde_json::from_str::<serde_json::Value>(torn.rsplit_once(' ').unwrap().0).is_ok());
        assert_eq!(ring.take(NOW, "b", &torn), None);
        assert_eq!(ring.take(NOW, "b", "{\"v\":1,\"run"), None);
        let said: Vec<&str> = ring.faults.iter().map(|f| f.what.as_str()).collect();
        assert!(said[0].starts_with("a report came torn on b after report 1: the line's CRC is "), "{said:?}");
        assert!(said[0].contains("{\"v\":1,\"run\":7,\"seq\":2,"), "{said:?}");
        assert_eq!(said[1], "a report came torn on b after report 1: no CRC at the line's end: {\"v\":1,\"run");
    }

    #[test]
    fn each_command_is_answered_once() {
        let said = |typed: &str, lines: &[&str]| {
            let mut ring = Ring::default();
            ring.typed(NOW, typed);
            for line in lines {
                ring.take(NOW, "b", line);
            }
            (ring.faults.into_iter().map(|f| f.what).collect::<Vec<_>>(), ring.lines.len())
        };
        let (ping, pong) = ("witness: report follows", "witness: pong");
        assert_eq!(said("report now\nping\n", &[ping, pong]), (vec![], 2));
        assert_eq!(said("rubbish\nping\n", &[UNKNOWN, pong, "witness: final: clean"]), (vec![], 2));
        let twice = said("ping\n", &[pong, pong]).0;
        assert_eq!(twice, ["\"witness: pong\" came on b for nothing that was typed then"]);
        let lost = said("report now\nping\n", &[pong]).0;
        assert_eq!(lost, ["\"report now\", typed at 1.0 s, was not answered before \"witness: pong\" on b"]);
        let torn = said("report now\n", &[UNKNOWN]).0;
        assert_eq!(torn, [format!("\"{UNKNOWN}\" came on b for nothing that was typed then")]);
    }

    #[test]
    fn what_may_be_in_a_log_that_cannot_be_read_is_not_lost() {
        let mut ring = Ring::default();
        ring.take(NOW, "a", &report(7, 1));
        ring.typed(NOW, "ping\n");
        ring.blind("a is gone".to_owned());
        ring.take(NOW, "b", &report(7, 4));
        ring.take(NOW, "b", &report(7, 6));
        let said = |faults: &[Fault]| faults.iter().map(|f| f.what.clone()).collect::<Vec<_>>();
        assert_eq!(said(&ring.unseen), ["reports 2 to 3 did not come: on b came 4 after 1 (a is gone)"]);
        assert_eq!(said(&ring.faults), ["report 5 did not come: on b came 6 after 4"]);
    }
}
