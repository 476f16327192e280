//! The agent's loop: finds its port, reads frames, hands each to the stream it belongs to.

use crate::{boot, exec, files, toolstack};
use anyhow::{Context, Result, anyhow};
use lab_agent::frame::{Frame, FrameError, Kind};
use lab_agent::message::{Done, Failed, Hello, Request};
use lab_agent::{PORT_NAME, PROTOCOL_VERSION};
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

/// What the reading loop tells a stream.
#[derive(Debug)]
pub enum Input {
    /// Bytes for standard input or for the file.
    Data(Vec<u8>),
    /// No more of them.
    End,
    /// Kill what runs.
    Kill,
    /// The terminal is now rows × columns.
    Resize(u16, u16),
}

/// The way back to the lab, shared by all streams.
#[derive(Clone)]
pub struct Output(Arc<Mutex<File>>);

impl Output {
    /// Sends one frame. A broken port is noticed by the reading loop, so that errors are dropped here.
    pub fn send(&self, frame: &Frame) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = frame.write(&mut *port);
    }

    /// Ends a stream.
    pub fn finish(&self, stream: u32, result: Result<Done>) {
        let frame = match result {
            Ok(done) => Frame::json(stream, Kind::Done, &done),
            Err(error) => Frame::json(stream, Kind::Failed, &Failed { reason: format!("{error:#}") }),
        };
        if let Ok(frame) = frame {
            self.send(&frame);
        }
    }

    fn hello(&self, nonce: &[u8]) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            nonce: String::from_utf8_lossy(nonce).into_owned(),
            uptime_ms: now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000,
        };
        if let Ok(frame) = Frame::json(0, Kind::Hello, &hello) {
            self.send(&frame);
        }
    }
}

/// Serves the port until it breaks for good; the error says how.
pub fn serve() -> anyhow::Error {
    match open_port() {
        Ok((reader, output)) => loop_over(reader, &output),
        Err(error) => error,
    }
}

fn open_port() -> Result<(File, Output)> {
    let path = wait_for_port()?;
    let port = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    let output = Output(Arc::new(Mutex::new(port.try_clone().context("duplicate the port")?)));
    output.hello(b"");
    Ok((port, output))
}

fn wait_for_port() -> Result<PathBuf> {
    for _ in 0..600 {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME) {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(anyhow!("no virtio-serial port is named {PORT_NAME}"))
}

fn loop_over(mut port: File, output: &Output) -> anyhow::Error {
    let streams: Arc<Mutex<HashMap<u32, mpsc::Sender<Input>>>> = Arc::default();
    loop {
        let frame = match Frame::read(&mut port) {
            Ok(Some(frame)) => frame,
            // The lab is not connected (yet).
            Ok(None) => {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            Err(FrameError::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => continue,
            Err(error) => return error.into(),
        };
        let locked = || streams.lock().unwrap_or_else(PoisonError::into_inner);
        let input = match frame.kind {
            Kind::Ping => {
                output.hello(&frame.body);
                continue;
            }
            Kind::Open => {
                let (sender, receiver) = mpsc::channel();
                locked().insert(frame.stream, sender);
                let (output, streams) = (output.clone(), Arc::clone(&streams));
                std::thread::spawn(move || {
                    let result = serde_json::from_slice(&frame.body)
                        .context("the request is not understood")
                        .and_then(|request| carry_out(request, frame.stream, &receiver, &output));
                    streams.lock().unwrap_or_else(PoisonError::into_inner).remove(&frame.stream);
                    output.finish(frame.stream, result);
                });
                continue;
            }
            Kind::Data => Input::Data(frame.body),
            Kind::End => Input::End,
            Kind::Kill => Input::Kill,
            Kind::Resize => match *frame.body.as_slice() {
                [r0, r1, c0, c1] => Input::Resize(u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1])),
                _ => continue,
            },
            Kind::Hello | Kind::ErrorData | Kind::Done | Kind::Failed => {
                boot::log(&format!("frame of kind {:?} is not for the agent", frame.kind));
                continue;
            }
        };
        // A stream that is over no longer takes input.
        if let Some(stream) = locked().get(&frame.stream) {
            let _ = stream.send(input);
        }
    }
}

fn carry_out(request: Request, stream: u32, input: &mpsc::Receiver<Input>, output: &Output) -> Result<Done> {
    match request {
        Request::Exec(program) => exec::run(&program, stream, input, output),
        Request::Put { path, mode } => files::put(&path, mode, input),
        Request::Get { path } => files::get(&path, stream, output),
        Request::Start(start) => toolstack::start(&start),
    }
}
