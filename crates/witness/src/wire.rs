//! Ports, frames and lines between the witness and its peer.
//!
//! All numbers in a [`Frame`] are big-endian. Reports are JSON, one object a line; see [`Envelope`].

use crate::report::Envelope;

/// Version of everything in this module; an [`Envelope`] carries it as `v`.
pub const VERSION: u32 = 1;

/// Offset from the base port (`witness.port`, default [`DEFAULT_PORT`]) of each service.
///
/// | offset | proto | listens | what goes over it |
/// |---|---|---|---|
/// | 0 | UDP | peer | reports, one JSON object a datagram, at most [`MAX_DATAGRAM`] bytes |
/// | 0 | TCP | peer | reports, one JSON object a line, at most [`MAX_LINE`] bytes |
/// | 1 | TCP | peer | [`Frame`]s of kind [`FrameKind::Tcp`]; the peer sends every byte back |
/// | 2 | UDP | peer | [`Frame`]s of kind [`FrameKind::Udp`]; the peer sends every datagram back |
/// | 3 | UDP | guest, receive-only address | [`Frame`]s of kind [`FrameKind::Receive`]; never answered |
/// | 4 | UDP | guest | control: one command a datagram, see [`Command`] |
/// | 5 | TCP | guest | echo: every byte is sent back |
/// | 6 | UDP | guest | echo: every datagram is sent back to its sender |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Service {
    /// Reports, UDP and TCP.
    Report = 0,
    /// The TCP connection that the guest opens and that must survive a move.
    TcpStream = 1,
    /// The guest's UDP stream.
    UdpStream = 2,
    /// What the peer sends to the address that only receives.
    ReceiveOnly = 3,
    /// Commands to the witness.
    Control = 4,
    /// TCP echo by the guest.
    GuestTcpEcho = 5,
    /// UDP echo by the guest.
    GuestUdpEcho = 6,
}

/// Base port when `witness.port` is not given.
pub const DEFAULT_PORT: u16 = 7700;

impl Service {
    /// The port of this service for a base port.
    pub fn port(self, base: u16) -> u16 {
        base.wrapping_add(self as u16)
    }
}

/// Most bytes of JSON in one report datagram.
pub const MAX_DATAGRAM: usize = 1400;
/// Most bytes of one report line on the TCP connection, its newline included.
pub const MAX_LINE: usize = 512 * 1024;

/// Which load a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FrameKind {
    /// `WTCP`: on the guest's TCP stream.
    Tcp = 0x5754_4350,
    /// `WUDP`: on the guest's UDP stream.
    Udp = 0x5755_4450,
    /// `WRCV`: from the peer to the address that only receives.
    Receive = 0x5752_4356,
}

/// A numbered packet of [`FRAME_LEN`] bytes.
///
/// | bytes | what |
/// |---|---|
/// | 0..4 | kind |
/// | 4..8 | CRC-32 (IEEE) of bytes 8..32 |
/// | 8..16 | run: a number that the sender drew when it started |
/// | 16..24 | sequence number, from 1 |
/// | 24..32 | sender's CLOCK_MONOTONIC in nanoseconds when it sent |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which load.
    pub kind: FrameKind,
    /// The sender's run.
    pub run: u64,
    /// Sequence number, from 1, without gaps.
    pub seq: u64,
    /// Sender's CLOCK_MONOTONIC, ns.
    pub sent_ns: u64,
}

/// Length of an encoded [`Frame`].
pub const FRAME_LEN: usize = 32;

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Too few bytes.
    #[error("frame has {0} bytes, not {FRAME_LEN}")]
    Length(usize),
    /// Unknown kind.
    #[error("unknown frame kind {0:#010x}")]
    Kind(u32),
    /// The CRC does not fit.
    #[error("frame CRC is {found:#010x}, computed {computed:#010x}")]
    Crc {
        /// In the frame.
        found: u32,
        /// Over its bytes.
        computed: u32,
    },
}

fn be64(b: &[u8; FRAME_LEN], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&b[at..at + 8]);
    u64::from_be_bytes(out)
}

fn be32(b: &[u8; FRAME_LEN], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&b[at..at + 4]);
    u32::from_be_bytes(out)
}

impl Frame {
    /// The frame's bytes.
    pub fn encode(&self) -> [u8; FRAME_LEN] {
        let mut b = [0; FRAME_LEN];
        b[0..4].copy_from_slice(&(self.kind as u32).to_be_bytes());
        b[8..16].copy_from_slice(&self.run.to_be_bytes());
        b[16..24].copy_from_slice(&self.seq.to_be_bytes());
        b[24..32].copy_from_slice(&self.sent_ns.to_be_bytes());
        let crc = crc32fast::hash(&b[8..32]);
        b[4..8].copy_from_slice(&crc.to_be_bytes());
        b
    }

