//! Where log lines go: the standard error, a file, or syslog, to be changed while running.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

enum Sink {
    Stderr,
    File(File),
    Syslog(UnixDatagram),
}

/// Handle to the log.
#[derive(Clone)]
pub struct Log {
    sink: Arc<Mutex<Sink>>,
    level: reload::Handle<LevelFilter, Registry>,
    file: Arc<Mutex<Option<PathBuf>>>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log")
    }
}

impl Log {
    /// Starts logging: to a trace file (with every request) if given, else to syslog in the background, else to the
    /// standard error.
    ///
    /// # Errors
    /// The file can't be opened.
    pub fn start(file: Option<&Path>, background: bool, verbose: bool) -> anyhow::Result<Log> {
        let sink = match file {
            Some(p) => Sink::File(open(p).map_err(|e| anyhow::anyhow!("trace file {}: {e}", p.display()))?),
            None if background => match syslog() {
                Ok(s) => Sink::Syslog(s),
                Err(_) => Sink::Stderr,
            },
            None => Sink::Stderr,
        };
        let level = if file.is_some() || verbose { LevelFilter::DEBUG } else { LevelFilter::INFO };
        let (filter, level) = reload::Layer::new(level);
        let sink = Arc::new(Mutex::new(sink));
        let log = Log { sink, level, file: Arc::new(Mutex::new(file.map(Path::to_path_buf))) };
        let fmt = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false).with_writer(log.clone());
        // A second daemon in one process (tests) logs with the first.
        let _ = tracing_subscriber::registry().with(filter).with(fmt).try_init();
        Ok(log)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sink> {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every request, or only what matters.
    pub fn trace(&self, on: bool) {
        let _ = self.level.modify(|l| *l = if on { LevelFilter::DEBUG } else { LevelFilter::INFO });
    }

    /// Goes on in another file.
    ///
    /// # Errors
    /// It can't be opened; the log stays where it is.
    pub fn switch(&self, path: &Path) -> io::Result<()> {
        let f = open(path)?;
        *self.lock() = Sink::File(f);
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_path_buf());
        self.trace(true);
        Ok(())
    }

    /// Opens the file again, which may have been moved away (SIGHUP).
    ///
    /// # Errors
    /// It can't be opened; the log stays where it is.
    pub fn reopen(&self) -> io::Result<()> {
        let path = self.file.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match path {
            Some(p) => {
                let f = open(&p)?;
                *self.lock() = Sink::File(f);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A text among the log lines.
    pub fn raw(&self, text: &str) {
        let _ = self.make_writer().write_all(text.as_bytes());
    }
}

fn open(p: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(p)
}

fn syslog() -> io::Result<UnixDatagram> {
    let s = UnixDatagram::unbound()?;
    s.connect("/dev/log")?;
    s.set_nonblocking(true)?;
    Ok(s)
}

/// Writes one line.
#[derive(Debug)]
pub struct Line<'a>(&'a Log);

impl Write for Line<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock() {
            Sink::Stderr => io::stderr().write_all(buf),
            Sink::File(f) => f.write_all(buf),
            // LOG_DAEMON | LOG_NOTICE; a full syslog must not stop the daemon.
            Sink::Syslog(s) => {
                let head = format!("<29>xenstored[{}]: ", std::process::id());
                let _ = s.send(&[head.as_bytes(), buf.trim_ascii_end()].concat());
                Ok(())
            }
        }?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}
