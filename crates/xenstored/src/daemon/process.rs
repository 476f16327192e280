//! What makes a process a daemon: into the background, a pid file, a word to systemd.

use anyhow::{Context, bail};
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Goes into the background. The process that was started stays until [`Background::ready`] and then ends with 0, or with
/// 1 if the daemon gave up before.
///
/// # Errors
/// fork(2) or pipe(2) fail.
pub fn background() -> anyhow::Result<Background> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("pipe")?;
    // SAFETY: called before any thread is started, so the child has the whole process' state.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", std::io::Error::last_os_error()),
        0 => {}
        _ => {
            drop(write);
            let mut word = [0];
            let code = if File::from(read).read(&mut word).unwrap_or(0) == 1 { 0 } else { 1 };
            std::process::exit(code);
        }
    }
    rustix::process::setsid().context("setsid")?;
    // SAFETY: as above.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", std::io::Error::last_os_error()),
        0 => {}
        _ => std::process::exit(0),
    }
    let _ = std::env::set_current_dir("/");
    Ok(Background { ready: File::from(write) })
}

/// Has the allocator give large blocks back at once: a snapshot of a large store is one, and would leave a hole of its size for good.
pub fn return_large_blocks() {
    #[cfg(target_env = "gnu")]
    for (what, bytes) in [
        (libc::M_MMAP_THRESHOLD, 1 << 20),
        // It does not follow by itself then. Smaller blocks come and go without the kernel.
        (libc::M_TRIM_THRESHOLD, 2 << 20),
    ] {
        // SAFETY: sets one number of the allocator. On failure, which there is none for such numbers, all is as it was.
        let _ = unsafe { libc::mallopt(what, bytes) };
    }
}

/// The way back to the process that was started.
#[derive(Debug)]
pub struct Background {
    ready: File,
}

impl Background {
    /// Lets it end, and gives up the terminal.
    ///
    /// # Errors
    /// /dev/null can't be opened.
    pub fn ready(mut self) -> anyhow::Result<()> {
        let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        // A log that the start script set up stays, also for the next daemon at a live update.
        if std::io::stderr().is_terminal() {
            rustix::stdio::dup2_stderr(&null)?;
        }
        let _ = self.ready.write_all(b"1");
        Ok(())
    }
}

/// Writes and locks the pid file, which must be kept open.
///
/// # Errors
/// It can't be written, or another daemon holds its lock.
pub fn pid_file(path: &Path) -> anyhow::Result<File> {
    let mut f = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("pid file {}", path.display()))?;
    if rustix::fs::fcntl_lock(&f, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("a xenstored is running already: it holds the lock of {}", path.display());
    }
    f.set_len(0)?;
    f.rewind()?;
    writeln!(f, "{}", std::process::id())?;
    Ok(f)
}

/// How often another took the processor from this thread.
pub fn times_preempted() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills a `rusage`, for which there is room; one that it does not fill is zeroed, which is one too.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_nivcsw as u64
}

/// Tells systemd, if it asked.
pub fn notify_systemd() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || -> std::io::Result<()> {
        let s = UnixDatagram::unbound()?;
        let text = path.to_string_lossy();
        match text.strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                s.connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?;
            }
            None => s.connect(&path)?,
        }
        s.send(b"READY=1")?;
        Ok(())
    };
    if let Err(e) = send() {
        tracing::warn!("systemd can't be told that the daemon is ready: {e}");
    }
}