    /// Reads a frame from exactly [`FRAME_LEN`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
        let b: &[u8; FRAME_LEN] = bytes.try_into().map_err(|_| FrameError::Length(bytes.len()))?;
        let kind = match be32(b, 0) {
            k if k == FrameKind::Tcp as u32 => FrameKind::Tcp,
            k if k == FrameKind::Udp as u32 => FrameKind::Udp,
            k if k == FrameKind::Receive as u32 => FrameKind::Receive,
            k => return Err(FrameError::Kind(k)),
        };
        let (found, computed) = (be32(b, 4), crc32fast::hash(&b[8..32]));
        if found != computed {
            return Err(FrameError::Crc { found, computed });
        }
        Ok(Frame { kind, run: be64(b, 8), seq: be64(b, 16), sent_ns: be64(b, 24) })
    }
}

/// What the witness does on a line typed on its console, or on a datagram to its control port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `report now`: a snapshot at once.
    Report,
    /// `quiet`: all loads stop; looking goes on.
    Quiet,
    /// `resume workload`: loads start again after `quiet`.
    Resume,
    /// `stop workload and final report`: loads stop, everything is verified, [`crate::report::Final`] is sent.
    Finish,
    /// `ping`: answers `witness: pong` on the console or to the sender.
    Ping,
}

impl Command {
    /// All of them.
    pub const ALL: [Command; 5] = [Command::Report, Command::Quiet, Command::Resume, Command::Finish, Command::Ping];

    /// The command's text.
    pub fn text(self) -> &'static str {
        match self {
            Command::Report => "report now",
            Command::Quiet => "quiet",
            Command::Resume => "resume workload",
            Command::Finish => "stop workload and final report",
            Command::Ping => "ping",
        }
    }

    /// Reads a command; surrounding white space is ignored.
    pub fn parse(line: &str) -> Option<Command> {
        Command::ALL.into_iter().find(|c| c.text() == line.trim())
    }

    /// What the witness answers when it has accepted the command: on the console for a typed one, as a datagram for one
    /// that came by UDP.
    pub fn answer(self) -> &'static str {
        match self {
            Command::Report => "witness: report follows",
            Command::Quiet => "witness: loads stopped",
            Command::Resume => "witness: loads resumed",
            Command::Finish => "witness: final report follows",
            Command::Ping => "witness: pong",
        }
    }
}

/// What the witness answers on anything that is no command.
pub const UNKNOWN: &str =
    "witness: unknown command; there are: report now, quiet, resume workload, stop workload and final report, ping";

/// How a report begins.
pub const REPORT_BEGINS: &str = "{\"v\":";

/// Why a line is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Longer than [`MAX_LINE`].
    #[error("report of {0} bytes is longer than {MAX_LINE}")]
    TooLong(usize),
    /// Not the JSON of an [`Envelope`].
    #[error("not a report: {0}")]
    Json(#[from] serde_json::Error),
    /// Another version of the wire form.
    #[error("report is of version {0}, this is {VERSION}")]
    Version(u32),
    /// A line of a console without a CRC at its end.
    #[error("no CRC at the line's end")]
    NoCrc,
    /// A line of a console whose CRC does not fit.
    #[error("the line's CRC is {found:#010x}, computed {computed:#010x}")]
    Crc {
        /// In the line.
        found: u32,
        /// Over its report.
        computed: u32,
    },
}

/// A report as it goes to the console: the JSON, a space, its CRC-32 (IEEE) in eight hexadecimal digits, a newline.
///
/// JSON out of whose middle some bytes are lost may still be JSON.
pub fn console_line(report: &[u8]) -> Vec<u8> {
    let mut line = report.to_vec();
    line.extend_from_slice(format!(" {:08x}\n", crc32fast::hash(report)).as_bytes());
    line
}

/// The JSON in a line of a console, if it came whole. Other lines stand between the reports; only those that begin with
/// [`REPORT_BEGINS`] are worth trying.
pub fn from_console(line: &str) -> Result<&str, ReportError> {
    let (report, sum) = line.trim_end().rsplit_once(' ').ok_or(ReportError::NoCrc)?;
    let digits = sum.len() == 8 && sum.bytes().all(|b| b.is_ascii_hexdigit());
    let found = u32::from_str_radix(sum, 16).ok().filter(|_| digits).ok_or(ReportError::NoCrc)?;
    let computed = crc32fast::hash(report.as_bytes());
    if found != computed {
        return Err(ReportError::Crc { found, computed });
    }
    Ok(report)
}

