//! How a witness is reached: by the peer over the network, or, if it has no card, on its console in dom0, whose log is
//! read into the same records.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use witness::report::Snapshot;
use witness::wire::Command;

use super::Executor;
use super::plan::shell_word;
use crate::net::peer::{GuestView, Received};
use crate::progress;

/// How long one look into a console's log may take.
const LOOK: Duration = Duration::from_secs(20);
/// Time between two looks.
const PERIOD: Duration = Duration::from_millis(500);

/// Types a text on a guest's console.
pub(super) fn type_text(guest: &str, text: &str) -> String {
    format!(
        "d=$(xl domid {}) && t=$(xenstore-read /local/domain/$d/console/tty) && printf %s {} > \"$t\"",
        shell_word(guest),
        shell_word(text)
    )
}

impl Executor<'_> {
    fn by_console(&self, guest: &str) -> bool {
        self.lab.scenario.guest(guest).is_some_and(|g| g.witness && g.vifs.is_empty())
    }

    /// Reads what is new on a guest's console on the host where it is, after what it wrote last on the one where it was.
    pub(super) fn read_console(&mut self, guest: &str) -> Result<()> {
        if !self.by_console(guest) {
            return Ok(());
        }
        let host = self.host_of(guest)?.name();
        let before = self.consoles.get(guest).and_then(|reader| reader.host.clone());
        if let Some(before) = before.filter(|before| before != host)
            && let Err(error) = self.read_log(guest, &before)
        {
            let why = format!("the end of {guest}'s console on {before} was not seen: {error:#}");
            progress::say(&why);
            self.record(guest).console.get_or_insert_default().blind(why);
        }
        self.read_log(guest, host)
    }

    /// Reads what is new in one host's log of a guest's console.
    fn read_log(&mut self, guest: &str, on: &str) -> Result<()> {
        let host = self.host(on)?;
        let from = self.consoles.get(guest).map_or(0, |reader| reader.read(on));
        let log = shell_word(&format!("/var/log/xen/console/guest-{guest}.log"));
        // Base64 keeps the count of bytes exact whatever the guest writes.
        let ran = host.shell(&format!("tail -c +{} {log} 2>/dev/null | base64 -w0", from + 1), LOOK)?;
        let Some(bytes) = base64(ran.stdout.trim()) else {
            bail!("{guest}'s console could not be read: {}", ran.describe())
        };
        // What is no text is no report; the count stays exact, one byte for one.
        let text: String = bytes.iter().map(|b| if b.is_ascii() { char::from(*b) } else { '?' }).collect();
        let lines = self.consoles.entry(guest.to_owned()).or_default().take(on, &text);
        let (now, peer) = (self.lab.clock.now(), self.lab.peer);
        let ring = self.record(guest).console.get_or_insert_default();
        for line in lines {
            if let Some(report) = ring.take(now, on, &line) {
                peer.console_report(guest, report.as_bytes());
            }
        }
        Ok(())
    }

    /// Notes what is typed on the console of a guest that is judged by it.
    pub(super) fn note_typed(&mut self, guest: &str, text: &str) {
        if self.by_console(guest) {
            let now = self.lab.clock.now();
            self.record(guest).console.get_or_insert_default().typed(now, text);
        }
    }

    fn command_by_console(&mut self, guest: &str, command: Command) -> Result<()> {
        let host = self.host_of(guest)?;
        let text = format!("{}\n", command.text());
        self.note_typed(guest, &text);
        let ran = host.shell(&type_text(guest, &text), LOOK)?;
        if !ran.success() {
            bail!("type on {guest}'s console on {}: {}", host.name(), ran.describe());
        }
        Ok(())
    }

    /// Reads the console until something is there.
    fn until<T>(
        &mut self,
        guest: &str,
        what: &str,
        limit: Duration,
        ready: impl Fn(&GuestView) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            self.read_console(guest)?;
            let view = self.lab.peer.view().into_iter().find(|v| v.name == guest).unwrap_or_default();
            if let Some(found) = ready(&view) {
                return Ok(found);
            }
            if Instant::now() > end {
                let (limit, reports) = (limit.as_secs(), view.reports);
                bail!("guest {guest}: {what} on its console within {limit} s ({reports} reports came before)");
            }
            std::thread::sleep(PERIOD);
        }
    }

    /// Waits until a witness has sent so many further beats.
    pub(super) fn wait_beats(&mut self, guest: &str, n: u32, limit: Duration) -> Result<()> {
        if !self.by_console(guest) {
            return Ok(self.lab.peer.wait_beats(guest, n, limit)?);
        }
        // What is in the log already is not further.
        self.read_console(guest)?;
        let now = self.lab.clock.now();
        self.until(guest, "not enough reports came", limit, |view| {
            (view.beats.iter().rev().take_while(|b| b.at > now).count() >= n as usize).then_some(())
        })
    }

    /// Asks a witness for a snapshot and waits for it.
    pub(super) fn snapshot(&mut self, guest: &str) -> Result<Received<Snapshot>> {
        if !self.by_console(guest) {
            return Ok(self.lab.peer.snapshot(guest, super::SNAPSHOT_LIMIT)?);
        }
        self.read_console(guest)?;
        let asked = self.lab.clock.now();
        self.command_by_console(guest, Command::Report)?;
        self.until(guest, "no snapshot came", super::SNAPSHOT_LIMIT, |view| {
            view.snapshots.last().filter(|s| s.at > asked && s.body.reason == "asked").cloned()
        })
    }

    /// Asks a witness for its final report and waits for it.
    pub(super) fn last_report(&mut self, guest: &str, limit: Duration) -> Result<()> {
        if !self.by_console(guest) {
            return Ok(self.lab.peer.finish(guest, limit)?);
        }
        self.command_by_console(guest, Command::Finish)?;
        self.until(guest, "no final report came", limit, |view| view.last.as_ref().map(drop))
    }
}

/// Base64 without line breaks; `None` if it is none.
fn base64(text: &str) -> Option<Vec<u8>> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => Some(u32::from(c - b'A')),
        b'a'..=b'z' => Some(u32::from(c - b'a') + 26),
        b'0'..=b'9' => Some(u32::from(c - b'0') + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for four in text.as_bytes().chunks(4) {
        let digits: Vec<u32> = four.iter().take_while(|c| **c != b'=').map(|c| value(*c)).collect::<Option<_>>()?;
        if four.len() != 4 || digits.len() < 2 {
            return None;
        }
        let bits = digits.iter().fold(0, |bits, d| bits << 6 | d) << (6 * (4 - digits.len()));
        out.extend(bits.to_be_bytes().iter().skip(1).take(digits.len() - 1));
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read() {
        assert_eq!(base64("").as_deref(), Some(&b""[..]));
        assert_eq!(base64("YQ==").as_deref(), Some(&b"a"[..]));
        assert_eq!(base64("YWI=").as_deref(), Some(&b"ab"[..]));
        assert_eq!(base64("AP/+YWJj").as_deref(), Some(&b"\x00\xff\xfeabc"[..]));
        assert_eq!(base64("YQ"), None);
        assert_eq!(base64("Y*=="), None);
    }
}
