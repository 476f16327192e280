//! What ssh is to `xl migrate`, without keys and ciphers: a TCP connection between two dom0s of the lab.
//!
//! `lab-remote serve` takes connections: the first line is a shell command, which then runs with the connection as
//! its standard input and output. `lab-remote HOST COMMAND…` is the other end, for `xl migrate -s lab-remote`. It goes
//! over the lab's own switch only, and whoever reaches the port is root in dom0: nothing to use anywhere else.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};

/// Port that both ends use.
const PORT: u16 = 7600;
/// Longest command line.
const MAX_LINE: u64 = 4096;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let result = match words.split_first() {
        Some((verb, [])) if verb == "serve" => serve(),
        Some((host, command)) if !command.is_empty() => connect(host, &command.join(" ")),
        _ => {
            eprintln!("usage: lab-remote serve | lab-remote HOST COMMAND…");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-remote: {error}");
            ExitCode::from(1)
        }
    }
}

fn serve() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    loop {
        let (stream, from) = listener.accept()?;
        std::thread::spawn(move || {
            if let Err(error) = run(stream) {
                eprintln!("lab-remote: connection from {from}: {error}");
            }
        });
    }
}

/// Runs the command that the connection's first line names. What follows that line is the command's, so the line is read
/// byte by byte.
fn run(stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut line = String::new();
    BufReader::with_capacity(1, &stream).take(MAX_LINE).read_line(&mut line)?;
    let input = OwnedFd::from(stream.try_clone()?);
    let output = OwnedFd::from(stream);
    eprintln!("lab-remote: running {}", line.trim_end());
    let mut child = Command::new("sh")
        .args(["-c", line.trim_end()])
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .spawn()?;
    let status = child.wait()?;
    eprintln!("lab-remote: {} ended ({status})", line.trim_end());
    Ok(())
}

fn connect(host: &str, command: &str) -> io::Result<()> {
    let mut stream = TcpStream::connect((host, PORT))?;
    stream.set_nodelay(true)?;
    writeln!(stream, "{command}")?;
    let mut back = stream.try_clone()?;
    // The descriptors themselves: std's standard output holds back what follows the last newline, and `xl` waits for it.
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let sender = std::thread::spawn(move || {
        let sent = pump(&mut input, &mut stream);
        // The other end may have gone first; the copy below then ends too.
        let _ = stream.shutdown(Shutdown::Write);
        sent
    });
    pump(&mut back, &mut output)?;
    // The command is over; its input is of no interest any more, and standard input may never end.
    if sender.is_finished() {
        sender.join().map_err(|_| io::Error::other("the sending thread panicked"))??;
    }
    Ok(())
}

/// Copies until the end, passing on at once what comes.
fn pump(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n])?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
