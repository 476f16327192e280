//! The disk load: a journal whose records are told to the peer after their fsync, and blocks rewritten with rising
//! versions, many in flight.

use crate::aio::{Aio, Blocks, Kind};
use crate::clock::mono_ns;
use crate::context::{Context, Pacer, lock};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use witness::disk::{Area, BLOCK, Record, SECTOR, journal_offset, least_size, rewrite_offset};
use witness::report::{Body, JournalAck, Noticed};

/// Blocks for each one in flight. A round rewrites one group and first reads it: a stale write that was played over a
/// resting group is found before it is overwritten.
const GROUPS: u32 = 4;

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

/// The rewritten blocks and what was acknowledged of each.
#[derive(Debug)]
pub struct Rewriter {
    path: String,
    file: File,
    aio: Aio,
    blocks: Blocks,
    seed: u64,
    depth: u32,
    /// Acknowledged version of each block; 0 before its first write, `None` after a failed write: either may be there.
    versions: Vec<Option<u64>>,
    next_group: u32,
    /// Rounds begun so far: the versions.
    rounds: u64,
}

impl Rewriter {
    fn new(path: &str, file: File, seed: u64, depth: u32) -> io::Result<Rewriter> {
        Ok(Rewriter {
            path: path.to_owned(),
            file,
            aio: Aio::new(depth)?,
            blocks: Blocks::new(depth as usize, BLOCK),
            seed,
            depth,
            versions: vec![Some(0); (depth * GROUPS) as usize],
            next_group: 0,
            rounds: 0,
        })
    }

    fn slots(&self, group: u32) -> std::ops::Range<u32> {
        group * self.depth..(group + 1) * self.depth
    }

    fn run(&mut self, ctx: &Context, kind: Kind, group: u32) -> Vec<(u32, bool)> {
        let slots: Vec<u32> = self.slots(group).collect();
        let offsets: Vec<u64> = slots.iter().map(|s| rewrite_offset(*s)).collect();
        let start = Instant::now();
        let results = self.aio.run(self.file.as_raw_fd(), kind, &mut self.blocks, &offsets);
        note_time(ctx, start);
        let op = if kind == Kind::Read { "read" } else { "write" };
        let fail = |slot: u32, error: String| {
            ctx.counters.disk_bad.add(1);
            let op = format!("{op} of {}", self.path);
            ctx.notice(Noticed::DiskError { op, offset: rewrite_offset(slot), error });
        };
        match results {
            Err(e) => {
                fail(slots.first().copied().unwrap_or(0), e.to_string());
                slots.into_iter().map(|s| (s, false)).collect()
            }
            Ok(results) => slots
                .into_iter()
                .zip(results)
                .map(|(slot, r)| {
                    let ok = r == BLOCK as i64;
                    if !ok {
                        let error = match i32::try_from(-r) {
                            Ok(errno) if errno > 0 => io::Error::from_raw_os_error(errno).to_string(),
                            _ => format!("{r} of {BLOCK} bytes"),
                        };
                        fail(slot, error);
                    }
                    (slot, ok)
                })
                .collect(),
        }
    }

    /// Reads a group and holds it against what was acknowledged.
    fn check(&mut self, ctx: &Context, group: u32) {
        let results = self.run(ctx, Kind::Read, group);
        for (i, (slot, ok)) in results.into_iter().enumerate() {
            let Some(Some(want)) = self.versions.get(slot as usize).copied() else { continue };
            if !ok || want == 0 {
                continue;
            }
            let found = match Record::decode_block(self.blocks.get(i)) {
                Ok(r) if r.area == Area::Rewrite && r.seed == self.seed && r.number == u64::from(slot) => r.version,
                _ => 0,
            };
            if found == want {
                ctx.counters.rereads.add(1);
            } else {
                ctx.counters.disk_bad.add(1);
                let area = format!("{} rewrite", self.path);
                ctx.notice(Noticed::DiskWrong { slot: slot.into(), area, want, found });
                // Reported once.
                if let Some(v) = self.versions.get_mut(slot as usize) {
                    *v = None;
                }
            }
        }
    }

    /// One round: reads a group, then writes it with the next version.
    fn round(&mut self, ctx: &Context) {
        let group = self.next_group;
        self.next_group = (group + 1) % GROUPS;
        self.check(ctx, group);
        // They rise whether the requests go well or not.
        self.rounds += 1;
        let version = self.rounds;
        for (i, slot) in self.slots(group).enumerate() {
            let record =
                Record { area: Area::Rewrite, seed: self.seed, number: slot.into(), version, mono_ns: mono_ns() };
            self.blocks.get_mut(i).copy_from_slice(&record.encode_block());
        }
        for (slot, ok) in self.run(ctx, Kind::Write, group) {
            if let Some(v) = self.versions.get_mut(slot as usize) {
                *v = ok.then_some(version);
            }
        }
        ctx.counters.rewrites.add(self.depth.into());
    }

    /// Reads all blocks.
    pub fn check_all(&mut self, ctx: &Context) {
        for group in 0..GROUPS {
            self.check(ctx, group);
        }
    }
}

fn note_time(ctx: &Context, start: Instant) {
    ctx.counters.disk_max_ms.max(u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX));
}

