//! The lab's end of the agent's port.

use super::Output;
use anyhow::{Context, Result, anyhow, bail};
use lab_agent::PROTOCOL_VERSION;
use lab_agent::frame::{Frame, Kind};
use lab_agent::message::{Done, Failed, Hello, Request};
use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes per data frame.
const CHUNK: usize = 256 << 10;
/// How often a waiting stream looks whether the host is still alive.
const LOOK: Duration = Duration::from_millis(500);

type Streams = Arc<Mutex<HashMap<u32, mpsc::Sender<Frame>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to dom0's agent.
#[derive(Debug)]
pub struct Agent {
    host: String,
    writer: Arc<Mutex<UnixStream>>,
    streams: Streams,
    next: AtomicU32,
}

impl Agent {
    /// Connects and waits for the agent's first answer. `go_on` is asked now and then and ends the waiting by failing.
    pub fn connect(host: &str, socket: &Path, go_on: impl Fn() -> Result<()>) -> Result<Agent> {
        let stream = UnixStream::connect(socket).with_context(|| format!("{host}: connect to {}", socket.display()))?;
        let writer = Arc::new(Mutex::new(stream.try_clone().context("duplicate the agent's socket")?));
        let streams: Streams = Arc::default();
        let (hello, hellos) = mpsc::channel();
        let known = Arc::clone(&streams);
        let mut reader = stream;
        std::thread::spawn(move || {
            while let Ok(Some(frame)) = Frame::read(&mut reader) {
                if frame.stream == 0 {
                    let _ = hello.send(frame);
                    continue;
                }
                let over = matches!(frame.kind, Kind::Done | Kind::Failed);
                let number = frame.stream;
                let mut known = lock(&known);
                if let Some(stream) = known.get(&number) {
                    let _ = stream.send(frame);
                }
                if over {
                    known.remove(&number);
                }
            }
            // The senders go, and with that everyone who waits learns that the connection is gone.
            lock(&known).clear();
        });
        let mut ping = 0u32;
        let mut last = Instant::now();
        loop {
            if ping == 0 || last.elapsed() > Duration::from_secs(5) {
                ping += 1;
                last = Instant::now();
                let frame = Frame { stream: 0, kind: Kind::Ping, body: ping.to_string().into_bytes() };
                frame.write(&mut *lock(&writer)).with_context(|| format!("{host}: the agent's port"))?;
            }
            match hellos.recv_timeout(Duration::from_millis(200)) {
                Ok(frame) => {
                    let hello: Hello = serde_json::from_slice(&frame.body).context("the agent's hello")?;
                    if hello.protocol != PROTOCOL_VERSION {
                        bail!(
                            "{host}: the agent speaks protocol {}, this lab {PROTOCOL_VERSION}: build both from one tree",
                            hello.protocol
                        );
                    }
                    if !hello.nonce.is_empty() {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("{host}: the agent's port was closed"),
            }
            go_on()?;
        }
        Ok(Agent { host: host.to_owned(), writer, streams, next: AtomicU32::new(1) })
    }

    /// Opens a stream.
    pub fn open(&self, request: &Request) -> Result<Stream> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        lock(&self.streams).insert(number, sender);
        let stream = Stream { host: self.host.clone(), number, writer: Arc::clone(&self.writer), receiver };
        stream.write(&Frame::json(number, Kind::Open, request)?)?;
        Ok(stream)
    }
}

/// One request under way.
#[derive(Debug)]
pub struct Stream {
    host: String,
    number: u32,
    writer: Arc<Mutex<UnixStream>>,
    receiver: mpsc::Receiver<Frame>,
}

impl Stream {
    fn write(&self, frame: &Frame) -> Result<()> {
        frame.write(&mut *lock(&self.writer)).with_context(|| format!("{}: send to the agent", self.host))
    }

    /// Sends bytes to the program's standard input.
    pub fn send(&self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.write(&Frame { stream: self.number, kind: Kind::Data, body: chunk.to_vec() })?;
        }
        Ok(())
    }

    /// Sends bytes, then the end of the input.
    pub fn send_all(&self, bytes: &[u8]) -> Result<()> {
        self.send(bytes)?;
        self.write(&Frame::empty(self.number, Kind::End))
    }

    /// Kills the program's process group.
    pub fn kill(&self) -> Result<()> {
        self.write(&Frame::empty(self.number, Kind::Kill))
    }

    /// Tells the program's terminal its size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let [r0, r1] = rows.to_le_bytes();
        let [c0, c1] = columns.to_le_bytes();
        self.write(&Frame { stream: self.number, kind: Kind::Resize, body: vec![r0, r1, c0, c1] })
    }

    /// The next frame, or `None` when none came within `limit`.
    pub fn next(&self, limit: Duration) -> Result<Option<Frame>> {
        match self.receiver.recv_timeout(limit) {
            Ok(frame) => Ok(Some(frame)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(anyhow!("{}: the connection to dom0's agent is gone", self.host))
            }
        }
    }

    /// As [`Stream::next`], but while none comes `alive` is asked, and fails for it. If the connection breaks, `alive` is asked for a
    /// little while too: that the host is dead says more, and QEMU's socket closes before QEMU has ended.
    pub fn next_while(&self, limit: Duration, alive: impl Fn() -> Result<()>) -> Result<Option<Frame>> {
        let next = self.next(limit);
        match &next {
            Ok(Some(_)) => {}
            Ok(None) => alive()?,
            Err(_) => {
                for _ in 0..20 {
                    alive()?;
                    std::thread::sleep(LOOK / 5);
                }
            }
        }
        next
    }

    /// Collects all output until the request is over. `alive` is asked now and then and ends it by failing.
    pub fn collect(&self, alive: impl Fn() -> Result<()>) -> Result<Output> {
        let mut output = Output { done: Done::Ok, stdout: Vec::new(), stderr: Vec::new() };
        loop {
            let Some(frame) = self.next_while(LOOK, &alive)? else { continue };
            match frame.kind {
                Kind::Data => output.stdout.extend_from_slice(&frame.body),
                Kind::ErrorData => output.stderr.extend_from_slice(&frame.body),
                Kind::Done => {
                    output.done = serde_json::from_slice(&frame.body).context("the agent's answer")?;
                    return Ok(output);
                }
                Kind::Failed => {
                    let failed: Failed = serde_json::from_slice(&frame.body).context("the agent's answer")?;
                    bail!("{}: {}", self.host, failed.reason);
                }
                other => bail!("{}: the agent sent a frame of kind {other:?} on a request's stream", self.host),
            }
        }
    }
}
