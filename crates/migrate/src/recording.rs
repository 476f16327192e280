//! A file that holds the image of a migration as it was sent, for `ferry stream`.

use crate::trouble::{Result, Trouble};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(crate) struct Recording {
    path: PathBuf,
    file: File,
    empty: bool,
}

impl Recording {
    /// Makes the file. Only its owner may read it: the guest's memory is in it.
    ///
    /// # Errors
    /// It can't be made, or is there already: nothing is written over.
    pub(crate) fn create(path: &Path) -> Result<Recording> {
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => Ok(Recording { path: path.into(), file, empty: true }),
            Err(error) => {
                let taken = error.kind() == io::ErrorKind::AlreadyExists;
                let todo = if taken { "remove it, or name another file" } else { "name another file" };
                Err(Trouble::because(format!("make the recording {}", path.display()), error).todo(todo))
            }
        }
    }

    /// Writes what was sent last, into the kernel's cache: the guest may be paused.
    ///
    /// # Errors
    /// There is no room for it. A recording with a hole would be of no use, so the migration ends.
    pub(crate) fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.empty = false;
        self.file.write_all(bytes).map_err(|error| {
            let todo = "give a file where there is room for the guest's memory and more, or record nothing";
            Trouble::because(format!("write the recording {}", self.path.display()), error).todo(todo)
        })
    }
}

/// A migration that was refused has sent nothing, and the file would stand in the way of the next.
impl Drop for Recording {
    fn drop(&mut self) {
        if self.empty
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("the empty recording {} stays: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn nobody_else_reads_it_and_nothing_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream");
        let mut recording = Recording::create(&path).unwrap();
        recording.add(b"one ").unwrap();
        recording.add(b"two").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = Recording::create(&path).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("remove it"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"one two");
    }

    #[test]
    fn no_room_is_an_error_that_names_the_file() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut recording = Recording { path: "/dev/full".into(), file, empty: false };
        let error = recording.add(b"bytes").unwrap_err().to_string();
        assert!(error.contains("/dev/full") && error.contains("where there is room"), "{error}");
    }
}
