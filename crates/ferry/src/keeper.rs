//! What happens when a guest that came in shuts down: `on_poweroff`, `on_reboot`, `on_crash`, `on_watchdog` of its configuration.
//!
//! On the host where a guest was created a process of `xl` does this. It ends with the guest's leaving, and stock `xl` has no
//! way to start another for a domain that exists; so ferryd does it for guests that came in, by stock `xl` commands. A
//! guest that it has started anew has a process of `xl` again, and is none of ferryd's concern.

use crate::xl_config::{self, XlConfig};
use hypervisor::{DomId, Hypervisor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use uuid::Uuid;

/// How often the guests are looked at: a few hypercalls.
const PERIOD: Duration = Duration::from_secs(1);
/// Attempts to start a guest anew, and the time between them.
const CREATE_ATTEMPTS: u32 = 5;
const CREATE_AGAIN: Duration = Duration::from_secs(2);

/// `SHUTDOWN_*` of Xen's public/sched.h.
mod reason {
    pub const POWEROFF: u8 = 0;
    pub const REBOOT: u8 = 1;
    pub const SUSPEND: u8 = 2;
    pub const CRASH: u8 = 3;
    pub const WATCHDOG: u8 = 4;
    pub const SOFT_RESET: u8 = 5;
}

/// A guest that came in; one file each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    domid: u16,
    uuid: Uuid,
    name: String,
    /// Once it has been decided to start it anew.
    restart: Option<Restart>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Restart {
    /// Its configuration for `xl create`.
    config: String,
    /// The domain that has shut down stays, under another name.
    keep_old: bool,
}

/// What became of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Runs,
    /// With Xen's reason.
    ShutDown(u8),
    /// Being destroyed.
    Dying,
    Gone,
}

/// What to do with a guest that has shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Preserve,
    Destroy,
    Restart,
    /// The old one stays under another name.
    RenameRestart,
}

/// The guests of a host that came in.
#[derive(Debug, Clone)]
pub struct Book {
    folder: PathBuf,
}

impl Book {
    /// In the daemon's folder.
    pub fn open(state: &Path) -> io::Result<Book> {
        let folder = state.join("guests");
        fs::create_dir_all(&folder)?;
        Ok(Book { folder })
    }

    fn path(&self, uuid: Uuid) -> PathBuf {
        self.folder.join(format!("{uuid}.json"))
    }

    /// It runs here now, and nobody watches it.
    pub fn add(&self, domid: u16, uuid: Uuid, name: &str) -> io::Result<()> {
        self.write(&Kept { domid, uuid, name: name.to_owned(), restart: None })
    }

    /// It has left this host, or ended.
    pub fn remove(&self, uuid: Uuid) -> io::Result<()> {
        match fs::remove_file(self.path(uuid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn write(&self, kept: &Kept) -> io::Result<()> {
        let path = self.path(kept.uuid);
        let fresh = path.with_extension("new");
        let mut file = fs::File::create(&fresh)?;
        file.write_all(&serde_json::to_vec(kept)?)?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        fs::File::open(&self.folder)?.sync_all()
    }

    fn list(&self) -> Vec<Kept> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let files = entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
        let read = |path: PathBuf| match fs::read(&path).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(kept)) => Some(kept),
            error => {
                tracing::error!("{}: {error:?}; it is left alone", path.display());
                None
            }
        };
        files.filter_map(read).collect()
    }
}

/// What the keeper sees of domains, and does to them.
trait Stock: Send + Sync + 'static {
    fn life(&self, domid: u16, uuid: Uuid) -> Result<Life, String>;
    /// Runs `xl` with these arguments.
    fn xl(&self, arguments: &[&str]) -> Result<String, String>;
    /// libxl's record of a domain's configuration.
    fn record(&self, domid: u16, uuid: Uuid) -> Result<Vec<u8>, String>;
}

struct Xl(Arc<dyn Hypervisor>);