/// Reads one report: a datagram, or a line of the TCP connection with or without its newline. A line of a console goes
/// through [`from_console`] first.
pub fn parse_report(bytes: &[u8]) -> Result<Envelope, ReportError> {
    if bytes.len() > MAX_LINE {
        return Err(ReportError::TooLong(bytes.len()));
    }
    let envelope: Envelope = serde_json::from_slice(bytes)?;
    if envelope.v != VERSION {
        return Err(ReportError::Version(envelope.v));
    }
    Ok(envelope)
}

/// Cuts a TCP report stream into lines; what comes in may be cut anywhere.
#[derive(Debug, Default)]
pub struct LineReader {
    held: Vec<u8>,
    /// True while the rest of a line that is longer than [`MAX_LINE`] is being skipped.
    skipping: bool,
    /// Lines that were dropped because they were longer than [`MAX_LINE`].
    pub dropped: u64,
}

impl LineReader {
    /// Adds what was received and returns the lines that it completed, without their newlines. Never holds more than
    /// [`MAX_LINE`] bytes.
    pub fn push(&mut self, mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
            if self.skipping || self.held.len() + line.len() >= MAX_LINE {
                self.dropped += 1;
                self.skipping = false;
                self.held.clear();
            } else {
                self.held.extend_from_slice(line);
                lines.push(std::mem::take(&mut self.held));
            }
            bytes = rest;
        }
        if !self.skipping {
            if self.held.len() + bytes.len() >= MAX_LINE {
                self.skipping = true;
                self.held.clear();
            } else {
                self.held.extend_from_slice(bytes);
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frame_round_trip_and_damage() {
        let f = Frame { kind: FrameKind::Udp, run: 7, seq: 1 << 40, sent_ns: 99 };
        let bytes = f.encode();
        assert_eq!(Frame::decode(&bytes), Ok(f));
        for at in 4..FRAME_LEN {
            let mut bad = bytes;
            bad[at] ^= 0x10;
            assert!(matches!(Frame::decode(&bad), Err(FrameError::Crc { .. })), "byte {at}");
        }
        assert!(matches!(Frame::decode(&[0; FRAME_LEN]), Err(FrameError::Kind(0))));
        assert_eq!(Frame::decode(&bytes[..31]), Err(FrameError::Length(31)));
    }

    #[test]
    fn commands_are_their_texts() {
        assert_eq!(Command::parse("  report now\r\n"), Some(Command::Report));
        assert_eq!(Command::parse("stop workload and final report"), Some(Command::Finish));
        assert_eq!(Command::parse("report"), None);
    }

    #[test]
    fn a_line_of_a_console_tells_whether_it_came_whole() {
        let report = br#"{"v":1,"text":"two words","n":123456}"#;
        let line = String::from_utf8(console_line(report)).unwrap();
        assert_eq!(from_console(&line).unwrap().as_bytes(), report);
        assert_eq!(from_console(line.trim_end()).unwrap().as_bytes(), report);
        // Still JSON, but not what was written.
        let lost = line.replace("1234", "14");
        assert!(matches!(from_console(&lost), Err(ReportError::Crc { .. })));
        for cut in [&line[..line.len() - 2], "{\"v\":1,\"text\":\"two words\"}", "{\"v\":1} +1234567", ""] {
            assert!(matches!(from_console(cut), Err(ReportError::NoCrc)), "{cut}");
        }
    }

    #[test]
    fn too_long_line_is_dropped_and_the_next_one_read() {
        let mut r = LineReader::default();
        assert!(r.push(&vec![b'x'; MAX_LINE * 2]).is_empty());
        assert_eq!(r.push(b"yy\nnext\n"), vec![b"next".to_vec()]);
        assert_eq!(r.dropped, 1);
    }

    proptest! {
        #[test]
        fn lines_survive_any_cut(lines in prop::collection::vec("[a-z]{0,40}", 0..20), cut in 1usize..17) {
            let text: String = lines.iter().map(|l| format!("{l}\n")).collect();
            let mut r = LineReader::default();
            let mut got = Vec::new();
            for part in text.as_bytes().chunks(cut) {
                got.extend(r.push(part));
            }
            prop_assert_eq!(got, lines.iter().map(|l| l.as_bytes().to_vec()).collect::<Vec<_>>());
        }

        #[test]
        fn no_bytes_make_the_readers_fail(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = from_console(&String::from_utf8_lossy(&bytes));
            let _ = Frame::decode(&bytes);
            let _ = parse_report(&bytes);
        }
    }
}