/// Writes a record and waits until it is on every disk.
fn write_record(files: &[File], blocks: &mut Blocks, seed: u64, record: u64) -> Result<u32, (&'static str, io::Error)> {
    let r = Record { area: Area::Journal, seed, number: record, version: 1, mono_ns: mono_ns() };
    let (sector, crc) = r.encode();
    blocks.get_mut(0).copy_from_slice(&sector);
    for file in files {
        file.write_all_at(blocks.get(0), journal_offset(record)).map_err(|e| ("journal write", e))?;
    }
    for file in files {
        file.sync_data().map_err(|e| ("journal fsync", e))?;
    }
    Ok(crc)
}

/// The disks that the settings name.
fn paths(ctx: &Context) -> Vec<String> {
    [&ctx.config.disk, &ctx.config.mirror].into_iter().filter(|path| *path != "none").cloned().collect()
}

/// Reads the records back that were written last, from each disk.
pub fn check_journals(ctx: &Context) {
    for path in paths(ctx) {
        if let Ok(file) = open(&path) {
            check_journal(ctx, &path, &file);
        }
    }
}

/// Bytes of the journal that are read at once; the journal begins and ends with one. Sector by sector, what a run of ten minutes writes
/// takes longer to read than the lab waits for the last report.
const CHUNK: usize = 64 << 10;

fn check_journal(ctx: &Context, path: &str, file: &File) {
    let mut blocks = Blocks::new(1, CHUNK);
    let told = |_| None;
    let read = witness::disk::in_chunks(CHUNK, |at, chunk| {
        file.read_exact_at(blocks.get_mut(0), at)?;
        chunk.copy_from_slice(blocks.get(0));
        Ok(())
    });
    for fault in witness::disk::check_journal(ctx.config.seed, ctx.counters.journal.get(), told, read) {
        ctx.counters.disk_bad.add(1);
        use witness::disk::JournalFault as F;
        let (record, found) = match &fault {
            F::Read { record, error } => {
                let (op, offset) = (format!("journal read of {path}"), journal_offset(*record));
                ctx.notice(Noticed::DiskError { op, offset, error: error.clone() });
                continue;
            }
            F::Lost { record, .. } | F::Changed { record, .. } => (*record, 0),
            F::Other { record, found, .. } => (*record, *found),
        };
        ctx.notice(Noticed::DiskWrong { slot: record, area: format!("{path} journal"), want: record, found });
    }
}

/// Opens a disk that is there and large enough.
fn open_disk(ctx: &Context, path: &str) -> Result<File, String> {
    let at = |e: io::Error| format!("disk: {path}: {e}");
    if !crate::boot::wait_for(path, Duration::from_secs(if crate::is_init() { 20 } else { 0 })) {
        return Err(format!("disk: {path}: no such device"));
    }
    let mut file = open(path).map_err(at)?;
    let size = file.seek(SeekFrom::End(0)).map_err(at)?;
    let least = least_size(ctx.config.depth * GROUPS);
    if size < least {
        return Err(format!("disk: {path} has {size} bytes, the load needs {least}"));
    }
    Ok(file)
}

/// Starts journal and rewrites; says why it can't. The rewriters are handed out for the last check.
pub fn start(ctx: &Arc<Context>) -> Result<Vec<Arc<Mutex<Rewriter>>>, String> {
    let paths = paths(ctx);
    let mut rewriters = Vec::new();
    for path in &paths {
        let file = open_disk(ctx, path)?;
        let rewriter = Rewriter::new(path, file, ctx.config.seed, ctx.config.depth);
        rewriters.push(Arc::new(Mutex::new(rewriter.map_err(|e| format!("disk: {path}: {e}"))?)));
    }
    if ctx.config.journal > 0 && !paths.is_empty() {
        let open = |path: &String| open(path).map_err(|e| format!("disk: {path}: {e}"));
        start_journal(ctx, paths.iter().map(open).collect::<Result<_, _>>()?);
    }
    for rewriter in &rewriters {
        if ctx.config.rewrite > 0 {
            let (c, r) = (ctx.clone(), rewriter.clone());
            crate::spawn("rewrite", move || {
                let period = Duration::from_secs(c.config.depth.into()) / c.config.rewrite;
                let mut pacer = Pacer::every(period);
                loop {
                    pacer.wait(&c);
                    lock(&r).round(&c);
                }
            });
        }
    }
    Ok(rewriters)
}

/// Starts the journal on these disks.
fn start_journal(ctx: &Arc<Context>, files: Vec<File>) {
    let c = ctx.clone();
    crate::spawn("journal", move || {
        let mut pacer = Pacer::new(c.config.journal);
        let mut blocks = Blocks::new(1, SECTOR);
        loop {
            pacer.wait(&c);
            let record = c.counters.journal.get() + 1;
            let start = Instant::now();
            let result = write_record(&files, &mut blocks, c.config.seed, record);
            note_time(&c, start);
            match result {
                Ok(crc) => {
                    c.counters.journal.set(record);
                    c.send(Body::Journal(JournalAck { record, crc }));
                }
                Err((op, e)) => {
                    c.counters.disk_bad.add(1);
                    let offset = journal_offset(record);
                    c.notice(Noticed::DiskError { op: op.into(), offset, error: e.to_string() });
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    });
}