impl Stock for Xl {
    fn life(&self, domid: u16, uuid: Uuid) -> Result<Life, String> {
        match self.0.domain_info(DomId(domid)) {
            Ok(info) if info.uuid != uuid => Ok(Life::Gone),
            Ok(info) if info.dying => Ok(Life::Dying),
            Ok(info) => Ok(info.shutdown.map_or(Life::Runs, Life::ShutDown)),
            Err(error) if error.is_no_such_domain() => Ok(Life::Gone),
            Err(error) => Err(error.to_string()),
        }
    }

    fn xl(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("xl")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("xl can't be run: {error}"))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        // One that was ended by a signal has said nothing.
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!("xl {}: {}: {}", arguments.join(" "), output.status, said.trim()))
    }

    fn record(&self, domid: u16, uuid: Uuid) -> Result<Vec<u8>, String> {
        let path = Path::new(pv_backend::records::USERDATA).join(format!("userdata-d.{domid}.{uuid}.libxl-json"));
        fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// Keeps watch; ends with the process. `busy` says of a domid that a migration has it in hand.
pub fn start(
    book: Book,
    hypervisor: Arc<dyn Hypervisor>,
    busy: impl Fn(DomId) -> bool + Send + 'static,
) -> io::Result<()> {
    let keeper = Arc::new(Keeper::new(book, Xl(hypervisor), CREATE_AGAIN));
    thread::Builder::new().name("keeper".into()).spawn(move || {
        loop {
            keeper.look(&busy);
            thread::sleep(PERIOD);
        }
    })?;
    Ok(())
}

struct Keeper<S> {
    book: Book,
    stock: S,
    /// Between two attempts to start a guest anew.
    pause: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Guests about which nothing more can be done as long as they are there: preserved, or what was tried failed.
    settled: BTreeSet<Uuid>,
    /// Guests that a thread has in hand.
    in_hand: BTreeSet<Uuid>,
}

impl<S: Stock> Keeper<S> {
    fn new(book: Book, stock: S, pause: Duration) -> Keeper<S> {
        Keeper { book, stock, pause, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to each guest that has ended, in a thread of its own: a core takes stock `xl` minutes to dump, the longer the
    /// higher the guest's last gfn is, and no other guest shall wait for that.
    fn look(self: &Arc<Self>, busy: &dyn Fn(DomId) -> bool) -> Vec<JoinHandle<()>> {
        // Before the book is read: else what a thread has just done with a guest would be done again.
        let in_hand = self.state().in_hand.clone();
        let kept = self.book.list().into_iter();
        kept.filter(|kept| !in_hand.contains(&kept.uuid) && !busy(DomId(kept.domid)))
            .filter_map(|kept| match self.stock.life(kept.domid, kept.uuid) {
                Ok(Life::Dying) => None,
                Ok(Life::Runs) => {
                    self.state().settled.remove(&kept.uuid);
                    None
                }
                Ok(life) => self.take_in_hand(kept, life),
                Err(error) => {
                    tracing::error!("guest {} ({}): {error}", kept.name, kept.domid);
                    None
                }
            })
            .collect()
    }

    fn take_in_hand(self: &Arc<Self>, kept: Kept, life: Life) -> Option<JoinHandle<()>> {
        let (keeper, uuid) = (self.clone(), kept.uuid);
        self.state().in_hand.insert(uuid);
        let work = move || {
            if let Err(error) = keeper.see_to(&kept, life) {
                tracing::error!("guest {} ({}): {error}; it is left as it is", kept.name, kept.domid);
                keeper.state().settled.insert(uuid);
            }
            keeper.state().in_hand.remove(&uuid);
        };
        match thread::Builder::new().name("guest's end".into()).spawn(work) {
            Ok(thread) => Some(thread),
            Err(error) => {
                // The next look tries again.
                tracing::error!("no thread for a guest that has ended: {error}");
                self.state().in_hand.remove(&uuid);
                None
            }
        }
    }

    fn see_to(&self, kept: &Kept, life: Life) -> Result<(), String> {
        let settled = self.state().settled.contains(&kept.uuid);
        let why = match (life, &kept.restart) {
            (Life::Dying | Life::Runs, _) => return Ok(()),
            // Destroyed by whoever.
            (Life::Gone, None) => return self.forget(kept),
            // Nothing more can be done, or a daemon before this one came so far.
            (_, _) if settled => return Ok(()),
            (Life::ShutDown(_), Some(Restart { keep_old: false, .. })) => {
                self.destroy(kept)?;
                return self.make(kept);
            }
            (_, Some(_)) => return self.make(kept),
            (Life::ShutDown(why), None) => why,
        };
        let record = self.stock.record(kept.domid, kept.uuid)?;
        let config = xl_config::parse(&record).map_err(|error| error.to_string())?;
        let Some((dump, then)) = decide(why, &config) else { return Ok(()) };
        tracing::info!("guest {} ({}) has shut down, reason {why}: {then:?}", kept.name, kept.domid);
        if dump {
            let file = format!("/var/lib/xen/dump/{}", kept.name.replace('/', "_"));
            tracing::info!("guest {} ({}): its core goes to {file} first", kept.name, kept.domid);
            // As stock xl does, whatever comes of it.
            match self.stock.xl(&["dump-core", &kept.domid.to_string(), &file]) {
                Ok(_) => tracing::info!("guest {} ({}): its core is in {file}", kept.name, kept.domid),
                Err(error) => tracing::error!("guest {} ({}): {error}", kept.name, kept.domid),
            }
        }
        match then {
            Then::Preserve => {
                self.state().settled.insert(kept.uuid);
                Ok(())
            }
            Then::Destroy => {
                self.destroy(kept)?;
                self.forget(kept)
            }
            Then::Restart | Then::RenameRestart => {
                let new = xl_config::convert(&config, then == Then::Restart).map_err(|error| error.to_string())?;
                warn_left_out(kept, &new);
                let restart = Restart { config: new.text, keep_old: then == Then::RenameRestart };
                let kept = Kept { restart: Some(restart), ..kept.clone() };
                if then == Then::Restart {
                    // On disk before the domain is gone: a daemon that is started again goes on with it.
                    self.book.write(&kept).map_err(|error| error.to_string())?;
                    self.destroy(&kept)?;
                } else {
                    let old = format!("{}-{}", kept.name, kept.domid);
                    self.stock.xl(&["rename", &kept.domid.to_string(), &old])?;
                    self.book.write(&kept).map_err(|error| error.to_string())?;
                }
                self.make(&kept)
            }
        }
    }

    fn destroy(&self, kept: &Kept) -> Result<(), String> {
        self.stock.xl(&["destroy", &kept.domid.to_string()]).map(drop)
    }

    fn forget(&self, kept: &Kept) -> Result<(), String> {
        self.state().settled.remove(&kept.uuid);
        self.book.remove(kept.uuid).map_err(|error| error.to_string())
    }

    /// Starts it anew, unless a daemon before this one has.
    fn make(&self, kept: &Kept) -> Result<(), String> {
        let Some(restart) = &kept.restart else { return Ok(()) };
        if self.stock.xl(&["domid", &kept.name]).is_err() {
            let file = self.book.path(kept.uuid).with_extension("cfg");
            fs::write(&file, &restart.config).map_err(|error| format!("{}: {error}", file.display()))?;
            let path = file.display().to_string();
            let mut made = self.stock.xl(&["create", "-q", &path]);
            // The memory of the old one may not be free yet.
            for _ in 1..CREATE_ATTEMPTS {
                if made.is_ok() {
                    break;
                }
                thread::sleep(self.pause);
                made = self.stock.xl(&["create", "-q", &path]);
            }
            // The record still has it.
            let _ = fs::remove_file(&file);
            made?;
            tracing::info!("guest {}: started anew", kept.name);
        }
        self.forget(kept)
    }
}

fn warn_left_out(kept: &Kept, config: &XlConfig) {
    if !config.left_out.is_empty() {
        tracing::warn!("guest {}: started anew without {}", kept.name, config.left_out.join(", "));
    }
}

/// Whether to dump its core, and then; `None`: it is suspended, which is somebody else's concern.
fn decide(why: u8, config: &serde_json::Value) -> Option<(bool, Then)> {
    let key = match why {
        reason::POWEROFF => "on_poweroff",
        reason::REBOOT => "on_reboot",
        reason::CRASH => "on_crash",
        reason::WATCHDOG => "on_watchdog",
        reason::SOFT_RESET => "on_soft_reset",
        reason::SUSPEND => return None,
        _ => "",
    };
    Some(match config[key].as_str() {
        Some("restart") => (false, Then::Restart),
        Some("rename_restart") => (false, Then::RenameRestart),
        Some("coredump_restart") => (true, Then::Restart),
        Some("coredump_destroy") => (true, Then::Destroy),
        // A soft reset needs the process of xl that there is not.
        Some("preserve" | "soft_reset") => (false, Then::Preserve),
        _ => (false, Then::Destroy),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::mpsc;

    const GUEST: Uuid = Uuid::from_u128(7);

    struct Fake {
        life: Mutex<Life>,
        config: serde_json::Value,
        /// Commands that fail.
        fail: Mutex<Vec<&'static str>>,
        done: Mutex<Vec<String>>,
        /// The dump of domain 5 ends when the other end of this is dropped.
        dump: Mutex<Option<mpsc::Receiver<()>>>,
    }

    impl Stock for Arc<Fake> {
        fn life(&self, _: u16, _: Uuid) -> Result<Life, String> {
            Ok(*self.life.lock().unwrap())
        }
        fn xl(&self, arguments: &[&str]) -> Result<String, String> {
            let line = arguments.join(" ");
            if arguments[0] == "create" {
                let text = fs::read_to_string(arguments[2]).unwrap();
                let name = text.lines().next().unwrap();
                self.done.lock().unwrap().push(format!("create {name}, {}", text.contains("uuid = ")));
            } else {
                self.done.lock().unwrap().push(line.clone());
            }
            if line.starts_with("dump-core 5") {
                let end = self.dump.lock().unwrap().take();
                end.map(|end| end.recv());
            }
            if arguments[0] == "destroy" {
                *self.life.lock().unwrap() = Life::Gone;
            }
            let fail = self.fail.lock().unwrap().iter().any(|f| line.starts_with(f));
            if fail { Err(format!("{line} failed")) } else { Ok(String::new()) }
        }
        fn record(&self, _: u16, _: Uuid) -> Result<Vec<u8>, String> {
            Ok(serde_json::to_vec(&self.config).unwrap())
        }
    }

    fn fake(key: &str, action: &str, life: Life) -> Arc<Fake> {
        let config = json!({
            "c_info": {"type": "pvh", "name": "g", "uuid": GUEST.to_string()},
            "b_info": {"max_vcpus": 1, "max_memkb": 262144},
            key: action,
        });
        let fail = Mutex::new(vec!["domid"]);
        Arc::new(Fake { life: Mutex::new(life), config, fail, done: Mutex::default(), dump: Mutex::default() })
    }

    fn book() -> (tempfile::TempDir, Book) {
        let folder = tempfile::tempdir().unwrap();
        let book = Book::open(folder.path()).unwrap();
        book.add(5, GUEST, "g").unwrap();
        (folder, book)
    }

    fn keeper(fake: &Arc<Fake>, book: &Book) -> Arc<Keeper<Arc<Fake>>> {
        Arc::new(Keeper::new(book.clone(), fake.clone(), Duration::from_millis(1)))
    }

    /// What was done in so many looks, each waited for.
    fn look(fake: &Arc<Fake>, book: &Book, times: u32) -> Vec<String> {
        let keeper = keeper(fake, book);
        for _ in 0..times {
            keeper.look(&|_| false).into_iter().for_each(|thread| thread.join().unwrap());
        }
        std::mem::take(&mut fake.done.lock().unwrap())
    }

    #[test]
    fn each_reason_has_its_action() {
        let create = "create name = \"g\", true".to_owned();
        let new = "create name = \"g\", false".to_owned();
        for (key, why, action, want, left) in [
            ("on_poweroff", reason::POWEROFF, "destroy", vec!["destroy 5".to_owned()], 0),
            (
                "on_reboot",
                reason::REBOOT,
                "restart",
                vec!["destroy 5".to_owned(), "domid g".to_owned(), create.clone()],
                0,
            ),
            ("on_crash", reason::CRASH, "preserve", vec![], 1),
            (
                "on_crash",
                reason::CRASH,
                "coredump_destroy",
                vec!["dump-core 5 /var/lib/xen/dump/g".to_owned(), "destroy 5".to_owned()],
                0,
            ),
            (
                "on_watchdog",
                reason::WATCHDOG,
                "rename_restart",
                vec!["rename 5 g-5".to_owned(), "domid g".to_owned(), new.clone()],
                0,
            ),
            ("on_poweroff", reason::SUSPEND, "destroy", vec![], 1),
        ] {
            let ((_folder, book), fake) = (book(), fake(key, action, Life::ShutDown(why)));
            assert_eq!(look(&fake, &book, 3), want, "{key} {action}");
            assert_eq!(book.list().len(), left, "{key} {action}");
        }
    }

    #[test]
    fn a_guest_that_runs_or_that_a_migration_has_is_left_alone() {
        let (_folder, book) = book();
        assert!(look(&fake("on_crash", "destroy", Life::Runs), &book, 2).is_empty());
        let shut = fake("on_crash", "destroy", Life::ShutDown(reason::CRASH));
        assert!(keeper(&shut, &book).look(&|dom| dom == DomId(5)).is_empty());
        assert!(shut.done.lock().unwrap().is_empty());
        assert_eq!(book.list().len(), 1);
        // One that was destroyed is forgotten.
        look(&fake("on_crash", "destroy", Life::Gone), &book, 1);
        assert!(book.list().is_empty());
    }

    #[test]
    fn a_dump_without_end_holds_up_no_other_guest() {
        let (_folder, book) = book();
        book.add(6, Uuid::from_u128(8), "h").unwrap();
        let fake = fake("on_crash", "coredump_destroy", Life::ShutDown(reason::CRASH));
        let (end, dump) = mpsc::channel();
        *fake.dump.lock().unwrap() = Some(dump);
        let keeper = keeper(&fake, &book);
        let mut threads = keeper.look(&|_| false);
        let done = || fake.done.lock().unwrap().clone();
        let waited = std::time::Instant::now();
        while !done().iter().any(|line| line == "destroy 6") {
            assert!(waited.elapsed() < Duration::from_secs(60), "{:?}", done());
            threads.extend(keeper.look(&|_| false));
            thread::sleep(Duration::from_millis(5));
        }
        assert!(!done().iter().any(|line| line == "destroy 5"), "{:?}", done());
        drop(end);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let count = |word: &str| done().iter().filter(|line| line.starts_with(word)).count();
        assert_eq!((count("dump-core 5"), count("destroy 5"), count("dump-core 6"), count("destroy 6")), (1, 1, 1, 1));
        assert!(book.list().is_empty());
    }

    #[test]
    fn a_restart_outlives_the_daemon() {
        let (_folder, book) = book();
        let fake = fake("on_reboot", "restart", Life::ShutDown(reason::REBOOT));
        fake.fail.lock().unwrap().push("create");
        let tried = look(&fake, &book, 3);
        assert_eq!(tried.iter().filter(|line| line.starts_with("create")).count(), 5, "{tried:?}");
        // The old one is gone, the new one not there; the next daemon makes it.
        fake.fail.lock().unwrap().retain(|f| *f != "create");
        assert_eq!(look(&fake, &book, 1), ["domid g", "create name = \"g\", true"]);
        assert!(book.list().is_empty());
        // One that died after it had made it does not make another.
        let restart = Some(Restart { config: "x".into(), keep_old: true });
        book.write(&Kept { domid: 5, uuid: GUEST, name: "g".into(), restart }).unwrap();
        fake.fail.lock().unwrap().clear();
        *fake.life.lock().unwrap() = Life::ShutDown(reason::REBOOT);
        assert_eq!(look(&fake, &book, 1), ["domid g"]);
        assert!(book.list().is_empty());
    }
}
