//! Archives in the form that the kernel takes as an initramfs ("newc", kernel documentation
//! `driver-api/early-userspace/buffer-format.rst`): a header of ASCII hex fields, the name, the data, each padded to
//! four bytes. Everything belongs to root and has no time, so that equal content gives equal archives.

use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// Writes an archive.
#[derive(Debug)]
pub struct Archive<W: Write> {
    to: W,
    at: u64,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// Begins an archive.
    pub fn new(to: W) -> Archive<W> {
        Archive { to, at: 0, inode: 0 }
    }

    /// A directory. `path` is relative to the root, here and below.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(path.as_bytes(), DIRECTORY | mode & 0o7777, (0, 0), &[])
    }

    /// A file with its content.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(path.as_bytes(), REGULAR | mode & 0o7777, (0, 0), content)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path.as_bytes(), LINK | 0o777, (0, 0), target.as_bytes())
    }

    /// A character device.
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        self.entry(path.as_bytes(), CHARACTER | mode & 0o7777, (major, minor), &[])
    }

    /// Everything under `root` for which `keep` says yes (it is asked with the path relative to `root`; a directory
    /// that is not kept is not entered).
    pub fn tree(&mut self, root: &Path, keep: &dyn Fn(&Path) -> bool) -> Result<()> {
        let mut pending = vec![PathBuf::new()];
        while let Some(directory) = pending.pop() {
            let full = root.join(&directory);
            let mut names: Vec<_> = fs::read_dir(&full)
                .and_then(|entries| {
                    entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>()
                })
                .with_context(|| format!("read {}", full.display()))?;
            names.sort();
            for name in names {
                let path = directory.join(name);
                if !keep(&path) {
                    continue;
                }
                self.existing(root, &path)?;
                if root.join(&path).symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                    pending.push(path);
                }
            }
        }
        Ok(())
    }

    fn existing(&mut self, root: &Path, path: &Path) -> Result<()> {
        let full = root.join(path);
        let meta = full.symlink_metadata().with_context(|| format!("look at {}", full.display()))?;
        let name = path.as_os_str().as_bytes();
        let mode = meta.mode() & 0o7777;
        if meta.is_dir() {
            self.entry(name, DIRECTORY | mode, (0, 0), &[])
        } else if meta.is_symlink() {
            let target = fs::read_link(&full).with_context(|| format!("read {}", full.display()))?;
            self.entry(name, LINK | 0o777, (0, 0), target.as_os_str().as_bytes())
        } else if meta.is_file() {
            let content = fs::read(&full).with_context(|| format!("read {}", full.display()))?;
            self.entry(name, REGULAR | mode, (0, 0), &content)
        } else if meta.file_type().is_fifo() || meta.file_type().is_socket() {
            Ok(())
        } else {
            bail!("{} is of a kind that does not belong into a ramdisk", full.display());
        }
    }

    fn entry(&mut self, name: &[u8], mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len()).context("a file of 4 GiB or more does not fit into a ramdisk")?;
        let name_size = u32::try_from(name.len() + 1).context("a name is too long")?;
        self.inode += 1;
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08X}"));
        }
        self.put(header.as_bytes())?;
        self.put(name)?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(content)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).context("write the ramdisk")?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, to: u64) -> Result<()> {
        let missing = self.at.next_multiple_of(to) - self.at;
        for _ in 0..missing {
            self.put(&[0])?;
        }
        Ok(())
    }

    /// Ends the archive. It is padded so that another may follow.
    pub fn finish(mut self) -> Result<W> {
        self.entry(b"TRAILER!!!", 0, (0, 0), &[])?;
        self.pad(512)?;
        self.to.flush().context("write the ramdisk")?;
        Ok(self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of the header at `at`, and where its data is.
    fn header(bytes: &[u8], at: usize) -> (Vec<u32>, usize) {
        assert_eq!(&bytes[at..at + 6], b"070701");
        let fields: Vec<u32> = (0..13)
            .map(|i| {
                let text = std::str::from_utf8(&bytes[at + 6 + i * 8..at + 14 + i * 8]).expect("ASCII");
                u32::from_str_radix(text, 16).expect("hex")
            })
            .collect();
        let data = (at + 110 + fields[11] as usize).next_multiple_of(4);
        (fields, data)
    }

    #[test]
    fn entries_lie_where_the_format_says() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev", 0o755).expect("directory");
        archive.device("dev/console", 0o600, 5, 1).expect("device");
        archive.file("init", 0o755, b"hello").expect("file");
        archive.link("sh", "init").expect("link");
        let bytes = archive.finish().expect("finish");
        assert_eq!(bytes.len() % 512, 0);

        let mut at = 0;
        let mut names = Vec::new();
        loop {
            let (fields, data) = header(&bytes, at);
            let name = String::from_utf8_lossy(&bytes[at + 110..at + 110 + fields[11] as usize - 1]).into_owned();
            let end = data + fields[6] as usize;
            match name.as_str() {
                "dev" => assert_eq!(fields[1], 0o040_755),
                "dev/console" => assert_eq!((fields[1], fields[9], fields[10]), (0o020_600, 5, 1)),
                "init" => assert_eq!((fields[1], &bytes[data..end]), (0o100_755, &b"hello"[..])),
                "sh" => assert_eq!((fields[1], &bytes[data..end]), (0o120_777, &b"init"[..])),
                _ => {}
            }
            at = end.next_multiple_of(4);
            names.push(name);
            if names.last().is_some_and(|name| name == "TRAILER!!!") {
                break;
            }
        }
        assert_eq!(names, ["dev", "dev/console", "init", "sh", "TRAILER!!!"]);
    }
}
