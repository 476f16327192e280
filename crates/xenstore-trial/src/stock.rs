//! The stock C xenstored, from Debian's package, on a [`FakeXen`].

use crate::fake_xen::FakeXen;
use anyhow::{Context, Result, bail};
use lab::cache::Cache;
use lab::packages::Pins;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STUB: &str = include_str!("stub.c");
const START: Duration = Duration::from_secs(20);

/// A running stock daemon. It ends with the value.
#[derive(Debug)]
pub struct Stock {
    child: Child,
    socket: PathBuf,
}

/// The programs of the packages, with the libraries of Xen's that they need.
#[derive(Debug)]
pub struct Programs {
    tree: PathBuf,
    libraries: PathBuf,
    stub: PathBuf,
}

impl Programs {
    /// Fetches the packages if need be, and compiles the stub into `work`.
    ///
    /// # Errors
    /// A package or the C compiler is missing.
    pub fn prepare(work: &Path) -> Result<Programs> {
        let tree = Pins::load()?.fetch(&Cache::open()?, "dom0")?.tree;
        let libraries = work.join("lib");
        fs::create_dir_all(&libraries).context("make the folder for libraries")?;
        // Only Xen's own: the tree's libc is not for this machine's loader.
        for entry in fs::read_dir(tree.join("usr/lib/x86_64-linux-gnu")).context("look for Xen's libraries")? {
            let entry = entry.context("look for Xen's libraries")?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("libxen") && !libraries.join(&name).exists() {
                symlink(entry.path(), libraries.join(&name)).context("link a library of Xen's")?;
            }
        }
        let source = work.join("stub.c");
        fs::write(&source, STUB).context("write the stub")?;
        let stub = work.join("stub.so");
        let out = Command::new("gcc")
            .args(["-O1", "-Wall", "-Werror", "-fPIC", "-shared", "-o"])
            .arg(&stub)
            .arg(&source)
            .output()
            .context("run gcc (is it installed?)")?;
        if !out.status.success() {
            bail!("gcc can't compile the stub: {}", String::from_utf8_lossy(&out.stderr));
        }
        Ok(Programs { tree, libraries, stub })
    }

    /// A program of the packages (`usr/bin/xenstore-ls`, `usr/lib/xen-4.17/bin/test-xenstore`), ready to be run
    /// against a daemon's socket.
    pub fn command(&self, program: &str, socket: &Path) -> Command {
        let mut c = Command::new(self.tree.join(program));
        c.env("LD_LIBRARY_PATH", &self.libraries).env("XENSTORED_PATH", socket);
        c
    }

    /// Python with the module `pyxs`, from Debian's packages, ready to be run against a daemon's socket.
    ///
    /// # Errors
    /// The package is missing.
    pub fn python_with_pyxs(&self, socket: &Path) -> Result<Command> {
        let pyxs = Pins::load()?.fetch(&Cache::open()?, "pyxs")?.tree;
        // With its package's own loader and libraries: this machine may have another Python, or none.
        let mut c = Command::new(self.tree.join("lib64/ld-linux-x86-64.so.2"));
        c.arg("--library-path").arg(self.tree.join("usr/lib/x86_64-linux-gnu")).arg(self.tree.join("usr/bin/python3"));
        c.env("PYTHONHOME", self.tree.join("usr")).env("PYTHONPATH", pyxs.join("usr/lib/python3/dist-packages"));
        c.env("PYTHONDONTWRITEBYTECODE", "1").env("XENSTORED_PATH", socket);
        Ok(c)
    }

    /// Starts the stock daemon with further arguments, and waits until it listens.
    ///
    /// # Errors
    /// It does not start; its messages are in `run/xenstored.log`.
    pub fn start_stock(&self, xen: &FakeXen, run: &Path, arguments: &[&str]) -> Result<Stock> {
        let mut c = Command::new(self.tree.join("usr/lib/xen-4.17/bin/xenstored"));
        c.arg("-N").args(arguments).env("LD_LIBRARY_PATH", &self.libraries).env("LD_PRELOAD", &self.stub);
        start(c, xen, run)
    }

    /// Starts oxenstored, for tools only: it does not connect with dom0. Its log of every request is off.
    ///
    /// # Errors
    /// As [`Programs::start_stock`].
    pub fn start_oxenstored(&self, xen: &FakeXen, run: &Path) -> Result<Stock> {
        fs::create_dir_all(run).context("make the daemon's folder")?;
        let configuration = run.join("oxenstored.conf");
        let at = run.display();
        let text = format!("pid-file = {at}/pid\nxenstored-log-file = {at}/log\npersistent = false\n");
        fs::write(&configuration, text).context("write oxenstored's configuration")?;
        let mut c = Command::new(self.tree.join("usr/lib/xen-4.17/bin/oxenstored"));
        c.args(["--no-fork", "--no-domain-init", "--no-access-log", "--config-file"]).arg(&configuration);
        c.env("LD_LIBRARY_PATH", &self.libraries).env("LD_PRELOAD", &self.stub).env("FAKE_SOCKET", run.join("socket"));
        start(c, xen, run)
    }

    /// The root of the packages.
    pub fn tree(&self) -> &Path {
        &self.tree
    }

    /// The stock daemon's path, for a live update to it.
    pub fn stock_path(&self) -> PathBuf {
        self.tree.join("usr/lib/xen-4.17/bin/xenstored")
    }

    /// Starts another daemon, with the environment that the stock one needs, so that it can hand over to that.
    ///
    /// # Errors
    /// As [`Programs::start_stock`].
    pub fn start_other(&self, program: &Path, options: &[&str], xen: &FakeXen, run: &Path) -> Result<Stock> {
        let mut c = Command::new(program);
        c.arg("-N").args(options).env("LD_LIBRARY_PATH", &self.libraries).env("LD_PRELOAD", &self.stub);
        start(c, xen, run)
    }
}

fn start(mut command: Command, xen: &FakeXen, run: &Path) -> Result<Stock> {
    fs::create_dir_all(run).context("make the daemon's folder")?;
    let log = File::create(run.join("xenstored.log")).context("make the daemon's log")?;
    let socket = run.join("socket");
    let child = command
        .env("FAKE_XEN", xen.dir())
        .env("XENSTORED_PATH", &socket)
        .env("XENSTORED_RUNDIR", run)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("share the daemon's log")?)
        .stderr(log)
        .spawn()
        .context("start the xenstored")?;
    let mut stock = Stock { child, socket };
    let end = Instant::now() + START;
    while UnixStream::connect(&stock.socket).is_err() {
        if let Some(status) = stock.child.try_wait().context("look after the xenstored")? {
            let text = fs::read_to_string(run.join("xenstored.log")).unwrap_or_default();
            bail!("the xenstored ended at once ({status}): {text}");
        }
        if Instant::now() > end {
            bail!("the xenstored does not listen on {}", stock.socket.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(stock)
}

impl Stock {
    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
